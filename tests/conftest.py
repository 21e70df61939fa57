"""Fixtures for every room."""

from __future__ import annotations

import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

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


CHECKPOINT_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "sub/.metadata")


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[[int], Path]:
    """Writes a folder that has everything a resume reads, with contents that depend on the step."""

    def make(step: int, parent: Path | None = None) -> Path:
        folder = (parent or tmp_path / "out") / f"checkpoint-{step}"
        for name in CHECKPOINT_FILES:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"{name} of step {step}".encode() * 100)
        return folder

    return make
