"""RunSession: a training's connection to its run, from the claim to the last commit, for Trainer and for custom loops."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast, overload

import torch.distributed as dist

from hf_spot.arguments import SpotArguments
from hf_spot.errors import EXIT_FENCED, EXIT_PREEMPTED, ConfigError, Fenced, SpotError
from hf_spot.log import log_always
from hf_spot.notices.notice import NoticeKind, PreemptionNotice
from hf_spot.policy.hangs import Phase
from hf_spot.policy.preemption import Decision, Measured, decide, gives_way
from hf_spot.run import history, last_words, local_copies
from hf_spot.run.checkpoint import Checkpoint, CommitRequest
from hf_spot.run.journal import TRAINING_KEY, CheckpointRef, Entry
from hf_spot.run.journal_writer import JournalWriter
from hf_spot.run.last_words import LastWords
from hf_spot.run.machine_info import about_this_machine
from hf_spot.run.manifest import files_in
from hf_spot.run.memory_copies import MemoryCopies
from hf_spot.run.output_folder import discard_own_saves
from hf_spot.run.progress import Bar
from hf_spot.run.restore import restore_checkpoint, restore_newest
from hf_spot.run.run import Run
from hf_spot.run.selection import Readers
from hf_spot.run.start_from import start_or_resume
from hf_spot.run.upload import Uploader, standing_prefixes
from hf_spot.run.webhook import Hook, hook_url
from hf_spot.runtime import Runtime, StepCounter
from hf_spot.storage.store import ObjectStore, Progress
from hf_spot.training.ranks.agreement import Agreement
from hf_spot.training.ranks.ballot import Ballot
from hf_spot.training.ranks.disks import Disk, check_writable, find_disk
from hf_spot.training.saving.shard_loads import ShardLoader, can_load_parts
from hf_spot.training.session.local_tier import MEMORY, LocalTier, Taken
from hf_spot.training.session.notice_listener import NoticeListener
from hf_spot.training.session.phases import Phases
from hf_spot.training.session.timing import Timing
from hf_spot.training.upstream.versions import versions

log = logging.getLogger("hf_spot")

T = TypeVar("T")


class RunSession:
    """Claims the run, listens for notices, restores checkpoints, uploads them, and writes the journal.

    Until `join_ranks` this process is the only rank.

    Args:
        by: what makes the claim, for people.
        url: URL of the run, or its store.
        arguments: settings.
        runtime: the launch that started this process, if one did.
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
        now: Callable[[], datetime],
        clock: Callable[[], float],
    ) -> None:
        self._by = by
        self.arguments = arguments
        self.runtime = runtime
        self._training = 1
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
        self.phases = Phases()
        self._rank = 0
        self._save_s: float | None = None
        self._size_bytes: int | None = None
        self._preempted: Decision | None = None
        self._machine_ends_at: float | None = None  # by this process's clock
        self._local: LocalTier | None = None
        self._uncommitted: Taken | None = None
        self.resumes_from_memory = False
        self._attempt = ""
        self.closing = contextlib.ExitStack()
        self.hook = Hook(None if runtime else hook_url(arguments, os.environ), self.run.url)  # a launcher calls it itself
        self.closing.callback(self.hook.close)
        self._shards = ShardLoader(self.run)
        self.closing.callback(self._shards.close)
        self._journal_writer = JournalWriter(self.run, self.hook)
        self.closing.callback(self._journal_writer.close)

    # -- the start ----------------------------------------------------------------------------------------------------

    def join_ranks(self, world_size: int, rank: int, local_rank: int, output_dir: Path, *, setting: str) -> None:
        """Set up communication with the other ranks. All ranks must call it.

        Args:
            world_size: number of ranks; ``torch.distributed`` must be initialised if there are several.
            rank: number of this process.
            local_rank: number of this process on its machine.
            output_dir: where checkpoints are written and restored to.
            setting: the setting that names ``output_dir``, for errors.

        Raises:
            ConfigError: ``output_dir`` can't be written to.
        """
        self.world_size = world_size
        self._rank = rank
        self.output_dir = output_dir
        self.agreement = Agreement(world_size)
        self.agreement.together(partial(check_writable, output_dir, setting=setting))
        self.disk = find_disk(self.agreement, rank, local_rank, output_dir)
        memory_gb = self.arguments.save_memory_gb
        limit_bytes = None if memory_gb is None else int(memory_gb * 1e9)
        memory = self._open_memory()
        self._local = LocalTier(self.run, self.agreement, self.disk, output_dir, self.now, memory, limit_bytes)
        self.closing.callback(self._local.close)

    def _open_memory(self) -> MemoryCopies | None:
        """Return the launcher's memory for copies of checkpoints on the leader of each disk. All ranks must call it."""
        runtime = self.runtime
        launchers = self.agreement.gather((os.uname().nodename, runtime.launcher) if runtime is not None else None)
        # The files of a disk that several machines share belong to no machine alone.
        if runtime is None or not runtime.memory or not self.disk.leads or len(set(launchers)) > self.disk.count:
            return None
        try:
            return MemoryCopies(runtime.memory_paths)
        except OSError as error:
            log.info("after a kill, checkpoints are taken from the disk and not from memory: %s", error)
            return None

    def listen(self, on_notice: Callable[[PreemptionNotice], None] = lambda notice: None, *, keyboard: bool = False) -> None:
        """Start a `NoticeListener`."""
        self.listener = NoticeListener(self.arguments, self.runtime, on_notice, keyboard=keyboard)
        self.closing.callback(self.listener.close)

    def tell_launcher(self, phase: Phase) -> None:
        """Tell the launcher that from now on there is something to save.

        Args:
            phase: that the training begins with.
        """
        if self.runtime is not None:
            self.runtime.tell_training(True)
            self.closing.callback(self._tell_end)
            self._count_steps()
            self.phases = Phases(self.runtime, self._rank, self._training)
            self.closing.callback(self.phases.close)
            self.phases.tell(phase)

    def _count_steps(self) -> None:
        if self.runtime is not None and self.agreement.is_main:
            self.steps = StepCounter(self.runtime.step_path_of(self.training))

    def _tell_end(self) -> None:
        assert self.runtime is not None
        if self.fenced is not None:
            self.runtime.tell_stopped(EXIT_FENCED)
        elif self.preempted is not None:
            self.runtime.tell_stopped(EXIT_PREEMPTED)
        else:
            self.runtime.tell_training(False)

    @property
    def training(self) -> int:
        """Return the number of the training in the run, from 1."""
        return self._training

    def enter(self, training: int) -> None:
        """Work on a training of the run. Every rank must call it, before it claims or restores."""
        self._training = training
        if self.steps is not None:
            self._count_steps()
        self.phases.enter(training)

    def tracker_id(self) -> str:
        """Return the id of this training's runs in trackers. The run must be claimed."""
        return self.run.tracker_id(self.training)

    def claim(self) -> None:
        """Claim the run on rank 0, or adopt the launcher's claim; the leaders of other disks adopt it too.

        Does nothing if the run is already claimed.

        Raises:
            ConfigError: the machines use different stores.
            SpotError: the run can't be used.
        """
        launch = self.agreement.from_main(self._claim_on_main)
        self.agreement.together(lambda: self._follow(launch))

    def _claim_on_main(self) -> int:
        if self.run.launch:
            return self.run.launch
        if self.runtime is not None:
            self.run.adopt(self.runtime.launch)
            self.timing.claimed(self.runtime.claimed_at)
        else:
            about = {**about_this_machine(self._by, os.environ), TRAINING_KEY: self.training}
            log.info("launch %d of %s", start_or_resume(self.run, about, self.arguments.start_from), self.run.url)
            self.timing.claimed(self.run.journal.claimed_at)
            self.hook.tell(f"launch {self.run.launch} has begun on {about['hostname']}")
        return self.run.launch

    def _follow(self, launch: int) -> None:
        if self.disk.leads and launch and self.run.launch != launch:
            if self.run.state().launch < launch:
                raise ConfigError(
                    f"{os.uname().nodename} does not see launch {launch} in {self.run.url}: all machines must use one store",
                    hint="s3://bucket/prefix, or a directory on a file system that all machines share",
                )
            self.run.adopt(launch)

    def on_each_disk(self, act: Callable[[], T]) -> T:
        """Call ``act`` on the leader of each disk; return on every rank what rank 0's call returned."""
        result = self.agreement.together(lambda: act() if self.disk.leads else None)
        return self.agreement.from_main(lambda: cast(T, result))

    def restore_newest(self, look: Callable[[], None] = lambda: None) -> tuple[Checkpoint, Path] | None:
        """Restore the newest intact commit of this training to each disk; return None if there are no commits.

        A newer checkpoint that is whole in this machine's memory or on this disk, and was not committed before its launch died,
        is taken instead, and committed once the uploader runs.

        Args:
            look: called repeatedly during the restore; an exception from it ends the restore.

        Raises:
            CorruptCheckpoint: there are commits, but none is intact.
            StoreError: the store could not be read.
        """
        refs = self.agreement.from_main(lambda: [ref for ref in self.run.state().checkpoints if ref.training == self.training])
        with self.phases.within(Phase.RESTORING):
            taken = None if self._local is None else self._local.find(self.training, refs[-1] if refs else None)
            self.resumes_from_memory = taken is not None and taken.place == MEMORY
            if taken is not None and self.disk.count == 1 and not taken.checkpoint.ref.complete:
                where = "in this machine's memory" if taken.place == MEMORY else "on this disk"
                log.info("step %d was not committed: it is whole %s, and committed next", taken.checkpoint.step, where)
                self._uncommitted = taken
                return self._on_this_machine((taken.checkpoint, self.output_dir / taken.checkpoint.name))
            if taken is not None and self._commit_now(taken, look):
                refs = self.agreement.from_main(
                    lambda: [ref for ref in self.run.state().checkpoints if ref.training == self.training]
                )
        if not refs:
            return None
        runtime = self.runtime if self.disk.leads else None
        with self.phases.within(Phase.RESTORING):
            if (local := self._local) is not None:
                self.agreement.together(lambda: local.put_back(refs[-1]))
            prefetched = self.agreement.together(lambda: runtime.wait_for_prefetched(look) if runtime is not None else None)
            return self._on_this_machine(
                restore_newest(
                    self.run,
                    refs,
                    self.output_dir,
                    everywhere=self.on_each_disk,
                    prefetched=prefetched,
                    readers=self._readers_here,
                    progress=partial(_watched_bar, "restore", look, self.phases.sign),
                )
            )

    def _commit_now(self, taken: Taken, look: Callable[[], None]) -> bool:
        """Upload and commit the parts of a checkpoint on all disks; return whether that was possible. All ranks must call it.

        If there are several, each machine needs files of the others to resume; a training that is complete uploads nothing.

        Args:
            taken: the checkpoint.
            look: called repeatedly; an exception from it ends the upload.
        """
        name, uploaded = taken.checkpoint.name, False
        self.claim()
        end = self.start_uploader(keeps_house=False)
        elsewhere = self.files_of_earlier_disks(self.output_dir / name, self.agreement)

        def is_over() -> bool:
            look()
            self.phases.sign()
            return False

        def upload() -> bool:
            if self.uploader is None or taken.request is None:
                return True
            part = replace(taken.request, part=self.disk.index, parts=self.disk.count)
            self.uploader.submit(self.output_dir / name, part, elsewhere)
            return self.uploader.drain(self.arguments.drain_timeout_s, is_over)

        try:
            uploaded = all(self.agreement.gather(self.agreement.together(upload)))
        finally:
            end()
        if self.agreement.is_main:
            how = "committed now" if uploaded else "not committed in time: an older commit is resumed"
            log.log(logging.INFO if uploaded else logging.ERROR, "%s was not committed: it is whole here, and %s", name, how)
        return uploaded

    def restore(self, ref: CheckpointRef, label: str, look: Callable[[], None] = lambda: None) -> tuple[Checkpoint, Path]:
        """Restore one commit to each disk.

        Args:
            ref: the commit.
            label: one or two words for the progress bar.
            look: called repeatedly during the restore; an exception from it ends the restore.

        Raises:
            CorruptCheckpoint: its files differ from what was committed.
            StoreError: the store could not be read.
        """

        def on_this_disk() -> tuple[Checkpoint, Path]:
            return restore_checkpoint(
                self.run,
                ref,
                self.output_dir,
                readers=self._readers_here,
                progress=partial(_watched_bar, label, look, self.phases.sign),
            )

        with self.phases.within(Phase.RESTORING):
            return self._on_this_machine(self.on_each_disk(on_this_disk))

    @property
    def _readers_here(self) -> Readers | None:
        return None if self.disk.count == 1 or not can_load_parts() else Readers(self.disk.ranks, self.world_size)

    @overload
    def _on_this_machine(self, restored: tuple[Checkpoint, Path]) -> tuple[Checkpoint, Path]: ...

    @overload
    def _on_this_machine(self, restored: tuple[Checkpoint, Path] | None) -> tuple[Checkpoint, Path] | None: ...

    def _on_this_machine(self, restored: tuple[Checkpoint, Path] | None) -> tuple[Checkpoint, Path] | None:
        """Return what rank 0 restored, with the folder on this machine: ``output_dir`` may differ between machines."""
        if restored is None:
            return None
        checkpoint, folder = restored[0], self.output_dir / restored[0].name
        if self.disk.count > 1:
            self._shards.know(folder, checkpoint)
        return checkpoint, folder

    def start_uploader(
        self, on_commit: Callable[[Entry], None] = lambda entry: None, *, keeps_house: bool = True
    ) -> Callable[[], None]:
        """Start the uploader that `submit` hands checkpoints to, on the leader of each disk. All ranks must call it.

        Args:
            on_commit: called after each commit, from the uploader's thread.
            keeps_house: delete what earlier launches left in the store.

        Returns:
            What ends it before the session does.
        """

        def committed(entry: Entry) -> None:
            local_copies.forget(self.output_dir, entry.data[TRAINING_KEY], entry.data["step"])
            discard_own_saves(self.output_dir, entry.data["step"])
            on_commit(entry)

        # All disks must choose the same place for a checkpoint, whenever their machines have read the journal.
        standing, attempt = self.agreement.from_main(lambda: (standing_prefixes(self.run), secrets.token_hex(4)))
        if not self.disk.leads:
            return lambda: None
        self.uploader = Uploader(
            self.run,
            self.output_dir / ".hf_spot" / f"pins-{self.run.launch}-{self.training}",
            save_total_limit=self.arguments.keep_checkpoints,
            keep_every=self.arguments.keep_every,
            keep_weights=self.arguments.keep_weights,
            on_commit=committed,
            keeps_house=self.agreement.is_main and keeps_house,
            standing=standing,
            attempt=attempt if self.disk.count > 1 else "",
        )
        self._attempt = attempt
        if self._local is not None:
            self._local.prepare()
        self.closing.callback(self.uploader.close)
        if self._uncommitted is not None and self._uncommitted.request is not None:
            self.uploader.submit(self.output_dir / self._uncommitted.checkpoint.name, self._uncommitted.request)
            self._uncommitted = None
        return self._end_uploader

    def _end_uploader(self) -> None:
        if self.uploader is not None:
            self.uploader.close()
            self.uploader = None

    # -- notices ------------------------------------------------------------------------------------------------------

    def decide(
        self, kind: NoticeKind, seconds_left: float | None, notice: PreemptionNotice | None, say: Callable[[str], None]
    ) -> Decision:
        """Decide what to do about a notice, and record it in the journal. Called on rank 0.

        Args:
            kind: kind of the notice.
            seconds_left: seconds until its deadline; None if it has none.
            notice: the notice, if it was received on this machine; None if on another one.
            say: called with a line for people.
        """
        decision = decide(kind, seconds_left, self.measured())
        told = notice.in_words() if notice is not None and notice.kind is kind else f"{kind.value} from another rank"
        say(f"{told}: {decision.action.value} ({decision.why})")
        if self.runtime is None and notice is not None:
            self.note(notice, decision.why)
        return decision

    def note(self, notice: PreemptionNotice, why: str) -> None:
        """Record a notice in the journal in the background: the training must not wait for a slow store."""
        self.record("notice", {**json.loads(notice.to_json()), "why": why}, patience_s=0.0)

    def ballot(
        self, notice: PreemptionNotice | None, *, advisory: bool = False, save_is_due: bool = False, is_draining: bool = False
    ) -> Ballot:
        """Return this rank's ballot.

        Args:
            notice: the notice in force on this machine.
            advisory: as in `Ballot`.
            save_is_due: as in `Ballot`.
            is_draining: as in `Ballot`.
        """
        return Ballot(
            terminate=notice is not None and notice.kind is NoticeKind.TERMINATE,
            advisory=advisory,
            fenced=self.fenced is not None,
            save_is_due=save_is_due,
            is_draining=is_draining,
            seconds_left=notice.seconds_left(self.now()) if notice else None,
        )

    @property
    def preempted(self) -> Decision | None:
        """Return the decision that ends the training, once a notice has led to one."""
        return self._preempted

    def stop(self, decision: Decision, seconds_left: float | None) -> None:
        """Record the decision to end the training because of a notice.

        Args:
            decision: the decision.
            seconds_left: seconds until the machine is taken away; None if unknown.
        """
        self._preempted = decision
        self._machine_ends_at = None if seconds_left is None else self.clock() + seconds_left

    @property
    def left_s(self) -> float | None:
        """Return the seconds until the machine is taken away, after `stop`; None if unknown."""
        return None if self._machine_ends_at is None else self._machine_ends_at - self.clock()

    def measured(self) -> Measured:
        """Return how long a save and its upload take."""
        measured = self.uploader.measured() if self.uploader else Measured()
        return replace(measured, save_s=self._save_s, size_bytes=self._size_bytes)

    def note_save(self, save_s: float) -> None:
        """Record how long the newest save took in seconds, including files written while training continued."""
        self._save_s = save_s

    @property
    def size_bytes(self) -> int | None:
        """Return the size of the newest checkpoint on this disk; None before the first."""
        return self._size_bytes

    @property
    def save_s(self) -> float | None:
        """Return the seconds that the newest save took; None before the first."""
        return self._save_s

    # -- uploads ------------------------------------------------------------------------------------------------------

    def submit(self, folder: Path, request: CommitRequest, ranks: Agreement, *, stays: bool = True) -> bool:
        """Hand a checkpoint to the uploader, once all its files are written.

        Returns True on the leader of a disk if its part was queued.

        All ranks must call it if there are several disks.

        Args:
            folder: the part of the checkpoint on this disk.
            request: describes the whole checkpoint.
            ranks: the agreement to use if there are several disks.
            stays: the folder stays on this disk, and may be taken from it by the next launch.
        """
        elsewhere = self.files_of_earlier_disks(folder, ranks)
        if self.uploader is None:
            return False
        try:
            details = {**(request.details or {}), "versions": versions()}
            part = replace(request, details=details, part=self.disk.index, parts=self.disk.count)
            self.uploader.submit(folder, part, elsewhere)
            if self._local is not None and stays:
                recorded, goes_on = replace(part, attempt=self._attempt), self._preempted is None
                self._local.saved(folder, recorded, lambda: self.committed_step, in_memory=goes_on)
            self._size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        except OSError as error:
            log_always(logging.ERROR, "%s can't be queued for upload; training goes on: %s", folder, error)
            return False
        return True

    def files_of_earlier_disks(self, folder: Path, ranks: Agreement) -> set[str]:
        """Return the files that another disk uploads: with ``save_on_each_node`` each disk also has what rank 0 writes.

        All ranks must call it if there are several disks.
        """
        if self.disk.count == 1:
            return set()
        told = ranks.gather((self.disk.index, files_in(folder) if self.disk.leads else []))
        return {name for index, names in told if index < self.disk.index for name in names}

    @property
    def fenced(self) -> Fenced | None:
        """Return the error to raise, once the uploader has found that a newer launch owns the run."""
        return self.uploader.fenced if self.uploader is not None else None

    def order_uploads(self) -> None:
        """Upload the newest checkpoint first after a notice; an upload in flight may have to be dropped for it."""
        if self._preempted is None:
            return
        give_way = self.agreement.from_main(lambda: gives_way(self.left_s, self.measured()))
        if self.uploader is not None:
            self.uploader.hurry(give_way=give_way)

    def finish_uploads(self, timeout_s: float) -> None:
        """Wait for pending uploads before the training ends; report what is not committed in time.

        Args:
            timeout_s: longest wait in seconds.
        """
        if self.uploader is None:
            return
        if not self.uploader.idle:
            log.warning("finishing the upload in flight")
        if not self.uploader.drain(timeout_s) and self.fenced is None:
            why = self.uploader.trouble or "the upload took too long"
            log_always(logging.ERROR, "the newest checkpoint is not in %s: %s", self.run.url, why)

    @property
    def committed_step(self) -> int:
        """Return the newest committed step of this training that this process knows of; 0 for none."""
        newest = self.run.journal.state.latest(self.training)
        return newest.step if newest else 0

    # -- the end ------------------------------------------------------------------------------------------------------

    def record(self, kind: str, data: dict[str, Any], *, patience_s: float | None = None) -> None:
        """Append an entry to the journal on rank 0; the arguments are those of `JournalWriter.record`."""
        if self.agreement.is_main:
            self._journal_writer.record(kind, data, patience_s=patience_s)

    def record_lost(self, lost: LastWords) -> None:
        """Record on rank 0, in the background, how far the previous launch had come, if the journal has no end of it."""

        def record() -> None:
            try:
                if history.read_past(self.run.journal).steps_lost is None:
                    self.run.record(last_words.KIND, lost.to_data())
            except SpotError as error:
                log.info("the steps that launch %d has lost could not be recorded: %s", lost.launch, error)

        if self.agreement.is_main:
            self._journal_writer.ask(record, patience_s=0.0)

    @property
    def forked(self) -> bool:
        """Return True in a child process that the script forked during the training.

        Such a child must not end the run when it fails or exits: the run, the pins and the runtime's files belong to its
        parent, and the threads that it would wait for exist only there.
        """
        return os.getpid() != self._process

    def close(self, *, alone: bool = False) -> None:
        """Stop receiving notices and uploading, and release all resources.

        Args:
            alone: the other ranks may not be closing.
        """
        if self.forked:
            return
        self.closing.close()
        if not alone and (self.agreement.alone or dist.is_initialized()):
            self.agreement.close()


def _watched_bar(label: str, look: Callable[[], None], sign: Callable[[], None], size_bytes: int) -> Progress:
    shown = Bar(label, size_bytes)

    def moved(count: int) -> None:
        look()
        sign()
        shown(count)

    return moved
