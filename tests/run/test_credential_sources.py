"""Sources of credentials are foreign code: what they raise, whenever they do, is told in one line and tried again."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import botocore.credentials
import google.auth.exceptions
import pytest
from botocore import exceptions as aws

from hf_spot.errors import SpotError, StoreError, StoreUnavailable
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.run import Run
from hf_spot.run.upload import Uploader
from hf_spot.storage.store import ObjectStore
from tests.launch.conftest import PLAIN
from tests.servers import SeaweedFS
from tests.waiting import PATIENCE_S, wait_for
from tests.zygote import Zygote

Make = Callable[..., Path]

RAISED: list[Exception] = [
    ValueError("not a\nvalue"),
    OSError(5, "Input/output error"),
    PermissionError(13, "Permission denied", "/run/secrets/token"),
    EOFError("Enter MFA code"),
    json.JSONDecodeError("Expecting value", "please log in", 0),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    KeyError("AccessKeyId"),
    AttributeError("'list' object has no attribute 'get'"),
    TypeError("string indices must be integers"),
    RuntimeError("the helper broke"),
    subprocess.TimeoutExpired("helper", 60),
    aws.CredentialRetrievalError(provider="custom-process", error_msg="please log in"),
    aws.NoCredentialsError(),
    aws.PartialCredentialsError(provider="env", cred_var="secret"),
    aws.RefreshWithMFAUnsupportedError(),
    aws.UnauthorizedSSOTokenError(),
    aws.InvalidConfigError(error_msg="no such source_profile"),
    aws.MetadataRetrievalError(error_msg="the agent is gone"),
    aws.ClientError({"Error": {"Code": "AccessDenied", "Message": "may not assume"}}, "AssumeRole"),
]


class Source:
    """Counts how often requests are signed, and raises at the n-th."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.at = 0
        self.error: Exception | None = None
        self.raised = 0
        plain = botocore.credentials.Credentials.get_frozen_credentials

        def give(held: botocore.credentials.Credentials) -> object:
            self.count += 1
            if self.error is not None and self.count == self.at:
                self.raised += 1
                raise self.error
            return plain(held)

        monkeypatch.setattr(botocore.credentials.Credentials, "get_frozen_credentials", give)

    def raises(self, error: Exception, at: int) -> None:
        self.count, self.at, self.error, self.raised = 0, at, error, 0


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, s3_url: str) -> Source:
    monkeypatch.setattr("hf_spot.run.upload._FIRST_RETRY_S", 0.01)
    return Source(monkeypatch)


def save(run: Run, folder: Path, pins: Path, step: int) -> bool:
    uploader = Uploader(run, pins, save_total_limit=2)
    try:
        uploader.submit(folder, CommitRequest(step=step))
        return uploader.drain(PATIENCE_S)
    finally:
        uploader.close()


def test_whatever_a_source_raises_at_whichever_request_of_a_save_the_save_is_committed(
    source: Source,
    s3_url: str,
    make_checkpoint: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    counted: Callable[[str], None],
) -> None:
    run = Run(s3_url)
    run.claim()
    assert save(run, make_checkpoint(1), tmp_path / "pins", 1)
    source.count = 0
    assert save(run, make_checkpoint(2), tmp_path / "pins", 2)
    requests = source.count
    assert requests > 5
    # Every exception at some request, and every request with some exception.
    step = 2
    for number, error in zip(range(max(requests, len(RAISED))), itertools.cycle(RAISED)):
        step += 1
        caplog.clear()
        source.raises(error, number % requests + 1)
        with caplog.at_level(logging.WARNING, "hf_spot"):
            assert save(run, make_checkpoint(step), tmp_path / "pins", step), (error, number)
        assert Run(s3_url).find(step).step == step
        for record in caplog.records:
            assert record.exc_info is None, f"a traceback for {error!r}"
            assert "\n" not in record.getMessage().partition("\n  Try: ")[0], record.getMessage()
    counted(f"credential sources: {step - 2} saves, each with another exception or at another of {requests} requests")


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_a_store_tells_it_in_the_sources_own_words(source: Source, s3_url: str, error: Exception) -> None:
    source.raises(error, 1)
    with pytest.raises(StoreError) as told:
        Run(s3_url).store.put("k", b"x")
    words = " ".join(str(error).split())
    assert words[:40] in told.value.args[0]
    assert told.value.hint
    assert Run(s3_url).store.list() is not None
    if not isinstance(error, aws.BotoCoreError):
        assert type(told.value) is StoreUnavailable


def helper(folder: Path, says: str) -> Path:
    program = folder / "helper"
    program.write_text(f"#!/bin/sh\n{says}\n")
    program.chmod(0o755)
    return program


def test_a_helper_that_wants_a_login_for_a_while_costs_no_checkpoint(
    seaweedfs: SeaweedFS, s3_url: str, make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"Version": 1, "AccessKeyId": seaweedfs.access_key, "SecretAccessKey": seaweedfs.secret_key}
    soon = datetime.now(timezone.utc) + timedelta(minutes=5)  # so soon that botocore asks for each request
    (tmp_path / "keys").write_text(json.dumps({**given, "Expiration": soon.isoformat()}))
    program = helper(tmp_path, f"if [ -e {tmp_path}/locked ]; then echo please log in; else cat {tmp_path}/keys; fi")
    config = tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = {program}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    run = Run(s3_url)
    run.claim()
    uploader = Uploader(run, tmp_path / "pins", save_total_limit=None)
    with contextlib.closing(uploader):
        (tmp_path / "locked").touch()
        uploader.submit(make_checkpoint(1), CommitRequest(step=1))
        wait_for(lambda: uploader.trouble)
        assert "please log in" not in str(uploader.trouble)  # nobody knows what a helper prints
        assert "JSONDecodeError" in str(uploader.trouble)
        (tmp_path / "locked").unlink()
        assert uploader.drain(PATIENCE_S)
    assert Run(s3_url).find().step == 1


def starts() -> Iterator[tuple[str, str, str]]:
    profile = "aws_access_key_id = A\naws_secret_access_key = B\n"
    role = "role_arn = arn:aws:iam::123456789012:role/x\n"
    yield "a helper that is not there", "credential_process = /no/such/helper\n", "/no/such/helper"
    yield "a helper that wants a login", "credential_process = HELPER\n", "JSON"
    yield (
        "MFA without a terminal",
        f"{role}source_profile = b\nmfa_serial = arn:aws:iam::1:mfa/x\n[profile b]\n{profile}",
        "MFA",
    )
    yield "no such source", f"{role}source_profile = none\n", "none"
    yield "a token file that is not there", f"{role}web_identity_token_file = /no/such/token\n", "/no/such/token"
    yield "a file that can't be parsed", "[broken\n", "config"
    yield (
        "SSO without a login",
        "sso_start_url = https://x\nsso_region = eu-west-1\nsso_account_id = 1\nsso_role_name = r\n",
        "sso",
    )


@pytest.mark.parametrize(("config", "said"), [one[1:] for one in starts()], ids=[one[0] for one in starts()])
@pytest.mark.parametrize("command", ["launch", "checkpoints"])
def test_at_the_start_a_source_that_cannot_work_is_one_line_and_code_2(
    command: str, config: str, said: str, seaweedfs: SeaweedFS, tmp_path: Path, zygote: Zygote
) -> None:
    path = tmp_path / "config"
    path.write_text("[default]\n" + config.replace("HELPER", str(helper(tmp_path, "echo please log in"))))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environ |= {name: value for name, value in seaweedfs.env().items() if not name.startswith(("AWS_ACCESS", "AWS_SECRET"))}
    environ |= {"AWS_CONFIG_FILE": str(path), "HF_HUB_OFFLINE": "1"}
    url = "s3://tests/no-run"
    what = ["launch", "--store", url, "--num_processes", "1", str(PLAIN)] if command == "launch" else ["checkpoints", "ls", url]
    with zygote.forking():
        done = subprocess.run(
            [sys.executable, "-m", "hf_spot", *what],
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            start_new_session=True,  # without a terminal, too
            cwd=tmp_path,
        )
    assert done.returncode == 2, done.stderr
    ours = done.stderr[done.stderr.index("hf-spot: error: ") :].strip().splitlines()  # accelerate warns of its defaults before
    assert len(ours) == 2, done.stderr
    assert ours[0].startswith("hf-spot: error: can't ")
    assert ours[1].startswith("  Try: ")
    assert "Traceback" not in done.stderr
    assert said in done.stderr


@pytest.mark.parametrize("kind", ["gs", "az", "hf"])
def test_other_clouds_sources_are_trouble_as_well(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if kind == "gs":
        from google.auth.credentials import AnonymousCredentials

        monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
        raising = AnonymousCredentials, "before_request"
        url = "gs://bucket/run"
    elif kind == "az":
        from azure.identity import DefaultAzureCredential

        for name in ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "account")
        raising = DefaultAzureCredential, "get_token_info"
        url = "az://container/run"
    else:
        import hf_spot.storage.hub_connection as connection

        raising = connection, "build_hf_headers"
        url = "hf://buckets/me/mine/run"
    path = tmp_path / "file"
    path.write_bytes(b"x")
    for error in (*RAISED[:10], google.auth.exceptions.RefreshError("please log in")):
        if kind != "gs" and isinstance(error, google.auth.exceptions.RefreshError):
            continue

        def give(*args: object, error: Exception = error, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr(*raising, give)
        for request in requests_of(Run(url).store, path):
            with pytest.raises(SpotError) as told:
                request()
            assert isinstance(told.value, StoreError), told.value
            assert " ".join(str(error).split())[:30] in told.value.args[0]


def requests_of(store: ObjectStore, path: Path) -> list[Callable[[], object]]:
    return [
        lambda: store.put("k", b"x"),
        lambda: store.create("k", b"x"),
        lambda: store.get("k"),
        lambda: [*store.list()],
        lambda: store.put_file("k", path),
        lambda: store.get_file("k", path.with_name("other")),
        lambda: store.copy("k", "other"),
        lambda: store.delete(["k"]),
    ]
