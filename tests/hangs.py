"""``python -m tests.hangs``: trainings that hang in ten ways, in real processes, and trainings on a crowded machine that don't.

Of each hang it is checked that the launch finds it, shows the line of the script that hangs, starts the training again and
finishes it; or, if it hangs after the same step again, ends with exit code 79 and both stacks. It takes about ten minutes.
``--only NAME…`` plays some of them.
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

from hf_spot.errors import EXIT_HUNG
from hf_spot.run.run import Run
from tests.launch.conftest import SCRIPTS, Launch, Launcher
from tests.waiting import wait_for

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
    time.sleep(3 * TIMEOUT_S)
    for one in tree:
        one.send_signal(signal.SIGCONT)
    code, text = launch.wait(), launch.text()
    assert code == 0 and FOUND not in text, text


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
    )
}


def main() -> int:
    """Play the stories, and return how many of them went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STORIES, default=list(STORIES))
    wrong = 0
    for name in parser.parse_args().only:
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
        print(f"{name:20} {time.monotonic() - began:6.0f} s  {told}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
