"""Read the index of a sharded checkpoint, torch's ``.metadata``, without torch, and without running what a pickle asks for."""

from __future__ import annotations

import io
import pickle
from typing import Any

from hf_spot.policy.shard_reads import Chunk, Value

INDEX_NAME = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint"


class UnknownIndex(Exception):
    """An index that this version can't read: its files are then fetched as a whole."""


class _Record:
    """Any object of the pickle: keeps its state, and runs nothing."""

    def __init__(self, *args: object) -> None:
        self.args = args
        self.state: Any = {}

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Index(_Record):
    pass


class _Chunk(_Record):
    pass


class _Tensor(_Record):
    pass


class _Bytes(_Record):
    pass


class _Key(_Record):
    pass


class _Place(_Record):
    pass


_KINDS: dict[tuple[str, str], Any] = {
    (f"{_CHECKPOINT}.metadata", "Metadata"): _Index,
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"): _Tensor,
    (f"{_CHECKPOINT}.metadata", "BytesStorageMetadata"): _Bytes,
    (f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata"): _Chunk,
    (f"{_CHECKPOINT}.metadata", "MetadataIndex"): _Key,
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"): _Place,
    ("torch", "Size"): tuple,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _KINDS.get((module, name), _Record)

    def persistent_load(self, pid: object) -> Any:
        raise UnknownIndex("it refers to data outside")


def values_in(index: bytes) -> list[Value]:
    """Return the values of a sharded checkpoint, and where they lie.

    Args:
        index: the verified bytes of ``.metadata``.

    Raises:
        UnknownIndex: it has another form than torch 2.13 writes.
    """
    try:
        told = _Unpickler(io.BytesIO(index)).load()
        if not isinstance(told, _Index):
            raise UnknownIndex(f"it is a {type(told).__name__}")
        places = {(key.state["fqn"], key.state.get("offset")): place.state for key, place in told.state["storage_data"].items()}
        return [_value(name, about, places) for name, about in told.state["state_dict_metadata"].items()]
    except UnknownIndex:
        raise
    except Exception as error:  # a pickle can raise anything
        raise UnknownIndex(f"{type(error).__name__}: {error}") from error


def _value(name: str, about: _Record, places: dict[Any, dict[str, Any]]) -> Value:
    if isinstance(about, _Bytes):
        return Value(0, (_chunk(places[name, None], None),))
    if not isinstance(about, _Tensor):
        raise UnknownIndex(f"{name} is neither a tensor nor bytes")
    size = _sizes(about.state["size"])
    chunks = []
    for one in about.state["chunks"]:
        offsets, sizes = _sizes(one.state["offsets"]), _sizes(one.state["sizes"])
        has_whole_rows = bool(size) and sizes[1:] == size[1:] and not any(offsets[1:])
        rows = (offsets[0], offsets[0] + sizes[0]) if has_whole_rows else None
        chunks.append(_chunk(places[name, offsets], rows))
    return Value(size[0] if size else 0, tuple(chunks))


def _chunk(place: dict[str, Any], rows: tuple[int, int] | None) -> Chunk:
    file, first, size_bytes = place["relative_path"], place["offset"], place["length"]
    if not isinstance(file, str) or type(first) is not int or type(size_bytes) is not int or first < 0 or size_bytes < 0:
        raise UnknownIndex("a place is not a file and two numbers")
    return Chunk(file, first, size_bytes, rows)


def _sizes(told: object) -> tuple[int, ...]:
    if not isinstance(told, tuple) or any(type(one) is not int for one in told):
        raise UnknownIndex("a size is not a tuple of numbers")
    return told
