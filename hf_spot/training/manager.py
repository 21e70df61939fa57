"""SpotCheckpointManager: checkpoints of a loop of one's own, in a run like that of a Trainer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError, Fenced, SpotError, StoreError, TrainingPreempted
from hf_spot.notices.notice import NoticeKind, PreemptionNotice
from hf_spot.policy.preemption import Action, Decision, Measured, decide, gives_way
from hf_spot.policy.restarts import patience_s
from hf_spot.run.hook import Hook, hook_url
from hf_spot.run.journal import CheckpointRef
from hf_spot.run.machine import about_this_machine
from hf_spot.run.progress import Bar, alert, show_log
from hf_spot.run.restore import bring, restore_newest, take
from hf_spot.run.run import Checkpoint, CommitRequest, Run
from hf_spot.run.upload import Uploader
from hf_spot.runtime import STORE_VARIABLE, Runtime, StepCounter
from hf_spot.storage.local import LocalStore
from hf_spot.storage.store import ObjectStore
from hf_spot.training.agreement import Agreement
from hf_spot.training.disks import Disk, check_writable, find_disk
from hf_spot.training.generators import capture, capture_gpus, restore
from hf_spot.training.journalist import Journalist
from hf_spot.training.listener import Listener
from hf_spot.training.loaders import Loaders
from hf_spot.training.loop_states import AcceleratorState, LoopState, PlainState
from hf_spot.training.timing import Timing

log = logging.getLogger("hf_spot")

T = TypeVar("T")

_FORMAT = "hf_spot loop 1"
_NEVER = 1e18  # seconds, for a notice that names no deadline
_LAST_WORD_S = 5.0
_LOOK_S = 0.02
_FAILED_DRAIN_S = 60.0


class LoopManager:
    """What `SpotCheckpointManager` and `AcceleratorCheckpointManager` have in common; they differ in what they are given.

    Args:
        checkpoint_dir: the run; None is that of `hf-spot launch`.
        save_every_n_steps: for the loop to read.
        args: settings; None takes those of `hf-spot launch`, or the defaults.
        local_dir: for files on their way.
        now: the wall clock.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        checkpoint_dir: str | os.PathLike[str] | ObjectStore | None = None,
        save_every_n_steps: int = 500,
        *,
        args: SpotArguments | None = None,
        local_dir: str | os.PathLike[str] | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if isinstance(save_every_n_steps, bool) or not isinstance(save_every_n_steps, int) or save_every_n_steps < 1:
            raise ConfigError(
                f"save_every_n_steps={save_every_n_steps!r} must be a whole number of steps, 1 or more",
                hint="SpotCheckpointManager(checkpoint_dir, save_every_n_steps=500)",
            )
        show_log()
        self.save_every_n_steps = save_every_n_steps
        self._runtime = Runtime.from_environ(os.environ)
        self._arguments = args or (self._runtime.arguments if self._runtime else SpotArguments())
        self.run = Run(
            self._url(checkpoint_dir),
            allow_unfenced_store=self._arguments.allow_unfenced_store,
            workers=self._arguments.upload_workers,
        )
        self._local_dir = _local_dir(self.run.store, local_dir)
        self._now, self._clock = now, clock
        self._process = os.getpid()
        self._begun = self._closed = False
        self._saved_step: int | None = None
        self._decision: Decision | None = None  # what the notice led to
        self._gone_at: float | None = None  # by this process's clock
        self._left = False
        self._save_s: float | None = None
        self._size_bytes: int | None = None
        self._steps: StepCounter | None = None
        self._step = 0
        self._timing = Timing(now, clock)
        self._told_advisories: set[str] = set()
        self._uploader: Uploader | None = None
        self._closing = contextlib.ExitStack()
        self._hook = Hook(None if self._runtime else hook_url(self._arguments, os.environ), self.run.url)
        self._closing.callback(self._hook.close)
        self._journalist = Journalist(self.run, self._hook)
        self._closing.callback(self._journalist.close)
        self._listener = Listener(self._arguments, self._runtime, self._hears)
        self._closing.callback(self._listener.close)
        # `atexit` is not heard in processes that multiprocessing has started (``accelerate.notebook_launcher``).
        self._closing.callback(Finalize(None, self._at_exit, exitpriority=100).cancel)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.run.url!r}, save_every_n_steps={self.save_every_n_steps})"

    # -- what a loop asks ---------------------------------------------------------------------------------------------

    @property
    def interrupted(self) -> bool:
        """Whether the machine is being taken: save now, and leave the loop. With several ranks each must ask, equally often,
        and all get the same answer at the same step.

        Raises:
            Fenced: a newer launch owns the run.
        """
        self._begin()
        if self._decision is not None:
            return True
        notice = self._listener.heard_end()
        left = notice.seconds_left(self._now()) if notice else None
        fenced = self._uploader is not None and self._uploader.fenced is not None
        self._agreement.ask(float(notice is not None), 0.0, float(fenced), -_NEVER if left is None else -left, 0.0)
        terminate, _, fence, soonest, _ = self._agreement.answer()
        if fence:
            raise self._fenced()
        self._tell_advisory()
        if not terminate:
            return False
        seconds_left = None if soonest == -_NEVER else -soonest
        self._decision = self._agreement.from_main(lambda: self._decide(seconds_left, notice))
        self._gone_at = None if seconds_left is None else self._clock() + seconds_left
        return True

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until everything saved so far is committed.

        Args:
            timeout_s: how long at most, in seconds; None is ``SpotArguments(drain_timeout_s=…)``.

        Raises:
            StoreError: it is not.
            Fenced: a newer launch owns the run.
        """
        if self._begun and not self._closed:
            self._agreement.together(lambda: self._wait(self._arguments.drain_timeout_s if timeout_s is None else timeout_s))

    def finish(self) -> None:
        """The loop has come to its end: waits for the last commit, and says in the journal that the run is finished.

        `hf-spot launch` then has nothing left to do for this run. What has not been saved is not in it. After an interruption
        nothing is finished.

        Raises:
            TrainingPreempted: the loop was left for an interruption.
            StoreError: the last checkpoint could not be committed.
            Fenced: a newer launch owns the run.
        """
        if self._closed:
            return
        self._begin()
        try:
            if self._decision is not None:
                self._leave(self._step)
                raise self._preempted()
            self.wait()
            committed = self._agreement.from_main(lambda: self._committed_step())
            if self._agreement.is_main:
                data = {"step": committed, "stage": 1, **self._timing.to_details(committed)}
                self._journalist.record("finished", data, patience_s=self._arguments.drain_timeout_s)
        finally:
            self.close()

    def close(self) -> None:
        """Stops listening, watching and uploading; waits for nothing. `finish`, or the end of a ``with`` block, calls it."""
        if self._closed or os.getpid() != self._process:
            return
        self._closed = True
        self._closing.close()
        if self._begun and dist.is_available() and (self._agreement.alone or dist.is_initialized()):
            self._agreement.close()

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            self.finish()
        elif not self._closed and os.getpid() == self._process:
            self._end_badly(error)

    # -- the start ----------------------------------------------------------------------------------------------------

    def _url(self, checkpoint_dir: str | os.PathLike[str] | ObjectStore | None) -> Any:
        told = self._runtime.store if self._runtime else os.environ.get(STORE_VARIABLE)
        if checkpoint_dir is None:
            if told is None:
                raise ConfigError(
                    f"no checkpoint_dir, and ${STORE_VARIABLE} is not set",
                    hint='SpotCheckpointManager("s3://bucket/runs/my-run"), or hf-spot launch --store …',
                )
            return told
        given = os.fspath(checkpoint_dir) if isinstance(checkpoint_dir, os.PathLike) else checkpoint_dir
        if self._runtime is not None and Run(given).url != Run(self._runtime.store).url:
            raise ConfigError(
                f"the script says checkpoint_dir={str(given)!r}, hf-spot launch says --store {self._runtime.store}",
                hint=f"hf-spot launch --store {given} …, or SpotCheckpointManager() without a directory",
            )
        return given

    def _begin(self) -> None:
        """Takes the run, when it is first used: ranks may not know each other before."""
        if self._closed:
            raise ConfigError("this manager is closed: its loop has ended", hint="make a new SpotCheckpointManager")
        if self._begun:
            return
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if ranks == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torch.distributed is not initialised",
                hint="torch.distributed.init_process_group(…), or Accelerator(), before manager.load_latest(…)",
            )
        self._rank = dist.get_rank() if ranks > 1 else 0
        self._ranks = ranks
        self._agreement = Agreement(ranks)
        self._agreement.together(partial(check_writable, self._local_dir, setting="SpotCheckpointManager(…, local_dir=…)"))
        self._disk: Disk = find_disk(
            self._agreement, self._rank, int(os.environ.get("LOCAL_RANK", self._rank)), self._local_dir
        )
        epoch = self._agreement.from_main(self._claim)
        self._agreement.together(lambda: self._follow(epoch))
        self._on_each_disk(lambda: _empty(self._local_dir))  # of what was on its way when an earlier launch was killed
        if self._disk.leads:
            self._uploader = Uploader(
                self.run,
                self._local_dir / ".hf_spot" / f"pins-{epoch}",
                save_total_limit=self._arguments.save_total_limit,
                keeps_house=self._agreement.is_main,
            )
            self._closing.callback(self._uploader.close)
        scratch = self._local_dir / ".hf_spot" / f"workers-{self._rank}"
        self._loaders = Loaders(scratch, self._iteration_begins, ranks)
        self._loaders.watch()
        self._closing.callback(shutil.rmtree, scratch, ignore_errors=True)
        self._closing.callback(self._loaders.close)
        if self._runtime is not None:
            self._runtime.training_path.touch()
            self._closing.callback(self._runtime.training_path.unlink, missing_ok=True)
            self._steps = StepCounter(self._runtime.step_path) if self._agreement.is_main else None
        self._begun = True

    def _claim(self) -> int:
        if self._runtime is not None:
            self.run.adopt(self._runtime.epoch)
            self._timing.claimed(self._runtime.claimed_at)
        else:
            about = {**about_this_machine("SpotCheckpointManager", os.environ), "stage": 1}
            log.info("launch %d of %s", self.run.claim(about), self.run.url)
            self._timing.claimed(self.run.journal.claimed_at)
            self._hook.tell(f"launch {self.run.epoch} has begun on {about['hostname']}")
        return self.run.epoch

    def _follow(self, epoch: int) -> None:
        """The leaders of other disks write under the claim of rank 0."""
        if self._disk.leads and self.run.epoch != epoch:
            if self.run.state().epoch < epoch:
                raise ConfigError(
                    f"{os.uname().nodename} does not see launch {epoch} in {self.run.url}: the machines need one store",
                    hint="s3://bucket/prefix, or a directory on a file system that all machines share",
                )
            self.run.adopt(epoch)

    def _on_each_disk(self, act: Callable[[], T]) -> T:
        """The leader of each disk acts; every rank gets what rank 0's act gave."""
        result = self._agreement.together(lambda: act() if self._disk.leads else None)
        return self._agreement.from_main(lambda: cast(T, result))

    # -- restoring ----------------------------------------------------------------------------------------------------

    def _load(self, state: LoopState, optimizer: Any = None) -> tuple[int, int]:
        self._begin()
        if self._saved_step is not None:
            self.wait()  # what was saved may be what is asked for
        began = self._clock()
        refs = self._agreement.from_main(lambda: list(self.run.state().checkpoints))
        found = restore_newest(refs, self._bring, self.run.url)
        self._count_steps(optimizer)
        if found is None:
            return 0, 0
        checkpoint, folder = found
        try:
            told = self._agreement.together(lambda: self._read(state, folder))
        finally:
            self._on_each_disk(lambda: shutil.rmtree(folder, ignore_errors=True))
        self._saved_step = self._step = checkpoint.step
        self._timing.restored(self._clock() - began)
        log.info("going on from step %d, committed by launch %d", checkpoint.step, checkpoint.ref.epoch)
        return checkpoint.step, int(told["epoch"])

    def _bring(self, ref: CheckpointRef) -> tuple[Checkpoint, Path]:
        ranks = None if self._disk.count == 1 else self._disk.ranks

        def act() -> tuple[Checkpoint, Path]:
            if self._runtime is not None:
                take(self._runtime, ref.entry, self._local_dir, lambda: time.sleep(_LOOK_S))
            progress = partial(Bar, "restore")
            return bring(self.run, ref, self._local_dir, ranks=ranks, world_size=self._ranks, progress=progress)

        return self._on_each_disk(act)

    def _read(self, state: LoopState, folder: Path) -> dict[str, Any]:
        told: dict[str, Any] = json.loads((folder / "trainer_state.json").read_bytes())
        if told.get("format") != _FORMAT:
            raise ConfigError(
                f"{folder.name} of {self.run.url} was not saved by a SpotCheckpointManager, but by Trainer",
                hint="SpotCallback for that run; another checkpoint_dir for this loop",
            )
        state.read(folder)
        path = folder / self._random_name
        if not path.exists():
            log.warning("rank %d was not there before: it draws what rank 0 drew", self._rank)
            path = next(folder.glob("rng_state*.pth"))
        # Verified by the journal's digest, as everything that is unpickled here.
        random = torch.load(path, map_location="cpu", weights_only=False)
        self._loaders.resume(random["loaders"], random["now"], folder, random["ranks"])
        if random["ranks"] != self._ranks and self._agreement.is_main:
            log.warning("%d ranks trained this, and now %d do: not the same bits", random["ranks"], self._ranks)
        restore(random["now"])
        return told

    @property
    def _random_name(self) -> str:
        return "rng_state.pth" if self._ranks == 1 else f"rng_state_{self._rank}.pth"

    def _count_steps(self, optimizer: Any) -> None:
        """Tells the launcher of steps between two saves, which it can't hear from a loop."""
        inner = getattr(optimizer, "optimizer", optimizer)
        if self._steps is None or not hasattr(inner, "register_step_post_hook"):
            return

        def stepped(*_: Any) -> None:
            self._step += 1
            if self._steps is not None:
                self._steps.tell(self._step)

        self._closing.callback(inner.register_step_post_hook(stepped).remove)

    def _iteration_begins(self) -> None:
        if self._left:
            raise self._preempted()  # nobody would keep what it trains, and an evaluation would take what time is left
        if self._timing.step_begins(self._step):
            log.debug("the first batch is asked for")

    # -- saving -------------------------------------------------------------------------------------------------------

    def _save(self, state: LoopState, step: int, epoch: int, loss: Any, dataloader: Any) -> None:
        self._begin()
        self._check_step(step)
        if self._left and step != self._saved_step:
            raise self._preempted()
        self._step = step
        finishes_only = self._decision is not None and self._decision.action is Action.FINISH_UPLOAD_AND_STOP
        if step != self._saved_step and not finishes_only:
            self._timing.step_begins(max(0, step - 1))
            self._save_now(state, step, epoch, loss, dataloader)
        if self._decision is not None:
            self._leave(step)

    def _check_step(self, step: int) -> None:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ConfigError(f"step={step!r} is no number of steps", hint="step += 1 after each optimizer.step()")
        if self._saved_step is not None and step < self._saved_step:
            raise ConfigError(
                f"step={step} comes after step {self._saved_step}: steps count through all epochs",
                hint="step, epoch = manager.load_latest(model, optimizer, scheduler), and step += 1 from there",
            )

    def _save_now(self, state: LoopState, step: int, epoch: int, loss: Any, dataloader: Any) -> None:
        began = self._clock()
        folder = self._local_dir / f"checkpoint-{step}"
        only = None if dataloader is None else list(dataloader) if isinstance(dataloader, (list, tuple)) else [dataloader]
        self._on_each_disk(lambda: _empty(folder))
        told = {
            "format": _FORMAT,
            "global_step": step,
            "step": step,
            "epoch": epoch,
            "loss": _number(loss),
        }

        def write() -> None:
            now = capture() | capture_gpus()
            loaders = self._loaders.save(folder, self._rank, only)
            torch.save({"now": now, "loaders": loaders, "ranks": self._ranks}, folder / self._random_name)
            state.write(folder, is_main=self._agreement.is_main)
            if self._agreement.is_main:
                (folder / "trainer_state.json").write_text(json.dumps(told, indent=2))

        try:
            self._agreement.together(lambda: self._explained(write, folder))
        except SpotError as error:
            self._on_each_disk(lambda: shutil.rmtree(folder, ignore_errors=True))
            if isinstance(error, ConfigError) or (self._decision is None and self._arguments.on_save_error == "stop"):
                self._agreement.together(lambda: self._drain(self._patience_s()))
                raise
            log.error("%s; %s", error.args[0], "the last commit stands" if self._decision else "the next save tries again")
            return
        self._saved_step = step
        self._save_s = self._clock() - began
        self._timing.stalled(self._save_s)
        seconds = round(self._save_s, 3)
        request = CommitRequest(
            step=step,
            reason="schedule" if self._decision is None else "notice",
            world_size=self._ranks,
            part=self._disk.index,
            parts=self._disk.count,
            details={
                "epoch_of_data": epoch,
                "output_dir": str(self._local_dir),
                "save_s": seconds,
                "stall_s": seconds,
                **self._timing.to_details(step),
            },
        )
        self._on_each_disk(lambda: self._submit(folder, request))

    def _explained(self, write: Callable[[], None], folder: Path) -> None:
        try:
            write()
        except Exception as error:
            from hf_spot.training.saves import is_of_a_disk  # imports transformers, which a loop may do without

            if isinstance(error, SpotError) or not is_of_a_disk(error):
                raise
            free_gb = shutil.disk_usage(self._local_dir).free / 1e9
            raise StoreError(
                f"{folder.name} can't be saved: {error}; {os.uname().nodename}:{self._local_dir} has {free_gb:.1f} GB free",
                hint=f"df -h {self._local_dir}; free some space and start the same command again: it goes on from the newest "
                "commit. To train on without it: SpotArguments(on_save_error='go-on')",
            ) from None  # its traceback holds half-written files open, whose space must become free

    def _submit(self, folder: Path, request: CommitRequest) -> None:
        assert self._uploader is not None
        self._size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        try:
            self._uploader.submit(folder, request)
        except OSError as error:
            log.error("%s can't be queued for upload, training goes on: %s", folder, error)
        else:
            shutil.rmtree(folder, ignore_errors=True)  # its files live on under the uploader's names until they are committed

    # -- interruptions ------------------------------------------------------------------------------------------------

    def _hears(self, notice: PreemptionNotice) -> None:
        left = notice.seconds_left(self._now())
        told = f"{notice.kind.value} from {notice.source}{'' if left is None else f', {left:.0f} s left'}"
        alert(told)
        self._hook.tell(told)

    def _tell_advisory(self) -> None:
        notice = self._listener.heard() if self._runtime is None else None
        if notice is None or notice.kind is not NoticeKind.ADVISORY or notice.id in self._told_advisories:
            return
        self._told_advisories.add(notice.id)
        if self._agreement.is_main:
            self._journalist.record(
                "notice", {**json.loads(notice.to_json()), "why": "the machine may be taken"}, patience_s=0.0
            )

    def _measured(self) -> Measured:
        measured = self._uploader.measured() if self._uploader else Measured()
        return replace(measured, save_s=self._save_s, size_bytes=self._size_bytes)

    def _decide(self, seconds_left: float | None, notice: PreemptionNotice | None) -> Decision:
        decision = decide(NoticeKind.TERMINATE, seconds_left, self._measured())
        told = f"terminate from {notice.source if notice else 'another rank'}: {decision.action.value} ({decision.why})"
        log.warning("%s", told)
        if self._runtime is None and notice is not None:
            # The journal may be slow to answer, and the loop shall not wait for it.
            self._journalist.record("notice", {**json.loads(notice.to_json()), "why": decision.why}, patience_s=0.0)
        return decision

    def _patience_s(self) -> float:
        left = None if self._gone_at is None else self._gone_at - self._clock()
        return patience_s(left, training=True, drain_timeout_s=self._arguments.drain_timeout_s)

    def _leave(self, step: int) -> None:
        """The machine goes: what is saved gets committed before this returns, if there is time for it."""
        assert self._decision is not None
        if self._left:
            return
        self._left = True
        left_s = None if self._gone_at is None else self._gone_at - self._clock()
        give_way = self._agreement.from_main(lambda: gives_way(left_s, self._measured()))
        if self._uploader is not None:
            self._uploader.hurry(give_way=give_way)
        self._agreement.together(lambda: self._drain(self._patience_s()))
        if self._uploader is not None and self._uploader.fenced is not None and self._agreement.alone:
            raise self._uploader.fenced
        if self._agreement.is_main:
            committed = self._committed_step()
            data = {"step": step, "committed_step": committed, "stage": 1, "why": self._decision.why}
            self._journalist.record("preempted", {**data, **self._timing.to_details(step)}, patience_s=_LAST_WORD_S)
            log.warning("%s", self._preempted())

    def _committed_step(self) -> int:
        newest = self.run.journal.state.latest()
        return newest.step if newest else 0

    def _preempted(self) -> TrainingPreempted:
        committed = self._agreement.from_main(self._committed_step) if self._agreement.alone else self._saved_step or 0
        return TrainingPreempted(
            f"preempted at step {self._step}; step {committed} is committed to {self.run.url}. "
            "Start the same command again to go on.",
            step=committed or None,
        )

    # -- the end ------------------------------------------------------------------------------------------------------

    def _fenced(self) -> Fenced:
        fenced = self._uploader.fenced if self._uploader is not None else None
        return fenced or Fenced(f"a newer launch owns {self.run.url}")

    def _drain(self, timeout_s: float) -> bool:
        if self._uploader is None:
            return True
        drained = self._uploader.drain(timeout_s)
        if not drained and self._uploader.fenced is None:
            log.error(
                "the newest checkpoint is not in %s: %s", self.run.url, self._uploader.trouble or "the upload took too long"
            )
        return drained

    def _wait(self, timeout_s: float) -> None:
        if self._uploader is None:
            return
        drained = self._uploader.drain(timeout_s, lambda: self._listener.heard_end() is not None and self._decision is None)
        if self._uploader.fenced is not None:
            raise self._uploader.fenced
        if not drained and self._listener.heard_end() is not None:  # no longer than the machine lives
            left = self._listener.heard_end().seconds_left(self._now())  # type: ignore[union-attr]
            drained = self._uploader.drain(min(timeout_s, patience_s(left, training=True, drain_timeout_s=timeout_s)))
        saved = self._saved_step or 0
        if self._agreement.is_main and (not drained or self._committed_step() < saved):
            raise StoreError(
                f"step {saved} was saved, but only step {self._committed_step()} is in {self.run.url} "
                f"after {timeout_s:.0f} s: {self._uploader.trouble or '(the log says why)'}",
                hint="start the same command again: it goes on from there",
            )

    def _end_badly(self, error: BaseException) -> None:
        """The loop was left by an error or an exit; the other ranks may not know of it, so they are not asked."""
        if self._begun and self._uploader is not None and self._uploader.fenced is None:
            ended = isinstance(error, SystemExit)
            if not self._uploader.idle:
                log.warning("finishing the upload in flight")
            self._drain(self._patience_s() if ended else min(_FAILED_DRAIN_S, self._patience_s()))
            if not ended and not self._left and self._runtime is None and self._agreement.is_main:
                data = {"error": type(error).__name__, "stage": 1, **self._timing.to_details(self._step)}
                self._journalist.record("failed", data, patience_s=_LAST_WORD_S)
        self._close_alone()

    def _at_exit(self) -> None:
        """The process ends, and has not said how: what was saved gets committed."""
        if self._closed or os.getpid() != self._process:
            return
        error = getattr(sys, "last_value", None)
        self._end_badly(error if isinstance(error, BaseException) else SystemExit())

    def _close_alone(self) -> None:
        if not self._closed:
            self._closed = True
            self._closing.close()


class SpotCheckpointManager(LoopManager):
    """Saves a training loop of your own to a run, and brings it back: model, optimizer, schedule, random states, and the place
    in the DataLoader that it iterates.

    ::

        manager = SpotCheckpointManager("s3://bucket/runs/my-run", save_every_n_steps=500)
        step, epoch = manager.load_latest(model, optimizer, scheduler)
        for epoch in range(epoch, epochs):
            for batch in dataloader:
                ...
                step += 1
                if step % manager.save_every_n_steps == 0:
                    manager.save(model, optimizer, scheduler, step, epoch, loss)
                if manager.interrupted:
                    manager.save(model, optimizer, scheduler, step, epoch, loss)
                    sys.exit(75)

    ``break`` and ``return`` do as well. Files are uploaded behind the training; a save after an interruption returns when it is
    committed. Whatever begins to iterate a DataLoader after that ends with `TrainingPreempted`. Used as a context manager it
    marks the run as finished at the end of the block, and ends with `TrainingPreempted` after an interruption.

    With several ranks (DDP) each must call every method.

    Args:
        checkpoint_dir: the run: ``s3://bucket/prefix``, or a directory. None is that of `hf-spot launch`.
        save_every_n_steps: for the loop to read; at least 1.
        args: settings; None takes those of `hf-spot launch`, or the defaults.
        local_dir: folder of this machine for files on their way; None is ``checkpoint_dir`` where that is a directory, else a
            folder in the user's cache.

    Raises:
        ConfigError: a value can't be used.
    """

    @staticmethod
    def for_accelerator(
        accelerator: Any,
        checkpoint_dir: str | os.PathLike[str] | ObjectStore | None = None,
        save_every_n_steps: int = 500,
        *,
        args: SpotArguments | None = None,
        local_dir: str | os.PathLike[str] | None = None,
    ) -> AcceleratorCheckpointManager:
        """For a loop with an ``accelerate.Accelerator``, after its ``prepare``: the manager's methods are then
        ``save(step, epoch, loss)`` and ``load_latest()``.

        Args:
            accelerator: whose ``save_state`` and ``load_state`` are used.
            checkpoint_dir: as above.
            save_every_n_steps: as above.
            args: as above.
            local_dir: as above.
        """
        manager = AcceleratorCheckpointManager(checkpoint_dir, save_every_n_steps, args=args, local_dir=local_dir)
        manager.accelerator = accelerator
        return manager

    def load_latest(self, model: nn.Module, optimizer: Any = None, scheduler: Any = None) -> tuple[int, int]:
        """Loads the newest whole checkpoint; the step and the epoch that it was saved with, and (0, 0) when there is none.

        The epoch's DataLoader then begins with the batches that were not trained.

        Raises:
            ConfigError: it is that of another model.
            CorruptCheckpoint: there are checkpoints, and none is whole.
            StoreError: the store could not be asked.
        """
        return self._load(PlainState(model, optimizer, scheduler), optimizer)

    def save(
        self,
        model: nn.Module,
        optimizer: Any,
        scheduler: Any,
        step: int,
        epoch: int,
        loss: Any = None,
        *,
        dataloader: Any = None,
    ) -> None:
        """Writes a checkpoint, and has it uploaded. A step that is saved already is not saved again.

        Args:
            model: also wrapped by DDP or ``torch.compile``.
            optimizer: or None.
            scheduler: or None.
            step: optimizer steps done in all epochs.
            epoch: under way; behind the end of its DataLoader, the next one.
            loss: for the record.
            dataloader: the one (or a list of those) that the loop is in the middle of, where that should not be found out.

        Raises:
            ConfigError: a value can't be used.
            StoreError: the local disk can't be written to; what was saved before is committed first.
            Fenced: a newer launch owns the run.
            TrainingPreempted: the loop has been saved for an interruption, and went on.
        """
        self._save(PlainState(model, optimizer, scheduler), step, epoch, loss, dataloader)


class AcceleratorCheckpointManager(LoopManager):
    """What `SpotCheckpointManager.for_accelerator` returns."""

    accelerator: Any

    def load_latest(self) -> tuple[int, int]:
        """As that of `SpotCheckpointManager`, for what the accelerator has prepared."""
        optimizers: Sequence[Any] = self.accelerator._optimizers
        return self._load(AcceleratorState(self.accelerator), optimizers[0] if optimizers else None)

    def save(self, step: int, epoch: int, loss: Any = None, *, dataloader: Any = None) -> None:
        """As that of `SpotCheckpointManager`, for what the accelerator has prepared."""
        self._save(AcceleratorState(self.accelerator), step, epoch, loss, dataloader)


def _local_dir(store: ObjectStore, given: str | os.PathLike[str] | None) -> Path:
    """A folder that nobody else writes to."""
    if given is None and not isinstance(store, LocalStore):
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        given = Path(cache) / "hf_spot" / hashlib.sha256(store.url.encode()).hexdigest()[:16]
    return Path(store.url if given is None else given).expanduser() / ".hf_spot" / "loop"


def _number(loss: Any) -> float | None:
    return None if loss is None else float(loss.item() if hasattr(loss, "item") else loss)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
