"""Find NaN and infinity in weights and optimizer states, on the device where they are, at the speed of its memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

Named = tuple[str, torch.Tensor]


def trained_weights(model: Any) -> Iterator[Named]:
    """Yield the weights that training changes, by their names."""
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            yield f"weight {name}", weight


def optimized_weights(optimizer: Any) -> Iterator[Named]:
    """Yield the weights that an optimizer changes, by their numbers."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, weight in enumerate(weights):
        yield f"weight of parameter {number}", weight


def optimizer_states(optimizer: Any) -> Iterator[Named]:
    """Yield the tensors of an optimizer's state, by their names and the numbers of their parameters."""
    state = getattr(optimizer, "state", None)
    if isinstance(state, Mapping):
        for number, of_parameter in enumerate(state.values()):
            for name, value in _tensors(of_parameter, ""):
                yield f"optimizer state {name} of parameter {number}", value


def _tensors(value: Any, name: str) -> Iterator[Named]:
    if isinstance(value, torch.Tensor):
        yield name.lstrip("."), value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _tensors(each, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, each in enumerate(value):
            yield from _tensors(each, f"{name}.{number}")


def not_finite(tensors: Iterable[Named]) -> tuple[list[str], list[str]]:
    """Return the names of tensors with a number that is not finite, and of those that can't be examined.

    Of a tensor that is spread over ranks, the part on this rank is examined. Devices are read once each.

    Args:
        tensors: of any type; integers are finite.
    """
    wrong: list[str] = []
    unknown: list[str] = []
    waiting: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    with torch.no_grad():
        for name, tensor in tensors:
            try:
                largest = _largest(tensor)
            except (RuntimeError, NotImplementedError):  # a kind of tensor that lacks the operation
                unknown.append(name)
                continue
            if largest is None:
                continue
            if largest.device.type == "cpu":
                if not math.isfinite(largest.item()):
                    wrong.append(name)
            else:
                waiting.setdefault(largest.device, []).append((name, largest.float()))
        for found in waiting.values():
            finite = torch.stack([value for _, value in found]).isfinite().tolist()
            wrong += [name for (name, _), is_finite in zip(found, finite, strict=True) if not is_finite]
    return wrong, unknown


def _largest(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the largest magnitude in a tensor, which is not finite if one of its numbers isn't; None if all must be finite."""
    here = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    here = here.detach()
    if not (here.is_floating_point() or here.is_complex()) or here.numel() == 0:
        return None
    if here.is_meta:
        raise NotImplementedError("its values are not in memory")
    if here.is_sparse:
        here = here.coalesce().values()
    if here.is_complex():
        here = torch.view_as_real(here)
    if here.itemsize == 1:  # float8 lacks reductions
        here = here.float()
    lowest, highest = here.aminmax()  # both are NaN if one number is; faster than a copy, unlike isfinite() and norms
    return torch.maximum(-lowest, highest)
