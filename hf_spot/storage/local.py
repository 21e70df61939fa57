"""LocalStore: a run in a directory, on this machine's disk or on a network filesystem that several machines mount."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path

from hf_spot.errors import AccessDenied, BucketNotFound, ObjectNotFound, StoreError, StoreUnavailable
from hf_spot.storage.keys import TEMPORARY_FOLDER, check_key, check_prefix
from hf_spot.storage.per_process import renamed_when_whole
from hf_spot.storage.store import ObjectInfo, Progress, witness_of

_CHUNK_BYTES = 4 << 20
_STALE_S = 86400.0  # a half-written file that has not changed for a day was left by a machine that died
_FULL = (errno.ENOSPC, errno.EDQUOT)
_GONE = (errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EAGAIN)
_DELETED_ON_NFS = re.compile(r"\.nfs[0-9a-f]{24}")  # deleted but still open on a machine, which removes it when it closes it
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


class LocalStore:
    """An `ObjectStore` in a directory. Objects are ordinary files; half-written ones stay in a hidden folder.

    The first write creates the directory itself, but not its parent: an unmounted ``/mnt/efs`` must not look like an empty run.

    Errors of the store raise subclasses of StoreError. Errors of the caller's own file in `put_file` and `get_file` are raised
    as the OSError that they are.

    Args:
        path: the directory, absolute or relative to the current working directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._root = Path(os.path.abspath(path))
        self._swept = False

    @property
    def url(self) -> str:
        """Return the directory's absolute path."""
        return str(self._root)

    def get(self, key: str) -> bytes:
        """Return the file's bytes."""
        check_key(key)
        for last in (False, False, True):
            try:  # a report reads every entry of a journal, and creating a Path for each would take as long as reading it
                with open(f"{self._root}{os.sep}{key}", "rb", buffering=0) as file:
                    return file.readall()
            except OSError as error:
                if last or error.errno != errno.ESTALE:  # NFS: replaced while it was read; the new file can be read
                    raise self._explain("read", self._root / key, error) from error
        raise AssertionError("the last try returns or raises")

    def get_range(self, key: str, first: int, count: int) -> bytes:
        """Return a part of the file's bytes."""
        path = self._path(key)
        with self._explained("read", path), FileIO(path) as file:
            file.seek(first)
            found = bytearray()
            while len(found) < count and (block := file.read(count - len(found))):
                found += block
            return bytes(found)

    def put(self, key: str, data: bytes) -> None:
        """Write a temporary file, sync it and rename it."""
        path = self._path(key)
        with self._half_written("write", path) as (file, temporary), self._explained("write", path):
            _write(file, data)
            os.fsync(file.fileno())
            self._into_place(lambda: os.replace(temporary, path), path)

    def create(self, key: str, data: bytes) -> bool:
        """Link a synced file to its name, which the filesystem allows only once."""
        path = self._path(key)
        with self._half_written("create", path) as (file, temporary), self._explained("create", path):
            _write(file, data)
            os.fsync(file.fileno())
            try:
                self._into_place(lambda: os.link(temporary, path), path)
                return True
            except FileExistsError:
                # An NFS client that repeats a request whose answer was lost finds its own link.
                return _links(temporary) == 2
            except OSError as error:
                if error.errno not in _NO_LINKS or path.parent.stat().st_dev != temporary.stat().st_dev:
                    raise
                raise StoreError(
                    f"{self._root} is on a filesystem without hard links, so two machines can't be kept apart there",
                    hint="a directory on ext4, xfs, NFS or EFS; for a mounted bucket its own URL: s3://bucket/prefix",
                ) from error

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Copy the file, sync the copy and rename it."""
        final = self._path(key)
        with open(path, "rb") as source, self._half_written("write", final) as (file, temporary):

            def write(chunk: bytes) -> None:
                with self._explained("write", final):
                    _write(file, chunk)

            _copy(source.read, write, progress)
            with self._explained("write", final):
                os.fsync(file.fileno())
                self._into_place(lambda: os.replace(temporary, final), final)

    def get_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Copy to a hidden file beside ``path``, sync it and rename it."""
        origin, path = self._path(key), Path(path)
        with self._explained("read", origin):
            source = FileIO(origin)

        def read(count: int) -> bytes:
            with self._explained("read", origin):
                return source.read(count)

        with source, renamed_when_whole(path) as file:
            _copy(read, lambda chunk: _write(file, chunk), progress)
            os.fsync(file.fileno())
        _sync_folder(path.parent)

    def copy(self, source: str, key: str) -> None:
        """Give the same file a second name, which takes no space: objects are replaced and deleted, but never modified. If the
        filesystem has no hard links, copy the file."""
        origin, final = self._path(source), self._path(key)
        with self._explained("read", origin):
            os.stat(origin)
        try:
            with self._half_written("write", final) as (_, temporary), self._explained("write", final):
                temporary.unlink()
                os.link(origin, temporary)
                self._into_place(lambda: os.replace(temporary, final), final)
        except StoreError as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in (*_NO_LINKS, errno.EMLINK):
                raise
            self.put_file(key, origin)

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects. Only folders that can contain matching keys are read, one folder in memory at a time."""
        # All matching keys are under the last complete folder of the prefix.
        folder = check_prefix(prefix).rpartition("/")[0]
        with self._explained("list", self._root):
            # In this order, because another process may be creating the directory at this moment.
            if (self._root.exists() and not self._root.is_dir()) or not self._root.parent.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self._root))
        yield from self._walk(f"{folder}/" if folder else "", prefix, start_after)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete files, and the folders that this leaves empty."""
        for key in keys:
            path = self._path(key)
            missing = contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError)
            with self._explained("delete", path), missing:
                path.unlink()
            self._prune(path.parent)

    def abort(self, stale: Callable[[str], bool]) -> int:
        """Delete half-written files, and return their number."""
        count = 0
        with self._explained("list", self._root / TEMPORARY_FOLDER), contextlib.suppress(FileNotFoundError):
            for leftover in (self._root / TEMPORARY_FOLDER).iterdir():
                if stale(f"{leftover.name.rpartition('.')[0]}/"):
                    leftover.unlink(missing_ok=True)
                    count += 1
        return count

    # -- reading ------------------------------------------------------------------------------------------------------

    def _walk(self, folder: str, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        """Yield the objects under ``folder`` (empty, or ending with a slash) in S3's order: by the full key, with '/' as a
        character like any other. Sorting each directory's entries with their slash gives exactly this order."""
        with self._explained("list", self._root / folder):
            try:
                with os.scandir(self._root / folder) as found:
                    entries = [(self._name(folder, entry), entry) for entry in found]
            except (FileNotFoundError, NotADirectoryError):
                return
        for name, entry in sorted(entries, key=lambda pair: pair[0]):
            if name == f"{TEMPORARY_FOLDER}/" or _DELETED_ON_NFS.fullmatch(entry.name):
                continue
            if name.endswith("/"):
                passed = name < start_after and not start_after.startswith(name)
                if not passed and (name.startswith(prefix) or prefix.startswith(name)):
                    yield from self._walk(name, prefix, start_after)
            elif name.startswith(prefix) and name > start_after:
                with self._explained("list", self._root / name):
                    try:
                        info = ObjectInfo(name, entry.stat().st_size) if entry.is_file() else None
                    except OSError as error:
                        if error.errno not in (errno.ENOENT, errno.ESTALE):
                            raise
                        info = None  # deleted meanwhile
                if info is not None:
                    yield info

    @staticmethod
    def _name(folder: str, entry: os.DirEntry[str]) -> str:
        # A link to a directory is neither an object nor followed: it could lead outside, or be circular.
        return f"{folder}{entry.name}/" if entry.is_dir(follow_symlinks=False) else f"{folder}{entry.name}"

    # -- writing ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _half_written(self, doing: str, path: Path) -> Iterator[tuple[FileIO, Path]]:
        """Create a temporary file on the store's own filesystem. Delete it at the end of the block unless it was renamed."""
        folder = self._root / TEMPORARY_FOLDER
        # It names the first folder of the key, so that `abort` can tell whose it was.
        temporary = folder / f"{path.relative_to(self._root).parts[0]}.{os.getpid()}-{uuid.uuid4().hex}"
        with self._explained(doing, path):
            with contextlib.suppress(FileExistsError):
                self._root.mkdir()
                _sync_folder(self._root.parent)
            folder.mkdir(exist_ok=True)
            file = FileIO(temporary, "x")
        try:
            with file:
                self._sweep(folder, temporary)
                yield file, temporary
        finally:
            with contextlib.suppress(OSError):  # renamed, or left to the next sweep
                temporary.unlink()

    def _sweep(self, folder: Path, fresh: Path) -> None:
        """Delete what dead machines left, once per store. Ages are measured by the fileserver's clock, read from a new file."""
        if self._swept:
            return
        self._swept = True
        now_s = fresh.stat().st_mtime
        for leftover in folder.iterdir():
            with contextlib.suppress(OSError):  # another machine sweeps too
                if leftover.stat().st_mtime < now_s - _STALE_S:
                    leftover.unlink()

    def _into_place(self, move: Callable[[], None], path: Path) -> None:
        """Create the folders above ``path``, then call ``move``. Try again if a `delete` elsewhere removes them in between."""
        for attempt in range(20):
            self._make_folder(path.parent)
            try:
                move()
                break
            except OSError as error:
                if attempt == 19 or error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
        _sync_folder(path.parent)

    def _make_folder(self, folder: Path) -> None:
        if folder.is_dir():
            return
        with contextlib.suppress(FileNotFoundError):  # its parent has just been removed: `_into_place` tries again
            if folder != self._root:
                self._make_folder(folder.parent)
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
            _sync_folder(folder.parent)

    def _prune(self, folder: Path) -> None:
        """Remove the folders that a deletion has left empty, up to the root, which stays."""
        while folder != self._root:
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass  # another delete was faster; the parent may still be empty
            except OSError:
                return  # not empty, or a file was added at this moment
            folder = folder.parent

    # -- keys and errors ----------------------------------------------------------------------------------------------

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    @contextlib.contextmanager
    def _explained(self, doing: str, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._explain(doing, path, error) from error

    def _explain(self, doing: str, path: Path, error: OSError) -> StoreError:
        what = f"can't {doing} {path}: {error.strerror or error}"
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            if not self._root.parent.is_dir():
                return BucketNotFound(
                    f"can't {doing} {path}: the folder {self._root.parent} does not exist",
                    hint=f"mount it, or: mkdir -p {self._root.parent}",
                )
            if self._root.exists() and not self._root.is_dir():
                return BucketNotFound(f"{self._root} is a file, not a directory", hint="another --store")
            if doing == "read":
                return ObjectNotFound(f"{path} does not exist")
            return StoreError(what, hint="a key can't be a file and a folder at once; give the run a folder of its own")
        if error.errno in (errno.EACCES, errno.EPERM):
            return AccessDenied(what, hint=f"ls -ld {self._root}; this process runs as user id {os.geteuid()}")
        if error.errno == errno.EROFS:
            return AccessDenied(what, hint=f"the filesystem is mounted read-only: findmnt -T {self._root}")
        if error.errno in _FULL:
            return StoreUnavailable(what, hint=f"{_free(self._root)}free some, or lower save_total_limit")
        if error.errno in _GONE:
            return StoreUnavailable(what, hint=f"the fileserver does not answer as it should: findmnt -T {self._root}")
        return StoreError(what)


def _links(path: Path) -> int:
    """Return the number of a file's names. The file is opened, because otherwise NFS answers from its cache (close-to-open)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.fstat(handle).st_nlink
    finally:
        os.close(handle)


def _free(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path).free / 1e9:.1f} GB are free on {path}: "
    except OSError:
        return ""


def _copy(read: Callable[[int], bytes], write: Callable[[bytes], None], progress: Progress | None) -> None:
    see, at = witness_of(progress), 0
    while chunk := read(_CHUNK_BYTES):
        write(chunk)
        see(at, memoryview(chunk))
        at += len(chunk)
        if progress is not None:
            progress(len(chunk))


def _write(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # an unbuffered write may take a part only
        rest = rest[file.write(rest) :]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network filesystems sync folders by themselves
            raise
    finally:
        os.close(handle)
