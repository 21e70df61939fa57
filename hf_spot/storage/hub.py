"""HubRepoStore and HubBucketStore: a run on the Hugging Face Hub, in a repository or in a bucket.

A repository is Git: every write is a commit. To keep two writers apart, a commit names its parent; it is then refused if
another commit came first. The Hub limits commits per hour, so simultaneous writes of several threads go into one commit.

A bucket accepts any number of writes, but none of them can be conditional: it can't keep two machines apart, and declares that.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hf_spot.errors import AccessDenied, BucketNotFound, ConfigError, ObjectNotFound, SpotError, StoreError, StoreUnavailable
from hf_spot.storage.hub_connection import Hub, HubFile
from hf_spot.storage.keys import check_key, check_prefix
from hf_spot.storage.parts import BLOCK_BYTES, Job, write_at
from hf_spot.storage.per_process import renamed_when_whole
from hf_spot.storage.store import ObjectInfo, ObjectStore, Progress, witness_of
from hf_spot.storage.threads import Workers

_URL = re.compile(
    r"hf://(?:(?P<kind>models|datasets|buckets)/)?(?!(?:models|datasets|buckets|spaces)/)(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<prefix>.*))?"
)
_EXAMPLES = "hf://buckets/owner/name/run, or hf://owner/name/run for a model repository"
_SAMPLE_BYTES = 512  # of a file, by which the Hub decides how to store it
_BATCH = 1000  # files in one request
_CREATES_S = 60.0  # for retries of `create` while others commit


def open_hub(url: str) -> ObjectStore:
    """Return the store at ``hf://buckets/owner/name/prefix``, ``hf://owner/name/prefix`` or ``hf://datasets/owner/name/prefix``.

    A repository's name may be followed by ``@branch``.

    Raises:
        ConfigError: ``url`` is none of these.
    """
    found = _URL.fullmatch(url)
    if not found:
        raise ConfigError(f"{url!r} is not the URL of a repository or bucket on the Hub", hint=_EXAMPLES)
    kind = (found["kind"] or "models")[:-1]
    if kind == "bucket" and found["revision"]:
        raise ConfigError(f"{url!r}: buckets have no revisions", hint=_EXAMPLES)
    prefix = (found["prefix"] or "").strip("/")
    hub = Hub(kind, found["id"], found["revision"] or "main")
    return (HubBucketStore if kind == "bucket" else HubRepoStore)(hub, check_key(prefix) if prefix else "")


def open_model(url: str) -> HubRepoStore:
    """Return the model repository ``hf://owner/name``, which need not exist yet.

    Raises:
        ConfigError: ``url`` is something else.
    """
    store = open_hub(url)
    if not isinstance(store, HubRepoStore) or store.hub.kind != "model" or store.url != f"hf://{store.hub.shown}":
        raise ConfigError(f"{url!r} is not the URL of a model repository", hint="hf://owner/name")
    return store


class _HubStore:
    """The part that repositories and buckets share: reading."""

    def __init__(self, hub: Hub, prefix: str) -> None:
        self.hub = hub
        self._base = f"{prefix}/" if prefix else ""

    @property
    def url(self) -> str:
        """Return the URL, without a trailing slash."""
        return f"hf://{self.hub.shown}/{self._base}".rstrip("/")

    def get(self, key: str) -> bytes:
        """Return the file's bytes, by one GET."""
        body: bytes = self.hub.ask("GET", self.hub.resolve(self._path(key)), doing="read", key=self._path(key)).content
        return body

    def get_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Download by Xet into a file beside ``path`` that is renamed when complete; small files of a repository by a GET."""
        file = self._about(key)
        with renamed_when_whole(path) as target, contextlib.ExitStack() as stack:
            at, see = 0, witness_of(progress)
            if file.size == 0:
                blocks: Iterator[bytes] = iter(())
            elif file.xet_hash is None:
                blocks = iter((self.get(key),))
            else:
                blocks = stack.enter_context(contextlib.closing(self.hub.fetch(file, file.path)))
            for block in blocks:
                write_at(target.fileno(), memoryview(block), at)
                see(at, memoryview(block))
                at += len(block)
                if progress is not None:
                    progress(len(block))

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects. The Hub lists the tree below the last full folder of ``prefix`` in pages; it is sorted here."""
        check_prefix(prefix)
        folder = (self._base + prefix).rpartition("/")[0]
        url = f"{self.hub.api}/tree{self.hub.at_revision}" + (f"/{quote(folder, safe=self._slashes)}" if folder else "")
        found = []
        for page in self.hub.pages(url, params={"recursive": True}, doing="list", key=folder):
            for told in page:
                key = told["path"][len(self._base) :]
                if told["type"] == "file" and told["path"].startswith(self._base + prefix) and key > start_after:
                    found.append(ObjectInfo(key, told["size"]))
        yield from sorted(found, key=lambda info: info.key)

    def abort(self, stale: Callable[[str], bool]) -> int:
        """Return 0: the Hub itself removes uploaded bytes that never became a file."""
        return 0

    _slashes = ""  # a folder is one segment in the URL of a bucket's listing, but several in that of a repository

    def _path(self, key: str) -> str:
        return self._base + check_key(key)

    def _about(self, key: str) -> HubFile:
        path = self._path(key)
        file = self.hub.about([path], doing="read").get(path)
        if file is None:
            raise ObjectNotFound(f"hf://{self.hub.shown}/{path} does not exist")
        return file

    def _there(self, keys: Iterable[str], doing: str) -> Iterator[tuple[str, ...]]:
        """Yield the paths of the ``keys`` that exist, in batches: deleting others is an error on the Hub."""
        paths = (self._path(key) for key in keys)
        while batch := [*islice(paths, _BATCH)]:
            if there := tuple(self.hub.about(batch, doing=doing)):
                yield there


class HubBucketStore(_HubStore):
    """An `ObjectStore` in a bucket of the Hub (https://huggingface.co/docs/hub/storage-buckets).

    Args:
        hub: the bucket.
        prefix: without slashes at its ends.
    """

    # The API that adds files accepts no condition, and its documentation says that it is not a transaction.
    fences = False

    def put(self, key: str, data: bytes) -> None:
        """Upload the bytes by Xet, then add the file by one request."""
        self._send(key, iter([memoryview(data)] if data else []))

    def create(self, key: str, data: bytes) -> bool:
        """Look, then write. Two machines that do so at the same moment may both get True, hence ``fences = False``. A machine
        that comes later gets False."""
        path = self._path(key)
        if self.hub.about([path], doing="write"):
            return False
        self.put(key, data)
        return True

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Upload the bytes by Xet, which sends only those that the Hub does not have, then add the file by one request."""
        with path.open("rb", buffering=0) as file:
            self._send(key, _blocks(file, progress))

    def copy(self, source: str, key: str) -> None:
        """Add a file with the same bytes."""
        self._batch(self._added(self._path(key), self._about(source)), key=key)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete the files, 1000 in one request."""
        for paths in self._there(keys, "delete"):
            self._batch(*({"type": "deleteFile", "path": path} for path in paths), key=paths[0])

    def _send(self, key: str, blocks: Iterator[memoryview]) -> None:
        path = self._path(key)
        self._batch(self._added(path, self.hub.send(blocks, path, sha256=False)), key=key)

    def _added(self, path: str, file: HubFile) -> dict[str, Any]:
        return {"type": "addFile", "path": path, "xetHash": file.xet_hash, "mtime": int(time.time() * 1000)}

    def _batch(self, *operations: dict[str, Any], key: str) -> None:
        answer = self.hub.ask(
            "POST",
            f"{self.hub.api}/batch",
            content=_lines(operations),
            headers={"Content-Type": "application/x-ndjson"},
            doing="write",
            key=key,
            accept=(422,),
        )
        if failed := answer.json().get("failed"):
            raise StoreUnavailable(f"can't write hf://{self.hub.shown}/{failed[0]['path']}: {failed[0]['error']}")
        if answer.status_code == 422:
            raise StoreUnavailable(f"can't write hf://{self.hub.shown}/{key}: {answer.text[:200]}")


class HubRepoStore(_HubStore):
    """An `ObjectStore` on a branch of a model or dataset repository.

    Args:
        hub: the repository.
        prefix: without slashes at its ends.
    """

    _slashes = "/"

    def __init__(self, hub: Hub, prefix: str) -> None:
        super().__init__(hub, prefix)
        self._together = _GroupedCommits(lambda operations: self.commit(operations))

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects in the branch's tree, without ``.gitattributes``, which Git and the Hub need."""
        return (info for info in super().list(prefix, start_after) if self._base or info.key != ".gitattributes")

    def put(self, key: str, data: bytes) -> None:
        """Make one commit, together with the simultaneous writes of other threads."""
        self._together.add({self._path(key): _text_file(self._path(key), data)})

    def create(self, key: str, data: bytes) -> bool:
        """Make a commit whose parent is the commit that did not have ``key``. If the Hub refuses it because another commit came
        first, look again."""
        path = self._path(key)
        give_up_at = time.monotonic() + _CREATES_S
        for attempt in range(1000):
            head = self.head()
            if path in self.hub.about([path], doing="write"):
                return False
            if self.commit([_text_file(path, data)], parent=head):
                return True
            if time.monotonic() > give_up_at:
                break
            time.sleep(
                random.uniform(0, min(2.0, 0.05 * 2**attempt))
            )  # random, so that two writers don't collide again and again
        raise StoreUnavailable(f"can't create hf://{self.hub.shown}/{path}: others commit all the time")

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Upload the bytes by Xet, which sends only those that the Hub does not have; then make one commit, together with the
        uploads of other threads that are under way."""
        where = self._path(key)
        with path.open("rb", buffering=0) as file, self._together.uploading() as done:
            done({where: self.prepared(where, file, progress)})

    def copy(self, source: str, key: str) -> None:
        """Make a commit that adds a file with the same bytes."""
        file, path = self._about(source), self._path(key)
        if file.sha256 is None:
            self.put(key, self.get(source))
        else:
            self._together.add({path: _large_file(path, file)})

    def delete(self, keys: Iterable[str]) -> None:
        """Delete the files, by one commit for each 1000."""
        for paths in self._there(keys, "delete"):
            self._together.add({path: _deleted(path) for path in paths})

    def head(self) -> str:
        """Return the newest commit of the branch. Raises BucketNotFound."""
        for branch in self.hub.ask("GET", f"{self.hub.api}/refs", doing="read").json()["branches"]:
            if branch["name"] == self.hub.revision:
                return str(branch["targetCommit"])
        raise BucketNotFound(
            f"hf://{self.hub.shown} has no branch {self.hub.revision!r}",
            hint=f"hf repos branch create {self.hub.id} {self.hub.revision}",
        )

    def prepared(self, path: str, file: Any, progress: Progress | None) -> dict[str, Any]:
        """Upload an open file in the way that the Hub asks for, and return the operation with which a commit adds it."""
        size = os.fstat(file.fileno()).st_size
        sample = base64.b64encode(file.read(_SAMPLE_BYTES)).decode()
        file.seek(0)
        answer = self.hub.ask(
            "POST",
            f"{self.hub.api}/preupload{self.hub.at_revision}",
            json={"files": [{"path": path, "sample": sample, "size": size}], "gitIgnore": ""},
            doing="write",
            key=path,
        )
        if size == 0 or answer.json()["files"][0]["uploadMode"] == "regular":
            return _text_file(path, b"".join(_blocks(file, progress)))
        return _large_file(path, self.hub.send(_blocks(file, progress), path, sha256=True))

    def commit(self, operations: Iterable[dict[str, Any]], *, parent: str = "", message: str = "hf_spot") -> bool:
        """Make a commit. Return False if ``parent`` is given and is no longer the newest commit."""
        head = {"summary": message, "description": "", **({"parentCommit": parent} if parent else {})}
        operations = [*operations]
        for attempt in range(5):
            answer = self.hub.ask(
                "POST",
                f"{self.hub.api}/commit{self.hub.at_revision}",
                content=_lines([{"key": "header", "value": head}, *operations]),
                headers={"Content-Type": "application/x-ndjson"},
                doing="write",
                key=operations[0]["value"]["path"],
                accept=(409, 412),
            )
            if answer.status_code not in (409, 412):
                return True
            if parent:
                return False
            time.sleep(random.uniform(0, 0.2 * 2**attempt))  # another commit was being made
        raise StoreUnavailable(f"can't write hf://{self.hub.shown}: others commit all the time")

    def publish(
        self,
        folder: Path,
        names: Sequence[str],
        *,
        superseded: Callable[[str], bool] = lambda name: False,
        defaults: Collection[str] = (),
        private: bool,
        message: str,
        workers: int = 4,
        progress: Progress | None = None,
    ) -> None:
        """Upload files and add all of them by one commit, or none. The repository is created if it does not exist.

        Args:
            folder: the folder of the files.
            names: relative to it, and the same in the repository.
            superseded: returns whether another file of the repository is deleted by this commit.
            defaults: those of ``names`` that are left out if the repository already has them.
            private: make a new repository private.
            message: of the commit.
            workers: number of files to upload at the same time.
            progress: see `Progress`.

        Raises:
            StoreError: others have changed the repository meanwhile.
        """
        try:
            head = self.head()
        # The Hub does not reveal whether a repository exists that this user can't see. If creating it is not allowed either,
        # that error says why.
        except (BucketNotFound, AccessDenied):
            self.hub.create(private=private)
            head = self.head()
        there = {info.key for info in self.list()}
        names = [name for name in names if name not in defaults or name not in there]
        old = [name for name in sorted(there.difference(names)) if superseded(name)]

        def prepare(name: str) -> dict[str, Any]:
            with (folder / name).open("rb", buffering=0) as file:
                return self.prepared(self._path(name), file, job.moved)

        job = Job(progress)
        with Workers(workers, "hf_spot-publish") as pool:
            operations = job.in_parts(pool, prepare, names)
        operations += [_deleted(self._path(name)) for name in old]
        if not self.commit(operations, parent=head, message=message):
            raise StoreError(
                f"{self.url} was changed by someone else meanwhile; nothing was published",
                hint=f"see {self.hub.endpoint}/{self.hub.id}/commits/{self.hub.revision}, then the same command again",
            )


class _GroupedCommits:
    """Makes one commit of the writes of several threads.

    An uploaded file waits until no other upload is under way, so that a checkpoint's files become one commit. Other writes wait
    only for the commit under way.

    Args:
        commit: makes a commit.
    """

    def __init__(self, commit: Callable[[list[dict[str, Any]]], object]) -> None:
        self._commit = commit
        self._changed = threading.Condition()
        self._moving = 0  # uploads under way
        self._waiting: list[_PendingWrite] = []
        self._committing = False
        self._process = os.getpid()

    def add(self, operations: dict[str, dict[str, Any]]) -> None:
        """Commit operations, given by the path that each concerns. Return when they are committed."""
        self._carry_out(_PendingWrite(operations, patient=False))

    @contextlib.contextmanager
    def uploading(self) -> Iterator[Callable[[dict[str, dict[str, Any]]], None]]:
        """Mark the block as the upload of a file. Once the file is uploaded, call the yielded function with the operations; it
        returns when they are committed."""
        arrived = False
        self._reset_after_fork()
        with self._changed:
            self._moving += 1

        def done(operations: dict[str, dict[str, Any]]) -> None:
            nonlocal arrived
            with self._changed:
                arrived = True
                self._moving -= 1
                self._changed.notify_all()
            self._carry_out(_PendingWrite(operations, patient=True))

        try:
            yield done
        finally:
            if not arrived:
                with self._changed:
                    self._moving -= 1
                    self._changed.notify_all()

    def _reset_after_fork(self) -> None:
        if self._process != os.getpid():  # after a fork: the threads that were working or held the lock do not exist here
            self.__init__(self._commit)  # type: ignore[misc]

    def _carry_out(self, write: _PendingWrite) -> None:
        self._reset_after_fork()
        with self._changed:
            self._waiting.append(write)
            while not write.done and (self._committing or (write.patient and self._moving)):
                self._changed.wait()
            if not write.done:
                self._committing = True
                batch, self._waiting = self._waiting, []
        if not write.done:
            self._commit_all(batch)
        if write.trouble is not None:
            raise write.trouble

    def _commit_all(self, batch: list[_PendingWrite]) -> None:
        trouble: BaseException | None = None
        try:
            operations: dict[str, dict[str, Any]] = {}
            for write in batch:
                operations |= write.operations
            self._commit([*operations.values()])
        except SpotError as error:
            trouble = error
        except BaseException as error:
            trouble = StoreUnavailable(f"the thread that was committing was ended ({error!r})")
            raise
        finally:
            with self._changed:
                for write in batch:
                    write.done, write.trouble = True, trouble
                self._committing = False
                self._changed.notify_all()


class _PendingWrite:
    """The operations that one thread wants to commit."""

    def __init__(self, operations: dict[str, dict[str, Any]], *, patient: bool) -> None:
        self.operations = operations
        self.patient = patient
        self.done = False
        self.trouble: BaseException | None = None


def _text_file(path: str, data: bytes) -> dict[str, Any]:
    return {"key": "file", "value": {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}}


def _large_file(path: str, file: HubFile) -> dict[str, Any]:
    return {"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": file.sha256, "size": file.size}}


def _deleted(path: str) -> dict[str, Any]:
    return {"key": "deletedFile", "value": {"path": path}}


def _lines(values: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def _blocks(file: Any, progress: Progress | None) -> Iterator[memoryview]:
    """Yield the rest of an open file in blocks; each is overwritten by the next."""
    buffer, at, see = memoryview(bytearray(BLOCK_BYTES)), 0, witness_of(progress)
    while count := file.readinto(buffer):
        see(at, buffer[:count])
        yield buffer[:count]
        at += count
        if progress is not None:
            progress(count)
