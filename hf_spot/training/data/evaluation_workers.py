"""Persistent DataLoader workers of evaluations: an uninterrupted run keeps them and the random states they have reached."""

from __future__ import annotations

import base64
import contextlib
import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_spot.training.data.worker_processes import starts_given
from hf_spot.training.data.worker_states import WorkerStates
from hf_spot.training.upstream import EVALUATION_LOOP, ITERATOR


@dataclass(frozen=True)
class _Started:
    """A loader whose workers have started in this process.

    Args:
        key: tells loaders apart, in other processes, too.
        loader: returns the loader, or None once it is gone: then its workers are, too.
        states: what its workers have reached.
    """

    key: str
    loader: Callable[[], Any]
    states: WorkerStates

    @property
    def is_there(self) -> bool:
        """Return whether the next iteration uses the same workers."""
        loader = self.loader()
        return loader is not None and ITERATOR.of(loader) is not None


class EvaluationWorkers:
    """Saves what persistent workers of a trainer's evaluations have reached, and gives it to those that take their place.

    Their seeds are drawn from the training's generator when they start, and they draw on from evaluation to evaluation.
    """

    def __init__(self) -> None:
        self._started: list[_Started] = []
        self._first: dict[str, list[bytes]] = {}
        self._saved: dict[str, list[bytes]] | None = None  # while an evaluation is under way: as before it
        self._may_start = self._is_training = False

    @contextlib.contextmanager
    def kept(self, trainer: Any) -> Iterator[None]:
        """Keep the workers of evaluations, and of predictions, within the block.

        What a checkpoint has told is also given to those that start behind it, as when a script evaluates a finished training.

        Args:
            trainer: the Trainer.
        """
        self._may_start = bool(trainer.args.dataloader_persistent_workers and trainer.args.dataloader_num_workers)
        EVALUATION_LOOP.restore(trainer)
        evaluate = EVALUATION_LOOP.plain(trainer)

        def loop(*args: Any, **kwargs: Any) -> Any:
            try:
                with starts_given(self._states_for):
                    return evaluate(*args, **kwargs)
            finally:
                self._release(trainer)

        EVALUATION_LOOP.set(trainer, loop)
        self._is_training = True
        try:
            yield
        finally:
            self._is_training = False
            self._release(trainer)

    def _release(self, trainer: Any) -> None:
        if not self._is_training and not self._first:
            EVALUATION_LOOP.restore(trainer)

    def resume(self, path: Path) -> bool:
        """Let workers that start from now on continue where those of a checkpoint were; return False if it tells nothing.

        Args:
            path: file from `save`; may be missing.
        """
        if not path.exists():
            return False
        told = json.loads(path.read_bytes())
        self._first = {key: [base64.b64decode(state) for state in states] for key, states in told.items()}
        return True

    def save(self, path: Path) -> None:
        """Write what the workers have reached to a file of the checkpoint; none if no evaluation has such workers.

        Args:
            path: the file.
        """
        if not (self._started or self._first or self._may_start):
            return
        reached = self._reached() if self._saved is None else self._saved
        told = {key: [base64.b64encode(state).decode() for state in states] for key, states in reached.items()}
        path.write_text(json.dumps(told))

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Let saves within the block tell what the workers had reached before it: an evaluation may be ended halfway."""
        self._saved = self._reached()
        yield
        self._saved = None

    def _reached(self) -> dict[str, list[bytes]]:
        here = {one.key: one.states.newest() for one in self._started if one.is_there}
        return self._first | {key: states for key, states in here.items() if states}

    def _states_for(self, loader: Any) -> WorkerStates | None:
        """Return the states for workers that start; None if they end with their iteration."""
        if not loader.persistent_workers:
            return None
        kind = f"{type(loader.dataset).__name__}, batches of {loader.batch_size}"
        self._started = [one for one in self._started if one.is_there]
        counted = Counter(one.key.partition(" #")[0] for one in self._started)
        key = f"{kind} #{counted[kind] + 1}"
        states = WorkerStates(None, 0, newest_only=True)
        if (first := self._first.pop(key, None)) is not None:
            states.go_on_with(first)
        states.note_seeded(first is not None)
        self._started.append(_Started(key, weakref.ref(loader), states))
        return states


_of_trainers: dict[int, EvaluationWorkers] = {}  # by identity: some classes of trainers compare equal or have no hash


def evaluation_workers(trainer: Any) -> EvaluationWorkers:
    """Return those of a trainer, which outlast a training: a second one of the same trainer finds the same workers."""
    if id(trainer) not in _of_trainers:
        _of_trainers[id(trainer)] = EvaluationWorkers()
        weakref.finalize(trainer, _of_trainers.pop, id(trainer), None).atexit = False
    return _of_trainers[id(trainer)]
