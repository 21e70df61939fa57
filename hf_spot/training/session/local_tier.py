"""The disk of this machine as a tier: checkpoints that are whole there, and were not committed before their launch died."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from hf_spot.errors import SpotError
from hf_spot.policy.cadence import ADDED
from hf_spot.policy.local_copies import Copy, Happened, newest_on_all, why_not
from hf_spot.run import local_copies
from hf_spot.run.checkpoint import Checkpoint, CommitRequest
from hf_spot.run.journal import CheckpointRef
from hf_spot.run.local_copies import LocalCopy
from hf_spot.run.run import Run
from hf_spot.storage.threads import Workers
from hf_spot.timeouts import LOCAL_RECORD_LAST_WORD_S
from hf_spot.training.ranks.agreement import Agreement
from hf_spot.training.ranks.disks import Disk

log = logging.getLogger("hf_spot")

_MOST_ENTRIES = 64  # of the journal, read back to what a copy goes on from
SAVED_BY = "saved_by_launch"  # detail of a commit that a later launch has made
_OF_ITS_LAUNCH = ("history", "timing")  # details that would be wrong in an entry of a later launch


@dataclass(frozen=True)
class Taken:
    """A checkpoint that is taken from this disk, and still to be committed.

    Args:
        checkpoint: as it will be committed; its entry is the newest one of the journal before that.
        request: for the commit of this disk's part; None on ranks that don't lead a disk.
    """

    checkpoint: Checkpoint
    request: CommitRequest | None


class LocalTier:
    """Records checkpoints when all their files are written, and finds those that can be resumed from.

    Args:
        run: the run.
        agreement: agreement of the ranks.
        disk: the disk that this rank writes to.
        output_dir: where checkpoints are written.
        now: the wall clock.
    """

    def __init__(self, run: Run, agreement: Agreement, disk: Disk, output_dir: Path, now: Callable[[], datetime]) -> None:
        self._run = run
        self._agreement = agreement
        self._disk = disk
        self._output_dir = output_dir
        self._now = now
        self._worker = Workers(1, "hf_spot-local-tier")
        self._under_way: Future[None] | None = None
        self._newest_step = 0

    # -- saving -------------------------------------------------------------------------------------------------------

    def saved(self, folder: Path, request: CommitRequest, committed_step: Callable[[], int]) -> None:
        """Record, in the background, that all files of a checkpoint are written. Called on the leader of each disk.

        Args:
            folder: this disk's part of the checkpoint.
            request: as it was submitted for upload.
            committed_step: returns the newest committed step of the training that this process knows of.
        """
        self._newest_step = request.step
        self._under_way = self._worker.submit(self._record, folder, request, committed_step)

    def _record(self, folder: Path, request: CommitRequest, committed_step: Callable[[], int]) -> None:
        if request.step < self._newest_step or committed_step() >= request.step:
            return
        try:
            local_copies.record(self._run, self._output_dir, folder, request)
        except Exception as error:  # also of a library that the store uses: the training continues
            if folder.is_dir() and committed_step() < request.step:
                told = error if isinstance(error, (SpotError, OSError)) else repr(error)
                log.info("if the training is killed now, %s can't be taken from this disk: %s", folder, told)
        if committed_step() >= request.step:
            local_copies.forget(self._output_dir, request.training, committed_step())

    def close(self) -> None:
        """Record no more; a record that is nearly there is waited for. Repeated calls do nothing."""
        self._worker.shutdown(wait=False, cancel_futures=True)
        if self._under_way is not None:
            wait([self._under_way], LOCAL_RECORD_LAST_WORD_S)

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
        told = agreement.gather((self._disk.index, [one.copy for one in here]) if self._disk.leads else None)
        on_disks: list[list[Copy]] = [copies for _, copies in sorted(one for one in told if one is not None)]
        for launch, step, attempt in newest_on_all(on_disks):
            key = launch, step, attempt
            mine = next((one for one in here if (one.launch, one.request.step, one.request.attempt) == key), None)
            why: str | None = agreement.from_main(lambda launch=launch: self._why_not(launch))  # type: ignore[misc]
            if why is None:
                folder = self._output_dir / f"checkpoint-{step}"
                wrong = agreement.gather(local_copies.problems(mine, folder)[:1] if mine is not None else [])
                why = next((problem for found in wrong for problem in found), None)
            if why is None:
                return self._taken(mine)
            if agreement.is_main:
                log.warning("checkpoint-%d of launch %d was not committed, and is not taken: %s", step, launch, why)
        return None

    def _here(self, training: int, newest: CheckpointRef | None) -> list[LocalCopy]:
        if not self._disk.leads:
            return []
        step, launch = (newest.step, newest.launch) if newest is not None else (0, 0)
        found = local_copies.copies(self._run, self._output_dir, training, step)
        if not found:
            return []
        run = self._run.journal.read(1).id if self._run.state().number else ""
        return [one for one in found if one.run == run and one.launch >= launch]

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

    def _taken(self, mine: LocalCopy | None) -> Taken:
        def to_request(copy: LocalCopy) -> CommitRequest:
            kept = {name: value for name, value in (copy.request.details or {}).items() if name not in _OF_ITS_LAUNCH}
            return replace(copy.request, details={**kept, SAVED_BY: copy.launch})

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

        return Taken(self._agreement.from_main(to_checkpoint), None if mine is None else to_request(mine))
