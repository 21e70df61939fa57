"""Session: one call of ``trainer.train()`` and the run that it belongs to, from the claim to the last commit."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError, SpotError, StoreError, TrainingInterrupted, TrainingPreempted
from hf_spot.notices.detect import sources
from hf_spot.notices.notice import NoticeKind, PreemptionNotice
from hf_spot.notices.signals import KeyboardSource
from hf_spot.notices.watcher import Watcher
from hf_spot.policy.preemption import Action, Decision, Measured, decide, gives_way, leaves_step
from hf_spot.policy.restarts import patience_s
from hf_spot.run import history
from hf_spot.run.hook import Hook, hook_url
from hf_spot.run.journal import CheckpointRef, Entry
from hf_spot.run.machine import about_this_machine
from hf_spot.run.progress import Bar, alert
from hf_spot.run.restore import bring, holds_own_checkpoints, restore_newest, set_aside_uncommitted, sweep, take
from hf_spot.run.run import Checkpoint, CommitRequest, Run
from hf_spot.run.upload import Uploader
from hf_spot.runtime import Runtime, StepCounter
from hf_spot.storage.store import Progress
from hf_spot.storage.threads import Workers
from hf_spot.training.agreement import Agreement
from hf_spot.training.batches import keep_samples
from hf_spot.training.cadence import Cadence
from hf_spot.training.disks import check_writable, find_disk
from hf_spot.training.exactness import RandomStates
from hf_spot.training.journalist import Journalist
from hf_spot.training.metrics import Metrics
from hf_spot.training.notebook import forget_the_agents_handlers, how_to_go_on, hush_advice_on_exits
from hf_spot.training.saves import is_sharded
from hf_spot.training.snapshot import WriteBehind
from hf_spot.training.timing import Timing

if TYPE_CHECKING:
    from transformers import Trainer

log = logging.getLogger("hf_spot")

T = TypeVar("T")


class _Going(Exception):
    """Ends a start that leads to no training."""


_NEVER = 1e18  # seconds, for a notice that names no deadline
_LAST_WORD_S = 5.0
_LOOK_S = 0.02
SAVE_IS_DUE = Decision(Action.SAVE_AND_GO_ON, "a save is due")

# Trainings that this process has finished, by run. A script that trains twice has two stages: after a preemption in the
# second, the first must end at once with its own last checkpoint, and the second go on from its own.
_finished_stages: Counter[str] = Counter()


class Session:
    """Opens the run, restores, watches for notices, uploads, and ends the training as it should end.

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
        self.trainer = trainer
        self._arguments = arguments
        self._runtime = runtime
        self._now = now
        self._clock = clock
        self.output_dir = Path(trainer.args.output_dir or ".")
        self._url = url
        self.stage = _finished_stages[url] + 1
        self._process = os.getpid()
        self.agreement = Agreement(trainer.args.world_size)
        self.agreement.together(partial(check_writable, self.output_dir, setting="TrainingArguments(output_dir=…)"))
        self.disk = find_disk(self.agreement, trainer.args.process_index, trainer.args.local_process_index, self.output_dir)
        self.run = Run(url, allow_unfenced_store=arguments.allow_unfenced_store, workers=arguments.upload_workers)
        self.restored: Checkpoint | None = None
        self.best_folder: Path | None = None
        self._uploader: Uploader | None = None
        self._watcher: Watcher | None = None
        self._heard: PreemptionNotice | None = None
        self._elsewhere: PreemptionNotice | None = None
        self._parted = False
        self._notice_mtime_ns = 0
        self._advisories: set[str] = set()
        self._asked_advisory: str | None = None
        self._steps: StepCounter | None = None
        self._save_began: float | None = None
        self._save_s: float | None = None
        self._size_bytes: int | None = None
        self._past: history.Past | None = None
        self._timing = Timing(now, clock)
        self._notices = 0
        self.preempted: Decision | None = None
        self._gone_at: float | None = None  # by this process's clock
        self._closed = contextlib.ExitStack()
        self._hook = Hook(None if runtime else hook_url(arguments, os.environ), url)  # a launcher tells it itself
        self._closed.callback(self._hook.close)
        self._journalist = Journalist(self.run, self._hook)
        self._closed.callback(self._journalist.close)
        # Not in output_dir, which may be full when the next epoch begins, or be deleted in its middle.
        scratch = Path(tempfile.mkdtemp(prefix="hf_spot-", dir=runtime.directory if runtime else None))
        self._closed.callback(shutil.rmtree, scratch, ignore_errors=True)
        self.random_states = RandomStates(trainer, scratch / f"random-states-{trainer.args.process_index}")
        self._closed.callback(self.random_states.close)
        memory_gb = arguments.save_memory_gb
        writers = Agreement(trainer.args.world_size)  # of its own: the ranks agree on something else meanwhile
        self._closed.callback(writers.close)
        self.behind = WriteBehind(None if memory_gb is None else int(memory_gb * 1e9), writers, self._share_of_memory())
        self._closed.callback(self.behind.close)
        self._cadence = Cadence(trainer, arguments, self._is_busy, now, clock)
        self._metrics = Metrics(trainer, {"next_save_in_s": self._cadence.due_in_s})
        self._closed.callback(self._metrics.close)

    # -- the start ----------------------------------------------------------------------------------------------------

    def begin(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Takes the run, restores what there is, starts listening; returns the folder to resume from, or None.

        Raises:
            SpotError: the run can't be used; nothing was trained.
            TrainingPreempted: the machine is going already.
        """
        self._listen()
        self._follow(self.agreement.from_main(self._claim))
        try:
            return self._begin(resume_from_checkpoint)
        except _Going:
            log.warning("the machine is going: it begins no training any more")
            newest = self.agreement.from_main(lambda: self.run.journal.state.latest(self.stage))
            self.leave(self.restored.step if self.restored else newest.step if newest else 0)

    def _begin(self, resume_from_checkpoint: str | bool | None) -> str | None:
        began = self._clock()
        found = self._restore(resume_from_checkpoint)
        if found is not None:
            self.restored = found[0]
        self._clear_away(found)
        if self.restored is None or not self.restored.ref.complete:
            self._follow(self.agreement.from_main(self._claim_if_finished))
            self._start_uploader()
            self._learn()
        if self.restored is not None:
            self._bring_best()
            self._timing.restored(self._clock() - began)
            log.info("going on from step %d, committed by launch %d", self.restored.step, self.restored.ref.epoch)
            if not self.restored.ref.complete:
                keep_samples(self.trainer, self.restored.details, allow_change=self._arguments.allow_batch_change)
        if self.is_going():
            raise _Going
        if found is not None:
            return str(found[1])
        foreign: str | None = self.agreement.from_main(lambda: self._foreign(resume_from_checkpoint))
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
        if self.run.epoch:
            data = {"step": step, "committed_step": step, "why": "before the first step", **self._timing.to_details(step)}
            self._record("preempted", data, patience_s=_LAST_WORD_S)
        why = "interrupted" if self._is_interrupt else "the machine is going"
        raise self._ending(f"{why}; nothing was trained in this launch.", step or None)

    @property
    def _is_interrupt(self) -> bool:
        """Whether a person ends the training, and not a cloud."""
        return self._heard is not None and self._heard.source == KeyboardSource.name

    def _ending(self, what: str, step: int | None) -> TrainingPreempted:
        hush_advice_on_exits()
        kind = TrainingInterrupted if self._is_interrupt else TrainingPreempted
        return kind(f"{what}\n{how_to_go_on()}", step=step)

    def _claim(self) -> int:
        if self._runtime is not None:
            self.run.adopt(self._runtime.epoch)
            self._timing.claimed(self._runtime.claimed_at)
        else:
            newest = self.run.state().latest(self.stage)
            if newest is None or not newest.complete:  # else there is nothing to train, so nothing to write
                self._claim_anew()
        return self.run.epoch

    def _claim_if_finished(self) -> int:
        if self.run.epoch == 0:  # a finished run was asked to train again
            self._claim_anew()
        return self.run.epoch

    def _claim_anew(self) -> None:
        about = {**about_this_machine("SpotCallback", os.environ), "stage": self.stage}
        log.info("launch %d of %s", self.run.claim(about), self.run.url)
        self._timing.claimed(self.run.journal.claimed_at)
        self._hook.tell(f"launch {self.run.epoch} has begun on {about['hostname']}")

    def _follow(self, epoch: int) -> None:
        """The leaders of other disks write under the claim of rank 0."""

        def adopt() -> None:
            if self.disk.leads and epoch and self.run.epoch != epoch:
                if self.run.state().epoch < epoch:
                    raise ConfigError(
                        f"{os.uname().nodename} does not see launch {epoch} in {self.run.url}: the machines need one store",
                        hint="--store s3://bucket/prefix, or a directory on a file system that all machines share",
                    )
                self.run.adopt(epoch)

        self.agreement.together(adopt)

    def _on_each_disk(self, act: Callable[[], T]) -> T:
        """The leader of each disk acts; every rank gets what rank 0's act gave."""
        result = self.agreement.together(lambda: act() if self.disk.leads else None)
        return self.agreement.from_main(lambda: cast(T, result))

    def _restore(self, resume_from_checkpoint: str | bool | None) -> tuple[Checkpoint, Path] | None:
        self._on_each_disk(lambda: sweep(self.output_dir))
        if resume_from_checkpoint is False:
            return None
        refs = self.agreement.from_main(lambda: [ref for ref in self.run.state().checkpoints if ref.stage == self.stage])
        return restore_newest(refs, lambda ref: self._bring(ref, "restore"), self.run.url)

    def _bring(self, ref: CheckpointRef, label: str) -> tuple[Checkpoint, Path]:
        args = self.trainer.args
        ranks = None if self.disk.count == 1 else self.disk.ranks
        progress = partial(self._watched_bar, label)

        def act() -> tuple[Checkpoint, Path]:
            if self._runtime is not None:
                take(self._runtime, ref.entry, self.output_dir, self._wait_for_launcher, ranks=ranks)
            return bring(self.run, ref, self.output_dir, ranks=ranks, world_size=args.world_size, progress=progress)

        return self._on_each_disk(act)

    def _wait_for_launcher(self) -> None:
        if self._hear_end() is not None:
            raise _Going
        time.sleep(_LOOK_S)

    def _watched_bar(self, label: str, size_bytes: int) -> Progress:
        """A bar for a restore that ends when the machine goes: nobody would train with it."""
        shown = Bar(label, size_bytes)

        def moved(count: int) -> None:
            if self._hear_end() is not None:
                raise _Going
            shown(count)

        return moved

    def _clear_away(self, found: tuple[Checkpoint, Path] | None) -> None:
        self._had_own = self.agreement.from_main(lambda: holds_own_checkpoints(self.run, self.output_dir))
        step = found[0].step if found else 0
        self._on_each_disk(lambda: set_aside_uncommitted(self.run, self.output_dir, step))

    def _foreign(self, resume_from_checkpoint: Any) -> Any:
        """What Trainer shall resume from when the run has nothing: a checkpoint from before hf_spot is Trainer's business."""
        if resume_from_checkpoint is True and not any(self.output_dir.glob("checkpoint-*")):
            return None
        own = _is_own(resume_from_checkpoint, self.output_dir) and self._had_own
        return None if own or resume_from_checkpoint in (None, False) else resume_from_checkpoint

    def _start_uploader(self) -> None:
        if not self.disk.leads:
            return
        self._uploader = Uploader(
            self.run,
            self.output_dir / ".hf_spot" / f"pins-{self.run.epoch}-{self.stage}",
            save_total_limit=self._arguments.save_total_limit,
            on_commit=self._committed,
            keeps_house=self.agreement.is_main,
        )
        self._closed.callback(self._uploader.close)

    def _bring_best(self) -> None:
        assert self.restored is not None
        args = self.trainer.args
        bests = [ref for ref in self.run.journal.state.checkpoints if ref.stage == self.stage and ref.best]
        best = self.agreement.from_main(lambda: bests[0] if bests else None)
        if not args.load_best_model_at_end or best is None:
            return
        if best.step == self.restored.step:
            self.best_folder = self.output_dir / self.restored.name
            return
        try:
            _, self.best_folder = self._bring(best, "restore best")
        except SpotError as error:
            log.error("the best checkpoint so far can't be restored; a later one will be taken for the best: %s", error)
        else:
            # Rotation goes by modification time: what is resumed from must count as the newer one.
            resumed = self.output_dir / self.restored.name
            self._on_each_disk(lambda: os.utime(resumed))

    def _listen(self) -> None:
        if self._runtime is not None:
            self._runtime.training_path.touch()
            self._steps = StepCounter(self._runtime.step_path) if self.agreement.is_main else None
            self._closed.callback(self._runtime.training_path.unlink, missing_ok=True)
            return

        def on_notice(notice: PreemptionNotice) -> None:
            self._heard = None if notice.kind is NoticeKind.CANCELLED else notice

        forget_the_agents_handlers()
        listened_to = sources(self._arguments, environ=os.environ)
        if listened_to:
            listened_to.append(KeyboardSource())
        self._watcher = Watcher(listened_to, on_notice)
        self._closed.enter_context(self._watcher)

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
        if self._timing.step_begins(self.trainer.state.global_step) and self.agreement.is_main:
            self._cadence.began()

    def ask(self) -> None:
        """Tells the other ranks what was heard here; `step_ended` and `micro_batch_ended` take the answer."""
        notice = self._hear()
        terminate = notice is not None and notice.kind is NoticeKind.TERMINATE
        # The ranks of a node read one file, not at the same instant: an advisory counts once, when rank 0 has seen it.
        advisory = self.agreement.is_main and notice is not None and notice.kind is NoticeKind.ADVISORY
        self._asked_advisory = notice.id if advisory and notice and notice.id not in self._advisories else None
        left = notice.seconds_left(self._now()) if notice else None
        fenced = self._uploader is not None and self._uploader.fenced is not None
        self.agreement.ask(
            float(terminate),
            float(self._asked_advisory is not None),
            float(fenced),
            -_NEVER if left is None else -left,
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
        seconds_left = None if answer[3] == -_NEVER else -answer[3]

        def decide_on_main() -> Decision | None:
            if leaves_step(seconds_left, rest_of_step_s, self._measured()) and rewindable():
                return self._decide(NoticeKind.TERMINATE, seconds_left, self._hear())
            return None

        decision = self.agreement.from_main(decide_on_main)
        if decision is not None:
            self._stop(decision, seconds_left)
        return decision

    def step_ended(self, step: int) -> Decision | None:
        """Called by every rank after every optimizer step: what to do if something was heard by anyone, else None."""
        if self._steps is not None:
            self._steps.tell(step)
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
        seconds_left = None if soonest == -_NEVER else -soonest
        decision = self.agreement.from_main(lambda: self._decide(kind, seconds_left, self._hear()))
        if decision.action in (Action.SAVE_AND_STOP, Action.FINISH_UPLOAD_AND_STOP):
            self._stop(decision, seconds_left)
        return decision

    def _is_quiet(self) -> bool:
        """Whether this rank has nothing to tell, as after nearly every step: microseconds are paid for no more than that."""
        fenced = self._uploader is not None and self._uploader.fenced is not None
        return self._hear() is None and not fenced and not self._cadence.is_due()

    def _stop(self, decision: Decision, seconds_left: float | None) -> None:
        self.preempted = decision
        self._gone_at = None if seconds_left is None else self._clock() + seconds_left

    def _measured(self) -> Measured:
        measured = self._uploader.measured() if self._uploader else Measured()
        return replace(measured, save_s=self._save_s, size_bytes=self._size_bytes)

    def _order_uploads(self) -> None:
        """After a notice: the newest checkpoint goes first, and what is in flight may have to give way to it."""
        if self.preempted is None:
            return
        left_s = None if self._gone_at is None else self._gone_at - self._clock()
        give_way = self.agreement.from_main(lambda: gives_way(left_s, self._measured()))
        if self._uploader is not None:
            self._uploader.hurry(give_way=give_way)

    def _decide(self, kind: NoticeKind, seconds_left: float | None, notice: PreemptionNotice | None) -> Decision:
        decision = decide(kind, seconds_left, self._measured())
        told = f"{kind.value} from {notice.source if notice else 'another rank'}: {decision.action.value} ({decision.why})"
        alert(told)
        if self._runtime is None and notice is not None:
            self._hook.tell(told)
            # The journal may be slow to answer, and the training shall not wait for it.
            self._record("notice", {**json.loads(notice.to_json()), "why": decision.why}, patience_s=0.0)
        return decision

    def save_begins(self) -> None:
        """A save comes next: starts the clock."""
        self._save_began = self._clock()
        self._cadence.saved(None)  # if it fails, the next attempt is not the next step

    def save_failed(self, why: SpotError, *, stops: bool) -> None:
        """Called by every rank when a checkpoint could not be written by one of them.

        Args:
            why: it could not.
            stops: ends the training with this error, after what is under way has been committed.
        """
        self._save_began = None
        if stops:
            self.agreement.together(self._drain_before_the_end)
            raise why
        next_is = "the last commit stands" if self.preempted else "training goes on, and the next save tries again"
        if self.agreement.is_main:
            log.error("%s; %s", why.args[0], next_is)

    def _drain_before_the_end(self) -> None:
        if self._uploader is not None and not self._uploader.idle:
            log.warning("finishing the upload in flight")
        if self._uploader is not None and not self._uploader.drain(self._arguments.drain_timeout_s):
            log.error("the upload in flight did not end: %s", self._uploader.trouble)

    def saved(self, folder: Path, request: CommitRequest) -> None:
        """Called by every rank when all parts of a checkpoint are written; rank 0 hands the folder to the uploader."""
        if self.disk.count > 1:
            self.behind.then_together(self._rotate_as_on_main)
        began, self._save_began = self._save_began, None
        stall_s = None if began is None else self._clock() - began
        self._timing.stalled(stall_s)
        self._cadence.saved(stall_s)
        self._metrics.put("stall_s", stall_s)
        details = {**(request.details or {}), **self._timing.to_details(request.step), **self._carried()}
        request = replace(request, details=details)
        if self._uploader is not None:
            self.behind.then(partial(self._submit, self._uploader, folder, request, began, stall_s))
        self._order_uploads()

    def _submit(
        self, uploader: Uploader, folder: Path, request: CommitRequest, began: float | None, stall_s: float | None
    ) -> None:
        """Called when all files are written, by whoever wrote them."""
        if began is not None:
            self._save_s = self._clock() - began
            self._metrics.put("checkpoint_s", self._save_s)
        seconds = {"save_s": self._save_s, "stall_s": stall_s}
        details = {**(request.details or {}), **{name: took and round(took, 3) for name, took in seconds.items()}}
        request = replace(request, details=details, part=self.disk.index, parts=self.disk.count)
        try:
            uploader.submit(folder, request)
            self._size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        except OSError as error:
            log.error("%s can't be queued for upload, training goes on: %s", folder, error)

    def _committed(self, entry: Entry) -> None:
        """Called after each commit, from the uploader's thread."""
        upload_s, size_bytes = entry.data["upload_s"], sum(file["size"] for file in entry.data["files"])
        if entry.data["save_s"] is not None:
            self._cadence.committed(entry.data["save_s"], upload_s)
        self._metrics.put("upload_s", upload_s)
        self._metrics.put("upload_gb_per_s", size_bytes / 1e9 / upload_s if upload_s else None)

    def _is_busy(self) -> bool:
        """Whether a new checkpoint would queue. Behind one that the store does not take it would not: it takes its place."""
        if self._uploader is None or self._uploader.trouble is not None:
            return False
        return not (self._uploader.idle and self.behind.wait(0.0))

    def _carried(self) -> dict[str, Any]:
        """For the launches after this one; nothing as long as the past is not known."""
        return history.to_details(self._past.now(self._now())) if self._past else {}

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
        if self._forked:
            return
        self._order_uploads()
        if not self.agreement.is_main:
            self._listen_on()
        self.agreement.from_main(lambda: self._end_on_main(step))
        self.stage_finished()

    def stage_finished(self) -> None:
        """The next ``train()`` of this process is another training, and doesn't resume this one."""
        _finished_stages[self._url] = self.stage

    def _listen_on(self) -> None:
        """While rank 0 waits for the last commit, the others tell what they hear: files of theirs may be on their way, too."""
        hurried = False
        while self._meet(waits=False):
            if self._uploader is not None and self._elsewhere is not None and not hurried:
                self._uploader.hurry(give_way=gives_way(self._elsewhere.seconds_left(self._now()), self._measured()))
                hurried = True

    def _meet(self, *, waits: bool) -> bool:
        """One round after the last step, of all ranks: what was heard anywhere, and whether rank 0 waits any longer."""
        if self.agreement.alone or self._parted:
            return False
        notice = self._hear_end()
        left = notice.seconds_left(self._now()) if notice else None
        self.agreement.ask(float(notice is not None), 0.0, 0.0, -_NEVER if left is None else -left, float(waits))
        try:
            terminate, _, _, soonest, waiting = self.agreement.answer()
        except RuntimeError as error:
            log.warning("a rank is gone, and the last commit is waited for without it: %s", error)
            self._parted = True
            return False
        if terminate and notice is None and self._elsewhere is None:
            deadline = None if soonest == -_NEVER else self._now() + timedelta(seconds=-soonest)
            self._elsewhere = PreemptionNotice(NoticeKind.TERMINATE, "another rank", "after the last step", deadline)
        return bool(waiting)

    def _end_on_main(self, step: int) -> None:
        try:
            if self._uploader is not None and self._uploader.fenced is None:
                drained = self._drain(self._uploader)
        finally:
            self._meet(waits=False)  # the others wait for this word
        if self._uploader is None:
            return
        if self._uploader.fenced is not None:
            raise self._uploader.fenced
        newest = self.run.journal.state.latest(self.stage)
        committed = newest.step if newest else 0
        if self.preempted is not None:
            data = {"step": step, "committed_step": committed, "stage": self.stage, "why": self.preempted.why}
            self._record("preempted", {**data, **self._timing.to_details(step)}, patience_s=_LAST_WORD_S)
            how = "interrupted" if self._is_interrupt else "preempted"
            raise self._ending(f"{how} at step {step}; step {committed} is committed to {self.run.url}.", committed)
        if not drained or committed < step:
            folder, timeout_s = self.output_dir / f"checkpoint-{step}", self._arguments.drain_timeout_s
            why = f"after {timeout_s:.0f} s: {self._uploader.trouble}" if not drained else "(the log says why)"
            raise StoreError(
                f"training ended at step {step}, but only step {committed} is in {self.run.url} {why}",
                hint=f"hf-spot checkpoints push {self.run.url} {folder}"
                if folder.is_dir()
                else "start the same command again: it goes on from there",
            )
        if self._runtime is None:
            self._record("finished", {"step": step, "stage": self.stage, **self._timing.to_details(step)})

    def _drain(self, uploader: Uploader) -> bool:
        """Waits for the last commit, as long as the machine lives, if a notice says how long; whether it came."""

        def patience() -> float:
            notice = self._hear_end()
            left = notice.seconds_left(self._now()) if notice else None
            return patience_s(left, training=True, drain_timeout_s=self._arguments.drain_timeout_s)

        if self.preempted is not None:
            return uploader.drain(patience())

        def is_heard() -> bool:
            self._meet(waits=True)
            return self._hear_end() is not None

        if uploader.drain(patience(), is_heard):
            return True
        notice = self._hear_end()
        if notice is None:
            return False
        # It came after the last step: nothing is left to stop, and nobody else waits for it.
        alert(f"{notice.kind.value} from {notice.source}: the last upload is finished")
        uploader.hurry(give_way=gives_way(notice.seconds_left(self._now()), self._measured()))
        drained = uploader.drain(patience())
        if not drained and uploader.fenced is None:
            self.preempted = Decision(Action.FINISH_UPLOAD_AND_STOP, "after the last step; its upload did not end in time")
        return drained

    def failed(self, error: BaseException) -> None:
        """The training raised: commits what is under way, and says so in the journal when no launcher will."""
        if self._forked or self._uploader is None or self._uploader.fenced is not None:
            return
        # Who presses Ctrl-C a second time has seen what there is to wait for.
        impatient = isinstance(error, KeyboardInterrupt) and self._is_interrupt
        if not impatient:
            if not self._uploader.idle:
                log.warning("finishing the upload in flight")
            self._uploader.drain(min(60.0, self._arguments.drain_timeout_s))
        if self._runtime is None:
            step = self.trainer.state.global_step
            told = {"error": type(error).__name__, "stage": self.stage, **self._timing.to_details(step)}
            self._record("failed", told, patience_s=_LAST_WORD_S if impatient else None)

    def close(self) -> None:
        """Stops listening and uploading; gives back what was taken."""
        if self._forked:
            return
        self._closed.close()
        self.agreement.close()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _hear(self) -> PreemptionNotice | None:
        """What was heard last on this node. Under a launch it costs one stat of a file that is usually absent."""
        if self._runtime is not None:
            try:
                mtime_ns = os.stat(self._runtime.notice_path).st_mtime_ns
            except FileNotFoundError:
                return None
            if mtime_ns != self._notice_mtime_ns:
                self._notice_mtime_ns = mtime_ns
                notice = self._runtime.read_notice()
                self._heard = None if notice is None or notice.kind is NoticeKind.CANCELLED else notice
        return self._heard

    @property
    def _forked(self) -> bool:
        """True in a child that the script forked during the training, and that leaves it by an error or an exit: the run, the
        pins and the runtime's files are its parent's, and the threads that it would wait for are not in it."""
        return os.getpid() != self._process

    def _hear_end(self) -> PreemptionNotice | None:
        """The termination that was heard on this node and still holds, or after the last step by another rank."""
        notice = self._hear()
        return notice if notice is not None and notice.kind is NoticeKind.TERMINATE else self._elsewhere

    @staticmethod
    def _is_going(answer: tuple[float, ...]) -> bool:
        return bool(answer and answer[0])

    def _record(self, kind: str, data: dict[str, Any], *, patience_s: float | None = None) -> None:
        if self.agreement.is_main:
            self._journalist.record(kind, data, patience_s=patience_s)


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


def _is_own(resume_from_checkpoint: str | bool | None, output_dir: Path) -> bool:
    """True for what ``get_last_checkpoint(output_dir)`` may have given the script: the run's own newest commit is better."""
    if isinstance(resume_from_checkpoint, str):
        return Path(resume_from_checkpoint).resolve().parent == output_dir.resolve()
    return resume_from_checkpoint is True
