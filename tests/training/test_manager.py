"""Loops without Trainer: the one that a user had, with one import changed, ends as if nothing had happened to it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_spot import Run
from tests.training.loops import Loops, loops_in


@pytest.fixture
def loops(tmp_path: Path) -> Iterator[Loops]:
    with loops_in(tmp_path) as loops:
        yield loops


def kinds(run: Run) -> list[str]:
    return [entry.kind for entry in run.events()]


@pytest.mark.parametrize("workers", [[], ["--workers", "2", "--persistent"]])
def test_a_loop_ends_as_its_home_made_twin_after_kills_and_a_notice(loops: Loops, workers: list[str]) -> None:
    twin = loops.run("twin", *workers, home_made=True)

    for kill_at in (6, 9):  # at the end of an epoch, and in the middle of one
        assert loops.start("run", *workers, "--kill_at", str(kill_at), "--committed").wait() == -signal.SIGKILL
    held = loops.start("run", *workers, "--hold_at", "13")
    held.wait_for_step(13)
    held.interrupt()
    held.go_on_when_it_says("TERMINATE from signal")
    assert held.wait() == 0, held.text()
    run = Run(loops.folder / "run")
    newest = run.latest()
    assert newest is not None and (newest.step, newest.reason) == (13, "notice")
    assert kinds(run)[-1] == "preempted"
    last = loops.run("run", *workers)

    assert last.end() == twin.end()
    steps = {line["step"]: line for line in twin.lines()}
    assert [line["step"] for line in last.lines()] == [*range(1, 7), *range(5, 10), *range(9, 14), *range(14, 19)]
    assert all(line == steps[line["step"]] for line in last.lines())
    assert [one.step for one in run.checkpoints()] == [12, 13, 16]
    assert not any(run.verify().values())


@pytest.mark.parametrize("accelerate", [[], ["--accelerate"]])
def test_two_ranks_stop_at_the_same_step_and_go_on_exactly(loops: Loops, accelerate: list[str]) -> None:
    twin = loops.run("twin", *accelerate, script="ddp_loop.py", ranks=2)

    killed = loops.start("run", *accelerate, "--hold_at", "5", script="ddp_loop.py", ranks=2)
    killed.wait_for_step(5)
    killed.wait_until_it_says("checkpoint-4 committed")
    for rank in (0, 1):
        killed.interrupt(signal.SIGKILL, rank)
    assert killed.wait() == -signal.SIGKILL
    notice = loops.folder / "notice-1"
    heard_by_1 = {"NOTICE_OF_RANK_1": str(notice)}
    held = loops.start("run", *accelerate, "--hold_at", "6", script="ddp_loop.py", ranks=2, env=heard_by_1)
    held.wait_for_step(6)
    notice.touch()
    held.go_on_when_it_says("TERMINATE from file")
    assert held.wait() == 0, held.text()
    newest = Run(loops.folder / "run").latest()
    assert newest is not None and newest.reason == "notice"
    assert newest.step in (6, 7)  # rank 1 may have said already that it had heard nothing
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.path for file in newest.files}
    last = loops.run("run", *accelerate, script="ddp_loop.py", ranks=2)

    assert last.end() == twin.end()
    steps = {line["step"]: line for line in twin.lines()}
    trained = [*range(1, 6), *range(5, newest.step + 1), *range(newest.step + 1, 19)]
    assert [line["step"] for line in last.lines()] == trained
    assert all(line == steps[line["step"]] for line in last.lines())
