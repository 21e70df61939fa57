"""Metrics that TRL's trainers compute beside the loss, the same on any number of ranks: entropy, token accuracy, rewards.

For each micro-batch TRL asks all ranks, appends what follows from their answers to a list, and logs the list's mean: a mean
over groups of as many micro-batches as there are ranks. Here each micro-batch answers for itself, as on a single GPU; at the
end of a step or an evaluation, ranks exchange what they have appended and put it in the order of micro-batches.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler
from transformers import Trainer

from hf_spot.policy.micro_batches import Shares
from hf_spot.training.upstream import ALL_BATCHES, INSIDE, OWN_METRICS, PREDICTION_STEP, TRAIN_TOKENS

# Modules of trainers that ask other ranks only for metrics which they log, never for a loss.
METRICS_ONLY = ("trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "trl.trainer.reward_trainer")
_TOTAL = "num_tokens"  # TRL logs it as it logs a mean: as a list of one value
_ASKING = ("gather", "gather_for_metrics")  # of accelerate's Accelerator


@dataclass
class _Answers:
    """What a micro-batch has added.

    Args:
        number: of the micro-batch.
        appended: values for each list, by its name.
        tokens: how many it has added to those trained.
    """

    number: int
    appended: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0


class ExactMetrics:
    """Collects a trainer's metrics by micro-batch. Does nothing with trainers that have none.

    Args:
        trainer: the Trainer.
        shares: which rank computes which micro-batch.
        rank: of this process.
    """

    def __init__(self, trainer: Trainer, shares: Shares, rank: int) -> None:
        self._trainer = trainer
        self._shares = shares
        self._rank = rank
        self._exist = OWN_METRICS.is_on(trainer) and any(kind.__module__ in METRICS_ONLY for kind in type(trainer).__mro__)
        self._answers: list[_Answers] = []
        self._evaluated: list[_Answers] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Collect those of evaluations within the block."""
        if not self._exist:
            yield
            return
        with PREDICTION_STEP.replaced(self._trainer, self._prediction_step):
            yield

    # -- training -----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin a step, and forget what was collected in one that was interrupted, or in an evaluation."""
        self._answers.clear()
        self._evaluated.clear()

    @contextlib.contextmanager
    def of_turn(self, turn: int, *, counts: bool) -> Iterator[None]:
        """Collect what the block adds, which computes the micro-batch of one of this rank's turns.

        Args:
            turn: which.
            counts: whether its result counts.
        """
        with self._collected("train", self._shares.number(self._rank, turn)) as answers:
            yield
        if answers is not None and counts:
            self._answers.append(answers)

    def end(self) -> None:
        """Add what all ranks have collected in a step. All ranks must call it."""
        if self._exist:
            self._add("train", self._answers)
            self._answers.clear()

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def _prediction_step(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def prediction_step(*args: Any, **kwargs: Any) -> Any:
            running = self._trainer.accelerator.gradient_state
            batches = _batches_of(running.active_dataloader)
            if batches is None:
                return plain(*args, **kwargs)
            with self._collected("eval", self._shares.number(self._rank, len(self._evaluated))) as answers:
                outcome = plain(*args, **kwargs)
            assert answers is not None
            self._evaluated.append(answers)
            if running.end_of_dataloader:
                # A rank that has no batch left for the last turn was given one of the first ones again.
                self._add("eval", [one for one in self._evaluated if one.number < batches])
                self._evaluated.clear()
            return outcome

        return prediction_step

    # -- both ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _collected(self, mode: str, number: int) -> Iterator[_Answers | None]:
        """Take what the block adds to the lists off them again."""
        if not self._exist:
            yield None
            return
        lists, before = OWN_METRICS.of(self._trainer)[mode], dict(OWN_METRICS.of(self._trainer)[mode])
        lengths = {name: len(values) for name, values in lists.items()}
        tokens, answers = TRAIN_TOKENS.of(self._trainer), _Answers(number)
        try:
            with self._each_for_itself():
                yield answers
            for name, values in lists.items():
                if name != _TOTAL:
                    answers.appended[name] = list(values[lengths.get(name, 0) :])
            answers.tokens = TRAIN_TOKENS.of(self._trainer) - tokens
        finally:
            lists.clear()
            lists.update(before)
            for name, length in lengths.items():
                del lists[name][length:]
            TRAIN_TOKENS.set(self._trainer, tokens)

    @contextlib.contextmanager
    def _each_for_itself(self) -> Iterator[None]:
        """Answer a trainer that asks all ranks for metrics with its own value."""
        accelerator: Any = self._trainer.accelerator
        before = {name: vars(accelerator)[name] for name in _ASKING if name in vars(accelerator)}
        for name in _ASKING:
            setattr(accelerator, name, _answering(getattr(accelerator, name)))
        try:
            yield
        finally:
            for name in _ASKING:
                delattr(accelerator, name)
            vars(accelerator).update(before)

    def _add(self, mode: str, mine: list[_Answers]) -> None:
        every = [one for of_rank in self._exchange(mine) for one in of_rank]
        lists: dict[str, list[float]] = OWN_METRICS.of(self._trainer)[mode]
        TRAIN_TOKENS.set(self._trainer, TRAIN_TOKENS.of(self._trainer) + sum(one.tokens for one in every))
        for one in sorted(every, key=lambda one: one.number):
            for name, values in one.appended.items():
                lists[name].extend(values)
        if every:
            lists[_TOTAL] = [TRAIN_TOKENS.of(self._trainer)]

    def _exchange(self, mine: list[_Answers]) -> list[list[_Answers]]:
        if self._shares.ranks == 1:
            return [mine]
        found: list[Any] = [None] * self._shares.ranks
        dist.all_gather_object(found, mine)
        return found


def _answering(plain: Callable[..., Any]) -> Callable[..., Any]:
    def ask(value: Any, *args: Any, **kwargs: Any) -> Any:
        asking = sys._getframe(1).f_globals.get("__name__")
        return value if asking in METRICS_ONLY else plain(value, *args, **kwargs)

    return ask


def _batches_of(loader: Any) -> int | None:
    """Return how many batches an evaluation has on a single GPU; None if that is not known, or each rank sees all of them."""
    if loader is None:
        return None
    inside = INSIDE.of(loader) if INSIDE.is_on(loader) else loader
    sampler = getattr(inside, "batch_sampler", None)
    if isinstance(sampler, BatchSamplerShard):
        return len(ALL_BATCHES.of(sampler))
    return len(sampler) if isinstance(sampler, BatchSampler) and not dist.is_initialized() else None
