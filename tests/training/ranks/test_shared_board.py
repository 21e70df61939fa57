"""What several processes show one another is what each of them reads, and who is gone is not waited for."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from hf_spot.training.ranks import shared_board
from hf_spot.training.ranks.shared_board import Board, Gone, open_together

RANKS, ROUNDS = 3, 3000
PATIENCE_S = 60.0
PROCESSES: Any = multiprocessing.get_context("spawn")


def numbers(rank: int, round_: int) -> list[float]:
    return [random.Random(f"{rank} {round_} {place}").uniform(-1e18, 1e18) for place in range(2)]


def play(path: Path, rank: int, told: Connection) -> None:
    """Shows and reads, now and then late; tells how many rounds were read wrongly."""
    one = Board(path, rank, RANKS, 2)
    told.send("here")
    told.recv()  # all have opened it
    wrong = 0
    for round_ in range(ROUNDS):
        if random.Random(f"{rank} {round_}").random() < 0.1:
            os.sched_yield()
        one.show(*numbers(rank, round_))
        expected = tuple(map(max, *(numbers(other, round_) for other in range(RANKS))))
        wrong += one.largest(PATIENCE_S) != expected
    told.send(wrong)


def meet(path: Path, rank: int, told: Connection) -> None:
    """Shows one round, and never another."""
    one = Board(path, rank, 2, 1)
    told.send("here")
    one.show(float(rank))
    told.send(one.largest(PATIENCE_S))
    told.recv()


@contextmanager
def playing(target: Callable[..., None], path: Path, ranks: range) -> Iterator[list[tuple[Any, Connection]]]:
    started = []
    for rank in ranks:
        ours, theirs = PROCESSES.Pipe()
        process = PROCESSES.Process(target=target, args=(path, rank, theirs))
        process.start()
        started.append((process, ours))
    try:
        yield started
    finally:
        for process, _ in started:
            process.kill()
            process.join()


@pytest.fixture
def path() -> Iterator[Path]:
    created = Board.create(RANKS)
    if created is None:
        pytest.skip("this system has no /dev/shm, or no room in it")
    yield created
    created.unlink()


def test_all_read_the_largest_numbers_of_the_same_round(path: Path) -> None:
    with playing(play, path, range(RANKS)) as players:
        assert [told.recv() for _, told in players] == ["here"] * RANKS
        for _, told in players:
            told.send("begin")
        assert [told.recv() for _, told in players] == [0] * RANKS


@pytest.mark.parametrize("ends", [signal.SIGKILL, "by itself"])
def test_a_process_that_has_ended_is_not_waited_for(path: Path, ends: Any) -> None:
    with closing(Board(path, 0, 2, 1)) as here, playing(meet, path, range(1, 2)) as [(process, told)]:
        assert told.recv() == "here"
        here.show(-1.0)
        assert here.largest(PATIENCE_S) == told.recv() == (1.0,)
        here.show(0.0)
        if ends == "by itself":
            told.send("leave")
        else:
            os.kill(process.pid, ends)
        with pytest.raises(Gone, match="rank 1 has ended"):
            here.largest(PATIENCE_S)


def test_a_process_that_lives_and_says_nothing_is_waited_for_as_long_as_is_wanted(path: Path) -> None:
    with closing(Board(path, 0, 2, 1)) as here, playing(meet, path, range(1, 2)) as [(_, told)]:
        assert told.recv() == "here"
        here.show(-1.0)
        assert here.largest(PATIENCE_S) == told.recv()
        here.show(0.0)
        with pytest.raises(Gone, match="rank 1 has not responded for 1 s"):
            here.largest(0.8)


def test_half_written_numbers_are_not_read(path: Path) -> None:
    with closing(Board(path, 0, 2, 1)) as here, closing(Board(path, 1, 2, 1)) as other:
        here.show(1.0)
        other.show(2.0)
        at = other._at(1)
        other._memory[at + 8 : at + 16] = here._memory[here._at(0) + 8 : here._at(0) + 16]
        assert here._read(1) is None


def test_one_who_can_not_reach_the_board_keeps_all_from_it() -> None:
    made: list[Path | None] = []

    def create(act: Callable[[], Path | None]) -> Path | None:
        made.append(act())
        return made[0]

    assert open_together(0, 2, 1, create, lambda here: [here, False]) is None
    assert made[0] is not None
    assert not made[0].exists()
    assert open_together(1, 2, 1, lambda act: Path("/dev/shm/hf_spot-elsewhere"), lambda here: [True, here]) is None


def test_a_machine_without_room_has_no_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_board, "_SHARED_MEMORY", tmp_path / "missing")
    assert Board.create(2) is None
    assert open_together(0, 2, 1, lambda act: act(), lambda here: [here, here]) is None
