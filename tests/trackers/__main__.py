"""``python -m tests.trackers``: one training in four launches, with the real trackers, and what they show of it.

Each case is trained undisturbed, without hf_spot, and in four launches under `hf-spot launch`: a SIGTERM, a ``kill -9`` of all
its processes, a Ctrl-C, and the rest. Then each tracker is read back with its own reader: one run, with the curve of the
undisturbed training, each step once. W&B, SwanLab and Comet work offline, MLflow with its real server on this machine. Trackers
that are not installed are skipped; ``--python`` names an environment that has them, and in which hf_spot is installed:

    python -m tests.trackers --python /tmp/trackers/bin/python --picture curve.png
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from hf_spot.run.run import Run
from tests.trackers.picture import draw

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("train.py")
LONGEST_S, STEP_S = 600.0, 0.15
HOWS = ("SIGTERM", "kill -9", "Ctrl-C")
PACKAGES = {"comet_ml": "comet-ml", "tensorboard": "tensorboard"}
Runs = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Case:
    """A training whose trackers are read.

    Args:
        name: of the case.
        kind: what ``train.py`` does.
        trackers: that it uses, if they are installed.
        runs: number of runs in each tracker.
        stops: steps at which the launches are interrupted, counted through all trainings.
        ids: ids that the user sets, by their variables; ``{mlflow}`` is that of a run in MLflow's server.
        draws_over: whether lines of steps that are done again may come twice, if they are equal. A loop writes its lines
            itself, and offline W&B's folders are merged as its server merges them.
    """

    name: str
    kind: str
    trackers: tuple[str, ...]
    runs: int = 1
    ids: dict[str, str] = field(default_factory=dict)
    stops: tuple[int, ...] = (8, 18, 28)
    draws_over: bool = False


ALL = ("wandb", "mlflow", "trackio", "tensorboard", "comet_ml", "dvclive", "aim")  # swanlab 0.10 fails in Trainer's callback
OWN = ("wandb", "mlflow", "trackio", "swanlab")
LATE = ("wandb", "swanlab")  # offline they write late: a killed loop loses its newest lines
IDS = {
    "WANDB_RUN_ID": "mine",
    "MLFLOW_RUN_ID": "{mlflow}",
    "COMET_EXPERIMENT_KEY": "m" * 32,
}
CASES = (
    Case("trainer", "trainer", ALL),
    Case("ids", "trainer", ("wandb", "mlflow", "comet_ml"), ids=IDS),
    Case("several", "several", ("wandb", "mlflow", "trackio", "tensorboard", "comet_ml"), runs=2, stops=(8, 48, 58)),
    Case("script", "script", OWN),
    Case("loop", "loop", OWN, draws_over=True),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.trackers", description=__doc__)
    parser.add_argument("--only", nargs="*", metavar="CASE", help=f"of {', '.join(one.name for one in CASES)}")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of the environment that trains")
    parser.add_argument("--folder", type=Path, help="kept; default: one that is deleted")
    parser.add_argument("--picture", type=Path, help="PNG of the first case's curve over its launches")
    options = parser.parse_args()
    wrong = 0
    cases = [one for one in CASES if not options.only or one.name in options.only]
    with tempfile.TemporaryDirectory(prefix="trackers-") as scratch, ExitStack() as stack:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        uri = stack.enter_context(mlflow_server(options.python, folder)) if installed(options.python, ("mlflow",)) else ""
        for case in cases:
            there = installed(options.python, case.trackers)
            for name in set(case.trackers) - set(there):
                print(f"skip  {case.name}: {name} is not installed", flush=True)
            if there:
                story = Story(case, there, folder / case.name, options.python, uri)
                for name, told in story.run().items():
                    print(
                        f"{'FAIL' if told else 'ok':5} {case.name}, {name}: {told or 'one curve, each step once'}", flush=True
                    )
                    wrong += bool(told)
                if options.picture is not None and case is CASES[0]:
                    draw(options.picture, story.undisturbed, story.curves, story.launches)
    return int(wrong > 0)


def installed(python: Path, names: tuple[str, ...]) -> list[str]:
    """Return which trackers an environment has."""
    code = f"import importlib.util as u; print(*[one for one in {names!r} if u.find_spec(one)])"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()


class Story:
    """Trains one case undisturbed and in four launches.

    Args:
        case: the case.
        trackers: those that are installed.
        folder: for all files.
        python: of the environment that trains.
        uri: of MLflow's server; empty for none.
    """

    def __init__(self, case: Case, trackers: list[str], folder: Path, python: Path, uri: str) -> None:
        self._uri = uri
        self._case = case
        self._trackers = trackers
        self._folder = folder
        self._python = python
        self.undisturbed: list[tuple[int, float]] = []
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self.launches: list[tuple[int, int, str]] = []  # first step, last step, how it ended

    def run(self) -> dict[str, str]:
        """Return what is wrong with each tracker; an empty text for nothing."""
        peace, ours = self._folder / "peace", self._folder / "ours"
        for folder in (peace, ours):
            folder.mkdir(parents=True)
        self._end(self._start(peace, [], {}), peace, 0)
        expected = self._read(peace)
        users = self._mlflow_run(ours) if self._case.ids else ""
        ids = {name: value.format(mlflow=users) for name, value in self._case.ids.items()}
        self._interrupt(ours, ids)
        found = self._read(ours)
        wrong = {name: self._wrong(name, expected[name], found[name], ids.values()) for name in found}
        report = subprocess.run(
            [self._python, "-m", "hf_spot", "report", str(ours / "run")], capture_output=True, text=True, cwd=ROOT, check=True
        ).stdout
        (ours / "report").write_text(report)
        for name in found:
            if name not in report.lower().replace("weights & biases", "wandb").replace("comet", "comet_ml"):
                wrong[name] = wrong[name] or "hf-spot report does not link it"
        first = self._trackers[0]
        self.undisturbed = next(iter(expected[first].values()))
        self.curves = {name: next(iter(runs.values())) for name, runs in found.items()}
        return wrong

    def _wrong(self, name: str, expected: Runs, found: Runs, ids: Any) -> str:
        if len(found) != self._case.runs:
            return f"{len(found)} runs instead of {self._case.runs}: {', '.join(found)}"
        # Undisturbed, W&B draws several trainings of a process as one run.
        one, other = (sorted(point for curve in runs.values() for point in curve) for runs in (expected, found))
        if self._case.draws_over:
            killed = range(self._case.stops[0] + 1, self._case.stops[1] + 1)
            lost = [point for point in one if name in LATE and point[0] in killed]
            other = sorted({*other, *lost})
        if one != other:
            return f"{len(other)} points, undisturbed {len(one)}; steps {[step for step, _ in other]}"
        if ids and not set(found) & set(ids):
            return f"the run is {', '.join(found)}, not that of the user"
        return ""

    def _interrupt(self, folder: Path, ids: dict[str, str]) -> None:
        launch = [str(self._python), "-m", "hf_spot", "launch", "--store", str(folder / "run"), "--max-restarts", "0"]
        for at_step, how in zip(self._case.stops, HOWS, strict=True):
            process = self._start(folder, launch, ids, slowly=True)
            began = self._steps(folder)
            self._wait_for(folder, len(began), at_step, process)
            if how == "kill -9":
                tree = [process, *process.children(recursive=True)]
                for one in tree:
                    with_no_fuss(one.kill)
                psutil.wait_procs(tree, timeout=LONGEST_S)
            else:
                process.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGINT)
                self._end(process, folder, 75)
            self._note(folder, len(began), how)
        began = self._steps(folder)
        self._end(self._start(folder, launch, ids), folder, 0)
        self._note(folder, len(began), "finished")
        assert Run(str(folder / "run")).state().ended == "finished", f"not finished: see {folder / 'log'}"

    def _note(self, folder: Path, before: int, how: str) -> None:
        steps = self._steps(folder)[before:]
        self.launches.append((steps[0], steps[-1], how))

    @staticmethod
    def _steps(folder: Path) -> list[int]:
        path = folder / "steps"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def _wait_for(self, folder: Path, before: int, step: int, process: psutil.Popen) -> None:
        began = time.monotonic()
        while max(self._steps(folder)[before:], default=0) < step:
            assert process.poll() is None, f"it has ended before step {step}: see {folder / 'log'}"
            assert time.monotonic() - began < LONGEST_S, f"step {step} never came: see {folder / 'log'}"
            time.sleep(0.02)

    def _start(self, folder: Path, launch: list[str], ids: dict[str, str], *, slowly: bool = False) -> psutil.Popen:
        words = [str(SCRIPT), self._case.kind, str(folder), "--project", self._project(folder), "--trackers", *self._trackers]
        start = launch or [str(self._python)]
        with (folder / "log").open("ab") as log:
            return psutil.Popen(
                [*start, *words, *([] if launch else ["--undisturbed"])],
                cwd=folder,
                env={**self._environ(folder), **ids, "TRACKERS_STEP_S": str(STEP_S if slowly else 0)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _project(self, folder: Path) -> str:
        return f"{self._case.name}-{folder.name}"

    def _environ(self, folder: Path) -> dict[str, str]:
        plain = {name: value for name, value in os.environ.items() if name not in IDS}
        return {
            **plain,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "offline",
            "WANDB_SILENT": "true",
            "WANDB_DIR": str(folder),
            "WANDB_PROJECT": self._project(folder),
            "MLFLOW_TRACKING_URI": self._uri,
            "MLFLOW_EXPERIMENT_NAME": self._project(folder),
            "TRACKIO_DIR": str(folder / "trackio"),
            "SWANLAB_MODE": "local",
            "SWANLAB_LOG_DIR": str(folder / "swanlog"),
            "COMET_START_ONLINE": "0",
            "COMET_OFFLINE_DIRECTORY": str(folder / "comet"),
            "DVCLIVE_TEST": "false",
        }

    @staticmethod
    def _end(process: psutil.Popen, folder: Path, expected: int) -> None:
        code = process.wait(LONGEST_S)
        assert code == expected, f"exit code {code} instead of {expected}: see {folder / 'log'}"

    def _mlflow_run(self, folder: Path) -> str:
        """Create a run of the user's in MLflow's server, and return its id."""
        if "mlflow" not in self._trackers:
            return ""
        make = f"c.create_run(c.create_experiment('{self._project(folder)}'))"
        code = f"import mlflow; c = mlflow.MlflowClient(); print({make}.info.run_id)"
        return self._python_says(folder, ["-c", code]).split()[-1]

    def _read(self, folder: Path) -> dict[str, Runs]:
        words = ["-m", "tests.trackers.read"]
        if "swanlab" in self._trackers:
            first = folder if folder.name == "peace" else folder.parent / "peace"
            text = self._python_says(first, [*words, str(first), self._project(first), "wandb"])
            curve = next(iter(json.loads(text.splitlines()[-1])["wandb"].values()))
            (folder / "first-loss").write_text(repr(curve[0][1]))
        readers = {"wandb_rows" if name == "wandb" and self._case.draws_over else name: name for name in self._trackers}
        text = self._python_says(folder, [*words, str(folder), self._project(folder), *readers])
        found: dict[str, Runs] = {readers[name]: runs for name, runs in json.loads(text.splitlines()[-1]).items()}
        return {
            name: {id: [(step, value) for step, value in rows] for id, rows in runs.items()} for name, runs in found.items()
        }

    def _python_says(self, folder: Path, words: list[str]) -> str:
        environ = self._environ(folder)
        done = subprocess.run([self._python, *words], cwd=folder, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


def with_no_fuss(kill: Any) -> None:
    try:
        kill()
    except psutil.NoSuchProcess:
        return


@contextmanager
def mlflow_server(python: Path, folder: Path) -> Iterator[str]:
    """Run MLflow's server on a local store within the block. Yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri, log = f"http://127.0.0.1:{port}", (folder / "mlflow-server.log").open("wb")
    words = [python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--default-artifact-root", str(folder / "artifacts")]
    server = psutil.Popen([*words, *store], cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        began = time.monotonic()
        while True:
            try:
                with urllib.request.urlopen(f"{uri}/health", timeout=5):
                    break
            except OSError:
                assert server.poll() is None and time.monotonic() - began < LONGEST_S, f"see {log.name}"
                time.sleep(0.2)
        yield uri
    finally:
        for one in [server, *server.children(recursive=True)]:
            with_no_fuss(one.kill)
        server.wait()
        log.close()


if __name__ == "__main__":
    sys.exit(main())
