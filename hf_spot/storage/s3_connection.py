"""One process's connection to S3: a boto3 client, its credentials, and the threads that move parts of files."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, UnknownCredentialError
from botocore.utils import determine_content_length

from hf_spot.aws_errors import region_of
from hf_spot.errors import ConfigError
from hf_spot.storage.credential_source import SourceFailed, credential_source, passed_on
from hf_spot.storage.s3_parts import Transfers, small_sums
from hf_spot.storage.s3_small import SmallRequests

# For all transfers of one store together. One connection to S3 carries less than 100 MB/s; large machines have faster networks.
_CONNECTIONS = min(64, max(16, os.cpu_count() or 1))
_TRIES = 5
_MOST_REDIRECTS = 2  # of the question where a bucket is
_SILENCE_S = 30.0  # after this long without a byte a connection counts as dead
# The first tries of a small request time out sooner: the cause is mostly one dead connection, and a commit has a deadline.
# Later tries wait longer, because a server may be slow.
_FIRST_SILENCES_S = (5.0, 10.0, 20.0)
_QUICK_REQUESTS = ("PutObject", "HeadObject", "ListObjectsV2", "DeleteObject", "CreateMultipartUpload")
_QUICK_BYTES = 128 << 10  # more may wait in the send buffer of a slow network for a while
_SIGNED_BY = "hf_spot_signed_by"  # key in the context of a request, for the id of an access key
_REFUSALS = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "InvalidAccessKeyId")

reads_small = ContextVar(
    "reads_small", default=False
)  # set by `S3Store.get`, because the download of a file is a GetObject, too
_silence_s = ContextVar("silence_s", default=_SILENCE_S)  # for the try that this thread is about to make


class Connection:
    """The client of one process, and the threads that move parts of files."""

    def __init__(self) -> None:
        core = botocore.session.get_session()
        if (region := region_of(os.environ)) is not None:
            core.set_config_variable("region", region)
        credentials = _Credentials(core)
        core.register_component("credential_provider", credentials)
        session = boto3.Session(botocore_session=core)
        self.client = _client(session, {})
        host = urlsplit(self.client.meta.endpoint_url).hostname or ""
        chosen = (core.get_scoped_config().get("s3") or {}).get("addressing_style")
        # Other servers than Amazon's rarely have a host name for each bucket.
        named = host.endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws"))
        style = {} if chosen or named else {"addressing_style": "path"}
        if style:
            self.client = _client(session, style)
        bulk = _client(session, {**style, "payload_signing_enabled": False})
        for client in (self.client, bulk):
            client.meta.events.register_first("needs-retry.s3", credentials.renew_if_refused)
            client.meta.events.register("request-created.s3", _limit_silence)
            client.meta.events.register_last("request-created.s3", credentials.note_signer)
            _Redirects(client)
        by_silence = _HttpSessions(lambda silence_s: _client(session, style, silence_s))
        for client in (self.client, bulk):
            if _has_http_session(client):  # otherwise each try waits for `_SILENCE_S`, as training/upstream says
                client._endpoint.http_session = by_silence
        self.transfers = Transfers(self.client, bulk, connections=_CONNECTIONS)

        def send(request: Any) -> Any:
            _silence_s.set(_FIRST_SILENCES_S[0])
            return by_silence.send(request)

        self.small = SmallRequests((self.client, bulk), credentials.get_frozen_credentials, send, small_sums())


def endpoint_of_others(environ: Mapping[str, str]) -> str | None:
    """Return the endpoint of a server that is not Amazon's, or None. It is found as boto3 does: in the environment or in the
    AWS config file.

    Args:
        environ: if it is not this process's own environment, only its variables are used.

    Raises:
        ConfigError: the config file can't be used.
    """
    if environ is not os.environ:
        if environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
            return None
        return environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or None
    try:
        # With keys given, boto3 does not look for others: the credentials of this machine do not matter here.
        found: str = boto3.Session().client("s3", aws_access_key_id="-", aws_secret_access_key="-").meta.endpoint_url
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"the settings of S3 can't be read: {error}", hint="aws configure list") from error
    host = urlsplit(found).hostname or ""
    return None if host.endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws")) else found


def _client(session: boto3.Session, s3: Any, silence_s: float = _SILENCE_S) -> Any:
    config = Config(
        retries={"mode": "standard", "total_max_attempts": _TRIES},
        connect_timeout=5,
        read_timeout=silence_s,
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
    """The credentials that boto3 finds. When a server refuses them, they are looked up again: a session may be revoked early,
    and the user may write new keys into a file. An upload under way then continues with the refused part.

    Args:
        session: botocore's, which finds the credentials.
    """

    def __init__(self, session: Any) -> None:
        self._first: Any = session.get_component("credential_provider")
        if not _has_terminal():
            self._ask_nobody()
        self._held: Any = None
        self._lock = threading.Lock()

    def load_credentials(self) -> _Credentials | None:
        """Find credentials. botocore calls this, and signs each request with the result of ``get_frozen_credentials``."""
        with credential_source():
            self._held = self._first.load_credentials()
        return None if self._held is None else self

    def _ask_nobody(self) -> None:
        """Make botocore raise at once instead of prompting for an MFA code, which nobody could type."""

        def refuse(prompt: str) -> str:
            raise EOFError(prompt.rstrip(": "))

        with contextlib.suppress(UnknownCredentialError):
            self._first.get_provider("assume-role")._prompter = refuse

    def get_frozen_credentials(self) -> Any:
        """Return the credentials for a signature. This may call a service or run a program. Raises SourceFailed."""
        with credential_source():
            return self._held.get_frozen_credentials()

    def __getattr__(self, name: str) -> Any:
        try:
            with credential_source():
                return getattr(self._held, name)
        except SourceFailed as failed:
            passed_on(failed, AttributeError)  # botocore checks which attributes exist
            raise

    def note_signer(self, request: Any, **kwargs: Any) -> None:
        """Record which key signed a request. botocore calls this after signing."""
        signed = re.search(r"Credential=([^/]+)/", str(request.headers.get("Authorization", "")))
        request.context[_SIGNED_BY] = signed[1] if signed else ""

    def renew_if_refused(self, request_dict: Any, response: Any = None, attempts: int = 1, **kwargs: Any) -> float | None:
        """Return the seconds until a request is sent again, or None. botocore calls this after each request."""
        code = "" if response is None else response[1].get("Error", {}).get("Code", "")
        refused = request_dict["context"].get(_SIGNED_BY)
        return 0.0 if code in _REFUSALS and attempts < _TRIES and refused and self._has_others(refused) else None

    def _has_others(self, refused: str) -> bool:
        with self._lock:
            if self._held.get_frozen_credentials().access_key == refused:  # otherwise another thread has already renewed them
                try:
                    with credential_source():
                        found = botocore.session.get_session().get_credentials()
                        fresh = None if found is None else found.get_frozen_credentials().access_key
                except SourceFailed:  # the server's refusal is the better message
                    return False
                if fresh in (None, refused):
                    return False
                self._held = found
            return True


class RedirectsInCircles(BotoCoreError):
    """The server answers the question where the bucket is with a redirect to nowhere."""

    fmt = "the server redirects without saying where to"


class _Redirects:
    """Ends a circle: botocore asks where a redirecting bucket is, is redirected again, asks again, and so on.

    Args:
        client: asked by one thread or several.
    """

    def __init__(self, client: Any) -> None:
        self._thread = threading.local()  # within: questions that this thread has not had an answer to yet
        events = client.meta.events
        events.register_last("before-call.s3.HeadBucket", self._asks)
        events.register("after-call.s3.HeadBucket", self._answered)
        events.register("after-call-error.s3.HeadBucket", self._answered)

    def _asks(self, **kwargs: Any) -> None:
        within = getattr(self._thread, "within", 0)
        if within == _MOST_REDIRECTS:
            raise RedirectsInCircles
        self._thread.within = within + 1

    def _answered(self, **kwargs: Any) -> None:
        self._thread.within -= 1


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
        return True
    except OSError:
        return sys.stdin is not None and sys.stdin.isatty()


def _limit_silence(request: Any, operation_name: str, **kwargs: Any) -> None:
    """Set the timeout of a try. botocore calls this before each one."""
    attempt = request.context.get("retries", {}).get("attempt", 1)
    size = request.headers.get("X-Amz-Decoded-Content-Length") or determine_content_length(request.data or b"")
    small = size is not None and int(size) <= _QUICK_BYTES and (operation_name in _QUICK_REQUESTS or reads_small.get())
    quick = small and attempt <= len(_FIRST_SILENCES_S)
    _silence_s.set(_FIRST_SILENCES_S[attempt - 1] if quick else _SILENCE_S)


def _has_http_session(client: Any) -> bool:
    return hasattr(getattr(client, "_endpoint", None), "http_session")


class _HttpSessions:
    """A replacement for the HTTP session of botocore's clients that sends each try through a session with its own timeout.

    A botocore session has one timeout for all requests (since 1.43.68 also one for each, but older versions must work, too).
    The sessions here belong to clients that differ only in the timeout: proxies, certificates and the number of connections are
    as configured.

    Args:
        client: makes a client with a timeout in seconds.
    """

    def __init__(self, client: Callable[[float], Any]) -> None:
        self._client = client
        self._clients: dict[float, Any] = {}
        self._lock = threading.Lock()

    def send(self, request: Any) -> Any:
        """Send a request. botocore calls this after `_limit_silence`, in the same thread."""
        silence_s = _silence_s.get()
        with self._lock:  # creating a client is not thread-safe
            if silence_s not in self._clients:
                self._clients[silence_s] = self._client(silence_s)
        return self._clients[silence_s]._endpoint.http_session.send(request)

    def close(self) -> None:
        """Close all clients. botocore calls this when a client is closed."""
        for client in self._clients.values():
            client.close()
