"""A training that an earlier launch has finished is loaded as ``train()`` would have left it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback

from hf_spot import Run, SpotArguments, SpotCallback, TrainingPreempted
from hf_spot.runtime import Runtime
from hf_spot.training.session import recognition
from tests.training.conftest import Patient, Recorder
from tests.training.test_callback import preempt
from tests.training.trainer.test_own_state import SHAPE, STEPS, Lookahead, Rows, make, of, weights


class Hears(TrainerCallback):
    """What a tracker hears."""

    per_launch = ("lines",)

    def __init__(self) -> None:
        self.lines: list[tuple[int, set[str]]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        self.lines.append((state.global_step, {name for name in logs if not name.startswith("spot/")}))


def spot(store: str, trainer: Trainer, *more: TrainerCallback, notice: str = "none") -> SpotCallback:
    callback = SpotCallback(store, SpotArguments(notice=notice))
    for one in (callback, Patient(callback), *more):
        trainer.add_callback(one)
    return callback


@pytest.mark.parametrize("optimizers", [None, lambda model: Lookahead(model.parameters())], ids=["Trainer's", "the script's"])
def test_a_second_train_goes_on_with_the_optimizer_of_the_first(store: str, tmp_path: Path, optimizers: Any) -> None:
    given = {} if optimizers is None else {"optimizers": optimizers}
    alone = make(tmp_path / "alone", **given)
    alone.train()
    alone.train()

    first = make(tmp_path / "one", **given)
    spot(store, first)
    first.train()
    recognition.forget_finished()
    trainer = make(tmp_path / "two", **given)
    spot(store, trainer)
    trainer.train()
    assert trainer.optimizer is not None
    assert trainer.optimizer.state_dict()["state"].keys() == alone.optimizer.state_dict()["state"].keys()  # type: ignore[union-attr]
    trainer.train()
    ended, wanted = weights(trainer), weights(alone)
    assert [name for name in wanted if not torch.equal(wanted[name], ended[name])] == []


class WithReference(Trainer):
    """Prepares another model, as DPO does with its reference."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reference = self.accelerator.prepare_model(GPT2LMHeadModel(SHAPE), evaluation_mode=True)


def test_its_model_is_evaluated_as_after_the_training_whatever_else_is_prepared(store: str, tmp_path: Path) -> None:
    def made(name: str) -> Trainer:
        return make(tmp_path / name, WithReference, bf16=True, eval_dataset=Rows())

    first = made("one")
    spot(store, first)
    first.train()
    wanted = first.evaluate()["eval_loss"]
    recognition.forget_finished()
    second = made("two")
    spot(store, second)
    second.train()
    assert second.evaluate()["eval_loss"] == wanted


class Fails(TrainerCallback):
    """After the last step, whose checkpoint is saved nevertheless."""

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == STEPS:
            raise ZeroDivisionError


def test_trackers_hear_the_end_that_a_failure_in_the_last_step_has_cut_off(store: str, tmp_path: Path) -> None:
    first, heard = make(tmp_path / "one"), Hears()
    spot(store, first, Fails(), heard)
    with pytest.raises(ZeroDivisionError):
        first.train()
    assert not any("train_loss" in names for _, names in heard.lines)
    second, again = make(tmp_path / "two"), Hears()
    spot(store, second, again)
    assert second.train().global_step == STEPS
    assert [step for step, names in again.lines if "train_loss" in names] == [STEPS]


class Ends(TrainerCallback):
    """Fails when the training has saved its last step, or when it has ended."""

    per_launch = ("event",)

    def __init__(self, event: str) -> None:
        self.event = event

    def on_epoch_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self.event == "before the end" and state.global_step == STEPS:
            raise ZeroDivisionError


@pytest.mark.parametrize("event", ["before the end", "behind the end"])
def test_under_a_launcher_too_the_end_is_told_once_however_the_script_fails(
    store: str, tmp_path: Path, event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []
    for name, ends in (("one", Ends(event)), ("two", Ends("not"))):
        run = Run(store)
        runtime = Runtime(store, run.claim(), tmp_path / name, SpotArguments(notice="none"))
        runtime.directory.mkdir()
        with monkeypatch.context() as launched:
            for variable, value in runtime.to_environ().items():
                launched.setenv(variable, value)
            trainer, hears = make(tmp_path / f"out-{name}", save_steps=STEPS), Hears()
            spot(store, trainer, ends, hears)
            if name == "one" and event == "before the end":
                with pytest.raises(ZeroDivisionError):
                    trainer.train()
            else:
                trainer.train()
        run.record("failed", {"step": STEPS})  # as the launcher does for a script that fails
        recognition.forget_finished()
        heard += [lines for lines in hears.lines if "train_loss" in lines[1]]
    assert len(heard) == 1


class NotReadable:
    """Keeps something, and can't say what."""

    def state_dict(self) -> Any:
        raise AttributeError("dl_state_dict")

    def load_state_dict(self, state: Any) -> None:
        raise AttributeError("dl_state_dict")


class Keeps(TrainerCallback):
    def __init__(self) -> None:
        self.inside = NotReadable()
        type(self.inside).__module__ = "accelerate.data_loader"  # that of a library

    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):  # type: ignore[no-untyped-def]
        self.loader = train_dataloader


def test_an_object_whose_state_can_not_be_read_is_named_and_costs_no_save(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path / "one")
    callback = spot(store, trainer, Keeps(), notice="signal")
    trainer.add_callback(Recorder(6, preempt(callback)))
    with pytest.raises(TrainingPreempted) as ended:
        trainer.train()
    assert ended.value.step == 6
    assert of(trainer, Keeps).loader is not None
    assert caplog.text.count("callbacks.Keeps.inside is not saved, because its state_dict() raises an exception") == 1
    assert "callbacks.Keeps.loader" not in caplog.text


class Worsens(Trainer):
    """Evaluates worse each time."""

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        metrics = super().evaluate(*args, **kwargs)
        return metrics | {"eval_loss": float(self.state.global_step)}


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_last_step_is_saved_though_it_is_not_the_best(store: str, tmp_path: Path, strategy: str) -> None:
    more: dict[str, Any] = {
        "eval_strategy": strategy,
        "eval_steps": 3,
        "save_strategy": "best",
        "metric_for_best_model": "loss",
    }
    trainer = make(tmp_path / "one", Worsens, eval_dataset=Rows(), **more)
    spot(store, trainer)
    trainer.train()
    assert Run(store).state().checkpoints[-1].step == STEPS
