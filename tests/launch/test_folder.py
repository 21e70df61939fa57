"""The folder of a launch stands in /tmp, and /tmp is cleaned: by age, file by file, or altogether."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import sys
import textwrap
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import psutil
import pytest

from hf_spot.arguments import SpotArguments
from hf_spot.launch.command import Command
from hf_spot.launch.folder import RuntimeFolder
from hf_spot.launch.supervisor import Supervisor
from hf_spot.notices.notice import NoticeKind, PreemptionNotice
from hf_spot.run.run import Run
from hf_spot.runtime import Prefetched, Runtime
from tests.launch.conftest import Launcher, Twin
from tests.waiting import wait_for

NOTICE = PreemptionNotice(NoticeKind.TERMINATE, "file", "1", datetime.now(timezone.utc))


@pytest.fixture
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /tmp of one's own, where everybody may write."""
    path = tmp_path / "tmp"
    path.mkdir()
    path.chmod(0o1777)
    monkeypatch.setattr("tempfile.tempdir", str(path))
    return path


@pytest.fixture
def folder(tmp: Path) -> Iterator[RuntimeFolder]:
    made = RuntimeFolder(clock=lambda: now_s[0])
    yield made
    made.close()
    assert not list(tmp.iterdir())


now_s = [0.0]


def test_systemd_tmpfiles_passes_it_by_and_others_find_it_young(folder: RuntimeFolder) -> None:
    locked = os.open(folder.path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):  # as systemd-tmpfiles asks, of each folder that it goes into
        fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(locked)
    file = folder.path / "step"
    file.touch()
    for path in (file, folder.path):
        os.utime(path, (0, 0))
    assert not folder.renew() and file.stat().st_mtime == 0
    now_s[0] += 4000
    assert not folder.renew()
    assert min(file.stat().st_mtime, folder.path.stat().st_mtime) > 1e9


@pytest.mark.parametrize("mode", [None, 0o755])
def test_what_is_deleted_is_made_again_for_this_user_alone(folder: RuntimeFolder, mode: int | None) -> None:
    shutil.rmtree(folder.path)
    if mode is not None:  # a worker was faster
        folder.path.mkdir(mode=mode)
    assert folder.renew() and not folder.renew()
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    runtime = Runtime("s3://b/r", 1, folder.path, SpotArguments())
    shutil.rmtree(folder.path)
    runtime.write_exit_code(7)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert runtime.read_exit_code() == 7 and folder.renew()


def test_what_another_process_is_deleting_is_made_again_as_soon_as_that_is_done(folder: RuntimeFolder) -> None:
    shutil.rmtree(folder.path)
    folder.path.mkdir()
    deleting = os.open(folder.path, os.O_RDONLY)
    fcntl.flock(deleting, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert folder.renew()
    shutil.rmtree(folder.path)
    os.close(deleting)
    assert folder.renew() and folder.path.is_dir() and not folder.renew()
    again = os.open(folder.path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(again)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a folder that is another user's")
def test_what_another_user_has_made_in_its_place_is_not_believed(folder: RuntimeFolder) -> None:
    runtime = Runtime("s3://b/r", 1, folder.path, SpotArguments())
    shutil.rmtree(folder.path)
    folder.path.mkdir()
    runtime.write_notice(NOTICE)
    runtime.tell_prefetched(Prefetched(7, Path("/a/planted/checkpoint")))
    runtime.write_exit_code(75)
    os.chown(folder.path, 12345, 12345)
    with pytest.raises(PermissionError, match="belongs to another user"):
        folder.renew()
    assert (runtime.read_notice(), runtime.read_prefetched(), runtime.read_exit_code()) == (None, None, None)


@pytest.mark.parametrize("gone", ["marker", "folder"])
def test_a_long_step_is_not_killed_and_hears_of_its_notice_whatever_is_cleaned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    script = tmp_path / "training.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, shutil, time
        from hf_spot.runtime import Runtime

        def until(is_so):
            while not is_so():
                time.sleep(0.01)

        runtime = Runtime.from_environ(os.environ)
        runtime.tell_training(True)
        open("trains", "w")
        until(lambda: os.path.exists("trains.seen"))
        open("notice", "w")
        until(lambda: runtime.read_notice() is not None)
        if {gone == "marker"}:
            runtime.training_path.unlink()
        else:
            shutil.rmtree(runtime.directory)
        open("gone", "w")
        until(lambda: os.path.exists("gone.seen"))
        until(lambda: runtime.read_notice() is not None)
        runtime.tell_training(False)
        open("saved", "w")
        raise SystemExit(75)
        """)
    )
    monkeypatch.chdir(tmp_path)
    looks = {"trains": 0, "gone": 0}

    def clock() -> float:
        """A step takes a minute; it goes on when the launcher has looked often."""
        for what in looks:
            looks[what] += (tmp_path / what).exists()
            if looks[what] == 12:
                (tmp_path / f"{what}.seen").touch()
        return 60.0 if 0 < looks["gone"] < 1000 else 1e4 if looks["gone"] else 0.0  # a test that fails must end

    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = SpotArguments(notice=f"file:{tmp_path / 'notice'}")
    command = Command(str(tmp_path / "run"), arguments, 0, [sys.executable, str(script)], environ)
    assert Supervisor(Run(command.store), command, clock=clock).supervise() == 75
    assert (tmp_path / "saved").exists()


def test_a_training_whose_folder_is_cleaned_away_is_preempted_and_resumed_to_the_bit(
    launcher: Launcher, tmp_path: Path, twin: Twin
) -> None:
    store = str(tmp_path / "run")
    first = launcher.plain(store, "--hold_at", "3", "--workers", "1", options=["--save-memory-gb", "0"])
    first.wait_for_step(3)
    (training,) = [one for one in first.tree() if "hf_spot.training.bootstrap" in one.cmdline()[:4]][:1]
    folder = Path(psutil.Process(training.pid).environ()["HF_SPOT_RUNTIME_DIR"])
    assert folder.is_dir()
    shutil.rmtree(folder)
    wait_for(folder.is_dir, "for the launcher to make it again")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    first.process.send_signal(signal.SIGTERM)
    first.go_on_when_it_says("TERMINATE from signal")
    assert first.wait() == 75, first.text()
    newest = Run(store).latest()
    assert newest is not None and newest.step == first.step() == 4, first.text()
    assert any(file.path.startswith("random_states/") for file in newest.files)
    assert not folder.exists()
    second = launcher.plain(store, "--workers", "1")
    assert second.wait() == 0, second.text()
    assert launcher.weights() == twin.weights
