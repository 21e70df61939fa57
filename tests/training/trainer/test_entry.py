"""A SpotCallback either works, or its trainer is refused by name; what is not made preemptible on purpose is said."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback

from hf_spot import ConfigError, Run, SpotArguments, SpotCallback, TrainingPreempted
from hf_spot.training.session import recognition
from tests.training.conftest import STEPS, Patient, Recorder, make_trainer, same, weights
from tests.training.test_callback import QUIET, kinds, preempt
from tests.waiting import PATIENCE_S
from tests.zygote import Zygote


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


class Holds(TrainerCallback):
    """Waits at the begin of a training."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.began.set()
        assert self.go_on.wait(PATIENCE_S)


def test_two_trainings_at_once_in_threads_are_named(store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    holds = Holds()
    first = make_trainer(tmp_path / "one", SpotCallback(store, QUIET), holds)
    thread = threading.Thread(target=first.train)
    thread.start()
    try:
        assert holds.began.wait(PATIENCE_S)
        assert "at once in the threads of one process" not in caplog.text
        make_trainer(tmp_path / "two").train()
        assert "at once in the threads of one process" in caplog.text
    finally:
        holds.go_on.set()
        thread.join(PATIENCE_S)


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


class Search:
    """A hyperparameter search of four trials with a pruner, started again and again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.study: Any = None
        self.trained: list[tuple[int, int]] = []  # trial and step

    def run(self, *callbacks: TrainerCallback, stop_in: int = -1, before: int = 0, act: Any = None) -> Any:
        recognition.forget_finished()
        search = self

        class Diary(TrainerCallback):
            per_launch = ("trial",)
            trial = -1

            def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
                self.trial = search.study.trials[-1].number
                if self.trial == stop_in and state.global_step == before - 1:
                    act()

            def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
                search.trained.append((self.trial, state.global_step))

        def space(trial: Any) -> dict[str, Any]:
            search.study = trial.study
            return {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-1, log=True)}

        trainer = make_trainer(self.root, Diary(), *callbacks, eval_strategy="steps", eval_steps=3)
        shape = trainer.model.config  # type: ignore[union-attr]
        trainer.model, trainer.model_init = None, lambda: GPT2LMHeadModel(shape)
        sampler, pruner = optuna.samplers.TPESampler(seed=1), optuna.pruners.MedianPruner(n_startup_trials=1)
        return trainer.hyperparameter_search(space, n_trials=4, backend="optuna", sampler=sampler, pruner=pruner)

    def told(self) -> list[tuple[Any, ...]]:
        return [(one.state.name, one.params, one.values, one.intermediate_values) for one in self.study.trials]


@pytest.mark.parametrize(("stop_in", "step"), [(0, 5), (1, 6), (2, 2), (3, 3)])
def test_a_hyperparameter_search_goes_on_where_it_was(store: str, tmp_path: Path, stop_in: int, step: int) -> None:
    peace = Search(tmp_path / "peace")
    best = peace.run()
    assert {"COMPLETE", "PRUNED"} == {one[0] for one in peace.told()}
    search = Search(tmp_path / "one")
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    with pytest.raises(TrainingPreempted):
        search.run(callback, Patient(callback), stop_in=stop_in, before=step, act=preempt(callback))
    done = len(search.trained)
    again = search.run(SpotCallback(store, QUIET))
    assert search.told() == peace.told()
    assert (again.run_id, again.objective, again.hyperparameters) == (best.run_id, best.objective, best.hyperparameters)
    assert search.trained[:done][-1] == (stop_in, step)
    assert list((tmp_path / "one").glob("run-*/checkpoint-*/random_states/rng_state.pth"))
    assert not list((tmp_path / "one").glob("checkpoint-*")), "each trial writes to a folder of its own"
    pruned = [number for number, one in enumerate(peace.told()) if one[0] == "PRUNED"]
    redone = set(search.trained[:done]) & set(search.trained[done:])
    assert {trial for trial, _ in redone} <= {*pruned}  # a pruned trial may have done steps that it never saved


def test_a_trial_of_another_search_is_named_and_not_made_preemptible(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = SpotCallback(store, QUIET)
    trainer = make_trainer(tmp_path, callback)
    trial = optuna.trial.FixedTrial({"learning_rate": 1e-3})  # without a backend: nobody knows what it sets
    assert trainer.train(trial=trial).global_step == STEPS
    assert "a hyperparameter search is preemptible only with backend='optuna'" in caplog.text
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


def test_under_the_launcher_any_trainer_is_asked_for(tmp_path: Path, zygote: Zygote) -> None:
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
    command, environ = [sys.executable, str(script), str(root)], {**os.environ, "HF_HUB_OFFLINE": "1"}
    with zygote.forking():
        done = subprocess.run(
            command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    assert done.stdout.count("ConfigError") == 2, done.stderr
