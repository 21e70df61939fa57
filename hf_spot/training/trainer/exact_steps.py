"""Optimizer steps whose result does not depend on the number of ranks: `SpotArguments.exact_on_any_gpus`.

A step is the one that a single GPU would do with as many micro-batches (``gradient_accumulation_steps``), whoever computes
them:

* the run keeps their number and their samples (`hf_spot.policy.micro_batches`, `hf_spot.training.data.micro_batches`);
* each micro-batch has random numbers of its own, for its data and for the model (dropout, NEFTune, stochastic depth);
* gradients are summed without rounding errors (`hf_spot.training.ranks.exact_gradients`): DistributedDataParallel, which adds
  in an order that depends on the ranks, is kept from synchronizing;
* losses are normalized by the items of the whole step, and each rank logs the loss of the whole step;
* metrics that a trainer of TRL computes beside the loss belong to a micro-batch (`hf_spot.training.trainer.exact_metrics`).

What follows from that is Trainer's own: clipping, optimizer, schedule, evaluations, checkpoints.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from torch.utils.data import BatchSampler
from transformers import Trainer

from hf_spot.errors import ConfigError
from hf_spot.log import warn_for_all
from hf_spot.policy.micro_batches import MODEL, Shares, count_in, seed_of, steps_in
from hf_spot.run.checkpoint import Checkpoint
from hf_spot.training.data.micro_batches import MicroBatches, seed_fetches, seeded
from hf_spot.training.ranks.exact_gradients import ExactGradients
from hf_spot.training.trainer.batch_size import batches, from_details
from hf_spot.training.trainer.exact_limits import OPTION, WITHOUT, looking_for_collective_calls
from hf_spot.training.trainer.exact_metrics import ExactMetrics
from hf_spot.training.upstream import (
    ACCUMULATION,
    ALL_BATCHES,
    COUNT_FLOS,
    COUNT_ITEMS,
    COUNT_TOKENS,
    GET_BATCH_SAMPLES,
    INSIDE,
    LOSS_SO_FAR,
    NESTED_GATHER,
    TRAIN_BATCH_SIZE,
    TRAIN_LOADER,
    TRAINING_STEP,
)

log = logging.getLogger("hf_spot")

COUNT = "micro_batches"  # the key in commits and descriptions
_METHODS = (TRAINING_STEP, GET_BATCH_SAMPLES, COUNT_FLOS, COUNT_TOKENS, TRAIN_LOADER)


def exact_steps(trainer: Trainer, restored: Checkpoint | None, described: Mapping[str, Any], full_ranks: int = 0) -> ExactSteps:
    """Return what makes the steps of a training independent of the number of ranks.

    Args:
        trainer: the Trainer.
        restored: the commit that the training resumes from.
        described: description of the training in the journal; empty for a new one.
        full_ranks: the number of ranks if all machines are there; 0 if the machines are fixed.
    """
    details = {} if restored is None else restored.details
    if restored is not None and COUNT not in details:
        warn_for_all("up to step %d this training depends on the number of GPUs: %s is new", restored.step, OPTION)
    return ExactSteps(trainer, _count_of(details, described, trainer, full_ranks), details.get("per_device_train_batch_size"))


def tell_no_longer_exact(restored: Checkpoint) -> None:
    """Warn if a training was exact on any number of GPUs up to a commit, and the option is now missing."""
    if COUNT in restored.details:
        warn_for_all("up to step %d this training was exact on any number of GPUs: now %s is missing", restored.step, OPTION)


def _count_of(details: Mapping[str, Any], described: Mapping[str, Any], trainer: Trainer, full_ranks: int) -> int:
    """Return how many micro-batches an optimizer step of the run has. A new run has as many as this launch would make
    with all machines."""
    for told in (details, described):
        if isinstance(told.get(COUNT), int):
            return int(told[COUNT])
    before = from_details(dict(details)) if details else None
    if before is not None:
        return before.accumulation * before.world_size
    now = batches(trainer)
    return now.accumulation * (full_ranks or now.world_size)


class ExactSteps:
    """Replaces the parts of a Trainer that depend on the number of ranks, from `watch` to `close`.

    Args:
        trainer: the Trainer.
        count: micro-batches of an optimizer step, on all ranks together.
        per_device: samples of a micro-batch; None for those of the trainer's settings.

    """

    def __init__(self, trainer: Trainer, count: int, per_device: int | None) -> None:
        self._trainer = trainer
        self._shares = Shares(count, trainer.args.world_size)
        self._per_device = per_device or trainer.args.per_device_train_batch_size
        self._rank = trainer.args.process_index
        self._seed = trainer.args.seed
        self._data_seed = trainer.args.seed if trainer.args.data_seed is None else trainer.args.data_seed
        self._gradients = ExactGradients(self._parameters, trainer.args.world_size, trainer.args.ddp_timeout_delta)
        self._metrics = ExactMetrics(trainer, self._shares, self._rank)
        self._sampler: MicroBatches | None = None
        self._iterator: Any = None
        self._step = self._done = self._counted = self._count = 0
        self._losses: list[float] = []
        self._state_compared = False
        self._closing = contextlib.ExitStack()

    @property
    def count(self) -> int:
        """Return how many micro-batches a step has, on all ranks together."""
        return self._shares.count

    def to_details(self) -> dict[str, int]:
        """Return what a commit records: a step as a single GPU would do it."""
        count = self._shares.count
        return {
            COUNT: count,
            "per_device_train_batch_size": self._per_device,
            "gradient_accumulation_steps": count,
            "data_parallel_size": 1,
        }

    def watch(self) -> None:
        """Start replacing. Call it before the training begins, and before others wrap ``training_step``."""
        trainer, args = self._trainer, self._trainer.args
        self._set_for_now("gradient_accumulation_steps", self._shares.each)
        self._set_for_now("per_device_train_batch_size", self._per_device)
        # The normalization below covers all ranks; Trainer and TRL would multiply by the number of ranks, for DDP's mean.
        self._set_for_now("average_tokens_across_devices", False)
        TRAIN_BATCH_SIZE.set(trainer, args.train_batch_size)
        if args.device.type == "cpu":
            self._closing.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)  # the order of sums within a tensor depends on it, and torchrun sets another than python
        self._plain_step = TRAINING_STEP.of(trainer)
        self._plain_batches = GET_BATCH_SAMPLES.of(trainer)
        seed_fetches()
        for name, method in zip(
            _METHODS,
            (self._training_step, self._batches_of_step, self._count_flos, self._count_tokens, self._loader),
            strict=True,
        ):
            name.set(trainer, method)
            self._closing.callback(self._restore, name, method)
        import transformers.trainer as trainer_module

        self._closing.enter_context(NESTED_GATHER.replaced(trainer_module, self._gather))
        self._closing.enter_context(self._metrics.watching())
        self._tell()

    def close(self) -> None:
        """Restore what was replaced."""
        self._closing.close()

    def _set_for_now(self, name: str, value: Any) -> None:
        args = self._trainer.args
        self._closing.callback(setattr, args, name, getattr(args, name))
        setattr(args, name, value)

    def _restore(self, name: Any, method: Any) -> None:
        if vars(self._trainer).get(name.name) == method:  # others have wrapped it, and restore all
            name.restore(self._trainer)

    def _tell(self) -> None:
        shares = self._shares
        log.info(
            "results do not depend on the number of GPUs: a step is %d micro-batches of %d samples, %s",
            shares.count,
            self._per_device,
            "all on one rank" if shares.ranks == 1 else f"{shares.each} on each of {shares.ranks} ranks",
        )
        if shares.dropped:
            warn_for_all(
                "%d micro-batches can't be divided equally among %d ranks: in each step %d of %d computations are for nothing",
                shares.count,
                shares.ranks,
                shares.dropped,
                shares.each * shares.ranks,
            )

    # -- data ---------------------------------------------------------------------------------------------------------

    def _loader(self) -> Any:
        trainer, args = self._trainer, self._trainer.args
        each = args.gradient_accumulation_steps
        args.gradient_accumulation_steps = self._shares.count  # a sampler that groups by length must not see the ranks
        try:
            loader = TRAIN_LOADER.plain(trainer)()
        finally:
            args.gradient_accumulation_steps = each
        inside = INSIDE.of(loader) if INSIDE.is_on(loader) else loader
        sampler = getattr(inside, "batch_sampler", None)
        if isinstance(sampler, MicroBatches):
            return loader
        if isinstance(sampler, BatchSamplerShard):
            sampler = ALL_BATCHES.of(sampler)
        if not isinstance(sampler, BatchSampler) or not isinstance(loader, DataLoaderShard):
            raise ConfigError(
                f"{OPTION} can't divide the batches of {type(loader).__name__}",
                hint=f"use a dataset with a length, or {WITHOUT}",
            )
        self._sampler = MicroBatches(sampler, self._shares, self._rank, self._data_seed, self._epoch)
        # A DataLoader refuses to change its sampler; nothing has been drawn from it yet.
        object.__setattr__(inside, "batch_sampler", self._sampler)
        return loader

    def _epoch(self) -> int:
        return int(self._trainer.state.epoch or 0)

    # -- a step -------------------------------------------------------------------------------------------------------

    def _batches_of_step(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        assert self._sampler is not None
        steps = steps_in(self._sampler.batches, self._shares.count)
        if epoch_iterator is not self._iterator:
            resumes = self._iterator is None and not self._trainer.args.ignore_data_skip
            self._iterator, self._step = epoch_iterator, self._trainer.state.global_step % steps if resumes else 0
        else:
            self._step += 1
        self._count, self._done, self._losses = count_in(self._step, self._sampler.batches, self._shares.count), 0, []
        self._counted = 0
        self._gradients.begin(self._count)
        self._metrics.begin()
        found, _ = self._plain_batches(epoch_iterator, num_batches, device)
        return found, self._items(found, device)

    def _items(self, found: list[Any], device: torch.device) -> Any:
        """Return the number of items in the step, over all its micro-batches; None if it does not matter."""
        mine = [one for turn, one in enumerate(found) if self._is_mine(turn)]
        of_all = COUNT_ITEMS.of(self._trainer)(found, device)  # for its type: this rank may have no micro-batch of its own
        if of_all is None or (self._shares.ranks == 1 and len(mine) == len(found)):
            return of_all
        of_mine = COUNT_ITEMS.of(self._trainer)(mine, device) if mine else None
        told = torch.as_tensor(0 if of_mine is None else of_mine, device=device).to(torch.float64)
        summed = self._trainer.accelerator.reduce(told, reduction="sum")
        return summed.to(of_all.dtype) if isinstance(of_all, torch.Tensor) else type(of_all)(summed.item())

    def _is_mine(self, turn: int) -> bool:
        """Return whether the result of this rank's turn counts."""
        return self._shares.number(self._rank, turn) < self._count

    def _training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        trainer, turn = self._trainer, self._done
        number = self._shares.number(self._rank, turn)
        seed = seed_of(self._seed, MODEL, (trainer.state.global_step, number if self._is_mine(turn) else 0))
        each, before, first = ACCUMULATION.of(trainer), self._note_state(), not self._state_compared
        self._state_compared = True
        ACCUMULATION.set(trainer, self._count)
        trainer.args.gradient_accumulation_steps = self._shares.count  # what a training_step of one's own may divide by
        try:
            with contextlib.ExitStack() as inside:
                inside.enter_context(trainer.accelerator.no_sync(model))
                inside.enter_context(seeded(seed, gpus=trainer.args.device.type == "cuda"))
                inside.enter_context(self._sending())
                inside.enter_context(self._metrics.of_turn(turn, counts=self._is_mine(turn)))
                if first:
                    inside.enter_context(looking_for_collective_calls())
                loss: torch.Tensor = self._plain_step(model, inputs, num_items_in_batch)
        finally:
            ACCUMULATION.set(trainer, each)
            trainer.args.gradient_accumulation_steps = self._shares.each
        self._check_state(before)
        if self._is_mine(turn):
            self._gradients.add()
            self._losses.append(float(loss))
        else:
            self._gradients.drop()
            self._losses.append(0.0)
        self._done += 1
        if self._done < self._shares.each:
            return torch.zeros_like(loss)
        told = self._gradients.finish(self._losses)
        self._metrics.end()
        return torch.full_like(loss, self._total(told))

    def _sending(self) -> contextlib.AbstractContextManager[None]:
        """Return a block that sends gradients as soon as they are computed, in a rank's last turn.

        Not with a ``training_step`` of the user's own, which may change gradients after the backward pass.
        """
        known = getattr(self._plain_step, "__module__", "").partition(".")[0] in ("transformers", "trl")
        is_last = self._done == self._shares.each - 1 and self._is_mine(self._done)
        return self._gradients.sending() if known and is_last else contextlib.nullcontext()

    def _total(self, told: list[list[float]]) -> float:
        """Return the loss of the step: the correctly rounded sum of its micro-batches' losses."""
        every = [one for of_rank in told for one in of_rank]
        return math.fsum(every) if all(map(math.isfinite, every)) else sum(every)

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield each parameter that is trained, once: those of the optimizer, and others of the model."""
        seen: set[int] = set()
        groups = [] if self._trainer.optimizer is None else self._trainer.optimizer.param_groups
        model: Any = self._trainer.model
        for one in (*model.parameters(), *(one for group in groups for one in group["params"])):
            if id(one) not in seen:
                seen.add(id(one))
                yield one

    def _state(self) -> dict[str, torch.Tensor]:
        model: Any = self._trainer.model
        every = {**dict(model.named_buffers()), **dict(model.named_parameters())}
        return {name: one for name, one in every.items() if not one.is_inference()}

    def _note_state(self) -> dict[str, tuple[int, str]]:
        """Return what shows that a micro-batch has changed buffers or parameters: numbers of their changes, and sums.

        Sums only the first time, since they take a pass over all of them; torch's batch_norm changes some buffers without
        counting it, and so does whoever changes ``parameter.data``.
        """
        first = not self._state_compared
        return {name: (one._version, _sum_of(one) if first else "") for name, one in self._state().items()}

    def _check_state(self, before: dict[str, tuple[int, str]]) -> None:
        """Refuse a model that changes itself while it computes gradients: each rank would do so with its own micro-batches.

        Raises:
            ConfigError: buffers or parameters have changed since `_note_state`.
        """
        now = self._state()
        changed = [
            name
            for name, (version, sum_before) in before.items()
            if name not in now or now[name]._version != version or (sum_before and _sum_of(now[name]) != sum_before)
        ]
        if changed:
            raise ConfigError(
                f"{OPTION}: {', '.join(changed[:3])}{' and others' if changed[3:] else ''} change with each "
                "micro-batch that a rank sees, which can't be exact on any number of GPUs",
                hint="change them once a step, in a callback or an optimizer that steps after the backward pass (for "
                f"BatchNorm: model.eval(), or GroupNorm in its place), or {WITHOUT}",
            )

    # -- what is counted ----------------------------------------------------------------------------------------------

    def _count_flos(self, inputs: Any) -> Any:
        # Trainer calls it once for each micro-batch, also for those that are passed over, and then `_count_tokens`.
        self._counted += 1
        return COUNT_FLOS.plain(self._trainer)(inputs) if self._is_mine(self._counted - 1) else 0

    def _count_tokens(self, inputs: Any) -> None:
        if not self._is_mine(self._counted - 1):
            inputs = {name: value[:0] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        COUNT_TOKENS.plain(self._trainer)(inputs)

    def _gather(self, plain: Any) -> Any:
        def gather(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            # The loss of a step is the same on all ranks; the mean of equal numbers may round to another one.
            return tensors if tensors is LOSS_SO_FAR.of(self._trainer) else plain(tensors, *args, **kwargs)

        return gather


def _sum_of(tensor: torch.Tensor) -> str:
    """Return the sum of a tensor's elements, of which all NaN are equal; nothing for kinds that have none."""
    if tensor.is_complex() or tensor.is_quantized or tensor.is_meta or tensor.layout is not torch.strided:
        return ""
    return str(float(tensor.detach().sum(dtype=torch.float64)))
