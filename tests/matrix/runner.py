"""Runs a case twice, in peace and with interruptions, and compares the two to the bit."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hf_spot.run.run import Run
from tests.matrix.cases import CASES, Case
from tests.matrix.ending import differences, left_by_a_command, tracker_lines

SCRIPT = Path(__file__).parent / "train.py"
TIMEOUT_S = 240.0
ERROR = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt|Exit)\b")
SILENCE = re.compile(r"no sign of the training for .*", re.M)


@dataclass(frozen=True)
class Row:
    """What came of a case. ``identical`` is None when it was skipped or refused; ``why`` says more about that."""

    case: str
    ranks: int
    interruption: str
    identical: bool | None
    max_weight_difference: float
    learning_rates_differ: int
    losses_differ: int
    same_data: bool
    seconds: float
    as_expected: bool
    why: str = ""
    differs: tuple[str, ...] = ()  # what else is another one: optimizer, log lines, results files, trackers' lines

    def __str__(self) -> str:
        found = {True: "yes", False: "no", None: "-"}[self.identical]
        numbers = f"{self.max_weight_difference:9.2e} {self.learning_rates_differ:3d} {self.losses_differ:4d}"
        data = "yes" if self.same_data else "no"
        line = f"{self.case:46} {self.ranks:5d} {self.interruption:26} {found:9} {numbers} {data:5} {self.seconds:5.0f}"
        line += ("" if self.as_expected else "  UNEXPECTED") + (f"  {self.why}" if self.why else "")
        return line + "".join(f"\n    {one}" for one in self.differs[:5])


HEADER = f"{'case':46} ranks {'interruption':26} identical {'weights':>9}  LR loss data  seconds"


def in_peace(name: str, folder: Path) -> tuple[int, str]:
    """Trains the case in ``folder`` under ``python`` or ``accelerate launch``; exit code, and what was said in the end."""
    return _python(CASES[name], name, folder)


def run(name: str, folder: Path, *, peace: Path | None = None, quick: bool = False) -> Row:
    """Trains the case in ``folder``, which is made.

    Args:
        name: of the case.
        folder: for everything.
        peace: one of `in_peace`; None trains it here.
        quick: with the stops that CI has time for.
    """
    case = CASES[name]
    if quick:
        case = replace(case, stops=case.quick)
    began = time.monotonic()

    def row(identical: bool | None, expected: bool, why: str, *numbers: Any, differs: tuple[str, ...] = ()) -> Row:
        numbers = numbers or (0.0, 0, 0, identical is not False)
        seconds = time.monotonic() - began
        return Row(name, case.ranks, " ".join(case.stops), identical, *numbers, seconds, expected, why, differs)

    missing = [package for package in case.needs if importlib.util.find_spec(package) is None]
    if missing:
        return row(None, True, f"skipped: needs {', '.join(missing)}")
    folder.mkdir(parents=True)
    if peace is not None:
        (folder / "peace").symlink_to(peace)
    elif not case.refused:
        code, said = in_peace(name, folder / "peace")
        if code:
            return row(None, False, f"the undisturbed training ended with {code}: {said}")
    for number, stop in enumerate([*case.stops, ""], 1):
        code, said = _launch(case, name, folder, number, stop)
        wanted = 2 if case.refused else 0 if not stop else -9 if stop.startswith("kill") else 75
        if code != wanted:
            return row(None, False, f"launch {number} ended with {code}, not {wanted}: {said}")
        if case.refused:
            refused = case.refused in (folder / f"launch-{number}.log").read_text()
            return row(None, refused, f"refused: {case.refused}")
    numbers = _compare(case, folder, len(case.stops) + 1)
    differs = tuple(_compare_endings(case, folder, len(case.stops) + 1))
    identical = numbers[0] == 0 and numbers[1:3] == (0, 0) and numbers[3] and not differs
    return row(identical, identical != bool(case.impossible), case.impossible, *numbers, differs=differs)


def alarms(folder: Path) -> tuple[int, int, list[str]]:
    """How many launches of a case there were, how often one was taken for hung, and what they warned of. None of them hangs."""
    events = list(Run(folder / "run").events()) if (folder / "run").exists() else []
    logs = [log.read_text(errors="replace") for log in sorted(folder.glob("launch-*.log"))]
    warned = [found for log in logs for found in SILENCE.findall(log)]
    return sum(one.kind == "claim" for one in events), sum(one.kind == "hang" for one in events), warned


def _python(case: Case, name: str, folder: Path) -> tuple[int, str]:
    if case.command is not None:
        ended = _run([sys.executable, *case.command(folder / "out")], folder, {})
        _keep_diary(folder)
        return ended
    command = [sys.executable, SCRIPT, name, folder]
    if case.ranks > 1:
        port = ["--main_process_port", "0"]
        multi = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(case.ranks), *port]
        command = [sys.executable, *multi, SCRIPT, name, folder]
    return _run(command, folder, {})


def _launch(case: Case, name: str, folder: Path, number: int, stop: str) -> tuple[int, str]:
    notice = folder / f"notice-{number}"
    ranks = ["--multi_gpu", "--num_processes", str(case.ranks), "--main_process_port", "0"]
    options = ["--store", folder / "run", "--notice", f"file:{notice}", "--max-restarts", "0"]
    options += ranks if case.ranks > 1 else ["--num_processes", "1"]
    fresh = folder / f"launch-{number}"
    launch = [sys.executable, "-m", "hf_spot", "launch", *options]
    if case.command is not None:
        interrupt = partial(_interrupt, stop, Run(folder / "run"), notice)
        ended = _run([*launch, *case.command(fresh / "out")], fresh, {}, interrupt)
        _keep_diary(fresh)
        return ended
    return _run([*launch, SCRIPT, name, fresh], fresh, {"MATRIX_STOP": stop, "MATRIX_NOTICE": str(notice)})


def _interrupt(stop: str, run: Run, notice: Path, launch: subprocess.Popen[bytes]) -> None:
    """From outside, as soon as the step is committed: for commands that are left as they are."""
    kind, _, step = stop.partition("@")
    while stop and launch.poll() is None:
        newest = run.state().latest()
        if newest is not None and newest.step >= int(step):
            if kind == "notice":
                notice.touch()
            else:
                launch.send_signal(signal.SIGKILL if kind == "kill" else signal.SIGTERM)
            return
        time.sleep(0.01)


def _keep_diary(folder: Path) -> None:
    """What `train.py` writes, from what Trainer itself keeps; the model's, if the training came to its end."""
    history = sorted(folder.glob("out/checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    lines = json.loads(history[-1].read_text())["log_history"] if history else []
    with (folder / "diary-0").open("w") as diary:
        for line in lines:
            if "loss" in line:
                counted = [line.get(name) for name in ("num_tokens", "mean_token_accuracy", "entropy")]
                diary.write(json.dumps({**line, "batches": counted}) + "\n")
    if (folder / "out" / "model.safetensors").exists():
        torch.save(load_file(folder / "out" / "model.safetensors"), folder / "final.pt")
        optimizer = torch.load(history[-1].with_name("optimizer.pt"), weights_only=True)
        (folder / "ending-0.json").write_text(json.dumps([left_by_a_command(folder / "out", optimizer, lines)]))


def _run(
    command: list[Any], folder: Path, env: dict[str, str], meanwhile: Callable[[subprocess.Popen[bytes]], None] = lambda _: None
) -> tuple[int, str]:
    folder.mkdir(exist_ok=True)
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
    log = folder.with_suffix(".log")
    with log.open("wb") as out:
        training = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, env={**os.environ, **quiet, **env})
        try:
            meanwhile(training)
            code = training.wait(TIMEOUT_S)
        finally:
            training.kill()
    lines = log.read_text(errors="replace").splitlines() or [""]
    # The first: what a rank died of comes before what its launcher says of that.
    errors = [line for line in lines if ERROR.match(line)] or lines[-1:]
    return code, f"{errors[0]} ({log})"


def _compare(case: Case, folder: Path, launches: int) -> tuple[float, int, int, bool]:
    """Greatest difference of a weight; steps whose learning rate, and whose loss, differs; whether all saw the same data."""
    one, other = (torch.load(folder / which / "final.pt") for which in ("peace", f"launch-{launches}"))
    difference = float("inf") if one.keys() != other.keys() else max(_difference(one[key], other[key]) for key in one)
    rates = losses = 0
    same_data = True
    for rank in range(case.ranks):
        peace = _by_step(_diary(folder / "peace" / f"diary-{rank}"))
        done: set[int] = set()
        for number in range(1, launches + 1):
            for step, line in _by_step(_diary(folder / f"launch-{number}" / f"diary-{rank}")).items():
                twin = peace.get(step, {})
                done.add(step)
                if "loss" in line:
                    rates += line["learning_rate"] != twin.get("learning_rate")
                    losses += line["loss"] != twin.get("loss")
                same_data = same_data and line.get("batches", ...) == twin.get("batches", ...)
        same_data = same_data and done == peace.keys() != set()
    return difference, rates, losses, same_data


def _by_step(lines: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        found.setdefault(line["step"], {}).update(line)
    return found


def _compare_endings(case: Case, folder: Path, launches: int) -> list[str]:
    """What differs in the end besides the weights, in words."""
    told: list[str] = []
    of_launches = [folder / f"launch-{number}" for number in range(1, launches + 1)]
    for rank in range(case.ranks):
        endings = [which / f"ending-{rank}.json" for which in (folder / "peace", of_launches[-1])]
        if case.command is None or endings[0].exists():
            told += differences(*(json.loads(ending.read_text()) for ending in endings), "training")
    for lines in sorted((folder / "peace").glob("lines-*.jsonl")):
        told += differences(
            *(tracker_lines([one / lines.name for one in ones]) for ones in ([folder / "peace"], of_launches)), "tracker"
        )
    return told


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.shape != other.shape or one.dtype != other.dtype:
        return float("inf")
    return 0.0 if torch.equal(one, other) else float((one.double() - other.double()).abs().max())


def _diary(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def to_json(rows: list[Row]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=1)
