"""What a user reads of an interrupted run is what an undisturbed one tells: log lines, results files, trackers' lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from hf_spot import SpotArguments, SpotCallback, TrainingPreempted
from tests.training.conftest import Patient, Recorder, make_trainer, same, weights
from tests.training.test_callback import QUIET, preempt

# Seconds of this machine, and what is divided by them: no two runs have the same.
MEASURED = ("_runtime", "_per_second")

CASES: dict[str, dict[str, Any]] = {
    "five steps a line": {"logging_steps": 5},
    "and an accumulation": {"logging_steps": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 2},
    "more steps than the run has": {"logging_steps": 50},
    "the first step": {"logging_steps": 4, "logging_first_step": True},
    "a share of the steps": {"logging_steps": 0.3},
    "epochs": {
        "logging_strategy": "epoch",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "logging_first_step": True,
    },
    "epochs that end within one": {"logging_strategy": "epoch", "max_steps": 9, "per_device_train_batch_size": 4},
    "epochs and their evaluation": {
        "logging_strategy": "epoch",
        "eval_strategy": "epoch",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "reduce_lr_on_plateau",
    },
    "epochs and evaluations within": {
        "logging_strategy": "epoch",
        "eval_strategy": "steps",
        "eval_steps": 3,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
    },
    "evaluated at the start": {"logging_steps": 5, "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 4},
    "evaluated at the start, and the best loaded": {
        "logging_steps": 5,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "load_best_model_at_end": True,
    },
    "two evaluation sets": {
        "logging_steps": 5,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "eval_dataset": lambda data: {"one": data[:4], "two": data[4:8]},
    },
    "a plateau": {
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
    },
    "tokens": {"logging_steps": 5, "include_num_input_tokens_seen": "all"},
    "bf16": {"logging_steps": 5, "bf16": True},
    "no schedule of saves": {"logging_steps": 5, "save_strategy": "no"},
    "the best saved": {
        "logging_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "best",
        "metric_for_best_model": "loss",
    },
}


def make(output_dir: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    split = settings.pop("eval_dataset", None)
    kind = settings.pop("kind", None)
    trainer = make_trainer(output_dir, *callbacks, **settings)
    if split is not None:
        trainer.eval_dataset = split(trainer.train_dataset)
    if kind is not None:
        trainer.__class__ = kind
        trainer.parts = {"train": [], "eval": []}
    return trainer


def told(trainer: Trainer) -> list[dict[str, float]]:
    """All log lines, without what is measured."""
    return [{key: value for key, value in line.items() if not key.endswith(MEASURED)} for line in trainer.state.log_history]


def keys(trainer: Trainer) -> list[set[str]]:
    return [set(line) for line in trainer.state.log_history]


def results(trainer: Trainer, output: TrainOutput) -> dict[str, Any]:
    """The files that transformers' examples write at their end, without what is measured."""
    trainer.log_metrics("train", output.metrics)
    trainer.save_metrics("train", output.metrics)
    trainer.save_state()
    found = {}
    for name in ("train_results.json", "all_results.json", "trainer_state.json"):
        text = Path(trainer.args.output_dir or "", name).read_text()
        content = json.loads(text.replace(str(trainer.args.output_dir), "…"))
        content["log_history"] = None  # see `told`
        found[name] = {key: value for key, value in content.items() if not key.endswith(MEASURED)}
    return found


def interrupted(store: str, tmp_path: Path, *at_steps: int, **settings: Any) -> tuple[Trainer, TrainOutput]:
    """One launch more than notices, each with another folder."""
    for number, at_step in enumerate(at_steps):
        callback = SpotCallback(store, SpotArguments(notice="signal"))
        with pytest.raises(TrainingPreempted):
            make(
                tmp_path / f"launch-{number}", callback, Patient(callback), Recorder(at_step, preempt(callback)), **settings
            ).train()
    callback = SpotCallback(store, QUIET)
    trainer = make(tmp_path / "last", callback, **settings)
    return trainer, trainer.train()


def peaceful(tmp_path: Path, *callbacks: TrainerCallback, **settings: Any) -> tuple[Trainer, TrainOutput]:
    trainer = make(tmp_path / "peace", *callbacks, **settings)
    return trainer, trainer.train()


def assert_equal(one: tuple[Trainer, TrainOutput], other: tuple[Trainer, TrainOutput]) -> None:
    assert told(one[0]) == told(other[0])
    assert keys(one[0]) == keys(other[0])
    assert one[1].training_loss == other[1].training_loss
    assert one[1].metrics.keys() == other[1].metrics.keys()
    assert results(*one) == results(*other)
    assert same(weights(one[0]), weights(other[0]))


@pytest.mark.parametrize("at_steps", [(4,), (3, 6, 7)], ids=["once", "three times"])
@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_tells_what_an_undisturbed_one_tells(
    store: str, tmp_path: Path, case: str, at_steps: tuple[int, ...]
) -> None:
    settings = {"save_steps": 100, **CASES[case]}
    if settings.get("load_best_model_at_end"):
        settings["save_steps"] = settings["eval_steps"]
    undisturbed = peaceful(tmp_path, **settings)
    assert_equal(interrupted(store, tmp_path, *at_steps, **settings), undisturbed)
