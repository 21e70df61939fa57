"""Notices at awkward moments to a whole launch, on a real S3 server."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

from hf_spot.run.run import Run
from tests.gate import Gate
from tests.launch.conftest import Launcher, Twin
from tests.run.test_webhook import SECRET, Listener
from tests.servers import SeaweedFS
from tests.waiting import wait_for


def test_a_second_sigterm_to_the_launcher_does_not_cut_the_commit_of_the_first(
    seaweedfs: SeaweedFS, s3_url: str, launcher: Launcher
) -> None:
    with Gate(seaweedfs.endpoint) as gate, Listener() as listener:
        gate.close_at(r"PUT .*/journal/\d+\.json", body='"kind":"commit"')
        options = ["--on-event", listener.url]
        launch = launcher.plain(s3_url, "--hold_at", "3", options=options, env={"AWS_ENDPOINT_URL": gate.endpoint})
        launch.wait_for_step(3)
        below = launch.tree()[1:]
        assert below
        assert not any(SECRET in str((one.cmdline(), one.environ())) for one in below)  # who needs it not has it not
        launch.process.send_signal(signal.SIGTERM)
        launch.go_on_when_it_says("TERMINATE from signal")
        wait_for(lambda: gate.reached.is_set() or launch.process.poll() is not None)
        for one in launch.tree():
            one.send_signal(signal.SIGTERM)
        gate.let_go()
        assert launch.wait() == 75, launch.text()
    began, noticed, told = listener.texts
    assert began.startswith(f"hf_spot: {s3_url}: launch 1 has begun on")
    assert noticed.startswith(f"hf_spot: {s3_url}: TERMINATE from signal")
    assert told == f"hf_spot: {s3_url}: preempted; step {launch.step()} is committed"
    assert not any(part in launch.text() for part in SECRET.split("/"))
    events = [*Run(s3_url).events()]
    assert [entry.kind for entry in events if entry.kind != "notice"] == ["claim", "training", "commit", "preempted"]
    assert [entry.kind for entry in events].count("notice") == 1
    (ended,) = (entry for entry in events if entry.kind == "preempted")
    assert ended.data["committed_step"] == launch.step() >= 3


def test_a_notice_that_is_taken_back_leaves_the_launch_to_finish(
    s3_url: str, launcher: Launcher, twin: Twin, tmp_path: Path
) -> None:
    notice = tmp_path / "notice"
    launch = launcher.plain(s3_url, "--hold_at", "4", options=["--notice", f"file:{notice}"])
    launch.wait_for_step(4)
    notice.touch()
    wait_for(lambda: "TERMINATE from file" in launch.text() or launch.process.poll() is not None)
    notice.unlink()
    launch.go_on_when_it_says("CANCELLED from file")
    assert launch.wait() == 0, launch.text()
    assert launcher.weights() == twin.weights
    kinds = [entry.kind for entry in Run(s3_url).events() if entry.kind not in ("commit", "prune")]
    assert kinds == ["claim", "training", "notice", "notice", "trained", "finished"]


def test_a_notice_during_a_restore_ends_the_launch_before_all_is_fetched(
    seaweedfs: SeaweedFS, s3_url: str, launcher: Launcher, make_checkpoint: Callable[[int], Path]
) -> None:
    folder = make_checkpoint(5)
    (folder / "model.safetensors").write_bytes(b"weights " * 4_000_000)
    Run(s3_url).push(folder)
    with Gate(seaweedfs.endpoint) as gate:
        gate.close_at(r"GET .*/model\.safetensors")
        launch = launcher.plain(s3_url, env={"AWS_ENDPOINT_URL": gate.endpoint})
        wait_for(lambda: gate.reached.is_set() or launch.process.poll() is not None)
        launch.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "TERMINATE from signal" in launch.text() or launch.process.poll() is not None)
        gate.let_go()
        assert launch.wait() == 75, launch.text()
    assert "no training is started" in launch.text()
    assert not [*launch.output_dir.glob("checkpoint-*"), *launch.output_dir.glob(".hf_spot/restore-*")]
    events = [entry for entry in Run(s3_url).events() if entry.kind != "notice"]  # which the launcher writes meanwhile
    assert (events[-1].kind, events[-1].data["committed_step"]) == ("preempted", 5)
    assert set(map(tuple, Run(s3_url).verify().values())) == {()}
