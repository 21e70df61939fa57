"""One tracker run per training: which id it gets, which environment variables name it, and which of its lines exist already.

A *tracker run* is what Weights & Biases, MLflow and others call a run: one curve. Its *lines* are what Trainer logs, in order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

_ID_CHARACTERS = 32  # Comet wants 32 to 50 letters and digits; the others allow that


@dataclass(frozen=True)
class Tracker:
    """How a tracker's integration in Trainer is told which tracker run to continue.

    Args:
        callback: name of the class of its callback in Trainer.
        key: its name in the journal and in ``report_to``.
        shown: its name for people.
        id_variable: environment variable for the id of the tracker run; None if it is known otherwise.
        also: further variables that make a new launch continue it, with their values.
        creates: whether it uses an id that it has never heard of for a new tracker run. If not, the tracker run must be created
            first.
    """

    callback: str
    key: str
    shown: str
    id_variable: str | None
    also: tuple[tuple[str, str], ...] = ()
    creates: bool = True


WANDB = Tracker("WandbCallback", "wandb", "Weights & Biases", "WANDB_RUN_ID", (("WANDB_RESUME", "allow"),))
MLFLOW = Tracker("MLflowCallback", "mlflow", "MLflow", "MLFLOW_RUN_ID", creates=False)
TRACKIO = Tracker("TrackioCallback", "trackio", "Trackio", None)
TENSORBOARD = Tracker("TensorBoardCallback", "tensorboard", "TensorBoard", None)
SWANLAB = Tracker("SwanLabCallback", "swanlab", "SwanLab", "SWANLAB_RUN_ID", (("SWANLAB_RESUME", "allow"),))
COMET = Tracker("CometCallback", "comet_ml", "Comet", "COMET_EXPERIMENT_KEY")
TRACKERS = (WANDB, MLFLOW, TRACKIO, TENSORBOARD, SWANLAB, COMET)

# By the class of their callback: trackers whose integrations can't be told by an id of hf_spot's which tracker run to continue.
BEGIN_ANEW = {
    "AimCallback": "pass the hash of the first launch's run, as its class shows",
    "ClearMLCallback": "set CLEARML_TASK_ID=… to the first launch's task",
    "DVCLiveCallback": "set DVCLIVE_RESUME=true and keep its folder",
    "NeptuneCallback": "pass run=neptune.init_run(with_id=…)",
}


def tracker_id(run: str, training: int) -> str:
    """Return the id of the tracker run of a training: the same in each launch, and another one for each training.

    Args:
        run: the id of the first entry of the run's journal.
        training: number of the training, from 1.
    """
    return hashlib.sha256(f"{run}/{training}".encode()).hexdigest()[:_ID_CHARACTERS]


def variables(tracker: Tracker, id: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables to set for a training; an id that the user has set is left as it is.

    Args:
        tracker: the tracker.
        id: the id of the tracker run; None sets only `Tracker.also`, for an id of the user's.
        environ: the environment.
    """
    if tracker.id_variable is None:
        return {}
    wanted = {} if id is None else {tracker.id_variable: id}
    return {name: value for name, value in {**wanted, **dict(tracker.also)}.items() if not environ.get(name)}


def init_kwargs(id: str, mlflow_run: str | None) -> dict[str, dict[str, str]]:
    """Return what continues a tracker run in a custom loop, by accelerate's name of the tracker.

    Args:
        id: the tracker id of the training.
        mlflow_run: MLflow's id of its run; None if there is none.
    """
    found = {
        WANDB.key: {"id": id, "resume": "allow"},
        TRACKIO.key: {"name": id, "resume": "allow"},
        SWANLAB.key: {"id": id, "resume": "allow"},
        COMET.key: {"experiment_key": id},
    }
    return found if mlflow_run is None else {**found, MLFLOW.key: {"run_id": mlflow_run}}


@dataclass(frozen=True)
class Told:
    """What a tracker run contains when a launch begins.

    Args:
        lines: number of its lines, and of those that the script has logged itself.
        newest_step: the highest step of a line; -1 if there is none.
    """

    lines: int
    newest_step: int = -1


def is_told(number: int, step: int, told: Told) -> bool:
    """Return whether a tracker run contains a line of Trainer's already.

    Args:
        number: of the line, from 0, among all lines of the training.
        step: its step.
        told: what the tracker run contains.
    """
    return number < told.lines and step <= told.newest_step
