"""Fixtures for every room."""

from __future__ import annotations

import signal
import uuid
from collections.abc import Iterator

import pytest

from tests.servers import SeaweedFS

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell does this to what it runs in the background; the processes that tests start would never hear a Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[SeaweedFS]:
    """A running S3 server: one for the whole session (with xdist, for each worker)."""
    with SeaweedFS() as server:
        server.make_bucket("tests")
        yield server


@pytest.fixture
def s3_url(seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh place on that server, with the environment that lets boto3 find it."""
    for name, value in seaweedfs.env().items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    return f"s3://tests/{uuid.uuid4().hex}"
