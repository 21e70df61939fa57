"""SpotCallback: maps Trainer's events to ``control.should_*``.

It makes no decisions: `TrainerSession` decides, and `hf_spot.policy.trainer_flags` derives the flags.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError, SpotError, TrainingPreempted
from hf_spot.log import warn_for_all
from hf_spot.policy.cadence import ADDED
from hf_spot.policy.hangs import Phase
from hf_spot.policy.numbers import HOW_TO_GET_FINITE, Answer, answer, in_words
from hf_spot.policy.preemption import Decision
from hf_spot.policy.rollback import to_data
from hf_spot.policy.trainer_flags import LoopState, Moment, flags_for, is_complete, reason_of_save
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.runtime import STORE_VARIABLE, Runtime
from hf_spot.training.data.worker_processes import seeded_before, shield
from hf_spot.training.session.notebook import shows_errors
from hf_spot.training.state.carried import CarriedState
from hf_spot.training.trainer.accumulation import Accumulation
from hf_spot.training.trainer.batch_size import (
    CUT,
    accumulation_changed,
    batches,
    from_details,
    tell_of_accumulation,
    tell_of_cut,
    to_details,
)
from hf_spot.training.trainer.entry import Entry
from hf_spot.training.trainer.evaluation import Evaluations, Stopped, workers_are_unknown
from hf_spot.training.trainer.gradients import WaitingGradients
from hf_spot.training.trainer.held_errors import HeldErrors
from hf_spot.training.trainer.log_window import LogWindow
from hf_spot.training.trainer.own_state import SavedTensors, own_state
from hf_spot.training.trainer.passed_over import PassedOver
from hf_spot.training.trainer.proof import Proof
from hf_spot.training.trainer.restore import load_finished
from hf_spot.training.trainer.resume_fixes import (
    batches_skipped,
    carry_callback_states,
    carry_counters,
    counters,
    set_epoch,
)
from hf_spot.training.trainer.resumed_events import ResumedEvents
from hf_spot.training.trainer.saves import Saves
from hf_spot.training.trainer.step_losses import StepLosses
from hf_spot.training.trainer.streams import StreamReader, random_streams_named, resumed_in_its_pass
from hf_spot.training.trainer.trackers import Trackers
from hf_spot.training.trainer.trainer_session import TrainerSession
from hf_spot.training.trainer.trials import is_pruned, prepared, report_again
from hf_spot.training.trainer.wanted_end import WantedEnd
from hf_spot.training.trainer.weights import all_weights_loaded
from hf_spot.training.upstream import check
from hf_spot.training.upstream.name import Scope

log = logging.getLogger("hf_spot")

_PLANNED = "max_steps_planned"  # in details of a commit: what a callback has changed since


class SpotCallback(TrainerCallback):
    """Makes a Trainer survive preemption: ``Trainer(..., callbacks=[SpotCallback("s3://bucket/runs/my-run")])``.

    ``trainer.train()`` then starts, or resumes from the run's newest committed checkpoint; ``train(resume_from_checkpoint=
    False)`` starts from the beginning. Every checkpoint that Trainer saves is uploaded in the background. On a preemption
    notice the training saves, commits, and ``train()`` raises `TrainingPreempted`.

    Args:
        store: URL of the run. None: ``$HF_SPOT_STORE`` (set by ``hf-spot launch``), else the Trainer's ``output_dir``
            itself is the run (EFS, Filestore, NFS).
        args: settings; None uses those of ``hf-spot launch``, or the defaults.

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
        self._session: TrainerSession | None = None
        self._evaluations: Evaluations | None = None
        self._saves: Saves | None = None
        self._saved_step = -1
        self._stopping = False
        self._added: str | None = None
        self._evaluation_skipped = False
        self._accumulation: Accumulation | None = None
        self._log_window: LogWindow | None = None
        self._losses: StepLosses | None = None
        self._save_is_extra = self._addition_is_due = self._epoch_has_ended = self._end_is_saved = False
        self._save_is_owed = False
        self._newest_is_ours = False
        self._resumed_epoch_is_ahead = False
        self._events: ResumedEvents | None = None
        self._proof: Proof | None = None
        self._is_proven = True
        self._trackers: Trackers | None = None
        self._stream: StreamReader | None = None
        self._gradients: WaitingGradients | None = None
        self._wanted_end: WantedEnd | None = None
        self._newest_request: CommitRequest | None = None
        self._accumulation_began = 1
        self._accumulation_told = False
        self._planned_steps = 0
        self._epoch_was_cut = False
        self._abandons_step = False
        self.resume_from_checkpoint: str | None = None
        _entry.install(Trainer)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy or pickle only the settings: a copy takes no part in a training."""
        return type(self), (self._store, self.args)

    # -- Trainer's events, in the order of the loop -------------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell Trainer where the best checkpoint is on this machine, and restore the state of other callbacks."""
        if self._session is None or self._saves is None:
            return
        if self._session.best_folder is not None:
            state.best_model_checkpoint = str(self._session.best_folder)
        self._saves.watch()
        self._planned_steps = state.max_steps
        if self._session.restored is not None:
            details = self._session.restored.details
            if details.get(_PLANNED) == state.max_steps:  # a callback had changed it since
                state.max_steps = details["max_steps"]
        self._session.commits.expect(self._saves.size_bytes)
        if not self._saves.can_add:
            self._session.commits.add_none(f"{type(self._session.trainer).__name__}._save_checkpoint is the script's own")
        self._session.tell_plan(state.max_steps)
        if self._session.restored is not None:
            carry_callback_states(self._session.trainer)
            carry_counters(self._session.trainer, self._session.restored.details.get("counters", {}))
        assert self._log_window is not None
        self._log_window.begin(self._resumed_folder(self._session))

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Give a resumed epoch the data order that it began with."""
        if self._session is None or self._events is None:
            return
        self._session.run_session.phases.tell(Phase.FIRST_BATCH)
        loader = kwargs.get("train_dataloader")
        resumed, self._resumed_epoch_is_ahead = self._resumed_epoch_is_ahead, False
        if resumed:
            set_epoch(loader, self._events.number)
        place = self._session.place if resumed and not args.ignore_data_skip else None
        checkpoint = None if place is None else Path(str(self.resume_from_checkpoint))
        middle = place is None or place.is_in_middle
        self._session.random_states.begin_epoch(loader, checkpoint, self._events.number, middle=middle)
        if self._stream is not None:
            self._stream.begin_epoch(loader)
        if self._gradients is not None:
            self._gradients.pass_begins(self._resumed_folder(self._session) if resumed else None)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the state before a step of several micro-batches, which may be abandoned halfway."""
        if self._session is not None:
            phases = self._session.run_session.phases
            phases.watch_compilations()
            phases.tell(Phase.STEP)
            if not self._is_proven and self._proof is not None:
                self._is_proven = True
                self._session.proven(self._proof.conclude(self._session.run_session.agreement.gather))
            self._session.step_begins()
        if self._saves is not None:
            self._saves.step_begins()
        if self._losses is not None:
            self._losses.step_begins()
        if self._accumulation is not None and args.gradient_accumulation_steps > 1:
            self._accumulation.begin()

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Act on a notice within a step, if the rest of the step would take too long."""
        if self._session is None or self._accumulation is None:
            return
        self._session.run_session.phases.sign()
        self._session.random_states.micro_batch_ended()
        rest_s = self._accumulation.micro_batch_ended()
        rewindable, gradients = self._accumulation.rewindable, self._gradients
        decision = self._session.micro_batch_ended(
            rest_s, rewindable=lambda: rewindable() and (gradients is None or not gradients.in_step)
        )
        if decision is None:
            return
        self._set(Moment.SUBSTEP_END, decision, args, state, control)
        self._abandons_step = True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cast this rank's ballot: the ranks agree while the optimizer works. Wait until the newest save has its copies."""
        if self._session is not None and not self._session.run_session.agreement.alone:
            self._session.ask()
        if self._saves is not None:
            self._saves.step_changes_weights()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Act on notices, and save if a save is due."""
        if self._session is None or self._saves is None:
            return
        self._saves.step_ended()
        self._added, self._addition_is_due, self._epoch_has_ended, self._end_is_saved = None, False, False, False
        if self._gradients is not None:
            self._gradients.step_ended()
        self._session.random_states.micro_batch_ended()
        if self._losses is not None:
            self._losses.step_ended(self._session.random_states.step_indices())
        self._session.random_states.step_ended()
        decision = self._session.step_ended(state.global_step)
        if decision is None:  # as after nearly every step: microseconds count here
            self._save_is_extra = self._save_is_owed = False
        else:
            self._set(Moment.STEP_END, decision, args, state, control)
        if control.should_save:
            self._session.commits.save_begins()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Read losses on devices where they can't be read meanwhile: Trainer has just waited for the device."""
        if self._losses is not None:
            self._losses.logged()

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End an evaluation after a notice: it may take longer than the time that is left."""
        if self._session is not None:
            self._session.run_session.phases.sign()
        if (
            self._evaluations is not None
            and self._evaluations.running
            and self._session is not None
            and self._session.machine_was_going()
        ):
            self._evaluations.cut()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the start of a save after an evaluation."""
        if self._session is not None and control.should_save:
            self._session.commits.save_begins()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hand the checkpoint over for upload."""
        if self._session is None or self._saves is None:
            return
        loop, exact = self._loop_state(args, state, control), self._session.exact
        # The end of a training is committed as such, also if its last step was saved before somebody ended it.
        if state.global_step == self._saved_step and not (self._newest_is_ours and is_complete(loop)):
            return
        self._saved_step, self._newest_is_ours = state.global_step, self._saves.is_ours
        self._newest_request = None
        accumulation = (self._accumulation_began, args.gradient_accumulation_steps)
        changed = {} if exact is not None else accumulation_changed(*accumulation)
        if changed and not self._accumulation_told:
            self._accumulation_told = True
            tell_of_accumulation(*accumulation, self._session.run_session.run.url)
        self._end_is_saved = is_complete(loop)
        request = CommitRequest(
            step=state.global_step,
            training=self._session.run_session.training,
            reason=reason_of_save(loop, self._added),
            complete=is_complete(loop),
            best_step=state.best_global_step,
            world_size=args.world_size,
            details={
                "evaluation_pending": self._evaluation_pending(args, state, loop),
                "max_steps": state.max_steps,
                **({} if self._planned_steps == state.max_steps else {_PLANNED: self._planned_steps}),
                **({CUT: True} if self._epoch_was_cut else {}),
                "finite": self._saves.is_known_finite,
                "described": self._session.known.described,
                "output_dir": str(self._session.run_session.output_dir),
                "epoch_of_data": state.epoch,
                "pass": {} if self._events is None else self._events.began.to_details(),
                "counters": counters(self._session.trainer),
                "fingerprint": {} if self._proof is None else self._proof.newest,
                "passed_over": to_data(self._session.passed_over),
                "trackers": {} if self._trackers is None else self._trackers.places(),
                **changed,
                **(to_details(batches(self._session.trainer)) if exact is None else exact.to_details()),
            },
        )
        self._session.commits.saved(self._saves.folder, request)
        self._newest_request = request
        self._added = None
        if self._stopping:
            state.best_model_checkpoint = None  # as in `on_epoch_end`, which may have been called already

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set the flags for Trainer's last log line, evaluation and save, after the last epoch or an early stop."""
        if self._session is None:
            return
        ends = is_complete(self._loop_state(args, state, control)) or control.should_training_stop or self._stopping
        self._session.run_session.phases.tell(Phase.FINISHING if ends else Phase.DATA)
        if self._saves is not None:
            self._saves.step_ended()
        if (control.should_training_stop or self._stopping) and self._saves is not None:
            self._saves.settle()  # the best model may be loaded from a file
        self._set(Moment.EPOCH_END, None, args, state, control)
        self._epoch_has_ended = True
        if control.should_save:
            self._session.commits.save_begins()

    def _event_ended(self, event: str, control: TrainerControl) -> None:
        """Act on what other callbacks have decided in an event, in whatever order they are called."""
        if self._session is None or self._wanted_end is None or self._saves is None:
            return
        wanted, step = self._wanted_end.is_wanted, self._session.trainer.state.global_step
        if control.should_epoch_stop and not self._epoch_was_cut:
            self._epoch_was_cut = True
            tell_of_cut(self._session.run_session.run.url)
        if event == "on_substep_end":
            self._end_within_step(step, wanted=wanted)
        elif event == "on_epoch_end" and wanted and not control.should_save:  # a later callback may have asked for it
            self._set(Moment.EPOCH_END, None, self._session.trainer.args, self._session.trainer.state, control)
            if control.should_save:
                self._session.commits.save_begins()
        if event in ("on_save", "on_epoch_end") and wanted and self._saved_step == step:
            request, self._newest_request = self._newest_request, None
            if request is not None and not request.complete:
                self._end_is_saved = True
                self._session.commits.completed(self._saves.folder, request)

    def _end_within_step(self, step: int, *, wanted: bool) -> None:
        """End the training after a micro-batch that is not the last one of its step, if somebody wants that.

        Args:
            step: the optimizer steps done.
            wanted: the script does, so that the step is never repeated.
        """
        assert self._saves is not None and self._accumulation is not None
        abandons, self._abandons_step = self._abandons_step, False
        if wanted:
            if step and step == self._saved_step:  # what the micro-batches have changed since belongs to the end
                self._saves.remove_newest()
                self._saved_step = -1
            self._save_is_owed = self._save_is_owed or (abandons and step > 0)
        elif abandons:
            warn_for_all("step %d is interrupted; the next launch repeats it", step + 1)
            if self._save_is_owed:
                self._accumulation.rewind()
                if self._gradients is not None:
                    self._gradients.abandon_step()

    # -- around train() -----------------------------------------------------------------------------------------------

    def _train_within(
        self, trainer: Trainer, train: Any, resume_from_checkpoint: str | bool | None, trial: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Run ``trainer.train()`` for a trainer that has this callback."""
        check(Scope.TRAINER, trainer)
        with prepared(trainer, trial) as output_dir:
            return self._train_prepared(trainer, train, resume_from_checkpoint, trial, output_dir, *args, **kwargs)

    def _train_prepared(
        self,
        trainer: Trainer,
        train: Any,
        resume_from_checkpoint: str | bool | None,
        trial: Any,
        output_dir: Path,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        url = self._store or os.environ.get(STORE_VARIABLE) or str(trainer.args.output_dir)
        self._saved_step, self._stopping, self._evaluation_skipped, self._save_is_owed = -1, False, False, False
        self._newest_request, self._abandons_step, self._accumulation_told = None, False, False
        self._epoch_was_cut = False
        session = TrainerSession(trainer, url, self.args, self._runtime, output_dir)
        with contextlib.closing(session):
            folder = session.begin(resume_from_checkpoint)
            self._accumulation_began = trainer.args.gradient_accumulation_steps
            carried = own_state(trainer)
            carried.look()
            if session.restored is not None:
                carried.keep()
            proof = Proof(trainer, session.random_states, carried, self.args.on_mismatch)
            self.resume_from_checkpoint = folder if session.restored else None
            trackers = Trackers(
                trainer,
                session.run_session.tracker_id,
                session.restored.details.get("trackers", {}) if session.restored else {},
                in_search=trial is not None,
            )
            session.run_session.closing.callback(trackers.close)
            shield(self.args)
            if session.restored is not None and session.nothing_left:
                log.info(
                    "step %d was the last one: the finished training %d is loaded, and nothing is left to train",
                    session.restored.step,
                    session.run_session.training,
                )
                session.training_finished()
                told = session.end_was_told()
                if not told:
                    trackers.name(session.restored.step)
                if trial is not None:
                    report_again(trainer, trial, Path(str(folder)))
                own = functools.partial(carried.restore, without="data.")  # the loader was the finished training's own
                with session.random_states.evaluations_kept(Path(str(folder))) as workers_known:
                    were_there = not workers_known and workers_are_unknown(trainer, Path(str(folder)))
                    with seeded_before(were_there):
                        return load_finished(
                            trainer,
                            Path(str(folder)),
                            session.restored,
                            session.best_folder,
                            own,
                            trackers.set_up,
                            told=told,
                            trial=trial,
                        )
            restored_to = None if session.restored is None else Path(str(folder))
            closing = session.run_session.closing
            workers_known = closing.enter_context(session.random_states.evaluations_kept(restored_to))
            if session.restored is not None:
                self._saved_step = session.restored.step
                session.random_states.resume(functools.partial(self._make_up, trial))
                if trial is not None:
                    report_again(trainer, trial, Path(str(folder)))
            trackers.name(session.restored.step if session.restored else None)
            self._session = session
            if session.exact is not None:
                session.exact.watch()
            passed_over = PassedOver(trainer, session.passed_over)
            passed_over.watch()
            losses = None if session.teller is None else StepLosses(trainer, session.teller)
            wanted_end = self._wanted_end = WantedEnd(trainer, self._event_ended)
            self._log_window = LogWindow(
                trainer,
                lambda: self._stopping,
                lambda: self._save_is_extra,
                lambda: wanted_end.is_wanted,
                _learn_nothing if losses is None else losses.learned,
                self._step_is_over,
            )
            self._accumulation = Accumulation(trainer, session.random_states, self._log_window)
            self._evaluations = Evaluations(
                trainer,
                session.random_states,
                self._log_window,
                functools.partial(self._evaluation_was_cut, trainer),
                self._resumed_folder(session),
                session.run_session.phases,
                workers_known=workers_known,
            )
            self._gradients = WaitingGradients(trainer)
            stream = self._stream = StreamReader(trainer, session.random_states.begin_behind)
            held = HeldErrors(trainer, self, lambda: self._stopping, session.commits.behind, self._event_comes)
            self._saves = Saves(
                trainer,
                output_dir,
                session.run_session.agreement,
                session.run_session.disk,
                session.commits.behind,
                functools.partial(_finish_save, session, self._log_window, carried, proof, stream, self._gradients),
                functools.partial(self._save_failed, trainer),
                self._save_refused,
                session.commits.opened,
                held.hold,
                session.run_session.phases,
            )
            self._resumed_epoch_is_ahead = session.restored is not None
            self._events = ResumedEvents(
                trainer, self, carried, self._evaluations, lambda: self._stopping, session.place, restored_to
            )
            self._events.watch(
                functools.partial(_restore_own_state, session, carried, proof, restored_to),
                functools.partial(self._return_before_epoch, trainer, restored_to),
                trackers.begun,
            )
            self._proof, self._is_proven = proof, restored_to is None
            self._losses, self._trackers = losses, trackers
            try:
                self._log_window.watch()
                if losses is not None:
                    losses.watch()
                with (
                    all_weights_loaded(trainer),
                    batches_skipped(session.random_states.watch_skipping, session.random_states.trained_batches_passed),
                    random_streams_named(trainer),
                    self._stream_resumed(trainer, session),
                    stream.resumed(restored_to),
                    held.held(),
                    wanted_end.watched(),
                ):
                    result = train(trainer, folder, trial, *args, **kwargs)
                if losses is not None:
                    losses.settle()
                self._saves.settle()
                self._saves.answer()
                session.end(trainer.state.global_step)
            except TrainingPreempted as preempted:
                if not shows_errors():
                    warn_for_all("%s", preempted)
                raise
            except BaseException as error:
                self._saves.settle()
                if is_pruned(error):
                    session.pruned()
                else:
                    session.failed(error)
                raise
            finally:
                self._events.close()
                self._evaluations.close()
                self._log_window.close()
                self._saves.close()
                if losses is not None:
                    losses.close()
                else:
                    passed_over.close()
                self._session = self._evaluations = self._accumulation = self._saves = self._log_window = self._losses = None
                stream.close()
                self._events = self._trackers = self._stream = self._gradients = self._wanted_end = None
            return result

    def _resumed_folder(self, session: TrainerSession) -> Path | None:
        return None if session.restored is None else session.run_session.output_dir / session.restored.name

    def _stream_resumed(self, trainer: Trainer, session: TrainerSession) -> contextlib.AbstractContextManager[None]:
        details = session.restored.details if session.restored else {}
        before = from_details(details)
        if before is None or session.place is None or "epoch_of_data" not in details or trainer.args.ignore_data_skip:
            return contextlib.nullcontext()
        return resumed_in_its_pass(trainer, details, session.place, before, batches(trainer))

    def _return_before_epoch(self, trainer: Trainer, checkpoint: Path | None) -> None:
        """Restore the random states of a checkpoint between two epochs, before callbacks are told that the next one begins."""
        assert self._session is not None and self._evaluations is not None and checkpoint is not None
        self._evaluations.begin()
        self._session.random_states.return_before_epoch(trainer.callback_handler.train_dataloader, checkpoint)

    def _loop_state(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> LoopState:
        wanted = control.should_save or control.should_training_stop
        return LoopState(
            step=state.global_step,
            max_steps=state.max_steps,
            # A save of this step that Trainer does not know of takes none away that somebody has asked for.
            saved_step=-1 if self._newest_is_ours and wanted else self._saved_step,
            should_save=control.should_save,
            should_evaluate=control.should_evaluate,
            should_training_stop=control.should_training_stop,
            is_epoch_end=_is_epoch_end(state),
            saves_each_epoch=args.save_strategy == SaveStrategy.EPOCH,
            loads_best_model=bool(args.load_best_model_at_end or args.metric_for_best_model),
            stopping=self._stopping,
            save_is_owed=self._save_is_owed,
            end_is_wanted=self._wanted_end is not None and self._wanted_end.is_wanted,
        )

    def _set(
        self, moment: Moment, decision: Decision | None, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        """Set the flags that follow from a decision, and record what later events need to know about it."""
        flags = flags_for(moment, decision, self._loop_state(args, state, control))
        if flags.added == ADDED:
            self._addition_is_due = True
            return
        self._save_is_extra = bool(flags.should_save) and not control.should_save
        for name in ("should_save", "should_evaluate", "should_log"):
            if (value := getattr(flags, name)) is not None:
                setattr(control, name, value)
        if flags.should_training_stop and self._wanted_end is not None:
            self._wanted_end.stop(control)
        self._added, self._save_is_owed = flags.added, flags.owes_save
        self._stopping = self._stopping or bool(decision and flags.should_training_stop)
        self._evaluation_skipped = self._evaluation_skipped or flags.skips_evaluation
        if flags.forgets_best:
            state.best_model_checkpoint = None

    def _save_failed(self, trainer: Trainer, why: SpotError) -> None:
        assert self._session is not None
        if self._stopping:
            trainer.state.best_model_checkpoint = None  # as in `on_save`, which is not called
        is_ours = self._saves is not None and self._saves.is_ours  # nobody has asked for it, so nothing ends for it
        self._session.commits.save_failed(why, stops=not self._stopping and not is_ours and self.args.on_save_error == "stop")

    def _event_comes(self, event: str) -> None:
        if self._saves is not None:
            self._saves.event_comes(event)

    def _step_is_over(self, model: Any, trial: Any) -> None:
        """Make the save that the cadence adds, unless somebody has asked for one of this step, or the training ends with it.

        Make the one at the end of a training that somebody has ended after this callback was asked.
        """
        due, self._addition_is_due = self._addition_is_due, False
        if self._session is None or self._saves is None or self._stopping or not self._saves.can_add:
            return
        trainer = self._session.trainer
        state, control = trainer.state, trainer.control
        if control.should_training_stop:
            due = self._epoch_has_ended and not self._end_is_saved
        elif self._saves.newest_step == state.global_step:
            due = False
        if not due:
            return
        self._session.commits.save_begins()
        self._added, self._save_is_extra = None if control.should_training_stop else ADDED, True
        if self._saves.add(model, trial):
            self.on_save(trainer.args, state, control)

    def _save_refused(self, wrong: list[str], step: int) -> None:
        assert self._session is not None
        if self._stopping:
            self._session.trainer.state.best_model_checkpoint = None
        decided = answer(wrong, on_nan=self.args.on_nan, stopping=self._stopping)
        why = in_words(wrong, step)
        if decided is Answer.ROLL_BACK:
            if self._losses is not None:
                self._losses.settle()
            first_wrong = None if self._losses is None else self._losses.first_not_finite
            self._session.roll_back(why, step, first_wrong)
        self._session.commits.save_failed(SpotError(why, hint=HOW_TO_GET_FINITE), stops=decided is Answer.STOP)

    def _evaluation_was_cut(self, trainer: Trainer) -> None:
        assert self._session is not None and self._evaluations is not None
        decision = self._session.stop_after_cut_evaluation(trainer.state.global_step)
        if not self._evaluations.has_begun:
            # ``eval_on_start``: there is nothing to save, and the next launch begins with this evaluation
            self._session.leave(0)
        self._set(Moment.EVALUATION_CUT, decision, trainer.args, trainer.state, trainer.control)
        if trainer.control.should_save:
            self._session.commits.save_begins()

    def _make_up(self, trial: Any) -> None:
        """Make up for what an uninterrupted run does between the checkpoint and the next step, in the same order.

        Called right after Trainer has restored the random states.
        """
        assert self._session is not None and self._session.restored is not None and self._log_window is not None
        trainer = self._session.trainer
        lines = [line for line in trainer.state.log_history if line.get("step") == trainer.state.global_step]
        # An evaluation leaves the model in another mode, which TRL tells apart in its log lines.
        trainer.model.train(not any(key.startswith("eval_") for line in lines for key in line))  # type: ignore[union-attr]
        pending = bool(self._session.restored.details.get("evaluation_pending"))
        at_epoch_end = self._session.trainer.args.eval_strategy == IntervalStrategy.EPOCH
        if pending and not at_epoch_end:
            self._make_up_for_evaluation(trial)
        if self._events is not None:
            self._events.make_up_for_end()
        self._log_window.make_up()
        if pending and at_epoch_end:
            self._make_up_for_evaluation(trial)
        # Not before: log lines behind an evaluation are of the model as the evaluation has left it, which TRL tells apart.
        self._session.trainer.model.train()  # type: ignore[union-attr]

    def _make_up_for_evaluation(self, trial: Any) -> None:
        """Make up for an evaluation at the only moment at which it draws the right random numbers."""
        assert self._session is not None and self._evaluations is not None
        try:
            self._evaluations.make_up(trial)
        except Stopped:
            self._saved_step = (
                -1
            )  # the checkpoint that was resumed turns out to be the last one, and is saved again to record that
            raise
        if self._stopping:
            self._session.leave(self._session.restored.step if self._session.restored else 0)

    def _evaluation_pending(self, args: TrainingArguments, state: TrainerState, loop: LoopState) -> bool:
        """Return whether an uninterrupted run evaluates between this save and the next step.

        A resumed run must make up for it, because an evaluation draws random numbers, selects the best model and may step the
        scheduler.
        """
        ends = _is_epoch_end(state) or is_complete(loop)
        at_epoch_end = args.eval_strategy == IntervalStrategy.EPOCH and ends and args.eval_delay <= (state.epoch or 0)
        evaluated = any(
            line.get("step") == state.global_step and any(key.startswith("eval_") for key in line) for line in state.log_history
        )
        return self._evaluation_skipped or (at_epoch_end and not evaluated)


def _finish_save(
    session: TrainerSession,
    log_window: LogWindow,
    carried: CarriedState,
    proof: Proof,
    stream: StreamReader,
    gradients: WaitingGradients,
    folder: Path,
    saved: SavedTensors,
) -> None:
    session.random_states.save(folder)
    stream.save(folder)
    gradients.save(folder)
    log_window.save(folder)
    carried.save(folder, saved, session.commits.behind.write_text)
    proof.save(folder, session.commits.behind.write_text)


def _restore_own_state(session: TrainerSession, carried: CarriedState, proof: Proof, folder: Path | None, last: bool) -> None:
    """Restore and verify the state of the script, after the callbacks that create or change it.

    Args:
        session: of this training.
        carried: restores the state.
        proof: verifies it.
        folder: the checkpoint, or None for a new training.
        last: whether nothing changes the state before the first step any more.
    """
    carried.look("data.")  # the loader is made by then, too
    carried.look("model.")  # `model_init` creates the model after the training has begun
    if folder is None:
        return
    carried.keep("model.")
    if not last:
        carried.restore(folder, last=False)
        proof.expect(folder, session.known.changed)
        return
    # The position in the data is that of the first batch of the pass, up to which Trainer reads again.
    with session.random_states.data_side_kept():
        carried.restore(folder)
        if not proof.is_expecting:
            proof.expect(folder, session.known.changed)
        proof.compare_loaded(folder)


def _learn_nothing(step: int, learning_rate: float | None) -> None:
    """Take the place of `StepLosses.learned`."""


def _is_epoch_end(state: TrainerState) -> bool:
    return state.epoch is not None and float(state.epoch).is_integer()


_entry = Entry(SpotCallback, SpotCallback._train_within, SpotCallback)


def install(trainer_module: Any) -> None:
    """Make every Trainer of this process preemptible. Called by `hf_spot.training.bootstrap`."""
    _entry.install(trainer_module.Trainer, for_all=True)
