"""The base of `SpotCheckpointManager` and `AcceleratorCheckpointManager`: restoring, saving and ending a custom loop."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError, Fenced, SpotError, StoreError, TrainingPreempted
from hf_spot.log import alert, log_always, warn_for_all
from hf_spot.notices.notice import NoticeKind, PreemptionNotice
from hf_spot.policy.hangs import Phase
from hf_spot.policy.numbers import HOW_TO_GET_FINITE, Answer, answer, in_words
from hf_spot.policy.preemption import Action
from hf_spot.policy.restarts import patience_s
from hf_spot.policy.trackers import init_kwargs
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.journal import TRAINING_KEY, Entry
from hf_spot.run.local_copies import recorded
from hf_spot.run.run import Run
from hf_spot.run.told_steps import is_told_steps
from hf_spot.runtime import STORE_VARIABLE, Runtime
from hf_spot.storage.local import LocalStore
from hf_spot.storage.store import ObjectStore
from hf_spot.timeouts import FAILED_DRAIN_S, JOURNAL_LAST_WORD_S
from hf_spot.training.data.loaders import Loaders
from hf_spot.training.loop.loop_files import LoopFiles
from hf_spot.training.loop.loop_states import LoopState
from hf_spot.training.loop.loop_training import LoopTraining
from hf_spot.training.saving.finite import not_finite
from hf_spot.training.session.local_tier import SAVED_BY
from hf_spot.training.session.mlflow_run import mlflow_run
from hf_spot.training.session.run_session import RunSession
from hf_spot.training.session.script_runs import ScriptRuns, of_launch
from hf_spot.training.upstream import check
from hf_spot.training.upstream.name import Scope

log = logging.getLogger("hf_spot")

_KEPT_HERE = 2  # checkpoints that are not committed yet, on this disk

T = TypeVar("T")


class LoopManager:
    """Connects a custom loop to a `RunSession`, which claims the run at the first call. The two managers differ in their state.

    Args:
        checkpoint_dir: the run; None uses that of `hf-spot launch`.
        save_every_n_steps: the interval between saves, for the loop to read.
        args: settings; None uses those of `hf-spot launch`, or the defaults.
        local_dir: folder for files that are being written, uploaded or restored.
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
        self.save_every_n_steps = save_every_n_steps
        runtime = Runtime.from_environ(os.environ)
        arguments = args or (runtime.arguments if runtime else SpotArguments())
        url = _url(checkpoint_dir, runtime)
        self._session = RunSession("SpotCheckpointManager", url, arguments, runtime, now=now, clock=clock)
        self.run = self._session.run
        self._local_dir = _local_dir(self.run.store, local_dir)
        self._begun = self._is_working = self._closed = False
        self._saved_step: int | None = None
        self._left = False
        self._step = 0
        self._told_advisories: set[str] = set()
        self._never_finite: frozenset[str] = frozenset()
        self._has_told_unknown = False
        self._script_runs = of_launch() or ScriptRuns(self._run_of_trackers)
        if self._script_runs is not of_launch():
            self._script_runs.watch()
            self._session.closing.callback(self._script_runs.close)
        self._session.listen(self._receive)
        # `atexit` does not run in processes that multiprocessing has started (``accelerate.notebook_launcher``).
        self._session.closing.callback(Finalize(None, self._at_exit, exitpriority=100).cancel)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.run.url!r}, save_every_n_steps={self.save_every_n_steps})"

    @property
    def has_begun(self) -> bool:
        """Return whether the run is claimed: at the first call of another method."""
        return self._begun

    # -- what a loop asks ---------------------------------------------------------------------------------------------

    @property
    def interrupted(self) -> bool:
        """Return whether the machine is being taken away: if True, save now and leave the loop.

        Every rank must read it equally often; all get the same answer at the same step.

        Raises:
            Fenced: a newer launch owns the run.
        """
        self._begin()
        session = self._session
        session.phases.sign()
        if session.preempted is not None:
            return True
        notice = session.listener.termination()
        session.agreement.ask(session.ballot(notice))
        merged = session.agreement.answer()
        assert merged is not None
        if merged.fenced:
            raise session.fenced or Fenced(f"a newer launch owns {self.run.url}")
        self._tell_advisory()
        if not merged.terminate:
            return False
        seconds_left, say = merged.seconds_left, partial(log.warning, "%s")
        decision = session.agreement.from_main(lambda: session.decide(NoticeKind.TERMINATE, seconds_left, notice, say))
        session.stop(decision, seconds_left)
        return True

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until everything saved so far is committed.

        Args:
            timeout_s: longest wait in seconds; None uses ``SpotArguments(drain_timeout_s=…)``.

        Raises:
            StoreError: something is not committed by then.
            Fenced: a newer launch owns the run.
        """
        if self._begun and not self._closed:
            at_most_s = self._session.arguments.drain_timeout_s if timeout_s is None else timeout_s
            self._session.agreement.together(lambda: self._wait(at_most_s))

    def finish(self) -> None:
        """Wait for the last commit, and record in the journal that the run is finished. Call it after the loop.

        `hf-spot launch` then has nothing left to do for this run. What was not saved is lost. An interrupted run does not
        count as finished.

        Raises:
            TrainingPreempted: the loop was left because of an interruption.
            StoreError: the last checkpoint could not be committed.
            Fenced: a newer launch owns the run.
        """
        if self._closed:
            return
        self._begin()
        session = self._session
        try:
            if session.preempted is not None:
                self._leave(self._step)
                raise self._preempted()
            self._training.conclude()
            self.wait()
            committed = session.agreement.from_main(lambda: session.committed_step)
            data = {"step": committed, TRAINING_KEY: session.training, **session.timing.to_details(committed)}
            # Under a launcher the script may train more than once, or fail later: the launcher records how it ends.
            kind = "finished" if session.runtime is None else "trained"
            session.record(kind, data, patience_s=session.arguments.drain_timeout_s)
            self._training.finished()
        finally:
            self.close()

    def close(self) -> None:
        """Stop receiving notices and uploading, without waiting. `finish` and the end of a ``with`` block call it."""
        if not self._closed and not self._session.forked:
            self._closed = True
            self._session.close()

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            self.finish()
        elif not self._closed and not self._session.forked:
            self._end_badly(error)

    # -- the start ----------------------------------------------------------------------------------------------------

    def _begin(self, state: LoopState | None = None, *, loads_only: bool = False) -> None:
        """Claim the run at its first use: the ranks may not be able to communicate before.

        Args:
            state: what the loop trains, if that is known.
            loads_only: as in `LoopTraining`.
        """
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
        session, rank = self._session, dist.get_rank() if ranks > 1 else 0
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        check(Scope.LOOP)
        if session.arguments.on_nan == "rollback":
            raise ConfigError(
                "on_nan='rollback' is for Trainer: only a custom loop itself can pass over its batches",
                hint="--on-nan stop, and other data after the last commit",
            )
        session.join_ranks(ranks, rank, local_rank, self._local_dir, setting="SpotCheckpointManager(…, local_dir=…)")
        self._training = LoopTraining(session, rank, state, loads_only=loads_only)
        session.claim()
        self._training.record()
        session.on_each_disk(lambda: _remove_leftovers(self._local_dir))
        scratch = self._local_dir / ".hf_spot" / f"workers-{rank}"
        loaders = Loaders(
            scratch,
            self._iteration_begins,
            ranks,
            lambda: session.phases.sign(),
            lambda value: session.agreement.from_main(lambda: value),
        )
        loaders.watch(session.arguments)
        session.closing.callback(shutil.rmtree, scratch, ignore_errors=True)
        session.closing.callback(loaders.close)
        self._loaders, self._files = loaders, LoopFiles(loaders, rank, ranks, self.run.url)
        session.tell_launcher(Phase.LOOP)
        self._begun = True

    def _run_of_trackers(self) -> Run | None:
        """Return the run, claimed; None if other ranks must claim it with this one, who don't begin tracker runs."""
        if not self._begun and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return None
        self._begin()
        return self.run

    def tracker_kwargs(self, *, mlflow_experiment: str | None = None) -> dict[str, dict[str, Any]]:
        """Return the ``init_kwargs`` of accelerate's ``init_trackers`` with which every launch continues the same tracker runs.

        Every rank must call it. Other code can use the values, too: ``wandb.init(**manager.tracker_kwargs()["wandb"])``.

        Args:
            mlflow_experiment: name of the experiment, if MLflow is used: its run is then found or created.
        """
        self._begin()
        session = self._session

        def on_main() -> dict[str, dict[str, Any]]:
            id = session.tracker_id()
            mlflow = mlflow_run(id, mlflow_experiment, None) if mlflow_experiment else None
            newest = self.run.latest()
            return init_kwargs(id, mlflow, None if newest is None else newest.step)

        return session.agreement.from_main(on_main)

    # -- restoring ----------------------------------------------------------------------------------------------------

    def _load(self, state: LoopState, optimizer: Any = None) -> tuple[int, int]:
        self._begin(state, loads_only=optimizer is None)
        if self._saved_step is not None:
            self.wait()  # the newest save may be the checkpoint to load
        session = self._session
        began = session.clock()
        found = session.restore_newest()
        taken = None if found is None else found[1]
        session.on_each_disk(lambda: _remove_all(folder for folder in self._saved_here() if folder != taken))
        if found is None:
            self._start_work(state, optimizer, 0)
            self._note_never_finite(state)
            return 0, 0
        checkpoint, folder = found
        self._training.compare(checkpoint)
        self._start_work(state, optimizer, checkpoint.step)
        try:
            told = session.agreement.together(lambda: self._files.read(folder, state))
        finally:
            if SAVED_BY not in checkpoint.details:  # otherwise it stays until it is committed
                session.on_each_disk(lambda: shutil.rmtree(folder, ignore_errors=True))
        self._note_never_finite(state)
        self._saved_step = self._step = checkpoint.step
        session.phases.tell(Phase.LOOP, checkpoint.step)
        session.timing.restored(session.clock() - began)
        how = "saved" if SAVED_BY in checkpoint.details else "committed"
        log.info("resuming from step %d, %s by launch %d", checkpoint.step, how, checkpoint.ref.launch)
        return checkpoint.step, int(told["epoch"])

    def _note_never_finite(self, state: LoopState) -> None:
        self._never_finite = frozenset(not_finite(state.tensors())[0])
        if self._never_finite:
            first = min(self._never_finite)
            warn_for_all("%s is not finite before the first step: %d tensors are not checked", first, len(self._never_finite))

    def _start_work(self, state: LoopState, optimizer: Any, resumed_step: int) -> None:
        """Watch the optimizer's steps, and begin to upload."""
        if self._is_working:
            return
        self._is_working = True
        self._training.watch(state, optimizer, self._loaders, self._stepped, resumed_step)
        self._session.start_uploader(self._committed)

    def _stepped(self) -> int:
        self._step += 1
        if self._session.steps is not None:
            self._session.steps.tell(self._step)
        self._session.phases.tell(Phase.LOOP, self._step)
        return self._step

    def _iteration_begins(self) -> None:
        if self._left:
            raise self._preempted()  # further steps would be lost, and an evaluation would use up the time that is left
        if self._session.timing.step_begins(self._step):
            log.debug("the loop requests its first batch")

    # -- saving -------------------------------------------------------------------------------------------------------

    def _save(self, state: LoopState, step: int, epoch: int, loss: Any, dataloader: Any) -> None:
        self._begin(state)
        self._check_step(step)
        self._start_work(state, None, 0)
        if self._left and step != self._saved_step:
            raise self._preempted()
        self._step = step
        self._session.phases.tell(Phase.LOOP, step)
        preempted = self._session.preempted
        finishes_only = preempted is not None and preempted.action is Action.FINISH_UPLOAD_AND_STOP
        if step != self._saved_step and not finishes_only:
            self._session.timing.step_begins(max(0, step - 1))
            with self._session.phases.within(Phase.SAVING):
                self._save_now(state, step, epoch, loss, dataloader)
        if preempted is not None:
            self._leave(step)

    def _check_step(self, step: int) -> None:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ConfigError(f"step={step!r} is not a number of steps", hint="step += 1 after each optimizer.step()")
        if self._saved_step is not None and step < self._saved_step:
            raise ConfigError(
                f"step={step} comes after step {self._saved_step}: steps count through all epochs",
                hint="step, epoch = manager.load_latest(model, optimizer, scheduler), and step += 1 from there",
            )

    def _save_now(self, state: LoopState, step: int, epoch: int, loss: Any, dataloader: Any) -> None:
        session = self._session
        began = session.clock()
        folder = self._local_dir / f"checkpoint-{step}"
        only = None if dataloader is None else list(dataloader) if isinstance(dataloader, (list, tuple)) else [dataloader]
        session.on_each_disk(lambda: _empty(folder))

        self._training.name_forgotten(state)
        found = session.agreement.gather(self._wrong_numbers(state))
        if wrong := [name for names in found for name in names]:
            self._refuse(wrong, step, began)
            return

        def write() -> None:
            self._files.write(folder, state, {"step": step, "epoch": epoch, "loss": _number(loss)}, only)

        try:
            session.agreement.together(write)
        except Exception as error:  # also of the script's own: a `state_dict` or a hook of accelerate that raises
            session.on_each_disk(lambda: shutil.rmtree(folder, ignore_errors=True))
            # Ranks may have met different errors, and must take the same way.
            if any(session.agreement.gather(self._ends_the_loop(error))):
                session.agreement.together(lambda: session.finish_uploads(self._patience_s()))
                raise
            if session.agreement.is_main:
                told = error.args[0] if isinstance(error, SpotError) else f"saving raised {type(error).__name__}: {error}"
                next_is = "the last commit stands" if session.preempted else "the next save will try again"
                log_always(logging.ERROR, "%s; %s", told, next_is)
            return
        self._saved_step = step
        save_s = session.clock() - began
        session.note_save(save_s)
        session.timing.stalled(save_s)
        seconds = round(save_s, 3)
        request = CommitRequest(
            step=step,
            reason="schedule" if session.preempted is None else "notice",
            world_size=session.world_size,
            training=session.training,
            details={
                "epoch_of_data": epoch,
                "finite": not self._never_finite and not self._has_told_unknown,
                "described": self._training.described,
                "output_dir": str(self._local_dir),
                "save_s": seconds,
                "stall_s": seconds,
                "trackers": self._script_runs.places(),
                **session.timing.to_details(step),
            },
        )
        session.agreement.together(lambda: self._submit(folder, request))

    def _wrong_numbers(self, state: LoopState) -> list[str]:
        """Return the names of what is not finite on this rank, and was when the loop began."""
        wrong, unknown = not_finite((name, value) for name, value in state.tensors() if name not in self._never_finite)
        if unknown and not self._has_told_unknown:
            self._has_told_unknown = True
            warn_for_all("%s and %d others can't be checked for NaN; said once", unknown[0], len(unknown) - 1)
        return wrong

    def _refuse(self, wrong: list[str], step: int, began: float) -> None:
        """Make no checkpoint of numbers that are not finite. Every rank must call it."""
        session = self._session
        session.timing.stalled(session.clock() - began)
        stopping = session.preempted is not None
        error = SpotError(in_words(wrong, step), hint=HOW_TO_GET_FINITE)
        if answer(wrong, on_nan=session.arguments.on_nan, stopping=stopping) is Answer.STOP:
            session.agreement.together(lambda: session.finish_uploads(self._patience_s()))
            raise error
        if session.agreement.is_main:
            next_is = "the last commit stands" if stopping else "training goes on, and the next save will try again"
            log_always(logging.ERROR, "%s; %s", error.args[0], next_is)

    def _ends_the_loop(self, error: Exception) -> bool:
        if self._session.preempted is not None:  # it ends anyway, with the last commit
            return isinstance(error, ConfigError)
        return not isinstance(error, StoreError) or self._session.arguments.on_save_error == "stop"

    def _submit(self, folder: Path, request: CommitRequest) -> None:
        stays = self._session.disk.count == 1
        if self._session.submit(folder, request, self._session.agreement, stays=stays) and not stays:
            shutil.rmtree(folder, ignore_errors=True)  # the uploader's hard links keep the files until they are committed
        for older in self._saved_here()[:-_KEPT_HERE]:  # those that a newer one has replaced would fill the disk
            shutil.rmtree(older, ignore_errors=True)

    def _committed(self, entry: Entry) -> None:
        """Delete what is committed from this disk. Called from the uploader's thread."""
        for folder in self._saved_here():
            if int(folder.name.removeprefix("checkpoint-")) <= entry.data["step"]:
                shutil.rmtree(folder, ignore_errors=True)

    def _saved_here(self) -> list[Path]:
        """Return the checkpoints on this disk, oldest first."""
        found = {int(step): path for path in self._local_dir.glob("checkpoint-*") if (step := path.name[11:]).isdigit()}
        return [found[step] for step in sorted(found)]

    # -- interruptions ------------------------------------------------------------------------------------------------

    def _receive(self, notice: PreemptionNotice) -> None:
        left = notice.seconds_left(self._session.now())
        told = f"{notice.in_words()}{'' if left is None else f', {left:.0f} s left'}"
        alert(told)
        self._session.hook.tell(told)

    def _tell_advisory(self) -> None:
        notice = self._session.listener.current() if self._session.runtime is None else None
        if notice is None or notice.kind is not NoticeKind.ADVISORY or notice.id in self._told_advisories:
            return
        self._told_advisories.add(notice.id)
        self._session.note(notice, "the machine may be taken away")

    def _patience_s(self) -> float:
        return patience_s(self._session.left_s, training=True, drain_timeout_s=self._session.arguments.drain_timeout_s)

    def _leave(self, step: int) -> None:
        """End the training for a notice: wait until what was saved is committed, or time runs out."""
        session = self._session
        assert session.preempted is not None
        if self._left:
            return
        self._left = True
        self._training.conclude()
        session.order_uploads()
        session.agreement.together(lambda: session.finish_uploads(self._patience_s()))
        if session.fenced is not None and session.agreement.alone:
            raise session.fenced
        if session.agreement.is_main:
            committed = session.committed_step
            data: dict[str, Any] = {"step": step, "committed_step": committed, TRAINING_KEY: session.training}
            data["why"] = session.preempted.why
            session.record("preempted", {**data, **session.timing.to_details(step)}, patience_s=JOURNAL_LAST_WORD_S)
            log.warning("%s", self._preempted())

    def _preempted(self) -> TrainingPreempted:
        committed = self._session.committed_step if self._session.agreement.alone else self._saved_step or 0
        return TrainingPreempted(
            f"preempted at step {self._step}; step {committed} is committed to {self.run.url}. "
            "Start the same command again to resume.",
            step=committed or None,
        )

    # -- the end ------------------------------------------------------------------------------------------------------

    def _wait(self, timeout_s: float) -> None:
        session, uploader, listener = self._session, self._session.uploader, self._session.listener
        session.phases.sign()
        if uploader is None:
            return
        drained = uploader.drain(timeout_s, lambda: listener.termination() is not None and session.preempted is None)
        if uploader.fenced is not None:
            raise uploader.fenced
        notice = listener.termination()
        if not drained and notice is not None:  # wait no longer than until the deadline of the notice
            left = notice.seconds_left(session.now())
            drained = uploader.drain(min(timeout_s, patience_s(left, training=True, drain_timeout_s=timeout_s)))
        saved = self._saved_step or 0
        if session.agreement.is_main and (not drained or session.committed_step < saved):
            raise StoreError(
                f"step {saved} was saved, but only step {session.committed_step} is in {self.run.url} "
                f"after {timeout_s:.0f} s: {uploader.trouble or '(the log says why)'}",
                hint="start the same command again to resume from there",
            )

    def _end_badly(self, error: BaseException) -> None:
        """Clean up after an error or an exit, without the other ranks: they may still be in the loop."""
        session = self._session
        if self._begun and session.uploader is not None and session.uploader.fenced is None:
            self._training.conclude()
            ended = isinstance(error, SystemExit)
            session.finish_uploads(self._patience_s() if ended else min(FAILED_DRAIN_S, self._patience_s()))
            if not ended and not self._left and session.runtime is None:
                data = {"error": type(error).__name__, TRAINING_KEY: session.training, **session.timing.to_details(self._step)}
                session.record("failed", data, patience_s=JOURNAL_LAST_WORD_S)
        self._closed = True
        session.close(alone=True)

    def _at_exit(self) -> None:
        """Commit what was saved when the process ends without `finish`."""
        if self._closed or self._session.forked:
            return
        error = getattr(sys, "last_value", None)
        self._end_badly(error if isinstance(error, BaseException) else SystemExit())


def _url(checkpoint_dir: str | os.PathLike[str] | ObjectStore | None, runtime: Runtime | None) -> Any:
    told = runtime.store if runtime else os.environ.get(STORE_VARIABLE)
    if checkpoint_dir is None:
        if told is None:
            raise ConfigError(
                f"no checkpoint_dir, and ${STORE_VARIABLE} is not set",
                hint='SpotCheckpointManager("s3://bucket/runs/my-run"), or hf-spot launch --store …',
            )
        return told
    given = os.fspath(checkpoint_dir) if isinstance(checkpoint_dir, os.PathLike) else checkpoint_dir
    if runtime is not None and Run(given).url != Run(runtime.store).url:
        raise ConfigError(
            f"the script says checkpoint_dir={str(given)!r}, hf-spot launch says --store {runtime.store}",
            hint=f"hf-spot launch --store {given} …, or SpotCheckpointManager() without a directory",
        )
    return given


def _local_dir(store: ObjectStore, given: str | os.PathLike[str] | None) -> Path:
    """Return a folder that nothing else writes to."""
    if given is None and not isinstance(store, LocalStore):
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        given = Path(cache) / "hf_spot" / hashlib.sha256(store.url.encode()).hexdigest()[:16]
    return Path(store.url if given is None else given).expanduser() / ".hf_spot" / "loop"


def _number(loss: Any) -> float | None:
    return None if loss is None else float(loss.item() if hasattr(loss, "item") else loss)


def _remove_leftovers(local_dir: Path) -> None:
    """Delete what a killed launch left behind, but for what it told about its steps, and checkpoints with a record."""
    local_dir.mkdir(parents=True, exist_ok=True)
    whole = [path for step, path in recorded(local_dir) for path in (path, local_dir / f"checkpoint-{step}")]
    for path in [*local_dir.iterdir(), *(local_dir / ".hf_spot").glob("*")]:
        if path.name == ".hf_spot" or is_told_steps(path) or path in whole:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _remove_all(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
