"""A stream of ``datasets`` is resumed where it was, without reading it again; where that is not exact, it is read again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import IterableDataset

from hf_spot import SpotCallback
from tests.training.conftest import Recorder, make_trainer, same, weights
from tests.training.test_callback import QUIET, train_until_preempted
from tests.training.trainer.test_exactness import InPeace

SHARDS, SAMPLES = 4, 24  # in a shard
READ: list[tuple[int, int]] = []  # shard and sample, in the order of reading


def read(shards: list[int]) -> Iterator[dict[str, Any]]:
    """Two samples of three are longer than `keep` wants."""
    for shard in shards:
        for number in range(SAMPLES):
            READ.append((shard, number))
            ids = torch.randint(64, (16,), generator=torch.Generator().manual_seed(shard * 1000 + number)).tolist()
            yield {"input_ids": ids, "labels": ids, "number": number}


def plain() -> IterableDataset:
    return IterableDataset.from_generator(read, gen_kwargs={"shards": list(range(SHARDS))})


def other(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: [[*one[1:], one[0]] for one in batch[name]] for name in ("input_ids", "labels")}


def looked_at(stream: IterableDataset) -> IterableDataset:
    """As a script does, to see what is in it."""
    next(iter(stream))
    return stream


SEEKS: dict[str, Callable[[], IterableDataset]] = {
    "plain": plain,
    "mapped in batches": lambda: plain().map(other, batched=True, batch_size=5),
    "filtered": lambda: plain().filter(lambda one: one["number"] % 3),
    "looked at before": lambda: looked_at(plain()),
    "repeated": lambda: plain().repeat(2),
    "shuffled": lambda: plain().shuffle(seed=3, buffer_size=20),
    "interleaved": lambda: datasets.interleave_datasets([plain(), plain().skip(7)], probabilities=[0.7, 0.3], seed=5),
}
READS_AGAIN: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "no stream of datasets": (lambda: Own(), {}, "Own can't say where it is"),
    "workers that draw": (
        lambda: plain().map(drawn),
        {"dataloader_num_workers": 2},
        "it draws random numbers while its DataLoader workers read it",
    ),
}


class Own(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return read(list(range(SHARDS)))


def drawn(sample: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": [*sample["input_ids"][1:], int(torch.randint(64, ()))]}


PASS = SHARDS * SAMPLES // 4  # steps of a pass of the plain stream


@pytest.fixture(autouse=True)
def _forget() -> None:
    READ.clear()


def settings_of(make: Callable[[], Any], **more: Any) -> dict[str, Any]:
    return {"train_dataset": make, "max_steps": PASS + 12, "per_device_train_batch_size": 4, "save_steps": 100, **more}


def assert_resumes_as_undisturbed(
    store: str, tmp_path: Path, in_peace: InPeace, name: str, at_step: int, settings: dict[str, Any]
) -> int:
    """Interrupt and resume a training; return the number of samples that the second launch has read."""
    undisturbed, second = in_peace(f"seeks: {name}", **settings), Recorder()
    first = train_until_preempted(store, tmp_path / "one", at_step, **settings)
    READ.clear()
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, QUIET), second, **settings)
    trainer.train()
    assert first.losses | second.losses == undisturbed.losses
    assert same(weights(trainer), undisturbed.weights)
    assert trainer.state.epoch == undisturbed.epoch
    return len(READ)


@pytest.mark.parametrize("at_step", [16, PASS + 6], ids=["first pass", "second pass"])
@pytest.mark.parametrize("name", SEEKS)
def test_a_stream_is_resumed_without_reading_it_again(
    store: str, tmp_path: Path, in_peace: InPeace, caplog: pytest.LogCaptureFixture, name: str, at_step: int
) -> None:
    caplog.set_level(logging.INFO, "hf_spot")
    settings = settings_of(SEEKS[name])
    assert_resumes_as_undisturbed(store, tmp_path, in_peace, name, at_step, settings)
    messages = [record.getMessage() for record in caplog.records]
    assert any("the stream begins at batch" in message for message in messages), messages
    assert not any("read again from its start" in message for message in messages)


def test_only_what_is_needed_is_read(store: str, tmp_path: Path, in_peace: InPeace) -> None:
    at_step, settings = 22, settings_of(plain, max_steps=PASS)
    count = assert_resumes_as_undisturbed(store, tmp_path, in_peace, "one pass", at_step, settings)
    # datasets opens the shard of a position and passes over its earlier samples; twice, as the position is proven first.
    assert count < 3 * SAMPLES
    assert {shard for shard, _ in READ} == {SHARDS - 1}


@pytest.mark.parametrize("at_step", [7, PASS + 7], ids=["first pass", "second pass"])
def test_steps_of_several_batches(store: str, tmp_path: Path, in_peace: InPeace, at_step: int) -> None:
    settings = settings_of(plain, gradient_accumulation_steps=3, per_device_train_batch_size=2, max_steps=PASS + 12)
    assert_resumes_as_undisturbed(store, tmp_path, in_peace, "accumulated", at_step, settings)


@pytest.mark.parametrize("name", READS_AGAIN)
def test_a_stream_that_can_not_say_where_it_is_is_read_again(
    store: str, tmp_path: Path, in_peace: InPeace, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    make, more, why = READS_AGAIN[name]
    assert_resumes_as_undisturbed(store, tmp_path, in_peace, name, 16, settings_of(make, **more))
    (message,) = [one.getMessage() for one in caplog.records if "read again from its start" in one.getMessage()]
    assert "to batch 16 (64 samples)" in message
    assert why in message


@pytest.mark.parametrize("at_step", [9, PASS + 7], ids=["first pass", "second pass"])
def test_workers_are_resumed_without_reading_again(
    store: str, tmp_path: Path, in_peace: InPeace, caplog: pytest.LogCaptureFixture, at_step: int
) -> None:
    """Three passes over a shuffled stream, with a collator that draws."""
    caplog.set_level(logging.INFO, "hf_spot")
    settings = settings_of(
        lambda: plain().shuffle(seed=3, buffer_size=20),
        max_steps=2 * PASS + 6,
        dataloader_num_workers=2,
        data_collator=jittered,
    )
    assert_resumes_as_undisturbed(store, tmp_path, in_peace, "workers", at_step, settings)
    assert any("the stream begins at batch" in message for message in caplog.messages), caplog.messages


def jittered(samples: list[Any]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([one["input_ids"] for one in samples])
    return {"input_ids": torch.where(torch.rand(ids.shape) < 0.1, 0, ids), "labels": ids}
