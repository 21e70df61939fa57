"""``python -m tests.memory_tier``: kill -9 of a training process at random steps, and what is lost with copies in memory.

One launch trains while its store takes no checkpoint beyond the first one. A training process is killed at ten random steps,
with a save after each step or after each third one, on one rank and on two. After each kill the checkpoints on the disk are
deleted: only the memory of the machine has them. Each kill may cost what was done since the save before the newest one, whose
copy may have been under way. The model must be that of an undisturbed training, to the bit. Ends with 1 otherwise.

``--times`` compares instead how long it takes from a kill to the next step, in processor time of the new processes and by the
clock, with copies in memory whose folder is gone from the disk or still there, with those on the disk alone, and with the store
alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

from hf_spot import Run
from hf_spot.economics.report import summarise
from hf_spot.run.local_copies import recorded
from hf_spot.run.memory_copies import MemoryCopies
from tests.launch.conftest import SCRIPTS, Launch, Launcher, of_ranks
from tests.waiting import wait_for
from tests.zygote import Zygote

NO_MEMORY = ["--save-memory-gb", "0.000001"]
STEP_S = "0.3"  # so that copies are complete, as in trainings of a usual size
MEMORY, BOTH, DISK, STORE = "memory alone", "memory and disk", "disk alone", "store alone"


@dataclass
class Kill:
    """After which step a process was killed, and how long it took to the next step of a new one."""

    at: int
    took_s: float
    cpu_s: float


class Story:
    """One training.

    Args:
        folder: for everything.
        ranks: of the training.
        save_steps: steps from one save to the next.
        place: from where the killed training must resume.
        zygote: forks Pythons; None starts fresh ones.
        more: arguments of the script.
    """

    def __init__(
        self, folder: Path, ranks: int, save_steps: int, place: str, zygote: Zygote | None, more: Sequence[str] = ()
    ) -> None:
        folder.mkdir(parents=True)
        self.launcher = Launcher(folder, zygote=zygote)
        self.folder, self.ranks, self.save_steps, self.place, self.more = folder, ranks, save_steps, place, more
        self.store = folder / "run"
        self.out = folder / "out"

    def start(self, *more: str, **env: str) -> Launch:
        script = [SCRIPTS / "restless.py", "--output_dir", "out", "--weights", "weights", "--diary", "diary-1"]
        script += ["--save_steps", str(self.save_steps), "--epochs", str(2 * self.ranks), "--step_s", STEP_S, *self.more, *more]
        options = [
            "--notice",
            "none",
            "--cadence",
            "fixed",
            *of_ranks(self.ranks),
            *(NO_MEMORY if self.place in (DISK, STORE) else []),
            *(["--warm-spares", "off"] if self.launcher.zygote is None else []),  # their imports come before the kill
        ]
        launch = self.launcher.start(str(self.store), script, options=options, env=env)
        launch.output_dir = self.out
        return launch

    def kill(self, launch: Launch, step: int) -> Kill:
        """Kill a process of the training after a step, and wait until it has gone on."""
        launch.wait_for_step(step)
        victim = random.Random(step).choice(launch.trainings())
        lines, before, older = len(launch.lines()), time.time(), set(launch.tree())
        victim.kill()
        psutil.wait_procs([victim])
        if self.place in (MEMORY, STORE):
            for path in [*self.out.glob("checkpoint-*"), *self.out.glob(".hf_spot/whole-*")]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        wait_for(lambda: len(launch.lines()) > lines or launch.process.poll() is not None, launch.text())
        took_s, cpu_s = time.time() - before, 0.0
        for process in launch.tree()[1:]:
            with contextlib.suppress(psutil.Error):
                if process not in older:
                    cpu_s += sum(process.cpu_times()[:2])
        return Kill(step, took_s, cpu_s)

    def steps_lost(self) -> list[int | None]:
        """What each launch has lost, by the report."""
        return [one.steps_lost for one in summarise(Run(str(self.store)).events()).launches]

    def wait_for_commit(self, step: int) -> None:
        def is_committed() -> bool:
            return self.store.exists() and (newest := Run(str(self.store)).latest()) is not None and newest.step >= step

        wait_for(is_committed, f"for the commit of step {step}")

    def wait_for_record(self, step: int) -> None:
        wait_for(lambda: any(each >= step for each, _ in recorded(self.out)), f"for the record of step {step}")

    def wait_for_copy(self, launch: Launch, step: int) -> None:
        halves = [path for path in Path(f"/proc/{launch.process.pid}/fd").iterdir() if is_half(path)]
        with contextlib.closing(MemoryCopies(halves)) as memory:
            wait_for(lambda: any(one.copy.request.step >= step for one in memory.copies(None)), f"for the copy of step {step}")

    def weights(self) -> bytes:
        return (self.folder / "weights" / "model.safetensors").read_bytes()


def is_half(descriptor: Path) -> bool:
    try:
        return os.readlink(descriptor).startswith("/memfd:hf_spot ")
    except FileNotFoundError:
        return False


def lose(folder: Path, ranks: int, save_steps: int, kills: int, seed: int, zygote: Zygote) -> list[str]:
    """Play one row, print it, and return what is wrong."""
    twin, story = (Story(folder / name, ranks, save_steps, MEMORY, zygote) for name in ("twin", "killed"))
    undisturbed = twin.start("--step_s", "0")
    assert undisturbed.wait() == 0, undisturbed.text()
    last = undisturbed.step()
    again = story.folder / "again"
    launch = story.start(UPLOADS_UP_TO=str(save_steps), UPLOADS_AGAIN=str(again))
    first = 2 * save_steps  # what is not in memory before that is nowhere
    story.wait_for_commit(save_steps)
    steps = sorted(random.Random(seed).sample(range(first, last - save_steps), kills))
    for step in steps:
        story.kill(launch, step)
    again.touch()
    wrong = [] if launch.wait() == 0 else [f"the launch has failed: {launch.text()}"]
    *lost, last_lost = story.steps_lost()
    resumed = [int(found) for found in re.findall(r"resuming from step (\d+)", launch.text())]
    if (len(lost), last_lost, len(resumed)) != (kills, 0, kills):
        wrong.append(f"{len(lost)} launches were killed, and {len(resumed)} resumed")
    for step, start, steps_lost in zip(steps, resumed, lost, strict=False):
        if steps_lost is None or not max(0, step - start) <= steps_lost < 2 * save_steps:
            wrong.append(f"killed after step {step}, resumed from {start}, and the report tells of {steps_lost} lost steps")
    in_memory = launch.text().count("it is whole in this machine's memory")
    if not wrong and story.weights() != twin.weights():
        wrong.append("the model is another one")
    if in_memory < kills - 1:
        wrong.append(f"only {in_memory} of {kills} kills were followed by a resume from memory")
    told = " ".join(f"{step}:{steps_lost}" for step, steps_lost in zip(steps, lost, strict=False))
    outcome = "WRONG" if wrong else "the same model"
    print(f"{ranks} ranks, a save each {save_steps} steps: step:lost {told}; {in_memory} from memory; {outcome}", flush=True)
    return [f"{ranks} ranks, {save_steps}: {one}; see {folder}" for one in wrong]


def compare_times(folder: Path, ranks: int, kills: int, size_mb: int) -> None:
    """Print how long it takes from a kill to the next step."""
    for place in (MEMORY, BOTH, DISK, STORE):
        story = Story(folder / place.replace(" ", "-"), ranks, 5, place, None, ["--ballast_mb", str(size_mb)])
        up_to = {} if place == STORE else {"UPLOADS_UP_TO": "5", "UPLOADS_AGAIN": str(story.folder / "again")}
        launch = story.start(**up_to)
        told = []
        try:
            for number in range(1, kills + 1):
                step = 5 * number + 7
                launch.wait_for_step(step)
                saved = 5 * number + 5
                if place == STORE:
                    story.wait_for_commit(saved)
                elif place == DISK:
                    story.wait_for_record(saved)
                else:
                    story.wait_for_copy(launch, saved)
                told.append(story.kill(launch, step))
        finally:
            launch.kill_tree()
        took, cpu = median(one.took_s for one in told), median(one.cpu_s for one in told)
        lost = " ".join(str(one) for one in story.steps_lost()[:kills])
        print(f"{ranks} ranks, {size_mb} MB, {place:15}: {cpu:.2f} s of processor, {took:.2f} s, lost {lost}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.memory_tier", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--save-steps", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--mb", type=int, default=500, help="for --times: what a checkpoint has besides a small model")
    parser.add_argument("--folder", type=Path, help="kept; default: one that is deleted if nothing is wrong")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="memory-tier-"))
    wrong: list[str] = []
    if options.times:
        for ranks in options.ranks:
            compare_times(folder / f"times-{ranks}", ranks, min(options.kills, 3), options.mb)
    else:
        zygote = Zygote()
        for ranks in options.ranks:
            for save_steps in options.save_steps:
                place = folder / f"{ranks}-{save_steps}"
                wrong += lose(place, ranks, save_steps, options.kills, options.seed, zygote)
        zygote.close()
    print(*wrong, sep="\n")
    if options.folder is None and not wrong:
        shutil.rmtree(folder)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
