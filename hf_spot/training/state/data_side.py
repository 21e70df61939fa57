"""State of the data pipeline besides the global generators: its own generators, and attributes that change during reading.

A batch is made before the previous one is trained. So a resume needs this state as it was when the batch was made, not as it is
at a save: it is recorded at each draw, and restored together with Python's, numpy's and torch's generators.
"""

from __future__ import annotations

import functools
import marshal
import types
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy
import torch

from hf_spot.training.state.adapters import Adapter, adapter_of
from hf_spot.training.state.places import PER_LAUNCH, Place, places_of
from hf_spot.training.state.values import (
    CONTAINERS,
    Generator,
    bytes_of,
    decode,
    encode,
    is_plain,
    is_tensor,
    marshalled,
    new_generator,
    put_into,
    set_state,
    state_of,
    unmarshalled,
)
from hf_spot.training.state.walk import is_of_script, may_keep_state, per_launch, unwrapped

_MOST_ITEMS = 10_000  # of a container that is copied at each draw
_MOST_BYTES = 1 << 18
_OF_TORCH = ("weights", "indices")  # attributes of its samplers and datasets that scripts change
_NAMES = ("generator", "synchronized_generator")
# Attributes of the loaders of accelerate and torch, of Trainer's collator, and of hf_spot's wrappers.
_INSIDE = ("base_dataloader", "batch_sampler", "sampler", "_inner", "collate_fn", "data_collator", "dataset", "datasets")


# Of `datasets`: what leads to the functions of `map`, `filter`, `set_transform` and `from_generator`.
_OF_DATASETS = ("_ex_iterable", "ex_iterable", "ex_iterables", "function", "_format_kwargs", "kwargs")


def _is_of_datasets(value: Any) -> bool:
    return str(type(value).__module__).partition(".")[0] == "datasets"


def parts_of(loader: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a DataLoader with their names, at any depth: samplers, collator, dataset.

    A part is named by its class, because its wrappers differ between a resumed training and an uninterrupted one.
    """
    looked_at, known, named = [loader], set(), Counter[str]()
    for one in looked_at:
        if one is None or id(one) in known:
            continue
        known.add(id(one))
        name = type(one).__name__
        named[name] += 1
        yield f"data.{name}{'' if named[name] == 1 else f'#{named[name]}'}", one
        attributes = getattr(one, "__dict__", {})
        for inside in (*_INSIDE, *_OF_DATASETS):
            inner = attributes.get(inside) if inside in _INSIDE or _is_of_datasets(one) else None
            if isinstance(inner, dict):  # of functions, such as the one of `set_transform`
                looked_at += [value for value in inner.values() if callable(value)]
                continue
            looked_at += inner if isinstance(inner, (list, tuple)) and inside in ("datasets", "ex_iterables") else [inner]
        if is_of_script(type(one)):
            looked_at += [inner for inner in attributes.values() if is_of_script(type(inner))]


class DataSide:
    """Captures and restores the generators of the data pipeline, and the values that its classes and functions keep.

    Args:
        parts: paths and objects: loaders, samplers, the collator, the dataset.
    """

    def __init__(self, parts: Iterable[tuple[str, Any]] = ()) -> None:
        self._generators: dict[str, Generator] = {}
        self._attributes: list[tuple[str, dict[str, Any], Collection[str]]] = []
        self._places: dict[str, Place] = {}
        self._too_large: set[str] = set()
        self._samplers: set[str] = set()
        self._known: set[int] = set()
        for path, part in parts:
            if isinstance(part, torch.utils.data.Sampler):
                self._samplers.add(path)
            attributes = getattr(part, "__dict__", {})
            own = may_keep_state(type(part))
            for name, value in attributes.items():
                of_torch = name in _NAMES and isinstance(value, torch.Generator)
                if id(value) not in self._known and (of_torch or (own and isinstance(value, Generator))):
                    self._known.add(id(value))
                    self._generators[f"{path}.{name}"] = value
            if own:
                is_of_torch = str(type(part).__module__).startswith("torch.")  # whose sizes are settings, and no state
                left_out = [name for name in attributes if name not in _OF_TORCH] if is_of_torch else per_launch(type(part))
                self._attributes.append((path, attributes, left_out))
                self._add_class(type(part))
            function = getattr(part, "func", part) if isinstance(part, functools.partial) else part
            self._add_function(path, getattr(function, "__func__", function))

    def _add_function(self, path: str, function: Any) -> None:
        """Add what a function of the script reaches: its closure, its attributes, global variables, and functions there."""
        if not isinstance(function, types.FunctionType):
            return
        function = unwrapped(function)
        if id(function) in self._known or not is_of_script(function):
            return
        self._known.add(id(function))
        for place in places_of(function):
            self._add_place(f"{place.module or path}.{place.name}", place)

    def _add_class(self, kind: type) -> None:
        """Add what a class of the script keeps for all its objects, and what its methods reach."""
        for one in kind.__mro__:
            if not is_of_script(one) or id(one) in self._known:
                continue
            self._known.add(id(one))
            path, left_out = f"{one.__module__}.{one.__qualname__}", per_launch(one)
            for name, value in list(vars(one).items()):
                method = getattr(value, "__func__", getattr(value, "fget", value))
                if isinstance(method, types.FunctionType):
                    self._add_function(f"{path}.{name}", method)
                elif not name.startswith("__") and name not in left_out and name != PER_LAUNCH:
                    get, put = functools.partial(getattr, one, name), functools.partial(setattr, one, name)
                    self._add_place(f"{path}.{name}", Place(name, get, put))

    def _add_place(self, path: str, place: Place) -> None:
        value = place.get()
        if isinstance(value, Generator):
            if id(value) not in self._known:
                self._known.add(id(value))
                self._generators[path] = value
        elif isinstance(value, types.FunctionType):
            self._add_function(path, value)
        elif isinstance(value, type):
            self._add_class(value)
        elif is_of_script(type(value)) and hasattr(value, "__dict__"):
            if id(value) not in self._known and not isinstance(value, torch.nn.Module):
                self._known.add(id(value))
                self._attributes.append((path, vars(value), per_launch(type(value))))
                self._add_class(type(value))
        elif not isinstance(value, (types.ModuleType, property, staticmethod, classmethod)):
            self._places[path] = place

    @property
    def names(self) -> list[str]:
        """Return the paths of the generators."""
        return list(self._generators)

    @property
    def is_empty(self) -> bool:
        """Return whether there is nothing to capture."""
        return not (self._generators or self._attributes or self._places)

    def capture(self) -> dict[str, Any]:
        """Return the current state. Takes microseconds if the script has no classes of its own here."""
        states: dict[str, Any] = {path: state_of(generator) for path, generator in self._generators.items()}
        for path, attributes, left_out in self._attributes:
            for name, value in list(attributes.items()):
                if name not in left_out:
                    self._capture(f"{path}.{name}", value, states)
        for path, place in self._places.items():
            self._capture(path, place.get(), states)
        return states

    def of_samplers(self, states: dict[str, Any]) -> dict[str, Any]:
        """Return what in a state belongs to samplers, which draw all batches of a resumed epoch again."""
        return {path: value for path, value in states.items() if path.rpartition(".")[0] in self._samplers}

    def _capture(self, path: str, value: Any, states: dict[str, Any]) -> None:
        if is_plain(value):
            states[path] = value
        elif isinstance(value, Generator) and path not in self._generators:  # which a worker may make only when it begins
            states[path] = ("generator", type(value).__name__, state_of(value))
        elif path not in self._too_large:
            held = _held(value)
            if held is None and (adapter := adapter_of(value)) is not None:
                held = _adapted(adapter)
            if held is None:
                self._too_large.add(path)
            else:
                states[path] = held

    def restore(self, states: dict[str, Any]) -> None:
        """Restore the state that `capture` returned."""
        for path, generator in self._generators.items():
            if path in states:
                set_state(generator, states[path])
        for path, attributes, _ in self._attributes:
            for at, state in states.items():
                owner, _, name = at.rpartition(".")
                if owner == path and at not in self._generators:  # an attribute may have been created only after the start
                    attributes[name] = _restored(attributes.get(name), state)
        for path, place in self._places.items():
            if path in states and path not in self._generators:
                place.put(_restored(place.get(), states[path]))


def _held(value: Any) -> Any:
    """Return a copy of a small container, array or tensor, as plain values in a tuple; None of anything else."""
    if isinstance(value, numpy.ndarray):
        fits = type(value) is numpy.ndarray and not value.dtype.hasobject and value.nbytes <= _MOST_BYTES
        return ("array", value.dtype.str, value.shape, value.tobytes()) if fits else None
    if isinstance(value, torch.Tensor):
        fits = is_tensor(value) and value.device.type == "cpu" and value.numel() * value.element_size() <= _MOST_BYTES
        return ("tensor", str(value.dtype).removeprefix("torch."), tuple(value.shape), bytes_of(value)) if fits else None
    if type(value) in CONTAINERS and len(value) <= _MOST_ITEMS:
        try:
            return ("container", type(value).__name__, marshalled(value))
        except ValueError:  # it holds other objects: then it is no state, or none that can be copied in microseconds
            return None
    return None


def _adapted(adapter: Adapter) -> Any:
    """Return the state of an object that keeps a small value inside; None of another one."""
    state = adapter.get()
    try:
        data = marshalled(state)
    except ValueError:
        return None
    return ("adapted", type(state).__name__, data) if len(data) <= _MOST_BYTES else None


def _restored(now: Any, held: Any) -> Any:
    if not isinstance(held, tuple):
        return held
    kind, name, *rest = held
    if kind == "generator":
        if not isinstance(now, Generator):
            return new_generator(rest[0])
        set_state(now, rest[0])
        return now
    if kind == "adapted":
        adapter = adapter_of(now)
        if adapter is not None:
            is_container = name in {one.__name__ for one in CONTAINERS}
            adapter.set(unmarshalled(name, rest[0]) if is_container else marshal.loads(rest[0]))
        return now
    if kind == "container":
        return put_into(now, unmarshalled(name, rest[0], now))
    shape, data = rest
    if kind == "array":
        return put_into(now, numpy.frombuffer(bytearray(data), dtype=numpy.dtype(name)).reshape(shape))
    empty = torch.empty(tuple(shape), dtype=getattr(torch, name))
    return put_into(now, torch.frombuffer(bytearray(data), dtype=empty.dtype).reshape(empty.shape) if data else empty)


def to_json(states: dict[str, Any]) -> dict[str, Any]:
    """Return the result of `DataSide.capture` as JSON."""
    return {path: encode(value, {}, path) for path, value in states.items()}


def from_json(written: dict[str, Any]) -> dict[str, Any]:
    """Return the state that `to_json` was given."""
    return {path: decode(value, {}) for path, value in written.items()}
