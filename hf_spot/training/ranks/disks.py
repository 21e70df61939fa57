"""The disks that ranks write to: checks them, and finds which ranks share one. Its leader uploads and restores its files."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from hf_spot.errors import ConfigError
from hf_spot.training.ranks.agreement import Agreement


@dataclass(frozen=True)
class Disk:
    """The disk under a rank's ``output_dir``.

    Args:
        index: number of the disk; rank 0's is 0.
        count: number of disks in this training.
        ranks: the ranks that write to it.
        leads: whether this rank uploads and restores its files.
    """

    index: int
    count: int
    ranks: tuple[int, ...]
    leads: bool


def find_disk(agreement: Agreement, rank: int, local_rank: int, output_dir: Path) -> Disk:
    """Find out which ranks share a disk. Every rank must call it.

    Machines either have their own disks, or share rank 0's (NFS, FSx): a test file shows which.

    Args:
        agreement: agreement of the ranks.
        rank: number of this process.
        local_rank: number of this process on its machine.
        output_dir: the Trainer's ``output_dir``; created on rank 0's disk.
    """
    if agreement.alone:
        return Disk(0, 1, (0,), True)

    def mark() -> str:
        folder = output_dir / ".hf_spot"
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / f"rank-0-{uuid.uuid4().hex}"
        made.touch()
        return made.name

    name = agreement.from_main(mark)
    seen = (output_dir / ".hf_spot" / name).exists()
    answers = agreement.gather((local_rank, seen))
    if rank == 0:
        (output_dir / ".hf_spot" / name).unlink()
    disks: list[list[int]] = [[]]
    current = disks[0]
    for number, (local, sees) in enumerate(answers):
        if local == 0:  # a machine's ranks are consecutive, and its first one answers for all
            current = disks[0] if sees else []
            if not sees:
                disks.append(current)
        current.append(number)
    index = next(at for at, ranks in enumerate(disks) if rank in ranks)
    return Disk(index, len(disks), tuple(disks[index]), disks[index][0] == rank)


def check_writable(folder: Path, *, setting: str) -> None:
    """Create the folder and write a file to it. Raises ConfigError if that fails.

    Args:
        folder: folder for checkpoints.
        setting: the setting for the folder, for the error: ``TrainingArguments(output_dir=…)``.
    """
    probe = folder / ".hf_spot" / f"probe-{os.uname().nodename}-{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{str(folder)!r} can't be written to on {os.uname().nodename}: {error.strerror or error}",
            hint=f"findmnt -T {folder}; df -h {folder}; or another {setting}",
        ) from error
