"""`hf-spot prices`: current and past prices of machines, by zone, with their sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from hf_spot.cloud.ec2 import Cloud
from hf_spot.cloud.ladder import Price
from hf_spot.errors import CloudError

LONGEST_DAYS = 90  # https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/using-spot-instances-history.html
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 24


@dataclass(frozen=True)
class Row:
    """One instance type in one zone.

    Args:
        instance_type: such as ``p4d.24xlarge``.
        region: name of the region.
        zone: name of the availability zone.
        spot: the current spot price.
        history: spot prices with the times from which they applied, oldest first.
        on_demand: the on-demand price; None if the price list has none.
    """

    instance_type: str
    region: str
    zone: str
    spot: Price
    history: tuple[Price, ...]
    on_demand: Price | None

    @property
    def saving(self) -> float | None:
        """Return the current saving as a share of the on-demand price."""
        return None if self.on_demand is None else 1 - self.spot.usd_per_hour / self.on_demand.usd_per_hour

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""

        def plain(price: Price | None) -> dict[str, Any] | None:
            return None if price is None else {**asdict(price), "time": price.time.isoformat()}

        return {
            "instance_type": self.instance_type,
            "region": self.region,
            "zone": self.zone,
            "spot": plain(self.spot),
            "on_demand": plain(self.on_demand),
            "saving": None if self.saving is None else round(self.saving, 4),
            "history": [plain(price) for price in self.history],
        }


def look_up(
    cloud: Cloud, types: Sequence[str], regions: Sequence[str], since: datetime, now: datetime
) -> tuple[list[Row], list[str]]:
    """Return every pool with a spot price, the cheapest first, and notes about missing prices.

    Args:
        cloud: the account's EC2.
        types: instance types.
        regions: names of the regions.
        since: start of the history.
        now: end of the history.

    Raises:
        CloudError: the cloud refused.
    """
    notes: list[str] = []
    rows = []
    found = cloud.each(regions, lambda region: cloud.spot_prices(region, types, since, now))
    for region, pools in zip(regions, found, strict=True):
        for (kind, zone), history in pools.items():
            full = _full(cloud, kind, region, notes)
            rows.append(Row(kind, region, zone, history[-1], tuple(history), full))
    return sorted(rows, key=lambda row: (row.spot.usd_per_hour, row.instance_type, row.region, row.zone)), notes


def _full(cloud: Cloud, kind: str, region: str, notes: list[str]) -> Price | None:
    if notes:
        return None  # a query has already failed
    try:
        return cloud.on_demand_price(kind, region)
    except CloudError as error:
        notes.append(f"on-demand prices are unknown: {error.args[0]}")
        return None


def sparkline(history: Sequence[Price], since: datetime, now: datetime, width: int = _WIDTH) -> str:
    """Return the history as a line of bars, each the price at the end of its time slice. Pure."""
    values: list[float | None] = []
    for place in range(width):
        at = since + (now - since) * ((place + 1) / width)
        held = [price.usd_per_hour for price in history if price.time <= at]
        values.append(held[-1] if held else None)
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if value is None else _BARS[round((value - low) * scale)] for value in values)


def render(rows: Sequence[Row], notes: Sequence[str], since: datetime, now: datetime) -> str:
    """Format the prices as a table."""
    days = (now - since) / timedelta(days=1)
    head = f"{'type':18}{'zone':18}{'spot $/h':>10}{'on-demand':>11}{'saving':>8}  last {days:g} days, low to high"
    lines = [head]
    for row in rows:
        full = "?" if row.on_demand is None else f"{row.on_demand.usd_per_hour:.4f}"
        saving = "?" if row.saving is None else f"{row.saving:.0%}"
        held = [price.usd_per_hour for price in row.history]
        line = f"{row.instance_type:18}{row.zone:18}{row.spot.usd_per_hour:>10.4f}{full:>11}{saving:>8}  "
        lines.append(f"{line}{sparkline(row.history, since, now)} {min(held):.4f} to {max(held):.4f}")
    if rows:
        newest = max(row.spot.time for row in rows)
        lines.append(f"spot: {rows[0].spot.source}, queried {now:%Y-%m-%d %H:%M} UTC, last change {newest:%Y-%m-%d %H:%M} UTC")
        full_prices = {row.on_demand.source: row.on_demand.time for row in rows if row.on_demand}
        lines += [f"on-demand: {source}, in force since {time:%Y-%m-%d}" for source, time in full_prices.items()]
    else:
        lines = ["no spot price and therefore no spot capacity in these regions"]
    return "\n".join([*lines, *notes])
