"""``hf-spot demo``: a real training with real interruptions, compared with the same training uninterrupted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

import psutil

from hf_spot.demo import train
from hf_spot.economics.plots import Interruption, plot_losses, require_matplotlib
from hf_spot.errors import EXIT_FINISHED, EXIT_PREEMPTED, ConfigError, SpotError
from hf_spot.run.run import Run
from hf_spot.testing import FakeIMDS

DEFAULT_PLOT = Path("hf-spot-demo.png")
_MIN_STEP_S = 0.06  # slow enough for a notice, polled every second or two, to arrive before the next interruption
_NOTICE_STEPS = (30, 90)  # launches 1 and 2 get their notice at these steps
_KILL_STEP = 150  # launch 3 is killed half-way between two of its saves after this step
_SAVE_STEPS = 20
_GIVE_UP_S = 300.0
_TICK_S = 0.02
_SHOW_EVERY_S = 0.2
_HOW_LONG = "four launches, each of which imports torch: about a minute and a half on two idle cores, longer on busy ones"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """The result of the demo; its fields are the keys of ``--json``.

    Args:
        identical: the final weights have the same sha256, and every step's loss and learning rate were equal.
        interruptions: preemption notices sent.
        kills: launches killed with SIGKILL.
        steps_lost_with_notice: total steps trained but not committed in launches that got a notice.
        steps_lost_to_kill: steps that the launch after the kill had to repeat.
        notice_to_commit_s: for each notice, seconds from the announcement to the committed checkpoint.
        store: URL of the run.
        final_step: optimizer steps of the finished run.
        sha256: digest of the interrupted run's final ``model.safetensors``.
        sha256_twin: digest of the uninterrupted run's.
        losses_equal: every step's loss and learning rate were equal.
    """

    identical: bool
    interruptions: int
    kills: int
    steps_lost_with_notice: int
    steps_lost_to_kill: int
    notice_to_commit_s: list[float]
    store: str
    final_step: int
    sha256: str
    sha256_twin: str
    losses_equal: bool


def run_demo(*, store: str | None, plot: Path | None, keep: Path | None, as_json: bool) -> int:
    """Run the demo and print its progress. Return 0 if both trainings gave the same model, else 1.

    Args:
        store: URL of an empty location for the run; None for a directory that is deleted afterwards.
        plot: file for the loss curve; None for `DEFAULT_PLOT`, or no plot if matplotlib is missing.
        keep: an empty folder for all files; None for one that is deleted afterwards.
        as_json: print the `Outcome` as JSON on stdout, and the progress on stderr.

    Raises:
        SpotError: the store can't be used, or a launch did not end as expected.
    """

    def say(line: str) -> None:
        print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

    plot = _checked_plot(plot, say)
    with _folder(keep) as folder:
        run = Run(store or folder / "store")
        if run.state().number:
            raise ConfigError(f"{run.url} already contains a run", hint="--store with an empty location")
        story = _Story(folder, run, say)
        outcome = story.play()
        if plot is not None:
            title = "interrupted and uninterrupted: the same model" if outcome.identical else "the two models DIFFER"
            plot_losses(plot, _by_step(story.twin_losses), [_by_step(one) for one in story.losses], story.marks, title)
            say(f"plot: {plot}")
    if as_json:
        print(json.dumps(asdict(outcome), indent=2))
    else:
        _print(outcome)
    return 0 if outcome.identical else 1


class _Story:
    """Four launches of one run, and its uninterrupted twin."""

    def __init__(self, folder: Path, run: Run, say: Say) -> None:
        self.folder = folder
        self.run = run
        self.say = say
        self.losses: list[dict[int, dict[str, float]]] = []
        self.twin_losses: dict[int, dict[str, float]] = {}
        self.marks: list[Interruption] = []
        self.notice_to_commit_s: list[float] = []
        self.began = time.monotonic()
        self.progress = _Progress()

    def play(self) -> Outcome:
        twin_command = [sys.executable, train.__file__, *self._arguments("twin")]
        with _process(twin_command, self.folder / "twin.log", _environ({})) as twin:
            self.say(_HOW_LONG)
            self.say(f"run:  {self.run.url}")
            self.say("twin: the same script runs in parallel under plain python, without interruptions")
            for number, step in enumerate(_NOTICE_STEPS, start=1):
                self._launch_with_notice(number, step)
            killed = len(_NOTICE_STEPS) + 1
            self._launch_and_kill(killed)
            self._launch_to_the_end(killed + 1)
            _expect(self._wait(twin), EXIT_FINISHED, "the twin", self.folder / "twin.log")
        self.say(f"both are trained, after {time.monotonic() - self.began:.0f} s")
        return self.compare()

    def compare(self) -> Outcome:
        """Read and compare what the trainings have written."""
        self.twin_losses = _read(self.folder / "twin.jsonl")
        last = f"launch-{len(self.losses)}"
        sha256, sha256_twin = (_sha256(self.folder / name / "final" / "model.safetensors") for name in (last, "twin"))
        union = {step: line for losses in self.losses for step, line in losses.items()}
        # A repeated step must be equal both times, so each launch is compared by itself.
        equal = union.keys() == self.twin_losses.keys() and all(
            line == self.twin_losses[step] for losses in self.losses for step, line in losses.items()
        )
        lost = [mark.step - mark.committed_step for mark in self.marks]
        return Outcome(
            identical=equal and sha256 == sha256_twin,
            interruptions=len(_NOTICE_STEPS),
            kills=1,
            steps_lost_with_notice=sum(lost[:-1]),
            steps_lost_to_kill=lost[-1],
            notice_to_commit_s=self.notice_to_commit_s,
            store=self.run.url,
            final_step=max(union),
            sha256=sha256,
            sha256_twin=sha256_twin,
            losses_equal=equal,
        )

    # -- the launches -------------------------------------------------------------------------------------------------

    def _launch_with_notice(self, number: int, step: int) -> None:
        with self._launch(number) as (process, imds):
            reached = self._wait_for(number, process, lambda at: at >= step)
            announced = datetime.now(timezone.utc)
            imds.interrupt(in_s=120)
            self.say(f"launch {number}: step {reached}: the metadata service announces the end of the machine in 120 s")
            _expect(self._end_of(number, process), EXIT_PREEMPTED, f"launch {number}", self._log(number))
        entries = [one for one in self.run.events() if one.launch == number and one.kind == "commit"]
        took_s = round((entries[-1].time - announced).total_seconds(), 2)
        committed = self._committed_step()
        self._ended(number, committed, "notice")
        self.notice_to_commit_s.append(took_s)
        self.say(f"launch {number}: step {committed} committed {took_s:.1f} s after the announcement; exit code 75")

    def _launch_and_kill(self, number: int) -> None:
        middle = _SAVE_STEPS // 2
        with self._launch(number) as (process, _):
            self._wait_for(number, process, lambda at: at >= _KILL_STEP and middle <= at % _SAVE_STEPS < middle + 5)
            _kill_tree(process)
        committed = self._committed_step()
        self._ended(number, committed, "kill -9")
        mark = self.marks[-1]
        self.say(f"launch {number}: step {mark.step}: kill -9 of all processes; the last committed step is {committed}")

    def _launch_to_the_end(self, number: int) -> None:
        with self._launch(number) as (process, _):
            _expect(self._end_of(number, process), EXIT_FINISHED, f"launch {number}", self._log(number))
        self.losses.append(_read(self.folder / f"launch-{number}.jsonl"))
        self.say(f"launch {number}: finished at step {self._committed_step()}")

    @contextlib.contextmanager
    def _launch(self, number: int) -> Iterator[tuple[psutil.Popen, FakeIMDS]]:
        online = {"HF_HUB_OFFLINE": "0"} if self.run.url.startswith("hf://") else {}
        command = [sys.executable, "-m", "hf_spot", "launch", "--store", self.run.url, "--num_processes", "1"]
        command += ["--notice", "imds", train.__file__, "--min_step_s", str(_MIN_STEP_S)]
        with FakeIMDS() as imds:
            name = f"launch-{number}"
            with _process([*command, *self._arguments(name)], self._log(number), _environ({**imds.env(), **online})) as process:
                self.say(f"launch {number}: starts on a new machine with an empty output_dir; only the run is shared")
                yield process, imds

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _end_of(self, number: int, process: psutil.Popen) -> int:
        """Wait for the end of a launch, and return its exit code; -1 if it takes too long."""
        return self._wait(process, f"launch {number}")

    def _wait(self, process: psutil.Popen, name: str = "") -> int:
        give_up_at = time.monotonic() + _GIVE_UP_S
        while (code := process.poll()) is None and time.monotonic() < give_up_at:
            self._show(name)
            time.sleep(_TICK_S)
        self.progress.clear()
        return -1 if code is None else int(code)

    def _show(self, name: str) -> None:
        def text() -> str:
            steps = {one: self._step_of(one.replace(" ", "-")) for one in (name, "twin") if one}
            told = ", ".join(f"{one}: {f'step {step}' if step else 'starting'}" for one, step in steps.items())
            return f"{time.monotonic() - self.began:4.0f} s  {told}"

        self.progress.show(text)

    def _step_of(self, name: str) -> int:
        return max(_read(self.folder / f"{name}.jsonl"), default=0)

    def _log(self, number: int) -> Path:
        return self.folder / f"launch-{number}.log"

    def _arguments(self, name: str) -> list[str]:
        return ["--output_dir", str(self.folder / name), "--losses", str(self.folder / f"{name}.jsonl")]

    def _committed_step(self) -> int:
        newest = self.run.state().latest()
        return newest.step if newest else 0

    def _ended(self, number: int, committed: int, label: str) -> None:
        self.losses.append(_read(self.folder / f"launch-{number}.jsonl"))
        self.marks.append(Interruption(max(self.losses[-1]), committed, label))

    def _wait_for(self, number: int, process: psutil.Popen, reached: Callable[[int], bool]) -> int:
        give_up_at = time.monotonic() + _GIVE_UP_S
        while time.monotonic() < give_up_at:
            step = self._step_of(f"launch-{number}")
            if reached(step):
                self.progress.clear()
                return step
            if process.poll() is not None:
                break
            self._show(f"launch {number}")
            time.sleep(_TICK_S)
        self.progress.clear()
        raise SpotError(
            f"launch {number} did not get as far as expected:\n{_tail(self._log(number))}", hint="hf-spot demo --keep DIR"
        )


class _Progress:
    """One line at the bottom of a terminal, which is written again and again. Elsewhere it shows nothing."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._is_shown = self._stream.isatty()
        self._next_at = 0.0

    def show(self, text: Callable[[], str]) -> None:
        """Show a text, a few times a second at most."""
        now = time.monotonic()
        if self._is_shown and now >= self._next_at:
            self._next_at = now + _SHOW_EVERY_S
            print(f"\r\033[K{text()}", end="", file=self._stream, flush=True)

    def clear(self) -> None:
        """Clear the line, before another one is printed."""
        if self._is_shown:
            print("\r\033[K", end="", file=self._stream, flush=True)


def _print(outcome: Outcome) -> None:
    rows = [
        ("sha256, interrupted", outcome.sha256),
        ("sha256, uninterrupted", outcome.sha256_twin),
        ("loss of every step", "equal" if outcome.losses_equal else "DIFFERENT"),
        ("steps lost with notice", str(outcome.steps_lost_with_notice)),
        ("steps lost to kill -9", str(outcome.steps_lost_to_kill)),
        ("notice to commit", ", ".join(f"{one:.1f} s" for one in outcome.notice_to_commit_s)),
    ]
    print("\n" + "\n".join(f"{name:<24}{value}" for name, value in rows))
    print(f"\n{'The same model, bit for bit.' if outcome.identical else 'The two models DIFFER.'}")


def _checked_plot(plot: Path | None, say: Say) -> Path | None:
    """Return the path of the plot, or None without matplotlib. Check it before the trainings start."""
    try:
        require_matplotlib()
    except ConfigError as error:
        if plot is not None:
            raise
        say(f"no plot is drawn: {error}")
        return None
    chosen = plot or DEFAULT_PLOT
    if not chosen.absolute().parent.is_dir():
        raise ConfigError(
            f"--plot {chosen}: the folder {chosen.absolute().parent} does not exist",
            hint=f"mkdir -p {chosen.absolute().parent}",
        )
    return chosen


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        folder = Path(tempfile.mkdtemp(prefix="hf_spot-demo-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise ConfigError(f"--keep {keep} is not an empty folder", hint="use a folder that does not exist yet")
    try:
        keep.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--keep {keep}: {error.strerror}", hint="use a folder that you can write to") from error
    yield keep.resolve()


def _environ(more: Mapping[str, str]) -> dict[str, str]:
    # One thread: on two cores the twins would otherwise slow each other down, and both must sum in the same order.
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **settings, **more}


@contextlib.contextmanager
def _process(command: list[str], log: Path, environ: dict[str, str]) -> Iterator[psutil.Popen]:
    """Run a process, and kill it and all its children afterwards, whatever happens."""
    with open(log, "wb") as file:
        process = psutil.Popen(command, env=environ, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        _kill_tree(process)


def _kill_tree(process: psutil.Popen) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def _expect(code: int, wanted: int, who: str, log: Path) -> None:
    if code != wanted:
        raise SpotError(f"{who} exited with {code} instead of {wanted}:\n{_tail(log)}", hint="hf-spot demo --keep DIR")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])


def _read(path: Path) -> dict[int, dict[str, float]]:
    """Return the lines of a losses file by step, without an incomplete last line."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return {line["step"]: line for line in lines}


def _by_step(losses: Mapping[int, Mapping[str, float]]) -> dict[int, float]:
    return {step: line["loss"] for step, line in losses.items()}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
