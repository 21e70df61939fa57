"""Copies of checkpoints in memory: a copy that was cut short, damaged, or is of another run or launch is never taken."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from hf_spot import Run
from hf_spot.errors import StoreUnavailable
from hf_spot.run import memory_copies
from hf_spot.run.digest import PART_BYTES, digest_of
from hf_spot.run.local_copies import copies, problems, record
from hf_spot.run.memory_copies import MemoryCopies
from hf_spot.run.page_cache import is_cached
from hf_spot.run.restore import restore_newest
from hf_spot.training.ranks.agreement import Agreement
from hf_spot.training.ranks.disks import Disk
from hf_spot.training.session import local_tier
from hf_spot.training.session.local_tier import DISK, MEMORY, LocalTier, Taken
from tests.run.crashes import kill
from tests.run.test_crash_points import NAMES, comes_to_its_end
from tests.run.test_local_copies import REQUEST, claimed, save
from tests.waiting import wait_for

DATA = 4096  # where the first file of a half begins


@pytest.fixture
def halves() -> Iterator[list[Path]]:
    """The memory of a launch, which outlives the processes that use it."""
    made = memory_copies.create()
    yield [Path(f"/proc/{os.getpid()}/fd/{one}") for one in made]
    for one in made:
        os.close(one)


def keep(halves: list[Path], run: Run, folder: Path, step: int = 10, launch: int | None = None, **changed: object) -> None:
    with closing(MemoryCopies(halves)) as memory:
        request = replace(REQUEST, step=step, **changed)  # type: ignore[arg-type]
        memory.keep(run.journal.read(1).id, launch or run.launch, request, folder, run.journal.key)


def steps(halves: list[Path], key: bytes | None = None) -> list[int]:
    with closing(MemoryCopies(halves)) as memory:
        return [one.copy.request.step for one in memory.copies(key)]


def tier_of(run: Run, out: Path, halves: list[Path], limit_bytes: int | None = None) -> LocalTier:
    disk, memory = Disk(0, 1, (0,), True), MemoryCopies(halves)
    return LocalTier(run, Agreement(1), disk, out, lambda: datetime.now(timezone.utc), memory, limit_bytes)


def find(run: Run, out: Path, halves: list[Path]) -> Taken | None:
    tier = tier_of(run, out, halves)
    try:
        return tier.find(1, run.state().latest(1))
    finally:
        tier.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_two_newest_copies_are_there_and_the_older_one_gives_way(halves: list[Path], tmp_path: Path) -> None:
    run = claimed()
    for step in (10, 20, 30, 5):  # after a rollback numbers may fall
        keep(halves, run, save(tmp_path, step), step)
    assert steps(halves) == [5, 30]
    with closing(MemoryCopies(halves)) as memory:
        assert memory.held_bytes >= 2 * sum(map(len, contents(tmp_path / "checkpoint-5").values()))
        memory.write_out(memory.copies(None)[1], tmp_path / "again")
        assert contents(tmp_path / "again") == contents(tmp_path / "checkpoint-30")
        memory.clear()
        assert (memory.copies(None), memory.held_bytes) == ([], 0)


@pytest.mark.parametrize("size_bytes", [0, 1, 4096, PART_BYTES + 5])
def test_files_of_all_sizes_come_back_with_the_digest_of_files(size_bytes: int, halves: list[Path], tmp_path: Path) -> None:
    run, folder = claimed(), save(tmp_path)
    (folder / "optimizer.pt").write_bytes(os.urandom(size_bytes))
    keep(halves, run, folder)
    with closing(MemoryCopies(halves)) as memory:
        (kept,) = memory.copies(None)
        assert {file.path: file.digest for file in kept.copy.files}["optimizer.pt"] == digest_of(folder / "optimizer.pt")
        memory.write_out(kept, tmp_path / "again")
    assert problems(kept.copy, tmp_path / "again") == []
    assert contents(tmp_path / "again") == contents(folder)


def test_killed_at_each_write_of_a_copy_the_one_before_is_whole(halves: list[Path], tmp_path: Path) -> None:
    run = claimed()
    older, old, new = (save(tmp_path, step) for step in (5, 10, 20))
    found: list[list[int]] = []
    while not found or found[-1] != [20, 10]:
        with closing(MemoryCopies(halves)) as memory:
            memory.clear()
        keep(halves, run, older, 5)
        keep(halves, run, old, 10)

        def act(number: int = len(found)) -> None:
            left = [number]

            def write(half: int, data: bytes, at: int, plain: Callable[..., int] = os.pwrite) -> int:
                if not left[0]:
                    plain(half, bytes(data)[: len(data) // 2], at)
                    kill()
                left[0] -= 1
                return plain(half, data, at)

            os.pwrite = write  # type: ignore[assignment]
            keep(halves, run, new, 20)
            kill()

        assert not comes_to_its_end(act)
        found.append(steps(halves))
        assert len(found) < 50
    assert found[:-1] == [[10]] * (len(found) - 1)
    assert len(found) > len(NAMES)


def flip(halves: list[Path], at: int) -> None:
    for half in halves:
        with half.open("r+b", buffering=0) as file:
            if byte := os.pread(file.fileno(), 1, at):
                os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), at)


@pytest.mark.parametrize("place", ["header", "data", "index"])
def test_a_flipped_byte_is_found_wherever_it_is(place: str, halves: list[Path], tmp_path: Path) -> None:
    run = claimed()
    keep(halves, run, save(tmp_path))
    shutil.rmtree(tmp_path / "checkpoint-10")
    size_bytes = max(half.stat().st_size for half in halves)
    flip(halves, {"header": 9, "data": DATA + 7, "index": size_bytes - 100}[place])
    assert find(claimed(run.url), tmp_path, halves) is None
    assert not list(tmp_path.glob("checkpoint-*")) and not list(tmp_path.glob(".hf_spot/memory-*"))


def test_of_a_damaged_copy_the_disk_serves_and_then_the_one_before(
    halves: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = claimed()
    for step in (10, 20):
        keep(halves, run, save(tmp_path, step), step)
    record(run, tmp_path, tmp_path / "checkpoint-20", replace(REQUEST, step=20))
    flip(halves, DATA + 7)
    with closing(MemoryCopies(halves)) as memory:  # of the older one nothing was flipped
        memory.write_out(memory.copies(None)[0], tmp_path / "newest")
    assert contents(tmp_path / "newest") != contents(tmp_path / "checkpoint-20")
    flip([half for half in halves if half != newest_half(halves)], DATA + 7)
    shutil.rmtree(tmp_path / "checkpoint-10")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_tier, "is_cached", lambda path: False)
        taken = find(claimed(run.url), tmp_path, halves)
    assert taken is not None and (taken.checkpoint.step, taken.place) == (20, DISK)
    assert "checkpoint-20 is looked for on the disk: in its copy in memory, " in caplog.text
    shutil.rmtree(tmp_path / "checkpoint-20")
    taken = find(claimed(run.url), tmp_path, halves)
    assert taken is not None and (taken.checkpoint.step, taken.place) == (10, MEMORY)
    assert "checkpoint-20 of launch 1 was not committed, and is not taken" in caplog.text
    assert contents(tmp_path / "checkpoint-10") == contents(save(tmp_path / "other", 10))


def newest_half(halves: list[Path]) -> Path:
    with closing(MemoryCopies(halves)) as memory:
        return halves[memory.copies(None)[0].half]


def test_a_copy_is_taken_with_its_details_whatever_has_become_of_the_disk(halves: list[Path], tmp_path: Path) -> None:
    run, out = claimed(), tmp_path / "out"
    before = contents(save(out))
    keep(halves, run, out / "checkpoint-10", best_step=10)
    assert find(run, out, halves) is None  # by the same launch
    shutil.rmtree(out)
    out.mkdir()
    taken = find(claimed(run.url), out, halves)
    assert taken is not None and taken.request is not None
    assert (taken.checkpoint.step, taken.checkpoint.ref.launch, taken.place) == (10, 1, MEMORY)
    assert taken.request.details == {"max_steps": 32, "saved_by_launch": 1, "taken_from": "memory"}
    assert contents(out / "checkpoint-10") == before
    (out / "checkpoint-10" / NAMES[0]).write_bytes(b"torn")
    (out / "checkpoint-10" / "half").write_bytes(b"of something else")
    assert find(claimed(run.url), out, halves) is not None
    assert contents(out / "checkpoint-10") == before


def test_what_stands_whole_on_the_disk_is_not_written_again(halves: list[Path], tmp_path: Path) -> None:
    run = claimed()
    folder = save(tmp_path)
    keep(halves, run, folder)
    before = {path: path.stat().st_ino for path in folder.rglob("*")}
    taken = find(claimed(run.url), tmp_path, halves)
    assert taken is not None and taken.place == MEMORY
    assert all(map(is_cached, filter(Path.is_file, before)))
    assert {path: path.stat().st_ino for path in folder.rglob("*")} == before


def test_a_full_disk_is_no_reason_to_fail(halves: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = claimed()
    keep(halves, run, save(tmp_path))
    shutil.rmtree(tmp_path / "checkpoint-10")
    (tmp_path / ".hf_spot").mkdir()
    (tmp_path / ".hf_spot" / "memory-10").write_bytes(b"")  # in the way
    assert find(claimed(run.url), tmp_path, halves) is None


def test_another_run_another_key_and_another_disk_can_not_slip_in(
    halves: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, folder = claimed(), save(tmp_path)
    keep(halves, run, folder)
    again = claimed()  # a run that was deleted and begun again has the same URL and the same numbers
    claimed(again.url)
    assert find(Run(again.url), tmp_path, halves) is None
    assert find(claimed(run.url), tmp_path, halves) is not None
    keep(halves, run, folder, 20, parts=2)  # now there is one disk
    taken = find(claimed(run.url), tmp_path, halves)
    assert taken is not None and taken.checkpoint.step == 10
    monkeypatch.setenv("HF_SPOT_JOURNAL_KEY", "k" * 32)
    signed = claimed()
    claimed(signed.url)
    assert find(Run(signed.url), tmp_path, halves) is None  # nobody signed it
    assert "a copy of a checkpoint in this machine's memory is ignored" in caplog.text


@pytest.mark.parametrize("happens", ["elsewhere", "commit", "rollback"])
def test_the_journal_is_the_judge_of_memory_too(happens: str, halves: list[Path], tmp_path: Path) -> None:
    run = claimed()
    keep(halves, run, save(tmp_path))
    if happens == "elsewhere":
        claimed(run.url, hostname="elsewhere")
    elif happens == "commit":
        run.record("commit", {**REQUEST.to_data(1), "files": []})
    else:
        run.record("rollback", {"step": 12})
    assert find(claimed(run.url), tmp_path, halves) is None


@pytest.mark.parametrize("lacks", ["disk", "half of it", "nothing"])
def test_what_is_committed_is_neither_read_from_the_store_nor_from_the_disk(
    lacks: str, halves: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = claimed(), tmp_path / "out"
    folder = save(out)
    keep(halves, run, folder)
    files = run.upload(folder, REQUEST)
    run.commit(REQUEST, files)
    before = contents(folder)
    if lacks == "half of it":
        flip(halves, DATA + 7)
    if lacks != "nothing":
        shutil.rmtree(folder)
    else:
        (folder / "own").touch()
    again = claimed(run.url)
    tier = tier_of(again, out, halves)
    (newest,) = again.state().checkpoints
    tier.put_back(newest)
    tier.close()
    assert folder.exists() == (lacks != "half of it")
    if lacks == "disk":
        monkeypatch.setattr(Run, "fetch", None)
        restored = restore_newest(again, [newest], out)
        assert restored is not None and contents(restored[1]) == before


def test_copies_are_kept_while_the_store_does_not_answer(
    halves: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = claimed()
    tier = tier_of(run, tmp_path, halves)
    tier.prepare()

    def no_answer(key: str) -> bytes:
        raise StoreUnavailable("no answer")

    wait_for(lambda: run.journal._run_id is not None, "for the run's id")
    monkeypatch.setattr(run.store, "get", no_answer)
    tier.saved(save(tmp_path), REQUEST, lambda: 0)
    wait_for(lambda: steps(halves) == [10], "for the copy")
    tier.close()
    monkeypatch.undo()
    taken = find(claimed(run.url), tmp_path, halves)
    assert taken is not None and taken.place == MEMORY


def test_memory_and_disk_have_one_digest_and_the_files_are_read_once(
    halves: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder, read = claimed(), save(tmp_path), []
    monkeypatch.setattr(memory_copies, "digest_of", lambda path, **how: read.append(path) or digest_of(path, **how))
    monkeypatch.setattr("hf_spot.run.local_copies.digest_of", lambda path: read.append(path) or digest_of(path))
    tier = tier_of(run, tmp_path, halves)
    tier.saved(folder, REQUEST, lambda: 0)
    wait_for(lambda: (tmp_path / ".hf_spot" / "whole-1-10.json").exists(), "for the record")
    assert sorted(read) == sorted(path for path in folder.rglob("*") if path.is_file())
    (recorded,) = copies(run, tmp_path, 1, 0)
    with closing(MemoryCopies(halves)) as memory:
        assert memory.copies(None)[0].copy.files == recorded.files
    tier.close()


def test_with_too_little_memory_the_disk_alone_serves_and_one_line_says_so(
    halves: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="hf_spot")
    run = claimed()
    tier = tier_of(run, tmp_path, halves, limit_bytes=45_000)
    tier.saved(save(tmp_path), REQUEST, lambda: 0)
    wait_for(lambda: (tmp_path / ".hf_spot" / "whole-1-10.json").exists(), "for the record")
    assert steps(halves) == [10]
    tier.saved(save(tmp_path, 15), replace(REQUEST, step=15), lambda: 0, in_memory=False)  # the machine goes
    wait_for(lambda: (tmp_path / ".hf_spot" / "whole-1-15.json").exists(), "for the record")
    assert steps(halves) == [10]
    big = save(tmp_path, 20)
    (big / "optimizer.pt").write_bytes(bytes(20_000))
    for step, folder in ((20, big), (30, save(tmp_path, 30))):
        tier.saved(folder, replace(REQUEST, step=step), lambda: 0)
        wait_for(lambda step=step: (tmp_path / ".hf_spot" / f"whole-1-{step}.json").exists(), "for the record")  # type: ignore[misc]
    tier.close()
    assert caplog.text.count("checkpoints are taken from the disk and not from memory, because --save-memory-gb 4.5e-05") == 1
    assert [half.stat().st_size for half in halves] == [0, 0]


@pytest.mark.parametrize("size_bytes", [10_000, 3])
def test_a_file_that_changes_meanwhile_spoils_nothing(
    size_bytes: int, halves: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = claimed()
    keep(halves, run, save(tmp_path, 10), 10)

    def change(path: Path, **how: Any) -> str:
        path.write_bytes(bytes(size_bytes))
        return digest_of(path, **how)

    monkeypatch.setattr(memory_copies, "digest_of", change)
    with pytest.raises(OSError, match="while it is copied"):
        keep(halves, run, save(tmp_path, 20), 20)
    assert steps(halves) == [10]


def test_only_the_memory_of_a_launch_is_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="Invalid argument"):
        MemoryCopies([tmp_path / "file", tmp_path / "file"])
    with (tmp_path / "file").open("r+b") as file, pytest.raises(FileNotFoundError, match="is no memory of a launch"):
        MemoryCopies([Path(f"/proc/self/fd/{file.fileno()}")])
