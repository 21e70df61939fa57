"""Trackers of a resumed training: one tracker run for all launches of a run, where possible."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_callback import TrainerCallback

from hf_spot.training.upstream import CALLBACK_HANDLER, CALLBACKS, SUMMARY_WRITER, TENSORBOARD_DIR, TENSORBOARD_WRITER

log = logging.getLogger("hf_spot")

_TENSORBOARD = "TensorBoardCallback"
# By callback: the variable by which a later launch continues a tracker's run, and an example.
_CONTINUED_BY = {
    "WandbCallback": ("WANDB_RUN_ID", "WANDB_RUN_ID=… WANDB_RESUME=allow"),
    "MLflowCallback": ("MLFLOW_RUN_ID", "MLFLOW_RUN_ID=…"),
    "CometCallback": ("COMET_EXPERIMENT_KEY", "COMET_EXPERIMENT_KEY=…"),
    "ClearMLCallback": ("CLEARML_TASK_ID", "CLEARML_TASK_ID=…"),
    "SwanLabCallback": ("SWANLAB_RUN_ID", "SWANLAB_RUN_ID=… SWANLAB_RESUME=allow"),
}


def where_trackers_write(trainer: Trainer) -> dict[str, Any]:
    """Return where trackers write, for `continue_trackers` in a later launch."""
    for callback in _named(trainer, _TENSORBOARD):
        folder = TENSORBOARD_DIR.of(callback)
        if folder is not None:
            return {"tensorboard": os.path.relpath(folder, trainer.args.output_dir or ".")}
    return {}


def continue_trackers(trainer: Trainer, details: dict[str, Any], step: int) -> None:
    """Continue TensorBoard's folder without the lines of repeated steps, and log which trackers begin a new run in each launch.

    Args:
        trainer: the Trainer, about to resume.
        details: details of the commit that it resumes from.
        step: step of that commit.
    """
    for callback in _named(trainer, _TENSORBOARD):
        if TENSORBOARD_DIR.of(callback) is None and "tensorboard" in details:
            TENSORBOARD_DIR.set(callback, str(Path(trainer.args.output_dir or ".") / details["tensorboard"]))
        if TENSORBOARD_WRITER.of(callback) is None:  # otherwise the script has created one
            SUMMARY_WRITER.set(callback, partial(_continued, SUMMARY_WRITER.of(callback), step))
    for name, (variable, setting) in _CONTINUED_BY.items():
        if _named(trainer, name) and variable not in os.environ and trainer.args.process_index == 0:
            log.info("%s begins a new tracker run in each launch; to continue one, set %s", name, setting)


def _continued(make: Any, step: int, log_dir: str) -> Any:
    """Return a TensorBoard writer that discards what was logged after ``step``, and does not repeat the texts of a start."""
    has_begun = any(Path(log_dir).glob("events.out.tfevents.*"))
    # "Crashed at step T+X, restarted at step T": readers then discard what was written from T on, as of step T + 1 here.
    writer = make(log_dir=log_dir, purge_step=step + 1)
    if has_begun:
        plain = writer.add_text

        def add_text(tag: str, text_string: str, global_step: int | None = None, *args: Any, **kwargs: Any) -> None:
            if global_step is not None:  # the settings of Trainer and model have no step, and are already there
                plain(tag, text_string, global_step, *args, **kwargs)

        writer.add_text = add_text
    return writer


def _named(trainer: Trainer, name: str) -> list[TrainerCallback]:
    return [
        one for one in CALLBACKS.of(CALLBACK_HANDLER.of(trainer)) if any(kind.__name__ == name for kind in type(one).__mro__)
    ]
