"""Three machines of the local spot cloud that really train together, kept in number by ``hf-spot provision --watch``."""

from __future__ import annotations

import json
import math
import os
import random
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from hf_spot.cloud.ec2 import RUN_TAG
from hf_spot.cloud.ending import AT_MOST
from hf_spot.cloud.ledger import Ledger, Machine, fold
from tests.elastic.story import TRAIN, Told, told, undisturbed
from tests.servers import SeaweedFS
from tests.spotcloud import guest
from tests.spotcloud.hurry import faster
from tests.spotcloud.market import ON_DEMAND, SPOT, Pool, Stay
from tests.spotcloud.story import LARGE, Script, Story

A, B = "us-east-1a", "us-east-1b"
_TWO_AT_ONCE = 1  # of the interruptions
_SLOW = ("--step_s", "0.5")
_THREADS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


class MachinesStory(Story):
    """Plays interruptions; ``with`` ends whatever is left.

    Args:
        folder: an empty one.
        s3: a running server.
        interruptions: how many.
        seed: of who is taken, and how.
        say: is told what happens, line by line.
    """

    def __init__(self, folder: Path, s3: SeaweedFS, interruptions: int, seed: int, say: Callable[[str], None]) -> None:
        self.began_s = time.time()
        self.epochs = math.ceil((interruptions * 9 + 8) / 10)  # of ten steps
        words = ("--epochs", str(self.epochs), "--save_steps", "4", "--save_on_each_node")
        paths = (str(TRAIN), "--output_dir", "{folder}/out", "--diary", "{folder}/losses.jsonl")
        super().__init__(folder, s3, Script((*paths, *words), slower=_SLOW), (), speed=20, say=say, twin=folder / "nowhere")
        self.interruptions, self.dice = interruptions, random.Random(seed)
        self.bill: list[str] = []

    def now(self) -> datetime:
        """A clock that runs as much faster as the waits are shorter: a first hour may be free."""
        return faster(self.began_s, self.speed)

    def _start(self, command: Sequence[str], name: str) -> psutil.Popen:
        with patch.dict(os.environ, {"SPOTCLOUD_BEGAN": str(self.began_s)}):
            return super()._start(command, name)

    def play_machines(self) -> dict[str, Any]:
        """From the job file to the bill: what came of it, by name."""
        market = self.cloud.market
        market.close()
        market.limit(3, LARGE, A, SPOT)
        self._start_watcher()
        for place in range(self.interruptions):
            self._wait_for(lambda: len(self._trains()) >= 2, "a launch of several machines")
            if place == _TWO_AT_ONCE:  # one must be left, or come: with the one that is to be had then, they are enough
                self._wait_for(lambda: len(self.cloud.running()) >= 3, "three machines")
            at = max(self._steps(), default=0)
            self._wait_for(lambda at=at: max(self._steps(), default=0) >= at + 2, f"step {at + 2}")  # type: ignore[misc]
            self._act(place)
        assert self._watcher is not None and self._watcher.wait(1200) == 0, self.text()
        return self._balance()

    def _act(self, place: int) -> None:
        spot = [name for name in self.cloud.running() if self.cloud.bill.stays[name].pool.market == SPOT]
        name = self.dice.choice(spot or self.cloud.running())
        market = self.cloud.market
        for zone in (A, B):
            market.set_price(Pool(LARGE, zone), round(self.dice.uniform(6, 9.5), 4), self.cloud.now())
        if place == _TWO_AT_ONCE:  # and only the full price is to be had
            market.close()
            market.limit(1, LARGE, A, ON_DEMAND)
            self.cloud.take(next(one for one in spot if one != name))
        if place == 2:
            market.limit(3, LARGE, A, SPOT)
        if place == 5:  # nobody has machines, until later: who is left trains on
            market.close()
            self._late = threading.Timer(15.0, market.limit, (3, LARGE, B, SPOT))
            self._late.start()
            self.stack.callback(self._late.cancel)
        if place == 8:  # one zone again, the cheaper one
            market.close()
            market.limit(3, LARGE, A, SPOT)
        if place == 3:  # all at once, and only another zone has machines
            market.close()
            market.limit(3, LARGE, B, SPOT)
            for one in self.cloud.running():
                self.cloud.take(one)
            self.say(f"story: all machines are taken at step {max(self._steps())}")
        elif place % 2 == 0:
            self.cloud.give_notice(name, 20)
            self.say(f"story: {name} is given a notice at step {max(self._steps())}")
            self._wait_for(lambda: name not in self.cloud.running(), "the end of a machine")
        else:
            self.cloud.take(name)
            self.say(f"story: {name} is taken without a word at step {max(self._steps())}")
        if place in (0, self.interruptions // 2):
            self._kill_watcher()
            self._start_watcher()

    def _trains(self) -> list[str]:
        """The machines that run and have made a step in the last seconds."""
        now = time.time()
        found = []
        for name in self.cloud.running():
            steps = [one for one in self._lines(name) if "step" in one]
            found += [name] if steps and now - steps[-1]["at"] < 5 else []
        return found

    def _steps(self) -> list[int]:
        return [one["step"] for name in list(self.cloud.machines) for one in self._lines(name) if "step" in one]

    def _lines(self, name: str) -> list[dict[str, Any]]:
        if name not in self.cloud.machines:
            return []  # it boots
        path = self.cloud.machines[name].folder / "losses.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def _job(self) -> str:
        script = [*self.script.arguments(guest.HOST), *self.script.slower]
        launch = ["hf-spot", "launch", "--num_processes", "1", "--peer-timeout-s", "10", *script]
        rungs = [f"  - {{market: {market}, instance_types: [{LARGE}], regions: preferred}}" for market in (SPOT, ON_DEMAND)]
        return "\n".join(
            [
                "name: several",
                f"store: {self.run.url}",
                f"run: {shlex.join(launch)}",
                "region: us-east-1",
                "max_spend: 3000",
                "machines: 2:3",
                "instance_profile: trains",
                "tags: {team: tests}",
                "disk_gb: 8",
                "ladder:",
                *rungs,
            ]
        )

    def _ledger(self) -> Ledger:
        ledger = Ledger()
        for entry in self.run.events():
            ledger = fold(ledger, entry)
        return ledger

    def _balance(self) -> dict[str, Any]:
        words = ("--epochs", str(self.epochs), "--save_steps", "4")
        twin = undisturbed(self.folder, _THREADS, *words)
        lines = sorted(
            (line for name in self.cloud.machines for line in self._lines(name) if "logged" in line),
            key=lambda line: int(line["logged"]),
        )
        found: Told = told(lines)
        written = {one.instance_id: one for one in self._ledger().machines}
        stays = self.cloud.bill.stays
        now = self.cloud.now()
        charged = {name: stay.charged(self.cloud.market, now) for name, stay in stays.items()}
        tags = {name: {tag["key"]: tag["value"] for tag in self.cloud.instance(name).get_tags()} for name in stays}
        self.bill = [_line(written.get(name), stay, charged[name]) for name, stay in stays.items()]
        claims = [entry.data["machines"] for entry in self.run.events() if entry.kind == "claim"]
        client = self.cloud.client()
        return {
            "rates are equal": found.rates == twin.rates,
            "losses differ by": max(abs(found.losses[step] - twin.losses[step]) for step in twin.losses),
            "machines of each launch": claims,
            "pools": sorted({str(stay.pool) for stay in stays.values()}),
            "machines": len(stays),
            "left running": self.cloud.running(),
            "not in the journal": sorted(stays.keys() ^ {name for name, one in written.items() if one.ended}),
            "without tags": [
                name for name in stays if (tags[name].get(RUN_TAG), tags[name].get("team")) != (self.run.url, "tests")
            ],
            "security groups left": len(client.describe_security_groups()["SecurityGroups"]) - 1,
            "spent by the journal": round(sum(one.cost_usd or 0.0 for one in written.values()), 4),
            "charged by the cloud": round(sum(charged.values()), 4),
            "interruptions": self.interruptions,
            "watchers": self._watchers,
            "steps": max(self._steps()),
            "wrong by a cent": [name for name, usd in charged.items() if not _is_right(written.get(name), usd)],
            "ends known to the second": sum(not one.cost_bound for one in written.values()),
            "taken for nothing": sum(
                stay.pool == Pool(LARGE, A) and not stay.charged(self.cloud.market, now) for stay in stays.values()
            ),
        }


_LATE_H = 180 / 3600  # no later has the watcher seen the end of a machine, by the cloud's clock


def _is_right(machine: Machine | None, charged_usd: float) -> bool:
    """To the cent where the cloud tells when the machine ended; otherwise a bound, and a close one."""
    if machine is None or machine.cost_usd is None:
        return False
    if not machine.cost_bound:
        return abs(machine.cost_usd - charged_usd) < 0.005
    return machine.cost_bound == AT_MOST and -1e-6 <= machine.cost_usd - charged_usd < _LATE_H * (
        machine.on_demand_usd_per_hour or 0.0
    )


def _line(machine: Machine | None, stay: Stay, charged_usd: float) -> str:
    seconds = ((stay.ended or stay.began) - stay.began).total_seconds()
    told = "not in the journal" if machine is None else f"{machine.cost_bound or 'exactly':8} ${machine.cost_usd or 0.0:.4f}"
    return f"{stay.instance_id}  {stay.pool!s:<34}{seconds:>6.0f} s  charged ${charged_usd:.4f}  journal {told}  {stay.reason}"
