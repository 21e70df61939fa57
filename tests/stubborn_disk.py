"""A filesystem that refuses calls, or fails a write: for processes that are started with `StubbornDisk.env`.

It is a library that is loaded before libc; no root and no FUSE is needed, only a C compiler.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")


def why_not() -> str:
    """Why there can't be one here; empty when there can."""
    if sys.platform != "linux":
        return "a stubborn disk needs Linux"
    return "" if shutil.which("cc") else "a stubborn disk needs a C compiler: apt-get install gcc"


def compiled(folder: Path) -> Path:
    """The library, made in ``folder``."""
    library = folder / "stubborn.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-w", "-o", library, SOURCE, "-ldl"], check=True)
    return library


class StubbornDisk:
    """A folder whose filesystem refuses.

    Args:
        library: see `compiled`.
        under: all below it is meant.
        scratch: gets the file that counts writes.
    """

    def __init__(self, library: Path, under: Path, scratch: Path) -> None:
        self.under = under
        self._library = library
        self._count = scratch / "writes"
        self._count.write_bytes(struct.pack("l", 0))

    def env(self, refuses: str = "", write: int = 0, error: int = errno.EPERM) -> dict[str, str]:
        """The environment of a process for which it refuses.

        Args:
            refuses: ``chmod``, ``link``, ``symlink``, ``utime``, ``rename``, ``fsync``, several with commas.
            write: the number, from 1, of the write that fails; 0 for none, which still counts them.
            error: with this ``errno``.
        """
        self._count.write_bytes(struct.pack("l", 0))
        return {
            "LD_PRELOAD": str(self._library),
            "STUBBORN_UNDER": os.path.realpath(self.under),
            "STUBBORN_REFUSES": refuses,
            "STUBBORN_WRITE": str(write),
            "STUBBORN_ERRNO": str(error),
            "STUBBORN_COUNT": str(self._count),
        }

    @property
    def writes(self) -> int:
        """How many there were since `env`."""
        return int(struct.unpack("l", self._count.read_bytes())[0])
