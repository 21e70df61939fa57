"""A name of another library: its place, its parameters, and access to it. `hf_spot.training.upstream` lists them."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Flag, auto
from functools import partial
from typing import Any, Literal
from weakref import finalize

_MISSING: Any = object()
# What the attributes of objects were before `Name.set` replaced a method there: a script may have put one of its own on them.
_replaced: dict[int, dict[str, Any]] = {}  # by identity: some classes of trainers compare equal or have no hash
# If other code has replaced a library's function, the names of its parameters are not checked.
_LIBRARIES = frozenset(
    (
        "accelerate",
        "botocore",
        "datasets",
        "deepspeed",
        "google",
        "hf_xet",
        "numpy",
        "peft",
        "safetensors",
        "subprocess",
        "torch",
        "tqdm",
        "transformers",
        "trl",
        "urllib3",
    )
)


class Scope(Flag):
    """What needs a name."""

    TRAINER = auto()
    LOOP = auto()
    LAUNCH = auto()


@dataclass(frozen=True, eq=False)
class Name:
    """One name of another library.

    Args:
        owner: its place: a module, or ``module:Class``.
        name: the name there.
        kind: an ``attribute`` belongs to a class's objects, and is found in the methods that read or set it.
        takes: the parameters that hf_spot passes or reads: by position from the first on, after ``*`` by name. Further ones
            must have defaults, unless ``…`` is at the end: then they are passed on unchanged.
        users: modules of hf_spot, without ``hf_spot.``.
        without: what is lost without it, for users.
        refused: whether a promise depends on it; False if only speed or convenience does.
        scope: what needs it.
        only: the trainings that need it, a key of `ONLY`; empty for all.
        optional: whether its module may be missing from a process that uses the library.
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
        """Return the name for people: without the module if there is a class."""
        module, _, kind = self.owner.partition(":")
        return f"{kind or module}.{self.name}"

    @property
    def library(self) -> str:
        """Return the top-level package, such as ``transformers``."""
        return self.owner.partition(":")[0].partition(".")[0]

    # -- the check ----------------------------------------------------------------------------------------------------

    def trouble(self) -> str | None:
        """Return what is wrong with the name, for people; None if nothing is, or its library is not in use."""
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
        """Return the object with this name; None if it can't be used. Not for attributes."""
        return None if (home := self.home()) is None else getattr(home, self.name)

    def put(self, value: Any) -> None:
        """Replace the object with this name in its module or class. Do nothing if `check` has reported it."""
        if (home := self.home()) is not None:
            setattr(home, self.name, value)

    def home(self) -> Any:
        """Return the module or class that contains the name; None if it can't be used."""
        module, _, kind = self.owner.partition(":")
        if module not in sys.modules or self.trouble() is not None:
            return None
        return getattr(sys.modules[module], kind) if kind else sys.modules[module]

    # -- the use ------------------------------------------------------------------------------------------------------

    def of(self, owner: Any) -> Any:
        """Return the current value of this name on an object, class or module."""
        return getattr(owner, self.name)

    def is_on(self, owner: Any) -> bool:
        """Return whether an object has this name. Only for names that some objects lack by design."""
        return hasattr(owner, self.name)

    def plain(self, owner: Any) -> Callable[..., Any]:
        """Return an object's method as it was before `set`: the class's, or one that the script has put on the object."""
        before: Any = _replaced.get(id(owner), {}).get(self.name, _MISSING)
        return partial(getattr(type(owner), self.name), owner) if before is _MISSING else before

    def set(self, owner: Any, value: Any) -> None:
        """Set this name on an object or class."""
        if self.kind == "method" and not isinstance(owner, type):
            if id(owner) not in _replaced:
                _replaced[id(owner)] = {}
                finalize(owner, _replaced.pop, id(owner), None).atexit = False
            _replaced[id(owner)].setdefault(self.name, vars(owner).get(self.name, _MISSING))
        setattr(owner, self.name, value)

    def restore(self, owner: Any) -> None:
        """Undo what `set` has set on an object."""
        before = _replaced.get(id(owner), {}).pop(self.name, _MISSING)
        if before is _MISSING:
            vars(owner).pop(self.name, None)
        else:
            setattr(owner, self.name, before)

    @contextlib.contextmanager
    def replaced(self, owner: Any, make: Callable[[Any], Any]) -> Iterator[None]:
        """Replace the name within the block. Do nothing if it can't be used, which `check` has reported.

        Args:
            owner: the object, class or module.
            make: returns the replacement, given the original.
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


def replaced_on(owner: Any) -> dict[str, Any]:
    """Return what a script had put on an object in place of its methods, by name, where `Name.set` has replaced it."""
    return {name: value for name, value in _replaced.get(id(owner), {}).items() if value is not _MISSING}


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
    """Return whether a function accepts these parameters; True if its signature is unknown."""
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
    """Return positional parameters, keyword-only ones, those without default, and whether ``*args`` and ``**kwargs`` exist.

    Reads the code object of a Python function, which is fifty times as fast as `inspect.signature`.
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
    except (TypeError, ValueError):  # a compiled function without a signature
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
