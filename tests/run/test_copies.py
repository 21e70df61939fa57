"""Whole runs: listed, copied, moved, deleted and forked, in a directory and in a bucket; and what stands where no run is."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from hf_spot.cli import main
from hf_spot.errors import ConfigError, ObjectNotFound
from hf_spot.run.below import find_runs, what_is_there
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.copies import copy_run, delete_run
from hf_spot.run.run import Run
from hf_spot.storage.local import LocalStore

Make = Callable[..., Path]


def made(url: str, make_checkpoint: Make, *steps: int, ended: str | None = "preempted") -> Run:
    run = Run(url)
    run.claim({"by": "test"})
    for step in steps:
        request = CommitRequest(step=step, details={"max_steps": 20})
        run.commit(request, run.upload(make_checkpoint(step), request))
    if ended is not None:
        run.record(ended, {"step": max(steps, default=0)})
    return run


def objects(run: Run) -> dict[str, bytes]:
    return {info.key: run.store.get(info.key) for info in run.store.list()}


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, Any]:
    code = main([*map(str, argv), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out or err)


@pytest.fixture(params=["local", "s3"])
def above(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3_url"))
    (tmp_path / "runs").mkdir()
    return str(tmp_path / "runs")


def test_runs_are_listed_with_what_they_are(above: str, make_checkpoint: Make, capsys: pytest.CaptureFixture[str]) -> None:
    made(f"{above}/b", make_checkpoint, 5, 10, ended="finished")
    made(f"{above}/a", make_checkpoint, 5, ended=None)
    if not above.startswith("s3"):
        Path(above, "deep").mkdir()
    made(f"{above}/deep/c", make_checkpoint)
    code, rows = call(capsys, "runs", "ls", above)
    assert code == 0
    assert [(row["name"], row["state"], row["step"], row["max_steps"], row["launches"]) for row in rows] == [
        ("a", "not ended", 5, 20, 1),
        ("b", "finished", 10, 20, 1),
        ("deep/c", "preempted", 0, None, 1),
    ]
    assert all(row["size_bytes"] > 0 for row in rows)
    assert [row["name"] for row in call(capsys, "runs", "ls", above, "--sort", "step")[1]] == ["b", "a", "deep/c"]
    assert main(["runs", "ls", above]) == 0
    assert "5 of 20" in capsys.readouterr().out
    (one,) = find_runs(f"{above}/b")
    assert (one.name, one.state.ended if one.state else None) == ("", "finished")


def test_a_damaged_run_does_not_hide_the_others(
    make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(str(tmp_path / "a"), make_checkpoint, 5)
    made(str(tmp_path / "b"), make_checkpoint)
    for path in (tmp_path / "b" / "journal").iterdir():
        path.write_text("rotten")
    assert [(one.name, bool(one.problem)) for one in find_runs(str(tmp_path))] == [("a", False), ("b", True)]
    assert main(["runs", "ls", str(tmp_path)]) == 0
    assert "b: not a journal entry" in capsys.readouterr().err


def test_a_copy_is_the_same_run_and_the_store_copies_the_files(
    above: str, make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made(f"{above}/old", make_checkpoint, 5, 10, 15)
    source.prune(2)
    moved: list[str] = []
    kind, target = type(source.store), Run(f"{above}/new")
    with monkeypatch.context() as patch:
        for name in ("put_file", "get_file"):
            patch.setattr(kind, name, lambda self, key, *args, name=name: moved.append(key))
        copy_run(source, target)
    assert moved == []
    assert objects(target) == objects(source)
    again = Run(f"{above}/new")
    assert again.state() == source.state() and [one.kind for one in again.events()] == [one.kind for one in source.events()]
    assert again.verify() == {ref.entry: [] for ref in source.state().checkpoints}
    assert again.claim() == 2 and source.state().launch == 1


def test_a_copy_between_kinds_of_stores(s3_url: str, make_checkpoint: Make, tmp_path: Path) -> None:
    source = made(str(tmp_path / "old"), make_checkpoint, 5)
    copy_run(source, Run(f"{s3_url}/new"))
    assert objects(Run(f"{s3_url}/new")) == objects(source)


@pytest.mark.parametrize("fails_at", range(1, 14))
def test_a_copy_that_was_killed_is_no_run_or_a_whole_one_and_goes_on(
    fails_at: int, make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made(str(tmp_path / "old"), make_checkpoint, 5, 10, 15)
    source.prune(1)
    count = 0

    def killed(name: str) -> Any:
        real = getattr(LocalStore, name)

        def call(self: LocalStore, *args: Any) -> Any:
            nonlocal count
            if self.url.endswith(("new", str(tmp_path))):
                count += 1
                if count == fails_at:
                    raise KeyboardInterrupt
            return real(self, *args)

        return call

    for name in ("copy", "create", "put"):
        monkeypatch.setattr(LocalStore, name, killed(name))
    with contextlib.suppress(KeyboardInterrupt):
        copy_run(source, Run(str(tmp_path / "new")))
    monkeypatch.undo()
    half = Run(str(tmp_path / "new"))
    state = half.state()
    if state.number:
        assert state == source.state()
        with contextlib.suppress(ObjectNotFound):  # of a commit's entry, but never of a file
            assert half.verify() == {ref.entry: [] for ref in state.checkpoints}
    copy_run(source, Run(str(tmp_path / "new")))
    whole = objects(Run(str(tmp_path / "new")))
    assert {key: data for key, data in whole.items() if "probe" not in key} == objects(source)


def test_a_checkpoint_that_is_pruned_meanwhile_is_not_in_the_copy(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made(str(tmp_path / "old"), make_checkpoint, 5, 10, ended=None)
    real, pruned, one_at_a_time = LocalStore.copy, [], threading.Lock()

    def copy(self: LocalStore, one: str, other: str) -> None:
        with one_at_a_time:
            real(self, one, other)
            if "checkpoint-5/" in one and not pruned:
                pruned.append(source.prune(1))

    monkeypatch.setattr(LocalStore, "copy", copy)
    target = Run(str(tmp_path / "new"))
    copy_run(source, target)
    assert [ref.step for ref in target.state().checkpoints] == [10]
    assert objects(target) == objects(source)


@pytest.mark.parametrize("place", ["", "inside", "other"])
def test_what_a_run_can_not_be_copied_to(place: str, make_checkpoint: Make, tmp_path: Path) -> None:
    source = made(str(tmp_path / "old"), make_checkpoint, 5)
    made(str(tmp_path / "other"), make_checkpoint, 5)
    before = objects(source)
    url = {"": "old", "inside": "old/new", "other": "other"}[place]
    with pytest.raises(ConfigError):
        copy_run(source, Run(str(tmp_path / url)))
    assert objects(source) == before


def test_a_run_is_moved_and_nothing_else(above: str, make_checkpoint: Make, capsys: pytest.CaptureFixture[str]) -> None:
    source = made(f"{above}/old", make_checkpoint, 5)
    for mine in (theirs := ["logs/run/events.out.tfevents.1", "logs/train.txt", "notes.txt"]):
        source.store.put(mine, b"mine")
    source.store.put("logs/i-1.log", b"shipped")
    before = objects(source)
    assert call(capsys, "runs", "mv", f"{above}/old", f"{above}/new", "--dry-run")[0] == 0
    assert objects(source) == before
    assert main(["runs", "mv", f"{above}/old", f"{above}/new", "--yes"]) == 0
    assert "3 other objects stay there, such as logs/run/events.out.tfevents.1" in capsys.readouterr().out
    assert [*objects(source)] == theirs
    for one in theirs:
        del before[one]
    assert objects(Run(f"{above}/new")) == before


def test_a_run_is_deleted_and_its_neighbours_stay(
    above: str, make_checkpoint: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    made(f"{above}/a", make_checkpoint, 5)
    other = made(f"{above}/ab", make_checkpoint, 5)
    below = made(f"{above}/a/below", make_checkpoint, 5)
    kept = objects(other), objects(below)
    assert call(capsys, "runs", "rm", f"{above}/a", "--dry-run")[1]["deleted"] is False
    assert Run(f"{above}/a").state().number
    code, error = call(capsys, "runs", "rm", f"{above}/a")
    assert (code, error["hint"]) == (2, "--yes")
    assert call(capsys, "runs", "rm", f"{above}/a", "--yes")[1]["deleted"] is True
    assert not Run(f"{above}/a").state().number
    assert (objects(other), objects(below)) == kept
    assert call(capsys, "runs", "rm", f"{above}/a", "--yes")[0] == 2


def test_a_deletion_that_was_killed_leaves_the_newest_state_and_goes_on(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(str(tmp_path / "old"), make_checkpoint, 5, 10)
    run.prune(1)
    state, real, count = run.state(), LocalStore.delete, 0

    def delete(self: LocalStore, keys: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        real(self, keys)

    monkeypatch.setattr(LocalStore, "delete", delete)
    with pytest.raises(KeyboardInterrupt):
        delete_run(run)
    monkeypatch.undo()
    half = Run(str(tmp_path / "old"))
    assert half.state() == state
    assert all([*half.store.list(f"{ref.prefix}/")] for ref in state.checkpoints)
    delete_run(half)
    assert not objects(half)


def test_a_launch_that_may_be_running_is_left_alone(
    make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(str(tmp_path / "old"), make_checkpoint, 5, ended=None)
    for words in (["rm", run.url], ["mv", run.url, tmp_path / "new"]):
        code, error = call(capsys, "runs", *words, "--yes")
        assert code == 2 and "may be running" in error["error"] and "--not-running" in error["hint"]
    assert run.state().launch == 1
    assert call(capsys, "runs", "mv", run.url, tmp_path / "new", "--yes", "--not-running")[0] == 0
    moved = Run(tmp_path / "new")
    assert [ref.step for ref in moved.state().checkpoints] == [5]
    assert call(capsys, "runs", "cp", moved.url, tmp_path / "third")[0] == 0  # it may be running


def test_a_fork_begins_at_the_step(above: str, make_checkpoint: Make, capsys: pytest.CaptureFixture[str]) -> None:
    old = made(f"{above}/old", make_checkpoint, 5, 10, ended=None)
    assert call(capsys, "runs", "fork", f"{old.url}@5", f"{above}/new", "--dry-run")[1]["step"] == 5
    assert not Run(f"{above}/new").state().number
    assert call(capsys, "runs", "fork", f"{old.url}@5", f"{above}/new")[1] == {"new": f"{above}/new", "step": 5}
    run = Run(f"{above}/new")
    assert [(one.step, one.reason) for one in run.checkpoints()] == [(5, "from")]
    assert old.state().launch == 1
    assert call(capsys, "runs", "fork", old.url, f"{above}/new")[0] == 2
    assert call(capsys, "runs", "rm", old.url, "--dry-run")[0] == 2  # its launch may be running
    assert call(capsys, "runs", "rm", run.url, "--dry-run")[0] == 0  # nobody has launched it
    run.claim({"by": "test"})
    assert call(capsys, "runs", "rm", run.url, "--dry-run")[0] == 2


def test_prune_can_be_tried(make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(str(tmp_path / "run"), make_checkpoint, 5, 10)
    before = objects(run)
    words = ["checkpoints", "prune", run.url, "--save-total-limit", "1", "--dry-run"]
    assert [ref["step"] for ref in call(capsys, *words)[1]] == [5]
    assert objects(run) == before


def test_what_stands_where_no_run_is_is_said(
    make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    made(str(tmp_path / "runs" / "llama"), make_checkpoint, 5)
    assert what_is_there(str(tmp_path / "runs")) == ("there is no run, but below it: llama", f"hf-spot runs ls {tmp_path}/runs")
    assert what_is_there(str(tmp_path / "runs" / "lama")) == ("there is nothing", f"did you mean {tmp_path}/runs/llama?")
    (tmp_path / "output" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "output" / "checkpoint-5" / "model.safetensors").touch()
    assert what_is_there(str(tmp_path / "output"))[0] == "there is no run, but a folder with checkpoint-5"
    for words in (["checkpoints", "ls"], ["report"], ["runs", "ls"]):
        assert main([*words, str(tmp_path / "runs" / "lama")]) == 0
        assert f"did you mean {tmp_path}/runs/llama?" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "runs")
    assert what_is_there("lama") == ("there is nothing", f"did you mean {tmp_path}/runs/llama?")
    assert main(["runs", "follow", str(tmp_path / "runs" / "lama")]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_a_run_is_followed_as_lines_and_as_a_picture(
    make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from hf_spot.economics.follow import Follower, picture_of

    run = made(str(tmp_path / "run"), make_checkpoint, ended=None)
    for step in (5, 10):
        timing = {"steps_s": step * 2.0, "steps": step, "step": step}
        request = CommitRequest(step=step, details={"max_steps": 20, "timing": timing})
        run.commit(request, run.upload(make_checkpoint(step), request))
    view = Follower(run).look(datetime.now(timezone.utc) + timedelta(seconds=5))
    assert (view.step, view.likely_step, view.max_steps, view.step_s, view.next_save) == (10, 12, 20, 2.0, 15)
    assert view.left == timedelta(seconds=16)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(picture_of(view))
    text = console.export_text()
    for word in ("10 of 20 committed, about 12 reached", "2.0 s a step, 16 s left", "next save is due at step 15"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 80
    run.record("notice", {"kind": "TERMINATE", "source": "signal", "id": "SIGINT 2030-01-31", "deadline": None})
    run.record("finished", {"step": 10})
    assert main(["runs", "follow", run.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[21:].split(" (")[0] for line in lines] == [
        "launch 1 begins on test",
        "step 5 of 20 committed",
        "step 10 of 20 committed",
        "notice: interrupted by Ctrl-C",
        "launch 1 has ended: finished",
    ]
    assert call(capsys, "runs", "follow", run.url)[1]["ended"] == "finished"
    assert "step 10 committed" in str(run) and repr(run) == f"Run({run.url!r})"
