"""What is different in a notebook: a user resumes by running a cell, and reads errors below it."""

from __future__ import annotations

import builtins
import multiprocessing
import signal
import sys
import threading
import warnings
from dataclasses import dataclass

from hf_spot.training.upstream import AGENT_HANDLER


def in_notebook() -> bool:
    """Return whether this process is IPython, in a kernel or a terminal, or was forked by it."""
    return hasattr(builtins, "__IPYTHON__")


@dataclass(frozen=True)
class Cell:
    """A cell of a notebook that runs.

    Args:
        source: its text.
        count: how many cells the kernel has run, with this one.
    """

    source: str
    count: int


def this_cell() -> Cell | None:
    """Return the cell that is running; None outside a notebook."""
    if not in_notebook():
        return None
    shell = sys.modules["IPython"].get_ipython()
    return Cell(str((shell.user_ns.get("In") or [""])[-1]), int(shell.execution_count))


def how_to_resume() -> str:
    """Return what a user must do after a preemption."""
    if in_notebook() and multiprocessing.parent_process() is not None:
        # The kernel keeps the rendezvous of the workers that have ended, and new workers would wait for them.
        return "Restart the kernel and run the cells again, here or on another machine: training resumes from there."
    if in_notebook():
        return "Run this cell again, here or on another machine: training resumes from there."
    return "Start the same command again to resume."


def shows_errors() -> bool:
    """Return whether an exception is shown below the cell, so that it need not be logged too."""
    return in_notebook() and multiprocessing.parent_process() is None


def suppress_exit_advice() -> None:
    """Suppress IPython's advice on how to leave IPython, which it prints below every SystemExit."""
    if in_notebook():
        warnings.filterwarnings("ignore", message="To exit: use", category=UserWarning, module="IPython")


def drop_inherited_handlers() -> None:
    """Remove the signal handlers of torch's elastic agent in workers of ``accelerate.notebook_launcher``.

    The workers inherit them by fork; they raise an error, which would end the training in the middle of a step.
    """
    if multiprocessing.parent_process() is None or threading.current_thread() is not threading.main_thread():
        return
    for one in (signal.SIGTERM, signal.SIGINT):
        if (handler := AGENT_HANDLER.find()) is not None and signal.getsignal(one) is handler:
            signal.signal(one, signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL)
