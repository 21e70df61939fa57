"""A SpotCallback either works, or its trainer is refused by name; what is not made preemptible on purpose is said."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback

from hf_spot import ConfigError, Run, SpotArguments, SpotCallback
from tests.training.conftest import STEPS, Patient, Recorder, make_trainer, same, weights
from tests.training.test_callback import QUIET, kinds
from tests.waiting import PATIENCE_S


class OwnLoop(Trainer):
    """A loop of its own, which tells callbacks what Trainer's tells them."""

    events = True

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.create_optimizer()
        assert self.optimizer is not None
        if self.events:
            self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        for batch in self.get_train_dataloader():
            self.model(**batch).loss.backward()  # type: ignore[misc]
            self.optimizer.step()
            self.state.global_step += 1
        return self.state.global_step


class SilentLoop(OwnLoop):
    """A loop of its own, which tells callbacks nothing."""

    events = False


class OwnTrain(Trainer):
    """Does something before the loop of Trainer."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        return super().train(*args, **kwargs)


def as_kind(kind: type[Trainer], trainer: Trainer) -> Trainer:
    trainer.__class__ = kind
    return trainer


@pytest.mark.parametrize("kind", [OwnLoop, SilentLoop])
def test_a_trainer_whose_loop_is_not_that_of_trainer_is_refused_before_its_first_step(
    store: str, tmp_path: Path, kind: type[Trainer]
) -> None:
    trainer = as_kind(kind, make_trainer(tmp_path, SpotCallback(store, QUIET)))
    before = weights(trainer)
    with pytest.raises(ConfigError, match=rf"{kind.__name__} trains without Trainer.train\(\)") as caught:
        trainer.train()
    assert f"super().train(…) in {kind.__name__}.train()" in str(caught.value.hint)
    assert same(weights(trainer), before)
    assert kinds(store) == []


@pytest.mark.parametrize("kind", [OwnLoop, SilentLoop])
def test_a_trainer_that_nobody_asked_to_protect_is_left_alone(store: str, tmp_path: Path, kind: type[Trainer]) -> None:
    SpotCallback(store, QUIET)
    assert as_kind(kind, make_trainer(tmp_path)).train() == STEPS


def test_a_trainer_that_calls_the_train_of_trainer_works(store: str, tmp_path: Path) -> None:
    callback = SpotCallback(store, QUIET)
    assert as_kind(OwnTrain, make_trainer(tmp_path, callback, Patient(callback))).train().global_step == STEPS
    assert kinds(store)[-1] == "finished"


def test_a_loop_without_a_trainer_is_nobodys_business(store: str, tmp_path: Path) -> None:
    SpotCallback(store, QUIET)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    (weight * 2).backward()
    optimizer.step()
    assert weight.item() == pytest.approx(0.8)


class Within(TrainerCallback):
    """Trains something else in the middle of a training."""

    def __init__(self, train: Any) -> None:
        self._train = train

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == 5:
            self._train()


@pytest.mark.parametrize("shared", [False, True], ids=["of its own", "shared"])
def test_a_training_within_another_is_named_and_touches_nothing_of_it(
    store: str, tmp_path: Path, peace: Any, caplog: pytest.LogCaptureFixture, shared: bool
) -> None:
    callback, recorder = SpotCallback(store, QUIET), Recorder()
    inner_callback = callback if shared else SpotCallback(f"{store}-inner", QUIET)
    found: list[int] = []

    def train_inside() -> None:
        state = torch.get_rng_state()
        inner = make_trainer(tmp_path / "inner", inner_callback)
        found.append(inner.train().global_step)
        assert inner_callback in inner.callback_handler.callbacks
        torch.set_rng_state(state)

    trainer = make_trainer(tmp_path / "outer", callback, Patient(callback), Within(train_inside), recorder)
    trainer.train()
    assert found == [STEPS]
    assert "a training inside another training is not preemptible" in caplog.text
    assert same(weights(trainer), peace[0])
    assert [ref.step for ref in Run(store).state().checkpoints] == [6, 9, 12]
    assert kinds(store)[-1] == "finished"
    if not shared:
        assert kinds(f"{store}-inner") == []


def test_a_hyperparameter_search_is_named_and_not_made_preemptible(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback, recorder = SpotCallback(store, QUIET), Recorder()
    trainer = make_trainer(tmp_path, callback, recorder, eval_strategy="epoch")
    shape = trainer.model.config  # type: ignore[union-attr]
    trainer.model, trainer.model_init = None, lambda: GPT2LMHeadModel(shape)
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)}, n_trials=2, backend="optuna"
    )
    assert best is not None
    assert len(recorder.evaluated) == 2
    assert caplog.text.count("a hyperparameter search is not preemptible") == 2
    assert kinds(store) == []
    assert callback in trainer.callback_handler.callbacks


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_callback_can_be_copied_during_its_training(store: str, tmp_path: Path, again: Any) -> None:
    callback = SpotCallback(store, SpotArguments(notice="none", drain_timeout_s=77.0))
    copies: list[SpotCallback] = []
    trainer = make_trainer(tmp_path, callback, Patient(callback), Within(lambda: copies.append(again(callback))))
    trainer.train()
    (other,) = copies
    assert (other.args, other._store, other._session) == (callback.args, store, None)
    assert other is not callback


def test_under_the_launcher_any_trainer_is_asked_for(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        import transformers.trainer
        from hf_spot.training.callback import install
        install(transformers.trainer)
        sys.path.insert(0, sys.argv[1])
        from tests.training.conftest import make_trainer
        from tests.training.trainer.test_entry import OwnLoop, SilentLoop, as_kind
        for kind in (OwnLoop, SilentLoop):
            try:
                as_kind(kind, make_trainer("out")).train()
            except Exception as error:
                print(type(error).__name__, error)
        """)
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, script, root], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.stdout.count("ConfigError") == 2, done.stderr
