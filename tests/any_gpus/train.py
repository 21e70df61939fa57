"""One rank of a training: trains a row, interrupted where it is told to be, and leaves what a user gets."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

from hf_spot import SpotArguments, SpotCallback, TrainingPreempted
from hf_spot.errors import ConfigError
from tests.any_gpus.rows import MICRO_BATCHES, ROWS

# All of a log line is compared but what depends on the clock, or tells of interruptions.
OF_THE_CLOCK = ("_runtime", "_per_second")
OF_INTERRUPTIONS = "spot/"


class Interrupt(TrainerCallback):
    """Interrupts at the beginning of a step: ``notice@5`` or ``kill@5``."""

    def __init__(self, stop: str, notice: Path) -> None:
        self.kind, _, step = stop.partition("@")
        self.step = int(step)
        self.notice = notice

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Interrupt."""
        if state.global_step != self.step - 1:
            return
        if self.kind == "kill":
            if args.world_size > 1:
                dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        if args.process_index == 0:
            self.notice.touch()
            time.sleep(1.0)  # its watcher looks every quarter of a second; another step does no harm


def digest_of(values: Any) -> str:
    """Return a digest of nested tensors and plain values."""
    found = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for name in value:
                found.update(str(name).encode())
                feed(value[name])
        elif isinstance(value, (list, tuple)):
            for one in value:
                feed(one)
        else:
            found.update(repr(value).encode())

    feed(values)
    return found.hexdigest()


def ending_of(trainer: Trainer) -> dict[str, str]:
    """Return digests of a finished training: its weights, optimizer states, and what a user reads."""
    assert trainer.model is not None and trainer.optimizer is not None
    lines = [
        {name: line[name] for name in sorted(line) if not name.endswith(OF_THE_CLOCK) and not name.startswith(OF_INTERRUPTIONS)}
        for line in trainer.state.log_history
    ]
    return {
        "weights": digest_of(dict(trainer.model.state_dict())),
        "optimizer": digest_of(trainer.optimizer.state_dict()["state"]),
        "lines": digest_of(lines),
        "read": json.dumps(lines),
    }


def train(name: str, folder: Path, stop: str, *, exact: bool) -> int:
    """Train a row, and return the exit code of this rank.

    Args:
        name: of the row.
        folder: for everything that is written.
        stop: ``notice@5``, ``kill@8`` or empty.
        exact: with the option.
    """
    ranks = int(os.environ["WORLD_SIZE"])
    try:
        trainer = ROWS[name].make(folder / "out", max(1, MICRO_BATCHES // ranks))
        notice = folder / "notice"
        arguments = SpotArguments(notice=f"file:{notice}", keep_checkpoints=0, exact_on_any_gpus=exact)
        trainer.add_callback(SpotCallback(str(folder / "run"), arguments))
        if stop:
            trainer.add_callback(Interrupt(stop, notice))
        trainer.train()
    except TrainingPreempted:
        return 75
    except ConfigError as error:
        print(f"refused: {error}; {error.hint}", flush=True)
        return 2
    (folder / f"ending-{trainer.args.process_index}.json").write_text(json.dumps(ending_of(trainer)))
    if ranks > 1:
        dist.barrier()
    return 0
