"""Carry hf_spot into every Python of a launch, whoever starts it: Python imports this module before it runs anything else.

It costs less than two milliseconds, and nothing else of hf_spot is imported before torch or transformers is. Then
`hf_spot.training.bootstrap` makes trainings of this process preemptible. A ``sitecustomize`` that this one hides is
run after it.

Other environments run it too, so it imports only modules that every Python has loaded by now, or built in, and its syntax is
that of Python 3.6. Without hf_spot in such an environment, a training there can't be protected, which is said once per launch.

Signals that mean a notice must not end a process that trains, nor one above it: many launchers kill their children when they
are signalled. While a training runs in this process or below it, such a signal is passed on to `hf-spot launch` instead, even
if the program has installed a handler for it. At all other times the program's own handler, or the default one, decides.
A process whose training was stopped waits at its end for `hf-spot launch`, which ends the whole command: nothing that would
come next in it, such as the next line of a shell script, may take the half-trained model for the finished one.
"""

import _signal  # type: ignore[import-not-found]  # the module `signal` would cost a millisecond
import atexit
import os
import sys
import time

Any = object  # the module `typing` would cost more than all of this

_OWN_FOLDER = os.path.dirname(os.path.abspath(__file__))
_RUNTIME = os.environ.get("HF_SPOT_RUNTIME_DIR", "")
_TRAINER = "transformers.trainer"
_ENTRIES = {  # functions of `hf_spot.training.bootstrap`, by the module that is about to be imported
    "torch.optim.optimizer": "before_optimizers",
    "torch.distributed.elastic.multiprocessing.api": "before_torchrun",
    _TRAINER: "before_trainer",
}
_OF_HF_SPOT = (
    "hf_spot.training.bootstrap",
    "hf_spot.launch.agent",
)  # modules that, run as a program, do all of this themselves
_LONGEST_WAIT_S = 60.0
_TICK_S = 0.02
_END_IS_NEW_S = 60.0  # a process that computes may answer a signal late
_FAILURE_IS_NEW_S = 30.0  # a launcher ends its other processes soon after one has failed

_ENDS = "ends-"  # a file of that name, with the process id behind it or, for a group, its negative, contains who ends it
_PASSED_ON = "passed-on"  # a file of that name: a signal from outside has reached a process
_SHOWN = 100  # characters

_plain_signal, _plain_getsignal = _signal.signal, _signal.getsignal


class Finder:
    """Imports hf_spot when a module is about to be imported that trainings need.

    Args:
        shield: of this process, or None.
    """

    def __init__(self, shield: "Shield | None") -> None:
        self._shield = shield
        self._left = dict(_ENTRIES)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return the spec that hf_spot makes for the module; None for all others."""
        if name == "torch":
            _touch(f"met-{os.getpid()}")
        if name not in self._left:
            return None
        enter = self._left.pop(name)
        try:
            from hf_spot.runtime import at_training
            from hf_spot.training import bootstrap

            before = getattr(bootstrap, enter)
        except (ImportError, AttributeError):
            _tell_once()
            self._left.clear()
            return None
        if self._shield is not None and name == _TRAINER:
            self._shield.pass_on_always()
            at_training(self._shield.stand_again)
        return before(name, path, target)


def _touch(name: str, flags: int = 0) -> bool:
    try:
        os.close(os.open(os.path.join(_RUNTIME, name), os.O_CREAT | flags, 0o600))
    except OSError:
        return False
    return True


def _tell_once() -> None:
    if not _touch("unprotected", os.O_EXCL):
        return  # it was said, or the launch is over
    sys.stderr.write(
        f"hf-spot: warning: a training under {sys.executable} is not protected: this launch's version of hf_spot is not "
        "installed there. Install it there, too, or train in the environment of hf-spot\n"
    )


class Shield:
    """Passes signals on to `hf-spot launch` while a training runs in this process or below it.

    Args:
        numbers: the signals that mean a notice.
        launcher: process id of `hf-spot launch`.
    """

    def __init__(self, numbers: "list[int]", launcher: int) -> None:
        self._launcher = launcher
        self._process = os.getpid()
        self._of_program = {}  # type: dict[int, Any]
        self._always = False
        for number in numbers:
            before = _plain_getsignal(number)
            if before != _signal.SIG_IGN and before is not None:  # nohup ignores SIGHUP, and that must stay so
                self._of_program[number] = before
                _plain_signal(number, self._answer)
        _signal.signal, _signal.getsignal = self._set, self._get
        os.register_at_fork(after_in_child=self._leave)

    def pass_on_always(self) -> None:
        """Pass signals on from now on, except to a handler of the program: a training is about to begin."""
        self._always = True
        self.stand_again()

    def stand_again(self) -> None:
        """Pass signals on in a process that was forked from the one of this shield, too: it trains."""
        if os.getpid() == self._process:
            return
        self._process = os.getpid()
        try:
            for number in self._of_program:
                self._of_program[number] = _plain_getsignal(number)
                _plain_signal(number, self._answer)
        except ValueError:  # not in the main thread
            return
        _signal.signal, _signal.getsignal = self._set, self._get

    def _set(self, number: int, handler: Any) -> Any:
        """Stand in for ``signal.signal``: this shield stays in front of a function that handles one of its signals."""
        known = self._of_program.get(number)
        if known is None:
            return _plain_signal(number, handler)
        if callable(handler):
            _plain_signal(number, self._answer)
            self._of_program[number] = handler
        else:
            _plain_signal(number, handler)
            self._of_program[number] = _signal.SIG_DFL
        return known

    def _get(self, number: int) -> Any:
        """Stand in for ``signal.getsignal``."""
        found = _plain_getsignal(number)
        return self._of_program[number] if found == self._answer else found

    def _leave(self) -> None:
        """Restore the program's handlers: a forked child is its parent's affair."""
        for number, handler in self._of_program.items():
            if _plain_getsignal(number) == self._answer:
                _plain_signal(number, handler)
        if _signal.signal == self._set:
            _signal.signal, _signal.getsignal = _plain_signal, _plain_getsignal

    def _answer(self, number: int, frame: Any) -> None:
        handler = self._of_program[number]
        has_own = callable(handler) and handler is not _signal.default_int_handler
        here, below = _trainings(self._process)
        is_of_training = below or ((here or self._always) and not has_own)
        if is_of_training and not end_from_inside(self._process):
            _touch(_PASSED_ON)
            try:
                os.kill(self._launcher, _signal.SIGTERM)  # not SIGINT: a second one means not to wait for anything
            except OSError:
                return  # without a launcher this process is about to end as well
        elif callable(handler):
            handler(number, frame)
        else:
            _plain_signal(number, _signal.SIG_DFL)
            os.kill(self._process, number)


def note_ends(numbers: "list[int]") -> None:
    """Note each signal that this process sends to a process below it, from now on: it ends that, which is no notice.

    Args:
        numbers: of the signals that would mean a notice; SIGKILL is noted as well, as it would mean a crash.
    """
    plain_kill, plain_killpg = os.kill, os.killpg
    numbers = [*numbers, _signal.SIGKILL]

    def kill(process: int, number: int) -> None:
        if number in numbers and process:
            _note_end(process, number)
        plain_kill(process, number)

    def killpg(group: int, number: int) -> None:
        if number in numbers and group:
            _note_end(-group, number)
        plain_killpg(group, number)

    kill.__doc__, killpg.__doc__ = plain_kill.__doc__, plain_killpg.__doc__
    os.kill, os.killpg = kill, killpg


def _note_end(target: int, number: int) -> None:
    """Note a signal to a process, or to a group if the number is negative, unless it may pass on a signal from outside."""
    own, led = os.getpid(), abs(target)
    if led == own or not _is_below(led, own) or _is_noticed() or _waits_for(number):
        return
    try:
        with open(os.path.join(_RUNTIME, f"{_ENDS}{target}"), "w") as file:
            file.write(str(own))
    except OSError:
        return


def _waits_for(number: int) -> bool:
    """Return whether the main thread blocks a signal: the program then waits for it in a way of its own."""
    found = _read("/proc/self/status", "").partition("SigBlk:")[2].split(None, 1)
    return bool(found) and bool(int(found[0], 16) >> (number - 1) & 1)


def _is_noticed() -> bool:
    """Return whether this launch ends because of a notice, or a process has just passed one on."""
    return os.path.exists(os.path.join(_RUNTIME, _PASSED_ON)) or "TERMINATE" in _read(os.path.join(_RUNTIME, "notice.json"), "")


def end_from_inside(process: int) -> bool:
    """Return whether a signal to this process comes from a program of the launch that ends it, and then say so, once.

    Args:
        process: id of this process.
    """
    if _is_noticed():
        return False
    for target in (process, -os.getpgrp()):
        path = os.path.join(_RUNTIME, f"{_ENDS}{target}")
        by = _read(path, "")
        if by and _age_s(path) < _END_IS_NEW_S:
            _tell_end(by, f"process {by} ({_command_of(int(by))}) ends process {process}, which it has started")
            return True
    failed = _new_failure(process)
    if failed:
        _tell_end("0", f"process {failed} has failed, and process {process} is ended")
    return bool(failed)


def _new_failure(process: int) -> int:
    """Return the id of a process that has trained and has just failed or died; 0 if there is none."""
    try:
        names = os.listdir(_RUNTIME)
    except OSError:
        return 0
    for name in names:
        kind, _, number = name.rpartition("-")
        if not number.isdigit() or int(number) == process:
            continue
        path = os.path.join(_RUNTIME, name)
        if kind == "training" and not _read(path, "ended") and not _parent(int(number)):
            gone = os.path.join(_RUNTIME, f"gone-{number}")
            if not os.path.exists(gone) or _age_s(gone) < _FAILURE_IS_NEW_S:
                return int(number)
        elif kind == "failed" and _age_s(path) < _FAILURE_IS_NEW_S:
            return int(number)
    return 0


def _tell_end(by: str, what: str) -> None:
    if _touch(f"told-{by}", os.O_EXCL):
        os.write(2, f"hf-spot: {what}: that is no notice of a preemption, and nothing more is saved\n".encode())


def _command_of(process: int) -> str:
    words = _read(f"/proc/{process}/cmdline", "").split("\0")
    return " ".join(words).strip()[:_SHOWN]


def _age_s(path: str) -> float:
    try:
        return time.time() - os.stat(path).st_mtime
    except OSError:
        return 0.0


def _trainings(process: int) -> "tuple[bool, bool]":
    """Return whether a training runs in a process, and whether one runs in a process below it."""
    here = below = False
    try:
        names = os.listdir(_RUNTIME)
    except OSError:
        return here, below
    for name in names:
        if name.startswith("training-") and name[9:].isdigit() and not _read(os.path.join(_RUNTIME, name), "ended"):
            one = int(name[9:])
            here = here or one == process
            below = below or _is_below(one, process)
    return here, below


def _is_below(process: int, other: int) -> bool:
    """Return whether a process was started by another one, or by one below that."""
    above = _parent(process)
    while above > 1 and above != other:
        above = _parent(above)
    return above == other


def _parent(process: int) -> int:
    # "pid (command) state parent ...", where the command may contain any characters
    fields = _read(f"/proc/{process}/stat", "").rpartition(")")[2].split()
    return int(fields[1]) if len(fields) > 1 and fields[0] not in "ZX" else 0


def _read(path: str, otherwise: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return otherwise


def _wait_at_the_end() -> None:
    process = os.getpid()
    if not _read(os.path.join(_RUNTIME, f"training-{process}"), "").isdigit():
        return
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            continue
    if not _touch(f"left-{process}"):
        return
    until = time.monotonic() + _LONGEST_WAIT_S
    while time.monotonic() < until:
        time.sleep(_TICK_S)


def begin_launch() -> None:
    """Do in a warm spare, whose launch begins, what every other Python of hf_spot's own has done at its start."""
    global _RUNTIME
    _RUNTIME = os.environ["HF_SPOT_RUNTIME_DIR"]
    note_ends([int(one) for one in os.environ.get("HF_SPOT_ANSWERED_SIGNALS", "").split(",") if one])


def _begin() -> None:
    """Install the hook, unless this Python belongs to no launch, or is one of hf_spot that has its own way."""
    started = getattr(sys, "orig_argv", ())[1:4]
    numbers = [int(one) for one in os.environ.get("HF_SPOT_ANSWERED_SIGNALS", "").split(",") if one]
    if "HF_SPOT_WAITS_ON" in os.environ:  # a warm spare, whose launch is still to come
        sys.modules["_hf_spot_sitecustomize"] = sys.modules[__name__]
    elif _RUNTIME:
        note_ends(numbers)
    if not _RUNTIME or any(one in _OF_HF_SPOT for one in started):
        return
    atexit.register(_wait_at_the_end)  # first, so that it runs last
    blocked = _signal.pthread_sigmask(_signal.SIG_BLOCK, ())
    shield = None
    if not any(one in blocked for one in numbers):  # otherwise whoever started this process has its own way to answer them
        try:
            shield = Shield(numbers, int(os.environ["HF_SPOT_LAUNCHER_PID"]))
        except (ValueError, KeyError):  # not in the main interpreter
            shield = None
    sys.meta_path.insert(0, Finder(shield))  # type: ignore[arg-type]


def _run_the_hidden_one() -> None:
    """Run the ``sitecustomize`` that Python would have found without this one."""
    sys.path[:] = [one for one in sys.path if os.path.abspath(one) != _OWN_FOLDER]
    this = sys.modules.pop(__name__)
    try:
        __import__(__name__)
    except ImportError as error:
        if error.name != __name__:
            raise
    finally:
        sys.modules.setdefault(__name__, this)


if __name__ == "sitecustomize":
    _begin()
    _run_the_hidden_one()
