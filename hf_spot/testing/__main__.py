"""Run a fake metadata service: ``python -m hf_spot.testing --help``."""

from __future__ import annotations

import argparse
import signal
import threading
import time
from collections.abc import Callable, Sequence

from hf_spot.testing import FakeAlibaba, FakeAzure, FakeGCP, FakeIMDS, FakeService

_CLOUDS: dict[str, Callable[[], FakeService]] = {"aws": FakeIMDS, "gcp": FakeGCP, "azure": FakeAzure, "alibaba": FakeAlibaba}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a fake metadata service until Ctrl-C. On SIGUSR1 it announces an interruption immediately."""
    parser = argparse.ArgumentParser(prog="python -m hf_spot.testing", description="Run a fake metadata service of a cloud.")
    parser.add_argument("--cloud", choices=_CLOUDS, default="aws", help="the cloud to imitate (default: aws)")
    parser.add_argument("--interrupt-after", type=float, metavar="S", help="announce an interruption after S seconds")
    parser.add_argument(
        "--in",
        dest="in_s",
        type=float,
        default=120,
        metavar="S",
        help="seconds from the announcement to the interruption (default: 120)",
    )
    arguments = parser.parse_args(argv)
    with _CLOUDS[arguments.cloud]() as service:
        signal.signal(signal.SIGUSR1, lambda number, frame: service.interrupt(arguments.in_s))
        print("\n".join(f"export {name}={value}" for name, value in service.env().items()), flush=True)
        try:
            if arguments.interrupt_after is not None:
                time.sleep(arguments.interrupt_after)
                service.interrupt(arguments.in_s)
            threading.Event().wait()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
