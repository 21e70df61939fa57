"""The launcher fetches a checkpoint while the training process still starts."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import textwrap
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError
from hf_spot.launch.command import Command, Machines, Reading
from hf_spot.launch.prefetch import Prefetch, newest_of
from hf_spot.launch.supervisor import launch
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.digest import digest_of
from hf_spot.run.restore import adopt_prefetched, restore_checkpoint
from hf_spot.run.run import Run
from hf_spot.run.selection import Readers
from hf_spot.runtime import Prefetched, Runtime
from tests.launch.conftest import Launcher
from tests.waiting import wait_for

Make = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path, make_checkpoint: Make) -> Run:
    """Two commits of a training whose output_dir is ``other/out``, which is not there any more."""
    run = Run(tmp_path / "store")
    run.claim()
    for step in (1, 2):
        request = CommitRequest(step=step, details={"output_dir": str(tmp_path / "other" / "out")})
        run.commit(request, run.upload(make_checkpoint(step), request))
    return run


@pytest.fixture
def runtime(run: Run, tmp_path: Path) -> Runtime:
    return runtime_in(tmp_path / "runtime", run)


def runtime_in(folder: Path, run: Run) -> Runtime:
    folder.mkdir()
    return Runtime(run.url, run.launch, folder, SpotArguments())


def fetched(
    run: Run, runtime: Runtime, needed: Callable[[], bool] = lambda: True, machines: Machines | None = None
) -> tuple[Prefetch, Prefetched]:
    newest = run.journal.refresh().latest()
    assert newest is not None
    handed = threading.Event()
    ahead = Prefetch(lambda: (run, newest) if handed.wait(60) else (run, None), machines or Machines())
    ahead.hand_to(runtime, needed)
    handed.set()
    return ahead, told_by(runtime)


def told_by(runtime: Runtime) -> Prefetched:
    wait_for(lambda: (told := runtime.read_prefetched()) is not None and told.entry is not None, "for the launcher")
    told = runtime.read_prefetched()
    assert told is not None
    return told


def test_the_newest_checkpoint_is_fetched_to_the_disk_of_its_output_dir_and_moved_where_it_is_wanted(
    run: Run, runtime: Runtime, tmp_path: Path
) -> None:
    assert runtime.read_prefetched() is None
    ahead, told = fetched(run, runtime)
    newest = run.find()
    assert told.entry == newest.ref.entry
    assert told.folder is not None and told.folder.parent.parent == tmp_path, "the nearest folder that is there"
    assert not (tmp_path / "other").exists(), "a script may look whether its output_dir is there"

    out = tmp_path / "elsewhere" / "out"
    adopt_prefetched(told, told.entry, out)
    assert run.compare(newest, out / "checkpoint-2") == []
    adopt_prefetched(told, told.entry, out)
    ahead.close()
    assert [*tmp_path.glob(".hf_spot*")] == []


def test_what_was_verified_as_it_came_is_not_read_again_and_a_folder_that_stands_there_is_read_once(
    run: Run, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead, told = fetched(run, runtime)
    read: list[str] = []
    monkeypatch.setattr(
        "hf_spot.run.manifest.digest_of", lambda path, *hash: (read.append(path.name), digest_of(path, *hash))[1]
    )
    ref, out = run.find().ref, tmp_path / "elsewhere" / "out"
    checkpoint, folder = restore_checkpoint(run, ref, out, prefetched=told)
    assert told.folder is not None and not told.folder.exists()
    assert read == []
    again, same_folder = restore_checkpoint(run, ref, out, prefetched=told)
    assert (again, same_folder) == (checkpoint, folder)
    assert sorted(read) == sorted(Path(file.path).name for file in checkpoint.files)
    ahead.close()


def test_what_was_saved_by_another_number_of_ranks_is_restored_whole(of_two: Run, runtime: Runtime, tmp_path: Path) -> None:
    ahead, told = fetched(of_two, runtime, machines=Machines(count=2, rank=1))
    ref, out = of_two.find().ref, tmp_path / "elsewhere" / "out"
    checkpoint, folder = restore_checkpoint(of_two, ref, out, readers=Readers((1,), 4), prefetched=told)
    assert told.folder is not None and told.folder.exists(), "it holds what rank 1 of two needs, and no more"
    assert of_two.compare(checkpoint, folder) == []
    assert (folder / "model.safetensors").samefile(told.folder / "model.safetensors"), "what both need is not fetched again"
    ahead.close()


def test_what_was_prefetched_where_others_can_write_is_not_used(of_two: Run, runtime: Runtime, tmp_path: Path) -> None:
    ahead, told = fetched(of_two, runtime, machines=Machines(count=2, rank=1))
    assert told.folder is not None
    told.folder.parent.chmod(0o777)
    ref, out = of_two.find().ref, tmp_path / "elsewhere" / "out"
    _, folder = restore_checkpoint(of_two, ref, out, readers=Readers((1,), 4), prefetched=told)
    assert not (folder / "model.safetensors").samefile(told.folder / "model.safetensors")
    ahead.close()


def test_another_commit_than_the_one_that_is_wanted_is_left_where_it_is_and_goes_with_the_launch(
    run: Run, runtime: Runtime, tmp_path: Path
) -> None:
    ahead, told = fetched(run, runtime)
    adopt_prefetched(told, run.find(1).ref.entry, tmp_path / "out-2")
    assert not (tmp_path / "out-2").exists()
    ahead.close()
    assert told.folder is not None and not told.folder.exists()


def test_a_checkpoint_that_is_there_already_is_not_fetched(run: Run, runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "other" / "out" / "checkpoint-2").mkdir(parents=True)
    ahead, told = fetched(run, runtime)
    assert told.folder is None
    ahead.close()


def test_a_damaged_one_is_left_to_the_training_process_which_knows_what_to_do(
    run: Run, runtime: Runtime, tmp_path: Path
) -> None:
    (tmp_path / "store" / run.find().ref.prefix / "optimizer.pt").write_bytes(b"x")
    ahead, told = fetched(run, runtime)
    assert told.folder is None
    adopt_prefetched(told, run.find().ref.entry, tmp_path / "out-2")
    assert not (tmp_path / "out-2").exists()
    ahead.close()


def test_nothing_is_fetched_for_a_machine_that_is_going(run: Run, runtime: Runtime) -> None:
    ahead, told = fetched(run, runtime, lambda: False)
    assert told.folder is None
    ahead.close()


@pytest.mark.parametrize("why", ["it has no commits", "it is finished", "it can't be read"])
def test_a_run_that_nothing_will_be_trained_from_is_not_fetched(run: Run, runtime: Runtime, tmp_path: Path, why: str) -> None:
    if why == "it is finished":
        run.record("finished", {})
    url = {"it is finished": run.url, "it has no commits": str(tmp_path / "fresh")}.get(why, "ftp://nowhere/run")
    ahead = Prefetch(partial(newest_of, url))
    ahead.hand_to(runtime, lambda: True)
    assert told_by(runtime).folder is None
    assert not ahead.serves(run.find().ref)
    assert [*tmp_path.glob(".hf_spot*")] == []


def test_a_download_that_began_before_the_options_were_known_serves_its_own_commit_alone(run: Run, tmp_path: Path) -> None:
    older, newest = run.state().checkpoints
    ahead = Prefetch(partial(newest_of, run.url))
    wait_for(lambda: [*tmp_path.glob(".hf_spot-restore-*/checkpoint-2")], "for the download")
    assert ahead.serves(newest)
    assert not ahead.serves(older), "a launch that has died has just committed another"
    assert [*tmp_path.glob(".hf_spot*")] == []
    assert not ahead.serves(newest), "it is closed"


@pytest.mark.parametrize("wrong", [False, True])
def test_it_is_under_way_before_the_options_are_known_and_gone_without_a_trace_if_they_are_wrong(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    class Late(Reading):
        def result(self) -> Command:
            wait_for(lambda: [*tmp_path.glob(".hf_spot-restore-*/checkpoint-2")], "for the download")
            return super().result()

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit(7)")
    options = ["--num_processes", "1", "--notice", "none", "--max-restarts", "-1" if wrong else "0"]
    reading = Late(["--store", run.url, *options, str(script)])
    if wrong:
        with pytest.raises(ConfigError, match="-1"):
            launch(reading)
    else:
        assert launch(reading) == 7
    assert [*tmp_path.glob(".hf_spot*")] == []


def test_before_the_machines_are_known_a_disk_that_they_may_share_is_left_alone(
    run: Run, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_spot.launch.prefetch._OF_ONE_MACHINE", ("none of these",))
    ahead = Prefetch(partial(newest_of, run.url))
    ahead.hand_to(runtime, lambda: True)
    assert told_by(runtime).folder is None
    assert not ahead.serves(run.find().ref)
    assert [*tmp_path.glob(".hf_spot*")] == []


@pytest.fixture
def of_two(run: Run, tmp_path: Path, make_checkpoint: Make) -> Run:
    """Its newest commit is one of two ranks."""
    folder = make_checkpoint(3)
    for rank in (0, 1):
        (folder / f"rng_state_{rank}.pth").write_text(f"of rank {rank}")
    details = {"output_dir": str(tmp_path / "other" / "out"), "world_size": 2}
    request = CommitRequest(step=3, world_size=2, details=details)
    run.commit(request, run.upload(folder, request))
    return run


def test_of_two_machines_each_fetches_what_its_own_ranks_need(of_two: Run, runtime: Runtime, tmp_path: Path) -> None:
    ahead, told = fetched(of_two, runtime, machines=Machines(count=2, rank=1))
    other, not_mine = fetched(of_two, runtime_in(tmp_path / "runtime-0", of_two), machines=Machines(count=2, rank=0))
    assert told.folder is not None and not_mine.folder is not None and told.folder != not_mine.folder
    assert {path.name for path in told.folder.glob("rng_state_*")} == {"rng_state_1.pth"}
    assert {path.name for path in not_mine.folder.glob("rng_state_*")} == {"rng_state_0.pth"}
    for wanted in (None, Readers((0,), 2), Readers((0, 1), 2), Readers((1,), 3)):
        adopt_prefetched(told, told.entry or 0, tmp_path / "out-2", readers=wanted)
        assert not (tmp_path / "out-2").exists()
    adopt_prefetched(told, told.entry or 0, tmp_path / "out-2", readers=Readers((1,), 2))
    assert of_two.compare(of_two.find(), tmp_path / "out-2" / "checkpoint-3", readers=Readers((1,), 2)) == []
    ahead.close()
    other.close()


def test_a_disk_that_the_machines_may_share_is_left_to_machine_0(
    of_two: Run, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_spot.launch.prefetch._OF_ONE_MACHINE", ("none of these",))
    ahead, told = fetched(of_two, runtime, machines=Machines(count=2, rank=1))
    assert told.folder is None
    ahead.close()
    on_main = runtime_in(tmp_path / "on-main", of_two)
    ahead, told = fetched(of_two, on_main, machines=Machines(count=2, rank=0))
    adopt_prefetched(told, told.entry or 0, tmp_path / "out-2")
    assert of_two.compare(of_two.find(), tmp_path / "out-2" / "checkpoint-3") == []
    ahead.close()


def test_who_wants_it_waits_while_it_is_under_way_and_may_leave(runtime: Runtime, tmp_path: Path) -> None:
    class Going(Exception):
        pass

    def leave() -> None:
        raise Going

    runtime.expect_prefetch()
    with pytest.raises(Going):
        runtime.wait_for_prefetched(leave)
    waits = threading.Event()
    asker = threading.Thread(target=runtime.wait_for_prefetched, args=(waits.set,))
    asker.start()
    assert waits.wait(60)
    runtime.tell_prefetched(Prefetched(1))
    asker.join(60)
    assert not asker.is_alive()


@pytest.mark.fresh_python
def test_a_launch_has_fetched_it_before_a_script_that_imports_for_long_asks(
    launcher: Launcher, run: Run, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import json, os
        from pathlib import Path
        from hf_spot.run.restore import adopt_prefetched
        from hf_spot.runtime import Runtime
        runtime = Runtime.from_environ(os.environ)
        told = runtime.wait_for_prefetched(lambda: None)
        assert adopt_prefetched(told, told.entry, Path("here"))
        Path("told.json").write_text(json.dumps([told.entry, sorted(os.listdir("here/checkpoint-2"))]))
        raise SystemExit(7)
        """)
    )
    newest = run.find()
    launch = launcher.start(run.url, [script], options=["--max-restarts", "0"])
    assert launch.wait() == 7, launch.text()
    entry, names = json.loads((tmp_path / "told.json").read_text())
    assert entry == newest.ref.entry
    assert "optimizer.pt" in names
    assert [*tmp_path.glob(".hf_spot*")] == []
    shutil.rmtree(tmp_path / "here")


def test_it_goes_to_a_folder_that_nobody_can_guess_enter_or_make_before(run: Run, runtime: Runtime, tmp_path: Path) -> None:
    _, told = fetched(run, runtime)
    assert told.folder is not None
    first = told.folder.parent
    assert stat.S_IMODE(first.stat().st_mode) == 0o700
    # A launch that is killed now leaves it; and somebody else has made one of that name.
    planted = first.with_name(f"{first.name}x")
    planted.mkdir(mode=0o777)
    planted.chmod(0o777)
    (planted / "bait").touch()
    _, again = fetched(run, runtime_in(tmp_path / "again", run))
    assert again.folder is not None
    assert again.folder.parent != first
    assert not first.exists(), "what a killed launch has left is removed"
    assert (planted / "bait").exists(), "and what others have made is not touched"
    assert run.compare(run.find(), again.folder) == []


@pytest.mark.parametrize("way", ["another user's", "a link", "everybody's", "one's own, of something else", "untouched"])
@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_what_somebody_puts_in_its_place_is_never_trained_on(
    way: str, mode: int, run: Run, runtime: Runtime, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if way == "another user's" and os.geteuid() != 0:
        pytest.skip("only root can make a folder another user's")
    tmp_path.chmod(mode)
    ahead, told = fetched(run, runtime)
    assert told.folder is not None
    mine, planted = told.folder.parent, tmp_path / "planted"
    if way != "untouched":
        shutil.copytree(mine, planted)
        planted.chmod(0o700)
        (planted / told.folder.name / "model.safetensors").write_bytes(bytes(1000))
        mine.rename(tmp_path / "taken away")
        if way == "a link":
            mine.symlink_to(planted)
        else:
            planted.rename(mine)
        if way == "another user's":
            for path in (mine, *mine.rglob("*")):
                os.chown(path, 65534, 65534)
        elif way == "everybody's":
            mine.chmod(0o777)
    checkpoint, folder = restore_checkpoint(run, run.find().ref, tmp_path / "elsewhere", prefetched=told)
    assert not told.folder.exists() or way != "untouched"
    # In a sticky folder nobody else can rename what is this user's.
    if (way, mode) != ("one's own, of something else", 0o1777):
        assert run.compare(checkpoint, folder) == []
    ahead.close()
