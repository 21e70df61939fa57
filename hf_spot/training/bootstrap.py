"""``python -m hf_spot.training.bootstrap [--module] SCRIPT [ARGS…]``: runs a script with every `Trainer` made preemptible.

`hf-spot launch` starts each rank of a script this way. Every other Python of a launch, which some program has started, gets the
same from `hf_spot.every_python.sitecustomize`, which calls the functions ``before_…`` when it imports a module that trains.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.abc
import importlib.machinery
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from functools import partial
from types import FrameType, ModuleType, TracebackType
from typing import Any

from hf_spot import process_guard
from hf_spot.errors import SpotError, StoreUnavailable
from hf_spot.notices.signals import answered_signals, is_left_alone
from hf_spot.runtime import EXIT_UNAVAILABLE, Runtime, at_training
from hf_spot.terminal import outlive_terminal
from hf_spot.training.session.after_import import AfterImport
from hf_spot.training.warm import WarmSpare

_TRAINER = "transformers.trainer"
_OPTIMIZERS = "torch.optim.optimizer"
_LARGE = ("torch", "transformers")
_owners: set[int] = set()  # processes, of this one and those above it, whose signals are left to the launcher


class TrainerHook(importlib.abc.MetaPathFinder):
    """Calls `hf_spot.training.callback.install` as soon as anything has imported ``transformers.trainer``.

    A script that never imports it is not affected. Python's garbage collector is off while torch and transformers are
    imported, and then ignores their objects (`gc.freeze`): it would scan a million objects again and again between steps, and
    for about a second when the process ends, when a machine may have few seconds left. Nothing is frozen if a function of the
    script imports Trainer, because it may have created a model already that must be freed later.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec that the standard finder finds, with a loader that also installs hf_spot's callback."""
        is_trainer = name == _TRAINER
        if is_trainer:
            if self in sys.meta_path:  # in a Python of a command, another finder has called this one
                sys.meta_path.remove(self)
        elif name.partition(".")[0] not in _LARGE or not gc.isenabled():
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            exec_module = loader.exec_module

            def exec_and_install(module: ModuleType) -> None:
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

            loader.exec_module = exec_and_install
        return spec


def before_trainer(name: str, path: Sequence[str] | None, target: ModuleType | None) -> importlib.machinery.ModuleSpec | None:
    """Make the trainings of this process, which some program of the launch has started, preemptible.

    Returns:
        The spec of ``transformers.trainer``.
    """
    runtime = Runtime.from_environ(os.environ)
    outlive_terminal()
    shown = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if runtime is not None:
            runtime.tell_failed()
        if isinstance(error, SpotError):
            with contextlib.suppress(SystemExit):
                _tell_end(runtime, error)
        else:
            shown(kind, error, trace)

    sys.excepthook = tell
    return TrainerHook().find_spec(name, path, target)


def before_optimizers(
    name: str, path: Sequence[str] | None, target: ModuleType | None
) -> importlib.machinery.ModuleSpec | None:
    """Watch for a training without hf_spot, in this process. Returns the spec of ``torch.optim.optimizer``."""
    _continue_script_runs(Runtime.from_environ(os.environ))
    return AfterImport(name, _watch_steps).find_spec(name, path, target)


def before_torchrun(name: str, path: Sequence[str] | None, target: ModuleType | None) -> importlib.machinery.ModuleSpec | None:
    """Make torchrun, if this process is its agent, kill ranks instead of signalling them. Returns the spec of its module."""
    return AfterImport(name, _kill_ranks).find_spec(name, path, target)


def begin_after_torch() -> None:
    """Do what the functions ``before_…`` do for torch's modules, in a process that has imported them before."""
    if (runtime := Runtime.from_environ(os.environ)) is not None:
        runtime.meet()
    _continue_script_runs(runtime)
    _watch_steps()
    _kill_ranks()


def _continue_script_runs(runtime: Runtime | None) -> None:
    from hf_spot.training.session.script_runs import watch_launch

    if runtime is not None:
        watch_launch(runtime.store)


def _watch_steps() -> None:
    from hf_spot.training.unprotected import watch_steps

    watch_steps()


def _kill_ranks() -> None:
    from hf_spot.training.ranks.agents import kill_ranks

    kill_ranks()


def _at_the_top_of_the_script() -> bool:
    for frame, _ in traceback.walk_stack(sys._getframe()):
        if frame.f_globals.get("__name__") == "__main__" and frame.f_globals is not globals():
            return frame.f_code.co_name == "<module>"
    return False


def main(argv: Sequence[str]) -> None:
    """Run the script. Its exceptions are raised as without hf_spot; hf_spot's own errors are printed without a traceback.

    Args:
        argv: ``--module`` or nothing, the script or module, and its arguments.
    """
    spare = WarmSpare.from_environ()
    runtime, process = Runtime.from_environ(os.environ), os.getpid()
    process_guard.tie(runtime.launcher if runtime else None)
    if runtime is not None:
        outlive_terminal()
        leave_signals_to_the_launcher(runtime)
    _continue_script_runs(runtime)
    sys.meta_path[:0] = [TrainerHook(), AfterImport(_OPTIMIZERS, _watch_steps)]
    if spare is not None:
        _enter(argv)
        spare.wait(partial(spare.first_imports_of, argv))
        runtime = Runtime.from_environ(os.environ)
    if runtime is not None:
        runtime.meet()
    try:
        _run(argv)
    except BaseException as error:
        if os.getpid() == process:  # not in a child that the script has forked: its end is not the training's
            _tell_end(runtime, error)
        raise


def _tell_end(runtime: Runtime | None, error: BaseException) -> None:
    """Report the exit code to the launcher, and print an error of hf_spot. Raises SystemExit for the latter."""
    code = 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif isinstance(error, StoreUnavailable):  # it may be back in a minute, while a wrong setting stays wrong
        code = EXIT_UNAVAILABLE
    elif isinstance(error, SpotError):
        code = error.exit_code
    if runtime is not None and code:
        runtime.write_exit_code(code)
    if isinstance(error, SpotError):
        print(f"hf-spot: error: {error}", file=sys.stderr, flush=True)
        sys.exit(code)


def _enter(argv: Sequence[str]) -> None:
    """Set the arguments and the search path that the script will find."""
    if argv[0] == "--module":
        sys.argv = list(argv[1:])
        return
    sys.argv = list(argv)
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(argv[0]))


def _run(argv: Sequence[str]) -> None:
    _enter(argv)
    if argv[0] == "--module":
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


def leave_signals_to_the_launcher(runtime: Runtime) -> None:
    """Forward signals that mean preemption to the launcher: dying of one would lose the save.

    A signal may reach only this process, or every process of the job. Either way the launcher learns of it, and sends a notice
    to all ranks. Signals that arrived while this process was starting were blocked until now.

    Handlers are used instead of SIG_IGN, which children would inherit: they could no longer be terminated. torchrun's agent
    ends its ranks in another way (see `hf_spot.launch.agent`).
    """
    owner, launcher = os.getpid(), runtime.launcher
    _owners.add(owner)
    signals = [one for one in answered_signals(runtime.arguments) if not is_left_alone(one)]

    def pass_on(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # it arrived before `restore_defaults`
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        else:
            with contextlib.suppress(ProcessLookupError):  # without a launcher this process is about to end as well
                os.kill(launcher, signal.SIGTERM)  # not the same signal: a second SIGINT means not to wait for anything

    def restore_defaults() -> None:
        for one in signals:
            if signal.getsignal(one) is pass_on:
                signal.signal(one, signal.SIG_DFL)

    for one in signals:
        signal.signal(one, pass_on)

    def stand_again() -> None:
        if os.getpid() not in _owners and threading.current_thread() is threading.main_thread():
            leave_signals_to_the_launcher(runtime)

    os.register_at_fork(after_in_child=restore_defaults)
    at_training(stand_again)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, answered_signals(runtime.arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
