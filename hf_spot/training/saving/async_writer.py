"""A save that training hardly feels: the state is copied in memory, and the files are written while training goes on.

What takes the time of a Trainer's save is checksums and files, not the state: a copy of it takes a tenth of that. So within
`AsyncCheckpointWriter.capturing` Trainer, PEFT and TRL save as ever, in their own order and formats, and whatever they hand to
``torch.save`` or safetensors is copied at the last moment: when the bytes of a tensor would go to the file. The same code of
torch and safetensors then writes the same bytes from the copies, in a thread; both give up the GIL for it.

So is what all ranks write together by ``torch.distributed.checkpoint.save`` (FSDP's shards; see `shards`). Either all ranks
write a save behind their training or none does, and it has an end when the last of them has written.

Only the training thread is captured, and only files that are named by a path. Seen with torch 2.13 and safetensors 0.8; where
these look different, files are written at once.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint
import torch.serialization
from torch.distributed.checkpoint.api import CheckpointException

from hf_spot.storage.threads import stand_back
from hf_spot.training.ranks.agreement import Agreement
from hf_spot.training.saving.arena import Arena, free_bytes
from hf_spot.training.saving.device import taken_over
from hf_spot.training.saving.shards import StagedPlanner, Unknown, stage
from hf_spot.training.upstream import (
    FILE_LIKE,
    OPEN_ZIPFILE,
    SAVE_ALONE,
    SAVE_TOGETHER,
    SERIALIZE_FILE,
    TENSOR_SPEC,
    TYPES,
    WRITE_RECORD,
)

log = logging.getLogger("hf_spot")

_SHARE = 0.5  # of the memory that is free at the first save
_DTYPES = {name: str(dtype).removeprefix("torch.") for name, dtype in (TYPES.find() or {}).items()}
# None where torch or safetensors has changed: files are written at once then, which `hf_spot.training.upstream.check` says.
_plain_open = OPEN_ZIPFILE.find()
_plain_serialize = SERIALIZE_FILE.find()
_plain_save_together = SAVE_TOGETHER.find()


class AsyncCheckpointWriter:
    """Writes the files of one save after the other, in a thread.

    Several ranks must capture the same saves. What one of them can't write has failed for all, which they learn when all have
    ended: only then nobody writes to the folder any more.

    Args:
        limit_bytes: of memory for copies; None takes half of what is free at the first save. A file that does not fit is
            written at once, as Trainer does it.
        ranks: that save together; for these saves only, because others may agree on something else meanwhile.
        share: of the memory that is this rank's, when there are others on its machine.
    """

    def __init__(self, limit_bytes: int | None = None, ranks: Agreement | None = None, share: float = 1.0) -> None:
        self._limit_bytes = limit_bytes
        self._ranks = ranks or Agreement(1)
        self._share = share
        self._arena: Arena | None = None
        self._owner = 0
        self._pending: list[Callable[[], None]] = []
        self._forgotten = False
        self._jobs: queue.Queue[tuple[Callable[[], Any], bool] | None] = queue.Queue()
        self._error: str | None = None
        self._in_words: Callable[[BaseException], str] = str
        self._said = False
        self._process = os.getpid()
        self._thread: threading.Thread | None = None
        self.parted = False  # a rank is gone: nothing can be written together any more

    def expect(self, size_bytes: int) -> None:
        """A first save of about this size will come: takes the memory for it, in the background."""
        arena = self._make_arena()
        self._submit(lambda: arena.touch(size_bytes))

    def _make_arena(self) -> Arena:
        if self._arena is None:
            limit_bytes = free_bytes() * _SHARE if self._limit_bytes is None else self._limit_bytes
            self._arena = Arena(int(limit_bytes * self._share))
        return self._arena

    @contextmanager
    def capturing(
        self, in_words: Callable[[BaseException], str] = str, on_error: Callable[[str], None] = lambda why: None
    ) -> Iterator[None]:
        """Within it, what this thread saves is copied, and written after its end.

        Waits for the files of the save before, because the memory is the same.

        Args:
            in_words: says why a file can't be written here.
            on_error: called with these words on every rank when one can't write and none writes any more, from the thread
                that writes.
        """
        self.wait()
        self._in_words = in_words
        self._make_arena().clear()
        self._owner = threading.get_ident()
        self._pending, self._forgotten = [], False
        try:
            with (
                SAVE_TOGETHER.replaced(torch.distributed.checkpoint, self._capture_together),
                OPEN_ZIPFILE.replaced(torch.serialization, lambda plain: self._open),
                SERIALIZE_FILE.replaced(safetensors.torch, lambda plain: self._serialize),
                taken_over(self._take),
            ):
                yield
        finally:
            self._owner = 0
        if self._forgotten:
            return
        while self._pending:
            write = self._pending.pop(0)
            # The others wait for this one in the middle of what they write together.
            self._submit(write, always=isinstance(write, _Together))
        if self._pending:
            self._submit(self._make_arena().pin)  # the next save copies faster
        self._submit(lambda: self._conclude(on_error), always=True)

    def write_text(self, path: Path, text: str) -> None:
        """Write a small file: behind the training within `capturing`, else at once. Its folder must be there."""

        def write() -> None:
            path.write_text(text)

        if threading.get_ident() == self._owner:
            self._pending.append(write)
        else:
            write()

    def forget(self) -> None:
        """Within `capturing`: what was captured is not to be written after all; all ranks must call it, or none."""
        self._pending.clear()
        self._forgotten = True

    def then(self, act: Callable[[], None]) -> None:
        """Calls ``act`` when all that was captured so far is written by all ranks, or at once if it is; not if the writing
        failed."""
        if self._jobs.unfinished_tasks:
            self._submit(act)
        elif self._error is None:
            act()

    def then_together(self, act: Callable[[Agreement], None]) -> None:
        """As `then`, for what all ranks do together; all must call it.

        Args:
            act: given the ranks, to agree with.
        """

        def agreed() -> None:
            if not self.parted and not any(self._ranks.gather(self._error is not None)):
                act(self._ranks)

        if self._jobs.unfinished_tasks:
            self._submit(agreed, always=True)
        else:
            agreed()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until everything is written; False when it is not after ``timeout_s`` seconds. A forked child, in which the
        thread is not, waits for nothing."""
        if os.getpid() != self._process:
            return True
        with self._jobs.all_tasks_done:
            return self._jobs.all_tasks_done.wait_for(lambda: not self._jobs.unfinished_tasks, timeout_s)

    def take_error(self) -> str | None:
        """What the writing of the newest save failed with on any rank, once. In words only: the error itself holds
        half-written files open, whose space must become free."""
        error, self._error = self._error, None
        return error

    def close(self) -> None:
        """Waits for the files, ends the thread and gives the memory back."""
        if os.getpid() != self._process:
            return
        if self._thread is not None:
            self.wait()
            self._jobs.put(None)
            self._thread.join()
            self._thread, self._jobs = None, queue.Queue()
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    # -- in place of what writes ----------------------------------------------------------------------------------------

    def _open(self, file: Any) -> Any:
        assert _plain_open is not None
        known = FILE_LIKE.trouble() is None and WRITE_RECORD.trouble() is None
        if threading.get_ident() != self._owner or not isinstance(file, str) or not known:
            return _plain_open(file)
        return _Captured(self, file)

    def _serialize(self, tensors: Any, filename: Any, metadata: Any = None) -> None:
        kept = self._keep_all(tensors) if threading.get_ident() == self._owner else None
        if kept is None:
            self._arrive()
            _plain_serialize(tensors, filename, metadata=metadata)
            return
        specs, copies = kept
        filename = os.fspath(filename)

        def write() -> None:
            self._arrive()
            _plain_serialize(specs, filename, metadata=metadata)
            copies.clear()  # they had to live until here

        self._pending.append(write)

    def _capture_together(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def save(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._owner or (self._ranks.alone and SAVE_ALONE.trouble() is not None):
                return plain(*args, **kwargs)
            staged, why = self._stage(args, kwargs)
            reasons = [one for one in self._ranks.gather(why) if one is not None]
            if reasons:
                self._say_once(reasons[0])
            if reasons or staged is None:
                return plain(*args, **kwargs)
            self._pending.append(_Together(self, staged, kwargs["storage_writer"]))
            return None

        return save

    def _stage(self, args: tuple[Any, ...], save: dict[str, Any]) -> tuple[StagedPlanner | None, str | None]:
        """What this rank writes, or why it can't be kept."""
        assert self._arena is not None
        try:
            if args:
                raise Unknown("its arguments have no names")
            staged = stage(self._arena.copy, is_coordinator=self._ranks.is_main, **save)
        except Exception as error:  # the others wait for a word; torch's own save will meet what is really wrong
            words = str(error) if isinstance(error, Unknown) else repr(error)
            return None, f"sharded checkpoints are written while training waits: {words}"
        return staged, None if staged is not None else self._too_large()

    def _keep_all(self, tensors: Any) -> tuple[dict[str, Any], list[torch.Tensor]] | None:
        specs, copies, described = {}, [], TENSOR_SPEC.find()
        for name, spec in tensors.items():
            if described is None or not isinstance(spec, described) or spec.dtype not in _DTYPES:
                return None
            memory = (ctypes.c_char * spec.data_len).from_address(spec.data_ptr) if spec.data_len else b""
            source = torch.frombuffer(memory, dtype=torch.uint8) if spec.data_len else torch.empty(0, dtype=torch.uint8)
            copy = self.keep(source)
            if copy is None:
                return None
            copies.append(copy)
            specs[name] = described(
                dtype=_DTYPES[spec.dtype], shape=spec.shape, data_ptr=copy.data_ptr(), data_len=spec.data_len
            )
        return specs, copies

    def _take(self, storage: torch.UntypedStorage, begin: int, count: int) -> torch.Tensor | None:
        return self.keep(_bytes_of(storage)[begin : begin + count])

    def _arrive(self) -> None:
        if self._arena is not None:
            self._arena.wait()

    def keep(self, source: torch.Tensor) -> torch.Tensor | None:
        """A copy of these bytes until they are written; None when there is no room, which is said once."""
        assert self._arena is not None
        if source.device.type == "cpu" and self._arena.holds(source.data_ptr()):
            return source  # brought from a device just now
        copy = self._arena.copy(source)
        if copy is None:
            self._say_once(self._too_large())
        return copy

    def _too_large(self) -> str:
        assert self._arena is not None
        return (
            f"a checkpoint does not fit into the {self._arena.limit_bytes / 1e9:.1f} GB of memory that saves may take: the "
            "rest of it is written while training waits"
        )

    def _say_once(self, why: str) -> None:
        if not self._said and self._ranks.is_main:
            log.warning("%s", why)
        self._said = True

    # -- the thread -----------------------------------------------------------------------------------------------------

    def _submit(self, act: Callable[[], Any], *, always: bool = False) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="hf_spot-writer", daemon=True)
            self._thread.start()
        self._jobs.put((act, always))

    def _work(self) -> None:
        stand_back()
        while (job := self._jobs.get()) is not None:
            act, always = job
            if self._error is None or (always and not self.parted):
                try:
                    act()
                except BaseException as error:  # told to the training thread: see `take_error`
                    self._error = self._error or self._in_words(error) or repr(error)
            del act, job  # and with them the copies
            self._jobs.task_done()

    def _conclude(self, on_error: Callable[[str], None]) -> None:
        """The end of a save: no rank writes any more, and all learn whether one could not."""
        try:
            errors = self._ranks.gather(self._error)
        except Exception as error:
            self._part(error)
            raise
        self._error = next((error for error in errors if error is not None), None)
        if self._error is not None:
            on_error(self._error)

    def _part(self, error: BaseException) -> None:
        """A rank is gone in the middle of what all do together. Its launch ends, and the next start sets aside what is torn:
        the others may be writing to it."""
        log.warning("a checkpoint is left incomplete, because a rank has ended: %s", error)
        self.parted = True
        self._ranks.close()  # those who wait for this one learn it by that


class _Together:
    """Writes what was staged of a sharded save, with the other ranks."""

    def __init__(self, behind: AsyncCheckpointWriter, staged: StagedPlanner, writer: Any) -> None:
        self._behind = behind
        self._staged = staged
        self._writer = writer
        # Each thread has one of its own, the first of the machine if it is not told: all ranks would take memory there.
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1  # type: ignore[no-untyped-call]

    def __call__(self) -> None:
        ranks = self._behind._ranks
        # Never the training's own group, which is at work.
        how: dict[str, Any] = {"no_dist": True} if ranks.alone else {"process_group": ranks.group}
        self._behind._arrive()
        try:
            with torch.cuda.device(self._device):
                _plain_save_together({}, storage_writer=self._writer, planner=self._staged, **how)
        except CheckpointException as error:  # raised on all ranks; each speaks for itself: see `_conclude`
            if (rank := 0 if ranks.alone else torch.distributed.get_rank()) in error.failures:
                raise error.failures[rank][0] from None
        except Exception as error:
            self._behind._part(error)
            raise


class _Captured:
    """Takes the place of ``torch._C.PyTorchFileWriter`` in ``torch.save``: remembers the records, and replays them later."""

    def __init__(self, behind: AsyncCheckpointWriter, path: str) -> None:
        self._behind = behind
        self._path = path
        self._records: list[tuple[str, Any, int]] = []
        self._at_once: Any = None

    def __enter__(self) -> _Captured:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._at_once is not None:
            self._at_once.__exit__(kind, error, trace)
        elif kind is None:
            self._behind._pending.append(self._write)

    def write_record(self, name: str, data: Any, size: int) -> None:
        """As the real one's."""
        if self._at_once is None and isinstance(data, torch.UntypedStorage):
            kept = self._behind.keep(_bytes_of(data)[:size])
            if kept is None:
                self._write_at_once()
            else:
                data = kept.untyped_storage() if size else b""
        elif not isinstance(data, (bytes, str)):  # an address, or what else may change before it is written
            self._write_at_once()
        if self._at_once is None:
            self._records.append((name, data, size))
        else:
            self._behind._arrive()
            FILE_LIKE.of(self._at_once).write_record(name, data, size)

    def __getattr__(self, name: str) -> Any:
        self._write_at_once()
        return getattr(FILE_LIKE.of(self._at_once), name)

    def _write_at_once(self) -> None:
        if self._at_once is None:
            self._at_once = self._open_and_replay()

    def _open_and_replay(self) -> Any:
        assert _plain_open is not None
        self._behind._arrive()
        opened = _plain_open(self._path)
        opened.__enter__()
        for record in self._records:
            FILE_LIKE.of(opened).write_record(*record)
        self._records.clear()
        return opened

    def _write(self) -> None:
        self._open_and_replay().__exit__(None, None, None)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
