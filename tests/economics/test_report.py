"""The report says what the journal says, and its sums are sums."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_spot.economics.follow import lines_of
from hf_spot.economics.page import page
from hf_spot.economics.report import _INNER, PARTS, Launch, Report, summarise
from hf_spot.economics.table import duration, machine_rows, money_lines, render_report
from hf_spot.economics.timeline import WAITING_LANE, Timeline, make_timeline
from hf_spot.run.last_words import BY_FILE, BY_HEARTBEAT, LastWords
from tests.economics.journals import BEGAN, Event, claim, commit, journal_of, timed, timing

STORY = (
    ("claim", {"hostname": "a"}),
    commit(10),
    ("notice", {}),
    commit(14, "notice"),
    ("preempted", {"step": 14}),
    ("claim", {"hostname": "b"}),
    commit(20),
    ("claim", {"hostname": "c"}),
    ("failed", {"step": 27}),
    ("claim", {"hostname": "d"}),
    commit(30, "end"),
    ("finished", {"step": 30}),
)


def test_launches_interruptions_and_lost_steps() -> None:
    report = summarise(journal_of(*STORY))
    assert [launch.ended for launch in report.launches] == ["preempted", "no word", "failed", "finished"]
    assert [launch.hostname for launch in report.launches] == ["a", "b", "c", "d"]
    assert [(launch.resumed_step, launch.committed_step) for launch in report.launches] == [
        (0, 14),
        (14, 20),
        (20, 20),
        (20, 30),
    ]
    assert [launch.steps_lost for launch in report.launches] == [0, None, 7, 0]
    assert [launch.steps_redone for launch in report.launches] == [0, 0, 0, 7]
    assert report.launches[0].notice_to_commit_s == 10.0
    assert (report.finished, report.committed_step, report.interruptions, report.steps_lost) == (True, 30, 3, 7)


def test_it_is_json_and_a_table() -> None:
    report = summarise(journal_of(*STORY))
    assert json.loads(json.dumps(report.to_dict()))["launches"][2]["steps_lost"] == 7
    text = render_report(report, "s3://bucket/run")
    assert "finished, step 30 committed" in text
    assert "3 interruptions, 7 steps lost and 1 launch without a recorded end, 7 steps redone" in text
    assert "not measured" in text
    assert "Cost: unknown. Before the next launch, set the price" in text
    assert "this run has not been launched yet" in render_report(summarise([]), "s3://bucket/run")


PRICED = {"cloud": "aws", "market": "spot", "price_usd_per_hour": 10.0, "on_demand_usd_per_hour": 36.0}
# Two launches of an hour's work in all: the first loses 100 steps of 4 s, the second does them again.
INTERRUPTED = (
    (0, claim("a", **PRICED)),
    (1100, commit(200, timing=timing(200, 200, 800, stalled_s=100, first_step_s=200))),
    (1600, ("failed", {"step": 300})),
    (1900, claim("b", **PRICED)),
    (5200, commit(900, timing=timing(900, 700, 2800, stalled_s=300, first_step_s=100, restore_s=40))),
    (5300, ("finished", {"step": 900})),
)


def test_every_second_is_somewhere() -> None:
    first, second = (report := summarise(timed(INTERRUPTED))).launches
    assert first.parts == {**dict.fromkeys(PARTS, 0.0), "training": 1200, "saving": 100, "starting": 200, "other": 100}
    assert second.parts["redoing"] == pytest.approx(400)
    assert second.parts["training"] == pytest.approx(2400)
    assert (second.parts["restoring"], second.parts["starting"], second.parts["other"]) == (40, 60, 200)
    assert (second.waited_s, report.waiting_s, report.wall_s, report.held_s) == (300, 300, 5300, 5000)
    assert report.goodput == pytest.approx(3600 / 5300)
    assert (report.steps_lost, report.steps_redone) == (100, 100)


def test_what_was_spent_and_what_on_demand_would_have_cost() -> None:
    report = summarise(timed(INTERRUPTED))
    assert report.cost_usd == pytest.approx(5000 / 3600 * 10)
    # 3600 s of steps, 400 s of saves, a last upload of 200 s, one start of 200 s; nothing restored, nothing twice.
    assert report.on_demand_s == pytest.approx(4400)
    assert report.on_demand_usd == pytest.approx(44.0)
    assert report.saved_usd == pytest.approx(44 - 50000 / 3600)
    assert "Saved: $30.11 (68%)." in money_lines(report)


def test_money_is_only_counted_where_a_price_is_known() -> None:
    unpriced = {**PRICED, "price_usd_per_hour": None}
    report = summarise(timed([*INTERRUPTED[:3], (1900, claim("b", **unpriced)), *INTERRUPTED[4:]]))
    assert report.cost_usd == pytest.approx(1600 / 360)
    assert report.unpriced_s == 3400
    assert report.saved_usd is None
    assert "The price of 56.7 min of 83.3 min is unknown." in money_lines(report)[0]
    on_demand = summarise(timed([(0, claim("a", **{**unpriced, "market": "on-demand"})), (3600, ("failed", {"step": 1}))]))
    assert on_demand.cost_usd == 36.0


def test_machines_that_come_and_go_are_named_and_each_is_paid_at_its_own_price() -> None:
    kind, data = INTERRUPTED[0][1]
    roster = [{"name": "a", "machine": data["machine"]}, {"name": "b", "machine": {"price_usd_per_hour": 2.0}}]
    claimed = {**data, "machines": 2, "roster": roster}
    report = summarise(timed([(0, (kind, claimed)), (3600, INTERRUPTED[1][1])]))
    [launch] = report.launches
    own = launch.price_usd_per_hour
    assert own is not None
    assert launch.cost_usd == own + 2.0
    names = [row[1] for row in machine_rows(report)[1:]]
    assert names == [launch.name, "b"]
    for strange in ("x", [3], [{"name": "a"}, None], {}):
        assert summarise(timed([(0, (kind, {**claimed, "roster": strange}))])).launches[0].machines == 2


def test_machines_that_train_together_are_all_paid() -> None:
    kind, data = claim("a", **PRICED)
    report = summarise(timed([(0, (kind, {**data, "machines": 4})), *INTERRUPTED[1:3]]))
    assert report.cost_usd == pytest.approx(4 * 1600 / 360)
    assert report.on_demand_s == 4 * (1200 + 100 + 200)


def test_a_first_hour_that_ec2_ended_may_be_free_and_is_not_taken_off() -> None:
    notice = ("notice", {"kind": "TERMINATE", "source": "imds"})
    report = summarise(timed([(0, claim("a", **PRICED)), (1700, notice), (1800, ("preempted", {"step": 9}))]))
    assert report.maybe_free_usd == report.cost_usd == 5.0
    assert any("may be free" in line for line in money_lines(report))
    longer = summarise(timed([(0, claim("a", **PRICED)), (3700, notice), (3800, ("preempted", {"step": 9}))]))
    assert longer.maybe_free_usd == 0


def test_a_launcher_that_starts_again_holds_its_machine_in_between() -> None:
    report = summarise(timed([(0, claim()), (100, ("failed", {"step": 3})), (130, claim()), (200, ("failed", {"step": 3}))]))
    assert [launch.wall_s for launch in report.launches] == [100, 100]
    assert report.waiting_s == 0
    new_machine = summarise(timed([(0, claim()), (100, ("preempted", {"step": 3})), (130, claim()), (200, commit(4))]))
    assert new_machine.waiting_s == 30


def test_what_people_do_to_a_run_by_hand_is_no_launch() -> None:
    by_hand = ("claim", {"by": "hf-spot checkpoints"})
    late = [(9000, commit(3, "push")), (9500, ("prune", {"entries": [], "steps": []}))]
    report = summarise(timed([(0, by_hand), (50, claim()), (100, ("finished", {"step": 3})), *late]))
    assert [launch.wall_s for launch in report.launches] == [50]
    assert report.wall_s == 50
    silent = summarise(timed([(0, claim()), (10, commit(5)), (500, ("prune", {"entries": [], "steps": []}))]))
    assert silent.launches[0].wall_s == 10


def test_time_after_a_notice_is_the_end() -> None:
    told = timing(10, 10, 50, first_step_s=20)
    events = [(0, claim()), (75, ("notice", {"kind": "TERMINATE"})), (90, commit(10, "notice", told))]
    launch = summarise(timed([*events, (100, ("preempted", {"step": 10, "timing": told}))])).launches[0]
    assert (launch.parts["ending"], launch.parts["other"]) == (25, 5)
    taken_back = [*events[:2], (76, ("notice", {"kind": "CANCELLED"})), *events[2:]]
    assert summarise(timed(taken_back)).launches[0].parts["ending"] == 0


def test_a_training_that_did_nothing_new_has_no_time_below_zero() -> None:
    did = timing(3, 3, 0.1)
    first = [(0, claim("a")), (10, ("failed", {"step": 3, "timing": did}))]
    again = summarise(timed([*first, (20, claim("b")), (30, ("failed", {"step": 3, "timing": did}))])).launches[1]
    assert 0.1 * 3 / 3 > 0.1
    assert again.steps_redone == 3 and again.parts["redoing"] == pytest.approx(0.1)
    assert again.parts["training"] == 0


# -- whatever the journal says ----------------------------------------------------------------------------------------

seconds = st.floats(0, 1e5)
numbers = st.integers(0, 1000)
timings = st.one_of(
    st.none(),
    st.just({"steps": "many"}),
    st.builds(
        timing, numbers, numbers, seconds, stalled_s=seconds, first_step_s=seconds | st.none(), restore_s=seconds | st.none()
    ),
)
prices = st.floats(0, 100) | st.none() | st.just("dear")
events = st.one_of(
    st.builds(
        claim,
        st.sampled_from("abc"),
        price_usd_per_hour=prices,
        on_demand_usd_per_hour=prices,
        market=st.sampled_from(["spot", "on-demand"]),
    ),
    st.builds(commit, numbers, st.sampled_from(["schedule", "notice", "push", "end"]), timings),
    st.builds(lambda kind: ("notice", {"kind": kind}), st.sampled_from(["TERMINATE", "ADVISORY", "CANCELLED"])),
    st.builds(
        lambda kind, step, told: (kind, {"step": step, "timing": told}),
        st.sampled_from(["preempted", "finished", "failed"]),
        numbers | st.none(),
        timings,
    ),
)


@given(st.lists(st.tuples(st.floats(-100, 1e4), events), max_size=12), st.sampled_from(["a", "b"]))
@settings(max_examples=80, deadline=None)
def test_the_parts_add_up(told: list[tuple[float, Event]], first: str) -> None:
    at_s, journal = 0.0, [(0.0, claim(first))]
    for pause_s, event in told:
        at_s += pause_s  # clocks of two machines differ
        journal.append((at_s, event))
    report = summarise(timed(journal))
    times = [0.0]
    for one in report.launches:
        assert min(one.parts.values()) >= 0
        assert sum(one.parts.values()) == pytest.approx(one.wall_s)
        assert one.waited_s >= 0
        assert one.resumed_step <= one.reached_step or not one.measured
        times.append(one.waited_s + one.wall_s)
    for name in PARTS:
        assert report.parts[name] == pytest.approx(sum(one.parts[name] for one in report.launches))
    last, began = report.launches[-1].last_heard, report.launches[0].began
    assert report.wall_s == pytest.approx((last - began).total_seconds()) == pytest.approx(sum(times))
    assert report.held_s + report.waiting_s == pytest.approx(report.wall_s)
    assert report.goodput is None or 0 <= report.goodput <= 1 + 1e-9
    priced = [one for one in report.launches if one.cost_usd is not None]
    assert report.cost_usd == pytest.approx(sum(one.wall_s / 3600 * (one.price_usd_per_hour or 0) for one in priced))
    assert report.unpriced_s + sum(one.wall_s for one in priced) == pytest.approx(report.held_s)
    assert report.on_demand_s <= report.held_s + 1e-6
    render_report(report, "run")
    json.dumps(report.to_dict(), allow_nan=False)
    assert_tiled(report)


def assert_tiled(report: Report) -> None:
    timeline = make_timeline(report, dict.fromkeys(range(0, 1000, 100), 1.0))
    at_s = 0.0
    for bar in timeline.bars:
        assert bar.begin_s == pytest.approx(at_s, abs=1e-3)
        at_s = bar.begin_s + bar.length_s
        assert (bar.part == "waiting") == (bar.lane == WAITING_LANE)
    assert at_s == pytest.approx(report.wall_s, abs=1e-3)
    drawn = {part: sum(bar.length_s for bar in timeline.bars if bar.part == part) for part in (*PARTS, "waiting")}
    assert drawn == {
        **{part: pytest.approx(report.parts[part], abs=1e-3) for part in PARTS},
        "waiting": pytest.approx(report.waiting_s),
    }
    for curve in timeline.losses:
        assert [at_s for at_s, _ in curve] == sorted(at_s for at_s, _ in curve)
        assert all(-1e-3 <= at_s <= report.wall_s + 1e-3 for at_s, _ in curve)


def test_a_loss_stands_where_its_step_was_done_last() -> None:
    report = summarise(timed(INTERRUPTED))
    timeline = make_timeline(report, {100: 3.0, 250: 2.0, 900: 1.0})
    (first,), (again, last) = timeline.losses
    assert first == (pytest.approx(200 + 450), 3.0)
    assert again == (pytest.approx(1900 + 100 + 50 * 3100 / 700), 2.0)
    assert last == (pytest.approx(1900 + 100 + 3100), 1.0)
    assert timeline.lanes == ("i-a", "i-b", WAITING_LANE)
    assert timeline.interruptions == ((1600, "failed"),)


def test_many_machines_share_lanes() -> None:
    told: list[tuple[float, Event]] = [(n * 10.0, claim(f"m{n}", zone=f"z{n % 3}", market="spot")) for n in range(100)]
    assert make_timeline(summarise(timed(told)), {}).lanes[:3] == ("? z0 spot", "? z1 spot", "? z2 spot")


def test_each_machine_of_a_launch_has_a_lane_that_begins_and_ends_with_it() -> None:
    a, b, c = ({"name": name, "machine": {"instance_id": f"i-{name}", "zone": f"z-{name}"}} for name in "abc")
    unnamed = {"name": "b", "machine": {}}
    told: list[tuple[float, Event]] = []
    for at_s, roster in ((0, (a, b, c)), (100, (b, c)), (200, (b,)), (300, (b, unnamed, unnamed))):
        kind, data = claim(roster[0]["name"])
        told += [(at_s, (kind, {**data, "machines": len(roster), "roster": list(roster)})), (at_s + 100, commit(at_s + 1))]
    timeline = make_timeline(summarise(timed(told)), {})
    assert timeline.lanes == ("i-a", "i-b", "i-c", "b", "b (2)")
    assert {lane: (spans[0], spans[-1]) for lane, spans in spans_of(timeline).items()} == {
        "i-a": (0, 100),
        "i-b": (0, 400),
        "i-c": (0, 200),
        "b": (300, 400),
        "b (2)": (300, 400),
    }
    crowd = [{"name": f"m{n}", "machine": {"zone": f"z{n % 2}"}} for n in range(40)]
    many = make_timeline(summarise(timed([(0, ("claim", {"roster": crowd, "machines": 40})), (9, commit(1))])), {})
    assert many.lanes == ("? ? ?", "? z1 ?", "? z0 ?")
    assert {lane: spans[-1] for lane, spans in spans_of(many).items()} == dict.fromkeys(many.lanes, 9)


def spans_of(timeline: Timeline) -> dict[str, list[float]]:
    """The begin and the end of each bar, by lane."""
    found: dict[str, list[float]] = {}
    for bar in timeline.bars:
        found.setdefault(bar.lane, []).extend((bar.begin_s, bar.begin_s + bar.length_s))
    return found


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0.0 s"), (119.9, "119.9 s"), (120, "2.0 min"), (7200, "2.0 h"), (172800, "2.0 d")]
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_launch_keeps_what_it_works_with_to_itself() -> None:
    shown: dict[str, Any] = summarise(timed(INTERRUPTED)).to_dict()["launches"][0]
    assert not set(_INNER) & shown.keys()
    assert shown.keys() < set(Launch.__dataclass_fields__)


def test_a_script_that_trains_twice_starts_twice() -> None:
    first = timing(10, 10, 100, first_step_s=20)
    second = timing(5, 5, 50, first_step_s=150, restore_s=10)
    events = [(0, claim()), (120, commit(10, timing=first)), (205, ("failed", {"step": 5, "stage": 2, "timing": second}))]
    report = summarise(timed(events))
    assert report.parts == {**dict.fromkeys(PARTS, 0.0), "training": 150, "restoring": 10, "starting": 40, "other": 5}
    assert_tiled(report)


def test_an_ending_does_not_make_steps_of_the_last_upload() -> None:
    events = [
        (0, claim()),
        (15, commit(10, timing=timing(10, 10, 10))),
        (60, ("finished", {"step": 10, "timing": timing(10, 10, 60)})),
    ]
    assert summarise(timed(events)).parts["training"] == 10


def test_what_resumes_have_proven_is_told() -> None:
    def resumed(*verified: str) -> Event:
        return "resumed", {"step": 5, "stage": 1, "verified": [*verified]}

    report = summarise(
        journal_of(
            claim(), commit(5), claim(), resumed("weights", "optimizer", "next batch"), claim(), resumed("weights", "optimizer")
        )
    )
    assert [len(launch.verified) for launch in report.launches] == [0, 3, 2]
    text = render_report(report, "url")
    assert "2 resumes verified before their first step: weights, optimizer" in text.splitlines()


def redone(first: int, last: int, different: dict[str, Any] | None = None, **more: Any) -> Event:
    steps = last - first + 1
    compared = dict.fromkeys(("loss", "learning_rate", "data"), steps)
    fields = {"first": first, "last": last, "steps": steps, "compared": compared, "different": different, "changed": []}
    return "redone", {"stage": 1, **fields, **more}


def test_redone_steps_are_told_as_compared() -> None:
    different = {"step": 21, "rank": 0, "before": {"loss": 2.0}, "again": {"loss": 2.5}, "same": ["data"]}
    report = summarise(
        journal_of(
            claim(), commit(5), claim(), redone(6, 15), commit(20), claim(), redone(21, 22, different, steps=1), ("unknown", {})
        )
    )
    lines = render_report(report, "url").splitlines()
    assert "launch 2: 10 steps redone, all equal" in lines
    assert any(line.startswith("launch 3: step 21 differs: loss 2 before, 2.5 now") for line in lines)
    assert report.launches[1].steps_redone == 10  # which the killed launch told to nobody else
    (told,) = report.to_dict()["launches"][1]["redone"]
    assert (told["training"], told["steps"], told["different"]) == (1, 10, None)


def test_trackers_are_linked_by_the_newest_commit_of_each_training() -> None:
    old, new = {"id": "a1", "url": "folder"}, {"id": "a1", "url": "https://wandb.ai/me/spot/runs/a1"}
    events = [
        claim(),
        commit(5, trackers={"wandb": old, "tensorboard": "../runs/at"}, output_dir="/data/out"),
        commit(9, trackers={"wandb": new}),
    ]
    report = summarise(journal_of(*events))
    lines = render_report(report, "url").splitlines()
    assert "TensorBoard: /data/runs/at" in lines
    assert "Weights & Biases: https://wandb.ai/me/spot/runs/a1 (run a1)" in lines
    assert "Weights &amp; Biases: https://wandb.ai/me/spot/runs/a1 (run a1)" in page(report, "url", "<svg/>")
    two = [*events, ("commit", {**commit(5)[1], "stage": 2, "trackers": {"mlflow": {"id": "b"}, "other": 5}})]
    lines = render_report(summarise(journal_of(*two)), "url").splitlines()
    assert "MLflow of training 2: (run b)" in lines
    assert "TensorBoard of training 1: /data/runs/at" in lines
    assert json.loads(json.dumps(summarise(journal_of(*two)).to_dict()["trackers"]))[-1]["id"] == "b"
    for damaged in (5, [], "", {"wandb": 5}, {"wandb": None}):
        assert summarise(journal_of(claim(), commit(5, trackers=damaged))).trackers == ()


def test_many_launches_whose_redone_steps_are_equal_take_one_line() -> None:
    events = [
        claim(),
        commit(5),
        *(event for at in range(5, 50, 5) for event in (claim(), redone(at + 1, at + 3), commit(at + 5))),
    ]
    text = render_report(summarise(journal_of(*events)), "url")
    assert "27 steps redone in 9 launches, all equal\n" in text
    assert "launch 2:" not in text


def test_redone_steps_of_all_trainings_of_a_launch_count() -> None:
    events = [
        claim(),
        commit(5),
        claim(),
        redone(6, 90),
        commit(95),
        ("commit", {**commit(3)[1], "stage": 2, "timing": timing(3, 3, 1)}),
    ]
    assert summarise(journal_of(*events)).launches[1].steps_redone == 85  # of the first training; none of the last


def lost(launch: int, step: int, at_s: float, known_by: str = BY_FILE, **more: Any) -> Event:
    return "lost", LastWords(launch, 1, step, BEGAN + timedelta(seconds=at_s), known_by, **more).to_data()


def test_a_killed_launch_lasts_until_it_was_last_heard_of_and_says_what_it_lost() -> None:
    told = timing(50, 50, 50, first_step_s=10)
    events = [(0, claim("a")), (60, commit(50, timing=told)), (300, claim("b")), (301, lost(1, 90, 100)), (340, commit(90))]
    report = summarise(timed(events))
    first, second = report.launches
    assert (first.steps_lost, first.known_by, first.reached_step, first.wall_s) == (40, "steps file", 90, 100)
    assert (first.parts["training"], first.parts["other"], second.waited_s, second.steps_redone) == (90, 0, 200, 40)
    assert_tiled(report)
    taken = summarise(timed([*events[:3], (301, lost(1, 90, 100, resumed_step=60)), events[-1]]))
    assert taken.steps_lost == 30
    assert "launch 1 had ended without a word after step 90" in " ".join(lines_of(timed(events)))
    assert "30 steps lost (step 90 at 00:01:40, by the file of steps on its disk; step 60 was whole" in render_report(
        taken, "url"
    )
    text = render_report(report, "url")
    assert (
        "launch 1 ended without a word: 40 steps lost (step 90 at 00:01:40, by the file of steps on its disk; step 50 is"
        in text
    )
    assert "1 interruption, 40 steps lost, 40 steps redone" in text
    early = summarise(timed([*events[:3], (301, lost(1, 90, 999)), (302, lost(1, 95, 20))]))  # by a clock that is ahead
    assert (early.launches[0].wall_s, early.launches[1].waited_s, early.steps_lost) == (300, 0, 40)
    assert_tiled(early)


def test_the_newest_launch_is_not_called_dead_while_its_heart_beats() -> None:
    entries = timed([(0, claim("a")), (60, commit(50, timing=timing(50, 50, 50, first_step_s=10)))])
    words = LastWords(1, 1, 90, BEGAN + timedelta(seconds=100), BY_HEARTBEAT, timing(90, 90, 90, first_step_s=10))
    dead, alive = summarise(entries, words), summarise(entries, replace(words, is_over=False))
    assert (dead.interruptions, alive.interruptions) == (1, 0)
    assert (dead.steps_lost, alive.steps_lost, alive.launches[0].steps_lost) == (40, 0, None)
    assert "launch 1 ended without a word: at least 40 steps lost (step 90 at 00:01:40, by its heart" in render_report(
        dead, "url"
    )
    assert "launch 1 has done step 90 at 00:01:40, by its heartbeat" in render_report(alive, "url")
    for report in (dead, alive):
        assert report.launches[0].parts["training"] == 90
        assert "by its heartbeat" in page(report, "url", "<svg/>")
        assert_tiled(report)


def test_lost_and_redone_steps_are_those_of_each_training() -> None:
    second = {"stage": 2, "prefix": "x/stage-2/checkpoint-3"}
    events = [
        (0, ("claim", {"hostname": "a"})),
        (50, commit(100, timing=timing(100, 100, 50))),
        (60, ("preempted", {"step": 5, "stage": 2, "timing": timing(5, 5, 5, first_step_s=55)})),
        (70, ("claim", {"hostname": "b"})),
        (80, commit(3, timing=timing(3, 3, 3, first_step_s=5), **second)),
        (90, ("failed", {"step": 7, "stage": 2, "timing": timing(7, 7, 7, first_step_s=5)})),
    ]
    report = summarise(timed(events))
    assert [launch.steps_lost for launch in report.launches] == [5, 4]
    assert [launch.steps_redone for launch in report.launches] == [0, 5]
    assert report.launches[1].parts["redoing"] == pytest.approx(5)


def test_minutes_between_two_cells_of_a_notebook_are_no_start() -> None:
    def cell(by: str | None) -> Event:
        kind, data = claim()
        return kind, {**data, "by": by}

    def ends(step: int) -> Event:
        return "finished", {"step": step, "timing": timing(step, step, 10, first_step_s=5)}

    for by, idle_s in (("SpotCallback", 300), ("hf-spot launch", 0), (None, 0)):
        report = summarise(timed([(0, cell(by)), (15, ends(10)), (315, cell(by)), (330, ends(10))]))
        assert (report.parts["idle"], report.parts["starting"]) == (idle_s, 310 - idle_s)
        assert report.waiting_s == 0
        assert_tiled(report)
        assert ("such as two cells of a notebook" in render_report(report, "url")) == bool(idle_s)


def test_writes_are_counted_and_priced_where_the_price_is_known() -> None:
    files = [{"path": f"{number}", "size": size, "digest": "x"} for number, size in enumerate((1, 1, 100 << 20))]
    _, data = commit(5)
    report = summarise(timed([(0, claim()), (1800, ("commit", {**data, "files": files}))]))
    assert report.writes == 2 + 2 + 2 + 4 + 30  # claim, entry, two files, four requests for the large one, heartbeats
    assert "Requests: about 40 writes, 80 per hour: $0.0004 per hour at S3's $0.005 for 1,000" in render_report(
        report, "s3://b/r"
    )
    assert "Requests: about 40 writes, 80 per hour.\n" in render_report(report, "gs://b/r")
    assert "Requests" not in render_report(report, "/a/directory")


def test_an_entry_about_redone_steps_that_nobody_understands_is_ignored() -> None:
    report = summarise(journal_of(claim(), commit(5), claim(), ("redone", {"stage": 1, "steps": "ten"}), commit(10)))
    assert report.launches[1].redone == {}


def test_a_report_fits_a_terminal_and_says_what_it_leaves_out() -> None:
    report = summarise(timed([event for _ in range(1) for event in INTERRUPTED]))
    whole = render_report(report, "s3://bucket/run")
    narrow = render_report(report, "s3://bucket/run", 80)
    assert max(map(len, narrow.splitlines())) <= 80 < max(map(len, whole.splitlines()))
    assert "(without columns notice→commit" in narrow and "--html FILE, or --json" in narrow
    assert render_report(report, "s3://bucket/run", 400).startswith(whole[:200])
    many = [((index * 1000), event) for index in range(60) for event in [claim("a")]]
    text = render_report(summarise(timed(many)), "s3://bucket/run", 80)
    assert "without 20 older rows" in text and len(text.splitlines()) < 110


def test_words_of_a_report_are_explained_once() -> None:
    text = render_report(summarise(timed(INTERRUPTED)), "url")
    assert text.count("goodput:") == 1 and "lost, redone:" in text
    assert "goodput:" in page(summarise(timed(INTERRUPTED)), "url", "<svg/>")


def test_numbers_of_a_page_are_aligned_right_and_many_launches_are_folded() -> None:
    many = summarise(timed([(index * 1000, claim("a")) for index in range(60)]))
    text = page(many, "url", "<svg/>")
    assert "<summary>all 60 launches</summary>" in text
    assert '<th scope="col" style="text-align: right; white-space: nowrap">launch</th>' in text
    assert '<th scope="col" style="text-align: left">ended</th>' in text


def test_a_timeline_has_the_losses_of_all_trainings_and_what_was_lost() -> None:
    report = summarise(timed(INTERRUPTED))
    timeline = make_timeline(report, {100: 3.0, 250: 2.0, 900: 1.0}, 1, {2: {5: 1.0}})
    assert timeline.trainings == (1,) * len(timeline.losses)  # no launch of training 2
    ((begin_s, end_s, steps),) = timeline.lost
    assert (begin_s, end_s, steps) == (1100, 1600, 100)
