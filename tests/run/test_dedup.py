"""Files that stand in the store already are copied there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.dedup import Unchanged
from hf_spot.run.manifest import FileEntry
from hf_spot.run.run import Run
from hf_spot.storage.faulty import FaultyStore
from hf_spot.storage.memory import MemoryStore

Make = Callable[..., Path]
MB = 1 << 20


def entry(path: str, content: int, size: int = MB) -> FileEntry:
    return FileEntry(path, size, f"blake3:{content:064x}")


def test_a_file_of_the_same_name_and_size_is_worth_a_look_once_it_stands() -> None:
    known = Unchanged()
    assert known.candidate("base", MB) is None
    known.note("e0001/checkpoint-1", [entry("base", 1), entry("small", 1, 10)])
    found = known.candidate("base", MB)
    assert found is not None and found.key == "e0001/checkpoint-1/base" and found.digest == entry("base", 1).digest
    assert known.candidate("base", MB + 1) is None
    assert known.candidate("small", 10) is None, "one request either way"
    known.note("e0001/checkpoint-2", [entry("base", 1)])
    found = known.candidate("base", MB)
    assert found is not None and found.key == "e0001/checkpoint-2/base", "the older one may be pruned"


def test_what_changes_with_each_checkpoint_is_not_hashed_before_it_is_sent_until_it_rests() -> None:
    known = Unchanged()
    for step, content in ((1, 1), (2, 2), (3, 3)):
        known.note(f"e0001/checkpoint-{step}", [entry("weights", content)])
        assert (known.candidate("weights", MB) is None) == (step > 1)
    known.note("e0001/checkpoint-4", [entry("weights", 3)])
    assert known.candidate("weights", MB) is not None


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore(MemoryStore(f"memory://{uuid.uuid4().hex}"))


def commit(run: Run, folder: Path, step: int) -> None:
    request = CommitRequest(step=step)
    run.commit(request, run.upload(folder, request, progress=moved.append))


moved: list[int] = []


def test_a_frozen_base_model_is_sent_once_and_each_checkpoint_stays_whole(
    store: FaultyStore, make_checkpoint: Make, tmp_path: Path
) -> None:
    base = os.urandom(2 * MB)

    def checkpoint(step: int, frozen: bytes = base) -> Path:
        folder = make_checkpoint(step)
        (folder / "base.safetensors").write_bytes(frozen)
        return folder

    def sent() -> list[str]:
        names = [key.rpartition("/")[2] for method, key in store.calls if method == "put_file"]
        store.calls.clear()
        return names

    run = Run(store)
    run.claim()
    commit(run, checkpoint(1), 1)
    assert "base.safetensors" in sent()
    moved.clear()
    commit(run, checkpoint(2), 2)
    assert "base.safetensors" not in sent()
    assert sum(moved) == sum(path.stat().st_size for path in checkpoint(2).rglob("*") if path.is_file()), (
        "progress counts what is copied"
    )
    run.prune(1)
    commit(run, checkpoint(3), 3)
    assert "base.safetensors" not in sent(), "it stands in the newest checkpoint too"
    assert run.verify() == {ref.entry: [] for ref in run.state().checkpoints}
    assert (run.pull(tmp_path / "pulled") / "base.safetensors").read_bytes() == base

    # The next launch knows what it has restored.
    later = Run(store)
    later.claim()
    later.pull(tmp_path / "pulled")
    store.calls.clear()
    commit(later, checkpoint(4), 4)
    assert "base.safetensors" not in sent()

    # Somebody deletes what would be copied; then one byte changes.
    store.inner.delete(["e0002/checkpoint-4/base.safetensors"])
    commit(later, checkpoint(5), 5)
    assert "base.safetensors" in sent()
    commit(later, checkpoint(6, base[:-1] + bytes([base[-1] ^ 1])), 6)
    assert "base.safetensors" in sent()
    assert (later.pull(tmp_path / "pulled") / "base.safetensors").read_bytes() != base
