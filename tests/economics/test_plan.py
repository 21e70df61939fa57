"""A plan's file says what it means, or is told in which line it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_spot.economics.plan import PRESETS, Plan, build, load, preset, with_prices, zones_of
from hf_spot.economics.traces import ZONES
from hf_spot.errors import ConfigError
from hf_spot.yaml_file import parse

PLAN = """\
work_hours: 10
rows:
  - name: spot
    ladder:
      - usd_per_hour: 2.5
        source: my account
        date: 2026-01-31
        zones: [us-east-2, us-west-2b]
"""


def test_a_plan_is_read(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    plan = load(tmp_path / "plan.yaml")
    assert (plan.work_hours, plan.rows[0].ladder[0].date, plan.rows[0].deadline_hours) == (10, "2026-01-31", None)
    assert zones_of(plan.rows[0].ladder[0], ZONES) == ["us-east-2a", "us-east-2b", "us-west-2b"]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("work_hours: 10", "work_hours: ten", "plan.yaml:1: work_hours: 'ten' is not a number above 0"),
        ("work_hours: 10", "work_hours: 0", "plan.yaml:1: work_hours: 0 is not a number above 0"),
        ("work_hours: 10", "work_hours: true", "plan.yaml:1: work_hours: True"),
        ("work_hours: 10\n", "", "plan.yaml:1: work_hours is missing"),
        ("work_hours: 10", "work_hour: 10", "plan.yaml:1: work_hour: unknown key\n  Try: did you mean work_hours?"),
        ("work_hours: 10", "work_hours: 10\nwork_hours: 9", "plan.yaml:2: work_hours appears twice"),
        ("work_hours: 10", "work_hours: 10\nunannounced_share: 2", "plan.yaml:2: unannounced_share: 2 is more than 1"),
        (
            "work_hours: 10",
            "work_hours: 10\ncommit_seconds: 1",
            "plan.yaml:2: commit_seconds: a save can't be committed after 1 s",
        ),
        ("work_hours: 10", "work_hours: 10\nnotes: one", "plan.yaml:2: notes"),
        (
            "    ladder:",
            "    deadline_hours: 20\n    ladder:",
            "plan.yaml:4: rows[0].deadline_hours: can't be guaranteed without an on-demand rung",
        ),
        ("name: spot", "name: 7", "plan.yaml:3: rows[0].name: 7 is not a name"),
        ("        source: my account\n", "", "plan.yaml:5: rows[0].ladder[0]: source is missing"),
        ("source: my account", "source: [1]", "plan.yaml:6: rows[0].ladder[0].source: [1] is not text"),
        ("usd_per_hour: 2.5", "usd_per_hour: -1", "plan.yaml:5: rows[0].ladder[0].usd_per_hour: -1"),
        ("zones: [us-east-2, us-west-2b]", "zones: us-east-2", "plan.yaml:8: rows[0].ladder[0].zones: is not a list of zones"),
        ("zones: [us-east-2, us-west-2b]", "market: flea", "plan.yaml:8: rows[0].ladder[0].market: 'flea' is neither"),
        (PLAN, "- 1", "plan.yaml:1: is not a mapping"),
        (PLAN, "", "plan.yaml: is not a mapping"),
        (PLAN, "work_hours: 1\nrows: []", "plan.yaml:2: rows: is not a list of rows"),
        (PLAN, "rows: [", "plan.yaml:1:"),
        (PLAN, "a: 2026-13-45", "this YAML can't be used"),
        (PLAN, "? [a]\n: 1", "plan.yaml:1: ['a'] is not a text key"),
        (PLAN, "rows: &a [*a]", "plan.yaml"),
    ],
)
def test_a_mistake_is_named_with_its_line(old: str, new: str, problem: str) -> None:
    assert old in PLAN
    with pytest.raises(ConfigError) as error:
        parse(PLAN.replace(old, new), "plan.yaml", build)
    assert problem in str(error.value)


def test_the_preset_has_the_published_table() -> None:
    assert list(PRESETS) == ["blog"]
    plan = preset("blog")
    published = {row.name: row.published_usd for row in plan.rows if row.published_usd}
    assert published == {"on demand": 655.4, "spot, one region": 196.6, "spot, several regions": 144.0, "fallback mix": 132.0}
    for row in plan.rows[:4]:
        assert plan.work_hours * row.ladder[0].usd_per_hour == pytest.approx(row.published_usd)
    assert "10-15%" in plan.notes[0]
    assert plan.rows[-1].ladder[0].usd_per_hour == 21.957642
    assert round(1 - 9.83 / 21.957642, 2) == 0.55  # as the note says
    assert all(rung.source and rung.date for row in plan.rows for rung in row.ladder)


def price(usd: float, source: str) -> dict[str, object]:
    return {"usd_per_hour": usd, "time": "2026-02-03T04:05:06+00:00", "source": source}


def told(*rows: tuple[str, str, float, float | None]) -> str:
    listed = [
        {
            "instance_type": kind,
            "region": zone[:-1],
            "zone": zone,
            "spot": price(spot, "history"),
            "on_demand": None if full is None else price(full, "list"),
        }
        for kind, zone, spot, full in rows
    ]
    return json.dumps({"rows": listed, "notes": []})


def test_prices_of_today_take_the_place_of_old_ones() -> None:
    p4d = "p4d.24xlarge"
    plan = with_prices(
        preset("blog"),
        told((p4d, "us-east-1a", 11.0, 22.0), (p4d, "us-west-2b", 8.0, None), ("p4de.24xlarge", "us-west-2b", 9.0, None)),
        "prices.json",
    )
    found = {row.name: row.ladder[0] for row in plan.rows}
    assert found["on demand"].usd_per_hour == 22.0
    assert (found["spot, one region"].usd_per_hour, found["spot, several regions"].usd_per_hour) == (11.0, 8.0)
    assert (found["on demand"].source, found["on demand"].date) == ("list", "2026-02-03")
    with pytest.raises(ConfigError, match="has no price for p4de"):
        with_prices(preset("blog"), told((p4d, "us-east-1a", 11.0, 22.0)), "prices.json")
    with pytest.raises(ConfigError, match="does not contain prices"):
        with_prices(preset("blog"), "[]", "prices.json")


def test_a_zone_without_a_trace_is_refused() -> None:
    plan: Plan = preset("blog")
    with pytest.raises(ConfigError, match="no trace of us-east-1; there are traces of here"):
        zones_of(plan.rows[1].ladder[0], ["here"])
