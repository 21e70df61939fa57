"""Finds out which training of the run a call of ``train()`` is, and what has changed since it was saved."""

from __future__ import annotations

import logging
from collections import defaultdict
from types import MappingProxyType

from hf_spot.errors import ConfigError
from hf_spot.log import warn_for_all
from hf_spot.policy.changes import consequences
from hf_spot.policy.trainings import FOLDER, LENGTH, Description, Known, Match, differences, match, steps_left
from hf_spot.run.checkpoint import Checkpoint
from hf_spot.run.journal import CheckpointRef, TrainingRef
from hf_spot.run.run import Run
from hf_spot.training.session.notebook import Cell, this_cell
from hf_spot.training.session.run_session import RunSession
from hf_spot.training.upstream.versions import version_changes

log = logging.getLogger("hf_spot")

# The trainings that this process has finished: by the run's URL and the training's number, the notebook cell that did it.
_finished: defaultdict[str, dict[int, Cell | None]] = defaultdict(dict)
_begun: defaultdict[str, set[int]] = defaultdict(set)  # the trainings that this process has begun, by the run's URL


def finished(url: str, training: int) -> None:
    """Record that this process has finished a training: a further ``train()`` of it is another training."""
    _finished[url][training] = this_cell()


def forget_finished() -> None:
    """Forget what this process has finished, as in a new process. For tests."""
    _finished.clear()
    _begun.clear()


class KnownTraining:
    """What a run knows about this training. Every rank must call every method.

    Args:
        session: connection to the run.
        description: what it trains, by names; empty if that is not known yet.
        first_is_known: as in `hf_spot.policy.trainings.match`.
        again: number of a training that this process has finished, and that this one may be all the same; 0 for none.
    """

    def __init__(self, session: RunSession, description: Description, *, first_is_known: bool = False, again: int = 0) -> None:
        self._first_is_known = first_is_known
        self._again = again
        self._session = session
        self._description = description
        self._match = Match(1)
        self._described = 0
        self._changed: tuple[str, ...] = ()
        self._in_words: list[str] = []

    @property
    def described(self) -> int:
        """Return the number of the journal's entry that describes what this training trains."""
        return self._described

    @property
    def changed(self) -> tuple[str, ...]:
        """Return the names of what has changed since the restored checkpoint was saved."""
        return self._changed

    @property
    def changed_in_words(self) -> list[str]:
        """Return what has changed since the restored checkpoint was saved, or without one since the training was described.

        Only rank 0 knows what has changed since a save.
        """
        if self._in_words or self._match.known is None:
            return self._in_words
        return [f"{name.rstrip('.')} has changed" for name in self._match.differences]

    def find(self) -> bool:
        """Find out which training of the run this is, and enter it. Return whether it is complete, so that no claim is needed.

        Raises:
            StoreError: the store could not be read.
        """
        session = self._session
        if session.runtime is not None:
            session.claim()  # the launcher has: this adopts it

        def on_main() -> tuple[Match, bool]:
            run = session.run
            state = run.journal.state if run.launch else run.state()
            found = recognize(run, self._description, run.launch, first_is_known=self._first_is_known, again=self._again)
            newest = state.latest(found.number)
            return found, newest is not None and newest.complete and LENGTH.isdisjoint(found.differences)

        self._match, is_complete = session.agreement.from_main(on_main)
        session.enter(self._match.number)
        return is_complete

    def compare(self, restored: Checkpoint) -> bool:
        """Report what has changed since a checkpoint was saved. Return whether there is nothing left to train.

        Raises:
            ConfigError: something has changed, and that should end the training; or it can't be told how long it is now.
        """
        is_over, self._changed = self._session.agreement.from_main(lambda: self._compare_on_main(restored))
        return is_over

    def _compare_on_main(self, restored: Checkpoint) -> tuple[bool, tuple[str, ...]]:
        before, now, length = self._before(restored), self._description, restored.details.get("max_steps")
        changed = differences(before, now)
        left = steps_left(before, now, step=restored.step, max_steps=length) if LENGTH & set(changed) else None
        told = [*consequences(before, now, changed, restored.step, left=left), *version_changes(restored.details)]
        if told and self._session.arguments.on_change == "stop":
            raise ConfigError(
                f"since step {restored.step} was saved, this has changed: {'; '.join(told)}",
                hint="--on-change go-on to train on with it, or undo the change",
            )
        self._in_words = told
        for one in told:
            warn_for_all("since step %d was saved, %s", restored.step, one)
        if LENGTH.isdisjoint(changed):
            wanted = int(now.get("max_steps") or -1)
            end = wanted if wanted > 0 else length
            reached = end is not None and restored.step >= end  # of a checkpoint of another run, say
            return restored.ref.complete or reached, changed
        if left is None and restored.ref.complete:
            raise ConfigError(
                "num_train_epochs has replaced max_steps in a training that is finished: how many steps are left can't be told",
                hint="TrainingArguments(max_steps=…) with the new number of steps",
            )
        return left is False, changed

    def _before(self, restored: Checkpoint) -> Description:
        """Return what the training was when a checkpoint was saved; empty if that was not recorded."""
        entry, origin = restored.details.get("described"), restored.details.get("from")
        if isinstance(entry, int) and entry > 0:
            return self._session.run.description(entry)
        trained = origin.get("trains") if isinstance(origin, dict) else None  # in the run that it comes from
        return trained if isinstance(trained, dict) else {}

    @property
    def known_description(self) -> Description:
        """Return what the run has recorded about this training; empty for a new one."""
        known = self._match.known
        return {} if known is None or known.description is None else known.description

    def record(self, also: Description = MappingProxyType({})) -> None:
        """Record what this training trains, unless the run knows it already. The run must be claimed.

        Args:
            also: values that say how it is trained, for later launches; they don't tell it from others.
        """
        self._description = {**self._description, **also}
        described = self._session.agreement.from_main(self._record_on_main)
        self._described = described.entry
        self._session.enter(described.training)
        _begun[self._session.run.url].add(described.training)

    def _record_on_main(self) -> TrainingRef:
        run, known, similar = self._session.run, self._match.known, self._match.similar
        refs = {one.training: one for one in run.journal.state.trainings}
        if known is not None and known.description is not None and not self._match.differences and known.number in refs:
            return refs[known.number]
        if similar is not None:
            _tell_other(similar.number, self._match.differences, run.journal.state.latest(similar.number))
        return run.describe_training(None if known is None else known.number, self._description)


def _tell_other(number: int, differences: tuple[str, ...], newest: CheckpointRef | None) -> None:
    """Report that a training is another than the one that it resembles most."""
    shown = ", ".join(name.rstrip(".") for name in differences[:5]) + (", …" if len(differences) > 5 else "")
    if newest is None or newest.complete:
        log.info("this is another training than number %d of this run: they differ in %s", number, shown)
        return
    warn_for_all(
        "this is taken for another training than number %d of this run, which is at step %d: they differ in %s. To resume that "
        "one, restore the old %s",
        number,
        newest.step,
        shown,
        FOLDER if FOLDER in differences else "settings",
    )


def recognize(run: Run, description: Description, launch: int, *, first_is_known: bool = False, again: int = 0) -> Match:
    """Return which training of a run this is: one request, and one more for each training that the run knows.

    Args:
        run: whose state is up to date.
        description: what it trains.
        launch: number of this launch; 0 before its claim.
        first_is_known: as in `hf_spot.policy.trainings.match`.
        again: as in `KnownTraining`.

    Raises:
        StoreError: the store could not be read.
    """
    state, done = run.journal.state, _finished[run.url]
    described = {one.training: one for one in state.trainings}
    known = []
    for number in sorted({ref.training for ref in state.checkpoints} | described.keys()):
        newest, told = state.latest(number), described.get(number)
        known.append(
            Known(
                number,
                None if told is None else run.description(told.entry),
                complete=newest is not None and newest.complete,
                at_work=told is not None and told.launch == launch and number not in _begun[run.url],
                done_here=number in done and number != again,
                repeated=number in done and _is_repeated(done[number]),
            )
        )
    return match(description, known, before=len(done), first_is_known=first_is_known)


def _is_repeated(finished_in: Cell | None) -> bool:
    now = this_cell()
    return finished_in is not None and now is not None and now.source == finished_in.source and now.count != finished_in.count
