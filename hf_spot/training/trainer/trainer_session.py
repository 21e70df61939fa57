"""TrainerSession: one call of ``trainer.train()`` and the run that it belongs to, from the claim to the last commit."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError, SpotError, StoreError, TrainingInterrupted, TrainingPreempted
from hf_spot.log import alert, log_always, warn_for_all
from hf_spot.notices.notice import NoticeKind, PreemptionNotice
from hf_spot.notices.signals import KeyboardSource
from hf_spot.policy.preemption import Action, Decision, leaves_step
from hf_spot.policy.trainer_flags import SAVE_IS_DUE
from hf_spot.run import history
from hf_spot.run.checkpoint import Checkpoint, CommitRequest
from hf_spot.run.journal import Entry
from hf_spot.runtime import Runtime, make_private
from hf_spot.storage.threads import Workers
from hf_spot.timeouts import FAILED_DRAIN_S, JOURNAL_LAST_WORD_S
from hf_spot.training.ranks.agreement import Agreement
from hf_spot.training.ranks.ballot import Ballot
from hf_spot.training.saving.async_writer import AsyncCheckpointWriter
from hf_spot.training.session.final_drain import FinalDrain
from hf_spot.training.session.run_session import RunSession
from hf_spot.training.trainer.batch_size import keep_samples
from hf_spot.training.trainer.metrics import Metrics
from hf_spot.training.trainer.notebook import drop_inherited_handlers, how_to_resume, suppress_exit_advice
from hf_spot.training.trainer.random_states import RandomStates
from hf_spot.training.trainer.restore import MachineGoing, Resumption
from hf_spot.training.trainer.save_schedule import Cadence
from hf_spot.training.trainer.saves import is_sharded
from hf_spot.training.versions import tell_changes

if TYPE_CHECKING:
    from transformers import Trainer

log = logging.getLogger("hf_spot")


# Trainings that this process has finished, by run. A script that trains twice has two stages: after a preemption in the
# second, the first must end at once with its own last checkpoint, and the second go on from its own.
_finished_stages: Counter[str] = Counter()


class TrainerSession:
    """Restores what Trainer resumes from, decides about notices, commits saves, and ends the training as it should end.

    Holds a `RunSession`, which does what custom loops need too.

    Args:
        trainer: the Trainer, before ``train()`` does anything.
        url: of the run.
        arguments: settings.
        runtime: the launch that started this process, if one did.
        now: the wall clock.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        trainer: Trainer,
        url: str,
        arguments: SpotArguments,
        runtime: Runtime | None,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check(trainer)
        stage = _finished_stages[url] + 1
        self._session = session = RunSession("SpotCallback", url, arguments, runtime, stage=stage, now=now, clock=clock)
        self.trainer = trainer
        self._url = url
        args = trainer.args
        session.join_ranks(
            args.world_size,
            args.process_index,
            args.local_process_index,
            Path(args.output_dir or "."),
            setting="TrainingArguments(output_dir=…)",
        )
        self._restored: Checkpoint | None = None
        self._best_folder: Path | None = None
        self._advisories: set[str] = set()
        self._asked_advisory: str | None = None
        self._save_began: float | None = None
        self._past: history.Past | None = None
        self._notices = 0
        # Not in output_dir, which may be full when the next epoch begins, or be deleted in its middle.
        if runtime is not None:
            make_private(runtime.directory)
        scratch = Path(tempfile.mkdtemp(prefix="hf_spot-", dir=runtime.directory if runtime else None))
        session.closing.callback(shutil.rmtree, scratch, ignore_errors=True)
        self.random_states = RandomStates(trainer, scratch / f"random-states-{trainer.args.process_index}")
        session.closing.callback(self.random_states.close)
        memory_gb = arguments.save_memory_gb
        writers = Agreement(trainer.args.world_size)  # of its own: the ranks agree on something else meanwhile
        session.closing.callback(writers.close)
        self.behind = AsyncCheckpointWriter(
            None if memory_gb is None else int(memory_gb * 1e9), writers, self._share_of_memory()
        )
        session.closing.callback(self.behind.close)
        self._cadence = Cadence(trainer, arguments, self._is_busy, now, clock)
        self._metrics = Metrics(trainer, {"next_save_in_s": self._cadence.due_in_s})
        session.closing.callback(self._metrics.close)

    @property
    def run_session(self) -> RunSession:
        """What custom loops need too."""
        return self._session

    @property
    def restored(self) -> Checkpoint | None:
        """The commit that the training resumes from."""
        return self._restored

    @property
    def best_folder(self) -> Path | None:
        """The best checkpoint so far, restored to this machine."""
        return self._best_folder

    # -- the start ----------------------------------------------------------------------------------------------------

    def begin(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Claim the run, restore what there is, start listening; return the folder to resume from, or None.

        Raises:
            SpotError: the run can't be used; nothing was trained.
            TrainingPreempted: the machine is going already.
        """
        if self._session.runtime is None:
            drop_inherited_handlers()
        self._session.listen(keyboard=True)
        self._session.tell_launcher()
        self._session.claim(unless_complete=True)
        try:
            return self._begin(resume_from_checkpoint)
        except MachineGoing:
            warn_for_all("the machine is being taken away: no training is started")
            newest = self._session.agreement.from_main(lambda: self._session.run.journal.state.latest(self._session.stage))
            self.leave(self._restored.step if self._restored else newest.step if newest else 0)

    def _begin(self, resume_from_checkpoint: str | bool | None) -> str | None:
        began, resumption = self._session.clock(), Resumption(self._session)
        found = resumption.restore(resume_from_checkpoint)
        if found is not None:
            self._restored = found[0]
        if self._restored is None or not self._restored.ref.complete:
            self._session.claim()  # a finished run was asked to train again
            self._session.start_uploader(self._committed)
            self._learn()
        if self._restored is not None:
            if self.trainer.args.load_best_model_at_end:
                self._best_folder = resumption.restore_best(self._restored)
            self._session.timing.restored(self._session.clock() - began)
            log.info("resuming from step %d, committed by launch %d", self._restored.step, self._restored.ref.launch)
            tell_changes(self._restored.details, self._restored.step)
            if not self._restored.ref.complete:
                keep_samples(self.trainer, self._restored.details, allow_change=self._session.arguments.allow_batch_change)
        if self.machine_is_going():
            raise MachineGoing
        if found is not None:
            return str(found[1])
        foreign: str | None = resumption.foreign(resume_from_checkpoint)
        return foreign

    def end_was_told(self) -> bool:
        """Whether callbacks have heard the last lines of the training that is complete; all ranks must ask.

        A launch that a notice ended left them to this one. So did one that ended between the last commit and what an
        evaluation or an epoch's end says after it, as far as the journal tells.
        """
        restored, stage = self._restored, self._session.stage
        assert restored is not None
        if restored.reason == "notice":
            return False

        def look() -> bool:
            state = self._session.run.journal.state
            went_on = any(ref.stage > stage for ref in state.checkpoints)
            return went_on or state.ended == "finished" or not restored.details.get("evaluation_pending")

        return self._session.agreement.from_main(look)

    def machine_is_going(self) -> bool:
        """Whether any rank has heard that its machine goes; all ranks must ask, and get the same answer."""
        self.ask()
        return self._must_stop(self._session.agreement.answer())

    def machine_was_going(self) -> bool:
        """`machine_is_going` as of the call before: the ranks agree while they do something else in between."""
        going = self._must_stop(self._session.agreement.answer())
        self.ask()
        return going or (self._session.agreement.alone and self._must_stop(self._session.agreement.answer()))

    def leave(self, step: int) -> NoReturn:
        """Ends the launch before its first step. Raises TrainingPreempted.

        Args:
            step: that is committed; 0 for none.
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
        """Whether a person ends the training, and not a cloud."""
        return self._session.listener.newest is not None and self._session.listener.newest.source == KeyboardSource.name

    def _ending(self, what: str, step: int | None) -> TrainingPreempted:
        suppress_exit_advice()
        kind = TrainingInterrupted if self._is_interrupt else TrainingPreempted
        return kind(f"{what}\n{how_to_resume()}", step=step)

    def _learn(self) -> None:
        """Rank 0 reads what happened to the run, in a thread: the training does not wait for it."""
        if not self._session.agreement.is_main:
            return

        def read() -> None:
            try:
                self._past = history.read_past(self._session.run.journal)
            except SpotError as error:
                log.info("what happened to %s before could not be read: %s", self._session.run.url, error)
                return
            except Exception:
                log.exception("what happened to %s before could not be read", self._session.run.url)
                return
            self._cadence.remember(self._past)
            if self._restored is not None:
                self._metrics.put("steps_lost", self._past.steps_lost)

        historian = Workers(1, "hf_spot-historian")
        historian.submit(read)
        historian.shutdown(wait=False)

    def proven(self, verified: list[str] | None) -> None:
        """Called by every rank when a resumed training has been compared with what was saved.

        Args:
            verified: the parts that are the same; None when the checkpoint tells nothing to compare with.
        """
        assert self._restored is not None
        if verified is None:
            log.info("%s was saved by an earlier hf_spot: what came back can't be compared", self._restored.name)
            return
        log.info("resumed at step %d as it was saved: %s", self._restored.step, ", ".join(verified) or "nothing to compare")
        data = {"step": self._restored.step, "stage": self._session.stage, "entry": self._restored.ref.entry}
        self._session.record("resumed", {**data, "verified": verified}, patience_s=0.0)

    # -- during training ----------------------------------------------------------------------------------------------

    def step_begins(self) -> None:
        """Called by every rank when a step begins."""
        if self._session.timing.step_begins(self.trainer.state.global_step) and self._session.agreement.is_main:
            self._cadence.began()

    def ask(self) -> None:
        """Tell the other ranks what this one knows; `step_ended` and `micro_batch_ended` take the answer."""
        session, notice = self._session, self._session.listener.current()
        # The ranks of a machine read one file, not at the same instant: an advisory counts once, when rank 0 has seen it.
        advisory = session.agreement.is_main and notice is not None and notice.kind is NoticeKind.ADVISORY
        self._asked_advisory = notice.id if advisory and notice and notice.id not in self._advisories else None
        save_is_due = session.agreement.is_main and self._cadence.is_due()
        session.agreement.ask(session.ballot(notice, advisory=self._asked_advisory is not None, save_is_due=save_is_due))

    def micro_batch_ended(self, rest_of_step_s: float, *, rewindable: Callable[[], bool]) -> Decision | None:
        """Called by every rank between two micro-batches of a step: a decision if the step is to be left, else None.

        Args:
            rest_of_step_s: what the rest of the step should need.
            rewindable: whether all can be made as it was before the step.
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

    def step_ended(self, step: int) -> Decision | None:
        """Decide what to do after an optimizer step; None when no rank has anything to answer. Every rank must call it."""
        session = self._session
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
        self._metrics.put("notices", self._notices)
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
            # The notice was taken back in this moment, but the evaluation is gone: the next launch makes up for it.
            decision = Decision(Action.SAVE_AND_STOP, "a notice that has been taken back ended an evaluation")
            self._session.stop(decision, None)
        return decision

    def _is_quiet(self) -> bool:
        """Whether this rank has nothing to tell, as after nearly every step: microseconds count here."""
        session = self._session
        return session.listener.current() is None and session.fenced is None and not self._cadence.is_due()

    def _decide(self, kind: NoticeKind, seconds_left: float | None, notice: PreemptionNotice | None) -> Decision:
        def say(told: str) -> None:
            alert(told)
            if notice is not None:
                self._session.hook.tell(told)

        return self._session.decide(kind, seconds_left, notice, say)

    def save_begins(self) -> None:
        """A save comes next: starts the clock."""
        self._save_began = self._session.clock()
        self._cadence.saved(None)  # if it fails, the next attempt is not the next step

    def save_failed(self, why: SpotError, *, stops: bool) -> None:
        """Called by every rank when a checkpoint could not be written by one of them.

        Args:
            why: it could not.
            stops: ends the training with this error, after what is under way has been committed.
        """
        self._save_began = None
        if stops:
            self._session.agreement.together(lambda: self._session.finish_uploads(self._session.arguments.drain_timeout_s))
            raise why
        next_is = "the last commit stands" if self._session.preempted else "training goes on, and the next save tries again"
        if self._session.agreement.is_main:
            log_always(logging.ERROR, "%s; %s", why.args[0], next_is)

    def saved(self, folder: Path, request: CommitRequest) -> None:
        """Called by every rank when all parts of a checkpoint are written; rank 0 hands the folder to the uploader."""
        if self._session.disk.count > 1:
            self.behind.then_together(self._rotate_as_on_main)
        began, self._save_began = self._save_began, None
        stall_s = None if began is None else self._session.clock() - began
        self._session.timing.stalled(stall_s)
        self._cadence.saved(stall_s)
        self._metrics.put("stall_s", stall_s)
        details = {**(request.details or {}), **self._session.timing.to_details(request.step), **self._carried()}
        request = replace(request, details=details)
        submit = partial(self._submit, folder, request, began, stall_s)
        if self._session.disk.count > 1:
            self.behind.then_together(submit)
        elif self._session.uploader is not None:
            self.behind.then(partial(submit, self._session.agreement))
        self._session.order_uploads()

    def _submit(
        self, folder: Path, request: CommitRequest, began: float | None, stall_s: float | None, ranks: Agreement
    ) -> None:
        """Called when all files are written, by whoever wrote them."""
        session = self._session
        if began is not None:
            session.note_save(session.clock() - began)
            self._metrics.put("checkpoint_s", session.save_s)
        seconds = {"save_s": session.save_s, "stall_s": stall_s}
        details = {**(request.details or {}), **{name: took and round(took, 3) for name, took in seconds.items()}}
        self._session.submit(folder, replace(request, details=details), ranks)

    def _committed(self, entry: Entry) -> None:
        """Called after each commit, from the uploader's thread."""
        upload_s, size_bytes = entry.data["upload_s"], sum(file["size"] for file in entry.data["files"])
        if entry.data["save_s"] is not None:
            self._cadence.committed(entry.data["save_s"], upload_s)
        self._metrics.put("upload_s", upload_s)
        self._metrics.put("upload_gb_per_s", size_bytes / 1e9 / upload_s if upload_s else None)

    def _is_busy(self) -> bool:
        """Whether a new checkpoint would queue. Behind one that the store does not take it would not: it takes its place."""
        if self._session.uploader is None or self._session.uploader.trouble is not None:
            return False
        return not (self._session.uploader.idle and self.behind.wait(0.0))

    def _carried(self) -> dict[str, Any]:
        """For the launches after this one; nothing as long as the past is not known."""
        return history.to_details(self._past.now(self._session.now())) if self._past else {}

    def _share_of_memory(self) -> float:
        """This rank's, when several of its machine write much."""
        node = os.uname().nodename
        ranks = self._session.agreement.gather(node).count(node)
        return 1.0 if self._session.agreement.is_main and not is_sharded(self.trainer) else 1 / ranks

    def _rotate_as_on_main(self, ranks: Agreement) -> None:
        """Trainer rotates on rank 0's disk alone; the others would fill up with shards."""
        kept = ranks.from_main(lambda: {path.name for path in self._session.output_dir.glob("checkpoint-*")})
        if self._session.disk.leads:
            for path in self._session.output_dir.glob("checkpoint-*"):
                if path.name not in kept:
                    shutil.rmtree(path, ignore_errors=True)

    # -- the end ------------------------------------------------------------------------------------------------------

    def end(self, step: int) -> None:
        """After ``train()`` returned: waits for the last commit and ends as the run ended.

        Raises:
            TrainingPreempted: a notice stopped the training, or came so late that its last checkpoint isn't committed.
            Fenced: a newer launch owns the run.
            StoreError: the last checkpoint could not be committed in ``drain_timeout_s``.
        """
        if self._session.forked:
            return
        self._session.order_uploads()
        last = FinalDrain(self._session)
        if not self._session.agreement.is_main:
            last.wait_for_main()
        self._session.agreement.from_main(lambda: self._end_on_main(step, last))
        self.stage_finished()

    def stage_finished(self) -> None:
        """The next ``train()`` of this process is another training, and doesn't resume this one."""
        _finished_stages[self._url] = self._session.stage

    def _end_on_main(self, step: int, last: FinalDrain) -> None:
        drained = last.wait()
        if self._session.uploader is None:
            return
        if self._session.uploader.fenced is not None:
            raise self._session.uploader.fenced
        committed = self._session.committed_step
        if self._session.preempted is not None:
            data = {"step": step, "committed_step": committed, "stage": self._session.stage, "why": self._session.preempted.why}
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
        if self._session.runtime is None:
            self._session.record(
                "finished", {"step": step, "stage": self._session.stage, **self._session.timing.to_details(step)}
            )

    def failed(self, error: BaseException) -> None:
        """The training raised: commits what is under way, and says so in the journal when no launcher will."""
        if self._session.forked or self._session.uploader is None or self._session.uploader.fenced is not None:
            return
        # Who presses Ctrl-C a second time has seen what there is to wait for.
        impatient = isinstance(error, KeyboardInterrupt) and self._is_interrupt
        if not impatient:
            self._session.finish_uploads(min(FAILED_DRAIN_S, self._session.arguments.drain_timeout_s))
        if self._session.runtime is None:
            step = self.trainer.state.global_step
            told = {"error": type(error).__name__, "stage": self._session.stage, **self._session.timing.to_details(step)}
            self._session.record("failed", told, patience_s=JOURNAL_LAST_WORD_S if impatient else None)

    def close(self) -> None:
        """Stop listening and uploading, and give back what was taken."""
        self._session.close()

    @staticmethod
    def _must_stop(merged: Ballot | None) -> bool:
        return merged is not None and merged.terminate


def _check(trainer: Trainer) -> None:
    args = trainer.args
    if args.save_only_model:
        raise ConfigError(
            "TrainingArguments(save_only_model=True) leaves nothing to resume from", hint="set save_only_model=False"
        )
    if getattr(args, "enable_jit_checkpoint", False):
        raise ConfigError(
            "TrainingArguments(enable_jit_checkpoint=True) and SpotCallback would both answer SIGTERM",
            hint="set enable_jit_checkpoint=False",
        )
    if args.ignore_data_skip:
        warn_for_all("ignore_data_skip=True: a resumed run sees other data than an uninterrupted one; set it to False")
