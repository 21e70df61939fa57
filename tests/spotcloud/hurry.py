"""``python -m tests.spotcloud.hurry SPEED COMMAND…``: the command line of hf-spot, whose waits are so many times shorter."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

from hf_spot import cli
from hf_spot.commands import machines

if __name__ == "__main__":
    speed = float(sys.argv[1])
    real_sleep = time.sleep
    machines.time = SimpleNamespace(sleep=lambda seconds: real_sleep(seconds / speed))  # type: ignore[attr-defined]
    sys.exit(cli.main(sys.argv[2:]))
