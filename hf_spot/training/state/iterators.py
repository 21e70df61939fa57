"""How far an iterator has been read, as far as it can be told without reading it."""

from __future__ import annotations

import itertools
import types
import warnings
from typing import Any

from hf_spot.training.state.values import is_value, mark_of

_DEEPEST = 4
_unknown = itertools.count()


def position_of(iterator: Any) -> Any:
    """Return a mark that changes when the iterator is read; of one that does not tell, a new mark at each call."""
    return _position(iterator, 0)


def _position(iterator: Any, depth: int) -> Any:
    if isinstance(iterator, types.GeneratorType):
        frame = iterator.gi_frame
        if frame is None:
            return "ended"
        inside = [(name, mark_of(value)) for name, value in frame.f_locals.items() if is_value(value)]
        return frame.f_lasti, inside
    read = getattr(iterator, "_num_yielded", None)  # of torch's DataLoader
    if isinstance(read, int):
        return read
    if depth < _DEEPEST and type(iterator).__module__ in ("builtins", "itertools"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                parts = iterator.__reduce__()[1:]
            except TypeError:
                return next(_unknown)
        return [_of_part(one, depth) for part in parts for one in (part if isinstance(part, tuple) else (part,))]
    return next(_unknown)


def _of_part(part: Any, depth: int) -> Any:
    if isinstance(part, (int, float, bool, type(None))):
        return part
    if callable(getattr(type(part), "__next__", None)):
        return _position(part, depth + 1)
    return len(part) if isinstance(part, (list, tuple, dict)) else type(part).__name__
