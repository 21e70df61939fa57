"""Trouble with the machine's own disk and processes: it costs steps at most, never a commit, and nobody hangs."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hf_spot import ConfigError, Run, SpotArguments, SpotCallback, SpotError, StoreError, TrainingPreempted
from hf_spot.arguments import SpotArguments as Settings
from hf_spot.storage.faulty import Fault, FaultyStore
from hf_spot.storage.memory import MemoryStore
from hf_spot.training.data.worker_states import Ring
from tests.small_disk import SmallDisk, why_not
from tests.training.conftest import STEPS, Patient, Recorder, SaveRecorder, make_trainer, same, weights
from tests.training.test_callback import QUIET, kinds, preempt, steps
from tests.waiting import PATIENCE_S, wait_for

needs_disks = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
GO_ON = Settings(notice="none", on_save_error="go-on", keep_checkpoints=0)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with SmallDisk(tmp_path / "disk", size_kb=16 << 10) as made:
        yield made


def at(**acts: Callable[[], None]) -> list[Recorder]:
    """``at(step_5=act)``: what is to happen before step 5."""
    return [Recorder(int(name.partition("_")[2]), act) for name, act in acts.items()]


# -- a full disk ------------------------------------------------------------------------------------------------------


@needs_disks
def test_a_full_disk_ends_the_training_with_a_clear_word_and_the_last_commit_stands(
    disk: SmallDisk, store: str, tmp_path: Path, peace
) -> None:  # type: ignore[no-untyped-def]
    out = disk.path / "out"
    callback = SpotCallback(store, QUIET)
    trainer = make_trainer(out, callback, Patient(callback), *at(step_5=disk.fill))
    with pytest.raises(SpotError, match=r"checkpoint-6 can't be saved.*No space left") as caught:
        trainer.train()
    assert str(out) in str(caught.value)
    assert "--on-save-error go-on" in caught.value.hint
    assert not (out / "checkpoint-6").exists()
    assert kinds(store) == ["claim", "training", "commit", "failed"]
    assert list(Run(store).verify().values()) == [[]]
    again = make_trainer(tmp_path / "out", SpotCallback(store, QUIET))
    again.train()
    assert same(weights(again), peace[0])


@needs_disks
def test_a_training_goes_on_wherever_in_a_save_the_disk_gets_full(disk: SmallDisk, store: str, peace, caplog) -> None:  # type: ignore[no-untyped-def]
    out = disk.path / "out"
    failing = range(3, 12)
    leave_kb: dict[int, int] = {}
    left: dict[int, int] = {}

    class Fill(SaveRecorder):
        def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            if state.global_step in failing:
                assert not (out / f"checkpoint-{state.global_step}").exists()
                left[state.global_step] = disk.free_kb
                disk.empty()
            if state.global_step + 1 in failing:
                session = callback._session
                assert (
                    session is not None
                    and session.run_session.uploader is not None
                    and session.run_session.uploader.drain(PATIENCE_S)
                )
                blocks = sum(path.stat().st_blocks for path in (out / "checkpoint-2").rglob("*"))
                page = (state.global_step - 2) * (blocks // 8 - 1) // (len(failing) - 1)  # the last one lacks one page
                leave_kb[state.global_step + 1] = page * 4
                disk.fill(page * 4)

    recorder, callback = Fill(), SpotCallback(store, GO_ON)
    trainer = make_trainer(out, callback, recorder, save_steps=1)
    with caplog.at_level(logging.ERROR, logger="hf_spot"):
        assert trainer.train().global_step == STEPS
    assert steps(store) == recorder.saved == [1, 2, 12], "a save that failed is no save for other callbacks either"
    assert list(Run(store).verify().values()) == [[], [], []]
    # The lines of the steps so far may have taken another page meanwhile, or a file that was being replaced has given one back.
    unfreed_kb = {step: leave_kb[step] - free for step, free in left.items()}
    assert set(unfreed_kb.values()) <= {-4, 0, 4}, "what is torn should free its space"
    assert left.keys() == leave_kb.keys()
    for step in failing:
        assert f"checkpoint-{step} can't be saved" in caplog.text
    assert "training goes on" in caplog.text
    assert same(weights(trainer), peace[0])


@needs_disks
def test_a_full_disk_takes_no_older_checkpoint_away(disk: SmallDisk, store: str) -> None:
    out = disk.path / "out"
    seen: list[list[str]] = []
    acts = at(step_5=lambda: disk.fill(48), step_8=lambda: seen.append(sorted(path.name for path in out.glob("checkpoint-*"))))
    callback = SpotCallback(store, GO_ON)
    with pytest.raises(StoreError, match="only step 3 is in"):
        make_trainer(out, callback, Patient(callback), *acts, save_total_limit=1).train()
    assert seen == [["checkpoint-3"]]
    assert kinds(store)[-1] == "failed", "a run whose last step is not committed is not finished"


@needs_disks
def test_a_notice_on_a_full_disk_ends_with_75_and_the_last_commit_stands(disk: SmallDisk, store: str, caplog) -> None:  # type: ignore[no-untyped-def]
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    heard = preempt(callback)

    def act() -> None:
        disk.fill()
        heard()

    with caplog.at_level(logging.ERROR, logger="hf_spot"), pytest.raises(TrainingPreempted) as caught:
        make_trainer(disk.path / "out", callback, Patient(callback), *at(step_5=act)).train()
    assert (caught.value.code, caught.value.step) == (75, 3)
    assert kinds(store) == ["claim", "training", "commit", "notice", "preempted"]
    assert "checkpoint-5 can't be saved" in caplog.text


@needs_disks
def test_a_best_checkpoint_that_could_not_be_saved_is_not_the_best(disk: SmallDisk, store: str) -> None:
    # At a rate this small every evaluation is better than the one before.
    settings = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "learning_rate": 1e-3}
    callback = SpotCallback(store, GO_ON)
    trainer = make_trainer(disk.path / "out", callback, Patient(callback), *at(step_11=lambda: disk.fill(48)), **settings)
    with pytest.raises(StoreError, match="only step 9 is in"):
        trainer.train()
    assert trainer.state.best_global_step == 9
    assert trainer.state.best_model_checkpoint == str(disk.path / "out" / "checkpoint-9")


@needs_disks
def test_an_epoch_begins_on_a_full_disk(disk: SmallDisk, store: str, peace) -> None:  # type: ignore[no-untyped-def]
    settings = {"num_train_epochs": 2, "save_steps": 4, "dataloader_num_workers": 1}
    acts = at(step_11=disk.fill, step_14=disk.empty)
    callback = SpotCallback(store, GO_ON)
    trainer = make_trainer(disk.path / "out", callback, Patient(callback), *acts, **settings)
    trainer.train()
    assert steps(store) == [4, 8, 16, 20, 24]
    files = {file.path for file in Run(store).find(20).files}
    assert {"random_states/rng_state.pth", "random_states/workers_0.json"} <= files


@needs_disks
def test_a_restore_that_finds_no_room_says_so_and_leaves_nothing(disk: SmallDisk, store: str, tmp_path: Path) -> None:
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    with pytest.raises(TrainingPreempted):
        make_trainer(tmp_path / "one", callback, *at(step_5=preempt(callback))).train()
    out = disk.path / "out"
    disk.fill(64)
    recorder = Recorder()
    with pytest.raises(SpotError, match="GB free, but the checkpoint needs"):
        make_trainer(out, SpotCallback(store, QUIET), recorder).train()
    disk.empty()
    assert recorder.losses == {}
    assert sorted(path.name for path in out.iterdir()) == [".hf_spot"]
    assert list((out / ".hf_spot").glob("restore-*")) == []
    make_trainer(out, SpotCallback(store, QUIET), recorder).train()
    assert min(recorder.losses) == 6


@needs_disks
def test_what_workers_note_on_a_full_disk_is_an_error_and_no_bus_error(disk: SmallDisk) -> None:
    disk.fill()
    with pytest.raises(OSError, match="No space left"):
        Ring(disk.path / "ring", workers=2, depth=4)
    disk.empty()
    ring = Ring(disk.path / "ring", workers=2, depth=4)
    disk.fill()
    for batch in range(8):
        ring.write(batch)


# -- other disks ------------------------------------------------------------------------------------------------------


@needs_disks
def test_a_read_only_output_dir_is_refused_before_the_run_is_taken(disk: SmallDisk, store: str) -> None:
    out = disk.path / "out"
    out.mkdir()
    disk.make_read_only()
    recorder = Recorder()
    with pytest.raises(ConfigError, match="Read-only file system") as caught:
        make_trainer(out, SpotCallback(store, QUIET), recorder).train()
    assert str(out) in str(caught.value)
    assert recorder.losses == {}
    assert kinds(store) == []


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> FaultyStore:
    """What ``memory://…`` URLs lead to in this test."""
    store = FaultyStore(MemoryStore(f"memory://{uuid.uuid4().hex}"))
    monkeypatch.setattr("hf_spot.run.run.open_store", lambda url: store)
    return store


def _is_deleted(folder: Path) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


@pytest.mark.parametrize("when", ["while it is uploaded", "between two saves"])
def test_an_output_dir_that_is_deleted_costs_at_most_one_checkpoint(
    faulty: FaultyStore, tmp_path: Path, peace, caplog, when: str
) -> None:  # type: ignore[no-untyped-def]
    out, gate = tmp_path / "out", threading.Event()
    in_flight = when == "while it is uploaded"
    if in_flight:
        faulty.faults.append(Fault("put_file", "*checkpoint-6/*", error=None, until=gate))
    callback = SpotCallback(faulty.url, GO_ON)

    def act() -> None:
        session = callback._session
        assert session is not None and session.run_session.uploader is not None
        if in_flight:
            wait_for(
                lambda: ("put_file", "checkpoint-6") in [(name, key.split("/")[1]) for name, key in faulty.calls if "/" in key]
            )
        else:
            assert session.commits.behind.wait(PATIENCE_S) and session.run_session.uploader.drain(PATIENCE_S)
        wait_for(lambda: _is_deleted(out), "for the folder to be gone: another thread may be adding a file to it")
        gate.set()

    with caplog.at_level(logging.ERROR, logger="hf_spot"):
        trainer = make_trainer(out, callback, *at(step_8=act), Patient(callback, after_step=9))
        trainer.train()
    assert same(weights(trainer), peace[0])
    assert [ref.step for ref in Run(faulty).state().checkpoints] == ([3, 9, 12] if in_flight else [3, 6, 9, 12])
    assert list(Run(faulty).verify().values()) == [[]] * (3 if in_flight else 4)
    assert ("checkpoint-6 is gone from this disk" in caplog.text) == in_flight
    files = {file.path for file in Run(faulty).find(9).files}
    assert "random_states/rng_state.pth" in files, "a resume in the middle of the epoch needs it"


# -- forks ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("way_out", ["exit", "error"])
def test_a_forked_child_that_leaves_training_touches_nothing_and_does_not_hang(
    faulty: FaultyStore, tmp_path: Path, peace, way_out: str
) -> None:  # type: ignore[no-untyped-def]
    gate = threading.Event()
    faulty.faults.append(Fault("put_file", "*checkpoint-3/*", error=None, until=gate))
    callback = SpotCallback(faulty.url, Settings(notice="signal", keep_checkpoints=0))
    parent = os.getpid()
    told = tmp_path / "told"

    def act() -> None:
        wait_for(lambda: any("checkpoint-3/" in key for name, key in faulty.calls if name == "put_file"))
        child = os.fork()
        if child == 0:
            if way_out == "exit":
                raise SystemExit(7)
            raise ZeroDivisionError
        wait_for(lambda: os.waitpid(child, os.WNOHANG)[0])
        assert list((tmp_path / "out" / ".hf_spot").glob("pins-*/*/model.safetensors")), "the child took the upload away"
        gate.set()

    trainer = make_trainer(tmp_path / "out", callback, *at(step_5=act), Patient(callback, after_step=6))
    try:
        trainer.train()
    except BaseException as error:
        if os.getpid() != parent:
            told.write_text(repr(error))
            os._exit(0)
        raise
    assert told.read_text() == {"exit": "SystemExit(7)", "error": "ZeroDivisionError()"}[way_out]
    assert same(weights(trainer), peace[0])
    assert [entry.kind for entry in Run(faulty).events()] == ["claim", "training", *["commit"] * 4, "finished"]
