"""Custom loops: each training of a run meets its own checkpoints, and steps that are done again are compared."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from hf_spot import ConfigError, Run, SpotArguments, SpotCheckpointManager
from hf_spot.training.loop import loop_training
from hf_spot.training.session import recognition
from tests.waiting import wait_for

Make = Callable[[], SpotCheckpointManager]


@pytest.fixture
def make(tmp_path: Path, store: str) -> Iterator[Make]:
    made: list[SpotCheckpointManager] = []

    def make() -> SpotCheckpointManager:
        arguments = SpotArguments(notice="none")
        made.append(SpotCheckpointManager(store, 2, args=arguments, local_dir=tmp_path / "local"))
        return made[-1]

    yield make
    for manager in made:
        manager.close()


def new_process() -> None:
    recognition.forget_finished()
    loop_training.forget_models()


class Loop:
    """A loop with a model and an optimizer of its own, made as a script makes them at each start."""

    def __init__(self, make: Make, seed: int, rate: float = 0.1, scale: float = 1.0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=rate, momentum=0.9)
        self.data = DataLoader(torch.arange(48.0).reshape(16, 3), batch_size=2, shuffle=True)
        self.scale = scale  # a stand-in for what a script or a device does differently
        self.manager = make()
        self.step, self.epoch = self.manager.load_latest(self.model, self.optimizer)

    def train(self, until: int, save_at: int, then: Callable[[], Any] = lambda: None) -> None:
        for epoch in range(self.epoch, 9):
            self.epoch = epoch
            for batch in self.data:
                if self.step >= until:
                    return
                loss = self.model(batch).pow(2).mean() * self.scale
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.step += 1
                if self.step == save_at:
                    self.save()
                    self.manager.wait()
                    then()

    def save(self) -> None:
        self.manager.save(self.model, self.optimizer, None, self.step, self.epoch)

    def die(self, local_dir: Path) -> None:
        """End as a process that is killed once its last step is on the disk."""
        told = f",{self.step},"
        wait_for(lambda: any(told in path.read_text().replace(" ", "") for path in local_dir.rglob("steps-*.jsonl")))
        self.manager.close()
        new_process()

    def finish(self) -> dict[str, torch.Tensor]:
        self.save()
        self.manager.finish()
        return self.model.state_dict()


def test_two_loops_of_a_script_meet_their_own_checkpoints(make: Make, store: str) -> None:
    first = Loop(make, seed=1)
    first.train(until=3, save_at=2)
    ends = [first.finish()]
    second = Loop(make, seed=2)
    assert second.step == 0  # the first one's end is not its beginning
    second.train(until=5, save_at=4)
    second.manager.close()  # killed
    new_process()

    again = Loop(make, seed=1)
    assert again.step == 3 and torch.equal(again.model.weight, ends[0]["weight"])
    again.finish()
    resumed = Loop(make, seed=2)
    assert resumed.step == 4
    resumed.train(until=6, save_at=0)
    ends.append(resumed.finish())
    assert [(one.training, one.step) for one in Run(store).state().checkpoints] == [(1, 3), (2, 4), (2, 6)]

    new_process()
    assert Loop(make, seed=2).step == 6  # a script that skips what it has trained itself


def test_a_model_without_a_seed_is_still_its_training(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    first = Loop(make, seed=1)
    first.train(until=2, save_at=0)
    first.finish()
    new_process()

    assert Loop(make, seed=7).step == 2
    assert "began with other weights: the finished one is loaded" in caplog.text


def test_a_loop_that_only_loads_gets_what_this_process_has_finished(make: Make) -> None:
    ends = []
    for seed in (1, 2):
        loop = Loop(make, seed=seed)
        loop.train(until=1 + seed, save_at=0)
        ends.append(loop.finish())

    shown = nn.Linear(3, 2)
    assert make().load_latest(shown) == (3, 0)
    assert torch.equal(shown.weight, ends[1]["weight"])


@pytest.mark.parametrize("reset", [False, True])
def test_a_finished_model_goes_on_or_is_another_training_once_it_was_reset(make: Make, reset: bool) -> None:
    loop = Loop(make, seed=1)
    before = {name: value.clone() for name, value in loop.model.state_dict().items()}
    loop.train(until=2, save_at=0)
    loop.finish()
    optimizer = loop.optimizer
    if reset:
        loop.model.load_state_dict(before)
        optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.1, momentum=0.9)

    assert make().load_latest(loop.model, optimizer) == ((0, 0) if reset else (2, 0))


@pytest.mark.parametrize(("scale", "told"), [(1.0, "3 steps redone, all equal"), (1.0 + 1e-6, "step 3 differs: loss")])
def test_steps_that_are_done_again_are_compared(
    make: Make, store: str, tmp_path: Path, scale: float, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    killed = Loop(make, seed=1)
    killed.train(until=5, save_at=2)
    killed.die(tmp_path / "local")

    again = Loop(make, seed=1, scale=scale)
    assert again.step == 2
    again.train(until=6, save_at=0)
    again.finish()

    assert told in caplog.text
    found = next(entry.data for entry in Run(store).events() if entry.kind == "redone")
    assert found["compared"]["loss"] == found["compared"]["data"] == found["steps"]


def test_evaluations_between_steps_are_no_part_of_them(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    held_out = DataLoader(torch.ones(4, 3), batch_size=2)
    killed = Loop(make, seed=1)
    killed.train(until=4, save_at=2, then=lambda: list(held_out))  # after the save: the next launch does not do it again
    killed.die(tmp_path / "local")

    again = Loop(make, seed=1)
    again.train(until=5, save_at=0)
    again.finish()
    assert "2 steps redone, all equal" in caplog.text


def test_another_learning_rate_is_told_with_what_follows(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    first = Loop(make, seed=1)
    first.train(until=2, save_at=2)
    first.manager.close()
    new_process()

    Loop(make, seed=1, rate=0.01)
    assert "learning_rate was 0.1 and is 0.01: the old value stays" in caplog.text


@pytest.mark.parametrize("forgotten", ["a second model", "a scheduler", "nothing"])
def test_what_is_in_no_checkpoint_is_named_at_the_start(make: Make, forgotten: str, caplog: pytest.LogCaptureFixture) -> None:
    model, head = nn.Linear(3, 2), nn.Linear(2, 2)
    trained: list[Any] = [*model.parameters(), *(head.parameters() if forgotten == "a second model" else ())]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    if forgotten == "a scheduler":
        torch.optim.lr_scheduler.LinearLR(optimizer)

    make().load_latest(model, optimizer)
    assert ("AdamW trains 2 parameters that are in no model" in caplog.text) == (forgotten == "a second model")
    assert ("a scheduler changes the learning rate of AdamW" in caplog.text) == (forgotten == "a scheduler")


class Level:
    """A state of the script's own, as a curriculum has."""

    def __init__(self, level: int) -> None:
        self.level = level

    def state_dict(self) -> dict[str, int]:
        return {"level": self.level}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.level = state["level"]


def test_registered_objects_come_back(make: Make) -> None:
    model = nn.Linear(3, 2)
    average, level = AveragedModel(model), Level(1)
    manager = make()
    manager.register(average, level)
    manager.load_latest(model, None)
    nn.init.constant_(model.weight, 7.0)
    average.update_parameters(model)
    level.level = 5
    manager.save(model, None, None, 1, 0)
    manager.wait()
    manager.close()
    new_process()

    again, averaged, at = nn.Linear(3, 2), AveragedModel(nn.Linear(3, 2)), Level(1)
    manager = make()
    manager.register(averaged, at)
    assert manager.load_latest(again) == (1, 0)
    assert at.level == 5 and torch.equal(averaged.module.weight, average.module.weight) and averaged.n_averaged == 1
    manager.close()

    manager = make()
    with pytest.raises(ConfigError, match="registered were AveragedModel, Level, and now nothing"):
        manager.load_latest(again)
    with pytest.raises(ConfigError, match="too late"):
        manager.register(at)
    with pytest.raises(ConfigError, match="a dict can't be registered"):
        make().register({})


@pytest.mark.parametrize("kind", ["optimizer", "average", "scaler", "registered", "unused"])
def test_what_is_used_and_not_saved_is_named_at_the_first_save(make: Make, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    more: Any = AveragedModel(model)
    if kind == "optimizer":
        more = torch.optim.AdamW(other.parameters(), lr=0.1)
    elif kind == "scaler":
        more = torch.amp.GradScaler("cpu")
    manager = make()
    if kind == "registered":
        manager.register(more)
    manager.load_latest(model, optimizer)
    if kind == "optimizer":
        other(torch.ones(2)).sum().backward()
        more.step()
    elif kind in ("average", "registered"):
        more.update_parameters(model)
    elif kind == "scaler":
        more.scale(model(torch.ones(3)).sum()).backward()
        more.step(optimizer)
        more.update()
    manager.save(model, optimizer, None, 1, 0)

    named = {"optimizer": "AdamW", "average": "AveragedModel", "scaler": "GradScaler"}.get(kind)
    assert ("in no checkpoint, so that a resume starts them anew" in caplog.text) == (named is not None)
    assert named is None or f"anew: {named}. manager.register" in caplog.text
