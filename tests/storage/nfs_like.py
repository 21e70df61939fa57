"""Stands in for NFS where the kernel has no client for it: a folder mounted by FUSE, whose mounts cache as NFS clients do, and
which can lose the answer to a link and forget files, as NFS servers do.

``python -m tests.storage.nfs_like BACKING MOUNT FAULTS CACHE_S``, in the foreground; root and libfuse are needed.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import mfusepy as fuse


class NFSLike(fuse.Operations):
    """Passes everything on to ``backing``.

    Args:
        backing: what all mounts share.
        faults: a folder; the file ``lose-link`` there has the next link done and answered EEXIST, as by a server that was asked
            again; ``stale`` has the next read answered ESTALE. Each is used up.
    """

    use_ns = True

    def __init__(self, backing: Path, faults: Path) -> None:
        self._backing = backing
        self._faults = faults

    def _there(self, path: str) -> str:
        return f"{self._backing}{path}"

    def _ordered(self, fault: str) -> bool:
        try:
            (self._faults / fault).unlink()
        except FileNotFoundError:
            return False
        return True

    def getattr(self, path: str, fh: Any = None) -> dict[str, Any]:
        found = os.lstat(self._there(path))
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_ino", "st_blocks")
        times = {f"st_{name}time": getattr(found, f"st_{name}time_ns") for name in "amc"}
        return {name: getattr(found, name) for name in names} | times

    def readdir(self, path: str, fh: Any) -> list[str]:
        return [".", "..", *os.listdir(self._there(path))]

    def mkdir(self, path: str, mode: int) -> int:
        os.mkdir(self._there(path), mode)
        return 0

    def rmdir(self, path: str) -> int:
        os.rmdir(self._there(path))
        return 0

    def unlink(self, path: str) -> int:
        os.unlink(self._there(path))
        return 0

    def rename(self, old: str, new: str) -> int:
        os.rename(self._there(old), self._there(new))
        return 0

    def link(self, target: str, source: str) -> int:
        os.link(self._there(source), self._there(target))
        if self._ordered("lose-link"):
            raise fuse.FuseOSError(errno.EEXIST)
        return 0

    def open(self, path: str, flags: int) -> int:
        return os.open(self._there(path), flags)

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return os.open(self._there(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        if self._ordered("stale"):
            raise fuse.FuseOSError(errno.ESTALE)
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: Any = None) -> int:
        os.truncate(self._there(path), length)
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        os.fsync(fh)
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        return 0

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0


if __name__ == "__main__":
    backing, mount, faults, cache_s, source = sys.argv[1:]
    cached = {name: float(cache_s) for name in ("entry_timeout", "attr_timeout", "negative_timeout")}
    fuse.FUSE(NFSLike(Path(backing), Path(faults)), mount, foreground=True, direct_io=True, fsname=source, **cached)
