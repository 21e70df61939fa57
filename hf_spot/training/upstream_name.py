"""A name of another library: where it lives, what it takes, and how to reach it. `hf_spot.training.upstream` lists them."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Flag, auto
from functools import partial
from typing import Any, Literal

_MISSING: Any = object()
# What somebody else has put in the place of a library's function is not judged by the names of its parameters.
_LIBRARIES = frozenset(
    (
        "accelerate",
        "botocore",
        "google",
        "hf_xet",
        "numpy",
        "peft",
        "safetensors",
        "torch",
        "tqdm",
        "transformers",
        "trl",
        "urllib3",
    )
)


class Scope(Flag):
    """Who needs a name."""

    TRAINER = auto()
    LOOP = auto()
    LAUNCH = auto()


@dataclass(frozen=True, eq=False)
class Name:
    """One name of another library.

    Args:
        owner: where it lives: a module, or ``module:Class``.
        name: there.
        kind: an ``attribute`` is one of a class's objects, and known by the methods that read or set it.
        takes: the parameters that hf_spot gives or reads: by position from the first on, behind ``*`` by name. More of them
            must have defaults, unless ``…`` stands at the end: then they are handed on as they come.
        users: modules of hf_spot, without ``hf_spot.``.
        without: what is lost, for a user to read.
        refused: a promise rests on it. False: only speed or comfort does.
        scope: who needs it.
        only: the trainings that need it, a key of `ONLY`; empty for all.
        optional: its module may be missing from a process that uses the library.
    """

    owner: str
    name: str
    kind: Literal["function", "method", "attribute", "class", "value"]
    takes: str
    users: tuple[str, ...]
    without: str
    refused: bool = True
    scope: Scope = Scope.TRAINER
    only: str = ""
    optional: bool = False

    @property
    def shown(self) -> str:
        """As a person would write it: without the module where a class says enough."""
        module, _, kind = self.owner.partition(":")
        return f"{kind or module}.{self.name}"

    @property
    def library(self) -> str:
        """The package that is imported, as ``transformers``."""
        return self.owner.partition(":")[0].partition(".")[0]

    # -- the check ----------------------------------------------------------------------------------------------------

    def trouble(self) -> str | None:
        """Return what is wrong with it, in words; None when it is as it was, or its library is not in use."""
        module_name, _, kind = self.owner.partition(":")
        owner: Any = sys.modules.get(module_name)
        if owner is None:
            return None if self.optional or self.library not in sys.modules else f"has no module {module_name}"
        if kind:
            owner = vars(owner).get(kind)
            if owner is None:
                return f"has no {module_name}.{kind}"
        if self.kind == "attribute":
            return None if _is_on(owner, self.name) else f"has no {self.shown}"
        found = getattr(owner, self.name, _MISSING)
        if found is _MISSING:
            return f"has no {self.shown}"
        if self.kind != "value" and _is_of_a_library(found) and not accepts(found, self.takes, bound=self.kind == "method"):
            return f"has changed the parameters of {self.shown}"
        return None

    def find(self) -> Any:
        """Return what it stands for; None when it can't be used. Not for attributes."""
        return None if (home := self.home()) is None else getattr(home, self.name)

    def put(self, value: Any) -> None:
        """Put a value in its place, where it lives. Do nothing when it can't be used, which `check` has said."""
        if (home := self.home()) is not None:
            setattr(home, self.name, value)

    def home(self) -> Any:
        """Return the module or the class where it lives; None when it can't be used."""
        module, _, kind = self.owner.partition(":")
        if module not in sys.modules or self.trouble() is not None:
            return None
        return getattr(sys.modules[module], kind) if kind else sys.modules[module]

    # -- the use ------------------------------------------------------------------------------------------------------

    def of(self, owner: Any) -> Any:
        """Return what an object, class or module has under this name now."""
        return getattr(owner, self.name)

    def is_on(self, owner: Any) -> bool:
        """Return whether an object has it: for what only some objects have by nature."""
        return hasattr(owner, self.name)

    def plain(self, owner: Any) -> Callable[..., Any]:
        """Return the method that an object's class has, whatever has taken its place on the object."""
        return partial(getattr(type(owner), self.name), owner)

    def set(self, owner: Any, value: Any) -> None:
        """Put a value in its place on one object, or class."""
        setattr(owner, self.name, value)

    def restore(self, owner: Any) -> None:
        """Remove what `set` has put on an object, so that its class's is in force again."""
        vars(owner).pop(self.name, None)

    @contextlib.contextmanager
    def replaced(self, owner: Any, make: Callable[[Any], Any]) -> Iterator[None]:
        """Put something else in its place for a while. Where it can't be used, which `check` has said, do nothing.

        Args:
            owner: the object, class or module.
            make: given what is there, returns what takes its place.
        """
        if self.trouble() is not None or not hasattr(owner, self.name):
            yield
            return
        before = vars(owner).get(self.name, _MISSING)
        setattr(owner, self.name, make(getattr(owner, self.name)))
        try:
            yield
        finally:
            if before is _MISSING:
                delattr(owner, self.name)
            else:
                setattr(owner, self.name, before)


def _is_on(kind: type, name: str) -> bool:
    """Return whether a class has an attribute, or one of its methods reads or sets it."""
    for one in kind.__mro__:
        members = vars(one)
        if name in members:
            return True
        for member in list(members.values()):
            found = member.fget if isinstance(member, property) else member
            code = getattr(_unwrapped(found), "__code__", None)
            if code is not None and name in code.co_names:
                return True
    return False


def _is_of_a_library(found: Any) -> bool:
    home = getattr(_unwrapped(found), "__globals__", None)
    return home is None or str(home.get("__name__")).partition(".")[0] in _LIBRARIES


def _unwrapped(function: Any) -> Any:
    while (inside := getattr(function, "__wrapped__", None)) is not None:
        function = inside
    return function


def accepts(function: Any, takes: str, *, bound: bool) -> bool:
    """Return whether a function can be given these parameters. One that does not tell its own is taken at its word."""
    function = _unwrapped(function)
    positional, by_name, required, any_positional, any_name = _parameters(function)
    if bound:
        required.discard(positional[0] if positional else "")
        positional = positional[1:]
    wanted = [part for part in takes.replace(",", " ").split() if part != "…"]
    ordered = wanted[: wanted.index("*")] if "*" in wanted else wanted
    named = wanted[len(ordered) + 1 :]
    if positional[: len(ordered)] != ordered[: len(positional)] or (len(positional) < len(ordered) and not any_positional):
        return False
    if not any_name and not {*named} <= {*positional, *by_name}:
        return False
    return takes.endswith("…") or required <= {*wanted}


def _parameters(function: Any) -> tuple[list[str], list[str], set[str], bool, bool]:
    """Return those by position, those by name alone, those without a default, and whether ``*args`` and ``**kwargs`` are there.

    Of a function of Python its code tells them, fifty times as fast as `inspect.signature`.
    """
    code = getattr(function, "__code__", None)
    if code is not None:
        count, only = code.co_argcount, code.co_kwonlyargcount
        positional = list(code.co_varnames[:count])
        by_name = list(code.co_varnames[count : count + only])
        without_default = positional[: count - len(function.__defaults__ or ())]
        required = {*without_default, *(name for name in by_name if name not in (function.__kwdefaults__ or {}))}
        return (
            positional,
            by_name,
            required,
            bool(code.co_flags & inspect.CO_VARARGS),
            bool(code.co_flags & inspect.CO_VARKEYWORDS),
        )
    try:
        told = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled, and says nothing
        return [], [], set(), True, True
    kinds: dict[Any, list[inspect.Parameter]] = {}
    for one in told:
        kinds.setdefault(one.kind, []).append(one)
    names = {kind: [one.name for one in found] for kind, found in kinds.items()}
    return (
        names.get(inspect.Parameter.POSITIONAL_ONLY, []) + names.get(inspect.Parameter.POSITIONAL_OR_KEYWORD, []),
        names.get(inspect.Parameter.KEYWORD_ONLY, []),
        {one.name for one in told if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)},
        inspect.Parameter.VAR_POSITIONAL in names,
        inspect.Parameter.VAR_KEYWORD in names,
    )
