"""What the journal says of a run's machines."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from hf_spot.cloud.ledger import Ledger, Machine, fold
from hf_spot.run.journal import Entry, RunState
from hf_spot.run.journal import fold as fold_run

NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)


def machine(name: str = "i-1", **values: Any) -> Machine:
    return Machine(name, "us-east-1", "us-east-1a", "p4d.24xlarge", "spot", 0, NOW, 9.0, "here", NOW, 22.0, **values)


class Journal:
    """Entries one after the other, one minute apart unless said otherwise."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.state = RunState()
        self.time = NOW

    def add(self, kind: str, data: dict[str, Any] | None = None, minutes: float = 1) -> Ledger:
        self.time += timedelta(minutes=minutes)
        number = self.ledger.number + 1
        self.state = fold_run(self.state, number, kind, self.state.launch + (kind == "claim"), data or {})
        entry = Entry(number, kind, self.state.launch, str(number), self.time, data or {}, self.state)
        self.ledger = fold(self.ledger, entry)
        return self.ledger

    def told(self, event: str, **data: Any) -> Ledger:
        return self.add("machine", {"event": event, **data})

    def asked(self, by: str = "me", *, fresh: bool = False, **data: Any) -> Ledger:
        return self.told("asked", by=by, token=f"token of {by}", fresh=fresh, **data)

    def commit(self, step: int, minutes: float, **data: Any) -> Ledger:
        files: dict[str, Any] = {"files": [], "prefix": f"e/checkpoint-{step}", "complete": False, "stage": 1, "max_steps": 100}
        return self.add("commit", {"step": step, "reason": "schedule", **files, **data}, minutes)


@pytest.fixture
def journal() -> Journal:
    return Journal()


def test_a_machine_survives_the_journal_and_unknown_keys() -> None:
    one = machine(ended=NOW, reason="x", cost_usd=1.5)
    assert Machine.from_data({**one.to_data(), "colour": "red"}) == one


def test_a_machine_lives_until_its_end_is_written_down(journal: Journal) -> None:
    journal.told("started", machine=machine().to_data())
    assert journal.told("started", machine=machine().to_data()).live() == [machine()]
    journal.told("ended", machine=machine(ended=NOW, cost_usd=3.0).to_data())
    assert journal.ledger.live() == [] and journal.ledger.machines[0].cost_usd == 3.0


def test_the_first_to_ask_walks_and_a_start_or_a_refusal_ends_the_walk(journal: Journal) -> None:
    first = journal.asked("one").walk
    assert journal.asked("two").walk == first
    assert journal.told("refused").walk is None
    assert journal.asked("two").walk_by == "two"
    assert journal.told("started", machine=machine().to_data()).walk is None


def test_a_walk_is_taken_over_when_it_is_stale_or_known_to_be_dead(journal: Journal) -> None:
    first = journal.asked("one").walk
    assert journal.asked("two", takes_over=first).walk_by == "two"
    assert journal.asked("three", takes_over=first).walk_by == "two"  # somebody was faster
    journal.time += timedelta(minutes=5)
    assert journal.asked("four").walk_by == "four"


def test_machines_that_go_by_themselves_without_a_commit_are_counted_until_a_person_asks(journal: Journal) -> None:
    for count in (1, 2):
        journal.told("started", machine=machine(f"i-{count}").to_data())
        journal.add("claim")
        gone = machine(f"i-{count}", ended=NOW, reason="Client.InstanceInitiatedShutdown: x").to_data()
        assert journal.told("ended", machine=gone).fruitless == count
    assert journal.asked(fresh=False).fruitless == 2
    journal.told("refused")
    assert journal.asked(fresh=True).fruitless == 0


@pytest.mark.parametrize(
    ("reason", "commits"), [("Client.InstanceInitiatedShutdown", 1), ("Server.SpotInstanceTermination", 0)]
)
def test_a_machine_that_committed_or_was_taken_away_is_not_fruitless(journal: Journal, reason: str, commits: int) -> None:
    journal.told("started", machine=machine().to_data())
    journal.add("claim")
    for step in range(commits):
        journal.commit(step + 1, 1)
    assert journal.told("ended", machine=machine(ended=NOW, reason=reason).to_data()).fruitless == 0


def test_the_rest_of_the_training_is_told_by_the_speed_of_its_commits(journal: Journal) -> None:
    assert journal.ledger.hours_left(20) == 20 and journal.ledger.hours_left(None) is None
    journal.add("claim")
    journal.commit(10, 60)
    assert journal.ledger.hours_left(20) == pytest.approx(9)
    journal.add("preempted")
    journal.add("claim", minutes=600)  # nobody trained in between
    journal.commit(20, 30)
    assert journal.ledger.hours_left(20) == pytest.approx(80 * 1.5 / 20)
    journal.commit(15, 30)  # the commit of 20 was damaged
    journal.commit(20, 30, reason="push")
    assert journal.ledger.hours_left(20) == pytest.approx(80 * 1.5 / 20)


def test_a_failure_is_forgotten_when_the_next_launch_begins(journal: Journal) -> None:
    journal.add("claim")
    assert journal.add("failed").failed
    assert not journal.add("claim").failed
