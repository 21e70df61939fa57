"""Saves the positions of the DataLoaders of a training, and resumes them in another process.

A custom loop just says ``for batch in dataloader``. While a `Loaders` watches, it counts the batches of each iteration of a
``torch.utils.data.DataLoader`` (or accelerate's), and records the random states from which the iteration drew its order. A
loader that is iterated for the first time after a resume begins with the same states, skips trained batches without loading
them, and continues with the random states of the save.

*Loaders are identified* across processes by their kind (dataset, batches) and, among those of a kind that are alive, by the
order of their first iterations. *Iterations under way* are the one that returned the newest batch and has neither ended nor
been discarded, and those that returned a batch between the newest two of that one (``zip(one, other)``).
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError
from hf_spot.log import warn_for_all
from hf_spot.training.data.iterations import TrackedIteration, TrackedLoader, batches_at_once, stateful_loader
from hf_spot.training.data.rng import set_states, states_of
from hf_spot.training.data.worker_processes import shield
from hf_spot.training.data.worker_states import WorkerStates
from hf_spot.training.upstream import DISPATCHER, INSIDE, ITERATE, SHARD, STATEFUL

_AHEAD = 2  # batches that accelerate fetches beyond the current one, and one to spare
_MOST_OF_A_STEP = 4096  # batches whose indices are kept, if nobody takes them

_watching: list[Loaders] = []
_plain_iter: dict[type, Callable[[Any], Iterator[Any]]] = {}


class Loaders:
    """Keeps track of the DataLoaders of this process, from `watch` to `close`.

    Args:
        scratch: local folder for files that workers share with the training; `close` empties it.
        begins: called before each iteration; an exception from it ends the training there.
        ranks: number of ranks.
        hands_out: called with each batch that a loader returns.
        from_main: returns rank 0's value to all ranks, which all call it.
    """

    def __init__(
        self,
        scratch: Path,
        begins: Callable[[], None] = lambda: None,
        ranks: int = 1,
        hands_out: Callable[[], None] = lambda: None,
        from_main: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        self._scratch = scratch
        self._begins = begins
        self._ranks = ranks
        self._on_batch = hands_out
        self._from_main = from_main
        self._process = os.getpid()
        self._known: weakref.WeakKeyDictionary[Any, TrackedLoader] = weakref.WeakKeyDictionary()
        self._waiting: list[dict[str, Any]] = []
        self._now: dict[str, Any] | None = None
        self._orders = itertools.count()
        self._handed_out = 0
        self._newest: Callable[[], TrackedIteration | None] = lambda: None
        self._indices: deque[Any] = deque(maxlen=_MOST_OF_A_STEP)
        self._driven: TrackedIteration | None = None

    def watch(self, arguments: SpotArguments | None = None) -> None:
        """Wrap the iterators of all loaders, until `close`.

        Args:
            arguments: as for `shield`.
        """
        shield(arguments)
        if self not in _watching:
            _watching.append(self)
        _replace(DataLoader, _iterate)
        # Only what is imported already: importing accelerate is slow.
        stateful = stateful_loader()
        if stateful is not None:
            _replace(stateful, _iterate_stateful)
        for kind in (SHARD.find(), DISPATCHER.find()):
            if kind is not None:
                _replace(kind, _iterate_prepared)

    def close(self) -> None:
        """Restore the loaders' own iterators."""
        if self in _watching:
            _watching.remove(self)
        if not _watching:
            for kind, plain in _plain_iter.items():
                ITERATE.set(kind, plain)
            _plain_iter.clear()
        for known in self._known.values():
            known.workers.close()

    # -- saving and resuming ------------------------------------------------------------------------------------------

    def save(self, folder: Path, rank: int, only: Collection[Any] | None = None) -> list[dict[str, Any]]:
        """Return what `resume` needs to resume each loader at its position.

        Args:
            folder: folder of the checkpoint, for the states of workers.
            rank: number of this process.
            only: loaders whose iterations are under way; None detects them.
        """
        if any(waiting["main"] for waiting in self._waiting):
            warn_for_all("no DataLoader matches the one that the checkpoint was saved in: the epoch started from its beginning")
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
            entry |= {"generators": states_of(known.generators), "iteration": known.iteration_of_accelerate}
            entry["at_once"] = known.at_once
            current = known.current()
            if current is not None and current in under_way:
                entry |= {"under_way": current.position(), "main": current is main}
            # Where rank 0 reads for all, nobody takes what the workers of another rank make.
            is_idle = rank > 0 and known.is_read_for_all
            if known.workers_count and not is_idle and (entry["under_way"] or known.persistent):
                entry["workers"] = f"random_states/loader-{len(entries)}_{rank}.json"
                (folder / "random_states").mkdir(exist_ok=True)
                known.workers.save(folder / entry["workers"], known.made())
            entries.append(entry)
        return entries

    def resume(self, entries: list[dict[str, Any]], now: dict[str, Any], folder: Path, ranks_before: int) -> None:
        """Resume the next iteration of each loader at its saved position.

        Args:
            entries: the result of `save`.
            now: the random states at the save, which the training continues with.
            folder: folder of the checkpoint.
            ranks_before: number of ranks at the save.
        """
        self._now = now
        for entry in entries:
            states = WorkerStates(self._scratch, _AHEAD * entry.get("at_once", 1))
            if "workers" in entry:
                states.resume(folder / entry["workers"], middle=entry["under_way"] is not None)
            if entry["under_way"] and ranks_before != self._ranks:
                entry["under_way"]["handed_out"] = entry["under_way"]["handed_out"] * ranks_before // self._ranks
                entry["under_way"] |= {"stream": None, "first_batch": None}
            entry["states"] = states
        self._waiting = entries

    def _under_way(self) -> list[TrackedIteration]:
        alive = [one for known in self._known.values() if (one := known.current()) is not None and one.last]
        if not alive:
            return []
        main = max(alive, key=lambda one: one.last)
        return [one for one in alive if one.last > main.before_last]

    def _explicit(self, loader: Any) -> TrackedIteration:
        known = self._known.get(loader)
        current = known.current() if known else None
        if current is None:
            raise ConfigError(
                f"dataloader={loader!r} is not being iterated: there is no position to save",
                hint="leave dataloader= out between epochs",
            )
        return current

    # -- iterations ---------------------------------------------------------------------------------------------------

    def begin(self, loader: Any) -> TrackedIteration:
        """Begin an iteration of a loader, at its saved position if there is one."""
        self._begins()
        known = self._known.get(loader)
        if known is None:
            at_once = batches_at_once(loader, self._ranks)
            states = WorkerStates(self._scratch, _AHEAD * at_once)
            known = self._known[loader] = TrackedLoader(loader, next(self._orders), states, at_once)
            entry = self._entry_for(known)
            if entry is not None:
                known.restore(entry["begun"], entry["states"])
                if entry["under_way"] is None:
                    set_states(known.generators, entry["generators"])
                    known.set_iteration_of_accelerate(entry["iteration"])
        else:
            entry = None
        position = entry["under_way"] if entry else None
        iteration = TrackedIteration(self, known, loader, position)
        known.begins(iteration, anew=position is None)
        return iteration

    def _entry_for(self, known: TrackedLoader) -> dict[str, Any] | None:
        place = (known.kind, self._number(known))
        found = next((entry for entry in self._waiting if (entry["kind"], entry["number"]) == place), None)
        if found is not None:
            self._waiting.remove(found)
        return found

    def _number(self, known: TrackedLoader) -> int:
        return sum(other.kind == known.kind and other.order < known.order for other in self._known.values())

    def take_now(self) -> dict[str, Any] | None:
        """Return the random states to continue with, once: for the first iteration that reaches its saved position."""
        now, self._now = self._now, None
        return now

    @property
    def handed_out(self) -> int:
        """Return the number of batches that all loaders have returned."""
        return self._handed_out

    def hands_out(self, iteration: TrackedIteration, indices: Any) -> int:
        """Count a batch, and return its number."""
        self._handed_out += 1
        if iteration is not self._newest():  # what an evaluation was given is no part of a step
            self._newest, self._indices = weakref.ref(iteration), deque(maxlen=_MOST_OF_A_STEP)
        self._indices.append(indices)
        self._on_batch()
        return self._handed_out

    def take_indices(self) -> list[Any] | None:
        """Return the indices of the batches since the previous call, of the iteration that gave the newest one.

        None stands for batches whose indices are not known, as those of a stream.
        """
        found = list(self._indices)
        self._indices.clear()
        return None if not found or any(one is None for one in found) else found

    @property
    def is_here(self) -> bool:
        """Return False in a process that the training has forked."""
        return os.getpid() == self._process

    @property
    def ranks(self) -> int:
        """Return the number of ranks."""
        return self._ranks

    def from_main(self, value: Any) -> Any:
        """Return what rank 0 has given. Every rank must call it."""
        return self._from_main(value)

    def drive(self, iteration: TrackedIteration | None) -> TrackedIteration | None:
        """Set accelerate's active iteration, to which its inner loader belongs; return the previous one."""
        before, self._driven = self._driven, iteration
        return before

    def driven(self, inside: Any) -> TrackedIteration | None:
        """Return the iteration that an inner loader of accelerate's belongs to, if any."""
        driven = self._driven
        belongs = driven is not None and INSIDE.is_on(driven.loader) and INSIDE.of(driven.loader) is inside
        return driven if belongs else None


def _iterate(self: Any) -> Iterator[Any]:
    """Replace ``DataLoader.__iter__``."""
    plain = _plain_iter[DataLoader]
    loaders = _watching[-1] if _watching else None
    if loaders is None or not loaders.is_here:
        return plain(self)
    driven = loaders.driven(self)
    if driven is not None:
        return driven.inside(self, plain)
    return loaders.begin(self).over(plain)


def _iterate_prepared(self: Any) -> Iterator[Any]:
    """Replace ``__iter__`` of accelerate's loaders.

    Raises:
        ConfigError: the loader holds a ``StatefulDataLoader``.
    """
    plain = next(_plain_iter[kind] for kind in type(self).__mro__ if kind in _plain_iter)
    loaders = _watching[-1] if _watching else None
    if loaders is None or not loaders.is_here:
        return plain(self)
    if STATEFUL.of(self):
        raise ConfigError(
            "accelerate's use_stateful_dataloader would give other batches and random numbers after a resume",
            hint="use_stateful_dataloader=False: hf_spot resumes any DataLoader at its position, a stream, too",
        )
    return loaders.begin(self).over_prepared(plain)


def _iterate_stateful(self: Any) -> Iterator[Any]:
    """Replace ``__iter__`` of torchdata's ``StatefulDataLoader``."""
    plain = next(_plain_iter[kind] for kind in type(self).__mro__ if kind in _plain_iter)
    loaders = _watching[-1] if _watching else None
    if loaders is None or not loaders.is_here:
        return plain(self)
    return loaders.begin(self).over_stateful(plain)


def _replace(kind: type, iterate: Callable[[Any], Iterator[Any]]) -> None:
    if kind not in _plain_iter:
        _plain_iter[kind] = ITERATE.of(kind)
        ITERATE.set(kind, iterate)
