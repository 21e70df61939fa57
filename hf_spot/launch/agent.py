"""``python -m hf_spot.launch.agent [OPTIONS] SCRIPT``: run ``accelerate launch``, without garbage collection while torch loads.

The objects that exist after the import are excluded from garbage collection, as in the launcher and in the ranks: scanning them
would cost a second of processor time, before the ranks start and again at the end.

When a rank crashes, torchrun's agent ends the other ranks with SIGTERM. A rank treats any SIGTERM as a notice, so the ranks are
killed instead, which is how the SIGTERM would have ended them; their child processes still get the SIGTERM.
Signals that mean a notice do nothing to the agent: they were blocked when it was started, and stay so. It passes them on to the
launcher. Torchrun's folder in /tmp, which nobody deletes if the agent is killed, is in the folder of the launch instead.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
import threading

gc.disable()
from accelerate.commands.launch import main  # noqa: E402

from hf_spot.errors import EXIT_PREEMPTED  # noqa: E402
from hf_spot.notices.signals import answered_signals, is_left_alone  # noqa: E402
from hf_spot.runtime import Runtime  # noqa: E402
from hf_spot.terminal import outlive_terminal  # noqa: E402
from hf_spot.training.ranks.agents import kill_ranks  # noqa: E402

gc.freeze()
gc.enable()


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
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger(main.__module__).addFilter(_is_news)  # the launcher shows it, once for all restarts
    outlive_terminal()
    kill_ranks()
    runtime = Runtime.from_environ(os.environ)
    if runtime is not None:
        runtime.meet()
        threading.Thread(target=_pass_on, args=(runtime,), name="hf_spot-signals", daemon=True).start()
        # First, so that a folder that the user names comes later and counts.
        sys.argv[1:1] = ["--log_dir", str(runtime.directory / "torchrun")]
    try:
        main()
    except ChildFailedError:
        # The exit code of a preempted rank is not an error.
        if runtime is None or runtime.read_exit_code() != EXIT_PREEMPTED:
            raise
        sys.exit(EXIT_PREEMPTED)
    except subprocess.CalledProcessError as error:  # of one process alone, which accelerate starts without torchrun
        sys.exit(error.returncode if error.returncode > 0 else 1)


if __name__ == "__main__":
    _main()
