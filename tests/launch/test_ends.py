"""Notices at both ends of a launch: before anything has begun, and while a script still works after its training."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
from pathlib import Path

import pytest

from hf_spot.arguments import SpotArguments
from hf_spot.launch.command import Command
from hf_spot.launch.supervisor import Supervisor
from hf_spot.run.run import Run
from tests.launch.conftest import Launcher
from tests.waiting import wait_for


def test_a_signal_before_anything_has_begun_is_a_preemption(launcher: Launcher, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("open('ran', 'w')")
    launch = launcher.start(str(tmp_path / "run"), [script])
    wait_for(lambda: any("hf_spot.launch.options" in one.cmdline() for one in launch.tree()[1:]), "for the options to be read")
    # It hears signals before it waits for its options, which takes a second; it imports for 0.2.
    status = Path(f"/proc/{launch.process.pid}/status")
    sigterm = 1 << (signal.SIGTERM - 1)
    wait_for(lambda: int(status.read_text().partition("SigCgt:")[2].split()[0], 16) & sigterm, "for the launcher to hear")
    tree = launch.tree()
    launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() == 75, launch.text()
    assert "start the same command again" in launch.text()
    assert "Traceback" not in launch.text()
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run" / "journal").exists()
    wait_for(lambda: not any(one.is_running() for one in tree), "for what it had started")


def test_a_script_has_its_grace_after_its_last_checkpoint_however_long_that_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "training.py"
    script.write_text(
        textwrap.dedent("""
        import os, time
        from hf_spot.runtime import Runtime

        def until(is_so):
            while not is_so():
                time.sleep(0.01)

        runtime = Runtime.from_environ(os.environ)
        runtime.tell_training(True)
        until(lambda: runtime.read_notice() is not None)
        open("saves", "w")
        until(lambda: os.path.exists("saves.seen"))
        runtime.tell_training(False)
        open("closes", "w")
        until(lambda: os.path.exists("closes.seen"))
        open("closed", "w")
        raise SystemExit(75)
        """)
    )
    monkeypatch.chdir(tmp_path)
    looks = {"saves": 0, "closes": 0}

    def clock() -> float:
        """A save takes a minute, and what comes behind it some seconds; each goes on when the launcher has looked often."""
        for what in looks:
            if (tmp_path / what).exists():
                looks[what] += 1
                if looks[what] == 6:
                    (tmp_path / f"{what}.seen").touch()
        return 63.0 if looks["closes"] else 60.0 if looks["saves"] else 0.0

    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = SpotArguments(notice=f"file:{tmp_path / 'notice'}")
    command = Command(str(tmp_path / "run"), arguments, 0, [sys.executable, str(script)], environ)
    (tmp_path / "notice").touch()
    assert Supervisor(Run(command.store), command, clock=clock).supervise() == 75
    assert (tmp_path / "closed").exists()
