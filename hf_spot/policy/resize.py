"""Whether a run may continue with different batches than it began with. Pure.

The number of samples in one optimizer step must not change: otherwise the number of steps, the learning rate of each step
and the samples that it sees would change silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Fit(str, Enum):
    """How the batches of a launch compare with those of the checkpoint that it resumes."""

    SAME = "same"
    REGROUPED = "regrouped"  # the same samples in each step, added up in another order
    OTHER = "other"


@dataclass(frozen=True)
class Batches:
    """The composition of an optimizer step.

    Args:
        per_device: samples in one micro-batch of one rank.
        accumulation: micro-batches of a rank in one step.
        world_size: number of ranks.
    """

    per_device: int
    accumulation: int
    world_size: int

    @property
    def total(self) -> int:
        """Return the number of samples in one optimizer step."""
        return self.per_device * self.accumulation * self.world_size

    def __str__(self) -> str:
        return f"{self.per_device} a device x {self.accumulation} accumulated x {self.world_size} ranks = {self.total}"


def fit(before: Batches, now: Batches) -> Fit:
    """Compare the batches of a checkpoint with those of this launch."""
    if before == now:
        return Fit.SAME
    return Fit.REGROUPED if before.total == now.total else Fit.OTHER


def keep_total(before: Batches, now: Batches) -> Batches | None:
    """Return the batches nearest to those of this launch that keep the samples of a step. Return None if no whole number
    does, or if only the accumulation differs, which must be deliberate.

    Micro-batches never grow: more might not fit into memory.
    """
    if (before.per_device, before.world_size) == (now.per_device, now.world_size) or before.total % now.world_size:
        return None
    a_rank = before.total // now.world_size
    per_device = next(size for size in range(min(now.per_device, a_rank), 0, -1) if a_rank % size == 0)
    return Batches(per_device, a_rank // per_device, now.world_size)


def repair(before: Batches, now: Batches) -> str:
    """Return the option that would restore the total, as written on a command line; empty if no whole number does."""
    micro_batch = now.per_device * now.world_size
    if before.total % micro_batch == 0:
        return f"--gradient_accumulation_steps {before.total // micro_batch}"
    ranks = now.world_size * now.accumulation
    if before.total % ranks == 0:
        return f"--per_device_train_batch_size {before.total // ranks}"
    return ""


def divided_otherwise(parallel: object) -> str | None:
    """Return which parts of accelerate's ``ParallelismConfig`` divide a model or its samples among ranks; None if none does.

    Args:
        parallel: the configuration, or None.
    """
    sizes = {name: int(getattr(parallel, f"{name}_size", None) or 1) for name in ("tp", "cp", "sp")}
    found = [f"{name}_size={size}" for name, size in sizes.items() if size > 1]
    return f"ParallelismConfig({', '.join(found)})" if found else None
