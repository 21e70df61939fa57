"""What was damaged or planted is never taken for a journal entry, and bytes of any kind never crash its reader."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_spot.errors import ConfigError, CorruptCheckpoint, SpotError, Untrusted
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.journal import Journal, RunState, decode
from hf_spot.run.mailbox import Mailbox
from hf_spot.run.manifest import FileEntry, check_names
from hf_spot.run.run import Run
from hf_spot.run.seal import VARIABLE, seal, unseal
from hf_spot.storage.memory import MemoryStore

KEY, OTHER = b"k" * 32, b"o" * 32
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(f"memory://{uuid.uuid4().hex}")


@pytest.mark.parametrize("key", [None, KEY])
def test_every_changed_byte_is_noticed(key: bytes | None) -> None:
    data = seal({"kind": "commit", "data": {"step": 5, "words": 'with "seal":" in them'}}, key)
    assert unseal(data, key)["data"]["step"] == 5
    for place in range(len(data)):
        damaged = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises((CorruptCheckpoint, Untrusted)):
            unseal(damaged, key)
    for length in range(len(data)):
        with pytest.raises((CorruptCheckpoint, Untrusted)):
            unseal(data[:length], key)


@given(st.binary(max_size=200), st.sampled_from([None, KEY]))
def test_bytes_of_any_kind_are_no_entry(data: bytes, key: bytes | None) -> None:
    with pytest.raises(SpotError):
        decode(data, key)


FIELDS = st.fixed_dictionaries(
    {
        "format": st.just(1) | JSON,
        "number": st.integers() | JSON,
        "kind": st.sampled_from(["claim", "commit"]) | JSON,
        "epoch": st.integers() | JSON,
        "id": st.text() | JSON,
        "time": st.just("2026-01-01T00:00:00+00:00") | JSON,
        "data": JSON,
        "state": st.fixed_dictionaries(
            {"number": st.integers() | JSON, "epoch": JSON, "checkpoints": st.lists(JSON) | JSON, "ended": JSON}
        )
        | JSON,
    }
)


@given(FIELDS | JSON)
def test_entries_of_any_shape_never_crash_the_reader(fields: Any) -> None:
    """A bucket's other writer can seal what he likes, where there is no key."""
    store = MemoryStore("memory://shapes")
    store.put("journal/00000001.json", seal(fields, None) if isinstance(fields, dict) else json.dumps(fields).encode())
    run = Run(store)
    with contextlib.suppress(SpotError):
        assert isinstance(run.state(), RunState)
        for entry in run.events():
            assert isinstance(entry.data, dict)
        run.checkpoints()


@given(st.dictionaries(st.sampled_from(["files", "reason", "step"]), JSON | st.lists(st.dictionaries(st.text(), JSON))))
def test_commits_of_any_shape_never_crash_the_reader(data: dict[str, Any]) -> None:
    store = MemoryStore(f"memory://{uuid.uuid4().hex}")
    run = Run(store)
    run.journal.claim({})
    good = {"step": 1, "stage": 1, "complete": False, "prefix": "e0001/checkpoint-1", "files": [], "reason": "schedule"}
    entry = run.journal.append("commit", good)
    planted = json.loads(store.get("journal/00000002.json"))
    planted.pop("seal")
    store.put("journal/00000002.json", seal({**planted, "data": {**good, **data}}, None))
    with contextlib.suppress(SpotError):
        assert run.checkpoint(entry.state.checkpoints[0]).step == 1


def commit(run: Run, folder: Path) -> None:
    request = CommitRequest(step=int(folder.name.split("-")[1]))
    run.commit(request, run.upload(folder, request))


def test_who_can_write_to_the_bucket_but_has_no_key_can_not_have_a_file_restored(
    store: MemoryStore, make_checkpoint: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, KEY.decode())
    run = Run(store)
    run.claim()
    commit(run, make_checkpoint(5))

    evil = make_checkpoint(10, tmp_path / "evil")
    (evil / "optimizer.pt").write_bytes(b"a pickle that runs a program")
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(Untrusted, match="no key here"):
        Run(store).push(evil)
    for key in (None, OTHER):
        planter = Run(store)
        planter.journal = Journal(store, key=key)
        planter.journal._state, planter.journal.launch = run.state(), run.launch
        commit(planter, evil)

        monkeypatch.setenv(VARIABLE, KEY.decode())
        with pytest.raises(Untrusted, match="not signed" if key is None else "another key"):
            Run(store).pull(tmp_path / "pulled")
        assert not list(tmp_path.glob("pulled/checkpoint-*"))
        store.delete(["journal/00000003.json"])
        monkeypatch.delenv(VARIABLE)

    monkeypatch.setenv(VARIABLE, KEY.decode())
    store.put("e0001/checkpoint-5/optimizer.pt", b"replaced")  # the journal binds every file
    with pytest.raises(CorruptCheckpoint):
        Run(store).pull(tmp_path / "pulled")
    assert not any(KEY in store.get(info.key) for info in store.list())


def test_what_a_machine_says_is_bound_to_the_place_it_was_meant_for(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, KEY.decode())
    run = Run(store)
    run.claim()
    old, new = (CommitRequest(step=step, part=1, parts=2) for step in (5, 10))
    Mailbox(run).hand_in(old, [FileEntry("optimizer.pt", 1, "blake3:" + "0" * 64)])
    assert Mailbox(run).other_parts(old) == [FileEntry("optimizer.pt", 1, "blake3:" + "0" * 64)]
    store.put("e0001/checkpoint-10/.parts/1.json", store.get("e0001/checkpoint-5/.parts/1.json"))
    with pytest.raises(CorruptCheckpoint):
        Mailbox(run).other_parts(new)
    store.put("e0001/checkpoint-10/.parts/1.json", seal({"key": "e0001/checkpoint-10/.parts/1.json", "told": {}}, None))
    with pytest.raises(Untrusted):
        Mailbox(run).other_parts(new)


@pytest.mark.parametrize("key", [None, KEY])
def test_an_entry_that_is_copied_to_another_number_is_refused(store: MemoryStore, key: bytes | None) -> None:
    journal = Journal(store, key=key)
    for _ in range(3):
        journal.claim({})
    store.put("journal/00000004.json", store.get("journal/00000002.json"))
    for reader in (journal, Journal(store, key=key)):
        with pytest.raises(CorruptCheckpoint, match=r"entry 2 .* under the number 4"):
            reader.refresh()


def test_a_key_that_can_be_guessed_is_refused(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "secret")
    with pytest.raises(ConfigError) as caught:
        Run(store)
    assert "openssl" in caught.value.hint
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("names", [("a", "a"), ("Model.bin", "model.bin"), ("a", "a/b"), ("A/b", "a")])
def test_names_that_would_be_one_file_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(CorruptCheckpoint, match="twice"):
        check_names([FileEntry(name, 1, "blake3:" + "0" * 64) for name in names])
    check_names([FileEntry(name, 1, "blake3:" + "0" * 64) for name in ("a", "b", "c/a", "c/b", ".metadata")])
