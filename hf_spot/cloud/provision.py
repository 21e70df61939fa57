"""Provisioning: walk the ladder of a job file to get a machine, and with ``--watch`` repeat until the run is finished.

This process may die at any moment and be restarted elsewhere. All state is in the run's journal and in the instances' tags
(`hf_spot.cloud.machine_records`); what is cached here can be queried again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from hf_spot.cloud import ec2, orders
from hf_spot.cloud.ec2 import Cloud, Instance
from hf_spot.cloud.ec2_errors import NEXT_RUNG, explain
from hf_spot.cloud.job import SHUTDOWN, SPOT, Job
from hf_spot.cloud.ladder import Pool, minutes_affordable, pause_s, untried
from hf_spot.cloud.ledger import FRUITLESS_MACHINES, Machine
from hf_spot.cloud.machine import LOGS
from hf_spot.cloud.machine_records import MachineRecords
from hf_spot.cloud.orders import Order, Outcome
from hf_spot.cloud.plans import Plan, Planner
from hf_spot.cloud.user_data import render
from hf_spot.cloud.wheel import Wheel, put, wheel_for
from hf_spot.errors import CloudError, ConfigError, NoCapacity, StoreUnavailable
from hf_spot.run.run import Run
from hf_spot.run.seal import VARIABLE as JOURNAL_KEY

FLEET, SPOT_REQUEST, SPOT_FLEET = "fleet", "spot-request", "spot-fleet"
APIS = (FLEET, SPOT_REQUEST, SPOT_FLEET)
POLL_S = 30.0
_TURN_S = 5.0  # between checks whether another process has got a machine
_LAST_MINUTES_S = 180.0  # reserved in the budget: a machine still costs this long after the order to terminate
_SHUTDOWN_POLLS = 20
_OVER_BUDGET = "MaxSpend"

Say = Callable[[str, dict[str, Any]], None]


class Provisioner:
    """Gets machines for one job.

    Args:
        job: the job.
        run: its run.
        cloud: the account's EC2.
        api: one of `APIS`.
        now: the wall clock.
        sleep: waits for some seconds.
        say: reports progress; takes a sentence, and the same as JSON values.
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
        self._is_in_store = False
        self.records = MachineRecords(run, cloud, now=now)
        self.planner = Planner(job, cloud, self.records, now=now)

    # -- before anything costs money ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Check everything that can be checked for free: credentials, regions, images, networks, keys, quotas, deadline.

        Raises:
            SpotError: the job or the account has a problem; nothing was started.
        """
        job = self._job
        self.planner.check_regions()
        if job.deadline is not None and job.deadline <= self._now():
            raise ConfigError(
                f"deadline: {job.deadline:%Y-%m-%d %H:%M} UTC is in the past", hint="set a later deadline, or remove it"
            )
        self.planner.check_sites()
        render(job, [], 1, wheel=wheel_for(job.store, os.environ))
        if os.environ.get(JOURNAL_KEY) and JOURNAL_KEY not in job.run:
            raise ConfigError(
                f"${JOURNAL_KEY} is set here but not on the machines: they could not read the journal",
                hint=f"add to run: export {JOURNAL_KEY}=$(aws ssm get-parameter --with-decryption --name NAME "
                "--query Parameter.Value --output text)",
            )
        try:
            self.planner.read_quotas()
        except CloudError as error:
            self._say(f"the quotas can't be read: {error.args[0]}", {"event": "note"})
        self.planner.check_quotas()

    # -- one machine --------------------------------------------------------------------------------------------------

    def provision(self) -> Machine | None:
        """Return the run's machine, a running or a new one; None if the run is finished.

        Raises:
            NoCapacity: no rung has capacity at the moment.
            CloudError: the remaining budget or time is too small, or the cloud refused.
        """
        self.check()
        return self._provision(fresh=True)

    def _provision(self, *, fresh: bool) -> Machine | None:
        while True:
            self.records.refresh()
            if self._api == SPOT_REQUEST:
                self._cloud.each(self.planner.regions, lambda region: self._cloud.tag_requested(region, self.records.run.url))
            alive = self.records.reconcile(self.records.find_instances(self.planner.regions), self.planner.regions)
            if alive:
                machine = next(one for one in self.records.ledger.machines if one.instance_id == alive[-1].id)
                self._say_machine("found", machine)
                return machine
            if self.records.state.ended == "finished":
                return None
            self._check_money_and_time()
            token = self.records.start_walk(fresh=fresh)
            if token is not None:
                break
            self._sleep(_TURN_S)
        try:
            return self._walk(token)
        except BaseException:
            if self.records.ledger.walk is not None:
                self.records.record("refused")
            raise

    def _walk(self, token: str) -> Machine:
        self.planner.forget_sites()  # images and networks may have changed since
        refused: list[str] = []
        expensive: list[str] = []
        for plan in self.planner.plans():
            found = None
            expensive += plan.over_budget
            refused += [f"rung {plan.index}: {note}" for note in plan.notes]
            for pools in plan.regions:
                found = self._try(plan, pools, token, refused)
                if found is not None:
                    machine = self.records.started(*found, plan.index)
                    self._say_machine("started", machine)
                    return machine
        details = "".join(f"\n  {line}" for line in [*refused, *expensive])
        if expensive and not refused:
            raise CloudError(
                f"the rest of max_spend does not cover any machine:{details}", hint="raise max_spend", code=_OVER_BUDGET
            )
        raise NoCapacity(
            f"no capacity available on any rung of the ladder:{details}",
            hint="try again later, use --watch, or add instance types or `regions: any` to the ladder",
        )

    def _try(self, plan: Plan, pools: list[Pool], token: str, refused: list[str]) -> tuple[str, Pool] | None:
        """Try one region's pools. Return the instance and its pool, or None, with the reasons added to ``refused``."""
        attempt = 0
        while pools:
            order = self._order(plan, pools, ec2.token_for(token, plan.index, pools[0].region, attempt))
            self._say(
                f"rung {plan.index}: requesting {', '.join(map(str, pools))}",
                {"event": "asking", "rung": plan.index, "region": order.region, "pools": len(pools)},
            )
            try:
                outcome = self._send(order)
            except CloudError as error:
                if error.code not in NEXT_RUNG and not ec2.is_temporary(error):
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
            pools, attempt = left, attempt + 1
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
                "on_demand_usd_per_hour": self.records.on_demand_usd(pool.instance_type, region),
            }
            for pool in pools
            if pool.price is not None
        ]
        return Order(
            token=token,
            pools=pools,
            image=self.planner.site(region)[0],
            site=job.site(region),
            user_data=render(job, prices, minutes_affordable(pools, self.planner.left_usd()), wheel=self._wheel_in_store()),
            tags={
                **job.tags,
                "Name": f"hf-spot {job.name}",
                ec2.RUN_TAG: ec2.tag_value(self.records.run.url),
                ec2.RUNG_TAG: str(plan.index),
            },
            instance_profile=job.instance_profile,
            disk_gb=job.disk_gb,
            strategy=job.strategy,
            max_price=plan.rung.max_price,
        )

    def _wheel_in_store(self) -> Wheel | None:
        """What this process runs, where the machine will look for it. Raises StoreError."""
        wheel = wheel_for(self._job.store, os.environ)
        if wheel is not None and not self._is_in_store:
            put(self.records.run.store, wheel)
            self._is_in_store = True
        return wheel

    def _send(self, order: Order) -> Outcome:
        if order.pools[0].market != SPOT or self._api == FLEET:
            return orders.create_fleet(self._cloud, order)
        if self._api == SPOT_REQUEST:
            return orders.request_spot_instances(self._cloud, order, sleep=self._sleep)
        # A spot fleet always uses capacity-optimized.
        return orders.request_spot_fleet(self._cloud, replace(order, strategy="capacity-optimized"), sleep=self._sleep)

    # -- watching ----------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Replace machines until the run is finished, or stopped by `hf-spot terminate`.

        Raises:
            CloudError: the budget is spent, the deadline can't be met, or the training itself fails.
        """
        self.check()
        begun, fruitless_walks = False, 0
        while True:
            try:
                pause = POLL_S
                if self._update() is None:
                    if self._is_over(begun):
                        return
                    machine = self._provision(fresh=not begun)
                    begun, fruitless_walks = True, 0
                    if machine is None:
                        continue
                else:
                    begun = True
                    if self._is_over(begun):
                        return
                    self._check_money_and_time()
            except NoCapacity as error:
                begun, fruitless_walks = True, fruitless_walks + 1
                pause = pause_s(fruitless_walks)
                self._say(f"{error.args[0]}\n  next try in {pause:.0f} s", {"event": "no-capacity", "pause_s": pause})
            except (StoreUnavailable, CloudError) as error:
                if isinstance(error, CloudError) and not ec2.is_temporary(error):
                    raise
                self._say(f"{error.args[0]}; trying again", {"event": "trouble", "error": str(error.args[0])})
            self._sleep(pause)

    def _update(self) -> Instance | None:
        """Return the live machine, if any, and record machines that have ended."""
        ledger = self.records.refresh()
        regions = sorted({machine.region for machine in ledger.live()})
        before = {machine.instance_id for machine in ledger.live()}
        alive = self.records.reconcile(self.records.find_instances(regions), regions) if regions else []
        for machine in self.records.ledger.machines:
            if machine.instance_id in before and machine.ended is not None:
                self._say_machine("ended", machine)
        return alive[-1] if alive else None

    def _is_over(self, begun: bool) -> bool:
        ledger, run = self.records.ledger, self.records.run
        if self.records.state.ended == "finished":
            self._say(f"{run.url} is finished at step {ledger.step}", {"event": "finished", "step": ledger.step})
            self._finish()
            return True
        if not begun or ledger.live():
            return False
        if ledger.stopped:
            self._say("stopped by `hf-spot terminate`", {"event": "stopped"})
            return True
        logs = f"the log is {run.url}/{LOGS}{ledger.machines[-1].instance_id}.log" if ledger.machines else ""
        if ledger.failed:
            raise CloudError(f"the training of {run.url} failed; another machine would not help; {logs}", hint="fix the job")
        if ledger.fruitless >= FRUITLESS_MACHINES:
            raise CloudError(
                f"{ledger.fruitless} machines in a row shut down by themselves without a commit; {logs}",
                hint="fix setup or run in the job file",
            )
        return False

    def _check_money_and_time(self) -> None:
        """Raise CloudError when budget or deadline is exhausted, after terminating all machines."""
        job, now, ledger = self._job, self._now(), self.records.ledger
        spent = self.records.spent_usd()
        per_hour = sum(machine.usd_per_hour or 0.0 for machine in ledger.live())
        if spent + per_hour * _LAST_MINUTES_S / 3600 >= job.max_spend:
            self._end_all()
            raise CloudError(
                f"the budget of ${job.max_spend:.2f} is spent: ${self.records.spent_usd():.2f}, step {ledger.step} committed",
                hint="raise max_spend, and run the same command again",
                code=_OVER_BUDGET,
            )
        if job.deadline is None:
            return
        hours = ledger.hours_left(job.hours) or 0.0
        late = now + timedelta(hours=hours) > job.deadline and not ledger.live()
        if late or now >= job.deadline:
            self._end_all()
            raise CloudError(
                f"the deadline {job.deadline:%Y-%m-%d %H:%M} UTC can't be met: about {hours:.1f} h of training remain, "
                f"step {ledger.step} is committed",
                hint="set a later deadline, and run the same command again",
                code="Deadline",
            )

    def _end_all(self) -> None:
        """Terminate the live machines, and wait until they are gone: their trainings save first."""
        for machine in self.records.ledger.live():
            self._cloud.terminate(machine.region, [machine.instance_id])
        for _ in range(_SHUTDOWN_POLLS):
            if self._update() is None:
                return
            self._sleep(POLL_S)

    def _finish(self) -> None:
        """Wait until a finished machine has shipped its log and shut down; terminate one that does not."""
        if self._job.on_finish != SHUTDOWN:
            for machine in self.records.ledger.live():
                price = "" if machine.usd_per_hour is None else f", for ${machine.usd_per_hour:.2f}/h"
                self._say(
                    f"{machine.instance_id} stays (on_finish: stay){price}; end it: hf-spot terminate {self.records.run.url}",
                    {"event": "stays"},
                )
            return
        for _ in range(_SHUTDOWN_POLLS):
            if self._update() is None:
                break
            self._sleep(POLL_S)
        else:
            self._end_all()
        spent = self.records.spent_usd()
        self._say(f"total cost of all machines: ${spent:.2f}", {"event": "spent", "usd": round(spent, 6)})

    def _say_machine(self, event: str, machine: Machine) -> None:
        usd = "price unknown" if machine.usd_per_hour is None else f"${machine.usd_per_hour:.4f}/h"
        since = f", {machine.price_time:%Y-%m-%d %H:%M} UTC" if machine.price_time else ""
        price = f"{usd} ({machine.price_source}{since})" if machine.price_source else usd
        text = f"{machine.instance_id}: {machine.instance_type} {machine.market} in {machine.zone}"
        if event == "ended":
            text = f"{text} ended: {machine.reason or 'no reason given'}, ${machine.cost_usd or 0.0:.2f}"
        else:
            text = f"{text}, {price}, rung {machine.rung}{', already running' if event == 'found' else ''}"
        self._say(text, {"event": event, "machine": machine.to_data()})
