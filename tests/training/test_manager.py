"""Loops without Trainer: the one that a user had, with one import changed, ends as if nothing had happened to it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from hf_spot import ConfigError, Fenced, Run, SpotArguments, SpotCheckpointManager, StoreError, TrainingPreempted
from hf_spot.errors import StoreUnavailable
from hf_spot.storage.memory import MemoryStore
from tests.small_disk import SmallDisk, why_not
from tests.training.loops import SCRIPTS, Loop, Loops, loops_in
from tests.waiting import wait_for
from tests.zygote import Zygote


@pytest.fixture
def loops(tmp_path: Path) -> Iterator[Loops]:
    with loops_in(tmp_path) as loops:
        yield loops


def kinds(run: Run) -> list[str]:
    return [entry.kind for entry in run.events()]


@pytest.mark.parametrize("workers", [[], ["--workers", "2", "--persistent"]])
def test_a_loop_ends_as_its_home_made_twin_after_kills_and_a_notice(loops: Loops, workers: list[str]) -> None:
    twin = loops.run("twin", *workers, home_made=True)

    kills = [9] if workers else [6, 9]  # in the middle of an epoch, and at the end of one
    for kill_at in kills:
        assert loops.start("run", *workers, "--kill_at", str(kill_at), "--committed").wait() == -signal.SIGKILL
    held = loops.start("run", *workers, "--hold_at", "13")
    held.wait_for_step(13)
    held.interrupt()
    held.go_on_when_it_says("TERMINATE from signal")
    assert held.wait() == 0, held.text()
    run = Run(loops.folder / "run")
    newest = run.latest()
    assert newest is not None and (newest.step, newest.reason) == (13, "notice")
    assert kinds(run)[-1] == "preempted"
    last = loops.run("run", *workers)

    assert last.end() == twin.end()
    steps = {line["step"]: line for line in twin.lines()}
    first = [*range(1, 10)] if workers else [*range(1, 7), *range(5, 10)]
    assert [line["step"] for line in last.lines()] == [*first, *range(9, 14), *range(14, 19)]
    assert all(line == steps[line["step"]] for line in last.lines())
    assert [one.step for one in run.checkpoints()] == [12, 13, 16]
    assert not any(run.verify().values())


@pytest.mark.parametrize("accelerate", [[], ["--accelerate"]])
def test_two_ranks_stop_at_the_same_step_and_go_on_exactly(
    loops: Loops, accelerate: list[str], loop_of_ranks_in_peace: Path
) -> None:
    twin = Loop([], loop_of_ranks_in_peace / "twin.json", loop_of_ranks_in_peace / "twin.log")
    if accelerate:
        twin = loops.run("twin", *accelerate, script="ddp_loop.py", ranks=2)

    killed = loops.start("run", *accelerate, "--hold_at", "5", script="ddp_loop.py", ranks=2)
    killed.wait_for_step(5)
    killed.wait_until_it_says("checkpoint-4 committed")
    for rank in (0, 1):
        killed.interrupt(signal.SIGKILL, rank)
    assert killed.wait() == -signal.SIGKILL
    notice = loops.folder / "notice-1"
    heard_by_1 = {"NOTICE_OF_RANK_1": str(notice)}
    held = loops.start("run", *accelerate, "--hold_at", "6", script="ddp_loop.py", ranks=2, env=heard_by_1)
    held.wait_for_step(6)
    notice.touch()
    held.go_on_when_it_says("TERMINATE from file")
    assert held.wait() == 0, held.text()
    newest = Run(loops.folder / "run").latest()
    assert newest is not None and newest.reason == "notice"
    assert newest.step in (6, 7)  # rank 1 may have said already that it had heard nothing
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.path for file in newest.files}
    last = loops.run("run", *accelerate, script="ddp_loop.py", ranks=2)

    assert last.end() == twin.end()
    steps = {line["step"]: line for line in twin.lines()}
    trained = [*range(1, 6), *range(5, newest.step + 1), *range(newest.step + 1, len(steps) + 1)]
    assert [line["step"] for line in last.lines()] == trained
    assert all(line == steps[line["step"]] for line in last.lines())


# -- in this process --------------------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path: Path, store: str) -> Iterator[Callable[..., SpotCheckpointManager]]:
    made: list[SpotCheckpointManager] = []

    def make(**settings: Any) -> SpotCheckpointManager:
        local_dir = settings.pop("local_dir", tmp_path / f"local-{len(made)}")
        arguments = SpotArguments(notice=f"file:{tmp_path / 'notice'}", **settings)
        made.append(SpotCheckpointManager(store, 2, args=arguments, local_dir=local_dir))
        return made[-1]

    yield make
    for manager in made:
        manager.close()


def small(width: int = 4) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, None


def notice(tmp_path: Path, manager: SpotCheckpointManager) -> None:
    (tmp_path / "notice").touch()
    wait_for(lambda: manager.interrupted)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "500"])
def test_save_every_n_steps_is_checked_at_once(wrong: Any, store: str) -> None:
    with pytest.raises(ConfigError, match="save_every_n_steps") as raised:
        SpotCheckpointManager(store, wrong)
    assert "save_every_n_steps=500" in raised.value.hint


def test_a_directory_that_cannot_be_one_is_refused_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("HF_SPOT_STORE", raising=False)
    with contextlib.closing(SpotCheckpointManager(tmp_path / "file" / "run")) as manager:
        with pytest.raises(ConfigError, match="can't be written to") as raised:
            manager.load_latest(*small())
        assert "df -h" in raised.value.hint
    with pytest.raises(ConfigError, match="HF_SPOT_STORE") as raised:
        SpotCheckpointManager()
    assert "--store" in raised.value.hint


def test_a_checkpoint_of_another_model_is_refused_by_name(make: Callable[..., SpotCheckpointManager]) -> None:
    manager = make()
    manager.save(*small(), 2, 0)
    manager.wait()
    with pytest.raises(ConfigError, match=r"(?s)size mismatch for 0.weight.*another checkpoint_dir"):
        make().load_latest(*small(width=5))
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 3))
    with pytest.raises(ConfigError, match=r"it lacks 2\.bias, 2\.weight"):
        make().load_latest(other)
    model, _, _ = small()
    with pytest.raises(ConfigError, match="AdamW"):
        make().load_latest(model, torch.optim.AdamW([{"params": [one]} for one in model.parameters()]))


class Tied(nn.Module):
    """One tensor under two names, and one inside another."""

    def __init__(self, *, overlapping: bool = False) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.other.weight = self.one.weight
        if overlapping:
            whole = torch.rand(6)
            self.register_buffer("most", whole[:5])
            self.register_buffer("rest", whole[3:])


@pytest.mark.parametrize("overlapping", [False, True])
def test_tensors_that_are_shared_come_back(make: Callable[..., SpotCheckpointManager], overlapping: bool) -> None:
    model, manager = Tied(overlapping=overlapping), make()
    manager.save(model, None, None, 2, 0)
    manager.wait()
    found = Tied(overlapping=overlapping)
    assert make().load_latest(found) == (2, 0)
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(make: Callable[..., SpotCheckpointManager]) -> None:
    manager, parts = make(), small()
    for step in (2, 4):
        manager.save(*parts, step, 0, torch.tensor(0.5))
        manager.wait()
    newest = manager.run.latest()
    assert newest is not None
    key = f"{newest.ref.prefix}/optimizer.pt"
    damaged = bytearray(manager.run.store.get(key))
    damaged[100] ^= 1
    manager.run.store.put(key, bytes(damaged))
    assert make().load_latest(*small()) == (2, 0)


def test_an_older_launch_stops_when_a_newer_one_owns_the_run(make: Callable[..., SpotCheckpointManager]) -> None:
    older, parts = make(), small()
    older.save(*parts, 2, 0)
    older.wait()
    newer = make()
    assert newer.load_latest(*small()) == (2, 0)
    older.save(*parts, 4, 0)

    def asks() -> bool:
        try:
            return older.interrupted
        except Fenced:
            return True

    wait_for(asks)
    with pytest.raises(Fenced):
        older.wait()
    assert [one.step for one in newer.run.checkpoints()] == [2]


def test_an_interrupted_step_is_saved_once_and_nothing_is_trained_after_it(
    make: Callable[..., SpotCheckpointManager], tmp_path: Path
) -> None:
    manager, parts = make(), small()
    data = DataLoader(torch.rand(8, 3), batch_size=2)
    batches = iter(data)
    manager.load_latest(*parts)
    next(iter(data))
    manager.save(*parts, 2, 0)
    notice(tmp_path, manager)
    for _ in range(3):
        manager.save(*parts, 2, 0)
    run = Run(manager.run.store)
    assert kinds(run) == ["claim", "training", "commit", "notice", "preempted"]
    with pytest.raises(TrainingPreempted):
        iter(data)
    with pytest.raises(TrainingPreempted):
        manager.save(*parts, 3, 0)
    assert next(batches) is not None


def test_a_with_block_ends_finished_or_preempted(make: Callable[..., SpotCheckpointManager], tmp_path: Path) -> None:
    parts = small()
    with make() as manager:
        manager.save(*parts, 2, 0)
    assert manager.run.state().ended == "finished"

    def is_interrupted() -> None:
        with make() as manager:
            assert manager.load_latest(*parts) == (2, 0)
            notice(tmp_path, manager)
            manager.save(*parts, 3, 0)

    with pytest.raises(TrainingPreempted) as raised:
        is_interrupted()
    assert (raised.value.code, raised.value.step) == (75, 3)
    assert manager.run.state().ended == "preempted"
    (tmp_path / "notice").unlink()

    def fails() -> None:
        with make() as manager:
            manager.save(*parts, 4, 0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert manager.run.state().ended == "failed"
    assert manager.run.state().latest().step == 4  # type: ignore[union-attr]


def test_a_store_that_is_away_loses_nothing(
    make: Callable[..., SpotCheckpointManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, parts, put_file = make(), small(), MemoryStore.put_file
    away = threading.Event()
    away.set()

    def put_or_not(self: MemoryStore, key: str, path: Path, progress: Any = None) -> None:
        if away.is_set():
            raise StoreUnavailable("injected")
        put_file(self, key, path, progress)

    monkeypatch.setattr(MemoryStore, "put_file", put_or_not)
    monkeypatch.setattr("hf_spot.run.upload._FIRST_RETRY_S", 0.01)
    for step in (2, 4):
        manager.save(*parts, step, 0)
    with pytest.raises(StoreError, match=r"step 4 was saved, but only step 0 .*injected"):
        manager.wait(0.05)
    away.clear()
    manager.wait()
    assert make().load_latest(*small()) == (4, 0)


@pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
def test_a_full_disk_ends_the_loop_with_what_was_saved_before(
    make: Callable[..., SpotCheckpointManager], tmp_path: Path
) -> None:
    big = nn.Linear(1000, 1000)
    with SmallDisk(tmp_path / "disk", size_kb=3000) as disk:
        manager = make(local_dir=disk.path)
        manager.save(*small(), 2, 0)
        with pytest.raises(StoreError, match="GB free") as raised:
            manager.save(big, None, None, 4, 0)
        assert "df -h" in raised.value.hint
        assert manager.run.latest().step == 2  # type: ignore[union-attr]
        manager.save(*small(), 6, 0)
        manager.wait()
        manager.close()


class Odd(Exception):
    """Can be pickled, and not unpickled, as many that scripts define."""

    def __init__(self, code: int, told: str) -> None:
        super().__init__(f"{told}: {code}")


class Stubborn(torch.optim.SGD):
    """An optimizer whose state can't be had while it is stubborn."""

    stubborn = True

    def state_dict(self) -> Any:
        if self.stubborn:
            raise Odd(7, "no state today")
        return super().state_dict()


def test_a_state_that_raises_ends_the_loop_with_what_was_saved_before(make: Callable[..., SpotCheckpointManager]) -> None:
    manager, (model, *rest) = make(), small()
    optimizer = Stubborn(model.parameters(), lr=0.1)
    manager.save(model, *rest, 2, 0)
    with pytest.raises(Odd, match="no state today"):
        manager.save(model, optimizer, None, 4, 0)
    assert manager.run.latest().step == 2  # type: ignore[union-attr]
    assert not [*manager._local_dir.glob("checkpoint-4")]
    with pytest.raises(ValueError, match="can only convert"):
        manager.save(model, *rest, 4, 0, loss=torch.zeros(2).numpy())
    optimizer.stubborn = False
    manager.save(model, optimizer, None, 4, 0)
    manager.wait()
    assert manager.run.latest().step == 4  # type: ignore[union-attr]


def test_a_state_that_raises_at_a_notice_leaves_the_last_commit(
    make: Callable[..., SpotCheckpointManager], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager, (model, *rest) = make(), small()
    manager.save(model, *rest, 2, 0)
    notice(tmp_path, manager)
    manager.save(model, Stubborn(model.parameters(), lr=0.1), None, 3, 0)
    with pytest.raises(TrainingPreempted, match="preempted at step 3; step 2 is committed"):
        manager.finish()
    assert "Odd: no state today: 7; the last commit stands" in caplog.text
    assert kinds(Run(manager.run.store))[-1] == "preempted"


@pytest.mark.parametrize("hooked", ["rank 0", "rank 1"])
def test_a_hook_that_raises_on_one_rank_ends_all(loops: Loops, hooked: str) -> None:
    script = loops.folder / "hooked.py"
    script.write_text(HOOKED.format(script=str(SCRIPTS / "ddp_loop.py"), rank=hooked[-1]))
    loop = loops.start("run", "--accelerate", script=str(script), ranks=2)
    loop.wait()
    assert [process.exitcode for process in loop.processes] == [1, 1], loop.text()
    assert "RuntimeError: Odd: no hook today: 8" in loop.text() and "Odd: no hook today: 8" in loop.text()
    assert [one.step for one in Run(loops.folder / "run").checkpoints()] == [4]


HOOKED = """
import os, runpy
import accelerate

class Odd(Exception):
    def __init__(self, code, told):
        super().__init__(f"{{told}}: {{code}}")

saves = 0
def hook(models, weights, folder):
    global saves
    saves += 1
    if saves == 2:
        raise Odd(8, "no hook today")

class Hooked(accelerate.Accelerator):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if os.environ["RANK"] == "{rank}":
            self.register_save_state_pre_hook(hook)

accelerate.Accelerator = Hooked
runpy.run_path({script!r}, run_name="__main__")
"""


def test_steps_must_grow(make: Callable[..., SpotCheckpointManager]) -> None:
    manager = make()
    manager.save(*small(), 4, 0)
    with pytest.raises(ConfigError, match="step=3 comes after step 4"):
        manager.save(*small(), 3, 1)
    with pytest.raises(ConfigError, match="no position"):
        manager.save(*small(), 6, 1, dataloader=DataLoader([1, 2]))


def test_under_the_launcher_a_loop_needs_no_directory(tmp_path: Path, zygote: Zygote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    diary, told, run = tmp_path / "diary.json", tmp_path / "notice", Run(tmp_path / "run")
    command = [sys.executable, "-m", "hf_spot", "launch", "--store", run.url, "--notice", f"file:{told}"]
    script = [str(SCRIPTS / "own_loop.py"), "--diary", str(diary), "--hold_at", "5"]

    with zygote.forking(), subprocess.Popen(command + script, stderr=subprocess.PIPE, text=True) as first:
        wait_for(lambda: (diary.exists() and '"step": 5' in diary.read_text()) or first.poll() is not None)
        told.touch()
        assert first.stderr is not None
        for line in first.stderr:
            if "TERMINATE" in line:
                diary.with_suffix(".go-on").touch()
    assert first.returncode == 75
    told.unlink()
    assert run.state().ended == "preempted"  # the launcher writes about the notice meanwhile, and may be later
    with zygote.forking():
        assert subprocess.run([*command, *script, "--finish"], capture_output=True).returncode == 0
    assert [json.loads(line)["step"] for line in diary.read_text().splitlines()] == list(range(1, 19))
    again = subprocess.run([*command, *script, "--finish"], capture_output=True, text=True)
    assert again.returncode == 0 and "is finished at step 16: nothing to do" in again.stderr


@pytest.mark.parametrize("size", ["tp_size", "cp_size", "sp_size"])
def test_a_parallel_loop_that_is_not_known_to_be_exact_is_refused_before_it_begins(tmp_path: Path, size: str) -> None:
    accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(dp_shard_size=2, **{size: 2}))
    with pytest.raises(ConfigError, match=rf"ParallelismConfig\({size}=2\)"):
        SpotCheckpointManager.for_accelerator(accelerator, tmp_path)
