"""One training on the local spot cloud: ``hf-spot provision --watch`` brings the demo's job through interruptions to its end.

Where the machines come from, and when they go, is decided by the steps that the training has done, so that a slow computer
sees the same story as a fast one.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from hf_spot.cloud.ec2 import RUN_TAG
from hf_spot.demo import train
from hf_spot.run.run import Run
from tests.hosts import kill
from tests.servers import SeaweedFS
from tests.spotcloud import guest
from tests.spotcloud.cloud import SpotCloud, utc_now
from tests.spotcloud.market import ON_DEMAND, Change, Market, Pool
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
PREFERRED, OTHER = "us-east-1", "us-west-2"
LARGE, SMALL = "p4d.24xlarge", "g5.48xlarge"
NOTICE, SILENCE, CONSOLE = "after a notice", "without a word", "by somebody in the console"
BEFORE_IT_HEARS, WHILE_IT_TRAINS = "killed before it hears of this machine", "killed while this machine trains"
_LADDER = f"""\
  - {{market: spot, instance_types: [{LARGE}], regions: preferred}}
  - {{market: spot, instance_types: [{LARGE}], regions: [{PREFERRED}, {OTHER}]}}
  - {{market: spot, instance_types: [{SMALL}], regions: [{PREFERRED}, {OTHER}]}}
  - {{market: on-demand, instance_types: [{LARGE}], regions: preferred}}
"""
_THREADS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
_GIVE_UP_S = 600.0


@dataclass(frozen=True)
class Script:
    """What is trained.

    Args:
        command: with ``{folder}`` for a folder that gets ``losses.jsonl`` and, at the end, ``out/final``.
        slower: makes its steps so long that a notice, polled every two seconds, comes before the end.
    """

    command: tuple[str, ...]
    slower: tuple[str, ...]

    def arguments(self, folder: object) -> list[str]:
        return [word.format(folder=folder) for word in self.command]


DEMO = Script(
    (train.__file__, "--output_dir", "{folder}/out", "--losses", "{folder}/losses.jsonl"), slower=("--min_step_s", "0.03")
)
PLAIN = Script(
    (
        str(ROOT / "tests/training/scripts/plain.py"),
        *("--output_dir", "{folder}/out", "--diary", "{folder}/losses.jsonl", "--weights", "{folder}/out/final"),
    ),
    slower=("--step_s", "0.3"),
)


@dataclass(frozen=True)
class Act:
    """A machine's time.

    Args:
        pool: the only one that has capacity when the machine is asked for.
        until: optimizer step at which it is taken; None: it stays.
        how: `NOTICE`, `SILENCE`, or `CONSOLE`.
        watcher: what happens to ``--watch``: nothing, or `BEFORE_IT_HEARS` or `WHILE_IT_TRAINS`; then another is started.
    """

    pool: Pool
    until: int | None = None
    how: str = NOTICE
    watcher: str = ""


SHORT = (  # of PLAIN's 32 steps
    Act(Pool(LARGE, "us-east-1a"), until=6),
    Act(Pool(SMALL, "us-west-2b"), until=18, how=SILENCE, watcher=BEFORE_IT_HEARS),
    Act(Pool(LARGE, "us-east-1b", ON_DEMAND)),
)


def long_story(seed: int) -> tuple[Act, ...]:
    """Six interruptions by EC2 in two regions and one by a person, in `DEMO`, at steps and in ways that the seed gives."""
    dice = random.Random(seed)
    pools = [
        Pool(LARGE, "us-east-1a"),
        Pool(LARGE, "us-east-1c"),
        Pool(LARGE, "us-west-2a"),
        Pool(SMALL, "us-west-2b"),
        Pool(SMALL, "us-east-1d"),
        Pool(LARGE, "us-east-1b"),
        Pool(LARGE, "us-west-2c"),
    ]
    ways = [*[NOTICE] * 4, *[SILENCE] * 2, CONSOLE]
    dice.shuffle(ways)
    watchers = ["", BEFORE_IT_HEARS, "", WHILE_IT_TRAINS, "", "", ""]
    steps = [15 + 27 * place + dice.randrange(12) for place in range(len(pools))]
    acts = [Act(*one) for one in zip(pools, steps, ways, watchers, strict=True)]
    return (*acts, Act(Pool(LARGE, "us-east-1b", ON_DEMAND)))


@dataclass
class Outcome:
    """What came of it.

    Args:
        sha256: of the weights in the run's newest checkpoint.
        sha256_twin: of those that the twin, which nobody disturbed, ended with.
        losses_equal: every step of every machine had the twin's loss and learning rate.
        final_step: optimizer steps of the finished run.
        pools: of the machines, in order.
        reasons: EC2's, why each ended.
        lost: steps that had to be trained again after each interruption.
        left_running: machines that nobody ended.
        untagged: machines without the run's or the job's tags.
        unwritten: machines that are not both in the bill and, from beginning to end, in the journal.
        templates: launch templates that are left over.
        spent_usd: dollars by the journal, for each machine.
        charged_usd: dollars by the cloud, for each machine.
    """

    sha256: str
    sha256_twin: str
    losses_equal: bool
    final_step: int
    pools: list[Pool]
    reasons: list[str]
    lost: list[int]
    left_running: list[str]
    untagged: list[str]
    unwritten: list[str]
    templates: int
    spent_usd: list[float]
    charged_usd: list[float]

    @property
    def identical(self) -> bool:
        """The interrupted training and the undisturbed one are the same."""
        return self.sha256 == self.sha256_twin and self.losses_equal

    @property
    def is_good(self) -> bool:
        """And nothing was left behind."""
        return self.identical and not (self.left_running or self.untagged or self.unwritten or self.templates)


class Story:
    """Plays acts. ``with`` ends whatever is left of it.

    Args:
        folder: an empty one, for everything.
        s3: a running server.
        script: what is trained.
        acts: in order.
        speed: so many times shorter than in life are the waits of ``--watch``.
        say: is told what happens, line by line.
        twin: where the script has been left in peace already; None trains that, too, meanwhile.
    """

    def __init__(
        self,
        folder: Path,
        s3: SeaweedFS,
        script: Script,
        acts: Sequence[Act],
        *,
        speed: float,
        say: Callable[[str], None],
        twin: Path | None = None,
    ) -> None:
        self.twin = twin or folder
        self.folder, self.s3, self.script, self.acts, self.speed, self.say = folder, s3, script, acts, speed, say
        self.machines: list[str] = []
        self._watcher: psutil.Popen | None = None
        self._watchers = 0

    def __enter__(self) -> Story:
        with ExitStack() as stack:
            machines = self.folder / "machines"
            machines.mkdir()
            market = Market(self.now() - timedelta(days=2))
            self.cloud = SpotCloud(machines, s3=self.s3, market=market, now=self.now, environment=_THREADS, say=self.say)
            stack.enter_context(self.cloud)
            self.cloud.make_instance_profile("trains")
            bucket = self.s3.make_bucket(f"spotcloud-{os.getpid()}-{time.monotonic_ns()}")
            stack.enter_context(patch.dict(os.environ, {**self.cloud.env(), **_THREADS}))
            self.run = Run(f"s3://{bucket}/runs/tiny")
            (self.folder / "job.yaml").write_text(self._job())
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def now(self) -> datetime:
        """The cloud's clock."""
        return utc_now()

    def play(self) -> Outcome:
        """From the job file to the bill."""
        twin = self._start_twin()
        self.cloud.market.close()
        self._open(self.acts[0])
        self._start_watcher()
        for act, next_ in zip(self.acts, [*self.acts[1:], None], strict=True):
            self._play(act, next_)
        assert self._watcher is not None and self._watcher.wait(_GIVE_UP_S) == 0, self.text()
        assert twin is None or twin.wait(_GIVE_UP_S) == 0, (self.folder / "twin.log").read_text()
        return self._compare()

    def play_weather(self, changes: Sequence[Change]) -> Outcome:
        """The same, with machines that come and go as a seed has it, and not when a step is reached."""
        twin = self._start_twin()
        self.cloud.market.close()
        for pool in {change.pool for change in changes}:
            self.cloud.market.open(pool.instance_type, pool.zone, pool.market)
        self.cloud.play(changes)
        self._start_watcher()
        assert self._watcher is not None and self._watcher.wait(_GIVE_UP_S) == 0, self.text()
        assert twin is None or twin.wait(_GIVE_UP_S) == 0, (self.folder / "twin.log").read_text()
        self.machines = [name for name in self.cloud.machines if self._losses(name)]
        return self._compare()

    def text(self) -> str:
        """What everybody said, for when something is wrong."""
        logs = [f"--- {path.name}\n{path.read_text(errors='replace')}" for path in sorted(self.folder.glob("*.log"))]
        return "\n".join([*logs, *(f"=== {name}\n{machine.text()}" for name, machine in self.cloud.machines.items())])

    # -- acts ---------------------------------------------------------------------------------------------------------

    def _play(self, act: Act, next_: Act | None) -> None:
        self._wait_for(lambda: len(self.cloud.machines) > len(self.machines), "a machine")
        name = list(self.cloud.machines)[-1]
        self.machines.append(name)
        if act.until is None:
            return
        until = act.until
        self._wait_for(lambda: max(self._losses(name), default=0) >= until, f"step {until}")
        price = self.cloud.market.price(act.pool, self.cloud.now())
        self.cloud.market.set_price(act.pool, round(price * 1.3, 4), self.cloud.now())
        if act.watcher == WHILE_IT_TRAINS:
            self._kill_watcher()
        assert next_ is not None
        held = self.cloud.api.hold_launch() if next_.watcher == BEFORE_IT_HEARS else None
        self._open(next_)
        self._interrupt(act, name)
        if act.watcher == WHILE_IT_TRAINS:
            self._start_watcher()
        if held is not None:
            self._wait_for(held.reached.is_set, "a launch")
            self._kill_watcher()
            held.go_on.set()
            self._start_watcher()

    def _interrupt(self, act: Act, name: str) -> None:
        ended = self._endings()
        if act.how == NOTICE:
            assert self.cloud.reclaim(act.pool, 120) == [name]
            self._wait_for(lambda: self._endings() > ended, "the training to say that it was preempted")
            self.cloud.take(name)
        elif act.how == SILENCE:
            assert self.cloud.reclaim(act.pool) == [name]
        else:
            self.cloud.market.close(act.pool.instance_type, act.pool.zone, act.pool.market)
            self.cloud.client(region=act.pool.region).terminate_instances(InstanceIds=[name])
            self._wait_for(lambda: name not in self.cloud.running(), "the end of a machine")
            assert self._endings() > ended, self.text()
        newest = self.run.latest()
        committed = newest.step if newest else 0
        done = max(self._losses(name))
        self.say(f"story: {name} was taken {act.how} at step {done}; step {committed} is committed")

    def _open(self, act: Act) -> None:
        self.cloud.market.open(act.pool.instance_type, act.pool.zone, act.pool.market)
        self.say(f"story: only {act.pool} has machines now")

    def _endings(self) -> int:
        return sum(entry.kind == "preempted" for entry in self.run.events())

    def _losses(self, machine: str) -> dict[int, Any]:
        return _read(self.cloud.machines[machine].folder / "losses.jsonl")

    def _wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Until it holds; what can't happen any more fails at once."""

        def holds() -> bool:
            if condition():
                return True
            assert self._watcher is None or self._watcher.poll() is None, f"--watch ended before {what}:\n{self.text()}"
            assert not self.cloud.broken, self.cloud.broken
            return False

        try:
            wait_for(holds, f"for {what}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()}") from error

    # -- processes ----------------------------------------------------------------------------------------------------

    def _start_watcher(self) -> None:
        self._watchers += 1
        arguments = ["provision", str(self.folder / "job.yaml"), "--watch"]
        command = [sys.executable, "-m", "tests.spotcloud.hurry", str(self.speed), *arguments]
        self.say(f"story: hf-spot {' '.join(arguments)}")
        self._watcher = self._start(command, f"watch-{self._watchers}")

    def _kill_watcher(self) -> None:
        assert self._watcher is not None
        kill(self._watcher)
        self.say("story: --watch is killed")
        self._watcher = None

    def _start_twin(self) -> psutil.Popen | None:
        if self.twin != self.folder:
            return None
        return self._start([sys.executable, *self.script.arguments(self.folder)], "twin")

    def _start(self, command: Sequence[str], name: str) -> psutil.Popen:
        with open(self.folder / f"{name}.log", "wb") as out:
            process = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=ROOT, start_new_session=True)
        self.stack.callback(kill, process)
        return process

    def _job(self) -> str:
        script = [*self.script.arguments(guest.HOST), *self.script.slower]
        return f"""\
name: tiny
store: {self.run.url}
run: {shlex.join(["hf-spot", "launch", "--num_processes", "1", *script])}
region: {PREFERRED}
max_spend: 100
instance_profile: trains
disk_gb: 100
tags: {{team: tests}}
ladder:
{_LADDER}"""

    # -- the end ------------------------------------------------------------------------------------------------------

    def _compare(self) -> Outcome:
        final = self.run.pull(self.folder)
        twin = _read(self.twin / "losses.jsonl")
        losses = [self._losses(name) for name in self.machines]
        seen = {step for one in losses for step in one}
        equal = seen == twin.keys() and all(line == twin[step] for one in losses for step, line in one.items())
        entries = [entry.data for entry in self.run.events() if entry.kind == "machine"]
        started = {one["machine"]["instance_id"] for one in entries if one["event"] == "started"}
        ended = {one["machine"]["instance_id"]: one["machine"]["cost_usd"] for one in entries if one["event"] == "ended"}
        stays = self.cloud.bill.stays
        tags = {name: {tag["key"]: tag["value"] for tag in self.cloud.instance(name).get_tags()} for name in stays}
        regions = {stay.pool.region for stay in stays.values()}
        templates = [self.cloud.client(region=region).describe_launch_templates()["LaunchTemplates"] for region in regions]
        return Outcome(
            sha256=_sha256(final / "model.safetensors"),
            sha256_twin=_sha256(self.twin / "out" / "final" / "model.safetensors"),
            losses_equal=equal,
            final_step=max(seen),
            pools=[stay.pool for stay in stays.values()],
            lost=[max(one) - min(other) + 1 for one, other in pairwise(losses)],
            reasons=[stay.reason for stay in stays.values()],
            left_running=self.cloud.running(),
            untagged=[name for name in stays if tags[name].get(RUN_TAG) != self.run.url or tags[name].get("team") != "tests"],
            unwritten=sorted(stays.keys() ^ (started & ended.keys())),
            templates=sum(map(len, templates)),
            spent_usd=[ended.get(name, 0.0) for name in stays],
            charged_usd=[stay.charged(self.cloud.market, self.cloud.now()) for stay in stays.values()],
        )


def _read(path: Path) -> dict[int, Any]:
    """Lines by step; one that is being written doesn't count yet."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return {line["step"]: line for line in lines}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
