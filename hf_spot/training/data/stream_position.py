"""The position in a stream of ``datasets``, so that a resume opens the right file instead of reading the stream again.

An ``IterableDataset`` of ``datasets`` says where it is (``state_dict``), and can begin there; a shuffle buffer does so by
`hf_spot.training.data.shuffle_buffers`. `StreamPosition` records where each batch has ended, in this process or in the
DataLoader worker that made it. A position is used only if all parts of the stream are known to resume exactly, and if the
batches before it come again, sample by sample. Any other stream is read again from its start, which is exact.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor, uint8
from torch.utils.data import IterableDataset, get_worker_info

from hf_spot.log import warn_for_all
from hf_spot.training.data.rng import capture, pack, restore, unpack
from hf_spot.training.data.shuffle_buffers import (
    StreamChangedError,
    install,
    is_installed,
    state_of_stream,
    take_over_state,
)
from hf_spot.training.upstream import ITERATOR, PIN_MEMORY, PREPARE_STREAM, STREAM_SHARD

log = logging.getLogger("hf_spot")

_MODULE = "datasets.iterable_dataset"
_FORMAT = 2  # of a saved position
_MORE = 3  # batches that may be made ahead, and two to spare
# The parts of a stream that were seen to give the same samples after a resume at every position (tests/training/data/
# test_stream_position.py and test_shuffle_buffers.py), with datasets 5.2.
_EXACT = frozenset(
    (
        "ArrowExamplesIterable",
        "BufferShuffledExamplesIterable",
        "CyclingMultiSourcesExamplesIterable",
        "DistributedConfig",
        "ExamplesIterable",
        "FilteredExamplesIterable",
        "FormattedExamplesIterable",
        "FormattingConfig",
        "HorizontallyConcatenatedMultiSourcesExamplesIterable",
        "InterleavedShardsExamplesIterable",
        "IterableDataset",
        "MappedExamplesIterable",
        "RandomlyCyclingMultiSourcesExamplesIterable",
        "RebatchedArrowExamplesIterable",
        "RepeatExamplesIterable",
        "SelectColumnsIterable",
        "SkipExamplesIterable",
        "StepExamplesIterable",
        "TakeExamplesIterable",
        "VerticallyConcatenatedMultiSourcesExamplesIterable",
    )
)
_AT_THE_START = {"epoch": -1}  # a state is used in its own pass only
_SHUFFLES = "BufferShuffledExamplesIterable"
_DRAWS = (
    "it draws random numbers while its DataLoader workers read it; to save the time, draw them in the collator, or from a "
    "generator that is seeded by the sample"
)


def why_not(loader: Any) -> str | None:
    """Return why no position of a loader's stream can be used, in words; None if it can.

    Args:
        loader: a loader of torch or accelerate.
    """
    dataset = _stream_of(loader.dataset)
    if type(dataset).__module__ != _MODULE or not hasattr(dataset, "state_dict"):
        return f"{type(dataset).__name__} can't say where it is"
    if loader.batch_size is None:
        return "it is not batched by its DataLoader"
    if loader.num_workers and not getattr(loader, "in_order", True):
        return "its DataLoader workers give batches in no fixed order (in_order=False)"
    install()
    take_over_state(dataset)
    unknown = sorted({type(part).__name__ for part in _parts(dataset, {}) if not _is_exact(part)})
    if _SHUFFLES in unknown:
        return "the contents of its shuffle buffer are not known in this version of datasets"
    return f"{unknown[0]} is not known to resume exactly" if unknown else None


def _stream_of(dataset: Any) -> Any:
    """Return the stream that accelerate divides among ranks, or the data set itself."""
    return dataset.dataset if _is_shard(dataset) else dataset


def _is_shard(dataset: Any) -> bool:
    return isinstance(dataset, STREAM_SHARD.find() or ())


def batches_to_complete_with(loader: Any, group: int | None) -> int:
    """Return how many batches each worker reads at the start of a pass, because accelerate completes the last ones with them.

    Args:
        loader: the loader.
        group: number of its batches that are divided among the ranks at once; None if each rank reads its own.
    """
    workers = max(1, loader.num_workers)
    if group is not None and not loader.drop_last:
        return int(math.lcm(workers, group) // workers)
    return 1 if _is_shard(loader.dataset) and not loader.dataset.drop_last else 0


def _parts(part: Any, seen: dict[int, Any]) -> Iterator[Any]:
    """Yield the objects of ``datasets`` that a stream consists of."""
    if id(part) in seen:
        return
    seen[id(part)] = part
    if isinstance(part, list | tuple):
        for one in part:
            yield from _parts(one, seen)
    elif type(part).__module__ == _MODULE:
        yield part
        for one in vars(part).values():
            yield from _parts(one, seen)


def _is_exact(part: Any) -> bool:
    name = type(part).__name__
    return name in _EXACT and (name != _SHUFFLES or is_installed())


@dataclass
class _Place:
    """Where a batch has ended.

    Args:
        count: number of batches of this pass up to there.
        states: by worker, what it needs to continue; worker 0 is this process if there are none.
        batch: digest of its samples, or the samples.
        begins_turn: whether the first of the workers that are left makes the next batch.
    """

    count: int
    states: dict[str, Any]
    batch: Any
    begins_turn: bool


@dataclass(frozen=True)
class Resumed:
    """A stream that begins at a saved position.

    Args:
        first: number of batches of this pass before it.
        batches: digests of its first batches.
        starts: by worker, where it begins.
        again: number of batches from the start of the pass that are read first.
        again_each: number of these that each worker reads.
    """

    first: int
    batches: list[str]
    starts: dict[str, Any] = field(default_factory=dict)
    again: int = 0
    again_each: int = 0

    @property
    def passed_over(self) -> int:
        """Return how many batches fewer are read than the pass had before the position."""
        return self.first - self.again


class StreamPosition:
    """Records the state of a stream after each batch that a loader reads.

    Args:
        ahead: number of batches that the training fetches at once.
        divided: number of batches that are divided among the ranks at once; None if each rank reads its own.
    """

    def __init__(self, ahead: int = 1, divided: int | None = None) -> None:
        self._ahead, self._divided, self._group = ahead, divided, divided or 1
        self._places: deque[_Place] = deque()
        self._again: int | None = 0
        self._why: str | None = None
        self._left: Any = None

    @property
    def group(self) -> int:
        """Return the number of batches that are divided among the ranks at once, or 1."""
        return self._group

    def read(
        self,
        loader: Any,
        plain: Callable[[Any], Iterator[Any]],
        resumed: Resumed | None = None,
        on_reading_again: Callable[[], None] = lambda: None,
    ) -> Iterator[Any]:
        """Return an iterator of a loader's batches that records where each has ended.

        Args:
            loader: the loader of torch.
            plain: returns its iterator.
            resumed: result of `go_to`, if the loader begins at a position; the batches before it are left out, except those
                that complete the last ones.
            on_reading_again: called if the stream did not give the same samples there, so that it is read again from its start.
        """
        workers = max(1, loader.num_workers)
        self._places = deque(maxlen=(self._ahead * self._group + _MORE) + 2 * workers * self._group)
        self._again, self._why = (0 if resumed is None else resumed.again), None
        # Not in a generator: the loader draws the seed of its workers when it is asked for its iterator.
        random = capture()
        begun = _iterate(loader, plain, resumed)
        return self._read(loader, plain, resumed, on_reading_again, begun, random)

    def _read(
        self,
        loader: Any,
        plain: Callable[[Any], Iterator[Any]],
        resumed: Resumed | None,
        on_reading_again: Callable[[], None],
        begun: tuple[Iterator[Any], _Samples],
        random: dict[str, Any],
    ) -> Iterator[Any]:
        batches, samples = begun
        again = 0 if resumed is None else resumed.again
        count = 0 if again or resumed is None else resumed.first
        to_prove = [] if resumed is None else list(resumed.batches)
        states: dict[str, Any] = {} if resumed is None else dict(resumed.starts)
        each = batches_to_complete_with(loader, self._divided)
        turn, last = 0, -1
        while True:
            try:
                given = next(batches, samples)
            except StreamChangedError as error:
                if not to_prove or resumed is None:
                    raise
                log.info("%s", error)
                given, to_prove = _Made(None, 0, {}, None), ["other samples"]
            if given is samples:
                return
            count += 1
            if isinstance(given, _Made):
                worker, batch = given.worker, given.batch
                states = {**states, str(worker): given.state}
                self._why = _DRAWS if given.state is None else None
            else:
                worker, batch = 0, given
                given = _Made(None, 0, {}, samples.newest)
                states = {"0": {"state": samples.state()}}
            is_again = resumed is not None and count <= again and again > 0
            if worker <= last:
                turn += 1
                if self._places:
                    self._places[-1].begins_turn = True
            last = worker
            if resumed is None and turn < each:
                self._again = count
            if is_again and resumed is not None:
                if count == again:
                    count, again, last = resumed.first, 0, -1
                    states = dict(resumed.starts)
            else:
                self._places.append(_Place(count, states, given.samples, begins_turn=loader.num_workers == 0))
                if to_prove and resumed is not None:
                    if _as_digest(given.samples) != to_prove.pop(0):
                        tell_of_reading(loader, resumed.first, "it does not give the same samples again at its saved position")
                        on_reading_again()
                        self._left = batches  # ending it here can take forever: datasets waits for its threads
                        batches, samples, batch = self._begin_again(loader, plain, random, count)
                        resumed, to_prove, again = None, [], 0
                        turn, last, states = 0, -1, {}
                    elif not to_prove:
                        log.info("the stream begins at batch %d, and gives the same samples there as before", resumed.first + 1)
            samples.newest = []
            yield batch

    def _begin_again(
        self, loader: Any, plain: Callable[[Any], Iterator[Any]], random: dict[str, Any], count: int
    ) -> tuple[Iterator[Any], _Samples, Any]:
        """Return an iterator that has read so many batches from the start, and the newest of them."""
        now = capture()
        restore(random)  # the seed of the workers is drawn a second time
        if loader.num_workers:
            ITERATOR.set(loader, None)
        batches, samples = _iterate(loader, plain, None)
        if loader.num_workers:
            restore(now)
        batch = None
        for _ in range(count):
            batch = next(batches)
        self._places.clear()
        self._again = None  # which batches were the first ones is not known here
        return batches, samples, batch.batch if isinstance(batch, _Made) else batch

    def to_save(self, trained: int) -> dict[str, Any] | None:
        """Return the newest position before the next batch to train, as JSON; None if there is none.

        Args:
            trained: number of batches of this pass that were trained.
        """
        if self._why is not None:
            return {"format": _FORMAT, "trained": trained, "why": self._why}
        known = [one for one in self._places if one.count <= trained]
        if not known or known[-1].count != trained:
            return None
        usable = [one for one in known[:-1] if one.begins_turn and one.count % self._group == 0]
        if not usable or self._again is None or usable[-1].count <= self._again or self._again % self._group:
            return None
        before = usable[-1]
        return {
            "format": _FORMAT,
            "trained": trained,
            "before": [before.count, before.states],
            "at": [trained],
            "batches": [_as_digest(one.batch) for one in known if one.count > before.count],
            "again": self._again,
        }

    def go_to(self, loader: Any, saved: dict[str, Any]) -> Resumed | None:
        """Return what `read` needs to begin at the batch before a saved position, which proves it.

        Args:
            loader: the loader.
            saved: the result of `to_save`.

        Returns:
            None if the stream consists of other parts than the saved one, or is read by another number of workers.
        """
        if saved.get("format") != _FORMAT or "why" in saved:  # of an older version, or a reason
            return None
        dataset, (count, states) = _stream_of(loader.dataset), saved["before"]
        if any(int(worker) >= max(1, loader.num_workers) for worker in states):
            return None
        dataset.set_epoch(next(iter(states.values()))["state"]["epoch"])
        if not loader.num_workers:
            PREPARE_STREAM.of(dataset)()  # its state was made before shuffle buffers said where they are
            if not _fits(states["0"]["state"], state_of_stream(dataset)):
                return None
        each = batches_to_complete_with(loader, self._divided)
        if bool(each) != bool(saved["again"]):
            return None
        return Resumed(count, saved["batches"], states, saved["again"], each)


def end_state(dataset: Any) -> None:
    """Let the next pass over a stream that was resumed at a state begin at its start; do nothing for other data sets."""
    dataset = _stream_of(dataset)
    if type(dataset).__module__ == _MODULE and hasattr(dataset, "load_state_dict"):
        dataset.load_state_dict(_AT_THE_START)


def _fits(state: Any, now: Any) -> bool:
    """Return whether a stream can take a state, given its current one: parts that are not begun yet are None."""
    if isinstance(state, dict) and isinstance(now, dict):
        same = state.get("type") == now.get("type")
        return same and all(name in now and _fits(value, now[name]) for name, value in state.items())
    if isinstance(state, list) and isinstance(now, list):
        return len(state) == len(now) and all(map(_fits, state, now))
    return True


def tell_of_reading(loader: Any, batches: int, why: str) -> None:
    """Say that a stream is read again from its start, and what that costs.

    Args:
        loader: its loader.
        batches: number of batches that are read again.
        why: the reason, in words.
    """
    size = getattr(loader, "batch_size", None)
    warn_for_all(
        "the stream is read again from its start to batch %d%s, which is exact and takes as long as it took before: %s",
        batches,
        f" ({batches * size} samples)" if size else "",
        why,
    )


def _iterate(loader: Any, plain: Callable[[Any], Iterator[Any]], resumed: Resumed | None) -> tuple[Iterator[Any], _Samples]:
    dataset, collate = loader.dataset, loader.collate_fn
    is_shard = _is_shard(dataset)
    ranks = dataset.num_processes if is_shard else 1
    samples: Any = _Samples(_stream_of(dataset), loader.batch_size * ranks, resumed)
    given = copy.copy(dataset) if is_shard else samples
    if is_shard:
        given.dataset = samples
    vars(loader)["dataset"] = given  # the iterator keeps what it finds here
    if loader.num_workers:
        vars(loader)["collate_fn"] = _Collator(collate, samples)
    try:
        return iter(plain(loader)), samples
    finally:
        vars(loader)["dataset"], vars(loader)["collate_fn"] = dataset, collate


class _Samples(IterableDataset[Any]):
    """Gives the samples of a stream, and keeps those since `newest` was emptied. It is copied to DataLoader workers.

    Args:
        dataset: the stream.
        batch_size: number of samples that make a batch of its loader.
        resumed: where it begins; None for the start.
    """

    def __init__(self, dataset: Any, batch_size: int, resumed: Resumed | None) -> None:
        self._dataset = dataset
        self._starts = {} if resumed is None else dict(resumed.starts)
        self.again = 0 if resumed is None else resumed.again_each * batch_size
        self.newest: list[Any] = []
        self.random = b""
        self._left: Any = None

    def __iter__(self) -> Iterator[Any]:
        install()  # a worker may be a new Python
        info = get_worker_info()
        start = self._starts.pop(str(info.id if info else 0), None)
        self.random = pack(capture()) if info else b""
        if start is None:
            yield from self._kept(self._dataset)
            return
        if self.again:
            self._left = iter(self._dataset)  # ending it here can take forever: datasets waits for its threads
            yield from self._kept(islice(self._left, self.again))
        yield from self._kept(_begun_at(self._dataset, start, in_worker=info is not None))

    def state(self) -> dict[str, Any]:
        """Return the state of the stream."""
        return state_of_stream(self._dataset)

    def _kept(self, samples: Any) -> Iterator[Any]:
        for sample in samples:
            # A collator may take values out of a sample.
            self.newest.append(dict(sample) if isinstance(sample, dict) else sample)
            yield sample

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.__dict__["_dataset"], name)


def _begun_at(dataset: Any, start: dict[str, Any], *, in_worker: bool) -> Iterator[Any]:
    """Yield the samples of a stream from a state on, with the random states of that time."""
    if "random" in start:
        restore(unpack(base64.b64decode(start["random"])))
    state = start["state"]
    if in_worker:
        # The whole stream is prepared before a worker takes its part, and can't take the state of a part.
        plain = PREPARE_STREAM.of(dataset)

        def prepare(*args: Any, **kwargs: Any) -> Any:
            end_state(dataset)
            try:
                return plain(*args, **kwargs)
            finally:
                dataset.load_state_dict(state)

        PREPARE_STREAM.set(dataset, prepare)
    dataset.load_state_dict(state)
    samples = iter(dataset)
    try:
        first = list(islice(samples, 1))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        # If it is an error of the data, it comes again when they are read from their start.
        raise StreamChangedError(f"the stream can't take its saved state: {error!r}") from error
    finally:
        end_state(dataset)  # it would hold in the next pass, too, and if it is read again
        if in_worker:
            PREPARE_STREAM.restore(dataset)
    yield from first
    yield from samples


class _Made:
    """A batch that a worker has made, and where it is then.

    Args:
        batch: the batch.
        worker: number of the worker.
        state: what that needs to continue; None if it can't.
        samples: digest of the samples.
    """

    def __init__(self, batch: Any, worker: int, state: dict[str, Any] | None, samples: Any) -> None:
        self.batch, self.worker, self.state, self.samples = batch, worker, state, samples

    def pin_memory(self, device: str | None = None) -> _Made:
        """Pin the memory of the batch: torch calls this for what is no tensor."""
        return _Made(PIN_MEMORY.find()(self.batch, device), self.worker, self.state, self.samples)


class _Collator:
    """Replaces a loader's collator in its workers.

    Args:
        plain: the collator itself.
        samples: of the worker.
    """

    def __init__(self, plain: Any, samples: _Samples) -> None:
        self._plain, self._samples = plain, samples

    def __call__(self, batch: list[Any]) -> _Made:
        """Return the batch, and where the worker is."""
        samples, info = self._samples, get_worker_info()
        assert info is not None
        digest, samples.newest = _digest(samples.newest), []
        has_drawn = pack(capture()) != samples.random
        made = self._plain(batch)
        samples.random = pack(capture())
        random = base64.b64encode(samples.random).decode()
        state = None if has_drawn else {"state": samples.state(), "random": random}
        return _Made(made, info.id, state, digest)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["_plain"], name)


def _as_digest(batch: Any) -> str:
    return batch if isinstance(batch, str) else _digest(batch)


def _digest(batch: list[Any]) -> str:
    return hashlib.sha256(json.dumps(batch, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Return what `json` can write, for a tensor, an array, an image, bytes or any other value."""
    if isinstance(value, bytes | bytearray):
        return hashlib.sha256(value).hexdigest()
    names = ("dtype", "shape") if hasattr(value, "dtype") else ("mode", "size")
    about = [str(getattr(value, name, "")) for name in names]
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous().flatten().view(uint8).numpy() if value.numel() else value.numpy()
    if hasattr(value, "tobytes"):  # an image or an array; a list of its numbers would take a thousand times as long
        return [*about, hashlib.sha256(value.tobytes()).hexdigest()]
    return repr(value)
