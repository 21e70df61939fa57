"""S3Store: a run in a bucket of S3, or of any server with S3's protocol.

boto3 finds credentials, region, profile and endpoint: every variable and file of the AWS tools works, such as
``AWS_PROFILE``, ``AWS_ENDPOINT_URL_S3`` or ``addressing_style`` in ``~/.aws/config``. Two variables are for settings that
boto3 does not have:

* ``HF_SPOT_S3_EXPECTED_BUCKET_OWNER``: account id; a bucket of another account is refused (AccessDenied).
* ``HF_SPOT_S3_SSE_KMS_KEY_ID``: objects are encrypted under this KMS key instead of the bucket's default.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from botocore import exceptions as aws
from urllib3.exceptions import HTTPError

from hf_spot.aws_errors import ELSEWHERE, Kind, code_of, explain, message_of, speaks_of_checksums
from hf_spot.errors import (
    AccessDenied,
    BucketNotFound,
    ConfigError,
    ObjectNotFound,
    SpotError,
    StoreError,
    StoreNotFencing,
    StoreUnavailable,
    without_passwords,
)
from hf_spot.storage.credential_source import SourceFailed
from hf_spot.storage.keys import check_key, check_prefix
from hf_spot.storage.per_process import PerProcess
from hf_spot.storage.s3_connection import Connection, RedirectsInCircles, reads_small
from hf_spot.storage.s3_settings import (
    KMS_KEY_VARIABLE,
    OWNER_VARIABLE,
    check_endpoint,
    encryption,
    is_directory_bucket,
    owner,
    parse,
)
from hf_spot.storage.s3_small import MOST_BYTES
from hf_spot.storage.store import Listed, ObjectInfo, Progress, witness_of

_READS = 3  # of an answer that breaks off
_DELETE_BATCH = 1000  # S3's limit
_LONGEST_WORDS = 500  # of a server's message, in characters
_NO_CHECKSUMS = "export AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
_CALLED_FOR_CHECKSUMS = (
    *(
        "InvalidArgument",
        "InvalidRequest",
        "NotImplemented",
        "SignatureDoesNotMatch",
        "MalformedSecurityHeader",
        "InvalidDigest",
    ),
    *(
        "BadDigest",
        "XAmzContentSHA256Mismatch",
        "XAmzContentChecksumMismatch",
        "InvalidHeader",
        "UnsupportedHeader",
        "400",
        "501",
    ),
)
_CONFLICT_WAITS_S = (0.1, 0.3, 1.0)

T = TypeVar("T")

_PERMISSIONS = {
    "read": "s3:GetObject",
    "write": "s3:PutObject",
    "list": "s3:ListBucket",
    "delete": "s3:DeleteObject",
    "list unfinished uploads of": "s3:ListBucketMultipartUploads",
    "abort an upload of": "s3:AbortMultipartUpload",
}


@dataclass(frozen=True)
class Place:
    """Where a bucket is.

    Args:
        endpoint: URL of the server.
        asked_in: the region that this machine is configured for.
        region: the bucket's own region, or None if the server does not report it.
        time: the server's time, to the second, or None.
    """

    endpoint: str
    asked_in: str
    region: str | None
    time: datetime | None


class S3Store:
    """An `ObjectStore` in a bucket. The first call makes the first request. Usable from threads and after a fork.

    Errors of the store raise subclasses of StoreError; settings that can't be used raise ConfigError. Errors of the caller's
    own file in `put_file` and `get_file` are raised as the OSError that they are.

    Args:
        url: ``s3://bucket/prefix``; the prefix may be empty.

    Raises:
        ConfigError: the URL is malformed.
    """

    def __init__(self, url: str) -> None:
        self._bucket, prefix = parse(url)
        self._base = f"{prefix}/" if prefix else ""
        self._owner = owner()
        self._encryption = encryption()
        self._batched_deletes = True
        self._connections = PerProcess(self._connect)

    @property
    def url(self) -> str:
        """Return the URL: bucket and prefix, without a trailing slash."""
        return f"s3://{self._bucket}/{self._base}".rstrip("/")

    def get(self, key: str) -> bytes:
        """Return the object's bytes (GetObject)."""
        target = self._target(key)
        with self._explained("read", key):
            small = self._connection.small
            if (quickly := small.get(target["Key"])) is not None:
                return quickly
            before = reads_small.set(True)
            try:
                with small.learning("GET", target["Key"]):
                    body: bytes = _again_if_broken(lambda: self._client.get_object(**target)["Body"].read())
                return body
            finally:
                reads_small.reset(before)

    def get_range(self, key: str, first: int, count: int) -> bytes:
        """Return a part of the object's bytes (GetObject with ``Range``)."""
        target = self._target(key)

        def read() -> bytes:
            answer = self._client.get_object(Range=f"bytes={first}-{first + count - 1}", **target)
            if "ContentRange" in answer:
                part: bytes = answer["Body"].read()
                return part
            # A server that does not support ranges sends the whole object.
            with contextlib.closing(answer["Body"]) as body:
                whole: bytes = body.read(first + count)
                return whole[first:]

        with self._explained("read", key):
            before = reads_small.set(True)
            try:
                return _again_if_broken(read)
            finally:
                reads_small.reset(before)

    def put(self, key: str, data: bytes) -> None:
        """Write or replace the object (PutObject)."""
        target = self._target(key)
        with self._explained("write", key):
            self._client.put_object(Body=data, **target, **self._encryption)

    def create(self, key: str, data: bytes) -> bool:
        """Write the object if it does not exist (PutObject with ``If-None-Match: *``).

        Raises:
            StoreNotFencing: the server refuses that header.
        """
        target = self._target(key)
        for wait_s in (*_CONFLICT_WAITS_S, None):
            with self._explained("write", key):
                try:
                    self._client.put_object(Body=data, IfNoneMatch="*", **target, **self._encryption)
                    return True
                except aws.ClientError as error:
                    code = code_of(error)
                    if code in ("PreconditionFailed", "412"):
                        return False
                    if code in ("NotImplemented", "501") and not speaks_of_checksums(message_of(error)):
                        raise StoreNotFencing(
                            f"{self.url} refuses create-if-absent (If-None-Match), so it can't keep two machines apart",
                            hint="another store, or a newer version of its server",
                        ) from error
                    # Another create of this key is under way: S3 asks to try again.
                    if code != "ConditionalRequestConflict" or wait_s is None:
                        raise
            time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Upload the file by one PutObject, or in parts of 64 MB, several at a time. A failed or cancelled upload leaves no
        parts behind."""
        target = self._target(key)
        with self._explained("write", key):
            small = self._connection.small
            if path.stat().st_size > MOST_BYTES:
                self._connection.transfers.upload(target, self._encryption, path, progress)
            elif small.put(target["Key"], body := path.read_bytes()):
                witness_of(progress)(0, memoryview(body))
                if progress is not None:
                    progress(len(body))
            else:
                with small.learning("PUT", target["Key"]):
                    self._connection.transfers.upload(target, self._encryption, path, progress)

    def get_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Download parts of 64 MB, several at a time, into a file beside ``path`` that is renamed when complete."""
        target = self._target(key)
        with self._explained("read", key):
            self._connection.transfers.download(target, path, progress)

    def copy(self, source: str, key: str) -> None:
        """Copy the object within the store (CopyObject; UploadPartCopy for a large object)."""
        origin, target = self._target(source), self._target(key)
        with self._explained("read", source):
            self._connection.transfers.copy(origin, target, self._encryption)

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects, a page of at most 1000 keys at a time (ListObjectsV2)."""
        wanted = self._base + check_prefix(prefix)
        if not is_directory_bucket(self._bucket):
            yield from self._pages(wanted, prefix, {"StartAfter": self._base + start_after} if start_after else {})
            return
        # A directory bucket (S3 Express) lists only whole folders, from their beginning, and in no particular order.
        found = self._pages(wanted[: wanted.rfind("/") + 1], prefix, {})
        chosen = (info for info in found if info.key.startswith(prefix) and info.key > start_after)
        yield from sorted(chosen, key=lambda info: info.key)

    def list_groups(self, prefix: str, delimiter: str) -> Iterator[Listed]:
        """Yield objects and groups of objects, a page of at most 1000 of both at a time. A directory bucket (S3 Express) knows
        no other delimiter than ``/``: all objects are listed there."""
        grouped = {} if is_directory_bucket(self._bucket) else {"Delimiter": delimiter}
        for page in self._answers(self._base + check_prefix(prefix), prefix, grouped):
            for found in self._objects(page):
                key, size = found["Key"][len(self._base) :], found["Size"]
                yield Listed(key, size=size, etag=found.get("ETag", ""), written=found.get("LastModified"))
            for group in page.get("CommonPrefixes", ()):
                yield Listed(group["Prefix"][len(self._base) :], is_group=True)

    def _pages(self, wanted: str, prefix: str, begin: dict[str, str]) -> Iterator[ObjectInfo]:
        for page in self._answers(wanted, prefix, begin):
            for found in self._objects(page):
                yield ObjectInfo(found["Key"][len(self._base) :], found["Size"])

    def _answers(self, wanted: str, prefix: str, more: dict[str, str]) -> Iterator[Any]:
        query = {"Bucket": self._bucket, "Prefix": wanted, **more, **self._owner}
        with self._explained("list", prefix):
            pages = iter(self._client.get_paginator("list_objects_v2").paginate(**query))
        while True:
            with self._explained("list", prefix):
                page = next(pages, None)
            if page is None:
                return
            yield page

    def _objects(self, page: Any) -> Iterator[Any]:
        for found in page.get("Contents", ()):
            key = found["Key"][len(self._base) :]
            if key and not key.endswith("/"):  # consoles create such objects to show a folder
                yield found

    def delete(self, keys: Iterable[str]) -> None:
        """Delete the objects, 1000 at a time (DeleteObjects); one by one if the server does not support that."""
        names = (self._base + check_key(key) for key in keys)
        while batch := [*islice(names, _DELETE_BATCH)]:
            self._delete(batch)

    def abort(self, stale: Callable[[str], bool]) -> int:
        """Abort stale multipart uploads and return their number. If the server can't list them, none is aborted."""
        found = []
        with self._explained("list unfinished uploads of", ""):
            try:
                for page in self._client.get_paginator("list_multipart_uploads").paginate(
                    Bucket=self._bucket, Prefix=self._base, **self._owner
                ):
                    found += page.get("Uploads", ())
            except aws.ClientError as error:
                if code_of(error) not in ("NotImplemented", "MethodNotAllowed", "405", "501"):
                    raise
        count = 0
        for upload in found:
            key = upload["Key"][len(self._base) :]
            if stale(key):
                with self._explained("abort an upload of", key):
                    self._abort(upload["Key"], upload["UploadId"])
                count += 1
        return count

    def place(self) -> Place:
        """Return where the bucket is and the server's time, from any answer to HeadBucket, even an error."""
        with self._explained("list", ""):
            try:
                answer = self._client.head_bucket(Bucket=self._bucket, **self._owner)["ResponseMetadata"]
            except aws.ClientError as error:
                answer = error.response.get("ResponseMetadata", {})
        headers = answer.get("HTTPHeaders", {})
        said = headers.get("date")
        return Place(
            endpoint=without_passwords(self._client.meta.endpoint_url),
            asked_in=self._client.meta.region_name,
            region=headers.get("x-amz-bucket-region"),
            time=parsedate_to_datetime(said) if said else None,
        )

    def _abort(self, name: str, upload_id: str) -> None:
        try:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload_id, **self._owner)
        except aws.ClientError as error:
            if code_of(error) not in ("NoSuchUpload", "404"):  # its writer has aborted it meanwhile
                raise

    def _delete(self, names: Sequence[str]) -> None:
        if self._batched_deletes:
            request = {"Objects": [{"Key": name} for name in names], "Quiet": True}
            with self._explained("delete", names[0][len(self._base) :]):
                try:
                    answer = self._client.delete_objects(Bucket=self._bucket, Delete=request, **self._owner)
                except aws.ClientError as error:
                    if code_of(error) == "NoSuchBucket" or explain(code_of(error), status_of(error)).kind is Kind.BUSY:
                        raise
                    # Google has no such request, others refuse its checksum, and a policy may allow the other one alone. If
                    # this is refused as well, that is the error.
                    self._batched_deletes = False
            if self._batched_deletes:
                for trouble in answer.get("Errors", ()):
                    if trouble.get("Code") not in ("NoSuchKey", "404"):
                        failed = trouble.get("Key", names[0])[len(self._base) :]
                        raise self._explain("delete", failed, aws.ClientError({"Error": trouble}, "DeleteObjects"))
                return
        for name in names:
            with self._explained("delete", name[len(self._base) :]):
                try:
                    self._client.delete_object(Bucket=self._bucket, Key=name, **self._owner)
                except aws.ClientError as error:
                    if code_of(error) not in ("NoSuchKey", "404"):
                        raise

    # -- connection ---------------------------------------------------------------------------------------------------

    def _connect(self) -> Connection:
        connection = Connection()
        check_endpoint(connection.client.meta.endpoint_url, self._bucket)
        return connection

    @property
    def _connection(self) -> Connection:
        return self._connections.get()

    @property
    def _client(self) -> Any:
        return self._connection.client

    def _target(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._base + check_key(key), **self._owner}

    # -- errors -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _explained(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except SourceFailed as failed:
            raise self._explain_source(doing, key, failed) from failed
        except RedirectsInCircles as error:
            raise ConfigError(
                f"can't {doing} s3://{self._bucket}/{self._base}{key}: {error}",
                hint=f"should AWS_ENDPOINT_URL begin with https://? Otherwise {explain('301', bucket=self._bucket).hint}",
            ) from error
        except (aws.ClientError, aws.BotoCoreError, HTTPError) as error:
            raise self._explain(doing, key, error) from error

    def _explain_source(self, doing: str, key: str, failed: SourceFailed) -> SpotError:
        """Return the error for a request that could not be signed. A source that fails may work later, for example after the
        user has logged in."""
        self._ask_for_credentials_again()
        cause = failed.__cause__
        meaning = explain(code_of(cause)) if isinstance(cause, aws.BotoCoreError) else None
        missing = meaning is not None and meaning.kind is Kind.CREDENTIALS
        told = f"can't {doing} s3://{self._bucket}/{self._base}{key}: {meaning.means if meaning and missing else ''}"
        hint = failed.hint or (meaning.hint if meaning else "") or "aws sts get-caller-identity"
        return (AccessDenied if missing else StoreUnavailable)(f"{told}: {failed}".replace(": : ", ": "), hint=hint)

    def _explain(self, doing: str, key: str, error: Exception) -> SpotError:
        """Return the error for a request that the server refused, or did not answer."""
        response: Any = error.response if isinstance(error, aws.ClientError) else {}
        code = code_of(error)
        where = f"s3://{self._bucket}/{self._base}{key}"
        if doing == "read" and code in ("NoSuchKey", "404"):
            return ObjectNotFound(f"{where} does not exist")
        said = response.get("ResponseMetadata", {})
        known = {"bucket": self._bucket, "permission": _PERMISSIONS[doing]}
        if self._connections.is_open():  # otherwise a setting keeps the client from being created
            known |= {
                "endpoint": urlsplit(self._client.meta.endpoint_url).netloc.rpartition("@")[2],
                "resource": self._resource(doing),
            }
        meaning = explain(code, status=said.get("HTTPStatusCode", 0), message=message_of(error), **known)
        words = " ".join(message_of(error).split())[:_LONGEST_WORDS].rstrip(".")
        if code in ("NoSuchBucket", "404"):
            return BucketNotFound(f"{meaning.means} ({code}: {words})" if words else meaning.means, hint=meaning.hint)
        checksums = doing == "write" and self._may_refuse_checksums(code, words)
        if meaning.kind is Kind.CREDENTIALS:
            self._ask_for_credentials_again()
        hint = meaning.hint
        if meaning.kind is Kind.PERMISSION and not code.startswith("KMS."):
            hint += self._other_reasons(doing)
        region = said.get("HTTPHeaders", {}).get("x-amz-bucket-region") or response.get("Error", {}).get("Region")
        if code in ELSEWHERE and region:
            hint = f"the bucket is in {region}: export AWS_REGION={region}"
        if checksums:
            hint = f"{_NO_CHECKSUMS}, if this server refuses checksums{f'; else: {hint}' if hint else ''}"
        means = f"{meaning.means}, or the server refuses the checksum" if checksums and meaning.means else meaning.means
        parts = (code, words, "" if means == words else means) if response else (means, str(error))
        told = ": ".join(dict.fromkeys(part for part in parts if part))
        unknown = StoreError if response else ConfigError
        return _ERRORS.get(meaning.kind, unknown)(f"can't {doing} {where}: {told}", hint=hint or _HINTS.get(unknown, ""))

    def _may_refuse_checksums(self, code: str, words: str) -> bool:
        """Return whether an upload may have been refused for its checksum: other servers than Amazon's report that in many
        ways."""
        if not self._connections.is_open() or self._client.meta.config.request_checksum_calculation == "when_required":
            return False
        amazons = (urlsplit(self._client.meta.endpoint_url).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
        return speaks_of_checksums(words) or (code in _CALLED_FOR_CHECKSUMS and not amazons)

    def _ask_for_credentials_again(self) -> None:
        """Make the next call look for credentials again, because the user may log in during a training."""
        self._connections.forget()

    def _resource(self, doing: str) -> str:
        bucket = f"arn:{self._client.meta.partition}:s3:::{self._bucket}"
        return bucket if doing.startswith("list") else f"{bucket}/{self._base}*"

    def _other_reasons(self, doing: str) -> str:
        hint = ""
        if doing == "read":
            hint += f" (without s3:ListBucket on {self._resource('list')}, S3 answers so for objects that don't exist, too)"
        if self._encryption and doing in ("read", "write"):
            hint += f"; and kms:GenerateDataKey and kms:Decrypt on the key of ${KMS_KEY_VARIABLE}"
        if self._owner:
            hint += f"; or the bucket does not belong to the account in ${OWNER_VARIABLE}"
        return hint


_ERRORS: dict[Kind, type[SpotError]] = {
    Kind.PERMISSION: AccessDenied,
    Kind.CREDENTIALS: AccessDenied,
    Kind.SETTING: ConfigError,
    Kind.BUSY: StoreUnavailable,
    Kind.QUOTA: StoreUnavailable,
}
_HINTS: dict[type[SpotError], str] = {ConfigError: "aws configure list"}
# Timeouts are not among them: botocore has already retried those.
_BROKEN = (aws.IncompleteReadError, aws.FlexibleChecksumError, aws.ResponseStreamingError)


def _again_if_broken(read: Callable[[], T]) -> T:
    """Read an answer, again if it breaks off or is damaged: botocore repeats only the request, not the reading."""
    for _ in range(_READS - 1):
        with contextlib.suppress(*_BROKEN):
            return read()
    return read()


def status_of(error: aws.ClientError) -> int:
    """Return the HTTP status of an answer; 0 if it is unknown."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
