"""Launches on a full disk, and launches that are frozen for a while."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from hf_spot.run.run import Run
from tests.gate import Gate
from tests.launch.conftest import PLAIN, Launch, Launcher, Twin
from tests.launch.test_end_to_end import ENTRY, FILE
from tests.servers import SeaweedFS
from tests.small_disk import SmallDisk, why_not
from tests.waiting import wait_for

needs_disks = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
# A save of two ranks with a best model has a barrier in its middle.
TWO_RANKS = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
BEST = ["--evaluate", "steps", "--eval_steps", "2", "--best", "--step_s", "0.05"]


def fill_at_step_3(launch: Launch, disk: SmallDisk, run: Run) -> None:
    launch.wait_for_step(3)
    wait_for(lambda: run.state().latest(), "for the commit of step 2")
    disk.fill()
    (launch.output_dir / "go-on").touch()


@needs_disks
def test_all_ranks_end_when_one_finds_the_disk_full(launcher: Launcher, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with SmallDisk(tmp_path / "out-1", size_kb=16 << 10) as disk:
        launch = launcher.plain(run.url, "--hold_at", "3", *BEST, options=TWO_RANKS)
        fill_at_step_3(launch, disk, run)
        assert launch.wait() == 2, launch.text()
        assert "checkpoint-4 can't be saved: " in launch.text()
        assert "No space left" in launch.text()
        assert not (disk.path / "checkpoint-4").exists()
    assert [entry.kind for entry in run.events()] == ["claim", "training", "commit", "failed"]
    assert run.find().step == 2


@needs_disks
@pytest.mark.fresh_python
def test_all_ranks_go_on_over_a_full_disk_and_hear_a_notice(launcher: Launcher, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with SmallDisk(tmp_path / "out-1", size_kb=16 << 10) as disk:
        options = [*TWO_RANKS, "--on-save-error", "go-on"]
        # What launcher and workers tell each other goes over the same full disk.
        env = {"TMPDIR": str(disk.path)}
        launch = launcher.plain(run.url, "--hold_at", "3", "--epochs", "20", *BEST, options=options, env=env)
        fill_at_step_3(launch, disk, run)
        wait_for(
            lambda: "training goes on, and the next save will try again" in launch.text() or launch.process.poll() is not None
        )
        launch.process.terminate()
        assert launch.wait() == 75, launch.text()
        assert launch.text().count("checkpoint-4 can't be saved") == 1
        assert not (disk.path / "checkpoint-4").exists()
    assert [entry.kind for entry in run.events()] == ["claim", "training", "commit", "notice", "preempted"]
    assert run.find().step == 2


def suspend(tree: list[psutil.Process]) -> None:
    for one in tree:
        one.suspend()
    wait_for(lambda: all(one.status() == psutil.STATUS_STOPPED for one in tree), "for the whole tree to be stopped")


def test_a_launch_that_was_frozen_goes_on_and_commits(
    seaweedfs: SeaweedFS, s3_url: str, launcher: Launcher, twin: Twin
) -> None:
    run = Run(s3_url)
    with Gate(seaweedfs.endpoint) as gate:
        gate.close_at(rf"PUT .*{FILE}", skip=2)
        env = {"AWS_ENDPOINT_URL": gate.endpoint}
        launch = launcher.plain(s3_url, "--hold_at", "7", options=["--notice", "none"], env=env)

        def wait_for_the_gate() -> None:
            wait_for(lambda: gate.reached.is_set() or launch.process.poll() is not None, launch.text())
            assert gate.reached.is_set(), launch.text()

        wait_for_the_gate()
        tree = launch.tree()
        suspend(tree)  # everything, in the middle of an upload, which is carried out meanwhile
        gate.let_go()
        wait_for(lambda: sum("/checkpoint-5/" in info.key for info in run.store.list()) > 2, "for the file that was held")
        assert run.state().latest() is None
        gate.close_at(ENTRY, body='"kind":"commit"')
        for one in tree:
            one.resume()
        wait_for_the_gate()
        suspend([launch.process])  # the launcher alone, from before a commit until after the end
        (guard,) = (one for one in launch.process.children() if any("process_guard" in word for word in one.cmdline()))
        gate.let_go()
        (launch.output_dir / "go-on").touch()
        wait_for(lambda: guard.status() == psutil.STATUS_ZOMBIE, "for the training to end")
        launch.process.resume()
        assert launch.wait() == 0, launch.text()
    assert (run.state().ended, run.find().step) == ("finished", 32)
    assert all(problems == [] for problems in run.verify().values())
    assert launcher.weights() == twin.weights


FORKS = f"""
import gc, os, runpy, signal, sys, transformers
from transformers.trainer import DEFAULT_CALLBACKS


class Forks(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 7:
            child = os.fork()
            if child == 0:
                signal.alarm(60)  # a child that hangs ends with 128 + 14
                sys.exit(3)
            print("the child ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


DEFAULT_CALLBACKS.append(Forks)
print("collector:", gc.isenabled(), gc.get_freeze_count() > 100_000)
runpy.run_path({str(PLAIN)!r}, run_name="__main__")
"""


def test_a_forked_child_that_exits_is_not_the_training(launcher: Launcher, twin: Twin, tmp_path: Path) -> None:
    script = tmp_path / "forks.py"
    script.write_text(FORKS)
    files = ["--output_dir", "out-1", "--diary", "diary-1", "--weights", "weights-1"]
    launch = launcher.start(str(tmp_path / "run"), [script, *files])
    assert launch.wait() == 0, launch.text()
    assert "the child ended with 3" in launch.text()
    assert "collector: True True" in launch.text()  # it works, and goes no more through what torch has imported
    assert "Traceback" not in launch.text()
    run = Run(tmp_path / "run")
    # How many commits there are depends on how fast the disk is: a newer checkpoint takes the place of one that waits.
    assert [entry.kind for entry in run.events() if entry.kind not in ("commit", "prune")] == [
        "claim",
        "training",
        "trained",
        "finished",
    ]
    assert run.find().step == 32
    assert launcher.weights() == twin.weights
