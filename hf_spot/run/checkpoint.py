"""A committed checkpoint, a request to commit one, and the checks of both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hf_spot.errors import IncompleteCheckpoint
from hf_spot.run.journal import TRAINING_KEY, CheckpointRef
from hf_spot.run.manifest import FileEntry, missing_for_resume

WEIGHTS_ONLY = "weights"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Args:
        ref: the short record of it in the journal's state.
        time: when it was committed, by the writer's clock.
        reason: why it was saved: ``schedule``, ``cadence``, ``notice``, ``advisory``, ``end`` or ``push``; ``weights`` if only
            its weights are kept.
        files: its manifest.
        details: everything else that the commit recorded (world size, batch sizes, measured durations, …).
    """

    ref: CheckpointRef
    time: datetime
    reason: str
    files: tuple[FileEntry, ...]
    details: dict[str, Any]

    @property
    def step(self) -> int:
        """Return the number of optimizer steps done."""
        return self.ref.step

    @property
    def name(self) -> str:
        """Return the name that Trainer gives the folder; of weights alone another one, which Trainer does not resume from."""
        return f"{'weights' if self.reason == WEIGHTS_ONLY else 'checkpoint'}-{self.ref.step}"


@dataclass(frozen=True)
class CommitRequest:
    """What a commit will record about a checkpoint. `Checkpoint` explains the fields.

    ``part`` (of ``parts``) is the number of the disk that holds these files, when each machine writes to its own disk.
    ``apart`` is a suffix that separates the files from those of an earlier checkpoint of the same step; empty if there is none.
    ``attempt`` is the same on all machines, and new whenever a launch starts its training again: what a machine said about an
    earlier save of this step counts no more.
    """

    step: int
    training: int = 1
    reason: str = "schedule"
    complete: bool = False
    best_step: int | None = None
    world_size: int = 1
    details: dict[str, Any] | None = None
    part: int = 0
    parts: int = 1
    apart: str = ""
    attempt: str = ""

    def prefix(self, launch: int) -> str:
        """Return the key in the store under which this checkpoint's files are kept, without a trailing slash.

        Args:
            launch: number of the launch that writes it.
        """
        training = "" if self.training == 1 else f"/stage-{self.training}"
        pushed = "/pushed" if self.reason == "push" else ""  # never where the launch itself writes
        return f"e{launch:04d}{pushed}{training}/checkpoint-{self.step}{f'-{self.apart}' if self.apart else ''}"

    def to_data(self, launch: int) -> dict[str, Any]:
        """Return what the commit's entry records, without the files.

        Args:
            launch: number of the launch that writes it.
        """
        return {
            "step": self.step,
            TRAINING_KEY: self.training,
            "reason": self.reason,
            "complete": self.complete,
            "best_step": self.best_step,
            "world_size": self.world_size,
            "prefix": self.prefix(launch),
            **(self.details or {}),
        }


def check_resumable(checkpoint: Checkpoint, url: str) -> None:
    """Check that a committed checkpoint has every file that a resume reads: one that was pushed by hand may hold only a model.

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
        request: the commit to be made.
        paths: names of the checkpoint's files.
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
