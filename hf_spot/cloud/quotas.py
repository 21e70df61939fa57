"""Quotas: which ones a rung of the ladder needs, and which ones block it.

AWS counts vCPUs per region, family of instance types and market. Quotas are found by their names in Service Quotas, so that
future families are supported without a change here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_spot.cloud.ec2 import Cloud
from hf_spot.cloud.job import ON_DEMAND, SPOT, Job
from hf_spot.errors import CloudError

_SPOT_NAME = re.compile(r"All (?P<families>.+?) Spot Instance Requests")
_ON_DEMAND_NAME = re.compile(r"Running On-Demand (?P<families>.+?) instances")
_FAMILY = re.compile(r"([a-z]+)(\d*)")


@dataclass(frozen=True)
class Quota:
    """One quota of a region.

    Args:
        code: such as ``L-7212CCBC``.
        name: AWS's name of the quota.
        vcpus: vCPUs that may run at the same time.
    """

    code: str
    name: str
    vcpus: float


@dataclass(frozen=True)
class Need:
    """What one instance type of a rung needs in a region, and the quota that it has.

    Args:
        rung: index of the rung in the ladder, from 0.
        region: name of the region.
        instance_type: such as ``p4d.24xlarge``.
        market: ``spot`` or ``on-demand``.
        vcpus: vCPUs of one machine; None if the region does not offer the type.
        quota: the quota that applies; None if none was found.
        machines: how many there must be; with fewer there is no training.
        most: how many there may be.
    """

    rung: int
    region: str
    instance_type: str
    market: str
    vcpus: int | None
    quota: Quota | None
    machines: int = 1
    most: int = 1

    @property
    def blocked(self) -> bool:
        """Return whether the quota is too small for one such machine; unknown quotas do not block."""
        return self.allows == 0

    @property
    def limits(self) -> bool:
        """Return whether the quota allows fewer of these machines than may train."""
        return self.allows is not None and self.allows < self.most

    @property
    def allows(self) -> int | None:
        """Return how many such machines the quota allows; None if that is unknown."""
        return None if self.vcpus is None or self.quota is None else int(self.quota.vcpus // self.vcpus)

    @property
    def command(self) -> str:
        """Return the command that requests a larger quota."""
        if self.quota is None or self.vcpus is None:
            return ""
        return (
            f"aws service-quotas request-service-quota-increase --service-code ec2 --region {self.region} "
            f"--quota-code {self.quota.code} --desired-value {self.vcpus * self.most}"
        )


def quotas(cloud: Cloud, region: str) -> list[Quota]:
    """Return the EC2 quotas of a region: the account's own values, or else AWS's defaults.

    Raises:
        CloudError: the quotas can't be read.
    """
    found: dict[str, Quota] = {}
    for operation in ("list_aws_default_service_quotas", "list_service_quotas"):
        for one in cloud.pages("service-quotas", region, operation, "Quotas", ServiceCode="ec2"):
            found[one["QuotaCode"]] = Quota(one["QuotaCode"], one["QuotaName"], one["Value"])
    return sorted(found.values(), key=lambda quota: quota.name)


def quota_for(instance_type: str, market: str, known: Iterable[Quota]) -> Quota | None:
    """Return the quota that applies to an instance type, the most specific one if several match. Pure.

    Names look like ``All P4, P3 and P2 Spot Instance Requests`` and ``Running On-Demand Standard (A, C, D, H, I, M, R, T, Z)
    instances``: families, or families with their generation.
    """
    family = _FAMILY.match(instance_type)
    assert family is not None
    letters, generation = family[1].upper(), (family[1] + family[2]).upper()
    pattern = _SPOT_NAME if market == SPOT else _ON_DEMAND_NAME
    fitting: dict[str, Quota] = {}
    for quota in known:
        if named := pattern.fullmatch(quota.name):
            for word in re.findall(r"[A-Za-z]+\d*", named["families"]):
                fitting.setdefault(word.upper(), quota)
    return fitting.get(generation) or fitting.get(letters)


def needs(cloud: Cloud, job: Job, regions: Sequence[str]) -> list[Need]:
    """Return what the job's ladder needs, for every rung, region and instance type.

    Args:
        cloud: the account's EC2.
        job: the job with the ladder.
        regions: regions that the account can use.

    Raises:
        CloudError: quotas or instance types can't be read.
    """
    places = [(index, region) for index, rung in enumerate(job.ladder) for region in job.regions_of(rung, regions)]
    queried = list(dict.fromkeys(region for _, region in places))
    types = sorted({kind for rung in job.ladder for kind in rung.instance_types})

    def ask(region: str) -> tuple[list[Quota], dict[str, int]]:
        return quotas(cloud, region), cloud.vcpus(region, types)

    many = job.size.least, job.size.most
    answers = dict(zip(queried, cloud.each(queried, ask, services=("ec2", "service-quotas")), strict=True))
    return [
        Need(
            index,
            region,
            kind,
            rung.market,
            answers[region][1].get(kind),
            quota_for(kind, rung.market, answers[region][0]),
            *many,
        )
        for index, region in places
        for rung in [job.ladder[index]]
        for kind in rung.instance_types
    ]


def blocked(found: Iterable[Need], rung: int) -> set[tuple[str, str]]:
    """Return the (region, instance type) pairs of a rung whose quota is too small. Pure."""
    return {(need.region, need.instance_type) for need in found if need.rung == rung and need.blocked}


def render(found: Sequence[Need], job: Job) -> str:
    """Format the needs as a table, with a command for each quota that blocks a rung."""
    lines = []
    for index, rung in enumerate(job.ladder):
        mine = [need for need in found if need.rung == index and need.vcpus is not None]
        free = [need for need in mine if not need.blocked]
        word = "ok" if len(free) == len(mine) else "partly blocked" if free else "blocked"
        lines.append(
            f"rung {index}: {rung.market} {', '.join(rung.instance_types)}: {word if mine else 'not offered anywhere'}"
        )
        for need in mine:
            quota = need.quota
            has = "no quota found" if quota is None else f"{quota.vcpus:g} of {quota.code} ({quota.name})"
            mark = "BLOCKED" if need.blocked else "limits" if need.limits else "ok"
            each = f" for each of {job.size} machines" if job.size.is_fleet else ""
            lines.append(f"  {mark:8}{need.region:16}{need.instance_type:18}needs {need.vcpus:>4} vCPUs{each}, has {has}")
    commands: dict[str, int] = {}
    for need in found:
        if (need.blocked or need.limits) and need.quota is not None and need.vcpus is not None:
            key = need.command.rpartition(" ")[0]
            commands[key] = max(commands.get(key, 0), need.vcpus * need.most)
    lines += [f"Try: {command} {vcpus}" for command, vcpus in commands.items()]
    return "\n".join(lines)


def none_usable(found: Sequence[Need], job: Job) -> CloudError | None:
    """Return the error if the quotas allow too few machines in every region, else None. Pure.

    Machines of several rungs train together, so the quotas of a region add up.
    """
    real = [need for need in found if need.vcpus is not None]
    regions = {need.region for need in real}
    if not real or any(_machines(real, region) >= job.size.least for region in regions):
        return None
    first = real[0]
    assert first.quota is not None
    market = "MaxSpotInstanceCountExceeded" if first.market != ON_DEMAND else "VcpuLimitExceeded"
    if job.size.is_fleet:
        best = max(regions, key=lambda region: _machines(real, region))
        return CloudError(
            f"machines: {job.size} needs {job.size.least} machines in one region, and the quotas of all rungs together allow "
            f"{_machines(real, best):.0f} in {best}: {first.instance_type} needs {first.vcpus} vCPUs each, and "
            f"{first.quota.name!r} allows {first.quota.vcpus:g}; `hf-spot quotas` lists all of them",
            hint=first.command,
            code=market,
        )
    return CloudError(
        f"quotas block every rung of the ladder: {first.instance_type} needs {first.vcpus} vCPUs in {first.region}, and "
        f"{first.quota.name!r} allows {first.quota.vcpus:g}; `hf-spot quotas` lists all of them",
        hint=first.command,
        code=market,
    )


def _machines(found: Sequence[Need], region: str) -> float:
    """Return how many machines all quotas of a region together allow; infinite if one of them is unknown."""
    by_quota: dict[str, float] = {}
    for need in found:
        if need.region == region:
            code = need.quota.code if need.quota else ""
            by_quota[code] = max(by_quota.get(code, 0), math.inf if need.allows is None else need.allows)
    return sum(by_quota.values())
