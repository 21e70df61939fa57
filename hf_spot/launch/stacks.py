"""Asks the processes of a training for the stacks of all their threads, and notes what the system knows of each."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from hf_spot.runtime import STACKS_SIGNAL, Runtime

log = logging.getLogger("hf_spot")

_ANSWER_S = 10.0
_QUIET_S = 0.2  # after the last byte of an answer
_NATIVE_S = 30.0
_LONGEST_BYTES = 60_000  # of one process
_THREADING = re.compile(r"threading\.py\", line \d+ in (run|_bootstrap|_bootstrap_inner)$")
_STATES = {
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "D": "waiting in the kernel, probably for a disk or a network file system",
    "R": "running",
    "S": "sleeping",
}


def state_of(process: int) -> str:
    """Return the state of a process by the letter of ``/proc``; an empty text if it has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return ""


def waited_for_processor_s(process: int) -> float:
    """Return for how many seconds in all the main thread of a process could have run and had no processor; 0 if unknown."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def stacks_of(ranks: Iterable[int], runtime: Runtime) -> str:
    """Return the stacks of these processes and of their children that can tell them, for people.

    A process that is stopped is continued to answer: it is about to be ended.

    Args:
        ranks: ids of the processes that train.
        runtime: of the launch.
    """
    told = []
    for rank in ranks:
        try:
            family = [psutil.Process(rank), *psutil.Process(rank).children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        told += [_of_process(one, rank, runtime) for one in family]
    return "\n".join(told)


def _of_process(process: psutil.Process, rank: int, runtime: Runtime) -> str:
    pid = process.pid
    letter, waits = state_of(pid), _waits_in(pid)
    what = "process" if pid == rank else f"child of {rank}, process"
    head = f"== {what} {pid}, {_STATES.get(letter, letter)}{f', in {waits}' if waits else ''}: {_name(process)}"
    # The native stacks of the ranks alone: each takes seconds.
    if (native := _native(pid) if pid == rank and letter != "T" else None) is not None:
        return f"{head}\n{native}"
    if not _answers(pid):
        return f"{head}\n(it can't tell its stacks{'' if native is None else ', and py-spy could not read them'})"
    answer = _ask(pid, rank, runtime, is_stopped=letter in "Tt")
    return f"{head}\n{answer or '(no answer)'}"


def _ask(process: int, rank: int, runtime: Runtime, *, is_stopped: bool) -> str:
    # A process that another one has forked writes to the file of that one.
    path = next((path for path in map(runtime.stacks_path, (process, rank)) if path.exists()), None)
    if path is None:
        return ""
    begin = path.stat().st_size
    with suppress(ProcessLookupError):
        os.kill(process, STACKS_SIGNAL)
        if is_stopped:
            os.kill(process, signal.SIGCONT)
    size, changed_at, until = begin, time.monotonic(), time.monotonic() + _ANSWER_S
    while (now := time.monotonic()) < until and (size == begin or now - changed_at < _QUIET_S):
        time.sleep(_QUIET_S / 4)
        if (grown := path.stat().st_size) != size:
            size, changed_at = grown, now
    with path.open("rb") as file:
        file.seek(begin)
        return main_first(file.read(_LONGEST_BYTES).decode(errors="replace").strip())


def main_first(answer: str) -> str:
    """Return the stacks that faulthandler has written, with the main thread first and without what each thread begins with."""
    threads = [
        "\n".join(line for line in thread.splitlines() if not _THREADING.search(line)) for thread in answer.split("\n\n")
    ]
    return "\n\n".join(sorted(threads, key=lambda thread: " in <module>" not in thread))


def _answers(process: int) -> bool:
    """Return whether a process has a handler for the signal, which would otherwise end it."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        caught = int(next(line for line in lines if line.startswith("SigCgt:")).split()[1], 16)
        return bool(caught >> (STACKS_SIGNAL - 1) & 1)
    return False


def _native(process: int) -> str | None:
    """Return the stacks with native frames, if py-spy is installed and may read them; None without it, or an empty text."""
    found = shutil.which("py-spy") or shutil.which("py-spy", path=os.path.dirname(sys.executable))
    if found is None:
        return None
    try:
        done = subprocess.run(
            [found, "dump", "--native", "--pid", str(process)], capture_output=True, text=True, timeout=_NATIVE_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        why = getattr(error, "stderr", None) or str(error)
        log.debug("py-spy can't read process %d: %s", process, why)
        return None
    return done.stdout.strip()[:_LONGEST_BYTES]


def _waits_in(process: int) -> str:
    """Return the function of the kernel that a process waits in, if the system tells it."""
    with suppress(OSError):
        found = Path(f"/proc/{process}/wchan").read_text().strip()
        return "" if found == "0" else found
    return ""


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())[:100]
    return "?"
