"""What the journal tells of a run's machines, and how little of it has to be read."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_spot.policy.cadence import History, SaveCost
from hf_spot.run.history import Past, gather, read_past, to_details
from hf_spot.run.journal import BY_HAND, Entry, Journal
from hf_spot.storage.memory import MemoryStore
from tests.run.test_journal import CountingStore, commit


class Clock:
    """Goes on as it is told; every machine may have its own."""

    def __init__(self) -> None:
        self.time = datetime(2026, 1, 1, tzinfo=timezone.utc)

    def __call__(self) -> datetime:
        return self.time

    def skip(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


class Writer:
    """Writes a journal as launches do: each commit carries what is known by then."""

    def __init__(self, store: MemoryStore) -> None:
        self.clock = Clock()
        self.journal = Journal(store, now=self.clock)
        self.past = Past()

    def launch(self) -> None:
        self.journal.claim({"by": "hf-spot launch"})
        self.past = read_past(self.journal)

    def after(self, seconds: float, kind: str, **data: Any) -> Entry:
        self.clock.skip(seconds)
        if kind == "commit":
            data = commit(data.pop("step"), **data, **to_details(self.past.now(self.clock.time)))
        return self.journal.append(kind, data)


@pytest.fixture
def store() -> CountingStore:
    return CountingStore()


@pytest.fixture
def writer(store: CountingStore) -> Writer:
    made = Writer(store)
    made.launch()
    return made


def test_a_fresh_run_has_no_past(writer: Writer) -> None:
    assert writer.past == Past(as_of=writer.clock.time)
    assert writer.past.now(writer.clock.time + timedelta(seconds=50)) == History(50.0)


@pytest.mark.parametrize(
    ("last", "announced", "lost"),
    [
        ([("commit", {"step": 9, "reason": "notice"}), ("preempted", {"step": 9, "committed_step": 9})], True, 0),
        ([("notice", {}), ("preempted", {"step": 9, "committed_step": 5})], False, 4),
        ([("commit", {"step": 9, "reason": "notice"})], True, 0),
        ([("commit", {"step": 9, "reason": "schedule"})], False, None),
        ([("notice", {})], False, None),
        ([], False, None),
    ],
    ids=["saved in time", "too late", "saved in time, its last word lost", "no word", "heard, and nothing more", "nothing"],
)
def test_an_interruption_is_announced_when_it_lost_nothing(
    writer: Writer, last: list[tuple[str, dict[str, Any]]], announced: bool, lost: int | None
) -> None:
    for kind, data in last:
        writer.after(100, kind, **data)
    writer.clock.skip(10_000)  # nobody's uptime
    writer.launch()
    assert writer.past.history == History(100.0 * len(last), int(announced), int(not announced))
    assert writer.past.steps_lost == lost


@pytest.mark.parametrize("ending", ["failed", "finished"])
def test_a_training_that_ended_by_itself_was_not_interrupted(writer: Writer, ending: str) -> None:
    writer.after(100, ending, step=7)
    writer.launch()
    assert writer.past.history == History(100.0)


def test_what_people_do_beside_a_launch_is_no_part_of_its_life(store: CountingStore) -> None:
    writer = Writer(store)
    writer.journal.claim({"by": BY_HAND})
    writer.after(100, "commit", step=5, reason="push")
    writer.clock.skip(1000)
    writer.launch()
    writer.after(50, "commit", step=7, reason="schedule")
    writer.after(1000, "commit", step=8, reason="push")
    writer.after(1000, "prune", entries=[], steps=[])
    writer.launch()
    assert writer.past.history == History(50.0, 0, 1)


def test_the_cost_of_a_save_is_that_of_the_newest_commit(writer: Writer) -> None:
    writer.after(100, "commit", step=5, reason="schedule", stall_s=9.0, save_s=9.0, upload_s=9.0)
    writer.after(100, "commit", step=6, reason="schedule", stall_s=0.5, save_s=2.0, upload_s=4.0)
    writer.launch()
    assert writer.past.cost == SaveCost(0.5, 6.0)


def test_a_long_journal_is_not_read_again(store: CountingStore, writer: Writer) -> None:
    for step in range(100):
        writer.after(10, "commit", step=step, reason="schedule")
    writer.after(1, "prune", entries=[], steps=[])
    writer.after(1, "preempted", step=99, committed_step=99)
    writer.journal.claim({"by": "hf-spot launch"})
    store.requests = 0
    past = read_past(writer.journal)
    assert store.requests == 4  # the claim, the ending, the prune, and the commit
    assert past.history == History(1002.0, 1, 0)


def test_launches_that_committed_nothing_are_counted_as_far_as_is_read(store: CountingStore, writer: Writer) -> None:
    for _ in range(200):
        writer.clock.skip(60)
        writer.journal.claim({"by": "hf-spot launch"})
    store.requests = 0
    assert read_past(writer.journal).history == History(0.0, 0, 63)
    assert store.requests == 64


launches = st.lists(
    st.tuples(
        st.lists(st.sampled_from(["schedule", "cadence", "notice", "push"]), max_size=4),
        st.sampled_from(["preempted", "failed", "finished", "no word"]),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=6,
)


@given(launches=launches, pause_s=st.integers(1, 5000))
def test_the_newest_entries_tell_what_the_whole_journal_tells(launches: list[tuple[list[str], str, int]], pause_s: int) -> None:
    writer = Writer(CountingStore())
    for reasons, ending, lost in launches:
        writer.launch()
        for step, reason in enumerate(reasons):
            writer.after(pause_s, "commit", step=step, reason=reason)
        if ending != "no word":
            writer.after(pause_s, ending, step=len(reasons) + lost, committed_step=len(reasons))
    writer.launch()
    entries = [*writer.journal.entries()]
    bare = [replace(one, data={key: value for key, value in one.data.items() if key != "history"}) for one in entries]
    told = gather(bare)
    assert told.steps_lost == writer.past.steps_lost
    assert (told.history.announced, told.history.unannounced) == (
        writer.past.history.announced,
        writer.past.history.unannounced,
    )
    assert told.history.uptime_s == pytest.approx(writer.past.history.uptime_s, abs=0.01)
