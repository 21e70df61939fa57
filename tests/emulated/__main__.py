"""Runs what only an accelerator shows on one that is emulated: ``python -m tests.emulated [TEST ...]``; needs g++ and ninja."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.emulated import device

TRAINING = Path(__file__).parent.parent / "training"


def main() -> int:
    device.pretend_cudart()
    device.set_delays(0.001, 0.0)
    tests = sys.argv[1:] or [str(TRAINING / name) for name in ("saving/test_device.py", "trainer/test_step_losses.py")]
    return int(pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", *tests]))


if __name__ == "__main__":
    sys.exit(main())
