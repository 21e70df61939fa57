"""What a killed training has written and not committed is not lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_spot import Run
from hf_spot.run.told_steps import path_of, read
from tests.launch.conftest import Launcher, Twin
from tests.launch.test_redone_steps import report, start
from tests.waiting import wait_for


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.proof)])
def test_a_save_that_was_whole_when_its_launch_was_killed_is_resumed_and_committed(
    ranks: int, launcher: Launcher, tmp_path: Path, twin: Twin, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    first = start(launcher, run, "--hold_at", "12", ranks=ranks, UPLOADS_UP_TO="5")
    first.wait_for_step(12)
    wait_for(lambda: (first.output_dir / ".hf_spot" / "whole-1-10.json").exists(), first.text())
    told = path_of(first.output_dir, str(run), 1, 0)
    wait_for(lambda: read(told).reached_by(1) == 12, first.text())
    first.kill_tree()
    assert [one.step for one in Run(str(run)).checkpoints()] == [5]
    second = start(launcher, run, ranks=ranks)
    assert second.wait() == 0, second.text()
    assert "step 10 was not committed: it is whole on this disk, and committed next" in second.text()
    assert "resuming from step 10, saved by launch 1" in second.text()
    commits = [entry for entry in Run(str(run)).events() if entry.kind == "commit" and entry.data["step"] == 10]
    assert [(entry.launch, entry.data["saved_by_launch"]) for entry in commits] == [(2, 1)]
    assert "launch 1 ended without a word: 2 steps lost" in (text := report(run, capsys)), text
    assert not [*first.output_dir.glob("torn-*"), *(first.output_dir / ".hf_spot").glob("whole-*")]
    if ranks == 1:
        assert (tmp_path / "weights" / "model.safetensors").read_bytes() == twin.weights
