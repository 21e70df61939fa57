"""The gradients of an optimizer step, summed over micro-batches and ranks without error (`hf_spot.training.ranks.exact_sum`).

Each rank owns a part of the parameters. It gets that part of all gradients (an all-to-all), adds them up, rounds once, and
sends the result to all (an all-gather).

Overlap: parameters are divided into buckets, the last ones first, since their gradients are computed first. While the
backward pass of a rank's last micro-batch goes on, each bucket is sent as soon as its gradients are there, as
DistributedDataParallel does (Li et al., "PyTorch Distributed", VLDB 2020). All ranks send in the same order, in a process
group of their own, so that neither parameters without a gradient nor collective calls of a model can get in between. What is
left for the time after the backward pass is the last bucket, the additions of the owned parts, and the all-gather.

What travels, for each parameter and rank, with R ranks and d bytes of a gradient (4 in float32):

==================================  =====================================  ===========================
gradients are summed by              bytes during the backward pass           bytes after it
==================================  =====================================  ===========================
DistributedDataParallel              2 d (R-1)/R (ring all-reduce)            its last bucket
exact, one micro-batch on each rank  d (R-1)/R                                d (R-1)/R, and a bucket
exact, several                       8 (R-1)/R (the sum in float64)           d (R-1)/R, and a bucket
==================================  =====================================  ===========================

So one micro-batch costs the bytes of an all-reduce, whose lower bound this is (Patarasuk and Yuan, "Bandwidth Optimal
All-reduce Algorithms for Clusters of Workstations", JPDC 2009): a reduce-scatter, whose sum is computed by its receiver
here, and an all-gather. Several cost (8 + d) / 2d as many, 1.5 times in float32. An int64 all-reduce, whose sum is as free of
order and which NCCL has (ncclInt64, ncclSum), costs 16 (R-1)/R: twice as many as float32, and rounds small elements to a
grid. On paper for NCCL, with 1e9 parameters in float32 on 8 GPUs: 3.5 GB before the end of the backward pass (7 GB with
several micro-batches) and 3.5 GB after it, which take 8 ms at the 450 GB/s that an H100 sends over NVLink, and 70 ms at 50
GB/s (400 Gb/s for each GPU).

What is computed, for each parameter: with several micro-batches on a rank, one addition of `exact_sum` for each of them but
the first (on a CPU about 3 ns; on a GPU it moves about 150 bytes, 0.05 ns at 3.35 TB/s, and waits for the GPU once in each
bucket to learn whether it was exact), and R-1 for a part of 1/R. A micro-batch of T tokens takes about 6 T operations for
each parameter (Kaplan et al., "Scaling Laws for Neural Language Models", 2020): the addition is a small share as soon as T
is some hundreds.

Memory, for each parameter in float32, at the end of the backward pass: DistributedDataParallel holds the gradient and a copy
in its buckets, 8 bytes; its buckets stay here, unused. With one micro-batch on each rank there are the gradients that were
sent and those that have arrived, 4 bytes more. With several there are the sum, what has arrived, and the last gradients, to
which a layer that is computed twice may add: 16 bytes more at most.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from hf_spot.errors import ConfigError
from hf_spot.training.ranks.exact_sum import NOTHING, Levels, add, levels_of, of_one, rounded, sum_of_two

_BUCKET = 4_000_000  # elements that travel together
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class _Bucket:
    """Parameters whose gradients are summed together, as one flat tensor that all ranks own equally long parts of.

    Args:
        parameters: of one dtype and device, with their numbers.
        ranks: number of ranks.
        raw: the gradients of this rank's only micro-batch, if no rank has more than one.
        levels: the exact sum of those of several.
        awaited: numbers of the parameters whose gradients the backward pass has yet to compute.
        sent: handle and place of what arrives, once this rank's part has been sent.
        gradients: what was sent last, by number of the parameter.
        grown: what became of these, if the backward pass has added to them since.
        result: the rounded sum.
    """

    parameters: list[tuple[int, torch.nn.Parameter]]
    ranks: int
    raw: torch.Tensor | None = None
    levels: Levels | None = None
    awaited: set[int] = field(default_factory=set)
    sent: tuple[Any, torch.Tensor] | None = None
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)
    grown: dict[int, torch.Tensor] = field(default_factory=dict)
    result: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def length(self) -> int:
        return sum(one.numel() for _, one in self.parameters)

    @property
    def part(self) -> int:
        """Return how many elements a rank owns."""
        return -(-self.length // self.ranks)

    @property
    def example(self) -> torch.nn.Parameter:
        return self.parameters[0][1]

    def clear(self) -> None:
        self.raw = self.levels = self.sent = None
        self.gradients, self.grown, self.result = {}, {}, torch.empty(0)

    def views(self, flat: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return each parameter's place in one tensor of all parts, by number."""
        found, at = {}, 0
        for number, one in self.parameters:
            found[number] = flat[at : at + one.numel()].view_as(one)
            at += one.numel()
        return found

    def flat(self, gradients: dict[int, torch.Tensor]) -> torch.Tensor:
        """Return gradients, by number, as one tensor of all parts; `NOTHING` stands for those that are missing."""
        pieces = [
            gradients[number].reshape(-1) if number in gradients else self._nothing(one.numel())
            for number, one in self.parameters
        ]
        return torch.cat([*pieces, self._nothing(self.part * self.ranks - self.length)])

    def _nothing(self, length: int) -> torch.Tensor:
        return torch.full((length,), NOTHING, dtype=self.example.dtype, device=self.example.device)


class ExactGradients:
    """Sums gradients over micro-batches and ranks. All ranks must do the same calls, but for `sending`.

    Args:
        parameters: returns the parameters, in the same order on each rank.
        ranks: number of ranks; more than one need an initialized process group.
        timeout: how long a rank waits for the others; None for the default of torch.
    """

    def __init__(
        self, parameters: Callable[[], Iterable[torch.nn.Parameter]], ranks: int, timeout: timedelta | None = None
    ) -> None:
        self._parameters = parameters
        self._ranks = ranks
        self._group: Any = dist.new_group(timeout=timeout) if ranks > 1 else None
        self._buckets: list[_Bucket] = []
        self._known: list[int] = []
        self._used: list[bool] = []
        self._next = 0
        self._count = 1

    def begin(self, count: int) -> None:
        """Forget what has been added, and look for the parameters to train.

        Args:
            count: micro-batches in the step, on all ranks together.
        """
        trained = [one for one in self._parameters() if one.requires_grad]
        if (known := [id(one) for one in trained]) != self._known:
            self._known, self._buckets = known, _divide(trained, self._ranks)
        for bucket in self._buckets:
            bucket.clear()
        self._used = [False] * len(trained)
        self._next, self._count = 0, count

    @property
    def _is_raw(self) -> bool:
        """Return whether no rank has more than one micro-batch: their gradients travel as they are."""
        return self._count <= self._ranks

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Send what has been added, and the gradients that are computed within the block, as soon as they are there.

        For the last micro-batch of a rank, if nobody changes its gradients after the backward pass. Call `add` behind it.
        """
        handles = []
        for at, bucket in enumerate(self._buckets if self._ranks > 1 else []):
            bucket.awaited = {number for number, _ in bucket.parameters}
            for number, one in bucket.parameters:
                handles.append(one.register_post_accumulate_grad_hook(partial(self._computed, at, number)))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _computed(self, at: int, number: int, _parameter: torch.Tensor) -> None:
        if at < self._next:
            self._add_late(self._buckets[at])
            return
        self._buckets[at].awaited.discard(number)
        while self._next < len(self._buckets) and not self._buckets[self._next].awaited:
            bucket = self._buckets[self._next]
            gradients = self._add(bucket)
            bucket.gradients = gradients if bucket.raw is None else bucket.views(bucket.raw)
            self._send(bucket)

    def add(self) -> None:
        """Add the gradients of a micro-batch, and take them off the parameters.

        Raises:
            ConfigError: gradients are sparse, or of a dtype whose sums are not exact.
        """
        for at, bucket in enumerate(self._buckets):
            self._add_late(bucket) if at < self._next else self._add(bucket)

    def drop(self) -> None:
        """Take the gradients of a micro-batch off the parameters without adding them."""
        for bucket in self._buckets:
            for _, one in bucket.parameters:
                one.grad = None

    def _add(self, bucket: _Bucket) -> dict[int, torch.Tensor]:
        gradients = self._taken(bucket)
        if gradients and self._is_raw:
            bucket.raw = bucket.flat(gradients)
        elif gradients and bucket.levels is None:
            bucket.levels = levels_of(bucket.flat(gradients))
        elif gradients and bucket.levels is not None:
            add(bucket.levels, bucket.flat(gradients))
        return gradients

    def _add_late(self, bucket: _Bucket) -> None:
        """Note what the backward pass has added to gradients that were sent, as it does with a layer that checkpointing
        computes twice: `finish` sends the difference."""
        for number, again in self._taken(bucket).items():
            before = bucket.grown.get(number, bucket.gradients.get(number))
            bucket.grown[number] = again if before is None else before + again

    def _taken(self, bucket: _Bucket) -> dict[int, torch.Tensor]:
        """Return the gradients of a bucket by number, and take them off the parameters."""
        found = {}
        for number, one in bucket.parameters:
            gradient, one.grad = one.grad, None
            if gradient is not None:
                _check(gradient)
                self._used[number] = True
                found[number] = gradient.detach()
        return found

    def finish(self, told: Sequence[float] = ()) -> list[list[float]]:
        """Give each parameter that a micro-batch of any rank used the sum of its gradients.

        Args:
            told: numbers of this rank for the others, equally many on each.

        Returns:
            The numbers of each rank.

        Raises:
            ConfigError: no micro-batch of any rank has left a gradient.
        """
        more = [_rest_of(bucket) for bucket in self._buckets]
        used, deep, told_by = self._agree([len(levels) for levels in more], list(told))
        if not any(used):
            raise ConfigError(
                "--exact-on-any-gpus: no gradient is left after the backward pass",
                hint="choose an optimizer that steps after the backward pass and not in it, or omit --exact-on-any-gpus",
            )
        wanted = [bucket for bucket in self._buckets if any(used[number] for number, _ in bucket.parameters)]
        if self._ranks == 1:
            for bucket in wanted:
                bucket.result = _sum_of_rank(bucket)
        else:
            self._exchange(wanted, more, deep)
        for bucket in wanted:
            _give(bucket, used)
        for bucket in self._buckets:
            bucket.clear()
        return told_by

    def _agree(self, deep: list[int], told: list[float]) -> tuple[list[bool], list[int], list[list[float]]]:
        """Exchange in one call which parameters were used, how many levels are left of each bucket, and numbers for others."""
        if self._ranks == 1:
            return self._used, deep, [told]
        device = self._buckets[0].example.device if self._buckets else torch.device("cpu")
        mine = torch.tensor([*map(float, self._used), *map(float, deep), *told], dtype=torch.float64, device=device)
        every = torch.empty(self._ranks * mine.numel(), dtype=torch.float64, device=device)
        dist.all_gather(list(every.view(self._ranks, -1).unbind()), mine)
        rows = every.view(self._ranks, -1).tolist()
        at, end = len(self._used), len(self._used) + len(deep)
        used = [any(row[number] for row in rows) for number in range(at)]
        deepest = [int(max(row[number] for row in rows)) for number in range(at, end)]
        return used, deepest, [row[end:] for row in rows]

    def _exchange(self, wanted: list[_Bucket], more: list[Levels], deep: list[int]) -> None:
        """Sum the gradients of all ranks: each rank sums its part. Parts travel while others are summed.

        Args:
            wanted: the buckets with gradients; others have been sent by no rank.
            more: what else this rank has of each bucket.
            deep: how many levels of that the ranks have at most.
        """
        for bucket in wanted[self._next :]:
            self._send(bucket)
        rest = [self._send_rest(*each) if each[2] else None for each in zip(self._buckets, more, deep, strict=True)]
        returning = []
        for bucket, later in zip(self._buckets, rest, strict=True):
            if bucket.sent is None:
                continue
            work, got = bucket.sent
            work.wait()
            rows = [got[rank] for rank in range(min(self._count, self._ranks) if self._is_raw else self._ranks)]
            bucket.clear()
            if later is not None:
                later[0].wait()
                rows.extend(later[1].flatten(0, 1))
            dtype = bucket.example.dtype
            summed = _sum_of_raw(rows) if self._is_raw and later is None else _sum_of_levels(rows, dtype)
            bucket.result = torch.empty(bucket.part * self._ranks, dtype=dtype, device=summed.device)
            parts = list(_bytes(bucket.result).view(self._ranks, -1).unbind())
            returning.append((dist.all_gather(parts, _bytes(summed), group=self._group, async_op=True), summed))
        for work, _ in returning:
            work.wait()

    def _send(self, bucket: _Bucket) -> None:
        """Send each rank its part of a bucket."""
        if self._is_raw:
            mine = bucket.flat({}) if bucket.raw is None else bucket.raw
        else:
            mine = bucket.flat({}).to(torch.float64) if bucket.levels is None else bucket.levels[0]
        got = torch.empty_like(mine)
        work = dist.all_to_all_single(_bytes(got), _bytes(mine), group=self._group, async_op=True)
        bucket.sent = work, got.view(self._ranks, bucket.part)
        self._next += 1

    def _send_rest(self, bucket: _Bucket, levels: Levels, deep: int) -> tuple[Any, torch.Tensor]:
        """Send each rank its part of some levels of a bucket."""
        mine = torch.full((self._ranks, deep, bucket.part), NOTHING, dtype=torch.float64, device=bucket.example.device)
        for row, level in enumerate(levels):
            mine[:, row] = level.view(self._ranks, -1)
        got = torch.empty_like(mine)
        return dist.all_to_all_single(_bytes(got), _bytes(mine), group=self._group, async_op=True), got


def _divide(parameters: list[torch.nn.Parameter], ranks: int) -> list[_Bucket]:
    """Divide parameters into buckets of one dtype and device each, the last parameters first."""
    buckets: list[_Bucket] = []
    by_kind: dict[Any, _Bucket] = {}
    for number, one in reversed(list(enumerate(parameters))):
        kind = (one.dtype, one.device)
        bucket = by_kind.get(kind)
        if bucket is None or bucket.length + one.numel() > _BUCKET:
            bucket = by_kind[kind] = _Bucket([], ranks)
            buckets.append(bucket)
        bucket.parameters.append((number, one))
    return buckets


def _check(gradient: torch.Tensor) -> None:
    if gradient.layout is not torch.strided:
        raise ConfigError(
            "--exact-on-any-gpus can't sum sparse gradients exactly",
            hint="create the embedding with sparse=False, or omit --exact-on-any-gpus",
        )
    if gradient.dtype not in _DTYPES:
        raise ConfigError(
            f"--exact-on-any-gpus can't sum gradients of {str(gradient.dtype).removeprefix('torch.')} exactly",
            hint="train in float32, bfloat16 or float16, or omit --exact-on-any-gpus",
        )


def _rest_of(bucket: _Bucket) -> Levels:
    """Return what a rank has of a bucket besides what it sends first: errors, and changes of gradients that were sent."""
    rest = [] if bucket.levels is None else bucket.levels[1:]
    if not bucket.grown:
        return rest
    changes = levels_of(bucket.flat(bucket.grown))
    add(changes, bucket.flat({number: -one for number, one in bucket.gradients.items() if number in bucket.grown}))
    return [*rest, *changes]


def _sum_of_rank(bucket: _Bucket) -> torch.Tensor:
    if bucket.levels is not None:
        return rounded(bucket.levels, bucket.example.dtype)
    assert bucket.raw is not None
    return of_one(bucket.raw)


def _sum_of_raw(rows: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum of gradients, one row for each micro-batch."""
    if len(rows) == 1:
        return of_one(rows[0])
    if len(rows) == 2 and rows[0].dtype is torch.float32:
        return sum_of_two(*rows)
    return _sum_of_levels(rows, rows[0].dtype)


def _sum_of_levels(rows: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return the sum of the levels of all ranks. They are used up."""
    levels = [rows[0]] if rows[0].dtype is torch.float64 else levels_of(rows[0])
    for row in rows[1:]:
        add(levels, row)
    return rounded(levels, dtype)


def _give(bucket: _Bucket, used: list[bool]) -> None:
    views = bucket.views(bucket.result)
    for number, one in bucket.parameters:
        if used[number]:
            one.grad = views[number]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes: transports don't know all dtypes."""
    return tensor.reshape(-1).view(torch.uint8)
