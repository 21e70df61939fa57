"""The simulator does what its arithmetic stands for, meets deadlines, and predicts a run that has happened."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_spot.cli import main
from hf_spot.economics import simulate as simulator
from hf_spot.economics.plan import ON_DEMAND, Rung, preset
from hf_spot.economics.replay import replay
from hf_spot.economics.simulate import Outcome, Training, run, simulate
from hf_spot.economics.table import render_simulation
from hf_spot.economics.traces import Trace
from hf_spot.errors import ConfigError
from hf_spot.policy import cadence, preemption
from hf_spot.policy.cadence import Interruptions
from hf_spot.policy.preemption import Action, Decision
from hf_spot.run.journal import Entry, decode
from tests.economics.journals import claim, timed

DEMO = Path(__file__).parent / "recorded" / "demo.jsonl"
SPOT = Rung(3.6, "a test", "2026")
FULL = replace(SPOT, market=ON_DEMAND, usd_per_hour=36.0)
TRAINING = Training(
    work_s=10_000,
    start_s=100,
    stall_s=10,
    commit_s=50,
    warning_s=120,
    expected=Interruptions(4 * 3600, 0.05),
    interval_s=1000,
    retry_s=0,
)


def trace(*spells: tuple[float, float]) -> Trace:
    return Trace(tuple(begin for begin, _ in spells), tuple(end for _, end in spells), math.inf)


def went(training: Training, *spells: tuple[float, float], unannounced: bool = True, began_s: float = 0.0) -> Outcome:
    return run(training, [(SPOT, [trace(*spells)])], began_s, lambda: unannounced)


# -- one training -----------------------------------------------------------------------------------------------------


def test_without_interruptions_it_takes_its_work_a_start_its_saves_and_the_last_commit() -> None:
    one = went(TRAINING, (0, math.inf))
    assert one.wall_s == one.held_s == 100 + 10_000 + 9 * 10 + 50
    assert one.usd == pytest.approx(one.held_s / 1000)
    assert (one.interruptions, one.lost_s, one.useful_s) == (0, 0, 10_000)


def test_what_was_not_committed_is_done_again() -> None:
    # 100 s of start, three intervals of 1000 s with their saves, and 500 s that nobody saves.
    one = went(TRAINING, (0, 100 + 3 * 1010 + 500), (5000, math.inf))
    assert (one.interruptions, one.lost_s) == (1, 500)
    assert one.wall_s == 5000 + 100 + 7000 + 6 * 10 + 50


def test_a_save_that_is_still_being_uploaded_is_lost_too() -> None:
    begun = 100 + 2 * 1010 + 1000  # the third save begins
    assert went(TRAINING, (0, begun + 49), (5000, math.inf)).lost_s == 1000 + 49 - 10
    assert went(TRAINING, (0, begun + 51), (5000, math.inf)).lost_s == 51 - 10


def test_a_notice_loses_nothing_but_its_own_time() -> None:
    one = went(TRAINING, (0, 100 + 3 * 1010 + 500 + 120), (5000, math.inf), unannounced=False)
    assert (one.interruptions, one.lost_s) == (1, 0)
    assert one.wall_s == 5000 + 100 + 6500 + 6 * 10 + 50


def test_a_notice_that_is_too_short_for_a_save_is_no_help() -> None:
    slow = replace(TRAINING, commit_s=500)
    one = went(slow, (0, 100 + 3 * 1010 + 600), (5000, math.inf), unannounced=False)
    assert one.lost_s == 600 - 120  # it stops when it hears the notice; three saves are committed by the end


def test_what_a_notice_is_answered_with_is_the_policys_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "decide", lambda *_: Decision(Action.FINISH_UPLOAD_AND_STOP, "a test"))
    assert went(TRAINING, (0, 100 + 3 * 1010 + 620), (5000, math.inf), unannounced=False).lost_s == 500
    assert preemption.decide is not simulator.decide


def test_the_cadence_is_the_policys_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Interruptions] = []

    def next_save_s(cost: cadence.SaveCost, expected: Interruptions, longest_s: float) -> float:
        assert (cost, longest_s) == (cadence.SaveCost(10, 50), 1800)
        asked.append(expected)
        return 1000.0

    monkeypatch.setattr(cadence, "next_save_s", next_save_s)
    auto = replace(TRAINING, interval_s=None)
    assert went(auto, (0, 3630), (5000, math.inf)) == went(TRAINING, (0, 3630), (5000, math.inf))
    assert asked[0] == cadence.learn(TRAINING.expected, cadence.History())
    assert asked[-1] == cadence.learn(TRAINING.expected, cadence.History(3630, 0, 1))
    assert asked[-1].unannounced_share > asked[0].unannounced_share


def test_capacity_is_found_when_it_is_asked_for() -> None:
    patient = replace(TRAINING, retry_s=600)
    # Between two questions capacity came and went; the next that is seen is that of 1700 s, asked for at 1800 s.
    one = went(patient, (700, 1100), (1700, math.inf))
    assert one.wall_s == 1800 + 100 + 10_000 + 90 + 50


def test_a_ladder_is_tried_from_the_top_and_zones_by_how_often_they_have_capacity() -> None:
    rare, frequent = Trace((0,), (300,), 1000), Trace((0,), (900,), 1000)
    dear, cheap = replace(SPOT, usd_per_hour=7.2), replace(SPOT, usd_per_hour=3.6)
    short = replace(TRAINING, work_s=500)
    one = run(short, [(dear, [trace()]), (cheap, [rare, frequent])], 0.0, lambda: True)
    assert (one.interruptions, one.usd) == (0, pytest.approx(650 / 1000))
    fast = run(short, [(replace(cheap, speed=2.0), [frequent])], 0.0, lambda: True)
    assert fast.wall_s == 100 + 250 + 50


def test_on_demand_in_a_ladder_is_taken_when_nothing_above_it_is_there() -> None:
    one = run(TRAINING, [(SPOT, [trace((0, 2000))]), (FULL, [])], 0.0, lambda: True)
    assert one.on_demand_s == one.held_s - 2000 == 100 + 9000 + 8 * 10 + 50


def test_what_never_gets_a_machine_is_given_up() -> None:
    one = went(TRAINING, (0, 50))
    assert (one.finished, one.useful_s) == (False, 0)


lives = st.lists(st.tuples(st.floats(1, 5000), st.floats(1, 5000), st.booleans()), max_size=8)
trainings = st.builds(
    lambda interval_s, stall_s, upload_s, warning_s: replace(
        TRAINING, interval_s=interval_s, stall_s=stall_s, commit_s=stall_s + upload_s, warning_s=warning_s
    ),
    st.floats(20, 3000),
    st.floats(0, 50),
    st.floats(0, 400),
    st.floats(1, 300),
)


def second_by_second(training: Training, spells: list[tuple[float, float, bool]]) -> tuple[float, float]:
    """Committed work at the end of the last of these spells, and what was lost; event by event, without arithmetic."""
    committed = lost = 0.0
    for begin, end, announced in spells:
        at, done, kept = begin + training.start_s, committed, committed
        stop = end - training.warning_s if announced else end
        uploads: list[tuple[float, float]] = []
        while at < stop and done < training.work_s:
            trained = min(training.interval_s or 0, training.work_s - done, stop - at)
            at, done = at + trained, done + trained
            if trained < (training.interval_s or 0) or at >= stop:
                break
            uploads.append((at + training.commit_s, done))
            at += training.stall_s
        kept = max([kept, *(then for when, then in uploads if when <= end)])
        if announced and training.saves_on_notice():
            kept = done
        lost += done - kept
        committed = kept
    return committed, lost


@given(trainings, lives)
@settings(max_examples=150, deadline=None)
def test_a_spell_in_one_step_is_a_spell_event_by_event(training: Training, told: list[tuple[float, float, bool]]) -> None:
    at, spells = 0.0, []
    for pause_s, length_s, announced in told:
        spells.append((at + pause_s, at + pause_s + length_s, announced))
        at += pause_s + length_s
    training = replace(training, work_s=1e6)  # never done before the last spell
    heard = iter([not announced for _, _, announced in spells])
    last = at + 1e4
    one = run(training, [(SPOT, [trace(*[spell[:2] for spell in spells], (last, math.inf))])], 0.0, lambda: next(heard))
    committed, lost = second_by_second(training, spells)
    assert one.lost_s == pytest.approx(lost, abs=1e-3)
    left = training.work_s - committed
    saves = math.ceil(left / training.interval_s - 1e-9) - 1
    needed_s = training.start_s + left + saves * training.stall_s + training.commit_s
    assert one.wall_s == pytest.approx(last + needed_s, abs=training.stall_s + 1e-3)
    assert one.held_s == pytest.approx(sum(length_s for _, length_s, _ in told) + needed_s, abs=training.stall_s + 1e-3)


@given(lives.filter(bool), st.floats(1.25, 4), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_deadline_that_leaves_room_is_met(told: list[tuple[float, float, bool]], room: float, has_spot: bool) -> None:
    at, spells = 0.0, []
    for pause_s, length_s, _ in told if has_spot else []:
        spells.append((at + pause_s, at + pause_s + length_s))
        at += pause_s + length_s
    deadline_s = room * TRAINING.work_s + 3000
    endless = Trace(tuple(begin for begin, _ in spells), tuple(end for _, end in spells), at or 1.0)
    one = run(TRAINING, [(SPOT, [endless]), (FULL, [])], 0.0, lambda: True, deadline_s)
    assert one.finished
    assert not one.late
    assert one.useful_s == pytest.approx(TRAINING.work_s)
    assert one.on_demand_s <= one.held_s <= one.wall_s + 1e-6


def test_a_deadline_far_away_costs_no_full_price_while_there_is_capacity() -> None:
    pools = [(SPOT, [trace((0, math.inf))]), (FULL, [])]
    assert run(TRAINING, pools, 0.0, lambda: True, 100_000).on_demand_s == 0
    tight = run(TRAINING, [(SPOT, [trace()]), (FULL, [])], 0.0, lambda: True, 13_000)
    assert tight.on_demand_s == tight.held_s


# -- many -------------------------------------------------------------------------------------------------------------


def test_the_published_table_and_what_interruptions_make_of_it() -> None:
    found = {one.row.name: one for one in simulate(preset("blog"), jobs=300)}
    assert {name: one.listed_usd for name, one in found.items() if one.row.published_usd} == pytest.approx(
        {"on demand": 655.40, "spot, one region": 196.60, "spot, several regions": 144.00, "fallback mix": 132.00}
    )
    assert found["spot, one region"].formula == "20 h x $9.83/h = $196.60"
    one, several, late = (
        found[name] for name in ("spot, one region", "spot, several regions", "spot in one region, done in 26 h")
    )
    assert found["on demand"].interruptions == 0
    assert one.interruptions > several.interruptions > 0.5
    assert one.extra_share > 0.3 > 0.1 > several.extra_share > 0
    assert 0.1 < late.on_demand_share < 0.9
    assert late.late_share == 0
    assert one.usd.low <= one.usd.mean <= one.usd.high


def test_the_same_seed_is_the_same_result() -> None:
    plan = preset("blog")
    assert simulate(plan, jobs=20) == simulate(plan, jobs=20)
    assert simulate(plan, jobs=20) != simulate(plan, jobs=20, seed=1)


# -- a run that has happened ------------------------------------------------------------------------------------------


def recorded() -> list[Entry]:
    """The journal that `hf-spot demo` left on a machine: four launches, two notices, one kill."""
    return [decode(line) for line in DEMO.read_bytes().splitlines()]


def test_a_run_of_the_demo_is_predicted() -> None:
    found = replay(recorded())
    assert found.predicted == pytest.approx(found.goodput, rel=0.1)
    assert found.predicted_wall_s == pytest.approx(found.wall_s, rel=0.1)


def test_a_run_that_tells_too_little_is_not_replayed() -> None:
    with pytest.raises(ConfigError, match="too little"):
        replay(timed([(0, claim()), (10, ("failed", {"step": 3}))]))
    with pytest.raises(ConfigError, match="too little"):
        replay([])


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_over_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for zone in ("us-east-1a", "us-west-2b"):
        (tmp_path / f"{zone}_v100.json").write_text(
            json.dumps({"metadata": {"gap_seconds": 3600}, "data": [1, 1, 0, 1, 0] * 50})
        )
    traces = [f"--trace={path}" for path in sorted(tmp_path.glob("*.json"))]
    assert main(["simulate", "--preset", "blog", "--seeds", "20", "--json", "--plot", str(tmp_path / "x.png"), *traces]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["row"]["name"] for one in told][:2] == ["on demand", "spot, one region"]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert main(["simulate", "--preset", "blog", "--seeds", "20", *traces]) == 0
    text = capsys.readouterr().out
    assert "20 h x $32.77/h = $655.40" in text
    assert "us-east-1a_v100.json" in text
    assert "the published table, 2024" in text


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "give exactly one of PLAN, --preset and --replay"),
        (["plan.yaml", "--preset", "blog"], "one of PLAN"),
        (["--preset", "bolg"], "--preset bolg: unknown; known presets: blog"),
        (["--preset", "blog", "--seeds", "0"], "--seeds 0 --nodes 1: both must be at least 1"),
        (["/no/such/plan.yaml"], "/no/such/plan.yaml can't be read"),
        (["--preset", "blog", "--prices", "/no/such/file"], "/no/such/file can't be read"),
        (["--preset", "blog", "--trace", "/no/such/file"], "/no/such/file can't be read"),
    ],
)
def test_what_can_not_be_simulated_is_said(argv: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *argv]) == 2
    assert problem in capsys.readouterr().err


def test_the_command_replays_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "journal").mkdir(parents=True)
    for number, line in enumerate(DEMO.read_bytes().splitlines(), start=1):
        (tmp_path / "run" / "journal" / f"{number:08d}.json").write_bytes(line)
    assert main(["simulate", "--replay", str(tmp_path / "run"), "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["predicted"] < 1
    assert main(["simulate", "--replay", str(tmp_path / "run")]) == 0
    assert "goodput" in capsys.readouterr().out


def test_a_simulation_fits_a_terminal_and_says_what_it_leaves_out() -> None:
    plan = preset("blog")
    results = simulate(plan, None, jobs=2)
    lines = render_simulation(plan, results, "a model", 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split()[:2] == ["row", "hours"] and "cost" in lines[0]
    assert "without columns without interruptions, published" in " ".join(lines) and "--json" in " ".join(lines)
    assert max(map(len, render_simulation(plan, results, "a model").splitlines())) > 80
