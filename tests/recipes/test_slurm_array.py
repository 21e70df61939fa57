"""The array that ``hf-spot recipe slurm --nodes MIN:MAX`` prints: two elements train one run, and one of them is preempted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from hf_spot.cli import main
from hf_spot.run.run import Run
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
PLAIN = ROOT / "tests" / "training" / "scripts" / "plain.py"
# Both machines of this test have the same disk, and each needs a folder of its own.
SCRIPT = """\
import runpy, sys, tempfile
folder = tempfile.mkdtemp(dir={folder!r})
sys.argv = [{plain!r}, "--output_dir", folder + "/out", "--weights", folder + "/weights"]
sys.argv += ["--save_steps", "5", "--step_s", "0.8"]
runpy.run_path({plain!r}, run_name="__main__")
"""
PROGRAMS = {"srun": 'exec "$@"', "scontrol": 'echo "scontrol $*" >> asked', "scancel": 'echo "scancel $*" >> asked'}


@pytest.mark.proof
def test_an_element_is_requeued_alone_and_the_finished_run_needs_no_more_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    for name, body in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "train.py").write_text(SCRIPT.format(folder=str(tmp_path), plain=str(PLAIN)))
    store = tmp_path / "run"
    assert main(["recipe", "slurm", "--store", str(store), "--nodes", "1:2", "--script", str(tmp_path / "train.py")]) == 0
    (tmp_path / "job.sh").write_text(capsys.readouterr().out)
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "SLURM_ARRAY_JOB_ID": "7"}
    elements = []
    for number in (1, 2):
        with (tmp_path / f"log-{number}").open("wb") as log:
            there = {**environ, "SLURM_JOB_ID": f"7{number}", "SLURM_ARRAY_TASK_ID": str(number)}
            elements.append(psutil.Popen(["bash", "job.sh"], cwd=tmp_path, env=there, stdout=log, stderr=subprocess.STDOUT))

    def said(number: int) -> str:
        return (tmp_path / f"log-{number}").read_text()

    try:
        wait_for(lambda: bool(Run(str(store)).state().checkpoints), "for the first commit")
        (launch,) = elements[1].children()  # as Slurm's daemon does, to what srun has started
        launch.send_signal(signal.SIGUSR1)
        codes = [element.wait(300) for element in elements]
    finally:
        for element in elements:
            for process in [*element.children(recursive=True), element] if element.is_running() else ():
                process.kill()
    assert codes == [0, 75], said(1) + said(2)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert sorted(asked) == ["scancel --state=PENDING 7", "scontrol requeue 7_2"]
    state = Run(str(store)).state()
    assert (state.ended, state.launch) == ("finished", 2)
