"""The losses of steps are known without waiting for the device, in their order, and each as it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_spot.training.session.pending_losses import _SLOTS
from hf_spot.training.trainer.step_losses import StepLosses
from tests.waiting import wait_for

DEVICE = torch.accelerator.current_accelerator(check_available=True)
needs_device = pytest.mark.skipif(
    DEVICE is None, reason="no accelerator on this machine; on an emulated one: python -m tests.emulated"
)


class Model:
    """A trainer, as far as it gives losses: each is written to the same memory, as a compiled model may do."""

    def __init__(self, device: Any, accumulation: int = 1) -> None:
        self.args = SimpleNamespace(gradient_accumulation_steps=accumulation)
        self.memory = torch.zeros((), device=device)

    def training_step(self, loss: float) -> torch.Tensor:
        return self.memory.fill_(loss)


class Teller:
    def __init__(self) -> None:
        self.told: list[tuple[int, float | None, float | None, Any]] = []

    def tell(self, *what: Any) -> None:
        self.told.append(what)

    @property
    def losses(self) -> list[float | None]:
        return [loss for _, loss, _, _ in self.told]


def made(device: Any, accumulation: int = 1) -> tuple[Model, StepLosses, Teller]:
    trainer, teller = Model(device, accumulation), Teller()
    losses = StepLosses(trainer, teller)  # type: ignore[arg-type]
    losses.watch()
    return trainer, losses, teller


def step(trainer: Model, losses: StepLosses, number: int, *parts: float) -> None:
    losses.step_begins()
    for part in parts:
        trainer.training_step(part)
    losses.step_ended([[number]])
    losses.learned(number, 0.1)


def test_a_step_is_the_sum_of_its_micro_batches_and_is_told_once() -> None:
    trainer, losses, teller = made("cpu", accumulation=2)
    losses.step_begins()
    trainer.training_step(99.0)  # of a step that a notice abandons
    step(trainer, losses, 1, 1.0, 2.0)
    losses.learned(1, None)  # at the end of an epoch
    step(trainer, losses, 2, 3.0, 4.0)
    assert teller.told == [(1, 3.0, 0.1, [[1]]), (2, 7.0, 0.1, [[2]])]
    losses.close()
    assert "training_step" not in vars(trainer)


def test_a_step_whose_loss_nobody_saw_is_told_without_it() -> None:
    trainer, losses, teller = made("cpu")
    step(trainer, losses, 1)
    assert teller.told == [(1, None, 0.1, [[1]])]


@needs_device
def test_losses_arrive_from_a_device_as_they_were() -> None:
    trainer, losses, teller = made(DEVICE)
    for number in range(1, 2 * _SLOTS):
        step(trainer, losses, number, float(number))
        wait_for(lambda: losses._copied is None or losses._copied.query(), "for a copy")
    assert len(teller.told) >= 2 * _SLOTS - 4  # the rest was not asked for yet
    losses.settle()
    assert [number for number, *_ in teller.told] == list(range(1, 2 * _SLOTS))
    assert teller.losses == [float(number) for number in range(1, 2 * _SLOTS)]


@needs_device
def test_a_device_that_lags_far_behind_costs_losses_and_no_wait() -> None:
    trainer, losses, teller = made(DEVICE)
    busy = torch.randn(600, 600, device=DEVICE)
    for number in range(1, _SLOTS + 11):
        for _ in range(3):
            busy = busy @ busy / 600
        step(trainer, losses, number, float(number))
    losses.settle()
    assert [number for number, *_ in teller.told] == list(range(1, _SLOTS + 11))
    assert all(loss in (number, None) for number, loss, *_ in teller.told)
