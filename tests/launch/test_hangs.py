"""The launcher finds a training that hangs, and none that doesn't. ``python -m tests.hangs`` plays ten ways to hang."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hf_spot.arguments import SpotArguments
from hf_spot.errors import EXIT_HUNG
from hf_spot.launch import hangs
from hf_spot.launch.group import Group, Hosting, Member, visit
from hf_spot.launch.hangs import HangKeeper
from hf_spot.launch.peers import Peers
from hf_spot.launch.stacks import main_first, stacks_of, state_of
from hf_spot.policy.hangs import Phase
from hf_spot.run.journal_writer import JournalWriter
from hf_spot.run.run import Run
from hf_spot.run.webhook import Hook
from hf_spot.runtime import PhaseTeller, Runtime
from hf_spot.training.session.phases import Phases
from tests.launch.conftest import SCRIPTS, Launcher
from tests.waiting import PATIENCE_S, wait_for


class Watched:
    """A keeper with a clock of its own, and a rank that tells what the test says."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        timeout_s: float | None = None,
        machine: int = 0,
        group: Group | None = None,
    ) -> None:
        (folder / f"runtime-{machine}").mkdir(exist_ok=True)
        self.run = Run(folder / "run")
        if machine == 0:
            self.run.claim({"by": "test"})
        else:
            self.run.adopt(self.run.state().launch)
        self.runtime = Runtime(self.run.url, 1, folder / f"runtime-{machine}", SpotArguments())
        self.now, self.began, self.group = 1000.0, time.monotonic(), group
        self.keeper = HangKeeper(timeout_s, self.run, JournalWriter(self.run), Hook(None, ""), clock=self.clock)
        self.keeper.begin(self.runtime, machine, 1 if group is None else 2, group)
        self.rank = PhaseTeller(self.runtime.phase_path, machine, 1)
        self.state = "S"
        self.waited_s = 0.0
        monkeypatch.setattr(hangs, "stacks_of", lambda ranks, runtime: "File stuck.py")
        monkeypatch.setattr(hangs, "state_of", lambda process: self.state)
        monkeypatch.setattr(hangs, "waited_for_processor_s", lambda process: self.waited_s)

    def clock(self) -> float:
        """The time of the test; while a keeper waits for another one, real time passes, too."""
        return self.now + (0.0 if self.group is None else time.monotonic() - self.began)

    def passes(self, seconds: float, *, every_s: float = 1.0, starved: float = 0.0) -> bool:
        """Look again and again while time passes; whether a hang was found."""
        until = self.now + seconds
        while self.now < until:
            self.now += every_s
            self.waited_s += starved * every_s
            if self.keeper.look():
                return True
        return False


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(tmp_path, monkeypatch)


def test_silence_in_a_step_is_a_hang_and_any_sign_ends_it(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    for step in range(30):
        watched.rank.tell(Phase.STEP, step)
        assert not watched.passes(2)
    assert not watched.passes(590)
    watched.rank.tell(Phase.STEP)
    assert not watched.passes(1795)
    with caplog.at_level(logging.ERROR, "hf_spot"):
        assert watched.passes(20)
    assert "hangs after step 29" in caplog.text and "rank 0 is in a step" in caplog.text and "stuck.py" in caplog.text
    entry = next(one for one in watched.run.events() if one.kind == "hang")
    assert (entry.data["step"], entry.data["phase"], entry.data["again"]) == (29, "step", False)
    assert not watched.keeper.is_final()


@pytest.fixture
def hasty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(tmp_path, monkeypatch, 60.0)


def test_a_suspended_machine_a_frozen_launcher_and_a_debugger_are_no_hang(hasty: Watched) -> None:
    hasty.rank.tell(Phase.STEP, 1)
    assert not hasty.passes(20)
    assert not hasty.passes(8 * 3600, every_s=3600)  # the launcher did not run, either
    hasty.state = "t"
    assert not hasty.passes(3600, every_s=60)
    hasty.state = "S"
    assert hasty.passes(60)


def test_a_rank_without_a_processor_gets_four_times_as_long(hasty: Watched) -> None:
    hasty.rank.tell(Phase.STEP, 1)
    assert not hasty.passes(235, starved=0.97)
    assert hasty.passes(20, starved=0.97)


def test_nothing_is_a_hang_outside_of_a_training_or_when_it_is_off(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.rank.tell(Phase.STEP, 1)
    watched.rank.tell(Phase.OUTSIDE)
    assert not watched.passes(90000, every_s=1000)
    off = Watched(tmp_path, monkeypatch, float("inf"))
    off.rank.tell(Phase.STEP, 1)
    assert not off.passes(90000, every_s=1000)


def test_the_download_of_a_checkpoint_gives_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(tmp_path, monkeypatch, 30.0)
    watched.rank.tell(Phase.RESTORING)
    watched.runtime.expect_prefetch()
    for number in range(5):
        assert not watched.passes(25)
        os.utime(watched.runtime._prefetched_path, ns=(number, number))
    assert watched.passes(40)


def test_the_second_hang_after_the_same_step_is_final_for_other_processes_and_machines_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_checkpoint, caplog: pytest.LogCaptureFixture
) -> None:  # type: ignore[no-untyped-def]
    def hangs_after(step: int) -> Watched:
        watched = Watched(tmp_path, monkeypatch, 30.0)
        watched.rank.tell(Phase.DATA, step)
        watched.passes(2)
        assert watched.passes(60)
        return watched

    assert not hangs_after(7).keeper.is_final()
    assert not hangs_after(8).keeper.is_final()
    final = hangs_after(7)
    assert final.keeper.is_final()
    assert "has hung after step 7 before" in caplog.text and "exit code 79" in caplog.text
    elsewhere = HangKeeper(None, final.run, JournalWriter(final.run), Hook(None, ""))
    assert elsewhere.is_final()
    from hf_spot.run.checkpoint import CommitRequest

    request = CommitRequest(step=9)
    final.run.commit(request, final.run.upload(make_checkpoint(9), request))
    assert not hangs_after(7).keeper.is_final()  # it has passed that step since


def test_ranks_tell_their_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime("run", 1, tmp_path, SpotArguments())
    monkeypatch.setattr("hf_spot.training.session.phases.answer_with_stacks", lambda runtime: None)
    phases = Phases(runtime, rank=3, training=2)
    assert runtime.read_phases() == {}
    phases.tell(Phase.STEP, 5)
    assert runtime.read_phases() == {os.getpid(): (1, Phase.STEP, 5, 3, 2)}
    with phases.within(Phase.SAVING):
        assert runtime.read_phases()[os.getpid()][1] == Phase.SAVING
    phases.sign()
    phases.enter(4)
    phases.tell(Phase.DATA)
    assert runtime.read_phases() == {os.getpid(): (5, Phase.DATA, 5, 3, 4)}
    phases.close()
    assert runtime.read_phases()[os.getpid()][1] == Phase.OUTSIDE
    Phases().tell(Phase.STEP, 1)  # without a launch


class Pair:
    """Two machines with the same clock: what a launch of two is for their keepers."""

    def __init__(self, *machines: Watched) -> None:
        self.machines = machines

    def pass_s(self, seconds: float) -> None:
        for one in self.machines:
            assert not one.passes(seconds)

    def hang(self, group: Group) -> None:
        """No sign any more: the keeper of machine 1 votes, and answers machine 0, which waits for it."""
        main, other = self.machines
        other.passes(60)
        found: list[bool] = []
        answers = threading.Thread(target=lambda: found.append(_until(other.keeper.look)))
        answers.start()
        assert main.passes(60) or _until(main.keeper.look)
        answers.join(PATIENCE_S)
        assert found == [True]


def _until(look: Any) -> bool:
    wait_for(look, "for the hang")
    return True


@pytest.fixture(params=["fixed", "elastic"])
def groups(request: pytest.FixtureRequest) -> Iterator[tuple[Group, Group]]:
    """The connections of machine 0 and of machine 1."""
    if request.param == "fixed":
        one, other = socket.socketpair()
        main, guest = Peers({1: one}, PATIENCE_S), Peers({0: other}, PATIENCE_S)
        yield main, guest
        guest.close()
        main.close()
        return
    hosting = Hosting(Member("h", "h", 1), None, PATIENCE_S)
    visiting = visit(hosting.invitation, Member("g", "g", 1), None, PATIENCE_S)
    wait_for(lambda: hosting.present().waiting, "for the guest")
    hosting.start(1, ["g"], 1)
    wait_for(lambda: visiting.wait_for_go(0.1), "for the launch")
    yield hosting, visiting
    visiting.close()
    hosting.close("leaving")


def test_a_hang_on_two_machines_is_one_entry_with_the_stacks_of_both_and_both_know_when_it_is_the_last(
    tmp_path: Path, groups: tuple[Group, Group], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hangs, "_REPORT_S", 20.0)
    for again in (False, True):
        main, other = (Watched(tmp_path, monkeypatch, 30.0, machine, group) for machine, group in enumerate(groups))
        monkeypatch.setattr(hangs, "stacks_of", lambda ranks, runtime: f"File {runtime.directory.name}.py " + "é" * 50_000)
        pair = Pair(main, other)
        main.rank.tell(Phase.STEP, 7)
        other.rank.tell(Phase.EVALUATION, 7)
        pair.pass_s(2)
        # Machine 1 only waits for machine 0, which goes on.
        assert not other.passes(60)
        for _ in range(5):
            main.rank.tell(Phase.STEP, 7)
            assert not main.passes(20)
        pair.hang(groups[0])
        entries = [one for one in main.run.events() if one.kind == "hang"]
        assert len(entries) == 1 + again
        data = entries[-1].data
        assert (data["machine"], data["rank"], data["step"], data["again"]) == (1, 1, 7, again)
        assert data["ranks"] == ["rank 0 (machine 0): in a step, after step 7", "rank 1 (machine 1): evaluating, after step 7"]
        assert "==== machine 0\nFile runtime-0.py" in data["stacks"] and "==== machine 1\nFile runtime-1.py" in data["stacks"]
        assert main.keeper.is_final() is other.keeper.is_final() is again
    assert "rank 1 (machine 1) is evaluating" in caplog.text


STUCK = """
import ctypes, os, sys, threading
from pathlib import Path
from hf_spot.arguments import SpotArguments
from hf_spot.runtime import Runtime
from hf_spot.training.session.phases import answer_with_stacks
answer_with_stacks(Runtime("run", 1, Path(sys.argv[1]), SpotArguments()))
def keep_the_gil():
    os.write(1, b"ready" + os.linesep.encode())
    while True:
        ctypes.PyDLL(None).sleep(1000)
def idle():
    os.write(1, b"ready" + os.linesep.encode())
    threading.Event().wait()
if os.fork() == 0:
    idle()
keep_the_gil()
"""


def test_stacks_come_from_c_code_that_keeps_the_gil_from_forked_children_and_from_stopped_processes(tmp_path: Path) -> None:
    children: list[psutil.Process] = []
    process = subprocess.Popen([sys.executable, "-c", STUCK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        children = psutil.Process(process.pid).children()
        wait_for(lambda: state_of(process.pid) == "S")  # in C
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: state_of(process.pid) == "T")
        told = stacks_of([process.pid], Runtime("run", 1, tmp_path, SpotArguments()))
    finally:
        for child in children:
            child.kill()
        process.kill()
        process.wait()
        process.stdout.close()
    head, _, child = told.partition("child of")
    assert "stopped by a signal" in head and "in keep_the_gil" in head, told
    assert "in idle" in child, told


def test_a_process_without_the_handler_is_not_killed_by_the_question(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "100"]) as process:
        told = stacks_of([process.pid], Runtime("run", 1, tmp_path, SpotArguments()))
        assert "can't tell its stacks" in told and process.poll() is None
        process.kill()


def test_the_main_thread_comes_first() -> None:
    answer = 'Thread 1 (most recent call first):\n  File "a.py", line 1 in wait\n  File "x/threading.py", line 982 in run\n\n'
    answer += 'Thread 2 (most recent call first):\n  File "b.py", line 1 in <module>'
    assert main_first(answer).splitlines()[1].endswith("in <module>") and "threading.py" not in main_first(answer)


@pytest.mark.slow
def test_a_deadlock_is_found_shown_and_trained_on_and_the_second_one_ends_the_launch(
    launcher: Launcher, tmp_path: Path
) -> None:
    script = [SCRIPTS / "hanging.py", "--output_dir", "out", "--hang", "lock", "--at", "6"]
    launch = launcher.start(str(tmp_path / "run"), script, options=["--hang-timeout", "8"])
    assert launch.wait() == EXIT_HUNG, launch.text()
    text = launch.text()
    assert text.count("the training hangs after step 5") == 2 and text.count("in deadlock") == 3
    assert "resuming from step 4" in text
