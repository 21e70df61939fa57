"""What a launch tells about its steps reaches the next one, from the same disk or through the store."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from hf_spot import Run
from hf_spot.errors import CorruptCheckpoint
from hf_spot.policy.redone import Step
from hf_spot.run.mailbox import Mailbox
from hf_spot.run.told_steps import StepFile, Told, path_of, read

STEPS = tuple(Step(1, number, number / 3, 1e-4, f"{number:016x}") for number in range(1, 6))
TOLD = Told(STEPS, {1: {"ranks": 2, "device": "cpu"}})


def test_a_file_says_what_was_told_and_ignores_a_line_that_was_cut_short(tmp_path: Path) -> None:
    path = path_of(tmp_path, "s3://bucket/run", 1, 0)
    file = StepFile(path)
    file.rewrite(Told(STEPS[:3], TOLD.circumstances))
    assert file.append(STEPS[3:])
    assert read(path) == TOLD
    path.write_bytes(path.read_bytes() + bytes(7) + b"\n[1]\n{}\n[[[\n")  # what a machine's crash may leave
    assert read(path) == TOLD
    with path.open("ab") as torn:
        torn.write(b'[1, 6, 2.0, 0.1, "00')
    assert read(path) == TOLD
    file.delete()
    assert read(path) == Told()
    assert path.parent.is_dir()


def test_two_runs_and_two_trainings_in_one_folder_have_files_of_their_own(tmp_path: Path) -> None:
    places = {path_of(tmp_path, url, training, rank) for url in ("a", "b") for training in (1, 2) for rank in (0, 1)}
    assert len(places) == 8


def test_the_store_hands_over_the_newest_launch_that_told_anything_and_forgets_it() -> None:
    url = f"memory://{uuid.uuid4().hex}"
    first = Run(url)
    first.claim()
    Mailbox(first).tell_steps(1, Told())
    Mailbox(first).tell_steps(1, TOLD)
    second, third = Run(url), Run(url)
    second.claim()
    third.claim()
    assert Mailbox(third).told_steps(1, third.launch) == TOLD
    assert Mailbox(third).told_steps(2, third.launch) == Told()
    assert third.collect_garbage() == 0  # nobody needs to read of it
    assert Mailbox(third).told_steps(1, third.launch) == Told()


def test_a_damaged_message_is_named() -> None:
    run = Run(f"memory://{uuid.uuid4().hex}")
    run.claim()
    Mailbox(run)._send("e0001/steps-1.json", {"steps": [[1, "two"]], "circumstances": []})
    with pytest.raises(CorruptCheckpoint, match="launch 1"):
        Mailbox(run).told_steps(1, 2)
