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
from hf_spot.notices.notice import NoticeKind, PreemptionNotice
from hf_spot.notices.signals import KeyboardSource
from hf_spot.policy.preemption import Action, Decision, leaves_step
from hf_spot.run import history
from hf_spot.run.checkpoint import Checkpoint, CommitRequest
from hf_spot.run.journal import Entry
from hf_spot.run.progress import alert
from hf_spot.runtime import Runtime
from hf_spot.storage.threads import Workers
from hf_spot.timeouts import FAILED_DRAIN_S, JOURNAL_LAST_WORD_S
from hf_spot.training.ranks.agreement import Agreement
from hf_spot.training.saving.async_writer import AsyncCheckpointWriter
from hf_spot.training.session.final_drain import FinalDrain
from hf_spot.training.session.run_session import RunSession, as_value, from_value
from hf_spot.training.trainer.batch_size import keep_samples
from hf_spot.training.trainer.metrics import Metrics
from hf_spot.training.trainer.notebook import forget_the_agents_handlers, how_to_go_on, hush_advice_on_exits
from hf_spot.training.trainer.random_states import RandomStates
from hf_spot.training.trainer.restore import Going, Resumption
from hf_spot.training.trainer.save_schedule import Cadence
from hf_spot.training.trainer.saves import is_sharded

if TYPE_CHECKING:
    from transformers import Trainer

log = logging.getLogger("hf_spot")


SAVE_IS_DUE = Decision(Action.SAVE_AND_GO_ON, "a save is due")

# Trainings that this process has finished, by run. A script that trains twice has two stages: after a preemption in the
# second, the first must end at once with its own last checkpoint, and the second go on from its own.
_finished_stages: Counter[str] = Counter()


class TrainerSession(RunSession):
    """Restores what Trainer resumes from, answers what is heard, commits its saves, and ends the training as it should end.

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
        super().__init__("SpotCallback", url, arguments, runtime, stage=_finished_stages[url] + 1, now=now, clock=clock)
        self.trainer = trainer
        self._url = url
        args = trainer.args
        self.join(
            args.world_size,
            args.process_index,
            args.local_process_index,
            Path(args.output_dir or "."),
            setting="TrainingArguments(output_dir=…)",
        )
        self.restored: Checkpoint | None = None
        self.best_folder: Path | None = None
        self._advisories: set[str] = set()
        self._asked_advisory: str | None = None
        self._save_began: float | None = None
        self._past: history.Past | None = None
        self._notices = 0
        # Not in output_dir, which may be full when the next epoch begins, or be deleted in its middle.
        scratch = Path(tempfile.mkdtemp(prefix="hf_spot-", dir=runtime.directory if runtime else None))
        self.closing.callback(shutil.rmtree, scratch, ignore_errors=True)
        self.random_states = RandomStates(trainer, scratch / f"random-states-{trainer.args.process_index}")
        self.closing.callback(self.random_states.close)
        memory_gb = arguments.save_memory_gb
        writers = Agreement(trainer.args.world_size)  # of its own: the ranks agree on something else meanwhile
        self.closing.callback(writers.close)
        self.behind = AsyncCheckpointWriter(
            None if memory_gb is None else int(memory_gb * 1e9), writers, self._share_of_memory()
        )
        self.closing.callback(self.behind.close)
        self._cadence = Cadence(trainer, arguments, self._is_busy, now, clock)
        self._metrics = Metrics(trainer, {"next_save_in_s": self._cadence.due_in_s})
        self.closing.callback(self._metrics.close)

    # -- the start ----------------------------------------------------------------------------------------------------

    def begin(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Takes the run, restores what there is, starts listening; returns the folder to resume from, or None.

        Raises:
            SpotError: the run can't be used; nothing was trained.
            TrainingPreempted: the machine is going already.
        """
        if self.runtime is None:
            forget_the_agents_handlers()
        self.listen(keyboard=True)
        self.tell_launcher()
        self.take(unless_complete=True)
        try:
            return self._begin(resume_from_checkpoint)
        except Going:
            log.warning("the machine is going: it begins no training any more")
            newest = self.agreement.from_main(lambda: self.run.journal.state.latest(self.stage))
            self.leave(self.restored.step if self.restored else newest.step if newest else 0)

    def _begin(self, resume_from_checkpoint: str | bool | None) -> str | None:
        began, resumption = self.clock(), Resumption(self)
        found = resumption.restore(resume_from_checkpoint)
        if found is not None:
            self.restored = found[0]
        if self.restored is None or not self.restored.ref.complete:
            self.take()  # a finished run was asked to train again
            self.start_uploader(self._committed)
            self._learn()
        if self.restored is not None:
            if self.trainer.args.load_best_model_at_end:
                self.best_folder = resumption.bring_best(self.restored)
            self.timing.restored(self.clock() - began)
            log.info("going on from step %d, committed by launch %d", self.restored.step, self.restored.ref.launch)
            if not self.restored.ref.complete:
                keep_samples(self.trainer, self.restored.details, allow_change=self.arguments.allow_batch_change)
        if self.is_going():
            raise Going
        if found is not None:
            return str(found[1])
        foreign: str | None = resumption.foreign(resume_from_checkpoint)
        return foreign

    def is_going(self) -> bool:
        """Whether any rank has heard that its machine goes; all ranks must ask, and get the same answer."""
        self.ask()
        return self._is_going(self.agreement.answer())

    def was_going(self) -> bool:
        """`is_going` as of the call before: the ranks agree while they do something else in between."""
        going = self._is_going(self.agreement.answer())
        self.ask()
        return going or (self.agreement.alone and self._is_going(self.agreement.answer()))

    def leave(self, step: int) -> NoReturn:
        """Ends the launch before its first step. Raises TrainingPreempted.

        Args:
            step: that is committed; 0 for none.
        """
        if self.run.launch:
            data = {"step": step, "committed_step": step, "why": "before the first step", **self.timing.to_details(step)}
            self.record("preempted", data, patience_s=JOURNAL_LAST_WORD_S)
        why = "interrupted" if self._is_interrupt else "the machine is going"
        raise self._ending(f"{why}; nothing was trained in this launch.", step or None)

    @property
    def _is_interrupt(self) -> bool:
        """Whether a person ends the training, and not a cloud."""
        return self.listener.newest is not None and self.listener.newest.source == KeyboardSource.name

    def _ending(self, what: str, step: int | None) -> TrainingPreempted:
        hush_advice_on_exits()
        kind = TrainingInterrupted if self._is_interrupt else TrainingPreempted
        return kind(f"{what}\n{how_to_go_on()}", step=step)

    def _learn(self) -> None:
        """Rank 0 reads what happened to the run, in a thread: the training does not wait for it."""
        if not self.agreement.is_main:
            return

        def read() -> None:
            try:
                self._past = history.read_past(self.run.journal)
            except SpotError as error:
                log.info("what happened to %s before could not be read: %s", self.run.url, error)
                return
            except Exception:
                log.exception("what happened to %s before could not be read", self.run.url)
                return
            self._cadence.remember(self._past)
            if self.restored is not None:
                self._metrics.put("steps_lost", self._past.steps_lost)

        historian = Workers(1, "hf_spot-historian")
        historian.submit(read)
        historian.shutdown(wait=False)

    # -- during training ----------------------------------------------------------------------------------------------

    def step_begins(self) -> None:
        """Called by every rank when a step begins."""
        if self.timing.step_begins(self.trainer.state.global_step) and self.agreement.is_main:
            self._cadence.began()

    def ask(self) -> None:
        """Tells the other ranks what was heard here; `step_ended` and `micro_batch_ended` take the answer."""
        notice = self.listener.heard()
        terminate = notice is not None and notice.kind is NoticeKind.TERMINATE
        # The ranks of a node read one file, not at the same instant: an advisory counts once, when rank 0 has seen it.
        advisory = self.agreement.is_main and notice is not None and notice.kind is NoticeKind.ADVISORY
        self._asked_advisory = notice.id if advisory and notice and notice.id not in self._advisories else None
        left = notice.seconds_left(self.now()) if notice else None
        fenced = self.uploader is not None and self.uploader.fenced is not None
        self.agreement.ask(
            float(terminate),
            float(self._asked_advisory is not None),
            float(fenced),
            as_value(left),
            float(self.agreement.is_main and self._cadence.is_due()),
        )

    def micro_batch_ended(self, rest_of_step_s: float, *, rewindable: Callable[[], bool]) -> Decision | None:
        """Called by every rank between two micro-batches of a step: a decision if the step is to be left, else None.

        Args:
            rest_of_step_s: what the rest of the step should need.
            rewindable: whether all can be made as it was before the step.
        """
        answer = self.agreement.answer()
        self.ask()
        if self.agreement.alone:
            answer = self.agreement.answer()
        if not self._is_going(answer):
            return None
        seconds_left = from_value(answer[3])

        def decide_on_main() -> Decision | None:
            if leaves_step(seconds_left, rest_of_step_s, self.measured()) and rewindable():
                return self._decide(NoticeKind.TERMINATE, seconds_left, self.listener.heard())
            return None

        decision = self.agreement.from_main(decide_on_main)
        if decision is not None:
            self.stop(decision, seconds_left)
        return decision

    def step_ended(self, step: int) -> Decision | None:
        """Called by every rank after every optimizer step: what to do if something was heard by anyone, else None."""
        if self.steps is not None:
            self.steps.tell(step)
        if self.agreement.alone:
            if self._is_quiet():
                return None
            self.ask()
        elif not self.agreement.asked:
            self.ask()
        terminate, advisory, fenced, soonest, due = self.agreement.answer()
        if fenced:
            return Decision(Action.FINISH_UPLOAD_AND_STOP, "a newer launch owns the run")
        if not terminate and not advisory:
            return SAVE_IS_DUE if due else None
        self._notices += 1
        self._metrics.put("notices", self._notices)
        if self._asked_advisory is not None:
            self._advisories.add(self._asked_advisory)
        kind = NoticeKind.TERMINATE if terminate else NoticeKind.ADVISORY
        seconds_left = from_value(soonest)
        decision = self.agreement.from_main(lambda: self._decide(kind, seconds_left, self.listener.heard()))
        if decision.action in (Action.SAVE_AND_STOP, Action.FINISH_UPLOAD_AND_STOP):
            self.stop(decision, seconds_left)
        return decision

    def _is_quiet(self) -> bool:
        """Whether this rank has nothing to tell, as after nearly every step: microseconds are paid for no more than that."""
        fenced = self.uploader is not None and self.uploader.fenced is not None
        return self.listener.heard() is None and not fenced and not self._cadence.is_due()

    def _decide(self, kind: NoticeKind, seconds_left: float | None, notice: PreemptionNotice | None) -> Decision:
        def say(told: str) -> None:
            alert(told)
            if notice is not None:
                self.hook.tell(told)

        return self.decide(kind, seconds_left, notice, say)

    def save_begins(self) -> None:
        """A save comes next: starts the clock."""
        self._save_began = self.clock()
        self._cadence.saved(None)  # if it fails, the next attempt is not the next step

    def save_failed(self, why: SpotError, *, stops: bool) -> None:
        """Called by every rank when a checkpoint could not be written by one of them.

        Args:
            why: it could not.
            stops: ends the training with this error, after what is under way has been committed.
        """
        self._save_began = None
        if stops:
            self.agreement.together(lambda: self.finish_uploads(self.arguments.drain_timeout_s))
            raise why
        next_is = "the last commit stands" if self.preempted else "training goes on, and the next save tries again"
        if self.agreement.is_main:
            log.error("%s; %s", why.args[0], next_is)

    def saved(self, folder: Path, request: CommitRequest) -> None:
        """Called by every rank when all parts of a checkpoint are written; rank 0 hands the folder to the uploader."""
        if self.disk.count > 1:
            self.behind.then_together(self._rotate_as_on_main)
        began, self._save_began = self._save_began, None
        stall_s = None if began is None else self.clock() - began
        self.timing.stalled(stall_s)
        self._cadence.saved(stall_s)
        self._metrics.put("stall_s", stall_s)
        details = {**(request.details or {}), **self.timing.to_details(request.step), **self._carried()}
        request = replace(request, details=details)
        submit = partial(self._submit, folder, request, began, stall_s)
        if self.disk.count > 1:
            self.behind.then_together(submit)
        elif self.uploader is not None:
            self.behind.then(partial(submit, self.agreement))
        self.order_uploads()

    def _submit(
        self, folder: Path, request: CommitRequest, began: float | None, stall_s: float | None, ranks: Agreement
    ) -> None:
        """Called when all files are written, by whoever wrote them."""
        if began is not None:
            self.save_s = self.clock() - began
            self._metrics.put("checkpoint_s", self.save_s)
        seconds = {"save_s": self.save_s, "stall_s": stall_s}
        details = {**(request.details or {}), **{name: took and round(took, 3) for name, took in seconds.items()}}
        self.submit(folder, replace(request, details=details), ranks)

    def _committed(self, entry: Entry) -> None:
        """Called after each commit, from the uploader's thread."""
        upload_s, size_bytes = entry.data["upload_s"], sum(file["size"] for file in entry.data["files"])
        if entry.data["save_s"] is not None:
            self._cadence.committed(entry.data["save_s"], upload_s)
        self._metrics.put("upload_s", upload_s)
        self._metrics.put("upload_gb_per_s", size_bytes / 1e9 / upload_s if upload_s else None)

    def _is_busy(self) -> bool:
        """Whether a new checkpoint would queue. Behind one that the store does not take it would not: it takes its place."""
        if self.uploader is None or self.uploader.trouble is not None:
            return False
        return not (self.uploader.idle and self.behind.wait(0.0))

    def _carried(self) -> dict[str, Any]:
        """For the launches after this one; nothing as long as the past is not known."""
        return history.to_details(self._past.now(self.now())) if self._past else {}

    def _share_of_memory(self) -> float:
        """This rank's, when several of its machine write much."""
        node = os.uname().nodename
        ranks = self.agreement.gather(node).count(node)
        return 1.0 if self.agreement.is_main and not is_sharded(self.trainer) else 1 / ranks

    def _rotate_as_on_main(self, ranks: Agreement) -> None:
        """Trainer rotates on rank 0's disk alone; the others would fill up with shards."""
        kept = ranks.from_main(lambda: {path.name for path in self.output_dir.glob("checkpoint-*")})
        if self.disk.leads:
            for path in self.output_dir.glob("checkpoint-*"):
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
        if self.forked:
            return
        self.order_uploads()
        last = FinalDrain(self)
        if not self.agreement.is_main:
            last.listen_on()
        self.agreement.from_main(lambda: self._end_on_main(step, last))
        self.stage_finished()

    def stage_finished(self) -> None:
        """The next ``train()`` of this process is another training, and doesn't resume this one."""
        _finished_stages[self._url] = self.stage

    def _end_on_main(self, step: int, last: FinalDrain) -> None:
        drained = last.wait()
        if self.uploader is None:
            return
        if self.uploader.fenced is not None:
            raise self.uploader.fenced
        committed = self.committed_step
        if self.preempted is not None:
            data = {"step": step, "committed_step": committed, "stage": self.stage, "why": self.preempted.why}
            self.record("preempted", {**data, **self.timing.to_details(step)}, patience_s=JOURNAL_LAST_WORD_S)
            how = "interrupted" if self._is_interrupt else "preempted"
            raise self._ending(f"{how} at step {step}; step {committed} is committed to {self.run.url}.", committed)
        if not drained or committed < step:
            folder, timeout_s = self.output_dir / f"checkpoint-{step}", self.arguments.drain_timeout_s
            why = f"after {timeout_s:.0f} s: {self.uploader.trouble}" if not drained else "(the log says why)"
            raise StoreError(
                f"training ended at step {step}, but only step {committed} is in {self.run.url} {why}",
                hint=f"hf-spot checkpoints push {self.run.url} {folder}"
                if folder.is_dir()
                else "start the same command again: it goes on from there",
            )
        if self.runtime is None:
            self.record("finished", {"step": step, "stage": self.stage, **self.timing.to_details(step)})

    def failed(self, error: BaseException) -> None:
        """The training raised: commits what is under way, and says so in the journal when no launcher will."""
        if self.forked or self.uploader is None or self.uploader.fenced is not None:
            return
        # Who presses Ctrl-C a second time has seen what there is to wait for.
        impatient = isinstance(error, KeyboardInterrupt) and self._is_interrupt
        if not impatient:
            self.finish_uploads(min(FAILED_DRAIN_S, self.arguments.drain_timeout_s))
        if self.runtime is None:
            step = self.trainer.state.global_step
            told = {"error": type(error).__name__, "stage": self.stage, **self.timing.to_details(step)}
            self.record("failed", told, patience_s=JOURNAL_LAST_WORD_S if impatient else None)

    @staticmethod
    def _is_going(answer: tuple[float, ...]) -> bool:
        return bool(answer and answer[0])


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
        log.warning("ignore_data_skip=True: a resumed run sees other data than an uninterrupted one; set it to False")
