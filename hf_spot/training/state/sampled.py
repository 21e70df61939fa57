"""A digest of a sample of what a data set contains. It is asked for no items: that could draw random numbers, or count."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import partial
from itertools import islice
from typing import Any

import numpy
import torch

from hf_spot.training.state.values import Generator, is_plain, is_tensor, mark_of
from hf_spot.training.state.walk import is_of_script, per_launch

_SAMPLED = 16  # elements of a long container
_DEEPEST = 12
_MOST = 10_000  # values that are looked at
_SORTED = 10_000  # largest container without an order that is sorted
_OF_LIBRARIES = (torch.utils.data.Dataset, torch.utils.data.Sampler)  # whose attributes are looked at like a script's own


def digest_of(value: Any) -> str:
    """Return a short digest that is the same in another process if the value was made the same way.

    Absolute paths, random generators and functions without arguments of their own don't count.

    Args:
        value: a data set, or any other value.
    """
    digest = hashlib.sha256()
    for told in islice(_told(value, 0, set()), _MOST):
        digest.update(told.encode("utf-8", "backslashreplace"))
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def rows_of(data: Any) -> int | None:
    """Return the number of items of a data set; None if it has no length."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _told(value: Any, depth: int, above: set[int]) -> Iterator[str]:
    if isinstance(value, str) and os.path.isabs(value):  # another machine may have it elsewhere
        return
    if is_plain(value):
        yield repr(mark_of(value))
    elif isinstance(value, torch.Tensor):
        yield repr(mark_of(value)) if is_tensor(value) else f"{value.dtype} {tuple(value.shape)}"
    elif isinstance(value, numpy.ndarray):
        whole = value.dtype.hasobject or not value.flags.c_contiguous  # then a sample would need a copy
        yield repr((value.shape, value.dtype.str)) if whole else repr(mark_of(value))
    elif depth < _DEEPEST and id(value) not in above:
        yield type(value).__qualname__
        for inner in _parts(value):
            yield from _told(inner, depth + 1, above | {id(value)})


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, Generator):
        return
    if isinstance(value, Mapping):
        yield len(value)
        keys = sorted(value, key=repr) if len(value) <= _SORTED else list(islice(value, _SAMPLED))
        for key in _sample(keys):
            yield key
            yield value[key]
    elif isinstance(value, Set):
        yield len(value)
        yield from _sample(sorted(map(repr, value)) if len(value) <= _SORTED else ())
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif _is_function(value):
        yield from _contents(value)
    elif _is_of_datasets(value):
        yield from _rows(value)
    elif isinstance(value, Sequence) and type(value).__module__ in ("builtins", "collections"):
        yield len(value)
        yield from _sample(value)
    elif isinstance(value, _OF_LIBRARIES) or is_of_script(type(value)):
        left_out = per_launch(type(value))
        attributes = getattr(value, "__dict__", {})
        yield from ((name, attributes[name]) for name in sorted(attributes) if name not in left_out)


def _sample(values: Sequence[Any]) -> list[Any]:
    """Return evenly spaced elements, the first and the last among them."""
    count = len(values)
    places = range(count) if count <= _SAMPLED else (at * (count - 1) // (_SAMPLED - 1) for at in range(_SAMPLED))
    return [values[at] for at in places]


def _is_function(value: Any) -> bool:
    return callable(value) and hasattr(value, "__qualname__") and not isinstance(value, type)


def _contents(function: Any) -> Iterator[Any]:
    """Yield a function's name and the values that it was made with."""
    yield function.__qualname__
    function = getattr(function, "__func__", function)
    yield getattr(function, "__defaults__", None)
    for cell in getattr(function, "__closure__", None) or ():
        try:
            inside = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if is_plain(inside):
            yield inside


def _is_of_datasets(value: Any) -> bool:
    library = sys.modules.get("datasets")
    return library is not None and isinstance(value, (library.Dataset, library.IterableDataset))


def _rows(data: Any) -> Iterator[Any]:
    """Yield sampled rows of a `Dataset` as they are stored: no transform is called, no image decoded."""
    yield sorted(data.column_names or ())
    count = rows_of(data)
    if count is None:  # a stream: only what it is made of can be told without reading it
        yield from (data.info.dataset_name, data.info.config_name, str(data.split), data.num_shards)
        return
    yield count
    stored = data.with_format("arrow")
    yield from (repr(stored[at].to_pylist()) for at in _sample(range(count)))
