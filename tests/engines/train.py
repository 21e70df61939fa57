"""One rank of a row: trains it, interrupted where it is told to be, and leaves what a user gets."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

from hf_spot import SpotArguments, SpotCallback, TrainingPreempted
from hf_spot.errors import ConfigError
from hf_spot.training.trainer.save_schedule import Cadence
from tests.engines.rows import Row
from tests.waiting import wait_for


class Interrupt(TrainerCallback):
    """At the beginning of a step: ``notice`` or ``kill``."""

    def __init__(self, stop: str, notice: Path, spot: SpotCallback) -> None:
        self.kind, _, step = stop.partition("@")
        self.step = int(step)
        self.notice = notice
        self.spot = spot

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step != self.step - 1:
            return
        if self.kind == "kill":
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        if args.process_index == 0:
            self.notice.touch()
            session = self.spot._session
            assert session is not None
            wait_for(session.run_session.listener.current, "for the watcher of this rank")  # another step does no harm


class Told(TrainerCallback):
    """Keeps what a user reads of each step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if "loss" in logs and state.is_world_process_zero:
            line = {"step": state.global_step, **{name: logs[name] for name in ("loss", "learning_rate")}}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def parts(model: Any) -> str:
    """Return a digest of the weights: of all, or of what DeepSpeed lets this rank hold. Every rank must call it."""
    digest = hashlib.sha256()
    for name, one in model.named_parameters():
        value = getattr(one, "ds_tensor", one)  # DeepSpeed's part of it
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        digest.update(name.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train(row: Row, folder: Path, stop: str | None, *, added: bool = False) -> int:
    """Train, and return the exit code of this rank.

    Args:
        row: what to train.
        folder: for everything that is written.
        stop: ``notice@5``, ``kill@8`` or empty; None trains without hf_spot.
        added: the cadence adds a save after each step.
    """
    torch.set_num_threads(1)
    if added:
        Cadence.is_due = lambda self: True  # type: ignore[method-assign]
    try:
        trainer: Trainer = row.make(folder / "out")
        trainer.add_callback(Told(folder / "told.jsonl"))
        if stop is not None:
            notice = folder / "notice"
            arguments = SpotArguments(notice=f"file:{notice}", keep_checkpoints=0)
            spot = SpotCallback(str(folder / "run"), arguments)
            trainer.add_callback(spot)
            if stop:
                trainer.add_callback(Interrupt(stop, notice, spot))
        result = trainer.train()
    except TrainingPreempted:
        return 75
    except ConfigError as error:
        print(f"refused: {error}; {error.hint}", flush=True)
        return 2
    rank = trainer.args.process_index
    ending = {"parts": parts(trainer.model), "step": trainer.state.global_step, "train_loss": result.training_loss}
    (folder / f"ending-{rank}.json").write_text(json.dumps(ending))
    dist.barrier()
    return 0
