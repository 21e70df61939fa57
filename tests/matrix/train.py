"""``train.py CASE``: trains one case, keeps a diary of it, and is told by the environment when to be interrupted.

Nothing here knows hf_spot but for the moment of the interruption, which has to be exact.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cases import CASES


class Diary(TrainerCallback):
    """One line for each optimizer step: loss, learning rate, and what the micro-batches were."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen = path, []

    def watch(self, trainer: Any) -> None:
        plain_step = trainer.training_step

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen.append(digest(inputs))
            return plain_step(model, inputs, *args, **kwargs)

        trainer.training_step = training_step

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if "loss" in logs and "learning_rate" in logs:
            line = {"step": state.global_step, "loss": logs["loss"], "learning_rate": logs["learning_rate"]}
            with self.path.open("a") as file:
                file.write(json.dumps({**line, "batches": self.seen}) + "\n")
            self.seen = []


class Interrupt(TrainerCallback):
    """At the beginning of a step: ``notice``, ``term`` or ``kill``."""

    def __init__(self, stop: str) -> None:
        self.kind, _, step = stop.partition("@")
        self.step = int(step)

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step != self.step - 1 or int(os.environ.get("RANK", "0")):
            return
        launcher = int(os.environ["HF_SPOT_LAUNCHER_PID"])
        if self.kind == "kill":
            os.kill(launcher, signal.SIGKILL)
            signal.pause()
        elif self.kind == "term":
            os.kill(launcher, signal.SIGTERM)
        else:
            Path(os.environ["MATRIX_NOTICE"]).touch()
        heard = Path(os.environ["HF_SPOT_RUNTIME_DIR"], "notice.json")
        while not heard.exists():
            time.sleep(0.01)


def digest(inputs: Any) -> str:
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict) or hasattr(value, "keys"):
            for key in sorted(value.keys()):
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for one in value:
                add(one)
        else:
            found.update(repr(value).encode())

    add(inputs)
    return found.hexdigest()[:16]


def final_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole model, whoever holds which part of it."""
    found = {}
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            found[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().cpu()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("folder", type=Path, help="for everything that is written; a fresh one for each launch")
    options = parser.parse_args()
    make = CASES[options.case].make
    assert make is not None, "a command that is not ours runs by itself"
    trainer = make(options.folder / "out")
    rank = trainer.args.process_index
    diary = Diary(options.folder / f"diary-{rank}")
    diary.watch(trainer)
    trainer.add_callback(diary)
    if stop := os.environ.get("MATRIX_STOP"):
        trainer.add_callback(Interrupt(stop))
    trainer.train()
    state = final_state(trainer.model)
    if rank == 0:
        torch.save(state, options.folder / "final.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
        # Gloo's threads sometimes want the GIL of an interpreter that is ending, and abort the process: seen in one of 60
        # trainings with FSDP2, without hf_spot (https://github.com/pytorch/pytorch/pull/179291).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
