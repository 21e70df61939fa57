"""Keeps the samples of each optimizer step when a run resumes with another number of GPUs, or with smaller ones."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from hf_spot.errors import ConfigError
from hf_spot.log import warn_for_all
from hf_spot.policy.resize import Batches, Fit, fit, keep_total, repair
from hf_spot.training.trainer.engines import refuse_other_ranks
from hf_spot.training.upstream import TOTAL_BATCH_SIZE, TRAIN_BATCH_SIZE

CUT = "epoch_was_cut"  # in details of a commit
_CHANGED = "accumulation_began_with"


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


def accumulation_changed(began: int, now: int) -> dict[str, int]:
    """Return what a commit records about an accumulation that the script has changed during the training.

    Args:
        began: ``gradient_accumulation_steps`` when the training began.
        now: the current value.
    """
    return {} if began == now else {_CHANGED: began}


def tell_of_accumulation(began: int, now: int, url: str) -> None:
    """Log that the accumulation has changed during the training, and what follows.

    Args:
        began: ``gradient_accumulation_steps`` when the training began.
        now: the current value.
        url: of the run.
    """
    warn_for_all(
        "gradient_accumulation_steps has changed from %d to %d during the training: Trainer counts batches by one value, so "
        "checkpoints from here on can't be resumed at their place in the data. %s",
        began,
        now,
        _way_out(url, None, now),
    )


def tell_of_cut(url: str) -> None:
    """Log that a callback ends a pass over the data early, and what follows.

    Args:
        url: of the run.
    """
    warn_for_all(
        "a callback ends an epoch early (should_epoch_stop): Trainer counts whole epochs, so checkpoints from here on can't be "
        "resumed at their place in the data. Let the data set end there, or train the rest as a run of its own: hf-spot launch "
        "--from %s@STEP --store NEW …",
        url,
    )


def _way_out(url: str, step: int | None, now: int) -> str:
    at = "STEP" if step is None else str(step)
    return (
        f"Train that part as a run of its own: hf-spot launch --from {url}@{at} --store NEW … with "
        f"TrainingArguments(gradient_accumulation_steps={now})"
    )


def from_details(details: dict[str, Any]) -> Batches | None:
    """Return the batches that `to_details` recorded; None for a commit that was pushed by hand."""
    if "per_device_train_batch_size" not in details:
        return None
    ranks = details.get("data_parallel_size", details["world_size"])
    return Batches(details["per_device_train_batch_size"], details["gradient_accumulation_steps"], ranks)


def keep_samples(trainer: Trainer, details: dict[str, Any], *, allow_change: bool, url: str = "RUN") -> None:
    """Make the steps of this launch contain the same samples as before, by setting the accumulation or the device batch size.

    Must be called on every rank, before ``train()`` does anything.

    Args:
        trainer: the Trainer, about to resume.
        details: details of the commit that it resumes from.
        allow_change: continue with other samples if they can't be kept.
        url: of the run, for a message.

    Raises:
        ConfigError: the samples of a step can't be kept, the script had changed their number before the save, or an engine
            can't resume with this number of ranks.
    """
    args = trainer.args
    before = from_details(details)
    if before is None:
        return
    if _CHANGED in details and "from" not in details and not allow_change:
        raise ConfigError(
            f"the script had changed gradient_accumulation_steps from {details[_CHANGED]} to {before.accumulation} before this "
            "checkpoint was saved: Trainer counts batches by one value and can't resume at this place in the data",
            hint=f"{_way_out(url, details.get('step'), before.accumulation)}; to go on at another place: --allow-batch-change",
        )
    if CUT in details and "from" not in details and not allow_change:
        raise ConfigError(
            "a callback had ended an epoch early (should_epoch_stop) before this checkpoint was saved: Trainer counts whole "
            "epochs and can't resume at this place in the data",
            hint=f"hf-spot launch --from {url}@{details.get('step')} --store NEW …; to go on at another place: "
            "--allow-batch-change --on-mismatch warn",
        )
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
