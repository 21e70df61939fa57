"""The records of a run's machines. They are in the run's journal and the instances' tags, and survive the watching process."""

from __future__ import annotations

import json
import os
import platform
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import psutil

from hf_spot.cloud.ec2 import LIVE, RUNG_TAG, STOP_TAG, Cloud, Instance
from hf_spot.cloud.ending import AT_MOST, Ending, SpotStatus, bound_of, ending_of
from hf_spot.cloud.job import SPOT
from hf_spot.cloud.ladder import Pool, Price, billed_until, cost_usd, is_free
from hf_spot.cloud.ledger import Ledger, Machine, fold, is_stale
from hf_spot.cloud.machine import network_key
from hf_spot.cloud.rates import between_zones, place_of, rates_for
from hf_spot.errors import CloudError, Fenced, SpotError
from hf_spot.run.journal import Entry, RunState
from hf_spot.run.run import Run
from hf_spot.run.traffic import NOWHERE, Rate, Traffic, charged_usd, pairs, traffic_data
from hf_spot.storage.probe import probe

_SETTLED_AFTER = timedelta(minutes=5)  # so much later the status of a spot request may follow
_STANDING = ("pending", "running")
_PRICES_AGE = timedelta(seconds=20)  # of what is known about machines that run; for one that has ended it is asked anew

PriceHistory = dict[tuple[str, str], list[Price]]


class MachineRecords:
    """Reads and writes the records of a run's machines.

    Args:
        run: the run, with the journal.
        cloud: the account's EC2, with the instances.
        now: the wall clock.
        disk_gb: size of the disk of a new machine; 0 if unknown.
        counts_network: machines may be in several zones, and tell how much they have sent.
    """

    def __init__(
        self, run: Run, cloud: Cloud, *, now: Callable[[], datetime], disk_gb: int = 0, counts_network: bool = False
    ) -> None:
        self._counts_network = counts_network
        self._disk_gb = disk_gb
        self.run = run
        self.ledger = Ledger()
        self.state = RunState()
        self._cloud = cloud
        self._now = now
        self._me = f"{platform.node()} {os.getpid()} {psutil.Process().create_time()}"
        self._probed = False
        self._prices: dict[tuple[str, str], tuple[datetime, datetime, PriceHistory]] = {}
        self._launched: dict[str, datetime] = {}  # by EC2's clock
        self._place: str | None = None
        self._rates: dict[tuple[str, str], Rate] = {}
        self._going: dict[str, datetime] = {}  # when it was first seen to shut down

    def refresh(self) -> Ledger:
        """Read new entries of the journal. Raises StoreUnavailable."""
        self.state = self.run.state()
        if self.ledger.number == 0 and self.state.number > 1:
            for entry in self.run.events():
                self.ledger = fold(self.ledger, entry)
        for number in range(self.ledger.number + 1, self.state.number + 1):
            self.ledger = fold(self.ledger, self.run.journal.read(number))
        return self.ledger

    def record(self, event: str, **data: Any) -> Entry:
        """Write an entry of the kind ``machine``, whatever launch is running. Raises StoreError."""
        if not self._probed:
            probe(self.run.store)
            self._probed = True
        while True:
            self.run.adopt(self.run.state().launch)
            try:
                entry = self.run.record("machine", {"event": event, **data})
            except Fenced:
                continue  # a launch has begun in between: write beside it
            self.refresh()
            return entry

    # -- walks -------------------------------------------------------------------------------------------------------

    def start_walk(self, *, fresh: bool, machines: str = "") -> str | None:
        """Acquire the right to walk the ladder. Return the token for its orders, or None while another process has it.

        Args:
            fresh: a person requested it, so earlier failures do not count.
            machines: how many are to train, as in the job file; empty for one.
        """
        ledger = self.refresh()
        data: dict[str, Any] = {"by": self._me, "token": uuid.uuid4().hex, "fresh": fresh}
        data |= {"machines": machines} if machines else {}
        if ledger.walk is not None:
            # With the same token the same orders return the machines that the dead process may have started.
            data["token"] = ledger.walk_token
            if not is_stale(ledger, self._now()) and not self._is_dead(ledger.walk_by):
                return None
            data["takes_over"] = ledger.walk
        entry = self.record("asked", **data)
        return self.ledger.walk_token if self.ledger.walk == entry.number else None

    def _is_dead(self, by: str) -> bool:
        host, pid, born = by.rsplit(" ", 2)
        if host != platform.node():
            return False
        try:
            return str(psutil.Process(int(pid)).create_time()) != born
        except psutil.NoSuchProcess:
            return True

    # -- machines -----------------------------------------------------------------------------------------------------

    def find_instances(self, regions: Sequence[str]) -> list[Instance]:
        """Return the run's instances in these regions, oldest first. Raises CloudError."""
        found = self._cloud.each(regions, lambda region: self._cloud.instances(region, self.run.url))
        return sorted((one for region in found for one in region), key=lambda one: (one.began, one.id))

    def reconcile(self, found: Sequence[Instance], regions: Iterable[str]) -> list[Instance]:
        """Record what the journal does not contain yet, and return the live instances.

        An instance that is shutting down may still be saving, so it is live; one that EC2 has forgotten is gone.

        Args:
            found: result of `find_instances`.
            regions: the regions that were queried.
        """
        known = {machine.instance_id for machine in self.ledger.machines}
        for one in found:
            if one.id not in known:
                self.record("started", machine=self._machine_of(one).to_data())
        seen = {one.id: one for one in found}
        for one in found:
            self._launched[one.id] = one.began
            if one.state not in _STANDING:
                self._going.setdefault(one.id, self._now())
        self._settle()
        for machine in self.ledger.live():
            if machine.region in regions:
                instance = seen.get(machine.instance_id)
                if instance is None or instance.state not in LIVE:
                    self.ended(machine, instance)
        return [one for one in found if one.state in LIVE]

    def started(self, instance_id: str, pool: Pool, rung: int, *, more: bool = False, wheel: str = "") -> Machine:
        """Record a new machine; with ``more`` the walk goes on."""
        price = pool.price
        machine = Machine(
            instance_id=instance_id,
            region=pool.region,
            zone=pool.zone,
            instance_type=pool.instance_type,
            market=pool.market,
            rung=rung,
            began=self._now(),
            usd_per_hour=price.usd_per_hour if price else None,
            price_source=price.source if price else "",
            price_time=price.time if price else None,
            on_demand_usd_per_hour=self.on_demand_usd(pool.instance_type, pool.region),
            disk_usd_per_hour=self.disk_usd_per_hour(pool.region),
            wheel=wheel,
        )
        self.record("started", machine=machine.to_data(), **({"more": True} if more else {}))
        return machine

    def ended(self, machine: Machine, instance: Instance | None, *, stop: bool = False) -> None:
        """Record that a machine is gone."""
        known = self._ending(machine, instance)
        stop = stop or (instance is not None and STOP_TAG in instance.tags)
        done = self._billed(machine, known)
        self.record("ended", machine=done.to_data(), stop=stop, **self._traffic_data(done))

    def _ending(self, machine: Machine, instance: Instance | None) -> Ending:
        now = self._now()
        began = self._launched.get(machine.instance_id, machine.began)
        last_sign = max(began, min(self.ledger.last_entry or began, now))
        seen = self._going.get(machine.instance_id, now)
        reason, told = (None, None) if instance is None else (instance.reason, instance.ended)
        status = self._spot_status(machine) if told is None else None
        return ending_of(began, seen, last_sign, reason, told, status)

    def _billed(self, machine: Machine, known: Ending) -> Machine:
        """Return the machine with its end and what it cost."""
        began = self._launched.get(machine.instance_id, machine.began)
        self._prices.clear()
        machine = replace(machine, began=began)
        cost = 0.0 if is_free(machine.market, began, known.time, known.reason) else self._cost(machine, known.time)
        done = replace(machine, ended=known.time, reason=known.reason, cost_usd=round(cost, 6))
        done = replace(done, end_source=known.source, cost_bound=known.bound)
        if self._counts_network:
            done = replace(done, sent_bytes=self._sent_bytes(machine))
        if machine.disk_usd_per_hour is not None:
            done = replace(done, disk_usd=round(_disk_usd(machine, known.time), 6))
        return done

    def _sent_bytes(self, machine: Machine) -> int | None:
        """Return what a machine has told last about what its network interfaces have sent; None if it has told nothing."""
        try:
            return int(json.loads(self.run.store.get(network_key(machine.instance_id)))["sent_bytes"])
        except (SpotError, ValueError, KeyError, TypeError):
            return machine.sent_bytes

    def _settle(self) -> None:
        """Correct the bill of machines that have just ended: the status of a spot request may come later than the end."""
        now = self._now()
        for machine in self.ledger.machines:
            if machine.ended is None or machine.market != SPOT or machine.cost_bound != AT_MOST:
                continue
            if now - machine.ended > _SETTLED_AFTER or (status := self._spot_status(machine)) is None:
                continue
            known = ending_of(machine.began, machine.ended, machine.ended, machine.reason, None, status)
            if (known.time, known.bound) != (machine.ended, machine.cost_bound):
                self.record("billed", machine=self._billed(machine, known).to_data())

    def _spot_status(self, machine: Machine) -> SpotStatus | None:
        """Return the status of a machine's spot request; None for a machine at full price, or if EC2 does not tell."""
        if machine.market != SPOT:
            return None
        try:
            return self._cloud.spot_statuses(machine.region, [machine.instance_id]).get(machine.instance_id)
        except CloudError:
            return None  # the bill is then an upper bound, and says so

    def cost_bound(self) -> str:
        """Return the word before the sum of what all machines have cost; empty if EC2 has told the end of each."""
        return bound_of(machine.cost_bound for machine in self.ledger.machines if machine.cost_usd or machine.disk_usd)

    # -- traffic ------------------------------------------------------------------------------------------------------

    def traffic_usd(self) -> float | None:
        """Return what the traffic with the store has cost so far, in dollars; None if the store's place is unknown."""
        traffic = self._traffic(self.ledger.machines)
        if self.store_place() == NOWHERE and not traffic.between_zones:
            return None
        return charged_usd(traffic, self.store_place(), self._rates_for(traffic))

    def _traffic(self, machines: Sequence[Machine]) -> Traffic:
        """Return what machines and store have exchanged, and machines of several zones with each other."""
        found = self.ledger.traffic
        return replace(found, between_zones=between_zones(machines, found.sent_bytes))

    def store_place(self) -> str:
        """Return the region of the run's store, or `INTERNET`; empty for a folder or an unknown place."""
        if self._place is None:
            self._place = place_of(self.run.store)
        return self._place

    def _rates_for(self, traffic: Traffic) -> list[Rate]:
        wanted = {(source, target) for source, target, _ in pairs(traffic, self.store_place()) if source}
        if missing := wanted - self._rates.keys():
            self._rates |= {(one.source_place, one.target_place): one for one in rates_for(self._cloud, missing)}
        return [*self._rates.values()]

    def _traffic_data(self, ended: Machine) -> dict[str, Any]:
        others = [one for one in self.ledger.machines if one.instance_id != ended.instance_id]
        traffic = self._traffic([*others, ended])
        if self.store_place() == NOWHERE and not traffic.between_zones:
            return {}
        return {"traffic": traffic_data(traffic, self.store_place(), self._rates_for(traffic))}

    # -- what all have cost -------------------------------------------------------------------------------------------

    def spent_usd(self) -> float:
        """Return what all machines of the run, their disks and their traffic with the store have cost so far, in dollars."""
        now = self._now()
        ended = sum((machine.cost_usd or 0.0) + (machine.disk_usd or 0.0) for machine in self.ledger.machines)
        ended += self.traffic_usd() or 0.0
        return ended + sum(self._cost(machine, now) + _disk_usd(machine, now) for machine in self.ledger.live())

    def disk_usd_per_hour(self, region: str) -> float | None:
        """Return the price of a new machine's disk in dollars per hour; None if unknown."""
        try:
            price = self._cloud.disk_price(region) if self._disk_gb else None
        except CloudError:
            return None
        return None if price is None else round(price.usd_per_hour * self._disk_gb, 6)

    def usd_per_hour_now(self, machine: Machine) -> float:
        """Return the current price of a machine in dollars per hour: that at its beginning, unless a later one is known."""
        now = self._now()
        return max([(machine.began, machine.usd_per_hour or 0.0), *self._history(machine, now)])[1]

    def on_demand_usd(self, instance_type: str, region: str) -> float | None:
        """Return the on-demand price in dollars per hour; None if unknown."""
        try:
            price = self._cloud.on_demand_price(instance_type, region)
        except CloudError:
            return None
        return price.usd_per_hour if price else None

    def _cost(self, machine: Machine, until: datetime) -> float:
        until = billed_until(machine.began, until)
        return cost_usd(machine.began, until, machine.usd_per_hour or 0.0, self._history(machine, until))

    def _history(self, machine: Machine, until: datetime) -> list[tuple[datetime, float]]:
        if machine.market != SPOT:
            return []
        try:
            found = self._spot_prices(machine, until)
        except CloudError:
            return []  # fall back to the price at the beginning
        return [(price.time, price.usd_per_hour) for price in found.get((machine.instance_type, machine.zone), ())]

    def _spot_prices(self, machine: Machine, until: datetime) -> PriceHistory:
        """Return the prices of a type in a region, for all of the run's machines at once."""
        key = machine.region, machine.instance_type
        alike = [one.began for one in self.ledger.live() if (one.region, one.instance_type) == key]
        since = min([machine.began, *alike])
        known = self._prices.get(key)
        if known is None or known[0] > since or not -_PRICES_AGE < until - known[1] < _PRICES_AGE:
            found = self._cloud.spot_prices(machine.region, [machine.instance_type], since, until)
            known = self._prices[key] = since, until, found
        return known[2]

    def _machine_of(self, one: Instance) -> Machine:
        """Return the record of an instance whose launching process died before recording it."""
        price: Price | None = None
        full = self.on_demand_usd(one.instance_type, one.region)
        if one.market == SPOT:
            try:
                found = self._cloud.spot_prices(one.region, [one.instance_type], one.began, one.began)
                price = next(iter(found.get((one.instance_type, one.zone), ())), None)
            except CloudError:
                price = None
        usd = price.usd_per_hour if price else full
        return Machine(
            instance_id=one.id,
            region=one.region,
            zone=one.zone,
            instance_type=one.instance_type,
            market=one.market,
            rung=int(one.tags.get(RUNG_TAG, 0)),
            began=one.began,
            usd_per_hour=usd,
            price_source=price.source if price else "",
            price_time=price.time if price else None,
            on_demand_usd_per_hour=full,
            disk_usd_per_hour=self.disk_usd_per_hour(one.region),
        )


def _disk_usd(machine: Machine, until: datetime) -> float:
    """Return the cost of a machine's disk; EC2 gives none away, and bills at least a minute."""
    hours = (billed_until(machine.began, until) - machine.began).total_seconds() / 3600
    return (machine.disk_usd_per_hour or 0.0) * hours
