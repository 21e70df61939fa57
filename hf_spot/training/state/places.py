"""Places outside of objects where functions keep state: closures, defaults, attributes, and global variables."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """A variable that a function reaches.

    Args:
        name: its name.
        get: returns its current value.
        put: replaces the value.
        module: name of the module whose global variable it is; empty for others.
    """

    name: str
    get: Callable[[], Any]
    put: Callable[[Any], None]
    module: str = ""


PER_LAUNCH = "per_launch"


def names_per_launch(namespace: Mapping[str, Any]) -> Collection[str]:
    """Return the names that a class, a function or a module says are each launch's own: ``per_launch = ("began_at",)``."""
    names = namespace.get(PER_LAUNCH, ())
    if isinstance(names, str):
        return (names,)
    return [name for name in names if isinstance(name, str)] if isinstance(names, (list, tuple, set, frozenset)) else ()


def places_of(function: types.FunctionType) -> Iterator[Place]:
    """Yield the places that a function reaches: its closure, its attributes, defaults that can change, global variables.

    Not those that the function or the module says are each launch's own.
    """
    left_out = {PER_LAUNCH, *names_per_launch(vars(function))}
    left_out_of_module = {PER_LAUNCH, *names_per_launch(function.__globals__)}
    for place in _all_of(function):
        if place.name not in (left_out_of_module if place.module else left_out):
            yield place


def _all_of(function: types.FunctionType) -> Iterator[Place]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            cell.cell_contents  # noqa: B018
        except ValueError:  # not filled yet
            continue
        yield Place(name, functools.partial(getattr, cell, "cell_contents"), functools.partial(setattr, cell, "cell_contents"))
    for name in list(vars(function)):
        yield Place(name, functools.partial(getattr, function, name), functools.partial(setattr, function, name))
    for number, value in enumerate(function.__defaults__ or ()):
        if isinstance(value, (list, dict, set)):
            yield Place(f"__defaults__[{number}]", functools.partial(_same, value), _stays)
    module = function.__globals__
    for name in _globals_named(function.__code__):
        if name in module and not (name.startswith("__") and name.endswith("__")):  # where a module is: __file__, __name__
            yield Place(
                name,
                functools.partial(module.__getitem__, name),
                functools.partial(module.__setitem__, name),
                str(module.get("__name__")),
            )


def _same(value: Any) -> Any:
    return value


def _stays(value: Any) -> None:
    """Do nothing: a default is changed in place."""


@functools.lru_cache(maxsize=4096)
def _globals_named(code: types.CodeType) -> tuple[str, ...]:
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= dict.fromkeys(_globals_named(constant))
    return tuple(names)


_DRAWING = re.compile(r"rand|choice|choices|shuffle|sample|normal|uniform|multinomial|bernoulli|permutation|integers")


def draws_by_name(function: Any) -> bool:
    """Return whether a function seems to draw random numbers: whether it names something that does."""
    code = getattr(function, "__code__", None)
    return code is not None and any(map(_DRAWING.match, _globals_named(code)))
