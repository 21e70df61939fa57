"""Tensors of a training that change in its optimizers' steps alone: they can be copied beside the next forward and backward.

Whether a tensor is one of them is found on the tensor itself. Trained parameters and states of optimizers are, if the last step
of their optimizer was seen; and so are parameters that no optimizer trains. Not those of which somebody else holds memory under
a count of writes of its own (``.data``, an array of numpy, shared memory): writes there can't be seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from hf_spot.training.saving.finite import optimizer_states
from hf_spot.training.upstream import STORAGE_HANDLE, USE_COUNT

SMALL = 1024  # elements up to which a tensor is copied at once: that takes no longer than to remember it


class LiveTensors:
    """Finds them, by their address. Make it between two steps, before anything is saved, and drop it after the save.

    Args:
        model: its parameters are looked at; all its buffers are left out, because a forward may change them.
        optimizers: those whose last step was seen, by `StepGate`.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Any]) -> None:
        optimizers = [one for one in optimizers if not _changes_weights_elsewhere(one)]
        stepped = {id(one) for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]}
        weights = {id(one): one for one in model.parameters() if id(one) in stepped or not one.requires_grad}
        for optimizer in optimizers:
            weights |= {id(one): one for group in optimizer.param_groups for one in group["params"]}
        states = {id(one): one for optimizer in optimizers for _, one in optimizer_states(optimizer)}
        self._by_address = {one.data_ptr(): one for one in _of_nobody_else([*weights.values(), *states.values()])}

    def __len__(self) -> int:
        return len(self._by_address)

    def at(self, address: int, count: int) -> torch.Tensor | None:
        """Return the tensor that consists of the ``count`` bytes from an address on; None if none does."""
        found = self._by_address.get(address)
        return found if found is not None and found.nbytes == count else None


def weights_written_since(model: nn.Module, versions: dict[str, int]) -> list[str]:
    """Return the names of the parameters that were written to since `versions_of`."""
    return [name for name, one in model.named_parameters() if versions.get(name, one._version) != one._version]


def versions_of(model: nn.Module) -> dict[str, int]:
    """Return how often each parameter was written to, as far as torch counts that, by its name."""
    return {name: one._version for name, one in model.named_parameters() if not one.is_inference()}


def _changes_weights_elsewhere(optimizer: Any) -> bool:
    """Return whether an optimizer changes weights in other methods than ``step``: schedule-free ones do, before a forward."""
    return any(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def _of_nobody_else(tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the tensors of which nobody else holds memory."""
    plain = [one for one in tensors if _is_plain(one)]
    by_memory: dict[int, list[torch.Tensor]] = {}
    for one in plain:
        by_memory.setdefault(one.untyped_storage().data_ptr(), []).append(one)
    count = USE_COUNT.find()
    if count is None or STORAGE_HANDLE.trouble() is not None:
        return

    def holders(tensor: torch.Tensor) -> int:
        return int(count(STORAGE_HANDLE.of(tensor.untyped_storage())))

    alone = holders(torch.empty(1))
    for together in by_memory.values():
        if holders(together[0]) == alone + len(together) - 1:
            yield from together


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.numel() > SMALL
        and not tensor.is_quantized
        and not tensor.is_inference()
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not bool(tensor.is_shared())  # type: ignore[no-untyped-call]
    )
