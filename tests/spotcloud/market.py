"""What the local spot cloud has, and what it costs: pools, their prices over time, who was billed for what, and the weather.

Nothing here reads a clock, and all randomness comes from a seed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fnmatch import fnmatchcase

SPOT, ON_DEMAND = "spot", "on-demand"

DOLLARS_PER_HOUR = {  # on demand; this cloud's own list, near that of AWS
    "p5.48xlarge": 55.04,
    "p4de.24xlarge": 27.447,
    "p4d.24xlarge": 21.957642,
    "p3dn.24xlarge": 31.212,
    "p3.16xlarge": 24.48,
    "p3.8xlarge": 12.24,
    "p3.2xlarge": 3.06,
    "g6.48xlarge": 13.3504,
    "g5.48xlarge": 16.288,
    "g5.12xlarge": 5.672,
    "g5.xlarge": 1.006,
    "c5.large": 0.085,
}
DISK_DOLLARS_PER_GB_AND_MONTH = 0.08
TRAFFIC_DOLLARS_PER_GB = {"InterRegion Outbound": 0.025, "IntraRegion": 0.011}  # what leaves for the internet is not listed
_LEAST_BILLED_S = 60
_FREE_IF_RECLAIMED_WITHIN_S = 3600
RECLAIMED = "Server.SpotInstanceTermination"


@dataclass(frozen=True, order=True)
class Pool:
    """Machines of one type in one zone, sold on one market."""

    instance_type: str
    zone: str
    market: str = SPOT

    @property
    def region(self) -> str:
        return self.zone[:-1]

    def __str__(self) -> str:
        return f"{self.instance_type} {self.market} {self.zone}"


class Market:
    """Which pools have capacity, and what each costs since when.

    Args:
        began: the first price of every pool is of this moment.
        seed: gives the spot prices that nobody sets: a third of the price on demand, more or less.
    """

    def __init__(self, began: datetime, seed: int = 0) -> None:
        self.began, self._seed = began, seed
        self._rules: list[tuple[str, str, str, float]] = []
        self._prices: dict[Pool, list[tuple[datetime, float]]] = {}

    def open(self, instance_type: str = "*", zone: str = "*", market: str = "*") -> None:
        """These pools have capacity from now on; names may hold ``*``."""
        self._rules.append((instance_type, zone, market, math.inf))

    def limit(self, count: int, instance_type: str = "*", zone: str = "*", market: str = "*") -> None:
        """In each of these pools so many machines can run at the same time from now on; those that run go on running."""
        self._rules.append((instance_type, zone, market, count))

    def close(self, instance_type: str = "*", zone: str = "*", market: str = "*") -> None:
        """These pools have none left; machines that run there go on running."""
        self._rules.append((instance_type, zone, market, 0))

    def has_capacity(self, pool: Pool) -> bool:
        """What the last word on this pool was; without any there is capacity."""
        return self.capacity(pool) > 0

    def capacity(self, pool: Pool) -> float:
        """How many machines of a pool can run at the same time, by the last word on it."""
        names = (pool.instance_type, pool.zone, pool.market)
        said = (count for *patterns, count in reversed(self._rules) if all(map(fnmatchcase, names, patterns)))
        return next(said, math.inf)

    def set_price(self, pool: Pool, price: float, at: datetime) -> None:
        """From ``at`` on, in dollars per hour."""
        self._history(pool).append((at, price))

    def price(self, pool: Pool, at: datetime) -> float:
        """Dollars per hour."""
        known = self._history(pool)
        return next((price for since, price in reversed(known) if since <= at), known[0][1])

    def history(self, pool: Pool) -> Sequence[tuple[datetime, float]]:
        """Since when which price, oldest first."""
        return tuple(self._history(pool))

    def cost(self, pool: Pool, began: datetime, ended: datetime) -> float:
        """Dollars: the seconds of each instance-hour at the price at its beginning, at least a minute of them."""
        seconds = max(_LEAST_BILLED_S, round((ended - began).total_seconds()))
        hours = [(hour, min(3600, seconds - 3600 * hour)) for hour in range(math.ceil(seconds / 3600))]
        return sum(self.price(pool, began + timedelta(hours=hour)) * billed_s / 3600 for hour, billed_s in hours)

    def _history(self, pool: Pool) -> list[tuple[datetime, float]]:
        if pool not in self._prices:
            full = DOLLARS_PER_HOUR.get(pool.instance_type, 1.0)
            share = random.Random(f"{self._seed} {pool}").uniform(0.28, 0.42) if pool.market == SPOT else 1.0
            self._prices[pool] = [(self.began, round(full * share, 4))]
        return self._prices[pool]


@dataclass
class Stay:
    """A machine's time in a pool, as the bill sees it."""

    instance_id: str
    pool: Pool
    began: datetime
    ended: datetime | None = None
    reason: str = ""
    disk_gb: int = 0

    def metered(self, market: Market, now: datetime) -> float:
        """Dollars by the meter."""
        return market.cost(self.pool, self.began, self.ended or now)

    def charged(self, market: Market, now: datetime) -> float:
        """Dollars to pay: nothing for a spot machine that EC2 took back within its first hour."""
        lived_s = ((self.ended or now) - self.began).total_seconds()
        free = self.reason == RECLAIMED and lived_s < _FREE_IF_RECLAIMED_WITHIN_S
        return 0.0 if free else self.metered(market, now)


@dataclass
class Bill:
    """What all machines cost, by whole seconds."""

    market: Market
    stays: dict[str, Stay] = field(default_factory=dict)

    def began(self, instance_id: str, pool: Pool, at: datetime, disk_gb: int = 0) -> None:
        self.stays[instance_id] = Stay(instance_id, pool, at.replace(microsecond=0), disk_gb=disk_gb)

    def ended(self, instance_id: str, at: datetime, reason: str) -> None:
        stay = self.stays[instance_id]
        if stay.ended is None:
            stay.ended, stay.reason = at.replace(microsecond=0), reason

    def charged(self, now: datetime) -> float:
        return sum(stay.charged(self.market, now) for stay in self.stays.values())

    def disks(self, now: datetime) -> dict[str, float]:
        """What each machine's disk cost: also of one that was taken back in its first hour."""
        found = {}
        for name, stay in self.stays.items():
            seconds = max(_LEAST_BILLED_S, ((stay.ended or now) - stay.began).total_seconds())
            found[name] = stay.disk_gb * DISK_DOLLARS_PER_GB_AND_MONTH / 730 * seconds / 3600
        return found

    def lines(self, now: datetime) -> Iterator[str]:
        """For people."""
        for stay in self.stays.values():
            seconds = ((stay.ended or now) - stay.began).total_seconds()
            charged, metered = stay.charged(self.market, now), stay.metered(self.market, now)
            free = "  taken back in its first hour: free" if metered and not charged else ""
            money = f"metered ${metered:8.4f}  charged ${charged:8.4f}"
            yield f"{stay.instance_id}  {stay.pool!s:<36}{seconds:>9.1f} s  {money}{free}"
        yield f"total charged: ${self.charged(now):.4f}"


@dataclass(frozen=True)
class Change:
    """Something that happens to a pool.

    Args:
        at_s: seconds after the weather began.
        pool: where.
        kind: ``price``, ``open``, ``close``, or ``reclaim``: capacity is gone, and machines that run there are taken.
        price: of ``price``, in dollars per hour.
        notice_s: of ``reclaim``: how long before they are gone machines hear of it; None: they don't.
    """

    at_s: float
    pool: Pool
    kind: str
    price: float = 0.0
    notice_s: float | None = None


def weather(
    seed: int,
    pools: Sequence[Pool],
    *,
    lasts_s: float,
    up_s: float,
    down_s: float,
    price_s: float,
    notice_s: float = 120.0,
    without_notice: float = 0.2,
) -> list[Change]:
    """What happens to pools, in order of time. The same arguments give the same weather.

    Args:
        seed: of all randomness.
        pools: that have weather; prices of on-demand pools stay, and their machines are never taken.
        lasts_s: when it ends.
        up_s: how long a pool has capacity, on average; exponentially distributed, as is the next.
        down_s: how long it then has none, on average.
        price_s: how long a price stands.
        notice_s: how long before the end machines hear of it.
        without_notice: the share of reclaims that nobody hears of.
    """
    changes = []
    for pool in pools:
        dice = random.Random(f"{seed} {pool}")
        at_s, is_open = dice.expovariate(1 / up_s), False
        while at_s < lasts_s:
            if is_open:
                changes.append(Change(at_s, pool, "open"))
            elif pool.market == SPOT:
                heard = None if dice.random() < without_notice else notice_s
                changes.append(Change(at_s, pool, "reclaim", notice_s=heard))
            else:
                changes.append(Change(at_s, pool, "close"))
            at_s += dice.expovariate(1 / (up_s if is_open else down_s))
            is_open = not is_open
        price = DOLLARS_PER_HOUR.get(pool.instance_type, 1.0) * 0.35
        for step in range(1, int(lasts_s / price_s) + 1 if pool.market == SPOT else 0):
            price *= dice.uniform(0.9, 1.11)
            changes.append(Change(step * price_s, pool, "price", price=round(price, 4)))
    return sorted(changes, key=lambda change: (change.at_s, change.pool, change.kind))
