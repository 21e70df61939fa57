"""Recognizes errors of a save that come from the disk, and explains them."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

# torch and safetensors write files outside Python, and don't raise OSError.
_OF_A_DISK = ("os error", "inline_container", "iostream error", "PytorchStreamWriter", "file write failed", "Parent directory")


def is_of_a_disk(error: BaseException) -> bool:
    """Return whether an error of code that writes files comes from the disk, and not from the data."""
    if isinstance(error, CheckpointException):
        return all(is_of_a_disk(inner) for inner, _ in error.failures.values())
    return isinstance(error, OSError) or any(word in str(error) for word in _OF_A_DISK)


def in_words(error: BaseException, folder: Path) -> str:
    """Return in words why a file in ``folder`` could not be written."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # torch's errors don't contain the reason.
    return "No space left on device" if _is_full(folder) and "os error" not in str(error) else str(error)


def _is_full(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free < 1 << 20
    return False


def free_gb(folder: Path) -> str:
    """Return in words how much space the disk of ``folder`` has."""
    with contextlib.suppress(OSError):
        return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free"
    return "disappeared"


def says_full(error: Exception) -> bool:
    """Return whether an error of safetensors means that the disk is full."""
    return "os error" in str(error) or "No space" in str(error)
