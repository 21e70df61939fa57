"""Datasets without a length, iterated more than once or drawing random numbers.

Trainer treats such a training as one epoch of ``max_steps`` steps: at a resume it skips all batches that were ever trained, as
if the first pass had contained them. Its own ``state.epoch`` is right: the integer part counts whole passes, and the fraction
the batches of the current pass, in units of ``max_steps`` times the accumulation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers.trainer
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.utils import broadcast_object_list
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy, has_length

from hf_spot.errors import ConfigError
from hf_spot.log import warn_for_all
from hf_spot.policy.passes import Place
from hf_spot.policy.resize import Batches
from hf_spot.training.data.rng import capture, pack
from hf_spot.training.data.stream_position import Resumed, StreamPosition, tell_of_reading, why_not
from hf_spot.training.state.data_side import DataSide, parts_of
from hf_spot.training.upstream import GET_BATCH_SAMPLES, INIT_TRAINING_STATE, INSIDE, SKIP_FIRST_BATCHES, SPLIT_BATCHES
from hf_spot.training.upstream.versions import how_to_install

_LOOKS = 4
_FOLDER = "random_states"  # inside a checkpoint


class StreamReader:
    """Saves where a training is in its stream, and resumes there without reading the stream again, if that is exact.

    Ranks that divide a stream complete its last batches with samples from the start of the pass: these are read again first.

    Args:
        trainer: the Trainer.
        begin_behind: called with the number of batches of the pass that are not read again.
    """

    def __init__(self, trainer: Trainer, begin_behind: Callable[[int], None]) -> None:
        self._trainer = trainer
        self._begin_behind = begin_behind
        self._position: StreamPosition | None = None
        self._watched: list[Any] = []

    def begin_epoch(self, dataloader: Any) -> None:
        """Watch the loader of an epoch. Call it before the loader is iterated."""
        if self._is_stream and self._why_not(dataloader) is None:
            self._watch(dataloader)

    @property
    def _is_stream(self) -> bool:
        data = self._trainer.train_dataset
        return isinstance(data, IterableDataset) and not has_length(data)

    def _why_not(self, dataloader: Any) -> str | None:
        if self._reads_for_all(dataloader) and dataloader.submesh_tp is not None:
            return "several ranks are given the same batches"
        return why_not(dataloader)

    def _reads_for_all(self, dataloader: Any) -> bool:
        """Return whether one rank reads the batches of all."""
        return self._trainer.args.world_size > 1 and isinstance(dataloader, DataLoaderDispatcher)

    def _position_in(self, dataloader: Any) -> StreamPosition:
        if self._position is None:
            divided: int | None = None
            if self._reads_for_all(dataloader):
                divided = 1 if SPLIT_BATCHES.of(dataloader) else self._trainer.args.world_size
            self._position = StreamPosition(self._trainer.args.gradient_accumulation_steps, divided)
        return self._position

    def _watch(self, dataloader: Any, resumed: Resumed | None = None) -> None:
        """Wrap the iterator of the loader of torch inside one of accelerate's, which calls it by this name."""
        loader, position = INSIDE.of(dataloader) if INSIDE.is_on(dataloader) else dataloader, self._position_in(dataloader)
        plain = type(loader).__iter__
        vars(loader)["__iter__"] = lambda: position.read(loader, plain, resumed, lambda: self._begin_behind(0))
        self._watched.append(loader)

    @property
    def _name(self) -> str:
        rank = self._trainer.args.process_index
        return f"stream_{rank}.json" if rank else "stream.json"

    def save(self, checkpoint: Path) -> None:
        """Add the position to a checkpoint."""
        state, args = self._trainer.state, self._trainer.args
        if self._position is None or not state.epoch:
            return
        trained = round((state.epoch % 1) * state.max_steps * args.gradient_accumulation_steps)
        position = self._position.to_save(trained * self._position.group)
        if position is not None:
            text = json.dumps({**position, "batch_size": self._watched[-1].batch_size, "ranks": args.world_size})
            (checkpoint / _FOLDER).mkdir(exist_ok=True)
            (checkpoint / _FOLDER / self._name).write_text(text)

    @contextmanager
    def resumed(self, checkpoint: Path | None) -> Iterator[None]:
        """Resume the stream at its position within the block.

        Args:
            checkpoint: the checkpoint, if the training resumes from one.
        """
        if checkpoint is None or not self._is_stream:
            yield
            return
        path = checkpoint / _FOLDER / self._name

        def make(plain_skip: Any) -> Any:
            def skip(dataloader: Any, num_batches: int = 0) -> Any:
                position = self._position_in(dataloader)
                group, resumed = position.group, None
                why = self._why_not(dataloader)
                if why is None:
                    saved: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
                    found = (saved.get("trained"), saved.get("batch_size"), saved.get("ranks"))
                    if found != (num_batches * group, dataloader.batch_size, self._trainer.args.world_size):
                        why = "the checkpoint has no position in it"
                    else:
                        resumed = position.go_to(dataloader, saved)
                        why = saved.get("why")
                passed_over = 0 if resumed is None else resumed.passed_over
                if self._reads_for_all(dataloader):
                    # The others skip what it does not read; their disks may have no position.
                    sent = broadcast_object_list([passed_over, why])
                    passed_over, why = sent
                if not passed_over:
                    tell_of_reading(dataloader, num_batches, why or "it consists of other parts than at the save")
                    return plain_skip(dataloader, num_batches)
                rest = plain_skip(dataloader, num_batches - passed_over // group)
                self._begin_behind(passed_over)
                self._watch(rest, resumed)
                return rest

            return skip

        with SKIP_FIRST_BATCHES.replaced(transformers.trainer, make):
            yield

    def close(self) -> None:
        """Restore the loaders."""
        for loader in self._watched:
            vars(loader).pop("__iter__", None)


@contextmanager
def resumed_in_its_pass(
    trainer: Trainer, details: dict[str, Any], place: Place, before: Batches, now: Batches
) -> Iterator[None]:
    """Resume a training on a stream in the right pass and at the right batch within the block.

    Args:
        trainer: the Trainer, about to resume.
        details: details of the commit that it resumes from.
        place: where that is in the data.
        before: how its steps were composed at the save.
        now: how they are composed now.

        Raises:
            ConfigError: Trainer resumes at another batch than expected.
    """
    if not isinstance(trainer.train_dataset, IterableDataset) or has_length(trainer.train_dataset):
        yield
        return
    plain_init = INIT_TRAINING_STATE.of(trainer)
    passes = place.number
    if passes and trainer.args.dataloader_num_workers and trainer.args.dataloader_persistent_workers:
        warn_for_all(
            "pass %d of the stream is resumed with new DataLoader workers, but an uninterrupted run keeps its workers: random "
            "numbers differ from those of an uninterrupted run; for exact results set dataloader_persistent_workers=False",
            passes + 1,
        )
    trained = details["epoch_of_data"] - passes if place.is_in_middle else 0
    done = round(trained * details["max_steps"] * before.accumulation)
    in_pass = done * before.per_device * before.world_size // (now.per_device * now.world_size)

    def init_training_state(*args: Any, **kwargs: Any) -> tuple[int, int]:
        theirs = plain_init(*args, **kwargs)
        all_in_one_pass = (0, trainer.state.global_step * trainer.args.gradient_accumulation_steps)
        if theirs not in (all_in_one_pass, (passes, in_pass)):
            raise ConfigError(
                f"this Trainer resumes a stream at batch {theirs[1]} of pass {theirs[0]}; it was interrupted at batch "
                f"{in_pass} of pass {passes}",
                hint=how_to_install({"transformers"}),
            )
        return passes, in_pass

    INIT_TRAINING_STATE.set(trainer, init_training_state)
    try:
        yield
    finally:
        INIT_TRAINING_STATE.restore(trainer)


@contextmanager
def random_streams_named(trainer: Trainer) -> Iterator[None]:
    """Warn within the block if a stream draws from this process's global generators, or changes what evaluations change.

    A resumed training reads the stream again from its start, between other draws and without the evaluations, and gets other
    samples.

    Args:
        trainer: the Trainer, about to train.
    """
    if not isinstance(trainer.train_dataset, IterableDataset) or trainer.args.dataloader_num_workers:
        yield
        return
    plain_get = GET_BATCH_SAMPLES.of(trainer)
    begun: Any = None
    looks = _LOOKS

    def get_batch_samples(epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal begun, looks
        if not looks or epoch_iterator is not begun:  # the first fetch of each epoch also draws the seed of its DataLoader
            begun = epoch_iterator
            return plain_get(epoch_iterator, *args, **kwargs)
        side = DataSide(parts_of(trainer.callback_handler.train_dataloader))
        before, before_side = pack(capture()), side.capture()
        fetched = plain_get(epoch_iterator, *args, **kwargs)
        looks -= 1
        # One rank that reads for several does not know which batch each state belongs to.
        evaluates, of_many = trainer.args.eval_strategy != IntervalStrategy.NO, trainer.args.world_size > 1
        if (evaluates or of_many) and side.capture() != before_side:
            looks = 0
            warn_for_all(
                "a stream's %s change while it is read, and %s: after a resume in the middle of an epoch it gives other "
                "samples; for exact results let the collator and the data set keep nothing%s",
                " and ".join(sorted(name for name, value in side.capture().items() if before_side.get(name) != value)),
                "one rank reads it for all" if of_many else "evaluations may change them, too",
                "" if of_many else ", or set --eval_strategy no",
            )
            return fetched
        if pack(capture()) != before:
            looks = 0
            warn_for_all(
                "%s draws random numbers from the global generators of the training process: after a resume in the middle of "
                "an epoch it gives other samples; for exact results set dataloader_num_workers=1, or give it its own generator",
                type(trainer.train_dataset).__name__,
            )
        return fetched

    GET_BATCH_SAMPLES.set(trainer, get_batch_samples)
    try:
        yield
    finally:
        GET_BATCH_SAMPLES.restore(trainer)
