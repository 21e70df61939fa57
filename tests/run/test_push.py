"""A checkpoint that is pushed by hand never touches what stands, wherever the push ends and whoever pushes beside it."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_spot.errors import ConfigError, CorruptCheckpoint, IncompleteCheckpoint, SpotError
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.restore import restore_checkpoint, restore_newest
from hf_spot.run.run import Run
from hf_spot.run.upload import Uploader
from hf_spot.storage.faulty import Fault, FaultyStore
from hf_spot.storage.local import LocalStore
from hf_spot.storage.memory import MemoryStore
from hf_spot.storage.store import ObjectStore
from tests.waiting import PATIENCE_S

Make = Callable[..., Path]


class Killed(BaseException):
    """Ends a push where a kill -9 would."""


@pytest.fixture(params=["memory", "directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return MemoryStore(f"memory://{uuid.uuid4().hex}") if request.param == "memory" else LocalStore(tmp_path / "run")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def objects(store: ObjectStore) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list("e")}


def test_a_step_that_stands_is_pushed_beside_it(store: ObjectStore, make_checkpoint: Make, tmp_path: Path) -> None:
    first, second = make_checkpoint(5, tmp_path / "a"), make_checkpoint(5, tmp_path / "b")
    (second / "model.safetensors").write_bytes(b"other weights")
    Run(store).push(first)
    stood = objects(store)
    Run(store).push(second)
    assert {key: objects(store)[key] for key in stood} == stood
    run = Run(store)
    assert list(run.verify().values()) == [[], []]
    assert contents(run.pull(tmp_path / "back", 5)) == contents(second)
    assert not [key for key in objects(store) if key.endswith(".taken")]
    run.claim()
    assert run.collect_garbage() == 0


def test_wherever_a_push_is_killed_what_stood_can_be_restored(
    make_checkpoint: Make, tmp_path: Path, counted: Callable[[str], None]
) -> None:
    first, second = make_checkpoint(5, tmp_path / "a"), make_checkpoint(5, tmp_path / "b")
    (second / "model.safetensors").write_bytes(b"other weights")

    def kill() -> Exception:
        raise Killed

    points = 0
    while True:
        points += 1
        for lost in (False, True):
            store = FaultyStore(MemoryStore(f"memory://{uuid.uuid4().hex}"))
            Run(store).push(first)
            store.faults.append(Fault(occurrence=points, answer_lost=lost, error=kill))
            try:
                Run(store, workers=1).push(second)
                ended = True
            except Killed:
                ended = False
            store.faults.clear()
            store.outage = False
            run = Run(store)
            assert set(map(tuple, run.verify().values())) == {()}
            restored = contents(run.pull(tmp_path / f"back-{points}-{lost}", 5))
            assert restored in (contents(first), contents(second))
            Run(store).push(second)  # the same again, by somebody who saw nothing
            run.claim()
            run.collect_garbage()
            assert set(map(tuple, run.verify().values())) == {()}
        if ended:
            break
    assert points > 10
    counted(f"pushes killed: {2 * points} points, nothing lost")


def test_pushes_at_one_instant_are_commits_of_their_own(store: ObjectStore, make_checkpoint: Make, tmp_path: Path) -> None:
    Run(store).claim()
    folders = [make_checkpoint(5, tmp_path / f"{number}") for number in range(4)]
    for number, folder in enumerate(folders):
        (folder / "model.safetensors").write_bytes(f"weights {number}".encode() * 1000)
    together, trouble = threading.Barrier(len(folders)), []

    def push(folder: Path) -> None:
        run = Run(store)
        together.wait()
        try:
            run.push(folder)
        except BaseException as error:
            trouble.append(error)

    threads = [threading.Thread(target=push, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not trouble
    run = Run(store)
    refs = run.state().checkpoints
    assert len({ref.prefix for ref in refs}) == len(folders)
    assert list(run.verify().values()) == [[]] * len(folders)
    assert {run.read(run.checkpoint(ref), "model.safetensors") for ref in refs} == {
        (folder / "model.safetensors").read_bytes() for folder in folders
    }


def test_a_launch_that_saves_a_step_twice_writes_beside_its_first_commit(make_checkpoint: Make, tmp_path: Path) -> None:
    store = MemoryStore(f"memory://{uuid.uuid4().hex}")
    run = Run(store)
    run.claim()
    for number in range(2):  # and a process of the same launch that begins again
        uploader = Uploader(run, tmp_path / "pins", save_total_limit=None)
        for again in range(2):
            folder = make_checkpoint(5, tmp_path / f"{number}{again}")
            (folder / "model.safetensors").write_bytes(f"weights {number} {again}".encode())
            stood = objects(store)
            uploader.submit(folder, CommitRequest(step=5))
            assert uploader.drain(PATIENCE_S)
            assert {key: objects(store)[key] for key in stood} == stood
        uploader.close()
        run = Run(store)
        run.adopt(1)
    assert [ref.prefix.rpartition("/")[2] for ref in run.state().checkpoints] == [
        "checkpoint-5",
        "checkpoint-5-1",
        "checkpoint-5-2",
        "checkpoint-5-3",
    ]
    assert set(map(tuple, run.verify().values())) == {()}


def test_a_commit_whose_answer_is_lost_is_not_uploaded_again(make_checkpoint: Make, tmp_path: Path) -> None:
    store = FaultyStore(MemoryStore(f"memory://{uuid.uuid4().hex}"))
    run = Run(store)
    run.claim()
    store.faults += [Fault("create", answer_lost=True), Fault("get", "journal/00000002.json")]
    uploader = Uploader(run, tmp_path / "pins")
    uploader.submit(make_checkpoint(5), CommitRequest(step=5))
    assert uploader.drain(PATIENCE_S)
    uploader.close()
    sent = [key for method, key in store.calls if method == "put_file"]
    assert len(sent) == len(set(sent)) > 5
    assert [entry.kind for entry in Run(store).events()] == ["claim", "commit"]


@pytest.mark.parametrize("names", [["readme.txt"], [], ["trainer_state.json", "optimizer.pt"], ["journal/00000001.json"]])
def test_what_is_no_checkpoint_is_refused_before_anything_is_written(
    store: ObjectStore, names: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("hi")
    with pytest.raises(ConfigError, match="not a checkpoint"):
        Run(store).push(folder)
    assert not [*store.list()]


def test_a_finished_run_takes_no_push(store: ObjectStore, make_checkpoint: Make) -> None:
    run = Run(store)
    run.push(make_checkpoint(5))
    run.record("finished", {"step": 5})
    with pytest.raises(ConfigError, match="is finished"):
        Run(store).push(make_checkpoint(7))
    assert [ref.step for ref in Run(store).state().checkpoints] == [5]


def test_a_model_alone_can_be_pushed_and_pulled_and_no_training_resumes_from_it(
    store: ObjectStore, make_checkpoint: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(store)
    run.push(make_checkpoint(5))
    model = make_checkpoint(6)
    (model / "optimizer.pt").unlink()
    run.push(model)
    assert "lacks optimizer.pt" in caplog.text
    assert contents(run.pull(tmp_path / "back", 6)) == contents(model)

    found = restore_newest(run, run.state().checkpoints, tmp_path / "out2")
    assert found is not None
    assert found[0].step == 5
    with pytest.raises(IncompleteCheckpoint, match="no training can resume"):
        restore_checkpoint(run, run.state().checkpoints[-1], tmp_path / "out3")
    with pytest.raises(CorruptCheckpoint, match="the only checkpoint"):
        restore_newest(run, run.state().checkpoints[-1:], tmp_path / "out3")
    assert issubclass(CorruptCheckpoint, SpotError)
