"""From kill -9 of a training process to its next step: ``python tests/benchmarks/restart.py [--rounds 3] [--json FILE]``.

A training of GPT-2's kind, tiny, on one rank and on two; its first rank is killed again and again, with warm spares and without
(``--warm-spares off``, fresh Pythons), each time only when the spares are ready. At the end the weights of both must be the
same bits. ``--machines`` also plays three machines that come and go, as launchers on this machine.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

SCRIPT = """
import json, os, time
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

def tell(what):
    with open("diary", "a") as file:
        print(json.dumps([what, time.time(), os.getpid()]), file=file)

class Diary(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        tell(state.global_step)
        while state.global_step % 10 == 7 and not os.path.exists(f"go-on-{state.global_step}"):
            time.sleep(0.01)

tell("script")
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=32, n_embd=64, n_layer=2, n_head=2))
rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 256, (200, 16))]
arguments = TrainingArguments(
    "out", max_steps=40, per_device_train_batch_size=2, save_steps=5, logging_strategy="no", report_to="none", use_cpu=True,
    disable_tqdm=True, save_total_limit=2,
)
trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Diary()])
trainer.train()
trainer.save_model("weights")
"""
IS_WARM = "a Python is kept warm for a restart"
PATIENCE_S = 300.0
_TRIES = 5


class Launch:
    """A launch in a folder of its own; every tenth step, from the seventh on, waits for a file."""

    def __init__(self, folder: Path, store: Path, ranks: int, warm: bool, more: list[str]) -> None:
        self.folder, self.warm = folder, warm
        folder.mkdir()
        (folder / "train.py").write_text(SCRIPT)
        several = ["--multi_gpu", "--main_process_port", "0"] if ranks > 1 else []
        options = more or [*several, "--num_processes", str(ranks)]
        command = [sys.executable, "-m", "hf_spot", "launch", "-v", "--store", str(store), *options]
        command += ["--warm-spares", "on" if warm else "off", "train.py"]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with open(folder / "log", "wb") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=subprocess.STDOUT)

    def diary(self) -> list[tuple[str | int, float, int]]:
        path = self.folder / "diary"
        return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []

    def text(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def wait_for(self, condition: object, what: str) -> None:
        until = time.monotonic() + PATIENCE_S
        while not condition():  # type: ignore[operator]
            if self.process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"waited in vain for {what}:\n{self.text()[-3000:]}")
            time.sleep(0.01)

    def kill_a_rank(self, number: int) -> float:
        """Kill the process that has written last, once it waits and its spares are ready. Seconds to the next step."""
        hold = number * 10 - 3
        self.wait_for(lambda: any(what == hold for what, _, _ in self.diary()), f"step {hold}")
        if self.warm:
            self.wait_for(lambda: self.text().count(IS_WARM) >= number, "the spare")
        known = {pid for _, _, pid in self.diary()}
        began = time.time()
        os.kill(self.diary()[-1][2], signal.SIGKILL)
        steps = functools.partial(_new_steps, self, known)
        self.wait_for(steps, "the next step")
        self.go_on(hold)
        return min(steps()) - began

    def go_on(self, step: int) -> None:
        """End the wait after a step."""
        (self.folder / f"go-on-{step}").touch()

    def finish(self) -> str:
        """Let it train to its end. The digest of its weights."""
        for step in range(7, 40, 10):
            self.go_on(step)
        if self.process.wait(PATIENCE_S) != 0:
            raise SystemExit(self.text()[-3000:])
        return hashlib.sha256((self.folder / "weights" / "model.safetensors").read_bytes()).hexdigest()


def _new_steps(launch: Launch, known: set[int]) -> list[float]:
    """When the steps of new processes ended."""
    return [at for what, at, pid in launch.diary() if pid not in known and what != "script"]


def of_one_machine(scratch: Path, ranks: int, rounds: int) -> dict[str, object]:
    seconds, digests = {}, {}
    for way in ("fresh", "warm"):
        launch = Launch(scratch / f"{way}-{ranks}", scratch / f"run-{way}-{ranks}", ranks, way == "warm", [])
        try:
            seconds[way] = [launch.kill_a_rank(number + 1) for number in range(rounds)]
            digests[way] = launch.finish()
        finally:
            _end(launch)
    if digests["fresh"] != digests["warm"]:
        raise SystemExit(f"{ranks} ranks: the weights differ: {digests}")
    found = {f"{way}_s": statistics.median(times) for way, times in seconds.items()}
    return {**found, "ratio": found["fresh_s"] / found["warm_s"], "sha256": digests["warm"]}


def of_three_machines(scratch: Path, lost: str) -> dict[str, object]:
    """Three launchers, each a machine of one process, of which one is killed with all that it has started: machine 0, so that
    the ranks of the others change, or the two others, so that machine 0 goes on alone."""
    found: dict[str, float] = {}
    for way in ("fresh", "warm"):
        least = 2 if lost == "machine 0" else 1
        launches = _three_machines(scratch, f"{way}-{lost.replace(' ', '-')}", way == "warm", least)
        try:
            main = next(launch for launch in launches if re.search(r"launch 1: ", launch.text()))
            gone = [launch for launch in launches if (launch is main) == (lost == "machine 0")]
            left = [launch for launch in launches if launch not in gone]
            known = {pid for one in launches for _, _, pid in one.diary()}
            used, began = _processor_s(left), time.time()
            for launch in gone:
                _end(launch)
            seen = []
            for launch in left:
                steps = functools.partial(_new_steps, launch, known)
                launch.wait_for(steps, "the next step")
                seen.append(min(steps()) - began)
            found[f"{way}_s"] = max(seen)
            if way == "warm" and (cold := [one.text() for one in left if "a fresh Python starts" in one.text()]):
                raise SystemExit(f"a spare was not taken:\n{cold[0][-3000:]}")
            now = _processor_s(left)
            found[f"{way}_processor_s"] = sum(now[pid] - used.get(pid, 0.0) for pid in now) / len(left)
        finally:
            for launch in launches:
                _end(launch)
    return {**found, "ratio": found["fresh_s"] / found["warm_s"]}


def _three_machines(scratch: Path, name: str, warm: bool, least: int) -> list[Launch]:
    """Three machines in their seventh step, with spares that are ready; all of them were there when the first launch began."""
    more = ["--num_machines", f"{least}:3", "--num_processes", "1"]
    for number in range(_TRIES):
        store = scratch / f"run-{name}-{number}"
        launches = [Launch(scratch / f"{name}-{number}-{machine}", store, 1, warm, more) for machine in range(3)]
        is_done = False
        try:
            launches[0].wait_for(lambda: any("launch 1: " in one.text() for one in launches), "the first launch")  # noqa: B023
            line = next(line for one in launches for line in one.text().splitlines() if "launch 1: " in line)
            if line.count(",") < 2:  # one was late, on a busy host
                continue
            for launch in launches:
                launch.wait_for(lambda one=launch: any(what == 7 for what, _, _ in one.diary()), "step 7")
                if warm:
                    launch.wait_for(lambda one=launch: IS_WARM in one.text(), "the spare")
            is_done = True
            return launches
        finally:
            if not is_done:
                for launch in launches:
                    _end(launch)
    raise SystemExit("three machines never began together: this host is too busy")


def _processor_s(launches: list[Launch]) -> dict[int, float]:
    """The processor time that each process of these launches has used."""
    found = {}
    for launch in launches:
        root = psutil.Process(launch.process.pid)
        for one in (root, *root.children(recursive=True)):
            try:
                times = one.cpu_times()
            except psutil.NoSuchProcess:
                continue
            found[one.pid] = times.user + times.system
    return found


def _end(launch: Launch) -> None:
    if launch.process.poll() is None:
        for one in [psutil.Process(launch.process.pid), *psutil.Process(launch.process.pid).children(recursive=True)]:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
        launch.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--machines", action="store_true", help="three machines, too")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    found: dict[str, dict[str, object]] = {}
    print("kill -9 of a rank to its next step     fresh Pythons   warm spares")
    with tempfile.TemporaryDirectory(prefix="hf_spot-restart-") as scratch:
        for ranks in options.ranks:
            found[f"{ranks}_ranks"] = one = of_one_machine(Path(scratch), ranks, options.rounds)
            print(
                f"{ranks} rank{'s' if ranks > 1 else ' '}, same weights        {one['fresh_s']:20.2f} s {one['warm_s']:11.2f} s"
                f"   {one['ratio']:.1f} times as fast",
                flush=True,
            )
        if options.machines:
            for lost in ("machine 0", "two others"):
                found[f"without {lost}"] = one = of_three_machines(Path(scratch), lost)
                print(
                    f"three machines, of which {lost:10} {one['fresh_s']:12.2f} s {one['warm_s']:11.2f} s"
                    f"   {one['ratio']:.1f} times as fast\n"
                    f"  processor time of each one left {one['fresh_processor_s']:7.2f} s {one['warm_processor_s']:11.2f} s",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
