"""``python -m tests.hangs``: trainings that hang in ten ways, in real processes, on several machines, too; and trainings on a
crowded or frozen machine that don't.

Of each hang it is checked that the launch finds it, shows the line of the script that hangs, starts the training again and
finishes it; or, if it hangs after the same step again, ends with exit code 79 and both stacks. It takes half an hour.
``--only NAME…`` plays some of them. Machines are network namespaces, which need root.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from hf_spot.errors import EXIT_HUNG, EXIT_PREEMPTED
from hf_spot.run.journal import Entry
from hf_spot.run.run import Run
from hf_spot.runtime import WAITS_ON
from tests.hosts import Hosts, kill, why_not
from tests.launch.conftest import SCRIPTS, Launch, Launcher
from tests.waiting import PATIENCE_S, wait_for

SCRIPT = SCRIPTS / "hanging.py"
TWO = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
FOUND = "the training hangs after step"
TIMEOUT_S = 6
IN_HANG = r"hanging.py.*in hang|hang \(hanging.py"  # the second is py-spy's


class Story:
    """One run in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.launcher = Launcher(folder)
        self.folder = folder
        self.store = str(folder / "run")
        self.marker = folder / "marker"

    def start(self, *script: str, options: list[str] | None = None, timeout: str = str(TIMEOUT_S)) -> Launch:
        given = ["--hang-timeout", timeout, *(options or [])]
        return self.launcher.start(self.store, [SCRIPT, "--output_dir", str(self.folder / "out"), *script], options=given)

    def once(self, kind: str, *more: str, shows: str, options: list[str] | None = None) -> Launch:
        """A hang that does not come back: found, shown, and trained on."""
        launch = self.start("--hang", kind, "--once", str(self.marker), *more, options=options)
        code, text = launch.wait(), launch.text()
        assert code == 0, text
        assert text.count(FOUND) == 1, text
        assert re.search(shows, text), f"{shows} is not in\n{text}"
        hangs = [one for one in Run(self.store).events() if one.kind == "hang"]
        assert len(hangs) == 1 and re.search(shows, hangs[0].data["stacks"]), hangs
        assert Run(self.store).state().ended == "finished"
        return launch

    def again(self, kind: str, *more: str, shows: str, options: list[str] | None = None) -> None:
        """A hang that comes back after the same step: the launch ends for good, and so does one that is started later."""
        launch = self.start("--hang", kind, *more, options=options)
        code, text = launch.wait(), launch.text()
        assert code == EXIT_HUNG, (code, text)
        assert text.count(FOUND) == 2 and len(re.findall(shows, text)) >= 3, text  # two hangs, and the first once more
        assert [one.data["again"] for one in Run(self.store).events() if one.kind == "hang"] == [False, True]
        later = self.start("--hang", kind, *more, options=options)
        assert later.wait() == EXIT_HUNG and later.text().count(FOUND) == 1, later.text()


def worker(story: Story) -> None:
    story.once("worker", shows="wait_in_a_worker")


def callback(story: Story) -> None:
    story.again("callback", shows="spin_for_ever")


def lock(story: Story) -> None:
    story.once("lock", shows="deadlock")


def c_code(story: Story) -> None:
    story.once("c", shows=IN_HANG)


def c_code_with_the_gil(story: Story) -> None:
    story.once("gil", shows=IN_HANG)


def collective(story: Story) -> None:
    story.once("collective", shows="in barrier", options=TWO)


def evaluation(story: Story) -> None:
    launch = story.once("evaluation", shows="spin_for_ever")
    assert "evaluating" in launch.text()


def stopped(story: Story) -> None:
    """SIGSTOP of one rank of two."""
    launch = story.start("--step_s", "0.3", options=TWO)
    wait_for(lambda: "checkpoint-4 committed" in launch.text() or launch.process.poll() is not None)
    rank = next(one for one in launch.tree() if one.environ().get("RANK") == "1" and "bootstrap" in " ".join(one.cmdline()))
    rank.send_signal(signal.SIGSTOP)
    code, text = launch.wait(), launch.text()
    assert code == 0 and "rank 1 is stopped by a signal" in text and "is finished at step 12" in text, text


def died(story: Story) -> None:
    """A rank that dies without a word: its neighbour gets an error of gloo, and no hang comes of it."""
    launch = story.start("--hang", "dies", "--once", str(story.marker), options=TWO, timeout="20")
    code, text = launch.wait(), launch.text()
    assert "is finished at step 12" in text or FOUND in text, text
    assert code == 0, text


def restore(story: Story) -> None:
    """A store that does not answer during a restore."""
    assert story.start("--hang", "lock", options=["--max-restarts", "0"]).wait() == EXIT_HUNG
    shutil.rmtree(story.folder / "out")
    files = list(Path(story.store).rglob("*.safetensors"))
    for path in files:
        path.unlink()
        os.mkfifo(path)
    launch = story.start()
    code, text = launch.wait(), launch.text()
    assert code == EXIT_HUNG and "rank 0: restoring" in text and text.count(FOUND) == 2, (code, text)


def own_loop(story: Story) -> None:
    story.once("callback", "--loop", shows="spin_for_ever")


def own_loop_again(story: Story) -> None:
    story.again("lock", "--loop", shows="deadlock")


@contextlib.contextmanager
def crowd(busy: int) -> Iterator[None]:
    """So many processes that only compute."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        yield
    finally:
        for one in others:
            one.kill()
            one.wait()


def crowded(story: Story) -> None:
    """A machine with a load of 20, and a limit of a few seconds: no hang is found."""
    with crowd(10 * (os.cpu_count() or 2)):
        launch = story.start("--steps", "40", "--step_s", "0.2", options=TWO, timeout="20")
        code, text = launch.wait(), launch.text()
    assert code == 0 and FOUND not in text, text


def frozen(story: Story) -> None:
    """Launcher and ranks stopped together for longer than the limit, as a suspended laptop's: no hang is found."""
    launch = story.start("--steps", "30", "--step_s", "0.3")
    wait_for(lambda: "checkpoint-4 committed" in launch.text() or launch.process.poll() is not None)
    tree = launch.tree()
    for one in tree:
        one.send_signal(signal.SIGSTOP)
    time.sleep(3 * TIMEOUT_S)  # the length of the freeze is what is tried: nothing happens in it that could be awaited
    for one in tree:
        one.send_signal(signal.SIGCONT)
    code, text = launch.wait(), launch.text()
    assert code == 0 and FOUND not in text, text


def warm(story: Story) -> None:
    """After a hang the training goes on in the processes that were kept warm, and hangs there as in others."""
    options = ["--warm-spares", "on"]
    env = {"HF_SPOT_LOG_LEVEL": "debug"}
    script = [SCRIPT, "--output_dir", str(story.folder / "out"), "--hang", "lock", "--step_s", "0.5"]
    launch = story.launcher.start(story.store, script, options=["--hang-timeout", "40", *options], env=env)
    wait_for(lambda: "a Python is kept warm" in launch.text() or launch.process.poll() is not None, launch.text())
    spares = {one.pid for one in launch.tree() if is_a_spare(one)}
    wait_for(lambda: "resuming from step 4" in launch.text() or launch.process.poll() is not None, launch.text())
    assert spares & {one.pid for one in launch.tree()}, launch.text()
    code, text = launch.wait(), launch.text()
    assert code == EXIT_HUNG and text.count(FOUND) == 2 and "a fresh Python starts" not in text, (code, text)
    assert text.count("in deadlock") == 3, text


def is_a_spare(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return WAITS_ON in process.environ() and "hf_spot.training.bootstrap" in " ".join(process.cmdline())
    return False


# -- several machines -------------------------------------------------------------------------------------------------


class Machines:
    """One launch on several machines, with a run in a folder that all of them see."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.store, self.marker = str(folder / "run"), folder / "marker"
        self.running: list[psutil.Popen] = []

    def start(self, *script: str, elastic: str = "", timeout_s: int = TIMEOUT_S, options: list[str] | None = None) -> None:
        for host in range(self.hosts.count):
            words = ["--num_machines", elastic]
            if not elastic:
                count = str(self.hosts.count)
                words = ["--num_machines", count, "--machine_rank", str(host), "--num_processes", count, "--multi_gpu"]
                words += ["--main_process_ip", self.hosts.address(0), "--main_process_port", "29500"]
            words += ["--store", self.store, "--hang-timeout", str(timeout_s), "--peer-timeout-s", "8", *(options or [])]
            command = [sys.executable, "-m", "hf_spot", "launch", *words, str(SCRIPT), "--output_dir", "out", *script]
            env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(self.hosts.folder(host))}
            with self.log(host).open("wb") as out:
                streams = {"stdout": out, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
                self.running.append(self.hosts.start(host, command, env, **streams))

    def log(self, host: int) -> Path:
        return self.hosts.folder(host) / "log"

    def text(self) -> str:
        return "\n".join(f"--- host {host}\n{self.log(host).read_text()}" for host in range(self.hosts.count))

    def wait(self, *hosts: int) -> list[int]:
        return [self.running[host].wait(PATIENCE_S) for host in hosts or range(self.hosts.count)]

    def wait_for(self, text: str) -> None:
        wait_for(lambda: text in self.text() or any(one.poll() is not None for one in self.running), self.text())
        assert text in self.text(), self.text()

    def rank(self, host: int, rank: int) -> psutil.Process:
        """The process that trains."""
        for one in self.running[host].children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if one.environ().get("RANK") == str(rank) and "bootstrap" in " ".join(one.cmdline()):
                    return one
        raise AssertionError(self.text())

    def entries(self, kind: str) -> list[Entry]:
        return [one for one in Run(self.store).events() if one.kind == kind]

    def check_once(self, rank: int, shows: str) -> None:
        """All have trained on from the newest checkpoint, and one entry has the stacks of all."""
        assert self.wait() == [0] * self.hosts.count, self.text()
        [hang] = self.entries("hang")
        assert hang.data["rank"] == rank and hang.data["again"] is False, (hang, self.text())
        stacks = hang.data["stacks"]
        assert re.search(shows, stacks) and all(f"==== machine {one}" in stacks for one in (0, 1)), stacks
        assert len(hang.data["ranks"]) == 2 and stacks.count("(most recent call first)") >= 2, hang.data
        assert len(self.entries("claim")) == 2, self.text()
        assert [one.data["step"] for one in self.entries("resumed")] == [4], self.text()
        assert self.entries("finished"), self.text()

    def check_again(self) -> None:
        assert self.wait() == [EXIT_HUNG] * self.hosts.count, self.text()
        hangs = self.entries("hang")
        assert [one.data["again"] for one in hangs] == [False, True] and len(self.entries("claim")) == 2, self.text()
        assert all("in deadlock" in one.data["stacks"] for one in hangs), hangs


def machine_1(machines: Machines) -> None:
    """Rank 1, on machine 1, is in a deadlock; rank 0, on machine 0, waits for it in a collective."""
    machines.start("--hang", "lock", "--rank", "1", "--once", str(machines.marker))
    machines.check_once(1, "in deadlock")


def machine_1_again(machines: Machines) -> None:
    machines.start("--hang", "lock", "--rank", "1")
    machines.check_again()


def stopped_on_machine_1(machines: Machines) -> None:
    machines.start("--step_s", "0.3")
    machines.wait_for("checkpoint-4 committed")
    machines.rank(1, 1).send_signal(signal.SIGSTOP)
    assert machines.wait() == [0, 0], machines.text()
    [hang] = machines.entries("hang")
    assert (hang.data["rank"], hang.data["machine"]) == (1, 1), hang
    assert "rank 1 (machine 1) is stopped by a signal" in machines.text()


def worker_on_another_machine(machines: Machines) -> None:
    machines.start("--hang", "worker", "--once", str(machines.marker))
    assert machines.wait() == [0, 0], machines.text()
    [hang] = machines.entries("hang")
    assert "wait_in_a_worker" in hang.data["stacks"] and len(machines.entries("claim")) == 2, machines.text()


def died_on_machine_1(machines: Machines) -> None:
    """A rank of another machine is killed: both begin again, long before it would be taken for a hang."""
    machines.start("--step_s", "0.3", timeout_s=100)
    machines.wait_for("checkpoint-4 committed")
    machines.rank(1, 1).kill()
    assert machines.wait() == [0, 0], machines.text()
    assert machines.entries("hang") == [] and len(machines.entries("claim")) == 2, machines.text()


def cut_off(machines: Machines) -> None:
    """Machine 1 can't be reached any more: machine 0 does not wait for the collective, nor for a hang."""
    machines.start("--step_s", "0.3", timeout_s=100)
    machines.wait_for("checkpoint-4 committed")
    machines.hosts.unplug(1)
    began = time.monotonic()
    assert machines.wait(0) == [EXIT_PREEMPTED], machines.text()
    assert time.monotonic() - began < 60 and machines.entries("hang") == [], machines.text()
    kill(machines.running[1])


def elastic(machines: Machines) -> None:
    """Machines that come and go, of which one waits as a spare: those that hang begin again together."""
    machines.start("--hang", "lock", "--rank", "1", "--once", str(machines.marker), elastic="2:2")
    machines.check_once(1, "in deadlock")


def elastic_again(machines: Machines) -> None:
    """And end together, the spare with them."""
    machines.start("--hang", "lock", "--rank", "1", elastic="2:2")
    machines.check_again()
    assert "this machine ends as the others do" in machines.text()


def elastic_warm(machines: Machines) -> None:
    """They go on in the processes that were kept warm."""
    script = ["--hang", "lock", "--rank", "1", "--step_s", "0.5", "--once", str(machines.marker)]
    machines.start(*script, elastic="2:2", timeout_s=40, options=["--warm-spares", "on"])
    machines.check_once(1, "in deadlock")
    assert "a fresh Python starts" not in machines.text(), machines.text()


ON_MACHINES: dict[str, tuple[int, Callable[[Machines], None]]] = {
    one.__name__: (count, one)
    for count, one in (
        (2, machine_1),
        (2, machine_1_again),
        (2, stopped_on_machine_1),
        (2, worker_on_another_machine),
        (2, died_on_machine_1),
        (2, cut_off),
        (3, elastic),
        (3, elastic_again),
        (2, elastic_warm),
    )
}


def on_machines(name: str) -> Callable[[Story], None]:
    """The story, on machines of its own."""

    def played(story: Story) -> None:
        count, one = ON_MACHINES[name]
        with Hosts(count, story.folder) as hosts:
            one(Machines(hosts, story.folder))

    return played


STORIES: dict[str, Callable[[Story], None]] = {
    one.__name__: one
    for one in (
        worker,
        callback,
        lock,
        c_code,
        c_code_with_the_gil,
        collective,
        evaluation,
        stopped,
        died,
        restore,
        own_loop,
        own_loop_again,
        crowded,
        frozen,
        warm,
    )
} | {name: on_machines(name) for name in ON_MACHINES}


def main() -> int:
    """Play the stories, and return how many of them went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STORIES, default=list(STORIES))
    wrong = 0
    for name in parser.parse_args().only:
        if name in ON_MACHINES and (why := why_not()) is not None:
            print(f"{name:25}          skipped: {why}")
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="hangs-") as folder:
            story = Story(Path(folder))
            try:
                STORIES[name](story)
                told = "ok"
            except AssertionError as error:
                wrong, told = wrong + 1, f"WRONG: {error}"
            finally:
                for launch in story.launcher.launches:
                    if launch.process.poll() is None:
                        launch.kill_tree()
        print(f"{name:25} {time.monotonic() - began:6.0f} s  {told}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
