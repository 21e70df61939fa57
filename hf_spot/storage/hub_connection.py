"""Communicate with the Hugging Face Hub: requests to its API, and the bytes of files by Xet.

huggingface_hub handles login, endpoint and offline mode: ``hf auth login``, ``HF_TOKEN``, ``HF_ENDPOINT`` and
``HF_HUB_OFFLINE`` work. Requests are made here and not by `HfApi`, because it has no settings for two things: a timeout, which
a machine that is being taken away needs, and progress that can cancel an upload.

The API: https://huggingface.co/docs/hub/api. Xet: https://huggingface.co/docs/xet.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from huggingface_hub import HfApi, ModelCard, ModelCardData, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

from hf_spot.errors import AccessDenied, BucketNotFound, ConfigError, ObjectNotFound, SpotError, StoreError, StoreUnavailable
from hf_spot.storage.credential_source import SourceFailed, credential_source, passed_on
from hf_spot.storage.per_process import PerProcess

try:
    import hf_xet
except ImportError:  # there is no wheel for this processor
    hf_xet = None

_SILENCE_S = 30.0  # without an answer
_WAITS_S = (0.3, 1.0, 3.0)  # before a failed request is sent again
_PATIENCE_S = 10.0  # if the Hub asks for a longer wait, the caller must repeat the request
_BUSY = (500, 502, 503, 504)
_ASKED_TO_WAIT = re.compile(r"\bt=(\d+)")  # in the header RateLimit: "api";r=0;t=55

log_in = "hf auth login, or export HF_TOKEN=…"


@dataclass(frozen=True)
class HubFile:
    """A file on the Hub: ``path`` from the root of the repository or bucket, ``size`` in bytes, and the hashes that identify
    its content in Xet and in Git LFS, or None."""

    path: str
    size: int
    xet_hash: str | None = None
    sha256: str | None = None


class Hub:
    """A repository or a bucket on the Hub.

    Args:
        kind: ``model``, ``dataset`` or ``bucket``.
        id: ``owner/name``.
        revision: a branch; buckets have none.
    """

    def __init__(self, kind: str, id: str, revision: str = "main") -> None:
        self.kind = kind
        self.id = id
        self.revision = revision
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self.api = f"{self.endpoint}/api/{kind}s/{id}"
        if hf_xet is None or not hasattr(hf_xet, "XetSession") or not hasattr(HfApi, "batch_bucket_files"):
            raise ConfigError(
                f"hf://{self.shown}: this huggingface_hub can't upload by Xet", hint="pip install --upgrade huggingface_hub"
            )
        self._sessions: PerProcess[Any] = PerProcess(hf_xet.XetSession)

    @property
    def shown(self) -> str:
        """Return the name as it appears in a URL after ``hf://``."""
        place = {"model": "", "dataset": "datasets/", "bucket": "buckets/"}[self.kind]
        return f"{place}{self.id}" + ("" if self.revision == "main" else f"@{self.revision}")

    @property
    def at_revision(self) -> str:
        """Return the end of an API path that names the branch."""
        return "" if self.kind == "bucket" else f"/{quote(self.revision, safe='')}"

    def resolve(self, path: str) -> str:
        """Return the URL of a file's bytes."""
        place = {"model": "", "dataset": "datasets/", "bucket": "buckets/"}[self.kind]
        return f"{self.endpoint}/{place}{self.id}/resolve{self.at_revision}/{quote(path)}"

    # -- requests -----------------------------------------------------------------------------------------------------

    def ask(self, method: str, url: str, *, doing: str, key: str = "", accept: Iterable[int] = (), **request: Any) -> Any:
        """Send a request and return the answer. The request is sent again after errors that may be temporary.

        Args:
            method: the HTTP method.
            url: the full URL.
            doing: what the request is for, for the error message.
            key: the object that it concerns, for the error message.
            accept: error status codes whose answers are returned, too.
            request: further arguments of httpx.

        Raises:
            SpotError: the Hub refused, or did not answer.
        """
        with self.explained(doing, key):
            headers = {**self.headers(), **request.pop("headers", {})}
        for wait_s in (*_WAITS_S, None):
            with self.explained(doing, key):
                try:
                    answer = get_session().request(method, url, headers=headers, timeout=_SILENCE_S, **request)
                except network_trouble():
                    if wait_s is None:
                        raise
                    time.sleep(wait_s)
                    continue
                wished_s = _wished_wait_s(answer) if answer.status_code == 429 else None
                later_s = wait_s if answer.status_code in _BUSY else wished_s
                if wait_s is not None and later_s is not None and later_s <= _PATIENCE_S:
                    time.sleep(later_s)
                    continue
                if answer.status_code not in accept:
                    hf_raise_for_status(answer)
                return answer
        raise AssertionError("the last try returns or raises")

    def pages(self, url: str, **request: Any) -> Iterator[list[dict[str, Any]]]:
        """Yield the pages of a listing, following the header Link; none if there is no such folder."""
        next_url: str | None = url
        while next_url:
            try:
                answer = self.ask("GET", next_url, **request)
            except ObjectNotFound:
                return
            yield answer.json()
            next_url = answer.links.get("next", {}).get("url")
            request.pop("params", None)  # the next page's URL contains them

    def create(self, *, private: bool) -> None:
        """Create the repository if it does not exist."""
        with self.explained("create", ""):
            api = HfApi(endpoint=self.endpoint, library_name="hf_spot")
            api.create_repo(self.id, repo_type=self.kind, private=private, exist_ok=True)

    def headers(self) -> dict[str, str]:
        """Return the headers of a request. The token is looked up each time, because the user may log in during a training."""
        try:
            with credential_source():  # the token may be in a file
                headers: dict[str, str] = build_hf_headers(library_name="hf_spot")
                return headers
        except SourceFailed as failed:
            passed_on(failed, LocalTokenNotFoundError)
            raise

    def about(self, paths: Iterable[str], *, doing: str) -> dict[str, HubFile]:
        """Return the files among ``paths``."""
        wanted = {"paths": [*paths]}
        if self.kind == "bucket":
            answer = self.ask("POST", f"{self.api}/paths-info", json=wanted, doing=doing, key=wanted["paths"][0])
        else:
            url = f"{self.api}/paths-info{self.at_revision}"
            answer = self.ask("POST", url, data={**wanted, "expand": False}, doing=doing, key=wanted["paths"][0])
        return {told["path"]: hub_file(told) for told in answer.json() if told["type"] == "file"}

    # -- bytes --------------------------------------------------------------------------------------------------------

    def send(self, blocks: Iterable[memoryview], key: str, *, sha256: bool) -> HubFile:
        """Upload bytes to Xet. They belong to no file yet. An exception from ``blocks`` ends the upload and is raised."""
        with self._xet_trouble("write", key):
            commit = self._xet.new_upload_commit(**self._way_to_bytes("write", key))
            stream = commit.start_upload_stream(sha256=hf_xet.COMPUTE_SHA256 if sha256 else hf_xet.SKIP_SHA256)
        try:
            for block in blocks:
                with self._xet_trouble("write", key):
                    stream.write(bytes(block))
            with self._xet_trouble("write", key):
                info = stream.finish().xet_info
                commit.wait_to_finish()
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to report
                stream.abort()
                commit.abort()
            raise
        return HubFile(key, info.file_size, info.hash, info.sha256)

    def fetch(self, file: HubFile, key: str) -> Generator[bytes, None, None]:
        """Yield the bytes of a file that is in Xet, in blocks."""
        with self._xet_trouble("read", key):
            group = self._xet.new_download_stream_group(**self._way_to_bytes("read", key))
            stream = iter(group.download_stream(hf_xet.XetFileInfo(file.xet_hash, file.size)))
        try:
            while True:
                with self._xet_trouble("read", key):
                    block = next(stream, None)
                if block is None:
                    return
                yield block
        finally:
            with contextlib.suppress(Exception):
                group.abort()

    @property
    def _xet(self) -> Any:
        return self._sessions.get()

    def _way_to_bytes(self, use: str, key: str) -> dict[str, Any]:
        url = f"{self.api}/xet-{use}-token{self.at_revision}"
        told = self.ask("GET", url, doing=use, key=key).json()
        return {
            "endpoint": told["casUrl"],
            "token": told["accessToken"],
            "token_expiry_unix_secs": told["exp"],
            "token_refresh_url": url,
            "token_refresh_headers": self.headers(),
        }

    # -- errors -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def explained(self, doing: str, key: str) -> Iterator[None]:
        """Translate exceptions of huggingface_hub into a SpotError."""
        try:
            yield
        except _all_trouble() as error:
            raise self._explain(doing, key, error) from error

    @contextlib.contextmanager
    def _xet_trouble(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except SpotError:
            raise
        except Exception as error:  # Xet's exceptions have no base class of their own
            raise StoreUnavailable(f"can't {doing} hf://{self.shown}/{key}: {error}") from error

    def _explain(self, doing: str, key: str, error: Exception) -> SpotError:
        what = f"can't {doing} hf://{self.shown}/{key}".rstrip("/")
        if isinstance(error, OfflineModeIsEnabled):
            return ConfigError(f"{what}: huggingface_hub is in offline mode", hint="unset HF_HUB_OFFLINE")
        if isinstance(error, LocalTokenNotFoundError):
            return AccessDenied(f"{what}: not logged in", hint=log_in)
        if isinstance(error, SourceFailed):
            return StoreUnavailable(f"{what}: {error}", hint=error.hint or log_in)
        if not isinstance(error, HfHubHTTPError):
            return StoreUnavailable(f"{what}: {error or type(error).__name__}", hint=f"can this machine reach {self.endpoint}?")
        answer = error.response
        status, code = answer.status_code, answer.headers.get("X-Error-Code", "")
        told = error.server_message or answer.reason_phrase or str(status)
        if code == "EntryNotFound":
            return ObjectNotFound(f"hf://{self.shown}/{key} does not exist")
        if code == "RevisionNotFound":
            return BucketNotFound(
                f"{what}: there is no branch {self.revision!r}", hint=f"hf repos branch create {self.id} {self.revision}"
            )
        if isinstance(error, GatedRepoError) or status == 403:
            return AccessDenied(
                f"{what}: {told}", hint=f"a token that may {doing} there: https://huggingface.co/settings/tokens"
            )
        if status == 401 and get_token() is not None:
            return AccessDenied(f"{what}: {told}", hint=log_in)
        if status in (401, 404):  # the Hub does not reveal that something private exists
            make = "hf buckets create" if self.kind == "bucket" else f"hf repos create --type {self.kind}"
            there = f"{what}: it does not exist"
            if get_token() is None:
                return AccessDenied(f"{there}, or it is private and this machine is not logged in", hint=log_in)
            return BucketNotFound(f"{there}, or this login can't see it", hint=f"{make} --private {self.id}")
        if status == 429:
            return StoreUnavailable(
                f"{what}: the Hub asks for fewer requests: {told}",
                hint=f"wait {_wished_wait_s(answer):.0f} s, and save less often: commits to a repository are limited per hour",
            )
        if status in (408, 409, 412) or status >= 500:
            return StoreUnavailable(f"{what}: {told}")
        return StoreError(f"{what}: {told}")


def model_card(metadata: dict[str, Any], text: str) -> str:
    """Return a README.md for the Hub.

    Args:
        metadata: arguments of ``huggingface_hub.ModelCardData``.
        text: Markdown.
    """
    return str(ModelCard(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{text}"))


def hub_file(told: dict[str, Any]) -> HubFile:
    """Return the file that an item of a listing describes."""
    return HubFile(told["path"], told["size"], told.get("xetHash"), (told.get("lfs") or {}).get("oid"))


def network_trouble() -> tuple[type[Exception], ...]:
    """Return the network errors of the HTTP library that this huggingface_hub uses: httpx, or httpx2 in newer versions."""
    library = __import__(type(get_session()).__module__.partition(".")[0])
    return (library.TransportError,)


def _all_trouble() -> tuple[type[Exception], ...]:
    return (HfHubHTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError, SourceFailed, *network_trouble())


def _wished_wait_s(answer: Any) -> float:
    """Return the seconds that a 429 asks to wait; a minute if it does not say."""
    told = answer.headers.get("Retry-After", "")
    if told.isdigit():
        return float(told)
    found = _ASKED_TO_WAIT.search(answer.headers.get("RateLimit", ""))
    return float(found[1]) if found else 60.0
