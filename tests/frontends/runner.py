"""Train one case four times, and compare the weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from safetensors import safe_open

from hf_spot.run.run import Run
from tests.frontends.cases import Case
from tests.servers import free_ports
from tests.zygote import SCRIPTS_FORK, Zygote

SLOW = Path(__file__).parent / "slow"
LONGEST_S = 600.0
STEP_S = 0.25
WAYS, WAYS_OF_RANKS = ("launch", "preempted", "killed"), ("rank_killed", "rank_raises")
RAISES = "raise-once"  # a file of that name: rank 1 deletes it, and raises
OF_TIME = ("time", "per_sec", "speed", "memory", "spot/")  # parts of the names of values that no two runs have in common


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Args:
        case: the case.
        wrong: what was wrong, by the way it was trained; empty if nothing was.
        skipped: why it was not run; empty if it was.
        seconds: that it took.
    """

    case: Case
    wrong: dict[str, str] = field(default_factory=dict)
    skipped: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong."""
        return not self.wrong

    def line(self) -> str:
        """Return the case, and what became of it, in one line."""
        if self.skipped:
            return f"skip  {self.case.name}: {self.skipped}"
        told = (
            "; ".join(f"{way}: {what}" for way, what in self.wrong.items())
            or f"the same weights and results in all {'six' if self.case.ranks else 'four'} ways"
        )
        return f"{'ok' if self.ok else 'FAIL':5} {self.case.name} ({self.seconds:.0f} s): {told}"


def _without_times(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_times(one) for one in value]
    if isinstance(value, dict):
        return {name: _without_times(one) for name, one in value.items() if not any(word in name for word in OF_TIME)}
    return value


class Runner:
    """Trains one case.

    Args:
        case: the case.
        folder: with what it reads; results go there, too.
        python: of the environment that trains.
        say: called with what is done next.
        zygote: forks what makes the models, the launcher and the reader of its options, never the command.
    """

    def __init__(
        self,
        case: Case,
        folder: Path,
        python: Path,
        say: Callable[[str], None] = lambda text: None,
        zygote: Zygote | None = None,
    ) -> None:
        self._case = case
        self._folder = folder
        self._python = python
        self._say = say
        self._zygote = zygote
        self._logs = 0
        self._port = free_ports(1)[0]
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        self._environ = {**os.environ, "PATH": path, "PYTHONPATH": str(SLOW), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._environ |= case.environ

    def run(self, ways: tuple[str, ...] = ()) -> Outcome:
        """Train undisturbed and in each of the ways, or in all of them, and return what became of it."""
        ways = ways or (*WAYS, *(WAYS_OF_RANKS if self._case.ranks else ()))
        began, wrong = time.monotonic(), {}
        command = [str(self._python), "make_models.py"]
        with self._forking():
            subprocess.run(command, cwd=self._folder, env=self._environ, check=True, capture_output=True)
        self._say(f"{self._case.name}: undisturbed")
        code, log = self._end(self._undisturbed())
        if code != 0:
            return Outcome(self._case, {"undisturbed": f"exit code {code}, see {log}"}, seconds=time.monotonic() - began)
        expected, results = self._weights("undisturbed"), self._results("undisturbed")
        for way in ways:
            self._say(f"{self._case.name}: {way}")
            told = getattr(self, f"_{way}")()
            if not told and self._weights(way) != expected:
                told = f"other weights, see {self._folder}"
            if not told and (found := self._results(way)) != results:
                names = [name for name in {**results, **found} if results.get(name) != found.get(name)]
                told = f"other results in {', '.join(sorted(names))}, see {self._folder}"
            if told:
                wrong[way] = told
        return Outcome(self._case, wrong, seconds=time.monotonic() - began)

    def _launch(self) -> str:
        code, log = self._end(self._launched("launch"))
        return f"exit code {code}, see {log}" if code else self._unfinished("launch", log)

    def _preempted(self) -> str:
        process = self._launched("preempted", slowly=True)
        if not self._wait_for_commit(process, "preempted"):
            return f"nothing was committed before the end, see {self._log}"
        process[0].send_signal(signal.SIGTERM)
        code, log = self._end(process)
        if code != 75:
            return f"exit code {code} after SIGTERM, see {log}"
        if (self._folder / "after-the-training").exists():
            return f"the script went on after the interruption, see {log}"
        code, log = self._end(self._launched("preempted"))
        return f"exit code {code}, see {log}" if code else self._unfinished("preempted", log, "resuming from step")

    def _killed(self) -> str:
        process = self._launched("killed", slowly=True)
        if not self._wait_for_commit(process, "killed"):
            return f"nothing was committed before the end, see {self._log}"
        tree = [process[0], *process[0].children(recursive=True)]
        for one in tree:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(tree, timeout=LONGEST_S)
        self._end(process)
        code, log = self._end(self._launched("killed"))
        return f"exit code {code}, see {log}" if code else self._unfinished("killed", log, "resuming from step")

    def _rank_killed(self) -> str:
        return self._after_a_crash("rank_killed", lambda process: self._rank_1(process).kill())

    def _rank_raises(self) -> str:
        return self._after_a_crash("rank_raises", lambda process: (self._folder / RAISES).touch())

    def _after_a_crash(self, way: str, crash: Callable[[psutil.Popen], object]) -> str:
        process = self._launched(way, slowly=True, restarts=1)
        if not self._wait_for_commit(process, way):
            return f"nothing was committed before the end, see {self._log}"
        crash(process[0])
        code, log = self._end(process)
        if (self._folder / RAISES).exists():
            return f"no rank has raised, see {log}"
        if "starting again" not in log.read_text(errors="replace"):
            return f"it was not started again, see {log}"
        return f"exit code {code}, see {log}" if code else self._unfinished(way, log, "resuming from step")

    @staticmethod
    def _rank_1(process: psutil.Popen) -> psutil.Process:
        """Return rank 1 of a launch: the last process that has its number, below launchers that have it as well."""
        ranks = [one for one in process.children(recursive=True) if one.environ().get("RANK") == "1"]
        return max(ranks, key=lambda one: len(one.parents()))

    # -- one command --------------------------------------------------------------------------------------------------

    def _words(self, way: str) -> list[str]:
        return shlex.split(self._case.command.format(out=f"out-{way}", port=self._port))

    def _undisturbed(self) -> tuple[psutil.Popen, Path]:
        words = self._words("undisturbed")
        program = shutil.which(words[0], path=self._environ["PATH"])
        if self._zygote is None or program is None or not Path(program).read_bytes().startswith(f"#!{self._python}".encode()):
            return self._start(words, {})
        # What hf_spot has no part in need not be fresh.
        return self._start([str(self._python), program, *words[1:]], {SCRIPTS_FORK: "1"}, forks=True)

    def _launched(self, way: str, *, slowly: bool = False, restarts: int = 0) -> tuple[psutil.Popen, Path]:
        (self._folder / "after-the-training").unlink(missing_ok=True)
        start = [
            str(self._python),
            "-m",
            "hf_spot",
            "launch",
            "--store",
            str(self._folder / f"run-{way}"),
            "--max-restarts",
            str(restarts),
        ]
        return self._start([*start, *self._words(way)], {"FRONTENDS_STEP_S": str(STEP_S)} if slowly else {})

    def _start(self, words: list[str], more: dict[str, str], *, forks: bool = False) -> tuple[psutil.Popen, Path]:
        self._logs += 1
        self._log = self._folder / f"log-{self._logs}"
        with self._log.open("wb") as out, self._forking(scripts=forks):
            process = psutil.Popen(
                words,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self._folder,
                env={**self._environ, **more},
            )
        return process, self._log

    def _forking(self, *, scripts: bool = False) -> contextlib.AbstractContextManager[None]:
        return self._zygote.forking(scripts=scripts) if self._zygote else contextlib.nullcontext()

    @staticmethod
    def _end(process: tuple[psutil.Popen, Path]) -> tuple[int, Path]:
        try:
            return int(process[0].wait(LONGEST_S)), process[1]
        except psutil.TimeoutExpired:
            for one in [process[0], *process[0].children(recursive=True)]:
                one.kill()
            return int(process[0].wait(LONGEST_S)), process[1]

    def _wait_for_commit(self, process: tuple[psutil.Popen, Path], way: str) -> bool:
        run, began = self._folder / f"run-{way}", time.monotonic()
        while process[0].poll() is None and time.monotonic() - began < LONGEST_S:
            if (run / "journal").exists() and Run(str(run)).state().latest() is not None:
                return True
            time.sleep(0.05)
        return False

    # -- what came of it ----------------------------------------------------------------------------------------------

    def _unfinished(self, way: str, log: Path, said: str = "") -> str:
        if Run(str(self._folder / f"run-{way}")).state().ended != "finished":
            return f"the run is not finished, see {log}"
        return "" if said in log.read_text(errors="replace") else f"nothing was resumed, see {log}"

    def _results(self, way: str) -> dict[str, Any]:
        """Return the contents of the results files and the log lines of the last checkpoint, without those about time."""
        out = self._folder / f"out-{way}"
        found = {str(path.relative_to(out)): json.loads(path.read_text()) for path in out.rglob("*results.json")}
        states = {int(path.parent.name.rpartition("-")[2]): path for path in out.rglob("checkpoint-*/trainer_state.json")}
        if states:
            found["log lines"] = json.loads(states[max(states)].read_text())["log_history"]
        return {name: _without_times(one) for name, one in found.items()}

    def _weights(self, way: str) -> str:
        """Return a digest of the final weights. Raises AssertionError if there are none."""
        files = sorted((self._folder / f"out-{way}").glob(self._case.weights))
        assert files, f"no {self._case.weights} in {self._folder / f'out-{way}'}"
        digest = hashlib.sha256()
        for path in files:
            with safe_open(path, "pt") as file:
                for name in sorted(file.keys()):
                    digest.update(name.encode() + file.get_tensor(name).contiguous().view(-1).numpy().tobytes())
        return digest.hexdigest()
