"""Several machines on the local spot cloud in simulated time: EC2's API is real, the training only writes the journal.

``--watch`` runs in this process, with a clock that only its waits move; at each wait the training trains on, and the story
takes machines, changes prices and capacity, and kills the watcher.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from hf_spot.cloud.ec2 import RUN_TAG, Cloud
from hf_spot.cloud.job import Job, Rung
from hf_spot.cloud.ledger import Machine
from hf_spot.cloud.machine_records import MachineRecords
from hf_spot.cloud.provision import Provisioner
from hf_spot.policy.membership import Size
from hf_spot.run.run import Run
from tests.spotcloud.cloud import BY_ITSELF, CRASHED, SpotCloud
from tests.spotcloud.market import ON_DEMAND, RECLAIMED, SPOT, Market, Pool

NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)
REGION, KIND = "us-east-1", "p4d.24xlarge"
A, B = f"{REGION}a", f"{REGION}b"
LADDER = (Rung((KIND,), SPOT), Rung((KIND,), ON_DEMAND))
_STEPS_EACH_S = 1 / 60  # of one machine: a step a minute


class Killed(BaseException):
    """kill -9 of the watcher, as far as a process can do this to itself."""


class Clock:
    """Moved by waiting only."""

    def __init__(self) -> None:
        self.time = NOW
        self.on_sleep: Callable[[float], None] = lambda seconds: None
        self.before: Callable[[], None] = lambda: None
        self.slept = 0

    def now(self) -> datetime:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.slept += 1
        assert self.slept < 20_000, "it never ends"
        self.before()
        self.time += timedelta(seconds=seconds)
        self.on_sleep(seconds)


class Training:
    """Trains on the machines that are there, as the elastic launch does: the more machines, the more steps.

    Args:
        stage: where it trains.
        size: of the job.
        steps: that finish it.
    """

    def __init__(self, stage: Stage, least: int, most: int, steps: int) -> None:
        self.stage, self.steps, self.size = stage, steps, Size(least, most, samples=840)
        self.run = stage.run()
        self.members: tuple[str, ...] = ()
        self.done = self.committed = 0.0
        self.lost = 0.0
        self.counts: list[int] = []

    def tick(self, seconds: float) -> None:
        """Goes on for some seconds, with the machines of now."""
        if self.run.state().ended == "finished":
            return
        here = tuple(sorted(self.stage.cloud.running()))
        count = self.size.of(len(here))
        if set(self.members) - set(here):  # what was not committed is done again
            self.lost += self.done - self.committed
            self.done, self.members = self.committed, ()
        if not count:
            return
        if not self.members or count > len(self.members):
            if self.members:
                self.commit()
            self.members = (*(one for one in self.members if one in here), *(one for one in here if one not in self.members))
            self.members = self.members[:count]
            roster = [{"name": one, "machine": {"instance_id": one}} for one in self.members]
            self.run.journal.claim({"machines": count, "roster": roster})
            return
        self.counts.append(count)
        self.done = min(self.steps, self.done + seconds * _STEPS_EACH_S * count)
        if self.done - self.committed >= 10 or self.done >= self.steps:
            self.commit()
        if self.done >= self.steps:
            self.run.record("finished", {})
            for name in here:
                self.stage.end(name, BY_ITSELF)

    def notice(self) -> None:
        """Saves, because a machine is about to go."""
        if self.members:
            self.commit()
            self.run.record("preempted", {"step": int(self.committed)})

    def commit(self) -> None:
        if int(self.done) == int(self.committed):
            return
        self.committed = float(int(self.done))
        step = int(self.committed)
        data = {"step": step, "stage": 1, "reason": "schedule", "complete": step >= self.steps, "max_steps": self.steps}
        sizes = {"per_device_train_batch_size": 840, "gradient_accumulation_steps": 1, "world_size": 1}
        self.run.journal.append(
            "commit", {**data, **sizes, "files": [], "prefix": f"e/checkpoint-{step}-{self.run.state().number}"}
        )


class Stage:
    """A cloud without machines of flesh, a job and its run; ``with`` ends it.

    Args:
        folder: an empty one.
        job: changes of the job.
    """

    def __init__(self, folder: Path, **job: Any) -> None:
        self.folder, self.clock = folder, Clock()
        self.said: list[dict[str, Any]] = []
        self.job = Job(
            **{
                "name": "llama",
                "store": str(folder / "run"),
                "run": "hf-spot launch train.py",
                "region": REGION,
                "max_spend": 1000,
                "machines": 3,
                "ladder": LADDER,
                "tags": {"team": "tests"},
                **job,
            }
        )

    def __enter__(self) -> Stage:
        with ExitStack() as stack:
            self.market = Market(NOW - timedelta(days=1))
            for zone, price in ((A, 8.0), (B, 9.0), (f"{REGION}c", 12.0), (f"{REGION}d", 12.0)):
                self.market.set_price(Pool(KIND, zone), price, NOW - timedelta(hours=1))
            machines = self.folder / "machines"
            machines.mkdir()
            self.cloud = stack.enter_context(SpotCloud(machines, market=self.market, now=self.clock.now))
            self.cloud.api.regions = [REGION]  # moto takes a second to make each
            self.clock.before = self._settle
            keys = {"aws_access_key_id": "AKUSER", "aws_secret_access_key": "secret"}
            self.session = _Session(self.cloud.api.endpoint, keys)
            self.training = Training(self, self.job.size.least, self.job.size.most, 600)
            self.clock.on_sleep = self.training.tick
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    def run(self) -> Run:
        run = Run(self.job.store)
        run.journal._now = self.clock.now
        return run

    def provisioner(self) -> Provisioner:
        made = Provisioner(
            self.job,
            self.run(),
            Cloud(self.session),
            now=self.clock.now,
            sleep=self.clock.sleep,
            say=lambda text, event: self.said.append({"text": text, "at": self.clock.time, **event}),
        )
        # Who comes after a kill finds a dead process, although all are this one.
        made.records._me = f"{made.records._me.rsplit(' ', 2)[0]} 1 0.0"
        return made

    def records(self) -> MachineRecords:
        return MachineRecords(self.run(), Cloud(self.session), now=self.clock.now)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.said if event["event"] == kind]

    def end(self, name: str, reason: str) -> None:
        """Ends a machine for a reason of EC2's, and returns when it is gone."""
        self.cloud._have_done(lambda: self.cloud._end(name, reason))

    def _settle(self) -> None:
        """Machines that somebody has terminated are gone, and billed until now, before the clock moves."""
        cloud = self.cloud
        cloud._have_done(lambda: [cloud._look_after(name) for name in cloud.running()] and None)

    def lose(self, name: str) -> None:
        """Takes a spot machine; one at full price, which EC2 never takes, breaks down."""
        self.end(name, RECLAIMED if self.cloud.bill.stays[name].pool.market == SPOT else CRASHED)

    def at_times(self, acts: Sequence[tuple[float, Callable[[], object]]], *, more_s: float = 0.0) -> None:
        """Plays acts at seconds after the beginning, in order, while the training trains; each wait is so much longer."""
        left = sorted(acts, key=lambda one: one[0])

        def sleep(seconds: float) -> None:
            self.clock.time += timedelta(seconds=more_s)
            self.training.tick(seconds + more_s)
            while left and (self.clock.time - NOW).total_seconds() >= left[0][0]:
                left.pop(0)[1]()

        self.clock.on_sleep = sleep

    # -- the end ------------------------------------------------------------------------------------------------------

    def machines(self) -> tuple[Machine, ...]:
        """Those of the journal."""
        return self.records().refresh().machines

    def balance(self) -> Balance:
        """What is left, and what it cost."""
        stays = self.cloud.bill.stays
        written = {one.instance_id: one for one in self.machines()}
        tags = {name: {tag["key"]: tag["value"] for tag in self.cloud.instance(name).get_tags()} for name in stays}
        client = self.cloud.client()
        named = [{"Name": f"tag:{RUN_TAG}", "Values": [self.job.store]}]
        left = [*client.describe_security_groups(Filters=named)["SecurityGroups"]]
        left += client.describe_placement_groups(Filters=named)["PlacementGroups"]
        left += client.describe_launch_templates()["LaunchTemplates"]
        return Balance(
            running=self.cloud.running(),
            untagged=[name for name in stays if tags[name].get(RUN_TAG) != self.job.store or tags[name].get("team") != "tests"],
            unwritten=sorted(stays.keys() ^ {name for name, one in written.items() if one.ended is not None}),
            left=left,
            spent_usd={name: one.cost_usd or 0.0 for name, one in written.items()},
            charged_usd={name: stay.charged(self.market, self.clock.time) for name, stay in stays.items()},
            disk_usd={name: one.disk_usd or 0.0 for name, one in written.items()},
            disks_charged_usd=self.cloud.bill.disks(self.clock.time),
            most_at_once=_most_at_once(self.cloud.bill.stays.values(), self.clock.time),
        )


@dataclass
class Balance:
    """What came of a story.

    Args:
        running: machines that nobody ended.
        untagged: machines without the tags of the run and the job.
        unwritten: machines that are not both in the bill and, to their end, in the journal.
        left: groups and templates.
        spent_usd: by the journal, by machine.
        charged_usd: by the cloud, by machine.
        disk_usd: of the disks, by the journal.
        disks_charged_usd: of the disks, by the cloud.
        most_at_once: machines that were billed at the same time.
    """

    running: list[str]
    untagged: list[str]
    unwritten: list[str]
    left: list[Any]
    spent_usd: dict[str, float]
    charged_usd: dict[str, float]
    disk_usd: dict[str, float]
    disks_charged_usd: dict[str, float]
    most_at_once: int

    @property
    def is_clean(self) -> bool:
        return not (self.running or self.untagged or self.unwritten or self.left)

    @property
    def is_right_to_the_cent(self) -> bool:
        """Each machine's cost, and so their sum."""
        both = {name: round(usd, 2) for name, usd in self.spent_usd.items()}
        disks = all(abs(usd - self.disk_usd[name]) < 0.005 for name, usd in self.disks_charged_usd.items())
        return disks and both == {name: round(usd, 2) for name, usd in self.charged_usd.items()}


def long_story(stage: Stage, seed: int, interruptions: int) -> Balance:
    """Interruptions with and without notice of machines that dice choose; capacity that comes late, in two zones and at full
    price; prices that move; ``--watch`` is killed twice, once between an order and its record."""
    dice = random.Random(seed)
    market, training = stage.market, stage.training
    training.steps = 25 * interruptions
    taken: list[str] = []
    market.close()
    market.open(KIND, A, SPOT)
    every_s = 600.0

    def interrupt(place: int) -> None:
        spot = [name for name in stage.cloud.running() if stage.cloud.bill.stays[name].pool.market == SPOT]
        if not spot:
            return
        name = dice.choice(spot)
        if place % 2:
            training.notice()
        stage.cloud.take(name)
        taken.append(name)
        market.set_price(Pool(KIND, A), round(dice.uniform(6, 12), 4), stage.clock.now())

    def late(zone_now: str) -> None:
        """Only another zone has machines, and later."""
        market.close()
        market.open(KIND, zone_now, SPOT)

    acts: list[tuple[float, Callable[[], object]]] = [
        (every_s * (place + 1), lambda place=place: interrupt(place)) for place in range(interruptions)
    ]
    at = every_s * interruptions
    acts += [
        (0.21 * at, market.close),  # nobody has machines: those that are left go on
        (0.30 * at, lambda: market.open(KIND, A, SPOT)),
        (0.40 * at, lambda: (market.close(), market.limit(1, KIND, A, ON_DEMAND))),  # the last rung, at the full price
        (0.55 * at, lambda: late(B)),
        (0.56 * at, lambda: [stage.lose(name) for name in stage.cloud.running()]),  # and all at once
        (0.80 * at, lambda: (market.open(KIND, A, SPOT), market.open(KIND, B, SPOT))),
    ]
    stage.at_times(acts)
    kills = [_after_the_first_order(), 0.35 * at]
    watch_with_kills(stage, kills)
    assert len(taken) >= interruptions * 0.8, taken
    return stage.balance()


def _after_the_first_order() -> str:
    return "order"


def watch_with_kills(stage: Stage, kills: Sequence[object]) -> None:
    """``--watch``, killed between an order and its record (``order``) or at so many seconds, and started again each time."""
    for kill in [*kills, None]:
        provisioner = stage.provisioner()
        if kill == "order":
            started = provisioner.records.started

            def dies(*args: Any, **more: Any) -> Machine:
                raise Killed

            assert started
            provisioner.records.started = dies  # type: ignore[method-assign]
        elif isinstance(kill, (int, float)):
            go_on = stage.clock.on_sleep

            def sleep(seconds: float, at: float = float(kill), go_on: Callable[[float], None] = go_on) -> None:
                go_on(seconds)
                if (stage.clock.time - NOW).total_seconds() >= at:
                    stage.clock.on_sleep = go_on
                    raise Killed

            stage.clock.on_sleep = sleep
        try:
            provisioner.watch()
        except Killed:
            continue
        return


def _most_at_once(stays: Any, now: datetime) -> int:
    moments = [stay.began for stay in stays]
    return max(sum(one.began <= at < (one.ended or now) for one in stays) for at in moments) if moments else 0


class _Session:
    """What `Cloud` needs of a boto3 session."""

    def __init__(self, endpoint: str, keys: dict[str, str]) -> None:
        self._endpoint, self._keys = endpoint, keys

    def client(self, service: str, region_name: str | None = None, **options: Any) -> Any:
        import boto3

        make: Any = boto3.client
        return make(service, region_name=region_name or REGION, endpoint_url=self._endpoint, **self._keys, **options)
