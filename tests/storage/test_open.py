"""From what the user writes to the store that is meant."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hf_spot.errors import ConfigError
from hf_spot.storage.local import LocalStore
from hf_spot.storage.memory import MemoryStore
from hf_spot.storage.open import open_store
from hf_spot.storage.s3 import S3Store


def test_each_kind_of_url_opens_its_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for url, kind, expected in (
        ("s3://bucket/runs/my-run/", S3Store, "s3://bucket/runs/my-run"),
        ("s3://bucket", S3Store, "s3://bucket"),
        ("S3://bucket/x", S3Store, "s3://bucket/x"),
        ("file:///a/b%20c", LocalStore, "/a/b c"),
        ("file://localhost/a", LocalStore, "/a"),
        ("/mnt/efs/run/", LocalStore, "/mnt/efs/run"),
        ("out", LocalStore, str(tmp_path / "out")),
        (Path("out"), LocalStore, str(tmp_path / "out")),
        ("~/run", LocalStore, str(tmp_path / "run")),
        ("name:with-colon", LocalStore, str(tmp_path / "name:with-colon")),
        ("memory://name", MemoryStore, "memory://name"),
    ):
        store = open_store(url)
        assert (type(store), store.url) == (kind, expected)


def test_a_store_passes_through() -> None:
    store = MemoryStore("memory://passes")

    assert open_store(store) is store


@pytest.mark.parametrize(
    "url",
    [
        "",
        "  ",
        "s3:/x",
        "s3:x",
        "s3://",
        "s3:///x",
        "s3://UPPER_bad/x",
        "s3://ab/x",
        "s3://bucket/a/../b",
        "s3://bucket//a//b",
        "s3://bucket/x?endpoint=y",
        "https://bucket.s3.amazonaws.com/x",
        "ftp://x/y",
        "file://relative/path",
        "file://",
        "file:///",
        "memory://",
        "nul\x00",
    ],
)
def test_what_is_no_store_is_a_config_error_with_a_hint(url: str) -> None:
    with pytest.raises(ConfigError):
        open_store(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("gs://bucket/runs/my-run/", "gs://bucket/runs/my-run"),
        ("gs://bucket", "gs://bucket"),
        ("az://container/runs/my-run", "az://container/runs/my-run"),
        ("hf://buckets/me/name/run/", "hf://buckets/me/name/run"),
        ("hf://me/name", "hf://me/name"),
        ("hf://models/me/name/run", "hf://me/name/run"),
        ("hf://me/name@branch/run", "hf://me/name@branch/run"),
        ("hf://datasets/me/name/run", "hf://datasets/me/name/run"),
    ],
)
def test_stores_of_other_clouds_are_opened_without_a_question(url: str, shown: str) -> None:
    assert open_store(url).url == shown


@pytest.mark.parametrize(
    "url",
    [
        "gs://",
        "gs://UPPER/x",
        "gs://bucket/a/../b",
        "gs://bucket/x?y",
        "az://a/x",
        "az://-container/x",
        "az://container/a//b",
        "hf://me",
        "hf://",
        "hf://buckets/me",
        "hf://buckets/me/name@branch/x",
        "hf://spaces/me/name",
        "hf://me/name/../other",
    ],
)
def test_what_the_other_clouds_have_not_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        open_store(url)


@pytest.mark.parametrize(
    ("url", "hint"),
    [("abfs://c/run", "az://"), ("wasbs://c@x/run", "az://"), ("gcs://b/run", "gs://"), ("s3a://b/run", "s3://")],
)
def test_other_spellings_are_told_with_the_right_one(url: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(url)
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("url", "module", "install"),
    [
        ("gs://bucket/run", "google.cloud.storage.exceptions", "pip install 'google-cloud-storage>=3.1'"),
        ("az://container/run", "azure.storage.blob", "pip install azure-storage-blob azure-identity"),
    ],
)
def test_a_package_that_is_missing_is_named_by_its_own_name(
    url: str, module: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("hf_spot.storage.gcs", "hf_spot.storage.azure"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    with pytest.raises(ConfigError) as caught:
        open_store(url)

    assert caught.value.hint == install


def test_a_password_in_the_url_is_refused_and_not_repeated() -> None:
    for url in ("s3://AKIA:hunter2@bucket/run", "https://me:hunter2@host/x"):
        with pytest.raises(ConfigError) as caught:
            open_store(url)
        assert "hunter2" not in str(caught.value)


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="int"):
        open_store(5)  # type: ignore[arg-type]
