"""Trials of a hyperparameter search by Optuna: each is a training of the run, known by its settings.

A search that is started again proposes the same settings again if its sampler has a seed. Trials that are finished are loaded,
and what they reported is reported again, so that the sampler and the pruner decide as before.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState, set_seed
from transformers.trainer_utils import HPSearchBackend

from hf_spot.training.upstream import SEARCH_SETUP, TRIAL_FOLDER


def is_protected(trainer: Trainer) -> bool:
    """Return whether a search can be resumed: Ray's and W&B's trials are started by programs of their own."""
    return bool(trainer.hp_search_backend == HPSearchBackend.OPTUNA)


@contextlib.contextmanager
def prepared(trainer: Trainer, trial: Any) -> Iterator[Path]:
    """Apply a trial's settings before its training begins, and not again within the block. Yield its output folder.

    Trainer itself applies them when the training has begun, which is too late to restore.

    Args:
        trainer: the Trainer.
        trial: Optuna's; None for a training that is no trial.
    """
    if trial is None:
        yield Path(trainer.args.output_dir or ".")
        return
    SEARCH_SETUP.of(trainer)(trial)
    if trainer.model_init is not None:
        set_seed(trainer.args.seed)
        trainer.model = trainer.call_model_init(trial)
    with SEARCH_SETUP.replaced(trainer, lambda plain: lambda trial: None):
        yield Path(TRIAL_FOLDER.of(trainer)(trial))


def report_again(trainer: Trainer, trial: Any, checkpoint: Path) -> None:
    """Report to a search what a trial reported in earlier launches.

    Args:
        trainer: the Trainer; it gets the trial's newest objective.
        trial: Optuna's.
        checkpoint: folder of the checkpoint that is restored.
    """
    for line in TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).log_history:
        if not any(key.startswith("eval_") for key in line):
            continue
        metrics = {key: value for key, value in line.items() if key != "step"}
        objective: Any = trainer.compute_objective(metrics)
        trainer.objective = objective  # type: ignore[has-type]
        if not isinstance(objective, (list, tuple)):
            trial.report(objective, line["step"])


def is_pruned(error: BaseException) -> bool:
    """Return whether an error is Optuna's way to end a trial."""
    optuna = sys.modules.get("optuna")
    return optuna is not None and isinstance(error, optuna.TrialPruned)
