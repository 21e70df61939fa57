"""When a training counts as hung."""

from __future__ import annotations

import math

import pytest

from hf_spot.errors import ConfigError
from hf_spot.policy.hangs import Phase, Shown, Told, Vote, all_hang, behind, counted_s, limit_s, parse_timeout, shares

MINUTE, HOUR = 60.0, 3600.0
INSIDE = [phase for phase in Phase if phase is not Phase.OUTSIDE]


def shown(phase: Phase, *silences: float) -> dict[Phase, Shown]:
    found = Shown()
    for one in silences:
        found = found.after(one)
    return {phase: found}


@pytest.mark.parametrize("phase", INSIDE)
def test_no_phase_is_a_hang_within_half_an_hour_whatever_it_has_shown(phase: Phase) -> None:
    assert limit_s([phase], {}, None, 600) >= HOUR
    assert limit_s([phase], shown(phase, *[0.001] * 1000), None, 600) >= HOUR / 2


def test_the_code_of_the_script_outside_of_a_training_is_never_a_hang() -> None:
    assert limit_s([Phase.OUTSIDE], {}, None, 600) == math.inf
    assert limit_s([Phase.OUTSIDE], {}, 5.0, 600) == math.inf
    assert limit_s([Phase.OUTSIDE, Phase.STEP], {}, 5.0, 600) == 5.0


@pytest.mark.parametrize(
    ("silences", "expected"),
    [
        ([], HOUR),
        ([1.0] * 19, HOUR),  # the first steps compile, tune and connect
        ([1.0] * 20, HOUR / 2),
        ([100.0] * 20, HOUR / 2),
        ([600.0] * 20, 6000.0),
        ([1.0] * 30 + [1200.0], 3600.0),  # one exception: three times as long
        ([1.0] * 30 + [1200.0, 1300.0], 12000.0),
        ([3.0 * HOUR] * 2, 30 * HOUR),
    ],
)
def test_a_step_may_take_a_multiple_of_what_the_run_has_shown(silences: list[float], expected: float) -> None:
    assert limit_s([Phase.STEP], shown(Phase.STEP, *silences), None, 600) == expected


def test_the_most_patient_phase_of_all_ranks_counts() -> None:
    assert limit_s([Phase.STEP, Phase.SAVING, Phase.DATA], {}, None, 600) == HOUR
    assert limit_s([Phase.STEP, Phase.COMPILING], shown(Phase.STEP, *[1.0] * 50), None, 600) == 2 * HOUR
    assert limit_s([Phase.FINISHING], {}, None, 3 * HOUR) == 6 * HOUR


def test_a_number_of_seconds_is_exact_but_for_the_last_upload() -> None:
    slow = shown(Phase.STEP, *[900.0] * 50)
    assert {limit_s([phase], slow, 90.0, 600) for phase in INSIDE if phase is not Phase.FINISHING} == {90.0}
    assert limit_s([Phase.FINISHING], slow, 90.0, 600) == 690.0


@pytest.mark.parametrize(("waited", "counted"), [(0.0, 1.0), (0.5, 0.5), (0.95, 0.25), (7.0, 0.25), (0.1, 0.9)])
def test_time_without_a_processor_counts_little(waited: float, counted: float) -> None:
    assert counted_s(1.0, waited) == pytest.approx(counted)


def test_the_ranks_that_others_wait_for_are_named() -> None:
    ahead, waits, late = Told(9, Phase.DATA, 8, 0), Told(9, Phase.STEP, 7, 1), Told(9, Phase.DATA, 7, 2)
    assert behind([ahead, waits, late]) == [late]
    assert behind([ahead, waits]) == [waits]
    assert behind([waits]) == [waits] and behind([]) == []


@pytest.mark.parametrize(("text", "seconds"), [("auto", None), ("off", math.inf), ("90", 90.0), ("0.5", 0.5)])
def test_a_timeout_is_read(text: str, seconds: float | None) -> None:
    assert parse_timeout(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "soon", "5m"])
def test_another_timeout_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="auto, off, or a number of seconds"):
        parse_timeout(text)


@pytest.mark.parametrize(
    ("votes", "hangs"),
    [
        ([Vote.SILENT], True),
        ([Vote.SILENT, Vote.SILENT], True),
        ([Vote.SILENT, Vote.OUTSIDE], True),  # nobody is left there whom it could wait for
        ([Vote.SILENT, Vote.ALIVE], False),  # such as rank 0, which evaluates while the others wait in a step
        ([Vote.OUTSIDE, Vote.OUTSIDE], False),
        ([Vote.ALIVE], False),
        ([], False),
    ],
)
def test_a_training_hangs_once_no_machine_shows_a_sign(votes: list[Vote], hangs: bool) -> None:
    assert all_hang(votes) is hangs


@pytest.mark.parametrize(
    ("lengths", "room", "kept"),
    [
        ([10], 100, [10]),
        ([100], 10, [10]),
        ([5, 100, 100], 65, [5, 30, 30]),
        ([100, 5], 20, [15, 5]),
        ([], 10, []),
        ([3, 3], 0, [0, 0]),
    ],
)
def test_the_stacks_of_all_machines_share_the_room(lengths: list[int], room: int, kept: list[int]) -> None:
    assert shares(lengths, room) == kept
