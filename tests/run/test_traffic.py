"""What machines and store have exchanged, by the journal, and what it costs."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_spot.economics.report import summarise
from hf_spot.economics.table import render_report
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.run import Run
from hf_spot.run.traffic import INTERNET, NOWHERE, Rate, Traffic, charged_usd, pairs, rates_in, traffic_data, zones_in
from hf_spot.run.upload import Uploader
from hf_spot.storage.memory import MemoryStore
from tests.economics.journals import Event, journal_of

GB = 1_000_000_000
EAST, WEST = "us-east-1", "us-west-2"


def claim(*machines: tuple[str, str]) -> Event:
    roster = [{"name": name, "machine": {"instance_id": name, "region": region}} for name, region in machines]
    more = {"roster": roster} if len(roster) > 1 else {}
    return "claim", {"hostname": "x", "machine": roster[0]["machine"], **more}


def commit(step: int, size: int, **more: Any) -> Event:
    files = [{"path": "model.safetensors", "size": size, "blake3": "0" * 64}]
    data = {
        "step": step,
        "stage": 1,
        "reason": "schedule",
        "complete": False,
        "files": files,
        "prefix": f"e0001/checkpoint-{step}",
    }
    return "commit", {**data, **more}


def traffic_of(*events: Event) -> Traffic:
    found = Traffic()
    for entry in journal_of(*events):
        found = found.after(entry)
    return found


def test_commits_are_sent_and_machines_that_are_new_fetch_the_newest_checkpoint() -> None:
    found = traffic_of(
        claim(("a", EAST), ("b", EAST)),
        commit(1, 3 * GB, sent_bytes=GB),  # the rest was copied in the store
        claim(("a", EAST), ("c", EAST)),  # a has it on its disk
        commit(2, 4 * GB),  # an older version did not measure
        claim(("d", WEST)),
        commit(3, 4 * GB, sent_bytes=2 * GB),
    )
    assert found.sent == {EAST: 5 * GB, WEST: 2 * GB}
    assert found.fetched == {EAST: 3 * GB, WEST: 4 * GB}


@pytest.mark.parametrize("sent", [-1, True, "1", None, 1.5])
def test_a_measurement_that_is_none_counts_as_the_files(sent: Any) -> None:
    assert traffic_of(claim(("a", EAST)), commit(1, GB, sent_bytes=sent)).sent == {EAST: GB}


def test_clouds_charge_for_what_leaves_a_region_and_on_both_sides_for_what_changes_zones() -> None:
    found = Traffic({EAST: 2 * GB, WEST: GB}, {EAST: GB, WEST: 3 * GB}, {EAST: GB})
    assert [*pairs(found, EAST)] == [(EAST, EAST, 2 * GB), (WEST, EAST, GB), (EAST, WEST, 3 * GB)]
    assert [*pairs(found, INTERNET)] == [(EAST, EAST, 2 * GB), (EAST, INTERNET, 2 * GB), (WEST, INTERNET, GB)]
    assert [*pairs(found, NOWHERE)] == [(EAST, EAST, 2 * GB)]
    rates = [Rate(EAST, EAST, 0.01, "list"), Rate(WEST, EAST, 0.02, "list"), Rate(EAST, WEST, 0.05, "list")]
    assert charged_usd(found, EAST, rates) == pytest.approx(2 * 0.01 + 0.02 + 3 * 0.05)
    assert charged_usd(found, EAST, rates[:2]) is None


def test_the_report_has_a_line_of_it_with_its_prices_and_their_source() -> None:
    events = [claim(("a", WEST)), commit(1, 2 * GB), claim(("b", WEST))]
    url = "s3://bucket/run"
    assert (
        "2.00 GB sent to the store, at most 2.00 GB fetched from it. What the store's part costs is unknown"
        in render_report(summarise(journal_of(*events)), url)
    )
    traffic = traffic_of(*events)
    told = traffic_data(traffic, EAST, [Rate(WEST, EAST, 0.02, "list"), Rate(EAST, WEST, 0.05, "guess")])
    assert told["usd"] == pytest.approx(0.14)
    report = summarise(journal_of(*events, ("machine", {"event": "ended", "machine": {}, "traffic": told})))
    said = render_report(report, url)
    assert (
        "at most 2.00 GB fetched from it: at most $0.14. us-west-2 to us-east-1: $0.02 per GB (list); us-east-1 to us" in said
    )
    assert json.loads(json.dumps(report.to_dict()))["traffic"]["usd"] == pytest.approx(0.14)
    same = traffic_data(traffic, WEST, [])
    said = render_report(summarise(journal_of(*events, ("machine", {"event": "ended", "machine": {}, "traffic": same}))), url)
    assert "at most 2.00 GB fetched from it: $0.00, because machines and store are in us-west-2." in said
    assert "Traffic" not in render_report(summarise(journal_of(*events)), "/a/folder")


def test_the_report_has_the_bill_of_machines_with_how_well_it_is_known() -> None:
    def machine(name: str, **more: Any) -> dict[str, Any]:
        return {"instance_id": name, "began": "2026-01-01T00:00:00+00:00", **more}

    def ended(name: str, usd: float, bound: str = "", event: str = "ended") -> Event:
        known = machine(name, ended="2026-01-01T02:00:00+00:00", cost_usd=usd, disk_usd=0.02, cost_bound=bound)
        return "machine", {"event": event, "machine": known}

    started = [("machine", {"event": "started", "machine": machine(name)}) for name in "abcd"]
    events = [*started, claim(("a", WEST)), commit(1, GB), ended("a", 3.0), ended("b", 0.0), ended("c", 5.0, "at most")]
    report = summarise(journal_of(*events))
    expected = "Bill: at most $8.00 for 3 machines from launch to end, 1 of them free, and $0.06 for their disks."
    assert f"{expected} 1 machine has not ended: hf-spot status." in render_report(report, "s3://bucket/run")
    report = summarise(journal_of(*events, ended("c", 4.5, event="billed"), ended("d", float("nan"))))
    assert "Bill: $7.50 for 4 machines" in render_report(report, "s3://bucket/run")
    assert json.loads(json.dumps(report.to_dict()))["bill"]["machines_usd"] == 7.5
    assert "Bill" not in render_report(summarise(journal_of(claim(("a", WEST)))), "s3://bucket/run")


@pytest.mark.parametrize("data", [{}, {"store": "x", "rates": 1}, {"store": "x", "rates": [{"bad": 1}]}, {"between_zones": 3}])
def test_entries_that_make_no_sense_tell_nothing(data: dict[str, Any]) -> None:
    assert rates_in(data) == (NOWHERE, []) and zones_in(data) == {}


def test_what_is_sent_is_measured_also_for_checkpoints_that_were_never_committed(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    run = Run(MemoryStore(f"memory://{uuid.uuid4().hex}"))
    run.claim({})
    uploader = Uploader(run, tmp_path / "pins")
    first = make_checkpoint(1)
    size = sum(path.stat().st_size for path in first.rglob("*") if path.is_file())
    run.upload(first, CommitRequest(step=1))  # and then its machine forgets it
    uploader.submit(make_checkpoint(2), CommitRequest(step=2))
    assert uploader.drain(10)
    uploader.submit(make_checkpoint(3), CommitRequest(step=3))
    assert uploader.drain(10)
    uploader.close()
    sent = [entry.data["sent_bytes"] for entry in run.events() if entry.kind == "commit"]
    assert sent == [2 * size, size]
