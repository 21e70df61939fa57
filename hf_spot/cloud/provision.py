"""Provisioning: walk the ladder of a job file to get machines, and with ``--watch`` repeat until the run is finished.

This process may die at any moment and be restarted elsewhere. All state is in the run's journal and in the instances' tags
(`hf_spot.cloud.machine_records`); what is cached here can be queried again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta

from hf_spot.cloud import ec2
from hf_spot.cloud.ec2 import Cloud, Instance
from hf_spot.cloud.ec2_errors import OF_CREDENTIALS
from hf_spot.cloud.ending import in_words
from hf_spot.cloud.fleet import Fleet
from hf_spot.cloud.fleet_size import REGION
from hf_spot.cloud.job import SHUTDOWN, Job
from hf_spot.cloud.ladder import pause_s
from hf_spot.cloud.ledger import FRUITLESS_MACHINES, Machine
from hf_spot.cloud.machine import LOGS
from hf_spot.cloud.machine_records import MachineRecords
from hf_spot.cloud.plans import Planner
from hf_spot.cloud.user_data import render
from hf_spot.cloud.walk import FLEET, OVER_BUDGET, SPOT_FLEET, SPOT_REQUEST, Say, Setting, Walker
from hf_spot.cloud.wheel import wheel_for
from hf_spot.errors import CloudError, ConfigError, NoAnswer, NoCapacity, SpotError, StoreUnavailable
from hf_spot.run.first_contact import FirstContact, is_unavailable, patiently
from hf_spot.run.run import Run
from hf_spot.run.seal import VARIABLE as JOURNAL_KEY

APIS = (FLEET, SPOT_REQUEST, SPOT_FLEET)
POLL_S = 30.0
_TURN_S = 5.0  # between checks whether another process has got a machine
_LAST_MINUTES_S = 180.0  # reserved in the budget: a machine still costs this long after the order to terminate
_SHUTDOWN_POLLS = 20


def _may_work_later(error: SpotError) -> bool:
    if isinstance(error, CloudError):
        return ec2.is_temporary(error) and error.code not in OF_CREDENTIALS
    return is_unavailable(error)


@contextlib.contextmanager
def _trouble_explained() -> Iterator[None]:
    """Raise NoAnswer, whose exit code lets a scheduler start the command again, if the same request may work later."""
    try:
        yield
    except SpotError as error:
        if not _may_work_later(error):
            raise
        raise NoAnswer(error.args[0], hint=error.hint or "start the same command again later") from error


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
        in_zones = job.size.is_fleet and job.placement == REGION
        self.records = MachineRecords(run, cloud, now=now, disk_gb=job.disk_gb, counts_network=in_zones)
        self.planner = Planner(job, cloud, self.records, now=now)
        setting = Setting(job, cloud, self.records, self.planner, say)
        self._walker = Walker(setting, api=api, sleep=sleep, tell=self._say_machine)
        self.fleet = Fleet(setting, self._walker, now=now)

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
        self.planner.check_fleet()
        if job.size.is_fleet and self._api != FLEET:
            raise ConfigError(
                f"machines: {job.size}: --api {self._api} orders one machine at a time", hint=f"omit --api, or --api {FLEET}"
            )
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

    def _check_patiently(self) -> None:
        """Check, again and again while the store or EC2 does not answer. Raises NoAnswer once that has lasted too long."""
        contact = FirstContact(_may_work_later, clock=lambda: self._now().timestamp())
        patiently(self.check, contact, self._sleep)

    # -- one machine --------------------------------------------------------------------------------------------------

    def provision(self) -> Machine | None:
        """Return the run's machine, a running or a new one; None if the run is finished.

        Raises:
            NoCapacity: no rung has capacity at the moment.
            NoAnswer: the store or EC2 does not answer.
            CloudError: the remaining budget or time is too small, or the cloud refused.
        """
        self._check_patiently()
        with _trouble_explained():
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
        return self._walker.one(token)

    # -- several machines ---------------------------------------------------------------------------------------------

    def provision_several(self) -> list[Machine]:
        """Return the machines of a run for which several train, running and new ones; none if the run is finished.

        Raises:
            NoCapacity: fewer than the job needs are to be had at the moment; those that were started are ended.
            CloudError: the remaining budget or time is too small, or the cloud refused.
        """
        self._check_patiently()
        with _trouble_explained():
            return self._provision_several()

    def _provision_several(self) -> list[Machine]:
        self.records.refresh()
        before = {machine.instance_id for machine in self.records.ledger.live()}
        self._fill(fresh=True)
        live = self.records.ledger.live()
        if self.records.state.ended == "finished":
            return []
        if len(live) < self._job.size.least:
            why = self.records.ledger.why_missing
            new = [machine for machine in live if machine.instance_id not in before]
            self.fleet.end(new, f"{len(live)} of at least {self._job.size.least} machines are of no use")
            raise NoCapacity(
                f"{len(live)} of at least {self._job.size.least} machines could be had, and those that were new are ended"
                f"{f': {why}' if why else ''}",
                hint="try again later, use --watch, or add instance types or `regions: any` to the ladder",
            )
        return live

    def _fill(self, *, fresh: bool) -> bool:
        """Start the machines that are missing, or give back those that are too many. Return whether all are there now."""
        while True:
            self.records.refresh()
            alive = self.records.reconcile(self.records.find_instances(self.planner.regions), self.planner.regions)
            if self.records.state.ended == "finished":
                return True
            if fresh:
                ids = {one.id for one in alive}
                for machine in self.records.ledger.live():
                    if machine.instance_id in ids:
                        self._say_machine("found", machine)
            self._check_money_and_time()
            wanted = self.fleet.look(alive, fresh=fresh)
            if wanted is None:
                return True
            token = self.records.start_walk(fresh=fresh, machines=str(self._job.size))
            if token is not None:
                break
            self._sleep(_TURN_S)
        try:
            return not self.fleet.fill(token, wanted).why
        except BaseException as error:
            if self.records.ledger.walk is not None:
                self.records.record("refused", **({"why": str(error.args[0])} if isinstance(error, CloudError) else {}))
            raise

    def _keep_several(self, alive: Sequence[Instance], *, fresh: bool) -> None:
        """Take one look at the machines, and do what there is to do. Raises as `watch`."""
        if not fresh:
            if alive:
                self._check_money_and_time()
            if self.fleet.look(alive, fresh=False) is None or not self.fleet.is_time_to_walk():
                return
        why = ""
        try:
            got_all = self._fill(fresh=fresh)
        except CloudError as error:
            if not (isinstance(error, NoCapacity) or (error.code == OVER_BUDGET and self.records.ledger.live())):
                raise
            got_all, why = False, str(error.args[0])
        pause = self.fleet.walked(got_all=got_all)
        if not got_all:
            live = len(self.records.ledger.live())
            self._say(
                f"{live} of {self._job.size} machines: {why or self.records.ledger.why_missing}\n  next try in {pause:.0f} s",
                {"event": "no-capacity", "pause_s": pause, "machines": live},
            )

    # -- watching ----------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Replace machines until the run is finished, or stopped by `hf-spot terminate`.

        Raises:
            CloudError: the budget is spent, the deadline can't be met, or the training itself fails.
        """
        self._check_patiently()
        try:
            self._watch()
        except CloudError:
            self._remove_networks()
            raise
        self._remove_networks()

    def _watch(self) -> None:
        begun, fruitless_walks = False, 0
        while True:
            try:
                pause = POLL_S
                if self._job.size.is_fleet:
                    before = {machine.instance_id for machine in self.records.ledger.live()}
                    alive = self._look()
                    if self._is_over(begun):
                        return
                    self.fleet.lost(before - {machine.instance_id for machine in self.records.ledger.live()})
                    fresh, begun = not begun, True
                    self._keep_several(alive, fresh=fresh)
                elif self._update() is None:
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
        """Return a live machine, if any, and record machines that have ended."""
        alive = self._look()
        return alive[-1] if alive else None

    def _look(self) -> Sequence[Instance]:
        """Return the live machines, and record those that have ended."""
        ledger = self.records.refresh()
        regions = sorted({machine.region for machine in ledger.live()})
        before = {machine.instance_id for machine in ledger.live()}
        alive = self.records.reconcile(self.records.find_instances(regions), regions) if regions else []
        for machine in self.records.ledger.machines:
            if machine.instance_id in before and machine.ended is not None:
                self._say_machine("ended", machine)
        return alive

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
        per_hour = sum((machine.usd_per_hour or 0.0) + (machine.disk_usd_per_hour or 0.0) for machine in ledger.live())
        if spent + per_hour * _LAST_MINUTES_S / 3600 >= job.max_spend:
            self._end_all()
            raise CloudError(
                f"the budget of ${job.max_spend:.2f} is spent: ${self.records.spent_usd():.2f}, step {ledger.step} committed",
                hint="raise max_spend, and run the same command again",
                code=OVER_BUDGET,
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
        spent, bound = self.records.spent_usd(), self.records.cost_bound()
        self._say(
            f"total cost of all machines: {in_words(spent, bound)}", {"event": "spent", "usd": round(spent, 6), "bound": bound}
        )

    def _remove_networks(self) -> None:
        """Remove the groups of several machines, once the machines are gone."""
        regions = sorted({machine.region for machine in self.records.ledger.machines})
        if not self._job.size.is_fleet or self.records.ledger.live():
            return
        for _ in range(_SHUTDOWN_POLLS):
            left = self._walker.remove_networks(regions)
            if not left:
                return
            self._sleep(POLL_S)
        self._say(
            f"still in use by machines: {', '.join(left)}; remove them later: hf-spot terminate {self.records.run.url}",
            {"event": "left", "groups": left},
        )

    def _say_machine(self, event: str, machine: Machine) -> None:
        usd = "price unknown" if machine.usd_per_hour is None else f"${machine.usd_per_hour:.4f}/h"
        since = f", {machine.price_time:%Y-%m-%d %H:%M} UTC" if machine.price_time else ""
        price = f"{usd} ({machine.price_source}{since})" if machine.price_source else usd
        text = f"{machine.instance_id}: {machine.instance_type} {machine.market} in {machine.zone}"
        if event == "ended":
            disk = f" and ${machine.disk_usd:.2f} for its disk" if machine.disk_usd else ""
            cost = in_words(machine.cost_usd or 0.0, machine.cost_bound)
            text = f"{text} ended: {machine.reason or 'no reason given'}, {cost}{disk}"
        else:
            text = f"{text}, {price}, rung {machine.rung}{', already running' if event == 'found' else ''}"
        self._say(text, {"event": event, "machine": machine.to_data()})
