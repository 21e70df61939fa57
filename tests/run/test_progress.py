"""Bars, as a terminal shows them: quiet elsewhere, gone at the end, and off where Hugging Face's are."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from hf_spot.cli import main
from hf_spot.run import upload
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.progress import Bar
from hf_spot.run.run import Run
from hf_spot.run.upload import Uploader
from hf_spot.storage.faulty import FaultyStore
from hf_spot.storage.memory import MemoryStore
from tests.waiting import wait_for


class Terminal:
    """A pseudo-terminal, and what was written to it so far."""

    def __init__(self) -> None:
        self._main, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.stream = os.fdopen(other, "w", encoding="utf-8")
        self._seen = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while data := os.read(self._main, 65536):
                self._seen += data
        except OSError:  # the other end is closed
            pass

    @property
    def text(self) -> str:
        return self._seen.decode(errors="replace")

    def close(self) -> str:
        """All that was written."""
        self.stream.close()
        self._reader.join(60)
        os.close(self._main)
        return self.text

    def shown_last(self) -> str:
        """What stands in the line of the cursor."""
        return self.text.replace("\r\n", "\n").rpartition("\n")[2].rpartition("\r")[2].strip()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    made = Terminal()
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    yield made
    if not made.stream.closed:
        made.close()


@pytest.fixture
def run(tmp_path: Path, make_checkpoint: Callable[[int], Path]) -> Run:
    made = Run(tmp_path / "run")
    made.push(make_checkpoint(5))
    return made


def commands(run: Run, folder: Path) -> list[list[str]]:
    return [
        ["checkpoints", "verify", run.url],
        ["checkpoints", "pull", run.url, str(folder / "pulled")],
        ["checkpoints", "push", str(folder / "copy"), str(folder / "pulled" / "checkpoint-5")],
    ]


def test_a_terminal_sees_a_bar_that_is_gone_at_the_end(run: Run, tmp_path: Path, terminal: Terminal) -> None:
    with redirect_stderr(terminal.stream):
        for command in commands(run, tmp_path):
            assert main(command) == 0
    text = terminal.close()
    for what in ("verify", "pull", "push"):
        assert f"hf-spot {what}:   0%" in text
    assert terminal.shown_last() == ""


def test_nothing_is_drawn_into_a_file(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in commands(run, tmp_path):
        assert main(command) == 0
    assert capfd.readouterr().err == ""


def test_the_switch_of_hugging_face_is_honoured(run: Run, tmp_path: Path, terminal: Terminal) -> None:
    hub = pytest.importorskip("huggingface_hub.utils")
    with hub.disable_progress_bars(), redirect_stderr(terminal.stream):
        for command in commands(run, tmp_path):
            assert main(command) == 0
    assert terminal.close() == ""


def test_so_is_its_variable_before_anybody_has_imported_it(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "huggingface_hub.utils", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "yes")
    with redirect_stderr(terminal.stream), Bar("pull", 10) as bar:
        bar(5)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    with redirect_stderr(terminal.stream), Bar("push", 10) as bar:
        bar(5)
    text = terminal.close()
    assert "pull" not in text
    assert "push" in text


def test_an_error_stands_on_a_line_of_its_own(run: Run, tmp_path: Path, terminal: Terminal) -> None:
    (Path(run.url) / "e0001" / "pushed" / "checkpoint-5" / "optimizer.pt").unlink()
    with redirect_stderr(terminal.stream):
        assert main(["checkpoints", "pull", run.url, str(tmp_path / "pulled")]) == 2
    before, _, _ = re.sub(r"\x1b\[[\d;]*m", "", terminal.close()).partition("hf-spot: error")
    assert "hf-spot pull" in before
    assert before.endswith("\r")
    assert before.rstrip("\r").rpartition("\r")[2].strip() == ""


def test_what_moves_after_all_has_moved_is_not_drawn(terminal: Terminal) -> None:
    with redirect_stderr(terminal.stream):
        bar = Bar("pull", 10)
        for count in (4, 6, 1):
            bar(count)
    text = terminal.close()
    assert "hf-spot pull" in text
    assert terminal.shown_last() == ""


def test_who_waits_for_the_last_upload_sees_how_far_it_is(
    tmp_path: Path, make_checkpoint: Callable[[int], Path], terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "_SHOWN_AFTER_S", 0.0)
    store = FaultyStore(MemoryStore(f"memory://{uuid.uuid4().hex}"))
    run = Run(store)
    run.claim()
    store.outage = True
    uploader = Uploader(run, tmp_path / "pins")
    uploader.submit(make_checkpoint(5), CommitRequest(step=5))
    drained: list[bool] = []
    waiting = threading.Thread(target=lambda: drained.append(uploader.drain(60)))
    with redirect_stderr(terminal.stream):
        waiting.start()
        wait_for(lambda: "hf-spot upload" in terminal.text)
        store.outage = False
        waiting.join(60)
    terminal.close()
    uploader.close()
    assert drained == [True]
    assert terminal.shown_last() == ""
