"""Trainings that Trainer alone does not resume exactly: each ends with the model of the one that nobody interrupted."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import EarlyStoppingCallback

from hf_spot import SpotArguments, SpotCallback
from tests.training.conftest import Recorder, make_trainer, same, weights
from tests.training.test_callback import QUIET, train_until_preempted


def mask(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """A collator with every kind of chance in it."""
    ids = torch.stack([one["input_ids"] for one in batch])
    hidden = torch.rand(ids.shape) < 0.3
    hidden[0, random.randrange(16)] = hidden[0, numpy.random.randint(16)] = True
    return {"input_ids": ids.masked_fill(hidden, 1), "labels": ids}


CASES: dict[str, dict[str, Any]] = {
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "a sampler without a seed": {"accelerator_config": {"use_seedable_sampler": False}},
    "dispatched batches": {"accelerator_config": {"dispatch_batches": True}},
    "split batches": {"accelerator_config": {"split_batches": True}},
    "in order": {"train_sampling_strategy": "sequential"},
    "accumulation with a remainder": {"gradient_accumulation_steps": 5},
    "a last batch that is dropped": {"per_device_train_batch_size": 5, "dataloader_drop_last": True},
    "another seed for the data": {"data_seed": 5},
    "noise in the embeddings": {"neftune_noise_alpha": 5.0},
    "masked tokens": {"data_collator": mask},
    "masked tokens, accumulated": {"data_collator": mask, "gradient_accumulation_steps": 2},
    "masked tokens in random order": {
        "data_collator": mask,
        "accelerator_config": {"use_seedable_sampler": False},
        "gradient_accumulation_steps": 3,
    },
    "masked tokens and evaluations": {"data_collator": mask, "eval_strategy": "steps", "eval_steps": 1},
    "an epoch's checkpoints": {"save_strategy": "epoch"},
}


@pytest.mark.parametrize("at_step", [2, -1, 1], ids=["in the first epoch", "at its end", "in the second"])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_ends_the_same(store: str, tmp_path: Path, case: str, at_step: int) -> None:
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "save_steps": 100, **CASES[case]}
    in_peace = Recorder()
    undisturbed = make_trainer(tmp_path / "peace", in_peace, **settings)
    undisturbed.train()
    half = max(in_peace.losses) // 2
    first = train_until_preempted(store, tmp_path / "one", at_step if at_step == 2 else half + max(0, at_step), **settings)
    second = Recorder()
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, QUIET), second, **settings)
    trainer.train()
    assert first.losses | second.losses == in_peace.losses
    assert same(weights(trainer), weights(undisturbed))


def test_early_stopping_goes_on_counting(store: str, tmp_path: Path) -> None:
    settings = {
        "num_train_epochs": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 100,
        "save_strategy": "steps",
        "metric_for_best_model": "loss",
        "learning_rate": 0.5,  # it gets worse from the start
    }

    def stopping() -> EarlyStoppingCallback:
        return EarlyStoppingCallback(early_stopping_patience=4)

    undisturbed = make_trainer(tmp_path / "peace", stopping(), **settings)
    stopped_at = undisturbed.train().global_step
    assert stopped_at < undisturbed.state.max_steps

    from hf_spot import TrainingPreempted
    from tests.training.test_callback import preempt

    callback = SpotCallback(store, SpotArguments(notice="signal"))
    with pytest.raises(TrainingPreempted):
        make_trainer(tmp_path / "one", callback, stopping(), Recorder(stopped_at - 3, preempt(callback)), **settings).train()
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, QUIET), stopping(), **settings)
    assert trainer.train().global_step == stopped_at
    assert same(weights(trainer), weights(undisturbed))
