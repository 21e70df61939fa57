"""Tells what each step was, and compares the steps that are done again with what an earlier launch told.

The training thread only appends to a queue. A thread of its own writes what is in it to a file of this rank
(`hf_spot.run.told_steps`) a few times a second, so that a kill without notice loses a fraction of a second. On rank 0 it also
sends rank 0's steps since the newest commit and a heartbeat to the store, once a minute, for a launch on another machine and
for ``hf-spot report``, and compares: the steps of all ranks that share rank 0's disk if the earlier launch trained there, too,
otherwise those of rank 0.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from hf_spot.errors import SpotError
from hf_spot.log import log_always
from hf_spot.policy import redone
from hf_spot.policy.redone import Redone, Step
from hf_spot.policy.spikes import Spike, Spikes
from hf_spot.run.journal import TRAINING_KEY
from hf_spot.run.last_words import LastWords, is_repository, of_an_earlier_launch
from hf_spot.run.mailbox import Mailbox
from hf_spot.run.run import Run
from hf_spot.run.told_steps import Heartbeat, StepFile, Told, path_of, read
from hf_spot.storage.threads import Workers, stand_back
from hf_spot.training.session.run_session import RunSession
from hf_spot.training.state.proof import digest_of

log = logging.getLogger("hf_spot")

COMPOSITION, DEVICE = "composition", "device"  # circumstances: samples of a step on each rank, and where it is done
FLUSH_S = 0.2
SEND_S = 60.0
_BEAT_S = 5.0  # between two heartbeats in the file
_MOST_STEPS = 5000  # kept: a training that commits more rarely has only its newest steps compared
_STRAGGLER_S = 10.0  # for other ranks, after the last step that is compared
_MOST_SPIKES = 20  # told by one launch
_SAMPLES_SHOWN, _SAMPLES_KEPT = 16, 256
_LAST_WORD_S = 5.0
_OTHERS_LAST_WORD_S = 1.0  # for other ranks, when the launch ends while steps are compared


class StepTeller:
    """Tells and compares the steps of one launch, from construction until `close`.

    Every rank on rank 0's disk has one. Construct it after the run is claimed and before the uploader starts, which deletes
    what earlier launches have left in the store.

    Args:
        session: connection to the run.
        rank: number of this process.
        launch: number of the launch, which ranks that write nothing to the run don't know.
        circumstances: named values that must be the same for steps to be comparable; `COMPOSITION` and `DEVICE` are known.
        resumed_step: the step from which this launch resumes; 0 for the start.
        changed: what the user has changed since, in words.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        session: RunSession,
        rank: int,
        launch: int,
        circumstances: dict[str, Any],
        *,
        resumed_step: int,
        changed: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = session
        self._is_main = session.agreement.is_main
        self._launch, self._training = launch, session.training
        self._clock = clock
        self._paths = {each: path_of(session.output_dir, session.run.url, self._training, each) for each in session.disk.ranks}
        self._file = StepFile(self._paths[rank])
        self._rank = rank
        earlier = {each: read(path) for each, path in self._paths.items() if self._is_main or each == rank}
        is_from_here = any(one.launch == self._launch - 1 for one in earlier[rank].steps)
        if self._is_main and not is_from_here:
            earlier = {**earlier, rank: _both(earlier[rank], self._told_elsewhere())}
        file = self._paths[rank] if is_from_here else None
        self._lost = of_an_earlier_launch(
            earlier[rank], self._launch, self._training, resumed_step, file, from_memory=session.resumes_from_memory
        )
        self._steps: deque[Step] = deque(
            redone.newest(earlier[rank].steps, after=resumed_step, before_launch=self._launch).values(), _MOST_STEPS
        )
        needed = {one.launch for one in self._steps}
        kept = {launch: values for launch, values in earlier[rank].circumstances.items() if launch in needed}
        self._circumstances = {**kept, self._launch: circumstances}
        self._changed = list(changed)
        self._before = self._comparable(earlier, resumed_step) if self._is_main else {}
        self._now: dict[int, dict[int, Step]] = {each: {} for each in self._before}
        self._is_compared = not any(self._before.values())
        self._straggling_since: float | None = None
        self._spikes = Spikes()
        self._spikes_told = 0
        self._fresh: deque[tuple[int, float | None, float | None, Any]] = deque()
        self._is_written = False
        self._written = 0  # lines since the file was rewritten
        self._is_troubled = False
        self._sender = Workers(1, "hf_spot-steps-sender")
        self._sending: Future[None] | None = None
        self._sent: tuple[int, float] = (0, -math.inf)  # newest step, when
        self._beat_at = -math.inf
        self._carries = bool(self._steps)  # what the store must learn again, because its copy is deleted
        self._sends = not is_repository(session.run.url)
        self._reader: Run | None = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="hf_spot-steps", daemon=True)
        self._thread.start()

    def _told_elsewhere(self) -> Told:
        """Return what the previous launch told through the store, probably from another machine."""
        if self._launch < 2:
            return Told()
        try:
            return Mailbox(self._session.run).told_steps(self._training, self._launch)
        except SpotError as error:
            log.info("what the previous launch told about its steps can't be read, so redone steps are not compared: %s", error)
            return Told()

    def _comparable(self, earlier: dict[int, Told], resumed_step: int) -> dict[int, dict[int, Step]]:
        """Return the steps to compare with, by rank, and note what makes differences no surprise."""
        mine = self._circumstances[self._launch]
        found = {
            rank: redone.newest(told.steps, after=resumed_step, before_launch=self._launch) for rank, told in earlier.items()
        }
        found = {rank: steps for rank, steps in found.items() if steps}
        theirs = [
            earlier[rank].circumstances.get(launch, {})
            for rank in found
            for launch in {one.launch for one in found[rank].values()}
        ]
        for name, what in ((COMPOSITION, "composition of a step"), (DEVICE, "device")):
            others = sorted({str(one[name]) for one in theirs if name in one and one[name] != mine[name]})
            if others:
                self._changed.append(f"the {what} was {' and '.join(others)} and is {mine[name]}")
                if name == COMPOSITION:
                    return {0: redone.only_learning_rates(found[0])} if 0 in found else {}
        return found

    @property
    def lost(self) -> LastWords | None:
        """Return what the previous launch had done beyond the step from which this one resumes; None if nothing is known."""
        return self._lost

    # -- called by the training thread --------------------------------------------------------------------------------

    def tell(self, step: int, loss: float | None, learning_rate: float | None, indices: Any) -> None:
        """Tell what a step was. Takes less than a microsecond.

        Args:
            step: its number.
            loss: this rank's own loss; None if unknown.
            learning_rate: with which it was done; None if unknown.
            indices: of this rank's samples, which nobody changes any more; None if unknown.
        """
        self._fresh.append((step, loss, learning_rate, indices))

    def conclude(self) -> None:
        """Write what was told so far, and report what was compared. Call it before the end of the launch is recorded."""
        if not self._lock.acquire(timeout=_LAST_WORD_S):  # the thread waits for a disk that does not answer
            return
        try:
            self._flush()
            if not self._is_compared:
                self._report(self._compare_with_stragglers())
        finally:
            self._lock.release()

    def forget(self) -> None:
        """Delete this rank's file after the end of the training: no step of it will be done again."""
        self.close()
        try:
            self._file.delete()
        except OSError as error:
            log.info("%s can't be deleted: %s", self._paths[self._rank], error)

    def close(self) -> None:
        """End the thread. Repeated calls do nothing."""
        if not self._closing.is_set():
            self._closing.set()
            self._sender.shutdown(wait=False, cancel_futures=True)
            self._thread.join(_LAST_WORD_S)
            self._file.close()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        stand_back()
        while not self._closing.wait(FLUSH_S):
            with self._lock:
                self._flush()

    def _flush(self) -> None:
        """Write the newest steps, compare them, and send them if it is time to."""
        fresh = []
        while self._fresh:
            step, loss, learning_rate, indices = self._fresh.popleft()
            fresh.append(Step(self._launch, step, loss, learning_rate, digest_of_indices(indices)))
            if (spike := self._spikes.look(step, loss)) is not None:
                self._tell_spike(spike, indices)
        self._steps.extend(fresh)
        self._write(fresh)
        if not self._is_main:
            return
        if not self._is_compared:
            self._now.get(self._rank, {}).update({one.step: one for one in fresh})
            if fresh or self._straggling_since is not None:
                self._conclude_if_complete()
        self._send()

    def _tell_spike(self, spike: Spike, indices: Any) -> None:
        """Report a loss that stands out, and this rank's samples of its step."""
        self._spikes_told += 1
        if self._spikes_told > _MOST_SPIKES:
            return
        samples = [] if indices is None else [_index(one) for batch in indices for one in batch]
        shown = f"; samples {', '.join(map(str, samples[:_SAMPLES_SHOWN]))}" if samples else "; its samples are unknown"
        more = f" and {len(samples) - _SAMPLES_SHOWN} more" if len(samples) > _SAMPLES_SHOWN else ""
        last = "; further ones are not told" if self._spikes_told == _MOST_SPIKES else ""
        log_always(logging.WARNING, "%s%s%s (rank %d)%s", spike.in_words(), shown, more, self._rank, last)
        data = {"step": spike.step, "loss": _finite(spike.loss), "usual": _finite(spike.usual), TRAINING_KEY: self._training}
        self._session.record("spike", {**data, "samples": samples[:_SAMPLES_KEPT], "rank": self._rank}, patience_s=0.0)

    def _conclude_if_complete(self) -> None:
        found = self._compare()
        last = max(step for steps in self._before.values() for step in steps)
        if redone.is_complete(found, self._before):
            self._report(found)
        elif self._steps and self._steps[-1].step >= last:  # the other ranks write as often as this one
            since = self._straggling_since = self._straggling_since or self._clock()
            if self._clock() - since > _STRAGGLER_S:
                self._report(found)

    def _write(self, fresh: list[Step]) -> None:
        try:
            self._written += len(fresh)
            is_long = self._written > 2 * _MOST_STEPS
            beat = None
            if fresh and self._is_main and self._clock() - self._beat_at >= _BEAT_S:
                beat, self._beat_at = self._heartbeat(), self._clock()
            if not self._is_written or is_long or (fresh and not self._file.append(fresh, beat)):
                self._file.rewrite(Told(tuple(self._steps), self._circumstances, beat or self._heartbeat()))
                self._written = 0
            self._is_written = True
            if self._is_troubled:
                log.info("%s is written again", self._paths[self._rank])
            self._is_troubled = False
        except OSError as error:
            self._is_written = False
            if not self._is_troubled:
                log.warning(
                    "%s can't be written: %s; training goes on, and if it is killed now, redone steps can't be compared",
                    self._paths[self._rank],
                    error.strerror or error,
                )
            self._is_troubled = True

    def _heartbeat(self) -> Heartbeat | None:
        """Return how far this launch has come; None before its first step."""
        newest = self._steps[-1] if self._steps else None
        if newest is None or newest.launch != self._launch:
            return None
        timing = self._session.timing.to_details(newest.step)["timing"]
        return Heartbeat(self._launch, newest.step, self._session.now(), timing, str(self._session.output_dir.absolute()))

    def _compare(self) -> Redone | None:
        """Return the comparison so far, with what the other ranks have written."""
        for rank in self._before:
            if rank != self._rank:
                of_launch = (one for one in read(self._paths[rank]).steps if one.launch == self._launch)
                self._now[rank] = {one.step: one for one in of_launch}
        return redone.compare(self._before, self._now, self._changed)

    def _compare_with_stragglers(self) -> Redone | None:
        """Return the comparison at the end of the launch, once the other ranks have written their last steps, too."""
        last, until = self._steps[-1].step if self._steps else 0, self._clock() + _OTHERS_LAST_WORD_S
        while True:
            found = self._compare()
            others = [self._now[rank] for rank in self._before if rank != self._rank]
            is_done = found is not None and redone.is_complete(found, self._before)
            if is_done or self._clock() > until or all(last in steps for steps in others):
                return found
            time.sleep(FLUSH_S / 4)

    def _report(self, found: Redone | None) -> None:
        self._is_compared = True
        if found is None:
            return
        line = redone.in_words(found)
        if found.different is None or found.changed:
            log.info("%s", line)
        else:
            log.warning("%s", line)
        self._session.record("redone", {TRAINING_KEY: self._training, **found.to_data()}, patience_s=0.0)

    def _send(self) -> None:
        """Send the steps since the newest commit to the store, in a thread of its own, if it is time to."""
        newest, (sent, at) = self._steps[-1].step if self._steps else 0, self._sent
        is_due = newest != sent and self._clock() - at >= SEND_S
        is_busy = self._sending is not None and not self._sending.done()
        if not self._sends or is_busy or not (is_due or self._carries) or self._session.preempted or self._session.fenced:
            return
        committed = self._session.committed_step
        steps = tuple(one for one in self._steps if one.step > committed)
        told = Told(steps, dict(self._circumstances), self._heartbeat())
        self._sent, self._carries = (newest, self._clock()), False
        if not self._closing.is_set():
            self._sending = self._sender.submit(self._send_now, told)

    def _send_now(self, told: Told) -> None:
        run = self._session.run
        if self._reader is None:
            self._reader = Run(run.store)  # of its own: the journal's lock is not held while the store answers
        try:
            if self._reader.state().launch == self._launch:
                Mailbox(run).tell_steps(self._training, told)
        except SpotError as error:  # the uploader reports what is wrong with the store
            log.debug("the newest steps could not be told: %s", error)


def _both(one: Told, other: Told) -> Told:
    beats = [told.heartbeat for told in (one, other) if told.heartbeat is not None]
    newest = max(beats, key=lambda beat: beat.launch, default=None)
    return Told((*one.steps, *other.steps), {**one.circumstances, **other.circumstances}, newest)


def kind_of(device: torch.device) -> str:
    """Return the kind of a device: another kind computes the same step with other rounding."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})" if device.type == "cpu" else device.type


def _index(value: Any) -> int | str:
    try:
        return int(value)
    except (TypeError, ValueError):  # a sampler may draw anything
        return repr(value)


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN


def digest_of_indices(batches: Any) -> str | None:
    """Return a digest of the indices of a step's batches; None for None."""
    if batches is None:
        return None
    found = hashlib.blake2b(digest_size=8)
    for batch in batches:
        try:
            data = array("q", batch).tobytes()
        except (TypeError, OverflowError):  # a sampler may draw anything
            data = digest_of(batch).encode()
        found.update(len(data).to_bytes(8, "big") + data)
    return found.hexdigest()
