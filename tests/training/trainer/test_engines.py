"""Trainings with DeepSpeed are exact; ``python -m tests.engines`` has more of them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S
from tests.zygote import Zygote


def play(zygote: Zygote, folder: Path, *rows: str) -> str:
    """Return the table of some rows, which must be as it should be."""
    command = [sys.executable, "-Wignore", "-m", "tests.engines", "--keep", str(folder), *rows]
    with zygote.forking():
        played = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE_S)
    assert played.returncode == 0, played.stdout
    return played.stdout


def test_saves_that_are_added_after_each_step_of_two_ranks_change_nothing(zygote: Zygote, tmp_path: Path) -> None:
    table = play(zygote, tmp_path, "--added", "DDP")
    assert "1 rows, 0 not as they must be" in table


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: see CONTRIBUTING.md")
def test_a_zero_3_training_is_exact_and_not_resumed_with_other_ranks(zygote: Zygote, tmp_path: Path) -> None:
    table = play(zygote, tmp_path, "ZeRO-3, not gathered", "another number of ranks")
    assert "2 rows, 0 not as they must be" in table
