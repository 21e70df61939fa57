"""A walk of a job's ladder: orders machines, rung after rung, until there are enough, and records each at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_spot.cloud import ec2, orders
from hf_spot.cloud.ec2 import Cloud
from hf_spot.cloud.ec2_errors import NEXT_RUNG, explain
from hf_spot.cloud.fleet_size import CLUSTER
from hf_spot.cloud.job import ON_DEMAND, SPOT, Job
from hf_spot.cloud.ladder import Pool, Wanted, hours_to_cover, minutes_affordable, untried
from hf_spot.cloud.ledger import Machine
from hf_spot.cloud.machine_records import MachineRecords
from hf_spot.cloud.network import Network, Networks, efa_interfaces
from hf_spot.cloud.orders import Order, Outcome
from hf_spot.cloud.plans import Plan, Planner
from hf_spot.cloud.user_data import render
from hf_spot.cloud.wheel import Wheel, put, wheel_for
from hf_spot.errors import CloudError, NoCapacity
from hf_spot.policy.fleet import affordable_machines

FLEET, SPOT_REQUEST, SPOT_FLEET = "fleet", "spot-request", "spot-fleet"
OVER_BUDGET = "MaxSpend"

Say = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Yield:
    """What a walk has brought.

    Args:
        machines: in the order in which they were started.
        why: why there are not more; empty if there are as many as were wanted.
    """

    machines: Sequence[Machine]
    why: str = ""


@dataclass(frozen=True)
class Setting:
    """What whoever gets machines for a job works with.

    Args:
        job: the job.
        cloud: the account's EC2.
        records: of the run's machines.
        planner: says what each rung offers, and what is left of the budget.
        say: reports progress.
    """

    job: Job
    cloud: Cloud
    records: MachineRecords
    planner: Planner
    say: Say


class Walker:
    """Walks the ladder of a job.

    Args:
        setting: the job, and what it needs.
        api: how spot machines are ordered.
        sleep: waits for some seconds.
        tell: reports a machine that was started.
    """

    def __init__(
        self, setting: Setting, *, api: str, sleep: Callable[[float], object], tell: Callable[[str, Machine], None]
    ) -> None:
        self._at = setting
        self._api = api
        self._sleep = sleep
        self._tell = tell
        self._is_in_store = False
        self._networks = Networks(setting.cloud, setting.records.run.url, setting.job.tags)

    def one(self, token: str) -> Machine:
        """Start one machine.

        Raises:
            NoCapacity: no rung has capacity at the moment.
            CloudError: the remaining budget is too small, or the cloud refused.
        """
        self._at.planner.forget_sites()  # images and networks may have changed since
        refused: list[str] = []
        expensive: list[str] = []
        for plan in self._at.planner.plans():
            expensive += plan.over_budget
            refused += [f"rung {plan.index}: {note}" for note in plan.notes]
            for pools in plan.regions:
                parts = plan.index, pools[0].region
                for found in self._try(plan, pools, token, refused, parts, Wanted())[0]:
                    machine = self._at.records.started(*found, plan.index)
                    self._tell("started", machine)
                    return machine
        raise _nothing(refused, expensive)

    def several(self, token: str, wanted: Wanted) -> Yield:
        """Start as many machines as are to be had of those that are wanted.

        If there are none yet, and all must be in one zone, a zone that has enough spot machines at once comes first.

        Raises:
            NoCapacity: there is none at all at the moment.
            CloudError: the remaining budget is too small for any, or the cloud refused.
        """
        self._at.planner.forget_sites()
        plans = [*self._at.planner.plans(wanted)]
        expensive = [line for plan in plans for line in plan.over_budget]
        refused = [f"rung {plan.index}: {note}" for plan in plans for note in plan.notes]
        at_once = wanted.one_zone and not wanted.zone and wanted.needed > 1
        found: list[Machine] = []
        for whole in (True, False) if at_once else (False,):
            for plan in plans:
                if whole and plan.rung.market == ON_DEMAND:
                    continue
                for pools in plan.regions:
                    found += self._some(plan, pools, token, refused, _rest(wanted, found, whole=whole), whole=whole)
                    if len(found) >= wanted.count or (whole and found):
                        return Yield(found, "" if len(found) >= wanted.count else "\n  ".join(refused))
        if not found:
            raise _nothing(refused, expensive)
        return Yield(found, "\n  ".join([*refused, *expensive]))

    def _some(
        self, plan: Plan, pools: Sequence[Pool], token: str, refused: list[str], wanted: Wanted, *, whole: bool
    ) -> list[Machine]:
        fitting = [pool for pool in pools if wanted.admits(pool)]
        market = plan.rung.market
        count = min(wanted.count if market == SPOT else wanted.needed, self._affordable(fitting, wanted))
        if not fitting or count < wanted.at_least:
            return []
        machines: list[Machine] = []
        while fitting and len(machines) < count:
            left = replace(wanted, count=count - len(machines), at_least=1 if machines else wanted.at_least)
            parts = plan.index, fitting[0].region, fitting[0].zone, whole, left.count
            found, fitting = self._try(plan, fitting, token, refused, parts, left)
            for one in found:
                machine = self._at.records.started(*one, plan.index, more=True, wheel=str(self._wheel_in_store() or ""))
                self._tell("started", machine)
                machines.append(machine)
        return machines

    def _affordable(self, pools: Sequence[Pool], wanted: Wanted) -> int:
        if not pools:
            return 0
        dearest = max(pools, key=lambda pool: pool.price.usd_per_hour if pool.price else 0.0)
        assert dearest.price is not None
        hours = hours_to_cover(dearest, self._at.planner.hours_left())
        return affordable_machines(dearest.price.usd_per_hour, wanted.running_usd, self._at.planner.left_usd(), hours)

    def _try(
        self,
        plan: Plan,
        pools: Sequence[Pool],
        token: str,
        refused: list[str],
        parts: Sequence[object],
        wanted: Wanted,
    ) -> tuple[Sequence[tuple[str, Pool]], list[Pool]]:
        """Try one region's pools. Return the instances and their pools, and the pools that may have more; the reasons why there
        are not all are added to ``refused``."""
        attempt = 0
        while pools:
            order = self._order(plan, pools, ec2.token_for(token, *parts, attempt), wanted)
            several = f"{wanted.count} machines of " if wanted.count > 1 else ""
            self._at.say(
                f"rung {plan.index}: requesting {several}{', '.join(map(str, pools))}",
                {"event": "asking", "rung": plan.index, "region": order.region, "pools": len(pools)}
                | ({"machines": wanted.count} if self._at.job.size.is_fleet else {}),
            )
            try:
                outcome = self._send(order)
            except CloudError as error:
                if error.code not in NEXT_RUNG and not ec2.is_temporary(error):
                    raise
                refused.append(f"rung {plan.index}: {error.args[0]}")
                return (), []
            if outcome.machines:
                short = wanted.count - len(outcome.machines)
                if not short:
                    return outcome.machines, []
                shown = ", ".join(map(str, pools))
                refused.append(f"rung {plan.index}: {short} of {wanted.count} machines had no capacity: {shown}")
                codes = {place: code for place, (code, _) in outcome.refusals.items()}
                used = {pool for _, pool in outcome.machines}
                return outcome.machines, [pool for pool in untried(pools, codes) if pool not in used]
            for (kind, subnet), (code, message) in outcome.refusals.items():
                if code not in NEXT_RUNG:
                    raise explain(code, message, doing=f"{kind} in {subnet}")
            codes = {pool: code for pool, (code, _) in outcome.refusals.items()}
            for pool in pools:
                code = codes.get((pool.instance_type, pool.subnet), "UnfulfillableCapacity")
                self._at.say(f"{pool}: {code}", {"event": "refused", "rung": plan.index, "zone": pool.zone, "code": code})
                if code != "UnfulfillableCapacity":
                    refused.append(f"rung {plan.index}: {explain(code, doing=str(pool)).args[0]}")
            left = untried(pools, codes)
            if not left:
                rest = [pool for pool in pools if codes.get((pool.instance_type, pool.subnet), "UnfulfillableCapacity")]
                refused += [f"rung {plan.index}: no capacity for {pool}" for pool in rest if len(rest) == len(pools)]
            pools, attempt = left, attempt + 1
        return (), []

    def _order(self, plan: Plan, pools: Sequence[Pool], token: str, wanted: Wanted) -> Order:
        job, region = self._at.job, pools[0].region
        prices = [
            {
                "instance_type": pool.instance_type,
                "zone": pool.zone,
                "region": pool.region,
                "market": pool.market,
                "price_usd_per_hour": pool.price.usd_per_hour,
                "price_source": pool.price.source,
                "price_time": pool.price.time.isoformat(),
                "on_demand_usd_per_hour": self._at.records.on_demand_usd(pool.instance_type, region),
            }
            for pool in pools
            if pool.price is not None
        ]
        # Each of several machines may use its share, so that all together keep to the budget even if nobody watches.
        disk = self._at.records.disk_usd_per_hour(region) or 0.0
        minutes = minutes_affordable(pools, self._at.planner.left_usd() / job.size.most, disk)
        return Order(
            token=token,
            pools=pools,
            image=self._at.planner.site(region)[0],
            site=job.site(region),
            user_data=render(job, prices, minutes, wheel=self._wheel_in_store()),
            tags={
                **job.tags,
                "Name": f"hf-spot {job.name}",
                ec2.RUN_TAG: ec2.tag_value(self._at.records.run.url),
                ec2.RUNG_TAG: str(plan.index),
            },
            instance_profile=job.instance_profile,
            disk_gb=job.disk_gb,
            strategy=job.strategy,
            max_price=plan.rung.max_price,
            count=wanted.count,
            at_least=wanted.at_least,
            network=self._network(pools) if job.size.is_fleet else None,
        )

    def _network(self, pools: Sequence[Pool]) -> Network:
        region = pools[0].region
        subnets = {subnet.id: subnet for subnet in self._at.planner.site(region)[1]}
        kinds = self._at.planner.kinds(region)
        placed = self._at.job.placement == CLUSTER
        return Network(
            self._networks.security_group(region, subnets[pools[0].subnet].vpc),
            self._networks.placement_group(region, pools[0].zone) if placed else None,
            {
                (pool.instance_type, pool.subnet): efa_interfaces(kinds[pool.instance_type], subnets[pool.subnet])
                for pool in pools
            },
        )

    def remove_networks(self, regions: Sequence[str]) -> list[str]:
        """Remove the groups of several machines. Return those that machines still use."""
        return self._networks.remove(regions) if self._at.job.size.is_fleet else []

    def _wheel_in_store(self) -> Wheel | None:
        """Return what this process runs, where the machine will look for it. Raises StoreError.

        Machines that train together install the same: while some run, theirs counts, even if this process is a newer hf_spot.
        """
        wheel = wheel_for(self._at.job.store, os.environ)
        theirs = [one.wheel for one in self._at.records.ledger.live() if one.wheel] if self._at.job.size.is_fleet else []
        if wheel is not None and theirs and theirs[0] != str(wheel):
            self._at.say(f"the other machines run {theirs[0]}: new ones get the same", {"event": "note", "wheel": theirs[0]})
            return Wheel.of(theirs[0])
        if wheel is not None and not self._is_in_store:
            put(self._at.records.run.store, wheel)
            self._is_in_store = True
        return wheel

    def _send(self, order: Order) -> Outcome:
        if order.pools[0].market != SPOT or self._api == FLEET:
            return orders.create_fleet(self._at.cloud, order)
        if self._api == SPOT_REQUEST:
            return orders.request_spot_instances(self._at.cloud, order, sleep=self._sleep)
        # A spot fleet always uses capacity-optimized.
        return orders.request_spot_fleet(self._at.cloud, replace(order, strategy="capacity-optimized"), sleep=self._sleep)


def _rest(wanted: Wanted, found: Sequence[Machine], *, whole: bool) -> Wanted:
    """Return what is still wanted after some machines were found: in their region, and in their zone if all must be in one."""
    if not found:
        return wanted if whole or not wanted.needed else replace(wanted, at_least=1)
    return replace(
        wanted,
        count=wanted.count - len(found),
        needed=max(0, wanted.needed - len(found)),
        at_least=1,
        region=found[0].region,
        zone=found[0].zone if wanted.one_zone else "",
        running_usd=wanted.running_usd + sum(one.usd_per_hour or 0.0 for one in found),
    )


def _nothing(refused: Sequence[str], expensive: Sequence[str]) -> CloudError:
    details = "".join(f"\n  {line}" for line in [*refused, *expensive])
    if expensive and not refused:
        return CloudError(
            f"the rest of max_spend does not cover any machine:{details}", hint="raise max_spend", code=OVER_BUDGET
        )
    return NoCapacity(
        f"no capacity available on any rung of the ladder:{details}",
        hint="try again later, use --watch, or add instance types or `regions: any` to the ladder",
    )
