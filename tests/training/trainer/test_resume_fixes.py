"""Repairs of what Trainer and accelerate do otherwise at a resume, where they do, and where they have mended it themselves."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer
from accelerate import Accelerator
from accelerate.data_loader import (
    BatchSamplerShard,
    DataLoaderDispatcher,
    DataLoaderShard,
    SkipBatchSampler,
    skip_first_batches,
)
from torch.utils.data import BatchSampler, IterableDataset, SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_spot import SpotCallback
from hf_spot.errors import ConfigError
from hf_spot.policy.passes import Place
from hf_spot.policy.resize import Batches
from hf_spot.training.data.evaluation_workers import EvaluationWorkers
from hf_spot.training.session.recognition import forget_finished
from hf_spot.training.trainer.resume_fixes import (
    batches_skipped,
    carry_callback_states,
    carry_counters,
    reaches_through_skips,
    set_epoch,
)
from hf_spot.training.trainer.streams import resumed_in_its_pass
from tests.training.conftest import make_trainer, same, weights
from tests.training.test_callback import QUIET, train_until_preempted
from tests.training.trainer.test_exactness import mask

# -- batches that rank 0 hands out ----------------------------------------------------------------------------------------


@pytest.fixture
def dispatcher() -> DataLoaderDispatcher:
    """Twelve batches of the sampler, for two ranks."""
    Accelerator(cpu=True)
    loader = DataLoaderDispatcher(range(12), batch_sampler=BatchSampler(SequentialSampler(range(12)), 1, False))
    loader.state = SimpleNamespace(num_processes=2, process_index=0)
    return loader


def as_it_is(dataloader: Any, num_batches: int = 0) -> Any:
    return skip_first_batches(dataloader, num_batches)


def skips_for_all_ranks(dataloader: Any, num_batches: int = 0) -> Any:
    return skip_first_batches(dataloader, 2 * num_batches)


def skips_what_is_handed_out(dataloader: Any, num_batches: int = 0) -> Any:
    skipping = skip_first_batches(dataloader, 0)
    skipping.skip_batches = num_batches
    return skipping


def skips_one_too_few(dataloader: Any, num_batches: int = 0) -> Any:
    return skip_first_batches(dataloader, 2 * num_batches - 1)


@pytest.mark.parametrize(
    ("skip", "of_sampler", "of_loader"), [(as_it_is, 6, 0), (skips_for_all_ranks, 6, 0), (skips_what_is_handed_out, 0, 3)]
)
def test_three_batches_of_two_ranks_are_passed_over_once(
    dispatcher: Any, monkeypatch: pytest.MonkeyPatch, skip: Any, of_sampler: int, of_loader: int
) -> None:
    monkeypatch.setattr(transformers.trainer, "skip_first_batches", skip)
    with batches_skipped():
        skipping = transformers.trainer.skip_first_batches(dispatcher, 3)
    assert len(skipping.batch_sampler) == 12 - of_sampler
    assert skipping.skip_batches == of_loader
    assert transformers.trainer.skip_first_batches is skip


def test_an_accelerate_that_skips_otherwise_is_refused(dispatcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.trainer, "skip_first_batches", skips_one_too_few)
    with (
        batches_skipped(),
        pytest.raises(ConfigError, match="skips 5 batches, but 6 were trained") as refused,
    ):
        transformers.trainer.skip_first_batches(dispatcher, 3)
    assert refused.value.hint == 'pip install "accelerate==1.15.0"'


def test_a_batch_that_is_split_is_passed_over_as_one(dispatcher: Any) -> None:
    dispatcher.split_batches = True
    with batches_skipped():
        assert len(transformers.trainer.skip_first_batches(dispatcher, 3).batch_sampler) == 9


# -- the epoch, through the sampler that skips ----------------------------------------------------------------------------


class Told(BatchSampler):
    """Notes the epochs that it is told."""

    def __init__(self) -> None:
        super().__init__(SequentialSampler(range(4)), 1, False)
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


@pytest.fixture(params=["plain", "for ranks", "dispatched"])
def loader(request: pytest.FixtureRequest) -> Any:
    Accelerator(cpu=True)
    if request.param == "dispatched":
        return DataLoaderDispatcher(range(4), batch_sampler=Told())
    sampler = Told() if request.param == "plain" else BatchSamplerShard(Told(), num_processes=1, process_index=0)
    return DataLoaderShard(range(4), batch_sampler=sampler)


def epochs_told(loader: Any) -> list[int]:
    sampler = loader.batch_sampler
    return (sampler if isinstance(sampler, Told) else sampler.batch_sampler).epochs


def test_samplers_are_told_the_epoch_that_accelerate_does_not_tell_through_a_skip(loader: Any) -> None:
    assert not reaches_through_skips(loader)
    set_epoch(loader, 3)
    assert 3 in epochs_told(loader) or isinstance(loader, DataLoaderDispatcher)


def test_samplers_are_not_told_twice_by_an_accelerate_that_tells_them(loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(self: Any, epoch: int) -> None:
        """Each sampler inside."""
        for one in (getattr(self, "batch_sampler", None), getattr(self, "sampler", None)):
            if one is not None:
                tell(one, epoch)
                if isinstance(one, Told) or type(one).__name__.startswith("_Recording"):
                    one.set_epoch(epoch)

    monkeypatch.setattr(SkipBatchSampler, "set_epoch", tell, raising=False)
    monkeypatch.setattr(DataLoaderDispatcher, "set_epoch", tell)
    assert reaches_through_skips(loader)
    set_epoch(loader, 3)
    assert epochs_told(loader) == []


def test_other_loaders_are_told() -> None:
    told = Told()
    set_epoch(SimpleNamespace(batch_sampler=SimpleNamespace(batch_sampler=told)), 2)
    set_epoch(told, 3)
    set_epoch(SimpleNamespace(), 4)
    assert told.epochs == [2, 3]


# -- what callbacks and trainers know -------------------------------------------------------------------------------------


class Knowing(TrainerCallback, ExportableState):
    """Knows a number, and how often it was told one."""

    def __init__(self, number: int) -> None:
        self.told = 0
        self.number = number

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "number":
            self.told += 1
        super().__setattr__(name, value)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"number": self.number}}


@pytest.mark.parametrize(("number", "told"), [(0, 1), (7, 0)], ids=["it has forgotten", "Trainer has told it"])
def test_a_callback_is_told_what_it_does_not_know(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, number: int, told: int
) -> None:
    caplog.set_level(logging.INFO, logger="hf_spot")
    callback = Knowing(number)
    trainer = make_trainer(tmp_path, callback)
    trainer.state.stateful_callbacks = {"Knowing": {"args": {}, "attributes": {"number": 7}}}
    carry_callback_states(trainer)
    assert (callback.number, callback.told) == (7, 1 + told)
    assert len([record for record in caplog.records if "restored the state of" in record.getMessage()]) == told


def test_a_counter_is_carried_to_trainers_that_have_it(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    carry_counters(trainer, {"_total_train_tokens": 5})
    assert not hasattr(trainer, "_total_train_tokens")
    trainer._total_train_tokens = 0
    carry_counters(trainer, {})
    assert trainer._total_train_tokens == 0
    carry_counters(trainer, {"_total_train_tokens": 5})
    assert trainer._total_train_tokens == 5


# -- streams --------------------------------------------------------------------------------------------------------------


class Endless(IterableDataset):
    """Has no length."""

    def __iter__(self) -> Iterator[int]:
        return count()


@pytest.mark.parametrize("theirs", [(0, 20), (1, 4)], ids=["Trainer takes all for one pass", "Trainer has mended it"])
def test_a_stream_is_resumed_in_its_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: tuple[int, int]) -> None:
    assert _resumed_at(tmp_path, monkeypatch, theirs) == (1, 4)


def test_a_trainer_that_resumes_a_stream_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="batch 5 of pass 1; it was interrupted at batch 4 of pass 1"):
        _resumed_at(tmp_path, monkeypatch, (1, 5))


def _resumed_at(folder: Path, monkeypatch: pytest.MonkeyPatch, theirs: tuple[int, int]) -> tuple[int, int]:
    monkeypatch.setattr(Trainer, "_init_training_state", lambda self, *args: theirs)
    trainer = make_trainer(folder, train_dataset=Endless, max_steps=16)
    trainer.state.global_step = 20
    batches = Batches(2, 1, 1)
    place = Place(1, is_in_middle=True, is_repeated=True)
    with resumed_in_its_pass(trainer, {"epoch_of_data": 1.25, "max_steps": 16}, place, batches, batches):
        begin: Callable[..., tuple[int, int]] = trainer._init_training_state
        return begin(16, 16, 1, None, None)


@pytest.mark.parametrize("persistent", [True, False])
def test_evaluations_whose_workers_an_uninterrupted_run_keeps_are_named(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, persistent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EvaluationWorkers, "save", lambda self, path: None)  # as an earlier hf_spot
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "dataloader_num_workers": 1}
    settings["dataloader_persistent_workers"] = persistent
    train_until_preempted(store, tmp_path / "one", 5, **settings)
    assert "evaluations begin with new DataLoader workers" not in caplog.text
    make_trainer(tmp_path / "two", SpotCallback(store, QUIET), **settings).train()
    assert ("evaluations begin with new DataLoader workers" in caplog.text) is persistent


def test_evaluations_go_on_with_what_their_workers_had_reached(store: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 3, "dataloader_num_workers": 2, "data_collator": mask}
    settings |= {"dataloader_persistent_workers": True, "per_device_eval_batch_size": 2}
    alone = make_trainer(tmp_path / "alone", **settings)
    alone.train()
    wanted = [evaluations(alone), alone.evaluate()["eval_loss"], weights(alone), float(torch.rand(()))]
    train_until_preempted(store, tmp_path / "one", 7, **settings)
    make_trainer(tmp_path / "two", SpotCallback(store, QUIET), **settings).train()
    forget_finished()  # the next process finds the training finished, and evaluates it as the script says
    trainer = make_trainer(tmp_path / "three", SpotCallback(store, QUIET), **settings)
    trainer.train()
    found = [evaluations(trainer), trainer.evaluate()["eval_loss"], weights(trainer), float(torch.rand(()))]
    assert found[:2] == wanted[:2] and found[3] == wanted[3]
    assert same(found[2], wanted[2])
    assert trainer.evaluation_loop.__func__ is Trainer.evaluation_loop  # nothing of it is left
    for worker in multiprocessing.active_children():  # others would wait until the garbage collector finds their loaders
        worker.terminate()
        worker.join()


def evaluations(trainer: Trainer) -> list[float]:
    return [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
