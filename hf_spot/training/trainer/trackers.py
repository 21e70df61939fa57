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
from hf_spot.training.upstream import (
    CALLBACK_HANDLER,
    CALLBACKS,
    COMET_SET_UP,
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
_SET_UP = {
    table.WANDB: WANDB_SET_UP,
    table.MLFLOW: MLFLOW_SET_UP,
    table.TRACKIO: TRACKIO_SET_UP,
    table.SWANLAB: SWANLAB_SET_UP,
    table.COMET: COMET_SET_UP,
}
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
            with _border(tracker, "begins a new run in this launch"):
                self._name(tracker, callback)
        for callback in CALLBACKS.of(CALLBACK_HANDLER.of(self._trainer)):
            kinds = {kind.__name__ for kind in type(callback).__mro__} & table.BEGIN_ANEW.keys()
            if resumed_step is not None and kinds:
                name = min(kinds)
                log.info("%s begins a new tracker run in each launch; to continue one, %s", name, table.BEGIN_ANEW[name])

    def _name(self, tracker: Tracker, callback: Any) -> None:
        if tracker is table.TENSORBOARD:
            self._continue_tensorboard(callback)
            return
        if tracker is table.TRACKIO:
            self._name_trackio(callback)
            return
        assert tracker.id_variable is not None
        users = os.environ.get(tracker.id_variable)
        if self._in_search and tracker is table.COMET and not users:
            return  # Trainer creates an experiment for each trial, and refuses one that exists
        id = None if users else self._id()
        if tracker is table.WANDB and not self._name_wandb(id, users):
            return
        if tracker is table.MLFLOW and id is not None:
            id = mlflow_run(id, os.environ.get("MLFLOW_EXPERIMENT_NAME"), self._trainer.args.run_name)
            if id is None:
                return
        if id is not None:
            _named.add(id)
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
            self._named[table.WANDB.key] = table.WANDB
            earlier = self._before.get(table.WANDB.key, {}).get("id")
            if earlier is not None and earlier != active.id:
                log.info(
                    "a run of Weights & Biases was begun before the training, and is another one in each launch; to continue "
                    "that of the previous launch, set WANDB_RUN_ID=%s WANDB_RESUME=allow",
                    earlier,
                )
            return False
        # W&B reads its variables once in a process, and this may be its second training.
        plain = wandb.init
        vars(wandb)["init"] = _with_id(id, plain)
        self._until_begun.callback(vars(wandb).update, init=plain)
        return True

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
        if tracker is table.MLFLOW:
            mlflow = importlib.import_module("mlflow")
            run = mlflow.active_run()
            if run is None:
                return None
            steps = [one.step for one in mlflow.MlflowClient().get_metric_history(run.info.run_id, _EVERY_LINE)]
            return Told(len(steps), max(steps, default=-1))
        if tracker is table.TRACKIO:
            return self._told_to_trackio()
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
        if tracker is table.MLFLOW:
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
        assert tracker.id_variable is not None
        return {"id": os.environ.get(tracker.id_variable)}

    def close(self) -> None:
        """Undo all of it: the next training of this process gets other tracker runs."""
        self._undo.close()

    def _with_callbacks(self) -> list[tuple[Tracker, TrainerCallback]]:
        callbacks = CALLBACKS.of(CALLBACK_HANDLER.of(self._trainer))
        return [
            (tracker, one)
            for tracker in table.TRACKERS
            for one in callbacks
            if any(kind.__name__ == tracker.callback for kind in type(one).__mro__)
        ]


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
