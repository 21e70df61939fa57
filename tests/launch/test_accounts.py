"""What launches leave behind, each disturbed in another way; ``python -m tests.accounts`` does a hundred."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import small_disk

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.timeout(3600)
@pytest.mark.skipif(bool(small_disk.why_not()), reason=small_disk.why_not() or "not skipped")
def test_however_launches_end_nothing_is_left_of_them(tmp_path: Path, counted: Callable[[str], None]) -> None:
    command = [sys.executable, "-m", "tests.accounts", "--launches", "13", "--keep", str(tmp_path / "all")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads(ended.stdout)
    assert told["launches"] == len(told["disturbances"]) == 13
    counted(f"accounts: {told['launches']} launches, exit codes {told['exit codes']}, nothing left")
