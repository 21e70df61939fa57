"""SpotCallback: Trainer's events in, `TrainerSession`'s decisions out as ``control.should_*``; no policy of its own."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, TrainOutput

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError, SpotError, TrainingPreempted
from hf_spot.policy.preemption import Action, Decision
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.progress import show_log
from hf_spot.runtime import STORE_VARIABLE, Runtime
from hf_spot.training.data.worker_processes import shield
from hf_spot.training.trainer.accumulation import Accumulation
from hf_spot.training.trainer.batch_size import batches, from_details, to_details
from hf_spot.training.trainer.evaluation import Evaluations, Stopped
from hf_spot.training.trainer.notebook import shows_errors
from hf_spot.training.trainer.resume_fixes import (
    carry_callback_states,
    carry_counters,
    counters,
    dispatched_batches_skipped,
    set_epoch,
)
from hf_spot.training.trainer.saves import Saves
from hf_spot.training.trainer.streams import chance_is_named, resumed_in_its_pass
from hf_spot.training.trainer.trainer_session import SAVE_IS_DUE, TrainerSession
from hf_spot.training.trainer.weights import loaded_whole

log = logging.getLogger("hf_spot")


class SpotCallback(TrainerCallback):
    """Makes a Trainer survive preemption: ``Trainer(..., callbacks=[SpotCallback("s3://bucket/runs/my-run")])``.

    ``trainer.train()`` then starts, or goes on from the run's newest committed checkpoint; ``train(resume_from_checkpoint=
    False)`` starts afresh. Every checkpoint that Trainer saves is uploaded in the background. On a preemption notice the
    training saves, commits and raises `TrainingPreempted` out of ``train()``.

    Args:
        store: URL of the run. None: ``$HF_SPOT_STORE`` (set by ``hf-spot launch``), else the Trainer's ``output_dir``
            itself is the run (EFS, Filestore, NFS).
        args: settings; None takes those of ``hf-spot launch``, or the defaults.

    Raises:
        ConfigError: ``store`` is not the store of the ``hf-spot launch`` that started this process.
    """

    # Not an ExportableState: resuming a checkpoint that was saved without this callback would raise KeyError in the next save.

    def __init__(self, store: str | os.PathLike[str] | None = None, args: SpotArguments | None = None) -> None:
        self._runtime = Runtime.from_environ(os.environ)
        self._store = None if store is None else os.fspath(store)
        if self._runtime is not None:
            if self._store is not None and self._store.rstrip("/") != self._runtime.store.rstrip("/"):
                raise ConfigError(
                    f"the script says SpotCallback({self._store!r}), hf-spot launch says --store {self._runtime.store}",
                    hint=f"hf-spot launch --store {self._store} …, or SpotCallback() without a store",
                )
            self._store = self._runtime.store
        self.args = args or (self._runtime.arguments if self._runtime else SpotArguments())
        show_log()
        self._session: TrainerSession | None = None
        self._evaluations: Evaluations | None = None
        self._saves: Saves | None = None
        self._saved_step = -1
        self._stop_reason: str | None = None
        self._added: str | None = None  # why a save that Trainer did not ask for was added
        self._evaluation_skipped = False
        self._accumulation: Accumulation | None = None
        self._save_at_epoch_end = False
        self._resumed_epoch_is_ahead = False
        self.resume_from_checkpoint: str | None = None
        patch(Trainer)

    # -- Trainer's events, in the order of the loop -------------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Points Trainer at the best checkpoint where it stands on this machine, and callbacks at what they knew."""
        if self._session is None or self._saves is None:
            return
        if self._session.best_folder is not None:
            state.best_model_checkpoint = str(self._session.best_folder)
        self._saves.watch()
        if self._session.restored is not None:
            carry_callback_states(self._session.trainer)
            carry_counters(self._session.trainer, self._session.restored.details.get("counters", {}))

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Makes sure that a resumed epoch has the order that it began with."""
        if self._session is None:
            return
        loader = kwargs.get("train_dataloader")
        resumed, self._resumed_epoch_is_ahead = self._resumed_epoch_is_ahead, False
        if resumed:
            set_epoch(loader, int(state.epoch or 0))
        checkpoint = Path(str(self.resume_from_checkpoint)) if resumed and not args.ignore_data_skip else None
        self._session.random_states.begin_epoch(loader, checkpoint, middle=not _is_epoch_end(state))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A step of several micro-batches may be left in its middle: remembers what it would have to return to."""
        if self._session is not None:
            self._session.step_begins()
        if self._accumulation is not None and args.gradient_accumulation_steps > 1:
            self._accumulation.begin()

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Answers what was heard, when the rest of the step would take too long."""
        if self._session is None or self._accumulation is None:
            return
        self._session.random_states.micro_batch_ended()
        rest_s = self._accumulation.micro_batch_ended()
        decision = self._session.micro_batch_ended(rest_s, rewindable=self._accumulation.rewindable)
        if decision is None:
            return
        log.warning("step %d is left in its middle; the next launch does it again", state.global_step + 1)
        self._stop(decision, control)
        # Trainer leaves its loop, and saves behind `on_epoch_end`. A step that has been saved is not saved twice.
        self._save_at_epoch_end = control.should_save and state.global_step not in (0, self._saved_step)
        if self._save_at_epoch_end:
            self._accumulation.rewind()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The ranks agree while the optimizer works."""
        if self._session is not None and not self._session.agreement.alone:
            self._session.ask()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Answers what was heard."""
        if self._session is None:
            return
        self._added = None
        self._session.random_states.micro_batch_ended()
        self._session.random_states.step_ended()
        decision = self._session.step_ended(state.global_step)
        if decision is not None and decision.action is Action.SAVE_AND_GO_ON:
            due = decision is SAVE_IS_DUE
            if not self._saves_anyway(args, state) and not (due and self._can_wait(args, state, control)):
                self._added = "cadence" if due else "advisory"
                control.should_save = True
        elif decision is not None:
            self._evaluation_skipped = control.should_evaluate
            control.should_evaluate = False
            control.should_log = True
            self._stop(decision, control)
        if control.should_save:
            self._session.save_begins()

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A notice ends an evaluation, which may take longer than the machine lives."""
        if (
            self._evaluations is not None
            and self._evaluations.running
            and self._session is not None
            and self._session.was_going()
        ):
            self._evaluations.cut()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A save after an evaluation begins here."""
        if self._session is not None and control.should_save:
            self._session.save_begins()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hands the checkpoint over."""
        if self._session is None or state.global_step == self._saved_step:
            return
        self._saved_step = state.global_step
        stopping = self._stop_reason is not None
        complete = state.global_step >= state.max_steps or (control.should_training_stop and not stopping)
        reason = "notice" if stopping else self._added or ("end" if complete else "schedule")
        request = CommitRequest(
            step=state.global_step,
            stage=self._session.stage,
            reason=reason,
            complete=complete,
            best_step=state.best_global_step,
            world_size=args.world_size,
            details={
                "evaluation_pending": self._evaluation_pending(args, state),
                "max_steps": state.max_steps,
                "output_dir": str(self._session.output_dir),
                "epoch_of_data": state.epoch,
                "counters": counters(self._session.trainer),
                **to_details(batches(self._session.trainer)),
            },
        )
        self._session.saved(self._session.output_dir / f"checkpoint-{state.global_step}", request)
        if stopping:
            state.best_model_checkpoint = None  # as in `on_epoch_end`, which may have passed already

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called after the last epoch, and after every early stop, before Trainer logs, evaluates and saves once more."""
        if self._session is None:
            return
        if control.should_training_stop and self._saves is not None:
            self._saves.settle()  # the best model may be loaded from a file
        if self._stop_reason is not None:
            control.should_log = control.should_evaluate = False
            control.should_save, self._save_at_epoch_end = self._save_at_epoch_end, False
            if control.should_save:
                self._session.save_begins()
            # _finalize_training would load it, and with save_total_limit=1 delete the checkpoint just written.
            state.best_model_checkpoint = None
            return
        if control.should_save and self._saved_step == state.global_step:
            control.should_save = False  # the same step twice would rewrite a folder that is being uploaded
        elif control.should_training_stop and self._saved_step != state.global_step:
            control.should_save = True  # whatever the strategy: a finished run ends with its last step committed
        if control.should_save:
            self._session.save_begins()

    # -- around train() -----------------------------------------------------------------------------------------------

    def run(self, trainer: Trainer, train: Any, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        """What ``trainer.train()`` does when this callback is among the trainer's."""
        url = self._store or os.environ.get(STORE_VARIABLE) or str(trainer.args.output_dir)
        self._saved_step, self._stop_reason, self._evaluation_skipped = -1, None, False
        session = TrainerSession(trainer, url, self.args, self._runtime)
        with contextlib.closing(session):
            folder = session.begin(resume_from_checkpoint)
            self.resume_from_checkpoint = folder if session.restored else None
            if session.restored is not None and session.restored.ref.complete:
                log.info("step %d was the last one: nothing is left to train", session.restored.step)
                session.stage_finished()
                return _load_finished(trainer, str(folder), session)
            if session.restored is not None:
                self._saved_step = session.restored.step
                pending = session.restored.details.get("evaluation_pending")
                session.random_states.resume(self._make_up_for_evaluation if pending else lambda: None)
            shield()
            evaluated_before = session.restored is not None and _has_evaluated(session.output_dir / session.restored.name)
            self._session = session
            self._accumulation = Accumulation(trainer, session.random_states)
            self._evaluations = Evaluations(
                trainer, session.random_states, functools.partial(self._evaluation_was_cut, trainer), evaluated_before
            )
            self._saves = Saves(
                trainer,
                session.agreement,
                session.disk,
                session.behind,
                session.random_states.save,
                functools.partial(self._save_failed, trainer),
            )
            self._resumed_epoch_is_ahead = session.restored is not None
            try:
                with (
                    loaded_whole(trainer),
                    dispatched_batches_skipped(),
                    chance_is_named(trainer),
                    self._stream_resumed(trainer, session),
                ):
                    result = train(trainer, folder, *args, **kwargs)
                session.end(trainer.state.global_step)
            except TrainingPreempted as preempted:
                if not shows_errors():
                    log.warning("%s", preempted)
                raise
            except BaseException as error:
                self._saves.settle()
                session.failed(error)
                raise
            finally:
                self._evaluations.close()
                self._saves.close()
                self._session = self._evaluations = self._accumulation = self._saves = None
            return result

    def _stream_resumed(self, trainer: Trainer, session: TrainerSession) -> contextlib.AbstractContextManager[None]:
        details = session.restored.details if session.restored else {}
        before = from_details(details)
        if before is None or "epoch_of_data" not in details or trainer.args.ignore_data_skip:
            return contextlib.nullcontext()
        return resumed_in_its_pass(trainer, details, before, batches(trainer))

    @staticmethod
    def _saves_anyway(args: TrainingArguments, state: TrainerState) -> bool:
        """At the end of an epoch Trainer saves after its evaluation: that one is worth more."""
        return args.save_strategy == SaveStrategy.EPOCH and _is_epoch_end(state)

    @staticmethod
    def _can_wait(args: TrainingArguments, state: TrainerState, control: TrainerControl) -> bool:
        """Whether a save that is due can as well be that of a later step, where Trainer saves this one, or would take a
        checkpoint of it for the best: without the added save there would be none to go back to at the end."""
        might_be_best = args.load_best_model_at_end and control.should_evaluate
        return control.should_save or might_be_best or state.global_step >= state.max_steps

    def _stop(self, decision: Decision, control: TrainerControl) -> None:
        self._stop_reason = decision.why
        control.should_save = decision.action is Action.SAVE_AND_STOP
        control.should_training_stop = True

    def _save_failed(self, trainer: Trainer, why: SpotError) -> None:
        assert self._session is not None
        stopping = self._stop_reason is not None
        if stopping:
            trainer.state.best_model_checkpoint = None  # as in `on_save`, which is not called
        self._session.save_failed(why, stops=not stopping and self.args.on_save_error == "stop")

    def _evaluation_was_cut(self, trainer: Trainer) -> None:
        assert self._session is not None
        self._evaluation_skipped = True
        decision = self._session.step_ended(trainer.state.global_step)
        if decision is None or decision.action is Action.SAVE_AND_GO_ON:
            # The notice was taken back in this moment, but the evaluation is gone: the next launch makes up for it.
            decision = Decision(Action.SAVE_AND_STOP, "a notice that has been taken back ended an evaluation")
            self._session.preempted = decision
        self._stop(decision, trainer.control)
        if self._saved_step == trainer.state.global_step:
            trainer.control.should_save = False  # it is committed with the evaluation pending
        if trainer.control.should_save:
            self._session.save_begins()

    def _make_up_for_evaluation(self) -> None:
        """At the one moment where it draws the random numbers that it would have drawn: right after Trainer has restored
        the RNG."""
        assert self._session is not None and self._evaluations is not None
        try:
            self._evaluations.make_up()
        except Stopped:
            self._saved_step = -1  # the checkpoint that was resumed is the last one: it is saved again to say so
            raise
        if self._stop_reason is not None:
            self._session.leave(self._session.restored.step if self._session.restored else 0)

    def _evaluation_pending(self, args: TrainingArguments, state: TrainerState) -> bool:
        """True when an uninterrupted run evaluates between this save and the next step: a resumed one has to make up for it,
        because the evaluation draws random numbers, picks the best model and may step the schedule."""
        at_epoch_end = (
            args.eval_strategy == IntervalStrategy.EPOCH and _is_epoch_end(state) and args.eval_delay <= (state.epoch or 0)
        )
        evaluated = any(
            line.get("step") == state.global_step and any(key.startswith("eval_") for key in line) for line in state.log_history
        )
        return self._evaluation_skipped or (at_epoch_end and not evaluated)


def _has_evaluated(checkpoint: Path) -> bool:
    history = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).log_history
    return any(key.startswith("eval_") for line in history for key in line)


def _is_epoch_end(state: TrainerState) -> bool:
    return state.epoch is not None and float(state.epoch).is_integer()


def _load_finished(trainer: Trainer, folder: str, session: TrainerSession) -> TrainOutput:
    """Leaves the trainer as ``train()`` left it when it finished, without training: Trainer itself would do one step more."""
    with loaded_whole(trainer):
        trainer._load_from_checkpoint(folder)
    trainer.state = TrainerState.load_from_json(os.path.join(folder, "trainer_state.json"))
    trainer._load_rng_state(folder)
    if session.restored is not None and session.restored.details.get("evaluation_pending"):
        trainer._determine_best_metric(metrics=trainer.evaluate(), trial=None)
        if trainer.state.best_global_step == session.restored.step:
            session.best_folder = Path(folder)
    if trainer.args.load_best_model_at_end and session.best_folder is not None:
        trainer.state.best_model_checkpoint = str(session.best_folder)
        trainer._load_best_model()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return TrainOutput(trainer.state.global_step, sum(losses) / len(losses) if losses else 0.0, {})


def patch(trainer_class: type[Trainer], *, always: bool = False) -> None:
    """Wraps ``Trainer.train`` once: a callback never sees the trainer, and ``on_train_begin`` is too late to resume.

    Args:
        trainer_class: ``transformers.Trainer``.
        always: give a SpotCallback to every trainer that has none (under ``hf-spot launch``).
    """
    if always:
        trainer_class._hf_spot_always = True
    if hasattr(trainer_class.train, "_hf_spot_wraps"):
        return
    plain_train = trainer_class.train

    @functools.wraps(plain_train)
    def train(self: Trainer, resume_from_checkpoint: Any = None, trial: Any = None, *args: Any, **kwargs: Any) -> Any:
        callbacks = [callback for callback in self.callback_handler.callbacks if isinstance(callback, SpotCallback)]
        if len(callbacks) > 1:
            raise ConfigError("this Trainer has two SpotCallbacks", hint="keep one of them")
        if not callbacks and getattr(trainer_class, "_hf_spot_always", False):
            callbacks = [SpotCallback()]
            self.add_callback(callbacks[0])
        if not callbacks or trial is not None or callbacks[0]._session is not None:
            if callbacks and trial is not None:
                log.warning("a hyperparameter search is not made preemptible: its trials are not one run")
            return plain_train(self, resume_from_checkpoint, trial, *args, **kwargs)
        return callbacks[0].run(self, plain_train, resume_from_checkpoint, trial, *args, **kwargs)

    train._hf_spot_wraps = plain_train  # type: ignore[attr-defined]
    trainer_class.train = train


def install(trainer_module: Any) -> None:
    """For `hf_spot.training.bootstrap`: from now on every Trainer of this process is preemptible."""
    patch(trainer_module.Trainer, always=True)
