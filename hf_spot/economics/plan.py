"""A plan: the duration of a training, the cost of its saves and starts, and the ladders of machines to compare."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from datetime import date
from pathlib import Path
from typing import Any

from hf_spot.economics.traces import ZONES
from hf_spot.errors import ConfigError
from hf_spot.yaml_file import Invalid, check_keys, parse, read

SPOT, ON_DEMAND = "spot", "on-demand"


@dataclass(frozen=True)
class Rung:
    """Machines without preference among them; the first zone with capacity is used.

    Args:
        usd_per_hour: price of a machine.
        source: source of the price.
        date: date of the price.
        market: ``spot`` or ``on-demand``; the latter is always available.
        instance_type: a name. Different types in one zone have capacity at different times.
        zones: names of zones or regions in the traces or the model; empty for all.
        speed: speed of the training, relative to the plan's ``work_hours``.
    """

    usd_per_hour: float
    source: str
    date: str
    market: str = SPOT
    instance_type: str = "any"
    zones: tuple[str, ...] = ()
    speed: float = 1.0


@dataclass(frozen=True)
class Row:
    """One way to get machines.

    Args:
        name: name of the row.
        ladder: rungs, tried in this order whenever a machine is needed.
        deadline_hours: on-demand rungs are used only if this deadline requires it; None uses them like any other.
        published_usd: a published cost, shown for comparison.
    """

    name: str
    ladder: tuple[Rung, ...]
    deadline_hours: float | None = None
    published_usd: float | None = None


@dataclass(frozen=True)
class Plan:
    """The input of a simulation.

    Args:
        work_hours: hours of training, uninterrupted and without saves.
        rows: the rows to compare.
        start_minutes: minutes from getting a machine to the first step on it: boot, installation, restore.
        save_stall_seconds: seconds for which a save pauses training.
        commit_seconds: seconds from the start of a save to its commit.
        warning_seconds: seconds between a notice and the end of the machine.
        unannounced_share: share of interruptions without a notice.
        mean_hours_between_interruptions: initial assumption of the cadence.
        save_every_minutes: minutes of training between saves; None lets `hf_spot.policy.cadence` decide.
        max_save_minutes: the longest interval that the cadence may choose.
        retry_minutes: minutes between two attempts to get a machine when there is no capacity.
        notes: lines to show below the table.
    """

    work_hours: float
    rows: tuple[Row, ...]
    start_minutes: float = 6.0
    save_stall_seconds: float = 10.0
    commit_seconds: float = 60.0
    warning_seconds: float = 120.0
    unannounced_share: float = 0.05
    mean_hours_between_interruptions: float = 4.0
    save_every_minutes: float | None = None
    max_save_minutes: float = 30.0
    retry_minutes: float = 1.0
    notes: tuple[str, ...] = field(default=())


def load(path: Path) -> Plan:
    """Read a plan. Raises ConfigError, with the line."""
    return parse(read(path), str(path), build)


def preset(name: str) -> Plan:
    """Return one of `PRESETS`."""
    return parse(PRESETS[name], f"the preset {name}", build)


def with_prices(plan: Plan, text: str, where: str) -> Plan:
    """Return the plan with other prices: for each rung the lowest one of its type, market and zones.

    Args:
        plan: a plan whose instance types appear in the prices.
        text: output of ``hf-spot prices --json``.
        where: source of the text, for errors.

    Raises:
        ConfigError: the text is not a list of prices, or has no price for a rung.
    """
    try:
        rows = json.loads(text)["rows"]
        prices = [
            (row["instance_type"], market, {row["zone"], row["region"]}, row[key])
            for row in rows
            for market, key in ((SPOT, "spot"), (ON_DEMAND, "on_demand"))
            if row[key] is not None
        ]
        known = [
            (kind, market, at, float(p["usd_per_hour"]), str(p["source"]), str(p["time"])) for kind, market, at, p in prices
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where} does not contain prices: {error!r}", hint="hf-spot prices p4d.24xlarge --json") from error

    def repriced(rung: Rung) -> Rung:
        fitting = [
            (usd, source, time)
            for kind, market, at, usd, source, time in known
            if (kind, market) == (rung.instance_type, rung.market) and (not rung.zones or at & set(rung.zones))
        ]
        if not fitting:
            what = f"{rung.instance_type} {rung.market}" + (f" in {', '.join(rung.zones)}" if rung.zones else "")
            raise ConfigError(f"{where} has no price for {what}", hint=f"hf-spot prices {rung.instance_type} --json")
        usd, source, time = min(fitting)
        return replace(rung, usd_per_hour=usd, source=source, date=time[:10])

    return replace(plan, rows=tuple(replace(row, ladder=tuple(map(repriced, row.ladder))) for row in plan.rows))


# -- from plain values ------------------------------------------------------------------------------------------------

_EXAMPLE = "rows: [{name: spot, ladder: [{usd_per_hour: 9.83, source: my account, date: 2026-01-31}]}]"
_POSITIVE = {"work_hours", "warning_seconds", "mean_hours_between_interruptions", "save_every_minutes", "max_save_minutes"} | {
    "speed",
    "deadline_hours",
}


def build(value: Any) -> Plan:
    """Build a plan from the values of its file. Raises Invalid."""
    made = _fields(Plan, value, ())
    rows = made["rows"]
    if not isinstance(rows, list) or not rows:
        raise Invalid(("rows",), "is not a list of rows", hint=_EXAMPLE)
    made["rows"] = tuple(_row(row, ("rows", index)) for index, row in enumerate(rows))
    if not isinstance(notes := made.get("notes", []), list) or not all(isinstance(note, str) for note in notes):
        raise Invalid(("notes",), "is not a list of lines", hint="notes: [one line, another line]")
    share = made.get("unannounced_share", 0)
    if share > 1:
        raise Invalid(("unannounced_share",), f"{share} is more than 1", hint="unannounced_share: 0.05")
    stall_s, commit_s = made.get("save_stall_seconds", Plan.save_stall_seconds), made.get("commit_seconds", Plan.commit_seconds)
    if commit_s < stall_s:
        raise Invalid(
            ("commit_seconds",),
            f"a save can't be committed after {commit_s} s if it stalls training for {stall_s} s",
            hint=f"commit_seconds: {stall_s}",
        )
    return Plan(**{**made, "notes": tuple(notes)})


def _row(value: Any, path: tuple[Any, ...]) -> Row:
    made = _fields(Row, value, path)
    if not isinstance(made["name"], str):
        raise Invalid((*path, "name"), f"{made['name']!r} is not a name", hint=f'name: "{made["name"]}"')
    ladder = made["ladder"]
    if not isinstance(ladder, list) or not ladder:
        raise Invalid((*path, "ladder"), "is not a list of rungs", hint=_EXAMPLE)
    made["ladder"] = tuple(_rung(rung, (*path, "ladder", index)) for index, rung in enumerate(ladder))
    if made.get("deadline_hours") is not None and not any(rung.market == ON_DEMAND for rung in made["ladder"]):
        raise Invalid((*path, "deadline_hours"), "can't be guaranteed without an on-demand rung", hint="market: on-demand")
    return Row(**made)


def _rung(value: Any, path: tuple[Any, ...]) -> Rung:
    made = _fields(Rung, value, path)
    if made.get("market", SPOT) not in (SPOT, ON_DEMAND):
        raise Invalid((*path, "market"), f"{made['market']!r} is neither {SPOT} nor {ON_DEMAND}", hint=f"market: {SPOT}")
    if (
        isinstance(made["date"], (date, int)) and made["date"] is not True
    ):  # YAML parses 2026-01-31 as a date, and 2026 as a number
        made["date"] = str(made["date"])[:10]
    for key in ("source", "date", "instance_type"):
        if key in made and not isinstance(made[key], str):
            raise Invalid((*path, key), f"{made[key]!r} is not text", hint=f'{key}: "{made[key]}"')
    zones = made.get("zones", [])
    if not isinstance(zones, list) or not all(isinstance(zone, str) for zone in zones):
        raise Invalid((*path, "zones"), "is not a list of zones or regions", hint="zones: [us-east-1, us-west-2a]")
    return Rung(**{**made, "zones": tuple(zones)})


def _fields(kind: Any, value: Any, path: tuple[Any, ...]) -> dict[str, Any]:
    """Return the mapping ``value`` after checking its keys and numbers against the fields of a dataclass."""
    if not isinstance(value, dict):
        raise Invalid(path, "is not a mapping of keys and values", hint=_EXAMPLE)
    known = {one.name: one for one in fields(kind)}
    check_keys(value, known, path)
    for name, one in known.items():
        if one.default is MISSING and name not in value:
            raise Invalid(path, f"{name} is missing", hint=_EXAMPLE)
        if name in value and str(one.type).startswith("float"):
            number = value[name]
            if number is None and "None" in str(one.type):
                continue
            right = isinstance(number, (int, float)) and not isinstance(number, bool) and 0 <= number < math.inf
            if not right or (number == 0 and name in _POSITIVE):
                least = "above" if name in _POSITIVE else "from"
                raise Invalid((*path, name), f"{number!r} is not a number {least} 0", hint=f"{name}: 1")
    return dict(value)


def zones_of(rung: Rung, known: Mapping[str, Any] | Iterable[str]) -> list[str]:
    """Return the zones of a rung. Raises ConfigError for a zone without a trace."""
    names = list(known)
    regions = {name: ZONES[name].region if name in ZONES else name.rstrip("abcdefgh").rstrip("-") for name in names}
    found = [name for name in names if not rung.zones or {name, regions[name]} & set(rung.zones)]
    for wanted in rung.zones:
        if wanted not in names and wanted not in regions.values():
            raise ConfigError(f"no trace of {wanted}; there are traces of {', '.join(names)}", hint=f"zones: [{names[0]}]")
    return found


# -- a published plan -------------------------------------------------------------------------------------------------

_BLOG = """\
# Fine-tuning a 7B model on one p4d.24xlarge (eight A100s) for 20 hours: a published table with these totals.
work_hours: 20
start_minutes: 6
save_stall_seconds: 10
commit_seconds: 60
warning_seconds: 120
unannounced_share: 0.05
rows:
  - name: on demand
    published_usd: 655.40
    ladder:
      - &full {instance_type: p4d.24xlarge, market: on-demand, usd_per_hour: 32.77, source: the published table, date: 2024}
  - name: spot, one region
    published_usd: 196.60
    ladder:
      - {instance_type: p4d.24xlarge, zones: [us-east-1], usd_per_hour: 9.83, source: the published table, date: 2024}
  - name: spot, several regions
    published_usd: 144.00
    ladder:
      - {instance_type: p4d.24xlarge, usd_per_hour: 7.20, source: "the published total, by 20 h", date: 2024}
  - name: fallback mix
    published_usd: 132.00
    ladder:
      - {instance_type: p4d.24xlarge, usd_per_hour: 6.60, source: "the published total, by 20 h", date: 2024}
      - {instance_type: p4de.24xlarge, usd_per_hour: 6.60, source: "the published total, by 20 h", date: 2024}
  - name: spot in one region, done in 26 h
    deadline_hours: 26
    ladder:
      - {instance_type: p4d.24xlarge, zones: [us-east-1], usd_per_hour: 9.83, source: the published table, date: 2024}
      - *full
  - name: on demand, since 2025-06
    ladder:
      - {instance_type: p4d.24xlarge, market: on-demand, usd_per_hour: 21.957642, source: AWS price list, date: 2025-06}
notes:
  - The published table is hours times price, without interruptions; its text expects 10-15% extra wall-clock time for them.
  - Prices change. On-demand, a p4d.24xlarge cost $32.7726/h in us-east-1 until 2024-07, and $21.957642/h from 2025-06 on (AWS
    price list), of which $9.83 saves 55%, not 70%.
"""
PRESETS = {"blog": _BLOG}
