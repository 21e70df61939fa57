"""All launches of a training are one run of each tracker, with each line once. With the real trackers, offline.

``pip install -e '.[trackers]'`` brings them; a test of one that is not there is skipped.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from transformers import Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import TrainerCallback

from hf_spot import Run, SpotArguments, SpotCallback, SpotCheckpointManager, TrainingPreempted
from hf_spot.policy.trackers import TRACKERS
from hf_spot.training.session import recognition
from hf_spot.training.trainer import trackers
from tests.tracker_files import WandbFile, read_mlflow, read_trackio, read_wandb, values
from tests.training.conftest import Patient, Recorder, make_trainer
from tests.training.test_callback import QUIET, preempt
from tests.waiting import wait_for

SETTINGS: dict[str, Any] = {"logging_steps": 2, "save_steps": 4, "eval_strategy": "steps", "eval_steps": 6}
VARIABLES = ("WANDB_RUN_ID", "WANDB_RESUME", "MLFLOW_RUN_ID", "SWANLAB_RUN_ID", "SWANLAB_RESUME", "COMET_EXPERIMENT_KEY")


def needs(name: str) -> None:
    pytest.importorskip(name, reason=f"{name} comes with pip install -e '.[trackers]'")


@pytest.fixture(scope="module")
def wandb_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where W&B writes: it reads its variables once in a process."""
    return tmp_path_factory.mktemp("wandb")


@pytest.fixture
def wandb_files(wandb_folder: Path, place: Path) -> Callable[[], list[WandbFile]]:
    needs("wandb")
    before = {file.path for file in read_wandb(wandb_folder)}

    def files() -> list[WandbFile]:
        """Those of this test, once W&B has written all of them."""

        def new() -> list[WandbFile]:
            return [file for file in read_wandb(wandb_folder) if file.path not in before]

        wait_for(lambda: all(file.ended for file in new()))
        return new()

    return files


@pytest.fixture
def place(tmp_path: Path, wandb_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which all trackers write, and no connection to any server."""
    for name in (*VARIABLES, "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DIR", str(wandb_folder))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{wandb_folder.parent}/mlflow.db")  # it takes seconds to make one
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    yield tmp_path
    assert not [name for name in VARIABLES if name in os.environ]
    ended()


def ended() -> None:
    """End this process's tracker runs, as the end of a process does."""
    trackers._named.clear()
    for name, end in (("wandb", "finish"), ("mlflow", "end_run"), ("trackio", "finish")):
        if name in sys.modules:
            module = importlib.import_module(name)
            if name == "trackio" and module.context_vars.current_run.get() is None:
                continue
            getattr(module, end)()


def interrupted(store: str, folder: Path, tracker: str, before: Callable[[], None] = lambda: None, **settings: Any) -> None:
    """Three launches: a notice at step 5; a crash in step 11, with steps 9 and 10 told; the rest."""

    def die() -> None:
        raise ZeroDivisionError

    def make(*callbacks: TrainerCallback) -> Trainer:
        before()
        return make_trainer(folder / "out", *callbacks, **SETTINGS, report_to=tracker, **settings)

    callback = SpotCallback(store, SpotArguments(notice="signal"))
    with pytest.raises(TrainingPreempted):
        make(callback, Patient(callback), Recorder(5, preempt(callback))).train()
    ended()
    callback = SpotCallback(store, QUIET)
    with pytest.raises(ZeroDivisionError):
        make(callback, Patient(callback), Recorder(11, die)).train()
    ended()
    make(SpotCallback(store, QUIET)).train()
    ended()


def undisturbed(folder: Path, tracker: str, **settings: Any) -> None:
    make_trainer(folder / "peace", **SETTINGS, report_to=tracker, **settings).train()
    ended()


def places(store: str) -> dict[str, Any]:
    return Run(store).checkpoints()[-1].details["trackers"]


def test_wandb_has_one_run_whose_newest_file_is_the_whole_curve(
    store: str, place: Path, wandb_files: Callable[[], list[WandbFile]]
) -> None:
    undisturbed(place, "wandb")
    (peace,) = wandb_files()
    interrupted(store, place, "wandb")
    files = [file for file in wandb_files() if file.id != peace.id]
    assert len(files) == 3
    assert {file.id for file in files} == {Run(store).tracker_id(1)} == {places(store)["wandb"]["id"]}
    assert values(files[-1].rows) == values(peace.rows)
    assert [row.number for row in files[-1].rows] == list(range(len(files[-1].rows)))
    # Whoever sends all three files to a server sends the same rows under the same numbers.
    whole = {row.number: row for row in files[-1].rows}
    for file in files[:-1]:
        assert values(file.rows) == values([whole[row.number] for row in file.rows])
    assert places(store)["wandb"]["url"] in {str(file.path.parent) for file in files}


def test_two_trainings_of_a_process_have_two_runs_and_leave_no_variable(
    store: str, place: Path, wandb_files: Callable[[], list[WandbFile]]
) -> None:
    for number in (1, 2):
        make_trainer(
            place / f"out-{number}", SpotCallback(store, QUIET), **SETTINGS, report_to="wandb", learning_rate=number / 100
        ).train()
        assert "WANDB_RUN_ID" not in os.environ
        assert "WANDB_RESUME" not in os.environ
    ended()
    files = wandb_files()
    assert [file.id for file in files] == [Run(store).tracker_id(1), Run(store).tracker_id(2)]
    assert [max(row.step for row in file.rows) for file in files] == [12, 12]
    assert len(files[0].rows) == len(files[1].rows)


@pytest.mark.filterwarnings("ignore")
def test_an_id_of_the_user_is_used_in_every_launch(store: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("mlflow")
    import mlflow

    client = mlflow.MlflowClient()
    users = client.create_run(client.create_experiment(place.name)).info.run_id
    interrupted(store, place, "mlflow", lambda: monkeypatch.setenv("MLFLOW_RUN_ID", users))  # MLflow removes it at a run's end
    (run,) = read_mlflow(os.environ["MLFLOW_TRACKING_URI"], place.name)
    assert run.id == users
    assert [step for step, _ in run.metrics["loss"]] == [2, 4, 6, 8, 10, 12]


def test_a_run_that_the_script_begins_is_left_and_told_how_to_be_continued(
    store: str, place: Path, caplog: pytest.LogCaptureFixture, wandb_files: Callable[[], list[WandbFile]]
) -> None:
    import wandb

    caplog.set_level(logging.INFO, "hf_spot")
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    first = wandb.init(project="mine").id
    with pytest.raises(TrainingPreempted):
        make_trainer(place / "out", callback, Recorder(5, preempt(callback)), **SETTINGS, report_to="wandb").train()
    assert wandb.run is not None and wandb.run.id == first
    ended()
    assert "WANDB_RUN_ID" not in caplog.text
    second = wandb.init(project="mine").id
    make_trainer(place / "out", SpotCallback(store, QUIET), **SETTINGS, report_to="wandb").train()
    assert wandb.run is not None and wandb.run.id == second
    ended()
    assert f"set WANDB_RUN_ID={first} WANDB_RESUME=allow" in caplog.text
    newest = wandb_files()[-1]
    assert newest.id == second
    assert [row.step for row in newest.rows] == [2, 4, 6, 6, 8, 10, 12, 12, 12]  # the whole curve, whatever it is called


@pytest.mark.filterwarnings("ignore")  # MLflow's own, about the libraries that it uses
def test_mlflow_has_one_run_with_each_step_once(store: str, place: Path) -> None:
    needs("mlflow")
    undisturbed(place, "mlflow")
    (peace,) = read_mlflow(os.environ["MLFLOW_TRACKING_URI"], place.name)
    interrupted(store, place, "mlflow")
    runs = read_mlflow(os.environ["MLFLOW_TRACKING_URI"], place.name)
    assert len(runs) == 2
    (ours,) = [run for run in runs if run.id != peace.id]
    assert ours.metrics == peace.metrics
    assert ours.status == "FINISHED"
    assert places(store)["mlflow"]["id"] == ours.id


@pytest.mark.filterwarnings("ignore")  # MLflow's own, about the libraries that it uses
def test_mlflow_takes_a_changed_setting_and_the_experiment_of_the_script(
    store: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("mlflow")
    import mlflow

    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    mlflow.set_experiment(place.name)
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    with pytest.raises(TrainingPreempted):
        make_trainer(place / "out", callback, Recorder(5, preempt(callback)), **SETTINGS, report_to="mlflow").train()
    ended()
    changed = SETTINGS | {"logging_nan_inf_filter": False}  # MLflow's parameters can't be changed
    make_trainer(place / "out", SpotCallback(store, QUIET), **changed, report_to="mlflow").train()
    ended()
    (run,) = read_mlflow(os.environ["MLFLOW_TRACKING_URI"], place.name)
    assert [step for step, _ in run.metrics["loss"]] == [2, 4, 6, 8, 10, 12]


def test_trackio_has_one_run_with_each_line_once(store: str, place: Path) -> None:
    needs("trackio")
    project = store.rpartition("/")[2]
    more = {"trackio_static_space_id": False}
    undisturbed(place, "trackio", project=f"peace-{project}", **more)
    ((_, peace),) = read_trackio(f"peace-{project}").items()
    interrupted(store, place, "trackio", project=project, **more)
    ((name, rows),) = read_trackio(project).items()
    assert name == Run(store).tracker_id(1)
    assert values(rows) == values(peace)
    assert places(store)["trackio"]["id"] == f"{project}/{name}"


@pytest.mark.filterwarnings("ignore")
def test_a_custom_loop_continues_what_accelerate_began(place: Path, wandb_files: Callable[[], list[WandbFile]]) -> None:
    needs("mlflow")
    import mlflow

    mlflow.set_experiment(place.name)  # as in a new process, which has no other one
    ids = set()
    for launch in (1, 2):
        accelerator = Accelerator(cpu=True, log_with=["wandb", "mlflow"])
        manager = SpotCheckpointManager.for_accelerator(accelerator, place / "run", args=QUIET)
        accelerator.init_trackers(place.name, init_kwargs=manager.tracker_kwargs(mlflow_experiment=place.name))
        accelerator.log({"loss": float(launch)}, step=launch)
        accelerator.end_training()
        ids.add(manager.run.tracker_id(1))
        manager.close()
        ended()
    assert {file.id for file in wandb_files()} == ids
    (run,) = read_mlflow(os.environ["MLFLOW_TRACKING_URI"], place.name)
    assert run.metrics["loss"] == [(1, 1.0), (2, 2.0)]


def test_every_tracker_of_trainer_and_accelerate_has_a_row() -> None:
    known = {tracker.key: tracker.callback for tracker in TRACKERS}
    of_trainer = {key: callback.__name__ for key, callback in INTEGRATION_TO_CALLBACK.items()}
    assert of_trainer.items() <= known.items()
    assert {str(one) for one in LOGGER_TYPE_TO_CLASS} <= known.keys()
    assert len(known) == len(TRACKERS)


class CodeCarbonCallback(TrainerCallback):
    """By its name, as its package may not be here."""


def test_a_tracker_that_begins_anew_is_named_when_a_training_resumes(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    with pytest.raises(TrainingPreempted):
        make_trainer(tmp_path / "one", callback, CodeCarbonCallback(), Recorder(3, preempt(callback))).train()
    assert "CodeCarbon" not in caplog.text
    make_trainer(tmp_path / "two", SpotCallback(store, QUIET), CodeCarbonCallback()).train()
    assert "CodeCarbon does not continue in another launch: it measures each launch by itself" in caplog.text


class MLflowCallback(TrainerCallback):
    """Its library can't be imported, or fails."""

    _initialized = False


def test_a_library_that_fails_is_named_and_ends_no_training(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    trainer = make_trainer(tmp_path / "one", SpotCallback(store, QUIET), MLflowCallback())
    assert trainer.train().global_step == 12
    assert "MLflow begins a new run in this launch: ModuleNotFoundError" in caplog.text


def test_the_lines_of_a_lost_machine_are_logged_again(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.training.trainer.test_log_window import board

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "peace-board"))
    make_trainer(tmp_path / "peace", **SETTINGS, report_to="tensorboard").train()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board-1"))
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    with pytest.raises(TrainingPreempted):
        make_trainer(tmp_path / "out", callback, Recorder(7, preempt(callback)), **SETTINGS, report_to="tensorboard").train()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board-2"))
    recognition.forget_finished()
    make_trainer(tmp_path / "other", SpotCallback(store, QUIET), **SETTINGS, report_to="tensorboard").train()
    one, other = board(tmp_path / "board-2"), board(tmp_path / "peace-board")
    assert one == other
