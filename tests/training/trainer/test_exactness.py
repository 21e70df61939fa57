"""Trainings that Trainer alone does not resume exactly: each ends with the model of the one that nobody interrupted."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainerCallback,
)

from hf_spot import Run, SpotArguments, SpotCallback, TrainingPreempted
from hf_spot.training.trainer.accumulation import Accumulation
from hf_spot.training.trainer.trainer_session import TrainerSession
from tests.training.conftest import Recorder, SaveRecorder, Undisturbed, make_trainer, same, weights
from tests.training.test_callback import QUIET, kinds, preempt, train_until_preempted

InPeace = Callable[..., Undisturbed]


def mask(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """A collator with every kind of chance in it."""
    ids = torch.stack([one["input_ids"] for one in batch])
    hidden = torch.rand(ids.shape) < 0.3
    hidden[0, random.randrange(16)] = hidden[0, numpy.random.randint(16)] = True
    return {"input_ids": ids.masked_fill(hidden, 1), "labels": ids}


def experts() -> Qwen3MoeForCausalLM:
    """Its checkpoints name each expert, and the model holds them in one tensor; its hooks get what its loss needs."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    more = {"attention_dropout": 0.1, "output_router_logits": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=64, **more, **sizes, **heads))


def adapted() -> Any:
    """Its checkpoints hold the adapter alone, which Trainer does not look for."""
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    model.add_adapter(peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True))
    return model


class Stream(torch.utils.data.IterableDataset):
    """Ten batches of two, in another order in each pass, and nobody knows how many."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        parts = torch.randint(64, (20, 16), generator=torch.Generator().manual_seed(1))
        order = torch.randperm(20, generator=torch.Generator().manual_seed(self.epoch))
        info = torch.utils.data.get_worker_info()
        for part in parts[order][info.id if info else 0 :: info.num_workers if info else 1]:
            yield {"input_ids": part, "labels": part}


CASES: dict[str, dict[str, Any]] = {
    "a mixture of experts": {"model": experts},
    "an adapter of the model's own": {"model": adapted},
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
    "masked tokens in workers": {"data_collator": mask, "dataloader_num_workers": 2},
    "masked tokens in workers, accumulated": {
        "data_collator": mask,
        "dataloader_num_workers": 2,
        "gradient_accumulation_steps": 2,
        "dataloader_prefetch_factor": 1,
    },
    "masked tokens in workers that persist, and evaluations": {
        "data_collator": mask,
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        "accelerator_config": {"use_seedable_sampler": False},
        "eval_strategy": "steps",
        "eval_steps": 2,
    },
}


@pytest.mark.parametrize("at_step", [2, -1, 1], ids=["in the first epoch", "at its end", "in the second"])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_ends_the_same(store: str, tmp_path: Path, in_peace: InPeace, case: str, at_step: int) -> None:
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "save_steps": 100, **CASES[case]}
    undisturbed = in_peace(f"resumed: {case}", **settings)
    half = max(undisturbed.losses) // 2
    first = train_until_preempted(store, tmp_path / "one", at_step if at_step == 2 else half + max(0, at_step), **settings)
    second = Recorder()
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, QUIET), second, **settings)
    trainer.train()
    assert first.losses | second.losses == undisturbed.losses
    assert same(weights(trainer), undisturbed.weights)


def test_a_trainer_that_loads_in_its_own_way_is_resumed_in_that_way(
    store: str, tmp_path: Path, peace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def load(self: Trainer, checkpoint_path: str) -> None:  # as in sentence-transformers: no model
        loaded.append(checkpoint_path)
        self.model.load_state_dict(load_file(Path(checkpoint_path, "model.safetensors")), strict=False)

    monkeypatch.setattr(Trainer, "_load_from_checkpoint", load)
    train_until_preempted(store, tmp_path / "one", 5)
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, QUIET))
    trainer.train()
    assert loaded == [str(tmp_path / "two" / "checkpoint-5")]
    assert same(weights(trainer), peace[0])


STREAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated over the end of a pass": {"gradient_accumulation_steps": 3},
    "random in workers": {"dataloader_num_workers": 2, "data_collator": mask},
}


@pytest.mark.parametrize("at_step", [3, 5, 6, 13], ids=["first pass", "its end", "second pass", "third pass"])
@pytest.mark.parametrize("case", STREAMS)
def test_a_stream_goes_on_in_its_pass(store: str, tmp_path: Path, in_peace: InPeace, case: str, at_step: int) -> None:
    settings = {
        "max_steps": 16,
        "per_device_train_batch_size": 4,
        "save_steps": 100,
        "train_dataset": Stream,
        **STREAMS[case],
    }
    undisturbed, second = in_peace(f"stream: {case}", **settings), Recorder()
    first = train_until_preempted(store, tmp_path / "one", at_step, **settings)
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, QUIET), second, **settings)
    trainer.train()
    assert first.losses | second.losses == undisturbed.losses
    assert same(weights(trainer), undisturbed.weights)
    assert trainer.state.epoch == undisturbed.epoch


@pytest.mark.parametrize(
    ("draws", "settings"),
    [(True, {"data_collator": mask}), (False, {}), (False, {"data_collator": mask, "dataloader_num_workers": 1})],
    ids=["random", "fixed", "random in a worker"],
)
def test_a_stream_that_can_not_be_exact_is_named(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, draws: bool, settings: dict[str, Any]
) -> None:
    # Four steps and a new pass: what a DataLoader draws at its start is no reason.
    settings = {"max_steps": 9, "per_device_train_batch_size": 8, "train_dataset": Stream, **settings}
    make_trainer(tmp_path / "out", SpotCallback(store, QUIET), **settings).train()
    named = [record.getMessage() for record in caplog.records if "global generators" in record.getMessage()]
    assert len(named) == draws
    assert all("dataloader_num_workers=1" in message for message in named)


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

    callback = SpotCallback(store, SpotArguments(notice="signal"))
    with pytest.raises(TrainingPreempted):
        make_trainer(tmp_path / "one", callback, stopping(), Recorder(stopped_at - 3, preempt(callback)), **settings).train()
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, QUIET), stopping(), **settings)
    assert trainer.train().global_step == stopped_at
    assert same(weights(trainer), weights(undisturbed))


@pytest.mark.parametrize(
    "when", [{"eval_strategy": "steps", "eval_steps": 2}, {"eval_strategy": "epoch"}], ids=["in an epoch", "at its end"]
)
def test_early_stopping_whose_last_evaluation_was_put_off_stops_at_the_same_step(
    store: str, tmp_path: Path, when: dict[str, Any]
) -> None:
    settings = {"num_train_epochs": 9, "save_steps": 100, "metric_for_best_model": "loss", "learning_rate": 0.5, **when}
    undisturbed = make_trainer(tmp_path / "peace", EarlyStoppingCallback(2), **settings)
    stopped_at = undisturbed.train().global_step
    assert stopped_at < undisturbed.state.max_steps
    callback, first, second = SpotCallback(store, SpotArguments(notice="signal")), Recorder(), Recorder()
    stop_there = Recorder(stopped_at, preempt(callback))
    with pytest.raises(TrainingPreempted):
        make_trainer(tmp_path / "one", callback, EarlyStoppingCallback(2), stop_there, first, **settings).train()
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, QUIET), EarlyStoppingCallback(2), second, **settings)
    assert trainer.train().global_step == stopped_at
    assert (second.losses, second.evaluated) == ({}, [stopped_at])
    assert same(weights(trainer), weights(undisturbed))
    assert kinds(store)[-1] == "finished"
    newest = Run(store).latest()
    assert newest is not None
    assert (newest.step, newest.ref.complete) == (stopped_at, True)


class PreemptEvaluation(TrainerCallback):
    """A notice in the middle of the n-th evaluation."""

    per_launch = ("batches",)

    def __init__(self, callback: SpotCallback, number: int) -> None:
        self.act, self.number, self.batches, self.losses = preempt(callback), number, 0, Recorder()

    def on_prediction_step(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.batches += 1
        if self.batches == 2 * self.number - 1:  # two batches each, on CPU
            self.act()


EVALUATIONS: dict[str, dict[str, Any]] = {
    "steps": {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 100},
    "best reloaded": {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 4,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
    },
    "epochs": {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "num_train_epochs": 3},
    "best saved": {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "best", "metric_for_best_model": "loss"},
    "plateau, saved before the evaluation": {
        "eval_strategy": "epoch",
        "save_steps": 12,
        "num_train_epochs": 3,
        "lr_scheduler_type": "reduce_lr_on_plateau",
    },
}


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("case", EVALUATIONS)
def test_a_notice_ends_an_evaluation_and_the_next_launch_makes_up_for_it(
    store: str, tmp_path: Path, in_peace: InPeace, case: str, number: int
) -> None:
    settings = {"per_device_eval_batch_size": 2, **EVALUATIONS[case]}
    undisturbed = in_peace(f"evaluation: {case}", **settings)
    callback, first, second = SpotCallback(store, SpotArguments(notice="signal")), SaveRecorder(), Recorder()
    with pytest.raises(TrainingPreempted) as caught:
        make_trainer(tmp_path / "one", first, PreemptEvaluation(callback, number), callback, **settings).train()
    assert caught.value.step == undisturbed.evaluated[number - 1] == max(first.losses)
    assert first.evaluated == undisturbed.evaluated[: number - 1]
    assert len(set(first.saved)) == len(first.saved)  # a folder that is being uploaded is not written again
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, QUIET), second, **settings)
    trainer.train()
    assert first.losses | second.losses == undisturbed.losses
    assert first.evaluated + second.evaluated == undisturbed.evaluated
    assert same(weights(trainer), undisturbed.weights)
    assert trainer.state.best_metric == undisturbed.best_metric


def test_a_notice_in_an_evaluation_that_is_made_up_for_loses_nothing(store: str, tmp_path: Path, in_peace: InPeace) -> None:
    settings = {"per_device_eval_batch_size": 2, **EVALUATIONS["steps"]}
    undisturbed = in_peace("evaluation: steps", **settings)
    for launch in ("one", "two"):
        callback = SpotCallback(store, SpotArguments(notice="signal"))
        with pytest.raises(TrainingPreempted) as caught:
            make_trainer(tmp_path / launch, PreemptEvaluation(callback, 1), callback, **settings).train()
        assert caught.value.step == 4
    recorder = Recorder()
    trainer = make_trainer(tmp_path / "three", SpotCallback(store, QUIET), recorder, **settings)
    trainer.train()
    assert recorder.evaluated == [4, 8, 12]
    assert same(weights(trainer), undisturbed.weights)


def test_a_notice_that_is_taken_back_while_it_ends_an_evaluation_loses_nothing(
    store: str, tmp_path: Path, in_peace: InPeace, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"per_device_eval_batch_size": 2, **EVALUATIONS["steps"]}
    undisturbed = in_peace("evaluation: steps", **settings)
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    plain = TrainerSession.step_ended

    def step_ended(self: TrainerSession, step: int) -> Any:
        self.run_session.listener.newest = None
        return plain(self, step)

    monkeypatch.setattr(TrainerSession, "step_ended", step_ended)
    with pytest.raises(TrainingPreempted):
        make_trainer(tmp_path / "one", PreemptEvaluation(callback, 1), callback, **settings).train()
    monkeypatch.undo()
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, QUIET), **settings)
    trainer.train()
    assert same(weights(trainer), undisturbed.weights)


def test_what_a_callback_evaluates_by_itself_is_left_alone(store: str, tmp_path: Path) -> None:
    """Perhaps it does so on one rank only: asking the others would wait for ever."""
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    asked = []

    class Own(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            if state.global_step in (4, 5):
                session = callback._session
                assert session is not None
                machine_is_going = session.machine_is_going
                session.machine_is_going = lambda: asked.append(1) or machine_is_going()  # type: ignore[method-assign, func-returns-value]
                trainer.evaluate()
                session.machine_is_going = machine_is_going  # type: ignore[method-assign]

    trainer = make_trainer(tmp_path, callback, Own(), eval_strategy="steps", eval_steps=4)
    trainer.train()
    assert asked == []


class Slow(TrainerCallback):
    """The clock of the accumulation, so slow that a step takes minutes; and a notice after a chosen micro-batch."""

    def __init__(self, callback: SpotCallback, step: int, micro_batch: int) -> None:
        self.act, self.at, self.done, self.now_s = preempt(callback), (step, micro_batch), 0, 0.0

    def clock(self) -> float:
        return self.now_s

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.done = 0

    def on_substep_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.now_s += 20.0
        self.done += 1
        if self.at == (state.global_step + 1, self.done):
            self.act()


class Normed(torch.nn.Module):
    """A model whose forward pass moves buffers and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(64, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.head = torch.nn.Linear(8, 64)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.norm(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
        logits = self.head(torch.nn.functional.dropout(found, 0.2, self.training))
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@pytest.mark.parametrize("step", [1, 3, 4, 5, 6], ids=["first", "middle", "saved before", "first of an epoch", "after it"])
@pytest.mark.parametrize("case", ["plain", "masked tokens", "batch norm", "evaluated"])
def test_a_notice_in_the_middle_of_a_step_does_not_wait_for_its_end(
    store: str, tmp_path: Path, in_peace: InPeace, case: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {
        "plain": {},
        "masked tokens": {"data_collator": mask, "include_num_input_tokens_seen": "all"},
        "batch norm": {"model": Normed},
        "evaluated": {"eval_strategy": "steps", "eval_steps": 1},
    }[case]
    settings = {"num_train_epochs": 2, "gradient_accumulation_steps": 3, "save_steps": 3, **more}
    undisturbed = in_peace(f"middle of a step: {case}", **settings)
    assert undisturbed.max_steps == 8
    callback, first, second = SpotCallback(store, SpotArguments(notice="signal")), SaveRecorder(), Recorder()
    slow = Slow(callback, step, 1)
    monkeypatch.setattr("hf_spot.training.callback.Accumulation", functools.partial(Accumulation, clock=slow.clock))
    with pytest.raises(TrainingPreempted) as caught:
        make_trainer(tmp_path / "one", first, slow, callback, **settings).train()
    assert max(first.losses, default=0) == step - 1
    assert (caught.value.step or 0) == step - 1
    assert len(set(first.saved)) == len(first.saved)
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, QUIET), second, **settings)
    trainer.train()
    assert first.losses | second.losses == undisturbed.losses
    assert first.evaluated + second.evaluated == undisturbed.evaluated
    assert same(weights(trainer), undisturbed.weights)
    assert trainer.state.num_input_tokens_seen == undisturbed.num_input_tokens_seen
