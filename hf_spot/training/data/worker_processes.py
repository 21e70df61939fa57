"""DataLoader workers that survive a signal to the whole job.

Some schedulers send their signal to every process (systemd, ``scancel --full``, a container's init), and a terminal or Jupyter
sends Ctrl-C's SIGINT. The training treats it as a notice and saves; its DataLoader workers would die of it, and the training
with them in its next step, before it could save. A signal may also reach a worker alone, so a worker passes it on.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

import psutil
import torch

from hf_spot.arguments import SpotArguments
from hf_spot.notices.signals import answered_signals, held_back, is_caught_by, is_left_alone
from hf_spot.runtime import Runtime
from hf_spot.training.data.worker_states import Asked, Made, Worker, WorkerStates
from hf_spot.training.upstream import SKIPS_INSIDE, START_WORKERS, WORKER_LOOP

log = logging.getLogger("hf_spot")

# None if torch has changed: `hf_spot.training.upstream.check` then refuses the training.
_plain_loop = WORKER_LOOP.find()
_plain_start = START_WORKERS.find()

_would_be_there = False
_given: Callable[[Any], WorkerStates | None] | None = None
_signals: tuple[signal.Signals, ...] = ()


def shield(arguments: SpotArguments | None = None) -> None:
    """Make the workers of every DataLoader pass on signals that mean a notice; they end if their own parent sends one.

    Args:
        arguments: name the signals; None uses those of the launch, or the defaults.
    """
    global _signals
    if arguments is None:
        runtime = Runtime.from_environ(os.environ)
        arguments = runtime.arguments if runtime else SpotArguments()
    _signals = answered_signals(arguments)
    START_WORKERS.put(_start)
    WORKER_LOOP.put(partial(shielded_loop, _signals))


@contextmanager
def seeded_before(would_be_there: bool) -> Iterator[None]:
    """Draw no seed for persistent workers that start within the block: without an interruption they would exist already.

    Args:
        would_be_there: whether this is so; False changes nothing.
    """
    global _would_be_there
    before, _would_be_there = _would_be_there, would_be_there
    try:
        yield
    finally:
        _would_be_there = before


@contextmanager
def starts_given(states_for: Callable[[Any], WorkerStates | None]) -> Iterator[None]:
    """Give states to the workers of other loaders than the training's that start within the block.

    Args:
        states_for: returns them for a loader whose workers start; None leaves its workers alone.
    """
    global _given
    before, _given = _given, states_for
    try:
        yield
    finally:
        _given = before


def _start(self: Any, loader: Any) -> None:
    states = _states_of(loader)
    persisted = states is None and _would_be_there and loader.persistent_workers
    states = states or (None if _given is None else _given(loader))
    init, generator = loader.worker_init_fn, loader.generator
    if states is not None:
        loader.worker_init_fn = states.to_worker(loader)
        persisted = persisted or states.seeded_before
    if persisted:  # their seed must not be drawn from the training's generator a second time
        loader.generator = torch.Generator()
    try:
        _start_shielded(self, loader)
    finally:
        loader.worker_init_fn, loader.generator = init, generator


def _states_of(loader: Any) -> WorkerStates | None:
    """Return the states set on the batch sampler of the training's loader, or, in a resumed epoch, on the one it wraps."""
    sampler = getattr(loader, "batch_sampler", None)
    for one in (sampler, SKIPS_INSIDE.of(sampler) if SKIPS_INSIDE.is_on(sampler) else None):
        states = getattr(one, "worker_states", None)
        if isinstance(states, WorkerStates):
            return states
    return None


def _start_shielded(self: Any, loader: Any) -> None:
    # The workers inherit the signal mask: if they set it themselves, it would miss threads that the import of numpy has
    # started by then. So do the processes that multiprocessing starts for them with "spawn" and "forkserver".
    with held_back(_signals):
        if (loader.multiprocessing_context or multiprocessing).get_start_method() != "fork":
            resource_tracker.ensure_running()  # otherwise the first worker starts it, which unblocks SIGTERM
            signal.pthread_sigmask(signal.SIG_BLOCK, _signals)
        _plain_start(self, loader)


def shielded_loop(signals: Sequence[signal.Signals], *args: Any, **kwargs: Any) -> None:
    """Run torch's worker loop, with signals blocked. Public because ``spawn`` pickles it by name."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # with "forkserver" os.getppid() is another process
    threading.Thread(target=_answer, args=(parent, signals), name="hf_spot-shield", daemon=True).start()
    # dataset_kind, dataset, index_queue, data_queue, …, collate_fn (6), …, init_fn (9), worker_id (10), … as torch 2.6 to 2.13
    # pass them
    worker = args[9] if len(args) > 10 else None
    if isinstance(worker, Worker):
        worker.works_with(args[1], args[6])
        args = (*args[:2], Asked(args[2], worker, args[10]), Made(args[3], worker), *args[4:])
    _plain_loop(*args, **kwargs)


def _answer(parent: BaseProcess, signals: Sequence[signal.Signals]) -> None:
    runtime = Runtime.from_environ(os.environ)
    # They end a worker with SIGTERM when its training has crashed, which is no notice.
    of_the_launch = _ancestors_up_to(runtime.launcher) if runtime else set()
    while (received := signal.sigwaitinfo(signals)).si_pid != parent.pid:
        one = signal.Signals(received.si_signo)
        # A keyboard's SIGINT reaches the training itself, too, where a second one means not to wait for anything.
        if one is signal.SIGINT or received.si_pid in of_the_launch or is_left_alone(one) or not parent.is_alive():
            continue
        if not _pass_on(one, signals, runtime.launcher if runtime else None, parent.pid):
            log.warning(
                "a DataLoader worker (process %d) has ignored %s: signals are no notice for this training (process %s)",
                os.getpid(),
                one.name,
                parent.pid,
            )
    os._exit(0)  # as torch's own handler does for a SIGTERM from the parent


def _pass_on(one: signal.Signals, signals: Sequence[signal.Signals], launcher: int | None, training: int | None) -> bool:
    others = [signal.SIGTERM] if launcher else [other for other in (one, *signals) if other is not signal.SIGINT]
    to = launcher or training
    for other in others:
        if to is not None and is_caught_by(to, other):
            with suppress(ProcessLookupError):
                os.kill(to, other)
            return True
    return False


def _ancestors_up_to(launcher: int) -> set[int]:
    found = set()
    for one in psutil.Process().parents():
        found.add(one.pid)
        if one.pid == launcher:
            return found
    return set()
