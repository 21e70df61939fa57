"""A run whose URL is outside ASCII, where the locale is not UTF-8."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_spot.run.run import Run
from hf_spot.runtime import from_system, to_system
from tests.launch.conftest import Launcher

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("kind", ["s3", "directory"])
def test_it_is_trained_preempted_and_read(s3_url: str, tmp_path: Path, launcher: Launcher, kind: str) -> None:
    url = f"{s3_url}/läufe-été" if kind == "s3" else f"{tmp_path}/läufe-été"
    launch = launcher.plain(url, "--step_s", "0.1", env=ASCII)
    launch.wait_for_step(3)
    launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() == 75, launch.text()
    newest = Run(url).latest()
    assert newest is not None and newest.step == launch.step()
    command = [sys.executable, "-m", "hf_spot", "checkpoints", "ls", url]
    done = subprocess.run(command, env={**os.environ, **ASCII}, capture_output=True, check=False)
    assert done.returncode == 0 and f"{newest.step}".encode() in done.stdout, done.stderr


@pytest.mark.parametrize("text", ["läufe", "s3://b/é", "plain", "\udcff"])
def test_what_comes_from_the_system_goes_back_to_it(text: str) -> None:
    assert from_system(to_system(text)) == text
