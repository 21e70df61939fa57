"""What data are made from beside the global generators: generators of their own, and settings that change while they are read.

A batch is made before the one before it is trained. So what it is made from has to be known as it was at that moment, and not
as it is at a save: it is noted at each draw, and takes the same way back as Python's, numpy's and torch's generators do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch

from hf_spot.training.state.values import Generator, decode, encode, is_plain, set_state, state_of
from hf_spot.training.state.walk import is_of_script, per_launch

_NAMES = ("generator", "synchronized_generator")
# Of accelerate's loaders, of torch's, of Trainer's collator, and of ours.
_INSIDE = ("base_dataloader", "batch_sampler", "sampler", "_inner", "collate_fn", "data_collator", "dataset", "datasets")


def parts_of(loader: Any) -> Iterator[tuple[str, Any]]:
    """Name what a DataLoader consists of, however deep accelerate and torch have put it: samplers, collator, dataset.

    A part is named by its class, as what lies around it differs between a training that is resumed and one that is not.
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
        for inside in _INSIDE:
            inner = attributes.get(inside)
            looked_at += inner if isinstance(inner, (list, tuple)) and inside == "datasets" else [inner]
        if is_of_script(type(one)):
            looked_at += [inner for inner in attributes.values() if is_of_script(type(inner))]


class DataSide:
    """The generators and plain attributes of what data are made with.

    Args:
        parts: path and object: loaders, samplers, the collator, the dataset.
    """

    def __init__(self, parts: Iterable[tuple[str, Any]] = ()) -> None:
        self._generators: dict[str, Generator] = {}
        self._attributes: list[tuple[str, dict[str, Any], Collection[str]]] = []
        known: set[int] = set()
        for path, part in parts:
            attributes = getattr(part, "__dict__", {})
            own = is_of_script(type(part))
            for name, value in attributes.items():
                of_torch = name in _NAMES and isinstance(value, torch.Generator)
                if id(value) not in known and (of_torch or (own and isinstance(value, Generator))):
                    known.add(id(value))
                    self._generators[f"{path}.{name}"] = value
            if own:
                self._attributes.append((path, attributes, per_launch(type(part))))

    @property
    def names(self) -> list[str]:
        """The generators, by path."""
        return list(self._generators)

    def capture(self) -> dict[str, Any]:
        """Return how everything stands: microseconds, where there is nothing of the script's own."""
        states: dict[str, Any] = {path: state_of(generator) for path, generator in self._generators.items()}
        for path, attributes, left_out in self._attributes:
            own = ((name, value) for name, value in attributes.items() if is_plain(value) and name not in left_out)
            states |= {f"{path}.{name}": value for name, value in own}
        return states

    def restore(self, states: dict[str, Any]) -> None:
        """Make everything stand as `capture` found it."""
        for path, generator in self._generators.items():
            if path in states:
                set_state(generator, states[path])
        for path, attributes, _ in self._attributes:
            for name, value in attributes.items():
                if is_plain(value) and f"{path}.{name}" in states:
                    attributes[name] = states[f"{path}.{name}"]


def to_json(states: dict[str, Any]) -> dict[str, Any]:
    """Return what `DataSide.capture` found as JSON."""
    return {path: encode(value, {}, path) for path, value in states.items()}


def from_json(written: dict[str, Any]) -> dict[str, Any]:
    """Return what `to_json` was given."""
    return {path: decode(value, {}) for path, value in written.items()}
