"""A login that ends in the middle of a launch: the checkpoint of a notice waits for it, and the exit code does not."""

from __future__ import annotations

import json
import signal
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from hf_spot.run.run import Run
from tests.launch.conftest import PLAIN, Launcher
from tests.servers import SeaweedFS
from tests.waiting import wait_for


def credential_process(folder: Path, server: SeaweedFS) -> dict[str, str]:
    """The environment of a helper that asks for a login while the file ``locked`` is there. It is asked for each request."""
    soon = (datetime.now(timezone.utc) + timedelta(minutes=9)).isoformat()
    keys = {"Version": 1, "AccessKeyId": server.access_key, "SecretAccessKey": server.secret_key, "Expiration": soon}
    (folder / "keys").write_text(json.dumps(keys))
    program, config = folder / "helper", folder / "config"
    program.write_text(f"#!/bin/sh\nif [ -e {folder}/locked ]; then echo please log in; else cat {folder}/keys; fi\n")
    program.chmod(0o755)
    config.write_text(f"[default]\ncredential_process = {program}\n")
    return {"AWS_CONFIG_FILE": str(config)}


@pytest.mark.parametrize("logs_in", [True, False], ids=["in time", "never"])
def test_a_login_that_is_wanted_while_the_machine_goes_ends_in_75_and_in_a_commit_if_it_comes_in_time(
    logs_in: bool,
    seaweedfs: SeaweedFS,
    s3_url: str,
    launcher: Launcher,
    punctual: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = credential_process(tmp_path, seaweedfs)
    with monkeypatch.context() as without:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            without.delenv(name)
        grace_s = "40" if logs_in else "4"
        script = [PLAIN, "--output_dir", "out-1", "--diary", "diary-1", "--weights", "weights-1", "--hold_at", "3"]
        launch = launcher.start(s3_url, script if logs_in else [punctual, *script], options=["--grace-s", grace_s], env=env)
        launch.wait_for_step(3)
        (tmp_path / "locked").touch()
        launch.process.send_signal(signal.SIGTERM)
        launch.go_on_when_it_says("TERMINATE from signal")
        if logs_in:
            wait_for(lambda: "the upload is retried" in launch.text() or launch.process.poll() is not None)
            threading.Timer(1.0, (tmp_path / "locked").unlink).start()
        assert launch.wait() == 75, launch.text()
    assert "Traceback" not in launch.text()
    state = Run(s3_url).state()
    assert [ref.step for ref in state.checkpoints] == ([launch.step()] if logs_in else [])
    assert state.ended == ("preempted" if logs_in else None)
