"""Trackers of a training: one tracker run for all its launches, with each line once.

`Trackers.name` gives the integrations of Trainer the id of the tracker run, through the environment variables that they read
while a training begins. After a resume the lines of a checkpoint that a tracker lacks are logged again (its machine is gone,
or it works offline), and lines that it has already are left out: the steps that are done again give the same lines.
`hf_spot.policy.trackers` is the table of trackers.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_callback import TrainerCallback

from hf_spot.log import warn_for_all
from hf_spot.policy import trackers as table
from hf_spot.policy.trackers import Told, Tracker, is_told, variables
from hf_spot.training.session.mlflow_run import mlflow_run
from hf_spot.training.session.script_runs import active_swanlab_run
from hf_spot.training.upstream import (
    AIM_HASH,
    AIM_RUN,
    CALLBACK_HANDLER,
    CALLBACKS,
    CLEARML_SET_UP,
    COMET_SET_UP,
    DVCLIVE_SET_UP,
    MLFLOW_SET_UP,
    SUMMARY_WRITER,
    SWANLAB_SET_UP,
    TENSORBOARD_DIR,
    TENSORBOARD_WRITER,
    TRACKIO_SET_UP,
    WANDB_SET_UP,
)

log = logging.getLogger("hf_spot")

_EVERY_LINE = "epoch"  # in all of Trainer's lines
_OF_AIM_ITSELF = "__system__"  # how the names of its values of the machine begin
_SET_UP = {
    table.WANDB: WANDB_SET_UP,
    table.MLFLOW: MLFLOW_SET_UP,
    table.DAGSHUB: MLFLOW_SET_UP,
    table.TRACKIO: TRACKIO_SET_UP,
    table.SWANLAB: SWANLAB_SET_UP,
    table.COMET: COMET_SET_UP,
    table.CLEARML: CLEARML_SET_UP,
    table.DVCLIVE: DVCLIVE_SET_UP,
}
_MLFLOWS = (table.MLFLOW, table.DAGSHUB)
_named: set[str] = set()  # the ids that this process has given to tracker runs


class Trackers:
    """The trackers of one training. Only rank 0 has any.

    Args:
        trainer: the Trainer.
        id_of_training: returns the tracker id of this training; called once, and only if a tracker needs it.
        places: where trackers wrote in earlier launches, from `places` of the commit that is resumed; empty for none.
        in_search: whether this is a trial of a hyperparameter search.
    """

    def __init__(
        self, trainer: Trainer, id_of_training: Callable[[], str], places: dict[str, Any], *, in_search: bool = False
    ) -> None:
        self._trainer = trainer
        self._id = functools.cache(id_of_training)
        self._before = places
        self._in_search = in_search
        self._resumed_step: int | None = None
        self._undo = contextlib.ExitStack()
        self._until_begun = self._undo.enter_context(contextlib.ExitStack())
        self._named: dict[str, Tracker] = {}
        self._places: dict[str, Any] = {}
        self._ids: dict[str, str | None] = {}
        self._tensorboard_is_new = False

    # -- before train() -----------------------------------------------------------------------------------------------

    def name(self, resumed_step: int | None) -> None:
        """Tell the integrations which tracker runs to continue, until `begun`.

        Args:
            resumed_step: step of the checkpoint that the training resumes from; None for a new training.
        """
        self._resumed_step = resumed_step
        if self._trainer.args.process_index != 0:
            return
        for tracker, callback in self._with_callbacks():
            if table.continued(tracker):
                with _border(tracker, "begins a new run in this launch"):
                    self._name(tracker, callback)
            if resumed_step is not None and tracker.named:
                log.info("%s does not continue in another launch: %s", tracker.shown, tracker.named)

    def _name(self, tracker: Tracker, callback: Any) -> None:
        if tracker is table.TENSORBOARD:
            self._continue_tensorboard(callback)
            return
        if tracker is table.TRACKIO:
            self._name_trackio(callback)
            return
        if tracker is table.AIM:
            self._name_aim(callback)
            return
        if tracker is table.DVCLIVE:
            self._name_dvclive(callback)
            return
        if tracker is table.CLEARML:
            self._name_clearml(callback)
            return
        assert tracker.id_variable is not None
        users = os.environ.get(tracker.id_variable)
        if self._in_search and tracker is table.COMET and not users:
            return  # Trainer creates an experiment for each trial, and refuses one that exists
        id = None if users else self._id()
        if tracker is table.WANDB and not self._name_wandb(id, users):
            return
        if tracker in _MLFLOWS and id is not None:
            id = mlflow_run(id, os.environ.get("MLFLOW_EXPERIMENT_NAME"), self._trainer.args.run_name)
            if id is None:
                active = importlib.import_module("mlflow").active_run().info.run_id
                self._tell_of_another(tracker, active, "MLFLOW_RUN_ID={}")
                return
        if id is not None:
            _named.add(id)
        self._ids[tracker.key] = id or users
        if tracker in _SET_UP:  # Neptune's callback begins a run in each training
            _SET_UP[tracker].set(callback, False)  # it may be set up for an earlier training
        for variable, value in variables(tracker, id, os.environ).items():
            os.environ[variable] = value
            self._until_begun.callback(os.environ.pop, variable, None)
        self._named[tracker.key] = tracker

    def _name_wandb(self, id: str | None, users: str | None) -> bool:
        """End the active run if it is that of an earlier training; return False if the script has begun one itself."""
        wandb = importlib.import_module("wandb")
        active = wandb.run
        if active is not None and active.id in _named and active.id != id:
            wandb.finish()
        elif active is not None and active.id not in (id, users):
            self._tell_of_another(table.WANDB, active.id, "WANDB_RUN_ID={} WANDB_RESUME=allow")
            return False
        # W&B reads its variables once in a process, and this may be its second training.
        plain = wandb.init
        vars(wandb)["init"] = _with_id(id, plain)
        self._until_begun.callback(vars(wandb).update, init=plain)
        return True

    def _tell_of_another(self, tracker: Tracker, active: str, how: str) -> None:
        """Log into a run that the script has begun itself, and say so if it is not that of the previous launch."""
        self._named[tracker.key] = tracker
        earlier = self._before.get(tracker.key, {}).get("id")
        if earlier is not None and earlier != active:
            log.info(
                "a run of %s was begun before the training, and is another one in each launch; to continue that of the "
                "previous launch, set %s",
                tracker.shown,
                how.format(earlier),
            )

    def _name_aim(self, callback: Any) -> None:
        """Continue the run of the commit. Aim's callback begins one when a Trainer is created, so that one is archived.

        Aim shows no archived runs unless it is asked to. It can't delete one whose files are open.
        """
        self._named[table.AIM.key] = table.AIM
        earlier = self._before.get(table.AIM.key, {}).get("id")
        if self._resumed_step is None or earlier is None or AIM_HASH.of(callback) == earlier:
            return
        begun = AIM_RUN.of(callback)
        if begun is not None:
            if AIM_HASH.of(callback) is None:  # the script has passed a run of its own
                return
            logged = [one["name"] for one in begun.collect_sequence_info(("metric",))["metric"]]
            begun.archived = all(name.startswith(_OF_AIM_ITSELF) for name in logged)  # not what the script has logged to it
            callback.close()
        AIM_RUN.set(callback, None)
        AIM_HASH.set(callback, earlier)

    def _name_dvclive(self, callback: Any) -> None:
        """Let DVCLive continue in its folder, which it would empty otherwise."""
        self._named[table.DVCLIVE.key] = table.DVCLIVE
        if self._resumed_step is None or callback.live is not None:  # a script's own `Live` is as the script has made it
            return
        DVCLIVE_SET_UP.set(callback, False)
        if not os.environ.get("DVCLIVE_RESUME"):
            os.environ["DVCLIVE_RESUME"] = "true"
            self._until_begun.callback(os.environ.pop, "DVCLIVE_RESUME", None)

    def _name_clearml(self, callback: Any) -> None:
        """Let ClearML continue the task of the commit: its server chooses the ids."""
        self._named[table.CLEARML.key] = table.CLEARML
        earlier = self._before.get(table.CLEARML.key, {}).get("id")
        task = importlib.import_module("clearml").Task
        active = task.current_task()
        if active is not None:
            self._tell_of_another(table.CLEARML, active.id, "Task.init(reuse_last_task_id='{}', continue_last_task=0)")
            return
        CLEARML_SET_UP.set(callback, False)
        if self._resumed_step is None or earlier is None:
            return
        plain = task.init

        def init(*args: Any, **more: Any) -> Any:
            # 0 is added to each step. Its default would be the number of the newest one.
            return plain(*args, **{"reuse_last_task_id": earlier, "continue_last_task": 0, **more})

        task.init = init
        self._until_begun.callback(setattr, task, "init", plain)

    def _name_trackio(self, callback: Any) -> None:
        """Give a Trackio run a name, which is what it is continued by, if the user gives none."""
        plain, args = callback.setup, self._trainer.args
        id = None if args.run_name else self._id()
        TRACKIO_SET_UP.set(callback, False)

        def setup(*given: Any, **more: Any) -> Any:
            before = args.run_name
            args.run_name = before or id
            try:
                return plain(*given, **more)
            finally:
                args.run_name = before

        callback.setup = setup
        self._until_begun.callback(vars(callback).pop, "setup", None)
        self._named[table.TRACKIO.key] = table.TRACKIO

    def _continue_tensorboard(self, callback: Any) -> None:
        self._named[table.TENSORBOARD.key] = table.TENSORBOARD
        if self._resumed_step is None:
            return
        if TENSORBOARD_DIR.of(callback) is None and "tensorboard" in self._before:
            folder = Path(self._trainer.args.output_dir or ".") / str(self._before["tensorboard"])
            TENSORBOARD_DIR.set(callback, str(folder))
        if TENSORBOARD_WRITER.of(callback) is None:  # otherwise the script has created one
            SUMMARY_WRITER.set(callback, partial(self._continued, SUMMARY_WRITER.of(callback), self._resumed_step))

    def _continued(self, make: Any, step: int, log_dir: str) -> Any:
        """Return a TensorBoard writer that discards what was logged after ``step``, and repeats no texts of a start."""
        self._tensorboard_is_new = not any(Path(log_dir).glob("events.out.tfevents.*"))
        # "Crashed at step T+X, restarted at step T": readers then discard what was written from T on, as of step T + 1 here.
        writer = make(log_dir=log_dir, purge_step=step + 1)
        if not self._tensorboard_is_new:
            plain = writer.add_text

            def add_text(tag: str, text_string: str, global_step: int | None = None, *args: Any, **kwargs: Any) -> None:
                if global_step is not None:  # the settings of Trainer and model have no step, and are already there
                    plain(tag, text_string, global_step, *args, **kwargs)

            writer.add_text = add_text
        return writer

    # -- after all callbacks' on_train_begin --------------------------------------------------------------------------

    def begun(self) -> None:
        """Log the lines of the checkpoint that a tracker lacks, and leave out those that it has, until its first new one."""
        trainer = self._trainer
        self._until_begun.close()
        if trainer.args.process_index != 0 or self._resumed_step is None:
            return
        for tracker, callback in self._with_callbacks():
            if tracker.key not in self._named:
                continue
            told: Told | None = None
            with _border(tracker, "may show the lines of repeated steps twice"):
                told = self._told(tracker, callback)
            if told is None:
                continue
            history = trainer.state.log_history
            missing = [line for number, line in enumerate(history) if not is_told(number, int(line["step"]), told)]
            for line in missing:
                self._log(callback, line)
            if missing:
                log.info(
                    "%s does not have %d of %d earlier lines here: they are logged again",
                    tracker.shown,
                    len(missing),
                    len(history),
                )
            if tracker is not table.TENSORBOARD and told.lines > len(history):
                self._leave_out(callback, told, len(history))

    def set_up(self) -> None:
        """Set up the callbacks outside ``train()``, for the last lines of a finished training, and do what `begun` does."""
        trainer = self._trainer
        for tracker, callback in self._with_callbacks():
            with _border(tracker, "does not get the end of the training"):
                callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
        self.begun()

    def _told(self, tracker: Tracker, callback: Any) -> Told | None:
        """Return what a tracker run contains; None if that can't be read."""
        if tracker is table.TENSORBOARD:
            # Its reader discards what comes after the resumed step, as `_continued` has told it.
            lines = 0 if self._tensorboard_is_new else len(self._trainer.state.log_history)
            return Told(lines, self._resumed_step or 0)
        if tracker is table.WANDB:
            run = importlib.import_module("wandb").run
            if run is None or run.disabled:
                return None
            return Told(run.step, int(run.summary.get("train/global_step", -1)))
        if tracker in _MLFLOWS:
            mlflow = importlib.import_module("mlflow")
            run = mlflow.active_run()
            if run is None:
                return None
            steps = [one.step for one in mlflow.MlflowClient().get_metric_history(run.info.run_id, _EVERY_LINE)]
            return Told(len(steps), max(steps, default=-1))
        if tracker is table.TRACKIO:
            return self._told_to_trackio()
        if tracker is table.DVCLIVE:
            return _told_to_dvclive(callback)
        if tracker is table.SWANLAB:
            run = active_swanlab_run()
            return Told(0) if run is not None and run.mode in ("local", "offline") else None
        if tracker is table.COMET:
            experiment = importlib.import_module("comet_ml").get_running_experiment()
            return Told(0) if experiment is not None and "Offline" in type(experiment).__name__ else None
        return None  # their lines have steps, at which the same values are drawn over each other

    def _told_to_trackio(self) -> Told | None:
        context = importlib.import_module("trackio").context_vars
        if context.current_server.get() is not None or context.current_run.get() is None:
            return None
        storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
        rows = storage.get_logs(context.current_project.get(), context.current_run.get().name)
        steps = [int(row["train/global_step"]) for row in rows if "train/global_step" in row]
        return Told(len(rows), max(steps, default=-1))

    def _log(self, callback: Any, line: dict[str, Any]) -> None:
        """Let a callback log a line of an earlier step."""
        trainer, state = self._trainer, copy.copy(self._trainer.state)
        state.global_step, state.epoch = line.get("step", 0), line.get("epoch", state.epoch)
        logs = {name: value for name, value in line.items() if name != "step"}
        callback.on_log(trainer.args, state, trainer.control, model=trainer.model, logs=logs)

    def _leave_out(self, callback: Any, told: Told, number: int) -> None:
        """Leave out the lines that a tracker has, until the first one that it has not."""
        plain, left = callback.on_log, iter(range(number, told.lines))

        def on_log(args: Any, state: Any, control: Any, **more: Any) -> Any:
            if is_told(next(left, told.lines), state.global_step, told):
                return None
            vars(callback).pop("on_log", None)
            return plain(args, state, control, **more)

        callback.on_log = on_log
        self._undo.callback(vars(callback).pop, "on_log", None)

    # -- for the journal ----------------------------------------------------------------------------------------------

    def places(self) -> dict[str, Any]:
        """Return where trackers write, by their keys: for later launches, and for reports."""
        if self._trainer.args.process_index != 0:
            return {}
        for tracker, callback in self._with_callbacks():
            if tracker.key in self._named and tracker.key not in self._places:
                found: Any = None
                with _border(tracker, "is not linked in reports"):
                    found = self._place(tracker, callback)
                if found:
                    self._places[tracker.key] = found
        return dict(self._places)

    def _place(self, tracker: Tracker, callback: Any) -> Any:
        if tracker is table.TENSORBOARD:
            folder = TENSORBOARD_DIR.of(callback)
            return None if folder is None else os.path.relpath(folder, self._trainer.args.output_dir or ".")
        if tracker is table.WANDB:
            run = importlib.import_module("wandb").run
            return None if run is None or run.disabled else {"id": run.id, "url": run.url or str(Path(run.dir).parent)}
        if tracker in _MLFLOWS:
            mlflow = importlib.import_module("mlflow")
            run = mlflow.active_run()
            if run is None:
                return None
            uri, info = mlflow.get_tracking_uri(), run.info
            page = f"{uri}/#/experiments/{info.experiment_id}/runs/{info.run_id}" if uri.startswith("http") else uri
            return {"id": info.run_id, "url": page}
        if tracker is table.TRACKIO:
            trackio = importlib.import_module("trackio")
            context = trackio.context_vars
            run, server = context.current_run.get(), context.current_server.get()
            if run is None:
                return None
            space = context.current_space_id.get()
            url = f"https://huggingface.co/spaces/{space}" if space else server or str(trackio.utils.TRACKIO_DIR)
            return {"id": f"{context.current_project.get()}/{run.name}", "url": url}
        if tracker is table.AIM:
            run = AIM_RUN.of(callback)
            return None if run is None else {"id": run.hash, "url": str(run.repo.path)}
        if tracker is table.DVCLIVE:
            return None if callback.live is None else {"id": "", "url": os.path.abspath(callback.live.dir)}
        if tracker is table.CLEARML:
            task = importlib.import_module("clearml").Task.current_task()
            return None if task is None else {"id": task.id, "url": task.get_output_log_web_page()}
        assert tracker.id_variable is not None
        return {"id": self._ids.get(tracker.key)}

    def close(self) -> None:
        """Undo all of it: the next training of this process gets other tracker runs."""
        self._undo.close()

    def _with_callbacks(self) -> list[tuple[Tracker, TrainerCallback]]:
        found = [
            (table.of_callback([kind.__name__ for kind in type(one).__mro__]), one)
            for one in CALLBACKS.of(CALLBACK_HANDLER.of(self._trainer))
        ]
        return [(tracker, one) for tracker, one in found if tracker is not None]


def _told_to_dvclive(callback: Any) -> Told | None:
    """Return what DVCLive's folder contains; it numbers lines, and does not know their steps."""
    live = callback.live
    if live is None:
        return None
    with contextlib.suppress(FileNotFoundError):
        rows = (Path(live.plots_dir) / "metrics" / f"{_EVERY_LINE}.tsv").read_text().splitlines()[1:]
        live.step = max(live.step, 1)  # it takes a folder with one line for an empty one
        return Told(len(rows), sys.maxsize)
    return Told(0)


def _with_id(id: str | None, plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def init(*args: Any, **more: Any) -> Any:
        chosen = any(more.get(name) for name in ("id", "resume", "resume_from", "fork_from"))
        if not chosen and id is not None:
            more["id"] = id
        if not chosen:
            more["resume"] = os.environ.get("WANDB_RESUME") or "allow"
        return plain(*args, **more)

    return init


@contextlib.contextmanager
def _border(tracker: Tracker, lost: str) -> Iterator[None]:
    """Log an exception of a tracker's library with what follows from it: no tracker may end a training."""
    try:
        yield
    except Exception as error:
        warn_for_all("%s %s: %s: %s", tracker.shown, lost, type(error).__name__, error)
