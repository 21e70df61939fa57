"""Launches as users make them: ``hf-spot launch`` in processes of its own, and the twin that nobody interrupts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.waiting import PATIENCE_S, wait_for
from tests.zygote import Zygote

SCRIPTS = Path(__file__).parent.parent / "training" / "scripts"
PLAIN = SCRIPTS / "plain.py"
Lines = list[dict[str, Any]]


def of_ranks(count: int) -> list[str]:
    """The options for so many ranks on this machine.

    accelerate looks whether its port is free long before it takes it: of two launches that start at once, one would fail,
    and be started again.
    """
    return ["--multi_gpu", "--num_processes", str(count), "--main_process_port", "0"] if count > 1 else []


def read_diary(path: Path) -> Lines:
    """The whole lines of a diary."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


@dataclass
class Launch:
    """A running ``hf-spot launch``; its output goes to ``log``."""

    process: psutil.Popen
    log: Path
    diary: Path
    output_dir: Path

    def lines(self) -> Lines:
        return [line for line in read_diary(self.diary) if "loss" in line]

    def step(self) -> int:
        return max((line["step"] for line in self.lines()), default=0)

    def wait_for_step(self, step: int) -> None:
        wait_for(lambda: self.step() >= step or self.process.poll() is not None, f"for step {step}: {self.text()}")
        assert self.step() >= step, self.text()

    def go_on_when_it_says(self, text: str) -> None:
        """Ends the hold of ``--hold_at`` as soon as ``text`` is in the output."""
        wait_for(lambda: text in self.text() or self.process.poll() is not None, f"for {text!r}: {self.text()}")
        (self.output_dir / "go-on").touch()

    def wait(self) -> int:
        return int(self.process.wait(PATIENCE_S))

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def tree(self) -> list[psutil.Process]:
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def trainings(self) -> list[psutil.Process]:
        """The processes that train now, by their own reports, in the order of their ids."""
        found = []
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                folder = process.environ().get("HF_SPOT_RUNTIME_DIR")
                if folder and Path(folder, f"training-{process.pid}").exists():
                    found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def kill_tree(self) -> None:
        """kill -9 of the launcher and of everything below it, and nothing is left."""
        tree = self.tree()
        for one in tree:
            try:
                one.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self.process.wait(PATIENCE_S)
        assert psutil.wait_procs(tree, timeout=PATIENCE_S)[1] == []


@dataclass
class Launcher:
    """Starts launches, each in a fresh folder as on a fresh machine, and ends them all when the test ends."""

    tmp_path: Path
    launches: list[Launch] = field(default_factory=list)
    zygote: Zygote | None = None  # None starts fresh Pythons
    scripts_fork: bool = True  # otherwise only the launcher and the reader of its options are forked

    def start(
        self,
        store: str,
        script: list[str | Path],
        *,
        options: list[str] | None = None,
        env: dict[str, str] | None = None,
    ) -> Launch:
        return self.start_known(store, script, options=["--num_processes", "1", *(options or [])], env=env)

    def start_known(
        self,
        store: str,
        script: list[str | Path],
        *,
        options: list[str] | None = None,
        env: dict[str, str] | None = None,
    ) -> Launch:
        """Start a command that gets no options of accelerate."""
        number = len(self.launches) + 1
        log, diary = self.tmp_path / f"log-{number}", self.tmp_path / f"diary-{number}"
        command = [sys.executable, "-m", "hf_spot", "launch", "--store", store, *(options or [])]
        with open(log, "wb") as out, self._forking():
            process = psutil.Popen(
                [*command, *map(str, script)],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self.tmp_path,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})},
            )
        self.launches.append(Launch(process, log, diary, self.tmp_path / f"out-{number}"))
        return self.launches[-1]

    def _forking(self) -> contextlib.AbstractContextManager[None]:
        return self.zygote.forking(scripts=self.scripts_fork) if self.zygote else contextlib.nullcontext()

    def plain(self, store: str, *more: str, options: list[str] | None = None, env: dict[str, str] | None = None) -> Launch:
        """Launches plain.py with a fresh empty output_dir and a diary of its own."""
        number = len(self.launches) + 1
        script = [PLAIN, "--output_dir", f"out-{number}", "--diary", f"diary-{number}", "--weights", f"weights-{number}"]
        return self.start(store, [*script, *more], options=options, env=env)

    def weights(self) -> bytes:
        """What the newest launch saved at its end."""
        return (self.tmp_path / f"weights-{len(self.launches)}" / "model.safetensors").read_bytes()


@pytest.fixture
def launcher(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Launcher]:
    """Starts launches, whose Pythons are forked (`tests.zygote`) unless the test is marked ``fresh_python``.

    Of a test that is marked ``fresh_script`` what a launch starts is fresh, and the launcher is forked.
    """
    fresh, fresh_script = map(request.node.get_closest_marker, ("fresh_python", "fresh_script"))
    made = Launcher(tmp_path, zygote=None if fresh else request.getfixturevalue("zygote"), scripts_fork=fresh_script is None)
    yield made
    for launch in made.launches:
        if launch.process.poll() is None:
            launch.kill_tree()


@dataclass(frozen=True)
class Twin:
    """What plain.py gives when nobody interrupts it; of one process, under plain ``python``."""

    weights: bytes
    lines: dict[int, dict[str, Any]]


# Machines may live longer than they said, so the last upload is given half a minute more. These don't.
PUNCTUAL = """
import runpy, sys
from pathlib import Path
from hf_spot.policy import restarts
restarts.LATE_S = 0.5
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def punctual(tmp_path: Path) -> Path:
    """A script that runs another one, on a machine that is gone half a second after its deadline."""
    path = tmp_path / "punctual.py"
    path.write_text(PUNCTUAL)
    return path


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def twin(plain_in_peace: Path) -> Twin:
    lines = {line["step"]: line for line in read_diary(plain_in_peace / "losses.jsonl") if "loss" in line}
    assert sorted(lines) == list(range(1, 33))
    return Twin((plain_in_peace / "out" / "final" / "model.safetensors").read_bytes(), lines)


@pytest.fixture(scope="session")
def twin_of_ranks(made_once: Once, zygote: Zygote) -> Callable[[int], Twin]:
    """What plain.py gives on so many ranks of one machine, with nobody to disturb them."""

    def of(ranks: int) -> Twin:
        def train(folder: Path) -> None:
            launcher = Launcher(folder, zygote=zygote)
            launch = launcher.plain(str(folder / "run"), options=of_ranks(ranks))
            try:
                assert launch.wait() == 0, launch.text()
            finally:
                if launch.process.poll() is None:
                    launch.kill_tree()

        folder = made_once(f"twin-of-{ranks}", train)
        lines = {line["step"]: line for line in read_diary(folder / "diary-1") if "loss" in line}
        return Twin((folder / "weights-1" / "model.safetensors").read_bytes(), lines)

    return of
