"""Commits: the way of a training's checkpoints from Trainer's thread to the uploader, and what saves and commits cost."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_spot.errors import SpotError
from hf_spot.log import log_always
from hf_spot.policy.cadence import lacks_room
from hf_spot.policy.requests import writes_of_commit
from hf_spot.run import history, last_words
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.journal import Entry
from hf_spot.run.last_words import LastWords, is_repository
from hf_spot.storage.threads import Workers
from hf_spot.training.ranks.agreement import Agreement
from hf_spot.training.saving.async_writer import AsyncCheckpointWriter
from hf_spot.training.session.run_session import RunSession
from hf_spot.training.trainer.metrics import Metrics
from hf_spot.training.trainer.save_schedule import Cadence, FirstSave
from hf_spot.training.trainer.saves import writes_on_each_rank

if TYPE_CHECKING:
    from transformers import Trainer

log = logging.getLogger("hf_spot")


@dataclass
class _Stall:
    """Seconds for which training stood still for a save; None if unknown. They may grow until the next step."""

    seconds: float | None


class Commits:
    """Submits checkpoints once all their files are written, and measures saves and commits for the next decisions.

    Args:
        trainer: the Trainer.
        session: what its launch has of the run; closes what this opens.
        now: the wall clock.
        clock: seconds, monotonic.
    """

    def __init__(
        self, trainer: Trainer, session: RunSession, *, now: Callable[[], datetime], clock: Callable[[], float]
    ) -> None:
        self._session = session
        self._save_began: float | None = None
        self._stall: _Stall | None = None
        self._past: history.Past | None = None
        self._expected_bytes = 0
        self._is_room_told = False
        memory_gb = session.arguments.save_memory_gb
        writers = Agreement(trainer.args.world_size)  # of its own: the ranks agree on something else meanwhile
        session.closing.callback(writers.close)
        share = _share_of_memory(trainer, session.agreement)
        self.behind = AsyncCheckpointWriter(None if memory_gb is None else int(memory_gb * 1e9), writers, share)
        session.closing.callback(self.behind.close)
        self._cadence = Cadence(trainer, session.arguments, self._is_busy, now, clock)
        self._lock = threading.Lock()
        self._submitted: set[int] = set()  # steps
        self._last_steps: set[int] = set()  # of which their commits shall say so
        self._first_save = FirstSave(trainer, session.arguments, clock)
        self._metrics = Metrics(trainer, {"next_save_in_s": self._cadence.due_in_s})
        session.closing.callback(self._metrics.close)

    @property
    def past(self) -> history.Past | None:
        """Return the history of the run; None until rank 0 has read it."""
        return self._past

    def begin(self, *, resumed_step: int, lost: LastWords | None = None) -> None:
        """Start the uploader, and read the history of the run on rank 0, in a thread: the training does not wait for it.

        Args:
            resumed_step: the step from which this launch resumes; 0 for the start.
            lost: how far the previous launch had come, if further. It is recorded if the journal has no end of that launch.
        """
        beyond = max(0, resumed_step - self._session.committed_step)  # it may not be committed yet
        self._session.start_uploader(self._committed)
        if not self._session.agreement.is_main:
            return

        def read() -> None:
            try:
                self._past = history.read_past(self._session.run.journal)
            except SpotError as error:
                log.info("the history of %s could not be read: %s", self._session.run.url, error)
                return
            except Exception:
                log.exception("the history of %s could not be read", self._session.run.url)
                return
            steps_lost = self._past.steps_lost
            if steps_lost is not None:
                steps_lost = max(0, steps_lost - beyond)
            elif lost is not None:
                steps_lost = lost.step - resumed_step
                self._session.record(last_words.KIND, lost.to_data(), patience_s=0.0)
            self._cadence.remember(self._past)
            if resumed_step:
                self._metrics.put("steps_lost", steps_lost)

        historian = Workers(1, "hf_spot-historian")
        historian.submit(read)
        historian.shutdown(wait=False)

    def step_begins(self, *, first: bool) -> None:
        """Record on rank 0 that a step begins.

        Args:
            first: it is the first one of this launch.
        """
        if self._session.agreement.is_main:
            if first:
                self._cadence.began()
            self._first_save.look()

    def save_is_due(self) -> bool:
        """Return whether it is time for a save that Trainer's own schedule does not have."""
        return self._cadence.is_due()

    def expect(self, size_bytes: int) -> None:
        """Record about how large a checkpoint is, before the first save."""
        self._expected_bytes = size_bytes
        self._cadence.expect(size_bytes, in_repository=is_repository(self._session.run.url))

    def add_none(self, why: str) -> None:
        """Add no saves to Trainer's own.

        Args:
            why: for people.
        """
        self._cadence.add_none()
        self._first_save.is_fixed()
        if self._session.agreement.is_main and self._session.arguments.cadence == "auto":
            log.info("--cadence auto adds no saves to this training, because %s: it may do more than save", why)

    def count_notices(self, number: int) -> None:
        """Show in the metrics how many notices this launch has received."""
        self._metrics.put("notices", number)

    def save_begins(self) -> None:
        """Record that a save comes next."""
        self._save_began = self._session.clock()
        self._cadence.saved(None)  # so that a failed save is not repeated after the very next step

    def save_failed(self, why: SpotError, *, stops: bool) -> None:
        """Report a checkpoint that a rank could not write. Every rank must call it.

        Args:
            why: the error.
            stops: raise it, after pending uploads are committed.
        """
        self._save_began = None
        self._cadence.failed()
        if stops:
            self._session.agreement.together(lambda: self._session.finish_uploads(self._session.arguments.drain_timeout_s))
            raise why
        next_is = "the last commit stands" if self._session.preempted else "training goes on, and the next save will try again"
        if self._session.agreement.is_main:
            log_always(logging.ERROR, "%s; %s", why.args[0], next_is)

    def saved(self, folder: Path, request: CommitRequest) -> None:
        """Hand a checkpoint to the uploader, once all its files are written. Every rank must call it after the save."""
        if self._session.disk.count > 1:
            self.behind.then_together(self._rotate_as_on_main)
        began, self._save_began = self._save_began, None
        stall_s = None if began is None else self._session.clock() - began
        self._session.timing.stalled(stall_s)
        self._cadence.saved(stall_s)
        self._first_save.saved()
        stall = _Stall(stall_s)
        if self.behind.gate.is_shut:
            self._stall = stall
        else:
            self._metrics.put("stall_s", stall_s)
        details = {**(request.details or {}), **self._session.timing.to_details(request.step), **self._carried()}
        request = replace(request, details=details)
        submit = partial(self._submit, folder, request, began, stall)
        if self._session.disk.count > 1:
            self.behind.then_together(submit)
        elif self._session.uploader is not None:
            self.behind.then(partial(submit, self._session.agreement))
        self._session.order_uploads()

    def completed(self, folder: Path, request: CommitRequest) -> None:
        """Let the commit of the newest save say that it is the last one of its training. Every rank must call it.

        Args:
            folder: of the save.
            request: as given to `saved`.
        """
        last = replace(request, complete=True)
        with self._lock:
            self._last_steps.add(request.step)
            is_submitted = request.step in self._submitted
        uploader = self._session.uploader
        is_told = not is_submitted or (uploader is not None and uploader.complete(request.training, request.step))
        if not self._session.agreement.from_main(lambda: is_told):  # it is committed already: once more
            self.saved(folder, last)

    def opened(self, waited_s: float) -> None:
        """Record that the newest save has its copies.

        Args:
            waited_s: seconds for which training stood still for them, after the save itself.
        """
        stall, self._stall = self._stall, None
        if stall is None or stall.seconds is None:  # within the save, which is measured as a whole
            return
        stall.seconds += waited_s
        self._session.timing.stalled(waited_s)
        self._cadence.stalled(stall.seconds)
        self._metrics.put("stall_s", stall.seconds)

    def _submit(self, folder: Path, request: CommitRequest, began: float | None, stall: _Stall, ranks: Agreement) -> None:
        """Submit a checkpoint. Called when all its files are written, from the thread that wrote them."""
        session = self._session
        if began is not None:
            session.note_save(session.clock() - began)
            self._metrics.put("checkpoint_s", session.save_s)
        seconds = {"save_s": session.save_s, "stall_s": stall.seconds}
        details = {**(request.details or {}), **{name: took and round(took, 3) for name, took in seconds.items()}}
        with self._lock:
            self._submitted.add(request.step)
            request = replace(request, complete=request.complete or request.step in self._last_steps)
        self._session.submit(folder, replace(request, details=details), ranks)

    def _committed(self, entry: Entry) -> None:
        """Record the measurements of a commit. Called from the uploader's thread."""
        upload_s, sizes_bytes = entry.data["upload_s"], [file["size"] for file in entry.data["files"]]
        size_bytes = sum(sizes_bytes)
        if entry.data["save_s"] is not None:
            self._cadence.committed(entry.data["save_s"], upload_s, writes_of_commit(sizes_bytes))
        self._metrics.put("upload_s", upload_s)
        self._metrics.put("upload_gb_per_s", size_bytes / 1e9 / upload_s if upload_s else None)

    def _is_busy(self) -> bool:
        """Return whether a new checkpoint would have to wait or has no room; it replaces one that the store does not accept."""
        if self._has_no_room():
            return True
        if self._session.uploader is None or self._session.uploader.trouble is not None:
            return False
        return not (self._session.uploader.idle and self.behind.wait(0.0))

    def _has_no_room(self) -> bool:
        size_bytes, place = self._session.size_bytes or self._expected_bytes, self._session.output_dir
        try:
            free = shutil.disk_usage(place).free
        except OSError:  # a save will say why
            return False
        if not lacks_room(free, size_bytes):
            self._is_room_told = False
            return False
        if not self._is_room_told:
            self._is_room_told = True
            log.warning(
                "--cadence auto adds no save for now: %s has %.1f GB free, and a checkpoint %.1f GB; Trainer's own saves go on",
                place,
                free / 1e9,
                size_bytes / 1e9,
            )
        return True

    def _carried(self) -> dict[str, Any]:
        """Return details for later launches; empty until the history is known."""
        return history.to_details(self._past.now(self._session.now())) if self._past else {}

    def _rotate_as_on_main(self, ranks: Agreement) -> None:
        """Delete the checkpoints that rank 0 has rotated away: Trainer does so on rank 0's disk only."""
        kept = ranks.from_main(lambda: {path.name for path in self._session.output_dir.glob("checkpoint-*")})
        if self._session.disk.leads:
            for path in self._session.output_dir.glob("checkpoint-*"):
                if path.name not in kept:
                    shutil.rmtree(path, ignore_errors=True)


def _share_of_memory(trainer: Trainer, agreement: Agreement) -> float:
    """Return the share of the machine's memory for this rank's saves, if several of its ranks write much."""
    node = os.uname().nodename
    ranks = agreement.gather(node).count(node)
    return 1.0 if agreement.is_main and not writes_on_each_rank(trainer) else 1 / ranks
