"""Small requests that are made without botocore, after some that it made, do what it does, or leave it to botocore."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hf_spot.errors import AccessDenied, ObjectNotFound
from hf_spot.storage.s3 import S3Store
from hf_spot.storage.s3_small import MOST_BYTES

FILES = 20
LEARNT_FROM = 8
KEYS = [f"e0001/sübfolder/file {number}+&=~é.bin" for number in range(FILES)]


@pytest.fixture
def store(s3_url: str) -> S3Store:
    return S3Store(s3_url)


@pytest.fixture
def botocores(store: S3Store) -> Counter[str]:
    """What botocore sends in its own way."""
    sent: Counter[str] = Counter()
    connection = store._connection
    for client in (connection.client, connection.transfers._bulk):
        client.meta.events.register("before-send.s3", lambda request, **_: sent.update([str(request.method)]))
    return sent


def body_of(key: str) -> bytes:
    return key.encode() * 100


def put_all(store: S3Store, folder: Path) -> None:
    for key in KEYS:
        (folder / "file").write_bytes(body_of(key))
        moved: list[int] = []
        store.put_file(key, folder / "file", moved.append)
        assert sum(moved) == len(body_of(key))


def learnt(store: S3Store, folder: Path) -> None:
    put_all(store, folder)
    for key in KEYS:
        store.get(key)


def test_all_but_the_first_are_made_without_botocore(store: S3Store, botocores: Counter[str], tmp_path: Path) -> None:
    put_all(store, tmp_path)
    assert [store.get(key) for key in KEYS] == [body_of(key) for key in KEYS]
    assert botocores == {"PUT": LEARNT_FROM, "GET": LEARNT_FROM}
    assert sorted(info.key for info in store.list("e0001/")) == sorted(KEYS)
    (tmp_path / "file").write_bytes(b"")
    store.put_file("empty", tmp_path / "file")
    assert store.get("empty") == b""


def test_a_large_file_and_a_missing_object_are_botocores(store: S3Store, botocores: Counter[str], tmp_path: Path) -> None:
    learnt(store, tmp_path)
    botocores.clear()
    (tmp_path / "file").write_bytes(bytes(MOST_BYTES + 1))
    store.put_file("large", tmp_path / "file")
    with pytest.raises(ObjectNotFound):
        store.get("missing")
    assert botocores == {"PUT": 1, "GET": 1}


@pytest.mark.parametrize("trouble", ["raises", "500", "broken off", "checksum"])
def test_what_is_no_plain_success_is_asked_of_botocore(
    store: S3Store, botocores: Counter[str], tmp_path: Path, trouble: str
) -> None:
    learnt(store, tmp_path)
    botocores.clear()
    small = store._connection.small
    plain = small._send

    class Answer:
        def __init__(self, answer: Any) -> None:
            self.status_code = 500 if trouble == "500" else answer.status_code
            self.headers = dict(answer.headers) | ({"x-amz-checksum-crc32": "AAAAAA=="} if trouble == "checksum" else {})
            self._content = answer.content

        @property
        def content(self) -> bytes:
            if trouble == "broken off":
                raise OSError("the answer broke off")
            return bytes(self._content)

    def send(request: Any) -> Any:
        if trouble == "raises":
            raise OSError("no connection")
        return Answer(plain(request))

    small._send = send
    assert [store.get(key) for key in KEYS] == [body_of(key) for key in KEYS]
    assert botocores == {"GET": FILES}


def test_refused_credentials_are_explained_as_ever(
    store: S3Store, botocores: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt(store, tmp_path)
    monkeypatch.setattr(
        store._connection.small,
        "_credentials",
        lambda: type("Keys", (), {"access_key": "wrong", "secret_key": "w", "token": None})(),
    )
    assert store.get(KEYS[0]) == body_of(KEYS[0]), "botocore has the right ones"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    other = S3Store(store.url)
    with pytest.raises(AccessDenied):
        other.get(KEYS[0])


def test_requests_that_are_signed_in_another_way_are_botocores(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_all(S3Store(s3_url), tmp_path)
    store = S3Store(s3_url)
    small = store._connection.small

    def presigned(request: Any, **kwargs: Any) -> None:
        request.headers["X-Amz-S3session-Token"] = "of a directory bucket"

    store._connection.client.meta.events.register("before-sign.s3.GetObject", presigned)
    assert [store.get(key) for key in KEYS] == [body_of(key) for key in KEYS]
    assert "GET" not in small._patterns
