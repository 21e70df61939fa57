"""One tracker run per training: which id it gets, which environment variables name it, and which of its lines exist already.

A *tracker run* is what Weights & Biases, MLflow and others call a run: one curve. Its *lines* are what Trainer logs, in order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

_ID_CHARACTERS = 32  # Comet wants 32 to 50 letters and digits; the others allow that


class Standing(Enum):
    """What all launches of a training are in a tracker, and how that is known."""

    TESTED = "one run, tested"
    READ = "one run, only read in its source"
    NOTHING = "nothing to continue"
    NOT = "not possible"


@dataclass(frozen=True)
class Tracker:
    """How a tracker's integration in Trainer is told which tracker run to continue.

    Args:
        callback: name of the class of its callback.
        key: its name in the journal, in ``report_to`` and in accelerate's ``log_with``.
        shown: its name for people.
        id_variable: environment variable for the id of the tracker run; None if it is known otherwise.
        standing: whether all launches of a training are one run in it.
        how: how a launch continues the tracker run, for the documentation.
        redone: what becomes of lines of steps that are done again, for the documentation.
        also: further variables that make a new launch continue it, with their values.
        creates: whether it uses an id that it has never heard of for a new tracker run. If not, the tracker run must be created
            first.
        named: what to say when a training resumes, if the tracker run can't be continued.
    """

    callback: str
    key: str
    shown: str
    id_variable: str | None
    standing: Standing
    how: str
    redone: str
    also: tuple[tuple[str, str], ...] = ()
    creates: bool = True
    named: str = ""


_AGAIN = "logged again under the same step"
WANDB = Tracker(
    "WandbCallback",
    "wandb",
    "Weights & Biases",
    "WANDB_RUN_ID",
    Standing.TESTED,
    'id of the training, `resume="allow"`; with `WANDB_MODE=offline` the same id in a folder of its own for each launch',
    "left out, up to the last row that the server has; offline the newest folder has the whole curve: "
    "`wandb sync wandb/offline-run-…`",
    also=(("WANDB_RESUME", "allow"),),
)
MLFLOW = Tracker(
    "MLflowCallback",
    "mlflow",
    "MLflow",
    "MLFLOW_RUN_ID",
    Standing.TESTED,
    "a run with the tag `hf_spot.training`",
    "left out",
    creates=False,
)
DAGSHUB = Tracker(
    "DagsHubCallback",
    "dagshub",
    "DagsHub",
    "MLFLOW_RUN_ID",
    Standing.READ,
    "as MLflow, which it extends",
    "left out",
    creates=False,
)
TRACKIO = Tracker(
    "TrackioCallback",
    "trackio",
    "Trackio",
    None,
    Standing.TESTED,
    "`run_name`, or else the id",
    "left out in a local project; logged again in a Space",
)
TENSORBOARD = Tracker(
    "TensorBoardCallback",
    "tensorboard",
    "TensorBoard",
    None,
    Standing.TESTED,
    "the same folder",
    "hidden by TensorBoard, which is told where the launch resumes",
)
SWANLAB = Tracker(
    "SwanLabCallback",
    "swanlab",
    "SwanLab",
    "SWANLAB_RUN_ID",
    Standing.READ,
    "`SWANLAB_RUN_ID`, `SWANLAB_RESUME=allow`; swanlab 0.10 fails in Trainer's own callback",
    f"{_AGAIN}; the newest folder has the whole curve",
    also=(("SWANLAB_RESUME", "allow"),),
)
COMET = Tracker(
    "CometCallback",
    "comet_ml",
    "Comet",
    "COMET_EXPERIMENT_KEY",
    Standing.TESTED,
    "`COMET_EXPERIMENT_KEY`; offline the same key in an archive of its own for each launch",
    f"{_AGAIN}; the newest archive has the whole curve",
)
AIM = Tracker(
    "AimCallback",
    "aim",
    "Aim",
    None,
    Standing.TESTED,
    "the hash of the first launch's run, from the commit; the empty run that Aim's callback begins is archived, but for a "
    "training that is finished",
    "overwritten: Aim has one value per step",
)
DVCLIVE = Tracker(
    "DVCLiveCallback",
    "dvclive",
    "DVCLive",
    None,
    Standing.TESTED,
    "`DVCLIVE_RESUME=true`, in the same folder",
    "left out",
)
CLEARML = Tracker(
    "ClearMLCallback",
    "clearml",
    "ClearML",
    None,
    Standing.READ,
    "the task of the first launch, from the commit",
    _AGAIN,
)
NEPTUNE = Tracker(
    "NeptuneCallback",
    "neptune",
    "Neptune",
    "NEPTUNE_CUSTOM_RUN_ID",
    Standing.READ,
    "`NEPTUNE_CUSTOM_RUN_ID`",
    "logged again; Neptune ignores a step that is not higher than the last one",
)
KUBEFLOW = Tracker(
    "KubeflowCallback",
    "kubeflow",
    "Kubeflow",
    None,
    Standing.NOTHING,
    "a TrainJob shows the newest progress and metrics, not a curve",
    "none",
)
FLYTE = Tracker(
    "FlyteCallback",
    "flyte",
    "Flyte",
    None,
    Standing.NOTHING,
    "the deck that it makes at the end shows `log_history`, which is the whole curve",
    "none",
)
AZURE_ML = Tracker(
    "AzureMLCallback",
    "azure_ml",
    "Azure ML",
    None,
    Standing.NOT,
    "the run is that of the Azure ML job: a job that Azure restarts is one run, another job is another",
    "logged again, without a step",
    named="it logs to the run of this Azure ML job, without steps: the lines of repeated steps appear twice there",
)
CODECARBON = Tracker(
    "CodeCarbonCallback",
    "codecarbon",
    "CodeCarbon",
    None,
    Standing.NOT,
    "each launch measures itself and adds a row to `emissions.csv`",
    "measured again, as the energy was used again",
    named="it measures each launch by itself: add up the rows of emissions.csv, and keep that file of each machine",
)
TRACKERS = (
    WANDB,
    DAGSHUB,  # before the one that it extends
    MLFLOW,
    TRACKIO,
    TENSORBOARD,
    SWANLAB,
    COMET,
    AIM,
    DVCLIVE,
    CLEARML,
    NEPTUNE,
    KUBEFLOW,
    FLYTE,
    AZURE_ML,
    CODECARBON,
)


def continued(tracker: Tracker) -> bool:
    """Return whether a launch can continue the tracker run of an earlier one."""
    return tracker.standing in (Standing.TESTED, Standing.READ)


def of_callback(classes: Collection[str]) -> Tracker | None:
    """Return the tracker of a callback; None if it is none's.

    Args:
        classes: the names of its class and that class's bases.
    """
    return next((one for one in TRACKERS if one.callback in classes), None)


def table() -> str:
    """Return the trackers as a table of the documentation."""
    rows = [
        "| `report_to` | all launches are | how a launch continues | lines of steps that are done again |",
        "|---|---|---|---|",
    ]
    rows += [f"| `{one.key}` | {one.standing.value} | {one.how} | {one.redone} |" for one in TRACKERS]
    return "\n".join(rows)


def script_run_id(run: str, name: str, number: int) -> str:
    """Return the id of a tracker run that a script begins itself: the same in each launch.

    Args:
        run: the id of the first entry of the run's journal.
        name: tracker, project and name that the script gives.
        number: of the tracker runs that it has begun with this name in this launch, from 1.
    """
    return hashlib.sha256(f"{run}/script/{name}/{number}".encode()).hexdigest()[:_ID_CHARACTERS]


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


def init_kwargs(id: str, mlflow_run: str | None, resumed_step: int | None = None) -> dict[str, dict[str, Any]]:
    """Return what continues a tracker run in a custom loop, by accelerate's name of the tracker.

    Args:
        id: the tracker id of the training.
        mlflow_run: MLflow's id of its run; None if there is none.
        resumed_step: step of the newest commit; None if there is none.
    """
    found: dict[str, dict[str, Any]] = {
        WANDB.key: {"id": id, "resume": "allow"},
        TRACKIO.key: {"name": id, "resume": "allow"},
        SWANLAB.key: {"id": id, "resume": "allow"},
        COMET.key: {"experiment_key": id},
    }
    if resumed_step is not None:
        found |= {TENSORBOARD.key: {"purge_step": resumed_step + 1}, DVCLIVE.key: {"resume": True}}
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
