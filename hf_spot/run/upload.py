"""The uploader: one background thread that uploads finished checkpoint folders and commits them, whatever the network does."""

from __future__ import annotations

import logging
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from hf_spot.errors import ConfigError, Fenced, SpotError, StoreError
from hf_spot.log import log_always
from hf_spot.policy.preemption import Measured
from hf_spot.run import transfer
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.journal import Entry
from hf_spot.run.mailbox import Mailbox
from hf_spot.run.manifest import FileEntry, files_in
from hf_spot.run.progress import Bar
from hf_spot.run.run import Run
from hf_spot.storage.threads import stand_back

log = logging.getLogger("hf_spot")

_RETRIED = "%s is not in %s yet; training goes on and the upload is retried. %s"
_FIRST_RETRY_S = 1.0
_LONGEST_RETRY_S = 30.0
_PART_POLL_S = 0.5
_ASK_S = 0.2
_SHOWN_AFTER_S = 1.0  # a shorter wait needs no explanation
_CLOSE_S = 2.0
_TELLING_S = 2.0  # after this long an upload shows how fast the network is now


class _Cancelled(SpotError):
    """The transfer gave way to a newer one, or to the end."""


@dataclass
class _Job:
    folder: Path
    request: CommitRequest
    size_bytes: int
    queued: float
    files: list[FileEntry] | None = None  # set once they are uploaded
    is_written: bool = False  # the journal may have its commit
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def best(self) -> bool:
        return self.request.best_step == self.request.step

    @property
    def is_whole(self) -> bool:
        """Return whether all its files still exist: the pins are inside output_dir and are deleted along with it."""
        try:
            return _size_bytes(self.folder) == self.size_bytes
        except OSError:  # it is being deleted
            return False


class Uploader:
    """Accepts checkpoint folders from the training thread and never makes it wait.

    At most one upload is under way and one waits. If training saves faster than the network carries, the newest checkpoint
    replaces the one that waits, unless that is the best so far: then both wait. Store errors are retried without end, and the
    next checkpoint replaces one that can't be uploaded.

    Args:
        run: a run that this process has claimed or adopted.
        pins: folder for the hard links, on the filesystem of the checkpoints; made when needed, removed by `close`.
        save_total_limit: passed to `Run.prune` after each commit, like the next two.
        keep_every: steps between two checkpoints that are kept for good.
        keep_weights: of those keep the weights alone.
        on_commit: called after each commit, from the uploader's thread.
        keeps_house: delete what earlier launches left; true for one uploader of a launch.
        standing: keys under which files of checkpoints are already, the same on all machines; None reads them from the run.
        attempt: see `CommitRequest`.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        run: Run,
        pins: Path,
        *,
        save_total_limit: int | None = 3,
        keep_every: int | None = None,
        keep_weights: bool = False,
        on_commit: Callable[[Entry], None] = lambda entry: None,
        keeps_house: bool = True,
        standing: Collection[str] | None = None,
        attempt: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._mailbox = Mailbox(run)
        self._pins = pins
        self._save_total_limit = save_total_limit
        self._keep_every = keep_every
        self._keep_weights = keep_weights
        self._on_commit = on_commit
        self._keeps_house = keeps_house
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: list[_Job] = []
        self._attempt_id = attempt
        self._standing = frozenset(standing_prefixes(run) if standing is None else standing)
        self._times: Counter[tuple[int, int]] = Counter()  # how often each (training, step) was submitted
        self._given_up: list[CommitRequest] = []
        self._current: _Job | None = None
        self._began = 0.0
        self._moved_bytes = 0
        self._told_bytes = run.sent.total  # of those sent, what commits have told
        self._hurried = False
        self._give_way = False
        self._closing = False
        self._awaited = 0  # drains that wait
        self._bytes_per_s: float | None = None
        self._commit_s = 0.0
        self._trouble: Exception | None = None
        self._fenced: Fenced | None = None
        self._thread = threading.Thread(target=self._work, name="hf_spot-uploader", daemon=True)
        self._thread.start()

    # -- called by the training thread --------------------------------------------------------------------------------

    def submit(self, folder: Path, request: CommitRequest, elsewhere: Collection[str] = ()) -> None:
        """Pin ``folder``, queue it, and return at once. `trouble` and `fenced` report later errors.

        Args:
            folder: with the files.
            request: for the commit.
            elsewhere: names of files that another machine uploads.

        Raises:
            OSError: it can't be pinned; machine 0 will not wait for it.
        """
        request = self._set_apart(request)
        pinned = self._pins / f"{request.training}-{request.step}-{uuid.uuid4().hex[:8]}"
        try:
            transfer.pin(folder, pinned, elsewhere)
        except OSError:
            self._note_given_up(request)
            raise
        size_bytes = _size_bytes(pinned)
        with self._changed:
            for job in [job for job in self._waiting if job.request.step != request.best_step]:
                log.warning(
                    "checkpoint-%d gives way to checkpoint-%d: saves are faster than uploads",
                    job.request.step,
                    request.step,
                )
                self._drop(job)
            self._waiting.append(_Job(pinned, request, size_bytes, self._clock()))
            self._changed.notify_all()

    def _set_apart(self, request: CommitRequest) -> CommitRequest:
        """Return the request with a place of its own in the store, so that the files of a commit are never overwritten.

        All machines of a launch choose the same place, because they submit the same steps in the same order.
        """
        key = request.training, request.step
        number = self._times[key]
        request = replace(request, attempt=self._attempt_id)
        while (apart := replace(request, apart=str(number or ""))).prefix(self._run.launch) in self._standing:
            number += 1
        self._times[key] = number + 1
        return apart

    def complete(self, training: int, step: int) -> bool:
        """Let the commit of a submitted checkpoint say that it is the last one of its training.

        Args:
            training: number of the training.
            step: optimizer steps done.

        Returns:
            Whether there is such a checkpoint whose commit is still to be written.
        """
        with self._changed:
            jobs = [*self._waiting, *([self._current] if self._current else [])]
            found = [job for job in jobs if (job.request.training, job.request.step) == (training, step) and not job.is_written]
            for job in found:
                job.request = replace(job.request, complete=True)
            return bool(found)

    def hurry(self, *, give_way: bool) -> None:
        """Upload the newest checkpoint first from now on, because the machine is being taken away.

        Args:
            give_way: end the upload under way when a newer one waits; the upload of the best so far is tried again afterwards.
        """
        with self._changed:
            self._hurried = True
            self._give_way = give_way
            self._changed.notify_all()

    def drain(self, timeout_s: float, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Wait until everything submitted is committed. Return False after ``timeout_s`` seconds, or if fenced.

        Args:
            timeout_s: how long to wait.
            interrupted: called repeatedly, from this thread; True ends the wait.
        """
        give_up_at = time.monotonic() + timeout_s
        with self._changed:
            self._awaited += 1
            self._changed.notify_all()  # a retry that sleeps tries at once
            left_bytes = self._left_bytes()
        try:
            with Bar("upload", left_bytes, delay_s=_SHOWN_AFTER_S) as bar:
                # Without the lock: it may wait for other ranks, and uploads continue meanwhile.
                while not self._is_over and not interrupted():
                    with self._changed:
                        left_s = give_up_at - time.monotonic()
                        if self._is_over or left_s <= 0:
                            break
                        self._changed.wait(min(left_s, _ASK_S))
                        before, left_bytes = left_bytes, self._left_bytes()
                    bar(before - left_bytes)
        finally:
            with self._changed:
                self._awaited -= 1
        return self.idle and self._fenced is None

    @property
    def _is_over(self) -> bool:
        return self.idle or self._fenced is not None

    def _left_bytes(self) -> int:
        under_way = max(0, self._current.size_bytes - self._moved_bytes) if self._current else 0
        return under_way + sum(job.size_bytes for job in self._waiting)

    def close(self) -> None:
        """End the thread without waiting for uploads, and remove the pins. Call `drain` first."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_S)
        shutil.rmtree(self._pins, ignore_errors=True)

    # -- what it knows ------------------------------------------------------------------------------------------------

    @property
    def fenced(self) -> Fenced | None:
        """Return the error if a newer launch has claimed the run: then nothing will be committed any more. Otherwise None."""
        return self._fenced

    @property
    def trouble(self) -> Exception | None:
        """Return the error of the newest attempt, or None if it succeeded."""
        return self._trouble

    def measured(self) -> Measured:
        """Return what is known about the network, and the uploads under way and waiting."""
        with self._changed:
            now = ([self._current] if self._current else []) + self._waiting
            moved = self._moved_bytes if self._current else 0
            newer = [job for job in now[1:] if job.request.step > now[0].request.step]
            return Measured(
                bytes_per_s=self._rate(),
                commit_s=self._commit_s,
                in_flight_bytes=max(0, now[0].size_bytes - moved) if now else None,
                waiting_bytes=newer[-1].size_bytes if newer else None,
            )

    def _rate(self) -> float | None:
        """Return bytes per second; None before anything has been sent."""
        took_s = self._clock() - self._began
        if self._current and 0 < self._moved_bytes < self._current.size_bytes and took_s >= _TELLING_S:
            return self._moved_bytes / took_s
        return self._bytes_per_s

    @property
    def idle(self) -> bool:
        """Return whether everything submitted is committed or given up."""
        with self._changed:  # a job is never in neither place
            return not self._waiting and self._current is None

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        stand_back()
        if self._keeps_house:
            self._tidy()
        retry_s = _FIRST_RETRY_S
        while (job := self._take()) is not None:
            failed = self._attempt(job)
            with self._changed:
                self._current = None
                self._trouble = failed
                if isinstance(failed, Fenced):
                    self._fenced = failed
                    self._closing = True
                overtaken = isinstance(failed, _Cancelled)
                if failed is None or not (overtaken or _may_pass(failed)):
                    self._discard(job)
                    retry_s = _FIRST_RETRY_S
                elif self._waiting and not self._is_best(job):
                    self._discard(job)  # the newer checkpoint replaces it
                else:
                    self._waiting.insert(0, job)
                if failed is not None and job not in self._waiting:
                    self._note_given_up(job.request)
                self._changed.notify_all()
                if failed is not None and not overtaken and not self._closing and self._waiting:
                    # A new submission or a drain ends the wait early.
                    self._changed.wait(_FIRST_RETRY_S if self._awaited else retry_s)
                    retry_s = min(2 * retry_s, _LONGEST_RETRY_S)

    def _take(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if self._closing:
                return None
            self._current = max(self._waiting, key=lambda job: job.request.step) if self._hurried else self._waiting[0]
            self._waiting.remove(self._current)
            self._moved_bytes = 0
            self._began = self._clock()
            return self._current

    def _is_best(self, job: _Job) -> bool:
        return job.best and all(newer.request.best_step == job.request.step for newer in self._waiting)

    def _attempt(self, job: _Job) -> Exception | None:
        """Upload and commit one job. Return an exception instead of raising it, because the thread must live on."""
        name = f"checkpoint-{job.request.step}"
        try:
            while self._given_up:
                self._mailbox.hand_in(self._given_up[0], None)
                self._given_up.pop(0)
            sent = job.files is None
            if job.files is None:  # otherwise only the answer to the commit was lost
                job.files = self._run.upload(job.folder, job.request, progress=self._moved)
            files = job.files
            upload_s = max(self._clock() - self._began, 1e-6)
            if job.request.part:
                self._mailbox.hand_in(job.request, files)
                entry = None
            else:
                entry = self._commit(job, files)
            took_s = max(self._clock() - self._began, upload_s)
        except _Cancelled as cancelled:
            if not self._closing:
                log.warning("the upload of %s gives way to a newer one", name)
            return cancelled
        except Fenced as error:
            log_always(logging.ERROR, "%s", error)
            return error
        except (SpotError, OSError) as error:
            if not job.is_whole:
                log_always(
                    logging.ERROR,
                    "%s is gone from this disk, and not in %s (was output_dir deleted?); training goes on, and the next "
                    "checkpoint replaces it",
                    name,
                    self._run.url,
                )
                return SpotError(f"{name} was deleted from this disk before it was uploaded")
            if not _may_pass(error):
                log_always(logging.ERROR, "%s can't be committed: %s", name, error)
                return error
            log_always(logging.ERROR, _RETRIED, name, self._run.url, error)
            return error
        except Exception as error:  # of a library, not translated by the store
            log_always(logging.ERROR, _RETRIED, name, self._run.url, f"{type(error).__name__}: {error}")
            log.debug("the upload of %s", name, exc_info=True)
            return error
        self._bytes_per_s = job.size_bytes / upload_s if sent else self._bytes_per_s
        self._commit_s = took_s - upload_s
        if entry is not None:
            log.info("%s committed to %s: %.1f MB in %.2f s", name, self._run.url, job.size_bytes / 1e6, took_s)
            self._after_commit(entry)
        return None

    def _commit(self, job: _Job, files: list[FileEntry]) -> Entry:
        while (others := self._mailbox.other_parts(job.request)) is None:
            self._moved(0)  # may end the wait
            with self._changed:
                self._changed.wait(_PART_POLL_S)
        # Also what was sent for checkpoints that were never committed; of other machines, what their files say.
        sent_bytes = self._run.sent.total - self._told_bytes
        details = {**(job.request.details or {}), "upload_s": round(self._clock() - job.queued, 3)}
        details["sent_bytes"] = sent_bytes + sum(file.size for file in others)
        with self._changed:
            job.is_written, request = True, replace(job.request, details=details)
        entry = self._run.commit(request, files + others, id=job.id)
        self._told_bytes += sent_bytes
        return entry

    def _after_commit(self, entry: Entry) -> None:
        try:
            self._on_commit(entry)
            gone = self._run.prune(self._save_total_limit, keep_every=self._keep_every, keep_weights=self._keep_weights)
            if gone:
                log.info("pruned from the run: %s", ", ".join(f"checkpoint-{ref.step}" for ref in gone))
        except Exception as error:  # whatever happens after it, the commit exists
            log.warning("old checkpoints were not deleted, and stay for now: %s", error or type(error).__name__)

    def _tidy(self) -> None:
        try:
            count = self._run.collect_garbage()
            if count:
                log.info("deleted %d files that earlier launches left without a commit", count)
        except Exception as error:  # the next launch tidies up, too
            log.warning("files left by earlier launches were not deleted: %s", error or type(error).__name__)

    def _moved(self, count: int) -> None:
        with self._changed:
            self._moved_bytes += count
            step = self._current.request.step if self._current else 0
            if self._closing or (self._give_way and any(job.request.step > step for job in self._waiting)):
                raise _Cancelled("the upload gave way")

    def _drop(self, job: _Job) -> None:
        self._waiting.remove(job)
        self._discard(job)
        self._note_given_up(job.request)

    def _note_given_up(self, request: CommitRequest) -> None:
        if request.part:
            self._given_up.append(request)  # machine 0 waits for this part

    def _discard(self, job: _Job) -> None:
        shutil.rmtree(job.folder, ignore_errors=True)


def standing_prefixes(run: Run) -> list[str]:
    """Return the keys under which the files of the run's checkpoints are, as far as its journal has been read."""
    return run.journal.state.prefixes


def _may_pass(error: Exception) -> bool:
    """Return whether the same upload may succeed later. A checkpoint that lacks files or has changed stays so; a store, its
    settings, a source of credentials or a disk may be repaired."""
    return isinstance(error, (StoreError, ConfigError)) or not isinstance(error, SpotError)


def _size_bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in files_in(folder))
