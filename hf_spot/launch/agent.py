"""``python -m hf_spot.launch.agent [OPTIONS] SCRIPT``: run ``accelerate launch``, without garbage collection while torch loads.

The objects that exist after the import are excluded from garbage collection, as in the launcher and in the ranks: scanning them
would cost a second of processor time, before the ranks start and again at the end.

When a rank crashes, torchrun's agent ends the other ranks with SIGTERM. A rank treats any SIGTERM as a notice, so the ranks are
killed instead, which is how the SIGTERM would have ended them; their child processes still get the SIGTERM.
Signals that mean a notice do nothing to the agent: they were blocked when it was started, and stay so. It passes them on to the
launcher. Torchrun's folder in /tmp, which nobody deletes if the agent is killed, is in the folder of the launch instead.

On machines other than machine 0 it waits until machine 0 listens: torch's own client, if it comes a moment too early, tries
again only half a second later, which was half of what a change of the machines took.

As a warm spare (`hf_spot.training.warm`), the agent first asks accelerate and torchrun how they would start its ranks, starts
those in the same way as spares of its own, and later gives them to torchrun where it starts a Python.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hf_spot.errors import EXIT_PREEMPTED
from hf_spot.launch.addresses import wait_for_listener
from hf_spot.notices.signals import answered_signals, is_left_alone
from hf_spot.runtime import Runtime
from hf_spot.terminal import outlive_terminal
from hf_spot.training.warm import WarmSpare, without_collection

if TYPE_CHECKING:
    from hf_spot.launch.warm_ranks import WarmRanks


_MACHINE_0_S = 60.0  # then torch tries by itself, and says what is wrong


def _import_all() -> None:
    with without_collection():
        importlib.import_module("accelerate.commands.launch")
        importlib.import_module("torch.distributed.run")
        importlib.import_module("hf_spot.launch.warm_ranks")
        importlib.import_module("hf_spot.training.ranks.agents")


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("The following values were not passed to `accelerate launch`")


def _pass_on(runtime: Runtime) -> None:
    signals = answered_signals(runtime.arguments)
    while True:
        number = signal.sigwait(signals)
        if not is_left_alone(signal.Signals(number)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(runtime.launcher, signal.SIGTERM)


def _main() -> None:
    spare = WarmSpare.from_environ()
    runtime = Runtime.from_environ(os.environ)
    if runtime is not None:
        threading.Thread(target=_pass_on, args=(runtime,), name="hf_spot-signals", daemon=True).start()
    outlive_terminal()
    ranks: WarmRanks | None = None
    if spare is None:
        if runtime is not None:
            runtime.meet()  # before the imports, which take long on a busy machine
        _import_all()
    else:
        ranks = _wait(spare)
        runtime = Runtime.from_environ(os.environ)
    from accelerate.commands.launch import main
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from hf_spot.training.ranks.agents import kill_ranks

    logging.getLogger(main.__module__).addFilter(_is_news)  # the launcher shows it, once for all restarts
    kill_ranks()
    if runtime is not None:
        runtime.meet()
        # First, so that a folder that the user names comes later and counts.
        sys.argv[1:1] = ["--log_dir", str(runtime.directory / "torchrun")]
    if (place := _machine_0(sys.argv)) is not None:
        wait_for_listener(*place, _MACHINE_0_S)
    try:
        with contextlib.nullcontext() if ranks is None else ranks.given():
            main()
    except ChildFailedError:
        # The exit code of a preempted rank is not an error.
        if runtime is None or runtime.read_exit_code() != EXIT_PREEMPTED:
            raise
        sys.exit(EXIT_PREEMPTED)
    except subprocess.CalledProcessError as error:  # of one process alone, which accelerate starts without torchrun
        sys.exit(error.returncode if error.returncode > 0 else 1)


def _machine_0(argv: Sequence[str]) -> tuple[str, int] | None:
    """Return where machine 0 is to be found by the others, according to accelerate's options; None on machine 0 itself."""
    end = next((place for place, word in enumerate(argv) if word in ("-m", "--module")), len(argv))
    told: dict[str, str] = {}
    for place, word in enumerate(argv[:end]):
        name, has_value, value = word.partition("=")
        if name.startswith("--"):
            told[name.replace("-", "_")] = value if has_value else "".join(argv[place + 1 : place + 2])
    address, port = told.get("__main_process_ip", ""), told.get("__main_process_port", "")
    if told.get("__machine_rank", "0") == "0" or not address or not port.isdecimal() or port == "0":
        return None
    return address, int(port)


def _wait(spare: WarmSpare) -> WarmRanks:
    """Wait with the ranks, as spares, until this agent is needed, and take over its arguments."""
    started: list[WarmRanks] = []

    def start() -> dict[socket.socket, Callable[[], str | bool]]:
        from hf_spot.launch.warm_ranks import WarmRanks

        started.append(WarmRanks(spare.nice, spare.outputs))
        return started[0].connections()

    argv = spare.wait(_import_all, start, any_arguments=True)
    sys.argv[1:] = argv[argv.index(__spec__.name) + 1 :]
    return started[0]


if __name__ == "__main__":
    _main()
