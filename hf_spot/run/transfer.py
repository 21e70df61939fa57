"""Move a checkpoint's files between a folder and the store, several at a time, and verify their digests."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from hf_spot.errors import CorruptCheckpoint, ObjectNotFound, SpotError
from hf_spot.run.dedup import Standing, Unchanged
from hf_spot.run.digest import FINE, Passing, combined, digest_of, name_for, part_digests
from hf_spot.run.manifest import FileEntry, check_names, difference, files_in
from hf_spot.run.parts import PartFiles, Parts, digests_key, get_digests, parts_path, run_all
from hf_spot.run.patience import WAITS_S, again_if_missing
from hf_spot.storage.store import ObjectStore, Progress
from hf_spot.storage.threads import Workers, result_of

LOST_BYTES = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
"""Error numbers by which `os.fsync` reports lost bytes. Others mean that the filesystem does not support it."""
_TRIES = 3
_DIGESTS_AT_ONCE = 16
_MANY = 100  # small files
_TIMES_AS_MANY = 4  # as workers, if most files are small
_SMALL_BYTES = 1 << 20  # up to this size one plain read is cheaper than a transfer, which first requests the size


class Meter:
    """Counts bytes, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.total = 0

    def __call__(self, count: int) -> None:
        """Add a number of bytes."""
        with self._lock:
            self.total += count


def upload(
    store: ObjectStore,
    folder: Path,
    prefix: str,
    *,
    unchanged: Unchanged | None = None,
    workers: int = 4,
    progress: Progress | None = None,
    sent: Progress = lambda count: None,
) -> list[FileEntry]:
    """Upload every file of ``folder`` under ``prefix`` and return the manifest that a commit needs.

    A file that the store already has is copied there. Other files are hashed as they are sent, or afterwards if the store's
    client does not show the bytes. Memory does not grow with the files: at most ``workers`` x 4 MB (blocks of each file that
    is copied), four times as much if most of many files are small, and for S3 1 MB for each connection, because parts are read
    from the file as they are sent.

    Args:
        store: where to.
        folder: the checkpoint.
        prefix: of its keys.
        unchanged: what the store already has.
        workers: how many files at the same time.
        progress: called with the number of bytes that have moved, from several threads.
        sent: called with the number of bytes that have left this machine, from several threads: what is copied has not.

    Raises:
        StoreError: from the store, for the first file that failed.
        SpotError: a file changed while it was read, so its digest and the uploaded bytes may differ.
    """
    known = unchanged or Unchanged()

    def put(name: str, path: Path, size_bytes: int) -> str:
        hash = name_for(name, size_bytes)

        def moved(count: int) -> None:
            sent(count)
            if progress is not None:
                progress(count)

        passing = Passing(size_bytes, moved, name=hash)
        store.put_file(f"{prefix}/{name}", path, passing)
        if hash != FINE:
            return passing.digest() or digest_of(path, hash)
        digests = passing.part_digests()
        return put_digests(name, part_digests(path) if digests is None else digests)

    def put_digests(name: str, digests: bytes) -> str:
        store.put(digests_key(prefix, name), digests)
        return combined(FINE, digests)

    def put_or_copy(name: str, path: Path, size_bytes: int, standing: Standing) -> str:
        hash = standing.digest.partition(":")[0]
        digests = part_digests(path) if hash == FINE else b""
        with contextlib.suppress(ObjectNotFound):  # it was pruned meanwhile
            if (combined(FINE, digests) if hash == FINE else digest_of(path, hash)) == standing.digest:
                store.copy(standing.key, f"{prefix}/{name}")
                if hash == FINE:
                    put_digests(name, digests)
                if progress is not None:
                    progress(size_bytes)
                return standing.digest
        return put(name, path, size_bytes)

    found = [(name, (folder / name).stat()) for name in files_in(folder)]
    with Workers(_at_once(workers, [before.st_size for _, before in found]), thread_name_prefix="hf_spot-upload") as pool:
        jobs: list[tuple[str, os.stat_result, Future[str]]] = []
        for name, before in found:
            path = folder / name
            standing = known.candidate(name, before.st_size)
            if standing and standing.key != f"{prefix}/{name}":  # the same key: an earlier attempt uploaded it and failed later
                jobs.append((name, before, pool.submit(put_or_copy, name, path, before.st_size, standing)))
            else:
                jobs.append((name, before, pool.submit(put, name, path, before.st_size)))
        try:
            entries = []
            for name, before, digest in jobs:
                entries.append(FileEntry(name, before.st_size, digest.result()))
                after = (folder / name).stat()
                if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                    raise SpotError(f"{folder / name} changed while it was uploaded; this checkpoint is not committed")
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return entries


def download(
    store: ObjectStore,
    prefix: str,
    files: Sequence[FileEntry],
    folder: Path,
    *,
    workers: int = 4,
    progress: Progress | None = None,
    waits_s: Sequence[float] = WAITS_S,
    have: Path | None = None,
    parts: Sequence[Parts] = (),
) -> None:
    """Download ``files``, and ``parts`` of others, into the new folder ``folder``. It appears complete and verified, or not at
    all.

    What ``have``, another folder, contains to the byte is linked from there instead. Files whose parts can't be verified are
    downloaded as a whole.

    Raises:
        CorruptCheckpoint: an object is missing, or differs from the manifest.
        SpotError: the disk is full, or can't be written.
        StoreError: from the store.
    """
    check_names(files)
    hidden = folder.parent / ".hf_spot"
    private: Path | None = None
    try:
        hidden.mkdir(parents=True, exist_ok=True)
        private = Path(tempfile.mkdtemp(prefix="restore-", dir=hidden))  # private, with a name that nobody can guess
        work = private / folder.name
        work.mkdir()
        _check_room(work, sum(entry.size for entry in files) + sum(one.size_bytes for one in parts))

        for within in {entry.path.rpartition("/")[0] for entry in (*files, *(one.file for one in parts))}:
            (work / within).mkdir(parents=True, exist_ok=True)

        def fetch(entry: FileEntry) -> None:
            path = work / entry.path
            if have is not None and difference(have, entry) is None and _linked(have / entry.path, path):
                return
            problem: str | None = None
            for _ in range(_TRIES):  # if it was only damaged on the way, another try succeeds
                passing = Passing(entry.size, progress, name=entry.digest.partition(":")[0])
                try:
                    again_if_missing(
                        partial(_get, store, f"{prefix}/{entry.path}", path, entry.size, passing),
                        waits_s=waits_s,
                        look=partial(progress or (lambda count: None), 0),
                    )
                except ObjectNotFound as error:
                    raise CorruptCheckpoint(f"{store.url}/{prefix}/{entry.path} is missing") from error
                if passing.digest() == entry.digest or (problem := difference(work, entry)) is None:
                    sync(path)
                    return
            raise CorruptCheckpoint(f"{store.url}/{prefix}: {problem}")

        without_digests = _download_parts(store, prefix, parts, work, progress, have)
        at_once = _at_once(workers, [entry.size for entry in (*files, *without_digests)])
        with Workers(at_once, thread_name_prefix="hf_spot-restore") as pool:
            jobs = [pool.submit(fetch, entry) for entry in (*files, *without_digests)]
            try:
                for job in jobs:
                    result_of(job)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        for directory, _, _ in os.walk(work):
            sync(Path(directory))
        os.rename(work, folder)
        sync(folder.parent)
    except OSError as error:
        raise SpotError(
            f"{folder} can't be written: {error.strerror or error}",
            hint=f"df -h {folder.parent}; findmnt -T {folder.parent}; or set output_dir to another disk",
        ) from error
    finally:
        if private is not None:
            shutil.rmtree(private, ignore_errors=True)


def _at_once(workers: int, sizes_bytes: Sequence[int]) -> int:
    """Return how many files to move at the same time: more if most are small, because they wait for answers and disks."""
    small = sum(size_bytes <= _SMALL_BYTES for size_bytes in sizes_bytes)
    many_are_small = small > _MANY and 2 * small > len(sizes_bytes)
    return _TIMES_AS_MANY * workers if workers > 1 and many_are_small else workers


def _download_parts(
    store: ObjectStore, prefix: str, parts: Sequence[Parts], work: Path, progress: Progress | None, have: Path | None
) -> list[FileEntry]:
    """Download parts of files into ``work``, and return the files whose parts can't be verified."""
    target, before = PartFiles(work), None if have is None else PartFiles(have)
    with Workers(_DIGESTS_AT_ONCE, thread_name_prefix="hf_spot-restore") as pool:
        found = list(pool.map(partial(get_digests, store, prefix), [one.file for one in parts]))
    fetched = [(one, digests) for one, digests in zip(parts, found, strict=True) if digests is not None]
    made: list[Path] = []
    requests: list[Callable[[], None]] = []
    for one, digests in fetched:
        name = parts_path(one.file.path)
        if before is not None and have is not None and before.difference(one) is None:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            if _linked(have / name, work / name):
                made += target.prepare(one, digests)
                continue
        made += target.prepare(one, digests)
        requests += target.fetches(store, prefix, one, digests, progress)
    run_all(requests)
    if fetched:
        made.append(target.write_index([one for one, _ in fetched]))
    for path in made:
        sync(path)
    return [one.file for one, digests in zip(parts, found, strict=True) if digests is None]


def _linked(source: Path, path: Path) -> bool:
    try:
        os.link(source, path)
    except OSError:  # the filesystem has no hard links
        return False
    return True


def _get(store: ObjectStore, key: str, path: Path, size_bytes: int, passing: Passing) -> None:
    if size_bytes > _SMALL_BYTES:
        store.get_file(key, path, passing)
        return
    data = store.get(key)
    path.write_bytes(data)
    passing.see(0, memoryview(data))
    passing(size_bytes)


def pin(folder: Path, into: Path, without: Collection[str] = ()) -> None:
    """Link the files of ``folder`` into ``into``, all but those named in ``without``, so that Trainer's rotation can't delete
    them. Hard links take milliseconds and no space. If the filesystem does not support them, the files are copied."""
    try:
        for name in files_in(folder):
            if name in without:
                continue
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(folder / name, target)
            except OSError:
                shutil.copyfile(folder / name, target)  # only the bytes: some filesystems support neither modes nor times
    except BaseException:
        shutil.rmtree(into, ignore_errors=True)  # the copies may be what fills the disk
        raise


def copy_files(folder: Path, into: Path) -> None:
    """Copy the files of ``folder``, and only their bytes: mounted buckets and Windows shares refuse modes and times."""
    for name in files_in(folder):
        target = into / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target)


def delete(store: ObjectStore, prefixes: Iterable[str]) -> None:
    """Delete every object under each of ``prefixes`` (folders)."""
    for prefix in prefixes:
        store.delete(info.key for info in store.list(f"{prefix}/"))


def _check_room(folder: Path, size_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < size_bytes:
        raise SpotError(
            f"{folder.parents[2]} has {free_bytes / 1e9:.1f} GB free, but the checkpoint needs {size_bytes / 1e9:.1f} GB",
            hint="free some space, or set output_dir to a larger disk",
        )


def sync(path: Path) -> None:
    """Let a file or a folder outlive a power cut, where the filesystem supports it. Raises OSError if bytes were lost."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in LOST_BYTES:
            raise
    finally:
        os.close(handle)
