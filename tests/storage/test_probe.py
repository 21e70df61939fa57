"""The probe: each way in which a store can fail it, by a real store with a fault."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Iterator

import pytest

from hf_spot.errors import AccessDenied, StoreError, StoreNotFencing, StoreUnavailable
from hf_spot.storage import probe as probe_module
from hf_spot.storage.faulty import Fault, FaultyStore
from hf_spot.storage.memory import MemoryStore
from hf_spot.storage.probe import probe
from hf_spot.storage.store import ObjectInfo


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """For listings that lag."""
    monkeypatch.setattr(probe_module, "_LAG_S", 0.5)


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore(f"memory://{uuid.uuid4().hex}")


def denied() -> Exception:
    return AccessDenied("no", hint="allow it")


def test_a_good_store_needs_six_requests(memory: MemoryStore) -> None:
    store = FaultyStore(memory)

    probe(store)

    assert [method for method, _ in store.calls] == ["create", "get", "create", "list", "delete", "list"]
    assert all(key.startswith(".probe/") for _, key in store.calls)


@pytest.mark.parametrize(
    ("method", "occurrence", "step"),
    [
        ("create", 1, "writing"),
        ("get", 1, "reading back"),
        ("create", 2, "create-if-absent"),
        ("list", 1, "listing"),
        ("delete", 1, "deleting"),
    ],
)
def test_a_failure_names_its_step_keeps_its_hint_and_cleans_up(
    memory: MemoryStore, method: str, occurrence: int, step: str
) -> None:
    store = FaultyStore(memory, [Fault(method, occurrence=occurrence, error=denied)])

    with pytest.raises(AccessDenied, match=step) as caught:
        probe(store)

    assert caught.value.hint == "allow it"
    assert step == "deleting" or [*memory.list()] == []


class Lagging(MemoryStore):
    """Its listings come late: what is new, or gone, shows in the third one after it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._shown: list[list[ObjectInfo]] = [[], []]

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        self._shown.append([*super().list(prefix, start_after)])
        return iter(self._shown.pop(0))


def test_a_store_whose_listings_lag_is_given_time(memory: MemoryStore) -> None:
    probe(Lagging(memory.url))
    assert [*memory.list()] == []


def test_a_store_that_never_lists_what_was_written_is_refused(memory: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lagging, "list", lambda *args: iter(()))
    with pytest.raises(StoreError, match="does not list what was written to it"):
        probe(Lagging(memory.url))
    assert [*memory.list()] == []


class Overwriting(MemoryStore):
    """Takes the condition and ignores it."""

    def create(self, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True


class Forgetful(MemoryStore):
    """Says yes and stores something else."""

    def get(self, key: str) -> bytes:
        return b"something else"


class Undying(MemoryStore):
    """Deletes nothing."""

    def delete(self, keys: object) -> None:
        pass


def test_a_store_that_lets_both_win_is_refused_unless_allowed(caplog: pytest.LogCaptureFixture) -> None:
    store = Overwriting(f"memory://{uuid.uuid4().hex}")

    with pytest.raises(StoreNotFencing) as caught:
        probe(store)
    assert "--allow-unfenced-store" in caught.value.hint
    assert [*store.list()] == []

    with caplog.at_level(logging.WARNING, "hf_spot"):
        probe(store, allow_unfenced=True)
    assert len(caplog.records) == 1
    assert [*store.list()] == []


@pytest.mark.parametrize("kind", [Forgetful, Undying])
def test_a_store_that_does_not_do_what_it_says_is_refused(kind: type[MemoryStore]) -> None:
    with pytest.raises(StoreError):
        probe(kind(f"memory://{uuid.uuid4().hex}"))


def test_a_store_that_hangs_is_given_up(memory: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "LIMIT_S", 0.1)
    answers = threading.Event()
    store = FaultyStore(memory, [Fault("list", until=answers, error=None)])

    with pytest.raises(StoreUnavailable, match="listing: no answer within"):
        probe(store)
    answers.set()
