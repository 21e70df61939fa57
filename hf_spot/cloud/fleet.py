"""The machines of a job for which several train: looks at them, gives back, and asks for what is missing.

`hf_spot.policy.fleet` decides, and a `hf_spot.cloud.walk.Walker` orders.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timedelta

from hf_spot.cloud.ec2 import Instance
from hf_spot.cloud.fleet_size import REGION
from hf_spot.cloud.job import SPOT
from hf_spot.cloud.ladder import Wanted, pause_s
from hf_spot.cloud.ledger import FRUITLESS_MACHINES, Machine
from hf_spot.cloud.walk import Setting, Walker, Yield
from hf_spot.policy.fleet import Goal, Means, Member, decide
from hf_spot.policy.membership import Size

_STANDING = ("pending", "running")
_HOUR = timedelta(hours=1)


class Fleet:
    """Keeps the number of machines of a run at what ladder, prices and budget give.

    Args:
        setting: the job, and what it needs.
        walker: orders machines.
        now: the wall clock.
    """

    def __init__(self, setting: Setting, walker: Walker, *, now: Callable[[], datetime]) -> None:
        self._at = setting
        self._walker = walker
        self._now = now
        self._fruitless_walks = 0
        self._next_walk = now()
        self._given: set[str] = set()

    # -- when to look for machines ------------------------------------------------------------------------------------

    def is_time_to_walk(self) -> bool:
        """Return whether the pause after a walk that did not get all is over."""
        return self._now() >= self._next_walk

    def lost(self, ids: Collection[str]) -> None:
        """Look for machines at once, unless all of those that have gone were given back."""
        if not self._given.issuperset(ids):
            self._fruitless_walks, self._next_walk = 0, self._now()

    def walked(self, *, got_all: bool) -> float:
        """Note how a walk has ended. Return the seconds until the next one."""
        self._fruitless_walks = 0 if got_all else self._fruitless_walks + 1
        pause = pause_s(self._fruitless_walks) if self._fruitless_walks else 0.0
        self._next_walk = self._now() + timedelta(seconds=pause)
        return pause

    # -- what to do ---------------------------------------------------------------------------------------------------

    def look(self, alive: Sequence[Instance], *, fresh: bool) -> Wanted | None:
        """Give back the machines that are too many or too dear. Return those to look for; None for none.

        Args:
            alive: the run's instances, as EC2 says.
            fresh: a person requested it, so earlier failures do not count.
        """
        job, ledger = self._at.job, self._at.records.ledger
        standing = {one.id for one in alive if one.state in _STANDING}
        machines = [one for one in ledger.live() if one.instance_id in standing]
        prices = {one.instance_id: self._at.records.usd_per_hour_now(one) for one in machines}
        members = [Member(one.instance_id, prices[one.instance_id], one.market != SPOT) for one in machines]
        decision = decide(self._goal(), members, self._means(), self._settled_s())
        if decision.why and decision.why != ledger.why_missing:
            self._at.records.record("short", why=decision.why)
        if decision.end:
            self.end([one for one in machines if one.instance_id in decision.end], decision.why)
            self.walked(got_all=False)  # what was given back for a reason is not asked for again at once
            return None
        if not decision.order or not (fresh or self._may_start()):
            return None
        first = machines[0] if machines else None
        one_zone = job.placement != REGION
        return Wanted(
            count=decision.order,
            needed=decision.needed,
            at_least=decision.at_least,
            most_usd=decision.most_usd_per_hour,
            region=first.region if first else "",
            zone=first.zone if first and one_zone else "",
            one_zone=one_zone,
            running_usd=sum(prices.values()),
        )

    def fill(self, token: str, wanted: Wanted) -> Yield:
        """Start machines, and record how the walk has ended. Raises as `Walker.several`."""
        found = self._walker.several(token, wanted)
        self._at.records.record("walked", why=found.why)
        return found

    def end(self, machines: Sequence[Machine], why: str) -> None:
        """Terminate some machines; the training saves first, and goes on with the others."""
        for machine in machines:
            self._at.say(
                f"{machine.instance_id} is given back: {why}",
                {"event": "given-back", "machine": machine.instance_id, "why": why},
            )
            self._given.add(machine.instance_id)
            self._at.cloud.terminate(machine.region, [machine.instance_id])

    def _may_start(self) -> bool:
        ledger = self._at.records.ledger
        return not (ledger.stopped or ledger.failed or ledger.fruitless >= FRUITLESS_MACHINES)

    def _goal(self) -> Goal:
        job, ledger = self._at.job, self._at.records.ledger
        is_free = "--allow_batch_change" in job.run.replace("--allow-batch-change", "--allow_batch_change")
        size = Size(job.size.least, job.size.most, ledger.ranks_each if ledger.samples else 1, ledger.samples, is_free)
        return Goal(job.size.least, job.size.most, size.of)

    def _means(self) -> Means:
        job = self._at.job
        whole = None if job.hours is None else job.hours * job.size.most
        deadline_h = None if job.deadline is None else (job.deadline - self._now()) / _HOUR
        return Means(self._at.planner.left_usd(), self._at.records.ledger.machine_hours_left(whole), deadline_h)

    def _settled_s(self) -> float:
        machines = self._at.records.ledger.machines
        changes = [moment for one in machines for moment in (one.began, one.ended) if moment is not None]
        return (self._now() - max(changes)).total_seconds() if changes else 0.0
