"""The position in a stream of ``datasets``, so that a resume opens the right file instead of reading the stream again.

An ``IterableDataset`` of ``datasets`` says where it is (``state_dict``), and can begin there. `StreamPosition` records where
each batch has ended. A position is used only if all parts of the stream are known to resume exactly, and if the batch before it
comes again, sample by sample. A shuffle buffer does not resume exactly: its contents are in no state, and it would be filled
with other samples. Such a stream is read again from its start, which is exact.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset

from hf_spot.log import warn_for_all

log = logging.getLogger("hf_spot")

_MODULE = "datasets.iterable_dataset"
_MORE = 3  # batches that may be made ahead, and two to spare
# The parts of a stream that were seen to give the same samples after a resume at every position (tests/training/data/
# test_stream_position.py), with datasets 5.2. Interleaved ones were not: of parquet files they gave others.
_EXACT = frozenset(
    (
        "ArrowExamplesIterable",
        "ExamplesIterable",
        "FilteredExamplesIterable",
        "FormattedExamplesIterable",
        "FormattingConfig",
        "HorizontallyConcatenatedMultiSourcesExamplesIterable",
        "IterableDataset",
        "MappedExamplesIterable",
        "RebatchedArrowExamplesIterable",
        "RepeatExamplesIterable",
        "SelectColumnsIterable",
        "SkipExamplesIterable",
        "TakeExamplesIterable",
        "VerticallyConcatenatedMultiSourcesExamplesIterable",
    )
)
_AT_THE_START = {"epoch": -1}  # a state is used in its own pass only
_SHUFFLES = "BufferShuffledExamplesIterable"


def why_not(loader: Any) -> str | None:
    """Return why no position of a loader's stream can be used, in words; None if it can.

    Args:
        loader: a loader of torch or accelerate.
    """
    dataset = loader.dataset
    if type(dataset).__module__ != _MODULE or not hasattr(dataset, "state_dict"):
        return f"{type(dataset).__name__} can't say where it is"
    if loader.num_workers:
        return "its DataLoader workers can't say where they are; to save the time, set dataloader_num_workers=0"
    if loader.batch_size is None:
        return "it is not batched by its DataLoader"
    unknown = sorted({type(part).__name__ for part in _parts(dataset, {}) if not _is_exact(part)})
    if _SHUFFLES in unknown:
        return "the contents of its shuffle buffer are not saved; to save the time, shuffle the files once instead"
    if any("MultiSources" in name for name in unknown):
        return "it is interleaved, and datasets reads its sources ahead of what it has given"
    return f"{unknown[0]} is not known to resume exactly" if unknown else None


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
    return type(part).__name__ in _EXACT


@dataclass
class _Place:
    """Where a batch has ended.

    Args:
        count: number of batches of this pass up to there.
        state: state of the stream.
        batch: its samples.
    """

    count: int
    state: dict[str, Any]
    batch: list[Any]


@dataclass(frozen=True)
class Resumed:
    """A stream that begins at a saved position.

    Args:
        first: number of batches of this pass before it.
        batch: digest of its first batch.
    """

    first: int
    batch: str


class StreamPosition:
    """Records the state of a stream after each batch that a loader reads.

    Args:
        ahead: number of batches that the training fetches at once.
    """

    def __init__(self, ahead: int = 1) -> None:
        self._places: deque[_Place] = deque(maxlen=ahead + _MORE)
        self._left: Any = None

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
            resumed: the result of `go_to`, if it was called: the first batch is then the one before the position.
            on_reading_again: called before the stream is read from its start after all.
        """
        if resumed is None:
            self._places.clear()
        # At once: a loader draws a seed when it is asked for its iterator.
        return self._read(loader, plain, resumed, on_reading_again, *_iterate(loader, plain))

    def _read(
        self,
        loader: Any,
        plain: Callable[[Any], Iterator[Any]],
        resumed: Resumed | None,
        on_reading_again: Callable[[], None],
        batches: Iterator[Any],
        samples: _Samples,
    ) -> Iterator[Any]:
        count = first = 0 if resumed is None else resumed.first
        while (batch := next(batches, samples)) is not samples:
            count += 1
            self._places.append(_Place(count, loader.dataset.state_dict(), samples.newest))
            if resumed is not None and count == first + 1:
                end_state(loader.dataset)  # it would hold in the next pass, too, and if it is read again
                if _digest(samples.newest) != resumed.batch:
                    tell_of_reading(loader, first, "it does not give the same samples again at its saved position")
                    on_reading_again()
                    self._left = batches  # ending it here can take forever: datasets waits for its threads
                    batches, samples = _iterate(loader, plain)
                    for _ in range(count):
                        batch = next(batches)
                    self._places.clear()
                else:
                    log.info("the stream begins at batch %d, and gives the same samples there as before", count)
            samples.newest = []
            yield batch

    def to_save(self, trained: int) -> dict[str, Any] | None:
        """Return the newest position before the next batch to train, as JSON; None if there is none.

        Args:
            trained: number of batches of this pass that were trained.
        """
        known = [one for one in self._places if one.count <= trained][-2:]
        if len(known) < 2:
            return None
        before, at = known
        return {
            "trained": trained,
            "before": [before.count, before.state],
            "at": [at.count, at.state],
            "batch": _digest(at.batch),
        }

    @staticmethod
    def go_to(loader: Any, saved: dict[str, Any]) -> Resumed | None:
        """Let the stream begin at the batch before a saved position; return what `read` needs, which proves that batch.

        Args:
            loader: the loader.
            saved: the result of `to_save`.

        Returns:
            None if the stream consists of other parts than the saved one.
        """
        dataset, (count, state) = loader.dataset, saved["before"]
        if not _fits(state, dataset.state_dict()):
            return None
        dataset.set_epoch(state["epoch"])
        dataset.load_state_dict(state)
        return Resumed(count, saved["batch"])


def end_state(dataset: Any) -> None:
    """Let the next pass over a stream that was resumed at a state begin at its start; do nothing for other data sets."""
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


def _iterate(loader: Any, plain: Callable[[Any], Iterator[Any]]) -> tuple[Iterator[Any], _Samples]:
    dataset, samples = loader.dataset, _Samples(loader.dataset)
    vars(loader)["dataset"] = samples  # the iterator keeps what it finds here
    try:
        return iter(plain(loader)), samples
    finally:
        vars(loader)["dataset"] = dataset


class _Samples(IterableDataset[Any]):
    """Gives the samples of a stream, and keeps those since `newest` was emptied."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.newest: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        for sample in self._dataset:
            # A collator may take values out of a sample.
            self.newest.append(dict(sample) if isinstance(sample, dict) else sample)
            yield sample

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_dataset"], name)


def _digest(batch: list[Any]) -> str:
    return hashlib.sha256(json.dumps(batch, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Return what `json` can write, for a tensor, an array, bytes or any other value."""
    if hasattr(value, "tolist"):
        return [str(value.dtype), value.tolist()]
    return repr(value)
