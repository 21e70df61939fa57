"""The place where Xet keeps bytes, for the real hf_xet: xorbs (chunks, packed together) and shards (which chunks make a file).

https://huggingface.co/docs/xet: /v1/xorbs, /v1/shards, /v1/chunks and /v1/reconstructions, and the two formats.
"""

from __future__ import annotations

import json
import re
import struct
import threading
from dataclasses import dataclass

from tests.storage.fake_http import Answer, Asked

_RECORD_BYTES = 48  # of a shard: header, and each record
_VERIFIED, _HAS_SHA256 = 1 << 31, 1 << 30
_CHUNK_HEADER_BYTES = 8


@dataclass(frozen=True)
class Term:
    """Chunks ``first`` to ``end`` of a xorb, which are so many bytes of a file."""

    xorb: str
    size: int
    first: int
    end: int


@dataclass(frozen=True)
class Kept:
    """A file, by what shards say of it."""

    terms: tuple[Term, ...]
    sha256: str | None

    @property
    def size(self) -> int:
        return sum(term.size for term in self.terms)


class FakeXet:
    """Answers under ``/cas`` of a fake server at ``endpoint``."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = f"{endpoint}/cas"
        self.files: dict[str, Kept] = {"0" * 64: Kept((), None)}  # the empty file has this hash
        self.received_bytes = 0
        self._xorbs: dict[str, bytes] = {}
        self._ends: dict[str, list[int]] = {}  # of each xorb: where its chunks end
        self._lock = threading.Lock()

    def by_sha256(self, sha256: str) -> tuple[str, Kept] | None:
        return next(((hash, kept) for hash, kept in self.files.items() if kept.sha256 == sha256), None)

    def decide(self, asked: Asked) -> Answer:
        parts = asked.path.removeprefix("/cas").strip("/").split("/")
        with self._lock:
            if asked.method == "POST" and parts[1] == "xorbs":
                new = parts[3] not in self._xorbs
                self._xorbs[parts[3]], self._ends[parts[3]] = asked.body, _ends_of_chunks(asked.body)
                self.received_bytes += len(asked.body)
                return _json({"was_inserted": new})
            if asked.method == "POST" and parts == ["v1", "shards"]:
                self.files.update(_files_in(asked.body))
                return _json({"result": 1})
            if parts[:2] == ["v1", "reconstructions"]:
                return self._reconstruction(self.files.get(parts[2]), asked)
            if parts[0] == "xorb":
                return _range(self._xorbs[parts[1]], asked)
        return Answer(404)  # a chunk that nobody has sent before

    def _reconstruction(self, file: Kept | None, asked: Asked) -> Answer:
        if file is None:
            return Answer(404)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", asked.headers.get("range", ""))
        first, last = (int(wanted[1]), int(wanted[2])) if wanted else (0, file.size)
        if first >= file.size:
            return Answer(416)
        terms, skipped, at = [], 0, 0
        for term in file.terms:
            if at + term.size > first and at <= last:
                skipped = first - at if not terms else skipped
                terms.append(term)
            at += term.size
        places: dict[str, list[dict[str, object]]] = {}
        for term in terms:
            begin = self._ends[term.xorb][term.first - 1] if term.first else 0
            place = {
                "range": {"start": term.first, "end": term.end},
                "url": f"{self.endpoint}/xorb/{term.xorb}",
                "url_range": {"start": begin, "end": self._ends[term.xorb][term.end - 1] - 1},
            }
            if place not in places.setdefault(term.xorb, []):
                places[term.xorb].append(place)
        told = [
            {"hash": term.xorb, "unpacked_length": term.size, "range": {"start": term.first, "end": term.end}} for term in terms
        ]
        return _json({"offset_into_first_range": skipped, "terms": told, "fetch_info": places})


def _ends_of_chunks(xorb: bytes) -> list[int]:
    """Each chunk: a version (0), 3 bytes of length as sent, how it is compressed, 3 bytes of its own length; a footer."""
    ends, at = [], 0
    while at + _CHUNK_HEADER_BYTES <= len(xorb) and xorb[at : at + 7] != b"XETBLOB":
        at += _CHUNK_HEADER_BYTES + int.from_bytes(xorb[at + 1 : at + 4], "little")
        ends.append(at)
    return ends


def _files_in(shard: bytes) -> dict[str, Kept]:
    found, at = {}, _RECORD_BYTES
    while (hash := shard[at : at + 32]) != b"\xff" * 32:
        flags, count = struct.unpack_from("<II", shard, at + 32)
        at += _RECORD_BYTES
        terms = []
        for number in range(count):
            place = at + number * _RECORD_BYTES
            size, first, end = struct.unpack_from("<III", shard, place + 36)
            terms.append(Term(_hex(shard[place : place + 32]), size, first, end))
        at += _RECORD_BYTES * count * (2 if flags & _VERIFIED else 1)
        sha256 = None
        if flags & _HAS_SHA256:
            sha256, at = _hex(shard[at : at + 32]), at + _RECORD_BYTES
        found[_hex(hash)] = Kept(tuple(terms), sha256)
    return found


def _hex(hash: bytes) -> str:
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", hash))


def _range(data: bytes, asked: Asked) -> Answer:
    first, last = (int(number) for number in asked.headers["range"].removeprefix("bytes=").split("-"))
    part = data[first : last + 1]
    return Answer(206, part, {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"})


def _json(value: object) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})
