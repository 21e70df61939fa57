"""What a new machine runs: the script itself, checked by shellcheck and run by bash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_spot.cloud import machine, user_data
from hf_spot.cloud.job import Job
from hf_spot.cloud.user_data import render
from hf_spot.errors import SpotError
from tests.waiting import PATIENCE_S, wait_for


def job(**values: Any) -> Job:
    return Job(
        **{
            "name": "llama",
            "store": "s3://bucket/runs/it's $HOME",
            "run": "cd it\nhf-spot launch train.py",
            "setup": "git clone https://example.com/it\nEND\ncat <<'EOF'\n$HOME `date`\nEOF",
            "region": "us-east-1",
            "max_spend": 10,
            "instance_profile": "role",
            **values,
        }
    )


@pytest.mark.parametrize("values", [{}, {"on_finish": "stay", "requirements": ()}, {"store": "/mnt/run", "setup": ""}])
def test_the_script_passes_shellcheck(values: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(render(job(**values), [{"zone": "us-east-1a"}], 90))
    shellcheck = Path(sys.executable).parent / "shellcheck"
    command = [shellcheck, "--severity=style", "--exclude=SC2016", script]  # the dollar in quotes is meant
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


class Machine:
    """The script on a machine whose folders are elsewhere, and whose commands only write down that they were called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.unit = folder / "hf-spot.service"
        self.calls = folder / "calls"
        self.calls.touch()
        for name, path in (("FOLDER", "it"), ("LOG", "log"), ("UNIT", "hf-spot.service")):
            monkeypatch.setattr(user_data, name, str(folder / path))
        bin = folder / "bin"
        bin.mkdir()
        for name in ("shutdown", "systemctl", "pip", "apt-get", "aws"):
            (bin / name).write_text(f'#!/bin/bash\necho {name} "$@" >> {self.calls}\n')
            (bin / name).chmod(0o755)
        (bin / "python3").write_text(f'#!/bin/bash\nif [[ $2 == venv ]]; then exit; fi\nexec {sys.executable} "$@"\n')
        (bin / "python3").chmod(0o755)
        self.environ = {
            "PATH": f"{bin}:{os.environ['PATH']}",
            "AWS_EC2_METADATA_DISABLED": "true",
            "PYTHONPATH": str(Path(user_data.__file__).parents[2]),
        }

    def run(self, *command: object, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(part) for part in command],
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    def boot(self, made: Job) -> subprocess.CompletedProcess[str]:
        (self.folder / "script").write_text(render(made, [{"zone": "us-east-1a"}], 90, {}))
        return self.run("bash", self.folder / "script")

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines()


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_a_machine_sets_its_fuse_installs_and_starts_the_training(fresh: Machine) -> None:
    done = fresh.boot(job(setup="echo setting up in $PWD > trace", requirements=("hf_spot[plot]", "trl")))
    assert done.returncode == 0, done.stderr
    assert fresh.called() == [
        "shutdown -h +90 hf-spot: the budget is spent",
        "pip install hf_spot[plot] trl",
        "systemctl daemon-reload",
        "systemctl enable hf-spot.service",
        "systemctl start --no-block hf-spot.service",
    ]
    assert (fresh.folder / "it/training/trace").read_text().startswith("setting up in")
    assert json.loads((fresh.folder / "it/prices.json").read_text()) == [{"zone": "us-east-1a"}]
    environment = (fresh.folder / "it/environment").read_text().splitlines()
    assert "HF_SPOT_STORE=s3://bucket/runs/it's $HOME" in environment and "AWS_REGION=us-east-1" in environment
    unit = fresh.unit.read_text()
    assert "RestartPreventExitStatus=2 75 76" in unit and "Restart=on-abnormal" in unit


def test_a_setup_that_fails_ships_its_log_and_the_machine_goes_away(fresh: Machine) -> None:
    store = fresh.folder / "run"
    done = fresh.boot(job(setup="echo almost; false", store=str(store)))
    assert done.returncode != 0
    assert fresh.called()[-1] == "shutdown -h now"
    assert not any(call.startswith("systemctl") for call in fresh.called())
    shipped = [path.read_text() for path in (store / "logs").iterdir()]
    assert len(shipped) == 1 and "almost" in shipped[0] and "the setup of this machine failed in line" in shipped[0]


def test_what_is_to_stay_stays_even_when_its_setup_fails(fresh: Machine) -> None:
    fresh.boot(job(setup="false", store=str(fresh.folder / "run"), on_finish="stay"))
    assert "shutdown -h now" not in fresh.called()


@pytest.mark.parametrize(
    ("code", "status", "then"),
    [
        ("exited", "0", ["shutdown -h now"]),
        ("exited", "75", ["shutdown -h +10"]),
        ("exited", "76", ["shutdown -h now"]),
        ("exited", "1", ["shutdown -h now"]),
        ("killed", "KILL", []),
        ("exited", "137", []),
    ],
)
def test_only_a_machine_that_ec2_takes_away_waits_for_it(fresh: Machine, code: str, status: str, then: list[str]) -> None:
    store = fresh.folder / "run"
    fresh.boot(job(store=str(store)))
    fresh.calls.write_text("")
    (fresh.folder / "log").write_text("last words")
    fresh.run("bash", fresh.folder / "it/stop", EXIT_CODE=code, EXIT_STATUS=status, HF_SPOT_STORE=str(store))
    assert fresh.called() == then
    assert [path.read_text() for path in (store / "logs").iterdir()] == ["last words"]


def test_the_shell_around_the_training_outlives_the_signal_and_passes_the_code_on(fresh: Machine) -> None:
    saving = "trap 'sleep 0.2; exit 75' TERM; kill -TERM $PPID; kill -TERM $BASHPID; sleep 20"
    fresh.boot(job(store="/mnt/run", run=f'bash -c "{saving.replace("$", chr(92) + "$")}"  # hf-spot launch train.py'))
    done = fresh.run("bash", "-euo", "pipefail", fresh.folder / "it/run")
    assert done.returncode == 75, done.stderr


def test_systemd_tells_the_first_shell_alone_and_that_the_launcher_alone(fresh: Machine) -> None:
    """However the launcher is started below it; the shells around it live on until it has saved, and so do its processes."""
    launcher = fresh.folder / "hf-spot"
    launcher.write_text(
        "import signal, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "open('ready', 'w'); signal.pause(); time.sleep(0.3)\n"
        "assert child.poll() is None; child.kill(); sys.exit(75)\n"
    )
    command = f"cd {fresh.folder}\nuntil false; do (python3 {launcher} launch train.py) && break || exit $?; done"
    fresh.boot(job(store="/mnt/run", run=command))
    assert "KillMode=mixed" in fresh.unit.read_text()
    shell = subprocess.Popen(["bash", "-euo", "pipefail", fresh.folder / "it/run"], env=fresh.environ)
    try:
        wait_for((fresh.folder / "ready").exists)
        shell.send_signal(signal.SIGTERM)
        assert shell.wait(PATIENCE_S) == 75
    finally:
        shell.kill()


def test_a_machine_knows_what_it_is_and_what_it_costs() -> None:
    said = {"instance-id": b"i-1", "instance-type": b"p4d.24xlarge", "placement/availability-zone": b"us-east-1a"}
    prices = [
        {"instance_type": "p4d.24xlarge", "zone": "us-east-1a", "price_usd_per_hour": 9},
        {"instance_type": "p4d.24xlarge", "zone": "us-east-1b", "price_usd_per_hour": 8},
    ]
    assert machine.describe(said.get, prices) == {
        "cloud": "aws",
        "instance_id": "i-1",
        "instance_type": "p4d.24xlarge",
        "zone": "us-east-1a",
        "price_usd_per_hour": 9,
    }


def test_without_a_metadata_service_a_machine_says_what_is_certain(capsys: pytest.CaptureFixture[str]) -> None:
    def silent(path: str) -> bytes | None:
        raise SpotError("no answer")

    assert machine.describe(silent, [{"zone": "us-east-1a", "price_usd_per_hour": 9}, {"zone": "us-east-1b"}]) == {
        "cloud": "aws"
    }
    assert "no answer" in capsys.readouterr().err


def test_a_log_is_shipped_again_whenever_it_has_grown(tmp_path: Path) -> None:
    log, seen = tmp_path / "log", []
    log.write_text("one")

    class Enough(Exception):
        pass

    def pause(seconds: float) -> None:
        shipped = tmp_path / "run/logs/i-1.log"
        seen.append((seconds, shipped.read_text()))
        if len(seen) == 2:
            raise Enough
        log.write_text("one two")

    environ = {"HF_SPOT_STORE": str(tmp_path / "run"), "HF_SPOT_MACHINE": '{"instance_id": "i-1"}'}
    with pytest.raises(Enough):
        machine.main(["ship", str(log), "--every", "60"], environ, pause)
    assert seen == [(60.0, "one"), (60.0, "one two")]
