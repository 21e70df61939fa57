"""``python -m hf_spot.launch.agent [OPTIONS] SCRIPT``: ``accelerate launch``, whose collector rests while torch is imported.

What stays is left alone, as in the launcher and in the ranks: looking through it costs a processor second, before the ranks
start and when all has ended.

torchrun's agent ends with SIGTERM the ranks that one that crashed has left behind. Ranks take a SIGTERM for a notice, from
whomever it comes, so they are killed instead, as they would have died of it; what they have started still gets the SIGTERM.
A signal that means a notice does nothing to the agent: they were blocked when it was started, and stay so; it passes them on to
the launcher.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading

gc.disable()
from accelerate.commands.launch import main  # noqa: E402

from hf_spot.errors import EXIT_PREEMPTED  # noqa: E402
from hf_spot.notices.signals import answered_signals, is_left_alone  # noqa: E402
from hf_spot.runtime import Runtime  # noqa: E402
from hf_spot.terminal import outlive_terminal  # noqa: E402

gc.freeze()
gc.enable()


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("The following values were not passed to `accelerate launch`")


def kill_ranks() -> None:
    """Make the agent of this process end its ranks at once, and the rest of their groups as ever.

    Raises:
        ImportError, AttributeError: torch has changed.
    """
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    close = SubprocessHandler.close

    def kill_and_close(self: SubprocessHandler, death_sig: signal.Signals | None = None) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.proc.kill()
        close(self, death_sig)

    SubprocessHandler.close = kill_and_close  # type: ignore[method-assign]


def _pass_on(runtime: Runtime) -> None:
    signals = answered_signals(runtime.arguments)
    while True:
        number = signal.sigwait(signals)
        if not is_left_alone(signal.Signals(number)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(runtime.launcher, signal.SIGTERM)


def _main() -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger(main.__module__).addFilter(_is_news)  # the launcher has said it, once for all restarts
    outlive_terminal()
    kill_ranks()
    runtime = Runtime.from_environ(os.environ)
    if runtime is not None:
        threading.Thread(target=_pass_on, args=(runtime,), name="hf_spot-signals", daemon=True).start()
    try:
        main()
    except ChildFailedError:
        # A rank that was preempted ends with a code that is no error.
        if runtime is None or runtime.read_exit_code() != EXIT_PREEMPTED:
            raise
        sys.exit(EXIT_PREEMPTED)


if __name__ == "__main__":
    _main()
