"""A training that hf_spot takes no part in is named while it runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.optim import optimizer

from hf_spot.arguments import SpotArguments
from hf_spot.runtime import Runtime
from hf_spot.training import unprotected


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """A launch that started this process, whose optimizers are as before afterwards."""
    made = Runtime(str(tmp_path / "run"), 1, tmp_path, SpotArguments())
    for name, value in made.to_environ().items():
        monkeypatch.setenv(name, value)
    assert Runtime.from_environ(os.environ) is not None
    before = dict(optimizer._global_optimizer_pre_hooks)
    yield made
    optimizer._global_optimizer_pre_hooks.clear()
    optimizer._global_optimizer_pre_hooks.update(before)


def train(monkeypatch: pytest.MonkeyPatch, seconds_a_step: float, steps: int = 10) -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    one, now = torch.optim.SGD([weight], lr=0.1), [0.0]
    monkeypatch.setattr(unprotected.time, "monotonic", lambda: now[0])
    for _ in range(steps):
        weight.grad = torch.ones(1)
        one.step()
        now[0] += seconds_a_step


@pytest.mark.parametrize(("seconds_a_step", "count"), [(3.0, 1), (1.0, 0)])
def test_a_custom_loop_without_hf_spot_is_named_once_within_a_minute(
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seconds_a_step: float,
    count: int,
) -> None:
    unprotected.watch_steps()
    train(monkeypatch, seconds_a_step)
    told = [one.getMessage() for one in caplog.records if "trains without hf_spot" in one.getMessage()]
    assert len(told) == count
    assert all("SpotCheckpointManager.for_accelerator(accelerator)" in one for one in told)  # the next command


def test_a_hook_behind_it_is_still_called(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer's door registers one, too: a training once ended in its 20th second."""
    calls = []
    unprotected.watch_steps()
    optimizer.register_optimizer_step_pre_hook(lambda *args: calls.append(args))
    train(monkeypatch, 3.0)
    assert len(calls) == 10


def test_a_training_that_has_reported_itself_is_not_named(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unprotected.watch_steps()
    runtime.tell_training(True)
    train(monkeypatch, 10.0)
    assert not caplog.records


def test_outside_a_launch_nothing_is_watched(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    before = len(optimizer._global_optimizer_pre_hooks)
    unprotected.watch_steps()
    assert len(optimizer._global_optimizer_pre_hooks) == before
