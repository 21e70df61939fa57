"""Prices of traffic: from AWS's price list, or AWS's usual ones where that does not answer."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterable, Sequence

from hf_spot.cloud.ec2 import Cloud
from hf_spot.cloud.ledger import Machine
from hf_spot.errors import CloudError, SpotError
from hf_spot.run.traffic import INTERNET, NOWHERE, Rate
from hf_spot.storage.s3 import S3Store
from hf_spot.storage.store import ObjectStore

USUAL_SOURCE = "AWS's usual price, https://aws.amazon.com/ec2/pricing/on-demand/#Data_Transfer"
USUAL_REGIONS, USUAL_INTERNET, USUAL_ZONES = 0.02, 0.09, 0.01
_AWS = (".amazonaws.com", ".amazonaws.com.cn")
_ELSEWHERE = ("gs://", "az://", "hf://")


def place_of(store: ObjectStore) -> str:
    """Return the region of a store in AWS, or `INTERNET`; empty for a folder, or a server whose place is unknown."""
    if store.url.startswith(_ELSEWHERE):
        return INTERNET
    if not isinstance(store, S3Store):
        return NOWHERE
    try:
        place = store.place()
    except SpotError:
        return NOWHERE
    host = urllib.parse.urlsplit(place.endpoint).hostname or ""
    return place.region or NOWHERE if host.endswith(_AWS) else NOWHERE


def rates_for(cloud: Cloud, pairs: Iterable[tuple[str, str]]) -> list[Rate]:
    """Return what a gigabyte costs from one place to another; within a region, from a zone to another, on each side."""
    return [_rate(cloud, source, target) for source, target in sorted(set(pairs))]


def _rate(cloud: Cloud, source: str, target: str) -> Rate:
    try:
        price = cloud.traffic_price(source, "" if target == INTERNET else target)
    except CloudError:
        price = None
    if price is not None:
        return Rate(source, target, price.usd_per_hour, price.source, price.time.isoformat())
    usual = USUAL_INTERNET if target == INTERNET else USUAL_ZONES if source == target else USUAL_REGIONS
    return Rate(source, target, usual, USUAL_SOURCE)


def between_zones(machines: Sequence[Machine], sent_bytes: int) -> dict[str, int]:
    """Return how many bytes went from one zone of a region to another, at most, by region. Pure.

    It is all that machines have sent while others were in other zones, except for what they sent to the store.

    Args:
        machines: of the run.
        sent_bytes: what all have sent to the store.
    """
    found: dict[str, int] = {}
    for one in machines:
        apart = any(other.region == one.region and other.zone != one.zone and _overlap(one, other) for other in machines)
        if apart and one.sent_bytes:
            found[one.region] = found.get(one.region, 0) + one.sent_bytes
    left = sent_bytes
    for region, count in found.items():
        found[region] = max(0, count - left)
        left = max(0, left - count)
    return found


def _overlap(one: Machine, other: Machine) -> bool:
    return (other.ended is None or one.began < other.ended) and (one.ended is None or other.began < one.ended)
