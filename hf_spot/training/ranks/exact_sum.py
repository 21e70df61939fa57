"""Sums of gradients that are correctly rounded, and therefore the same in every order, grouping and number of ranks.

A sum of floating-point numbers depends on the order of its additions, because each one rounds. Here no addition rounds: the
sum of the micro-batches' gradients is kept without error, and is rounded once, at the end. What is left is a property of the
numbers themselves: the float that is nearest to their exact sum (ties to even), so at most 0.5 ulp away. No order, grouping
or number of ranks can change it, and each of them may compute it in its own way.

How it is kept: as an unevaluated sum of float64 *levels*. The gradients of float32 (24 bits), bfloat16 and float16 are
float64 numbers, and an addition in float64 (53 bits) loses nothing as long as the numbers of one element differ by less than
about 2^29. Whether it has lost anything is computed, not assumed: with Knuth's TwoSum, ``s + x = t + e`` holds exactly for
``t = fl(s + x)``, and ``e`` follows from six operations. If any ``e`` is not zero, it is added to the next level in the same
way. That all are zero shows in two of the six: ``e = (s - (t - u)) + (x - u)`` for ``u = t - s``, each operation rounded, so
that ``t - s = x`` and ``t - x = s`` leave nothing of it.

How many levels there can be: all numbers are multiples of the smallest float32, 2^-149, and so are all errors. A level's
partial sums are at most M times its largest number, and its errors at most 2^-53 of these. So each level is at least 2^(53 -
log2 M) times smaller than the one above, and a level whose sums are below 2^(53 - 149) makes no errors. Float32 ends at
2^128: for up to 2^20 micro-batches there are at most (128 + 149) / 33 + 1, ten levels, which end the chain of errors for any
numbers. Gradients of real trainings need one: 8 bytes per parameter.

How it is rounded: the levels are added up, from the last one, until nothing changes any more. Then the first level is the
float64 nearest to the exact sum, and the sign of the next one says on which side of it the sum is. Rounding the first level
*to odd* keeps that, so that a second rounding, to 24 bits or less, is the one of the exact sum (Boldo and Melquiond: it holds
if the first format has two bits more than the second one). Sums of zeros have the sign that IEEE 754 gives them in every
order: -0.0 if all are -0.0. A sum with infinities or NaN is infinite or NaN, as in every order; all NaN get the same bits.

Sources: Demmel and Nguyen, "Parallel Reproducible Summation" (IEEE Trans. Computers 64(7), 2015; ReproBLAS) get reproducible
sums from bins that are fixed in advance, which take 16 bytes per parameter and round elements that are much smaller than the
largest one; Shewchuk, "Adaptive Precision Floating-Point Arithmetic" (1997), for the levels; Li et al., "EasyScale" (SC'23),
whose virtual workers make a training free of the number of GPUs by a fixed order of additions.

Pure functions of tensors: no ranks, no randomness.
"""

from __future__ import annotations

import torch

Levels = list[torch.Tensor]
"""An exact sum: float64 tensors of equal shape, whose sum it is. The first one is the largest."""

# Elements that are added at a time on a CPU: they stay in its cache during the passes of an addition.
_CHUNK = 16384
NOTHING = -0.0
"""Adds nothing to any number: also -0.0 stays what it is."""


def levels_of(numbers: torch.Tensor) -> Levels:
    """Return numbers as a sum of one summand.

    Args:
        numbers: flat, of float32, bfloat16 or float16; or a float64 level of another sum.
    """
    return [numbers.detach().to(torch.float64, copy=True)]


def add(levels: Levels, numbers: torch.Tensor) -> None:
    """Add numbers to a sum, in place and without error. A level is appended if there is an error to keep.

    Args:
        levels: the sum.
        numbers: flat, as many as the sum has; as for `levels_of`.
    """
    on_cpu = numbers.device.type == "cpu"
    length = levels[0].numel()
    step = min(_CHUNK, length) if on_cpu else length
    summand, before, scratch = (torch.empty(step, dtype=torch.float64, device=numbers.device) for _ in range(3))
    for start in range(0, length, max(step, 1)):
        place = slice(start, min(start + step, length))
        s, size = levels[0][place], min(step, length - start)
        x, old, u = summand[:size].copy_(numbers[place]), before[:size].copy_(s), scratch[:size]
        if on_cpu and _is_exact(s.add_(x), old, x, u):
            continue
        t, e = torch.empty_like(x), torch.empty_like(x)
        is_exact = _two_sum(old, x, t, e, u)
        s.copy_(t)
        if not is_exact:
            _add_below(levels, 1, place, _finite(e, t))


def _is_exact(t: torch.Tensor, s: torch.Tensor, x: torch.Tensor, u: torch.Tensor) -> bool:
    """Return whether ``t``, the rounded sum of ``s`` and ``x``, is finite and their exact sum. ``u`` is overwritten."""
    return torch.equal(torch.sub(t, s, out=u), x) and torch.equal(torch.sub(t, x, out=u), s)


def _two_sum(s: torch.Tensor, x: torch.Tensor, t: torch.Tensor, e: torch.Tensor, u: torch.Tensor) -> bool:
    """Set ``t`` to the rounded sum of two tensors and ``e`` to its error (Knuth); return whether all errors are zero.

    ``u`` is overwritten. The square of an error can't underflow: the smallest one is 2^-149.
    """
    torch.add(s, x, out=t)
    torch.sub(t, s, out=u)
    torch.sub(t, u, out=e)
    torch.sub(s, e, out=e)
    torch.sub(x, u, out=u)
    e.add_(u)
    return bool(torch.dot(e, e) == 0)


def _finite(error: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Return errors without those of infinities and NaN, which are not numbers: their total says all that there is to say."""
    return torch.where(torch.isfinite(total), error, 0.0)


def _add_below(levels: Levels, at: int, place: slice, x: torch.Tensor) -> None:
    """Add errors to a level and the ones below it."""
    while bool(torch.any(x)):
        if at == len(levels):
            levels.append(torch.zeros_like(levels[0]))
        s = levels[at][place]
        t, e, u = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        _two_sum(s, x, t, e, u)
        levels[at][place] = t
        x, at = _finite(e, t), at + 1


def rounded(levels: Levels, dtype: torch.dtype) -> torch.Tensor:
    """Return a sum, rounded once to the nearest number of a dtype; ties to even. The sum is used up.

    Args:
        levels: the sum.
        dtype: float32, bfloat16 or float16.
    """
    first = levels[0] if len(levels) == 1 else _to_odd(levels)
    if dtype is torch.float32:
        return _one_nan(first.to(dtype))
    # torch converts float64 to 16 bits by way of float32, which would round twice.
    return _one_nan(_to_odd_float32(first).to(dtype))


def sum_of_two(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the sum of two float32 tensors: IEEE 754 rounds a single addition correctly, so that nothing has to be kept."""
    return _one_nan(torch.add(one, other))


def of_one(numbers: torch.Tensor) -> torch.Tensor:
    """Return the sum of one summand: itself, with the bits that `rounded` gives to NaN. In place."""
    return _one_nan(numbers)


def _one_nan(numbers: torch.Tensor) -> torch.Tensor:
    """Give all NaN the same bits, in place: their sign and payload depend on the order of additions."""
    if not bool(torch.isfinite(numbers.sum(dtype=torch.float32))):
        numbers.masked_fill_(torch.isnan(numbers), float("nan"))
    return numbers


def _to_odd(levels: Levels) -> torch.Tensor:
    """Return a sum as float64, rounded to odd: the neighbour with an odd last bit, unless it is a float64 itself."""
    changed = True
    while changed:  # until each level is at most half an ulp of the one above, with nothing but zeros behind a zero
        changed = False
        for at in range(len(levels) - 2, -1, -1):
            s, x = levels[at], levels[at + 1]
            t, e, u = torch.empty_like(s), torch.empty_like(s), torch.empty_like(s)
            _two_sum(s, x, t, e, u)
            e = _finite(e, t)
            # A zero that has nothing below it keeps its sign.
            t = torch.where(x == 0, s, t)
            changed = changed or bool((t != s).logical_and_(~torch.isnan(t)).any()) or bool((e != x).any())
            levels[at], levels[at + 1] = t, e
    first, below = levels[0], levels[1]
    even = (first.view(torch.int64) & 1) == 0
    toward = torch.copysign(torch.full_like(first, float("inf")), below)
    return torch.where((below != 0) & even & torch.isfinite(first), torch.nextafter(first, toward), first)


def _to_odd_float32(numbers: torch.Tensor) -> torch.Tensor:
    """Return float64 numbers as float32, rounded to odd."""
    near = numbers.to(torch.float32)
    back = near.to(torch.float64)
    # Toward zero, and then up to the odd neighbour; an overflow becomes the largest float32, which is odd.
    down = torch.where(back.abs() > numbers.abs(), torch.nextafter(near, torch.zeros_like(near)), near)
    odd = (down.view(torch.int32) | 1).view(torch.float32)
    return torch.where((back != numbers) & torch.isfinite(numbers), odd, near)
