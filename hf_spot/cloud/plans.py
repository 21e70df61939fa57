"""What each rung of a job's ladder offers at the moment: regions, pools, prices and quotas are queried; nothing is bought."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from hf_spot.cloud import ec2, quotas
from hf_spot.cloud.ec2 import Cloud, Image, Kind, Subnet
from hf_spot.cloud.fleet_size import CLUSTER, ONE, REGION, FleetSize
from hf_spot.cloud.job import ANY, SPOT, Job, Rung
from hf_spot.cloud.ladder import Pool, Price, Wanted, by_zone, in_order, over_budget
from hf_spot.cloud.machine_records import MachineRecords
from hf_spot.errors import CloudError, SpotError
from hf_spot.yaml_file import Invalid


@dataclass(frozen=True)
class Plan:
    """The current offer of a rung.

    Args:
        index: index in the ladder, from 0.
        rung: the rung of the job file.
        regions: affordable pools by region, in the order in which they are tried; for several machines that must be in one
            zone, by zone.
        notes: why other pools are skipped.
        over_budget: why pools are too expensive for the remaining budget.
    """

    index: int
    rung: Rung
    regions: list[list[Pool]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    over_budget: list[str] = field(default_factory=list)

    def to_dict(self, size: FleetSize = ONE) -> dict[str, Any]:
        """Return JSON values, for so many machines."""
        pools = [{**asdict(pool), "price": _plain(pool.price)} for region in self.regions for pool in region]
        return {
            "rung": self.index,
            "market": self.rung.market,
            "pools": pools,
            "notes": self.notes,
            "too_dear": self.over_budget,
            **({"machines": {"least": size.least, "most": size.most}} if size.is_fleet else {}),
        }


class Planner:
    """Query what a job can get at the moment, in the order of its ladder.

    Args:
        job: the job.
        cloud: the account's EC2.
        records: the run's machines, and with them what has been spent.
        now: the wall clock.
    """

    def __init__(self, job: Job, cloud: Cloud, records: MachineRecords, *, now: Callable[[], datetime]) -> None:
        self._job = job
        self._cloud = cloud
        self._records = records
        self._now = now
        self._regions: list[str] = []
        self._needs: list[quotas.Need] = []
        self._sites: dict[str, tuple[Image, list[Subnet]]] = {}
        self._kinds: dict[str, dict[str, Kind]] = {}

    @property
    def regions(self) -> list[str]:
        """Return the regions that the account can use; empty before `check_regions`."""
        return self._regions

    # -- checks that cost nothing -------------------------------------------------------------------------------------

    def check_regions(self) -> None:
        """Query the account's regions. Raise SpotError when the job names a region that is not among them."""
        self._regions = self._cloud.regions(self._job.region)
        self._cloud.check_regions(self._job.named_regions(), self._regions)

    def check_sites(self) -> None:
        """Check images and networks in each region that the job names. Raise SpotError for the first that is missing."""
        job = self._job
        tried = {region for rung in job.ladder if rung.regions != ANY for region in job.regions_of(rung, self._regions)}
        for region in sorted(tried):
            self.site(region)

    def check_fleet(self) -> None:
        """Check what only several machines need: as many GPUs on each, and for a placement group one zone and types that fit.

        Raises:
            ConfigError: the job can't have several machines like this; the message names the key.
            CloudError: the instance types can't be read.
        """
        job = self._job
        if not job.size.is_fleet:
            return
        gpus: dict[str, int] = {}
        for region in {region for rung in job.ladder if rung.regions != ANY for region in job.regions_of(rung, self._regions)}:
            kinds = self.kinds(region)
            gpus |= {name: kind.gpus for name, kind in kinds.items()}
            alone = [name for name, kind in kinds.items() if not kind.clusters]
            if job.placement == CLUSTER and alone:
                raise Invalid(
                    ("placement",),
                    f"{alone[0]} can't be in a cluster placement group",
                    hint="placement: zone, or remove the type",
                )
            zones = sorted({subnet.zone for subnet in self.site(region)[1]}) if job.site(region).subnets else []
            if job.placement == CLUSTER and len(zones) > 1:
                raise Invalid(
                    ("subnets",),
                    f"a cluster placement group is in one zone, and these subnets are in {', '.join(zones)}",
                    hint=f"subnets: {{{region}: [subnet-…]}} with those of one zone, or placement: region",
                )
            nets = sorted({subnet.vpc for subnet in self.site(region)[1]})
            if len(nets) > 1:
                raise Invalid(
                    ("subnets",),
                    f"machines that train together are in one VPC, and these are in {', '.join(nets)}",
                    hint=f"subnets: {{{region}: [subnet-…]}} with those of one VPC",
                )
        if len(set(gpus.values())) > 1:
            shown = ", ".join(f"{name} has {count}" for name, count in sorted(gpus.items(), key=lambda one: (-one[1], one[0])))
            raise Invalid(
                ("ladder",),
                f"machines that train together have as many GPUs each, and {shown}",
                hint="one job file for each number of GPUs, or remove the other types from the ladder",
            )

    def kinds(self, region: str) -> dict[str, Kind]:
        """Return the instance types of the ladder that a region offers."""
        if region not in self._kinds:
            types = sorted({name for rung in self._job.ladder for name in rung.instance_types})
            self._kinds[region] = self._cloud.kinds(region, types)
        return self._kinds[region]

    def read_quotas(self) -> None:
        """Query the quotas. Raise CloudError when they can't be read; those read before stay in force."""
        self._needs = quotas.needs(self._cloud, self._job, self._regions)

    def check_quotas(self) -> None:
        """Raise CloudError when the quotas allow no machine on any rung; unknown quotas block nothing."""
        if none := quotas.none_usable(self._needs, self._job):
            raise none

    def site(self, region: str) -> tuple[Image, list[Subnet]]:
        """Return image and subnets in a region, after checking everything that the job names there."""
        if region not in self._sites:
            site = self._job.site(region)
            image = self._cloud.image(region, site.image_id)
            subnets = self._cloud.subnets(region, site.subnets)
            for vpc in sorted({subnet.vpc for subnet in subnets}):
                self._cloud.check_groups(region, site.security_groups, vpc)
            if site.key_name:
                self._cloud.check_key(region, site.key_name)
            self._sites[region] = image, subnets
        return self._sites[region]

    def forget_sites(self) -> None:
        """Drop cached images and networks: they may have changed."""
        self._sites.clear()

    # -- the offers of the rungs --------------------------------------------------------------------------------------

    def plans(self, wanted: Wanted | None = None) -> Iterator[Plan]:
        """Yield the current offer of each rung, in the ladder's order; each rung is queried when it is reached.

        Args:
            wanted: the machines to look for; default: as many as the job needs, wherever they are.
        """
        size = self._job.size
        wanted = wanted or Wanted(size.most, size.least, size.least, one_zone=size.is_fleet and self._job.placement != REGION)
        for index in range(len(self._job.ladder)):
            yield self._plan(index, wanted)

    def _plan(self, index: int, wanted: Wanted) -> Plan:
        rung = self._job.ladder[index]
        regions = [one for one in self._job.regions_of(rung, self._regions) if wanted.region in ("", one)]
        plan = Plan(index, rung)
        if not regions:
            plan.notes.append(f"the other machines are in {wanted.region}")
            return plan
        if rung.market != SPOT and not wanted.needed:
            plan.notes.append("on-demand machines are taken up to the minimum of `machines` only")
            return plan
        blocked = quotas.blocked(self._needs, index)
        services = "ec2", "ssm", "pricing"
        answers = self._cloud.each(regions, lambda region: self._pools(rung, region, blocked), services=services)
        pools = [pool for offered, _ in answers for pool in offered if wanted.admits(pool)]
        plan.notes.extend(note for _, notes in answers for note in notes)
        if rung.market == SPOT and pools:
            try:
                scores = self._cloud.scores(rung.instance_types, sorted({pool.region for pool in pools}))
                pools = [replace(pool, score=scores.get(pool.region)) for pool in pools]
            except CloudError as error:
                plan.notes.append(f"no placement scores: {error.args[0]}")
        left = self.left_usd()
        hours = self.hours_left()
        few = max(1, wanted.needed)
        for found in in_order(pools, rung, regions):
            dear = {pool: over_budget(pool, left, hours, few, wanted.running_usd) for pool in found}
            plan.over_budget.extend(why for why in dear.values() if why)
            if affordable := [pool for pool in found if not dear[pool]]:
                plan.regions.extend(by_zone(affordable) if wanted.one_zone else [affordable])
        if not pools and not plan.notes:
            plan.notes.append(f"{', '.join(rung.instance_types)}: no price and therefore no capacity in {', '.join(regions)}")
        elif pools and not plan.regions and not plan.over_budget:
            plan.notes.append(f"every price is unknown or above max_price ${rung.max_price}")
        return plan

    def _pools(self, rung: Rung, region: str, blocked: set[tuple[str, str]]) -> tuple[list[Pool], list[str]]:
        notes = [f"{kind} in {region}: the quota is too small" for kind in rung.instance_types if (region, kind) in blocked]
        types = [kind for kind in rung.instance_types if (region, kind) not in blocked]
        if not types:
            return [], notes
        try:
            offered = self._cloud.offered(region, types)
            prices = self._prices(rung.market, region, types, offered)
            if not prices:
                return [], notes
            subnets = self.site(region)[1]
        except SpotError as error:
            if rung.regions != ANY and not (isinstance(error, CloudError) and ec2.is_temporary(error)):
                raise
            return [], [*notes, f"{region}: {error.args[0]}"]
        pools = [
            Pool(region, subnet.zone, subnet.id, kind, rung.market, prices.get((kind, subnet.zone)))
            for kind in types
            for subnet in subnets
            if (kind, subnet.zone) in offered
        ]
        return pools, notes

    def _prices(
        self, market: str, region: str, types: Sequence[str], offered: set[tuple[str, str]]
    ) -> dict[tuple[str, str], Price]:
        if market == SPOT:
            now = self._now()
            return {pool: prices[-1] for pool, prices in self._cloud.spot_prices(region, types, now, now).items()}
        found = {kind: self._cloud.on_demand_price(kind, region) for kind in {kind for kind, _ in offered}}
        return {(kind, zone): price for kind, zone in offered if (price := found[kind]) is not None}

    def left_usd(self) -> float:
        """Return the remaining budget in dollars."""
        return self._job.max_spend - self._records.spent_usd()

    def hours_left(self) -> float | None:
        """Return the remaining hours of the training; None if unknown."""
        return self._records.ledger.hours_left(self._job.hours)


def _plain(price: Price | None) -> dict[str, Any] | None:
    return None if price is None else {**asdict(price), "time": price.time.isoformat()}


def render_plan(plan: Plan, size: FleetSize = ONE) -> str:
    """Format the offer of a rung, one pool per line; of several machines also what they cost together."""
    rung = plan.rung
    where = rung.regions if isinstance(rung.regions, str) else ", ".join(rung.regions)
    lines = [f"rung {plan.index}: {rung.market} {', '.join(rung.instance_types)}, regions: {where}"]
    for pool in (pool for region in plan.regions for pool in region):
        assert pool.price is not None
        score = "" if pool.score is None else f", placement score {pool.score} of 10"
        usd = pool.price.usd_per_hour
        price = f"${usd:.4f}/h ({pool.price.source}, {pool.price.time:%Y-%m-%d %H:%M} UTC)"
        if size.is_fleet:
            price += f", {size} machines ${usd * size.least:.2f}/h" + (
                f" to ${usd * size.most:.2f}/h" if size.least < size.most else ""
            )
        lines.append(f"{pool.instance_type} in {pool.zone}: {price}{score}")
    return "\n    ".join([*lines, *plan.over_budget, *plan.notes])
