"""Fetch parts of files: of a sharded checkpoint a machine needs only what its ranks read.

The parts of a file lie at their offsets in a sparse file beside the place of the whole one, under another name: code that does
not know of parts finds no file, instead of zeros. An index tells which parts are there. Each part is verified before it is
written, by the list of the digests of all parts, which the file's digest in the journal binds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from blake3 import blake3

from hf_spot.errors import CorruptCheckpoint, ObjectNotFound
from hf_spot.policy.shard_reads import Stretch, length, merged, parts_of, without
from hf_spot.run.digest import FINE, FINE_PART_BYTES, PART_DIGEST_BYTES, combined
from hf_spot.run.manifest import PARTS_PREFIX, FileEntry
from hf_spot.run.patience import WAITS_S, again_if_missing
from hf_spot.storage.store import ObjectStore, Progress, ranges_of
from hf_spot.storage.threads import Workers, result_of

_INDEX = f"{PARTS_PREFIX}.json"
_DIGESTS = ".digests"  # folder in the store, beside the files of a checkpoint
_PARTS_AT_ONCE = 64  # 4 MiB: what one request reads
_REQUESTS_AT_ONCE = 16
_TRIES = 3


@dataclass(frozen=True)
class Parts:
    """Parts of one file.

    Args:
        file: the file, which has the digest ``blake3-64k``.
        numbers: of the parts, in ascending order.
    """

    file: FileEntry
    numbers: tuple[Stretch, ...]

    @property
    def size_bytes(self) -> int:
        """Return how many bytes the parts have together."""
        past_end = max(0, self.numbers[-1][1] * FINE_PART_BYTES - self.file.size) if self.numbers else 0
        return length(self.numbers) * FINE_PART_BYTES - past_end


def can_be_parted(file: FileEntry) -> bool:
    """Return whether parts of a file can be verified."""
    return file.digest.startswith(f"{FINE}:")


def digests_key(prefix: str, path: str) -> str:
    """Return the key of the digests of a file's parts.

    Args:
        prefix: of the checkpoint.
        path: of the file in it.
    """
    return f"{prefix}/{_DIGESTS}/{path}"


def parts_path(path: str) -> str:
    """Return the name of the sparse file that has the parts of the file ``path``."""
    place = PurePosixPath(path)
    return str(place.with_name(f"{PARTS_PREFIX}-of-{place.name}"))


def _digests_path(path: str) -> str:
    place = PurePosixPath(path)
    return str(place.with_name(f"{PARTS_PREFIX}-digests-of-{place.name}"))


def parts_in(folder: Path) -> list[str]:
    """Return the names of the files of which a folder has only parts: what the ranks of one machine read."""
    return sorted(path for path in PartFiles(folder).index() if not (folder / path).exists())


def get_digests(store: ObjectStore, prefix: str, file: FileEntry) -> bytes | None:
    """Return the verified digests of a file's parts; None if the store lacks them, or has others."""
    try:
        found = again_if_missing(partial(store.get, digests_key(prefix, file.path)), waits_s=WAITS_S[:1])
    except ObjectNotFound:
        return None
    return found if _are_digests_of(file, found) else None


def _are_digests_of(file: FileEntry, digests: bytes) -> bool:
    count = -(-file.size // FINE_PART_BYTES)
    return len(digests) == count * PART_DIGEST_BYTES and combined(FINE, digests) == file.digest


class PartFiles:
    """The parts of files in a checkpoint's folder on this machine.

    Args:
        folder: of the checkpoint, or where it is made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def index(self) -> Mapping[str, list[Stretch]]:
        """Return the numbers of the parts that are there, by file; empty if there is no index, or it can't be read."""
        try:
            told = json.loads((self._folder / _INDEX).read_bytes())
            return {path: [(int(first), int(end)) for first, end in numbers] for path, numbers in told.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def write_index(self, parts: Iterable[Parts]) -> Path:
        """Record which parts are there, and return the file."""
        path = self._folder / _INDEX
        path.write_text(json.dumps({one.file.path: one.numbers for one in parts}))
        return path

    def difference(self, parts: Parts) -> str | None:
        """Return how what is there differs from some parts of a file; None if they are the same to the byte."""
        path = parts.file.path
        if without(parts.numbers, self.index().get(path, [])):
            return f"parts of {path} are missing"
        digests = self._digests(parts.file)
        if digests is None:
            return f"the digests of the parts of {path} are missing"
        try:
            with (self._folder / parts_path(path)).open("rb", buffering=0) as file:
                for first, end in parts.numbers:
                    for number in range(first, end):
                        data = os.pread(file.fileno(), FINE_PART_BYTES, number * FINE_PART_BYTES)
                        if not _is_part(data, number, digests):
                            return f"part {number} of {path} has other contents (its digest differs)"
        except OSError as error:
            return f"parts of {path} can't be read: {error.strerror}"
        return None

    def _digests(self, file: FileEntry) -> bytes | None:
        try:
            found = (self._folder / _digests_path(file.path)).read_bytes()
        except OSError:
            return None
        return found if _are_digests_of(file, found) else None

    def prepare(self, parts: Parts, digests: bytes) -> list[Path]:
        """Make the sparse file for some parts, and return all files that this writes."""
        made = [self._folder / name(parts.file.path) for name in (parts_path, _digests_path)]
        made[0].parent.mkdir(parents=True, exist_ok=True)
        with made[0].open("ab") as file:
            os.truncate(file.fileno(), parts.file.size)
        made[1].write_bytes(digests)
        return made

    def fetches(
        self,
        store: ObjectStore,
        prefix: str,
        parts: Parts,
        digests: bytes,
        progress: Progress | None = None,
    ) -> Iterator[Callable[[], None]]:
        """Yield the requests for some parts, to be called from any thread. `prepare` comes before them.

        They raise CorruptCheckpoint if the object is missing or differs from what was committed, and StoreError.
        """
        for first, end in parts.numbers:
            for begin in range(first, end, _PARTS_AT_ONCE):
                numbers = range(begin, min(begin + _PARTS_AT_ONCE, end))
                yield partial(self._fetch, store, prefix, parts.file, numbers, digests, progress)

    def _fetch(
        self, store: ObjectStore, prefix: str, file: FileEntry, numbers: range, digests: bytes, progress: Progress | None
    ) -> None:
        get_range, key = ranges_of(store), f"{prefix}/{file.path}"
        assert get_range is not None, "who can't read ranges does not ask for parts"
        at = numbers.start * FINE_PART_BYTES
        count = min(numbers.stop * FINE_PART_BYTES, file.size) - at
        read, look = partial(get_range, key, at, count), partial(progress or (lambda moved: None), 0)
        for _ in range(_TRIES):  # if it was only damaged on the way, another try succeeds
            try:
                view = memoryview(again_if_missing(read, look=look))
            except ObjectNotFound as error:
                raise CorruptCheckpoint(f"{store.url}/{key} is missing") from error
            firsts = range(0, count, FINE_PART_BYTES)
            if len(view) == count and all(
                _is_part(view[first : first + FINE_PART_BYTES], number, digests)
                for first, number in zip(firsts, numbers, strict=True)
            ):
                break
        else:
            raise CorruptCheckpoint(f"{store.url}/{key} has other contents at bytes {at} to {at + count} (a digest differs)")
        with (self._folder / parts_path(file.path)).open("r+b", buffering=0) as target:
            done = 0
            while done < count:
                done += os.pwrite(target.fileno(), view[done:], at + done)
        if progress is not None:
            progress(count)

    def complete(self, store: ObjectStore, prefix: str, file: FileEntry, ranges: Iterable[Stretch]) -> int:
        """Fetch what is missing of some ranges of bytes, and return how many bytes that was.

        Several processes may do so at the same time: all of them write the same verified bytes.

        Raises:
            CorruptCheckpoint: the file can't be read in parts, is missing, or differs from what was committed.
            StoreError: from the store.
        """
        have = self.index().get(file.path, [])
        numbers = without(parts_of(ranges, FINE_PART_BYTES), have)
        if not numbers:
            return 0
        parts = Parts(file, tuple(numbers))
        digests = self._digests(file)
        if digests is None:
            digests = get_digests(store, prefix, file) if can_be_parted(file) and ranges_of(store) is not None else None
            if digests is None:
                raise CorruptCheckpoint(
                    f"{store.url}/{prefix}/{file.path} was not fetched as a whole, and its parts can't be verified",
                    hint="start again: what is on this disk will not be used",
                )
            self.prepare(parts, digests)
        run_all(self.fetches(store, prefix, parts, digests))
        return parts.size_bytes


def run_all(requests: Iterable[Callable[[], None]]) -> None:
    """Send requests, several at a time. Raise the error of the first that failed, when none is under way any more."""
    with Workers(_REQUESTS_AT_ONCE, "hf_spot-parts") as pool:
        jobs = [pool.submit(request) for request in requests]
        try:
            for job in jobs:
                result_of(job)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _is_part(data: bytes | memoryview, number: int, digests: bytes) -> bool:
    at = number * PART_DIGEST_BYTES
    digest: bytes = blake3(data).digest()
    return digest == digests[at : at + PART_DIGEST_BYTES]


def all_parts(file: FileEntry, ranges: Iterable[Stretch]) -> Parts:
    """Return the parts of a file that contain some ranges of bytes, and single ones between two of them."""
    return Parts(file, tuple(merged(parts_of(ranges, FINE_PART_BYTES, gap=1))))
