"""A real filesystem of a few megabytes that a test can fill, empty and make read-only: a tmpfs, mounted by root."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from pathlib import Path

from tests import leftovers

_TRIES = 20
_FILLER = "filler"


def why_not() -> str | None:
    """Why there can't be one here, or None."""
    if os.geteuid() != 0:
        return "no small disks: mounting needs root"
    with tempfile.TemporaryDirectory(prefix="hf_spot-probe-") as folder:
        tried = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True, text=True)
        if tried.returncode:
            return f"no small disks: {tried.stderr.strip()}"
        subprocess.run(["umount", folder], check=True)
    return None


class SmallDisk:
    """``with SmallDisk(folder, size_kb=4096) as disk:`` mounts it on the new folder, and takes it away at the end.

    Args:
        path: where it is mounted.
        size_kb: how much it holds, in kilobytes.
    """

    def __init__(self, path: Path, size_kb: int) -> None:
        self.path = path
        self._size_kb = size_kb

    def __enter__(self) -> SmallDisk:
        self.path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self._size_kb}k", leftovers.name(), self.path], check=True)
        return self

    def __exit__(self, *error: object) -> None:
        subprocess.run(["umount", "--lazy", self.path], check=True)

    @property
    def free_kb(self) -> int:
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize // 1024

    def fill(self, leave_kb: int = 0) -> None:
        """Takes all the space but ``leave_kb``, while others may write, too."""
        with (self.path / _FILLER).open("ab", buffering=0) as file:
            for tries_left in reversed(range(_TRIES)):
                try:
                    os.posix_fallocate(file.fileno(), 0, file.tell() + max(0, self.free_kb - leave_kb) * 1024)
                    return
                except OSError as error:
                    if error.errno != errno.ENOSPC or not tries_left:
                        raise

    def empty(self) -> None:
        """Gives it back."""
        (self.path / _FILLER).unlink()

    def make_read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", self.path], check=True)
