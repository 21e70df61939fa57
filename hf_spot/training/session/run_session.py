"""RunSession: what a training has of a run, from the claim to the last commit, whoever's loop it is."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError
from hf_spot.notices.notice import NoticeKind, PreemptionNotice
from hf_spot.policy.preemption import Decision, Measured, decide, gives_way
from hf_spot.run.checkpoint import Checkpoint, CommitRequest
from hf_spot.run.journal import CheckpointRef, Entry
from hf_spot.run.journal_writer import JournalWriter
from hf_spot.run.machine_info import about_this_machine
from hf_spot.run.manifest import files_in
from hf_spot.run.progress import Bar
from hf_spot.run.restore import bring, take
from hf_spot.run.run import Run
from hf_spot.run.upload import Uploader
from hf_spot.run.webhook import Hook, hook_url
from hf_spot.runtime import Runtime, StepCounter
from hf_spot.storage.store import ObjectStore, Progress
from hf_spot.training.ranks.agreement import Agreement
from hf_spot.training.ranks.disks import Disk, check_writable, find_disk
from hf_spot.training.session.notice_listener import NoticeListener
from hf_spot.training.session.timing import Timing

log = logging.getLogger("hf_spot")

T = TypeVar("T")

_NEVER = 1e18  # seconds, for a notice that names no deadline
_LOOK_S = 0.02


def as_value(seconds_left: float | None) -> float:
    """A deadline, for `Agreement.ask`: the largest value is that of the soonest one."""
    return -_NEVER if seconds_left is None else -seconds_left


def from_value(value: float) -> float | None:
    """Seconds left until the deadline that `as_value` was given."""
    return None if value == -_NEVER else -value


class RunSession:
    """Claims the run, listens for notices, brings checkpoints to this machine, uploads, and keeps the journal.

    Until `join` this process is the only rank.

    Args:
        by: who claims, in words.
        url: of the run, or its store.
        arguments: settings.
        runtime: the launch that started this process, if one did.
        stage: which training of the script this is, from 1.
        now: the wall clock.
        clock: seconds, monotonic.
    """

    output_dir: Path
    listener: NoticeListener

    def __init__(
        self,
        by: str,
        url: str | os.PathLike[str] | ObjectStore,
        arguments: SpotArguments,
        runtime: Runtime | None,
        *,
        stage: int = 1,
        now: Callable[[], datetime],
        clock: Callable[[], float],
    ) -> None:
        self._by = by
        self.arguments = arguments
        self.runtime = runtime
        self.stage = stage
        self.now = now
        self.clock = clock
        self._process = os.getpid()
        self.world_size = 1
        self.agreement = Agreement(1)
        self.disk = Disk(0, 1, (0,), True)
        self.run = Run(url, allow_unfenced_store=arguments.allow_unfenced_store, workers=arguments.upload_workers)
        self.timing = Timing(now, clock)
        self.uploader: Uploader | None = None
        self.steps: StepCounter | None = None
        self.save_s: float | None = None  # that the newest save took, its writing behind the training included
        self._size_bytes: int | None = None
        self.preempted: Decision | None = None  # what a notice led to that ends the training
        self._gone_at: float | None = None  # by this process's clock
        self.closing = contextlib.ExitStack()
        self.hook = Hook(None if runtime else hook_url(arguments, os.environ), self.run.url)  # a launcher tells it itself
        self.closing.callback(self.hook.close)
        self._journal_writer = JournalWriter(self.run, self.hook)
        self.closing.callback(self._journal_writer.close)

    # -- the start ----------------------------------------------------------------------------------------------------

    def join(self, world_size: int, rank: int, local_rank: int, output_dir: Path, *, setting: str) -> None:
        """Meets the other ranks. All must call it.

        Args:
            world_size: ranks of the training; ``torch.distributed`` must be initialised when there are several.
            rank: of this process.
            local_rank: its number on its machine.
            output_dir: where checkpoints are written and restored to.
            setting: that names it, as it is written.

        Raises:
            ConfigError: ``output_dir`` can't be written to.
        """
        self.world_size = world_size
        self.output_dir = output_dir
        self.agreement = Agreement(world_size)
        self.agreement.together(partial(check_writable, output_dir, setting=setting))
        self.disk = find_disk(self.agreement, rank, local_rank, output_dir)

    def listen(self, on_notice: Callable[[PreemptionNotice], None] = lambda notice: None, *, keyboard: bool = False) -> None:
        """Listens from now on, as a `NoticeListener` does."""
        self.listener = NoticeListener(self.arguments, self.runtime, on_notice, keyboard=keyboard)
        self.closing.callback(self.listener.close)

    def tell_launcher(self) -> None:
        """From now on the launcher knows that there is something to save."""
        if self.runtime is not None:
            self.runtime.training_path.touch()
            self.closing.callback(self.runtime.training_path.unlink, missing_ok=True)
            self.steps = StepCounter(self.runtime.step_path) if self.agreement.is_main else None

    def take(self, *, unless_complete: bool = False) -> None:
        """Takes the run: rank 0 claims it, or adopts the launcher's claim, and the leaders of other disks write under that.

        A run that is taken already stays so.

        Args:
            unless_complete: not where nothing is left to train, so nothing to write.

        Raises:
            ConfigError: the machines see different stores.
            SpotError: the run can't be used.
        """
        launch = self.agreement.from_main(lambda: self._claim(unless_complete))
        self.agreement.together(lambda: self._follow(launch))

    def _claim(self, unless_complete: bool) -> int:
        if self.run.launch:
            return self.run.launch
        if self.runtime is not None:
            self.run.adopt(self.runtime.launch)
            self.timing.claimed(self.runtime.claimed_at)
        elif not (unless_complete and self._is_complete()):
            about = {**about_this_machine(self._by, os.environ), "stage": self.stage}
            log.info("launch %d of %s", self.run.claim(about), self.run.url)
            self.timing.claimed(self.run.journal.claimed_at)
            self.hook.tell(f"launch {self.run.launch} has begun on {about['hostname']}")
        return self.run.launch

    def _is_complete(self) -> bool:
        newest = self.run.state().latest(self.stage)
        return newest is not None and newest.complete

    def _follow(self, launch: int) -> None:
        if self.disk.leads and launch and self.run.launch != launch:
            if self.run.state().launch < launch:
                raise ConfigError(
                    f"{os.uname().nodename} does not see launch {launch} in {self.run.url}: the machines need one store",
                    hint="s3://bucket/prefix, or a directory on a file system that all machines share",
                )
            self.run.adopt(launch)

    def on_each_disk(self, act: Callable[[], T]) -> T:
        """The leader of each disk acts; every rank gets what rank 0's act gave."""
        result = self.agreement.together(lambda: act() if self.disk.leads else None)
        return self.agreement.from_main(lambda: cast(T, result))

    def bring(
        self, ref: CheckpointRef, label: str = "restore", look: Callable[[], None] = lambda: None
    ) -> tuple[Checkpoint, Path]:
        """One commit as a folder on each disk: what the launcher has fetched, what is there, or what is downloaded now.

        Args:
            ref: the commit.
            label: one word or two, for the bar.
            look: called again and again meanwhile; what it raises ends it.

        Raises:
            CorruptCheckpoint: its files are not what was committed.
            StoreError: the store could not be asked.
        """
        ranks = None if self.disk.count == 1 else self.disk.ranks

        def wait_for_launcher() -> None:
            look()
            time.sleep(_LOOK_S)

        def watched_bar(size_bytes: int) -> Progress:
            shown = Bar(label, size_bytes)

            def moved(count: int) -> None:
                look()
                shown(count)

            return moved

        def take_over(wanted: Collection[int] | None) -> bool:
            return self.runtime is not None and take(self.runtime, ref.entry, self.output_dir, wait_for_launcher, ranks=wanted)

        checkpoint, _ = self.on_each_disk(
            lambda: bring(
                self.run,
                ref,
                self.output_dir,
                ranks=ranks,
                world_size=self.world_size,
                progress=watched_bar,
                take=take_over,
            )
        )
        return checkpoint, self.output_dir / checkpoint.name  # machines may call their folders differently

    def start_uploader(self, on_commit: Callable[[Entry], None] = lambda entry: None) -> None:
        """On the leader of each disk: from now on `submit` has somebody to hand a checkpoint to.

        Args:
            on_commit: called after each commit, from the uploader's thread.
        """
        if not self.disk.leads:
            return
        self.uploader = Uploader(
            self.run,
            self.output_dir / ".hf_spot" / f"pins-{self.run.launch}-{self.stage}",
            save_total_limit=self.arguments.save_total_limit,
            on_commit=on_commit,
            keeps_house=self.agreement.is_main,
        )
        self.closing.callback(self.uploader.close)

    # -- notices ------------------------------------------------------------------------------------------------------

    def decide(
        self, kind: NoticeKind, seconds_left: float | None, notice: PreemptionNotice | None, say: Callable[[str], None]
    ) -> Decision:
        """Called on rank 0: what to do about a notice. The journal is told.

        Args:
            kind: of it.
            seconds_left: until the deadline; None when it names none.
            notice: the one that was heard on this node; None when it was heard elsewhere.
            say: tells people.
        """
        decision = decide(kind, seconds_left, self.measured())
        say(f"{kind.value} from {notice.source if notice else 'another rank'}: {decision.action.value} ({decision.why})")
        if self.runtime is None and notice is not None:
            self.note(notice, decision.why)
        return decision

    def note(self, notice: PreemptionNotice, why: str) -> None:
        """Writes a notice to the journal, which may be slow to answer: the training shall not wait for it."""
        self.record("notice", {**json.loads(notice.to_json()), "why": why}, patience_s=0.0)

    def stop(self, decision: Decision, seconds_left: float | None) -> None:
        """The training ends for a notice.

        Args:
            decision: that ends it.
            seconds_left: until the machine goes; None when nobody knows.
        """
        self.preempted = decision
        self._gone_at = None if seconds_left is None else self.clock() + seconds_left

    @property
    def left_s(self) -> float | None:
        """Seconds until the machine goes for which the training has stopped; None when nobody knows."""
        return None if self._gone_at is None else self._gone_at - self.clock()

    def measured(self) -> Measured:
        """How long a save and its upload take."""
        measured = self.uploader.measured() if self.uploader else Measured()
        return replace(measured, save_s=self.save_s, size_bytes=self._size_bytes)

    # -- uploads ------------------------------------------------------------------------------------------------------

    def submit(self, folder: Path, request: CommitRequest, ranks: Agreement) -> bool:
        """Has a checkpoint uploaded, once all its files are written: True on the leader of a disk whose part is on its way.

        All ranks must call it when there are several disks.

        Args:
            folder: its part on this disk.
            request: for all of it.
            ranks: to agree with, when there are several disks.
        """
        elsewhere = self._on_earlier_disks(folder, ranks)
        if self.uploader is None:
            return False
        try:
            self.uploader.submit(folder, replace(request, part=self.disk.index, parts=self.disk.count), elsewhere)
            self._size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        except OSError as error:
            log.error("%s can't be queued for upload, training goes on: %s", folder, error)
            return False
        return True

    def _on_earlier_disks(self, folder: Path, ranks: Agreement) -> set[str]:
        """Files that are uploaded from another disk: with ``save_on_each_node`` each has what rank 0 writes."""
        if self.disk.count == 1:
            return set()
        told = ranks.gather((self.disk.index, files_in(folder) if self.disk.leads else []))
        return {name for index, names in told if index < self.disk.index for name in names}

    def order_uploads(self) -> None:
        """After a notice: the newest checkpoint goes first, and what is in flight may have to give way to it."""
        if self.preempted is None:
            return
        give_way = self.agreement.from_main(lambda: gives_way(self.left_s, self.measured()))
        if self.uploader is not None:
            self.uploader.hurry(give_way=give_way)

    def finish_uploads(self, timeout_s: float) -> None:
        """Waits for what is on its way, before something ends. What does not arrive in time is told."""
        if self.uploader is None:
            return
        if not self.uploader.idle:
            log.warning("finishing the upload in flight")
        if not self.uploader.drain(timeout_s) and self.uploader.fenced is None:
            log.error(
                "the newest checkpoint is not in %s: %s", self.run.url, self.uploader.trouble or "the upload took too long"
            )

    @property
    def committed_step(self) -> int:
        """Of this stage, as far as this process knows; 0 for none."""
        newest = self.run.journal.state.latest(self.stage)
        return newest.step if newest else 0

    # -- the end ------------------------------------------------------------------------------------------------------

    def record(self, kind: str, data: dict[str, Any], *, patience_s: float | None = None) -> None:
        """On rank 0: an entry for the journal, as `JournalWriter.record` has it."""
        if self.agreement.is_main:
            self._journal_writer.record(kind, data, patience_s=patience_s)

    @property
    def forked(self) -> bool:
        """True in a child that the script forked during the training, and that leaves it by an error or an exit: the run, the
        pins and the runtime's files are its parent's, and the threads that it would wait for are not in it."""
        return os.getpid() != self._process

    def close(self, *, alone: bool = False) -> None:
        """Stops listening and uploading; gives back what was taken.

        Args:
            alone: the other ranks may not know of it.
        """
        if self.forked:
            return
        self.closing.close()
        if not alone and (self.agreement.alone or dist.is_initialized()):
            self.agreement.close()
