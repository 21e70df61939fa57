"""Fork Pythons that have imported torch already, where a test would start fresh ones.

Most of the processor time of a launch in the tests is torch, transformers and accelerate being imported: by the reader of
the options, by torchrun's agent and by each rank. A `Zygote` has imported them once. ``with zygote.forking():`` makes
`subprocess.Popen` fork ``[sys.executable, …]`` from it instead of executing it; below that process Popen, and the guard's
``execvp``, do the same.

Why a test may rely on it:

- No line of hf_spot knows about this, and none of it is imported before the fork. The new process is a real child of the one
  that called Popen: kill -9, waitpid, PR_SET_PDEATHSIG, sessions, descriptors, signals, ``/proc/PID/environ`` and
  ``cmdline`` are the kernel's own, and no process stands in between to pass anything on. To that end the zygote is a child of
  the process that calls Popen; it forks twice, and the process in the middle ends while the caller adopts orphans. A process
  that starts others is given a zygote of its own before it runs its first line.
- ``transformers.trainer``, and all that has taken something from it, is imported after the fork: ``hf_spot.training.bootstrap``
  waits for that import.
- Environment variables that the imports read (every read is observed), and those that C libraries read when they are
  loaded, must have the value that they had then; of Python's options only those that can be imitated are accepted. Otherwise
  a fresh Python is executed.

What differs: signals and threads while the imports run, how long a start takes, Python's own finalization (exit handlers and
threads are waited for, objects are not destroyed), what the collector has frozen, and the hash seed, which all share. Tests
of those things, of bootstrap's own hook and of the deaths of processes start fresh Pythons, and at least one launch of each
kind does.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import ctypes
import fcntl
import gc
import importlib
import importlib.machinery
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NoReturn

_PRELOADED = (
    "boto3.session",
    "s3transfer.manager",
    "accelerate.commands.launch",
    "torch.distributed.run",
    "transformers.trainer",
    "transformers.models.gpt2.modeling_gpt2",
)
_TRAINER = "transformers.trainer"
# What C libraries read when they are loaded can't be observed.
_OF_LIBRARIES = ("CUDA_", "GOMP_", "KMP_", "LANG", "LC_", "LD_", "MALLOC_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON", "TORCH")
_OFFLINE = "HF_HUB_OFFLINE"  # the Hub's client and datasets keep it in constants, which are set after the fork
# Read by hf_spot, boto's sessions and ranks, after the fork. PYTHONPATH is entered into sys.path here; XDG_CACHE_HOME is where
# the Hub's files are, which none of these scripts opens; COLUMNS is the width of accelerate's menus, which nobody opens; the
# others are seen by whoever copies all variables.
_READ_LATER = ("AWS_", "HF_SPOT_", "PYTEST_", "TORCHELASTIC_", "TORCH_NCCL_")
# KMP_DUPLICATE_LIB_OK: scikit-learn sets it when it is imported, for OpenMP libraries that are loaded after that.
_NOT_READ = (_OFFLINE, "PYTHONPATH", "XDG_CACHE_HOME", "COLUMNS", "OLDPWD", "PATH", "PWD", "SHLVL", "_", "KMP_DUPLICATE_LIB_OK")
_STARTERS = ("accelerate.commands.launch", "hf_spot", "hf_spot.launch.agent")  # modules that start further Pythons
SCRIPTS_FORK = "HF_SPOT_TESTS_SCRIPTS_FORK"  # a variable: scripts start further Pythons, too, and those are forked
HAND_OVER = "HF_SPOT_TESTS_ZYGOTE"  # a variable: the process gets a zygote, for `Zygote.handed_over`
_READER = "hf_spot.launch.options"  # reads the options of a launch in a process of its own
_LONGEST_ANSWER = 4000
_GUARD = "process_guard.py"
_PR_SET_PDEATHSIG, _PR_SET_MM, _PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 1, 35, 36, 37  # <linux/prctl.h>
_PR_SET_MM_MAP = 14

_libc = ctypes.CDLL(None, use_errno=True)
_execute = subprocess.Popen._execute_child  # type: ignore[attr-defined]
_execvp = os.execvp


class Zygote:
    """A process that has imported torch and forks. It begins to import at once, in the background.

    Args:
        environ: variables to import with, besides those of this process.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).parent.parent)
        code = f"import sys; sys.path.insert(0, {root!r}); from tests import zygote; zygote._main({theirs.fileno()})"
        env = {**os.environ, **(environ or {})}
        env.pop("PYTHONPATH", None)
        env.pop(_OFFLINE, None)
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [sys.executable, "-c", code], env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._client = _Client(ours)
        subprocess.Popen._execute_child = _fork_or_execute  # type: ignore[attr-defined]

    @classmethod
    def handed_over(cls) -> Zygote | None:
        """Return the one that this process was given because its environment had `HAND_OVER`; None without one.

        To be called once, before this process starts others.
        """
        number = os.environ.pop(HAND_OVER, "")
        if not number.isdigit():
            return None
        made = cls.__new__(cls)
        made._process, made._client = None, _Client(socket.socket(fileno=int(number)))
        subprocess.Popen._execute_child = _fork_or_execute  # type: ignore[attr-defined]
        return made

    @contextlib.contextmanager
    def forking(self, space: str | None = None, *, scripts: bool = True) -> Iterator[None]:
        """Let `subprocess.Popen`, called by this thread, fork Pythons.

        Args:
            space: name of the network namespace that they are in, with mounts and /dev/shm of their own; None is here.
            scripts: what a launch starts is forked, too; otherwise only the launcher and what reads its options are.
        """
        before = _callers.client, _callers.space, _callers.scripts
        _callers.client, _callers.space, _callers.scripts = self._client, space, scripts
        try:
            yield
        finally:
            _callers.client, _callers.space, _callers.scripts = before

    @property
    def refusals(self) -> list[str]:
        """Why Pythons that this process wanted to fork were executed afresh."""
        return self._client.refusals

    def close(self) -> None:
        """End it. The processes that were forked go on."""
        self._client.close()
        if self._process is not None:
            self._process.wait()


class _Client:
    """Asks a zygote, which is a child of this process, to fork."""

    def __init__(self, connection: socket.socket) -> None:
        self.refusals: list[str] = []  # why fresh ones had to be executed
        self._connection = connection
        self._lock = threading.Lock()

    def fork(self, request: dict[str, Any], fds: Sequence[int]) -> int:
        """Return the id of the new process, a child of this one; 0 when a fresh Python has to be executed."""
        before = ctypes.c_int()
        with self._lock, open(os.memfd_create("request"), "w+b", buffering=0) as file:
            file.write(json.dumps(request).encode())
            _libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
            _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self._connection, [b"x"], [file.fileno(), *fds])
                answer = self._connection.recv(_LONGEST_ANSWER).decode()
            except OSError:  # killed with its whole group
                answer = "the zygote is gone"
            finally:
                _libc.prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)
        if answer.isdigit():
            return int(answer)
        self.refusals.append(answer)
        return 0

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it has ended already
            self._connection.shutdown(socket.SHUT_RDWR)  # whatever this process has forked since has the connection, too
        self._connection.close()


class _Callers(threading.local):
    client: _Client | None = None
    space: str | None = None
    scripts: bool = True


@dataclass
class _Imports:
    """What a zygote's imports have read and left, inherited by all that come from it."""

    read: set[str] = field(default_factory=set)  # names of variables
    environ: dict[str, str] = field(default_factory=dict)  # behind them
    set_by_them: dict[str, str] = field(default_factory=dict)
    path: list[str] = field(default_factory=list)  # sys.path without its first entry
    refuse: str = ""  # why this machine can't have any of it


_imported = _Imports()
_callers = _Callers()
_own: list[_Client] = []  # the zygote of a process that was forked itself
_own_forks_scripts = [True]


def _fork_or_execute(self: Any, args: Any, executable: Any, preexec_fn: Any, close_fds: bool, *more: Any) -> None:
    """Stand in for ``Popen._execute_child``."""
    client = _callers.client or next(iter(_own), None)
    pass_fds, cwd, env, startupinfo, flags, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = more[:12]
    restore_signals, gid, gids, uid, umask, new_session, *group = more[12:]
    usual = (executable, preexec_fn, startupinfo, gid, gids, uid, umask) == (None,) * 6 + (-1,) and group in ([], [-1])
    usual = usual and close_fds and restore_signals and not (flags or shell) and isinstance(args, list | tuple)
    if not _own_forks_scripts[0] and _callers.client is None and _READER not in args:
        client = None
    if client and usual and os.fsdecode(args[0]) == sys.executable:
        request = {
            "words": [os.fsdecode(word) for word in args],
            "environ": {
                os.fsdecode(name): os.fsdecode(value) for name, value in dict(os.environ if env is None else env).items()
            },
            "cwd": os.path.abspath(os.fsdecode(cwd or ".")),
            "umask": int(Path("/proc/self/status").read_text().partition("Umask:")[2].split()[0], 8),
            "new_session": bool(new_session),
            "space": _callers.space,
            "scripts": _callers.scripts and _own_forks_scripts[0],
            "ignored": _ignored(),
            "blocked": [int(one) for one in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
            "fds": [0, 1, 2, *pass_fds],
        }
        given = zip((p2cread, c2pwrite, errwrite), range(3), strict=True)
        if pid := client.fork(request, [*(fd if fd != -1 else own for fd, own in given), *pass_fds]):
            self._child_created = True
            self.pid = pid
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
            return
        if _callers.space is not None:  # executed here it would be on the wrong host
            raise RuntimeError(f"{args} can't be forked: {client.refusals[-1]}")
    _execute(self, args, executable, preexec_fn, close_fds, *more)


def _main(connection_fd: int) -> NoReturn:
    """Import, then fork on demand until the other side is gone."""
    sys.modules["__main__"].__dict__["__name__"] = "zygote"  # bootstrap looks for the frame of a __main__
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    connection = socket.socket(fileno=connection_fd)
    _imported.path = sys.path[2:]  # behind the tests' own root, and behind ''
    before = dict(os.environ)
    gc.disable()
    with _observed(_imported.read):
        for name in _PRELOADED:
            importlib.import_module(name)
        # Compiles hundreds of patterns at the first save of a process: a sixth of what a forked training takes.
        sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("gpt2")
    _forget_trainer()
    gc.collect()
    gc.freeze()
    gc.enable()
    _imported.environ = dict(os.environ)
    _imported.set_by_them = dict(_imported.environ.items() - before.items())
    assert threading.active_count() == 1, threading.enumerate()
    try:
        _show(sys.orig_argv, os.environ)
    except OSError as error:
        _imported.refuse = f"kernel: prctl(PR_SET_MM_MAP): {error}"
    _serve(connection)


@contextlib.contextmanager
def _observed(read: set[str]) -> Iterator[None]:
    getitem = os._Environ.__getitem__

    def observing(self: Any, key: str) -> str:
        read.add(key)
        return getitem(self, key)  # type: ignore[no-any-return]

    os._Environ.__getitem__ = observing  # type: ignore[method-assign]
    try:
        yield
    finally:
        os._Environ.__getitem__ = getitem  # type: ignore[method-assign]


def _forget_trainer() -> None:
    """Take out what has to be imported after the fork: Trainer, and whatever has anything of it."""
    lazy = vars(sys.modules["transformers"])
    forgotten: set[str] = set()
    more = {_TRAINER}
    while more:
        forgotten |= more
        of_them = {id(value) for name in forgotten for value in vars(sys.modules[name]).values() if _origin(value) in forgotten}
        more = {
            name
            for name, module in list(sys.modules.items())
            if name not in forgotten
            and vars(module) is not lazy
            and any(id(value) in of_them for value in vars(module).values())
        }
    for name in [name for name, value in lazy.items() if id(value) in of_them]:
        del lazy[name]
    for name in forgotten:
        parent, _, last = name.rpartition(".")
        del sys.modules[name]
        vars(sys.modules[parent]).pop(last, None)


def _origin(value: Any) -> str | None:
    return value.__module__ if isinstance(value, type | FunctionType) else None


def _serve(connection: socket.socket) -> NoReturn:
    while True:
        message, fds, _, _ = socket.recv_fds(connection, 1, 200)
        if not message:
            os._exit(0)
        with open(fds[0], "rb") as file:
            file.seek(0)
            request = json.load(file)
        answer = _why_not(request["words"], request["environ"])
        if not answer:
            reader, writer = os.pipe()
            between = os.fork()
            if between == 0:
                between = os.getpid()
                child = os.fork()
                if child == 0:
                    while os.getppid() == between:
                        time.sleep(0.0005)
                    _begin(request, fds[1:])
                os.write(writer, str(child).encode())
                os._exit(0)
            os.close(writer)
            with open(reader) as file:
                answer = file.read()
            os.waitpid(between, 0)
        for fd in fds[1:]:
            os.close(fd)
        connection.send(answer.encode()[:_LONGEST_ANSWER])


def _why_not(words: Sequence[str], environ: Mapping[str, str]) -> str:
    """Return why only a fresh Python will do; nothing when one that is forked has the same settings."""
    if _imported.refuse:
        return _imported.refuse
    if words[0] != sys.executable or _parse(words) is None:
        return f"command {words[:3]}"
    of_libraries = {name for name in {*environ, *_imported.environ} if name.startswith(_OF_LIBRARIES)}
    names = {name for name in of_libraries | _imported.read if not name.startswith(_READ_LATER) and name not in _NOT_READ}
    as_imports_leave_it = {**_imported.set_by_them, **environ}
    others = sorted(name for name in names if as_imports_leave_it.get(name) != _imported.environ.get(name))
    return f"variables {others}" if others else ""


def _starts_others(words: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Return whether this command starts further Pythons that should be forked."""
    module = words[words.index("-m") + 1] if "-m" in words[:3] else ""
    starts = module in _STARTERS or os.path.basename(words[1]) == "hf-spot" or SCRIPTS_FORK in environ
    return starts and module != _READER


def _parse(words: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """Return Python's options, and the words behind them; None for options that can't be imitated."""
    rest = list(words[1:])
    options = []
    while rest and rest[0] in ("-u", "-S", "-E", "-Wignore"):
        options.append(rest.pop(0))
    if not rest or (rest[0].startswith("-") and (rest[0] not in ("-c", "-m") or len(rest) < 2)):
        return None
    if {"-S", "-E"} & set(options) and os.path.basename(rest[0]) != _GUARD:
        return None
    return options, rest


def _begin(request: dict[str, Any], fds: Sequence[int]) -> NoReturn:
    """Become the process that was asked for."""
    try:
        if request["new_session"]:
            os.setsid()
        words = request["words"]
        _keep_only(dict(zip(request["fds"], fds, strict=True)))
        if request["space"]:
            _enter(request["space"])
        os.umask(request["umask"])
        subprocess.Popen._execute_child = _execute  # type: ignore[attr-defined]
        _own.clear()
        _own_forks_scripts[0] = request["scripts"]
        if HAND_OVER in request["environ"]:
            request["environ"][HAND_OVER] = str(_fork_zygote().detach())
        elif _starts_others(words, request["environ"]):
            _own.append(_Client(_fork_zygote()))
            subprocess.Popen._execute_child = _fork_or_execute  # type: ignore[attr-defined]
        os.chdir(request["cwd"])
        _reset_signals(request["ignored"])
        signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
        _run(words, request["environ"])
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _enter(space: str) -> None:
    """Do what ``ip netns exec`` does, and mount a /dev/shm of its own. Raises OSError."""
    clone_newns, clone_newnet, ms_rec_slave, mnt_detach = 0x00020000, 0x40000000, 0x4000 | 0x80000, 2
    with open(f"/run/netns/{space}") as file:
        _check(_libc.setns(file.fileno(), clone_newnet))
    _check(_libc.unshare(clone_newns))
    _check(_libc.mount(b"", b"/", b"none", ms_rec_slave, None))
    _check(_libc.umount2(b"/sys", mnt_detach))
    _check(_libc.mount(space.encode(), b"/sys", b"sysfs", 0, None))
    _check(_libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, None))


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _fork_zygote() -> socket.socket:
    """Leave a copy of this process behind, as it is before it runs anything, which forks for it."""
    ours, theirs = socket.socketpair()
    caller = os.getpid()
    if os.fork() == 0:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != caller:
            os._exit(0)
        for one in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(one, signal.SIG_IGN)  # some tests signal a whole group
        os.chdir("/")
        nothing = os.open(os.devnull, os.O_RDWR)
        connection = fcntl.fcntl(theirs, fcntl.F_DUPFD, 10)
        _keep_only({0: nothing, 1: nothing, 2: nothing, 3: connection})
        _serve(socket.socket(fileno=3))
    theirs.close()
    return ours


def _exec_or_become(file: str, words: Sequence[str]) -> NoReturn:
    """Stand in for ``os.execvp`` in a guard's child, which has nothing but its main thread."""
    words, environ = list(words), dict(os.environ)
    if file != words[0] or threading.active_count() > 1 or _why_not(words, environ):
        _execvp(file, words)
    try:
        ignored = _ignored()
        _keep_only({fd: fd for fd in _open_fds() if os.get_inheritable(fd)})
        if _starts_others(words, environ):
            _own.append(_Client(_fork_zygote()))
            subprocess.Popen._execute_child = _fork_or_execute  # type: ignore[attr-defined]
        _reset_signals(ignored)
        _run(words, environ)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _open_fds() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that has listed them
            os.fstat(int(name))
            found.append(int(name))
    return found


def _keep_only(fds: Mapping[int, int]) -> None:
    """Close all descriptors but these values, each of which becomes its key."""
    above = max([*fds, 9]) + 1
    moved = {wanted: fcntl.fcntl(fd, fcntl.F_DUPFD, above) for wanted, fd in fds.items()}
    for wanted, fd in moved.items():
        os.dup2(fd, wanted)
    for fd in _open_fds():
        if fd not in fds:
            os.close(fd)


def _ignored() -> list[int]:
    """Return the signals that an exec would leave ignored."""
    of_python = (signal.SIGPIPE, signal.SIGXFSZ)  # Popen restores them
    return [int(one) for one in signal.valid_signals() if one not in of_python and signal.getsignal(one) is signal.SIG_IGN]


def _reset_signals(ignored: Sequence[int]) -> None:
    """Set them as Python has them when it has started."""
    for one in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(one, signal.SIG_IGN if one in ignored else signal.SIG_DFL)
    for one in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(one, signal.SIG_IGN)
    if signal.SIGINT not in ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(words: list[str], environ: dict[str, str]) -> NoReturn:
    """Do what Python does with this command line, to its end."""
    parsed = _parse(words)
    assert parsed is not None
    options, rest = parsed
    os.environ.clear()
    os.environ.update({**environ, **{name: value for name, value in _imported.set_by_them.items() if name not in environ}})
    time.tzset()
    _set_offline(environ)
    _show(words, environ)
    # Python asks a file when it opens it whether it can be sought: these were opened for others.
    sys.stdout, sys.stderr = (
        open(fd, "w", encoding=stream.encoding, errors=stream.errors, closefd=False)  # noqa: SIM115  # for the whole process
        for fd, stream in ((1, sys.stdout), (2, sys.stderr))
    )
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=stream is sys.stderr or stream.isatty(), write_through="-u" in options)  # type: ignore[union-attr]
    if "-Wignore" in options:
        sys.warnoptions.append("ignore")
        warnings.simplefilter("ignore")
    sys.orig_argv = list(words)
    import multiprocessing.process
    import tempfile

    import numpy as np
    import torch

    np.random.seed()
    torch.default_generator.seed()
    tempfile.tempdir = None
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()  # type: ignore[attr-defined]
    os.execvp = _exec_or_become if os.path.basename(rest[0]) == _GUARD else _execvp
    for name in ("tests.zygote", "tests"):
        sys.modules.pop(name, None)
    main = ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main
    sys.path[:] = ["", *filter(None, environ.get("PYTHONPATH", "").split(os.pathsep)), *_imported.path]
    code = 0
    try:
        if "-S" not in options:
            _run_sitecustomize(environ)
        if rest[0] == "-m":
            sys.path[0] = os.getcwd()
            sys.argv = ["-m", *rest[2:]]
            sys.modules.pop(rest[1], None)  # runpy warns of a module that is there already
            runpy._run_module_as_main(rest[1])  # type: ignore[attr-defined]
        elif rest[0] == "-c":
            sys.argv = ["-c", *rest[2:]]
            exec(compile(rest[1], "<string>", "exec"), main.__dict__)
        else:
            script = os.path.abspath(rest[0])
            sys.path[0] = os.path.dirname(os.path.realpath(script))
            sys.argv = list(rest)
            loader = importlib.machinery.SourceFileLoader("__main__", script)
            main.__dict__.update(__file__=script, __cached__=None, __loader__=loader)
            exec(compile(Path(script).read_bytes(), script, "exec"), main.__dict__)
    except SystemExit as end:
        if isinstance(end.code, int):
            code = end.code
        elif end.code is not None:
            print(end.code, file=sys.stderr)
            code = 1
    except BaseException as error:
        shown = error.__traceback__
        while shown is not None and shown.tb_frame.f_code.co_filename == __file__:
            shown = shown.tb_next
        sys.excepthook(type(error), error.with_traceback(shown), shown)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def _set_offline(environ: Mapping[str, str]) -> None:
    """Set what an import would read from the variable: the imports were made without it."""
    from datasets import config
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = constants._is_true(environ.get(_OFFLINE) or environ.get("TRANSFORMERS_OFFLINE"))
    if "HF_DATASETS_OFFLINE" not in environ:
        config.HF_HUB_OFFLINE = config.HF_DATASETS_OFFLINE = constants.HF_HUB_OFFLINE


def _run_sitecustomize(environ: Mapping[str, str]) -> None:
    """Do what the import of `site` does at the start of a Python whose environment names a ``sitecustomize``."""
    folders = environ.get("PYTHONPATH", "").split(os.pathsep)
    if not any(os.path.isfile(os.path.join(folder, "sitecustomize.py")) for folder in folders):
        return
    sys.modules.pop("sitecustomize", None)
    importlib.import_module("sitecustomize")
    if any((type(one).__module__, type(one).__name__) == ("sitecustomize", "Finder") for one in sys.meta_path):  # not a user's
        from hf_spot.training import bootstrap

        bootstrap.begin_after_torch()


class _MemoryMap(ctypes.Structure):
    """``struct prctl_mm_map`` of <linux/prctl.h>."""

    _numbers = ("start_code", "end_code", "start_data", "end_data", "start_brk", "brk", "start_stack")
    _fields_ = (
        *((name, ctypes.c_uint64) for name in (*_numbers, "arg_start", "arg_end", "env_start", "env_end", "auxv")),
        ("auxv_size", ctypes.c_uint32),
        ("exe_fd", ctypes.c_uint32),
    )


_shown: list[Any] = []


def _show(words: Sequence[str], environ: Mapping[str, str]) -> None:
    """Make the kernel show this command line and this environment in /proc. Raises OSError when it does not."""
    first = b"".join(os.fsencode(word) + b"\0" for word in words)
    second = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environ.items())
    buffer = ctypes.create_string_buffer(first + second)
    _shown[:] = [buffer]
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start = ctypes.addressof(buffer)
    wanted = _MemoryMap(
        start_code=int(fields[23]),
        end_code=int(fields[24]),
        start_stack=int(fields[25]),
        start_data=int(fields[42]),
        end_data=int(fields[43]),
        start_brk=int(fields[44]),
        arg_start=start,
        arg_end=start + len(first),
        env_start=start + len(first),
        env_end=start + len(first) + len(second),
        exe_fd=0xFFFFFFFF,
    )
    _libc.sbrk.restype = ctypes.c_void_p
    wanted.brk = _libc.sbrk(0)
    _check(_libc.prctl(_PR_SET_MM, _PR_SET_MM_MAP, ctypes.byref(wanted), ctypes.sizeof(wanted), 0))
