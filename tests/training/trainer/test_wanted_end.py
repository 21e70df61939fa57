"""An end that the script asks for is its end, also if a notice stops the training at the same step."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_spot import Run, SpotArguments, SpotCallback, TrainingPreempted
from hf_spot.training.session import recognition
from hf_spot.training.trainer.accumulation import Accumulation
from tests.training.conftest import Patient, Recorder, make_trainer, same, weights
from tests.training.test_callback import preempt
from tests.training.trainer.test_exactness import Slow

SETTINGS: dict[str, Any] = {
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 3,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "metric_for_best_model": "loss",
    "logging_steps": 2,
}
LAST = 6  # of 18: the last step of the first pass, evaluated and saved


class Ends(TrainerCallback):
    """Asks for the end in an event."""

    def __init__(self, event: str, step: int = LAST) -> None:
        self.step, self.told = step, [0]
        setattr(self, event, self.ask)

    def ask(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.told.append(state.global_step)


EVENTS = ("on_step_begin", "on_substep_end", "on_step_end", "on_log", "on_evaluate", "on_save", "on_epoch_end")


def found(trainer: Trainer) -> Any:
    lines = [
        {name: value for name, value in line.items() if not name.endswith(("_runtime", "_per_second"))}
        for line in trainer.state.log_history
    ]
    return trainer.state.global_step, lines, [one.told for one in trainer.callback_handler.callbacks if isinstance(one, Ends)]


def undisturbed(folder: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    trainer = make_trainer(folder, *callbacks, **(SETTINGS | settings))
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("event", "notice"),
    [
        *((event, "at this step") for event in EVENTS),
        *((event, "none") for event in ("on_substep_end", "on_save", "on_epoch_end")),
    ],
)
def test_the_next_launch_trains_no_further(store: str, tmp_path: Path, event: str, notice: str) -> None:
    alone = undisturbed(tmp_path / "alone", Ends(event))
    assert alone.state.global_step == LAST
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    in_next = event in ("on_step_begin", "on_substep_end")
    at_step = 0 if notice == "none" else LAST + in_next
    trainer = make_trainer(
        tmp_path / "one", callback, Patient(callback), Recorder(at_step, preempt(callback)), Ends(event), **SETTINGS
    )
    if notice == "none" or in_next:  # it ends before it looks for a notice
        trainer.train()
    else:
        with pytest.raises(TrainingPreempted):
            trainer.train()
    recognition.forget_finished()
    newest = Run(store).latest()
    is_made_up_for = notice != "none" and event in ("on_evaluate", "on_epoch_end")  # by the next launch, where it is asked
    assert newest is not None and newest.step == LAST and newest.ref.complete is not is_made_up_for
    again = make_trainer(tmp_path / "two", SpotCallback(store, SpotArguments(notice="none")), Ends(event), **SETTINGS)
    again.train()
    assert found(again) == found(alone)
    assert same(weights(again), weights(alone))


def test_nor_if_the_step_is_left_halfway(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = undisturbed(tmp_path / "alone", Ends("on_substep_end"))
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    slow = Slow(callback, LAST + 1, 1)
    monkeypatch.setattr("hf_spot.training.callback.Accumulation", functools.partial(Accumulation, clock=slow.clock))
    with pytest.raises(TrainingPreempted):
        make_trainer(tmp_path / "one", slow, callback, Patient(callback), Ends("on_substep_end"), **SETTINGS).train()
    again = make_trainer(
        tmp_path / "two", SpotCallback(store, SpotArguments(notice="none")), Ends("on_substep_end"), **SETTINGS
    )
    again.train()
    assert found(again) == found(alone)
    assert same(weights(again), weights(alone))


def test_what_follows_the_last_step_is_made_up_for(store: str, tmp_path: Path) -> None:
    by_epoch = {"eval_strategy": "epoch", "logging_strategy": "epoch"}
    alone = undisturbed(tmp_path / "alone", Ends("on_step_end", 4), **by_epoch)
    assert alone.state.global_step == 4 and len(alone.state.log_history) == 3  # losses, an evaluation, the end
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    first = (callback, Patient(callback), Recorder(4, preempt(callback)), Ends("on_step_end", 4))
    with pytest.raises(TrainingPreempted):
        make_trainer(tmp_path / "one", *first, **(SETTINGS | by_epoch)).train()
    quiet = SpotCallback(store, SpotArguments(notice="none"))
    again = make_trainer(tmp_path / "two", quiet, Ends("on_step_end", 4), **(SETTINGS | by_epoch))
    again.train()
    assert found(again) == found(alone)


def test_nor_if_it_stops_early(store: str, tmp_path: Path) -> None:
    more = {"learning_rate": 0.0, "load_best_model_at_end": True, "save_total_limit": 1}
    alone = undisturbed(tmp_path / "alone", EarlyStoppingCallback(1), **more)
    assert alone.state.global_step == LAST
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    trainer = make_trainer(
        tmp_path / "one",
        callback,
        Patient(callback),
        Recorder(LAST, preempt(callback)),
        EarlyStoppingCallback(1),
        **(SETTINGS | more),
    )
    with pytest.raises(TrainingPreempted):
        trainer.train()
    quiet = SpotCallback(store, SpotArguments(notice="none"))
    again = make_trainer(tmp_path / "two", quiet, EarlyStoppingCallback(1), **(SETTINGS | more))
    again.train()
    assert found(again) == found(alone)
