"""Finds state in the objects that a script passes to its training: values, generators, tensors of models, optimizers."""

from __future__ import annotations

import contextlib
import functools
import io
import random
import sys
import sysconfig
import threading
import types
from collections import deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from hf_spot.training.state.adapters import NAMESPACES, WEAK, Adapter, adapter_of, items_of_weak, opaque_mark_of
from hf_spot.training.state.places import PER_LAUNCH, Place, draws_by_name, names_per_launch, places_of
from hf_spot.training.state.values import MOST_ELEMENTS, Generator, is_constant, is_plain, is_tensor, is_value

_DEEPEST = 10
MOST_OBJECTS = 10_000  # that a walk looks into; it takes some tenths of a second
_OF_MODULES = frozenset(vars(torch.nn.Module()))  # a module's own attributes: parameters, hooks, …
# Their state is how far they have been read, and a resume reads them again up to there.
_POSITIONED = (torch.utils.data.DataLoader, torch.utils.data.IterableDataset)
# Libraries whose objects belong to a process: tensors and models are found where they are used, the rest is no state.
_OF_PROCESSES = frozenset(
    (
        "torch",
        "transformers",
        "accelerate",
        "datasets",
        "tokenizers",
        "numpy",
        "pandas",
        "pyarrow",
        "PIL",
        "safetensors",
        "huggingface_hub",
        "wandb",
        "mlflow",
        "tensorboard",
        "tensorboardX",
        "swanlab",
        "comet_ml",
        "trackio",
        "clearml",
        "neptune",
        "aim",
        "dvclive",
        "codecarbon",
        "vllm",
        "ray",
        "optuna",
        "boto3",
        "botocore",
        "hf_spot",
        "torchdata",
        "tqdm",
        "deepspeed",
        "bitsandbytes",
        "requests",
        "httpx",
    )
)
_OF_TRAININGS = ("torch.utils.data.sampler", "torch.utils.data.dataset", "torch.distributions")  # parts of them, all the same
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_OF_TENSORS = ("_post_accumulate_grad_hooks", "_backward_hooks")
# Of optimizers and schedulers: what their state_dict has, and torch's own hooks and notes.
IN_STATE_DICT = frozenset(
    (
        *("state", "param_groups", "defaults", "base_lrs", "last_epoch", "_step_count", "_last_lr", "optimizer"),
        *vars(torch.optim.Optimizer([torch.zeros(1)], {})),
    )
)
_CACHE = type(functools.lru_cache(len))  # the class of functions whose results are kept
_STDLIB = Path(sysconfig.get_paths()["stdlib"])


class Found(NamedTuple):  # a save makes thousands, and a dataclass takes three times as long
    """One piece of state.

    Args:
        path: its path, as in code: ``callbacks.Average.of``.
        kind: ``value``, ``tensor`` (of a module), ``generator``, ``state`` (an object with a ``state_dict``), ``adapted`` (an
            `Adapter`), ``long`` (a container with so many elements that it counts as data), ``iterator`` (whose position can't
            be saved), or ``opaque`` (a mark of what can't be saved).
        value: the current value.
        put: replaces the value; None if it can only be changed in place.
    """

    path: str
    kind: str
    value: Any
    put: Callable[[Any], None] | None = None


def is_of_script(kind: Any) -> bool:
    """Return whether a class or a function is the user's: not of an installed package, nor of Python, nor of hf_spot."""
    module = kind.__module__
    if isinstance(kind, types.FunctionType):  # `functools.wraps` gives a function the module of the one that it wraps
        module = kind.__globals__.get("__name__", module)
    if module == "__main__":
        return True
    if module is None or module == "builtins" or module.partition(".")[0] == "hf_spot":
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:  # created by exec, as in a notebook, or compiled into Python
        return module not in sys.stdlib_module_names
    return _is_of_user(file)


@functools.lru_cache(maxsize=4096)
def _is_of_user(file: str) -> bool:
    return not {"site-packages", "dist-packages"} & {*Path(file).parts} and not Path(file).is_relative_to(_STDLIB)


class Walk:
    """Walks through objects; yields nothing twice.

    Args:
        skip: objects to skip.
        kinds: classes whose objects are skipped.
        libraries: whether plain attributes of modules of installed packages are visited, such as the rate of a dropout.
    """

    def __init__(self, skip: Collection[Any] = (), kinds: tuple[type, ...] = (), *, libraries: bool = True) -> None:
        self._seen = {id(one) for one in skip}
        self._skipped = list(skip)  # keeps them alive: the id of a deleted object is reused
        self._kinds = kinds
        self._libraries = libraries
        self._left = MOST_OBJECTS
        self.owners: dict[str, Any] = {}  # visited objects, by path
        self.beyond = ""  # path of the first object that was one too many

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
        for kind in type(owner).__mro__:
            if is_of_script(kind):
                yield from self.of_class(kind, left_out, depth)

    def of_class(self, kind: type, left_out: Collection[str], depth: int) -> Iterator[Found]:
        """Yield the state in the attributes of a class, and in what its methods use from outside.

        Args:
            kind: a class of the user's.
            left_out: attributes to leave out.
            depth: number of objects on the way here.
        """
        if id(kind) in self._seen:
            return
        self._seen.add(id(kind))
        path = f"{kind.__module__}.{kind.__qualname__}"
        self.owners[path] = kind
        for name, value in list(vars(kind).items()):
            method = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(method, types.FunctionType):
                yield from self.function(f"{path}.{name}", method, depth)
            elif not name.startswith("__") and name not in left_out and name != PER_LAUNCH:
                yield from self.value(f"{path}.{name}", value, _attribute_setter(kind, name), depth)

    def function(self, path: str, function: Any, depth: int) -> Iterator[Found]:
        """Yield the state that a function reaches: its closure, defaults, attributes, and the global variables that it names.

        Args:
            path: path of the function.
            function: a function, a bound method, or a `functools.partial`.
            depth: number of objects on the way here.
        """
        if isinstance(function, functools.partial):
            if not _is_of_script_function(function.func):
                return
            yield from self.value(path, function.func, None, depth + 1)
            for key, one in (*enumerate(function.args), *function.keywords.items()):
                yield from self.value(f"{path}.{key}", one, None, depth + 1)
            return
        if isinstance(function, types.MethodType):
            yield from self.value(f"{path}.__self__", function.__self__, None, depth + 1)
            return
        if depth >= _DEEPEST or not _is_of_script_function(function):
            return
        function = unwrapped(function)
        if id(function) in self._seen:
            return
        self._seen.add(id(function))
        self.owners[path] = function
        for place in places_of(function):
            yield from self._place(path, place, depth)

    def _place(self, path: str, place: Place, depth: int) -> Iterator[Found]:
        value, at = place.get(), f"{path}.{place.name}"
        if place.module:
            at = f"{place.module}.{place.name}"
            if id(value) in self._seen and not is_constant(value):
                return
            if at in self.owners:  # of another function
                return
            self.owners[at] = None
        if isinstance(value, type):
            if is_of_script(value) and not issubclass(value, BaseException):
                yield from self.of_class(value, per_launch(value), depth + 1)
        elif isinstance(value, types.FunctionType):
            yield from self.function(at, value, depth + 1)
        elif not isinstance(value, types.ModuleType):
            yield from self.value(at, value, place.put, depth + 1)

    def value(self, path: str, value: Any, put: Callable[[Any], None] | None = None, depth: int = 0) -> Iterator[Found]:
        """Yield the state in a value.

        Args:
            path: path of the value.
            value: any value.
            put: as in `Found`.
            depth: number of objects on the way here.
        """
        if is_constant(value):
            yield Found(path, "value", value, put)
            return
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            if put is not None:
                yield Found(path, "value", value, put)
            yield from self.function(path, value, depth)
            return
        if isinstance(value, type) and put is not None:
            yield Found(path, "value", value, put)
            return
        if isinstance(value, _CACHE):
            if draws_by_name(value.__wrapped__):  # what it has drawn is kept where nobody can read it
                yield Found(path, "opaque", value.cache_info()[1:])
            yield from self.function(path, value.__wrapped__, depth)
            return
        if id(value) in self._seen or isinstance(value, self._kinds):
            return
        if isinstance(value, torch.nn.Module):
            if put is not None:
                yield Found(f"{path}.__class__", "value", type(value))
            yield from self.module(path, value)
            return
        self._seen.add(id(value))
        self._left -= 1
        if self._left < 0:
            self.beyond = self.beyond or path
            return
        if isinstance(value, Generator) and not isinstance(value, random.SystemRandom):  # which has no state
            yield Found(path, "generator", value)
        elif is_value(value):
            yield Found(path, "value", value, put)
            if isinstance(value, torch.nn.Parameter):
                self.owners[path] = value
            if isinstance(value, torch.nn.Parameter) and value.grad is not None:
                # Trainer's `model.zero_grad()` does not reach it: its gradients add up from step to step.
                yield Found(f"{path}.grad", "value", value.grad, _attribute_setter(value, "grad"))
        elif (adapter := _adapter_of(value)) is not None:
            yield Found(path, "adapted", adapter)
            if is_of_script(type(value)):
                yield from self.attributes(path, value, depth=depth + 1)
        elif isinstance(value, NAMESPACES) or type(value) is threading.local:
            self.owners[path] = value
            for name, one in list(vars(value).items()):
                yield from self.value(f"{path}.{name}", one, _attribute_setter(value, name), depth + 1)
        elif isinstance(value, WEAK):
            for place, (key, one) in enumerate(items_of_weak(value)):
                inner = _item_setter(value, key)
                named = repr(key) if is_value(key) and not isinstance(key, torch.Tensor) else f"{type(key).__name__} {place}"
                yield from self.value(f"{path}[{named}]", one, inner, depth + 1)
        elif isinstance(value, (set, frozenset, deque)):
            yield Found(path, "long", value)
        elif isinstance(value, (list, tuple, dict)):
            if len(value) > MOST_ELEMENTS:
                yield Found(path, "long", value)
            elif depth < _DEEPEST:
                self.owners[path] = value
                items = list(value.items() if isinstance(value, dict) else enumerate(value))
                held: Any = _Tuple(value, put) if isinstance(value, tuple) else None
                for place, (key, one) in enumerate(items):
                    inner = _item_setter(held if isinstance(value, tuple) else value, key)
                    # A key of the user's class may print an address, or raise an error.
                    known = is_value(key) and not isinstance(key, torch.Tensor)
                    named = repr(key) if known else f"{type(key).__name__} {place}"
                    yield from self.value(f"{path}[{named}]", one, inner, depth + 1)
        elif isinstance(value, (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)):
            yield Found(path, "state", value)
            if is_of_script(type(value)):
                yield from self.attributes(path, value, lambda name: name not in IN_STATE_DICT, depth + 1)
        elif _is_iterator(value):
            yield Found(path, "iterator", value)
        elif is_of_script(type(value)) and not isinstance(value, type) and depth < _DEEPEST:
            if put is not None:  # another object may take its place
                yield Found(f"{path}.__class__", "value", type(value), _attribute_setter(value, "__class__"))
            yield from self.attributes(path, value, depth=depth + 1)
        elif _has_state_dict(value) and not isinstance(value, _POSITIONED):
            yield Found(path, "state", value)
        elif (mark := opaque_mark_of(value)) is not None:
            yield Found(path, "opaque", mark)
        elif _is_of_library(type(value)) and depth < _DEEPEST:
            yield from self.numbers(path, value, depth=depth + 1)

    def numbers(
        self, path: str, owner: Any, only: Callable[[str], bool] = lambda name: True, depth: int = 0
    ) -> Iterator[Found]:
        """Yield numbers, tensors and generators in the attributes of an object of an installed package.

        Args:
            path: path of the object.
            owner: the object.
            only: returns whether to visit an attribute of this name.
            depth: number of objects on the way here.
        """
        self.owners[path] = owner
        for name, value in list((getattr(owner, "__dict__", None) or {}).items()):
            if name.startswith("__") or not only(name) or isinstance(value, (bool, str, bytes, type(None))):
                continue
            put = _attribute_setter(owner, name)
            if isinstance(value, (int, float, torch.Tensor, numpy.ndarray, Generator, torch.nn.Module, dict, list, deque)):
                yield from self.value(f"{path}.{name}", value, put, depth)
            elif _is_of_library(type(value)) and depth < _DEEPEST and id(value) not in self._seen:
                self._seen.add(id(value))
                yield from self.numbers(f"{path}.{name}", value, depth=depth + 1)

    def plain_attributes(self, path: str, owner: Any, only: Callable[[str], bool] = lambda name: True) -> Iterator[Found]:
        """Yield the attributes of an object that are values; other objects in them are not visited."""
        for name, value in list(vars(owner).items()):
            if not only(name) or name.startswith("__"):
                continue
            small = type(value) in (list, tuple, dict, set) and is_value(value)
            if is_plain(value) or (small and id(value) not in self._seen):
                if small:
                    self._seen.add(id(value))
                yield Found(f"{path}.{name}", "value", value, _attribute_setter(owner, name))

    def module(self, path: str, module: torch.nn.Module) -> Iterator[Found]:
        """Yield the parameters and buffers of a model, and other attributes of modules of the user's classes."""
        for name, inner in module.named_modules():
            if id(inner) in self._seen:
                continue
            self._seen.add(id(inner))
            at = f"{path}.{name}" if name else path
            self.owners[at] = inner
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
                        yield from self._of_parameter(f"{at}.{key}", tensor)
            if is_of_script(type(inner)):
                yield from self.attributes(at, inner, lambda key: key not in _OF_MODULES, _DEEPEST - 1)
            elif self._libraries:
                yield from self.plain_attributes(at, inner, _is_no_part_of_module)
            for name, value in list(vars(inner).items()):
                if isinstance(value, types.FunctionType):  # as a script that replaces `forward` does
                    yield from self.function(f"{at}.{name}", value, 1)
            for hooks in _HOOKS:
                for place, hook in enumerate(list((getattr(inner, hooks, None) or {}).values())):
                    yield from self.function(f"{at}.{hooks}[{place}]", hook, 1)

    def _of_parameter(self, path: str, parameter: torch.nn.Parameter) -> Iterator[Found]:
        """Yield what scripts attach to a parameter: values, and what its hooks keep."""
        self.owners[path] = parameter
        for name, value in list(vars(parameter).items()):
            if not name.startswith(("_", "ds_")) and (isinstance(value, torch.Tensor) or is_value(value)):
                yield from self.value(f"{path}.{name}", value, _attribute_setter(parameter, name), 1)
        for hooks in _HOOKS_OF_TENSORS:
            for place, hook in enumerate(list((getattr(parameter, hooks, None) or {}).values())):
                yield from self.function(f"{path}.{hooks}[{place}]", hook, 1)
                for name, stepped in _stepped_by(hook, parameter):
                    yield from self.value(f"{path}.{hooks}[{place}].{name}", stepped, None, 1)

    def tensor(self, path: str, tensor: torch.Tensor) -> Iterator[Found]:
        """Yield a tensor that was not found otherwise."""
        if id(tensor) not in self._seen and is_tensor(tensor):
            self._seen.add(id(tensor))
            yield Found(path, "tensor", tensor)


def _stepped_by(hook: Any, parameter: torch.nn.Parameter) -> Iterator[tuple[str, Any]]:
    """Yield optimizers and schedulers that a hook steps for its parameter, as it does for "layerwise" ones of transformers."""
    for name, cell in zip(getattr(getattr(hook, "__code__", None), "co_freevars", ()), hook.__closure__ or (), strict=False):
        with contextlib.suppress(ValueError):  # nothing is in it yet
            value = cell.cell_contents
            value = value.get(parameter) if isinstance(value, dict) else value
            if isinstance(value, (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)):
                yield name, value


def _adapter_of(value: Any) -> Adapter | None:
    """Return the adapter of an object; None for tensors of libraries, which may be divided among ranks."""
    if isinstance(value, torch.Tensor) and not is_of_script(type(value)):
        return None
    return adapter_of(value)


def _is_no_part_of_module(name: str) -> bool:
    return name not in _OF_MODULES and name != "gradient_checkpointing"  # Trainer sets it when a training begins


def _is_of_script_function(function: Any) -> bool:
    return isinstance(function, types.FunctionType) and is_of_script(unwrapped(function))


def unwrapped(function: types.FunctionType) -> types.FunctionType:
    """Return a function of the script without what libraries have wrapped around it, as torch does with ``Optimizer.step``."""
    while not is_of_script(function):
        inner = getattr(function, "__wrapped__", None)
        if not isinstance(inner, types.FunctionType):
            break
        function = inner
    return function


def _is_of_library(kind: type) -> bool:
    """Return whether a class comes from an installed package that may keep state of a training in its objects."""
    package = str(kind.__module__).partition(".")[0]
    if str(kind.__module__).startswith(_OF_TRAININGS):
        return True
    return package not in _OF_PROCESSES and package not in sys.stdlib_module_names and not issubclass(kind, type)


def may_keep_state(kind: type) -> bool:
    """Return whether a class is the user's, or of an installed package that may keep state of a training in its objects."""
    return is_of_script(kind) or _is_of_library(kind)


def _is_iterator(value: Any) -> bool:
    return callable(getattr(type(value), "__next__", None)) and not isinstance(value, io.IOBase)


def per_launch(kind: type) -> Collection[str]:
    """Return the attributes that a class says are each launch's own: ``per_launch = ("began_at",)``."""
    return {name for one in kind.__mro__ for name in names_per_launch(vars(one))}


def _slots(kind: type) -> Collection[str]:
    slots = vars(kind).get("__slots__", ())
    return [name for name in ((slots,) if isinstance(slots, str) else slots) if name not in ("__dict__", "__weakref__")]


class _Tuple:
    """Replaces items of a tuple, or of one with named items, by replacing the tuple.

    Args:
        now: the tuple.
        put: puts another one in its place; None if that can't be done.
    """

    def __init__(self, now: tuple[Any, ...], put: Callable[[Any], None] | None) -> None:
        self._now, self._put = now, put

    def __setitem__(self, at: int, value: Any) -> None:
        """Replace an item.

        Raises:
            TypeError: the tuple can't be replaced.
        """
        if self._put is None:
            raise TypeError("this tuple can't be replaced")
        items = [*self._now[:at], value, *self._now[at + 1 :]]
        make = getattr(type(self._now), "_make", type(self._now))
        self._now = make(items)
        self._put(self._now)


def _attribute_setter(owner: Any, name: str) -> Callable[[Any], None]:
    return lambda value: set_attribute(owner, name, value)


def set_attribute(owner: Any, name: str, value: Any) -> None:
    """Set an attribute, also of a frozen dataclass: a script replaces such an object, which has no other state."""
    is_frozen = getattr(getattr(type(owner), "__dataclass_params__", None), "frozen", False)
    (object.__setattr__ if is_frozen else setattr)(owner, name, value)


def _item_setter(container: Any, key: Any) -> Callable[[Any], None]:
    def put(value: Any) -> None:
        container[key] = value

    return put


def _has_state_dict(value: Any) -> bool:
    kind = type(value)
    return callable(getattr(kind, "state_dict", None)) and callable(getattr(kind, "load_state_dict", None))
