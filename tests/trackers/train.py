"""Trainings of a few seconds whose trackers `tests.trackers` reads. Run as a script in an environment that has the trackers."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

STEPS, SAVE_STEPS = 40, 5
OWN = ("wandb", "mlflow", "trackio", "swanlab")  # what a script begins itself


class Told(TrainerCallback):
    """Tells which step was done, and takes time for it."""

    def __init__(self, folder: Path, step_s: float, before: int) -> None:
        self.path, self.step_s, self.before = folder / "steps", step_s, before

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        tell(self.path, self.before + state.global_step, self.step_s)


def tell(path: Path, step: int, step_s: float) -> None:
    with path.open("a") as file:
        file.write(f"{step}\n")
    time.sleep(step_s)


def trainer(folder: Path, reports: list[str], options: argparse.Namespace, number: int = 1) -> Trainer:
    torch.manual_seed(number)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    rows = [{"input_ids": ids, "labels": ids} for ids in ([(one + 3 * at) % 32 for at in range(16)] for one in range(64))]
    settings = {
        "max_steps": STEPS,
        "learning_rate": number / 100,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
        "report_to": [one for one in reports if one != "aim"],
        "use_cpu": True,
        "disable_tqdm": True,
        "project": options.project,  # of Trackio
        "trackio_static_space_id": False,
    }
    callbacks: list[TrainerCallback] = [Told(folder, options.step_s, (number - 1) * STEPS)]
    if "aim" in reports:  # whose callback is its own; it and Comet can't both take over the terminal
        kind = importlib.import_module("aim.hugging_face").AimCallback
        callbacks.append(kind(repo=str(folder), experiment=options.project, capture_terminal_logs=False))
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder / f"out-{number}"), **settings),  # type: ignore[arg-type]
        train_dataset=rows,  # type: ignore[arg-type]
        callbacks=callbacks,
    )


def by_trainer(folder: Path, options: argparse.Namespace) -> None:
    trainer(folder, options.trackers, options).train()


def several(folder: Path, options: argparse.Namespace) -> None:
    """Two trainings in one script."""
    for number in (1, 2):
        trainer(folder, options.trackers, options, number).train()


def begun_by_script(folder: Path, options: argparse.Namespace) -> None:
    """The script begins all tracker runs before there is a Trainer."""
    for name in set(options.trackers) & set(OWN):
        module = importlib.import_module(name)
        if name == "mlflow":
            module.start_run(run_name="mine")
        else:
            module.init(project=options.project)
    trainer(folder, [one for one in options.trackers if one in OWN], options).train()


def loop(folder: Path, options: argparse.Namespace) -> None:
    """A custom loop with accelerate's trackers."""
    from accelerate import Accelerator

    from hf_spot import SpotCheckpointManager

    torch.manual_seed(0)
    used = [one for one in options.trackers if one in OWN]
    accelerator = Accelerator(cpu=True, log_with=used, project_dir=str(folder))
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(torch.arange(160.0).reshape(40, 4) / 160, shuffle=True)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    manager = SpotCheckpointManager.for_accelerator(
        accelerator, str(folder / "undisturbed") if options.undisturbed else None, SAVE_STEPS
    )
    step, _ = manager.load_latest()
    # As trackers.md says; the undisturbed loop has nothing to continue.
    kwargs = {} if options.undisturbed else manager.tracker_kwargs(mlflow_experiment=options.project)
    accelerator.init_trackers(options.project, init_kwargs={name: kwargs.get(name, {}) for name in used})
    for batch in loader:
        loss = model(batch).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        accelerator.log({"train/loss": loss.item()}, step=step)
        tell(folder / "steps", step, options.step_s)
        if manager.interrupted or step % SAVE_STEPS == 0:
            manager.save(step, 0)
        if manager.interrupted:
            sys.exit(75)
    accelerator.end_training()
    manager.finish()


KINDS = {"trainer": by_trainer, "several": several, "script": begun_by_script, "loop": loop}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trackers", nargs="+")
    parser.add_argument("--project", required=True)
    parser.add_argument("--undisturbed", action="store_true")
    options = parser.parse_args()
    # Not an argument: the same command is typed in each launch.
    options.step_s = float(os.environ.get("TRACKERS_STEP_S", "0"))
    KINDS[options.kind](options.folder, options)


if __name__ == "__main__":
    main()
