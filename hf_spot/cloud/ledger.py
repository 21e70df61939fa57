"""A run's machines according to its journal: which they were, what they cost, how far the training is. Pure.

Provisioning writes entries of the kind ``machine``; ``data["event"]`` is one of

* ``asked``: a process walks the ladder; until ``started`` or ``refused`` follows, no other does (for `LEASE_S`, or until a
  process that knows that the first one is dead takes over);
* ``started``: a machine, with its price and the source of the price; with ``more`` the walk goes on, for further machines;
* ``refused``: no rung had capacity;
* ``walked``: the walk for several machines has ended, and why it did not get all;
* ``short``: why no more machines are wanted;
* ``ended``: a machine is gone, why, what it cost, and whether to start another; with ``traffic``, what all have exchanged
  with the store until then, and what it costs;
* ``billed``: the same machine, whose end EC2 has told more exactly since.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta
from typing import Any

from hf_spot.run.journal import ENDINGS, Entry
from hf_spot.run.traffic import Traffic

LEASE_S = 300.0
GUEST_SHUTDOWN = "Client.InstanceInitiatedShutdown"
FRUITLESS_MACHINES = 2  # in a row, shut down without a commit: a third would do the same


@dataclass(frozen=True)
class Machine:
    """One instance, as recorded in the journal.

    Args:
        instance_id: id of the instance.
        region: name of the region.
        zone: name of the availability zone.
        instance_type: such as ``p4d.24xlarge``.
        market: ``spot`` or ``on-demand``.
        rung: index of its rung in the ladder, from 0.
        began: when EC2 launched it.
        usd_per_hour: its price at the beginning; None if unknown.
        price_source: source of this price.
        price_time: since when this price applied.
        on_demand_usd_per_hour: on-demand price of the same machine; None if unknown.
        ended: when it was gone.
        reason: EC2's code for why it ended.
        cost_usd: total cost of a machine that has ended, without its disk.
        cost_bound: ``at most`` or ``at least``, if EC2 has not told when it ended; empty if it has.
        end_source: source of its end.
        disk_usd_per_hour: price of its disk; None if unknown.
        disk_usd: total cost of its disk, once it has ended.
        sent_bytes: what its network interfaces have sent, of machines in several zones; None if unknown.
        wheel: of hf_spot that it installs, with its digest; empty if the image has hf_spot, or unknown.
    """

    instance_id: str
    region: str
    zone: str
    instance_type: str
    market: str
    rung: int
    began: datetime
    usd_per_hour: float | None = None
    price_source: str = ""
    price_time: datetime | None = None
    on_demand_usd_per_hour: float | None = None
    ended: datetime | None = None
    reason: str = ""
    cost_usd: float | None = None
    disk_usd_per_hour: float | None = None
    disk_usd: float | None = None
    wheel: str = ""
    cost_bound: str = ""
    end_source: str = ""
    sent_bytes: int | None = None

    def to_data(self) -> dict[str, Any]:
        """Return JSON values."""
        return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in asdict(self).items()}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Machine:
        """Return the machine from the values of `to_data`; unknown keys are ignored."""
        known = {one.name: data[one.name] for one in fields(cls) if one.name in data}
        for name in ("began", "price_time", "ended"):
            if known.get(name) is not None:
                known[name] = datetime.fromisoformat(known[name])
        return cls(**known)


@dataclass(frozen=True)
class Ledger:
    """A run's machines after entry ``number``.

    Args:
        number: number of the last entry that was read.
        machines: oldest first.
        walk: number of the ``asked`` entry of the current walk, or None.
        walk_since: time of that entry.
        walk_by: the process that wrote it.
        walk_token: token that makes repeated orders idempotent, also for a process that takes over.
        fruitless: number of machines in a row that shut down by themselves without a commit.
        stopped: the last machine was ended on request, and no other is wanted.
        step: last committed step.
        max_steps: total steps of the training, if its commits say so.
        last_entry: time of the training's last entry.
        failed: the newest launch ended with ``failed``.
        trained_s: seconds from the beginnings of launches to their last commits.
        trained_steps: steps committed in that time.
        committed: number of commits.
        machine_s: as ``trained_s``, summed over the machines that trained.
        wanted: how many machines are to train, as in the job file; empty for one.
        why_missing: why the last walk did not get all of them; empty if it did.
        met: ids of the machines that have taken part in a launch of several.
        samples: of an optimizer step; None if no commit has told.
        ranks_each: of each machine, by the same commit.
        traffic: between the machines and the store.
    """

    number: int = 0
    machines: tuple[Machine, ...] = ()
    walk: int | None = None
    walk_since: datetime | None = None
    walk_by: str = ""
    walk_token: str = ""
    fruitless: int = 0
    stopped: bool = False
    step: int = 0
    max_steps: int | None = None
    last_entry: datetime | None = None
    failed: bool = False
    trained_s: float = 0.0
    trained_steps: int = 0
    committed: int = 0
    machine_s: float = 0.0
    wanted: str = ""
    why_missing: str = ""
    met: frozenset[str] = frozenset()
    samples: int | None = None
    ranks_each: int = 1
    traffic: Traffic = field(default_factory=Traffic)
    _machines: int = 1
    _mark: datetime | None = None
    _committed_before: int = 0

    def live(self) -> list[Machine]:
        """Return the machines without a recorded end."""
        return [machine for machine in self.machines if machine.ended is None]

    def hours_left(self, expected: float | None) -> float | None:
        """Return the remaining hours of the training by the speed of its commits; before the first one, ``expected``.

        Args:
            expected: hours of the whole training from the job file; None if unknown.
        """
        if self.max_steps and self.trained_steps > 0:
            return max(0, self.max_steps - self.step) * self.trained_s / self.trained_steps / 3600
        return expected

    def machine_hours_left(self, expected: float | None) -> float | None:
        """Return the hours of one machine that the rest of the training takes, as `hours_left`.

        Args:
            expected: machine-hours of the whole training; None if unknown.
        """
        if self.max_steps and self.trained_steps > 0:
            return max(0, self.max_steps - self.step) * self.machine_s / self.trained_steps / 3600
        return expected


def fold(ledger: Ledger, entry: Entry) -> Ledger:
    """Return the ledger after one more entry of the journal."""
    after = replace(ledger, number=entry.number)
    if entry.kind == "machine":
        return _machine(after, entry)
    after = replace(after, last_entry=entry.time, traffic=ledger.traffic.after(entry))
    if entry.kind == "claim":
        roster = [one.get("machine") or {} for one in entry.data.get("roster") or ()]
        met = after.met | {str(one["instance_id"]) for one in roster if one.get("instance_id")}
        return replace(after, _mark=entry.time, failed=False, met=met, _machines=int(entry.data.get("machines") or 1))
    if entry.kind == "commit":
        newest = entry.state.latest()
        step = newest.step if newest else entry.data["step"]
        advanced = step - ledger.step
        since_s = (entry.time - ledger._mark).total_seconds() if ledger._mark else 0.0
        counts = advanced > 0 and since_s > 0 and entry.data.get("reason") != "push"
        samples, ranks = _samples(entry.data)
        return replace(
            after,
            samples=samples or ledger.samples,
            ranks_each=max(1, ranks // ledger._machines) if samples else ledger.ranks_each,
            machine_s=ledger.machine_s + (since_s * ledger._machines if counts else 0.0),
            step=step,
            max_steps=entry.data.get("max_steps") or ledger.max_steps,
            committed=ledger.committed + 1,
            trained_s=ledger.trained_s + (since_s if counts else 0.0),
            trained_steps=ledger.trained_steps + (advanced if counts else 0),
            _mark=entry.time,
        )
    if entry.kind in ENDINGS:
        return replace(after, failed=entry.kind == "failed")
    return after


def _machine(ledger: Ledger, entry: Entry) -> Ledger:
    event, data = entry.data.get("event"), entry.data
    if event == "asked":
        if ledger.walk is not None and data.get("takes_over") != ledger.walk and not is_stale(ledger, entry.time):
            return ledger
        begun = replace(ledger, walk=entry.number, walk_since=entry.time, walk_by=data["by"], walk_token=data["token"])
        begun = replace(begun, wanted=data.get("machines", ""), why_missing="")
        return replace(begun, fruitless=0, failed=False, stopped=False) if data["fresh"] else begun
    if event in ("refused", "walked"):
        return replace(ledger, walk=None, walk_since=None, why_missing=data.get("why", ""))
    if event == "short":
        return replace(ledger, why_missing=data["why"])
    if event == "started":
        machine = Machine.from_data(data["machine"])
        known = any(one.instance_id == machine.instance_id for one in ledger.machines)
        machines = ledger.machines if known else (*ledger.machines, machine)
        begun = replace(ledger, machines=machines, _committed_before=ledger.committed)
        return begun if data.get("more") else replace(begun, walk=None, walk_since=None)
    if event == "billed":
        return replace(ledger, machines=_with(ledger, Machine.from_data(data["machine"])))
    if event == "ended":
        machine = Machine.from_data(data["machine"])
        in_vain = ledger.committed == ledger._committed_before or (
            bool(ledger.wanted) and machine.instance_id not in ledger.met
        )
        by_itself = machine.reason.startswith(GUEST_SHUTDOWN) and in_vain
        return replace(
            ledger,
            stopped=bool(data.get("stop")),
            machines=_with(ledger, machine),
            fruitless=ledger.fruitless + 1 if by_itself else 0,
        )
    return ledger


def _with(ledger: Ledger, machine: Machine) -> tuple[Machine, ...]:
    """Return the machines with a newer record of one of them."""
    return tuple(machine if one.instance_id == machine.instance_id else one for one in ledger.machines)


def _samples(data: Mapping[str, Any]) -> tuple[int | None, int]:
    """Return the samples of an optimizer step and the ranks, as a commit tells them; None and 1 if it does not."""
    each, times = data.get("per_device_train_batch_size"), data.get("gradient_accumulation_steps")
    ranks = data.get("data_parallel_size", data.get("world_size", 1))
    if not (isinstance(each, int) and isinstance(times, int) and isinstance(ranks, int)) or each * times * ranks <= 0:
        return None, 1
    return each * times * ranks, ranks


def is_stale(ledger: Ledger, now: datetime) -> bool:
    """Return whether the lease of the current walk has expired, so that another process may walk the ladder."""
    return ledger.walk_since is None or now - ledger.walk_since > timedelta(seconds=LEASE_S)
