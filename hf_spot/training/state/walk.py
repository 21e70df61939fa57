"""Finds state in the objects that a script passes to its training: values, generators, tensors of models, optimizers."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from hf_spot.training.state.values import MOST_ELEMENTS, Generator, is_plain, is_tensor, is_value

_DEEPEST = 6
_OF_MODULES = frozenset(vars(torch.nn.Module()))  # a module's own attributes: parameters, hooks, …
# Their state is how far they have been read, and a resume reads them again up to there.
_POSITIONED = (torch.utils.data.DataLoader, torch.utils.data.IterableDataset)
_STDLIB = Path(sysconfig.get_paths()["stdlib"])


@dataclass(frozen=True)
class Found:
    """One piece of state.

    Args:
        path: its path, as in code: ``callbacks.Average.of``.
        kind: ``value``, ``tensor`` (of a module), ``generator``, ``state`` (an object with a ``state_dict``), or ``long`` (a
            container with so many elements that it counts as data).
        value: the current value.
        put: replaces the value; None if it can only be changed in place.
    """

    path: str
    kind: str
    value: Any
    put: Callable[[Any], None] | None = None


def is_of_script(kind: type) -> bool:
    """Return whether a class is the user's: neither from an installed package, nor from Python, nor from hf_spot."""
    module = kind.__module__
    if module == "__main__":
        return True
    if module == "builtins" or module.partition(".")[0] == "hf_spot":
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:  # created by exec, as in a notebook, or compiled into Python
        return module not in sys.stdlib_module_names
    return _is_of_user(file)


@lru_cache(maxsize=4096)
def _is_of_user(file: str) -> bool:
    return not {"site-packages", "dist-packages"} & {*Path(file).parts} and not Path(file).is_relative_to(_STDLIB)


class Walk:
    """Walks through objects; yields nothing twice.

    Args:
        skip: objects to skip.
    """

    def __init__(self, skip: Collection[Any] = ()) -> None:
        self._seen = {id(one) for one in skip}
        self._skipped = list(skip)  # keeps them alive: the id of a deleted object is reused
        self.owners: dict[str, Any] = {}  # visited objects, by path

    def attributes(
        self, path: str, owner: Any, only: Callable[[str], bool] = lambda name: True, depth: int = 0
    ) -> Iterator[Found]:
        """Yield the state in the attributes of an object.

        Args:
            path: path of the object.
            owner: the object.
            only: returns whether to visit an attribute of this name.
            depth: number of objects on the way here.
        """
        self._seen.add(id(owner))
        self.owners[path] = owner
        left_out = per_launch(type(owner))
        attributes = dict(getattr(owner, "__dict__", None) or {})
        for kind in type(owner).__mro__:
            attributes |= {name: getattr(owner, name) for name in _slots(kind) if hasattr(owner, name)}
        for name, value in attributes.items():
            if only(name) and name not in left_out and not name.startswith("__"):
                yield from self.value(f"{path}.{name}", value, _attribute_setter(owner, name), depth)

    def value(self, path: str, value: Any, put: Callable[[Any], None] | None = None, depth: int = 0) -> Iterator[Found]:
        """Yield the state in a value.

        Args:
            path: path of the value.
            value: any value.
            put: as in `Found`.
            depth: number of objects on the way here.
        """
        if is_plain(value):
            yield Found(path, "value", value, put)
            return
        if id(value) in self._seen:
            return
        if isinstance(value, torch.nn.Module):
            yield from self.module(path, value)
            return
        self._seen.add(id(value))
        if isinstance(value, Generator):
            yield Found(path, "generator", value)
        elif is_value(value):
            yield Found(path, "value", value, put)
            if isinstance(value, torch.nn.Parameter):
                self.owners[path] = value
            if isinstance(value, torch.nn.Parameter) and value.grad is not None:
                # Trainer's `model.zero_grad()` does not reach it: its gradients add up from step to step.
                yield Found(f"{path}.grad", "value", value.grad, _attribute_setter(value, "grad"))
        elif isinstance(value, (list, tuple, dict)):
            if len(value) > MOST_ELEMENTS:
                yield Found(path, "long", len(value))
            elif depth < _DEEPEST:
                items = list(value.items() if isinstance(value, dict) else enumerate(value))
                for place, (key, one) in enumerate(items):
                    inner = None if isinstance(value, tuple) else _item_setter(value, key)
                    # A key of the user's class may print an address, or raise an error.
                    named = repr(key) if is_value(key) else f"{type(key).__name__} {place}"
                    yield from self.value(f"{path}[{named}]", one, inner, depth + 1)
        elif is_of_script(type(value)) and not isinstance(value, type) and depth < _DEEPEST:
            yield from self.attributes(path, value, depth=depth + 1)
        elif _has_state_dict(value) and not isinstance(value, _POSITIONED):
            yield Found(path, "state", value)

    def module(self, path: str, module: torch.nn.Module) -> Iterator[Found]:
        """Yield the parameters and buffers of a model, and other attributes of modules of the user's classes."""
        for name, inner in module.named_modules():
            if id(inner) in self._seen:
                continue
            self._seen.add(id(inner))
            at = f"{path}.{name}" if name else path
            for key, tensor in (*inner._parameters.items(), *inner._buffers.items()):
                if tensor is not None and is_tensor(tensor) and id(tensor) not in self._seen:
                    self._seen.add(id(tensor))
                    yield Found(f"{at}.{key}", "tensor", tensor)
                    if isinstance(tensor, torch.nn.Parameter):
                        yield Found(
                            f"{at}.{key}.requires_grad",
                            "value",
                            tensor.requires_grad,
                            _attribute_setter(tensor, "requires_grad"),
                        )
            if is_of_script(type(inner)):
                yield from self.attributes(at, inner, lambda key: key not in _OF_MODULES, _DEEPEST - 1)

    def tensor(self, path: str, tensor: torch.Tensor) -> Iterator[Found]:
        """Yield a tensor that was not found otherwise."""
        if id(tensor) not in self._seen and is_tensor(tensor):
            self._seen.add(id(tensor))
            yield Found(path, "tensor", tensor)


def per_launch(kind: type) -> Collection[str]:
    """Return the attributes that a class says are each launch's own: ``per_launch = ("began_at",)``."""
    return {name for one in kind.__mro__ for name in vars(one).get("per_launch", ())}


def _slots(kind: type) -> Collection[str]:
    slots = vars(kind).get("__slots__", ())
    return [name for name in ((slots,) if isinstance(slots, str) else slots) if name not in ("__dict__", "__weakref__")]


def _attribute_setter(owner: Any, name: str) -> Callable[[Any], None]:
    return lambda value: setattr(owner, name, value)


def _item_setter(container: Any, key: Any) -> Callable[[Any], None]:
    def put(value: Any) -> None:
        container[key] = value

    return put


def _has_state_dict(value: Any) -> bool:
    kind = type(value)
    return callable(getattr(kind, "state_dict", None)) and callable(getattr(kind, "load_state_dict", None))
