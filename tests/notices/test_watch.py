from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_spot.notices.aws import IMDSSource
from hf_spot.notices.file import FileSource
from hf_spot.notices.notice import NoticeSource
from hf_spot.notices.signals import SignalSource
from hf_spot.notices.watch import watch
from hf_spot.testing import FakeIMDS
from tests.waiting import PATIENCE_S, wait_for

ROOT = Path(__file__).resolve().parents[2]


def once(*sources: NoticeSource, as_json: bool = False) -> tuple[bool, list[str]]:
    out = io.StringIO()
    answered = watch(sources, out=out, as_json=as_json, duration_s=0)
    return answered, out.getvalue().splitlines()


def test_each_source_says_where_it_listens_and_what_it_hears(tmp_path: Path) -> None:
    with FakeIMDS() as imds:
        imds.interrupt(in_s=100)
        answered, lines = once(IMDSSource(imds.endpoint), SignalSource(), FileSource(tmp_path / "notice"))
    assert answered
    assert imds.endpoint in lines[0] and "TERMINATE" in lines[0] and "s left" in lines[0]
    assert "SIGTERM,SIGUSR1,SIGHUP" in lines[1] and lines[1].endswith("no notice")
    assert str(tmp_path / "notice") in lines[2] and lines[2].endswith("no notice")


def test_a_source_that_can_not_be_asked_shows_its_error_and_the_repair() -> None:
    with FakeIMDS() as imds:
        imds.fail(403)
        answered, lines = once(IMDSSource(imds.endpoint))
    assert not answered
    assert "error: " in lines[0] and "403" in lines[0]
    assert "--http-endpoint enabled" in "\n".join(lines)


def test_json_is_one_object_a_line() -> None:
    with FakeIMDS() as imds:
        imds.interrupt()
        _, lines = once(IMDSSource(imds.endpoint), SignalSource(["SIGUSR2"]), as_json=True)
    first, second = (json.loads(line) for line in lines)
    assert (first["event"], first["name"], first["where"], first["error"]) == ("source", "imds", imds.endpoint, None)
    assert first["notice"]["kind"] == "TERMINATE"
    assert (second["name"], second["notice"]) == ("signal", None)


def test_no_source_is_said_in_words() -> None:
    assert once()[1] == ["no source of notices is active"]


def test_it_ends_by_itself_after_the_duration_and_tells_what_came(tmp_path: Path) -> None:
    path = tmp_path / "notice"
    path.touch()
    out = io.StringIO()
    assert watch([FileSource(path, interval_s=0.01)], out=out, as_json=True, duration_s=0.5)
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["source", "notice"]
    assert events[1]["kind"] == "TERMINATE"


WATCH = """
import os, sys
from hf_spot.notices.aws import IMDSSource
from hf_spot.notices.watch import watch
watch([IMDSSource(os.environ["AWS_EC2_METADATA_SERVICE_ENDPOINT"], interval_s=0.02)], out=sys.stdout, as_json=True)
print("ended", flush=True)
"""


def test_notices_are_shown_as_they_come_until_ctrl_c() -> None:
    with FakeIMDS() as imds:
        child = subprocess.Popen([sys.executable, "-c", WATCH], cwd=ROOT, env=imds.env(), stdout=subprocess.PIPE, text=True)
        try:
            assert child.stdout is not None
            assert json.loads(child.stdout.readline())["notice"] is None
            imds.interrupt()
            assert json.loads(child.stdout.readline())["kind"] == "TERMINATE"
            imds.cancel()
            assert json.loads(child.stdout.readline())["kind"] == "CANCELLED"
            child.send_signal(signal.SIGINT)
            assert child.stdout.readline() == "ended\n"
            assert child.wait(timeout=PATIENCE_S) == 0
        finally:
            child.kill()
            child.communicate()


def test_the_fake_runs_on_its_own_and_announces_when_told_to() -> None:
    command = [sys.executable, "-m", "hf_spot.testing", "--interrupt-after", "0", "--in", "60"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(2)]
        environ = dict(line.strip().removeprefix("export ").split("=", 1) for line in lines)
        source = IMDSSource.from_environ(environ)
        notice = source.poll()
        while notice is None:
            notice = source.poll()
        assert notice.kind.value == "TERMINATE"
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=PATIENCE_S) == 0
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_that_ends_others_is_shown_and_ends_it_and_any_other_is_shown(name: str) -> None:
    command = [sys.executable, "-m", "hf_spot", "watch", "--notice", "signal"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert "no notice" in child.stdout.readline()
        status = Path(f"/proc/{child.pid}/status")
        bit = 1 << (signal.SIGUSR1 - 1)
        wait_for(lambda: int(status.read_text().partition("SigCgt:")[2].split()[0], 16) & bit, "for it to listen")
        if name != "SIGINT":
            child.send_signal(getattr(signal, name))
            assert f"TERMINATE ({name}" in child.stdout.readline()
        else:
            child.send_signal(signal.SIGUSR1)
            assert "TERMINATE (SIGUSR1" in child.stdout.readline()
            assert child.poll() is None
            child.send_signal(signal.SIGINT)
        assert child.wait(timeout=PATIENCE_S) == 0
    finally:
        child.kill()
        child.communicate()
