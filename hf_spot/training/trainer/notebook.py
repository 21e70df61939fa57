"""What is different in a notebook: there a person goes on by running a cell, and reads errors below it."""

from __future__ import annotations

import builtins
import multiprocessing
import signal
import threading
import warnings

from hf_spot.training.upstream import AGENT_HANDLER


def in_notebook() -> bool:
    """Whether this is IPython, in a kernel or in a terminal, or a process that it has forked."""
    return hasattr(builtins, "__IPYTHON__")


def how_to_resume() -> str:
    """What a person does after a preemption."""
    if in_notebook() and multiprocessing.parent_process() is not None:
        # The kernel keeps the rendezvous of the workers that have ended, and new ones would look for them.
        return "Restart the kernel and run the cells again, here or on another machine: training resumes from there."
    if in_notebook():
        return "Run this cell again, here or on another machine: training resumes from there."
    return "Start the same command again to resume."


def shows_errors() -> bool:
    """Whether what is raised stands below the cell, so that the log need not say it, too."""
    return in_notebook() and multiprocessing.parent_process() is None


def suppress_exit_advice() -> None:
    """Keeps IPython, after a `TrainingPreempted`, from telling how to leave IPython, as it does below every SystemExit."""
    if in_notebook():
        warnings.filterwarnings("ignore", message="To exit: use", category=UserWarning, module="IPython")


def drop_inherited_handlers() -> None:
    """``accelerate.notebook_launcher`` forks its workers from the process in which torch's elastic agent handles signals by
    raising an error. What they inherit of it is not theirs: it would end the training in the middle of a step."""
    if multiprocessing.parent_process() is None or threading.current_thread() is not threading.main_thread():
        return
    for one in (signal.SIGTERM, signal.SIGINT):
        if (handler := AGENT_HANDLER.find()) is not None and signal.getsignal(one) is handler:
            signal.signal(one, signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL)
