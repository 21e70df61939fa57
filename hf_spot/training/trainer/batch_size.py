"""Keeps the samples of each optimizer step when a run resumes with another number of GPUs, or with smaller ones."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from hf_spot.errors import ConfigError
from hf_spot.log import warn_for_all
from hf_spot.policy.resize import Batches, Fit, fit, keep_total, repair
from hf_spot.training.trainer.engines import refuse_other_ranks
from hf_spot.training.upstream import TOTAL_BATCH_SIZE, TRAIN_BATCH_SIZE


def batches(trainer: Trainer) -> Batches:
    """Return how Trainer composes an optimizer step, including the effect of ``auto_find_batch_size``."""
    args = trainer.args
    micro_batch = int(TRAIN_BATCH_SIZE.of(trainer))
    ranks = int(TOTAL_BATCH_SIZE.of(trainer)(args)) // (micro_batch * args.gradient_accumulation_steps)
    if _splits(trainer):
        return Batches(micro_batch // ranks, args.gradient_accumulation_steps, ranks)
    gpus = max(1, args.n_gpu)
    return Batches(micro_batch // gpus, args.gradient_accumulation_steps, ranks * gpus)


def to_details(made: Batches) -> dict[str, int]:
    """Return what a commit records about the batches."""
    return {
        "per_device_train_batch_size": made.per_device,
        "gradient_accumulation_steps": made.accumulation,
        "data_parallel_size": made.world_size,
    }


def from_details(details: dict[str, Any]) -> Batches | None:
    """Return the batches that `to_details` recorded; None for a commit that was pushed by hand."""
    if "per_device_train_batch_size" not in details:
        return None
    ranks = details.get("data_parallel_size", details["world_size"])
    return Batches(details["per_device_train_batch_size"], details["gradient_accumulation_steps"], ranks)


def keep_samples(trainer: Trainer, details: dict[str, Any], *, allow_change: bool) -> None:
    """Make the steps of this launch contain the same samples as before, by setting the accumulation or the device batch size.

    Must be called on every rank, before ``train()`` does anything.

    Args:
        trainer: the Trainer, about to resume.
        details: details of the commit that it resumes from.
        allow_change: continue with other samples if they can't be kept.

    Raises:
        ConfigError: the samples of a step can't be kept, or an engine can't resume with this number of ranks.
    """
    args = trainer.args
    before = from_details(details)
    if before is None:
        return
    now = batches(trainer)
    if args.auto_find_batch_size and before.world_size == now.world_size:
        now = Batches(before.per_device, now.accumulation, now.world_size)  # Trainer itself keeps the size that it found
    refuse_other_ranks(trainer, before, now)
    found = fit(before, now)
    if found is Fit.REGROUPED:
        warn_for_all(
            "an optimizer step was %s, and is now %s: the samples are the same, but results will not be bit-exact", before, now
        )
    elif found is Fit.OTHER and allow_change:
        warn_for_all("an optimizer step was %s, and is now %s: steps, learning rate and data change", before, now)
    elif found is Fit.OTHER:
        kept = keep_total(before, now) if _may_change(trainer) else None
        if kept is None:
            raise ConfigError(
                f"an optimizer step of this run is {before} samples; this launch would make it {now}",
                hint=f"{repair(before, now) or 'use another number of ranks'}; to change it anyway: --allow-batch-change",
            )
        _apply(trainer, kept)
        warn_for_all(
            "an optimizer step was %s, and would be %s: set to %s. The samples are the same, but results will not be bit-exact",
            before,
            now,
            kept,
        )


def keep_full_samples(trainer: Trainer, full_ranks: int) -> None:
    """Make the steps of a new training contain the samples of all ranks that may come, however many are there now.

    Must be called on every rank, before ``train()`` does anything.

    Args:
        trainer: the Trainer, about to begin.
        full_ranks: the number of ranks if all machines are there; 0 if the machines are fixed.

    Raises:
        ConfigError: these ranks can't have the samples of that many.
    """
    now = batches(trainer)
    if not full_ranks or full_ranks == now.world_size:
        return
    full = Batches(now.per_device, now.accumulation, full_ranks)
    kept = keep_total(full, now) if _may_change(trainer) else None
    if kept is None:
        raise ConfigError(
            f"an optimizer step of all machines is {full} samples, and {now.world_size} ranks can't share them equally",
            hint="another --num_machines MIN:MAX, per_device_train_batch_size or gradient_accumulation_steps",
        )
    _apply(trainer, kept)
    warn_for_all("an optimizer step of all machines is %s, and of these it is %s: the samples are the same", full, kept)


def _may_change(trainer: Trainer) -> bool:
    # Trainers with data loaders of their own (GRPO, sentence-transformers) and DeepSpeed have used the numbers already.
    own_loader = type(trainer).get_train_dataloader is not Trainer.get_train_dataloader
    return not own_loader and not trainer.is_deepspeed_enabled and not _splits(trainer)


def _splits(trainer: Trainer) -> bool:
    config: Any = trainer.args.accelerator_config
    return bool(config.split_batches)


def _apply(trainer: Trainer, made: Batches) -> None:
    trainer.args.gradient_accumulation_steps = made.accumulation
    trainer.args.per_device_train_batch_size = made.per_device
    TRAIN_BATCH_SIZE.set(trainer, trainer.args.train_batch_size)
