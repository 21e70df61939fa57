"""Values that can be saved without pickle: recognizes them, detects changes, encodes and restores them."""

from __future__ import annotations

import base64
import copy
import ctypes
import datetime
import decimal
import enum
import fractions
import functools
import hashlib
import itertools
import json
import marshal
import math
import pathlib
import random
import sys
import types
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch

MOST_ELEMENTS = 1000  # most elements of a container that counts as state; a longer one is data
_LONGEST_OF_NUMBERS = 1_000_000  # of a flat container of numbers, which is state up to that
_SAMPLED = 256  # values of a large tensor that are compared to detect a change
_SMALL = 4096  # size of a tensor up to which all values are compared
_PLAIN = frozenset((bool, int, float, str, bytes, type(None)))
_SEQUENCES: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
_MAPPINGS: dict[str, type] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter, "defaultdict": defaultdict}
CONTAINERS = frozenset((*_SEQUENCES.values(), *_MAPPINGS.values()))
_NUMBERS = frozenset((bool, int, float, type(None)))
_KEYS = _NUMBERS | {str}
_BY_TEXT: dict[str, Callable[[str], Any]] = {
    "complex": complex,
    "Decimal": decimal.Decimal,
    "Fraction": fractions.Fraction,
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "timedelta": lambda text: datetime.timedelta(microseconds=int(text)),
    "device": torch.device,
    "range": lambda text: range(*json.loads(text)),
    "slice": lambda text: slice(*json.loads(text)),
    "PosixPath": pathlib.PosixPath,
    "PurePosixPath": pathlib.PurePosixPath,
    "UUID": uuid.UUID,
}
_KINDS_BY_TEXT = (
    complex,
    decimal.Decimal,
    fractions.Fraction,
    datetime.datetime,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    torch.device,
    range,
    slice,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    uuid.UUID,
)

Generator = torch.Generator | numpy.random.Generator | numpy.random.RandomState | random.Random


def is_tensor(value: Any) -> bool:
    """Return whether a value is a tensor with its data in this process."""
    whole = type(value) in (torch.Tensor, torch.nn.Parameter) or isinstance(value, torch.nn.Buffer)
    return whole and value.layout == torch.strided and not (value.is_meta or value.is_nested or value.is_quantized)


def is_plain(value: Any) -> bool:
    """Return whether a value is small and immutable, so that two places with it don't share an object."""
    return type(value) in _PLAIN or isinstance(value, (torch.dtype, numpy.generic))


def is_constant(value: Any) -> bool:
    """Return whether a value is immutable and no container: a plain one, a member of an enumeration, a date, a fraction."""
    return is_plain(value) or isinstance(value, enum.Enum) or type(value) in _KINDS_BY_TEXT


def is_named(value: Any) -> bool:
    """Return whether a value is a function or a class, which is saved as its name."""
    return isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type))


def is_value(value: Any) -> bool:
    """Return whether a value consists of numbers, strings, tensors, arrays, and containers of them that are not too long.

    A list, a set, or a dictionary with nothing but numbers may be longer.
    """
    left = itertools.count(-MOST_ELEMENTS)
    return _is_value(value, left) or _is_of_numbers(value)


def _is_of_numbers(value: Any) -> bool:
    if type(value) in _SEQUENCES.values():
        return len(value) <= _LONGEST_OF_NUMBERS and _NUMBERS.issuperset(map(type, value))
    if type(value) in _MAPPINGS.values():
        if len(value) > _LONGEST_OF_NUMBERS:
            return False
        return _KEYS.issuperset(map(type, value)) and _NUMBERS.issuperset(map(type, value.values()))
    return False


def _is_value(value: Any, left: Iterator[int]) -> bool:
    if next(left) >= 0:
        return False
    if is_constant(value) or type(value) is bytearray:
        return True
    if isinstance(value, torch.Tensor):
        return is_tensor(value)
    if type(value) is numpy.ndarray:
        return value.dtype.hasobject is False
    if type(value) in _SEQUENCES.values():
        return all(_is_value(one, left) for one in value)
    if type(value) in _MAPPINGS.values():
        return all(_is_value(key, left) and _is_value(one, left) for key, one in value.items())
    return False


# -- has it changed? --------------------------------------------------------------------------------------------------


def mark_of(value: Any) -> Any:
    """Return a mark that changes when the value changes. Only a sample of a large tensor is compared.

    Args:
        value: a value, or a generator.
    """
    if type(value) in _PLAIN:  # nearly all
        return type(value).__name__, repr(value)
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), _sample(value)
    if isinstance(value, numpy.ndarray):
        flat = numpy.ascontiguousarray(value).reshape(-1).view(numpy.uint8)
        return str(value.dtype), value.shape, (flat if flat.size <= _SMALL else flat[:: flat.size // _SAMPLED | 1]).tobytes()
    if _is_long(value):
        return type(value).__name__, len(value), hashlib.sha256(marshalled(value)).digest()
    if is_named(value):
        return type(value).__name__, *_name_of(value), _code_of(value)
    if isinstance(value, functools.partial):
        given = [*value.args, *value.keywords.items()]
        return "partial", mark_of(value.func), mark_of(given) if is_value(given) else len(given)
    if type(value) in _SEQUENCES.values():
        marks = [mark_of(one) for one in value]
        return type(value).__name__, tuple(sorted(marks, key=repr) if isinstance(value, (set, frozenset)) else marks)
    if type(value) in _MAPPINGS.values():
        return type(value).__name__, tuple((mark_of(key), mark_of(one)) for key, one in value.items())
    if isinstance(value, Generator):
        return hashlib.sha256(repr(state_of(value)).encode()).digest()
    return type(value).__name__, repr(value)


def mark_of_data(value: Any) -> Any:
    """Return a mark of a container that is too long to be saved: its length, and a sample of its items as far as they are
    values."""
    step = max(1, len(value) // _SAMPLED)
    if isinstance(value, (set, frozenset)):
        return len(value)  # their order differs between processes
    items = value.values() if isinstance(value, dict) else value
    sample = [
        one for one in itertools.islice(items, 0, None, step | 1) if not isinstance(one, torch.Tensor) or one.numel() < _SMALL
    ]
    return len(value), tuple(mark_of(one) if is_value(one) else type(one).__name__ for one in sample)


def _is_long(value: Any) -> bool:
    return type(value) in CONTAINERS and len(value) > MOST_ELEMENTS and _is_of_numbers(value)


def marshalled(value: Any) -> bytes:
    """Return the bytes of a container of builtin values, the same in each process.

    Raises:
        ValueError: it contains something else.
    """
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=repr)
    elif isinstance(value, deque):
        value = list(value)
    elif isinstance(value, dict):
        value = dict(value)
    return marshal.dumps(value, 0)  # later versions write the same string in several ways


def unmarshalled(kind: str, data: bytes, now: Any = None) -> Any:
    """Return the container that `marshalled` was given. A ``defaultdict`` is returned as a ``dict``.

    Args:
        kind: name of its class.
        data: its bytes.
        now: the container in its place, whose length may be limited.
    """
    held = marshal.loads(data)
    if kind == "deque":
        return deque(held, getattr(now, "maxlen", None))
    made = (_SEQUENCES | _MAPPINGS)[kind]
    return held if made is defaultdict else made(held)


def _name_of(value: Any) -> tuple[str, str]:
    return str(getattr(value, "__module__", None)), str(getattr(value, "__qualname__", None))


def _code_of(value: Any) -> str:
    """Return a digest of what a function does: several of one function may have the same name."""
    code = getattr(value, "__code__", None)
    if code is None:
        return ""
    constants = [one for one in code.co_consts if isinstance(one, (int, float, str, bytes, type(None)))]
    return hashlib.sha256(code.co_code + repr((constants, code.co_names)).encode()).hexdigest()[:16]


def _by_name(module: str, name: str) -> Any:
    """Return the function, class or member with a name.

    Raises:
        ValueError: the module, which must be imported already, has none.
    """
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise ValueError(f"{module} has no {name}")
    return found


_OBJECT = "an object of"  # the key of its class


def without_objects(value: Any) -> Any:
    """Return a ``state_dict`` in which dictionaries take the place of objects that have nothing but attributes.

    GaLore and APOLLO keep such an object for each parameter.
    """
    if type(value) in (list, tuple):
        return type(value)(map(without_objects, value))
    if type(value) is dict:
        return {key: without_objects(one) for key, one in value.items()}
    if _has_only_attributes(value):
        return {_OBJECT: list(_name_of(type(value))), **{name: without_objects(one) for name, one in vars(value).items()}}
    return value


def with_objects(value: Any) -> Any:
    """Return what `without_objects` was given. No code of the objects' classes runs, which this process has imported.

    Raises:
        ValueError: a class is not here.
    """
    if type(value) in (list, tuple):
        return type(value)(map(with_objects, value))
    if type(value) is not dict:
        return value
    items = {key: with_objects(one) for key, one in value.items() if key != _OBJECT}
    if _OBJECT not in value:
        return items
    kind = _by_name(*value[_OBJECT])
    if not isinstance(kind, type):
        raise ValueError(f"{value[_OBJECT]} is no class")
    made: Any = object.__new__(kind)
    vars(made).update(items)
    return made


def _has_only_attributes(value: Any) -> bool:
    kind: Any = type(value)
    usual = all(getattr(kind, name) is getattr(object, name) for name in ("__new__", "__reduce__", "__reduce_ex__"))
    own = any(hasattr(kind, name) for name in ("__setstate__", "__slots__", "__next__"))
    return usual and not own and type(getattr(value, "__dict__", None)) is dict and not isinstance(value, torch.nn.Module)


def _sample(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    if flat.numel() > _SMALL:
        step = flat.numel() // _SAMPLED
        flat = flat[:: step | 1]  # odd, so that the sample covers different columns
    return bytes_of(flat)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor on any device."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return b""
    # `numpy()` would keep the training from resizing the tensor later, as observers of quantization do.
    return bytes((ctypes.c_char * (flat.numel() * flat.element_size())).from_address(flat.data_ptr()).raw)


# -- generators -------------------------------------------------------------------------------------------------------


def state_of(generator: Generator) -> Any:
    """Return the state of a generator as a value."""
    if isinstance(generator, torch.Generator):
        state = generator.get_state()  # numbers in the host's memory, also of a device's generator
        return ctypes.string_at(state.data_ptr(), state.numel())
    if isinstance(generator, numpy.random.Generator):
        return _plain(generator.bit_generator.state)
    if isinstance(generator, numpy.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return generator.getstate()


def set_state(generator: Generator, state: Any) -> None:
    """Restore the state that `state_of` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    elif isinstance(generator, numpy.random.Generator):
        generator.bit_generator.state = _arrays(state)
    elif isinstance(generator, numpy.random.RandomState):
        generator.set_state(_arrays(state))
    else:
        generator.setstate(state)


def new_generator(state: Any) -> Generator | None:
    """Return a new generator with a state from `state_of`; None if there is no such kind on this machine."""
    found: Generator | None
    if isinstance(state, bytes):
        found = torch.Generator() if len(state) == torch.Generator().get_state().numel() else None  # otherwise of a GPU
    elif isinstance(state, tuple):
        found = random.Random()
    else:
        kind = getattr(numpy.random, str(state.get("bit_generator")), None)
        legacy = "has_gauss" in state  # which only RandomState has
        found = None if kind is None else (numpy.random.RandomState if legacy else numpy.random.Generator)(kind())
    if found is not None:
        set_state(found, state)
    return found


def plain_of_bits(state: Any, *, back: bool = False) -> Any:
    """Return the state of one of numpy's bit generators as a value, or the state that a value tells."""
    return _arrays(state) if back else _plain(state)


def _plain(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, numpy.ndarray):
        return ("array", str(state.dtype), state.tolist())
    return state.item() if isinstance(state, numpy.generic) else state


def _arrays(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _arrays(value) for key, value in state.items()}
    if isinstance(state, tuple) and state[:1] == ("array",):
        return numpy.array(state[2], dtype=state[1])
    return state


# -- to JSON and tensors, and back ------------------------------------------------------------------------------------


def encode(value: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """Return a value as JSON; its tensors and arrays are added to ``tensors``, under names that begin with ``name``."""
    if isinstance(value, torch.Tensor):
        key = f"{name}#{len(tensors)}"
        tensors[key] = value.detach()
        return {"tensor": key, "device": value.device.type}
    if isinstance(value, numpy.ndarray):
        key = f"{name}#{len(tensors)}"
        data = numpy.ascontiguousarray(value)
        tensors[key] = torch.from_numpy(data.reshape(-1).view(numpy.uint8).copy())
        return {"array": key, "dtype": numpy.lib.format.dtype_to_descr(value.dtype), "shape": list(value.shape)}
    if isinstance(value, numpy.generic):
        return {"scalar": encode(numpy.array(value), tensors, name)}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, enum.Flag):  # several members may be set
        return {"named": _importable(type(value)), "flags": value.value}
    if isinstance(value, enum.Enum):
        return {"named": _importable(type(value)), "member": value.name}
    if is_named(value):
        return {"named": _importable(value)}
    if type(value) in _KINDS_BY_TEXT:
        return {"kind": type(value).__name__, "text": _text_of(value)}
    if type(value) is bytearray:
        return {"bytearray": base64.b64encode(value).decode()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if _is_long(value):
        return {"long": type(value).__name__, "marshal": encode(marshalled(value), tensors, name)} | (
            {"maxlen": value.maxlen} if isinstance(value, deque) else {}
        )
    for names, kind in ((_SEQUENCES, "sequence"), (_MAPPINGS, "mapping")):
        if type(value) in names.values():
            items = value.items() if kind == "mapping" else value
            inner = [encode(list(one) if kind == "mapping" else one, tensors, name) for one in items]
            found = {kind: type(value).__name__, "items": inner}
            return found | ({"maxlen": value.maxlen} if isinstance(value, deque) else {})
    if type(value) not in (bool, int, float, str, type(None)):
        raise TypeError(f"{type(value).__name__} can't be saved")
    return value


def _importable(value: Any) -> list[str]:
    module, name = _name_of(value)
    try:
        found = _by_name(module, name)
    except ValueError as error:
        raise TypeError(str(error)) from error
    if found is not value:
        raise TypeError(f"{module}.{name} is something else")
    return [module, name]


def _text_of(value: Any) -> str:
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (range, slice)):
        return json.dumps([value.start, value.stop, value.step])
    return str(value // datetime.timedelta(microseconds=1) if isinstance(value, datetime.timedelta) else value)


def decode(written: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the value that `encode` was given. A ``defaultdict`` is returned as a ``dict``, a tensor on its kind of device if
    this machine has one.

    Raises:
        KeyError, TypeError, ValueError: it was not written by `encode`.
    """
    if not isinstance(written, dict):
        return written
    if "tensor" in written:
        return _on(written.get("device", "cpu"), tensors[written["tensor"]])
    if "array" in written:
        data = tensors[written["array"]].numpy().copy()
        return data.view(_dtype_of(written["dtype"])).reshape(written["shape"])
    if "scalar" in written:
        return decode(written["scalar"], tensors)[()]
    if "bytes" in written:
        return base64.b64decode(written["bytes"])
    if "dtype" in written:
        found = getattr(torch, written["dtype"])
        if not isinstance(found, torch.dtype):
            raise TypeError(f"torch.{written['dtype']} is not a dtype")
        return found
    if "float" in written:
        return float(written["float"])
    if "named" in written:
        found = _by_name(*written["named"])
        if "flags" in written:
            return found(written["flags"])
        return found[written["member"]] if "member" in written else found
    if "kind" in written:
        return _BY_TEXT[written["kind"]](written["text"])
    if "bytearray" in written:
        return bytearray(base64.b64decode(written["bytearray"]))
    if "long" in written:
        held = unmarshalled(written["long"], decode(written["marshal"], tensors))
        return deque(held, written["maxlen"]) if "maxlen" in written else held
    items = [decode(one, tensors) for one in written["items"]]
    if "mapping" in written:
        kind = _MAPPINGS[written["mapping"]]
        return dict(items) if kind is defaultdict else kind(dict(items))
    if written["sequence"] == "deque":
        return deque(items, written["maxlen"])
    return _SEQUENCES[written["sequence"]](items)


def _dtype_of(told: Any) -> numpy.dtype[Any]:
    if isinstance(told, str):
        return numpy.dtype(told)
    return numpy.dtype([(name, _dtype_of(kind), *map(tuple, shape)) for name, kind, *shape in told])


def _on(device: str, tensor: torch.Tensor) -> torch.Tensor:
    accelerator = torch.accelerator.current_accelerator() if device != "cpu" else None
    return tensor.to(accelerator) if accelerator is not None and accelerator.type == device else tensor


def copy_of(value: Any) -> Any:
    """Return a copy of a value that later changes in place don't reach; an object of another kind is returned as it is."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, numpy.ndarray):
        return value.copy()
    if type(value) in _SEQUENCES.values():
        items = [copy_of(one) for one in value]
        return deque(items, value.maxlen) if isinstance(value, deque) else type(value)(items)
    if type(value) is bytearray:
        return bytearray(value)
    if type(value) in _MAPPINGS.values():
        found = copy.copy(value)  # with the factory of a defaultdict
        found.update({key: copy_of(one) for key, one in value.items()})
        return found
    return value


def _held_by(mapping: dict[Any, Any], key: Any) -> Any:
    """Return what a mapping has under a key, made by its factory if it has one; otherwise None."""
    if key not in mapping and isinstance(mapping, defaultdict) and mapping.default_factory is not None:
        made = mapping.default_factory()
        return made if isinstance(made, (dict, list, set, deque)) else None
    return mapping.get(key)


def put_into(old: Any, new: Any) -> Any:
    """Copy ``new`` into ``old`` if possible, so that other references to ``old`` see it; return the object with the new value.

    Args:
        old: the current value.
        new: a value from `decode`.
    """
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        if old.shape == new.shape and old.dtype == new.dtype:
            with torch.no_grad():
                old.copy_(new)
            return old
        moved = new.to(old.device)
        return torch.nn.Parameter(moved, old.requires_grad) if isinstance(old, torch.nn.Parameter) else moved
    if isinstance(old, numpy.ndarray) and isinstance(new, numpy.ndarray) and (old.shape, old.dtype) == (new.shape, new.dtype):
        if old.flags.writeable:
            old[...] = new
            return old
        return new
    if isinstance(old, dict) and isinstance(new, dict):
        held = {key: put_into(_held_by(old, key), value) for key, value in new.items()}
        old.clear()
        old.update(held)
        return old
    if isinstance(old, (list, deque)) and type(old) is type(new):
        pairs = itertools.zip_longest(list(old), new)
        held_items = [put_into(before, after) for before, after in itertools.islice(pairs, len(new))]
        old.clear()
        old.extend(held_items)
        return old
    if isinstance(old, set) and isinstance(new, set):
        old.clear()
        old.update(new)
        return old
    return new
