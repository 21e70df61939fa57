"""Files of a checkpoint that are not written yet: whoever touches one waits until it is.

A script's own ``_save_checkpoint`` or ``on_save`` may copy, upload or read back what has just been saved. Python reports such
accesses by audit events (PEP 578) before they happen; what it does not report is wrapped: ``os.stat`` and its relatives, which
say whether a file exists, and safetensors' reader, which is compiled. Other programs are covered as far as Python starts them:
it waits before it does.

An audit hook can't be removed. It is installed with the first save that needs it, and costs less than a microsecond per event
while everything is written.
"""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

from hf_spot.training.upstream import SAFE_OPEN

# Events by the positions of the paths in their arguments. A file is touched by its name; a folder by a file in it or below it.
_FILES = {
    "open": (0,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.utime": (0,),
    "os.remove": (0,),
    "os.getxattr": (0,),
    "os.listxattr": (0,),
    "os.setxattr": (0,),
    "shutil.copyfile": (0, 1),
    "shutil.copymode": (0, 1),
    "shutil.copystat": (0, 1),
}
_LISTINGS = {"os.listdir": (0,), "os.scandir": (0,)}
_TREES = {
    "os.rename": (0, 1),
    "os.link": (0,),
    "shutil.copytree": (0,),
    "shutil.move": (0, 1),
    "shutil.rmtree": (0,),
    "shutil.make_archive": (2, 3),
    "shutil.unpack_archive": (0,),
}
# Something else begins to run, and its accesses can't be seen.
_STARTS = {"subprocess.Popen", "os.system", "os.posix_spawn", "os.spawn", "os.exec", "os.fork", "os.forkpty"}
_NOTICES = {"socket.connect"}  # somebody elsewhere may be told of the folder
_OS = ("stat", "lstat", "access")
_LIBRARIES = ("hf_spot", "torch", "safetensors", "transformers", "trl", "peft", "sentence_transformers", "accelerate")

_all: tuple[Unwritten, ...] = ()  # those with files
_changing = threading.Lock()
_busy = threading.local()  # threads whose accesses are not met
_is_installed = False
_STDLIB = sysconfig.get_paths()["stdlib"]


class Unwritten:
    """The files of one save that are not written yet.

    Args:
        arrive: waits until they are, or writes them; called in the thread that touches one, with what it touches, just before
            it does. An exception from it reaches that code instead of the file.
    """

    def __init__(self, arrive: Callable[[str], None]) -> None:
        self._arrive = arrive
        self._paths: frozenset[str] = frozenset()  # replaced, not changed: other threads read it
        self._process = os.getpid()
        self._strict: dict[int, frozenset[str]] = {}  # threads in which everything that starts may read the files

    def add(self, path: str) -> None:
        """Make others wait for a file, or for a folder that does not exist yet."""
        _install()
        with self.ours():
            self._paths |= {_real(path)}
        _change(self, there=True)

    def clear(self) -> None:
        """Make nobody wait any more: everything is written, or will never be."""
        self._paths = frozenset()
        _change(self, there=False)

    def __bool__(self) -> bool:
        return bool(self._paths)

    @staticmethod
    @contextmanager
    def ours() -> Iterator[None]:
        """Let this thread access all files within the block."""
        before = getattr(_busy, "now", False)
        _busy.now = True
        try:
            yield
        finally:
            _busy.now = before

    @contextmanager
    def strict(self, *, told: bool = False) -> Iterator[None]:
        """Let whatever this thread starts within the block wait: subprocesses, forks.

        Args:
            told: connections to others, too: they may be told of the folder.
        """
        thread = threading.get_ident()
        before = self._strict.get(thread)
        self._strict[thread] = frozenset(_STARTS | _NOTICES if told else _STARTS)
        try:
            yield
        finally:
            if before is None:
                del self._strict[thread]
            else:
                self._strict[thread] = before

    def meet(self, event: str, args: tuple[Any, ...]) -> None:
        """Make this thread wait if an event is about one of the files."""
        if getattr(_busy, "now", False) or os.getpid() != self._process:
            return
        with self.ours():
            touched = self._touched(event, args)
            if touched is not None:
                self._arrive(touched)

    def _touched(self, event: str, args: tuple[Any, ...]) -> str | None:
        """Return what an event touches, for people; None if nothing that is unwritten."""
        if event in self._strict.get(threading.get_ident(), ()):
            return "starts another process" if event in _STARTS else "connects to a server"
        if event in _STARTS:
            return "starts a process on its folder" if any(map(self._is_named, _words(args))) else None
        for kinds, is_touched in ((_FILES, self._is_file), (_LISTINGS, self._is_folder), (_TREES, self._is_above)):
            for at in kinds.get(event, ()):
                path = _path(args[at]) if at < len(args) else None
                if path is not None and is_touched(path):
                    return f"touches {os.path.basename(path)}"
        return None

    def _is_named(self, word: str) -> bool:
        """Return whether a word of a command names one of their folders, or a folder around it."""
        if any(os.path.dirname(one) in word for one in self._paths):
            return True
        return os.path.isdir(word) and self._is_above(os.path.abspath(word))

    def _is_file(self, path: str) -> bool:
        """Return whether a path is unwritten, or below what is."""
        if not any(os.path.basename(one) in path for one in self._paths):
            return False
        real = _real(path)
        return any(real == one or real.startswith(one + os.sep) for one in self._paths)

    def _is_folder(self, path: str) -> bool:
        real = os.path.realpath(path)
        return any(os.path.dirname(one) == real for one in self._paths) or self._is_file(path)

    def _is_above(self, path: str) -> bool:
        real = os.path.realpath(path)
        return self._is_file(path) or any(one.startswith(real + os.sep) for one in self._paths)


def caller() -> str:
    """Return which function of a script, or else of a library, this thread executes, for people."""
    frame: FrameType | None = sys._getframe(1)
    library = ""
    while frame is not None:
        code = frame.f_code
        if not _is_passed_over(frame):
            # co_qualname exists from Python 3.11 on
            shown = f"{getattr(code, 'co_qualname', code.co_name)} ({os.path.basename(code.co_filename)}:{frame.f_lineno})"
            if _package(frame) not in _LIBRARIES:
                return shown
            library = library or shown
        frame = frame.f_back
    return library or "a thread"


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _is_passed_over(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    of_python = file.startswith((_STDLIB, "<frozen")) and not ("site-packages" in file or "dist-packages" in file)
    return of_python or _package(frame) == "hf_spot"


def _real(path: str) -> str:
    """Return a path without links on the way to it; it may be one itself."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def _path(value: Any) -> str | None:
    if isinstance(value, (str, bytes, os.PathLike)):
        return os.path.abspath(os.fsdecode(value))
    return None


def _words(args: tuple[Any, ...]) -> Iterator[str]:
    """Yield the words of a command, and where it is executed; not its environment."""
    for one in args[:3]:
        for word in one if isinstance(one, (list, tuple)) else (one,):
            if isinstance(word, (str, bytes, os.PathLike)):
                yield os.fsdecode(word)


def _change(one: Unwritten, *, there: bool) -> None:
    global _all
    with _changing:
        _all = (*(other for other in _all if other is not one), *[one] * there)


def _meet(event: str, args: tuple[Any, ...]) -> None:
    for one in _all:
        one.meet(event, args)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _all and (event in _FILES or event in _LISTINGS or event in _TREES or event in _STARTS or event in _NOTICES):
        _meet(event, args)


def _install() -> None:
    global _is_installed
    with _changing:
        if _is_installed:
            return
        _is_installed = True
        for name in _OS:
            _wrap_in_os(name)
        if (plain := SAFE_OPEN.find()) is not None:
            opening = _gated(plain)
            for module in who_have_imported(SAFE_OPEN.name, plain):
                setattr(module, SAFE_OPEN.name, opening)
        sys.addaudithook(_hook)


def who_have_imported(name: str, value: Any) -> list[ModuleType]:
    """Return the modules in which a name stands for a value.

    They are not asked for it: some import half a library then, and fail if one of its parts needs a package that is missing.
    """
    modules = [one for one in list(sys.modules.values()) if isinstance(one, ModuleType)]
    return [one for one in modules if vars(one).get(name) is value]


def _gated(plain: Callable[..., Any]) -> Any:
    """Return a function that is met like ``open``, and then does what ``plain`` does."""

    @functools.wraps(plain)
    def gated(*args: Any, **kwargs: Any) -> Any:
        if _all:
            _meet("open", args[:1] or tuple(kwargs.values())[:1])
        return plain(*args, **kwargs)

    return gated


def _wrap_in_os(name: str) -> None:
    plain = getattr(os, name)
    gated = _gated(plain)
    setattr(os, name, gated)
    for can in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks, os.supports_effective_ids):
        if plain in can:
            can.add(gated)
