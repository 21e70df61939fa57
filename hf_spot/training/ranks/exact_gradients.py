"""The gradients of an optimizer step, summed over micro-batches and ranks without error (`hf_spot.training.ranks.exact_sum`).

What ranks exchange is no more than plain data parallelism exchanges, if each rank has one micro-batch: each rank owns a part
of the parameters, gets that part of all gradients, adds them up, rounds once, and sends the result to all. With several
micro-batches on a rank, the exact local sum (8 bytes instead of 4) goes the first half of the way: one and a half times as
much in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from hf_spot.errors import ConfigError
from hf_spot.training.ranks.exact_sum import NOTHING, Levels, add, levels_of, of_one, rounded, sum_of_two

_BUCKET = 4_000_000  # elements that travel together
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class _Bucket:
    """Parameters whose gradients are summed together, as one flat tensor.

    Args:
        parameters: of one dtype and device, with their numbers.
        first: the gradients of this rank's first micro-batch.
        levels: the exact sum, once there is a second one.
    """

    parameters: list[tuple[int, torch.nn.Parameter]]
    first: torch.Tensor | None = None
    levels: Levels | None = None
    result: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def length(self) -> int:
        return sum(one.numel() for _, one in self.parameters)

    @property
    def example(self) -> torch.nn.Parameter:
        return self.parameters[0][1]


class ExactGradients:
    """Sums gradients over micro-batches and ranks. All ranks must do the same calls.

    Args:
        parameters: returns the parameters, in the same order on each rank.
        ranks: number of ranks; more than one need an initialized process group.
    """

    def __init__(self, parameters: Callable[[], Iterable[torch.nn.Parameter]], ranks: int) -> None:
        self._parameters = parameters
        self._ranks = ranks
        self._buckets: list[_Bucket] = []
        self._known: list[int] = []
        self._used: list[bool] = []

    def begin(self) -> None:
        """Forget what has been added, and look for the parameters to train."""
        trained = [one for one in self._parameters() if one.requires_grad]
        if (known := [id(one) for one in trained]) != self._known:
            self._known, self._buckets = known, _divide(trained)
        for bucket in self._buckets:
            bucket.first = bucket.levels = None
        self._used = [False] * len(trained)

    def add(self) -> None:
        """Add the gradients of a micro-batch, and take them off the parameters.

        Raises:
            ConfigError: gradients are sparse, or of a dtype whose sums are not exact.
        """
        for bucket in self._buckets:
            flat = self._taken(bucket)
            if flat is None:
                continue
            if bucket.levels is not None:
                add(bucket.levels, flat)
            elif bucket.first is not None:
                bucket.levels = levels_of(bucket.first)
                bucket.first = None
                add(bucket.levels, flat)
            else:
                bucket.first = flat

    def drop(self) -> None:
        """Take the gradients of a micro-batch off the parameters without adding them."""
        for bucket in self._buckets:
            for _, one in bucket.parameters:
                one.grad = None

    def _taken(self, bucket: _Bucket) -> torch.Tensor | None:
        """Return the gradients of a bucket as one flat tensor; None if there are none."""
        pieces: list[torch.Tensor | None] = []
        for number, one in bucket.parameters:
            gradient, one.grad = one.grad, None
            if gradient is None:
                pieces.append(None)
                continue
            _check(gradient)
            self._used[number] = True
            pieces.append(gradient.detach().reshape(-1))
        if all(piece is None for piece in pieces):
            return None
        given = [
            torch.full((one.numel(),), NOTHING, dtype=one.dtype, device=one.device) if piece is None else piece
            for piece, (_, one) in zip(pieces, bucket.parameters, strict=True)
        ]
        return torch.cat(given)

    def finish(self, count: int, told: Sequence[float] = ()) -> list[list[float]]:
        """Give each parameter that a micro-batch of any rank used the sum of its gradients.

        Args:
            count: micro-batches in the step, on all ranks together.
            told: numbers of this rank for the others, equally many on each.

        Returns:
            The numbers of each rank.
        """
        raw = count <= self._ranks  # each rank has at most one: its gradients travel as they are
        deep = [0 if raw or one.levels is None else len(one.levels) for one in self._buckets]
        used, deep, told_by = self._agree(deep, list(told))
        wanted = [any(used[number] for number, _ in one.parameters) for one in self._buckets]
        if self._ranks == 1:
            for bucket, is_wanted in zip(self._buckets, wanted, strict=True):
                if is_wanted:
                    bucket.result = _sum_of_rank(bucket)
        else:
            self._exchange(
                [one for one, is_wanted in zip(self._buckets, wanted, strict=True) if is_wanted], count, raw, max([1, *deep])
            )
        for bucket, is_wanted in zip(self._buckets, wanted, strict=True):
            bucket.first = bucket.levels = None
            if is_wanted:
                _give(bucket, used)
        return told_by

    def _agree(self, deep: list[int], told: list[float]) -> tuple[list[bool], list[int], list[list[float]]]:
        """Exchange which parameters were used, how many levels the sums have, and numbers for others, in one call."""
        if self._ranks == 1:
            return self._used, deep, [told]
        device = self._buckets[0].example.device if self._buckets else torch.device("cpu")
        mine = torch.tensor([*map(float, self._used), *map(float, deep), *told], dtype=torch.float64, device=device)
        every = torch.empty(self._ranks * mine.numel(), dtype=torch.float64, device=device)
        dist.all_gather(list(every.view(self._ranks, -1).unbind()), mine)
        rows = every.view(self._ranks, -1).tolist()
        at, end = len(self._used), len(self._used) + len(deep)
        used = [any(row[number] for row in rows) for number in range(at)]
        return used, [int(max(row[number] for row in rows)) for number in range(at, end)], [row[end:] for row in rows]

    def _exchange(self, buckets: list[_Bucket], count: int, raw: bool, deep: int) -> None:
        """Sum the gradients of all ranks: each rank sums its part. Parts travel while others are summed."""
        on_way = [self._send(bucket, raw, deep) for bucket in buckets]
        returning = []
        for bucket, (sent, got, part) in zip(buckets, on_way, strict=True):
            sent.wait()
            dtype = bucket.example.dtype
            rows = got.view(self._ranks, -1, part)
            summed = _sum_of_raw(rows[:count, 0]) if raw else _sum_of_levels(rows, dtype)
            bucket.result = torch.empty(part * self._ranks, dtype=dtype, device=summed.device)
            parts = list(_bytes(bucket.result).view(self._ranks, -1).unbind())
            work = dist.all_gather(parts, _bytes(summed), async_op=True)
            returning.append((work, summed))
        for work, _ in returning:
            work.wait()

    def _send(self, bucket: _Bucket, raw: bool, deep: int) -> tuple[Any, torch.Tensor, int]:
        """Send each rank its part of a bucket; return the handle, what arrives, and the length of a part."""
        example = bucket.example
        part = -(-bucket.length // self._ranks)
        levels: Sequence[torch.Tensor] = ()
        if raw:
            dtype, rows = example.dtype, 1
            levels = [] if bucket.first is None else [bucket.first]
        else:
            dtype, rows = torch.float64, deep
            if bucket.levels is not None:
                levels = bucket.levels
            elif bucket.first is not None:
                levels = [bucket.first]
        mine = torch.full((self._ranks, rows, part), NOTHING, dtype=dtype, device=example.device)
        for row, level in enumerate(levels):
            for rank in range(self._ranks):
                piece = level[rank * part : (rank + 1) * part]
                mine[rank, row, : piece.numel()] = piece
        bucket.first = bucket.levels = None
        got = torch.empty_like(mine)
        work = dist.all_to_all_single(_bytes(got), _bytes(mine), async_op=True)
        return work, got, part


def _divide(parameters: list[torch.nn.Parameter]) -> list[_Bucket]:
    """Divide parameters into buckets of one dtype and device each."""
    buckets: list[_Bucket] = []
    by_kind: dict[Any, _Bucket] = {}
    for number, one in enumerate(parameters):
        kind = (one.dtype, one.device)
        bucket = by_kind.get(kind)
        if bucket is None or bucket.length + one.numel() > _BUCKET:
            bucket = by_kind[kind] = _Bucket([])
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


def _sum_of_rank(bucket: _Bucket) -> torch.Tensor:
    if bucket.levels is not None:
        return rounded(bucket.levels, bucket.example.dtype)
    assert bucket.first is not None
    return of_one(bucket.first)


def _sum_of_raw(rows: torch.Tensor) -> torch.Tensor:
    """Return the sum of gradients, one row for each micro-batch."""
    if len(rows) == 1:
        return of_one(rows[0])
    if len(rows) == 2 and rows.dtype is torch.float32:
        return sum_of_two(*rows)
    levels = levels_of(rows[0])
    for row in rows[1:]:
        add(levels, row)
    return rounded(levels, rows.dtype)


def _sum_of_levels(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the sum of the levels of all ranks."""
    levels = levels_of(rows[0, 0])
    for level in rows.flatten(0, 1)[1:]:
        add(levels, level)
    return rounded(levels, dtype)


def _give(bucket: _Bucket, used: list[bool]) -> None:
    at = 0
    for number, one in bucket.parameters:
        if used[number]:
            one.grad = bucket.result[at : at + one.numel()].view_as(one)
        at += one.numel()
    bucket.result = torch.empty(0)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes: transports don't know all dtypes."""
    return tensor.reshape(-1).view(torch.uint8)
