"""Which pools to try, in which order, and what they may cost. Pure: values in, values out.

A pool is one instance type in one subnet. What a fleet asks for in one call is one region's pools; EC2 then chooses among
them by capacity and price, which it alone knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from hf_spot.cloud.job import ON_DEMAND, Rung

FREE_HOUR_S = 3600.0
_LEAST_BILLED_S = 60.0
RECLAIMED = "Server.SpotInstanceTermination"
_WORTH_STARTING_H = 1.0
_LIKELY, _UNKNOWN, _UNLIKELY = 0, 1, 2
_PAUSES_S = (60.0, 120.0, 240.0, 480.0, 600.0)


@dataclass(frozen=True)
class Price:
    """Dollars per hour of one machine, with where and when this was said."""

    usd_per_hour: float
    time: datetime
    source: str


@dataclass(frozen=True)
class Pool:
    """Machines that are all alike.

    Args:
        region: its name.
        zone: its availability zone's name in this account.
        subnet: its id.
        instance_type: such as ``p4d.24xlarge``.
        market: ``spot`` or ``on-demand``.
        price: of this market, or None when nobody says one; no spot price means no spot capacity.
        score: of the region, 1 to 10: how likely AWS thinks a spot request succeeds; None when it was not asked.
    """

    region: str
    zone: str
    subnet: str
    instance_type: str
    market: str
    price: Price | None = None
    score: int | None = None

    def __str__(self) -> str:
        return f"{self.instance_type} {self.market} in {self.zone}"


def in_order(pools: Iterable[Pool], rung: Rung, preferred: Sequence[str]) -> list[list[Pool]]:
    """The pools of a rung by region, the region to try first in front; in a region the cheapest pool comes first.

    Left out are pools without a price, and those above the rung's `max_price`. Regions that AWS thinks likely (a placement
    score of 7 or more) come before those that it says nothing of, and these before unlikely ones (3 or less); among equals
    the cheapest goes first. Scores are coarse, and a small difference is worth no money.

    Args:
        pools: of all regions.
        rung: that they belong to.
        preferred: regions in the order that decides between equals.
    """
    regions: dict[str, list[Pool]] = {}
    for pool in pools:
        if pool.price is not None and (rung.max_price is None or pool.price.usd_per_hour <= rung.max_price):
            regions.setdefault(pool.region, []).append(pool)
    for found in regions.values():
        found.sort(key=lambda pool: (_usd(pool), rung.instance_types.index(pool.instance_type), pool.zone, pool.subnet))

    def rank(region: str) -> tuple[int, float, int]:
        place = preferred.index(region) if region in preferred else len(preferred)
        return _likelihood(regions[region][0].score), _usd(regions[region][0]), place

    return [regions[region] for region in sorted(regions, key=rank)]


def _usd(pool: Pool) -> float:
    assert pool.price is not None
    return pool.price.usd_per_hour


def _likelihood(score: int | None) -> int:
    if score is None or 3 < score < 7:
        return _UNKNOWN
    return _LIKELY if score >= 7 else _UNLIKELY


def untried(pools: Sequence[Pool], codes: Mapping[tuple[str, str], str]) -> list[Pool]:
    """What is worth another call after a refused one.

    A fleet really tries about three pools and says ``UnfulfillableCapacity`` of all others, whatever their state; so those
    are asked again without the ones that gave a reason of their own. Empty when nobody did.

    Args:
        pools: that were asked.
        codes: error codes by (instance type, subnet); a pool without one counts as not tried.
    """
    left = [pool for pool in pools if codes.get((pool.instance_type, pool.subnet), "") in ("", "UnfulfillableCapacity")]
    return left if len(left) < len(pools) else []


def too_dear(pool: Pool, left_usd: float, hours_left: float | None) -> str:
    """Why the money that is left does not do for a machine; empty when it does.

    A spot machine must be affordable for an hour, or for what is left of the training if that is less: prices fall, and
    spot machines go anyway. At the full price all that is left of the training must be affordable.

    Args:
        pool: with its price.
        left_usd: of the run's budget.
        hours_left: of the training; None when nobody knows.
    """
    usd = _usd(pool)
    hours = _WORTH_STARTING_H if hours_left is None else hours_left
    if pool.market != ON_DEMAND:
        hours = min(hours, _WORTH_STARTING_H)
    if hours * usd <= left_usd:
        return ""
    has = f"${max(0.0, left_usd):.2f} of the budget are left"
    return f"{pool} costs ${usd:.2f}/h: {hours:.1f} h cost ${hours * usd:.2f}, and {has}"


def minutes_affordable(pools: Iterable[Pool], left_usd: float) -> int:
    """How long the dearest of these machines may run, in whole minutes, at least one."""
    return max(1, int(left_usd / max(_usd(pool) for pool in pools) * 60))


def cost_usd(began: datetime, until: datetime, price: float, history: Iterable[tuple[datetime, float]] = ()) -> float:
    """What a machine cost: hours times price, with the price as it changed. Billed by the second; disk and traffic aside.

    Args:
        began: when it was launched.
        until: its end, or now.
        price: dollars per hour at the beginning.
        history: later prices with the times from which they held, in any order.
    """
    total, since, usd = 0.0, began, price
    for time, changed in sorted(history):
        if began < time < until:
            total += (time - since).total_seconds() / 3600 * usd
            since = time
        if time < until:
            usd = changed
    return total + max(0.0, (until - since).total_seconds()) / 3600 * usd


def billed_until(began: datetime, until: datetime) -> datetime:
    """Seconds are billed, and at least sixty of them: https://aws.amazon.com/ec2/pricing/on-demand/"""
    return max(until, began + timedelta(seconds=_LEAST_BILLED_S))


def is_free(market: str, began: datetime, ended: datetime, reason: str) -> bool:
    """Whether AWS charges nothing: it took a spot machine away in its first hour.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/billing-for-interrupted-spot-instances.html
    """
    return market != ON_DEMAND and reason.startswith(RECLAIMED) and (ended - began).total_seconds() < FREE_HOUR_S


def pause_s(fruitless_walks: int) -> float:
    """Seconds to wait after so many walks of the whole ladder without a machine, at least one."""
    return _PAUSES_S[min(fruitless_walks, len(_PAUSES_S)) - 1]
