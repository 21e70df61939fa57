"""Small real trainings inside the test's own process, with the network taken out."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import PATIENCE_S

torch = pytest.importorskip("torch")
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

# The loaders of a training that a test has interrupted are found by the garbage collector, and torch then waits so many
# seconds for each of their workers.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2

STEPS = 12


class Recorder(TrainerCallback):
    """Steps done and losses, evaluations, and something to do after a chosen step: of one launch."""

    per_launch = ("losses", "evaluated", "saved")

    def __init__(self, at_step: int = 0, act: Callable[[], None] = lambda: None) -> None:
        self.losses: dict[int, float] = {}
        self.evaluated: list[int] = []
        self._at_step = at_step
        self._act = act

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self._at_step and state.global_step == self._at_step - 1:
            self._act()

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if "loss" in logs:
            self.losses[state.global_step] = logs["loss"]

    def on_evaluate(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.evaluated.append(state.global_step)


class SaveRecorder(Recorder):
    """Saves, too. Since it reads their files, training waits for them."""

    def __init__(self, at_step: int = 0, act: Callable[[], None] = lambda: None) -> None:
        super().__init__(at_step, act)
        self.saved: list[int] = []

    def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.is_world_process_zero:
            assert list(Path(args.output_dir, f"checkpoint-{state.global_step}").iterdir())
        self.saved.append(state.global_step)


class Patient(TrainerCallback):
    """Waits before each step until all saves so far are committed: these trainings save faster than anybody could upload."""

    def __init__(self, callback: Any, after_step: int = 0) -> None:
        self._callback = callback
        self._after_step = after_step

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        session = self._callback._session
        if state.global_step < self._after_step or session.run_session.uploader.fenced:
            return
        assert session.commits.behind.wait(PATIENCE_S) and session.run_session.uploader.drain(PATIENCE_S)


def make_trainer(output_dir: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    """A tiny GPT-2 with dropout: 12 steps, a save after every third."""
    torch.manual_seed(0)
    make_model = settings.pop("model", None)
    small = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = make_model() if make_model else GPT2LMHeadModel(small)
    data = [{"input_ids": part, "labels": part} for part in torch.randint(64, (24, 16))]
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    collator = settings.pop("data_collator", None)
    make_data = settings.pop("train_dataset", lambda: data)
    return Trainer(
        model=model,
        args=TrainingArguments(**(defaults | settings)),
        data_collator=collator,
        train_dataset=make_data(),
        eval_dataset=data[:4],
        callbacks=list(callbacks),
    )


def weights(trainer: Trainer) -> dict[str, Any]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def store() -> str:
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def peace(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[int, float]]:
    """Weights and losses of a training without hf_spot."""
    recorder = Recorder()
    trainer = make_trainer(tmp_path_factory.mktemp("peace"), recorder)
    trainer.train()
    return weights(trainer), recorder.losses


@dataclass(frozen=True)
class Undisturbed:
    """What a training gives when nobody interrupts it."""

    weights: dict[str, Any]
    losses: dict[int, float]
    evaluated: list[int]
    max_steps: int
    epoch: float
    best_metric: float | None
    num_input_tokens_seen: int


@pytest.fixture(scope="session")
def in_peace(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Callable[..., Undisturbed]:
    """Trains what `make_trainer` makes of the settings, without hf_spot; once for each name, which goes with the settings."""

    def train(name: str, **settings: Any) -> Undisturbed:
        def fill(folder: Path) -> None:
            recorder = Recorder()
            trainer = make_trainer(folder / "out", recorder, **settings)
            trainer.train()
            seen = (trainer.state.epoch, trainer.state.best_metric, trainer.state.num_input_tokens_seen)
            found = (weights(trainer), recorder.losses, recorder.evaluated, trainer.state.max_steps, *seen)
            torch.save(found, folder / "found.pt")

        folder = made_once(re.sub(r"\W+", "-", name), fill)
        return Undisturbed(*torch.load(folder / "found.pt"))

    return train
