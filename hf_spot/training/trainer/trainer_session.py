"""TrainerSession: one call of ``trainer.train()`` with its run, from the claim to the last commit."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from hf_spot.arguments import SpotArguments
from hf_spot.errors import RolledBack, SpotError, StoreError, TrainingInterrupted, TrainingPreempted
from hf_spot.log import alert, warn_for_all
from hf_spot.notices.notice import NoticeKind, PreemptionNotice
from hf_spot.notices.signals import KeyboardSource
from hf_spot.policy import rollback
from hf_spot.policy.hangs import Phase
from hf_spot.policy.numbers import HOW_TO_GET_FINITE
from hf_spot.policy.passes import Place, place_of
from hf_spot.policy.preemption import Action, Decision, leaves_step
from hf_spot.policy.rollback import Span
from hf_spot.policy.trainer_flags import SAVE_IS_DUE
from hf_spot.run.checkpoint import Checkpoint
from hf_spot.run.journal import TRAINING_KEY
from hf_spot.runtime import Plan, Runtime, held_folder, make_private
from hf_spot.timeouts import FAILED_DRAIN_S, JOURNAL_LAST_WORD_S
from hf_spot.training.ranks.ballot import Ballot
from hf_spot.training.session.final_drain import FinalDrain
from hf_spot.training.session.local_tier import DISK, SAVED_BY, TAKEN_FROM
from hf_spot.training.session.notebook import drop_inherited_handlers, how_to_resume, suppress_exit_advice
from hf_spot.training.session.recognition import KnownTraining, finished
from hf_spot.training.session.run_session import RunSession
from hf_spot.training.session.step_teller import COMPOSITION, DEVICE, StepTeller, kind_of
from hf_spot.training.trainer.batch_size import batches, keep_full_samples, keep_samples
from hf_spot.training.trainer.commits import Commits
from hf_spot.training.trainer.description import describe
from hf_spot.training.trainer.engines import refuse_what_can_not_be_resumed
from hf_spot.training.trainer.exact_limits import refuse_what_is_not_exact
from hf_spot.training.trainer.exact_steps import COUNT, ExactSteps, exact_steps, tell_no_longer_exact
from hf_spot.training.trainer.passed_over import why_impossible
from hf_spot.training.trainer.random_states import RandomStates
from hf_spot.training.trainer.restore import MachineGoing, Resumption

if TYPE_CHECKING:
    from transformers import Trainer

log = logging.getLogger("hf_spot")

_MOST_ENTRIES = 200  # read back for rollbacks


class TrainerSession:
    """Restores checkpoints, decides about notices, commits saves, and ends the training.

    Holds a `RunSession`, which does what custom loops need as well.

    Args:
        trainer: the Trainer, before ``train()`` does anything.
        url: URL of the run.
        arguments: settings.
        runtime: the launch that started this process, if one did.
        output_dir: where this training's checkpoints are written.
        now: the wall clock.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        trainer: Trainer,
        url: str,
        arguments: SpotArguments,
        runtime: Runtime | None,
        output_dir: Path,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        refuse_what_can_not_be_resumed(trainer)
        if arguments.exact_on_any_gpus:
            refuse_what_is_not_exact(trainer)
        self._session = session = RunSession("SpotCallback", url, arguments, runtime, now=now, clock=clock)
        self.trainer = trainer
        self._url = url
        args = trainer.args
        session.join_ranks(
            args.world_size,
            args.process_index,
            args.local_process_index,
            output_dir,
            setting="TrainingArguments(output_dir=…)",
        )
        self.exact: ExactSteps | None = None
        self._restored: Checkpoint | None = None
        self._nothing_left = False
        self._passed_over: list[Span] = []
        self.known = KnownTraining(session, describe(trainer, output_dir))
        self._best_folder: Path | None = None
        self._advisories: set[str] = set()
        self._asked_advisory: str | None = None
        self._notices = 0
        self._teller: StepTeller | None = None
        # Not in output_dir, which may be full when the next epoch begins, or be deleted in its middle.
        if runtime is not None:
            make_private(runtime.directory)
            scratch = Path(tempfile.mkdtemp(prefix="hf_spot-", dir=runtime.directory))
        else:
            scratch, held = held_folder()
            session.closing.callback(os.close, held)
        session.closing.callback(shutil.rmtree, scratch, ignore_errors=True)
        self.random_states = RandomStates(
            trainer, scratch / f"random-states-{trainer.args.process_index}", shared=arguments.exact_on_any_gpus
        )
        session.closing.callback(self.random_states.close)
        self.commits = Commits(trainer, session, now=now, clock=clock)

    @property
    def run_session(self) -> RunSession:
        """Return the part that custom loops use as well."""
        return self._session

    @property
    def restored(self) -> Checkpoint | None:
        """Return the commit that the training resumes from, if any."""
        return self._restored

    @property
    def place(self) -> Place | None:
        """Return where in the data the training resumes; None for a new one."""
        if self._restored is None:
            return None
        details, data = self._restored.details, self.trainer.train_dataset
        has_a_length = has_length(data) if isinstance(data, IterableDataset) else True
        epoch = float(details.get("epoch_of_data") or 0)
        return place_of(details.get("pass") or None, epoch, self._restored.step, has_length=has_a_length)

    @property
    def nothing_left(self) -> bool:
        """Return whether the training is complete, so that its end only needs to be loaded."""
        return self._nothing_left

    @property
    def teller(self) -> StepTeller | None:
        """Return what tells and compares this rank's steps; None on machines that don't share rank 0's disk."""
        return self._teller

    @property
    def passed_over(self) -> list[Span]:
        """Return the steps that the training passes over, or has passed over, after rollbacks: one span for each."""
        return self._passed_over

    @property
    def best_folder(self) -> Path | None:
        """Return the folder of the best checkpoint so far, if it was restored."""
        return self._best_folder

    # -- the start ----------------------------------------------------------------------------------------------------

    def begin(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Watch for notices, claim the run, restore its newest commit; return the folder to resume from, or None.

        Raises:
            SpotError: the run can't be used.
            TrainingPreempted: the machine is being taken away already.
        """
        if self._session.runtime is None:
            drop_inherited_handlers()
        self._session.listen(keyboard=True)
        self._session.tell_launcher(Phase.STARTING)
        if not self.known.find():
            self._session.claim()
        try:
            return self._begin(resume_from_checkpoint)
        except MachineGoing:
            warn_for_all("the machine is being taken away: no training is started")
            newest = self._session.agreement.from_main(lambda: self._session.run.journal.state.latest(self._session.training))
            self.leave(self._restored.step if self._restored else newest.step if newest else 0)

    def _begin(self, resume_from_checkpoint: str | bool | None) -> str | None:
        began, resumption = self._session.clock(), Resumption(self._session)
        found = resumption.restore(resume_from_checkpoint)
        committed = self._session.run.journal.state.latest(self._session.training)
        if found is None and resume_from_checkpoint is False and committed is not None:
            log.warning(
                "train(resume_from_checkpoint=False) begins from the start, although step %d of this training is committed",
                committed.step,
            )
        if found is not None:
            self._restored = found[0]
            self._nothing_left = self.known.compare(found[0])
        if not self._nothing_left:
            self._session.claim()  # a finished run should be trained again
            if self._session.arguments.exact_on_any_gpus:
                full_ranks = 0 if self._session.runtime is None else self._session.runtime.full_ranks
                self.exact = exact_steps(self.trainer, self._restored, self.known.known_description, full_ranks)
                self._session.closing.callback(self.exact.close)
            elif self._restored is not None:
                tell_no_longer_exact(self._restored)
            self.known.record({} if self.exact is None else {COUNT: self.exact.count})
        if not self._nothing_left and self.exact is None and self._session.runtime is not None:
            keep_full_samples(self.trainer, self._session.runtime.full_ranks)
        if self._restored is not None:
            if self.trainer.args.load_best_model_at_end:
                self._best_folder = resumption.restore_best(self._restored)
            self._session.timing.restored(self._session.clock() - began)
            self._session.phases.tell(Phase.STARTING, self._restored.step)
            how = "saved" if SAVED_BY in self._restored.details else "committed"
            log.info("resuming from step %d, %s by launch %d", self._restored.step, how, self._restored.ref.launch)
            if not self._nothing_left and self.exact is None:
                may_change = self._session.arguments.allow_batch_change
                keep_samples(self.trainer, self._restored.details, allow_change=may_change, url=self._session.run.url)
        if not self._nothing_left:
            self._passed_over = self._session.agreement.from_main(self._find_passed_over)
            if self._passed_over:
                log.warning("after NaN, these steps are passed over: %s", rollback.in_words(self._passed_over))
            self._start_teller()  # before the uploader deletes what earlier launches told
            lost = None if self._teller is None else self._teller.lost
            self.commits.begin(resumed_step=self._restored.step if self._restored else 0, lost=lost)
        if self.machine_is_going():
            raise MachineGoing
        if found is not None:
            return str(found[1])
        foreign: str | None = resumption.foreign(resume_from_checkpoint)
        return foreign

    def _start_teller(self) -> None:
        session, args = self._session, self.trainer.args
        launch = session.agreement.from_main(lambda: session.run.launch)
        if session.disk.index != 0:
            return
        self._teller = StepTeller(
            session,
            args.process_index,
            launch,
            {COMPOSITION: str(batches(self.trainer)), DEVICE: kind_of(args.device)},
            resumed_step=self._restored.step if self._restored else 0,
            changed=[*self.known.changed_in_words, *self._passed_over_in_words()],
        )
        session.closing.callback(self._teller.close)

    def _passed_over_in_words(self) -> list[str]:
        ahead = [one for one in self._passed_over if one.last > (self._restored.step if self._restored else 0)]
        return [f"after NaN, steps {rollback.in_words(ahead)} are passed over"] if ahead else []

    def _find_passed_over(self) -> list[Span]:
        restored = self._restored
        found = rollback.spans_from(restored.details.get("passed_over")) if restored else []
        if found or self._session.arguments.on_nan == "rollback":  # the others need no further request
            journal = self._session.run.journal
            last, after = journal.state.number, restored.ref.entry if restored else 0
            entries = map(journal.read, range(max(after, last - _MOST_ENTRIES) + 1, last + 1))
            of_this = [one for one in entries if one.kind == rollback.KIND]
            for one in of_this:
                if one.data.get(TRAINING_KEY, 1) == self._session.training:
                    found += rollback.spans_from([one.data.get("span")])
        return found

    def roll_back(self, what: str, step: int, first_wrong: int | None) -> NoReturn:
        """End the launch, so that the next one resumes from the newest commit and passes over the steps that went wrong.

        Every rank must call it.

        Args:
            what: is not finite, for people.
            step: the step that would have been saved.
            first_wrong: the first step whose loss on this rank was not finite, if any.

        Raises:
            RolledBack: it was recorded.
            SpotError: it is impossible, or was done too often.
        """
        session = self._session
        if self._teller is not None:
            self._teller.conclude()  # the launcher ends the other ranks as soon as the first one has ended
        session.agreement.together(lambda: session.finish_uploads(session.arguments.drain_timeout_s))
        known = [one for one in session.agreement.gather(first_wrong) if one is not None]

        def decide_on_main() -> Span:
            why, most = why_impossible(self.trainer), session.arguments.max_rollbacks
            if why is None and len(self._passed_over) >= most:
                why = f"it was rolled back {most} times (--max-rollbacks)"
            if why is not None:
                raise SpotError(f"{what}; not rolled back: {why}", hint=HOW_TO_GET_FINITE)
            committed = session.committed_step
            span = rollback.span_of(min(known, default=None), step, committed, self._passed_over)
            data: dict[str, Any] = {"step": step, "committed_step": committed, TRAINING_KEY: session.training}
            data |= {"span": [span.first, span.last], "why": what}
            session.record(rollback.KIND, data, patience_s=session.arguments.drain_timeout_s)
            return span

        span = session.agreement.from_main(decide_on_main)
        raise RolledBack(
            f"{what}; the next launch resumes from the newest commit and passes over steps {rollback.in_words([span])}",
            hint="start the same command again; hf-spot launch does so by itself",
        )

    def end_was_told(self) -> bool:
        """Return whether callbacks got the last log lines of the complete training. All ranks must call it.

        If a notice ended the previous launch, this launch must send them. The same holds if that launch ended after the last
        commit, but before ``train()`` returned, as far as the journal shows.
        """
        restored, training = self._restored, self._session.training
        assert restored is not None
        if restored.reason == "notice":
            return False

        def look() -> bool:
            state = self._session.run.journal.state
            known = [*(one.training for one in state.checkpoints), *(one.training for one in state.trainings)]
            went_on = any(number > training for number in known)
            if went_on or state.ended == "finished":
                return True
            if self._session.runtime is None:
                return False
            if "pass" not in restored.details:  # by a version that left no word of it under a launcher
                return not restored.details.get("evaluation_pending")
            journal = self._session.run.journal
            later = (journal.read(number) for number in range(restored.ref.entry + 1, state.number + 1))
            return any(entry.kind == "trained" and entry.data.get(TRAINING_KEY) == training for entry in later)

        return self._session.agreement.from_main(look)

    def machine_is_going(self) -> bool:
        """Return whether any rank's machine is being taken away. All ranks must call it, and get the same answer."""
        self.ask()
        return self._must_stop(self._session.agreement.answer())

    def machine_was_going(self) -> bool:
        """Return `machine_is_going` as of the previous call, so that the ranks can agree while they work."""
        going = self._must_stop(self._session.agreement.answer())
        self.ask()
        return going or (self._session.agreement.alone and self._must_stop(self._session.agreement.answer()))

    def leave(self, step: int) -> NoReturn:
        """End the launch before its first step. Raises TrainingPreempted.

        Args:
            step: the committed step; 0 for none.
        """
        if self._session.run.launch:
            data = {
                "step": step,
                "committed_step": step,
                "why": "before the first step",
                **self._session.timing.to_details(step),
            }
            self._session.record("preempted", data, patience_s=JOURNAL_LAST_WORD_S)
        why = "interrupted" if self._is_interrupt else "the machine is being taken away"
        raise self._ending(f"{why}; nothing was trained in this launch.", step or None)

    @property
    def _is_interrupt(self) -> bool:
        """Return whether a user, and not a cloud, ends the training."""
        return self._session.listener.newest is not None and self._session.listener.newest.source == KeyboardSource.name

    def _ending(self, what: str, step: int | None) -> TrainingPreempted:
        suppress_exit_advice()
        kind = TrainingInterrupted if self._is_interrupt else TrainingPreempted
        runtime = self._session.runtime
        others_go_on = runtime is not None and runtime.full_ranks > 0 and not self._is_interrupt
        left = "Machines that are left train on from there; the same command lets this one take part again."
        next_is = left if others_go_on else how_to_resume()
        return kind(f"{what}\n{next_is}", step=step)

    def proven(self, verified: list[str] | None) -> None:
        """Report the result of comparing a resumed training with what was saved. Every rank must call it.

        Args:
            verified: the parts that are the same; None if the checkpoint contains nothing to compare with.
        """
        assert self._restored is not None
        if verified is None:
            log.info("%s was saved by an earlier hf_spot: the resumed state can't be compared with it", self._restored.name)
            return
        log.info("resumed at step %d exactly as saved: %s", self._restored.step, ", ".join(verified) or "nothing to compare")
        data: dict[str, Any] = {
            "step": self._restored.step,
            TRAINING_KEY: self._session.training,
            "entry": self._restored.ref.entry,
        }
        if SAVED_BY in self._restored.details:
            data[TAKEN_FROM] = self._restored.details.get(TAKEN_FROM, DISK)
        self._session.record("resumed", {**data, "verified": verified}, patience_s=0.0)

    # -- during training ----------------------------------------------------------------------------------------------

    def step_begins(self) -> None:
        """Record that a step begins. Every rank must call it."""
        self.commits.step_begins(first=self._session.timing.step_begins(self.trainer.state.global_step))

    def ask(self) -> None:
        """Cast this rank's ballot; `step_ended` and `micro_batch_ended` read the result."""
        session, notice = self._session, self._session.listener.current()
        # The ranks of a machine don't read the notice at the same instant: an advisory counts once, when rank 0 has seen it.
        advisory = session.agreement.is_main and notice is not None and notice.kind is NoticeKind.ADVISORY
        self._asked_advisory = notice.id if advisory and notice and notice.id not in self._advisories else None
        save_is_due = session.agreement.is_main and self.commits.save_is_due()
        session.agreement.ask(session.ballot(notice, advisory=self._asked_advisory is not None, save_is_due=save_is_due))

    def micro_batch_ended(self, rest_of_step_s: float, *, rewindable: Callable[[], bool]) -> Decision | None:
        """Decide between two micro-batches whether to abandon the step; return None to continue. Every rank must call it.

        Args:
            rest_of_step_s: estimated seconds for the rest of the step.
            rewindable: returns whether the step can be undone.
        """
        session = self._session
        merged = session.agreement.answer()
        self.ask()
        if session.agreement.alone:
            merged = session.agreement.answer()
        if merged is None or not merged.terminate:
            return None
        seconds_left = merged.seconds_left

        def decide_on_main() -> Decision | None:
            if leaves_step(seconds_left, rest_of_step_s, session.measured()) and rewindable():
                return self._decide(NoticeKind.TERMINATE, seconds_left, session.listener.current())
            return None

        decision = session.agreement.from_main(decide_on_main)
        if decision is not None:
            session.stop(decision, seconds_left)
        return decision

    def tell_plan(self, max_steps: int) -> None:
        """Tell a launcher of machines that come and go how long the training is, and what a step is made of."""
        session = self._session
        if session.runtime is not None and session.runtime.full_ranks and session.agreement.is_main:
            session.runtime.tell_plan(Plan(max_steps, batches(self.trainer).total))

    def step_ended(self, step: int) -> Decision | None:
        """Decide what to do after an optimizer step; return None if there is nothing to do. Every rank must call it."""
        session = self._session
        session.phases.tell(Phase.DATA, step)
        if session.steps is not None:
            session.steps.tell(step)
        if session.agreement.alone:
            if self._is_quiet():
                return None
            self.ask()
        elif not session.agreement.asked:
            self.ask()
        merged = session.agreement.answer()
        assert merged is not None
        if merged.fenced:
            return Decision(Action.FINISH_UPLOAD_AND_STOP, "a newer launch owns the run")
        if not merged.terminate and not merged.advisory:
            return SAVE_IS_DUE if merged.save_is_due else None
        self._notices += 1
        self.commits.count_notices(self._notices)
        if self._asked_advisory is not None:
            self._advisories.add(self._asked_advisory)
        kind = NoticeKind.TERMINATE if merged.terminate else NoticeKind.ADVISORY
        decision = session.agreement.from_main(lambda: self._decide(kind, merged.seconds_left, session.listener.current()))
        if decision.action in (Action.SAVE_AND_STOP, Action.FINISH_UPLOAD_AND_STOP):
            session.stop(decision, merged.seconds_left)
        return decision

    def stop_after_cut_evaluation(self, step: int) -> Decision:
        """Decide how to stop when a notice has ended an evaluation. Every rank must call it."""
        decision = self.step_ended(step)
        if decision is None or decision.action is Action.SAVE_AND_GO_ON:
            # The notice has just been cancelled, but the evaluation is lost: the next launch makes up for it.
            decision = Decision(Action.SAVE_AND_STOP, "a notice that was then cancelled ended an evaluation")
            self._session.stop(decision, None)
        return decision

    def _is_quiet(self) -> bool:
        """Return whether this rank has nothing to report, as after nearly every step: microseconds count here."""
        session = self._session
        return session.listener.current() is None and session.fenced is None and not self.commits.save_is_due()

    def _decide(self, kind: NoticeKind, seconds_left: float | None, notice: PreemptionNotice | None) -> Decision:
        def say(told: str) -> None:
            alert(told)
            if notice is not None:
                self._session.hook.tell(told)

        return self._session.decide(kind, seconds_left, notice, say)

    # -- the end ------------------------------------------------------------------------------------------------------

    def end(self, step: int) -> None:
        """Wait for the last commit after ``train()`` has returned, and record how the training ended.

        Raises:
            TrainingPreempted: a notice stopped the training, or left no time to commit its last checkpoint.
            Fenced: a newer launch owns the run.
            StoreError: the last checkpoint could not be committed in ``drain_timeout_s``.
        """
        if self._session.forked:
            return
        self._session.phases.tell(Phase.FINISHING, step)
        if self._teller is not None:
            self._teller.conclude()
        self._session.order_uploads()
        last = FinalDrain(self._session)
        if not self._session.agreement.is_main:
            last.wait_for_main()
        self._session.agreement.from_main(lambda: self._end_on_main(step, last))
        self.training_finished()

    def training_finished(self) -> None:
        """Mark this training as finished: the next ``train()`` of this process is another training, and doesn't resume it."""
        finished(self._session.run.url, self._session.training)
        if self._teller is not None:
            self._teller.forget()

    def _end_on_main(self, step: int, last: FinalDrain) -> None:
        drained = last.wait()
        if self._session.uploader is None:
            return
        if self._session.uploader.fenced is not None:
            raise self._session.uploader.fenced
        committed = self._session.committed_step
        if self._session.preempted is not None:
            data = {
                "step": step,
                "committed_step": committed,
                TRAINING_KEY: self._session.training,
                "why": self._session.preempted.why,
            }
            self._session.record("preempted", {**data, **self._session.timing.to_details(step)}, patience_s=JOURNAL_LAST_WORD_S)
            how = "interrupted" if self._is_interrupt else "preempted"
            raise self._ending(f"{how} at step {step}; step {committed} is committed to {self._session.run.url}.", committed)
        if not drained or committed < step:
            folder, timeout_s = self._session.output_dir / f"checkpoint-{step}", self._session.arguments.drain_timeout_s
            why = f"after {timeout_s:.0f} s: {self._session.uploader.trouble}" if not drained else "(the log says why)"
            raise StoreError(
                f"training ended at step {step}, but only step {committed} is in {self._session.run.url} {why}",
                hint=f"hf-spot checkpoints push {self._session.run.url} {folder}"
                if folder.is_dir()
                else "start the same command again to resume from there",
            )
        done = {"step": step, TRAINING_KEY: self._session.training}
        if self._session.runtime is None:
            self._session.record("finished", {**done, **self._session.timing.to_details(step)})
        else:  # the launcher records how the script ends, which may train more than once, or fail later
            self._session.record("trained", done, patience_s=JOURNAL_LAST_WORD_S)

    def failed(self, error: BaseException) -> None:
        """Commit pending uploads after an exception, and record it in the journal if there is no launcher to do it."""
        uploader = self._session.uploader
        if self._session.forked or (uploader is not None and uploader.fenced is not None):
            return
        self._session.phases.tell(Phase.FINISHING)
        if self._teller is not None:
            self._teller.conclude()
        if uploader is None:
            return
        # A user who presses Ctrl-C a second time has seen what the training waits for.
        impatient = isinstance(error, KeyboardInterrupt) and self._is_interrupt
        if not impatient:
            self._session.finish_uploads(min(FAILED_DRAIN_S, self._session.arguments.drain_timeout_s))
        if self._session.runtime is None:
            step = self.trainer.state.global_step
            told = {
                "error": type(error).__name__,
                TRAINING_KEY: self._session.training,
                **self._session.timing.to_details(step),
            }
            self._session.record("failed", told, patience_s=JOURNAL_LAST_WORD_S if impatient else None)

    def pruned(self) -> None:
        """Commit pending uploads of a trial that its search has ended early. The next ``train()`` is another training."""
        if not self._session.forked:
            self._session.finish_uploads(min(FAILED_DRAIN_S, self._session.arguments.drain_timeout_s))
            self.training_finished()

    def close(self) -> None:
        """Stop receiving notices and uploading, and release all resources."""
        self._session.close()

    @staticmethod
    def _must_stop(merged: Ballot | None) -> bool:
        return merged is not None and merged.terminate
