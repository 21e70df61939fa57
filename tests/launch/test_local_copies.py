"""What a killed training has written and not committed is not lost."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    assert "step 10 was whole on its disk)" in text
    assert not [*first.output_dir.glob("torn-*"), *(first.output_dir / ".hf_spot").glob("whole-*")]
    if ranks == 1:
        assert (tmp_path / "weights" / "model.safetensors").read_bytes() == twin.weights


LOOP = """
import sys, time
import torch
from hf_spot import Run, SpotArguments, SpotCheckpointManager

plain_upload, last = Run.upload, int(sys.argv[1])

def upload(run, folder, request, **more):
    while request.step > last:
        time.sleep(0.1)
    return plain_upload(run, folder, request, **more)

Run.upload = upload
torch.manual_seed(0)
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.AdamW(model.parameters())
manager = SpotCheckpointManager("run", 5, local_dir="local", args=SpotArguments(notice="none"))
first, _ = manager.load_latest(model, optimizer)
for step in range(first + 1, 21):
    model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        manager.save(model, optimizer, None, step, 0)
    with open("steps", "a") as file:
        file.write(f"{step}\\n")
manager.finish()
torch.save(model.state_dict(), sys.argv[2])
"""


@pytest.mark.proof
def test_a_loop_of_ones_own_takes_what_was_whole_too(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", LOOP, *words], cwd=tmp_path, start_new_session=True)

    first = run("5", "never")
    wait_for(lambda: any(tmp_path.glob("local/**/whole-1-20.json")), "for the record")
    first.kill()
    first.wait()
    assert [one.step for one in Run(tmp_path / "run").checkpoints()] == [5]
    assert run("100", "killed.pt").wait() == 0
    assert (tmp_path / "steps").read_text().split() == [str(step) for step in range(1, 21)]  # none is done again
    assert not [*tmp_path.glob("local/**/checkpoint-*"), *tmp_path.glob("local/**/whole-*")]
    shutil.rmtree(tmp_path / "run")
    assert run("100", "twin.pt").wait() == 0
    killed, twin = (torch.load(tmp_path / name) for name in ("killed.pt", "twin.pt"))
    assert all(torch.equal(killed[name], twin[name]) for name in twin)
