"""Records of checkpoints that stand whole on this disk, until they are committed.

A training may be killed after it has written a checkpoint and before the checkpoint is committed. The next launch on this
machine resumes from such a checkpoint if its record is there: it is written after all files are on the disk, with their
digests, and names the run (by the id of its journal's first entry, which no other run has) and the launch. Whoever takes the
checkpoint compares every file with its digest, so neither a record nor a folder that was cut short, or changed, can be taken.
With ``$HF_SPOT_JOURNAL_KEY`` records are signed as the journal is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_spot.errors import SpotError
from hf_spot.policy.local_copies import Copy
from hf_spot.run.checkpoint import CommitRequest, check_whole
from hf_spot.run.digest import digest_of
from hf_spot.run.manifest import FileEntry, difference, files_in
from hf_spot.run.run import Run
from hf_spot.run.seal import seal, unseal
from hf_spot.run.transfer import sync

log = logging.getLogger("hf_spot")

_NAME = re.compile(r"whole-(\d{1,9})-(\d{1,9})\.json")
_KEPT = 2  # of each training: rotation keeps no more for long
_LARGEST_BYTES = 64 << 20


@dataclass(frozen=True)
class LocalCopy:
    """One record.

    Args:
        run: id of the first entry of the run's journal.
        launch: the launch that wrote the checkpoint.
        request: as it was submitted for upload.
        files: of this disk.
    """

    run: str
    launch: int
    request: CommitRequest
    files: tuple[FileEntry, ...]

    @property
    def copy(self) -> Copy:
        """Return what decisions need."""
        request = self.request
        return Copy(self.launch, request.step, request.attempt, request.part, request.parts)

    def to_data(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        files = [asdict(file) for file in self.files]
        return {"run": self.run, "launch": self.launch, "request": asdict(self.request), "files": files}

    @classmethod
    def of(cls, told: Any) -> LocalCopy:
        """Return what `to_data` wrote. Raises CorruptCheckpoint, TypeError or KeyError if these are other values."""
        request = CommitRequest(**told["request"])
        numbers = (told["launch"], request.step, request.training, request.part, request.parts, request.world_size)
        if not all(type(one) is int and one >= 0 for one in numbers) or not isinstance(request.details, dict | None):
            raise TypeError("a field has another type")
        return cls(str(told["run"]), told["launch"], request, tuple(map(FileEntry.of, told["files"])))


def record(run: Run, output_dir: Path, folder: Path, request: CommitRequest, known: Collection[FileEntry] = ()) -> None:
    """Record that a folder has all files of a checkpoint, or of this disk's part of it.

    Args:
        run: which this process has claimed or adopted.
        output_dir: the Trainer's.
        folder: with the files.
        request: for the commit.
        known: files whose digests are known already.

    Raises:
        OSError: the folder has gone meanwhile, or the disk has lost bytes.
        IncompleteCheckpoint: a file that a resume reads is missing: Trainer's rotation may have deleted the folder meanwhile.
        SpotError: the journal could not be read.
    """
    names = files_in(folder)
    if request.parts == 1:  # what several disks have together is examined by whoever commits it
        check_whole(request, names, folder)
    for name in names:
        sync(folder / name)
    for inner in {(folder / name).parent for name in names}:
        sync(inner)
    path = output_dir / ".hf_spot" / f"whole-{request.training}-{request.step}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for parent in {folder.parent, output_dir}:
        sync(parent)
    digests = {(file.path, file.size): file.digest for file in known}
    sizes = {name: (folder / name).stat().st_size for name in names}
    files = [FileEntry(name, size, digests.get((name, size)) or digest_of(folder / name)) for name, size in sizes.items()]
    told = LocalCopy(run.journal.run_id, run.launch, request, tuple(files))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(seal(told.to_data(), run.journal.key))
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)
    for _, older in recorded(output_dir, request.training)[:-_KEPT]:
        older.unlink(missing_ok=True)


def copies(run: Run, output_dir: Path, training: int, after_step: int) -> list[LocalCopy]:
    """Return the records of a training's checkpoints beyond a step; delete the others, and what can't be read.

    Args:
        run: of the training.
        output_dir: the Trainer's.
        training: its number.
        after_step: the newest committed step.
    """
    forget(output_dir, training, after_step)
    for half in (output_dir / ".hf_spot").glob(f".whole-{training}-*.json.*"):  # of a process that was killed
        half.unlink(missing_ok=True)
    found = []
    for step, path in recorded(output_dir, training):
        try:
            if path.stat().st_size > _LARGEST_BYTES:
                raise ValueError("too large")
            copy = LocalCopy.of(unseal(path.read_bytes(), run.journal.key))
            if (copy.request.training, copy.request.step) != (training, step):
                raise ValueError("of another checkpoint")
            found.append(copy)
        except (OSError, SpotError, ValueError, TypeError, KeyError) as error:
            log.warning("%s is ignored, and deleted: %s", path, error)
            path.unlink(missing_ok=True)
    return found


def forget(output_dir: Path, training: int, up_to_step: int) -> None:
    """Delete the records of a training's checkpoints up to a step: they are committed, or of no use."""
    for step, path in recorded(output_dir, training):
        if step <= up_to_step:
            path.unlink(missing_ok=True)


def problems(copy: LocalCopy, folder: Path) -> list[str]:
    """Return how a folder differs from its record; an empty list if its files are the same to the byte, and no others."""
    others = set(files_in(folder)) - {file.path for file in copy.files}
    found = [f"{name} is not in its record" for name in sorted(others)]
    return found or [problem for file in copy.files if (problem := difference(folder, file))]


def recorded(output_dir: Path, training: int | None = None) -> list[tuple[int, Path]]:
    """Return the steps and paths of the records of a training, or of all, oldest first."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for path in (output_dir / ".hf_spot").iterdir():
            match = _NAME.fullmatch(path.name)
            if match is not None and training in (None, int(match[1])):
                found.append((int(match[2]), path))
    return sorted(found)
