"""What only the stores of Google and Azure do, and a whole run in each store that is not S3."""

from __future__ import annotations

import base64
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import google_crc32c
import pytest

from hf_spot.errors import AccessDenied, BucketNotFound, ConfigError, Fenced, ObjectNotFound, StoreError, StoreUnavailable
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.restore import restore_newest
from hf_spot.run.run import Run
from hf_spot.run.upload import Uploader
from hf_spot.storage import azure, gcs
from hf_spot.storage.open import open_store
from hf_spot.storage.probe import probe
from tests.servers import FakeGCS
from tests.storage.fake_azure import FakeAzure
from tests.storage.fake_http import Answer, Asked, FakeServer
from tests.waiting import PATIENCE_S

MB = 1 << 20


@pytest.mark.parametrize("kind", ["gcs", "azure", "azurite", "hub_repo", "hub_bucket"])
def test_a_run_is_saved_pruned_restored_and_fenced(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, make_checkpoint: Callable[[int], Path]
) -> None:
    open_run = partial(Run, request.getfixturevalue(f"{kind}_url"), allow_unfenced_store=kind == "hub_bucket")
    first = open_run()
    first.claim()
    uploader = Uploader(first, tmp_path / "pins", save_total_limit=2)
    for step in (5, 10, 15):
        uploader.submit(make_checkpoint(step), CommitRequest(step=step))
        assert uploader.drain(PATIENCE_S)
    uploader.close()

    second = open_run()
    second.claim({"host": "another"})
    restored = restore_newest(second, second.state().checkpoints, tmp_path / "new")

    assert [ref.step for ref in second.state().checkpoints] == [10, 15]
    assert restored is not None and restored[1].name == "checkpoint-15"
    assert (restored[1] / "optimizer.pt").read_bytes() == (tmp_path / "out/checkpoint-15/optimizer.pt").read_bytes()
    assert [*second.verify().values()] == [[], []]
    assert {info.key.split("/")[1] for info in second.store.list("e0001/")} == {"checkpoint-10", "checkpoint-15"}
    with pytest.raises(Fenced):
        first.record("finished", {})


# -- Google -----------------------------------------------------------------------------------------------------------


def test_of_a_killed_upload_to_google_the_whole_parts_are_found(gcs_url: str, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.write_bytes(b"\1" * (9 * MB))
    code = """
import os, sys
from pathlib import Path
from hf_spot.storage import gcs
gcs.PART_BYTES = 3 << 20
store = gcs.GoogleStore(sys.argv[1])
put_together = gcs.storage.Blob.compose
gcs.storage.Blob.compose = lambda *args, **kwargs: os.kill(os.getpid(), 9)
store.put_file("e0001/checkpoint-5/model", Path(sys.argv[2]))
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code, gcs_url, str(source)]).returncode == -9
    store = open_store(gcs_url)

    assert [*store.list()] == []
    assert store.abort(lambda key: key.startswith("e0002/")) == 0
    assert store.abort(lambda key: key.startswith("e0001/")) == 1
    assert store.abort(lambda key: True) == 0


def test_parts_are_put_together_in_order_and_deleted(gcs_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs, "PART_BYTES", 1 * MB)
    monkeypatch.setattr(gcs, "_MOST_PARTS", 4)
    source, store = tmp_path / "source", open_store(gcs_url)
    source.write_bytes(bytes(range(256)) * (10 * MB // 256) + b"end")

    store.put_file("e0001/model", source)
    store.get_file("e0001/model", tmp_path / "back")

    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert store.abort(lambda key: True) == 0


class DamagedUploads(FakeServer):
    """Says of each resumable upload that another CRC32C has arrived."""

    def decide(self, asked: Asked) -> Answer:
        if asked.method in ("DELETE", "GET"):
            return Answer(204)
        if asked.method == "POST":
            return Answer(200, headers={"Location": f"{self.endpoint}/upload/1"})
        last, total = asked.headers["content-range"].split("-")[1].split("/")
        if int(last) + 1 < int(total):
            return Answer(308, headers={"Range": f"bytes=0-{last}"})
        told = {"name": "x", "size": total, "generation": "1", "crc32c": "AAAAAA=="}
        return Answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"})


def test_a_large_upload_that_was_damaged_on_the_way_is_no_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\1" * (9 * MB))
    with DamagedUploads() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
        with pytest.raises(StoreUnavailable, match="hecksum"):
            open_store("gs://bucket/run").put_file("a", tmp_path / "file")


def test_a_small_upload_takes_its_checksum_along_for_google_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = []

    class Noting(FakeServer):
        def decide(self, asked: Asked) -> Answer:
            bodies.extend([asked.body] if asked.method == "POST" else [])
            return Answer(200, b'{"name": "a", "size": "9"}', {"Content-Type": "application/json"})

    with Noting() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
        open_store("gs://bucket/run").put("a", b"something")

    expected = base64.b64encode(google_crc32c.value(b"something").to_bytes(4, "big"))
    assert b'"crc32c": "' + expected + b'"' in bodies[0]


class Saying(FakeServer):
    """Answers everything alike."""

    def __init__(self, status: int) -> None:
        super().__init__()
        self.status = status

    def decide(self, asked: Asked) -> Answer:
        return Answer(self.status, b'{"error": {"message": "so it is"}}', {"Content-Type": "application/json"})


@pytest.mark.parametrize(
    ("status", "kind", "hint"),
    [(401, AccessDenied, "gcloud auth"), (403, AccessDenied, "storage.objectUser"), (400, StoreError, "")],
)
def test_what_google_says_no_to_is_told_with_its_repair(
    status: int, kind: type[Exception], hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Saying(status) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
        store = open_store("gs://bucket/run")
        for act in (lambda: store.get("a"), lambda: store.put("a", b""), lambda: [*store.list()], lambda: store.delete(["a"])):
            with pytest.raises(kind) as caught:
                act()
            assert type(caught.value) is kind and hint in caught.value.hint  # type: ignore[attr-defined]


def test_without_googles_credentials_the_login_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "absent.json"))

    with pytest.raises(AccessDenied) as caught:
        open_store("gs://bucket/run").get("a")

    assert caught.value.hint == "gcloud auth application-default login"


def test_a_bucket_and_a_container_that_are_not_there_are_told_with_the_command_that_makes_them(
    gcs_url: str, azure_url: str
) -> None:
    for url, hint in (
        ("gs://absent/run", "gcloud storage buckets create gs://absent"),
        ("az://absent/run", "az storage container"),
    ):
        with pytest.raises(BucketNotFound, match="absent does not exist") as caught:
            probe(open_store(url))
        assert caught.value.hint.startswith(hint)


# -- Azure ------------------------------------------------------------------------------------------------------------


def test_a_block_that_arrives_damaged_is_refused(
    fake_azure: FakeAzure, azure_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, store = tmp_path / "source", open_store(azure_url)
    source.write_bytes(b"\1" * (9 * MB))
    put = FakeAzure._put

    def damage(self: FakeAzure, blobs: object, name: str, asked: Asked) -> Answer:
        asked.body = b"\0" + asked.body[1:] if 0 < len(asked.body) <= MB else asked.body
        return put(self, blobs, name, asked)  # type: ignore[arg-type]

    monkeypatch.setattr(FakeAzure, "_put", damage)

    with pytest.raises(StoreError, match="Md5Mismatch"):
        store.put_file("a", source)
    assert [*store.list()] == []
    assert store.abort(lambda key: True) == 0  # the blocks that had come have been dropped


@pytest.mark.parametrize(
    ("answer", "kind", "hint"),
    [
        (Answer(403, headers={"x-ms-error-code": "AuthorizationPermissionMismatch"}), AccessDenied, "Blob Data Contributor"),
        (Answer(401, headers={"x-ms-error-code": "InvalidAuthenticationInfo"}), AccessDenied, "az login"),
        (Answer(400, headers={"x-ms-error-code": "InvalidHeaderValue"}), StoreError, ""),
        (Answer(404, headers={"x-ms-error-code": "BlobNotFound"}), ObjectNotFound, ""),
    ],
)
def test_what_azure_says_no_to_is_told_with_its_repair(
    fake_azure: FakeAzure, azure_url: str, answer: Answer, kind: type[Exception], hint: str
) -> None:
    store = open_store(azure_url)
    fake_azure.failures.append((f"/{azure_url.split('/')[2]}/", answer))

    with pytest.raises(kind) as caught:
        store.get("a")

    assert type(caught.value) is kind and hint in caught.value.hint  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("variables", "match"),
    [
        ({}, "AZURE_STORAGE_ACCOUNT is not set"),
        ({"AZURE_STORAGE_ACCOUNT": "Not an account"}, "not the name of an account"),
        ({"AZURE_STORAGE_CONNECTION_STRING": "hunter2"}, "not a connection string"),
    ],
)
def test_an_account_that_is_not_named_is_asked_for(
    variables: dict[str, str], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_CONNECTION_STRING"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(ConfigError, match=match) as caught:
        open_store("az://container/run").get("a")

    assert "AZURE_STORAGE_ACCOUNT" in caught.value.hint and "hunter2" not in str(caught.value)


def test_no_key_is_logged(
    azure_url: str, fake_azure: FakeAzure, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    store = open_store(azure_url)
    store.put("a", b"x")
    fake_azure.failures.append(("GET", Answer(403)))
    with pytest.raises(AccessDenied) as caught:
        store.get("a")

    key = fake_azure.env()["AZURE_STORAGE_CONNECTION_STRING"].split("AccountKey=")[1].split(";")[0]
    assert key not in caplog.text and key not in str(caught.value)
    assert azure.AzureStore.__name__ in repr(store) and key not in repr(store)


def test_googles_emulator_decides_a_race_of_processes(gcs_url: str, fake_gcs: FakeGCS) -> None:
    code = "import sys; from hf_spot.storage.open import open_store; print(open_store(sys.argv[1]).create('journal/1', b'x'))"
    racers = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, gcs_url], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert sorted(racer.communicate()[0].strip() for racer in racers) == ["False", "False", "True"]
