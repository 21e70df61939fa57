"""What ``hf-spot launch --dry-run`` says: what a launch would go on from, and what it would run."""

from __future__ import annotations

import shlex
from datetime import timezone

from hf_spot.launch.command import Command
from hf_spot.run.journal import CheckpointRef, RunState
from hf_spot.run.run import Run
from hf_spot.run.start_from import find_start


def describe(run: Run, state: RunState, command: Command, finished_by: str | None) -> str:
    """Return the text. The run is read, and nothing is written.

    Args:
        run: the run.
        state: its state.
        command: what would be started.
        finished_by: the fingerprint of the command that finished the run; None if it is not finished, or nobody recorded it.

    Raises:
        SpotError: ``--from`` names nothing that can be resumed from, or the store can't be read.
    """
    lines = [("run", f"{run.url}: {_history(state)}"), ("it would", _begin(run, state, command, finished_by))]
    if command.machines.are_elastic:
        lines.append(("machines", f"{command.machines.least} to {command.machines.count}, which meet in the run"))
    elif command.machines.count > 1:
        lines.append(("machines", f"{command.machines.count}; this is machine {command.machines.rank}"))
    lines.append(("script", shlex.join(command.script)))
    lines += [("note", remark) for remark in command.remarks]
    return "\n".join(f"{name + ':':<10}{text}" for name, text in lines) + "\nnothing was started or written"


def _history(state: RunState) -> str:
    if not state.number:
        return "new"
    if state.ended is None:
        return f"launch {state.launch} is running, or died without a word; a new launch keeps it from writing"
    return f"launch {state.launch} has ended: {state.ended}"


def _begin(run: Run, state: RunState, command: Command, finished_by: str | None) -> str:
    newest = state.latest()
    if state.ended == "finished" and command.has_finished(finished_by):
        return f"do nothing: the run is finished at step {newest.step if newest else 0}"
    number = f"as launch {state.launch + 1}"
    if newest is None and command.arguments.start_from is not None:
        start = find_start(command.arguments.start_from)
        return f"start from step {start.step} of {start.name}, {number}"
    if newest is None:
        return f"begin from the start, {number}: the run has no checkpoint"
    trainings = {ref.training: ref for ref in state.checkpoints}
    return f"go on {number} from " + "; ".join(_about(run, ref, several=len(trainings) > 1) for ref in trainings.values())


def _about(run: Run, ref: CheckpointRef, *, several: bool) -> str:
    checkpoint = run.checkpoint(ref)
    when = f"{checkpoint.time.astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"
    of = f" of training {ref.training}" if several else ""
    complete = ", which is complete" if ref.complete else ""
    size = f"{ref.size_bytes / 1e6:,.1f} MB"
    return f"step {ref.step}{of}, committed by launch {ref.launch} at {when} ({checkpoint.reason}, {size}){complete}"
