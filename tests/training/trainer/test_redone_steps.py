"""What the steps of a training were is told while it trains, whatever the disk and the data are like."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from hf_spot import Run, SpotArguments, SpotCallback
from hf_spot.run.told_steps import path_of, read
from hf_spot.training.session import step_teller
from hf_spot.training.session.step_teller import digest_of_indices
from tests.small_disk import SmallDisk, why_not
from tests.training.conftest import Patient, Recorder, make_trainer
from tests.waiting import wait_for

QUIET = SpotArguments(notice="none", on_mismatch="warn", allow_batch_change=True)


class Died(Exception):
    """Stands for the death of the process: what the training's thread does next does not happen."""


def die() -> None:
    raise Died


def killed(store: str, out: Path, at_step: int, **settings: Any) -> None:
    callback = SpotCallback(store, QUIET)
    with pytest.raises(Died):
        make_trainer(out, callback, Patient(callback), Recorder(at_step, die), **settings).train()


def redone(store: str, out: Path, **settings: Any) -> list[dict[str, Any]]:
    callback = SpotCallback(store, QUIET)
    make_trainer(out, callback, Patient(callback), **settings).train()
    return [entry.data for entry in Run(store).events() if entry.kind == "redone"]


def test_a_step_of_other_parts_has_only_its_learning_rate_to_compare(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="hf_spot")
    killed(store, tmp_path, 6)
    (told,) = redone(store, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert (told["steps"], told["different"]) == (2, None)
    assert told["compared"] == {"loss": 0, "learning_rate": 2, "data": 0}
    assert any("the composition of a step was " in change for change in told["changed"])
    assert "2 steps redone, all equal (learning rate compared, loss and data unknown)" in caplog.messages


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for number in range(24):
            part = torch.arange(number, number + 16)
            yield {"input_ids": part, "labels": part}


def test_a_stream_has_no_indices_to_compare(store: str, tmp_path: Path) -> None:
    settings = {"train_dataset": Stream, "max_steps": 12}
    killed(store, tmp_path, 6, **settings)
    (told,) = redone(store, tmp_path, **settings)
    assert told["compared"] == {"loss": 2, "learning_rate": 2, "data": 0}
    assert told["different"] is None


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_is_told_is_what_trainer_logs(store: str, tmp_path: Path, accumulation: int) -> None:
    recorder, told = Recorder(), path_of(tmp_path, store, 1, 0)
    callback = SpotCallback(store, QUIET)
    last = Recorder(6, lambda: wait_for(lambda: len(read(told).steps) == 5, "for five steps"))
    read_rows: list[int] = []

    class Rows(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            read_rows.append(index)
            return super().__getitem__(index)

    part = torch.arange(16)
    settings = {"train_dataset": lambda: Rows([{"input_ids": part + at, "labels": part} for at in range(24)]), "max_steps": 6}
    trainer = make_trainer(tmp_path, callback, recorder, last, gradient_accumulation_steps=accumulation, **settings)
    read_rows.clear()
    steps: list[Any] = []
    last._act = lambda act=last._act: (act(), steps.extend(read(told).steps))  # type: ignore[misc]
    trainer.train()
    logged = {line["step"]: line for line in trainer.state.log_history if "loss" in line}
    assert [(one.launch, one.step) for one in steps] == [(1, number) for number in range(1, 6)]
    assert [one.loss for one in steps] == [recorder.losses[one.step] for one in steps]
    assert [one.learning_rate for one in steps] == [logged[one.step]["learning_rate"] for one in steps]
    trained = read_rows[-min(24, 12 * accumulation + 2) :]  # accelerate reads a batch ahead; the training's description, before
    batches = [trained[at : at + 2] for at in range(0, 12 * accumulation, 2)]
    of_steps = [batches[at : at + accumulation] for at in range(0, 5 * accumulation, accumulation)]
    assert [one.data for one in steps] == [digest_of_indices(each) for each in of_steps]
    assert not told.exists()


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_full_disk_costs_a_line_and_no_step(store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="hf_spot")
    with SmallDisk(tmp_path / "disk", size_kb=4096) as disk:
        out = disk.path / "out"
        told = path_of(out, store, 1, 0)

        def is_said(text: str) -> bool:
            return sum(text in line for line in caplog.messages) == 1

        def is_full() -> None:
            wait_for(lambda: is_said("can't be written: No space left on device; training goes on"), "for the full disk")
            disk.empty()
            wait_for(lambda: is_said("is written again"), "for the empty disk")
            assert [one.step for one in read(told).steps] == list(range(1, 250))

        acts = [Recorder(5, disk.fill), Recorder(250, is_full)]
        trainer = make_trainer(out, SpotCallback(store, QUIET), *acts, max_steps=255, save_strategy="no", logging_strategy="no")
        trainer.train()
        assert trainer.state.global_step == 255
    assert is_said("can't be written: No space left on device; training goes on")


def test_a_launch_that_a_newer_one_has_replaced_sends_nothing(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_teller, "SEND_S", 0.0)
    sent: list[bytes] = []

    def replaced() -> None:
        wait_for(lambda: any(info.key == "e0001/steps-1.json" for info in Run(store).store.list()), "for the steps")
        Run(store).claim()
        sent.append(Run(store).store.get("e0001/steps-1.json"))

    reached: list[int] = []

    def read_again() -> None:
        teller = callback._session.teller
        wait_for(lambda: len(teller._steps) == 10 and teller._sending is not None and teller._sending.done(), "for a flush")
        reached.append(10)

    callback = SpotCallback(store, QUIET)
    acts = [Recorder(3, replaced), Recorder(11, read_again)]
    trainer = make_trainer(tmp_path, callback, *acts, save_strategy="no", max_steps=11)
    with pytest.raises(Exception, match="launch 2 has taken over"):
        trainer.train()
    assert reached == [10]
    assert [Run(store).store.get("e0001/steps-1.json")] == sent


def test_a_digest_is_that_of_the_indices_and_of_their_batches() -> None:
    assert digest_of_indices(None) is None
    assert digest_of_indices([[1, 2], [3]]) == digest_of_indices([[1, 2], [3]])
    different = [[[1, 2, 3]], [[1, 2], [3]], [[2, 1], [3]], [["a", 2], [3]], [["b", 2], [3]], [[(1, 2), 3]]]
    assert len({digest_of_indices(batches) for batches in different}) == len(different)
