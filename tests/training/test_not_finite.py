"""Numbers that are not finite never become a checkpoint, in a Trainer as in a loop, and never push a good one out."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_spot import Run, SpotArguments, SpotCallback, SpotCheckpointManager, SpotError, TrainingPreempted
from hf_spot.errors import RolledBack
from hf_spot.policy.numbers import Answer, answer, in_words
from hf_spot.training.saving.finite import not_finite, optimized_weights, optimizer_states, trained_weights
from hf_spot.training.saving.later_copies import LaterCopies
from tests.training.conftest import STEPS, Patient, Recorder, SaveRecorder, make_trainer, same, weights
from tests.training.test_callback import kinds, preempt, steps

STOP, GO_ON = (SpotArguments(notice="none", on_nan=on_nan, keep_checkpoints=1) for on_nan in ("stop", "go-on"))


ROLLBACK = SpotArguments(notice="none", on_nan="rollback", keep_checkpoints=1)


@pytest.mark.parametrize(
    ("wrong", "on_nan", "stopping", "expected"),
    [
        ([], "stop", False, Answer.MAKE),
        ([], "go-on", True, Answer.MAKE),
        (["x"], "stop", False, Answer.STOP),
        (["x"], "stop", True, Answer.SKIP),
        (["x"], "go-on", False, Answer.SKIP),
        (["x"], "go-on", True, Answer.SKIP),
        ([], "rollback", False, Answer.MAKE),
        (["x"], "rollback", False, Answer.ROLL_BACK),
        (["x"], "rollback", True, Answer.SKIP),
    ],
)
def test_a_save_of_wrong_numbers_is_never_made(wrong: list[str], on_nan: str, stopping: bool, expected: Answer) -> None:
    assert answer(wrong, on_nan=on_nan, stopping=stopping) is expected


def test_what_is_wrong_is_named_once() -> None:
    assert in_words(["a", "b", "a", "c", "d"], 7) == "step 7 is not saved: not finite (NaN or infinity): a, b, c and 1 more"


@pytest.mark.parametrize(
    "kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.complex64]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.0])
def test_every_kind_of_number_is_examined(kind: torch.dtype, value: float) -> None:
    if kind is torch.float8_e4m3fn and math.isinf(value):
        pytest.skip("it has no infinity")
    for place in (0, 3, 4):
        tensor = torch.ones(5).to(kind)
        tensor[place] = value
        assert not_finite([("x", tensor)]) == ([] if value == 1.0 else ["x"], [])


def test_large_numbers_that_are_finite_are_finite() -> None:
    for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert not_finite([("x", torch.full((1000,), torch.finfo(kind).max, dtype=kind))]) == ([], [])
        assert not_finite([("x", torch.full((1000,), torch.finfo(kind).min, dtype=kind))]) == ([], [])


def test_what_has_no_numbers_that_can_be_wrong_is_left_out() -> None:
    sparse = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.tensor([math.nan]), (3,), check_invariants=True)
    assert not_finite([("empty", torch.empty(0)), ("whole", torch.ones(3, dtype=torch.int64)), ("sparse", sparse)]) == (
        ["sparse"],
        [],
    )
    assert not_finite([("elsewhere", torch.empty(3, device="meta"))]) == ([], ["elsewhere"])


def test_what_training_does_not_change_is_not_looked_at() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False).fill_(-math.inf)
    model.register_buffer("mask", torch.full((2,), -math.inf))
    assert [name for name, _ in trained_weights(model)] == ["weight weight"]
    optimizer = torch.optim.AdamW([model.weight])
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert {name.split(" of ")[0] for name, _ in optimizer_states(optimizer)} == {
        "optimizer state step",
        "optimizer state exp_avg",
        "optimizer state exp_avg_sq",
    }
    assert [name for name, _ in optimized_weights(optimizer)] == ["weight of parameter 0"]


# -- Trainer ----------------------------------------------------------------------------------------------------------


def poison(trainer: Any, where: str) -> None:
    weight = trainer.model.lm_head.weight
    with torch.no_grad():
        if where == "weight":
            weight[3, 3] = math.nan
        elif where == "optimizer":
            trainer.optimizer.state[weight]["exp_avg_sq"][0, 0] = math.inf
        else:
            trainer.state.log_history.append({"step": trainer.state.global_step, "loss": math.nan})


class Poison(Recorder):
    """Damages the training after a step."""

    def __init__(self, at_step: int, where: str) -> None:
        super().__init__()
        self.at_step = at_step
        self.where = where
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at_step and self.where != "loss":
            poison(self.trainer, self.where)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.at_step and self.where == "loss":
            poison(self.trainer, self.where)


def poisoned(out: Path, callback: SpotCallback, at_step: int, where: str, *callbacks: Any) -> Any:
    harm = Poison(at_step, where)
    trainer = make_trainer(out, callback, Patient(callback), harm, *callbacks)
    harm.trainer = trainer
    return trainer


@pytest.mark.parametrize(
    ("where", "word"),
    [
        ("weight", "weight transformer.wte.weight"),
        ("optimizer", "optimizer state exp_avg_sq of parameter"),
        ("loss", "the logged loss"),
    ],
)
def test_a_training_ends_with_the_last_good_commit(where: str, word: str, store: str, tmp_path: Path, peace: Any) -> None:
    trainer = poisoned(tmp_path / "out", SpotCallback(store, STOP), 6, where)
    with pytest.raises(SpotError, match="step 6 is not saved: not finite") as caught:
        trainer.train()
    assert word in caught.value.args[0] and "--on-nan go-on" in caught.value.hint and caught.value.exit_code == 2
    assert steps(store) == [3] and kinds(store)[-1] == "failed"
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    again = make_trainer(tmp_path / "out", SpotCallback(store, STOP))
    again.train()
    assert same(weights(again), peace[0])


def test_a_training_that_goes_on_saves_once_its_numbers_are_finite(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer: Any = None
    kept: dict[str, Any] = {}

    def keep() -> None:
        kept.update(weights(trainer))
        kept["optimizer"] = copy.deepcopy(trainer.optimizer.state_dict())

    def heal() -> None:
        optimizer = kept.pop("optimizer")
        trainer.model.load_state_dict(kept)
        trainer.optimizer.load_state_dict(optimizer)

    callback = SpotCallback(store, GO_ON)
    told = SaveRecorder()
    trainer = poisoned(tmp_path / "out", callback, 5, "weight", Recorder(5, keep), Recorder(8, heal), told)
    with caplog.at_level(logging.ERROR, "hf_spot"):
        trainer.train()
    assert [entry.data["step"] for entry in Run(store).events() if entry.kind == "commit"] == [3, 9, STEPS]
    assert "step 6 is not saved: not finite (NaN or infinity): weight" in caplog.text
    assert "training goes on" in caplog.text
    assert told.saved == [3, 9, STEPS]  # nobody is told of a save that was not made


def test_a_training_that_ends_with_wrong_numbers_is_not_finished(store: str, tmp_path: Path) -> None:
    trainer = poisoned(tmp_path / "out", SpotCallback(store, GO_ON), 5, "weight")
    with pytest.raises(SpotError, match="only step 3 is in"):
        trainer.train()
    assert steps(store) == [3] and "finished" not in kinds(store)


@pytest.mark.parametrize("on_nan", ["stop", "go-on"])
def test_a_notice_with_wrong_numbers_leaves_the_last_commit(on_nan: str, store: str, tmp_path: Path, peace: Any) -> None:
    callback = SpotCallback(store, SpotArguments(notice="signal", on_nan=on_nan, keep_checkpoints=1))
    trainer = poisoned(tmp_path / "out", callback, 4, "weight", Recorder(5, preempt(callback)))
    with pytest.raises(TrainingPreempted) as caught:
        trainer.train()
    assert caught.value.step == 3 and steps(store) == [3]
    again = make_trainer(tmp_path / "out", SpotCallback(store, STOP))
    again.train()
    assert same(weights(again), peace[0])


def test_a_weight_that_never_was_finite_is_named_and_not_checked(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path / "out", SpotCallback(store, STOP))
    trainer.model.extra = nn.Parameter(torch.tensor([-math.inf]))  # in no computation
    with caplog.at_level(logging.WARNING, "hf_spot"):
        trainer.train()
    assert steps(store) == [STEPS]
    assert "weight extra is not finite before the first step: 1 weights are not checked" in caplog.text


# -- copies that are made beside the training: the answer comes within the next step -----------------------------------------


def large() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=48, n_layer=1, n_head=2))


def poisoned_beside(out: Path, callback: SpotCallback, at_step: int, where: str, *callbacks: Any, size: Any = large) -> Any:
    harm = Poison(at_step, where)
    trainer = make_trainer(out, callback, harm, *callbacks, model=size)
    harm.trainer = trainer
    return trainer


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The saves whose copies were checked in the writer thread: how many tensors each has left for later."""
    checked, plain = [], LaterCopies.run

    def run(self: LaterCopies) -> None:
        checked.append(len(self))
        plain(self)

    monkeypatch.setattr(LaterCopies, "run", run)
    return checked


@pytest.mark.parametrize(
    ("where", "word"),
    [("weight", "weight lm_head.weight|weight transformer.wte.weight"), ("optimizer", "optimizer state exp_avg_sq")],
)
def test_copies_with_wrong_numbers_end_a_training_in_the_next_step(
    where: str, word: str, store: str, tmp_path: Path, beside: list[int]
) -> None:
    trainer = poisoned_beside(tmp_path / "out", SpotCallback(store, STOP), 6, where)
    with pytest.raises(SpotError, match=f"step 6 is not saved: not finite .*({word})") as caught:
        trainer.train()
    assert caught.value.exit_code == 2 and trainer.state.global_step in range(6, 10)
    assert len(beside) == 2 and min(beside) > 0
    assert steps(store) == [3] and kinds(store)[-1] == "failed"
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]


def test_copies_with_wrong_numbers_are_left_out_until_all_are_finite(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, beside: list[int]
) -> None:
    trainer: Any = None
    kept: dict[str, Any] = {}

    def keep() -> None:
        kept.update(weights(trainer))
        kept["optimizer"] = copy.deepcopy(trainer.optimizer.state_dict())

    def heal() -> None:
        optimizer = kept.pop("optimizer")
        trainer.model.load_state_dict(kept)
        trainer.optimizer.load_state_dict(optimizer)

    more = Recorder(5, keep), Recorder(9, heal)
    trainer = poisoned_beside(tmp_path / "out", SpotCallback(store, GO_ON), 5, "weight", *more)
    with caplog.at_level(logging.ERROR, "hf_spot"):
        trainer.train()
    assert [entry.data["step"] for entry in Run(store).events() if entry.kind == "commit"] == [3, 9, STEPS]
    assert caplog.text.count("step 6 is not saved: not finite (NaN or infinity): weight") == 1
    assert "training goes on" in caplog.text and len(beside) == 3


def test_copies_with_wrong_numbers_roll_a_training_back(store: str, tmp_path: Path, beside: list[int]) -> None:
    trainer = poisoned_beside(tmp_path / "out", SpotCallback(store, ROLLBACK), 6, "weight")
    with pytest.raises(RolledBack, match=r"step 6 is not saved: .* passes over steps 5 to 6"):
        trainer.train()
    assert len(beside) == 2 and steps(store) == [3] and kinds(store).count("rollback") == 1


def test_a_best_model_that_could_not_be_saved_is_forgotten(store: str, tmp_path: Path, beside: list[int]) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "metric_for_best_model": "made_up"}
    harm = Poison(6, "optimizer")
    trainer = make_trainer(tmp_path / "out", SpotCallback(store, GO_ON), harm, model=large, **settings)
    harm.trainer = trainer
    plain = trainer.evaluate

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        found = plain(*args, **kwargs)
        return found | {"eval_made_up": {3: 2.0, 6: 1.0}.get(trainer.state.global_step, 3.0)}

    trainer.evaluate = evaluate
    with pytest.raises(SpotError, match="only step 3 is in"):
        trainer.train()
    assert trainer.state.best_global_step == 3 and beside


# -- loops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_nan", ["stop", "go-on"])
def test_a_loop_saves_no_wrong_numbers(on_nan: str, store: str, tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    arguments = SpotArguments(notice="none", on_nan=on_nan, keep_checkpoints=1)
    manager = SpotCheckpointManager(store, 1, args=arguments, local_dir=tmp_path / "local")
    assert manager.load_latest(model, optimizer, None) == (0, 0)

    def step(number: int, harm: Callable[[], Any] = lambda: None) -> None:
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        with torch.no_grad():
            harm()
        manager.save(model, optimizer, None, number, 0)

    step(1)
    manager.wait()
    healthy = model.weight.detach().clone()
    if on_nan == "stop":
        with pytest.raises(SpotError, match="step 2 is not saved: not finite"):
            step(2, lambda: model.weight.fill_(math.nan))
        manager.close()
        assert steps(store) == [1]
        return
    step(2, lambda: model.weight.fill_(math.nan))
    with torch.no_grad():
        model.weight.copy_(healthy)
    step(3)
    manager.finish()
    assert [entry.data["step"] for entry in Run(store).events() if entry.kind == "commit"] == [1, 3]


# -- rollback ---------------------------------------------------------------------------------------------------------


class Explodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss * math.nan

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad * math.nan


def exploding(out: Path, callback: SpotCallback, at_step: int) -> Any:
    """A training whose loss is NaN in one step, because of its batch."""
    trainer = make_trainer(out, callback, Patient(callback))
    plain = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        loss = plain(*args, **kwargs)
        return Explodes.apply(loss) if trainer.state.global_step + 1 == at_step and trainer.model.training else loss

    trainer.compute_loss = compute_loss
    return trainer


def passing_over(out: Path, *steps: int) -> Any:
    """The undisturbed training that makes no update in some steps."""
    trainer = make_trainer(out)
    plain = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        return torch.zeros(()) if trainer.state.global_step + 1 in steps else plain(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    return trainer


def test_a_rollback_ends_as_a_training_that_passes_over_the_steps(store: str, tmp_path: Path) -> None:
    with pytest.raises(RolledBack, match="passes over steps 4 to 5") as caught:
        exploding(tmp_path / "out", SpotCallback(store, ROLLBACK), 5).train()
    assert caught.value.exit_code == 1 and steps(store) == [3]
    again = exploding(tmp_path / "out", SpotCallback(store, ROLLBACK), 5)
    again.train()
    twin = passing_over(tmp_path / "twin", 4, 5)
    assert same(weights(again), weights(twin)) and again.state.global_step == STEPS == twin.state.global_step
    assert kinds(store).count("rollback") == 1
    newest = Run(store).find()
    assert newest.details["passed_over"] == [[4, 5]]


def test_a_rolled_back_training_is_interrupted_and_resumed_to_the_same_bits(store: str, tmp_path: Path) -> None:
    with pytest.raises(RolledBack):
        exploding(tmp_path / "out", SpotCallback(store, ROLLBACK), 5).train()
    watching = SpotArguments(notice="signal", on_nan="rollback", keep_checkpoints=1)
    callback = SpotCallback(store, watching)
    interrupted = exploding(tmp_path / "out", callback, 5)
    interrupted.add_callback(Recorder(4, preempt(callback)))
    with pytest.raises(TrainingPreempted):
        interrupted.train()
    assert Run(store).find().step == 4
    last = exploding(tmp_path / "elsewhere", SpotCallback(store, STOP), 5)
    last.train()
    assert same(weights(last), weights(passing_over(tmp_path / "twin", 4, 5)))


def test_rollbacks_end_after_some(store: str, tmp_path: Path) -> None:
    arguments = SpotArguments(notice="none", on_nan="rollback", max_rollbacks=1)

    def train() -> None:
        poisoned(tmp_path / "out", SpotCallback(store, arguments), 6, "weight").train()

    with pytest.raises(RolledBack, match="passes over steps 5 to 6"):
        train()
    with pytest.raises(SpotError, match="not rolled back: it was rolled back 1 times") as caught:
        train()
    assert caught.value.exit_code == 2 and steps(store) == [3]


def test_a_loop_of_ones_own_is_not_rolled_back(store: str) -> None:
    manager = SpotCheckpointManager(store, args=ROLLBACK)
    with pytest.raises(SpotError, match="is for Trainer"):
        manager.load_latest(nn.Linear(1, 1))
    manager.close()
