"""A checkpoint that was written and not committed is taken from this disk if it is whole, and of this run: never a torn one."""

from __future__ import annotations

import json
import os
import platform
import shutil
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from hf_spot import Run
from hf_spot.errors import IncompleteCheckpoint
from hf_spot.policy.local_copies import Copy, Happened, newest_on_all, why_not
from hf_spot.run import local_copies
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.local_copies import copies, problems, record
from hf_spot.training.ranks.agreement import Agreement
from hf_spot.training.ranks.disks import Disk
from hf_spot.training.session.local_tier import LocalTier, Taken
from tests.run.crashes import Crash, PowerCut, kill
from tests.run.test_crash_points import NAMES, comes_to_its_end

REQUEST = CommitRequest(step=10, details={"max_steps": 32, "history": {}, "timing": {}})
HERE = platform.node()


def save(out: Path, step: int = 10) -> Path:
    folder = out / f"checkpoint-{step}"
    (folder / "random_states").mkdir(parents=True)
    for name in (*NAMES, "random_states/loader_0.pt"):
        (folder / name).write_bytes(f"{name} of {step}".encode() * 100)
    return folder


def claimed(url: str | None = None, hostname: str = HERE) -> Run:
    run = Run(url or f"memory://{uuid.uuid4().hex}")
    run.claim({"hostname": hostname})
    return run


def find(run: Run, out: Path) -> Taken | None:
    tier = LocalTier(run, Agreement(1), Disk(0, 1, (0,), True), out, lambda: datetime.now(timezone.utc))
    try:
        return tier.find(1, run.state().latest(1))
    finally:
        tier.close()


def test_what_rotation_has_taken_apart_is_not_recorded(tmp_path: Path) -> None:
    run, folder = claimed(), save(tmp_path / "out")
    (folder / "trainer_state.json").unlink()
    with pytest.raises(IncompleteCheckpoint, match=r"lacks trainer_state\.json"):
        record(run, tmp_path / "out", folder, REQUEST)
    assert copies(run, tmp_path / "out", 1, 0) == []
    record(run, tmp_path / "out", folder, replace(REQUEST, parts=2))  # the other disk may have it
    assert len(copies(run, tmp_path / "out", 1, 0)) == 1


@pytest.mark.parametrize("power", [False, True])
def test_killed_at_each_point_of_a_record_there_is_a_whole_one_or_none(power: bool, tmp_path: Path) -> None:
    found, at = [], 0
    while not found or not found[-1]:
        at += 3 if power else 1  # to follow what the disk holds takes long
        disk, after = tmp_path / "disk", tmp_path / "after"
        shutil.rmtree(disk, ignore_errors=True)
        disk.mkdir()
        run = claimed(str(tmp_path / f"run-{at}"))

        def act(at: int = at, run: Run = run, disk: Path = disk, after: Path = after) -> None:
            end: Callable[[], None] = PowerCut(disk, after) if power else kill
            folder = save(disk / "out")
            if power:  # Trainer has written these without fsync; their folders are there
                os.fsync(os.open(disk, os.O_RDONLY))
            with Crash(at, end, disk):
                record(run, disk / "out", folder, REQUEST)
            end()

        assert not comes_to_its_end(act)
        if power:
            shutil.rmtree(disk)
            after.rename(disk)
        there = copies(claimed(run.url), disk / "out", 1, 5)
        assert [problems(one, disk / "out" / "checkpoint-10") for one in there] == [[]] * len(there)
        found.append(bool(there))
        assert at < 100
    assert at > 2 * len(NAMES)


def test_what_is_whole_and_not_committed_is_taken_with_its_details(tmp_path: Path) -> None:
    run = claimed()
    record(run, tmp_path, save(tmp_path), replace(REQUEST, best_step=10))
    assert find(run, tmp_path) is None  # by the same launch
    taken = find(claimed(run.url), tmp_path)
    assert taken is not None
    assert taken.request is not None
    assert (taken.checkpoint.step, taken.checkpoint.ref.launch, taken.checkpoint.ref.best) == (10, 1, True)
    assert taken.request.details == {"max_steps": 32, "saved_by_launch": 1}
    assert taken.checkpoint.details["max_steps"] == 32
    assert {file.path for file in taken.checkpoint.files} == {*NAMES, "random_states/loader_0.pt"}


def damage_size(out: Path) -> None:
    (out / "checkpoint-10" / NAMES[0]).write_bytes(b"short")


def damage_bit(out: Path) -> None:
    path = out / "checkpoint-10" / NAMES[1]
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)


def add_file(out: Path) -> None:
    (out / "checkpoint-10" / "optimizer_1.bin").write_bytes(b"half")


def remove_file(out: Path) -> None:
    (out / "checkpoint-10" / NAMES[3]).unlink()


def remove_folder(out: Path) -> None:
    shutil.rmtree(out / "checkpoint-10")


def forge(out: Path) -> None:
    path = out / ".hf_spot" / "whole-1-10.json"
    path.write_text(path.read_text().replace('"launch":1', '"launch":2'))


def rename(out: Path) -> None:
    (out / ".hf_spot" / "whole-1-10.json").rename(out / ".hf_spot" / "whole-1-11.json")
    (out / "checkpoint-10").rename(out / "checkpoint-11")


def fill(out: Path) -> None:
    (out / ".hf_spot" / "whole-1-10.json").write_bytes(bytes(100))


@pytest.mark.parametrize("damage", [damage_size, damage_bit, add_file, remove_file, remove_folder, forge, rename, fill])
def test_what_is_damaged_is_not_taken(damage: Callable[[Path], None], tmp_path: Path) -> None:
    run = claimed()
    record(run, tmp_path, save(tmp_path), REQUEST)
    damage(tmp_path)
    assert find(claimed(run.url), tmp_path) is None


def test_another_run_and_another_key_can_not_slip_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = claimed()
    record(run, tmp_path, save(tmp_path), REQUEST)
    again = claimed()  # a run that was deleted and begun again has the same URL and the same numbers
    claimed(again.url)
    assert find(Run(again.url), tmp_path) is None
    monkeypatch.setenv("HF_SPOT_JOURNAL_KEY", "k" * 32)
    signed = claimed()
    claimed(signed.url)
    assert find(Run(signed.url), tmp_path) is None
    assert not list((tmp_path / ".hf_spot").glob("whole-*"))  # nobody signed it


@pytest.mark.parametrize(
    ("launch", "current", "since", "why"),
    [
        (1, 2, [("claim", 2, HERE), ("claim", 1, HERE)], None),
        (1, 2, [("claim", 2, "b"), ("notice", 1, None), ("commit", 1, None)], None),
        (1, 3, [("claim", 3, HERE), ("claim", 2, HERE), ("claim", 1, HERE)], None),
        (1, 3, [("claim", 3, HERE), ("claim", 2, "b"), ("claim", 1, HERE)], "launch 2 was on another machine"),
        (1, 3, [("commit", 2, None), ("claim", 2, HERE), ("claim", 1, HERE)], "launch 2 has committed since"),
        (1, 2, [("rollback", 1, None), ("claim", 1, HERE)], "launch 1 took its last steps back, after NaN"),
        (2, 2, [], "launch 2 is not an earlier one"),
    ],
)
def test_the_journal_is_the_judge(launch: int, current: int, since: list[Any], why: str | None) -> None:
    assert why_not(launch, current, HERE, [Happened(*one) for one in since]) == why


def test_later_entries_of_the_journal_count(tmp_path: Path) -> None:
    run = claimed()
    record(run, tmp_path, save(tmp_path), REQUEST)
    second = claimed(run.url, hostname="elsewhere")
    assert find(second, tmp_path) is not None
    third = claimed(run.url)
    assert find(third, tmp_path) is None
    third.record("commit", {**CommitRequest(step=5).to_data(3), "files": []})
    assert find(claimed(run.url), tmp_path) is None
    third = Run(run.url)
    third.claim({})
    third.record("commit", {**CommitRequest(step=10).to_data(3), "files": []})
    assert find(claimed(run.url), tmp_path) is None
    assert not list((tmp_path / ".hf_spot").glob("whole-*"))  # it is committed


def test_several_disks_must_all_have_their_own_part_of_one_save() -> None:
    def on(part: int, *steps: int, parts: int = 2, attempt: str = "a", launch: int = 1) -> list[Copy]:
        return [Copy(launch, step, attempt, part, parts) for step in steps]

    assert newest_on_all([on(0, 10, 20), on(1, 10, 20)]) == [(1, 20, "a"), (1, 10, "a")]
    assert newest_on_all([on(0, 10, 20), on(1, 10)]) == [(1, 10, "a")]
    assert newest_on_all([on(0, 10), on(1, 20)]) == []
    assert newest_on_all([on(0, 10), on(1, 10, attempt="b")]) == []
    assert newest_on_all([on(0, 10), on(0, 10)]) == []
    assert newest_on_all([on(0, 10), on(1, 10), on(2, 10)]) == []
    assert newest_on_all([on(0, 10), on(1, 10, launch=2)]) == []
    assert newest_on_all([on(0, 10, parts=1)]) == [(1, 10, "a")]


def test_few_records_are_kept_and_those_that_were_cut_short_go(tmp_path: Path) -> None:
    run = claimed()
    for step in (10, 20, 30):
        record(run, tmp_path, save(tmp_path, step), replace(REQUEST, step=step))
    assert [one.request.step for one in copies(run, tmp_path, 1, 0)] == [20, 30]
    local_copies.forget(tmp_path, 1, 20)
    assert [one.request.step for one in copies(run, tmp_path, 1, 0)] == [30]
    told = json.loads((tmp_path / ".hf_spot" / "whole-1-30.json").read_bytes())
    assert (told["launch"], told["run"]) == (1, run.journal.read(1).id)
