"""``spot/`` metrics in real trackers, and a log that says what nobody must miss."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from tqdm.auto import tqdm

from hf_spot import SpotArguments, SpotCallback, TrainingPreempted
from hf_spot.log import AboveBars, alert, log
from tests.run.test_webhook import SECRET, Listener
from tests.training.conftest import Patient, Recorder, make_trainer
from tests.training.test_callback import QUIET, preempt, train_until_preempted
from tests.waiting import wait_for

SAVES = {"spot/checkpoint_s", "spot/stall_s", "spot/upload_s", "spot/upload_gb_per_s"}


def interrupted_run(store: str, tmp_path: Path, **settings: Any) -> None:
    """Two launches, of which the first hears a notice."""
    train_until_preempted(store, tmp_path / "one", 5, **settings)
    callback = SpotCallback(store, SpotArguments(notice="none", cadence="auto"))

    def look() -> None:
        session = callback._session
        assert session is not None
        wait_for(lambda: session.commits.past)

    make_trainer(tmp_path / "two", callback, Patient(callback), Recorder(8, look), **settings).train()


def test_tensorboard_shows_them(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    interrupted_run(store, tmp_path, report_to="tensorboard")
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    tags = {tag.removeprefix("train/") for tag in board.Tags()["scalars"]}
    assert {"loss", "spot/notices", "spot/steps_lost", "spot/next_save_in_s", *SAVES} <= tags
    assert [event.value for event in board.Scalars("train/spot/notices")] == [1]
    assert [event.value for event in board.Scalars("train/spot/steps_lost")] == [0]
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 13))
    assert all(event.value > 0 for tag in SAVES for event in board.Scalars(f"train/{tag}"))


def test_trackio_shows_them(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio comes with pip install -e '.[matrix]'")
    from trackio.utils import TRACKIO_DIR

    interrupted_run(store, tmp_path, report_to="trackio", project=store.rpartition("/")[2], trackio_static_space_id=False)
    with sqlite3.connect(next(Path(TRACKIO_DIR).glob(f"*{store.rpartition('/')[2]}*.db"))) as database:
        lines = [json.loads(line) for (line,) in database.execute("select metrics from metrics")]
    names = {name.removeprefix("train/") for line in lines for name in line}
    assert {"loss", "spot/notices", "spot/steps_lost", "spot/next_save_in_s", *SAVES} <= names


def test_the_log_that_checkpoints_hold_is_trainers_own(store: str, tmp_path: Path) -> None:
    callback = SpotCallback(store, QUIET)
    trainer = make_trainer(tmp_path, callback, Patient(callback))
    heard: set[str] = set()

    class Listening(Recorder):
        def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
            heard.update(logs)

    trainer.add_callback(Listening())
    trainer.train()
    assert heard >= SAVES
    assert not any(name.startswith("spot/") for line in trainer.state.log_history for name in line)
    assert "spot/" not in (tmp_path / "checkpoint-12" / "trainer_state.json").read_text()
    assert "on_log" not in vars(trainer.callback_handler)


# -- alerts --------------------------------------------------------------------------------------------------------------


def test_a_line_stands_above_the_bar_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "handlers", [AboveBars()])
    with contextlib.redirect_stderr(io.StringIO()) as seen, tqdm(total=10, mininterval=0) as bar:
        bar.update(5)
        alert("TERMINATE from imds")
        bar.update(1)
    lines = [part.strip() for part in seen.getvalue().replace("\r", "\n").split("\n")]
    assert "hf-spot: >>> TERMINATE from imds <<<" in lines


@pytest.mark.parametrize("level", [logging.WARNING, logging.CRITICAL])
def test_an_alert_is_seen_where_warnings_are_not(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "handlers", [AboveBars()])
    before = log.level
    log.setLevel(level)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as seen:
            alert("TERMINATE from imds")
    finally:
        log.setLevel(before)
    assert seen.getvalue() == "hf-spot: >>> TERMINATE from imds <<<\n"


# -- the webhook ---------------------------------------------------------------------------------------------------------


def test_a_webhook_hears_how_a_launch_goes(store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with Listener() as listener:
        callback = SpotCallback(store, SpotArguments(notice="signal", on_event=listener.url))
        with pytest.raises(TrainingPreempted):
            make_trainer(tmp_path / "one", callback, Recorder(5, preempt(callback))).train()
        preempted, listener.texts = listener.texts, []
        make_trainer(tmp_path / "two", SpotCallback(store, SpotArguments(notice="none", on_event=listener.url))).train()
        finished, listener.texts = listener.texts, []

        def fail() -> None:
            raise ZeroDivisionError

        callback = SpotCallback(f"{store}-other", SpotArguments(notice="none", on_event=listener.url))
        with pytest.raises(ZeroDivisionError):
            make_trainer(tmp_path / "three", callback, Recorder(2, fail)).train()
        failed = listener.texts
    here, node = f"hf_spot: {store}:", os.uname().nodename
    assert preempted[0] == f"{here} launch 1 has begun on {node}"
    assert preempted[1].startswith(f"{here} TERMINATE from signal: save and stop")
    assert preempted[2] == f"{here} preempted at step 5; step 5 is committed"
    assert finished == [f"{here} launch 2 has begun on {node}", f"{here} finished at step 12"]
    assert failed[-1] == f"hf_spot: {store}-other: failed at step 1, by ZeroDivisionError"
    assert not any(part in caplog.text for part in SECRET.split("/"))


def test_a_webhook_that_hangs_holds_up_no_training(
    store: str, tmp_path: Path, peace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_spot.run.webhook.WEBHOOK_LAST_WORD_S", 0.01)
    with Listener(0) as listener:
        monkeypatch.setenv("HF_SPOT_ON_EVENT", listener.url)
        recorder = Recorder()
        make_trainer(tmp_path, SpotCallback(store, QUIET), recorder).train()
        assert len(listener.texts) == 1  # it has not answered yet
    assert recorder.losses == peace[1]
