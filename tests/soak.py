"""``python -m tests.soak``: one training of two ranks over a store in trouble, interrupted again and again, and its twin.

Prints what was done and what came of it, and ends with 1 unless the two models are the same to the bit and every step of every
launch was the twin's. The seed gives the interruptions and the store's trouble; when exactly they come depends on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tqdm import tqdm

from hf_spot.run.run import Run
from tests.hostile import Hostile
from tests.launch.conftest import Launch, Launcher
from tests.servers import SeaweedFS

URL = "s3://tests/soak"
RANKS = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
FAILING = 0.05  # share of the store's requests
HANG_S = 90.0


class Soak:
    """The interruptions of one run, and what they did."""

    def __init__(self, launcher: Launcher, store: Hostile, steps: list[str], seed: int) -> None:
        self.launcher, self.store, self.steps = launcher, store, steps
        self.chance = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.launches = 0
        self.wrong: list[str] = []
        self.notice = launcher.tmp_path / "notice"
        self.gentle: dict[str, Callable[[Launch], None]] = {
            "an advisory": self.advise,
            "a notice that is taken back": self.take_back,
            "a second without the store": self.outage,
            "a rank that freezes for half a second": self.freeze,
            "a rank that is killed": self.kill_rank,
        }
        self.final: dict[str, Callable[[Launch], int]] = {
            "a notice": self.give_notice,
            "SIGTERM": lambda launch: self.end(launch, signal.SIGTERM),
            "kill -9 of everything": self.kill_all,
        }

    def start(self) -> Launch:
        """The same command on a fresh machine."""
        self.notice.unlink(missing_ok=True)
        self.launches += 1
        options = [*RANKS, "--notice", f"file:{self.notice}", "--max-restarts", "5"]
        env = {"AWS_ENDPOINT_URL": self.store.endpoint}
        return self.launcher.plain(URL, *self.steps, options=options, env=env)

    def advance(self, launch: Launch, lines: int) -> bool:
        """Waits until so many more steps are done; False when the launch ended before."""
        wanted, give_up_at = len(launch.lines()) + lines, time.monotonic() + HANG_S
        while launch.process.poll() is None:
            if len(launch.lines()) >= wanted:
                return True
            if time.monotonic() > give_up_at:
                raise SystemExit(f"a hang after {dict(self.done)}:\n{launch.text()}")
            time.sleep(0.02)
        return False

    def interrupt(self, launch: Launch) -> None:
        """Some gentle ones, and one that ends the launch."""
        for name in self.chance.sample(sorted(self.gentle), self.chance.randint(1, 3)):
            if not self.advance(launch, self.chance.randint(1, 6)):
                return self.check(launch, launch.wait())
            self.gentle[name](launch)
            self.done[name] += 1
        if not self.advance(launch, self.chance.randint(1, 12)):
            return self.check(launch, launch.wait())
        name = self.chance.choice(sorted(self.final))
        self.done[name] += 1
        return self.check(launch, self.final[name](launch))

    def check(self, launch: Launch, code: int) -> None:
        """How it ended is one of the ways that a user can go on from."""
        if code not in (0, 75, -signal.SIGKILL):
            self.wrong.append(f"launch {self.launches} ended with {code}: {launch.log}")

    def advise(self, launch: Launch) -> None:
        self.notice.write_text(json.dumps({"kind": "ADVISORY", "id": str(self.done.total())}))

    def take_back(self, launch: Launch) -> None:
        self.notice.write_text("")
        self.notice.unlink()

    def outage(self, launch: Launch) -> None:
        self.store.rate = 1.0
        time.sleep(1)
        self.store.rate = FAILING

    def freeze(self, launch: Launch) -> None:
        rank = self.chance.choice(ranks(launch) or [launch.process])
        rank.suspend()
        time.sleep(0.5)
        rank.resume()

    def kill_rank(self, launch: Launch) -> None:
        for rank in ranks(launch)[-1:]:
            rank.kill()

    def give_notice(self, launch: Launch) -> int:
        self.notice.write_text(json.dumps({"kind": "TERMINATE", "deadline_s": 60}))
        return launch.wait()

    def end(self, launch: Launch, number: int) -> int:
        launch.process.send_signal(number)
        return launch.wait()

    def kill_all(self, launch: Launch) -> int:
        launch.kill_tree()
        return -signal.SIGKILL


def ranks(launch: Launch) -> list[psutil.Process]:
    found = []
    for process in launch.tree():
        try:
            if "RANK" in process.environ():
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.pid)


def soak(folder: Path, interruptions: int, seed: int) -> dict[str, object]:
    """Runs it; the counts."""
    began = time.monotonic()
    steps = ["--epochs", str(max(4, interruptions)), "--step_s", "0.1", "--save_steps", "5"]
    with SeaweedFS() as server, Hostile(server.endpoint, seed, FAILING) as store, pytest.MonkeyPatch.context() as patch:
        server.make_bucket("tests")
        for name, value in server.env().items():
            patch.setenv(name, value)
        launcher = Launcher(folder)
        peace = launcher.plain(str(folder / "peace"), *steps, options=RANKS)
        assert peace.process.wait() == 0, peace.text()
        undisturbed, twin = launcher.weights(), {line["step"]: line for line in peace.lines()}
        run = Run(URL)
        one = Soak(launcher, store, steps, seed)
        lost_commits = wrong_resumes = 0
        with tqdm(total=interruptions, desc="interruptions", disable=not sys.stderr.isatty()) as shown:
            while True:
                newest = run.latest()
                launch = one.start()
                if one.done.total() < interruptions:
                    one.interrupt(launch)
                else:
                    one.check(launch, launch.process.wait())
                shown.update(min(one.done.total(), interruptions) - shown.n)
                committed = newest.step if newest else 0
                lines = launch.lines()
                wrong_resumes += bool(lines) and lines[0]["step"] != committed + 1
                one.wrong += [f"launch {one.launches}: {line}" for line in lines if line != twin[line["step"]]]
                now = run.latest()
                lost_commits += (now.step if now else 0) < committed
                if run.state().ended == "finished" or one.wrong:
                    break
        identical = not one.wrong and launcher.weights() == undisturbed
        damaged = sum(bool(problems) for problems in run.verify().values())
    return {
        "interruptions": one.done.total(),
        "kinds": dict(one.done),
        "launches": one.launches,
        "requests that failed": store.faults.total(),
        "kinds of failures": dict(store.faults),
        "steps": len(twin),
        "commits lost": lost_commits,
        "wrong resumes": wrong_resumes,
        "damaged checkpoints": damaged,
        "wrong": one.wrong[:5],
        "identical": identical,
        "seconds": round(time.monotonic() - began),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--interruptions", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave everything that was written there")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="hf_spot-soak-") as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(exist_ok=True)
        found = soak(folder, options.interruptions, options.seed)
    print(json.dumps(found, indent=1))
    zero = ("commits lost", "wrong resumes", "damaged checkpoints")
    return int(not found["identical"] or any(found[name] for name in zero) or bool(found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
