"""FaultyStore: trouble where it was ordered, and nowhere else."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_spot.errors import ObjectNotFound, StoreUnavailable
from hf_spot.storage.faulty import Fault, FaultyStore
from hf_spot.storage.memory import MemoryStore
from hf_spot.storage.store import ObjectStore
from tests.waiting import PATIENCE_S


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore(f"memory://{uuid.uuid4().hex}")


def test_without_faults_it_is_the_inner_store(memory: MemoryStore) -> None:
    store = FaultyStore(memory)
    store.put("a", b"1")

    assert isinstance(store, ObjectStore)
    assert (store.url, store.get("a")) == (memory.url, b"1")
    assert store.calls == [("put", "a"), ("get", "a")]


def test_a_fault_hits_its_method_key_and_occurrence_only(memory: MemoryStore) -> None:
    store = FaultyStore(memory, [Fault("put", "journal/*", occurrence=2, error=lambda: ObjectNotFound("ordered"))])

    store.put("journal/1", b"")
    store.put("other", b"")
    with pytest.raises(ObjectNotFound, match="ordered"):
        store.put("journal/2", b"")
    store.put("journal/2", b"")

    assert [info.key for info in memory.list()] == ["journal/1", "journal/2", "other"]


def test_an_answer_can_be_lost_although_the_call_was_carried_out(memory: MemoryStore) -> None:
    store = FaultyStore(memory, [Fault("create", answer_lost=True)])

    with pytest.raises(StoreUnavailable):
        store.create("a", b"mine")

    assert memory.get("a") == b"mine"
    assert store.create("a", b"again") is False


def test_an_outage_fails_every_call_and_ends_with_the_switch(memory: MemoryStore, tmp_path: Path) -> None:
    store = FaultyStore(memory)
    source = tmp_path / "source"
    source.write_bytes(b"x" * 3_000_000)
    store.outage = True
    for attempt in (lambda: store.get("a"), lambda: [*store.list()], lambda: store.put_file("a", source)):
        with pytest.raises(StoreUnavailable):
            attempt()

    store.outage = False
    store.put_file("a", source)

    assert memory.get("a") == source.read_bytes()


def test_an_outage_ends_a_transfer_that_is_under_way(memory: MemoryStore, tmp_path: Path) -> None:
    store = FaultyStore(memory)
    source = tmp_path / "source"
    source.write_bytes(b"x" * 3_000_000)

    with pytest.raises(StoreUnavailable):
        store.put_file("a", source, lambda moved: setattr(store, "outage", True))

    assert [*memory.list()] == []


def test_a_call_can_be_held_until_an_event(memory: MemoryStore) -> None:
    gate = threading.Event()
    store = FaultyStore(memory, [Fault("put", until=gate, error=None)])

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(store.put, "a", b"")
        while not store.calls:
            pass
        assert not held.done()
        gate.set()
        held.result(timeout=PATIENCE_S)

    assert memory.get("a") == b""


def test_the_same_seed_gives_the_same_faults_whatever_the_order_of_the_calls(memory: MemoryStore) -> None:
    def failed(seed: int, keys: list[str]) -> set[str]:
        store = FaultyStore(memory, [Fault("put", occurrence=0, probability=0.3)], seed=seed)
        found = set()
        for key in keys:
            try:
                store.put(key, b"")
            except StoreUnavailable:
                found.add(key)
        return found

    keys = [str(number) for number in range(100)]
    first = failed(1, keys)

    assert 10 < len(first) < 60
    assert failed(1, keys[::-1]) == first
    assert failed(2, keys) != first
