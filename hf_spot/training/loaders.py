"""Where the DataLoaders of a training stand, and how they get there again in another process.

A loop of one's own says ``for batch in dataloader`` and knows nothing of resuming. While a `Loaders` watches, each iteration
of a ``torch.utils.data.DataLoader`` (and of accelerate's) is counted, and the random states are noted from which it has drawn
its order. A loader that is iterated for the first time after a resume begins from the same states, passes over what was
trained without loading it, and goes on with the random states of the save.

*Which loader is which* in another process is told by its kind (dataset, batches) and, among those of a kind that are alive, by
the order of their first iterations. *Which iterations are under way:* the one that has handed out the newest batch and neither
ended nor been thrown away, and those that have handed out one between the newest two of that one (``zip(one, other)``).
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import weakref
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from hf_spot.errors import ConfigError
from hf_spot.training.generators import capture, capture_gpus, restore
from hf_spot.training.worker_states import WorkerStates
from hf_spot.training.workers import shield

log = logging.getLogger("hf_spot")

_ACCELERATE = "accelerate.data_loader"
_AHEAD = 2  # batches that accelerate takes beyond the one that is trained, and one to spare

_watching: list[Loaders] = []
_plain_iter: dict[type, Callable[[Any], Iterator[Any]]] = {}


class Loaders:
    """The DataLoaders of this process, from `watch` to `close`.

    Args:
        scratch: folder on this machine for what workers share with the training; `close` empties it.
        begins: called before each iteration; what it raises ends the training there.
        ranks: that train together.
    """

    def __init__(self, scratch: Path, begins: Callable[[], None] = lambda: None, ranks: int = 1) -> None:
        self._scratch = scratch
        self._begins = begins
        self._ranks = ranks
        self._process = os.getpid()
        self._known: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()
        self._waiting: list[dict[str, Any]] = []
        self._now: dict[str, Any] | None = None
        self._orders = itertools.count()
        self._handed_out = 0
        self._driven: _Iteration | None = None

    def watch(self) -> None:
        """From now on, until `close`."""
        shield()
        if self not in _watching:
            _watching.append(self)
        _replace(DataLoader, _iterate)
        # Only what somebody has imported: accelerate takes its time.
        for name in ("DataLoaderShard", "DataLoaderDispatcher"):
            if _ACCELERATE in sys.modules:
                _replace(getattr(sys.modules[_ACCELERATE], name), _iterate_prepared)

    def close(self) -> None:
        """Loaders are what they were."""
        if self in _watching:
            _watching.remove(self)
        if not _watching:
            for kind, plain in _plain_iter.items():
                kind.__iter__ = plain
            _plain_iter.clear()
        for known in self._known.values():
            known.workers.close()

    # -- saving and resuming ------------------------------------------------------------------------------------------

    def save(self, folder: Path, rank: int, only: Collection[Any] | None = None) -> list[dict[str, Any]]:
        """What `resume` needs to bring each loader to where it stands.

        Args:
            folder: of the checkpoint, for the states of workers.
            rank: of this process.
            only: loaders whose iterations count as under way; None finds them out.
        """
        if any(waiting["main"] for waiting in self._waiting):
            log.warning("no DataLoader is the one that the checkpoint was in the middle of: its epoch began anew")
            self._waiting = []
        under_way = self._under_way() if only is None else [self._explicit(loader) for loader in only]
        main = max(under_way, key=lambda one: one.last, default=None)
        entries: list[dict[str, Any]] = []
        for known in sorted(self._known.values(), key=lambda one: one.order):
            entry: dict[str, Any] = {
                "kind": known.kind,
                "number": self._number(known),
                "begun": known.begun,
                "main": False,
                "under_way": None,
            }
            entry |= {"generators": _states_of(known.generators), "iteration": known.iteration_of_accelerate}
            current = known.current()
            if current is not None and current in under_way:
                entry |= {"under_way": current.position(), "main": current is main}
            if known.workers_count and (entry["under_way"] or known.persistent):
                entry["workers"] = f"random_states/loader-{len(entries)}_{rank}.json"
                (folder / "random_states").mkdir(exist_ok=True)
                known.workers.save(folder / entry["workers"], known.made())
            entries.append(entry)
        return entries

    def resume(self, entries: list[dict[str, Any]], now: dict[str, Any], folder: Path, ranks_before: int) -> None:
        """The next iteration of each loader goes on where it stood.

        Args:
            entries: made by `save`.
            now: the random states of that moment, which the training goes on with.
            folder: of the checkpoint.
            ranks_before: that trained together then.
        """
        self._now = now
        for entry in entries:
            states = WorkerStates(self._scratch, _AHEAD)
            if "workers" in entry:
                states.resume(folder / entry["workers"], middle=entry["under_way"] is not None)
            if entry["under_way"] and ranks_before != self._ranks:
                entry["under_way"]["handed_out"] = entry["under_way"]["handed_out"] * ranks_before // self._ranks
            entry["states"] = states
        self._waiting = entries

    def _under_way(self) -> list[_Iteration]:
        alive = [one for known in self._known.values() if (one := known.current()) is not None and one.last]
        if not alive:
            return []
        main = max(alive, key=lambda one: one.last)
        return [one for one in alive if one.last > main.before_last]

    def _explicit(self, loader: Any) -> _Iteration:
        known = self._known.get(loader)
        current = known.current() if known else None
        if current is None:
            raise ConfigError(
                f"dataloader={loader!r} is not being iterated: there is no position to save",
                hint="leave dataloader= out between epochs",
            )
        return current

    # -- iterations ---------------------------------------------------------------------------------------------------

    def begin(self, loader: Any) -> _Iteration:
        """An iteration of a loader begins."""
        self._begins()
        known = self._known.get(loader)
        if known is None:
            known = self._known[loader] = _Known(loader, next(self._orders), WorkerStates(self._scratch, _AHEAD))
            entry = self._entry_for(known)
            if entry is not None:
                known.begun, known.workers = entry["begun"], entry["states"]
                if entry["under_way"] is None:
                    _set_states(known.generators, entry["generators"])
                    known.set_iteration_of_accelerate(entry["iteration"])
        else:
            entry = None
        position = entry["under_way"] if entry else None
        if position is None:
            known.begun += 1
        iteration = _Iteration(self, known, loader, position)
        known.newest = weakref.ref(iteration)
        known.made_before, known.newest_made = known.made(), iteration.made
        return iteration

    def _entry_for(self, known: _Known) -> dict[str, Any] | None:
        place = (known.kind, self._number(known))
        found = next((entry for entry in self._waiting if (entry["kind"], entry["number"]) == place), None)
        if found is not None:
            self._waiting.remove(found)
        return found

    def _number(self, known: _Known) -> int:
        return sum(other.kind == known.kind and other.order < known.order for other in self._known.values())

    def take_now(self) -> dict[str, Any] | None:
        """The random states to go on with, for the first that arrives where it stood: the others follow it."""
        now, self._now = self._now, None
        return now

    @property
    def handed_out(self) -> int:
        """Batches, of all loaders."""
        return self._handed_out

    def hands_out(self) -> int:
        """A batch is handed out: its number."""
        self._handed_out += 1
        return self._handed_out

    @property
    def is_here(self) -> bool:
        """False in a process that the training has forked."""
        return os.getpid() == self._process

    @property
    def ranks(self) -> int:
        """That train together."""
        return self._ranks

    def drive(self, iteration: _Iteration | None) -> _Iteration | None:
        """accelerate's iteration that is at work from now on, and whose loader inside belongs to it; the one before."""
        before, self._driven = self._driven, iteration
        return before

    def driven(self, inside: Any) -> _Iteration | None:
        """The iteration that a loader inside one of accelerate's belongs to."""
        driven = self._driven
        return driven if driven is not None and getattr(driven.loader, "base_dataloader", None) is inside else None


class _Known:
    """A loader that has been iterated. It does not keep the loader alive."""

    def __init__(self, loader: Any, order: int, workers: WorkerStates) -> None:
        self._loader = weakref.ref(loader)
        self.order = order
        self.kind = _kind(loader)
        self.workers = workers
        self.begun = 0
        self.newest: Callable[[], _Iteration | None] = lambda: None
        self.newest_made: list[int] = [0]
        self.made_before = 0
        self.workers_count: int = loader.num_workers
        self.persistent = bool(loader.persistent_workers)
        self.workers_are_shifted = False
        self.generators = _generators(loader)

    def current(self) -> _Iteration | None:
        """Its newest iteration, if it is under way."""
        newest = self.newest()
        return None if newest is None or newest.ended else newest

    def made(self) -> int:
        """Batches that the newest iteration has handed out in this process."""
        return self.newest_made[0]

    @property
    def iteration_of_accelerate(self) -> int | None:
        """accelerate counts iterations to seed their order."""
        return getattr(self._loader(), "iteration", None)

    def set_iteration_of_accelerate(self, number: int | None) -> None:
        """Goes on counting from there."""
        loader: Any = self._loader()
        if number is not None and hasattr(loader, "iteration"):
            loader.iteration = number


class _Iteration:
    """What ``iter(dataloader)`` returns while somebody watches: hands out the same batches.

    Args:
        loaders: that watch.
        known: the loader.
        loader: itself, kept alive as long as it is iterated.
        position: to begin at; None is the start.
    """

    def __init__(self, loaders: Loaders, known: _Known, loader: Any, position: dict[str, Any] | None) -> None:
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

    # -- the beginning ------------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        """What draws first is next."""
        self._entered = True
        if self._position is not None:
            self._found = _capture()
            restore(self._position["start"])
            _set_states(self._known.generators, self._position["start_generators"])
            self._known.set_iteration_of_accelerate(self._position["iteration"])
        self._start, self._start_generators = _capture(), _states_of(self._known.generators)
        self._iteration_of_accelerate = self._known.iteration_of_accelerate

    def over(self, plain: Callable[[Any], Iterator[Any]]) -> _Iteration:
        """Iterates a loader of torch."""
        self._enter()
        self._batches = self.inside(self.loader, plain)
        if isinstance(self.loader.dataset, IterableDataset):
            self._read_over()
        elif self.loader.num_workers:
            self._arrive()
        else:
            self._put_back()
        return self

    def over_prepared(self, plain: Callable[[Any], Iterator[Any]]) -> _Iteration:
        """Iterates a loader of accelerate, which takes a batch before it hands out the one before."""
        dispatches = type(self.loader).__name__ == "DataLoaderDispatcher"
        self._ahead = not dispatches
        if dispatches and not self.loader.split_batches:
            self._skip_inside *= self._loaders.ranks
        self._batches = plain(self.loader)
        if isinstance(self.loader.dataset, IterableDataset):
            self._read_over()
        return self

    def _read_over(self) -> None:
        if self._position is None:
            return
        log.warning(
            "%s has no index: it is read again from its start up to batch %d, which is exact if it gives the same each time",
            type(self.loader.dataset).__name__,
            self._skipped,
        )
        if not self._entered:
            self._enter()
        before = self._loaders.drive(self)
        try:
            for _ in range(self._skipped):
                next(self._batches, None)
        finally:
            self._loaders.drive(before)
        self._arrive()

    def inside(self, loader: Any, plain: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
        """The iterator of a loader of torch, with its order watched."""
        known = self._known
        if known.workers_count:
            known.workers.seeded_before = known.persistent and known.begun > 1
        if known.workers_are_shifted and loader._iterator is not None:
            # Each worker has done the work of another one since the resume: they begin anew in their places.
            known.workers.go_on(known.made_before)
            loader._iterator = None
        known.workers_are_shifted = known.persistent and self._skipped > 0
        if isinstance(loader.dataset, IterableDataset):
            return plain(loader)
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        sampler = getattr(loader, name)
        watched = _Order(sampler, self, known.workers if known.workers_count else None)
        if loader._iterator is not None:
            loader._iterator._index_sampler = watched
        object.__setattr__(loader, name, watched)  # a DataLoader refuses such a change, for fear of one that has begun
        try:
            return plain(loader)
        finally:
            object.__setattr__(loader, name, sampler)

    # -- called by the order, in its order ----------------------------------------------------------------------------

    def order_begins(self, indices: Iterator[Any]) -> None:
        """The first index is drawn next: passes over those of batches that were trained."""
        if self._position is not None and self._position["order"] is not None:
            if not self._ahead:
                self._found = _capture()
            restore(self._position["order"])
        self._order = _capture()
        for _ in range(self._skip_inside):
            next(indices, None)
        if self._position is not None and not self._ahead and not self._known.workers_count:
            self._arrive()

    def draws(self) -> None:
        """An index is drawn next."""
        self._attempts += 1
        if self._position is not None and self._attempts > 1 and not self._known.workers_count:
            self._arrive()

    def drawn(self) -> None:
        """An index was drawn, and its batch is made next."""
        if self._ahead and not self._known.workers_count:
            if self._position is not None and self._attempts == 1 and self._position["before_draw"] is not None:
                restore(self._position["before_draw"])
            self._before_draw = capture()

    def _arrive(self) -> None:
        """The loader stands where it stood, and the training goes on with the random states of the save."""
        if self._position is None:
            return
        self._position = None
        now = self._loaders.take_now()
        if now is not None:
            restore(now)
            self._found = None
        self._put_back()

    def _put_back(self) -> None:
        if self._found is not None:
            restore(self._found)
            self._found = None

    # -- what the training sees ---------------------------------------------------------------------------------------

    def __iter__(self) -> _Iteration:
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
            self._arrive()
        self.made[0] += 1
        self.before_last, self.last = self.last or self.before_last, self._loaders.hands_out()
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_batches"], name)

    def _end(self) -> None:
        if self._position is not None:
            self._arrive()
        if not self.ended and self._iteration_of_accelerate is not None:
            # With nothing left to train accelerate does not count it.
            self._known.set_iteration_of_accelerate(self._iteration_of_accelerate + 1)
        self.ended = True

    def position(self) -> dict[str, Any]:
        """Where it stands."""
        return {
            "handed_out": self._skipped + self.made[0],
            "start": self._start,
            "start_generators": self._start_generators,
            "iteration": self._iteration_of_accelerate,
            "order": self._order,
            "before_draw": self._before_draw,
        }


class _Order(BatchSampler):
    """A sampler that tells of each draw, and is the one inside in everything else."""

    def __init__(self, inner: Any, iteration: _Iteration, worker_states: WorkerStates | None) -> None:
        self._inner = inner
        self._iteration = weakref.ref(iteration)
        self.worker_states = worker_states

    def __iter__(self) -> Iterator[Any]:
        return self._go(iter(self._inner))

    def _go(self, indices: Iterator[Any]) -> Iterator[Any]:
        # The iteration is asked for each time: held here, it would not end where a loop is left.
        self._tell("order_begins", indices)
        while True:
            self._tell("draws")
            try:
                index = next(indices)
            except StopIteration:
                return
            self._tell("drawn")
            yield index

    def _tell(self, what: str, *args: Any) -> None:
        iteration = self._iteration()
        if iteration is not None:
            getattr(iteration, what)(*args)

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)


def _iterate(self: Any) -> Iterator[Any]:
    """Takes the place of ``DataLoader.__iter__``."""
    plain = _plain_iter[DataLoader]
    loaders = _watching[-1] if _watching else None
    if loaders is None or not loaders.is_here:
        return plain(self)
    driven = loaders.driven(self)
    if driven is not None:
        return driven.inside(self, plain)
    return loaders.begin(self).over(plain)


def _iterate_prepared(self: Any) -> Iterator[Any]:
    """Takes the place of ``__iter__`` of accelerate's loaders."""
    plain = next(_plain_iter[kind] for kind in type(self).__mro__ if kind in _plain_iter)
    loaders = _watching[-1] if _watching else None
    if loaders is None or not loaders.is_here or self.use_stateful_dataloader:
        return plain(self)
    return loaders.begin(self).over_prepared(plain)


def _replace(kind: type, iterate: Callable[[Any], Iterator[Any]]) -> None:
    if kind not in _plain_iter:
        _plain_iter[kind] = kind.__iter__
        kind.__iter__ = iterate


def _capture() -> dict[str, Any]:
    return capture() | capture_gpus()


def _kind(loader: Any) -> str:
    def size(one: Any) -> int | None:
        try:
            return len(one)
        except TypeError:  # a stream has none
            return None

    return f"{type(loader.dataset).__name__} of {size(loader.dataset)} samples in {size(loader)} batches of {loader.batch_size}"


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators that a loader and its samplers own, each once."""
    found: dict[int, torch.Generator] = {}
    looked_at = [loader]
    for one in looked_at:
        for name in ("generator", "synchronized_generator"):
            if isinstance(generator := getattr(one, name, None), torch.Generator):
                found[id(generator)] = generator
        inner = [vars(one).get(name) for name in ("base_dataloader", "batch_sampler", "sampler")]
        looked_at += [each for each in inner if hasattr(each, "__dict__")]
    return list(found.values())


def _states_of(generators: list[torch.Generator]) -> list[torch.Tensor]:
    return [generator.get_state() for generator in generators]


def _set_states(generators: list[torch.Generator], states: list[torch.Tensor]) -> None:
    for generator, state in zip(generators, states, strict=False):
        generator.set_state(state)
