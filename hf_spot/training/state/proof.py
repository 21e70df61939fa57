"""Describes the state of a training at a save, part by part, and finds differences after a resume. Pure functions."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy
import torch

from hf_spot.training.state.values import bytes_of, is_plain

_MOST_SHOWN = 3
_LONGEST = 60  # characters of a value in a message

Part = dict[str, Any]  # JSON: names, and values or digests


def digest_of(value: Any) -> str:
    """Return a digest of a value, including all bytes of its tensors and arrays."""
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()[:32]


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        found.update(bytes_of(value))
    elif isinstance(value, Mapping):
        for key in value:
            _feed(found, key)
            _feed(found, value[key])
    elif isinstance(value, numpy.ndarray):  # its repr leaves out the middle, and depends on numpy's print options
        found.update(f"{value.dtype}{value.shape}".encode())
        if value.dtype.hasobject:
            _feed(found, value.tolist())
        else:
            found.update(numpy.ascontiguousarray(value).tobytes())
    elif isinstance(value, (list, tuple)):
        found.update(f"[{len(value)}".encode())
        if all(type(one) is int for one in value):  # a random state has hundreds
            found.update("".join([f"int {one};" for one in value]).encode())
            return
        for one in value:
            _feed(found, one)
    else:
        text = repr(value)
        # An object that does not say what it holds can't be compared between processes: only its kind can.
        found.update(f"{type(value).__name__} {'' if ' at 0x' in text else text};".encode())


def part_of(values: Mapping[str, Any]) -> Part:
    """Return named values as JSON: short plain ones unchanged, and digests of the others."""
    return {name: _shown(value) for name, value in values.items()}


def _shown(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    plain = is_plain(value) and not isinstance(value, bytes) and type(value).__module__ == "builtins"
    return value if plain and len(str(value)) <= _LONGEST else digest_of(value)


def differences(part: str, saved: Part, live: Part) -> list[str]:
    """Return the differences in words, each with its name and both values; an empty list if there are none.

    Args:
        part: name of the part.
        saved: the part at the save.
        live: the part now; compared as JSON, in which tuples and lists are the same.
    """
    live = json.loads(json.dumps(live))
    names = [name for name in {**saved, **live} if saved.get(name, ...) != live.get(name, ...)]
    told = [f"{part}: {name} was {saved.get(name, 'missing')}, is {live.get(name, 'missing')}" for name in names]
    more = len(told) - _MOST_SHOWN
    return told[:_MOST_SHOWN] + ([f"{part}: {more} more"] if more > 0 else [])


def differing_tensors(part: str, saved: Mapping[str, Any], live: Mapping[str, Any]) -> tuple[list[str], int]:
    """Compare tensors bit by bit.

    Args:
        part: name of the part.
        saved: tensors by name, from a file.
        live: tensors by name, from the training.

    Returns:
        The differences in words, and the number of tensors compared.
    """
    told, compared = [], 0
    for name, tensor in saved.items():
        if name not in live:
            continue
        compared += 1
        own = live[name].detach()
        if own.shape != tensor.shape or not torch.equal(_bits(own.to(tensor.dtype)), _bits(tensor.to(own.device))):
            told.append(f"{part}: {name} was {_brief(tensor)}, is {_brief(own)}")
    more = len(told) - _MOST_SHOWN
    return told[:_MOST_SHOWN] + ([f"{part}: {more} more tensors"] if more > 0 else []), compared


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, in which NaN equals itself."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else flat


def _brief(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {digest_of(tensor)[:12]}"


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts and lists, by path."""
    if isinstance(value, Mapping):
        pairs = [(f"{name}.{key}" if name else str(key), one) for key, one in value.items()]
    elif isinstance(value, (list, tuple)):
        pairs = [(f"{name}[{at}]", one) for at, one in enumerate(value)]
    else:
        return {name: value}
    return {path: leaf for key, one in pairs for path, leaf in flat(one, key).items()}
