"""The uploader: training never waits, nothing is lost that could be kept, and the newest wins."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hf_spot.errors import Fenced
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.mailbox import Mailbox
from hf_spot.run.run import Run
from hf_spot.run.upload import Uploader
from hf_spot.storage.faulty import Fault, FaultyStore
from hf_spot.storage.memory import MemoryStore
from tests.waiting import PATIENCE_S, wait_for

Make = Callable[..., Path]


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore(MemoryStore(f"memory://{uuid.uuid4().hex}"))


@pytest.fixture
def run(store: FaultyStore) -> Run:
    run = Run(store)
    run.claim()
    return run


@pytest.fixture
def uploader(run: Run, tmp_path: Path) -> Iterator[Uploader]:
    made = Uploader(run, tmp_path / "pins", save_total_limit=None)
    yield made
    made.close()
    assert not (tmp_path / "pins").exists()


def committed(store: FaultyStore) -> list[int]:
    """In the order of the commits."""
    return [entry.data["step"] for entry in Run(store.inner).events() if entry.kind == "commit"]


def steps(store: FaultyStore) -> list[int]:
    return [ref.step for ref in Run(store.inner).state().checkpoints]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_what_is_submitted_is_committed(store: FaultyStore, uploader: Uploader, make_checkpoint: Make) -> None:
    assert uploader.measured().upload_s(1000) is None
    uploader.submit(make_checkpoint(5), CommitRequest(step=5))
    assert uploader.drain(PATIENCE_S)
    assert steps(store) == [5]
    assert (uploader.measured().upload_s(1000) or 0) > 0
    assert uploader.idle
    assert uploader.measured().in_flight_bytes is None


def test_uploads_continue_while_whoever_is_asked_takes_its_time(
    store: FaultyStore, uploader: Uploader, make_checkpoint: Make
) -> None:
    """Rank 0 asks the other ranks, and one of them may wait for the very commit."""
    uploader.submit(make_checkpoint(5), CommitRequest(step=5))
    asked: list[bool] = []

    def interrupted() -> bool:
        asked.append(wait_until(lambda: steps(store) == [5]))
        return False

    assert uploader.drain(PATIENCE_S, interrupted)
    assert all(asked), "nothing was committed while it was asked"


def wait_until(is_so: Callable[[], bool]) -> bool:
    until = time.monotonic() + 10.0
    while not is_so() and time.monotonic() < until:
        time.sleep(0.005)
    return is_so()


def test_trainer_may_delete_the_folder_while_it_is_uploaded(
    store: FaultyStore, uploader: Uploader, make_checkpoint: Make
) -> None:
    gate = threading.Event()
    store.faults.append(Fault("put_file", "*", error=None, until=gate))
    folder = make_checkpoint(5)
    uploader.submit(folder, CommitRequest(step=5))
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()
    gate.set()
    assert uploader.drain(PATIENCE_S)
    assert list(Run(store.inner).verify().values()) == [[]]


def test_saves_that_come_too_fast_give_way_to_the_newest_and_the_best_stays(
    store: FaultyStore, uploader: Uploader, make_checkpoint: Make
) -> None:
    gate = threading.Event()
    store.faults.append(Fault("put_file", "*", error=None, until=gate))
    for step in (1, 2, 3, 4, 5):
        uploader.submit(make_checkpoint(step), CommitRequest(step=step, best_step=3))
        wait_for(lambda step=step: step > 1 or any(call[0] == "put_file" for call in store.calls))
    gate.set()
    assert uploader.drain(PATIENCE_S)
    assert steps(store) == [1, 3, 5]


def test_an_outage_ends_in_a_commit(store: FaultyStore, uploader: Uploader, make_checkpoint: Make) -> None:
    store.outage = True
    uploader.submit(make_checkpoint(1), CommitRequest(step=1))
    wait_for(lambda: uploader.trouble)
    uploader.submit(make_checkpoint(2), CommitRequest(step=2))
    assert not uploader.drain(0.05)
    store.outage = False
    assert uploader.drain(PATIENCE_S)
    assert steps(store) == [2]  # the newer one caught up
    assert uploader.trouble is None
    assert list(uploader._pins.iterdir()) == [], "links hold the space of what nobody needs any more"


def test_who_waits_under_a_deadline_does_not_wait_for_the_pause_after_a_long_outage(
    store: FaultyStore, uploader: Uploader, make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_spot.run.upload._FIRST_RETRY_S", 2 * PATIENCE_S)
    monkeypatch.setattr("hf_spot.run.upload._LONGEST_RETRY_S", 2 * PATIENCE_S)
    uploader.submit(make_checkpoint(1), CommitRequest(step=1))
    assert uploader.drain(PATIENCE_S)
    store.outage = True
    uploader.submit(make_checkpoint(2), CommitRequest(step=2))
    wait_for(lambda: uploader.trouble)
    monkeypatch.setattr("hf_spot.run.upload._FIRST_RETRY_S", 0.05)
    assert not uploader.drain(0.2)  # tries, and fails
    threading.Timer(0.2, lambda: setattr(store, "outage", False)).start()
    assert uploader.drain(PATIENCE_S / 2)


def test_a_commit_whose_answer_is_lost_is_one_commit(store: FaultyStore, uploader: Uploader, make_checkpoint: Make) -> None:
    store.faults.append(Fault("create", "journal/*", answer_lost=True))
    store.faults.append(Fault("get", "journal/*"))
    uploader.submit(make_checkpoint(1), CommitRequest(step=1))
    assert uploader.drain(PATIENCE_S)
    assert steps(store) == [1]
    assert [entry.kind for entry in Run(store.inner).events()] == ["claim", "commit"]


def test_of_several_best_checkpoints_only_the_newest_waits(
    store: FaultyStore, uploader: Uploader, make_checkpoint: Make
) -> None:
    gate = threading.Event()
    store.faults.append(Fault("put_file", "*", error=None, until=gate))
    for step in (1, 2, 3, 4, 5):
        uploader.submit(make_checkpoint(step), CommitRequest(step=step, best_step=min(step, 4)))
        wait_for(lambda step=step: step > 1 or any(call[0] == "put_file" for call in store.calls))
    gate.set()
    assert uploader.drain(PATIENCE_S)
    assert steps(store) == [1, 4, 5]


def test_in_a_hurry_the_newest_goes_before_the_best_that_waits(
    store: FaultyStore, uploader: Uploader, make_checkpoint: Make
) -> None:
    gate = threading.Event()
    store.faults.append(Fault("put_file", "*checkpoint-1/*", error=None, until=gate))
    for step in (1, 2, 3):
        uploader.submit(make_checkpoint(step), CommitRequest(step=step, best_step=2))
        wait_for(lambda step=step: step > 1 or any(call[0] == "put_file" for call in store.calls))
    uploader.hurry(give_way=False)
    gate.set()
    assert uploader.drain(PATIENCE_S)
    assert committed(store) == [1, 3, 2]
    assert steps(store) == [1, 2, 3]


def test_the_best_that_gave_way_is_uploaded_behind_the_newer_one(
    store: FaultyStore, uploader: Uploader, make_checkpoint: Make
) -> None:
    gate = threading.Event()
    store.faults.append(Fault("put_file", "*checkpoint-1/*", error=None, until=gate))
    uploader.submit(make_checkpoint(1), CommitRequest(step=1, best_step=1))
    wait_for(lambda: any(call[0] == "put_file" for call in store.calls))
    uploader.submit(make_checkpoint(2), CommitRequest(step=2, best_step=1))
    uploader.hurry(give_way=True)
    gate.set()
    assert uploader.drain(PATIENCE_S)
    assert committed(store) == [2, 1]
    assert steps(store) == [1, 2]
    assert list(Run(store.inner).verify().values()) == [[], []]


def test_what_is_alone_gives_way_to_nothing(store: FaultyStore, uploader: Uploader, make_checkpoint: Make) -> None:
    gate = threading.Event()
    store.faults.append(Fault("put_file", "*checkpoint-2/*", error=None, until=gate))
    uploader.submit(make_checkpoint(2), CommitRequest(step=2, best_step=1))
    wait_for(lambda: any(call[0] == "put_file" for call in store.calls))
    uploader.hurry(give_way=True)
    gate.set()
    assert uploader.drain(PATIENCE_S)
    assert steps(store) == [2]


def test_what_is_measured_are_the_bytes_on_their_way_and_the_throughput_of_now(
    store: FaultyStore, run: Run, tmp_path: Path, make_checkpoint: Make
) -> None:
    now, gate = [0.0], threading.Event()
    uploader = Uploader(run, tmp_path / "pins", clock=lambda: now[0])
    store.faults.append(Fault("put_file", "*checkpoint-1/trainer_state.json", error=None, until=gate))
    uploader.submit(folder := make_checkpoint(1), CommitRequest(step=1))
    all_bytes, last_bytes = (
        sum(path.stat().st_size for path in folder.rglob(name) if path.is_file()) for name in ("*", "trainer*")
    )
    wait_for(lambda: uploader.measured().in_flight_bytes == last_bytes)
    assert uploader.measured().bytes_per_s is None  # an instant tells nothing
    now[0] = 10.0
    assert uploader.measured().bytes_per_s == (all_bytes - last_bytes) / 10
    assert uploader.measured().waiting_bytes is None
    uploader.submit(newer := make_checkpoint(2), CommitRequest(step=2))
    assert uploader.measured().waiting_bytes == size_of(newer)
    now[0] = 20.0
    gate.set()
    wait_for(lambda: steps(store) == [1, 2])
    uploader.drain(PATIENCE_S)
    measured = uploader.measured()
    assert (measured.in_flight_bytes, measured.waiting_bytes) == (None, None)
    uploader.close()


def test_an_upload_can_give_way_to_a_more_urgent_one(store: FaultyStore, uploader: Uploader, make_checkpoint: Make) -> None:
    gate = threading.Event()
    store.faults.append(Fault("put_file", "*checkpoint-1/*", error=None, until=gate))
    uploader.submit(make_checkpoint(1), CommitRequest(step=1))
    wait_for(lambda: any(call[0] == "put_file" for call in store.calls))
    uploader.submit(make_checkpoint(2), CommitRequest(step=2, reason="notice"))
    uploader.hurry(give_way=True)
    gate.set()
    assert uploader.drain(PATIENCE_S)
    assert steps(store) == [2]


def test_a_fenced_uploader_stops_and_says_so(store: FaultyStore, uploader: Uploader, make_checkpoint: Make) -> None:
    Run(store.inner).claim()
    uploader.submit(make_checkpoint(1), CommitRequest(step=1))
    assert not uploader.drain(PATIENCE_S)
    assert isinstance(uploader.fenced, Fenced)
    assert steps(store) == []


def test_one_bad_checkpoint_does_not_end_the_uploader(store: FaultyStore, uploader: Uploader, make_checkpoint: Make) -> None:
    folder = make_checkpoint(1)
    (folder / "optimizer.pt").unlink()
    uploader.submit(folder, CommitRequest(step=1))
    wait_for(lambda: uploader.trouble)
    uploader.submit(make_checkpoint(2), CommitRequest(step=2))
    assert uploader.drain(PATIENCE_S)
    assert steps(store) == [2]


# -- several machines -------------------------------------------------------------------------------------------------


def halves(make_checkpoint: Make, step: int, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint of two ranks, as two disks hold it."""
    folder = make_checkpoint(step)
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    other = tmp_path / "other" / folder.name
    other.mkdir(parents=True)
    (other / "rng_state_1.pth").write_bytes(b"of rank 1")
    return folder, other


@pytest.fixture
def other_uploader(run: Run, store: FaultyStore, tmp_path: Path) -> Iterator[Uploader]:
    its_run = Run(store)
    its_run.adopt(run.launch)
    made = Uploader(its_run, tmp_path / "other-pins", save_total_limit=None, keeps_house=False)
    yield made
    made.close()


def test_the_commit_stands_only_when_every_machine_has_handed_in_its_part(
    store: FaultyStore, uploader: Uploader, other_uploader: Uploader, make_checkpoint: Make, tmp_path: Path
) -> None:
    mine, theirs = halves(make_checkpoint, 5, tmp_path)
    uploader.submit(mine, CommitRequest(step=5, world_size=2, part=0, parts=2))
    assert not uploader.drain(0.7)
    assert steps(store) == []
    other_uploader.submit(theirs, CommitRequest(step=5, world_size=2, part=1, parts=2))
    assert uploader.drain(PATIENCE_S)
    found = Run(store.inner).find()
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.path for file in found.files}
    assert Run(store.inner).pull(tmp_path / "pulled").joinpath("rng_state_1.pth").read_bytes() == b"of rank 1"


def test_all_machines_choose_one_place_for_a_step_that_is_saved_again(
    store: FaultyStore, run: Run, make_checkpoint: Make, tmp_path: Path
) -> None:
    """As when the training crashes and is started again within a launch, and saves a step twice."""
    saved = []
    for attempt in ("a", "b"):
        standing = [ref.prefix for ref in Run(store.inner).state().checkpoints]
        runs = [run, Run(store)]
        runs[1].adopt(run.launch)
        uploaders = [
            Uploader(one, tmp_path / f"pins-{attempt}-{part}", save_total_limit=None, standing=standing, attempt=attempt)
            for part, one in enumerate(runs)
        ]
        try:
            for turn in range(2):
                folders = halves(make_checkpoint, 5, tmp_path / f"{attempt}-{turn}")
                saved.append(f"of rank 1, {attempt}, {turn}".encode())
                (folders[1] / "rng_state_1.pth").write_bytes(saved[-1])
                for part, folder in enumerate(folders):
                    uploaders[part].submit(folder, CommitRequest(step=5, world_size=2, part=part, parts=2))
                assert all(one.drain(PATIENCE_S) for one in uploaders)
        finally:
            for one in uploaders:
                one.close()
    found = Run(store.inner)
    refs = found.state().checkpoints
    assert [found.read(found.checkpoint(ref), "rng_state_1.pth") for ref in refs] == saved
    assert list(found.verify().values()) == [[]] * len(saved)


@pytest.mark.parametrize("files", [True, False], ids=["uploaded", "given up"])
def test_what_a_machine_said_before_the_training_was_started_again_counts_no_more(
    files: bool, store: FaultyStore, run: Run, make_checkpoint: Make, tmp_path: Path
) -> None:
    mine, theirs = halves(make_checkpoint, 5, tmp_path)
    request = CommitRequest(step=5, world_size=2, part=1, parts=2)
    its_run = Run(store)
    its_run.adopt(run.launch)
    Mailbox(its_run).hand_in(replace(request, attempt="a"), its_run.upload(theirs, request) if files else None)
    # Machine 0 crashed before the commit. Both save the step again.
    uploaders = [
        Uploader(one, tmp_path / f"pins-{part}", save_total_limit=None, attempt="b") for part, one in enumerate((run, its_run))
    ]
    try:
        uploaders[0].submit(mine, replace(request, part=0))
        assert not uploaders[0].drain(0.7)
        (theirs / "rng_state_1.pth").write_bytes(b"of rank 1, again")
        uploaders[1].submit(theirs, request)
        assert uploaders[0].drain(PATIENCE_S)
    finally:
        for one in uploaders:
            one.close()
    found = Run(store.inner)
    assert list(found.verify().values()) == [[]]
    assert found.read(found.find(), "rng_state_1.pth") == b"of rank 1, again"


def test_a_part_that_is_given_up_is_not_waited_for(
    store: FaultyStore, uploader: Uploader, other_uploader: Uploader, make_checkpoint: Make, tmp_path: Path
) -> None:
    gate = threading.Event()
    store.faults.append(Fault("put_file", "*checkpoint-1/rng_state_1.pth", error=None, until=gate))
    parts = {step: halves(make_checkpoint, step, tmp_path) for step in (1, 2, 3)}
    for step, (mine, theirs) in parts.items():
        other_uploader.submit(theirs, CommitRequest(step=step, world_size=2, part=1, parts=2))
        if step == 1:
            wait_for(lambda: not other_uploader._waiting)
        if step == 2:
            uploader.submit(mine, CommitRequest(step=2, world_size=2, part=0, parts=2))
    gate.set()  # step 2 gave way to step 3 on the other machine
    assert uploader.drain(PATIENCE_S)
    uploader.submit(parts[3][0], CommitRequest(step=3, world_size=2, part=0, parts=2))
    assert uploader.drain(PATIENCE_S)
    assert steps(store) == [3]


def test_a_part_that_its_disk_has_no_room_for_is_not_waited_for(
    store: FaultyStore, uploader: Uploader, other_uploader: Uploader, make_checkpoint: Make, tmp_path: Path
) -> None:
    for step in (1, 2):
        mine, theirs = halves(make_checkpoint, step, tmp_path)
        request = CommitRequest(step=step, world_size=2, part=0, parts=2)
        uploader.submit(mine, request)
        if step == 1:
            other_uploader._pins.touch()  # no folder can be made there
            with pytest.raises(NotADirectoryError):
                other_uploader.submit(theirs, replace(request, part=1))
            other_uploader._pins.unlink()
        else:
            other_uploader.submit(theirs, replace(request, part=1))
    assert uploader.drain(PATIENCE_S)
    assert steps(store) == [2]


def test_a_file_that_two_machines_have_is_uploaded_by_one_or_nothing_is_committed(
    store: FaultyStore, uploader: Uploader, other_uploader: Uploader, make_checkpoint: Make, tmp_path: Path
) -> None:
    for step, elsewhere in ((1, ()), (2, ("optimizer.pt",))):
        mine, theirs = halves(make_checkpoint, step, tmp_path)
        (theirs / "optimizer.pt").write_bytes(b"as this machine has it")
        request = CommitRequest(step=step, world_size=2, part=0, parts=2)
        other_uploader.submit(theirs, replace(request, part=1), elsewhere)
        assert other_uploader.drain(PATIENCE_S)
        uploader.submit(mine, request)
        assert uploader.drain(PATIENCE_S)
    assert steps(store) == [2]
    Run(store.inner).pull(tmp_path / "pulled")


def test_a_checkpoint_that_lacks_a_rank_of_another_machine_is_not_committed(
    store: FaultyStore, uploader: Uploader, other_uploader: Uploader, make_checkpoint: Make, tmp_path: Path
) -> None:
    mine, theirs = halves(make_checkpoint, 5, tmp_path)
    other_uploader.submit(theirs, CommitRequest(step=5, world_size=3, part=1, parts=2))
    uploader.submit(mine, CommitRequest(step=5, world_size=3, part=0, parts=2))
    assert uploader.drain(PATIENCE_S)
    assert "rng_state_2.pth" in str(uploader.trouble)
    assert steps(store) == []
