"""A run that starts from a checkpoint of another run, or from a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_spot.errors import ConfigError, CorruptCheckpoint, IncompleteCheckpoint, NoCheckpoint
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.run import Run
from hf_spot.run.start_from import find_start, start_or_resume

Make = Callable[..., Path]


def source(url: str, make_checkpoint: Make, *steps: int, complete: bool = False) -> Run:
    run = Run(url)
    run.claim()
    for step in steps:
        details = {"max_steps": 20, "timing": {"step": step}, "trackers": {"wandb": "an-id"}}
        request = CommitRequest(step=step, complete=complete and step == steps[-1], details=details)
        run.commit(request, run.upload(make_checkpoint(step), request))
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["beside", "inside another folder"])
def test_a_checkpoint_of_another_run_is_the_first_of_a_new_one(place: str, make_checkpoint: Make, tmp_path: Path) -> None:
    old = source(str(tmp_path / "old"), make_checkpoint, 5, 10)
    (tmp_path / "deep").mkdir()
    run = Run(str(tmp_path / ("new" if place == "beside" else "deep/new")))
    assert start_or_resume(run, {"by": "test"}, f"{old.url}@5") == 1
    begun = run.find()
    assert (begun.step, begun.reason, begun.ref.complete) == (5, "from", False)
    assert begun.details["from"] == {"run": old.url, "launch": 1, "step": 5}
    assert begun.details["max_steps"] == 20
    assert not {"timing", "trackers"} & begun.details.keys()
    assert contents(run.pull(tmp_path / "pulled")) == contents(make_checkpoint(5))
    assert run.verify() == {begun.ref.entry: []}
    # Files of one directory are the same file twice, and take no room; pruning one run leaves the other whole.
    name = "optimizer.pt"
    assert (Path(run.url) / begun.ref.prefix / name).samefile(Path(old.url) / old.find(5).ref.prefix / name)
    old.prune(1)
    assert run.verify() == {begun.ref.entry: []}


def test_within_a_bucket_the_server_copies(s3_url: str, make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    old = source(f"{s3_url}/old", make_checkpoint, 5)
    moved: list[str] = []
    for name in ("put_file", "get_file"):
        monkeypatch.setattr(f"hf_spot.storage.s3.S3Store.{name}", lambda self, key, *args, name=name: moved.append(key))
    run = Run(f"{s3_url}/new")
    start_or_resume(run, {"by": "test"}, old.url)
    assert [key for key in moved if "checkpoint-" in key] == []
    monkeypatch.undo()
    assert run.verify() == {run.find().ref.entry: []}


def test_between_two_kinds_of_store_the_files_move_through_this_machine(
    s3_url: str, make_checkpoint: Make, tmp_path: Path
) -> None:
    old = source(str(tmp_path / "old"), make_checkpoint, 5)
    run = Run(s3_url)
    start_or_resume(run, {"by": "test"}, old.url)
    assert run.verify() == {run.find().ref.entry: []}


def test_a_damaged_source_is_not_started_from(s3_url: str, make_checkpoint: Make, tmp_path: Path) -> None:
    old = source(str(tmp_path / "old"), make_checkpoint, 5)
    (Path(old.url) / old.find().ref.prefix / "optimizer.pt").write_bytes(b"zeroed")
    run = Run(s3_url)
    with pytest.raises(CorruptCheckpoint, match=r"optimizer\.pt"):
        start_or_resume(run, {"by": "test"}, old.url)
    assert run.state().latest() is None


def test_a_folder_that_trainer_wrote_is_a_start_whatever_its_name_is(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = make_checkpoint(5)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 5}))
    renamed = folder.rename(folder.with_name("other-checkpoint-5.2"))
    run = Run(str(tmp_path / "new"))
    start_or_resume(run, {"by": "test"}, str(renamed))
    assert run.find().step == 5
    assert contents(run.pull(tmp_path / "pulled")) == contents(renamed)


def test_a_run_with_checkpoints_resumes_from_its_own(
    make_checkpoint: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, run = source(str(tmp_path / "old"), make_checkpoint, 5), source(str(tmp_path / "new"), make_checkpoint, 3)
    caplog.set_level("INFO", logger="hf_spot")
    start_or_resume(run, {"by": "test"}, old.url)
    assert [ref.step for ref in run.state().checkpoints] == [3]
    assert "has checkpoints of its own" in caplog.text
    start_or_resume(run, {"by": "test"}, "nowhere at all")  # as in a restart, after the source was deleted


def test_a_finished_source_stays_finished(make_checkpoint: Make, tmp_path: Path) -> None:
    old = source(str(tmp_path / "old"), make_checkpoint, 5, 10, complete=True)
    assert find_start(old.url).complete
    assert not find_start(f"{old.url}@5").complete


def test_what_is_no_checkpoint_is_refused_before_the_run_is_claimed(make_checkpoint: Make, tmp_path: Path) -> None:
    old = source(str(tmp_path / "old"), make_checkpoint, 5)
    lacking = make_checkpoint(7)
    (lacking / "trainer_state.json").write_text(json.dumps({"global_step": 7}))
    (lacking / "optimizer.pt").unlink()
    (tmp_path / "empty").mkdir()
    old.push(lacking)
    run = Run(str(tmp_path / "new"))
    for name, error, words in (
        (str(tmp_path / "nowhere"), ConfigError, "neither a run nor a checkpoint"),
        (f"{old.url}@6", NoCheckpoint, "no checkpoint of step 6"),
        (f"{old.url}@7", IncompleteCheckpoint, "optimizer"),
        (str(lacking), ConfigError, "lacks optimizer"),
        (str(tmp_path / "empty"), ConfigError, "trainer_state.json"),
        ("s3:/bucket/x", ConfigError, "two slashes"),
    ):
        with pytest.raises(error, match=words):
            start_or_resume(run, {"by": "test"}, name)
    assert run.state().number == 0
