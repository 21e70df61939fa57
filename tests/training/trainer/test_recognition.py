"""Trainings of one run: each meets its own checkpoints, whatever the script trains before it or leaves out."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from hf_spot import ConfigError, Run, SpotArguments, SpotCallback, TrainingPreempted
from hf_spot.policy.trainings import differences
from hf_spot.training.session import recognition
from hf_spot.training.trainer.description import describe
from tests.training.conftest import Patient, Recorder, make_trainer, same, weights
from tests.training.test_callback import QUIET, preempt

ROWS = torch.randint(64, (36, 16), generator=torch.Generator().manual_seed(1))
Member = dict[str, Any]


def fold(number: int, **more: Any) -> Member:
    rows = [{"input_ids": row, "labels": row} for at, row in enumerate(ROWS) if at % 3 != number]
    return {"name": f"fold-{number}", "train_dataset": lambda: rows, **more}


def swept(value: float) -> Member:
    return {"name": f"rate-{value}", "learning_rate": value}


def seeded(seed: int) -> Member:
    def model() -> GPT2LMHeadModel:
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2))

    return {"name": f"member-{seed}", "model": model}


class Weighted(Trainer):
    """Scales the loss by a number of its own."""

    alpha = 1.0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * self.alpha


def weighted(alpha: float) -> Member:
    return {"name": f"alpha-{alpha}", "alpha": alpha}


Folder = Callable[[Path, str], Path]


def one_folder(root: Path, name: str) -> Path:
    return root / "out"


def own_folders(root: Path, name: str) -> Path:
    return root / name


def run_script(
    members: Sequence[Member],
    root: Path,
    folder: Folder,
    models: dict[str, Any],
    store: str | None = None,
    *,
    stop_in: str = "",
) -> None:
    """What such scripts do: train one member after another, and leave out those whose model is there."""
    recognition.forget_finished()  # as in a new process
    for member in members:
        settings = dict(member)
        name, alpha = settings.pop("name"), settings.pop("alpha", None)
        if name in models:
            continue
        callbacks: list[Any] = []
        if store is not None:
            callback = SpotCallback(store, SpotArguments(notice="signal" if name == stop_in else "none"))
            callbacks = [callback, Patient(callback)]
            if name == stop_in:
                callbacks.append(Recorder(5, preempt(callback)))
        trainer = make_trainer(folder(root, name), *callbacks, **settings)
        if alpha is not None:
            trainer.__class__ = Weighted
            trainer.alpha = alpha
        trainer.train()
        models[name] = weights(trainer)


FAMILIES: dict[str, list[Member]] = {
    "folds": [fold(0), fold(1), fold(2)],
    "a sweep of rates": [swept(1e-2), swept(2e-2), swept(3e-2)],
    "an ensemble": [seeded(1), seeded(2), seeded(3)],
    "a number of the script's own": [weighted(1.0), weighted(2.0), weighted(3.0)],
}


@pytest.fixture(scope="module")
def undisturbed_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Folder], dict[str, Any]]:
    """The models of a family that nobody disturbs, trained once for all that are compared with them."""

    @functools.cache
    def of(family: str, folder: Folder) -> dict[str, Any]:
        models: dict[str, Any] = {}
        run_script(FAMILIES[family], tmp_path_factory.mktemp("undisturbed"), folder, models)
        return models

    return of


@pytest.mark.parametrize("folder", [one_folder, own_folders], ids=["one folder", "folders of their own"])
@pytest.mark.parametrize("skips", [True, False], ids=["skips what is trained", "skips nothing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_training_meets_its_own_checkpoints(
    family: str,
    skips: bool,
    folder: Folder,
    store: str,
    tmp_path: Path,
    undisturbed_family: Callable[[str, Folder], dict[str, Any]],
) -> None:
    members, undisturbed = FAMILIES[family], undisturbed_family(family, folder)
    models: dict[str, Any] = {}
    second = members[1]["name"]
    with pytest.raises(TrainingPreempted):
        run_script(members, tmp_path / "one", folder, models, store, stop_in=second)
    assert models.keys() == {members[0]["name"]}
    if not skips:
        models = {}
    run_script(members, tmp_path / "one", folder, models, store)
    assert models.keys() == undisturbed.keys()
    for name in models:
        assert same(models[name], undisturbed[name]), name
    assert [one.training for one in Run(store).state().trainings] == [1, 2, 3]


def test_a_member_that_had_not_saved_yet_starts_from_its_own_beginning(store: str, tmp_path: Path) -> None:
    members = FAMILIES["folds"]
    undisturbed: dict[str, Any] = {}
    run_script(members, tmp_path / "peace", one_folder, undisturbed)
    models: dict[str, Any] = {}
    run_script(members[:1], tmp_path / "one", one_folder, models, store)
    run_script(members, tmp_path / "one", one_folder, models, store)
    assert all(same(models[name], undisturbed[name]) for name in undisturbed)


def test_data_that_can_not_be_looked_at_are_named_and_trained_on(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Key:
        def __repr__(self) -> str:
            raise RuntimeError("nobody prints me")

    class Odd(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.cache = {Key(): 1, Key(): 2}

        def __len__(self) -> int:
            return 12

        def __getitem__(self, at: int) -> Any:
            return {"input_ids": ROWS[at], "labels": ROWS[at]}

    interrupted(store, tmp_path, train_dataset=Odd)
    recorder = Recorder()
    with caplog.at_level(logging.INFO, logger="hf_spot"):
        make_trainer(tmp_path, SpotCallback(store, QUIET), recorder, train_dataset=Odd).train()
    assert "the training data can't tell this training from others: RuntimeError: nobody prints me" in caplog.text
    assert min(recorder.losses) == 6


# -- changes between launches -----------------------------------------------------------------------------------------


def other_dropout() -> GPT2LMHeadModel:
    """Return the model of `make_trainer` with another dropout, which changes none of its parameters."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2, attn_pdrop=0.3))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_a_change_of_an_adapter_is_one(tmp_path: Path) -> None:
    def adapted(alpha: int) -> Any:
        settings = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["c_attn"], fan_in_fan_out=True)
        return peft.get_peft_model(other_dropout(), settings)

    one, other = (describe(make_trainer(tmp_path, model=lambda a=a: adapted(a)), tmp_path) for a in (4, 8))  # type: ignore[misc]
    assert differences(one, other) == ("model.default.lora_alpha",)


def interrupted(store: str, folder: Path, **settings: Any) -> None:
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    with pytest.raises(TrainingPreempted):
        make_trainer(folder, callback, Patient(callback), Recorder(5, preempt(callback)), **settings).train()
    recognition.forget_finished()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"learning_rate": 0.5}, "learning_rate was 0.01 and is 0.5: the old value stays"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type was linear and is cosine: the new schedule holds from step 6 on"),
        ({"seed": 7}, "seed was 42 and is 7: the rest of the data comes in another order"),
        ({"max_steps": 9}, "max_steps was -1 and is 9: the schedule from step 6 on is the one for the new length"),
        ({"num_train_epochs": 2}, "num_train_epochs was 1 and is 2: the schedule from step 6 on"),
        ({"weight_decay": 0.1}, "weight_decay was 0.0 and is 0.1: the old value stays"),
        ({"max_grad_norm": 0.5}, "max_grad_norm was 1.0 and is 0.5: the new value holds from step 6 on"),
        ({"model": other_dropout}, "model.attn_pdrop was 0.1 and is 0.3: the new value holds from step 6 on"),
        (fold(0) | {"name": None}, "the training data had 24 rows and have 24"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_change_is_told_with_what_follows_before_the_first_step(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, changed: dict[str, Any], told: str
) -> None:
    changed = {key: value for key, value in changed.items() if key != "name"}
    if "train_dataset" in changed:
        told = "the training data have changed: the data order is that of the new data"
    interrupted(store, tmp_path)
    with caplog.at_level(logging.WARNING, logger="hf_spot"):
        make_trainer(tmp_path, SpotCallback(store, QUIET), **changed).train()
    assert f"since step 5 was saved, {told}" in caplog.text
    caplog.clear()
    recognition.forget_finished()
    with caplog.at_level(logging.WARNING, logger="hf_spot"):
        make_trainer(tmp_path, SpotCallback(store, QUIET), **changed).train()
    assert "since step" not in caplog.text  # the newest commit was made with the change


def test_the_old_rate_and_the_new_schedule_are_what_training_goes_on_with(store: str, tmp_path: Path) -> None:
    """What is told is true: see hf_spot/policy/changes.py."""
    interrupted(store, tmp_path, warmup_steps=0)
    seen = {}

    class Rates(Recorder):
        def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
            if "learning_rate" in logs:
                seen[state.global_step] = logs["learning_rate"]

    changed = {"warmup_steps": 0, "learning_rate": 0.5, "lr_scheduler_type": "constant", "weight_decay": 0.3}
    trainer = make_trainer(tmp_path, SpotCallback(store, QUIET), Rates(), **changed)
    trainer.train()
    assert {rate for step, rate in seen.items() if step > 6} == {0.01}
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0}  # type: ignore[union-attr]


def test_a_change_can_end_the_training_before_its_first_step(store: str, tmp_path: Path) -> None:
    interrupted(store, tmp_path)
    recorder = Recorder()
    stops = SpotCallback(store, SpotArguments(notice="none", on_change="stop"))
    with pytest.raises(
        ConfigError, match=r"since step 5 was saved, this has changed: learning_rate was 0\.01 and is 0\.02"
    ) as caught:
        make_trainer(tmp_path, stops, recorder, learning_rate=2e-2).train()
    assert caught.value.hint.startswith("--on-change go-on")
    assert recorder.losses == {}
    make_trainer(tmp_path, stops, recorder).train()
    assert min(recorder.losses) == 6


@pytest.mark.parametrize("how", ["max_steps", "num_train_epochs"])
def test_a_finished_training_that_has_become_longer_goes_on_as_trainer_itself_would(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    first, longer = ({"max_steps": 6}, {"max_steps": 10}) if how == "max_steps" else ({}, {"num_train_epochs": 2})
    plain = make_trainer(tmp_path / "plain", **first)
    plain.train()
    last = plain.state.global_step
    plain = make_trainer(tmp_path / "plain", **longer)
    plain.train(resume_from_checkpoint=str(tmp_path / "plain" / f"checkpoint-{last}"))
    make_trainer(tmp_path / "one", SpotCallback(store, QUIET), **first).train()
    recognition.forget_finished()
    recorder = Recorder()
    trainer = make_trainer(tmp_path / "one", SpotCallback(store, QUIET), recorder, **longer)
    with caplog.at_level(logging.WARNING, logger="hf_spot"):
        trainer.train()
    assert f"since step {last} was saved, {how} was" in caplog.text
    assert min(recorder.losses) == last + 1
    assert same(weights(trainer), weights(plain))
    assert Run(store).state().ended == "finished"
    recognition.forget_finished()
    shorter = make_trainer(tmp_path / "two", SpotCallback(store, QUIET), recorder, **first)
    assert shorter.train().global_step == trainer.state.global_step  # what is trained stays trained


def test_a_length_that_can_not_be_compared_is_refused(store: str, tmp_path: Path) -> None:
    make_trainer(tmp_path / "one", SpotCallback(store, QUIET), max_steps=6).train()
    recognition.forget_finished()
    with pytest.raises(ConfigError, match="num_train_epochs has replaced max_steps"):
        make_trainer(tmp_path / "one", SpotCallback(store, QUIET)).train()


def test_a_changed_number_of_the_script_holds_and_is_no_mismatch(store: str, tmp_path: Path) -> None:
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    first = make_trainer(tmp_path, callback, Patient(callback), Recorder(5, preempt(callback)))
    first.__class__, first.alpha = Weighted, 1.0
    with pytest.raises(TrainingPreempted):
        first.train()
    recognition.forget_finished()
    second = make_trainer(tmp_path, SpotCallback(store, QUIET), recorder := Recorder())
    second.__class__, second.alpha = Weighted, 2.0
    second.train()
    assert second.alpha == 2.0
    assert min(recorder.losses) == 6
    assert recorder.losses[6] > 6.0  # about twice ln 64


def test_whoever_moves_and_changes_a_training_is_told_that_it_counts_as_another(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(store, tmp_path / "one")
    recorder = Recorder()
    with caplog.at_level(logging.WARNING, logger="hf_spot"):
        make_trainer(tmp_path / "two", SpotCallback(store, QUIET), recorder, learning_rate=2e-2).train()
    assert min(recorder.losses) == 1
    assert (
        "another training than number 1 of this run, which is at step 5: they differ in output_dir, learning_rate"
        in caplog.text
    )
    assert "restore the old output_dir" in caplog.text


def test_an_older_run_without_descriptions_is_resumed(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As hf_spot before this wrote it: no entry describes a training, and no commit names one."""
    with monkeypatch.context() as old:
        old.setattr("hf_spot.run.run.Run.describe_training", lambda self, number, description: recognition_ref(number or 1))
        interrupted(store, tmp_path)
    assert Run(store).state().trainings == ()
    recorder = Recorder()
    make_trainer(tmp_path, SpotCallback(store, QUIET), recorder, learning_rate=2e-2).train()
    assert min(recorder.losses) == 6
    assert [one.training for one in Run(store).state().trainings] == [1]


def recognition_ref(number: int) -> Any:
    from hf_spot.run.journal import TrainingRef

    return TrainingRef(number, 0, 1)
