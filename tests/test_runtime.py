"""What a launch and its workers tell each other."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError
from hf_spot.notices.notice import NoticeKind, PreemptionNotice
from hf_spot.process_guard import ENDED
from hf_spot.runtime import PhaseTeller, Runtime, StepCounter, held_folder
from tests.small_disk import SmallDisk, why_not


def test_a_worker_sees_the_launch_that_started_it(tmp_path: Path) -> None:
    runtime = Runtime("s3://b/r", 3, tmp_path, SpotArguments(notice="imds", grace_s=30.0))
    assert Runtime.from_environ(runtime.to_environ()) == runtime
    assert Runtime.from_environ({"HF_SPOT_STORE": "s3://b/r"}) is None


def test_a_notice_replaces_the_one_before(tmp_path: Path) -> None:
    runtime = Runtime("s3://b/r", 1, tmp_path, SpotArguments())
    assert runtime.read_notice() is None
    for number in range(2):
        notice = PreemptionNotice(NoticeKind.TERMINATE, "imds", str(number), datetime.now(timezone.utc))
        runtime.write_notice(notice)
        assert runtime.read_notice() == notice


def test_folders_of_killed_processes_are_deleted_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = "import sys; from hf_spot.runtime import held_folder; print(held_folder()[0], flush=True); sys.stdin.read()"
    started = []
    for _ in range(2):
        one = subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "TMPDIR": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert one.stdout is not None
        started.append((one, Path(one.stdout.readline().rstrip())))
    (killed, left), (living, held) = started
    (left / "file").touch()
    stranger = tmp_path / "hf_spot-of-somebody-else"
    stranger.mkdir()
    killed.kill()
    killed.communicate()
    mine, lock = held_folder()
    assert {*tmp_path.iterdir()} == {mine, held, stranger}
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700
    os.close(lock)
    living.communicate()
    again, lock = held_folder()
    assert {*tmp_path.iterdir()} == {again, stranger}
    os.close(lock)


def test_a_folder_that_another_process_is_deleting_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plain, found = tempfile.mkdtemp, []

    def found_before_it_is_held(**options: Any) -> str:
        """Create a folder. Another process has found the first two: it is deleting one, and has deleted the other."""
        path = plain(**options)
        if len(found) < 2:
            handle = os.open(path, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.append((path, handle))
            if len(found) == 2:
                shutil.rmtree(path)
        return path

    monkeypatch.setattr("tempfile.mkdtemp", found_before_it_is_held)
    open_before = len(os.listdir("/proc/self/fd"))
    path, held = held_folder()
    assert str(path) not in {one for one, _ in found}
    for _, handle in found:
        os.close(handle)
    assert len(os.listdir("/proc/self/fd")) == open_before + 1
    other, lock = held_folder()
    assert {*tmp_path.iterdir()} == {path, other}, "what is held stays, and nothing else"
    os.close(held)
    os.close(lock)


def test_the_first_exit_code_stands(tmp_path: Path) -> None:
    runtime = Runtime("s3://b/r", 1, tmp_path, SpotArguments())
    assert runtime.read_exit_code() is None
    runtime.write_exit_code(75)
    runtime.write_exit_code(1)
    assert runtime.read_exit_code() == 75


def test_the_step_outlives_its_teller(tmp_path: Path) -> None:
    assert StepCounter.read(tmp_path / "step") is None
    StepCounter(tmp_path / "step").tell(2**40)
    assert StepCounter.read(tmp_path / "step") == 2**40


def test_trainings_side_by_side_count_their_own_steps(tmp_path: Path) -> None:
    runtime = Runtime("s3://b/r", 1, tmp_path, SpotArguments())
    assert runtime.read_steps() == {}
    for training, step in ((1, 7), (2, 3), (12, 5)):
        StepCounter(runtime.step_path_of(training)).tell(step)
    assert runtime.read_steps() == {1: 7, 2: 3, 12: 5}
    assert StepCounter.read(runtime.step_path) == 7


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_notices_and_exit_codes_get_through_on_a_full_disk(tmp_path: Path) -> None:
    with SmallDisk(tmp_path / "disk", size_kb=1024) as disk:
        runtime = Runtime("s3://b/r", 1, disk.path, SpotArguments())
        runtime.reserve()
        disk.fill()
        for kind in (NoticeKind.ADVISORY, NoticeKind.TERMINATE):
            notice = PreemptionNotice(kind, "imds", kind.value, datetime.now(timezone.utc))
            runtime.write_notice(notice)
            assert runtime.read_notice() == notice
            disk.fill()
        with pytest.raises(OSError, match="No space left"):  # an error, and no bus error later
            StepCounter(runtime.step_path)
        disk.empty()
        runtime.reserve()
        disk.fill()
        runtime.write_exit_code(75)
        assert runtime.read_exit_code() == 75
        with pytest.raises(OSError, match="No space left"):
            runtime.reserve()


@pytest.mark.parametrize(
    "settings",
    [
        {"notice": "smoke"},
        {"notice": "auto,imds"},
        {"notice": ""},
        {"notice": "imds:/a/path"},
        {"grace_s": 0},
        {"keep_checkpoints": -1},
        {"drain_timeout_s": 0},
        {"upload_workers": 0},
        {"on_save_error": "panic"},
    ],
)
def test_settings_are_checked_where_they_are_made(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SpotArguments(**settings)  # type: ignore[arg-type]


def test_processes_that_died_while_they_trained_are_lost_unless_somebody_of_the_launch_knows(tmp_path: Path) -> None:
    runtime = Runtime("s3://b/r", 1, tmp_path, SpotArguments())
    dead = iter(range(10**8, 10**8 + 100))  # above the largest process id

    def report(told: str, training: int | None = None) -> int:
        process = next(dead)
        (tmp_path / f"training-{process}").write_text(told)
        if training is not None:
            PhaseTeller(tmp_path / f"phase-{process}", 0, training).tell(1)
        return process

    report("ended", 1)
    report("75", 2)
    (tmp_path / f"training-{os.getpid()}").touch()  # alive
    assert runtime.read_lost() == []
    report("", 1)  # another process has finished the same training
    (tmp_path / f"failed-{report('', 2)}").touch()
    (tmp_path / f"ends-{report('', 2)}").touch()
    assert runtime.read_lost() == []
    lost = [report("", 2), report("")]
    assert runtime.read_lost() == lost
    (tmp_path / "ends--77").touch()  # a group, whose members nobody knows any more
    assert runtime.read_lost() == []


def test_a_failure_counts_if_the_command_had_ended_before(tmp_path: Path) -> None:
    runtime = Runtime("s3://b/r", 1, tmp_path, SpotArguments())
    failed = tmp_path / "failed-1"
    failed.touch()
    assert not runtime.has_command_ended and not runtime.has_failed_since_the_command()
    (tmp_path / ENDED).touch()
    os.utime(failed, (1.0, 1.0))
    assert runtime.has_command_ended and not runtime.has_failed_since_the_command()
    os.utime(failed)
    assert runtime.has_failed_since_the_command()
