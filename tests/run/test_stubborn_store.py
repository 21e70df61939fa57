"""A run on a disk that fails a write, or refuses a call: saves are committed in the end, and doctor and launch agree."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_spot.run.run import Run
from tests.stubborn_disk import StubbornDisk, compiled, why_not
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "not skipped")

SAVES = """
import errno, json, logging, os, struct, sys
from pathlib import Path
import hf_spot.run.upload as upload
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.run import Run

logging.disable()
upload._FIRST_RETRY_S = 0.01
url, folders, pins = sys.argv[1:]
run = Run(url)
run.claim()

def save(step, at, error):
    Path(os.environ["STUBBORN_COUNT"]).write_bytes(struct.pack("l", 0))
    os.environ.update(STUBBORN_WRITE=str(at), STUBBORN_ERRNO=str(error))
    folder = Path(folders) / f"checkpoint-{step}"
    folder.mkdir()
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (folder / name).write_bytes(f"{name} of {step}".encode() * 100)
    uploader = upload.Uploader(run, Path(pins), save_total_limit=3, keeps_house=False)
    uploader.submit(folder, CommitRequest(step=step))
    done = uploader.drain(60)
    uploader.close()
    return done, struct.unpack("l", Path(os.environ["STUBBORN_COUNT"]).read_bytes())[0]

_, writes = save(1, 0, 0)
failed, step = [], 1
for error in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
    for at in range(1, writes + 1):
        step += 1
        if not save(step, at, error)[0]:
            failed.append((error, at))
print(json.dumps({"writes": writes, "saves": step, "failed": failed}))
"""


@pytest.fixture
def disk(tmp_path: Path, made_once: Callable[[str, Callable[[Path], object]], Path]) -> StubbornDisk:
    (tmp_path / "mount").mkdir()
    return StubbornDisk(made_once("stubborn-disk", compiled) / "stubborn.so", tmp_path / "mount", tmp_path)


def test_whichever_write_of_a_save_fails_it_is_committed(
    disk: StubbornDisk, tmp_path: Path, counted: Callable[[str], None]
) -> None:
    (tmp_path / "folders").mkdir()
    store = disk.under / "run"
    command = [sys.executable, "-c", SAVES, store, tmp_path / "folders", tmp_path / "pins"]
    done = subprocess.run(command, env={**os.environ, **disk.env()}, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["failed"] == []
    assert told["writes"] > 5
    run = Run(store)
    assert run.find().step == told["saves"]
    assert list(run.verify().values()) == [[], [], []]
    assert [entry.kind for entry in run.events()].count("commit") == told["saves"]
    counted(f"stores that fail a write: {told['saves'] - 1} saves, all committed")


@pytest.mark.parametrize(
    ("refuses", "works"), [("chmod,utime,symlink", True), ("link", False), ("rename", False), ("fsync", False)]
)
def test_doctor_and_launch_judge_a_directory_alike(refuses: str, works: bool, disk: StubbornDisk, tmp_path: Path) -> None:
    env = {**os.environ, **disk.env(refuses, error=errno.EPERM), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    store = str(disk.under / "run")

    def hf_spot(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hf_spot", *map(str, arguments)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, cwd=tmp_path, check=False)

    looked = hf_spot("doctor", "--store", store, "--json")
    findings = {one["check"]: one["level"] for one in json.loads(looked.stdout)}
    script = tmp_path / "script.py"
    script.write_text("print('it ran')\n")
    launched = hf_spot("launch", "--store", store, "--num_processes", "1", script)
    assert ("fail" not in {findings[name] for name in findings if name in ("write", "conditional", "launch")}) is works, (
        findings
    )
    assert launched.returncode == (0 if works else 2), launched.stderr
    assert ("it ran" in launched.stdout) is works
    assert "Traceback" not in looked.stderr + launched.stderr
