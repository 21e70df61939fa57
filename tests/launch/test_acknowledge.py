"""Azure is told that a machine may go when everything is committed, and at no other time. The training is a script without
torch, which writes into the journal what a training would."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hf_spot.arguments import SpotArguments
from hf_spot.launch.command import Command
from hf_spot.launch.supervisor import Supervisor
from hf_spot.run.run import Run
from hf_spot.testing import FakeAzure

PREAMBLE = """
import os, sys, time
from pathlib import Path
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.run import Run
from hf_spot.runtime import Runtime, StepCounter

runtime = Runtime.from_environ(os.environ)
run = Run(runtime.store)
run.adopt(runtime.launch)
Path("ready").touch()
while runtime.read_notice() is None:
    time.sleep(0.01)
"""
COMMITS = """
request = CommitRequest(step=5)
run.commit(request, run.upload(Path("checkpoint-5"), request))
"""


@pytest.fixture
def azure() -> Iterator[FakeAzure]:
    with FakeAzure() as server:
        yield server


@pytest.fixture
def supervise(
    azure: FakeAzure, tmp_path: Path, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], int]:
    """Runs a training that ends with the given lines after a notice of Azure; the exit code of the launch."""
    make_checkpoint(5, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, value in azure.env().items():
        monkeypatch.setenv(name, value)

    def run(ending: str) -> int:
        script = tmp_path / "training.py"
        script.write_text(PREAMBLE + textwrap.dedent(ending))
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        arguments = SpotArguments(notice="azure")
        command = Command(str(tmp_path / "run"), arguments, 0, [sys.executable, str(script)], environ)
        azure.interrupt(in_s=60)
        return Supervisor(Run(command.store), command).supervise()

    return run


def test_azure_is_told_after_the_commit_of_the_last_step(
    azure: FakeAzure, supervise: Callable[[str], int], tmp_path: Path
) -> None:
    ending = """
from hf_spot.notices.azure import AzureSource
run.record("preempted", {"step": 5, "committed_step": 5})
Path("deadline").write_text(str(AzureSource.from_environ(os.environ).poll().deadline))
sys.exit(75)
"""
    assert supervise(COMMITS + ending) == 75
    assert (tmp_path / "deadline").read_text() != "None"  # as long as the training lived the end had not begun
    assert len(azure.acknowledged) == 1


@pytest.mark.parametrize(
    "ending",
    [
        pytest.param(
            COMMITS + 'run.record("preempted", {"step": 7, "committed_step": 5}); sys.exit(75)', id="a step is not committed"
        ),
        pytest.param(
            COMMITS
            + 'run.record("preempted", {"step": 7, "committed_step": 5, "stage": 2}); '
            + 'run.record("preempted", {"step": 5, "committed_step": 5}); sys.exit(75)',
            id="a step of a training beside it is not committed",
        ),
        pytest.param(COMMITS + "StepCounter(runtime.step_path).tell(7); sys.exit(75)", id="the training said nothing"),
        pytest.param("sys.exit(75)", id="nothing was trained"),
    ],
)
def test_azure_is_not_told_when_it_is_not_certain_that_all_is_committed(
    azure: FakeAzure, supervise: Callable[[str], int], ending: str
) -> None:
    assert supervise(ending) == 75
    assert azure.acknowledged == []


def test_azure_is_not_told_when_a_newer_launch_has_taken_the_run(azure: FakeAzure, supervise: Callable[[str], int]) -> None:
    ending = 'run.record("preempted", {"step": 5, "committed_step": 5}); Run(runtime.store).claim(); sys.exit(75)'
    assert supervise(COMMITS + ending) == 76
    assert azure.acknowledged == []


def test_a_training_that_finishes_after_all_lets_azure_wait(azure: FakeAzure, supervise: Callable[[str], int]) -> None:
    assert supervise(COMMITS + "sys.exit(0)") == 0
    assert azure.acknowledged == []
