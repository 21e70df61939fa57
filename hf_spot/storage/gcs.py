"""GoogleStore: a run in a bucket of Google Cloud Storage, by Google's own client.

The client finds the credentials: ``gcloud auth application-default login``, ``GOOGLE_APPLICATION_CREDENTIALS``, or the
service account of the machine or pod. ``STORAGE_EMULATOR_HOST`` selects an emulator.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests
from google.api_core import exceptions as google
from google.api_core.client_info import ClientInfo
from google.auth import exceptions as login
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from google.cloud.storage.retry import DEFAULT_RETRY
from urllib3.exceptions import HTTPError

from hf_spot.errors import AccessDenied, BucketNotFound, ConfigError, ObjectNotFound, SpotError, StoreError, StoreUnavailable
from hf_spot.storage.credential_source import GuardedSource, SourceFailed, credential_source, passed_on
from hf_spot.storage.keys import TEMPORARY_FOLDER, check_key, check_prefix
from hf_spot.storage.parts import BLOCK_IN_BYTES, Job, Piece, Stopped, write_at
from hf_spot.storage.per_process import PerProcess, renamed_when_whole
from hf_spot.storage.store import ObjectInfo, Progress
from hf_spot.storage.threads import Workers

PART_BYTES = 64 << 20
PAGE = 1000  # names in an answer
_MOST_PARTS = 32  # that one request can compose: Google's limit
_SENT_BYTES = 4 << 20  # in one request, and held in memory meanwhile; a multiple of 256 KB
_CONNECTIONS = min(64, max(16, os.cpu_count() or 1))
_READS = 5  # of a part, if the answer repeatedly breaks off without a byte
_TIMEOUTS = {"timeout": (5, 30), "retry": DEFAULT_RETRY.with_timeout(60.0)}  # seconds: to connect, of silence, of all tries
_URL = re.compile(r"gs://(?P<bucket>[a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?:/(?P<prefix>[^?#]*))?")
_LOG_IN = "gcloud auth application-default login"


class GoogleStore:
    """An `ObjectStore` in a bucket. The first call makes the first request. Usable from threads and after a fork.

    A file of more than 64 MB is uploaded in parts, each an object of its own in a hidden folder, verified by CRC32C; one
    request then composes them. This takes at most 4 MB of memory for each of 16 to 64 connections.

    Args:
        url: ``gs://bucket/prefix``; the prefix may be empty.

    Raises:
        ConfigError: the URL is malformed.
    """

    def __init__(self, url: str) -> None:
        found = _URL.fullmatch(url)
        if not found:
            raise ConfigError(f"{url!r} is not the URL of a bucket of Google Cloud Storage", hint="gs://bucket/prefix")
        prefix = (found["prefix"] or "").strip("/")
        self._name = found["bucket"]
        self._base = f"{check_key(prefix)}/" if prefix else ""
        self._connections = PerProcess(_Connection)

    @property
    def url(self) -> str:
        """Return the URL: bucket and prefix, without a trailing slash."""
        return f"gs://{self._name}/{self._base}".rstrip("/")

    def get(self, key: str) -> bytes:
        """Return the object's bytes, by one GET, verified by the client."""
        with self._explained("read", key):
            body: bytes = self._blob(key).download_as_bytes(raw_download=True, **_TIMEOUTS)
            return body

    def get_range(self, key: str, first: int, count: int) -> bytes:
        """Return a part of the object's bytes, by one GET."""
        with self._explained("read", key):
            part: bytes = self._blob(key).download_as_bytes(
                start=first, end=first + count - 1, raw_download=True, checksum=None, **_TIMEOUTS
            )
            return part

    def put(self, key: str, data: bytes) -> None:
        """Write or replace the object, verified by CRC32C."""
        with self._explained("write", key):
            self._blob(key).upload_from_string(data, checksum="crc32c", **_TIMEOUTS)

    def create(self, key: str, data: bytes) -> bool:
        """Write the object if it does not exist (``ifGenerationMatch=0``)."""
        with self._explained("write", key):
            try:
                self._blob(key).upload_from_string(data, checksum="crc32c", if_generation_match=0, **_TIMEOUTS)
                return True
            except google.PreconditionFailed:
                return False

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Upload the file at once, or in up to 32 parts, several at a time, which are then composed and deleted."""
        blob, job = self._blob(key), Job(progress)
        with path.open("rb", buffering=0) as file, self._explained("write", key):
            size = os.fstat(file.fileno()).st_size
            if size <= PART_BYTES:
                with job.first_trouble():
                    self._upload(blob, _PartFile(job, file.fileno(), 0, size), size)
                return
            part_bytes = PART_BYTES * max(1, -(-size // (_MOST_PARTS * PART_BYTES)))
            # It names the first folder of the key, so that `abort` can tell whose it was.
            folder = f"{self._base}{TEMPORARY_FOLDER}/{key.split('/', 1)[0]}.{uuid.uuid4().hex}"
            parts = [self._bucket.blob(f"{folder}/{first // part_bytes:02d}") for first in range(0, size, part_bytes)]

            def send(number: int) -> None:
                first = number * part_bytes
                length = min(part_bytes, size - first)
                self._upload(parts[number], _PartFile(job, file.fileno(), first, length), length)

            try:
                job.in_parts(self._connection.workers, send, range(len(parts)))
                # Only verified parts are composed: each generation belongs to one upload.
                blob.compose(parts, if_source_generation_match=[part.generation for part in parts], **_TIMEOUTS)
            finally:
                with contextlib.suppress(google.GoogleAPIError, login.GoogleAuthError, requests.RequestException):
                    self._remove([part.name for part in parts])

    def get_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Download several ranges of one generation at a time into a file beside ``path`` that is renamed when complete."""
        blob, job = self._blob(key), Job(progress)
        with renamed_when_whole(path) as file, self._explained("read", key):
            blob.reload(**_TIMEOUTS)
            os.ftruncate(file.fileno(), blob.size)

            def fetch(first: int) -> None:
                self._fetch(blob, job, file.fileno(), first, min(first + PART_BYTES, blob.size))

            job.in_parts(self._connection.workers, fetch, range(0, blob.size, PART_BYTES))

    def copy(self, source: str, key: str) -> None:
        """Copy the object within Google Cloud, whatever its size (Rewrite)."""
        origin, blob, token = self._blob(source), self._blob(key), None
        with self._explained("read", source):
            while True:
                token, _, _ = blob.rewrite(origin, token=token, **_TIMEOUTS)
                if token is None:
                    return

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects, a page at a time (Objects.list)."""
        wanted = self._base + check_prefix(prefix)
        begin = {"start_offset": self._base + start_after} if start_after else {}
        for key, size in self._listed(wanted, **begin):
            if key > start_after and not key.startswith(f"{TEMPORARY_FOLDER}/") and not key.endswith("/"):
                yield ObjectInfo(key, size)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete the objects, one request for each, several at a time."""
        names = [self._base + check_key(key) for key in keys]
        with self._explained("delete", names[0][len(self._base) :] if names else ""):
            self._remove(names)

    def abort(self, stale: Callable[[str], bool]) -> int:
        """Delete the parts of uploads that were not composed, and return the number of these uploads. Google itself drops an
        incomplete part within a week."""
        begun: dict[str, list[str]] = {}
        for key, _ in self._listed(f"{self._base}{TEMPORARY_FOLDER}/"):
            begun.setdefault(key.split("/")[1], []).append(self._base + key)
        gone = [upload for upload in begun if stale(f"{upload.rpartition('.')[0]}/")]
        with self._explained("delete", f"{TEMPORARY_FOLDER}/"):
            self._remove([name for upload in gone for name in begun[upload]])
        return len(gone)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _upload(self, blob: Any, part: _PartFile, size: int) -> None:
        blob.chunk_size = _SENT_BYTES
        blob.upload_from_file(part, size=size, rewind=False, checksum="crc32c", **_TIMEOUTS)

    def _fetch(self, blob: Any, job: Job, handle: int, at: int, end: int) -> None:
        """Write bytes ``at`` to ``end`` to their place in the file. If an answer breaks off, request the rest. The client's own
        download would read 8 KB at a time."""
        buffer = memoryview(bytearray(min(BLOCK_IN_BYTES, end - at)))
        url = f"{self._connection.client.api_endpoint}/download/storage/v1/b/{self._name}/o/{quote(blob.name, safe='')}"
        query = {"alt": "media", "generation": blob.generation}
        tries = 0
        while at < end:
            try:
                with self._connection.session.get(
                    url, params=query, headers={"Range": f"bytes={at}-{end - 1}"}, timeout=_TIMEOUTS["timeout"], stream=True
                ) as answer:
                    if answer.status_code != requests.codes.partial_content:
                        raise google.from_http_response(answer)
                    while at < end and (count := answer.raw.readinto(buffer[: end - at])):
                        job.may_go_on()
                        write_at(handle, buffer[:count], at)
                        job.see(at, buffer[:count])
                        at, tries = at + count, 0
                        job.moved(count)
                if at < end:
                    raise requests.ConnectionError("the answer broke off")
            except (requests.RequestException, HTTPError, google.ServerError):
                tries += 1
                if tries == _READS:
                    raise

    def _listed(self, prefix: str, **begin: str) -> Iterator[tuple[str, int]]:
        with self._explained("list", prefix[len(self._base) :]):
            pages = self._connection.client.list_blobs(
                self._name,
                prefix=prefix,
                fields="items(name,size),nextPageToken",
                page_size=PAGE,
                **begin,
                **_TIMEOUTS,
            ).pages
        while True:
            with self._explained("list", prefix[len(self._base) :]):
                page = next(pages, None)
            if page is None:
                return
            for blob in page:
                if key := blob.name[len(self._base) :]:
                    yield key, blob.size or 0

    def _remove(self, names: Iterable[str]) -> None:
        def remove(name: str) -> None:
            with contextlib.suppress(google.NotFound):
                self._bucket.blob(name).delete(**_TIMEOUTS)

        Job(None).in_parts(self._connection.workers, remove, names)

    def _blob(self, key: str) -> Any:
        return self._bucket.blob(self._base + check_key(key))

    @property
    def _bucket(self) -> Any:
        with self._explained("reach", ""):
            return self._connection.client.bucket(self._name)

    @property
    def _connection(self) -> _Connection:
        return self._connections.get()

    # -- errors -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _explained(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except _TROUBLE as error:
            raise self._explain(doing, key, error) from error

    def _explain(self, doing: str, key: str, error: Exception) -> SpotError:
        where = f"gs://{self._name}/{self._base}{key}"
        what = f"can't {doing} {where}: {getattr(error, 'message', '') or error}"
        if isinstance(error, google.RetryError) and error.cause is not None:
            error = error.cause
        if isinstance(error, SourceFailed):
            self._connections.forget()
            return StoreUnavailable(what, hint=error.hint or _LOG_IN)
        if isinstance(error, login.TransportError):
            return StoreUnavailable(what)
        if isinstance(error, login.GoogleAuthError):
            self._connections.forget()  # the user may log in during a training
            return AccessDenied(what, hint=_LOG_IN)
        if isinstance(error, google.Unauthorized):
            self._connections.forget()
            return AccessDenied(what, hint=_LOG_IN)
        if isinstance(error, google.Forbidden):
            return AccessDenied(
                what, hint=f"gcloud storage buckets add-iam-policy-binding gs://{self._name} --role=roles/storage.objectUser …"
            )
        if isinstance(error, google.NotFound):
            if doing == "read" and "bucket does not exist" not in str(error):
                return ObjectNotFound(f"{where} does not exist")
            return BucketNotFound(
                f"the bucket {self._name} does not exist", hint=f"gcloud storage buckets create gs://{self._name}"
            )
        if isinstance(error, (google.ClientError, InvalidResponse)) and not isinstance(error, google.TooManyRequests):
            return StoreError(what)
        return StoreUnavailable(what)


_TROUBLE = (
    google.GoogleAPIError,
    login.GoogleAuthError,
    SourceFailed,
    requests.RequestException,
    HTTPError,
    DataCorruption,
    InvalidResponse,
)


class _PartFile:
    """A part in the form of a file, as the client needs it. It reports to the job how far it has been read; bytes that are read
    again, because a request was repeated, are not reported again."""

    def __init__(self, job: Job, handle: int, first: int, size: int) -> None:
        self._job = job
        self._first = first
        self._piece = Piece(job, handle, first, size)
        self._told = 0
        self.tell, self.seek = self._piece.tell, self._piece.seek

    def read(self, count: int = -1) -> bytes:
        """Read as a file does. Raises Stopped, SpotError."""
        self._job.may_go_on()
        before = self._piece.tell()
        block = self._piece.read(count)
        if not block and count and before < len(self._piece):
            self._job.fail(SpotError("a file became shorter while it was uploaded; this checkpoint is not committed"))
            raise Stopped
        if self._piece.tell() > self._told:
            new = memoryview(block)[self._told - before :]
            self._job.see(self._first + self._told, new)
            self._told += len(new)
            self._job.moved(len(new))
        return block


class _Connection:
    """The client of one process, and the threads that move parts of files."""

    def __init__(self) -> None:
        try:
            with credential_source():
                self.client = storage.Client(project=None, client_info=ClientInfo(user_agent="hf_spot"))
        except SourceFailed as failed:
            passed_on(failed, login.GoogleAuthError)
            raise
        self.session = self.client._http  # has the credentials and refreshes them; there is no public access to them
        self.session.credentials = GuardedSource(self.session.credentials, passed_on=(login.GoogleAuthError,))
        adapter = requests.adapters.HTTPAdapter(pool_connections=4, pool_maxsize=2 * _CONNECTIONS)
        self.session.mount("https://", adapter)
        self.session.mount("http://", adapter)
        self.workers = Workers(_CONNECTIONS, "hf_spot-part")
