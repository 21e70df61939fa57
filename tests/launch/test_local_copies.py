"""What a killed training has written and not committed is not lost."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_spot import Run
from hf_spot.run.told_steps import path_of, read
from tests.launch.conftest import Launch, Launcher, Twin
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


def forget_on_disk(launch: Launch, step: int) -> None:
    """Delete a checkpoint from the disk once it is recorded there, which comes after its copy in memory."""
    record = launch.output_dir / ".hf_spot" / f"whole-1-{step}.json"
    wait_for(record.exists, launch.text())
    record.unlink()
    shutil.rmtree(launch.output_dir / f"checkpoint-{step}")


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.proof)])
def test_a_killed_training_resumes_from_the_memory_of_its_machine(
    ranks: int, launcher: Launcher, tmp_path: Path, twin_of_ranks: Callable[[int], Twin], capsys: pytest.CaptureFixture[str]
) -> None:
    run, go_on = tmp_path / "run", tmp_path / "out" / "go-on"
    launch = start(launcher, run, "--hold_at", "12", ranks=ranks, UPLOADS_UP_TO="5", UPLOADS_AGAIN=str(go_on))
    launch.wait_for_step(12)
    forget_on_disk(launch, 10)
    launch.trainings()[-1].kill()
    wait_for(lambda: "resuming from step" in launch.text(), launch.text())
    go_on.touch()
    assert launch.wait() == 0, launch.text()
    assert "step 10 was not committed: it is whole in this machine's memory, and committed next" in launch.text()
    assert "resuming from step 10, saved by launch 1" in launch.text()
    text = report(run, capsys)
    assert "launch 1 failed: 2 steps lost (step 12 at " in text, text
    assert ", by its launcher; step 10 was whole in its machine's memory)" in text
    assert [line.split()[9:11] for line in text.splitlines()[2:4]] == [["2", "0"], ["0", "2"]], text
    assert (tmp_path / "weights" / "model.safetensors").read_bytes() == twin_of_ranks(ranks).weights


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
