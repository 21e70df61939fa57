"""What a callback raises on the way to a save costs no checkpoint: it is committed, then the error is raised or told."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import transformers.trainer
from transformers import TrainerCallback

from hf_spot import Run, SpotArguments, SpotCallback, TrainingPreempted
from hf_spot.training.trainer.saves import Saves
from tests.training.conftest import Recorder, make_trainer
from tests.training.test_callback import QUIET, kinds, preempt, steps
from tests.waiting import PATIENCE_S


class Boom(Exception):
    """Of a tracker."""


class Raises(TrainerCallback):
    """Raises in one event, once a step is reached."""

    def __init__(self, event: str, at: int) -> None:
        self.raised = 0

        def act(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= at:
                self.raised += 1
                raise Boom(f"{event} at {state.global_step}")

        setattr(self, event, act)


EVENTS = ["on_step_end", "on_log", "on_evaluate", "on_save"]


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "behind ours"])
@pytest.mark.parametrize("event", EVENTS)
def test_a_callback_that_raises_at_a_save_is_heard_after_the_commit(
    event: str, first: bool, store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spot, user = SpotCallback(store, QUIET), Raises(event, 4)
    order = [user, spot] if first else [spot, user]
    trainer = make_trainer(tmp_path / "out", *order, save_steps=4, logging_steps=4, eval_strategy="steps", eval_steps=4)
    with pytest.raises(Boom, match=f"{event} at 4"):
        trainer.train()
    assert user.raised >= 1
    assert steps(store) == [4]
    assert list(Run(store).verify().values()) == [[]]
    assert kinds(store) == ["claim", "training", "commit", "failed"]
    assert "the checkpoint is saved first" in caplog.text


@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_save"])
def test_at_a_notice_it_is_told_and_the_training_is_preempted(
    event: str, store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spot, user = SpotCallback(store, SpotArguments(notice="signal")), Raises(event, 3)
    trainer = make_trainer(tmp_path / "out", user, spot, Recorder(3, preempt(spot)), save_steps=100, logging_steps=100)
    with caplog.at_level(logging.WARNING, "hf_spot"), pytest.raises(TrainingPreempted) as caught:
        trainer.train()
    assert caught.value.code == 75
    assert steps(store) == [caught.value.step]
    assert caught.value.step is not None and caught.value.step >= 3
    assert kinds(store)[-1] == "preempted"
    assert user.raised == 0 or "Boom" in caplog.text
    assert user.raised or event == "on_log", "what a preempted training logs is kept for the next launch"


def raise_from_save(first: int) -> Callable[..., None]:
    """Raises after the save of this number and after each later one, wherever the training is meanwhile."""
    saves = count(1)

    def act(*args: Any, **kwargs: Any) -> None:
        if (number := next(saves)) >= first:
            raise Boom(f"after the save of number {number}")

    return act


@pytest.mark.parametrize("goes_on", [True, False], ids=["behind the training", "at once"])
@pytest.mark.parametrize("what", ["rotation", "push"])
def test_what_trainer_does_after_a_save_costs_no_checkpoint(
    what: str,
    goes_on: bool,
    store: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spot = SpotCallback(store, QUIET)

    def wait_for_the_writer() -> None:
        assert spot._session is not None and spot._session.commits.behind.wait(PATIENCE_S)

    # So that the last save does not begin before what follows the one before it.
    trainer = make_trainer(tmp_path / "out", spot, Recorder(10, wait_for_the_writer), save_steps=4, save_total_limit=1)
    if what == "push":
        trainer.args.push_to_hub = not goes_on
        monkeypatch.setattr(trainer, "_push_from_checkpoint", raise_from_save(2))
    else:
        monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", raise_from_save(2 if goes_on else 3))
    if what == "push" and goes_on:
        trainer.args.push_to_hub = True
        monkeypatch.setattr(Saves, "_why_at_once", lambda self: None)
    with pytest.raises(Boom, match="after the save of"):
        trainer.train()
    assert steps(store)[-1] == (12 if (what, goes_on) == ("rotation", False) else 8)
    assert list(Run(store).verify().values()) == [[]] * len(steps(store))
    assert kinds(store)[-1] == "failed"
    assert "what follows the save (" in caplog.text


def test_what_trainer_does_after_the_save_of_a_notice_is_told(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    spot = SpotCallback(store, SpotArguments(notice="signal"))
    trainer = make_trainer(tmp_path / "out", spot, Recorder(3, preempt(spot)), save_steps=100, save_total_limit=1)
    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", raise_from_save(1))
    with caplog.at_level(logging.WARNING, "hf_spot"), pytest.raises(TrainingPreempted) as caught:
        trainer.train()
    assert caught.value.code == 75
    assert steps(store) == [caught.value.step]
    assert "Boom: after the save of" in caplog.text


def test_where_no_save_is_due_it_is_raised_at_once(store: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", Raises("on_step_end", 2), SpotCallback(store, QUIET), save_steps=4)
    with pytest.raises(Boom, match="at 2"):
        trainer.train()
    assert steps(store) == []
    assert any(type(one) is Raises for one in trainer.callback_handler.callbacks)
