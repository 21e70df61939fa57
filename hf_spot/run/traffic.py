"""What the machines of a run and its store have exchanged, according to the journal, and what the clouds charge for it. Pure.

The writer of a checkpoint measures what it sends; copies within the store are not sent. What a restore fetches is bounded: each
machine that was not in the launch before fetches the whole newest checkpoint, unless it needs only a part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hf_spot.run.journal import BY_HAND, Entry

INTERNET = "internet"
NOWHERE = ""  # a folder, or a store that is not known to be anywhere
GB = 1e9  # bytes; clouds may mean 2**30, and charge 7% less


@dataclass(frozen=True)
class Rate:
    """What a gigabyte costs from one place (a region, or `INTERNET`) to another; within a region, from one zone to another.

    Args:
        source_place: where the bytes come from.
        target_place: where they go.
        usd_per_gb: dollars.
        source: source of the price.
        time: since when it applies, as ISO 8601; empty if unknown.
    """

    source_place: str
    target_place: str
    usd_per_gb: float
    source: str
    time: str = ""

    def to_data(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Traffic:
    """Bytes between machines and store, by the region of the machines; an empty name where it is unknown.

    Args:
        sent: to the store.
        fetched: from the store, at most.
        between_zones: sent from machines of one zone to those of others, at most.
    """

    sent: Mapping[str, int] = field(default_factory=dict)
    fetched: Mapping[str, int] = field(default_factory=dict)
    between_zones: Mapping[str, int] = field(default_factory=dict)
    _region: str = ""
    _members: frozenset[str] = frozenset()
    _newest_bytes: int = 0

    @property
    def sent_bytes(self) -> int:
        """Return the bytes that all machines have sent."""
        return sum(self.sent.values())

    @property
    def fetched_bytes(self) -> int:
        """Return the bytes that all machines have fetched, at most."""
        return sum(self.fetched.values())

    def after(self, entry: Entry) -> Traffic:
        """Return the traffic after one more entry of the journal."""
        data = entry.data
        if entry.kind == "claim" and data.get("by") != BY_HAND:
            members = dict(_members(data))
            fetched = dict(self.fetched)
            for name, region in members.items():
                if name not in self._members and self._newest_bytes:
                    fetched[region] = fetched.get(region, 0) + self._newest_bytes
            region = next(iter(members.values()), "")
            return replace(self, fetched=fetched, _region=region, _members=frozenset(members))
        if entry.kind == "commit":
            files = data.get("files")
            sizes = [one.get("size") for one in files if isinstance(one, dict)] if isinstance(files, list) else []
            whole = sum(size for size in sizes if isinstance(size, int) and size > 0)
            sent = data.get("sent_bytes")
            sent = sent if isinstance(sent, int) and not isinstance(sent, bool) and sent >= 0 else whole
            if data.get("reason") == "push":  # from wherever somebody pushed
                return replace(self, _newest_bytes=whole)
            both = {**self.sent, self._region: self.sent.get(self._region, 0) + sent}
            return replace(self, sent=both, _newest_bytes=whole)
        return self


def _members(claim: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    roster = claim.get("roster")
    found = [one for one in roster if isinstance(one, dict)] if isinstance(roster, list) else []
    for one in found or [{"machine": claim.get("machine"), "name": claim.get("hostname")}]:
        stated = one.get("machine")
        machine = stated if isinstance(stated, dict) else {}
        yield str(machine.get("instance_id") or one.get("name") or ""), str(machine.get("region") or "")


def charged_usd(traffic: Traffic, store: str, rates: Sequence[Rate]) -> float | None:
    """Return what the clouds charge for the traffic, in dollars, at most; None if a price is unknown.

    Args:
        traffic: between machines and store.
        store: region of the store, or `INTERNET`.
        rates: the prices that are known.
    """
    known = {(one.source_place, one.target_place): one.usd_per_gb for one in rates}
    total = 0.0
    for source, target, count in pairs(traffic, store):
        if (source, target) not in known:
            return None
        total += known[source, target] * count / GB
    return total


def pairs(traffic: Traffic, store: str) -> Iterator[tuple[str, str, int]]:
    """Yield from where to where bytes went that a cloud charges for, and how many.

    AWS charges for what leaves a region, and on both sides for what goes from one zone to another, which counts twice here.
    """
    for region, count in traffic.between_zones.items():
        if count:
            yield region, region, 2 * count
    if store == NOWHERE:
        return
    for region, count in traffic.sent.items():
        if count and region != store:
            yield region, store, count
    for region, count in traffic.fetched.items():
        if count and region != store and store != INTERNET:
            yield store, region, count


def traffic_data(traffic: Traffic, store: str, rates: Sequence[Rate]) -> dict[str, Any]:
    """Return the traffic, its prices and its cost as JSON values."""
    return {
        "store": store,
        "sent_bytes": traffic.sent_bytes,
        "fetched_bytes": traffic.fetched_bytes,
        "between_zones": dict(traffic.between_zones),
        "usd": charged_usd(traffic, store, rates),
        "rates": [one.to_data() for one in rates],
    }


def rates_in(data: Mapping[str, Any]) -> tuple[str, list[Rate]]:
    """Return the store's place and the prices from the values of `traffic_data`; nothing from invalid ones."""
    try:
        return str(data["store"]), [Rate(**one) for one in data["rates"]]
    except (KeyError, TypeError):
        return NOWHERE, []


def zones_in(data: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes between zones from the values of `traffic_data`; nothing from invalid ones."""
    found = data.get("between_zones")
    return {str(name): count for name, count in found.items() if isinstance(count, int)} if isinstance(found, dict) else {}
