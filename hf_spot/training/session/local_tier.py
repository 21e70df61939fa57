"""The memory and the disk of this machine as tiers: checkpoints that are whole there, and were not committed in time.

A checkpoint is in memory (`hf_spot.run.memory_copies`) as soon as its files are copied, and on the disk once they are synced,
which may take far longer. The memory outlives the training's processes, the disk the machine's restart as well. Both are judged
by the same rules: a copy counts if it is whole, of this run, and not overtaken by the journal (`hf_spot.policy.local_copies`).
"""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path

from hf_spot.errors import SpotError
from hf_spot.free_memory import available_and_total_bytes
from hf_spot.policy.cadence import ADDED
from hf_spot.policy.local_copies import Copy, Happened, newest_on_all, why_not
from hf_spot.policy.memory_tier import why_no_room
from hf_spot.run import local_copies
from hf_spot.run.checkpoint import Checkpoint, CommitRequest
from hf_spot.run.journal import CheckpointRef
from hf_spot.run.local_copies import LocalCopy
from hf_spot.run.manifest import FileEntry, files_in
from hf_spot.run.memory_copies import MemoryCopies, MemoryCopy
from hf_spot.run.output_folder import foreign_checkpoints
from hf_spot.run.page_cache import is_cached
from hf_spot.run.run import Run
from hf_spot.storage.threads import Workers
from hf_spot.timeouts import LOCAL_RECORD_LAST_WORD_S
from hf_spot.training.ranks.agreement import Agreement
from hf_spot.training.ranks.disks import Disk

log = logging.getLogger("hf_spot")

_MOST_ENTRIES = 64  # of the journal, read back to what a copy goes on from
SAVED_BY = "saved_by_launch"  # detail of a commit that a later launch has made
TAKEN_FROM, MEMORY, DISK = "taken_from", "memory", "disk"  # detail of such a commit, and its values
_OF_ITS_LAUNCH = ("history", "timing")  # details that would be wrong in an entry of a later launch


@dataclass(frozen=True)
class Taken:
    """A checkpoint that is taken from this machine, and still to be committed.

    Args:
        checkpoint: as it will be committed; its entry is the newest one of the journal before that.
        request: for the commit of this disk's part; None on ranks that don't lead a disk.
        place: where rank 0's part was: `MEMORY` or `DISK`.
    """

    checkpoint: Checkpoint
    request: CommitRequest | None
    place: str = DISK


@dataclass(frozen=True)
class _Here:
    """A checkpoint on this machine.

    Args:
        on_disk: its record on the disk; None if it has none there.
        in_memory: its copy in memory; None if there is none.
    """

    on_disk: LocalCopy | None = None
    in_memory: MemoryCopy | None = None

    @property
    def copy(self) -> LocalCopy:
        """Return what is known of it."""
        found = self.in_memory.copy if self.in_memory is not None else self.on_disk
        assert found is not None
        return found


class LocalTier:
    """Keeps copies of checkpoints in memory, records those that are whole on the disk, and finds what can be resumed from.

    Args:
        run: the run.
        agreement: agreement of the ranks.
        disk: the disk that this rank writes to.
        output_dir: where checkpoints are written.
        now: the wall clock.
        memory: of the launch, for copies of this disk's checkpoints; None if there is none, and on ranks that lead no disk.
        limit_bytes: memory for copies of saves, as the user has set it; None if they have not.
    """

    def __init__(
        self,
        run: Run,
        agreement: Agreement,
        disk: Disk,
        output_dir: Path,
        now: Callable[[], datetime],
        memory: MemoryCopies | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        self._run = run
        self._agreement = agreement
        self._disk = disk
        self._output_dir = output_dir
        self._now = now
        self._memory = memory
        self._limit_bytes = limit_bytes
        self._keeps = memory is not None
        self._keeper = Workers(1, "hf_spot-memory-tier")  # not the same, because a disk may take long to sync
        self._recorder = Workers(1, "hf_spot-local-tier")
        self._under_way: list[Future[None]] = []
        self._newest_step = 0

    # -- saving -------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Ask in the background what copies need to know of the claimed run, because a store may not answer later."""
        if self._keeps:
            self._keeper.submit(lambda: self._run.journal.run_id)

    def saved(self, folder: Path, request: CommitRequest, committed_step: Callable[[], int], *, in_memory: bool = True) -> None:
        """Keep and record a checkpoint in the background, because all its files are written. Called on the leader of each disk.

        Args:
            folder: this disk's part of the checkpoint.
            request: as it was submitted for upload.
            committed_step: returns the newest committed step of the training that this process knows of.
            in_memory: keep a copy in memory, too. After a notice that would only delay the upload: the launcher ends as well.
        """
        self._newest_step = request.step
        if self._keeps and in_memory:
            self._under_way = [self._keeper.submit(self._keep, folder, request, committed_step)]
        else:
            self._under_way = [self._recorder.submit(self._record, folder, request, committed_step)]

    def _keep(self, folder: Path, request: CommitRequest, committed_step: Callable[[], int]) -> None:
        if request.step < self._newest_step:
            return
        known: tuple[FileEntry, ...] = ()
        try:
            known = self._keep_in_memory(folder, request)
        except Exception as error:  # also of a library that the store uses: the training continues
            if folder.is_dir():
                told = error if isinstance(error, (SpotError, OSError)) else repr(error)
                log.info("if the training is killed now, %s can't be taken from memory: %s", folder, told)
        self._under_way.append(self._recorder.submit(self._record, folder, request, committed_step, known))

    def _keep_in_memory(self, folder: Path, request: CommitRequest) -> tuple[FileEntry, ...]:
        memory = self._memory
        if memory is None or not self._keeps:
            return ()
        size_bytes = sum((folder / name).stat().st_size for name in files_in(folder))
        why = why_no_room(size_bytes, memory.held_bytes, self._limit_bytes, *available_and_total_bytes())
        if why is not None:
            self._keeps = False
            memory.clear()
            log.info("after a kill, checkpoints are taken from the disk and not from memory, because %s", why)
            return ()
        journal = self._run.journal
        return memory.keep(journal.run_id, self._run.launch, request, folder, journal.key)

    def _record(
        self, folder: Path, request: CommitRequest, committed_step: Callable[[], int], known: Collection[FileEntry] = ()
    ) -> None:
        if request.step < self._newest_step or committed_step() >= request.step:
            return
        try:
            local_copies.record(self._run, self._output_dir, folder, request, known)
        except Exception as error:  # also of a library that the store uses: the training continues
            if folder.is_dir() and committed_step() < request.step:
                told = error if isinstance(error, (SpotError, OSError)) else repr(error)
                log.info("if the training is killed now, %s can't be taken from this disk: %s", folder, told)
        if committed_step() >= request.step:
            local_copies.forget(self._output_dir, request.training, committed_step())

    def close(self) -> None:
        """Record no more; a record that is nearly there is waited for. Repeated calls do nothing."""
        self._keeper.shutdown(wait=False, cancel_futures=True)
        kept = wait(self._under_way, LOCAL_RECORD_LAST_WORD_S)  # hands over to the recorder
        self._recorder.shutdown(wait=False, cancel_futures=True)
        wait(self._under_way, LOCAL_RECORD_LAST_WORD_S)
        if self._memory is not None and not kept.not_done:  # else a thread still writes to it
            self._memory.close()

    # -- restoring ----------------------------------------------------------------------------------------------------

    def find(self, training: int, newest: CheckpointRef | None) -> Taken | None:
        """Return the newest checkpoint, beyond the newest commit, of which every disk has its part, verified; None if there is
        none. All ranks must call it.

        Args:
            training: number of the training.
            newest: its newest commit; None if there is none.
        """
        agreement = self._agreement
        here = agreement.together(lambda: self._here(training, newest))
        told = agreement.gather((self._disk.index, [one.copy.copy for one in here]) if self._disk.leads else None)
        on_disks: list[list[Copy]] = [copies for _, copies in sorted(one for one in told if one is not None)]
        for launch, step, attempt in newest_on_all(on_disks):
            key = launch, step, attempt
            mine = next((one for one in here if _key(one.copy) == key), None)
            why: str | None = agreement.from_main(lambda launch=launch: self._why_not(launch))  # type: ignore[misc]
            place = DISK
            if why is None:
                wrong, place = agreement.together(partial(self._put_in_place, mine))
                why = next((problem for found in agreement.gather(wrong[:1]) for problem in found), None)
            if why is None:
                return self._taken(None if mine is None else mine.copy, place)
            if agreement.is_main:
                log.warning("checkpoint-%d of launch %d was not committed, and is not taken: %s", step, launch, why)
        return None

    def put_back(self, newest: CheckpointRef) -> None:
        """Write a commit's folder anew from memory, if it is missing on the only disk of the training.

        It must be compared with the commit. What can't be written is left to the restore, which fetches it.
        """
        folder = self._output_dir / f"checkpoint-{newest.step}"
        if self._memory is None or self._disk.count > 1 or folder.exists():
            return
        run = self._run.journal.run_id
        for kept in self._memory.copies(self._run.journal.key):
            request = kept.copy.request
            if (kept.copy.run, request.training, request.step, request.parts) == (run, newest.training, newest.step, 1):
                try:
                    if not (wrong := self._from_memory(kept)):
                        log.info("%s is written anew from this machine's memory", folder)
                        return
                    log.warning("%s is fetched: %s", folder, wrong[0])
                except OSError as error:
                    log.warning("%s can't be written from this machine's memory: %s", folder, error)

    def _here(self, training: int, newest: CheckpointRef | None) -> list[_Here]:
        if not self._disk.leads:
            return []
        step, launch = (newest.step, newest.launch) if newest is not None else (0, 0)
        on_disk = local_copies.copies(self._run, self._output_dir, training, step)
        in_memory = self._memory.copies(self._run.journal.key) if self._memory is not None else []
        if not on_disk and not in_memory:
            return []
        run = self._run.journal.run_id if self._run.state().number else ""

        def counts(one: LocalCopy) -> bool:
            request = one.request
            return one.run == run and one.launch >= launch and request.training == training and request.step > step

        found = {_key(one): _Here(one) for one in on_disk if counts(one)}
        for one in reversed(in_memory):  # the newest one of a step counts
            if counts(one.copy):
                found[_key(one.copy)] = replace(found.get(_key(one.copy), _Here()), in_memory=one)
        return list(found.values())

    def _put_in_place(self, found: _Here | None) -> tuple[list[str], str]:
        """Put a checkpoint's folder in its place, verified. Return what is wrong with it, and from where it was taken.

        Args:
            found: the checkpoint; None on ranks that don't lead a disk, where nothing is to be done.
        """
        wrong: list[str] = []
        if found is None:
            return wrong, DISK
        if found.in_memory is not None:
            try:
                wrong = self._from_memory(found.in_memory)
            except OSError as error:
                wrong = [f"its copy in memory can't be written: {error}"]
            if not wrong:
                return [], MEMORY
            if found.on_disk is not None:
                log.warning("checkpoint-%d is looked for on the disk: %s", found.copy.request.step, wrong[0])
        if found.on_disk is not None:
            wrong = local_copies.problems(found.on_disk, self._output_dir / f"checkpoint-{found.copy.request.step}")
        return wrong, DISK

    def _from_memory(self, kept: MemoryCopy) -> list[str]:
        """Write a copy out to the disk, unless its folder is there, is the same, and can be read without the disk.

        Returns:
            What is wrong with it; then the folder is as it was.
        """
        assert self._memory is not None
        folder = self._output_dir / f"checkpoint-{kept.copy.request.step}"
        paths = [folder / file.path for file in kept.copy.files]
        if all(path.is_file() and is_cached(path) for path in paths) and not local_copies.problems(kept.copy, folder):
            return []
        if folder.name in foreign_checkpoints(self._output_dir):
            return [f"another's {folder.name} is in its place"]
        private = self._output_dir / ".hf_spot" / f"memory-{kept.copy.request.step}"
        shutil.rmtree(private, ignore_errors=True)
        try:
            self._memory.write_out(kept, private / folder.name)
            if wrong := local_copies.problems(kept.copy, private / folder.name):
                return [f"in its copy in memory, {wrong[0]}"]
            if folder.exists():
                shutil.rmtree(folder)
            (private / folder.name).rename(folder)
            return []
        finally:
            shutil.rmtree(private, ignore_errors=True)

    def _why_not(self, launch: int) -> str | None:
        """Return why a launch's copies may not be taken, by the journal; None if they may."""
        journal = self._run.journal
        state, happened = journal.state, []
        for number in range(state.number, max(0, state.number - _MOST_ENTRIES), -1):
            entry = journal.read(number)
            is_claim = entry.kind == "claim"
            happened.append(Happened(entry.kind, entry.launch, str(entry.data.get("hostname")) if is_claim else None))
            if entry.launch <= launch and (is_claim or entry.kind == "commit"):
                return why_not(launch, self._run.launch or state.launch + 1, platform.node(), happened)
        return f"more than {_MOST_ENTRIES} entries of the journal came after it"

    def _taken(self, mine: LocalCopy | None, place: str) -> Taken:
        def to_request(copy: LocalCopy) -> CommitRequest:
            kept = {name: value for name, value in (copy.request.details or {}).items() if name not in _OF_ITS_LAUNCH}
            told = {SAVED_BY: copy.launch, **({TAKEN_FROM: place} if place != DISK else {})}
            return replace(copy.request, details={**kept, **told})

        def to_checkpoint() -> Checkpoint:
            assert mine is not None  # rank 0 leads its disk
            request = to_request(mine)
            ref = CheckpointRef(
                entry=self._run.journal.state.number,
                launch=mine.launch,
                training=request.training,
                step=request.step,
                size_bytes=sum(file.size for file in mine.files),
                prefix=request.prefix(mine.launch),
                best=request.best_step == request.step,
                complete=request.complete,
                added=request.reason == ADDED,
            )
            return Checkpoint(ref, self._now(), request.reason, mine.files, request.to_data(mine.launch))

        checkpoint, place = self._agreement.from_main(lambda: (to_checkpoint(), place))
        return Taken(checkpoint, None if mine is None else to_request(mine), place)


def _key(copy: LocalCopy) -> tuple[int, int, str]:
    return copy.launch, copy.request.step, copy.request.attempt
