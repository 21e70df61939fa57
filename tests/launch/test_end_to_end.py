"""A script that knows nothing of hf_spot, interrupted on a real S3 server, ends with the model of its twin."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from hf_spot.run.run import Run
from hf_spot.testing import FakeIMDS
from tests.gate import Gate
from tests.launch.conftest import PLAIN, Launch, Launcher, Twin
from tests.servers import SeaweedFS
from tests.waiting import wait_for

STEPS = 32


def committed_step(run: Run) -> int:
    newest = run.state().latest()
    return newest.step if newest else 0


def check_against(twin: Twin, launch: Launch, resumed_step: int) -> None:
    """The launch did the steps behind the one it resumed, and each as the twin did it."""
    lines = launch.lines()
    assert [line["step"] for line in lines] == list(range(resumed_step + 1, resumed_step + 1 + len(lines)))
    assert all(line == twin.lines[line["step"]] for line in lines)


def test_notices_lose_no_step_and_change_no_bit(s3_url: str, launcher: Launcher, twin: Twin, tmp_path: Path) -> None:
    run = Run(s3_url)

    with FakeIMDS() as imds:
        first = launcher.plain(s3_url, "--hold_at", "3", options=["--notice", "imds"], env=imds.env())
        first.wait_for_step(3)
        [private] = {one.environ()["HF_SPOT_RUNTIME_DIR"] for one in first.tree() if "HF_SPOT_RUNTIME_DIR" in one.environ()}
        assert os.stat(private).st_mode & 0o077 == 0  # where the notice file is
        imds.interrupt(in_s=120)
        first.go_on_when_it_says("TERMINATE from imds")
        assert first.wait() == 75, first.text()
    second = launcher.plain(s3_url, "--hold_at", "12")
    second.wait_for_step(12)
    second.process.send_signal(signal.SIGTERM)
    second.go_on_when_it_says("TERMINATE from")
    assert second.wait() == 75, second.text()
    last = launcher.plain(s3_url)
    assert last.wait() == 0, last.text()

    resumed = 0
    for launch in (first, second):
        check_against(twin, launch, resumed)
        resumed = launch.step()  # nothing that was trained is trained again
        assert not (tmp_path / f"weights-{launcher.launches.index(launch) + 1}").exists()
    check_against(twin, last, resumed)
    assert last.step() == STEPS
    assert launcher.weights() == twin.weights

    kinds = [entry.kind for entry in run.events()]
    assert (kinds.count("claim"), kinds.count("notice"), kinds.count("preempted")) == (3, 2, 2)
    assert kinds[-1] == "finished"
    told = last.diary.read_bytes()
    again = launcher.start(s3_url, [PLAIN, "--output_dir", "out-3", "--diary", "diary-3", "--weights", "weights-3"])
    assert again.wait() == 0
    assert (again.lines(), last.diary.read_bytes()) == ([], told)  # the same command as the last one trains nothing
    assert [entry.kind for entry in run.events()] == kinds

    texts = [*(launch.text().encode() for launch in launcher.launches), *(run.store.get(info.key) for info in run.store.list())]
    secrets = [os.environ[name].encode() for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    assert not any(secret in text for secret in secrets for text in texts)


FILE = r"/e\d+/checkpoint-\d+/"
ENTRY = r"PUT .*/journal/\d+\.json"
MOMENTS = (
    ("the claim stands, its answer does not come", ENTRY, {"body": '"kind":"claim"', "after": True}),
    ("in the middle of an upload", rf"PUT .*{FILE}", {"skip": 2, "after": True}),
    ("the commit stands, its answer does not come", ENTRY, {"body": '"kind":"commit"', "after": True}),
    ("in the middle of a restore", rf"GET .*{FILE}", {"skip": 2, "after": True}),
    ("a checkpoint is about to be taken out, and must still be whole", ENTRY, {"body": '"kind":"prune"'}),
)


def _has_files(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except FileNotFoundError:  # a newer save has just deleted it
        return False


def kill_in_a_save(launch: Launch, output_dir: Path) -> None:
    """Stops everything at a moment when a checkpoint folder has weights and no trainer_state.json yet, and kills it."""

    def torn() -> bool:
        return any(
            _has_files(folder) and not (folder / "trainer_state.json").exists() for folder in output_dir.glob("checkpoint-*")
        )

    while True:
        wait_for(lambda: torn() or launch.process.poll() is not None, launch.text(), longest_pause_s=0.005)
        tree = launch.tree()
        for one in tree:
            one.suspend()
        if torn():
            launch.kill_tree()
            assert torn()
            return
        assert launch.process.poll() is None, launch.text()
        for one in tree:
            one.resume()


@pytest.mark.slow
def test_kill_9_at_any_moment_repeats_only_what_was_not_committed(
    seaweedfs: SeaweedFS, s3_url: str, launcher: Launcher, twin: Twin, tmp_path: Path
) -> None:
    """Launches are killed at `MOMENTS`, in the middle of a save to the disk, and behind the training's last line, where only
    the word that it has finished is missing. `tests/run/test_crash_points.py` kills what they do with files and store at
    every other operation, too, but without a training."""
    run = Run(s3_url)
    options = ["--save-total-limit", "1", "--notice", "none"]
    resumed = []
    with Gate(seaweedfs.endpoint) as gate:
        env = {"AWS_ENDPOINT_URL": gate.endpoint}

        def start() -> Launch:
            resumed.append(committed_step(run))
            return launcher.plain(s3_url, "--save_steps", "2", options=options, env=env)

        def kill_at(moment: str, request: str, how: dict[str, Any]) -> None:
            gate.close_at(request, **how)
            launch = start()
            wait_for(lambda: gate.reached.is_set() or launch.process.poll() is not None, moment)
            assert gate.reached.is_set(), (moment, launch.text())
            launch.kill_tree()
            gate.open()
            assert all(problems == [] for problems in run.verify().values()), moment

        for moment in MOMENTS:
            kill_at(*moment)
        kill_in_a_save(start(), tmp_path / f"out-{len(launcher.launches)}")
        kill_at("behind the training", ENTRY, {"body": '"kind":"finished"'})
        assert launcher.weights() == twin.weights
        assert run.state().ended is None
        last = start()
        assert last.wait() == 0, last.text()

    assert launcher.weights() == twin.weights
    assert run.state().ended == "finished"
    assert resumed[:2] == [0, 0]
    assert 0 < resumed[3] == resumed[4] < resumed[-3] <= resumed[-2] < resumed[-1] == STEPS
    for launch, step in zip(launcher.launches, resumed, strict=True):
        check_against(twin, launch, step)


@pytest.mark.fresh_script
def test_a_bucket_that_vanishes_and_comes_back_costs_nothing(launcher: Launcher, twin: Twin) -> None:
    with SeaweedFS() as server:
        server.make_bucket("tests")
        os_env = server.env()
        url = "s3://tests/outage"
        launch = launcher.plain(url, "--step_s", "0.1", options=["--notice", "none"], env=os_env)
        launch.wait_for_step(7)
        server.stop()
        launch.wait_for_step(17)  # through two saves
        assert launch.process.poll() is None
        server.start()
        assert launch.wait() == 0, launch.text()
        assert "training goes on" in launch.text()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in os_env.items():
                patch.setenv(name, value)
            state = Run(url).state()
    assert state.ended == "finished"
    assert state.checkpoints[-1].step == STEPS
    check_against(twin, launch, 0)
    assert launcher.weights() == twin.weights
    assert os.environ.get("AWS_ENDPOINT_URL") != os_env["AWS_ENDPOINT_URL"]


def test_a_machine_that_wakes_up_after_its_successor_has_changed_nothing(
    seaweedfs: SeaweedFS, s3_url: str, launcher: Launcher, twin: Twin
) -> None:
    with Gate(seaweedfs.endpoint) as gate:
        gate.close_at(ENTRY, body='"kind":"commit"')
        env = {"AWS_ENDPOINT_URL": gate.endpoint}
        zombie = launcher.plain(s3_url, "--save_steps", "2", "--hold_at", "3", options=["--notice", "none"], env=env)
        wait_for(lambda: gate.reached.is_set() or zombie.process.poll() is not None)
        assert gate.reached.is_set(), zombie.text()
        for one in zombie.tree():
            one.suspend()
        successor = launcher.plain(s3_url)
        assert successor.wait() == 0, successor.text()
        assert launcher.weights() == twin.weights
        run = Run(s3_url)
        before = {info.key: run.store.get(info.key) for info in run.store.list()}
        for one in zombie.tree():
            one.resume()
        gate.let_go()  # the commit that it had sent reaches the store only now
        (zombie.output_dir / "go-on").touch()
        assert zombie.wait() == 76, zombie.text()
    assert {info.key: run.store.get(info.key) for info in run.store.list()} == before
    assert "Traceback" not in zombie.text()


def test_of_two_launches_at_the_same_instant_exactly_one_owns_the_run(s3_url: str, launcher: Launcher, twin: Twin) -> None:
    both = [launcher.plain(s3_url, "--hold_at", "1", "--save_steps", "2", options=["--notice", "none"]) for _ in range(2)]
    wait_for(lambda: Run(s3_url).state().launch == 2, "for both claims")
    for launch in both:
        launch.output_dir.mkdir(exist_ok=True)
        (launch.output_dir / "go-on").touch()
    codes = [launch.wait() for launch in both]
    assert sorted(codes) == [0, 76], [launch.text() for launch in both]
    weights = launcher.tmp_path / f"weights-{codes.index(0) + 1}" / "model.safetensors"
    assert weights.read_bytes() == twin.weights
    assert not (launcher.tmp_path / f"weights-{codes.index(76) + 1}").exists()
    assert Run(s3_url).state().ended == "finished"
