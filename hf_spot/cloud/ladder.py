"""Which pools to try, in which order, and what they may cost. Pure: values in, values out.

A pool is one instance type in one subnet. A fleet requests all pools of one region in one call; EC2 then chooses among them by
capacity, which only EC2 knows, and price.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from hf_spot.cloud.job import ON_DEMAND, Rung

FREE_HOUR_S = 3600.0
_LEAST_BILLED_S = 60.0
_HOUR = timedelta(hours=1)
RECLAIMED = "Server.SpotInstanceTermination"
_WORTH_STARTING_H = 1.0
_LIKELY, _UNKNOWN, _UNLIKELY = 0, 1, 2
_PAUSES_S = (60.0, 120.0, 240.0, 480.0, 600.0)


@dataclass(frozen=True)
class Price:
    """The price of one machine in dollars per hour, with its source and time."""

    usd_per_hour: float
    time: datetime
    source: str


@dataclass(frozen=True)
class Pool:
    """Machines of one type in one subnet.

    Args:
        region: name of the region.
        zone: name of the availability zone in this account.
        subnet: id of the subnet.
        instance_type: such as ``p4d.24xlarge``.
        market: ``spot`` or ``on-demand``.
        price: price on this market; None if unknown. No spot price means no spot capacity.
        score: AWS's estimate, 1 to 10, that a spot request succeeds in the region; None if it was not requested.
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


@dataclass(frozen=True)
class Wanted:
    """The machines to look for.

    Args:
        count: how many.
        needed: how many of these from any rung; the others only as spot machines.
        at_least: fewer are of no use.
        most_usd: highest price per hour of those that are not needed; None for no limit beyond the rung's.
        region: where the others are; empty if there are none.
        zone: the same, if all must be in one zone.
        one_zone: whether all must be in one zone.
        running_usd: dollars per hour of those that run.
    """

    count: int = 1
    needed: int = 1
    at_least: int = 1
    most_usd: float | None = None
    region: str = ""
    zone: str = ""
    one_zone: bool = False
    running_usd: float = 0.0

    def admits(self, pool: Pool) -> bool:
        """Return whether a machine of the pool can be one of these; also False for one that is too dear."""
        if (self.region and pool.region != self.region) or (self.zone and pool.zone != self.zone):
            return False
        dear = self.most_usd is not None and pool.price is not None and pool.price.usd_per_hour > self.most_usd
        return self.needed > 0 or not dear


def by_zone(pools: Iterable[Pool]) -> list[list[Pool]]:
    """Return the pools of each zone, in the order in which the zones come first."""
    zones: dict[str, list[Pool]] = {}
    for pool in pools:
        zones.setdefault(pool.zone, []).append(pool)
    return [*zones.values()]


def in_order(pools: Iterable[Pool], rung: Rung, preferred: Sequence[str]) -> list[list[Pool]]:
    """Return the pools of a rung by region, in the order to try them; within a region the cheapest pool comes first.

    Pools without a price, or above the rung's `max_price`, are skipped. Likely regions (a placement score of 7 or more) come
    before those without a clear score, and these before unlikely ones (3 or less); among equals the cheapest comes first.
    Scores are coarse, so a small difference does not justify a higher price.

    Args:
        pools: pools of all regions.
        rung: the rung that they belong to.
        preferred: regions in the order that breaks ties.
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
    """Return the pools that are worth another request after a refused one.

    A fleet really tries about three pools and reports ``UnfulfillableCapacity`` for all others, whatever their state; so
    those are requested again without the pools that have a specific error. Empty if no pool has one.

    Args:
        pools: the requested pools.
        codes: error codes by (instance type, subnet); a pool without one counts as not tried.
    """
    left = [pool for pool in pools if codes.get((pool.instance_type, pool.subnet), "") in ("", "UnfulfillableCapacity")]
    return left if len(left) < len(pools) else []


def over_budget(pool: Pool, left_usd: float, hours_left: float | None, machines: int = 1, running_usd: float = 0.0) -> str:
    """Return why the remaining budget does not cover a machine; empty if it does.

    A spot machine must be affordable for an hour, or for the rest of the training if that is shorter: prices may fall, and
    spot machines are taken away anyway. On-demand, the whole rest of the training must be affordable.

    Args:
        pool: a pool with its price.
        left_usd: rest of the run's budget.
        hours_left: rest of the training; None if unknown.
        machines: how many of it are wanted at once.
        running_usd: dollars per hour of the machines that run.
    """
    usd = _usd(pool)
    hours = hours_to_cover(pool, hours_left)
    if hours * (usd * machines + running_usd) <= left_usd:
        return ""
    left = f"${max(0.0, left_usd):.2f} of the budget is left"
    if machines > 1 or running_usd:
        others = f" beside ${running_usd:.2f}/h" if running_usd else ""
        cost = f"{machines} for {hours:.1f} h{others} cost ${hours * (usd * machines + running_usd):.2f}"
        return f"{pool} costs ${usd:.2f}/h: {cost}, and {left}"
    return f"{pool} costs ${usd:.2f}/h: {hours:.1f} h cost ${hours * usd:.2f}, and {left}"


def hours_to_cover(pool: Pool, hours_left: float | None) -> float:
    """Return the hours for which a machine must be affordable, as `over_budget` counts them."""
    hours = _WORTH_STARTING_H if hours_left is None else hours_left
    return hours if pool.market == ON_DEMAND else min(hours, _WORTH_STARTING_H)


def minutes_affordable(pools: Iterable[Pool], left_usd: float, disk_usd_per_hour: float = 0.0) -> int:
    """Return how long the most expensive of these machines may run with its disk, in whole minutes, at least one."""
    return max(1, int(left_usd / (max(_usd(pool) for pool in pools) + disk_usd_per_hour) * 60))


def cost_usd(began: datetime, until: datetime, price: float, history: Iterable[tuple[datetime, float]] = ()) -> float:
    """Return the cost of a machine in dollars, without disk and traffic.

    Each hour of the machine has the price at its beginning, and is billed by the second: a spot price that changes counts from
    the machine's next hour on. https://aws.amazon.com/ec2/faqs/ ("What price will I pay for a Spot Instance?")

    Args:
        began: when it was launched.
        until: its end, or now.
        price: dollars per hour at the beginning.
        history: later prices with the times from which they applied, in any order.
    """
    changes = sorted(history)
    total, hour = 0.0, began
    while hour < until:
        usd = next((changed for time, changed in reversed(changes) if time <= hour), price)
        total += usd * min(1.0, (until - hour) / _HOUR)
        hour += _HOUR
    return total


def billed_until(began: datetime, until: datetime) -> datetime:
    """Return the end of billing: at least 60 seconds are billed. https://aws.amazon.com/ec2/pricing/on-demand/"""
    return max(until, began + timedelta(seconds=_LEAST_BILLED_S))


def is_free(market: str, began: datetime, ended: datetime, reason: str) -> bool:
    """Return whether AWS charges nothing: it interrupted a spot machine in its first hour.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/billing-for-interrupted-spot-instances.html
    """
    return market != ON_DEMAND and reason.startswith(RECLAIMED) and (ended - began).total_seconds() < FREE_HOUR_S


def pause_s(fruitless_walks: int) -> float:
    """Return the seconds to wait after a number (at least one) of walks of the whole ladder without a machine."""
    return _PAUSES_S[min(fruitless_walks, len(_PAUSES_S)) - 1]
