"""``python -m tests.spotcloud.hurry SPEED COMMAND…``: the command line of hf-spot, whose waits are so many times shorter.

With ``$SPOTCLOUD_BEGAN``, a time of the Unix clock, its clock runs so many times faster since then.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import datetime, timezone
from types import SimpleNamespace

from hf_spot import cli
from hf_spot.commands import machines


def faster(began_s: float, speed: float) -> datetime:
    """The time of a clock that has run so many times faster since a moment of the Unix clock."""
    return datetime.fromtimestamp(began_s + (time.time() - began_s) * speed, timezone.utc)


if __name__ == "__main__":
    speed = float(sys.argv[1])
    real_sleep = time.sleep
    machines.time = SimpleNamespace(sleep=lambda seconds: real_sleep(seconds / speed))  # type: ignore[attr-defined]
    if began_s := float(os.environ.get("SPOTCLOUD_BEGAN", "0")):
        machines._now = lambda: faster(began_s, speed)
    sys.exit(cli.main(sys.argv[2:]))
