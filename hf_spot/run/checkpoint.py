"""A committed checkpoint, and what is asked of a commit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hf_spot.errors import IncompleteCheckpoint
from hf_spot.run.journal import CheckpointRef
from hf_spot.run.manifest import FileEntry, missing_for_resume


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Args:
        ref: what the journal's state remembers of it.
        time: when it was committed, by the writer's clock.
        reason: why it was saved: ``schedule``, ``cadence``, ``notice``, ``advisory``, ``end`` or ``push``.
        files: its manifest.
        details: everything else that the commit recorded (world size, batch sizes, seconds measured, …).
    """

    ref: CheckpointRef
    time: datetime
    reason: str
    files: tuple[FileEntry, ...]
    details: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.ref.step

    @property
    def name(self) -> str:
        """The folder's name, as Trainer would write it."""
        return f"checkpoint-{self.ref.step}"


@dataclass(frozen=True)
class CommitRequest:
    """What is to be said about a checkpoint when it is committed; `Checkpoint` gives the meanings.

    ``part`` of ``parts``: which disk's files these are, when a training's machines each write to their own. ``apart``: what
    sets its files apart from those of an earlier checkpoint of the same step; empty where there is none.
    """

    step: int
    stage: int = 1
    reason: str = "schedule"
    complete: bool = False
    best_step: int | None = None
    world_size: int = 1
    details: dict[str, Any] | None = None
    part: int = 0
    parts: int = 1
    apart: str = ""

    def prefix(self, launch: int) -> str:
        """Key in the store under which the files of this checkpoint stand, without a slash at its end.

        Args:
            launch: number of the launch that writes it.
        """
        stage = "" if self.stage == 1 else f"/stage-{self.stage}"
        pushed = "/pushed" if self.reason == "push" else ""  # never where the launch itself writes
        return f"e{launch:04d}{pushed}{stage}/checkpoint-{self.step}{f'-{self.apart}' if self.apart else ''}"


def check_resumable(checkpoint: Checkpoint, url: str) -> None:
    """Check that a committed checkpoint has every file that a resume reads; what was pushed by hand may be a model alone.

    Raises:
        IncompleteCheckpoint: a file is missing.
    """
    missing = missing_for_resume((file.path for file in checkpoint.files), checkpoint.details.get("world_size", 1))
    if missing:
        raise IncompleteCheckpoint(
            f"{checkpoint.name} of {url} lacks {', '.join(missing)}: no training can resume from it",
            hint=f"another --step of: hf-spot checkpoints ls {url}",
        )


def check_whole(request: CommitRequest, paths: Iterable[str], where: object) -> None:
    """Check that a checkpoint has every file that a resume reads.

    Args:
        request: what is committed.
        paths: names of its files.
        where: the folder or key, for the message.

    Raises:
        IncompleteCheckpoint: a file is missing.
    """
    missing = missing_for_resume(paths, request.world_size)
    if missing and request.reason != "push":
        raise IncompleteCheckpoint(
            f"{where} lacks {', '.join(missing)}: it can't be resumed from and is not committed",
            hint="TrainingArguments(save_only_model=False)",
        )
