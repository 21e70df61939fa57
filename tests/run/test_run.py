"""A run from outside: commit, pull, fall back, prune, push."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_spot.errors import ConfigError, CorruptCheckpoint, Fenced, IncompleteCheckpoint, NoCheckpoint
from hf_spot.run.checkpoint import Checkpoint, CommitRequest
from hf_spot.run.output_folder import enter, foreign_checkpoints, set_aside_uncommitted
from hf_spot.run.restore import restore_newest
from hf_spot.run.run import Run
from hf_spot.storage.memory import MemoryStore

Make = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    return MemoryStore(f"memory://{tmp_path.name}")


@pytest.fixture
def run(store: MemoryStore) -> Run:
    run = Run(store)
    run.claim()
    return run


def commit(run: Run, folder: Path, **more: object) -> None:
    request = CommitRequest(step=int(folder.name.split("-")[1]), **more)  # type: ignore[arg-type]
    run.commit(request, run.upload(folder, request))


def restore(store: MemoryStore, into: Path) -> tuple[Checkpoint, Path] | None:
    run = Run(store)
    return restore_newest(run, run.state().checkpoints, into)


def same(a: Path, b: Path) -> bool:
    def contents(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    return contents(a) == contents(b)


def test_what_is_pulled_is_what_was_committed(run: Run, make_checkpoint: Make, tmp_path: Path) -> None:
    folder = make_checkpoint(5)
    commit(run, folder)
    pulled = Run(run.store).pull(tmp_path / "elsewhere")
    assert pulled == tmp_path / "elsewhere" / "checkpoint-5"
    assert same(pulled, folder)
    assert not (tmp_path / "elsewhere" / ".hf_spot" / "restore").exists()


def test_half_an_upload_is_invisible(run: Run, make_checkpoint: Make) -> None:
    run.upload(make_checkpoint(5), CommitRequest(step=5))
    assert Run(run.store).latest() is None
    with pytest.raises(NoCheckpoint, match="no committed checkpoint"):
        Run(run.store).pull("/nowhere")


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_is_taken(
    run: Run, store: MemoryStore, make_checkpoint: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = make_checkpoint(5)
    commit(run, good)
    commit(run, make_checkpoint(10))
    store.put("e0001/checkpoint-10/optimizer.pt", b"flipped")
    found = restore(store, tmp_path / "new")
    assert found is not None
    assert found[0].step == 5
    assert same(found[1], good)
    assert "optimizer.pt has 7 bytes" in caplog.text
    assert not (tmp_path / "new" / "checkpoint-10").exists()


def test_a_checkpoint_whose_object_is_gone_is_passed_over(
    run: Run, store: MemoryStore, make_checkpoint: Make, tmp_path: Path
) -> None:
    commit(run, make_checkpoint(5))
    commit(run, make_checkpoint(10))
    store.delete(["e0001/checkpoint-10/scheduler.pt"])
    found = restore(store, tmp_path / "new")
    assert found is not None and found[0].step == 5


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_afresh_in_silence(
    run: Run, store: MemoryStore, make_checkpoint: Make, tmp_path: Path
) -> None:
    commit(run, make_checkpoint(5))
    store.put("e0001/checkpoint-5/model.safetensors", b"")
    with pytest.raises(CorruptCheckpoint, match="the only checkpoint of"):
        restore(store, tmp_path / "new")


@pytest.mark.parametrize("lost", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_folder_that_would_reset_something_in_silence_is_not_committed(run: Run, make_checkpoint: Make, lost: str) -> None:
    folder = make_checkpoint(5)
    (folder / lost).unlink()
    with pytest.raises(IncompleteCheckpoint, match=lost):
        run.upload(folder, CommitRequest(step=5))


def test_a_local_folder_that_is_the_same_is_used_and_one_that_differs_is_set_aside(
    run: Run, store: MemoryStore, make_checkpoint: Make, tmp_path: Path
) -> None:
    folder = make_checkpoint(5)
    commit(run, folder)
    inode = (folder / "optimizer.pt").stat().st_ino
    restore(store, tmp_path / "out")
    assert (folder / "optimizer.pt").stat().st_ino == inode
    (folder / "optimizer.pt").write_bytes(b"torn")
    restore(store, tmp_path / "out")
    assert (folder / "optimizer.pt").stat().st_ino != inode
    assert (tmp_path / "out" / "torn-checkpoint-5" / "optimizer.pt").read_bytes() == b"torn"


def test_newer_local_folders_that_were_never_committed_are_set_aside(run: Run, make_checkpoint: Make, tmp_path: Path) -> None:
    for step in (5, 10, 15):
        make_checkpoint(step)
    set_aside_uncommitted(run, tmp_path / "out", resume_step=10)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["checkpoint-10", "checkpoint-5", "torn-checkpoint-15"]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".hf_spot")


def test_checkpoints_from_before_hf_spot_are_kept_under_another_name_and_offered(
    run: Run, make_checkpoint: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        before = {path.name: path.read_bytes() for path in make_checkpoint(5).iterdir() if path.is_file()}
        (tmp_path / "out" / ".hf_spot" / "run").unlink(missing_ok=True)
        with caplog.at_level(logging.WARNING, logger="hf_spot"):
            enter(run, tmp_path / "out", keep=False)
    assert names_in(tmp_path / "out") == ["other-checkpoint-5", "other-checkpoint-5.2"]
    kept = tmp_path / "out" / "other-checkpoint-5.2"
    assert {path.name: path.read_bytes() for path in kept.iterdir() if path.is_file()} == before
    assert f"was there before this run: it is kept as {kept.name}. To start a run from it: --from {kept}" in caplog.text
    # The second launch of this run knows that what it finds must be its own.
    make_checkpoint(10)
    enter(run, tmp_path / "out", keep=False)
    set_aside_uncommitted(run, tmp_path / "out", resume_step=0)
    assert names_in(tmp_path / "out") == ["other-checkpoint-5", "other-checkpoint-5.2", "torn-checkpoint-10"]


def test_checkpoints_that_the_script_resumes_from_stay_in_every_launch(run: Run, make_checkpoint: Make, tmp_path: Path) -> None:
    make_checkpoint(5)
    for _ in range(2):
        enter(run, tmp_path / "out", keep=True)
        set_aside_uncommitted(run, tmp_path / "out", resume_step=0)
        assert names_in(tmp_path / "out") == ["checkpoint-5"]
        assert foreign_checkpoints(tmp_path / "out") == {"checkpoint-5"}


def test_checkpoints_of_another_run_or_training_are_named_as_what_they_are(
    run: Run, make_checkpoint: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Run(MemoryStore("memory://other"))
    enter(other, tmp_path / "out", keep=False)
    commit(run, make_checkpoint(3))
    make_checkpoint(5)
    with caplog.at_level(logging.WARNING, logger="hf_spot"):
        enter(run, tmp_path / "out", keep=False)
    assert names_in(tmp_path / "out") == ["checkpoint-3", "other-checkpoint-5"]
    assert "checkpoint-5 belongs to memory://other" in caplog.text
    commit(run, make_checkpoint(10))  # of training 1; training 2 uses the same folder
    make_checkpoint(12)
    with caplog.at_level(logging.WARNING, logger="hf_spot"):
        set_aside_uncommitted(run, tmp_path / "out", 3, training=2)
    assert names_in(tmp_path / "out") == ["checkpoint-3", "other-checkpoint-10", "other-checkpoint-5", "torn-checkpoint-12"]
    assert "checkpoint-10 belongs to training 1 of this run" in caplog.text
    # Training 1 is restored again in each launch, and nothing piles up; a training that begins leaves it where it is.
    make_checkpoint(10)
    set_aside_uncommitted(run, tmp_path / "out", 3, training=2)
    assert names_in(tmp_path / "out") == ["checkpoint-3", "other-checkpoint-10", "other-checkpoint-5", "torn-checkpoint-12"]
    make_checkpoint(10)
    set_aside_uncommitted(run, tmp_path / "out", 0, training=2)
    assert (tmp_path / "out" / "checkpoint-10").is_dir()


def test_pruning_keeps_the_newest_and_the_best_and_deletes_the_files(
    run: Run, store: MemoryStore, make_checkpoint: Make
) -> None:
    for step in (5, 10, 15, 20):
        commit(run, make_checkpoint(step), best_step=5)
    assert [ref.step for ref in run.prune(2)] == [10]
    assert [ref.step for ref in Run(store).state().checkpoints] == [5, 15, 20]
    assert not list(store.list("e0001/checkpoint-10/"))
    assert Run(store).verify() == {2: [], 4: [], 5: []}


def test_files_that_a_dead_launch_left_behind_are_collected_and_committed_ones_stay(
    run: Run, store: MemoryStore, make_checkpoint: Make
) -> None:
    commit(run, make_checkpoint(5))
    run.upload(make_checkpoint(10), CommitRequest(step=10))
    successor = Run(store)
    successor.claim()
    successor.upload(make_checkpoint(10), CommitRequest(step=10))
    assert successor.collect_garbage() == 6
    assert {info.key.split("/checkpoint")[0] for info in store.list("e")} == {"e0001", "e0002"}
    assert Run(store).verify() == {2: []}


def test_a_zombie_can_not_commit_over_its_successor(run: Run, store: MemoryStore, make_checkpoint: Make) -> None:
    request = CommitRequest(step=5)
    files = run.upload(make_checkpoint(5), request)
    successor = Run(store)
    successor.claim()
    with pytest.raises(Fenced):
        run.commit(request, files)
    assert Run(store).latest() is None


def test_pushing_beside_a_running_launch_fences_nobody(run: Run, store: MemoryStore, make_checkpoint: Make) -> None:
    pushed = Run(store).push(make_checkpoint(5))
    assert (pushed.step, pushed.ref.prefix) == (5, "e0001/pushed/checkpoint-5")
    commit(run, make_checkpoint(10))
    assert [ref.step for ref in Run(store).state().checkpoints] == [5, 10]


def test_pushing_what_is_no_folder_or_has_no_step_says_what_to_type(store: MemoryStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a folder"):
        Run(store).push(tmp_path / "missing")
    with pytest.raises(ConfigError, match="--step"):
        Run(store).push(tmp_path)


def test_verify_names_the_damaged_file(run: Run, store: MemoryStore, make_checkpoint: Make) -> None:
    commit(run, make_checkpoint(5))
    store.put("e0001/checkpoint-5/sub/.metadata", b"x")
    problems = Run(store).verify()[2]
    assert len(problems) == 1 and "sub/.metadata" in problems[0]


def test_a_manifest_that_points_outside_is_refused_before_anything_is_fetched(run: Run, tmp_path: Path) -> None:
    data = {
        "step": 5, "stage": 1, "reason": "schedule", "complete": False, "best_step": None, "world_size": 1,
        "prefix": "e0001/checkpoint-5", "files": [{"path": "../../evil", "size": 1, "digest": "blake3:" + "0" * 64}],
    }  # fmt: skip
    run.journal.append("commit", data)
    with pytest.raises(CorruptCheckpoint, match="outside"):
        Run(run.store).pull(tmp_path)


def test_what_killed_probes_left_goes_after_a_day(store: MemoryStore) -> None:
    for began_s in (time.time() - 90_000, time.time() - 80_000):
        store.put(f".probe/{began_s:.0f}-abc", b"first")
    run = Run(store)
    run.claim()
    assert run.collect_garbage() == 1
    assert [int(info.key[7:].split("-")[0]) > time.time() - 86_400 for info in store.list(".probe/")] == [True]
