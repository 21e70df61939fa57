"""The report says what the journal says."""

from __future__ import annotations

import json
import uuid
from datetime import datetime, timedelta, timezone

from hf_spot.economics.report import render, summarise
from hf_spot.run.journal import Entry, Journal
from hf_spot.storage.memory import MemoryStore


def journal_of(*events: tuple[str, dict[str, object]]) -> list[Entry]:
    """A journal with ten seconds between its entries."""
    store = MemoryStore(f"memory://{uuid.uuid4().hex}")
    times = iter(datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=10 * n) for n in range(1000))
    journal = Journal(store, now=lambda: next(times))
    for kind, data in events:
        if kind == "claim":
            journal.claim(data)
        else:
            journal.append(kind, data)
    return list(journal.entries())


def commit(step: int, reason: str = "schedule") -> tuple[str, dict[str, object]]:
    fields = {"step": step, "reason": reason, "stage": 1, "complete": False, "prefix": f"x/checkpoint-{step}", "files": []}
    return "commit", fields


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
    assert report.launches[0].notice_to_commit_s == 10.0
    assert (report.finished, report.committed_step, report.interruptions, report.steps_lost) == (True, 30, 3, 7)


def test_it_is_json_and_a_table() -> None:
    report = summarise(journal_of(*STORY))
    assert json.loads(json.dumps(report.to_dict()))["launches"][2]["steps_lost"] == 7
    text = render(report, "s3://bucket/run")
    assert "finished, step 30 committed" in text
    assert "3 interruptions, 7 steps lost and 1 launches that ended without a word" in text
    assert "nobody has launched" in render(summarise([]), "s3://bucket/run")
