"""A store that takes requests and answers nothing, or too slowly: a machine that must go ends in time all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hf_spot.run.run import Run
from tests.gate import Gate
from tests.hostile import Hostile, SlowLink
from tests.launch.conftest import PLAIN, SCRIPTS, Launch, Launcher, Twin
from tests.servers import SeaweedFS
from tests.waiting import wait_for
from tests.zygote import Zygote

DEADLINE_S = 2.0
NAMES = ["--output_dir", "out", "--diary", "diary", "--weights", "weights"]
LAUNCH_1 = ["--output_dir", "out-1", "--diary", "diary-1", "--weights", "weights-1"]
END_S = 25.0  # for last words to a journal that doesn't answer, and for Python's own end; a request would hang for 95 s


def give_notice(notice: Path) -> float:
    """The machine goes in `DEADLINE_S` from now; the time of now."""
    whole = notice.with_suffix(".whole")
    whole.write_text(json.dumps({"kind": "TERMINATE", "deadline_s": DEADLINE_S}))
    whole.rename(notice)
    return time.monotonic()


def committed_step(run: Run) -> int:
    newest = run.state().latest()
    return newest.step if newest else 0


@pytest.mark.fresh_script
def test_a_store_that_says_nothing_any_more_holds_no_launch_after_its_deadline(
    seaweedfs: SeaweedFS, s3_url: str, launcher: Launcher, punctual: Path
) -> None:
    run, notice = Run(s3_url), launcher.tmp_path / "notice"
    with Gate(seaweedfs.endpoint) as gate:
        script = [punctual, PLAIN, *LAUNCH_1, "--hold_at", "7"]
        options = ["--notice", f"file:{notice}"]
        launch = launcher.start(s3_url, script, options=options, env={"AWS_ENDPOINT_URL": gate.endpoint})
        launch.wait_for_step(7)
        wait_for(lambda: committed_step(run) == 5)
        gate.close_at(".")
        began = give_notice(notice)
        launch.go_on_when_it_says("TERMINATE from file")
        assert launch.wait() == 75, launch.text()
        assert time.monotonic() - began < DEADLINE_S + END_S, launch.text()
    assert "Traceback" not in launch.text()
    assert committed_step(run) == 5


def test_uploads_that_hang_keep_no_process_from_its_end(
    seaweedfs: SeaweedFS, s3_url: str, tmp_path: Path, punctual: Path, zygote: Zygote
) -> None:
    run, notice = Run(s3_url), tmp_path / "notice"
    with Gate(seaweedfs.endpoint) as gate, open(tmp_path / "log", "wb") as log:
        gate.close_at(r"PUT .*/checkpoint-")
        env = {"AWS_ENDPOINT_URL": gate.endpoint, "TEST_STORE": s3_url, "TEST_NOTICE": f"file:{notice}", "OMP_NUM_THREADS": "1"}
        script = [str(punctual), str(SCRIPTS / "with_callback.py"), *NAMES, "--hold_at", "7", "--step_s", "0.1"]
        with zygote.forking():
            process = psutil.Popen(
                [sys.executable, *script],
                cwd=tmp_path,
                env={**os.environ, "HF_HUB_OFFLINE": "1", **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        launch = Launch(process, tmp_path / "log", tmp_path / "diary", tmp_path / "out")
        try:
            launch.wait_for_step(7)  # training has not waited for the upload of step 5
            wait_for(gate.reached.is_set)
            began = give_notice(notice)
            launch.output_dir.joinpath("go-on").touch()
            assert launch.wait() == 75, launch.text()
            assert time.monotonic() - began < DEADLINE_S + END_S, launch.text()
        finally:
            launch.kill_tree()
    assert [entry.kind for entry in run.events()] == ["claim", "training", "notice", "preempted"]
    assert "Traceback" not in launch.text()


def test_a_link_too_slow_for_the_deadline_slows_no_step_and_the_last_commit_stands(
    seaweedfs: SeaweedFS, s3_url: str, launcher: Launcher, punctual: Path
) -> None:
    run, notice = Run(s3_url), launcher.tmp_path / "notice"
    with SlowLink(seaweedfs.endpoint, bytes_per_s=1e6) as link:
        script = [punctual, PLAIN, *LAUNCH_1, "--hold_at", "7", "--step_s", "0.1"]
        options = ["--notice", f"file:{notice}"]
        launch = launcher.start(s3_url, script, options=options, env={"AWS_ENDPOINT_URL": link.endpoint})
        launch.wait_for_step(7)
        wait_for(lambda: committed_step(run) == 5)
        link.bytes_per_s = 5e3  # a minute for each checkpoint
        (launch.output_dir / "go-on").touch()
        launch.wait_for_step(17)  # through two saves
        began = give_notice(notice)
        assert launch.wait() == 75, launch.text()
        assert time.monotonic() - began < DEADLINE_S + END_S, launch.text()
    steps = [line["step"] for line in launch.lines()]
    assert steps == list(range(1, len(steps) + 1))
    assert "Traceback" not in launch.text()
    assert committed_step(run) == 5


def test_a_store_that_fails_for_good_costs_no_step(seaweedfs: SeaweedFS, s3_url: str, launcher: Launcher, twin: Twin) -> None:
    options = ["--notice", "none", "--max-restarts", "0", "--drain-timeout-s", "1"]
    with Hostile(seaweedfs.endpoint, seed=0, rate=0.0) as store:
        launch = launcher.plain(s3_url, "--hold_at", "7", options=options, env={"AWS_ENDPOINT_URL": store.endpoint})
        launch.wait_for_step(7)
        wait_for(lambda: committed_step(Run(s3_url)) == 5)
        store.rate = 1.0
        (launch.output_dir / "go-on").touch()
        assert launch.wait() not in (0, 75), launch.text()
    assert {line["step"]: line for line in launch.lines()} == twin.lines
    assert "only step 5 is in" in launch.text()
