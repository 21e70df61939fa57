"""A plan: how long a training is, what a save and a start cost it, and the ways to get machines that are to be compared."""

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
    """Machines that are as welcome as each other; the first zone with capacity gives one.

    Args:
        usd_per_hour: of a machine.
        source: who says this price.
        date: when.
        market: ``spot`` or ``on-demand``; the latter is always there.
        instance_type: a name. Different types in one zone have capacity at different times.
        zones: names, or regions, of the traces or the model; empty for all.
        speed: of the training, beside that of the plan's ``work_hours``.
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
        name: of it.
        ladder: tried in this order whenever a machine is needed.
        deadline_hours: on-demand rungs are used only as far as this needs them; None takes them as any other.
        published_usd: what somebody has said that it costs, to be shown beside.
    """

    name: str
    ladder: tuple[Rung, ...]
    deadline_hours: float | None = None
    published_usd: float | None = None


@dataclass(frozen=True)
class Plan:
    """What is simulated.

    Args:
        work_hours: of training, uninterrupted and without saves.
        rows: to be compared.
        start_minutes: from having a machine to the first step on it: boot, installation, restore.
        save_stall_seconds: a save makes training stand still.
        commit_seconds: from the begin of a save to its commit.
        warning_seconds: between a notice and the end.
        unannounced_share: of interruptions, those without a notice.
        mean_hours_between_interruptions: what the cadence assumes until it has learnt.
        save_every_minutes: of training; None lets `hf_spot.policy.cadence` decide.
        max_save_minutes: the longest interval that the cadence may choose.
        retry_minutes: between two attempts to get a machine where there was none.
        notes: lines that are shown below the table.
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
    """Reads a plan. Raises ConfigError, with the line."""
    return parse(read(path), str(path), build)


def preset(name: str) -> Plan:
    """One of `PRESETS`."""
    return parse(PRESETS[name], f"the preset {name}", build)


def with_prices(plan: Plan, told: str, where: str) -> Plan:
    """The plan at other prices: for each rung the lowest of its type, market and zones.

    Args:
        plan: with instance types that the prices name.
        told: what ``hf-spot prices --json`` prints.
        where: it comes from, for errors.

    Raises:
        ConfigError: these are no prices, or none of a rung's.
    """
    try:
        rows = json.loads(told)["rows"]
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
        raise ConfigError(f"{where} holds no prices: {error!r}", hint="hf-spot prices p4d.24xlarge --json") from error

    def repriced(rung: Rung) -> Rung:
        fitting = [
            (usd, source, time)
            for kind, market, at, usd, source, time in known
            if (kind, market) == (rung.instance_type, rung.market) and (not rung.zones or at & set(rung.zones))
        ]
        if not fitting:
            what = f"{rung.instance_type} {rung.market}" + (f" in {', '.join(rung.zones)}" if rung.zones else "")
            raise ConfigError(f"{where} has no price of {what}", hint=f"hf-spot prices {rung.instance_type} --json")
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
    """A plan from the values of its file. Raises Invalid."""
    made = _made(Plan, value, ())
    rows = made["rows"]
    if not isinstance(rows, list) or not rows:
        raise Invalid(("rows",), "is no list of rows", hint=_EXAMPLE)
    made["rows"] = tuple(_row(row, ("rows", index)) for index, row in enumerate(rows))
    if not isinstance(notes := made.get("notes", []), list) or not all(isinstance(note, str) for note in notes):
        raise Invalid(("notes",), "is no list of lines", hint="notes: [one line, another line]")
    share = made.get("unannounced_share", 0)
    if share > 1:
        raise Invalid(("unannounced_share",), f"{share} is more than 1", hint="unannounced_share: 0.05")
    stall_s, commit_s = made.get("save_stall_seconds", Plan.save_stall_seconds), made.get("commit_seconds", Plan.commit_seconds)
    if commit_s < stall_s:
        raise Invalid(
            ("commit_seconds",),
            f"a save is committed after {commit_s} s, while it stalls training for {stall_s}",
            hint=f"commit_seconds: {stall_s}",
        )
    return Plan(**{**made, "notes": tuple(notes)})


def _row(value: Any, path: tuple[Any, ...]) -> Row:
    made = _made(Row, value, path)
    if not isinstance(made["name"], str):
        raise Invalid((*path, "name"), f"{made['name']!r} is no name", hint=f'name: "{made["name"]}"')
    ladder = made["ladder"]
    if not isinstance(ladder, list) or not ladder:
        raise Invalid((*path, "ladder"), "is no list of rungs", hint=_EXAMPLE)
    made["ladder"] = tuple(_rung(rung, (*path, "ladder", index)) for index, rung in enumerate(ladder))
    if made.get("deadline_hours") is not None and not any(rung.market == ON_DEMAND for rung in made["ladder"]):
        raise Invalid((*path, "deadline_hours"), "no rung is on demand, so nothing can be promised", hint="market: on-demand")
    return Row(**made)


def _rung(value: Any, path: tuple[Any, ...]) -> Rung:
    made = _made(Rung, value, path)
    if made.get("market", SPOT) not in (SPOT, ON_DEMAND):
        raise Invalid((*path, "market"), f"{made['market']!r} is neither {SPOT} nor {ON_DEMAND}", hint=f"market: {SPOT}")
    if isinstance(made["date"], (date, int)) and made["date"] is not True:  # YAML has read 2026-01-31, or 2026, as what it is
        made["date"] = str(made["date"])[:10]
    for key in ("source", "date", "instance_type"):
        if key in made and not isinstance(made[key], str):
            raise Invalid((*path, key), f"{made[key]!r} is no text", hint=f'{key}: "{made[key]}"')
    zones = made.get("zones", [])
    if not isinstance(zones, list) or not all(isinstance(zone, str) for zone in zones):
        raise Invalid((*path, "zones"), "is no list of zones or regions", hint="zones: [us-east-1, us-west-2a]")
    return Rung(**{**made, "zones": tuple(zones)})


def _made(kind: Any, value: Any, path: tuple[Any, ...]) -> dict[str, Any]:
    """A mapping with the keys of a dataclass, whose numbers are numbers."""
    if not isinstance(value, dict):
        raise Invalid(path, "is no mapping of keys and values", hint=_EXAMPLE)
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
                raise Invalid((*path, name), f"{number!r} is no number {least} 0", hint=f"{name}: 1")
    return dict(value)


def zones_of(rung: Rung, known: Mapping[str, Any] | Iterable[str]) -> list[str]:
    """The zones that a rung means. Raises ConfigError for one that there is no trace of."""
    names = list(known)
    regions = {name: ZONES[name].region if name in ZONES else name.rstrip("abcdefgh").rstrip("-") for name in names}
    found = [name for name in names if not rung.zones or {name, regions[name]} & set(rung.zones)]
    for wanted in rung.zones:
        if wanted not in names and wanted not in regions.values():
            raise ConfigError(f"there is no trace of {wanted}, only of {', '.join(names)}", hint=f"zones: [{names[0]}]")
    return found


# -- a plan that somebody has published -------------------------------------------------------------------------------

_BLOG = """\
# Fine-tuning a 7B model on one p4d.24xlarge (eight A100s) for 20 hours: a table that was published with these totals.
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
  - Prices change. On demand a p4d.24xlarge cost $32.7726/h in us-east-1 until 2024-07, and $21.957642/h from 2025-06 on (AWS
    price list), of which $9.83 saves 55%, not 70%.
"""
PRESETS = {"blog": _BLOG}
