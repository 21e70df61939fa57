"""Ends a process at a chosen operation, as SIGKILL does or as a power cut does.

An operation is whatever Python's audit hooks tell of files (PEP 578), each write and fsync, and each request to the store,
before it is sent and before its answer is read. After a power cut only that is left which POSIX promises: of a file what it
held at its last fsync, and in a folder the names that it had at its own.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_EVENTS = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "os.truncate"}
_active: Crash | None = None
_hooked = False


class Crash:
    """``with Crash(7, kill):`` calls ``kill`` at the seventh operation in ``folders``, or at a store's seventh request.

    ``count`` is the number of operations so far.
    """

    def __init__(self, at: int, end: Callable[[], None], *folders: Path) -> None:
        self.at, self.count = at, 0
        self._end = end
        self._folders = tuple(map(str, folders))

    def point(self) -> None:
        self.count += 1
        if self.count == self.at:
            self._end()

    def __enter__(self) -> Crash:
        global _active, _hooked
        if not _hooked:
            sys.addaudithook(_hook)
            _hooked = True
        self._fsync = os.fsync
        os.fsync = self._point_before(os.fsync)  # no audit event tells of it
        _active = self
        return self

    def __exit__(self, *error: object) -> None:
        global _active
        _active = None
        os.fsync = self._fsync

    def _point_before(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.point()
            return act(*args)

        return run

    def _concerns(self, path: object) -> bool:
        return isinstance(path, (str, Path)) and str(path).startswith(self._folders)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    crash = _active
    if crash is None:
        return
    if event == "open":
        path, _, flags = args
        if crash._concerns(path) and isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            crash.point()
    elif event in _EVENTS and any(map(crash._concerns, args)):
        crash.point()


def kill() -> None:
    """The process is gone."""
    os.kill(os.getpid(), signal.SIGKILL)


class PowerCut:
    """What would be left of a folder: ask it to follow from before the first write; calling it ends the process.

    Args:
        folder: the disk. What is in it now is safe.
        after: gets what is left; made by the call.
    """

    def __init__(self, folder: Path, after: Path) -> None:
        self._folder, self._after = folder, after
        self._contents: dict[int, bytes] = {}
        self._names: dict[int, dict[str, tuple[int, bool]]] = {}
        self._held: list[int] = []
        self._lock = threading.Lock()
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
        for root, _, files in os.walk(folder):
            self._sync_folder(root)
            self._contents |= {os.stat(Path(root, name)).st_ino: Path(root, name).read_bytes() for name in files}
        self._root = os.stat(folder).st_ino
        fsync = os.fsync

        def watched(handle: int) -> None:
            fsync(handle)
            found = os.fstat(handle)
            if stat.S_ISDIR(found.st_mode):
                with self._lock:  # an older look must not replace a newer one
                    self._sync_folder(handle)
            else:
                self._contents[found.st_ino] = Path(f"/proc/self/fd/{handle}").read_bytes()
                self._held.append(os.dup(handle))

        os.fsync = watched

    def __call__(self) -> None:
        """The power is gone."""
        self._restore(self._root, self._after)
        kill()

    def _sync_folder(self, folder: str | int) -> None:
        here = os.dup(folder) if isinstance(folder, int) else os.open(folder, os.O_RDONLY)
        with os.scandir(here) as found:
            names = {entry.name: (entry.inode(), entry.is_dir(follow_symlinks=False)) for entry in found}
        self._names[os.fstat(here).st_ino] = names
        self._held.append(here)
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # gone in the meantime
                # What is held open keeps its number, which a new file would else get.
                self._held.append(os.open(name, os.O_RDONLY, dir_fd=here))

    def _restore(self, number: int, folder: Path) -> None:
        folder.mkdir()
        for name, (inode, is_folder) in self._names.get(number, {}).items():
            if is_folder:
                self._restore(inode, folder / name)
            else:
                (folder / name).write_bytes(self._contents.get(inode, b""))
