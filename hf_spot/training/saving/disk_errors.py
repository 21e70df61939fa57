"""Which errors of a save come from the disk, and what they mean in words."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

# torch and safetensors write files outside Python, and their errors are no OSErrors.
_OF_A_DISK = ("os error", "inline_container", "iostream error", "PytorchStreamWriter", "file write failed", "Parent directory")


def is_of_a_disk(error: BaseException) -> bool:
    """Whether an error of something that writes files comes from the disk, and not from what was to be written."""
    if isinstance(error, CheckpointException):
        return all(is_of_a_disk(inner) for inner, _ in error.failures.values())
    return isinstance(error, OSError) or any(word in str(error) for word in _OF_A_DISK)


def in_words(error: BaseException, folder: Path) -> str:
    """Say why a file in ``folder`` could not be written."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # torch does not say why it could not write.
    return "No space left on device" if _is_full(folder) and "os error" not in str(error) else str(error)


def _is_full(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free < 1 << 20
    return False


def free_gb(folder: Path) -> str:
    """Say how much room the disk under ``folder`` has."""
    with contextlib.suppress(OSError):
        return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free"
    return "vanished"


def says_full(error: Exception) -> bool:
    """Whether an error of safetensors says that the disk is full."""
    return "os error" in str(error) or "No space" in str(error)
