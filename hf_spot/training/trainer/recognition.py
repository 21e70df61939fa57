"""Finds out which training of the run a call of ``train()`` is, and what has changed since it was saved."""

from __future__ import annotations

from collections import defaultdict

from hf_spot.policy.trainings import Description, Known, Match, match
from hf_spot.run.run import Run
from hf_spot.training.trainer.notebook import Cell, this_cell

# The trainings that this process has finished: by the run's URL and the training's number, the notebook cell that did it.
_finished: defaultdict[str, dict[int, Cell | None]] = defaultdict(dict)


def finished(url: str, training: int) -> None:
    """Record that this process has finished a training: a further ``train()`` of it is another training."""
    _finished[url][training] = this_cell()


def forget_finished() -> None:
    """Forget what this process has finished, as in a new process. For tests."""
    _finished.clear()


def recognize(run: Run, description: Description, launch: int) -> Match:
    """Return which training of a run this is: one request, and one more for each training that the run knows.

    Args:
        run: whose state is up to date.
        description: from `hf_spot.training.trainer.description.describe`.
        launch: number of this launch; 0 before its claim.

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
                at_work=told is not None and told.launch == launch,
                done_here=number in done,
                repeated=number in done and _is_repeated(done[number]),
            )
        )
    return match(description, known, before=len(done))


def _is_repeated(finished_in: Cell | None) -> bool:
    now = this_cell()
    return finished_in is not None and now is not None and now.source == finished_in.source and now.count != finished_in.count
