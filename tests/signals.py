"""``python -m tests.signals``: random signals to random processes of a launch at random moments, again and again.

Each round is a launch of one, two or three ranks that resumes where the last one ended. It gets bursts of signals, each to
any number of its processes, from its first moment on. A round is `committed` when every step that it made is in the store,
`kept` when it was interrupted too early to say, and lost nothing that a commit was due for, and `lost` otherwise. It ends with
1 when any round is lost, or when any of the models that came of it is not that of a training in peace, to the bit. The seed
gives the signals; when exactly they come depends on the machine.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from tqdm import tqdm

from hf_spot.run.run import Run
from tests.launch.conftest import Launch, Launcher
from tests.zygote import Zygote

LISTS = ["", "SIGUSR2,SIGQUIT", "SIGHUP,SIGALRM,SIGRTMIN"]
ALWAYS = ["SIGTERM", "SIGHUP", "SIGINT"]
SAVE_STEPS = 5
ROUND_S = 300.0


class Fuzzer:
    """Launches of one number of ranks, and what signals did to them.

    Args:
        folder: for everything; must be empty.
        ranks: of each launch.
        chance: what is random.
        zygote: forks their Pythons; None starts fresh ones.
    """

    def __init__(self, folder: Path, ranks: int, chance: random.Random, zygote: Zygote | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.launcher = Launcher(folder, zygote=zygote)
        self.ranks = ["--multi_gpu", "--num_processes", str(ranks), "--main_process_port", "0"] if ranks > 1 else []
        self.chance = chance
        self.runs = 0
        self.weights: list[bytes] = []
        self.sent: Counter[str] = Counter()
        self._new_run()

    def _new_run(self) -> None:
        self.runs += 1
        self.store = str(self.launcher.tmp_path / f"run-{self.runs}")

    def round(self) -> tuple[str, str]:
        """Return what it came to, and where to read about it."""
        names = self.chance.choice(LISTS)
        options = [*self.ranks, *(["--signals", names] if names else [])]
        before = self._committed()
        workers = str(self.chance.choice([0, 2]))
        launch = self.launcher.plain(self.store, "--step_s", "0.15", "--workers", workers, options=options)
        try:
            told = self._disturb(launch, [*ALWAYS, *(names.split(",") if names else ["SIGUSR1"])])
            code = launch.process.wait(ROUND_S)
        except psutil.TimeoutExpired:
            return "lost", f"{told}: hangs: {launch.log}"
        finally:
            if launch.process.poll() is None:
                launch.kill_tree()
        made, committed = max(before, launch.step()), self._committed()
        due = max(before, made // SAVE_STEPS * SAVE_STEPS)
        if code < 0 and launch.text() == "":
            return "kept", str(launch.log)  # Python had not begun
        if code == 0:
            self.weights.append(self.launcher.weights())
            self._new_run()
        elif code != 75 or committed < due:
            return "lost", f"{told}: ended with {code}, {committed} of {made} steps are committed: {launch.log}"
        return "committed" if code == 0 or committed == made else "kept", str(launch.log)

    def _committed(self) -> int:
        newest = Run(self.store).state().latest()
        return newest.step if newest else 0

    def _disturb(self, launch: Launch, names: list[str]) -> list[str]:
        told = []
        first = True
        for _ in range(self.chance.randint(1, 3)):
            if first and self.chance.random() < 0.3:
                time.sleep(self.chance.uniform(0.0, 8.0))  # while it starts
            elif first:
                self._wait_for_steps(launch, self.chance.randint(0, 8))
            else:
                time.sleep(self.chance.expovariate(2.0))
            first = False
            name = self.chance.choice(names)
            tree = launch.tree()
            chosen = self.chance.choice([tree, self.chance.sample(tree, self.chance.randint(1, len(tree)))]) if tree else []
            for one in chosen:
                # Two of them to the launcher mean that nothing is waited for.
                number = signal.SIGTERM if name == "SIGINT" and one.pid == launch.process.pid else getattr(signal, name)
                try:
                    one.send_signal(number)
                except psutil.NoSuchProcess:
                    continue
            self.sent[name] += len(chosen)
            told.append(f"{name} to {len(chosen)} of {len(tree)}")
        return told

    @staticmethod
    def _wait_for_steps(launch: Launch, count: int) -> None:
        began, first = time.monotonic(), None
        while launch.process.poll() is None and time.monotonic() - began < ROUND_S:
            lines = launch.lines()
            first = first if first is not None or not lines else min(line["step"] for line in lines)
            if first is not None and launch.step() >= first + count:
                return
            time.sleep(0.05)


def fuzz(
    folder: Path, rounds: int, seed: int, ranks: tuple[int, ...] = (1, 2, 3), zygote: Zygote | None = None
) -> tuple[Counter[str], list[str]]:
    """Return how many rounds came to what, and what went wrong.

    Args:
        folder: for everything.
        rounds: number of launches.
        seed: of what is random.
        ranks: numbers of ranks.
        zygote: forks the Pythons of launches of several ranks; those of one rank are fresh.
    """
    chance = random.Random(seed)
    fuzzers = [Fuzzer(folder / f"of-{count}", count, chance, zygote if count > 1 else None) for count in ranks]
    came_to: Counter[str] = Counter()
    wrong = []
    for number in tqdm(range(rounds), disable=None):
        outcome, where = fuzzers[number % len(fuzzers)].round()
        came_to[outcome] += 1
        if outcome == "lost":
            wrong.append(where)
            print(where, file=sys.stderr, flush=True)
    for fuzzer in fuzzers:
        if len(set(fuzzer.weights)) > 1:
            wrong.append(f"models differ in {fuzzer.launcher.tmp_path}")
    return came_to, wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.signals", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept; default: one that is deleted")
    options = parser.parse_args()
    for one, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(one) is signal.SIG_IGN:
            signal.signal(one, usual)  # a shell and nohup ignore them in what they run in the background; launches would, too
    with tempfile.TemporaryDirectory(prefix="signals-") as scratch:
        came_to, wrong = fuzz(options.folder or Path(scratch), options.rounds, options.seed)
        print(f"{options.rounds} rounds: " + ", ".join(f"{came_to[name]} {name}" for name in ("committed", "kept", "lost")))
        print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
