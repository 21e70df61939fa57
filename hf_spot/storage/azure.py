"""AzureStore: a run in a container of Azure Blob Storage, by Azure's own client.

Account and credentials come from ``AZURE_STORAGE_CONNECTION_STRING``, or from ``AZURE_STORAGE_ACCOUNT`` with
``AZURE_STORAGE_KEY`` or ``AZURE_STORAGE_SAS_TOKEN``; otherwise `azure.identity.DefaultAzureCredential` finds credentials, such
as the identity of the machine or pod, or ``az login``.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import requests
from azure.core import MatchConditions
from azure.core import exceptions as azure
from azure.core.pipeline.transport import RequestsTransport
from azure.identity import DefaultAzureCredential
from azure.storage.blob import BlobBlock, BlobServiceClient, ContainerClient

from hf_spot.errors import AccessDenied, BucketNotFound, ConfigError, ObjectNotFound, SpotError, StoreError, StoreUnavailable
from hf_spot.storage.credential_source import GuardedSource, SourceFailed, credential_source
from hf_spot.storage.keys import check_key, check_prefix
from hf_spot.storage.parts import Job, write_at
from hf_spot.storage.per_process import PerProcess, renamed_when_whole
from hf_spot.storage.store import ObjectInfo, Progress
from hf_spot.storage.threads import Workers

PART_BYTES = 4 << 20  # held in memory while it is sent; up to this size the service also returns checksums
_MOST_PARTS = 50_000  # of one blob: Azure's limit
_CONNECTIONS = min(64, max(16, os.cpu_count() or 1))
_READS = 5  # of a part whose answer breaks off
_COPY_S = 600.0  # for Azure to copy a blob within an account
_COPY_POLL_S = 0.2
_URL = re.compile(r"az://(?P<container>\$root|[a-z0-9](?:-?[a-z0-9]){2,62})(?:/(?P<prefix>[^?#]*))?")
_ACCOUNT_HINT = "export AZURE_STORAGE_ACCOUNT=name, and az login; or export AZURE_STORAGE_CONNECTION_STRING='…'"
_LOG_IN = "az login; or a managed identity with the role 'Storage Blob Data Contributor'"


class AzureStore:
    """An `ObjectStore` in a container. The first call makes the first request. Usable from threads and after a fork.

    Files are uploaded and downloaded in parts of 4 MB, several at a time, each verified by its MD5. This takes 4 MB of memory
    for each of 16 to 64 connections.

    Args:
        url: ``az://container/prefix``; the prefix may be empty.

    Raises:
        ConfigError: the URL is malformed.
    """

    def __init__(self, url: str) -> None:
        found = _URL.fullmatch(url)
        if not found:
            raise ConfigError(f"{url!r} is not the URL of a container of Azure Blob Storage", hint="az://container/prefix")
        prefix = (found["prefix"] or "").strip("/")
        self._name = found["container"]
        self._base = f"{check_key(prefix)}/" if prefix else ""
        self._connections = PerProcess(_Connection)

    @property
    def url(self) -> str:
        """Return the URL: container and prefix, without a trailing slash."""
        return f"az://{self._name}/{self._base}".rstrip("/")

    def get(self, key: str) -> bytes:
        """Return the blob's bytes, verified by the client (Get Blob)."""
        with self._explained("read", key):
            body: bytes = self._blob(key).download_blob(validate_content="md5").readall()
            return body

    def get_range(self, key: str, first: int, count: int) -> bytes:
        """Return a part of the blob's bytes (Get Blob with a range)."""
        with self._explained("read", key):
            part: bytes = self._blob(key).download_blob(offset=first, length=count).readall()
            return part

    def put(self, key: str, data: bytes) -> None:
        """Write or replace the blob, verified by its MD5 (Put Blob)."""
        with self._explained("write", key):
            self._blob(key).upload_blob(data, overwrite=True, validate_content="md5")

    def create(self, key: str, data: bytes) -> bool:
        """Write the blob if it does not exist (Put Blob with ``If-None-Match: *``)."""
        with self._explained("write", key):
            try:
                self._blob(key).upload_blob(data, overwrite=False, validate_content="md5")
                return True
            except azure.ResourceExistsError:
                return False

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Upload the file (Put Block for each part, then Put Block List)."""
        blob, job = self._blob(key), Job(progress)
        with path.open("rb", buffering=0) as file, self._explained("write", key):
            size = os.fstat(file.fileno()).st_size
            part_bytes = max(PART_BYTES, -(-size // _MOST_PARTS))
            upload = uuid.uuid4().hex[:16]  # so that two uploads of one name don't mix their blocks

            def send(first: int) -> str:
                part = os.pread(file.fileno(), part_bytes, first)
                if len(part) != min(part_bytes, size - first):
                    raise SpotError("a file became shorter while it was uploaded; this checkpoint is not committed")
                block = base64.b64encode(f"{upload}{first // part_bytes:08d}".encode()).decode()
                blob.stage_block(block, part, length=len(part), validate_content="md5")
                job.moved(len(part))
                return block

            try:
                blocks = job.in_parts(self._connection.workers, send, range(0, size, part_bytes))
                blob.commit_block_list([BlobBlock(block) for block in blocks])
            except BaseException:
                with contextlib.suppress(azure.AzureError):  # if this fails, the next launch drops them
                    self._drop_blocks(blob)
                raise

    def get_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Download several ranges at a time into a file beside ``path`` that is renamed when complete."""
        blob, job = self._blob(key), Job(progress)
        with renamed_when_whole(path) as file, self._explained("read", key):
            about = blob.get_blob_properties()
            os.ftruncate(file.fileno(), about.size)

            def fetch(first: int) -> None:
                part = self._read(blob, first, min(PART_BYTES, about.size - first), about.etag)
                job.may_go_on()
                write_at(file.fileno(), memoryview(part), first)
                job.moved(len(part))

            job.in_parts(self._connection.workers, fetch, range(0, about.size, PART_BYTES))

    def copy(self, source: str, key: str) -> None:
        """Copy within the account (Copy Blob), and poll until the copy has ended."""
        origin, blob = self._blob(source), self._blob(key)
        with self._explained("read", source):
            status = blob.start_copy_from_url(origin.url)["copy_status"]
            give_up_at = time.monotonic() + _COPY_S
            while status == "pending":
                if time.monotonic() > give_up_at:
                    raise StoreUnavailable(f"Azure has not copied {self.url}/{source} within {_COPY_S:.0f} s")
                time.sleep(_COPY_POLL_S)
                status = blob.get_blob_properties().copy.status
        if status != "success":
            raise StoreUnavailable(f"Azure's copy of {self.url}/{source} has ended: {status}")

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects, in pages of up to 5000, from the start of the prefix: the service can't start after a name."""
        for key, size in self._listed(self._base + check_prefix(prefix)):
            if key > start_after and not key.endswith("/"):
                yield ObjectInfo(key, size)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete the blobs, one request for each, several at a time."""
        names = [self._base + check_key(key) for key in keys]

        def remove(name: str) -> None:
            try:
                self._container.get_blob_client(name).delete_blob()
            except azure.ResourceNotFoundError as error:
                if error.error_code == "ContainerNotFound":
                    raise

        with self._explained("delete", names[0][len(self._base) :] if names else ""):
            Job(None).in_parts(self._connection.workers, remove, names)

    def abort(self, stale: Callable[[str], bool]) -> int:
        """Drop the blocks of unfinished uploads, which Azure would keep, and bill, for a week. Return the number of uploads."""
        whole = {key for key, _ in self._listed(self._base)}
        begun = [key for key, _ in self._listed(self._base, include=["uncommittedblobs"]) if key not in whole and stale(key)]
        for key in begun:
            with self._explained("delete", key):
                self._drop_blocks(self._blob(key))
        return len(begun)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _drop_blocks(self, blob: Any) -> None:
        """Replace the blocks with an empty blob, and delete it. If the blob itself exists, do nothing."""
        with contextlib.suppress(azure.ResourceExistsError, azure.ResourceModifiedError):
            made = blob.commit_block_list([], match_condition=MatchConditions.IfMissing)
            blob.delete_blob(etag=made["etag"], match_condition=MatchConditions.IfNotModified)

    def _read(self, blob: Any, first: int, length: int, etag: str) -> bytes:
        same = {"etag": etag, "match_condition": MatchConditions.IfNotModified}
        for _ in range(_READS - 1):
            with contextlib.suppress(azure.IncompleteReadError, azure.ServiceResponseError):
                body: bytes = blob.download_blob(first, length, validate_content="md5", **same).readall()
                return body
        last: bytes = blob.download_blob(first, length, validate_content="md5", **same).readall()
        return last

    def _listed(self, prefix: str, **what: Any) -> Iterator[tuple[str, int]]:
        with self._explained("list", prefix[len(self._base) :]):
            pages = self._container.list_blobs(name_starts_with=prefix, **what).by_page()
        while True:
            with self._explained("list", prefix[len(self._base) :]):
                page = [*next(pages, ())]
            if not page and not getattr(pages, "continuation_token", None):
                return
            for blob in page:
                yield blob.name[len(self._base) :], blob.size or 0

    def _blob(self, key: str) -> Any:
        return self._container.get_blob_client(self._base + check_key(key))

    @property
    def _container(self) -> Any:
        with self._explained("reach", ""):
            container: ContainerClient = self._connection.service.get_container_client(self._name)
            return container

    @property
    def _connection(self) -> _Connection:
        return self._connections.get()

    # -- errors -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _explained(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except SourceFailed as failed:
            self._connections.forget()  # the user may log in during a training
            where = f"az://{self._name}/{self._base}{key}"
            raise StoreUnavailable(f"can't {doing} {where}: {failed}", hint=failed.hint or _LOG_IN) from failed
        except azure.AzureError as error:
            raise self._explain(doing, key, error) from error

    def _explain(self, doing: str, key: str, error: Any) -> SpotError:
        where = f"az://{self._name}/{self._base}{key}"
        told = str(getattr(error, "message", "") or error).strip().partition("\n")[0]
        what = f"can't {doing} {where}: {told}"
        code = str(getattr(error, "error_code", None) or "")
        status = getattr(error, "status_code", None) or 0
        if code == "ContainerNotFound":
            make = f"az storage container create --name {self._name}"
            return BucketNotFound(f"the container {self._name} does not exist", hint=make)
        if isinstance(error, azure.ClientAuthenticationError) or status == 401:
            self._connections.forget()  # the user may log in during a training
            return AccessDenied(what, hint=_LOG_IN)
        if status == 403:
            return AccessDenied(what, hint=_LOG_IN)
        if status == 404 and doing == "read":
            return ObjectNotFound(f"{where} does not exist")
        if isinstance(error, azure.ServiceRequestError) and "resolve" in told:
            return StoreUnavailable(what, hint="is AZURE_STORAGE_ACCOUNT the account's name?")
        if 400 <= status < 500 and status not in (408, 409, 412, 429):
            return StoreError(what)
        return StoreUnavailable(what)


class _Connection:
    """The client of one process, and the threads that move parts of files."""

    def __init__(self) -> None:
        session = requests.Session()
        for scheme in ("https://", "http://"):
            session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=2 * _CONNECTIONS))
        settings: dict[str, Any] = {
            "user_agent": "hf_spot",
            "transport": RequestsTransport(session=session, session_owner=False, connection_timeout=5, read_timeout=30),
            "retry_total": 4,
        }
        environ = os.environ
        if text := environ.get("AZURE_STORAGE_CONNECTION_STRING"):
            try:
                self.service = BlobServiceClient.from_connection_string(text, **settings)
            except ValueError as error:  # whose text has a part of the secret
                raise ConfigError("AZURE_STORAGE_CONNECTION_STRING is not a connection string", hint=_ACCOUNT_HINT) from error
        elif account := environ.get("AZURE_STORAGE_ACCOUNT") or environ.get("AZURE_STORAGE_ACCOUNT_NAME"):
            if not re.fullmatch("[a-z0-9]{3,24}", account):
                raise ConfigError(f"AZURE_STORAGE_ACCOUNT={account!r} is not the name of an account", hint=_ACCOUNT_HINT)
            secret = environ.get("AZURE_STORAGE_KEY") or environ.get("AZURE_STORAGE_SAS_TOKEN")
            self.service = BlobServiceClient(
                f"https://{account}.blob.core.windows.net", credential=secret or _found_credential(), **settings
            )
        else:
            raise ConfigError("which storage account? AZURE_STORAGE_ACCOUNT is not set", hint=_ACCOUNT_HINT)
        self.workers = Workers(_CONNECTIONS, "hf_spot-part")


def _found_credential() -> Any:
    """Return the credentials that Azure's own search finds. The search raises SourceFailed, and so does their use."""
    with credential_source():
        return GuardedSource(DefaultAzureCredential(), passed_on=(azure.AzureError,))
