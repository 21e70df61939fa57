"""Asynchronous saves: the state is copied in memory, and the files are written while training continues.

A Trainer's save spends its time on checksums and files; copying the state takes a tenth of that. So within
`AsyncCheckpointWriter.capturing` Trainer, PEFT and TRL save as always, in their own order and formats, and what they pass to
``torch.save`` or safetensors is copied at the last moment, when the bytes of a tensor would be written to the file. The same
code of torch and safetensors then writes the same bytes from the copies in a thread; both release the GIL meanwhile.

Serializing what ``torch.save`` gets takes longer than copying it, so the thread does that as well, where `Frozen` can keep it.

Tensors that only a step of an optimizer changes are not even copied within the block: the same thread copies them first, while
the training computes its next gradients, and `StateGate` holds the step back until they are copied.

The same holds for the collective ``torch.distributed.checkpoint.save`` (FSDP's shards; see `shards`). Either all ranks write a
save asynchronously or none does, and it is complete when the last of them has written.

Only writes of the training thread to files named by a path are captured. Verified with torch 2.13 and safetensors 0.8; if the
libraries have changed, files are written at once.
"""

from __future__ import annotations

import ctypes
import logging
import os
import pickle
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
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
from hf_spot.training.saving.finite import Named
from hf_spot.training.saving.frozen import Changeable, Frozen
from hf_spot.training.saving.later_copies import LaterCopies
from hf_spot.training.saving.live_tensors import LiveTensors
from hf_spot.training.saving.shards import StagedPlanner, Unknown, stage
from hf_spot.training.saving.state_gate import StateGate
from hf_spot.training.saving.unwritten import Unwritten, caller
from hf_spot.training.upstream import (
    FILE_LIKE,
    OPEN_ZIPFILE,
    SAVE_ALONE,
    SAVE_INTO_ZIPFILE,
    SAVE_TOGETHER,
    SERIALIZATION_SETTINGS,
    SERIALIZE_FILE,
    STORAGE_HANDLE,
    TENSOR_SPEC,
    TYPES,
    WRITE_RECORD,
)

log = logging.getLogger("hf_spot")

_SHARE = 0.5  # share of the memory that is free at the first save
_CONFIRM_S = 30.0  # no write to a tensor takes so long
_DTYPES = {name: str(dtype).removeprefix("torch.") for name, dtype in (TYPES.find() or {}).items()}
# None if torch or safetensors has changed: files are then written at once, and `hf_spot.training.upstream.check` warns.
_plain_open = OPEN_ZIPFILE.find()
_plain_save = SAVE_INTO_ZIPFILE.find()
_plain_serialize = SERIALIZE_FILE.find()
_plain_save_together = SAVE_TOGETHER.find()


class Refused(Exception):
    """A save could be written, and must not be committed. The argument says why, for people."""


class Refusal(str):
    """Why a save must not be committed, as an error that `AsyncCheckpointWriter.take_error` returns."""


class AsyncCheckpointWriter:
    """Writes the files of saves in a thread, one save after the other.

    Several ranks must capture the same saves. If one rank can't write, the save has failed for all; they learn it when all have
    finished, because only then no rank writes to the folder any more.

    Args:
        limit_bytes: memory for copies; None uses half of what is free at the first save. A file that does not fit is written
            at once, as Trainer does it.
        ranks: an agreement for these saves only, because the training uses its own at the same time.
        share: this rank's share of that memory, if its machine has several.
    """

    def __init__(self, limit_bytes: int | None = None, ranks: Agreement | None = None, share: float = 1.0) -> None:
        self._limit_bytes = limit_bytes
        self._ranks = ranks or Agreement(1)
        self._share = share
        self._arena: Arena | None = None
        self._owner = 0
        self.gate = StateGate()
        self._live: LiveTensors | None = None
        self._later = LaterCopies()
        self._made: dict[int, torch.Tensor] = {}  # copies of this save by the addresses of the tensors
        self._pending: list[Callable[[], None]] = []
        self._forgotten = False
        self._jobs: queue.Queue[tuple[Callable[[], Any], bool] | None] = queue.Queue()
        self._error: str | None = None
        self._in_words: Callable[[BaseException], str] = str
        self._on_touch: Callable[[str, str, float], None] | None = None
        self._unwritten = Unwritten(self._arrived)
        self._writing = threading.RLock()  # held while captured files are written within `capturing`
        self._is_concluded = threading.Condition()
        self._has_warned = False
        self._process = os.getpid()
        self._thread: threading.Thread | None = None
        self.disconnected = False  # a rank has ended: no more collective writes are possible

    def expect(self, size_bytes: int) -> None:
        """Allocate memory for a first save of about this size, in the background."""
        arena = self._make_arena()
        self._submit(lambda: arena.touch(size_bytes))

    def _make_arena(self) -> Arena:
        if self._arena is None:
            limit_bytes = free_bytes() * _SHARE if self._limit_bytes is None else self._limit_bytes
            self._arena = Arena(int(limit_bytes * self._share))
        return self._arena

    @contextmanager
    def capturing(
        self,
        in_words: Callable[[BaseException], str] = str,
        on_error: Callable[[str], None] = lambda why: None,
        on_touch: Callable[[str, str, float], None] | None = None,
        live: LiveTensors | None = None,
        on_opened: Callable[[float], None] = lambda waited_s: None,
        judge: Callable[[], str | None] = lambda: None,
    ) -> Iterator[None]:
        """Copy what this thread saves within the block, and write it after the block.

        Waits for the files of the previous save first, because they use the same memory.

        Args:
            in_words: returns why a file can't be written, for people.
            on_error: called with this text on every rank if a rank could not write, when none writes any more, from the writer
                thread.
            on_touch: makes other code that touches one of the files wait until it is written: within the block it is then
                written at once, unless all ranks write it together. Called with the code and what it does, for people, and
                the seconds that it waited.
            live: tensors that may be copied after the block, while `gate` is shut.
            on_opened: called with the seconds for which the training then waited at the gate.
            judge: called from the writer thread when such tensors are copied and it is known whether they were written to
                meanwhile; returns why the save must not be committed, or None.
        """
        self.wait()
        self._in_words = in_words
        self._on_touch = on_touch
        self._make_arena().clear()
        self._owner = threading.get_ident()
        self._pending, self._forgotten = [], False
        self._live, self._later, self._made = live, LaterCopies(), {}
        try:
            with (
                SAVE_TOGETHER.replaced(torch.distributed.checkpoint, self._capture_together),
                OPEN_ZIPFILE.replaced(torch.serialization, lambda plain: self._open),
                SAVE_INTO_ZIPFILE.replaced(torch.serialization, lambda plain: self._save),
                SERIALIZE_FILE.replaced(safetensors.torch, lambda plain: self._serialize),
                taken_over(self._take),
                self._unwritten.strict() if on_touch else nullcontext(),
            ):
                yield
        except BaseException:
            self._owner = 0
            self._end_waits()
            raise
        finally:
            self._live, self._made = None, {}
        with self._writing:
            self._owner = 0
            if self._forgotten:
                self._end_waits()
                return
            pins, later = bool(self._pending), self._later
            if live is not None:
                self.gate.shut(later, on_opened)
                self._submit(later.run, always=True)
            while self._pending:
                write = self._pending.pop(0)
                # The other ranks wait for this one in the collective write.
                self._submit(write, always=isinstance(write, _CollectiveWrite))
            if pins:
                self._submit(self._make_arena().pin)  # so that the next save copies faster
            if live is not None:
                self._submit(lambda: self._judge(later, judge))
            self._submit(lambda: self._conclude(on_error), always=True)

    def examine(self, tensors: Iterable[Named]) -> tuple[LaterCopies, list[Named]]:
        """Have the writer thread check the copies of tensors for NaN; return who knows, and the tensors that it can't check.

        Call it within `capturing`, after everything was saved.
        """
        left = []
        for name, tensor in tensors:
            plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and not tensor.is_sparse
            address = tensor.data_ptr() if plain else 0
            if address and self._later.holds(address):
                continue
            copy = self._made.get(address)
            if copy is not None and tensor.is_contiguous() and copy.numel() == tensor.nbytes:
                self._later.add_made(address, copy, tensor.dtype)
            else:
                left.append((name, tensor))
        return self._later, left

    def write_text(self, path: Path, text: str) -> None:
        """Write a small file: behind the training within `capturing`, else at once. Its folder must be there."""

        def write() -> None:
            path.write_text(text)

        if threading.get_ident() == self._owner:
            self._keep_for_later(str(path), write)
        else:
            write()

    def call(self, path: Path, write: Callable[[], None]) -> None:
        """Have a file written by a function that reads nothing that may change: behind the training within `capturing`.

        Args:
            path: of the file.
            write: writes it, perhaps in another thread.
        """
        if threading.get_ident() == self._owner:
            self._keep_for_later(str(path), write)
        else:
            write()

    @staticmethod
    def ours() -> AbstractContextManager[None]:
        """Let this thread look at files within the block that are not written yet, without waiting for them."""
        return Unwritten.ours()

    def telling(self) -> AbstractContextManager[None]:
        """Let code within the block, which is told of a save and may read it, wait until its files are written.

        It waits when it touches one of them, starts a process, or connects to a server.
        """
        return self._unwritten.strict(told=True)

    @property
    def failed(self) -> bool:
        """Return whether the newest save could not be written."""
        return self._error is not None

    def forget(self) -> None:
        """Discard what was captured. Call it within `capturing`, on all ranks or on none."""
        self._pending.clear()
        self._forgotten = True

    def then(self, act: Callable[[], None]) -> None:
        """Call ``act`` once all ranks have written what was captured so far, or at once if they have; never after a failure."""
        if self._jobs.unfinished_tasks:
            self._submit(act)
        elif self._error is None:
            act()

    def then_together(self, act: Callable[[Agreement], None]) -> None:
        """Call ``act`` as `then` does, for a collective. All ranks must call it.

        Args:
            act: called with the agreement of these ranks.
        """

        def agreed() -> None:
            if not self.disconnected and not any(self._ranks.gather(self._error is not None)):
                act(self._ranks)

        if self._jobs.unfinished_tasks:
            self._submit(agreed, always=True)
        else:
            agreed()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until everything is written; return False if it is not within ``timeout_s`` seconds.

        A forked child, which has no writer thread, does not wait.
        """
        if os.getpid() != self._process:
            return True
        if timeout_s != 0:
            self.gate.pass_through()  # what is written waits for it
        with self._jobs.all_tasks_done:
            return self._jobs.all_tasks_done.wait_for(lambda: not self._jobs.unfinished_tasks, timeout_s)

    def take_error(self) -> str | None:
        """Return why the newest save could not be written by any rank, once; None if it was.

        The reason is text: the exception itself would keep half-written files open and their disk space in use.
        """
        error, self._error = self._error, None
        return error

    def close(self) -> None:
        """Wait for the files, end the thread and release the memory."""
        if os.getpid() != self._process:
            return
        if self._thread is not None:
            self.wait()
            self._jobs.put(None)
            self._thread.join()
            self._end_waits()
            self._thread, self._jobs = None, queue.Queue()
        self.gate.close()
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    # -- in place of what writes ----------------------------------------------------------------------------------------

    def _open(self, file: Any) -> Any:
        assert _plain_open is not None
        known = FILE_LIKE.trouble() is None and WRITE_RECORD.trouble() is None
        if threading.get_ident() != self._owner or not isinstance(file, str) or not known:
            return _plain_open(file)
        return _Captured(self, os.path.abspath(file))

    def _save(self, obj: Any, zip_file: Any, pickle_module: Any, protocol: int, without_byteorder: bool) -> None:
        settings = SERIALIZATION_SETTINGS.find()
        usual = pickle_module is pickle and settings is not None and not settings.skip_data
        if usual and isinstance(zip_file, _Captured) and STORAGE_HANDLE.trouble() is None:
            with suppress(Changeable):
                frozen = Frozen(obj)
                if (copies := self._keep_storages(frozen.storages)) is not None:
                    zip_file.serialize_later(frozen.value, copies, protocol, without_byteorder)
                    return
        assert _plain_save is not None
        _plain_save(obj, zip_file, pickle_module, protocol, without_byteorder)

    def _keep_storages(self, storages: dict[int, torch.UntypedStorage]) -> dict[int, torch.Tensor] | None:
        """Return copies of the memory of tensors by its handle; None if there is no room."""
        copies = {}
        for handle, storage in storages.items():
            later = self._keep_later(storage.data_ptr(), storage.nbytes())
            kept = self.keep(_bytes_of(storage)) if later is None else later
            if kept is None:
                return None
            copies[handle] = kept
        return copies

    def _serialize(self, tensors: Any, filename: Any, metadata: Any = None) -> None:
        kept = self._keep_all(tensors) if threading.get_ident() == self._owner else None
        if kept is None:
            self._arrive()
            _plain_serialize(tensors, filename, metadata=metadata)
            return
        specs, copies = kept
        filename = os.path.abspath(filename)  # the script may change its directory before the file is written

        def write() -> None:
            self._arrive()
            _plain_serialize(specs, filename, metadata=metadata)
            copies.clear()  # the copies must exist until the file is written

        self._keep_for_later(filename, write)

    def _capture_together(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def save(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._owner or (self._ranks.alone and SAVE_ALONE.trouble() is not None):
                return plain(*args, **kwargs)
            staged, why = self._stage(args, kwargs)
            reasons = [one for one in self._ranks.gather(why) if one is not None]
            if reasons:
                self._warn_once(reasons[0])
            if reasons or staged is None:
                return plain(*args, **kwargs)
            writer = kwargs["storage_writer"]
            self._keep_for_later(os.path.abspath(writer.path), _CollectiveWrite(self, staged, writer))
            return None

        return save

    def _keep_for_later(self, path: str, write: Callable[[], None]) -> None:
        self._pending.append(write)
        if self._on_touch is not None:
            self._unwritten.add(path)

    def _arrived(self, touch: str) -> None:
        """Return when what is unwritten is written. Called in the thread of the code that touches it."""
        if threading.current_thread() is self._thread:
            return
        began = time.monotonic()
        with self._writing:
            within = self._owner != 0
            # What ranks write together can't be written by one of them, and stays for later.
            while within and self._pending and not isinstance(self._pending[0], _CollectiveWrite):
                try:
                    self._pending.pop(0)()
                except BaseException as error:
                    self._error = self._error or self._in_words(error) or repr(error)
                    raise
            if within and not self._pending:
                self._end_waits()
        if not within:
            self.gate.pass_through()
            with self._is_concluded:
                self._is_concluded.wait_for(lambda: not self._unwritten)
        if self._on_touch is not None:
            self._on_touch(caller(), touch, time.monotonic() - began)

    def _end_waits(self) -> None:
        with self._is_concluded:
            self._unwritten.clear()
            self._is_concluded.notify_all()

    def _stage(self, args: tuple[Any, ...], save: dict[str, Any]) -> tuple[StagedPlanner | None, str | None]:
        """Return what this rank writes, or why it can't be copied."""
        assert self._arena is not None
        try:
            if args:
                raise Unknown("its arguments are positional")
            staged = stage(self._arena.copy, is_coordinator=self._ranks.is_main, **save)
        except Exception as error:  # the other ranks wait for an answer; torch's own save will raise the actual error
            words = str(error) if isinstance(error, Unknown) else repr(error)
            return None, f"sharded checkpoints are written while training waits: {words}"
        return staged, None if staged is not None else self._too_large()

    def _keep_all(self, tensors: Any) -> tuple[dict[str, Any], list[torch.Tensor]] | None:
        specs, copies, described = {}, [], TENSOR_SPEC.find()
        for name, spec in tensors.items():
            if described is None or not isinstance(spec, described) or spec.dtype not in _DTYPES:
                return None
            copy = self.keep(_bytes_at(spec.data_ptr, spec.data_len))
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
        self._later.finish()

    def keep(self, source: torch.Tensor) -> torch.Tensor | None:
        """Return a copy of these bytes; None if there is no room, which is logged once."""
        assert self._arena is not None
        if source.device.type == "cpu" and self._arena.holds(source.data_ptr()):
            return source  # just copied from a device
        copy = self._keep_later(source.data_ptr(), source.numel())
        if copy is None:
            copy = self._arena.copy(source)
            if copy is not None and self._live is not None:
                self._made[source.data_ptr()] = copy
        if copy is None:
            self._warn_once(self._too_large())
        return copy

    def _keep_later(self, address: int, count: int) -> torch.Tensor | None:
        """Return memory in which these bytes will be; None if they must be copied now, or if there is no room."""
        live = None if self._live is None else self._live.at(address, count)
        if live is None or self._arena is None or (target := self._arena.reserve(count)) is None:
            return None
        self._later.add(live, target)
        return target

    def _too_large(self) -> str:
        assert self._arena is not None
        return (
            f"a checkpoint does not fit into the {self._arena.limit_bytes / 1e9:.1f} GB of memory that saves may use: the "
            "rest of it is written while training waits"
        )

    def _warn_once(self, why: str) -> None:
        if not self._has_warned and self._ranks.is_main:
            log.warning("%s", why)
        self._has_warned = True

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
            if self._error is None or (always and not self.disconnected):
                try:
                    act()
                except Refused as refused:
                    self._error = self._error or Refusal(refused)
                except BaseException as error:  # reported to the training thread: see `take_error`
                    self._error = self._error or self._in_words(error) or repr(error)
            del act, job  # releases the copies
            self._jobs.task_done()

    def _judge(self, later: LaterCopies, judge: Callable[[], str | None]) -> None:
        if not later.is_confirmed(_CONFIRM_S):
            self.gate.confirm_without_training(later)
        if (why := judge()) is not None:
            raise Refused(why)

    def _conclude(self, on_error: Callable[[str], None]) -> None:
        """End a save: wait until no rank writes any more, and find out on all of them whether one failed."""
        try:
            errors = self._ranks.gather(self._error)
        except Exception as error:
            self._disconnect(error)
            raise
        self._error = next((error for error in errors if error is not None), None)
        try:
            if self._error is not None:
                on_error(self._error)
        finally:
            self._end_waits()

    def _disconnect(self, error: BaseException) -> None:
        """Stop collective writes, because a rank has ended during one.

        The incomplete folder stays, because other ranks may be writing to it; the next start sets it aside.
        """
        log.warning("a checkpoint is left incomplete, because a rank has ended: %s", error)
        self.disconnected = True
        self._end_waits()
        self._ranks.close()  # so that ranks that wait for this one get an error


class _CollectiveWrite:
    """Writes the staged part of a sharded save, together with the other ranks."""

    def __init__(self, behind: AsyncCheckpointWriter, staged: StagedPlanner, writer: Any) -> None:
        self._behind = behind
        self._staged = staged
        self._writer = writer
        # The current device is per thread, and by default the machine's first: all ranks would allocate memory there.
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1  # type: ignore[no-untyped-call]

    def __call__(self) -> None:
        ranks = self._behind._ranks
        # Never the training's own group, which is in use.
        how: dict[str, Any] = {"no_dist": True} if ranks.alone else {"process_group": ranks.group}
        self._behind._arrive()
        try:
            with torch.cuda.device(self._device):
                _plain_save_together({}, storage_writer=self._writer, planner=self._staged, **how)
        except CheckpointException as error:  # raised on all ranks; each reports its own error: see `_conclude`
            if (rank := 0 if ranks.alone else torch.distributed.get_rank()) in error.failures:
                raise error.failures[rank][0] from None
        except Exception as error:
            self._behind._disconnect(error)
            raise


class _Captured:
    """Replaces ``torch._C.PyTorchFileWriter`` in ``torch.save``: stores the records, and replays them later."""

    def __init__(self, behind: AsyncCheckpointWriter, path: str) -> None:
        self._behind = behind
        self._path = path
        self._records: list[tuple[str, Any, int]] = []
        self._unserialized: tuple[Any, dict[int, torch.Tensor], int, bool] | None = None
        self._at_once: Any = None

    def __enter__(self) -> _Captured:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._at_once is not None:
            self._at_once.__exit__(kind, error, trace)
        elif kind is None:
            self._behind._keep_for_later(self._path, self._write)

    def serialize_later(self, value: Any, copies: dict[int, torch.Tensor], protocol: int, without_byteorder: bool) -> None:
        """Have the whole content serialized when the file is written.

        Args:
            value: as `Frozen` returns it.
            copies: of its tensors' memory, by the handle of that; complete once they have arrived.
            protocol: of pickle.
            without_byteorder: as in ``torch.save``.
        """
        self._unserialized = value, copies, protocol, without_byteorder

    def write_record(self, name: str, data: Any, size: int) -> None:
        """Store a record, or write it at once if it can't be copied. The parameters are those of torch's method."""
        if self._at_once is None and isinstance(data, torch.UntypedStorage):
            kept = self._behind.keep(_bytes_of(data)[:size])
            if kept is None:
                self._write_at_once()
            else:
                data = kept.untyped_storage() if size else b""
        elif not isinstance(data, (bytes, str)):  # an address, or another value that may change before it is written
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
        try:
            for record in self._records:
                FILE_LIKE.of(opened).write_record(*record)
            if self._unserialized is not None:
                value, copies, protocol, without_byteorder = self._unserialized
                assert _plain_save is not None
                _plain_save(value, _FromCopies(FILE_LIKE.of(opened), copies), pickle, protocol, without_byteorder)
        except BaseException as error:
            with suppress(Exception):  # ends the file: torch's destructor would try to, and abort the process if it can't
                opened.__exit__(type(error), error, error.__traceback__)
            raise
        self._records.clear()
        self._unserialized = None
        return opened

    def _write(self) -> None:
        self._open_and_replay().__exit__(None, None, None)


class _FromCopies:
    """Writes the copies of tensors instead of their memory into a file that ``torch.save`` writes.

    Args:
        file: a ``torch._C.PyTorchFileWriter``.
        copies: by the handles of the memory.
    """

    def __init__(self, file: Any, copies: dict[int, torch.Tensor]) -> None:
        self._file = file
        self._copies = copies

    def write_record(self, name: str, data: Any, size: int) -> None:
        """Write a record. The parameters are those of torch's method."""
        if isinstance(data, torch.UntypedStorage):
            data = self._copies[STORAGE_HANDLE.of(data)].untyped_storage() if size else b""
        self._file.write_record(name, data, size)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _bytes_at(address: int, count: int) -> torch.Tensor:
    if not count:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer((ctypes.c_char * count).from_address(address), dtype=torch.uint8)
