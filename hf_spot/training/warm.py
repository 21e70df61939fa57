"""A warm spare: a Python that was started before it is needed, has run its imports, and waits to be told that it is needed.

It was started with the command line and the environment of the process that it will be, and does what that would do, in the
same order; only it does it earlier. `hf_spot.launch.agent` and `hf_spot.training.bootstrap` are such processes if a variable
names a socket. What has changed since then is examined when the order comes, and the spare refuses it if a fresh Python could
be another one.

Until then it has no port and no device, and its output is held back. The imports run in a thread of their own: a priority that
was lowered (nice 19) can be raised again by few users, and that of the main thread, which trains later, stays as it is.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
import importlib.machinery
import importlib.util
import json
import os
import select
import site
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from hf_spot.policy.first_imports import Statement, first_imports, imports_torch
from hf_spot.policy.warm import differing, is_of_launch, looks_for_others, same_command
from hf_spot.runtime import WAITS_ON

_FIRST_TO_GO = 1000  # for the kernel, when memory is short
_LONGEST_LINE_BYTES = 2**20
_DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/", "/dev/davinci", "/dev/accel", "/dev/habanalabs")
_OWN_PACKAGE = Path(__file__).resolve().parent.parent
_RESTORE_S = 0.5
_COMPREHENSIONS = ("<genexpr>", "<listcomp>", "<setcomp>", "<dictcomp>")
_OF_MAPPINGS = ("os", "collections.abc", "_collections_abc")  # modules of os.environ's own methods
_SUBNORMAL = 2.2250738585072014e-308


class Unfit(Exception):
    """A spare can't be made of this command, and no further one should be tried."""


class WarmSpare:
    """This process, while it waits.

    Args:
        fd: of the socket to whoever has started it.
        nice: the priority of its imports, as of the command ``nice``.
    """

    def __init__(self, fd: int, nice: int) -> None:
        os.set_inheritable(fd, False)
        self.connection = socket.socket(fileno=fd)
        self.nice = nice
        self._received = b""
        self._started_with = {name: value for name, value in os.environ.items() if name != WAITS_ON}
        os.environ.pop(WAITS_ON, None)
        self._began_ns = time.time_ns()
        self._read: set[str] = set()  # names of variables
        self._files: dict[str, tuple[int, int]] = {}
        self._statements: list[Statement] | None = None
        self._argv: Sequence[str] = ()
        self.outputs: Mapping[int, int] = {}  # where the standard output and the standard error go that are held back

    @classmethod
    def from_environ(cls) -> WarmSpare | None:
        """Return this process as a spare; None if it is to begin at once."""
        return cls(*map(int, os.environ[WAITS_ON].split(","))) if WAITS_ON in os.environ else None

    def wait(
        self,
        work: Callable[[], None],
        also: Callable[[], Mapping[socket.socket, Callable[[], str | bool]]] = dict,
        *,
        any_arguments: bool = False,
    ) -> list[str]:
        """Do the work beforehand, then wait for the order to begin, and take over its variables.

        Args:
            work: the imports; runs in another thread.
            any_arguments: the command may have got other arguments.
            also: called when the work is done; returns connections that are read meanwhile, each with a function that is called
                when there is something to read, and returns True once it is done, or why it never will be.

        Returns:
            The command line to go on with. The process ends if it is no longer needed, or not fit for what it is needed for.
        """
        with _held_output() as self.outputs, _first_to_go(), _low_autogroup(self.nice):
            with self._observed():
                failed = self._done_aside(work)
            if failed is not None:
                self._end({"unfit": failed})
            self._files = _files()
            if (told := self._changed_meanwhile()) is not None:
                self._end({"gone": told})
            waited_for = dict(also())
            if not waited_for:
                self._tell({"ready": True})
            while True:
                ready = select.select([self.connection, *waited_for], [], [])[0]
                if self.connection in ready and (order := self._order()) is not None:
                    break
                for one in ready:
                    if one not in waited_for:
                        continue
                    if (state := waited_for[one]()) is not True:
                        self._end({"unfit": state})
                    del waited_for[one]
                    if not waited_for:
                        self._tell({"ready": True})
            why = self._why_not(order, any_arguments=any_arguments)
            if waited_for or why is not None:
                self._end({"no": why or "the spares of its ranks are not ready"})
            for name in {*self._started_with, *order["environ"]}:
                value = order["environ"].get(name)
                if value == self._started_with.get(name):
                    continue
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
        self._tell({"yes": True})
        self.connection.close()
        if (of_every_python := sys.modules.pop("_hf_spot_sitecustomize", None)) is not None:
            of_every_python.begin_launch()
        argv: list[str] = order["argv"]
        return argv

    def first_imports_of(self, argv: Sequence[str]) -> None:
        """Run the first imports of a script, as far as they are of installed packages.

        Args:
            argv: ``--module`` or nothing, the script or module, and its arguments.

        Raises:
            Unfit: nothing that takes time is imported there, or a package uses a device as soon as it is imported.
        """
        source, package = _source(argv)
        namespace = {"__name__": "__main__", "__package__": package, "__file__": argv[-1]}
        self._argv, self._statements = argv, []
        for one in first_imports(source):
            if not all(_is_installed(name or (package or "").partition(".")[0]) for name in one.modules):
                break
            exec(compile(one.source, argv[0], "exec", dont_inherit=True), namespace)
            self._statements.append(one)
            if used := _devices():
                raise Unfit(f"`{one.source}` uses {used[0]} as soon as it is imported")
        if not imports_torch(self._statements):
            raise Unfit("the script does something of its own before it imports torch or transformers")

    # -- before the order ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _observed(self) -> Iterator[None]:
        """Note the names of variables that are read within the block."""
        kind: Any = type(os.environ)
        getitem = kind.__getitem__

        def observing(environ: Any, name: str) -> str:
            if not (is_of_launch(name) and _passes_by(sys._getframe(1))):
                self._read.add(name)
            value: str = getitem(environ, name)
            return value

        kind.__getitem__ = observing
        try:
            yield
        finally:
            kind.__getitem__ = getitem

    def _done_aside(self, work: Callable[[], None]) -> str | None:
        """Do the work in a thread of low priority. Return why it failed; None if it did not."""
        failed: list[str] = []
        context = contextvars.copy_context()

        def run() -> None:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self.nice)
            try:
                context.run(work)
                if _SUBNORMAL / 2 == 0.0:
                    failed.append("an import makes its thread round small numbers to zero")
            except Unfit as error:
                failed.append(str(error))
            except BaseException as error:  # of any package; a fresh Python would show it
                failed.append(f"{type(error).__name__}: {error}")

        before = os.getpriority(os.PRIO_PROCESS, 0)
        thread = threading.Thread(target=run, name="hf_spot-warm", daemon=True)
        thread.start()
        while thread.is_alive():
            if select.select([self.connection], [], [], 0.05)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                os._exit(0)
            thread.join(0.05)
        for variable in context:
            if variable not in contextvars.copy_context() or variable.get() is not context[variable]:
                variable.set(context[variable])
        for name in os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else []:
            with contextlib.suppress(OSError):  # threads that packages have started, where this user may do it
                os.setpriority(os.PRIO_PROCESS, int(name), before)
        return failed[0] if failed else None

    def _changed_meanwhile(self) -> str | None:
        late = [path for path, (changed_ns, _) in self._files.items() if changed_ns > self._began_ns]
        return f"{late[0]} has changed during the imports" if late else None

    # -- the order ----------------------------------------------------------------------------------------------------

    def _order(self) -> dict[str, Any] | None:
        try:
            data = self.connection.recv(_LONGEST_LINE_BYTES)
        except OSError:
            data = b""
        if not data:
            os._exit(0)
        self._received += data
        if b"\n" not in self._received:
            return None
        order: dict[str, Any] = json.loads(self._received)
        return order

    def _why_not(self, order: dict[str, Any], *, any_arguments: bool) -> str | None:
        """Return why a fresh Python would not be the same as this one; None if it would."""
        if not (any_arguments or same_command(sys.orig_argv, order["argv"])):
            return "the command line has changed"
        if names := differing(self._started_with, order["environ"], self._read):
            return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} changed"
        changed = sorted(path for path, was in self._files.items() if _stamp(path) != was)
        if changed:
            return f"{changed[0]}{f' and {len(changed) - 1} more' if changed[1:] else ''} has changed"
        if self._statements is not None:
            source, _ = _source(self._argv)
            if first_imports(source)[: len(self._statements)] != self._statements:
                return f"the first lines of {self._argv[0]} have changed"
        return None

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            os._exit(0)

    def _end(self, message: dict[str, Any]) -> None:
        self._tell(message)
        os._exit(0)


def _passes_by(frame: FrameType | None) -> bool:
    """Return whether a variable is read by a function that goes through all of them in search of others."""
    while frame is not None:
        module, function = str(frame.f_globals.get("__name__")), frame.f_code.co_name
        if module not in _OF_MAPPINGS and function not in _COMPREHENSIONS:
            return looks_for_others(module, function)
        frame = frame.f_back
    return False


# -- what a spare has imported ----------------------------------------------------------------------------------------


def _source(argv: Sequence[str]) -> tuple[str, str | None]:
    """Return the text of a script or module, and the module's package, which is imported. Raises Unfit."""
    if argv[0] != "--module":
        try:
            return Path(argv[0]).read_text(encoding="utf-8"), None
        except (OSError, UnicodeError) as error:
            raise Unfit(f"{argv[0]} can't be read: {error}") from error
    name = argv[1]
    if not _is_installed(name.partition(".")[0]):
        raise Unfit(f"{name} belongs to no installed package")
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    source = getattr(spec.loader, "get_source", lambda _: None)(spec.name) if spec is not None else None
    if spec is None or source is None:
        raise Unfit(f"{name} has no source")
    return source, spec.parent


def _is_installed(name: str) -> bool:
    """Return whether a top-level package is Python's own or installed: a user's own module may do anything when imported."""
    if name in sys.builtin_module_names or name in sys.stdlib_module_names:
        return True
    spec = importlib.machinery.PathFinder.find_spec(name)
    if spec is None or spec.origin is None:
        return spec is None and importlib.util.find_spec(name) is None  # the import fails, as it would later
    origin = Path(spec.origin).resolve()
    return origin.is_relative_to(_OWN_PACKAGE) or any(origin.is_relative_to(one) for one in _site_folders())


def _site_folders() -> list[Path]:
    named = [sysconfig.get_path(one) for one in ("purelib", "platlib")]
    named += [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    named += [one for one in sys.path if os.path.basename(one) in ("site-packages", "dist-packages")]
    return [Path(one).resolve() for one in dict.fromkeys(named)]


def _files() -> dict[str, tuple[int, int]]:
    """Return time and size of the files of all modules, of hf_spot, and of the folders in which packages are installed."""
    found = {str(one) for one in _OWN_PACKAGE.rglob("*.py")} | {str(one) for one in _site_folders()}
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if isinstance(path, str) and os.path.isabs(path):
            found.add(path)
    return {path: stamp for path in found if (stamp := _stamp(path)) is not None}


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _devices() -> list[str]:
    """Return the devices that this process has opened."""
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{name}")
                if target.startswith(_DEVICES):
                    found.append(target)
    return found


# -- while it waits ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _held_output() -> Iterator[Mapping[int, int]]:
    """Write what is printed within the block at its end, to the descriptors that are yielded. Terminals are left alone, because
    imports ask whether they write to one."""
    held: list[tuple[int, int, int]] = []  # number, where it goes, where it is held
    memories: dict[tuple[int, int], int] = {}
    with contextlib.suppress(OSError, AttributeError):  # not every system can hold files in memory
        for number in (1, 2):
            if os.isatty(number):
                continue
            status = os.fstat(number)
            memory = memories.setdefault((status.st_dev, status.st_ino), -1)
            if memory < 0:
                memory = memories[status.st_dev, status.st_ino] = os.memfd_create("output")
            held.append((number, os.dup(number), memory))
            os.dup2(memory, number)
    try:
        yield {number: goes_to for number, goes_to, _ in held}
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        for number, goes_to, _ in held:
            os.dup2(goes_to, number)
            os.close(goes_to)
        for memory in memories.values():
            number = next(one for one, _, to in held if to == memory)
            os.lseek(memory, 0, os.SEEK_SET)
            while data := os.read(memory, 2**16):
                while data:
                    data = data[os.write(number, data) :]
            os.close(memory)


@contextlib.contextmanager
def _first_to_go() -> Iterator[None]:
    """Have the kernel end this process before any other within the block, if memory is short."""
    with _written(Path("/proc/self/oom_score_adj"), str(_FIRST_TO_GO)):
        yield


@contextlib.contextmanager
def _low_autogroup(nice: int) -> Iterator[None]:
    """Lower the share of this session, where the kernel divides processors by sessions: nice counts only within one."""
    path = Path("/proc/self/autogroup")
    with contextlib.suppress(OSError):
        path.write_text(str(nice))
    try:
        yield
    finally:
        until_s = time.monotonic() + _RESTORE_S
        while path.exists() and time.monotonic() < until_s:  # a kernel that others ask as well wants a pause
            try:
                path.write_text("0")
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break


@contextlib.contextmanager
def _written(path: Path, text: str) -> Iterator[None]:
    before = None
    with contextlib.suppress(OSError):
        before = path.read_text()
        path.write_text(text)
    try:
        yield
    finally:
        if before is not None:
            with contextlib.suppress(OSError):
                path.write_text(before)


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Run no garbage collection within the block, and let later ones ignore what exists then."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
