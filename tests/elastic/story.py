"""Machines as network namespaces, with disks of their own, that come and go in one training; and what came of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from hf_spot.run.run import Run
from tests.hosts import Hosts, kill
from tests.waiting import wait_for
from tests.zygote import Zygote

TRAIN = Path(__file__).with_name("train.py")
PEER_TIMEOUT_S = 5
_HOSTED = re.compile(r"launch (\d+): ")
PATIENCE_S = 300.0
END_S = 1800.0  # of a long training, once nothing slows it down


@dataclass
class Cluster:
    """Starts and ends launchers on hosts."""

    hosts: Hosts
    url: str
    env: Mapping[str, str]
    options: Sequence[str]
    zygote: Zygote | None = None
    script: Sequence[str] = ()
    running: dict[int, psutil.Popen] = field(default_factory=dict)
    started: int = 0

    def start(self, *hosts: int) -> None:
        for host in hosts:
            self.started += 1
            diary = f"diary-{self.started}"
            words = ["--store", self.url, "--peer-timeout-s", PEER_TIMEOUT_S, "--notice", "signal", *self.options]
            command = [sys.executable, "-m", "hf_spot", "launch", *map(str, words), str(TRAIN)]
            command += ["--output_dir", "out", "--diary", diary, *self.script]
            env = {**self.env, "XDG_CACHE_HOME": str(self.hosts.folder(host) / "cache")}
            env["HF_SPOT_MACHINE"] = json.dumps({"instance_id": f"machine {host + 1}", "price_usd_per_hour": 1.0 + host})
            with open(self.hosts.folder(host) / f"log-{self.started}", "wb") as out:
                streams = {"stdout": out, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
                self.running[host] = self.hosts.start(host, command, env, self.zygote, **streams)

    def kill(self, host: int) -> float:
        """kill -9 of all that runs there. Returns the time."""
        at = time.time()
        kill(self.running.pop(host))
        return at

    def notice(self, host: int) -> psutil.Popen:
        self.running[host].send_signal(signal.SIGTERM)
        return self.running.pop(host)

    def wait(self) -> dict[int, int]:
        return {host: process.wait(END_S) for host, process in self.running.items()}

    def lines(self, host: int | None = None) -> list[dict[str, Any]]:
        folders = [self.hosts.folder(one) for one in (range(self.hosts.count) if host is None else [host])]
        paths = sorted(path for folder in folders for path in folder.glob("diary-*"))
        return [json.loads(line) for path in paths for line in path.read_text().splitlines(True) if line.endswith("\n")]

    def steps(self) -> list[dict[str, Any]]:
        """In the order of time."""
        return sorted((line for line in self.lines() if "step" in line), key=lambda line: float(line["at"]))

    def wait_for_step(self, step: int, *, ranks: int | None = None, after: float = 0.0) -> float:
        """Returns when a step from this one on has ended, among so many ranks, after a time."""

        def found() -> list[float]:
            return [
                line["at"]
                for line in self.steps()
                if line["step"] >= step and line["at"] > after and ranks in (None, line["ranks"])
            ]

        def may_stop() -> bool:
            return bool(found()) or any(process.poll() is not None for process in self.running.values())

        wait_for(may_stop, f"for step {step} of {ranks} ranks: {self.text()}")
        assert found(), self.text()
        return min(found())

    def training(self) -> list[int]:
        """The hosts that train in the newest launch: a spare that waits has processes as well, which are kept warm."""
        newest = f"launch {self.run().state().launch} of "
        return [host for host in self.running if newest in self.newest_log(host).read_text(errors="replace")]

    def main(self) -> int:
        """The host that is machine 0 of the newest launch."""
        return max(self.running, key=self._newest_hosted)

    def _newest_hosted(self, host: int) -> int:
        log = self.newest_log(host).read_text(errors="replace")
        return max((int(number) for number in _HOSTED.findall(log)), default=0)

    def newest_log(self, host: int) -> Path:
        return max(self.hosts.folder(host).glob("log-*"), key=lambda path: int(path.name.removeprefix("log-")))

    def text(self) -> str:
        return "\n".join(
            f"--- host {host}, {path.name}\n{path.read_text(errors='replace')}"
            for host in range(self.hosts.count)
            for path in sorted(self.hosts.folder(host).glob("log-*"))
        )

    def run(self) -> Run:
        return Run(self.url)


@dataclass(frozen=True)
class Told:
    """A training: what its steps saw, and what it logged."""

    samples: dict[int, list[int]]
    losses: dict[int, float]
    rates: dict[int, float]


def told(lines: Sequence[Mapping[str, Any]]) -> Told:
    """What the last launch that made a step has told of it: all earlier ones were lost, or interrupted."""
    seen: dict[int, list[int]] = defaultdict(list)
    losses, rates = {}, {}
    for line in lines:
        if "in" in line:
            seen[line["in"]] += line["samples"]
        elif "logged" in line:
            losses[line["logged"]], rates[line["logged"]] = line["loss"], line["rate"]
    return Told({step: sorted(found) for step, found in seen.items()}, losses, rates)


def merged(cluster: Cluster) -> tuple[Told, int]:
    """What a disturbed training has told, each step once; and how many times a step was made again.

    The samples of a step that was made twice must be the same both times, apart from those of a machine that was killed in it.
    """
    rounds: dict[int, list[list[int]]] = defaultdict(list)
    per_diary = defaultdict(list)
    for host in range(cluster.hosts.count):
        for path in cluster.hosts.folder(host).glob("diary-*"):
            current: dict[int, list[int]] = {}
            newest = 0
            for text in path.read_text().splitlines(True):
                line = json.loads(text) if text.endswith("\n") else {}
                if "in" in line:
                    if line["in"] < newest:  # a later launch of this launcher begins
                        per_diary[path].append(current)
                        current = {}
                    newest = line["in"]
                    current.setdefault(line["in"], []).extend(line["samples"])
            per_diary[path].append(current)
    for launches in per_diary.values():
        for one in launches:
            for step, samples in one.items():
                rounds[step].append(samples)
    everything = told(cluster.lines())
    seen = {step: sorted(set().union(*map(set, found))) for step, found in rounds.items()}
    again = sum(max(0, _times(found) - 1) for found in rounds.values())
    return Told(seen, everything.losses, everything.rates), again


def _times(found: list[list[int]]) -> int:
    counts: dict[int, int] = defaultdict(int)
    for samples in found:
        for sample in samples:
            counts[sample] += 1
    return max(counts.values())


def undisturbed(folder: Path, env: Mapping[str, str], *script: str) -> Told:
    """The same training in one process, which nobody disturbs: six micro-batches of four samples make a step."""
    diary = folder / "twin"
    words = [str(TRAIN), "--output_dir", str(folder / "twin-out"), "--diary", str(diary), "--accumulation", "6", *script]
    done = subprocess.run([sys.executable, *words], env={**os.environ, **env}, capture_output=True, text=True, timeout=END_S)
    assert done.returncode == 0, done.stderr
    return told([json.loads(line) for line in diary.read_text().splitlines()])


def _other_samples(found: Told, twin: Told) -> str:
    steps = sorted(set(found.samples) | set(twin.samples))
    return "\n".join(
        f"step {step}: {found.samples.get(step)} instead of {twin.samples.get(step)}"
        for step in steps
        if found.samples.get(step) != twin.samples.get(step)
    )


def order_digest(training: Told) -> str:
    """A digest of the samples of each step."""
    return hashlib.sha256(json.dumps(sorted(training.samples.items())).encode()).hexdigest()[:16]


def compare(cluster: Cluster, twin: Told) -> tuple[float, int]:
    """Assert that each step saw the samples of the twin's, at its learning rate. Return the largest difference between two
    losses of a step, and how many steps were made again."""
    found, again = merged(cluster)
    assert order_digest(found) == order_digest(twin), _other_samples(found, twin)
    assert found.samples == twin.samples
    assert found.rates == twin.rates
    return max(abs(found.losses[step] - loss) for step, loss in twin.losses.items()), again
