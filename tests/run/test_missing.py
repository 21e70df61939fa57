"""One 404 is an answer of a proxy, or of a store that lags behind: it costs neither a checkpoint nor a run."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_spot.cli import main
from hf_spot.errors import CorruptCheckpoint, ObjectNotFound
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.restore import restore_newest
from hf_spot.run.run import Run
from hf_spot.storage.faulty import Fault, FaultyStore
from hf_spot.storage.local import LocalStore
from hf_spot.storage.memory import MemoryStore

Make = Callable[..., Path]


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore(MemoryStore(f"memory://{uuid.uuid4().hex}"))


def commit(run: Run, folder: Path, step: int) -> None:
    request = CommitRequest(step=step)
    run.commit(request, run.upload(folder, request))


def not_found() -> Exception:
    return ObjectNotFound("says a proxy")


@pytest.mark.parametrize("large", [False, True], ids=["small files", "large files"])
def test_one_404_for_any_object_of_a_restore_costs_nothing(
    large: bool, store: FaultyStore, make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr("hf_spot.run.transfer._SMALL_BYTES", 0)
    run = Run(store)
    run.claim()
    for step in (5, 10):
        commit(run, make_checkpoint(step), step)
    store.calls.clear()

    def restored(place: str) -> int:
        fresh = Run(store)
        found = restore_newest(fresh, fresh.state().checkpoints, tmp_path / place)
        assert found is not None
        return found[0].step

    assert restored("first") == 10
    asked = {key for method, key in store.calls if method in ("get", "get_file")}
    assert len(asked) > 6
    for number, key in enumerate(sorted(asked - {"journal/00000004.json"})):  # it is asked for to see that there is none
        store.faults.clear()
        store.faults += [
            Fault("get", key, occurrence=1, error=not_found),
            Fault("get_file", key, occurrence=1, error=not_found),
        ]
        store.calls.clear()
        assert restored(f"again-{number}") == 10, key


def test_what_stays_missing_is_missing(store: FaultyStore, make_checkpoint: Make, tmp_path: Path) -> None:
    run = Run(store)
    run.claim()
    for step in (5, 10):
        commit(run, make_checkpoint(step), step)
    store.delete([f"{run.find(10).ref.prefix}/optimizer.pt", f"{run.find(10).ref.prefix}/scheduler.pt"])
    found = restore_newest(run, run.state().checkpoints, tmp_path / "out2")
    assert found is not None and found[0].step == 5
    with pytest.raises(CorruptCheckpoint, match=r"optimizer\.pt is missing|scheduler\.pt is missing"):
        run.pull(tmp_path / "pulled", 10)
    assert [len(problems) for problems in run.verify().values()] == [0, 2]


def test_a_checkpoint_that_is_pruned_while_it_is_verified_is_not_called_damaged(
    make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = FaultyStore(LocalStore(tmp_path / "run"))
    run = Run(store)
    run.claim()
    for step in (5, 10, 15):
        commit(run, make_checkpoint(step), step)
    oldest = run.find(5)
    reached, pruned = threading.Event(), threading.Event()
    reader = FaultyStore(LocalStore(tmp_path / "run"))
    reader.faults.append(Fault("get", f"{oldest.ref.prefix}/optimizer.pt", error=None, until=pruned))
    found: dict[int, list[str]] = {}

    def verify() -> None:
        reached.set()
        found.update(Run(reader).verify())

    thread = threading.Thread(target=verify)
    thread.start()
    reached.wait(60)
    while not any("optimizer.pt" in key for _, key in reader.calls):
        pass
    run.prune(2)
    pruned.set()
    thread.join(60)
    assert list(found.values()) == [[], []]
    assert oldest.ref.entry not in found
    assert main(["checkpoints", "verify", str(tmp_path / "run")]) == 0
    assert "missing" not in capsys.readouterr().out
