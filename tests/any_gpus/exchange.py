"""``python -m tests.any_gpus.exchange [--quick]``: sums gradients on ranks that send them during the backward pass.

Each case is computed on one rank, where nothing is sent, and on two and three. The sums must have the same bits, and be those
of exact arithmetic. Gradients are real: of a small model with parameters that some micro-batches do not use, a layer that
checkpointing computes twice, magnitudes that need several levels, and collective calls of its own.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import traceback
from fractions import Fraction
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from hf_spot.policy.micro_batches import Shares
from hf_spot.training.ranks import exact_gradients
from hf_spot.training.ranks.exact_gradients import ExactGradients

SHAPES = ((3, 4), (5,), (), (7,), (2, 2), (11,))
UNUSED = 4  # by any micro-batch


class _Asked(torch.autograd.Function):
    """Does nothing but a collective call, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        _ask()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        _ask()
        return gradients[0]


def _ask() -> None:
    if dist.is_initialized():
        one = torch.ones(1)
        dist.all_reduce(one)
        assert int(one) == dist.get_world_size()


class Case:
    """A step of some micro-batches.

    Args:
        count: how many.
        kind: "plain", "wild" (magnitudes of all sizes), "unused", "twice" (a layer that is computed twice) or "asking".
        dtype: of the parameters.
    """

    def __init__(self, count: int, kind: str, dtype: torch.dtype) -> None:
        self.count, self.kind = count, kind
        self.parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]

    def gradient(self, number: int, at: int) -> torch.Tensor | None:
        """Return what a micro-batch contributes to a parameter; None if it does not use it."""
        if at == UNUSED or (self.kind == "unused" and (number + at) % 3 == 0):
            return None
        numbers = torch.Generator().manual_seed(100 * number + at)
        drawn = torch.randn(SHAPES[at], generator=numbers)
        if self.kind == "wild":
            drawn = drawn * 10.0 ** torch.randint(-30, 30, SHAPES[at], generator=numbers)
            if number < 2:  # two ranks have numbers that leave nothing but the errors of the others
                drawn = torch.full(SHAPES[at], 1e36 * (-1) ** number)
        return drawn.to(self.parameters[at].dtype)

    def backward(self, number: int) -> None:
        """Compute the gradients of a micro-batch."""
        loss = torch.zeros(())
        for at, one in enumerate(self.parameters):
            if (wanted := self.gradient(number, at)) is None:
                continue
            if self.kind == "twice":  # the second call adds another number to the gradient of the first one
                start = torch.zeros((), requires_grad=True)
                for factor in (1.0, 0.37, 0.11):
                    part: Any = checkpoint(partial(_times, one=one, wanted=wanted * factor), start, use_reentrant=True)
                    loss = loss + part
            else:
                loss = loss + _times(torch.zeros(()), one, wanted)
            if self.kind == "asking":
                loss = _Asked.apply(loss)  # type: ignore[no-untyped-call]
        loss.backward()  # type: ignore[no-untyped-call]

    def sums(self, gradients: ExactGradients, ranks: int, rank: int) -> list[torch.Tensor | None]:
        """Return the sums of the gradients."""
        shares = Shares(self.count, ranks)
        gradients.begin(self.count)
        for turn in range(shares.each):
            number = shares.number(rank, turn)
            is_mine = number < self.count
            if is_mine and turn == shares.each - 1:
                with gradients.sending():
                    self.backward(number)
            else:
                self.backward(number if is_mine else 0)
            gradients.add() if is_mine else gradients.drop()
        levels = [0 if bucket.levels is None else len(bucket.levels) for bucket in gradients._buckets]
        assert self.kind != "plain" or not any(bucket.grown for bucket in gradients._buckets), "sent too early"
        assert self.kind != "wild" or self.count < 2 * ranks or ranks == 1 or rank > 1 or max(levels) > 1
        gradients.finish()
        found = [one.grad for one in self.parameters]
        assert all(not one._post_accumulate_grad_hooks for one in self.parameters)
        for one in self.parameters:
            one.grad = None
        return found

    def check(self, sums: list[torch.Tensor | None]) -> None:
        """Compare sums with those of exact arithmetic."""
        every = []
        for number in range(self.count):  # as the backward pass leaves them: of several uses it rounds the sum
            self.backward(number)
            every.append([None if one.grad is None else one.grad.clone() for one in self.parameters])
            for one in self.parameters:
                one.grad = None
        for at, found in enumerate(sums):
            summands = [row[at] for row in every if row[at] is not None]
            assert (found is None) == (not summands)
            for place, value in enumerate([] if found is None else found.reshape(-1).tolist()):
                exact = sum(Fraction(one.reshape(-1)[place].item()) for one in summands if one is not None)
                _is_nearest(value, exact, self.parameters[at].dtype)


def _times(start: torch.Tensor, one: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return start + (one.double() * wanted.double()).sum().float()


def _is_nearest(value: float, exact: Fraction | int, dtype: torch.dtype) -> None:
    mine = torch.tensor(value, dtype=dtype)
    error = abs(Fraction(value) - exact)
    for side in (float("inf"), float("-inf")):
        other = torch.nextafter(mine, torch.tensor(side, dtype=dtype)).item()
        assert error <= abs(Fraction(other) - exact), (value, other, float(exact))


def cases(*, quick: bool) -> list[Case]:
    """Return all cases, or only those with two and five micro-batches."""
    kinds = ("plain", "wild", "unused", "twice", "asking")
    found = [Case(count, kind, torch.float32) for count, kind in itertools.product((2, 5) if quick else (1, 2, 3, 5, 6), kinds)]
    return found if quick else [*found, Case(3, "plain", torch.bfloat16), Case(6, "twice", torch.bfloat16)]


def _rank(rank: int, ranks: int, meeting: str, expected: list[list[torch.Tensor | None]], *, quick: bool) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    trained: list[torch.nn.Parameter] = []
    gradients = ExactGradients(lambda: trained, ranks)
    for most in (8,) if quick else (8, 10**6):
        exact_gradients._BUCKET = most
        for case, wanted in zip(cases(quick=quick), expected, strict=True):
            trained[:] = case.parameters
            found = case.sums(gradients, ranks, rank)
            for at, (mine, other) in enumerate(zip(found, wanted, strict=True)):
                same = mine is other if mine is None or other is None else torch.equal(mine, other)
                assert same, f"{case.kind}, {case.count} micro-batches, {ranks} ranks, parameter {at}: {mine}, {other}"


def main() -> int:
    """Compare, and return the exit code."""
    quick = "--quick" in sys.argv[1:]
    torch.set_num_threads(1)
    expected, wrong = [], 0
    for case in cases(quick=quick):
        expected.append(case.sums(ExactGradients(partial(list, case.parameters), 1), 1, 0))
        case.check(expected[-1])
    for ranks in (3,) if quick else (2, 3):
        with tempfile.TemporaryDirectory() as folder:
            children = []
            for rank in range(ranks):
                if not (child := os.fork()):
                    code = 1
                    try:
                        _rank(rank, ranks, f"{folder}/meeting", expected, quick=quick)
                        code = 0
                    except BaseException:
                        traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(code)
                children.append(child)
            wrong += sum(os.waitpid(child, 0)[1] != 0 for child in children)
    print(f"{len(expected)} cases, {wrong} ranks with other sums")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
