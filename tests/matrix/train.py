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
from transformers import Trainer, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.matrix.cases import CASES
from tests.matrix.ending import ending
from tests.matrix.parts import Writes


class Diary(TrainerCallback):
    """Lines for each optimizer step: what the micro-batches were; loss and learning rate, where they are logged."""

    per_launch = ("path", "seen", "before")
    not_of_training = True

    def __init__(self, path: Path, before: int) -> None:
        self.path, self.before, self.seen = path, before, []

    def watch(self, trainer: Any) -> None:
        plain_step = trainer.training_step

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen.append(digest(inputs))
            return plain_step(model, inputs, *args, **kwargs)

        trainer.training_step = training_step

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.write({"step": self.before + state.global_step, "batches": self.seen})

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if "loss" in logs and "learning_rate" in logs:
            step = self.before + state.global_step
            self.write({"step": step, "loss": logs["loss"], "learning_rate": logs["learning_rate"]})

    def write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Interrupt(TrainerCallback):
    """At the beginning of a step: ``notice``, ``term`` or ``kill``."""

    per_launch = ("kind", "step")
    not_of_training = True

    def __init__(self, stop: str, before: int) -> None:
        self.kind, _, step = stop.partition("@")
        self.step = int(step) - before

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
    made = make(options.folder / "out")
    before, left, weights = 0, [], {}
    for number, trainer in enumerate([made] if isinstance(made, Trainer) else made):
        rank = trainer.args.process_index
        for kind in (Diary, Interrupt, Writes):  # a second training of the same trainer
            trainer.remove_callback(kind)
        diary = Diary(options.folder / f"diary-{rank}", before)
        diary.watch(trainer)
        trainer.add_callback(diary)
        if rank == 0:
            trainer.add_callback(Writes(options.folder / f"lines-{number}.jsonl"))
        if stop := os.environ.get("MATRIX_STOP"):
            trainer.add_callback(Interrupt(stop, before))
        result = trainer.train()
        before += trainer.state.global_step
        weights |= {f"{number}." * (number > 0) + name: value for name, value in final_state(trainer.model).items()}
        left.append(ending(trainer, result, Path(trainer.args.output_dir)))
    (options.folder / f"ending-{rank}.json").write_text(json.dumps(left))
    if rank == 0:
        torch.save(weights, options.folder / "final.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
        # Gloo's threads sometimes want the GIL of an interpreter that is ending, and abort the process: seen in one of 60
        # trainings with FSDP2, without hf_spot (https://github.com/pytorch/pytorch/pull/179291).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
