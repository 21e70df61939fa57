"""How far a killed launch had come is known by its disk, or by its heartbeat, and a living one is not called dead."""

from __future__ import annotations

import os
import platform
import uuid
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from hf_spot import Run
from hf_spot.policy.redone import Step
from hf_spot.run.last_words import BY_FILE, BY_HEARTBEAT, LastWords, of_an_earlier_launch, of_the_newest_launch
from hf_spot.run.mailbox import Mailbox
from hf_spot.run.told_steps import Heartbeat, StepFile, Told, path_of, read

NOW = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
GONE = 2**22 - 1  # no process has this number
TIMING = {"restore_s": 0.0, "first_step_s": 2.0, "steps_s": 80.0, "stalled_s": 0.0, "steps": 80, "step": 80}


def beat(output_dir: Path, step: int = 80, launch: int = 1, ago_s: float = 10) -> Heartbeat:
    return Heartbeat(launch, step, NOW - timedelta(seconds=ago_s), TIMING, str(output_dir))


def claimed(**data: Any) -> Run:
    run = Run(f"memory://{uuid.uuid4().hex}")
    run.claim({"hostname": platform.node(), "pid": GONE, **data})
    return run


def words_of(run: Run, now: datetime = NOW) -> LastWords | None:
    return of_the_newest_launch(run, list(run.events()), now)


def test_the_file_on_this_disk_says_more_than_the_heartbeat(tmp_path: Path) -> None:
    run = claimed()
    assert words_of(run) is None
    Mailbox(run).tell_steps(1, Told((), {}, beat(tmp_path)))
    words = words_of(run)
    assert words is not None
    assert (words.step, words.known_by, words.is_over, words.timing["step"]) == (80, BY_HEARTBEAT, True, 80)
    path = path_of(tmp_path, run.url, 1, 0)
    file = StepFile(path)
    file.rewrite(Told(tuple(Step(1, step) for step in range(1, 86)), {}, beat(tmp_path)))
    assert file.append([Step(1, step) for step in range(86, 91)], beat(tmp_path, 85))
    assert read(path).heartbeat == beat(tmp_path, 85)
    file.close()
    os.utime(path, (NOW.timestamp(), NOW.timestamp()))
    words = words_of(run)
    assert words is not None
    assert (words.step, words.known_by, words.time) == (90, BY_FILE, NOW)
    assert LastWords.of(words.to_data()) == words
    run.record("failed", {"step": 90})
    assert words_of(run) is None


@pytest.mark.parametrize(
    ("claim", "ago_s", "is_over"),
    [
        ({}, 10, True),
        ({"pid": os.getpid()}, 10, False),
        ({"hostname": "elsewhere"}, 10, False),
        ({"hostname": "elsewhere"}, 170, False),
        ({"hostname": "elsewhere"}, 190, True),
        ({"pid": "?"}, 10, True),
    ],
)
def test_a_launch_is_over_if_its_process_is_gone_or_it_is_silent(
    claim: dict[str, Any], ago_s: float, is_over: bool, tmp_path: Path
) -> None:
    run = claimed(**claim)
    Mailbox(run).tell_steps(2, Told((), {}, beat(tmp_path, ago_s=ago_s)))
    words = words_of(run)
    assert words is not None
    assert (words.training, words.is_over) == (2, is_over)


def test_the_next_launch_finds_what_was_lost(tmp_path: Path) -> None:
    steps = tuple(Step(launch, step) for launch, last in ((1, 7), (2, 9)) for step in range(5, last + 1))
    told = Told(steps, {}, beat(tmp_path, 8, launch=2))
    by_store = of_an_earlier_launch(told, 3, 1, 5, None)
    assert by_store is not None
    assert (by_store.launch, by_store.step, by_store.known_by) == (2, 8, BY_HEARTBEAT)
    assert by_store.resumed_step == 5
    assert of_an_earlier_launch(told, 3, 1, 9, None) is not None  # nothing is lost, and its time is known
    assert of_an_earlier_launch(told, 3, 1, 10, None) is None
    assert of_an_earlier_launch(Told(), 3, 1, 0, None) is None
    assert of_an_earlier_launch(Told(steps), 3, 1, 5, None) is None  # by a version without heartbeats
    path = path_of(tmp_path, "url", 1, 0)
    file = StepFile(path)
    file.rewrite(Told(steps))
    file.close()
    by_file = of_an_earlier_launch(read(path), 3, 1, 5, path)
    assert by_file is not None
    assert (by_file.step, by_file.known_by) == (9, BY_FILE)


@pytest.mark.parametrize(
    "damage", [{"at": "noon"}, {"at": "2026-01-01T12:00:00"}, {"step": -1}, {"launch": "1"}, {"timing": 3}]
)
def test_words_that_nobody_understands_are_ignored(damage: dict[str, Any]) -> None:
    words = LastWords(1, 1, 90, NOW, BY_FILE)
    assert LastWords.of(words.to_data()) == words
    assert LastWords.of({**words.to_data(), **damage}) is None
