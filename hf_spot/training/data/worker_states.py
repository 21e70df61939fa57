"""The random states of DataLoader workers: what they had before the batches that a resumed training makes first.

A worker draws its augmentations and masks from generators of its own, which nobody saves. Here each worker notes its state
after every batch in a file that the training process maps, too; a save picks those that belong to the batches trained so
far, though the workers are ahead of them. A resumed epoch begins with the first batch that is left: whichever worker makes
it starts with the state of the one that would have made it.

Batch *n* of an iteration is made by worker *n mod workers* (torch's DataLoader deals them out in turn).
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import mmap
import os
import struct
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_spot.log import warn_for_all
from hf_spot.runtime import make_private
from hf_spot.training.data.rng import capture, pack, restore, unpack

log = logging.getLogger("hf_spot")

_NUMBER = struct.Struct("<q")
_STATE_BYTES = len(pack(capture()))
_START_S = 5.0
_LOOK_S = 0.01
_SLOT_BYTES = _NUMBER.size + _STATE_BYTES


class Ring:
    """The newest states of each worker, in a file.

    Args:
        path: of the file; made when it does not exist.
        workers: how many write.
        depth: states kept of each.
    """

    def __init__(self, path: Path, workers: int, depth: int) -> None:
        self._workers, self._depth = workers, depth
        size_bytes = workers * depth * _SLOT_BYTES
        with path.open("a+b") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)  # or writing to it on a full disk would be a bus error
            self._memory = mmap.mmap(file.fileno(), size_bytes)

    def write(self, batch: int) -> None:
        """Notes the generators of this process as the state after a batch; before the first one its number is negative."""
        at = self._slot(batch)
        self._memory[at + _NUMBER.size : at + _SLOT_BYTES] = pack(capture())
        _NUMBER.pack_into(self._memory, at, batch)

    def read(self, batch: int) -> bytes | None:
        """The state after a batch; None when it was not noted, or is gone."""
        at = self._slot(batch)
        if _NUMBER.unpack_from(self._memory, at)[0] != batch:
            return None
        return bytes(self._memory[at + _NUMBER.size : at + _SLOT_BYTES])

    def _slot(self, batch: int) -> int:
        return (batch % self._workers * self._depth + batch // self._workers % self._depth) * _SLOT_BYTES


class Worker:
    """What a worker is given, in place of its ``worker_init_fn``; travels by pickle where workers are spawned.

    Args:
        init: the loader's own ``worker_init_fn``.
        path: of the `Ring`.
        workers: how many there are.
        depth: of the ring.
        first: states to begin with, by worker; None leaves what the seed gave.
    """

    def __init__(
        self, init: Callable[[int], None] | None, path: Path, workers: int, depth: int, first: list[bytes] | None
    ) -> None:
        self._init, self._path, self._workers, self._depth, self._first = init, path, workers, depth, first

    def __call__(self, worker_id: int) -> None:
        """torch calls it in the worker, before the first batch."""
        if self._init is not None:
            self._init(worker_id)
        if self._first is not None:
            restore(unpack(self._first[worker_id]))
        self._ring = Ring(self._path, self._workers, self._depth)
        self.begins(worker_id)

    def begins(self, worker_id: int) -> None:
        """An iteration over the data begins."""
        self._ring.write(worker_id - self._workers)

    def made(self, batch: int) -> None:
        """A batch has been made."""
        self._ring.write(batch)


class Asked:
    """The queue on which a worker is asked for batches: persistent workers hear here that an iteration begins again."""

    def __init__(self, queue: Any, worker: Worker, worker_id: int) -> None:
        self._queue, self._worker, self._worker_id = queue, worker, worker_id

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """Passes it on."""
        asked = self._queue.get(*args, **kwargs)
        if asked is not None and not isinstance(asked, tuple):
            self._worker.begins(self._worker_id)
        return asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


class Made:
    """The queue on which a worker hands out batches: when one is received, the state after it has been noted."""

    def __init__(self, queue: Any, worker: Worker) -> None:
        self._queue, self._worker = queue, worker

    def put(self, item: Any, *args: Any, **kwargs: Any) -> None:
        """Notes, and passes it on."""
        if isinstance(item[0], int):
            self._worker.made(item[0])
        self._queue.put(item, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


class WorkerStates:
    """The training process's side.

    Args:
        folder: for the file that workers and training share, on this machine.
        ahead: batches that the training may have taken beyond those that a save counts.
    """

    def __init__(self, folder: Path, ahead: int) -> None:
        self._folder = folder
        self._ahead = ahead
        self._path: Path | None = None
        self._ring: Ring | None = None
        self._workers = 0
        self._first: list[bytes] | None = None
        self._shift = self._shift_ahead = 0  # worker 0 of the iteration does what worker `shift` of an undisturbed one does
        self._seeded_before = False

    @property
    def seeded_before(self) -> bool:
        """Whether the workers' seeds have been drawn before, as they are once for workers that persist."""
        return self._seeded_before

    def note_seeded(self, before: bool) -> None:
        """Remember whether the workers' seeds have been drawn before."""
        self._seeded_before = before

    def to_worker(self, loader: Any) -> Worker:
        """What takes the place of a loader's ``worker_init_fn`` when its workers start."""
        self._workers = loader.num_workers
        depth = (loader.prefetch_factor or 2) + self._ahead + 3
        make_private(self._folder)
        self._forget_file()
        self._path = self._folder / f"workers-{uuid.uuid4().hex}"
        self._ring = Ring(self._path, self._workers, depth)
        first, self._first = self._first or None, None
        self._shift = self._shift_ahead
        if first is not None and len(first) != self._workers:
            warn_for_all(
                "dataloader_num_workers was %d and is %d: what workers draw at random differs from an uninterrupted run; "
                "set it to %d",
                len(first),
                self._workers,
                len(first),
            )
            first = None
        return Worker(loader.worker_init_fn, self._path, self._workers, depth, first)

    def save(self, path: Path, handed_out: int) -> None:
        """Writes the states of all workers to a file of the checkpoint.

        Args:
            path: of the file.
            handed_out: batches of this iteration that have been trained.
        """
        if self._ring is not None:
            states = [base64.b64encode(state).decode() for state in self._read(handed_out)]
            path.write_text(json.dumps({"handed_out": handed_out, "shift": self._shift, "states": states}))

    def resume(self, path: Path, *, middle: bool) -> None:
        """The next workers begin where those of the checkpoint were.

        Args:
            path: written by `save`; may be missing.
            middle: of an epoch; at its start only workers that persist go on with their states.
        """
        if path.exists():
            found = json.loads(path.read_bytes())
            states = [base64.b64decode(state) for state in found["states"]]
            if states:
                self._go_on(states, found["handed_out"] if middle else -found["shift"])
                self._shift_ahead = (found["shift"] + found["handed_out"]) % len(states) if middle else 0

    def go_on(self, handed_out: int) -> None:
        """The workers of the next epoch begin where those of a resumed one ended, which had a loader of its own."""
        if self._ring is not None:
            self._go_on(self._read(handed_out), -self._shift)
            self._shift_ahead = 0

    def _go_on(self, states: list[bytes], shift: int) -> None:
        shift %= max(1, len(states))
        self._first = states[shift:] + states[:shift]

    def _read(self, handed_out: int) -> list[bytes]:
        assert self._ring is not None
        last = [worker + (handed_out - 1 - worker) // self._workers * self._workers for worker in range(self._workers)]
        states = [state for batch in last if (state := self._noted(batch)) is not None]
        if len(states) == self._workers:
            return states
        log.warning("the random states of DataLoader workers are not known: what they draw will differ after a resume")
        return []

    def _noted(self, batch: int) -> bytes | None:
        """The state after a batch; a worker that has made none yet may still be starting, while others have."""
        assert self._ring is not None
        give_up_at = time.monotonic() + _START_S
        while (state := self._ring.read(batch)) is None and batch < 0 and time.monotonic() < give_up_at:
            time.sleep(_LOOK_S)
        return state

    def close(self) -> None:
        """Removes the file."""
        self._forget_file()

    def _forget_file(self) -> None:
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
