"""One iteration of a DataLoader: counts its batches, and resumes at the position that another process saved.

A resumed iteration begins with the random states that the original one began with, skips trained batches without loading them,
and returns the rest. `hf_spot.training.data.loaders` keeps track of all iterations.
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import BatchSampler, IterableDataset

from hf_spot.log import warn_for_all
from hf_spot.training.data.first_batch import FirstBatch
from hf_spot.training.data.rng import capture, capture_gpus, restore, set_states, states_of
from hf_spot.training.data.stream_position import Resumed, StreamPosition, end_state, why_not
from hf_spot.training.data.worker_states import WorkerStates
from hf_spot.training.upstream import DISPATCHER, INDEX_SAMPLER, INSIDE, ITERATION, ITERATOR, SHARD_GENERATOR, SPLIT_BATCHES

_MOST_AHEAD = 4096  # batches that workers have drawn, and nobody has been given


def stateful_loader() -> type | None:
    """Return torchdata's ``StatefulDataLoader``; None if the script has not imported it."""
    module = sys.modules.get("torchdata.stateful_dataloader")
    return None if module is None else vars(module).get("StatefulDataLoader")


class IterationOwner(Protocol):
    """The part of `hf_spot.training.data.loaders.Loaders` that an iteration needs."""

    @property
    def ranks(self) -> int:
        """Return the number of ranks."""

    @property
    def handed_out(self) -> int:
        """Return the number of batches that all loaders have returned so far."""

    def hands_out(self, iteration: TrackedIteration, indices: Any) -> int:
        """Count a batch that is returned to the training, and return its number.

        Args:
            iteration: the one that returns it.
            indices: of its samples on this rank; None if unknown.
        """

    def take_now(self) -> dict[str, Any] | None:
        """Return the random states to resume with, once, to the first iteration that reaches its saved position."""

    def from_main(self, value: Any) -> Any:
        """Return what rank 0 has given. Every rank must call it."""

    def drive(self, iteration: TrackedIteration | None) -> TrackedIteration | None:
        """Set the active iteration, to which accelerate's inner loader belongs; return the previous one."""


class TrackedLoader:
    """Keeps track of a loader that has been iterated, by a weak reference.

    Args:
        loader: a loader of torch or accelerate.
        order: number of its first iteration among the first iterations of all loaders.
        workers: the random states of its workers.
        at_once: number of batches of torch's loader that one rank fetches at once, for all ranks; 1 if each fetches its own.
    """

    def __init__(self, loader: Any, order: int, workers: WorkerStates, at_once: int = 1) -> None:
        self._loader = weakref.ref(loader)
        self.order = order
        self.at_once = at_once
        self.is_read_for_all = isinstance(loader, DISPATCHER.find() or ())
        self.kind = _kind(loader)
        self.workers = workers
        self.begun = 0
        self.newest: Callable[[], TrackedIteration | None] = lambda: None
        self.newest_made: list[int] = [0]
        self.made_before = 0
        kind = stateful_loader()
        self.is_stateful = kind is not None and isinstance(loader, kind)
        # Such a loader restores its workers itself.
        self.workers_count: int = 0 if self.is_stateful else loader.num_workers
        self.persistent = bool(loader.persistent_workers) and not self.is_stateful
        self.workers_are_shifted = False
        self.generators = _generators(loader)

    def restore(self, begun: int, workers: WorkerStates) -> None:
        """Continue counting from an earlier process.

        Args:
            begun: number of iterations that had begun there.
            workers: the random states of its workers.
        """
        self.begun, self.workers = begun, workers

    def begins(self, iteration: TrackedIteration, *, anew: bool) -> None:
        """Record the newest iteration.

        Args:
            iteration: the newest one.
            anew: whether it begins at the start, instead of resuming one of an earlier process.
        """
        self.begun += anew
        self.newest = weakref.ref(iteration)
        self.made_before, self.newest_made = self.made(), iteration.made

    def seed_workers(self) -> None:
        """Record in the workers' states whether their seeds have been drawn before."""
        self.workers.note_seeded(self.persistent and self.begun > 1)

    def current(self) -> TrackedIteration | None:
        """Return the newest iteration, if it is under way."""
        newest = self.newest()
        return None if newest is None or newest.ended else newest

    def made(self) -> int:
        """Return the number of batches of torch's loader that the newest iteration has returned in this process."""
        return self.newest_made[0] * self.at_once

    @property
    def iteration_of_accelerate(self) -> int | None:
        """Return accelerate's count of iterations, which seeds their order; None for a loader of torch."""
        loader = self._loader()
        return int(ITERATION.of(loader)) if ITERATION.is_on(loader) else None

    def set_iteration_of_accelerate(self, number: int | None) -> None:
        """Set accelerate's count of iterations; do nothing for None, or for a loader of torch."""
        loader = self._loader()
        if number is not None and ITERATION.is_on(loader):  # a loader of torch has no count
            ITERATION.set(loader, number)


class TrackedIteration:
    """Returns the same batches as ``iter(dataloader)``, which it replaces while `Loaders` watches.

    Args:
        loaders: the `Loaders`.
        known: what is known of the loader.
        loader: the loader itself, kept alive while it is iterated.
        position: the position to begin at; None for the start.
    """

    def __init__(self, loaders: IterationOwner, known: TrackedLoader, loader: Any, position: dict[str, Any] | None) -> None:
        self._loaders = loaders
        self._known = known
        self.loader = loader
        self._position = position
        self._skipped: int = position["handed_out"] if position else 0
        self.made = [0]
        self.last, self.before_last = 0, loaders.handed_out
        self.ended = False
        self._ahead = False
        self._skip_inside = self._skipped
        self._order: dict[str, Any] | None = None
        self._attempts = 0
        self._before_draw: dict[str, Any] | None = None
        self._found: dict[str, Any] | None = None
        self._entered = False
        self._start: dict[str, Any] = {}
        self._start_generators: list[torch.Tensor] = []
        self._iteration_of_accelerate: int | None = None
        self._batches: Iterator[Any] = iter(())
        self._stream: StreamPosition | None = None
        self._holds_state = False
        self._first = 0  # number of batches before the first one that a resumed stream reads
        self._reads_for_all = False
        self._at_once = 1
        self._first_batch = FirstBatch(loaders.ranks)
        self._fetched = 0  # batches of a stream, in this process
        self._before_fetch: dict[str, Any] | None = None
        self._drawn: deque[Any] = deque(maxlen=_MOST_AHEAD)
        self._draws_its_own = True  # one draw for each batch that is returned

    # -- the beginning ------------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        """Record the random states at the start, restored first if the iteration resumes. Call it before the first draw."""
        self._entered = True
        if self._position is not None:
            self._found = _capture()
            restore(self._position["start"])
            set_states(self._known.generators, self._position["start_generators"])
            self._known.set_iteration_of_accelerate(self._position["iteration"])
        self._start, self._start_generators = _capture(), states_of(self._known.generators)
        self._iteration_of_accelerate = self._known.iteration_of_accelerate

    def over(self, plain: Callable[[Any], Iterator[Any]]) -> TrackedIteration:
        """Iterate a loader of torch."""
        self._enter()
        self._batches = self.inside(self.loader, plain)
        if isinstance(self.loader.dataset, IterableDataset):
            self._read_over()
        elif self.loader.num_workers:
            self._end_resumption()
        else:
            self._restore_found()
        return self

    def over_stateful(self, plain: Callable[[Any], Iterator[Any]]) -> TrackedIteration:
        """Iterate a ``StatefulDataLoader`` of torchdata, which says itself where it is."""
        self._enter()
        if self._position is not None and self._position.get("stateful") is not None:
            self.loader.load_state_dict(self._position["stateful"])
            self._holds_state = not self.loader.num_workers  # workers have data sets of their own, which end with them
        self._batches = plain(self.loader)
        self._end_resumption()
        return self

    def over_prepared(self, plain: Callable[[Any], Iterator[Any]]) -> TrackedIteration:
        """Iterate a loader of accelerate, which fetches a batch before it returns the previous one."""
        dispatches = isinstance(self.loader, DISPATCHER.find() or ())
        # accelerate fetches a batch before it returns the previous one, or did so when the position was saved.
        self._ahead = self._position is None or bool(self._position.get("ahead", True))
        self._at_once = self._known.at_once
        self._skip_inside *= self._at_once
        self._draws_its_own = not dispatches
        self._reads_for_all = dispatches and self._loaders.ranks > 1
        is_stream = isinstance(self.loader.dataset, IterableDataset)
        if self._reads_for_all and not is_stream:  # of a stream they are read again
            self._first_batch.begin_pass(self.loader, None if self._position is None else self._position.get("first_batch"))
        self._batches = plain(self.loader)
        if is_stream:
            self._read_over()
        return self

    def _tell_of_reading(self) -> None:
        warn_for_all(
            "%s has no index: reading it again from its start to batch %d, which is exact if it gives the same samples",
            type(self.loader.dataset).__name__,
            self._skipped,
        )

    def _read_over(self) -> None:
        if self._position is None:
            return
        if not self._entered:
            self._enter()
        before = self._loaders.drive(self)
        try:
            number = 0
            while number < self._skipped - self._first:  # what comes first is known when the stream has begun
                next(self._batches, None)
                number += 1
        finally:
            self._loaders.drive(before)
        self._end_resumption()

    def inside(self, loader: Any, plain: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
        """Return the iterator of a loader of torch, wrapping its sampler to observe the order."""
        known = self._known
        if known.workers_count:
            known.seed_workers()
        persistent = ITERATOR.of(loader)
        if known.workers_are_shifted and persistent is not None:
            # Since the resume each worker has done the work of another one: restart them in their own places.
            known.workers.go_on(known.made_before)
            ITERATOR.set(loader, None)
            persistent = None
        known.workers_are_shifted = known.persistent and self._skipped > 0
        if isinstance(loader.dataset, IterableDataset):
            return self._read_stream(loader, plain)
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        sampler = getattr(loader, name)
        watched = _Order(sampler, self, known.workers if known.workers_count else None)
        if persistent is not None:
            INDEX_SAMPLER.set(persistent, watched)
        object.__setattr__(loader, name, watched)  # a DataLoader refuses to change its sampler, as it may be iterating already
        try:
            return plain(loader)
        finally:
            object.__setattr__(loader, name, sampler)

    def _read_stream(self, loader: Any, plain: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
        """Return the iterator of a loader of a stream, which begins at its saved position where that is exact."""
        resumed: Resumed | None = None
        saved = None if self._position is None else self._position.get("stream")
        knows = why_not(loader) is None
        position = StreamPosition(divided=self._at_once if self._reads_for_all else None)
        if knows and saved is not None:
            resumed = position.go_to(loader, saved)
        passed_over = 0 if resumed is None else resumed.passed_over
        if self._position is not None and self._reads_for_all:
            # The other ranks skip what rank 0 does not read; they have no position.
            passed_over = self._loaders.from_main(passed_over)
        if self._position is not None and self._skipped and not passed_over:
            resumed = None
            self._tell_of_reading()
        self._first = passed_over // self._at_once
        if not knows:
            return self._fetch(plain(loader))
        self._stream = position
        return self._fetch(self._stream.read(loader, plain, resumed))

    def _fetch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Return the batches of a stream; the first one that is not trained is made with the random states of its first draw.

        accelerate fetches a batch before it returns the previous one. Its collator may draw random numbers, to mask words.
        """
        while True:
            if self._fetched % self._at_once == 0:
                is_first = self._position is not None and self._fetched == (self._skipped - self._first) * self._at_once
                if is_first and self._position is not None and self._position.get("before_fetch") is not None:
                    restore(self._position["before_fetch"])
                self._before_fetch = capture()
            self._fetched += 1
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch

    # -- called by the wrapped sampler, in this order -----------------------------------------------------------------

    def order_begins(self, indices: Iterator[Any]) -> None:
        """Prepare the random states before the first index is drawn, and skip the indices of trained batches."""
        if self._position is not None and self._position["order"] is not None:
            if not self._ahead:
                self._found = _capture()
            restore(self._position["order"])
        self._order = _capture()
        for _ in range(self._skip_inside):
            next(indices, None)
        if self._position is not None and not self._ahead and not self._known.workers_count:
            self._end_resumption()

    def draws(self) -> None:
        """Finish resuming before an index of the second batch is drawn, if there are no workers."""
        self._attempts += 1
        if self._position is not None and self._attempts > self._at_once and not self._known.workers_count:
            self._end_resumption()

    def drawn(self, index: Any) -> None:
        """Restore or record random states, after an index was drawn and before its batch is made."""
        self._drawn.append(index)
        if self._ahead and not self._known.workers_count and (self._attempts - 1) % self._at_once == 0:
            if self._position is not None and self._attempts == 1 and self._position["before_draw"] is not None:
                restore(self._position["before_draw"])
            self._before_draw = capture()

    def _end_resumption(self) -> None:
        """End the resumption of this loader at its saved position: continue with the random states of the save."""
        if self._position is None:
            return
        self._position = None
        now = self._loaders.take_now()
        if now is not None:
            restore(now)
            self._found = None
        self._restore_found()

    def _restore_found(self) -> None:
        if self._found is not None:
            restore(self._found)
            self._found = None

    # -- what the training sees ---------------------------------------------------------------------------------------

    def __iter__(self) -> TrackedIteration:
        return self

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __next__(self) -> Any:
        if not self._entered:
            self._enter()
        before = self._loaders.drive(self)
        try:
            batch = next(self._batches)
        except StopIteration:
            self._end()
            raise
        finally:
            self._loaders.drive(before)
        if self._position is not None:
            self._end_resumption()
        self._end_state()
        self.made[0] += 1
        indices = self._drawn.popleft() if self._drawn and self._draws_its_own else None
        self.before_last, self.last = self.last or self.before_last, self._loaders.hands_out(self, indices)
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_batches"], name)

    def _end_state(self) -> None:
        if self._holds_state:
            self._holds_state = False
            end_state(self.loader.dataset)

    def _end(self) -> None:
        self._end_state()
        if self._position is not None:
            self._end_resumption()
        if not self.ended and self._iteration_of_accelerate is not None:
            # accelerate does not count an iteration with nothing left to train.
            self._known.set_iteration_of_accelerate(self._iteration_of_accelerate + 1)
        self.ended = True

    def position(self) -> dict[str, Any]:
        """Return the position, for a checkpoint."""
        fetched = self._fetched > (self._skipped - self._first + self.made[0]) * self._at_once
        ahead = self._ahead and self._attempts > self.made[0] * self._at_once
        return {
            "handed_out": self._skipped + self.made[0],
            "start": self._start,
            "start_generators": self._start_generators,
            "iteration": self._iteration_of_accelerate,
            "order": self._order,
            "before_draw": self._before_draw if ahead else None,
            "before_fetch": self._before_fetch if fetched else None,
            "ahead": ahead,
            "stream": None if self._stream is None else self._stream.to_save((self._skipped + self.made[0]) * self._at_once),
            "first_batch": self._first_batch.kept,
            "stateful": self.loader.state_dict() if self._known.is_stateful else None,
        }


class _Order(BatchSampler):
    """Wraps a sampler and reports each draw to the iteration."""

    def __init__(self, inner: Any, iteration: TrackedIteration, worker_states: WorkerStates | None) -> None:
        self._inner = inner
        self._iteration = weakref.ref(iteration)
        self.worker_states = worker_states

    def __iter__(self) -> Iterator[Any]:
        return self._report_draws(iter(self._inner))

    def _report_draws(self, indices: Iterator[Any]) -> Iterator[Any]:
        # Dereferenced each time: a reference held here would keep the iteration alive after its loop was left.
        self._report("order_begins", indices)
        while True:
            self._report("draws")
            try:
                index = next(indices)
            except StopIteration:
                return
            self._report("drawn", index)
            yield index

    def _report(self, what: str, *args: Any) -> None:
        iteration = self._iteration()
        if iteration is not None:
            getattr(iteration, what)(*args)

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)


def _capture() -> dict[str, Any]:
    return capture() | capture_gpus()


def batches_at_once(loader: Any, ranks: int) -> int:
    """Return how many batches of torch's loader accelerate fetches at once, because one rank reads for all; otherwise 1.

    Args:
        loader: a loader of torch or accelerate.
        ranks: number of ranks.
    """
    return ranks if isinstance(loader, DISPATCHER.find() or ()) and not SPLIT_BATCHES.of(loader) else 1


def _kind(loader: Any) -> str:
    def size(one: Any) -> int | None:
        try:
            return len(one)
        except TypeError:  # a stream has no length
            return None

    return f"{type(loader.dataset).__name__} of {size(loader.dataset)} samples in {size(loader)} batches of {loader.batch_size}"


def _generators(loader: Any) -> list[torch.Generator]:
    """Return the generators that a loader and its samplers own, each once."""
    found: dict[int, torch.Generator] = {}
    looked_at = [loader]
    for one in looked_at:
        for name in ("generator", SHARD_GENERATOR.name):
            if isinstance(generator := getattr(one, name, None), torch.Generator):
                found[id(generator)] = generator
        inner = [vars(one).get(name) for name in (INSIDE.name, "batch_sampler", "sampler")]
        looked_at += [each for each in inner if hasattr(each, "__dict__")]
    return list(found.values())
