"""From a job file to a machine that trains it: walks the ladder, and with ``--watch`` again until the run is finished.

Whoever does this may die at any moment and start again elsewhere. What has to be known stands in the run's journal and in
the instances' tags (`hf_spot.cloud.machine_records`); nothing is remembered here but what can be asked again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from hf_spot.cloud import ec2, orders, quotas
from hf_spot.cloud.ec2 import Cloud, Image, Instance, Subnet
from hf_spot.cloud.ec2_errors import NEXT_RUNG, explain
from hf_spot.cloud.job import ANY, SHUTDOWN, SPOT, Job, Rung
from hf_spot.cloud.ladder import Pool, Price, in_order, minutes_affordable, pause_s, too_dear, untried
from hf_spot.cloud.ledger import FRUITLESS_MACHINES, Machine
from hf_spot.cloud.machine import LOGS
from hf_spot.cloud.machine_records import MachineRecords
from hf_spot.cloud.orders import Order, Outcome
from hf_spot.cloud.user_data import render
from hf_spot.errors import CloudError, ConfigError, NoCapacity, SpotError, StoreUnavailable
from hf_spot.run.run import Run
from hf_spot.run.seal import VARIABLE as JOURNAL_KEY

FLEET, SPOT_REQUEST, SPOT_FLEET = "fleet", "spot-request", "spot-fleet"
APIS = (FLEET, SPOT_REQUEST, SPOT_FLEET)
POLL_S = 30.0
_TURN_S = 5.0  # how often to ask whether another process has got a machine
_LAST_MINUTES_S = 180.0  # of the budget: what a machine costs from the order to end until its end
_FAREWELL_POLLS = 20
_TOO_DEAR = "MaxSpend"

Say = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Plan:
    """What a rung offers now.

    Args:
        index: its place in the ladder, from 0.
        rung: as in the job file.
        regions: affordable pools by region, in the order in which they are tried.
        notes: why others are left out.
        dear: what would be there for more money.
    """

    index: int
    rung: Rung
    regions: list[list[Pool]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dear: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        pools = [{**asdict(pool), "price": _plain(pool.price)} for region in self.regions for pool in region]
        return {"rung": self.index, "market": self.rung.market, "pools": pools, "notes": self.notes, "too_dear": self.dear}


class Provisioner:
    """Gets machines for one job.

    Args:
        job: what is trained.
        run: where it is trained.
        cloud: that is asked.
        api: one of `APIS`.
        now: the wall clock.
        sleep: waits for some seconds.
        say: is told what happens: a sentence, and the same as JSON values.
    """

    def __init__(
        self,
        job: Job,
        run: Run,
        cloud: Cloud,
        *,
        api: str = FLEET,
        now: Callable[[], datetime],
        sleep: Callable[[float], object],
        say: Say,
    ) -> None:
        self._job = job
        self._cloud = cloud
        self._api = api
        self._now = now
        self._sleep = sleep
        self._say = say
        self._known: list[str] = []
        self._needs: list[quotas.Need] = []
        self._sites: dict[str, tuple[Image, list[Subnet]]] = {}
        self.book = MachineRecords(run, cloud, now=now)

    # -- before anything costs money ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Proves what can be proved for nothing: credentials, regions, images, networks, keys, quotas, deadline.

        Raises:
            SpotError: something is wrong with the job or the account; nothing was started.
        """
        job = self._job
        self._known = self._cloud.regions(job.region)
        self._cloud.check_regions(job.named_regions(), self._known)
        if job.deadline is not None and job.deadline <= self._now():
            raise ConfigError(f"deadline: {job.deadline:%Y-%m-%d %H:%M} UTC is past", hint="a later deadline, or none")
        tried = {region for rung in job.ladder if rung.regions != ANY for region in job.regions_of(rung, self._known)}
        for region in sorted(tried):
            self._site(region)
        render(job, [], 1)
        if os.environ.get(JOURNAL_KEY) and JOURNAL_KEY not in job.run:
            raise ConfigError(
                f"${JOURNAL_KEY} is set here, and the machines would not have it: they could not read the journal",
                hint=f"in run: export {JOURNAL_KEY}=$(aws ssm get-parameter --with-decryption --name NAME "
                "--query Parameter.Value --output text)",
            )
        try:
            self._needs = quotas.needs(self._cloud, job, self._known)
        except CloudError as error:
            self._say(f"quotas are not known: {error.args[0]}", {"event": "note"})
        if none := quotas.none_usable(self._needs, job):
            raise none

    def _site(self, region: str) -> tuple[Image, list[Subnet]]:
        """Image and subnets in a region, once everything that the job names there has been found."""
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

    # -- what there is to choose from ---------------------------------------------------------------------------------

    def plans(self) -> Iterator[Plan]:
        """What each rung offers now, in the ladder's order; a rung is asked about when its turn has come."""
        for index in range(len(self._job.ladder)):
            yield self._plan(index)

    def _plan(self, index: int) -> Plan:
        rung = self._job.ladder[index]
        regions = self._job.regions_of(rung, self._known)
        plan = Plan(index, rung)
        blocked = quotas.blocked(self._needs, index)
        services = "ec2", "ssm", "pricing"
        told = self._cloud.each(regions, lambda region: self._pools(rung, region, blocked), services=services)
        pools = [pool for offered, _ in told for pool in offered]
        plan.notes.extend(note for _, notes in told for note in notes)
        if rung.market == SPOT and pools:
            try:
                scores = self._cloud.scores(rung.instance_types, sorted({pool.region for pool in pools}))
                pools = [replace(pool, score=scores.get(pool.region)) for pool in pools]
            except CloudError as error:
                plan.notes.append(f"no placement scores: {error.args[0]}")
        left = self.left_usd()
        hours = self.book.ledger.hours_left(self._job.hours)
        for found in in_order(pools, rung, regions):
            plan.dear.extend(said for pool in found if (said := too_dear(pool, left, hours)))
            if affordable := [pool for pool in found if not too_dear(pool, left, hours)]:
                plan.regions.append(affordable)
        if not pools and not plan.notes:
            plan.notes.append(f"{', '.join(rung.instance_types)}: no price, and so no capacity, in {', '.join(regions)}")
        elif pools and not plan.regions and not plan.dear:
            plan.notes.append(f"every price is above max_price ${rung.max_price}, or not known")
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
            subnets = self._site(region)[1]
        except SpotError as error:
            if rung.regions != ANY and not (isinstance(error, CloudError) and ec2.is_passing(error)):
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
        """Of the budget."""
        return self._job.max_spend - self.book.spent_usd()

    # -- one machine --------------------------------------------------------------------------------------------------

    def provision(self) -> Machine | None:
        """The run's machine: the one that runs, or a new one; None when the run is finished.

        Raises:
            NoCapacity: no rung has a machine now.
            CloudError: the money or the time that is left does not do, or the cloud said no.
        """
        self.check()
        return self._provision(fresh=True)

    def _provision(self, *, fresh: bool) -> Machine | None:
        while True:
            self.book.refresh()
            if self._api == SPOT_REQUEST:
                self._cloud.each(self._known, lambda region: self._cloud.tag_requested(region, self.book.run.url))
            alive = self.book.settle(self.book.look(self._known), self._known)
            if alive:
                machine = next(one for one in self.book.ledger.machines if one.instance_id == alive[-1].id)
                self._tell("found", machine)
                return machine
            if self.book.state.ended == "finished":
                return None
            self._check_money_and_time()
            token = self.book.ask(fresh=fresh)
            if token is not None:
                break
            self._sleep(_TURN_S)
        try:
            return self._walk(token)
        except BaseException:
            if self.book.ledger.walk is not None:
                self.book.record("refused")
            raise

    def _walk(self, token: str) -> Machine:
        self._sites.clear()  # images and networks may have changed since
        refused: list[str] = []
        dear: list[str] = []
        for plan in self.plans():
            found = None
            dear += plan.dear
            refused += [f"rung {plan.index}: {note}" for note in plan.notes]
            for pools in plan.regions:
                found = self._try(plan, pools, token, refused)
                if found is not None:
                    machine = self.book.started(*found, plan.index)
                    self._tell("started", machine)
                    return machine
        said = "".join(f"\n  {line}" for line in [*refused, *dear])
        if dear and not refused:
            raise CloudError(
                f"what is left of max_spend does not pay for any machine:{said}", hint="a higher max_spend", code=_TOO_DEAR
            )
        raise NoCapacity(f"no rung of the ladder has a machine now:{said}", hint="--watch, other types, or any region")

    def _try(self, plan: Plan, pools: list[Pool], token: str, refused: list[str]) -> tuple[str, Pool] | None:
        """One region's pools: the instance and its pool, or None, and why."""
        asked = 0
        while pools:
            order = self._order(plan, pools, ec2.token_for(token, plan.index, pools[0].region, asked))
            self._say(
                f"rung {plan.index}: asking for {', '.join(map(str, pools))}",
                {"event": "asking", "rung": plan.index, "region": order.region, "pools": len(pools)},
            )
            try:
                outcome = self._send(order)
            except CloudError as error:
                if error.code not in NEXT_RUNG and not ec2.is_passing(error):
                    raise
                refused.append(f"rung {plan.index}: {error.args[0]}")
                return None
            if outcome.instance_id is not None and outcome.pool is not None:
                return outcome.instance_id, outcome.pool
            for (kind, subnet), (code, message) in outcome.refusals.items():
                if code not in NEXT_RUNG:
                    raise explain(code, message, doing=f"{kind} in {subnet}")
            codes = {pool: code for pool, (code, _) in outcome.refusals.items()}
            for pool in pools:
                code = codes.get((pool.instance_type, pool.subnet), "UnfulfillableCapacity")
                self._say(f"{pool}: {code}", {"event": "refused", "rung": plan.index, "zone": pool.zone, "code": code})
                if code != "UnfulfillableCapacity":
                    refused.append(f"rung {plan.index}: {explain(code, doing=str(pool)).args[0]}")
            left = untried(pools, codes)
            if not left:
                rest = [pool for pool in pools if codes.get((pool.instance_type, pool.subnet), "UnfulfillableCapacity")]
                refused += [f"rung {plan.index}: no capacity for {pool}" for pool in rest if len(rest) == len(pools)]
            pools, asked = left, asked + 1
        return None

    def _order(self, plan: Plan, pools: Sequence[Pool], token: str) -> Order:
        job, region = self._job, pools[0].region
        prices = [
            {
                "instance_type": pool.instance_type,
                "zone": pool.zone,
                "region": pool.region,
                "market": pool.market,
                "price_usd_per_hour": pool.price.usd_per_hour,
                "price_source": pool.price.source,
                "price_time": pool.price.time.isoformat(),
                "on_demand_usd_per_hour": self.book.full_price(pool.instance_type, region),
            }
            for pool in pools
            if pool.price is not None
        ]
        return Order(
            token=token,
            pools=pools,
            image=self._site(region)[0],
            site=job.site(region),
            user_data=render(job, prices, minutes_affordable(pools, self.left_usd())),
            tags={
                **job.tags,
                "Name": f"hf-spot {job.name}",
                ec2.RUN_TAG: ec2.tag_value(self.book.run.url),
                ec2.RUNG_TAG: str(plan.index),
            },
            instance_profile=job.instance_profile,
            disk_gb=job.disk_gb,
            strategy=job.strategy,
            max_price=plan.rung.max_price,
        )

    def _send(self, order: Order) -> Outcome:
        if order.pools[0].market != SPOT or self._api == FLEET:
            return orders.create_fleet(self._cloud, order)
        if self._api == SPOT_REQUEST:
            return orders.request_spot_instances(self._cloud, order, sleep=self._sleep)
        # Here the strategy is the one that the API is used for.
        return orders.request_spot_fleet(self._cloud, replace(order, strategy="capacity-optimized"), sleep=self._sleep)

    # -- until it is finished -----------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Replaces machines until the run is finished, or somebody ends it by `hf-spot terminate`.

        Raises:
            CloudError: the budget is spent, the deadline can't be met, or the training fails by itself.
        """
        self.check()
        begun, empty_handed = False, 0
        while True:
            try:
                pause = POLL_S
                if self._look() is None:
                    if self._is_over(begun):
                        return
                    machine = self._provision(fresh=not begun)
                    begun, empty_handed = True, 0
                    if machine is None:
                        continue
                else:
                    begun = True
                    if self._is_over(begun):
                        return
                    self._check_money_and_time()
            except NoCapacity as error:
                begun, empty_handed = True, empty_handed + 1
                pause = pause_s(empty_handed)
                self._say(f"{error.args[0]}\n  next try in {pause:.0f} s", {"event": "no-capacity", "pause_s": pause})
            except (StoreUnavailable, CloudError) as error:
                if isinstance(error, CloudError) and not ec2.is_passing(error):
                    raise
                self._say(f"{error.args[0]}; trying again", {"event": "trouble", "error": str(error.args[0])})
            self._sleep(pause)

    def _look(self) -> Instance | None:
        """The machine that lives; writes down those that do not any more."""
        ledger = self.book.refresh()
        regions = sorted({machine.region for machine in ledger.live()})
        before = {machine.instance_id for machine in ledger.live()}
        alive = self.book.settle(self.book.look(regions), regions) if regions else []
        for machine in self.book.ledger.machines:
            if machine.instance_id in before and machine.ended is not None:
                self._tell("ended", machine)
        return alive[-1] if alive else None

    def _is_over(self, begun: bool) -> bool:
        ledger, run = self.book.ledger, self.book.run
        if self.book.state.ended == "finished":
            self._say(f"{run.url} is finished at step {ledger.step}", {"event": "finished", "step": ledger.step})
            self._say_farewell()
            return True
        if not begun or ledger.live():
            return False
        if ledger.stopped:
            self._say("ended by `hf-spot terminate`", {"event": "stopped"})
            return True
        logs = f"the log is {run.url}/{LOGS}{ledger.machines[-1].instance_id}.log" if ledger.machines else ""
        if ledger.failed:
            raise CloudError(f"the training of {run.url} failed; another machine would not help; {logs}", hint="repair the job")
        if ledger.fruitless >= FRUITLESS_MACHINES:
            raise CloudError(
                f"{ledger.fruitless} machines in a row went away by themselves without a commit; {logs}",
                hint="repair setup or run",
            )
        return False

    def _check_money_and_time(self) -> None:
        """Raises CloudError when one of them is at its end; no machine is left then."""
        job, now, ledger = self._job, self._now(), self.book.ledger
        spent = self.book.spent_usd()
        per_hour = sum(machine.usd_per_hour or 0.0 for machine in ledger.live())
        if spent + per_hour * _LAST_MINUTES_S / 3600 >= job.max_spend:
            self._end_all()
            raise CloudError(
                f"the budget of ${job.max_spend:.2f} is spent: ${self.book.spent_usd():.2f}, step {ledger.step} is committed",
                hint="a higher max_spend, and the same command again",
                code=_TOO_DEAR,
            )
        if job.deadline is None:
            return
        hours = ledger.hours_left(job.hours) or 0.0
        late = now + timedelta(hours=hours) > job.deadline and not ledger.live()
        if late or now >= job.deadline:
            self._end_all()
            raise CloudError(
                f"the deadline {job.deadline:%Y-%m-%d %H:%M} UTC can't be met: about {hours:.1f} h of training are left, "
                f"step {ledger.step} is committed",
                hint="a later deadline, and the same command again",
                code="Deadline",
            )

    def _end_all(self) -> None:
        """Ends what lives, and waits until it is gone: it saves first."""
        for machine in self.book.ledger.live():
            self._cloud.terminate(machine.region, [machine.instance_id])
        for _ in range(_FAREWELL_POLLS):
            if self._look() is None:
                return
            self._sleep(POLL_S)

    def _say_farewell(self) -> None:
        """A finished machine ships its log and goes by itself; one that doesn't is ended."""
        if self._job.on_finish != SHUTDOWN:
            for machine in self.book.ledger.live():
                price = "" if machine.usd_per_hour is None else f", for ${machine.usd_per_hour:.2f}/h"
                self._say(
                    f"{machine.instance_id} stays, as asked{price}; hf-spot terminate {self.book.run.url}", {"event": "stays"}
                )
            return
        for _ in range(_FAREWELL_POLLS):
            if self._look() is None:
                break
            self._sleep(POLL_S)
        else:
            self._end_all()
        spent = self.book.spent_usd()
        self._say(f"all machines together: ${spent:.2f}", {"event": "spent", "usd": round(spent, 6)})

    def _tell(self, event: str, machine: Machine) -> None:
        usd = "price not known" if machine.usd_per_hour is None else f"${machine.usd_per_hour:.4f}/h"
        since = f", {machine.price_time:%Y-%m-%d %H:%M} UTC" if machine.price_time else ""
        price = f"{usd} ({machine.price_source}{since})" if machine.price_source else usd
        text = f"{machine.instance_id}: {machine.instance_type} {machine.market} in {machine.zone}"
        if event == "ended":
            text = f"{text} ended: {machine.reason or 'no reason given'}, ${machine.cost_usd or 0.0:.2f}"
        else:
            text = f"{text}, {price}, rung {machine.rung}{', runs already' if event == 'found' else ''}"
        self._say(text, {"event": event, "machine": machine.to_data()})


def _plain(price: Price | None) -> dict[str, Any] | None:
    return None if price is None else {**asdict(price), "time": price.time.isoformat()}


def render_plan(plan: Plan) -> str:
    """What a rung offers, one pool a line."""
    rung = plan.rung
    where = rung.regions if isinstance(rung.regions, str) else ", ".join(rung.regions)
    lines = [f"rung {plan.index}: {rung.market} {', '.join(rung.instance_types)}, regions: {where}"]
    for pool in (pool for region in plan.regions for pool in region):
        assert pool.price is not None
        score = "" if pool.score is None else f", placement score {pool.score} of 10"
        price = f"${pool.price.usd_per_hour:.4f}/h ({pool.price.source}, {pool.price.time:%Y-%m-%d %H:%M} UTC)"
        lines.append(f"{pool.instance_type} in {pool.zone}: {price}{score}")
    return "\n    ".join([*lines, *plan.dear, *plan.notes])
