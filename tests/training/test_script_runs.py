"""Tracker runs that a script begins itself get the same ids in each launch; `tests.trackers` does it with real packages."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_spot import Run
from hf_spot.training.session import script_runs
from hf_spot.training.session.script_runs import ScriptRuns

# As much of a tracker's package as a script calls: what it was asked to begin is its run.
PACKAGE = """
from types import SimpleNamespace
run = None
def init(project=None, name=None, id=None, resume=None, **more):
    return SimpleNamespace(id=id, resume=resume, name=name, project=project)
def get_run():
    raise RuntimeError("No active Run. Call swanlab.init() first.")
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "packages"
    folder.mkdir()
    for name in ("wandb", "swanlab"):
        (folder / f"{name}.py").write_text(PACKAGE)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1"])
    for name in ("WANDB_RUN_ID", "SWANLAB_RUN_ID", "WANDB_SWEEP_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in ("wandb", "swanlab"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(store: str) -> Run:
    begun = Run(store)
    begun.claim({})
    return begun


def launch(run: Run, name: str) -> Iterator[tuple[ScriptRuns, Any]]:
    """One launch of a script: whatever begins here ends at the end of the block."""
    watching = ScriptRuns(lambda: run)
    watching.watch()
    module = importlib.import_module(name)
    yield watching, module
    watching.close()
    del sys.modules[name]


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_each_launch_continues_what_the_first_has_begun(packages: None, run: Run, name: str) -> None:
    seen = []
    for _ in range(2):
        for watching, module in launch(run, name):
            begun = [module.init(project="p"), module.init(project="p"), module.init(project="p", name="other")]
            assert [one.resume for one in begun] == ["allow"] * 3
            assert watching.places()[name]["id"] == begun[-1].id
            seen.append([one.id for one in begun])
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 3


def test_another_command_begins_another_run(packages: None, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = set()
    for rate in "12":
        monkeypatch.setattr(sys, "argv", ["train.py", "--lr", rate])
        for _, wandb in launch(run, "wandb"):
            ids.add(wandb.init(project="p").id)
    assert len(ids) == 2


def test_what_the_script_chooses_is_left(packages: None, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for _, wandb in launch(run, "wandb"):
        assert wandb.init(id="mine").id == "mine"
        assert wandb.init(resume="must").id is None
        monkeypatch.setenv("WANDB_RUN_ID", "mine")
        assert wandb.init().id is None
        monkeypatch.delenv("WANDB_RUN_ID")
        wandb.run = SimpleNamespace(id="active", url=None, dir="x/y")
        assert wandb.init().id is None


def test_other_ranks_and_what_is_closed_are_left(packages: None, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    watching = ScriptRuns(lambda: run)
    watching.watch()
    watching.close()
    assert importlib.import_module("wandb").init().id is None
    monkeypatch.setenv("RANK", "1")
    for _, swanlab in launch(run, "swanlab"):
        assert swanlab.init().id is None


def test_a_run_that_is_not_known_yet_is_named(packages: None, caplog: pytest.LogCaptureFixture) -> None:
    watching = ScriptRuns(lambda: None)
    watching.watch()
    assert importlib.import_module("wandb").init().id is None
    assert "Weights & Biases begins a new run in this launch" in caplog.text
    assert "manager.load_latest(…)" in caplog.text
    watching.close()


def test_a_store_that_fails_ends_no_script(packages: None, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> Run:
        raise OSError("no network")

    watching = ScriptRuns(fail)
    watching.watch()
    assert importlib.import_module("wandb").init(project="p").project == "p"
    assert "OSError: no network" in caplog.text
    watching.close()


def test_a_process_of_a_launch_watches_once(packages: None, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setattr(script_runs, "_of_launch", [])
    script_runs.watch_launch(str(run.url))
    script_runs.watch_launch(str(run.url))
    watching = script_runs.of_launch()
    assert watching is not None
    assert importlib.import_module("wandb").init().id is not None
    watching.close()
