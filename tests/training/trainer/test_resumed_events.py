"""Events that Trainer repeats or omits around a resume: callbacks see and leave the same as without an interruption."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_spot import Run, SpotArguments, SpotCallback, TrainingPreempted
from hf_spot.training.session import recognition
from hf_spot.training.trainer.accumulation import Accumulation
from tests.matrix.parts import Padded, Stream, Swaps, Watches
from tests.training.conftest import Patient
from tests.training.test_callback import preempt
from tests.training.trainer.test_exactness import Slow
from tests.training.trainer.test_own_state import Rows, make, of, weights


class Crash(Exception):
    """What a script raises."""


def crash() -> None:
    raise Crash


class AtStep(TrainerCallback):
    """Acts when a step begins, once all saves so far are committed."""

    not_of_training = True
    per_launch = ("step", "act")

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == self.step - 1:
            self.act()


class Sees(TrainerCallback):
    """What is shown in this launch when a pass begins."""

    per_launch = ("saw",)

    def __init__(self) -> None:
        self.saw: list[Any] = []

    def on_epoch_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        best = state.best_model_checkpoint and Path(state.best_model_checkpoint).name
        shown = [state.epoch, state.global_step, state.total_flos, state.best_metric, state.best_global_step, best]
        self.saw.append([*shown, [line["step"] for line in state.log_history], control.state()])


def interrupted(store: str, tmp_path: Path, make_one: Callable[[Path], Trainer], at_step: int, how: str) -> Trainer:
    """Interrupt a training in a step, by a notice or by an exception, and return the trainer that has resumed and ended it."""
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    first = make_one(tmp_path / "one")
    for one in (callback, Patient(callback), AtStep(at_step, preempt(callback) if how == "notice" else crash)):
        first.add_callback(one)
    with pytest.raises(TrainingPreempted if how == "notice" else Crash):
        first.train()
    return resumed(store, tmp_path / "two", make_one)


def resumed(store: str, out: Path, make_one: Callable[[Path], Trainer]) -> Trainer:
    callback = SpotCallback(store, SpotArguments(notice="none"))
    trainer = make_one(out)
    for one in (callback, Patient(callback)):
        trainer.add_callback(one)
    trainer.train()
    return trainer


def assert_same_ending(one: Trainer, other: Trainer) -> None:
    ended, wanted = weights(one), weights(other)
    assert [name for name in wanted if not torch.equal(wanted[name], ended[name])] == []
    assert losses(one) == losses(other)


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def of_rows(out: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    return make(out, callbacks=[*callbacks], **settings)


def of_a_stream(out: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    more = {"max_steps": 12, "data_collator": Padded(), "eval_dataset": Rows(), **settings}
    return make(out, callbacks=[*callbacks], data=Stream(24), **more)


BY_EPOCH = {"save_strategy": "epoch", "eval_strategy": "epoch", "eval_dataset": Rows()}
LEFT_OVER = {"gradient_accumulation_steps": 5, "max_steps": 5, "per_device_train_batch_size": 2}  # two of twelve
BEST = {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": Rows(), "metric_for_best_model": "loss"}


@pytest.mark.parametrize(
    ("make_one", "settings", "at_step", "how"),
    [
        (of_rows, {}, 8, "notice"),
        (of_rows, {}, 6, "notice"),  # the launch ends before the end of the pass is told
        (of_rows, {"save_steps": 3}, 7, "crash"),
        (of_rows, BY_EPOCH, 8, "crash"),
        (of_rows, BEST, 11, "crash"),  # the second pass began when another checkpoint was the best
        (of_rows, {"save_steps": 3, "accelerator_config": {"use_seedable_sampler": False}}, 7, "crash"),
        (of_a_stream, {}, 8, "notice"),
        (of_a_stream, {}, 6, "notice"),
        (of_a_stream, {"save_steps": 3}, 7, "crash"),
        (of_a_stream, BY_EPOCH, 8, "crash"),  # a pass that has ended does not end, nor is it evaluated, again
        (of_a_stream, {**BY_EPOCH, **LEFT_OVER}, 4, "crash"),  # gradients wait at the end of a pass
        (of_a_stream, LEFT_OVER, 3, "notice"),
        (of_a_stream, {**BY_EPOCH, **LEFT_OVER, "accelerator_config": {"dispatch_batches": False}}, 4, "crash"),
    ],
)
def test_callbacks_see_what_they_see_without_an_interruption(
    store: str, tmp_path: Path, make_one: Callable[..., Trainer], settings: dict[str, Any], at_step: int, how: str
) -> None:
    alone = make_one(tmp_path / "alone", Watches(), Sees(), **settings)
    alone.train()
    again = interrupted(store, tmp_path, lambda out: make_one(out, Watches(), Sees(), **settings), at_step, how)
    saw = of(again, Sees).saw
    assert saw == of(alone, Sees).saw[-len(saw) :]
    wanted, found = of(alone, Watches), of(again, Watches)
    assert (found.begins, found.ends, found.passes, found.drawn) == (wanted.begins, wanted.ends, wanted.passes, wanted.drawn)
    assert [sorted(line) for line in again.state.log_history] == [sorted(line) for line in alone.state.log_history]
    assert_same_ending(again, alone)


@pytest.mark.parametrize(("micro_batch", "saved"), [(1, 2), (3, 3)], ids=["left over", "added to what is left over"])
def test_a_notice_meets_gradients_that_wait(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int, saved: int
) -> None:
    def make_one(out: Path) -> Trainer:
        return of_a_stream(out, **LEFT_OVER)

    alone = make_one(tmp_path / "alone")
    alone.train()
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    slow = Slow(callback, 3, micro_batch)
    monkeypatch.setattr("hf_spot.training.callback.Accumulation", functools.partial(Accumulation, clock=slow.clock))
    first = make_one(tmp_path / "one")
    for one in (slow, callback):
        first.add_callback(one)
    with pytest.raises(TrainingPreempted) as preempted:
        first.train()
    assert preempted.value.step == saved
    monkeypatch.undo()
    assert_same_ending(resumed(store, tmp_path / "two", make_one), alone)


def test_a_notice_in_the_middle_of_a_pass_tells_nobody_that_the_pass_has_ended(store: str, tmp_path: Path) -> None:
    callback, watches = SpotCallback(store, SpotArguments(notice="signal")), Watches()
    trainer = make(tmp_path / "one", callbacks=[callback, Patient(callback), watches, AtStep(8, preempt(callback))])
    with pytest.raises(TrainingPreempted):
        trainer.train()
    assert (watches.passes, len(watches.ends)) == (2, 1)


class Enough(TrainerCallback):
    def on_evaluate(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        control.should_training_stop = True


def test_an_evaluation_that_is_made_up_for_and_ends_the_training_ends_the_pass_once(store: str, tmp_path: Path) -> None:
    def make_one(out: Path) -> Trainer:
        return make(out, eval_strategy="epoch", eval_dataset=Rows(), callbacks=[Watches(), Enough()])

    alone = make_one(tmp_path / "alone")
    alone.train()
    again = interrupted(store, tmp_path, make_one, 6, "notice")
    wanted, found = of(alone, Watches), of(again, Watches)
    assert (again.state.global_step, found.begins, found.ends) == (6, wanted.begins, wanted.ends)


def test_an_interruption_behind_an_interruption_between_passes_keeps_the_order_of_the_data(store: str, tmp_path: Path) -> None:
    def make_one(out: Path) -> Trainer:
        return make(out, save_steps=3, accelerator_config={"use_seedable_sampler": False}, callbacks=[Watches()])

    alone = make_one(tmp_path / "alone")
    alone.train()
    for at_step, name in ((7, "one"), (10, "two")):
        callback = SpotCallback(store, SpotArguments(notice="none"))
        trainer = make_one(tmp_path / name)
        for one in (callback, Patient(callback), AtStep(at_step, crash)):
            trainer.add_callback(one)
        with pytest.raises(Crash):
            trainer.train()
    again = resumed(store, tmp_path / "three", make_one)
    assert of(again, Watches).begins == of(alone, Watches).begins
    assert_same_ending(again, alone)


class Prefers(TrainerCallback):
    """Decides anew in each launch, and would otherwise leave what was there before."""

    def __init__(self) -> None:
        self.names, self.dice = ["bias"], torch.Generator().manual_seed(1)

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.names[:] = ["bias"] if state.global_step == 0 else ["weight"]
        if state.global_step:
            self.dice.manual_seed(2)


class Compares(Trainer):
    """Stays near a reference, which a callback sets when a training begins."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        import copy

        super().__init__(*args, **kwargs)
        self.reference = copy.deepcopy(self.model).requires_grad_(False).eval()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        pairs = zip(model.parameters(), self.reference.parameters(), strict=True)
        return loss + sum(((one - other) ** 2).sum() for one, other in pairs)


class SetsReference(TrainerCallback):
    def __init__(self) -> None:
        self.trainer: Any = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        self.trainer.reference.load_state_dict(model.state_dict())


class Resets(TrainerCallback):
    """Begins each training with a new head, and each pass with another bias, less decay and no momentum."""

    def __init__(self, event: str) -> None:
        self.event = event

    def act(self, model: Any, optimizer: Any) -> None:
        with torch.no_grad():
            model.transformer.ln_f.bias.fill_(0.1)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1
        for held in optimizer.state.values():
            held["exp_avg"].zero_()

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):  # type: ignore[no-untyped-def]
        if self.event == "train":
            self.act(model, optimizer)

    def on_epoch_begin(self, args, state, control, model=None, optimizer=None, **kwargs):  # type: ignore[no-untyped-def]
        if self.event == "pass":
            self.act(model, optimizer)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):  # type: ignore[no-untyped-def]
        for group in optimizer.param_groups:
            group["weight_decay"] *= 0.9


def with_reference(out: Path) -> Trainer:
    sets = SetsReference()
    sets.trainer = trainer = make(out, Compares, callbacks=[sets])
    return trainer


@pytest.mark.parametrize(
    "make_one",
    [
        lambda out: make(out, callbacks=[Prefers()]),
        with_reference,
        lambda out: make(out, callbacks=[Resets("train")]),
        lambda out: make(out, callbacks=[Resets("pass")]),
    ],
    ids=["another value", "another model", "weights when training begins", "weights when a pass begins"],
)
@pytest.mark.parametrize("at_step", [4, 8])
def test_what_a_callback_does_again_after_a_resume_is_undone(
    store: str, tmp_path: Path, make_one: Callable[[Path], Trainer], at_step: int
) -> None:
    alone = make_one(tmp_path / "alone")
    alone.train()
    again = interrupted(store, tmp_path, make_one, at_step, "notice")
    assert_same_ending(again, alone)
    if any(isinstance(one, Prefers) for one in again.callback_handler.callbacks):
        assert of(again, Prefers).names == ["bias"]
        assert torch.equal(of(again, Prefers).dice.get_state(), of(alone, Prefers).dice.get_state())


@pytest.mark.parametrize("how", ["notice", "finished"])
def test_callbacks_of_a_training_that_an_earlier_launch_has_finished_do_what_they_do_at_its_end(
    store: str, tmp_path: Path, how: str
) -> None:
    def make_one(out: Path) -> Trainer:
        return make(out, callbacks=[Swaps(), Watches()], save_steps=6)

    alone = make_one(tmp_path / "alone")
    alone.train()
    if how == "notice":  # in the last step: everything is saved, and nobody was told of the end
        again = interrupted(store, tmp_path, make_one, 12, "notice")
    else:
        resumed(store, tmp_path / "one", make_one)
        recognition.forget_finished()  # as in a new process
        again = resumed(store, tmp_path / "two", make_one)
    assert [entry.kind for entry in Run(store).events()].count("commit") == 2
    assert_same_ending(again, alone)
    wanted, found = of(alone, Watches), of(again, Watches)
    assert (found.begins, found.ends, found.passes) == (wanted.begins, wanted.ends, wanted.passes)
    assert found.dice.getstate() == wanted.dice.getstate()
