"""Every resume is compared with what was saved: a repair that no longer works is named before the first step."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_spot import ConfigError, Run, SpotArguments, SpotCallback, TrainingPreempted
from hf_spot.training.data import rng
from hf_spot.training.state.carried import CarriedState
from hf_spot.training.state.data_side import DataSide
from hf_spot.training.state.proof import digest_of
from hf_spot.training.trainer.random_states import RandomStates
from tests.training.conftest import Patient, Recorder
from tests.training.test_callback import preempt
from tests.training.trainer.test_own_state import STEPS, Average, Noisy, Rows, make, weights

ALL = {"weights", "optimizer", "scheduler", "counters", "random states", "next batch"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.arange(5000.0), np.where(np.arange(5000) == 2500, 0.5, np.arange(5000.0))),
        (np.array([1 / 3]), np.array([np.nextafter(1 / 3, 1)])),
        (np.array([["a"], [{1: np.zeros(2000)}]], object), np.array([["a"], [{1: np.eye(1, 2000, 1000)}]], object)),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (np.zeros(2, np.float32), np.zeros(2, np.int32)),
        (np.arange(6)[::2], np.arange(6)[1::2]),
        ([1, 2, 3], [1, 2, True + 3]),
        ([1, 1], [True, 1]),
        ((1, 23), (12, 3)),
    ],
)
def test_a_digest_is_of_all_that_a_value_holds(one: Any, other: Any) -> None:
    assert digest_of(one) != digest_of(other)
    with np.printoptions(threshold=3, precision=2):
        assert digest_of({"x": one}) == digest_of({"x": copy.deepcopy(one)})
        shown = digest_of(one)
    assert shown == digest_of(one)


def interrupted(store: str, out: Path, at_step: int, **settings: Any) -> None:
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    trainer = make(out, **settings)
    for one in (callback, Patient(callback), Recorder(at_step, preempt(callback))):
        trainer.add_callback(one)
    with pytest.raises(TrainingPreempted):
        trainer.train()


def resumed(store: str, out: Path, on_mismatch: str = "stop", **settings: Any) -> Trainer:
    callback = SpotCallback(store, SpotArguments(notice="none", on_mismatch=on_mismatch))
    trainer = make(out, **settings)
    for one in (callback, Patient(callback)):
        trainer.add_callback(one)
    trainer.train()
    return trainer


def proven(store: str) -> list[Any]:
    return [entry.data for entry in Run(store).events() if entry.kind == "resumed"]


@pytest.mark.parametrize(("at_step", "parts"), [(5, ALL), (6, ALL - {"next batch"})], ids=["in an epoch", "between epochs"])
def test_what_is_as_it_was_saved_stands_in_the_journal(store: str, tmp_path: Path, at_step: int, parts: set[str]) -> None:
    interrupted(store, tmp_path / "one", at_step)
    resumed(store, tmp_path / "two")
    (proof,) = proven(store)
    assert (proof["step"], set(proof["verified"])) == (at_step, parts)
    assert set(Run(store).checkpoints()[0].details["fingerprint"]) >= parts - {"weights", "optimizer"}


def off(patch: pytest.MonkeyPatch, owner: Any, name: str, result: Any = None) -> None:
    patch.setattr(owner, name, lambda *args, **kwargs: result)


def no_weights(patch: pytest.MonkeyPatch) -> None:
    off(patch, Trainer, "_load_from_checkpoint")


def one_weight(patch: pytest.MonkeyPatch) -> None:
    plain = Trainer._load_from_checkpoint

    def load(self: Trainer, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        with torch.no_grad():
            self.model.transformer.ln_f.bias[3] += 1e-7  # type: ignore[union-attr]

    patch.setattr(Trainer, "_load_from_checkpoint", load)


def no_optimizer(patch: pytest.MonkeyPatch) -> None:
    off(patch, Trainer, "_load_optimizer_and_scheduler")


def no_random_states(patch: pytest.MonkeyPatch) -> None:
    off(patch, RandomStates, "_return_to_checkpoint")


def no_python(patch: pytest.MonkeyPatch) -> None:
    off(patch, rng.random, "setstate")


def no_start_of_epoch(patch: pytest.MonkeyPatch) -> None:
    off(patch, RandomStates, "_load_start_of_epoch")


def no_data_side(patch: pytest.MonkeyPatch) -> None:
    off(patch, DataSide, "restore")


def no_own_state(patch: pytest.MonkeyPatch) -> None:
    plain = CarriedState.restore

    def restore(self: CarriedState, checkpoint: Path, **more: Any) -> list[str]:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr("hf_spot.training.state.carried._put", lambda *args: True)
            return plain(self, checkpoint, **more)

    patch.setattr(CarriedState, "restore", restore)


def no_callback_states(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("hf_spot.training.callback.carry_callback_states", lambda trainer: None)


def no_step(patch: pytest.MonkeyPatch) -> None:
    plain = Trainer._init_training_state

    def init(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, *args, **kwargs)
        self.state.num_input_tokens_seen = 5
        return found

    patch.setattr(Trainer, "_init_training_state", init)


class Draws(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        random.random()


def early() -> Any:
    stopping = EarlyStoppingCallback(9)
    stopping.early_stopping_patience_counter = 2
    return stopping


EVALUATED = {"eval_strategy": "steps", "eval_steps": 100, "metric_for_best_model": "loss", "eval_dataset": Rows()}

REPAIRS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], dict[str, Callable[[], Any]], int, str]] = {
    "weights": (no_weights, {}, 5, r"weights: transformer\.\S+ was \(.*\) \w+, is "),
    "one bit of a weight": (one_weight, {}, 5, r"weights: transformer.ln_f.bias was"),
    "optimizer": (no_optimizer, {}, 5, "optimizer: .*; scheduler: |scheduler: last_epoch was 5, is 0"),
    "random states": (no_random_states, {}, 6, "random states: never restored"),
    "Python's random state": (no_python, {"callbacks": lambda: [Draws()]}, 5, "random states: python was"),
    "the order of the epoch": (
        no_start_of_epoch,
        {"accelerator_config": lambda: {"use_seedable_sampler": False}},
        9,
        "next batch: indices was",
    ),
    "generators of the data": (
        no_data_side,
        {"data": lambda: Noisy(torch.Generator().manual_seed(3))},
        5,
        "random states: data.Noisy.generator was",
    ),
    "an average": (no_own_state, {"callbacks": lambda: [Average()]}, 5, r"state of the script: callbacks.Average.of was"),
    "callbacks": (no_callback_states, {}, 5, "callbacks: EarlyStoppingCallback"),
    "a counter": (no_step, {}, 5, "counters: num_input_tokens_seen was 0, is 5"),
}


@pytest.mark.parametrize("repair", REPAIRS)
def test_a_repair_that_does_not_work_is_named_before_the_first_step(
    store: str, tmp_path: Path, repair: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    switch_off, given, at_step, told = REPAIRS[repair]

    def settings() -> dict[str, Any]:
        return {name: give() for name, give in given.items()}

    def with_patience() -> dict[str, Any]:
        return {"callbacks": [early()], **EVALUATED}

    interrupted(store, tmp_path / "one", at_step, **(with_patience() if repair == "callbacks" else settings()))
    switch_off(monkeypatch)
    again = {"callbacks": [EarlyStoppingCallback(9)], **EVALUATED} if repair == "callbacks" else settings()
    with pytest.raises(ConfigError, match=told) as caught:
        resumed(store, tmp_path / "two", **again)
    assert (caught.value.exit_code, "--on-mismatch warn" in str(caught.value.hint)) == (2, True)
    assert [ref.step for ref in Run(store).state().checkpoints][-1] == at_step, "nothing was trained, and nothing saved"
    assert proven(store) == []


def test_the_training_goes_on_if_it_is_told_to(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(store, tmp_path / "one", 5)
    no_optimizer(monkeypatch)
    assert resumed(store, tmp_path / "two", on_mismatch="warn").state.global_step == STEPS
    assert "the resumed training differs from what was saved; training goes on: scheduler: " in caplog.text
    (proof,) = proven(store)
    assert {"optimizer", "scheduler"}.isdisjoint(proof["verified"])


def test_a_checkpoint_of_an_earlier_version_can_not_be_compared_and_is_resumed(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    peace = make(tmp_path / "peace")
    peace.train()
    with monkeypatch.context() as patch:
        patch.setattr("hf_spot.training.trainer.proof.Proof.save", lambda self, checkpoint, write: None)
        interrupted(store, tmp_path / "one", 5)
    trainer = resumed(store, tmp_path / "two")
    assert "was saved by an earlier hf_spot" in caplog.text
    wanted, ended = weights(peace), weights(trainer)
    assert [name for name in wanted if not torch.equal(wanted[name], ended[name])] == []
