"""``python -m hf_spot.training.bootstrap [--module] SCRIPT [ARGS…]``: runs a script as ``python SCRIPT`` would, with every
`Trainer` in it made preemptible. `hf-spot launch` starts each rank this way."""

from __future__ import annotations

import contextlib
import gc
import importlib.abc
import importlib.machinery
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType, ModuleType
from typing import Any

from hf_spot import process_guard
from hf_spot.errors import SpotError, StoreUnavailable
from hf_spot.notices.signals import answered_signals, is_left_alone
from hf_spot.runtime import Runtime
from hf_spot.terminal import outlive_terminal

_TRAINER = "transformers.trainer"
_LARGE = ("torch", "transformers")


class TrainerHook(importlib.abc.MetaPathFinder):
    """Calls `hf_spot.training.callback.install` when ``transformers.trainer`` has been imported, by whomever.

    A script that never imports it pays nothing. Python's garbage collector rests while torch and transformers are imported,
    and leaves alone what they have brought once Trainer is there, as `gc.freeze` is meant for: it would go through a million
    objects again and again, before and between the steps, and for about a second when the process ends, maybe of a machine
    that has few of them left. Where Trainer is imported by a function of the script, which may have made a model already
    that it will want to be rid of, nothing is left alone.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that the others find, with a loader that does one thing more."""
        is_trainer = name == _TRAINER
        if is_trainer:
            sys.meta_path.remove(self)
        elif name.partition(".")[0] not in _LARGE or not gc.isenabled():
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            exec_module = loader.exec_module

            def exec_in_peace(module: ModuleType) -> None:
                was_enabled = gc.isenabled()
                gc.disable()
                try:
                    exec_module(module)
                    if is_trainer:
                        from hf_spot.training.callback import install

                        install(module)
                        if _at_the_top_of_the_script():
                            gc.freeze()
                finally:
                    if was_enabled:
                        gc.enable()

            loader.exec_module = exec_in_peace
        return spec


def _at_the_top_of_the_script() -> bool:
    for frame, _ in traceback.walk_stack(sys._getframe()):
        if frame.f_globals.get("__name__") == "__main__" and frame.f_globals is not globals():
            return frame.f_code.co_name == "<module>"
    return False


def main(argv: Sequence[str]) -> None:
    """Runs the script. What it raises goes on as it would without us, but for hf_spot's own errors, which are told in words."""
    runtime, process = Runtime.from_environ(os.environ), os.getpid()
    process_guard.tie(runtime.launcher if runtime else None)
    if runtime is not None:
        outlive_terminal()
        leave_signals_to_the_launcher(runtime)
    sys.meta_path.insert(0, TrainerHook())
    try:
        _run(argv)
    except BaseException as error:
        if os.getpid() == process:  # and not a child that the script has forked: its end is not the training's
            _tell_end(runtime, error)
        raise


def _tell_end(runtime: Runtime | None, error: BaseException) -> None:
    """Tells the launcher the exit code, and the user in words what is no accident. Raises SystemExit then."""
    code = 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif isinstance(error, SpotError) and not isinstance(error, StoreUnavailable):
        code = error.exit_code  # the store may be back in a minute; what is wrong with a setting is wrong again
    if runtime is not None and code:
        runtime.write_exit_code(code)
    if isinstance(error, SpotError):
        print(f"hf-spot: error: {error}", file=sys.stderr, flush=True)
        sys.exit(code)


def _run(argv: Sequence[str]) -> None:
    if argv[0] == "--module":
        sys.argv = list(argv[1:])
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = list(argv)
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(argv[0]))
    runpy.run_path(argv[0], run_name="__main__")


def leave_signals_to_the_launcher(runtime: Runtime) -> None:
    """Make this process outlive the signals that mean preemption: dying of one would lose the save.

    They may come to it alone, by somebody who has found it in a list of processes, or to every process of the job. Either way
    the launcher gets to know, and a notice goes from there to all ranks. Those that came while this process was started have
    waited for this.

    It is done by handlers and not by SIG_IGN, which children would inherit: they would no longer die when they are told to.
    torchrun's agent has another way to end its ranks (see `hf_spot.launch.agent`).
    """
    owner, launcher = os.getpid(), runtime.launcher
    signals = [one for one in answered_signals(runtime.arguments) if not is_left_alone(one)]

    def pass_on(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # it came before `let_go`
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        else:
            with contextlib.suppress(ProcessLookupError):  # then this process is about to die as well
                os.kill(launcher, signal.SIGTERM)  # not the same signal: two SIGINTs mean that nothing is waited for

    def let_go() -> None:
        for one in signals:
            if signal.getsignal(one) is pass_on:
                signal.signal(one, signal.SIG_DFL)

    for one in signals:
        signal.signal(one, pass_on)
    os.register_at_fork(after_in_child=let_go)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, answered_signals(runtime.arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
