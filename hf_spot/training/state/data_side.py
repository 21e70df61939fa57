"""State of the data pipeline besides the global generators: its own generators, and attributes that change during reading.

A batch is made before the previous one is trained. So a resume needs this state as it was when the batch was made, not as it is
at a save: it is recorded at each draw, and restored together with Python's, numpy's and torch's generators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch

from hf_spot.training.state.values import Generator, decode, encode, is_plain, set_state, state_of
from hf_spot.training.state.walk import is_of_script, per_launch

_NAMES = ("generator", "synchronized_generator")
# Attributes of the loaders of accelerate and torch, of Trainer's collator, and of hf_spot's wrappers.
_INSIDE = ("base_dataloader", "batch_sampler", "sampler", "_inner", "collate_fn", "data_collator", "dataset", "datasets")


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
        for inside in _INSIDE:
            inner = attributes.get(inside)
            looked_at += inner if isinstance(inner, (list, tuple)) and inside == "datasets" else [inner]
        if is_of_script(type(one)):
            looked_at += [inner for inner in attributes.values() if is_of_script(type(inner))]


class DataSide:
    """Captures and restores the generators and plain attributes of the data pipeline.

    Args:
        parts: paths and objects: loaders, samplers, the collator, the dataset.
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
        """Return the paths of the generators."""
        return list(self._generators)

    def capture(self) -> dict[str, Any]:
        """Return the current state. Takes microseconds if the script has no classes of its own here."""
        states: dict[str, Any] = {path: state_of(generator) for path, generator in self._generators.items()}
        for path, attributes, left_out in self._attributes:
            own = ((name, value) for name, value in attributes.items() if is_plain(value) and name not in left_out)
            states |= {f"{path}.{name}": value for name, value in own}
        return states

    def restore(self, states: dict[str, Any]) -> None:
        """Restore the state that `capture` returned."""
        for path, generator in self._generators.items():
            if path in states:
                set_state(generator, states[path])
        for path, attributes, _ in self._attributes:
            for name, value in attributes.items():
                if is_plain(value) and f"{path}.{name}" in states:
                    attributes[name] = states[f"{path}.{name}"]


def to_json(states: dict[str, Any]) -> dict[str, Any]:
    """Return the result of `DataSide.capture` as JSON."""
    return {path: encode(value, {}, path) for path, value in states.items()}


def from_json(written: dict[str, Any]) -> dict[str, Any]:
    """Return the state that `to_json` was given."""
    return {path: decode(value, {}) for path, value in written.items()}
