"""The random states of DataLoader workers before the first batches of a resumed training.

A worker draws augmentations and masks from its own generators, which Trainer does not save. Each worker writes its state
after every batch to a file that the training process also maps; a save selects the states that belong to the batches trained
so far, although the workers are ahead of them. A resumed epoch begins with the first batch that is left: the worker that makes
it starts with the state of the worker that would have made it.

Batch *n* of an iteration is made by worker *n mod workers* (torch's DataLoader assigns them in turn).
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
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_spot.log import warn_for_all
from hf_spot.runtime import make_private
from hf_spot.training.data.rng import capture, pack, restore, unpack
from hf_spot.training.state.data_side import DataSide, from_json, parts_of, to_json

log = logging.getLogger("hf_spot")

_NUMBER = struct.Struct("<q")
_STATE_BYTES = len(pack(capture()))
_START_S = 5.0
_LOOK_S = 0.01
_ROOM_BYTES = 1 << 14  # at least, for the state of the script's dataset and collator, if they have any


def side_of(dataset: Any, collate: Any) -> DataSide:
    """Return the state that a worker's dataset and collator keep."""
    return DataSide([*parts_of(dataset), *parts_of(collate)])


class Ring:
    """Stores the newest states of each worker in a file.

    Args:
        path: the file; created if it does not exist.
        workers: number of workers.
        depth: number of states kept per worker.
        room_bytes: room for the state of the dataset and the collator in each of them.
    """

    def __init__(self, path: Path, workers: int, depth: int, room_bytes: int = 0) -> None:
        self._workers, self._depth, self._room_bytes = workers, depth, room_bytes
        self._slot_bytes = _NUMBER.size + _STATE_BYTES + _NUMBER.size + room_bytes
        size_bytes = workers * depth * self._slot_bytes
        with path.open("a+b") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)  # otherwise writing to it on a full disk would be a bus error
            self._memory = mmap.mmap(file.fileno(), size_bytes)

    def write(self, batch: int, own: bytes = b"") -> None:
        """Write the states of this process's generators after a batch; the state before the first one has a negative number.

        Args:
            batch: number of the batch.
            own: state of the dataset and the collator.
        """
        at = self._slot(batch)
        end = at + _NUMBER.size + _STATE_BYTES
        self._memory[at + _NUMBER.size : end] = pack(capture())
        fits = len(own) <= self._room_bytes
        _NUMBER.pack_into(self._memory, end, len(own) if fits else -1)
        if fits:
            self._memory[end + _NUMBER.size : end + _NUMBER.size + len(own)] = own
        _NUMBER.pack_into(self._memory, at, batch)

    def read(self, batch: int) -> bytes | None:
        """Return the state after a batch: of the generators, and of dataset and collator; None if it was not written, or was
        overwritten."""
        at = self._slot(batch)
        if _NUMBER.unpack_from(self._memory, at)[0] != batch:
            return None
        end = at + _NUMBER.size + _STATE_BYTES
        own_bytes = _NUMBER.unpack_from(self._memory, end)[0]
        if own_bytes < 0:
            warn_for_all(
                "what the dataset or the collator keeps in DataLoader workers is too large to be saved: it is reset in a "
                "resumed run; with dataloader_num_workers=0 it is saved"
            )
        own = self._memory[end + _NUMBER.size : end + _NUMBER.size + max(0, own_bytes)]
        return bytes(self._memory[at + _NUMBER.size : end]) + bytes(own)

    def _slot(self, batch: int) -> int:
        return (batch % self._workers * self._depth + batch // self._workers % self._depth) * self._slot_bytes


class Worker:
    """Replaces a worker's ``worker_init_fn``; must be picklable for workers that are spawned.

    Args:
        init: the loader's own ``worker_init_fn``.
        path: file of the `Ring`.
        workers: number of workers.
        depth: depth of the ring.
        first: initial states by worker; None keeps those from the seed.
        room_bytes: as in `Ring`.
        newest_only: write only what the worker has reached, in the place of the state at the start of an iteration.
    """

    def __init__(
        self,
        init: Callable[[int], None] | None,
        path: Path,
        workers: int,
        depth: int,
        first: list[bytes] | None,
        room_bytes: int = 0,
        *,
        newest_only: bool = False,
    ) -> None:
        self._init, self._path, self._workers, self._depth, self._first = init, path, workers, depth, first
        self._room_bytes = room_bytes
        self._newest_only = newest_only
        self._id = 0
        self._side = DataSide()
        self._side_began: dict[str, Any] = {}
        self._carried: set[str] = set()  # paths that a checkpoint has told of

    def works_with(self, dataset: Any, collate: Any) -> None:
        """Record the dataset and the collator of this worker's process, whose state is saved, too."""
        if self._room_bytes:
            self._side = side_of(dataset, collate)
            self._side_began = self._side.capture()

    def __call__(self, worker_id: int) -> None:
        """Initialize the worker: torch calls this in the worker, before the first batch."""
        self._id = worker_id
        if self._init is not None:
            self._init(worker_id)
        if self._first is not None:
            state = self._first[worker_id]
            restore(unpack(state[:_STATE_BYTES]))
            if own := state[_STATE_BYTES:]:
                states = from_json(json.loads(own))
                self._side.restore(states)
                self._carried.update(states)
        self._ring = Ring(self._path, self._workers, self._depth, self._room_bytes)
        self.begins(worker_id)

    def begins(self, worker_id: int) -> None:
        """Write the state at the start of an iteration."""
        self._ring.write(worker_id - self._workers, self._own())

    def made(self, batch: int) -> None:
        """Write the state after a batch."""
        self._ring.write(self._id - self._workers if self._newest_only else batch, self._own())

    def _own(self) -> bytes:
        if self._side.is_empty or (now := self._side.capture()) == self._side_began:
            return b""
        # What never changes is made by the script, perhaps in another way on another machine, as a folder.
        kept, before = self._carried.union(self._side.names), self._side_began
        moved = {path: one for path, one in now.items() if path in kept or path not in before or before[path] != one}
        return json.dumps(to_json(moved)).encode()


class Asked:
    """Wraps the queue of a worker's requests, which tells persistent workers that a new iteration begins."""

    def __init__(self, queue: Any, worker: Worker, worker_id: int) -> None:
        self._queue, self._worker, self._worker_id = queue, worker, worker_id

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """Return the next request, and write the state if an iteration begins."""
        asked = self._queue.get(*args, **kwargs)
        if asked is not None and not isinstance(asked, tuple):
            self._worker.begins(self._worker_id)
        return asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


class Made:
    """Wraps the queue of a worker's batches, so that the state after a batch is written before the batch is received."""

    def __init__(self, queue: Any, worker: Worker) -> None:
        self._queue, self._worker = queue, worker

    def put(self, item: Any, *args: Any, **kwargs: Any) -> None:
        """Write the state after a batch, and pass the batch on."""
        if isinstance(item[0], int):
            self._worker.made(item[0])
        self._queue.put(item, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


class WorkerStates:
    """Saves and resumes workers' states in the training process.

    Args:
        folder: local folder for the file that workers and training share; None for one in memory, which ends with this object.
        ahead: number of batches that the training may have fetched beyond those that a save counts.
        newest_only: keep only what each worker has reached, whatever it has made.
    """

    def __init__(self, folder: Path | None, ahead: int, *, newest_only: bool = False) -> None:
        self._folder = folder
        self._ahead = ahead
        self._newest_only = newest_only
        self._path: Path | None = None
        self._ring: Ring | None = None
        self._workers = 0
        self._first: list[bytes] | None = None
        self._shift = self._shift_ahead = 0  # worker 0 of this iteration does what worker `shift` does in an uninterrupted one
        self._seeded_before = False

    @property
    def seeded_before(self) -> bool:
        """Return whether the workers' seeds have been drawn before: persistent workers draw them once."""
        return self._seeded_before

    def note_seeded(self, before: bool) -> None:
        """Record whether the workers' seeds have been drawn before."""
        self._seeded_before = before

    def to_worker(self, loader: Any) -> Worker:
        """Return what replaces a loader's ``worker_init_fn`` when its workers start."""
        self._workers = loader.num_workers
        depth = 1 if self._newest_only else (loader.prefetch_factor or 2) + self._ahead + 3
        self._forget_file()
        path = self._path = self._new_file()
        side = side_of(loader.dataset, loader.collate_fn)
        room_bytes = 0 if side.is_empty else max(_ROOM_BYTES, 4 * len(json.dumps(to_json(side.capture()))))
        self._ring = Ring(path, self._workers, depth, room_bytes)
        first, self._first = self._first or None, None
        self._shift = self._shift_ahead
        if first is not None and len(first) != self._workers:
            warn_for_all(
                "dataloader_num_workers was %d and is now %d: random numbers in workers differ from an uninterrupted run; "
                "set it to %d",
                len(first),
                self._workers,
                len(first),
            )
            first = None
        newest_only = self._newest_only
        return Worker(loader.worker_init_fn, path, self._workers, depth, first, room_bytes, newest_only=newest_only)

    def _new_file(self) -> Path:
        if self._folder is None:
            memory = os.memfd_create("hf_spot-workers")
            weakref.finalize(self, os.close, memory).atexit = False
            return Path(f"/proc/{os.getpid()}/fd/{memory}")
        make_private(self._folder)
        return self._folder / f"workers-{uuid.uuid4().hex}"

    def save(self, path: Path, handed_out: int) -> None:
        """Write the states of all workers to a file of the checkpoint.

        Args:
            path: the file.
            handed_out: number of batches of this iteration that have been trained.
        """
        if self._ring is not None:
            states = [base64.b64encode(state).decode() for state in self._read(handed_out)]
            path.write_text(json.dumps({"handed_out": handed_out, "shift": self._shift, "states": states}))

    def resume(self, path: Path, *, middle: bool) -> None:
        """Start the next workers with the states of a checkpoint.

        Args:
            path: file from `save`; may be missing.
            middle: whether the checkpoint is in the middle of an epoch; at its start only persistent workers keep their states.
        """
        if path.exists():
            found = json.loads(path.read_bytes())
            states = [base64.b64decode(state) for state in found["states"]]
            if states:
                self._go_on(states, found["handed_out"] if middle else -found["shift"])
                self._shift_ahead = (found["shift"] + found["handed_out"]) % len(states) if middle else 0

    def go_on_with(self, states: list[bytes]) -> None:
        """Start the next workers with the result of `newest`."""
        self._first = states

    def newest(self) -> list[bytes]:
        """Return what each worker has reached, if only that is kept; an empty list if it is unknown."""
        return [] if self._ring is None else self._read(0)

    def go_on(self, handed_out: int) -> None:
        """Start the workers of the next epoch with the states at the end of a resumed one, which had a separate loader."""
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
        log.warning("the random states of DataLoader workers are unknown: their random numbers will differ after a resume")
        return []

    def _noted(self, batch: int) -> bytes | None:
        """Return the state after a batch; wait for a worker that may still be starting. None if there is none."""
        assert self._ring is not None
        give_up_at = time.monotonic() + _START_S
        while (state := self._ring.read(batch)) is None and batch < 0 and time.monotonic() < give_up_at:
            time.sleep(_LOOK_S)
        return state

    def close(self) -> None:
        """Remove the shared file."""
        self._forget_file()

    def _forget_file(self) -> None:
        if self._path is not None and self._folder is not None:
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
