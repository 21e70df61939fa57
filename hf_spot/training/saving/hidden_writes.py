"""Code that asks a tensor for its memory in a way in which torch does not count writes waits until the tensor is copied.

``tensor.data``, ``tensor.numpy()``, storages, addresses and dlpack give memory with a count of its own, or with none. While
tensors are still to be copied, these names of ``torch.Tensor`` are replaced; whoever uses one for such a tensor copies first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch

from hf_spot.training.upstream import (
    TENSOR_ADDRESS,
    TENSOR_ARRAY,
    TENSOR_DATA,
    TENSOR_DLPACK,
    TENSOR_NUMPY,
    TENSOR_OLD_STORAGE,
    TENSOR_STORAGE,
    TENSOR_TYPED_STORAGE,
)

_HIDDEN = (
    TENSOR_DATA,
    TENSOR_NUMPY,
    TENSOR_ARRAY,
    TENSOR_STORAGE,
    TENSOR_OLD_STORAGE,
    TENSOR_TYPED_STORAGE,
    TENSOR_ADDRESS,
    TENSOR_DLPACK,
)
_storage_of = torch.Tensor.untyped_storage
_address_of = torch.UntypedStorage.data_ptr

_watching: dict[HiddenWrites, frozenset[int]] = {}  # replaced, not changed: other threads read it
_changing = threading.Lock()
_replaced = ExitStack()


class HiddenWrites:
    """Makes others wait from `watch` to `close`.

    Args:
        arrive: waits until everything is copied; called in the thread that asks for memory, just before it gets it.
    """

    def __init__(self, arrive: Callable[[], None]) -> None:
        self.arrive = arrive

    def watch(self, storages: frozenset[int]) -> None:
        """Begin.

        Args:
            storages: addresses of the memory that is still to be copied.
        """
        _change(self, storages)

    def close(self) -> None:
        """Stop. Any thread may call it, and repeated calls do nothing."""
        _change(self, None)


def _change(one: HiddenWrites, storages: frozenset[int] | None) -> None:
    global _watching
    with _changing:
        before = _watching
        _watching = {other: its for other, its in before.items() if other is not one}
        if storages is not None:
            _watching[one] = storages
        if _watching and not before:
            for name in _HIDDEN:
                _replaced.enter_context(name.replaced(torch.Tensor, _waiting))
        elif before and not _watching:
            _replaced.close()


def _waiting(plain: Any) -> Any:
    if not callable(plain):  # the descriptor of ``data``
        return property(lambda tensor: plain.__get__(_met(tensor)), lambda tensor, value: plain.__set__(tensor, value))

    @wraps(plain)
    def waiting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return plain(_met(tensor), *args, **kwargs)

    return waiting


def _met(tensor: torch.Tensor) -> torch.Tensor:
    try:
        address = _address_of(_storage_of(tensor))
    except (RuntimeError, NotImplementedError):  # it has no memory: a sparse tensor, or one without data
        return tensor
    for one, storages in _watching.items():
        if address in storages:
            one.arrive()
    return tensor
