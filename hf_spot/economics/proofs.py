"""The checkpoints of a run and what the journal proves about each. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hf_spot.policy.words import counted
from hf_spot.run.checkpoint import WEIGHTS_ONLY
from hf_spot.run.journal import CheckpointRef, Entry
from hf_spot.run.manifest import missing_for_resume

_TITLES = ("checkpoint", "size", "launch", "reason", "committed (UTC)", "", "proven")
_WITH_FILES = ("weights", "optimizer")  # are compared with the checkpoint's files
_OF_RANKS = "ranks"  # the digest of what single ranks compare
_MOST_LAUNCHES = 4  # named, the newest ones


def checkpoint_rows(entries: Sequence[Entry]) -> list[list[str]]:
    """Return one row per checkpoint that exists, below a header: first those of which only the weights are kept.

    Args:
        entries: of the journal, oldest first.
    """
    rows = [list(_TITLES)]
    if not entries:
        return rows
    state, by_number = entries[-1].state, {entry.number: entry for entry in entries}
    resumed: dict[int, list[Entry]] = {}
    for entry in entries:
        if entry.kind == "resumed" and isinstance(entry.data.get("entry"), int):
            resumed.setdefault(entry.data["entry"], []).append(entry)
    for ref in (*state.weights, *state.checkpoints):
        if (commit := by_number.get(ref.entry)) is not None:
            rows.append(_row(ref, commit, resumed.get(ref.entry, [])))
    return rows


def _row(ref: CheckpointRef, commit: Entry, resumed: Sequence[Entry]) -> list[str]:
    marks = " ".join(word for word, holds in (("best", ref.best), ("complete", ref.complete)) if holds)
    kind = "weights" if commit.kind == WEIGHTS_ONLY else "checkpoint"
    name = f"{kind}-{ref.step}" + (f" of training {ref.training}" if ref.training > 1 else "")
    size, reason = f"{ref.size_bytes / 1e6:,.1f} MB", str(commit.data.get("reason", ""))
    return [name, size, str(ref.launch), reason, f"{commit.time:%Y-%m-%d %H:%M:%S}", marks, "; ".join(_proven(commit, resumed))]


def _proven(commit: Entry, resumed: Sequence[Entry]) -> Iterable[str]:
    """Yield what a commit and the launches that resumed from it prove."""
    data = commit.data
    files = [one for one in data["files"] if isinstance(one, dict)]
    yield f"{counted(len(files), 'file')} with digests"
    ranks = data.get("world_size")
    if missing_for_resume((str(one.get("path")) for one in files), ranks if type(ranks) is int and ranks > 0 else 1):
        yield "no training can resume from it"
    if data.get("finite") is True:
        yield "no NaN or infinity found"
    compared = _compared(resumed)
    if compared:
        numbers = [str(entry.launch) for entry in resumed]
        named = f"{len(numbers)} launches" if len(numbers) > _MOST_LAUNCHES else f"launch {', '.join(numbers)}"
        yield f"resumed by {named} exactly as saved: {', '.join(compared)}"
    elif (fingerprint := data.get("fingerprint")) and isinstance(fingerprint, dict):
        digests = (str(part) for part in fingerprint if part != _OF_RANKS)
        yield f"a resume will compare {', '.join(dict.fromkeys((*_WITH_FILES, *digests)))}"


def _compared(resumed: Sequence[Entry]) -> list[str]:
    """Return the parts that were the same in all resumes."""
    told: list[Any] = [entry.data.get("verified") for entry in resumed]
    parts = [[str(part) for part in one] for one in told if isinstance(one, list)]
    return [part for part in parts[0] if all(part in one for one in parts)] if parts else []
