"""Random states that Trainer does not save, or restores at the wrong moment, and that a bit-exact resume needs.

Each repair changes only a resumed training; an uninterrupted one stays as Trainer runs it. Verified with transformers 5.23
and accelerate 1.15.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch.utils.data import BatchSampler, IterableDataset
from transformers import Trainer

from hf_spot.runtime import make_private
from hf_spot.training.data.evaluation_workers import evaluation_workers
from hf_spot.training.data.first_batch import FirstBatch, read_first_batch
from hf_spot.training.data.rng import capture, capture_gpus, forget, pack, restore, unpack
from hf_spot.training.data.worker_states import WorkerStates
from hf_spot.training.state.data_side import DataSide, from_json, parts_of, to_json
from hf_spot.training.state.proof import digest_of
from hf_spot.training.upstream import INSIDE, LOAD_RNG_STATE, SAVE_RNG_STATE, SPLIT_BATCHES

log = logging.getLogger("hf_spot")

_NEWEST = 1024  # batches whose indices are remembered: workers are so many ahead at most
_FOLDER = "random_states"  # inside a checkpoint; the files are named like Trainer's `rng_state`


class RandomStates:
    """Adds the random states of two earlier moments to each checkpoint, and restores them at a resume.

    *The start of the epoch.* A sampler that draws its order from the global generators (``group_by_length``,
    ``use_seedable_sampler=False``) draws it there. Trainer saves only the state at the time of the save.

    *The draw of the next batch.* accelerate fetches a batch before it returns the previous one: at a save in the middle of an
    epoch the next batch already exists. A collator or a dataset that draws random numbers (masked language modelling,
    augmentation) must draw the numbers of that moment again for this batch, and those after the save for later batches; Trainer
    makes the batches first and restores the generators afterwards. With workers (``dataloader_num_workers``) batches are made
    in other processes, and `WorkerStates` is responsible.

    Args:
        trainer: the Trainer; its own methods save and restore the generators.
        folder: local folder for files that Trainer writes; `close` removes it.
        shared: all ranks have the same states between two steps; a rank that did not exist at a save takes those of rank 0.
    """

    def __init__(self, trainer: Trainer, folder: Path, *, shared: bool = False) -> None:
        self._trainer = trainer
        self._shared = shared
        self._folder = folder
        self._remembered = folder.with_name(f"{folder.name}-remembered")
        self._start_of_epoch: dict[str, bytes] = {}
        self._remembered_files: dict[str, bytes] = {}
        self._remembered_data: list[tuple[DataSide, dict[str, Any]]] = []
        self._draws = 0
        self._at_once, self._draws_for_all = 1, False
        self._is_then_due = False
        self._before_draw: dict[str, Any] | None = None
        settings: Any = trainer.args.accelerator_config
        ahead = trainer.args.gradient_accumulation_steps * (trainer.args.world_size if settings.dispatch_batches else 1)
        self._workers = WorkerStates(folder.with_name(f"{folder.name}-workers"), ahead)
        self._evaluations = evaluation_workers(trainer)
        self._first_batch = FirstBatch(trainer.args.world_size)
        self._micro_batches = self._handed_out = 0
        self._watched: list[_Watched] = []
        self._step_ended = False
        self._between_steps: tuple[dict[str, Any], dict[str, Any] | None, int] | None = None
        self._resumed: Path | None = None
        self._resumed_draw: dict[str, Any] | None = None
        self._restored = False
        self._then: Callable[[], None] = lambda: None
        self._restored_digests: dict[str, Any] | None = None
        self._newest_indices: deque[tuple[int, Any]] = deque(maxlen=_NEWEST)
        self._place_is_known = True
        self._expected_batch: int | None = None
        self._drawn_batch: dict[str, Any] | None = None
        self._passed_over = self._passes_over = 0  # batches of the epoch under way, or of the one that is resumed
        self._data_side = DataSide()
        self._data_side_began: dict[str, Any] = {}
        self._data_side_made: dict[str, Any] | None = None  # as the script has made it, before the first epoch of this process
        self._moved: set[str] = set()  # paths of the data side that have changed since, in this process or before it
        self._of_samplers: dict[str, Any] = {}  # of the save, where samplers have arrived at it by drawing again
        self._read_data_side(None)

    @contextlib.contextmanager
    def evaluations_kept(self, checkpoint: Path | None) -> Iterator[bool]:
        """Keep persistent workers of evaluations within the block; yield whether a checkpoint tells what they had reached.

        Args:
            checkpoint: the one to resume from, or None.
        """
        told = checkpoint is not None and self._evaluations.resume(checkpoint / _FOLDER / self._evaluations_name)
        with self._evaluations.kept(self._trainer):
            yield told

    def evaluation(self) -> contextlib.AbstractContextManager[None]:
        """Return the context of an evaluation, which may be ended halfway: a save within it belongs to the state before."""
        return self._evaluations.evaluation()

    def resume(self, then: Callable[[], None]) -> None:
        """Wrap the method by which Trainer restores the random states of the checkpoint.

        Args:
            then: called once, right afterwards.
        """
        self._then = then
        LOAD_RNG_STATE.set(self._trainer, self._return_to_checkpoint)

    def return_before_epoch(self, dataloader: Any, checkpoint: Path) -> None:
        """Restore the random states of a checkpoint that was saved between two epochs.

        Trainer does so when the next epoch has begun: too late for what callbacks draw or change at that moment, and for
        `begin_epoch`, which records the states at the start of the epoch.

        Args:
            dataloader: the DataLoader of the epoch.
            checkpoint: the checkpoint.
        """
        self._look_at_data(dataloader, checkpoint)
        self._return_to_checkpoint(str(checkpoint))

    @contextlib.contextmanager
    def data_side_kept(self) -> Iterator[None]:
        """Keep the state of the data pipeline as it is before the block."""
        side = self._data_side
        states = side.capture()
        yield
        side.restore(states)

    def begin_epoch(self, dataloader: Any, resumed: Path | None, number: int = 0, *, middle: bool = True) -> None:
        """Prepare the random states for an epoch that begins.

        Args:
            dataloader: the DataLoader of the epoch.
            resumed: the checkpoint, if this is the first epoch after a resume.
            number: number of the epoch, from 0.
            middle: whether the checkpoint was saved in the middle of an epoch.
        """
        if getattr(dataloader, "persistent_workers", False):
            self._workers.note_seeded(number > 0)
            if resumed is None and self._resumed is not None:
                self._workers.go_on(self._micro_batches * self._at_once)
            elif resumed is not None:
                self._workers.resume(resumed / _FOLDER / self._workers_name, middle=middle)
        elif resumed is not None and middle:
            self._workers.resume(resumed / _FOLDER / self._workers_name, middle=True)
        self._micro_batches = self._handed_out = 0
        self._newest_indices.clear()
        self._place_is_known = resumed is None or not middle or self._passes_over > 0
        self._passed_over, self._passes_over = self._passes_over, 0
        self._look_at_data(dataloader, resumed)
        if middle or not self._restored:
            self._data_side.restore(self._resumed_data_side["began" if middle else "saved"])
        resumed = resumed if middle else None
        self._draws, self._resumed, self._resumed_draw = 0, resumed, None
        if resumed is not None and (resumed / _FOLDER).is_dir():
            self._load_start_of_epoch(resumed / _FOLDER)
            if (resumed / _FOLDER / self._draw_name).exists():
                self._resumed_draw = json.loads((resumed / _FOLDER / self._draw_name).read_bytes())
        self._start_of_epoch = self._files_of_now(self._folder)
        self._data_side_began = self._data_side.capture()
        self._watch(dataloader)
        self._step_ended = True
        self._mark()

    def watch_skipping(self, dataloader: Any) -> None:
        """Watch the loader with which Trainer skips the trained batches of a pass.

        Of a stream they are drawn as in an uninterrupted training, and the next one is made in the state in which that made it.
        """
        if self._resumed is not None:
            self._keep_first_batch(dataloader, read_first_batch(self._resumed / _FOLDER / self._first_batch_name))
        if isinstance(dataloader.dataset, IterableDataset) and not dataloader.num_workers:
            self._watch(dataloader)

    def trained_batches_passed(self) -> None:
        """Return to the checkpoint where a loader of the script's own has made the trained batches of its pass again."""
        if self._resumed is not None:
            self._return_to_checkpoint(str(self._resumed))

    def micro_batch_ended(self) -> None:
        """Count a trained batch. Call it before `step_ended`."""
        self._micro_batches += 1

    def step_ended(self) -> None:
        """Record the end of an optimizer step. An evaluation or a save that follows still belongs to it."""
        self._handed_out = self._micro_batches
        self._step_ended = True

    def step_begins(self) -> None:
        """Record the start of a step, when its micro-batches have been made."""
        self._mark()

    def rewind(self) -> None:
        """Restore the random states between the last finished step and the one under way.

        A checkpoint that is saved now belongs to the last finished step.
        """
        assert self._between_steps is not None
        state, self._before_draw, self._draws = self._between_steps
        restore(state)
        self._data_side.restore(state["data_side"])

    def save(self, checkpoint: Path) -> None:
        """Add this rank's states to a checkpoint."""
        if self._start_of_epoch:
            _write(self._start_of_epoch, checkpoint / _FOLDER)
            if self._before_draw is not None:
                state = base64.b64encode(pack(self._before_draw)).decode()
                (checkpoint / _FOLDER / self._draw_name).write_text(json.dumps({"draws": self._draws, "state": state}))
            moments = self._moments()
            if any(moments.values()):
                text = json.dumps({moment: to_json(states) for moment, states in moments.items()})
                (checkpoint / _FOLDER / self._data_side_name).write_text(text)
            if not self._draws_for_all or self._trainer.args.process_index == 0:  # otherwise its workers' batches go to nobody
                self._workers.save(checkpoint / _FOLDER / self._workers_name, self._handed_out * self._at_once)
            self._first_batch.save(checkpoint / _FOLDER / self._first_batch_name)
            self._evaluations.save(checkpoint / _FOLDER / self._evaluations_name)

    def _look_at_data(self, dataloader: Any, checkpoint: Path | None) -> None:
        self._data_side = DataSide(parts_of(dataloader))
        if self._data_side_made is None:
            self._data_side_made = self._data_side.capture()
        self._read_data_side(checkpoint)

    def _moments(self) -> dict[str, dict[str, Any]]:
        """Return the state of the data pipeline at the moments that a checkpoint tells of.

        Without what has never changed: the script makes it anew, perhaps in another way on another machine, as a folder.
        """
        now, made = self._data_side.capture(), self._data_side_made or {}
        moments = {
            "began": _still_in(now, self._data_side_began),
            "draw": {} if self._before_draw is None else _still_in(now, self._before_draw["data_side"]),
            "saved": now,
        }
        for states in moments.values():
            self._moved.update(path for path, value in states.items() if path not in made or made[path] != value)
        kept = self._moved.union(self._data_side.names)
        return {moment: {path: one for path, one in states.items() if path in kept} for moment, states in moments.items()}

    def _read_data_side(self, checkpoint: Path | None) -> None:
        path = None if checkpoint is None else checkpoint / _FOLDER / self._data_side_name
        told = json.loads(path.read_text()) if path is not None and path.exists() else {}
        self._resumed_data_side = {moment: from_json(told.get(moment, {})) for moment in ("began", "draw", "saved")}
        self._moved.update(*self._resumed_data_side.values())

    def remember(self) -> None:
        """Keep the current random states, and the state of the data to evaluate on, for `return_to_remembered`."""
        self._remembered_files = self._files_of_now(self._remembered)
        evaluated: Any = self._trainer.eval_dataset
        data = list(evaluated.values()) if isinstance(evaluated, dict) else [evaluated]
        sides = [self._data_side, *(DataSide(parts_of(one)) for one in (self._trainer.data_collator, *data))]
        self._remembered_data = [(side, side.capture()) for side in sides]

    def return_to_remembered(self) -> None:
        """Restore the random states that `remember` kept."""
        make_private(self._remembered)
        _write(self._remembered_files, self._remembered)
        LOAD_RNG_STATE.plain(self._trainer)(str(self._remembered))
        forget()
        for side, states in self._remembered_data:
            side.restore(states)

    def _files_of_now(self, folder: Path) -> dict[str, bytes]:
        """Return the files that Trainer writes for the current states, in memory, because /tmp may be cleaned meanwhile."""
        make_private(folder)
        SAVE_RNG_STATE.of(self._trainer)(str(folder))
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    def close(self) -> None:
        """Restore the trainer's method, and remove the folder."""
        LOAD_RNG_STATE.restore(self._trainer)
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.rmtree(self._remembered, ignore_errors=True)
        self._workers.close()
        # Otherwise trainer and loaders form a cycle, and torch is slow to end workers that the garbage collector finds.
        for watched in self._watched:
            watched.release()

    @property
    def _draw_name(self) -> str:
        return f"next_batch_{self._trainer.args.process_index}.json"

    @property
    def _first_batch_name(self) -> str:
        return f"first_batch_{self._trainer.args.process_index}.pt"

    @property
    def _data_side_name(self) -> str:
        return f"data_side_{self._trainer.args.process_index}.json"

    @property
    def _evaluations_name(self) -> str:
        return f"evaluation_workers_{self._trainer.args.process_index}.json"

    @property
    def _workers_name(self) -> str:
        return f"workers_{self._trainer.args.process_index}.json"

    def _watch(self, dataloader: Any) -> None:
        sampler = getattr(dataloader, "batch_sampler", None)
        dispatches = isinstance(dataloader, DataLoaderDispatcher)
        # Its workers read a stream again from its start, with the seeds of that time.
        is_read_again = dispatches and dataloader.num_workers > 0 and isinstance(dataloader.dataset, IterableDataset)
        if sampler is None or is_read_again:
            self._before_draw = None
            return
        self._keep_first_batch(dataloader, None)
        if isinstance(sampler, _Watched):
            return
        # One rank draws the batches of all before it hands them out, and the others' part of them is not its own.
        self._draws_for_all = dispatches and self._trainer.args.world_size > 1
        self._at_once = self._trainer.args.world_size if self._draws_for_all and not SPLIT_BATCHES.of(dataloader) else 1
        watched = _Watched(sampler, self, self._workers if dataloader.num_workers else None, self._at_once)
        self._watched.append(watched)
        # A DataLoader refuses to change its sampler, as it may be iterating already; accelerate's loaders wrap another one.
        object.__setattr__(INSIDE.of(dataloader) if INSIDE.is_on(dataloader) else dataloader, "batch_sampler", watched)

    def _keep_first_batch(self, dataloader: Any, resumed: list[torch.Tensor] | None) -> None:
        """Keep the samples that complete the last batch of a pass; of a stream they are read again at a resume."""
        of_all = isinstance(dataloader, DataLoaderDispatcher) and self._trainer.args.world_size > 1
        if of_all and not isinstance(dataloader.dataset, IterableDataset):
            self._first_batch.begin_pass(dataloader, resumed)

    # -- proof --------------------------------------------------------------------------------------------------------

    def digests(self) -> dict[str, Any]:
        """Return a digest of the current state of each generator, and of what else changes in the data pipeline."""
        return self._digests(self._moments()["saved"])

    def _digests(self, data_side: dict[str, Any]) -> dict[str, Any]:
        states = capture() | data_side
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()  # of this process's GPU: a machine may have more than the training uses
        return {name: digest_of(state) for name, state in states.items()}

    @property
    def restored_digests(self) -> dict[str, Any] | None:
        """Return the digests right after Trainer has restored the checkpoint's random states; None if it has not."""
        return self._restored_digests

    def next_batch(self) -> dict[str, Any] | None:
        """Return the number in its epoch of the batch to train next, and a digest of its indices; None if unknown."""
        number = self._passed_over + self._handed_out + 1
        indices = next((batch for at, batch in self._newest_indices if at == number), None) if self._place_is_known else None
        return None if indices is None else self._batch(number, indices)

    def step_indices(self) -> list[Any] | None:
        """Return the indices of each batch of the step that was just done; None if unknown. Call it before `step_ended`."""
        if not self._newest_indices or not self._place_is_known:
            return None
        after_newest = self._newest_indices[-1][0] + 1
        places = range(
            self._passed_over + self._handed_out + 1 - after_newest, self._passed_over + self._micro_batches + 1 - after_newest
        )
        if not places or places.start < -len(self._newest_indices) or places.stop > 0:
            return None
        found = [self._newest_indices[at][1] for at in places]
        return None if all(index is None for indices in found for index in indices) else found  # streams have none

    def _batch(self, number: int, indices: Any) -> dict[str, Any]:
        return {"number": number, "of": [len(indices), self._trainer.args.world_size], "indices": digest_of(indices)}

    def expect(self, next_batch: dict[str, Any] | None) -> None:
        """Record the batch that `next_batch` returned at the save, so that `drawn_batch` can be compared with it."""
        self._expected_batch = None if next_batch is None else next_batch["number"]
        self._passes_over = 0 if next_batch is None else next_batch["number"] - 1

    @property
    def drawn_batch(self) -> dict[str, Any] | None:
        """Return the expected batch as it was actually drawn, or None before that."""
        return self._drawn_batch

    def note_indices(self, number: int, indices: Any) -> None:
        """Record the indices of a batch that a sampler has drawn for this rank."""
        if self._draws_for_all:
            return
        self._newest_indices.append((number, indices))
        if number == self._expected_batch and not all(index is None for index in indices):  # streams have none
            self._expected_batch, self._drawn_batch = None, self._batch(number, indices)

    def begin_behind(self, count: int) -> None:
        """Count draws from here on as those behind the first ``count`` batches of the epoch, which are not drawn again."""
        self._draws = count // self._at_once

    def drawn(self) -> None:
        """Restore or record random states, after a batch's indices were drawn and before the batch is made in this process."""
        now = self._mark()
        self._draws += 1
        if self._resumed_draw is not None:
            if self._draws == self._resumed_draw["draws"]:
                restore(unpack(base64.b64decode(self._resumed_draw["state"])))
                self._data_side.restore(self._resumed_data_side["draw"])
                saved = self._data_side.of_samplers(self._resumed_data_side["saved"])
                if _still_in(saved, self._data_side.of_samplers(self._data_side.capture())) == saved:
                    self._of_samplers = saved
            elif self._draws > self._resumed_draw["draws"]:
                # What follows a restoration waits for all ranks, and the others wait here for this one's batches.
                self._restore_checkpoint(str(self._resumed), then=not self._draws_for_all)
                self._resumed_draw = None
            now = None
        self._before_draw = now or self._capture()

    def _load_start_of_epoch(self, states: Path) -> None:
        LOAD_RNG_STATE.plain(self._trainer)(str(self._with_own_file(states)))
        forget()

    @property
    def _rng_name(self) -> str:
        """Return the name of the file in which Trainer looks for this rank's states."""
        args = self._trainer.args
        return f"rng_state_{args.process_index}.pth" if args.world_size > 1 else "rng_state.pth"

    def _with_own_states(self, checkpoint: str | None) -> str | None:
        """Return a folder in which Trainer finds this rank's states, or those of rank 0 if all ranks share theirs."""
        return checkpoint if checkpoint is None or not self._shared else str(self._with_own_file(Path(checkpoint)))

    def _with_own_file(self, states: Path) -> Path:
        """Return a folder with a file of this rank's states: the given one, or one with a copy of those of rank 0.

        The number of ranks may have changed. The given folder stays as it is: other ranks may be reading it.
        """
        every = (states / name for name in (self._rng_name, "rng_state_0.pth", "rng_state.pth"))
        found = next((path for path in every if path.exists()), None)
        if found is None or found.name == self._rng_name:
            return states
        make_private(self._remembered)
        shutil.copyfile(found, self._remembered / self._rng_name)
        return self._remembered

    def _capture(self) -> dict[str, Any]:
        return capture() | {"data_side": self._data_side.capture()}

    def _mark(self) -> dict[str, Any] | None:
        """Record the states between two steps, once per step; return them if they were captured now."""
        if not self._step_ended:
            return None
        self._step_ended = False
        now = self._capture()
        if self._trainer.args.gradient_accumulation_steps > 1:  # a step of one micro-batch is never abandoned
            now |= capture_gpus()
        self._between_steps = (now, self._before_draw, self._draws)
        return now

    def _return_to_checkpoint(self, checkpoint: str | None) -> None:
        self._restore_checkpoint(checkpoint, then=True)

    def _restore_checkpoint(self, checkpoint: str | None, *, then: bool) -> None:
        """Restore the states of a checkpoint, once, and do what is to follow, or leave that to the next call."""
        if not self._restored:
            self._restored = self._is_then_due = True
            LOAD_RNG_STATE.plain(self._trainer)(self._with_own_states(checkpoint))
            forget()
            saved = self._resumed_data_side["saved"]
            # One that draws each batch when it is asked for it has drawn the next one since, as in an uninterrupted training.
            self._data_side.restore({path: value for path, value in saved.items() if path not in self._of_samplers})
            told = saved.keys() | set(self._data_side.names)  # this process may have changed more on its way here
            now = {path: value for path, value in self._data_side.capture().items() if path in told}
            self._restored_digests = self._digests(now | self._of_samplers)
        if then and self._is_then_due:
            self._is_then_due = False
            self._then()


class _Watched(BatchSampler):
    """Wraps a batch sampler and reports each draw to `RandomStates`, or the first of those that are made at once."""

    def __init__(self, inner: Any, states: RandomStates, worker_states: WorkerStates | None, at_once: int = 1) -> None:
        self._inner = inner
        self._at_once = at_once
        self._states: RandomStates | None = states
        self.worker_states = worker_states

    def release(self) -> None:
        """Stop reporting draws."""
        self._states = self.worker_states = None

    def __iter__(self) -> Iterator[list[int]]:
        for number, batch in enumerate(self._inner, 1):
            if self._states is not None:
                self._states.note_indices(number, batch)
            if self._states is not None and self.worker_states is None and (number - 1) % self._at_once == 0:
                self._states.drawn()
            yield batch

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)


def _still_in(saved: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of an earlier state can be told still: what has grown too large is restored as it was at the save."""
    return {path: value for path, value in earlier.items() if path in saved}


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
