"""Keeps what ``torch.save`` gets as it is now, so that it can be serialized later, by another thread, into the same bytes.

Serializing the states of an optimizer takes Python longer than everything else in a save. What is needed of them at the save is
little: which tensors they are, and the numbers beside them.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_spot.training.upstream import STORAGE_HANDLE

# Nobody can change them, so the same objects are serialized later: what pickle writes also depends on which are the same.
_FIXED = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device))


class Changeable(Exception):
    """There is something that may have changed when it is serialized later."""


class Frozen:
    """A value as it is at the construction.

    Dictionaries and lists are copied, tensors remembered with the memory that they have: it must be copied by others.

    Args:
        value: dictionaries, lists and tuples of plain tensors on the CPU, numbers and text.

    Raises:
        Changeable: there is something else in it.
    """

    def __init__(self, value: Any) -> None:
        self._copies: dict[int, Any] = {}
        self._dtypes: dict[int, torch.dtype] = {}
        self.storages: dict[int, torch.UntypedStorage] = {}  # by their handles
        self.value = self._copy(value)
        self._copies.clear()  # they are known by the addresses of objects that may be gone soon

    def _copy(self, value: Any) -> Any:
        kind = type(value)
        if kind in _FIXED:
            return value
        known = self._copies.get(id(value))
        if known is not None:
            return known
        if kind is dict:
            copy: Any = {}
            self._copies[id(value)] = copy
            for key, one in value.items():
                copy[key if type(key) in _FIXED else self._copy(key)] = one if type(one) in _FIXED else self._copy(one)
        elif kind is list:
            copy = []
            self._copies[id(value)] = copy
            copy.extend([one if type(one) in _FIXED else self._copy(one) for one in value])
        elif kind is tuple and all(type(one) in _FIXED for one in value):
            return value
        elif kind is torch.Tensor:
            copy = self._copies[id(value)] = self._alias(value)
        else:
            raise Changeable(kind.__name__)
        return copy

    def _alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the same memory, seen in the same way, whatever becomes of the tensor."""
        usual = tensor.device.type == "cpu" and tensor.layout is torch.strided and not tensor.requires_grad
        if not usual or tensor.__dict__ or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
            raise Changeable("tensor")
        storage = tensor.untyped_storage()
        handle = STORAGE_HANDLE.of(storage)
        if handle not in self.storages:
            self.storages[handle] = storage
        if storage.nbytes() and self._dtypes.setdefault(storage.data_ptr(), tensor.dtype) is not tensor.dtype:
            raise Changeable("memory of two types")  # torch says so, at once
        return tensor.detach()
