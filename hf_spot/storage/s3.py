"""S3Store: a run in a bucket of S3, or of anything that speaks S3's protocol.

Credentials, region, profile and endpoint are boto3's business: every variable and file of the AWS tools works, such as
``AWS_PROFILE``, ``AWS_ENDPOINT_URL_S3`` or ``addressing_style`` in ``~/.aws/config``. Two variables say what boto3 has
no setting for:

* ``HF_SPOT_S3_EXPECTED_BUCKET_OWNER``: account id; a bucket of another account is refused (AccessDenied).
* ``HF_SPOT_S3_SSE_KMS_KEY_ID``: objects are encrypted under this KMS key instead of the bucket's default.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.session
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as aws
from botocore.config import Config
from botocore.utils import determine_content_length
from s3transfer.exceptions import RetriesExceededError
from s3transfer.futures import TransferFuture
from s3transfer.manager import TransferManager
from s3transfer.subscribers import BaseSubscriber
from urllib3.exceptions import HTTPError

from hf_spot.errors import (
    AccessDenied,
    BucketNotFound,
    ConfigError,
    ObjectNotFound,
    SpotError,
    StoreError,
    StoreNotFencing,
    StoreUnavailable,
)
from hf_spot.storage.keys import check_key, check_prefix
from hf_spot.storage.s3_settings import KMS_KEY_VARIABLE, OWNER_VARIABLE, encryption, owner, parse
from hf_spot.storage.store import ObjectInfo, Progress
from hf_spot.storage.threads import Workers

_PART_BYTES = 64 << 20
_CONNECTIONS = 16  # for all transfers of one store together; downloads buffer at most 100 MB
_READS = 3  # of an answer that breaks
_DELETE_BATCH = 1000  # S3's limit
_CONFLICT_WAITS_S = (0.1, 0.3, 1.0)
_TRIES = 5
_SILENCE_S = 30.0  # without a byte: then a connection counts as dead
# The first tries of a small request end sooner: most silences are one dead connection, and a commit has a deadline. Later
# ones are patient, because a server may be slow.
_FIRST_SILENCES_S = (5.0, 10.0, 20.0)
_QUICK_REQUESTS = ("PutObject", "HeadObject", "ListObjectsV2", "DeleteObject", "CreateMultipartUpload")
_QUICK_BYTES = 128 << 10  # more may lie in a slow line's buffer for a while after it was sent
_SIGNED_BY = "hf_spot_signed_by"  # in the context of a request: an access key's id

_reads_small = ContextVar("reads_small", default=False)  # set by `get`: a file's download is a GetObject, too

T = TypeVar("T")

_PERMISSIONS = {
    "read": "s3:GetObject",
    "write": "s3:PutObject",
    "list": "s3:ListBucket",
    "delete": "s3:DeleteObject",
    "list unfinished uploads of": "s3:ListBucketMultipartUploads",
    "abort an upload of": "s3:AbortMultipartUpload",
}


class S3Store:
    """An `ObjectStore` in a bucket. Nothing is asked before the first call; usable from threads and after a fork.

    Trouble with the store raises children of StoreError, settings that can't be used ConfigError; trouble with the
    caller's own file in `put_file` and `get_file` is the OSError that it is.

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
        self._connections: dict[int, _Connection] = {}  # by process id: sockets and threads don't survive a fork
        self._locks: dict[int, threading.Lock] = {}  # likewise: a lock may be held by a thread that was not forked

    @property
    def url(self) -> str:
        """Bucket and prefix, without a slash at the end."""
        return f"s3://{self._bucket}/{self._base}".rstrip("/")

    def get(self, key: str) -> bytes:
        """GetObject."""
        target = self._target(key)
        with self._explained("read", key):
            reads_small = _reads_small.set(True)
            try:
                body: bytes = _again_if_broken(lambda: self._client.get_object(**target)["Body"].read())
                return body
            finally:
                _reads_small.reset(reads_small)

    def put(self, key: str, data: bytes) -> None:
        """PutObject."""
        target = self._target(key)
        with self._explained("write", key):
            self._client.put_object(Body=data, **target, **self._encryption)

    def create(self, key: str, data: bytes) -> bool:
        """PutObject with ``If-None-Match: *``. Raises StoreNotFencing when the server refuses that header."""
        target = self._target(key)
        for wait_s in (*_CONFLICT_WAITS_S, None):
            with self._explained("write", key):
                try:
                    self._client.put_object(Body=data, IfNoneMatch="*", **target, **self._encryption)
                    return True
                except aws.ClientError as error:
                    code = _code(error)
                    if code in ("PreconditionFailed", "412"):
                        return False
                    if code in ("NotImplemented", "501"):
                        raise StoreNotFencing(
                            f"{self.url} refuses create-if-absent (If-None-Match), so it can't keep two machines apart",
                            hint="another store, or a newer version of its server",
                        ) from error
                    # Another create of this key is just being decided: S3 asks to try again.
                    if code != "ConditionalRequestConflict" or wait_s is None:
                        raise
            time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """One PutObject, or parts of 64 MB several at a time; a failed or cancelled upload leaves no parts behind."""
        target = self._target(key)
        watch = _Watch(progress)
        with self._explained("write", key):
            connection = self._connection
            extra = {**self._owner, **self._encryption, **connection.checksum}
            future = connection.transfers.upload(
                str(path), target["Bucket"], target["Key"], extra_args=extra, subscribers=[watch]
            )
            watch.outcome(future)

    def get_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Parts of 64 MB several at a time, into a file beside ``path`` that is renamed when whole."""
        target = self._target(key)
        watch = _Watch(progress)
        with self._explained("read", key):

            def fetch() -> None:
                future = self._connection.transfers.download(
                    target["Bucket"], target["Key"], str(path), extra_args=dict(self._owner), subscribers=[watch]
                )
                watch.outcome(future)

            try:
                _again_if_broken(fetch)
            except aws.ClientError as error:
                if not _code(error).isdigit():
                    raise
                # The transfer begins with HEAD, whose errors are a bare status: ask again in a way that has an answer.
                self._client.get_object(Range="bytes=0-0", **target)["Body"].close()
                fetch()  # the answer may have been that the credentials had to be renewed

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        """ListObjectsV2, a page of at most 1000 keys at a time."""
        begin = {"StartAfter": self._base + start_after} if start_after else {}
        query = {"Bucket": self._bucket, "Prefix": self._base + check_prefix(prefix), **begin, **self._owner}
        with self._explained("list", prefix):
            pages = iter(self._client.get_paginator("list_objects_v2").paginate(**query))
        while True:
            with self._explained("list", prefix):
                page = next(pages, None)
            if page is None:
                return
            for found in page.get("Contents", ()):
                key = found["Key"][len(self._base) :]
                if key and not key.endswith("/"):  # consoles make such objects to show a folder
                    yield ObjectInfo(key, found["Size"])

    def delete(self, keys: Iterable[str]) -> None:
        """DeleteObjects, 1000 at a time; one by one where the server doesn't know that."""
        names = (self._base + check_key(key) for key in keys)
        while batch := [*islice(names, _DELETE_BATCH)]:
            self._delete(batch)

    def abort(self, stale: Callable[[str], bool]) -> int:
        """AbortMultipartUpload for each of ListMultipartUploads; none where the server can't list them."""
        found = []
        with self._explained("list unfinished uploads of", ""):
            try:
                for page in self._client.get_paginator("list_multipart_uploads").paginate(
                    Bucket=self._bucket, Prefix=self._base, **self._owner
                ):
                    found += page.get("Uploads", ())
            except aws.ClientError as error:
                if _code(error) not in ("NotImplemented", "MethodNotAllowed", "405", "501"):
                    raise
        count = 0
        for upload in found:
            key = upload["Key"][len(self._base) :]
            if stale(key):
                with self._explained("abort an upload of", key):
                    self._abort(upload["Key"], upload["UploadId"])
                count += 1
        return count

    def _abort(self, name: str, upload_id: str) -> None:
        try:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload_id, **self._owner)
        except aws.ClientError as error:
            if _code(error) not in ("NoSuchUpload", "404"):  # its writer has aborted it
                raise

    def _delete(self, names: Sequence[str]) -> None:
        if self._batched_deletes:
            request = {"Objects": [{"Key": name} for name in names], "Quiet": True}
            with self._explained("delete", names[0][len(self._base) :]):
                try:
                    answer = self._client.delete_objects(Bucket=self._bucket, Delete=request, **self._owner)
                except aws.ClientError as error:
                    if _code(error) not in ("NotImplemented", "MethodNotAllowed", "MissingContentMD5", "405", "501"):
                        raise
                    self._batched_deletes = False  # Google's S3 interface, for one
            if self._batched_deletes:
                for trouble in answer.get("Errors", ()):
                    if trouble.get("Code") not in ("NoSuchKey", "404"):
                        failed = trouble.get("Key", names[0])[len(self._base) :]
                        raise self._explain_answer("delete", failed, aws.ClientError({"Error": trouble}, "DeleteObjects"))
                return
        for name in names:
            with self._explained("delete", name[len(self._base) :]):
                try:
                    self._client.delete_object(Bucket=self._bucket, Key=name, **self._owner)
                except aws.ClientError as error:
                    if _code(error) not in ("NoSuchKey", "404"):
                        raise

    # -- connection ---------------------------------------------------------------------------------------------------

    @property
    def _connection(self) -> _Connection:
        process = os.getpid()
        if process not in self._connections:
            with self._locks.setdefault(process, threading.Lock()):
                if process not in self._connections:
                    self._connections[process] = _Connection()
        return self._connections[process]

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
        except aws.ClientError as error:
            raise self._explain_answer(doing, key, error) from error
        except (aws.BotoCoreError, HTTPError, RetriesExceededError) as error:
            raise self._explain_silence(doing, key, error) from error
        except RecursionError as error:
            # botocore asks where a redirecting bucket is, is redirected, asks where that is, and so on.
            raise ConfigError(
                f"can't {doing} s3://{self._bucket}/{self._base}{key}: the server redirects without saying where to",
                hint=f"has AWS_ENDPOINT_URL to begin with https://? Otherwise {self._find_region}",
            ) from error

    def _explain_answer(self, doing: str, key: str, error: aws.ClientError) -> SpotError:
        """What the server said no to; by its code, because texts differ between servers."""
        code = _code(error)
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        what = f"can't {doing} s3://{self._bucket}/{self._base}{key}: {code}"
        if doing == "read" and code in ("NoSuchKey", "404"):
            return ObjectNotFound(f"s3://{self._bucket}/{self._base}{key} does not exist")
        if code in ("NoSuchBucket", "404"):
            return BucketNotFound(
                f"the bucket {self._bucket} does not exist", hint=f"check its name, or: aws s3 mb s3://{self._bucket}"
            )
        if code in ("AccessDenied", "403", "AllAccessDisabled", "UnauthorizedAccess"):
            return AccessDenied(what, hint=self._permission(doing))
        if code in _CREDENTIALS:
            self._ask_for_credentials_again()
            return AccessDenied(what, hint=_CREDENTIALS[code])
        if code in _ELSEWHERE:
            return ConfigError(what, hint=self._elsewhere(error))
        if code in _CONFIGURATION:
            return ConfigError(what, hint=_CONFIGURATION[code])
        if code.startswith("KMS."):
            key_name = f"the bucket's KMS key, or ${KMS_KEY_VARIABLE}"
            return AccessDenied(what, hint=f"{key_name}: is it enabled, in this region, and allowed to you?")
        if code in _BUSY or (code.isdigit() and int(code) >= 500) or status >= 500 or status == 429:
            return StoreUnavailable(what, hint="the store is busy or in trouble; the same call should work later")
        if code == "InvalidObjectState":
            return StoreError(what, hint="a lifecycle rule has archived the object: aws s3api restore-object")
        return StoreError(f"{what}: {error.response.get('Error', {}).get('Message', '')}".rstrip(": "))

    def _explain_silence(self, doing: str, key: str, error: Exception) -> SpotError:
        """Trouble before or instead of an answer: settings, credentials, network."""
        what = f"can't {doing} s3://{self._bucket}/{self._base}{key}: {error}"
        if isinstance(error, _LACKING):
            self._ask_for_credentials_again()
        if isinstance(error, (aws.NoCredentialsError, aws.PartialCredentialsError)):
            return AccessDenied(
                what,
                hint="aws configure; on EC2 attach an instance profile, and for a container raise the metadata hop "
                "limit: aws ec2 modify-instance-metadata-options --http-put-response-hop-limit 2 --instance-id ...",
            )
        if isinstance(error, (aws.SSOError, aws.TokenRetrievalError)):
            return AccessDenied(what, hint="aws sso login")
        if isinstance(error, (aws.CredentialRetrievalError, aws.MetadataRetrievalError)):
            return StoreUnavailable(what, hint="the source of the credentials fails: aws sts get-caller-identity")
        if isinstance(error, aws.NoRegionError):
            return ConfigError(what, hint="export AWS_REGION=us-east-1, the region of the bucket")
        if isinstance(error, aws.SSLError):
            return StoreUnavailable(what, hint="for a certificate of your own: export AWS_CA_BUNDLE=/path/to/ca.pem")
        if isinstance(error, _NETWORK):
            where = urlsplit(self._client.meta.endpoint_url).netloc
            return StoreUnavailable(
                what,
                hint=f"does this machine reach {where} (route, VPC endpoint, security group, proxy, AWS_ENDPOINT_URL)?",
            )
        return ConfigError(what, hint="aws configure list")

    def _ask_for_credentials_again(self) -> None:
        """The next call reads files and asks processes anew: somebody may log in while a training goes on."""
        self._connections.pop(os.getpid(), None)

    @property
    def _find_region(self) -> str:
        return f"set AWS_REGION to the answer of: aws s3api get-bucket-location --bucket {self._bucket}"

    def _permission(self, doing: str) -> str:
        bucket = f"arn:{self._client.meta.partition}:s3:::{self._bucket}"
        resource = bucket if doing.startswith("list") else f"{bucket}/{self._base}*"
        hint = f"allow {_PERMISSIONS[doing]} on {resource} for the role or user of: aws sts get-caller-identity"
        if doing == "read":
            hint += f" (without s3:ListBucket on {bucket}, S3 answers so for objects that don't exist, too)"
        if self._encryption and doing in ("read", "write"):
            hint += f"; and kms:GenerateDataKey and kms:Decrypt on the key of ${KMS_KEY_VARIABLE}"
        if self._owner:
            hint += f"; or the bucket is not of the account in ${OWNER_VARIABLE}"
        return hint

    def _elsewhere(self, error: aws.ClientError) -> str:
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        details: Any = error.response.get("Error", {})
        region = headers.get("x-amz-bucket-region") or details.get("Region")
        if region:
            return f"the bucket is in {region}: export AWS_REGION={region}"
        return self._find_region


_CREDENTIALS = {
    "InvalidAccessKeyId": "this access key is not known there: aws configure list; is AWS_ENDPOINT_URL the right one?",
    "SignatureDoesNotMatch": "the secret key does not fit the access key: aws configure",
    "ExpiredToken": "the session's credentials have expired: aws sso login, or new ones in AWS_SESSION_TOKEN",
    "ExpiredTokenException": "the session's credentials have expired: aws sso login, or new ones in AWS_SESSION_TOKEN",
    "TokenRefreshRequired": "the session's credentials have expired: aws sso login, or new ones in AWS_SESSION_TOKEN",
    "InvalidToken": "AWS_SESSION_TOKEN does not belong to this access key: unset it, or set all three anew",
    "InvalidSecurity": "these credentials are not valid: aws configure list",
    "NotSignedUp": "this account is not signed up for S3",
    "AccountProblem": "AWS has a problem with this account, often an unpaid bill: see the console",
    "RequestTimeTooSkewed": "this machine's clock is wrong: timedatectl; sudo chronyc makestep",
    "RequestExpired": "this machine's clock is wrong: timedatectl; sudo chronyc makestep",
}
_REFUSALS = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "InvalidAccessKeyId")
_LACKING = (aws.NoCredentialsError, aws.PartialCredentialsError, aws.SSOError, aws.TokenRetrievalError)
_ELSEWHERE = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301", "307")
_CONFIGURATION = {
    "InvalidBucketName": "s3://bucket/prefix, where bucket is an existing bucket's name",
    "EntityTooLarge": "an object may have 5 TB at most, on some servers less: save sharded",
    "KeyTooLongError": "a shorter prefix in --store",
    "InvalidRequest": "is the server's S3 too old? Try: export AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
    "InvalidStorageClass": "a storage class that this server knows",
}
_NETWORK = (
    aws.ConnectionError,
    aws.HTTPClientError,
    aws.IncompleteReadError,
    aws.ChecksumError,
    aws.FlexibleChecksumError,
    RetriesExceededError,
    HTTPError,
)
# No timeouts: botocore has waited for those often enough.
_BROKEN = (aws.IncompleteReadError, aws.FlexibleChecksumError, aws.ResponseStreamingError)
_BUSY = (
    "SlowDown",
    "ServiceUnavailable",
    "InternalError",
    "RequestLimitExceeded",
    "RequestTimeout",
    "ThrottlingException",
    "Throttling",
    "TooManyRequestsException",
    "BadDigest",  # damaged on the way
    "XAmzContentChecksumMismatch",
    "IncompleteBody",
    "OperationAborted",
    "ConditionalRequestConflict",
    "NoSuchUpload",  # aborted by a lifecycle rule or another process: a new upload may pass
    "PreconditionFailed",  # replaced while it was downloaded
    "412",
)


class _Connection:
    """What one process holds open: a client, and the threads that move parts of files."""

    def __init__(self) -> None:
        core = botocore.session.get_session()
        credentials = _Credentials(core)
        core.register_component("credential_provider", credentials)
        session = boto3.Session(botocore_session=core)
        self.client = _client(session, {})
        host = urlsplit(self.client.meta.endpoint_url).hostname or ""
        chosen = (core.get_scoped_config().get("s3") or {}).get("addressing_style")
        if not chosen and not host.endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws")):
            # Servers other than Amazon's seldom have a name per bucket in DNS.
            self.client = _client(session, {"addressing_style": "path"})
        # Raised before the retries see it: a cancelled upload would otherwise be tried five times.
        self.client.meta.events.register_first("needs-retry.s3", _end_if_cancelled)
        self.client.meta.events.register_first("needs-retry.s3", credentials.renew_if_refused)
        self.client.meta.events.register("request-created.s3", _limit_silence)
        self.client.meta.events.register_last("request-created.s3", credentials.note_signer)
        config: Any = TransferConfig(
            multipart_threshold=_PART_BYTES,
            multipart_chunksize=_PART_BYTES,
            max_concurrency=_CONNECTIONS,
            io_chunksize=1 << 20,
        )
        # boto3 may choose another manager, which takes far more memory and keeps a process from ending.
        threads: Any = Workers
        self.transfers: Any = TransferManager(self.client, config, executor_cls=threads)
        wanted = self.client.meta.config.request_checksum_calculation != "when_required"
        fast = wanted and importlib.util.find_spec("awscrt") is not None
        self.checksum = {"ChecksumAlgorithm": "CRC64NVME"} if fast else {}


def _client(session: boto3.Session, s3: Any) -> Any:
    config = Config(
        retries={"mode": "standard", "total_max_attempts": _TRIES},
        connect_timeout=5,
        read_timeout=_SILENCE_S,
        tcp_keepalive=True,
        max_pool_connections=2 * _CONNECTIONS,
        user_agent_extra="hf_spot",
        s3=s3 or None,
    )
    try:
        return session.client("s3", config=config)
    except ValueError as error:
        raise ConfigError(str(error), hint="AWS_ENDPOINT_URL=https://host:port, AWS_REGION=us-east-1") from error


class _Credentials:
    """What boto3 finds, and asks for anew when a server refuses it: a session may be revoked before its time, and somebody
    may write new keys into a file. An upload under way then goes on with the part that was refused.

    Args:
        session: knows where to look.
    """

    def __init__(self, session: Any) -> None:
        self._first: Any = session.get_component("credential_provider")
        self._held: Any = None
        self._lock = threading.Lock()

    def load_credentials(self) -> _Credentials | None:
        """Called by botocore, which signs each request with what `get_frozen_credentials` gives then."""
        self._held = self._first.load_credentials()
        return None if self._held is None else self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._held, name)

    def note_signer(self, request: Any, **kwargs: Any) -> None:
        """Called by botocore when it has signed a request."""
        signed = re.search(r"Credential=([^/]+)/", str(request.headers.get("Authorization", "")))
        request.context[_SIGNED_BY] = signed[1] if signed else ""

    def renew_if_refused(self, request_dict: Any, response: Any = None, attempts: int = 1, **kwargs: Any) -> float | None:
        """Called by botocore after each request: seconds until it is sent again, or None."""
        code = "" if response is None else response[1].get("Error", {}).get("Code", "")
        refused = request_dict["context"].get(_SIGNED_BY)
        return 0.0 if code in _REFUSALS and attempts < _TRIES and refused and self._has_others(refused) else None

    def _has_others(self, refused: str) -> bool:
        with self._lock:
            if self._held.get_frozen_credentials().access_key == refused:  # else another thread has asked already
                found = botocore.session.get_session().get_credentials()
                if found is None or found.get_frozen_credentials().access_key == refused:
                    return False
                self._held = found
            return True


class _Watch(BaseSubscriber):
    """Passes progress on, and turns its exception into a cancelled transfer."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._error: BaseException | None = None

    def on_progress(self, future: TransferFuture, bytes_transferred: int, **kwargs: Any) -> None:
        if self._progress is None or self._error is not None:
            return
        try:
            self._progress(bytes_transferred)
        except BaseException as error:
            # Out of here it would count as a broken connection, and be retried.
            self._error = error
            future.cancel()

    def outcome(self, future: TransferFuture) -> None:
        """Waits for the end. Raises what `progress` raised, or what went wrong."""
        try:
            future.result()
        finally:
            if self._error is not None:
                raise self._error


def _end_if_cancelled(caught_exception: Exception | None = None, **kwargs: Any) -> None:
    if not isinstance(caught_exception, aws.HTTPClientError):
        return
    # Reading the body raised it, because another part has failed or the whole was cancelled: no broken connection.
    if isinstance(caught_exception.kwargs.get("error"), (CancelledError, aws.ClientError, aws.BotoCoreError)):
        raise caught_exception


def _limit_silence(request: Any, operation_name: str, **kwargs: Any) -> None:
    """Called by botocore before each try. An older one doesn't know the setting, and waits for `_SILENCE_S`."""
    attempt = request.context.get("retries", {}).get("attempt", 1)
    size = request.headers.get("X-Amz-Decoded-Content-Length") or determine_content_length(request.data or b"")
    small = size is not None and int(size) <= _QUICK_BYTES and (operation_name in _QUICK_REQUESTS or _reads_small.get())
    quick = small and attempt <= len(_FIRST_SILENCES_S)
    request.context["read_timeout"] = _FIRST_SILENCES_S[attempt - 1] if quick else _SILENCE_S


def _again_if_broken(read: Callable[[], T]) -> T:
    """botocore repeats a request, but not the reading of an answer that breaks off or was damaged on the way."""
    for _ in range(_READS - 1):
        with contextlib.suppress(*_BROKEN):
            return read()
    return read()


def _code(error: aws.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
