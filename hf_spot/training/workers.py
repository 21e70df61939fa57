"""DataLoader workers that outlive a signal to the whole job.

Some schedulers send SIGTERM to every process (systemd, ``scancel --full``, a container's init). The training hears it and
saves; its DataLoader workers would die of it, and the training with them in its next step, before it could save.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import resource_tracker
from typing import Any

from torch.utils.data import dataloader
from torch.utils.data._utils import worker

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_plain_loop = worker._worker_loop
_plain_start = dataloader._MultiProcessingDataLoaderIter.__init__


def shield() -> None:
    """From now on the workers of every DataLoader end only when the process that started them says so."""
    dataloader._MultiProcessingDataLoaderIter.__init__ = _start
    worker._worker_loop = shielded_loop


def _start(self: Any, loader: Any) -> None:
    # The workers inherit it with their first instruction: blocked by themselves, it would miss the threads that the import
    # of numpy has made by then.
    if (loader.multiprocessing_context or multiprocessing).get_start_method() == "spawn":
        resource_tracker.ensure_running()  # otherwise the first worker starts it, and that unblocks SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        _plain_start(self, loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shielded_loop(*args: Any, **kwargs: Any) -> None:
    """What a worker runs. Public for pickle's sake: with ``spawn`` it travels by name."""
    threading.Thread(target=_obey_the_parent, args=(os.getppid(),), name="hf_spot-shield", daemon=True).start()
    _plain_loop(*args, **kwargs)


def _obey_the_parent(parent: int) -> None:
    while signal.sigwaitinfo(_SIGNALS).si_pid != parent:
        continue
    os._exit(0)  # as torch's own handler does for a SIGTERM from the parent
