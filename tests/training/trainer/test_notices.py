"""Notices at awkward moments: a second one, one that is taken back, and those that meet no step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_spot import Run, SpotArguments, SpotCallback, TrainingPreempted
from hf_spot.errors import StoreUnavailable
from hf_spot.policy.preemption import Measured
from hf_spot.storage.memory import MemoryStore
from hf_spot.training.session.final_drain import FinalDrain
from hf_spot.training.session.run_session import RunSession
from hf_spot.training.trainer.trainer_session import TrainerSession
from tests.servers import free_ports
from tests.training.conftest import STEPS, Patient, Recorder, SaveRecorder, make_trainer, same, weights
from tests.training.test_callback import QUIET, kinds, preempt, steps, train_until_preempted
from tests.waiting import PATIENCE_S, wait_for
from tests.zygote import Zygote


class At(TrainerCallback):
    """Something to do when one of Trainer's events comes for the first time."""

    def __init__(self, event: str, act: Callable[[], None]) -> None:
        self._act = act
        setattr(self, event, self._happened)

    def _happened(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        act, self._act = self._act, lambda: None
        act()


def heard(callback: SpotCallback) -> Any:
    session = callback._session
    assert session is not None
    return session.run_session.listener.newest


def listening(notice: Path) -> SpotCallback:
    return SpotCallback(args=SpotArguments(notice=f"file:{notice}"))


def terminate_in(notice: Path, seconds: float) -> None:
    deadline = datetime.now(timezone.utc) + timedelta(seconds=seconds)
    temporary = notice.with_name("notice.tmp")
    temporary.write_text(json.dumps({"deadline": deadline.isoformat()}))
    temporary.rename(notice)


@pytest.fixture
def from_store(store: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_SPOT_STORE", store)
    return store


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """No file of a checkpoint gets into the store before this is set."""
    gate, put_file = threading.Event(), MemoryStore.put_file

    def put_or_not(self: MemoryStore, key: str, path: Path, progress: Any = None) -> None:
        if not gate.is_set():
            raise StoreUnavailable("injected")
        put_file(self, key, path, progress)

    monkeypatch.setattr(MemoryStore, "put_file", put_or_not)
    monkeypatch.setattr("hf_spot.run.upload._FIRST_RETRY_S", 0.01)
    return gate


def test_a_second_sigterm_while_the_commit_is_on_its_way_does_not_stop_it(
    store: str, tmp_path: Path, peace: Any, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    wait = FinalDrain.wait

    def second(self: FinalDrain) -> bool:
        session = callback._session
        assert session is not None and session.run_session.uploader is not None
        assert not session.run_session.uploader.idle
        watcher = session.run_session.listener.watcher
        assert watcher is not None
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: watcher.sources[0].count == 2)  # type: ignore[attr-defined]
        held.set()
        return wait(self)

    monkeypatch.setattr(FinalDrain, "wait", second)
    with pytest.raises(TrainingPreempted) as caught:
        make_trainer(tmp_path / "one", callback, Recorder(5, preempt(callback)), save_steps=100).train()
    assert (caught.value.code, caught.value.step) == (75, 5)
    assert kinds(store) == ["claim", "training", "notice", "commit", "preempted"]
    monkeypatch.undo()
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, QUIET))
    trainer.train()
    assert same(weights(trainer), peace[0])


def test_a_notice_that_is_taken_back_before_the_step_ends_changes_nothing(from_store: str, tmp_path: Path, peace: Any) -> None:
    notice = tmp_path / "notice"
    callback = listening(notice)

    def act() -> None:
        terminate_in(notice, 120)
        wait_for(lambda: heard(callback))
        notice.unlink()
        wait_for(lambda: not heard(callback))

    trainer = make_trainer(tmp_path / "one", callback, Patient(callback), Recorder(5, act))
    assert trainer.train().global_step == STEPS
    assert same(weights(trainer), peace[0])
    assert steps(from_store) == [6, 9, 12]
    assert "notice" not in kinds(from_store)


def test_a_notice_that_is_taken_back_after_the_decision_still_ends_in_a_commit(
    from_store: str, tmp_path: Path, peace: Any
) -> None:
    notice = tmp_path / "notice"
    callback = listening(notice)

    def act() -> None:
        terminate_in(notice, 120)
        wait_for(lambda: heard(callback))

    def take_back() -> None:
        if notice.exists():
            notice.unlink()
            wait_for(lambda: not heard(callback))

    with pytest.raises(TrainingPreempted) as caught:
        make_trainer(tmp_path / "one", callback, Recorder(5, act), At("on_save", take_back), save_steps=100).train()
    assert caught.value.step == 5
    assert kinds(from_store)[-2:] == ["commit", "preempted"]
    trainer = make_trainer(tmp_path / "two", SpotCallback(args=QUIET))
    trainer.train()
    assert same(weights(trainer), peace[0])


def test_a_notice_during_a_restore_ends_it_at_once_and_loses_nothing(
    store: str, tmp_path: Path, peace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_until_preempted(store, tmp_path / "one", 5)
    sessions: list[TrainerSession] = []
    begin, moved = TrainerSession.begin, []
    monkeypatch.setattr(TrainerSession, "begin", lambda self, *args: (sessions.append(self), begin(self, *args))[1])

    def bar(what: str, size_bytes: int) -> Callable[[int], None]:
        def go(count: int) -> None:
            moved.append(count)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: sessions[0].run_session.listener.newest is not None)

        return go

    monkeypatch.setattr("hf_spot.training.session.run_session.Bar", bar)
    recorder = Recorder()
    settings = SpotArguments(notice="signal", upload_workers=1)
    with pytest.raises(TrainingPreempted) as caught:
        make_trainer(tmp_path / "two", SpotCallback(store, settings), recorder).train()
    assert (caught.value.code, caught.value.step) == (75, 5)
    assert len(moved) == 1  # of a checkpoint's many files
    assert not (tmp_path / "two" / "checkpoint-5").exists()
    assert not [*(tmp_path / "two" / ".hf_spot").glob("restore-*")]
    assert recorder.losses == {}
    assert kinds(store)[-2:] == ["claim", "preempted"]
    assert [*Run(store).events()][-1].data["committed_step"] == 5
    monkeypatch.undo()
    trainer = make_trainer(tmp_path / "three", SpotCallback(store, QUIET))
    trainer.train()
    assert same(weights(trainer), peace[0])


# -- a first step that compiles the model -----------------------------------------------------------------------------


COMPILED = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Training arguments for a compiled model; what is put into the list is done in the middle of the next compilation."""
    torch._dynamo.reset()
    acts: list[Callable[[], None]] = []
    eager = torch._dynamo.lookup_backend("eager")  # the one that needs no C++ compiler

    def backend(*args: Any, **kwargs: Any) -> Any:
        while acts:
            acts.pop()()
        return eager(*args, **kwargs)

    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "eager", backend)
    yield {"torch_compile": True, "torch_compile_backend": "eager"}, acts
    torch._dynamo.reset()


@COMPILED
def test_a_notice_during_compilation_commits_the_step_that_was_compiled_for(
    store: str, tmp_path: Path, peace: Any, compiling: Any
) -> None:
    settings, acts = compiling
    callback, first = SpotCallback(store, SpotArguments(notice="signal")), Recorder()
    acts.append(preempt(callback))
    with pytest.raises(TrainingPreempted) as caught:
        make_trainer(tmp_path / "one", callback, first, **settings).train()
    assert acts == []
    assert (caught.value.code, caught.value.step) == (75, 1)
    second = Recorder()
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, QUIET), second, **settings)
    trainer.train()
    assert list(second.losses) == list(range(2, STEPS + 1))
    assert (first.losses | second.losses)[STEPS] == pytest.approx(peace[1][STEPS], rel=1e-5)


@COMPILED
def test_when_the_compilation_outlasts_the_deadline_the_last_commit_stands(
    from_store: str, tmp_path: Path, compiling: Any, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    held.set()
    train_until_preempted(from_store, tmp_path / "one", 5)
    held.clear()
    monkeypatch.setattr("hf_spot.policy.restarts.LATE_S", 0.0)
    settings, acts = compiling
    notice = tmp_path / "notice"
    callback, recorder = listening(notice), Recorder()

    def act() -> None:
        terminate_in(notice, 0)
        wait_for(lambda: heard(callback))

    acts.append(act)
    with pytest.raises(TrainingPreempted) as caught:
        make_trainer(tmp_path / "two", callback, recorder, **settings).train()
    assert (caught.value.code, caught.value.step) == (75, 5)
    assert list(recorder.losses) == [6]
    held.set()
    assert steps(from_store)[-1] == 5
    assert kinds(from_store)[-1] == "preempted"


# -- before the first step, after the last ----------------------------------------------------------------------------


def test_a_notice_that_stands_before_the_start_trains_nothing(from_store: str, tmp_path: Path, peace: Any) -> None:
    notice = tmp_path / "notice"
    terminate_in(notice, 120)
    callback, recorder = listening(notice), Recorder()
    claim = RunSession._claim_on_main

    def heard_first(self: RunSession) -> int:
        wait_for(lambda: self.listener.newest)
        return claim(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunSession, "_claim_on_main", heard_first)
        with pytest.raises(TrainingPreempted) as caught:
            make_trainer(tmp_path / "one", callback, recorder).train()
    assert (caught.value.code, caught.value.step, recorder.losses) == (75, None, {})
    assert kinds(from_store) == ["claim", "training", "preempted"]
    trainer = make_trainer(tmp_path / "two", SpotCallback(args=QUIET))
    trainer.train()
    assert same(weights(trainer), peace[0])


@pytest.mark.parametrize("resumed", [0, 5], ids=["of a fresh training", "of a resumed one"])
def test_a_notice_right_before_the_first_step_commits_that_step(store: str, tmp_path: Path, peace: Any, resumed: int) -> None:
    if resumed:
        train_until_preempted(store, tmp_path / "zero", resumed)
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    with pytest.raises(TrainingPreempted) as caught:
        make_trainer(tmp_path / "one", callback, At("on_train_begin", preempt(callback))).train()
    assert caught.value.step == resumed + 1
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, QUIET))
    trainer.train()
    assert same(weights(trainer), peace[0])


def test_a_notice_after_the_last_step_finishes_the_last_upload_and_the_run(
    store: str, tmp_path: Path, peace: Any, held: threading.Event
) -> None:
    callback = SpotCallback(store, SpotArguments(notice="signal"))

    def act() -> None:
        preempt(callback)()
        held.set()

    trainer = make_trainer(tmp_path / "one", callback, At("on_train_end", act))
    assert trainer.train().global_step == STEPS
    assert same(weights(trainer), peace[0])
    assert kinds(store)[-1] == "finished"


def test_when_the_last_upload_outlasts_the_deadline_the_next_launch_finishes_the_run(
    from_store: str, tmp_path: Path, peace: Any, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_spot.policy.restarts.LATE_S", 0.0)
    notice = tmp_path / "notice"
    callback = listening(notice)

    def act() -> None:
        terminate_in(notice, 0.1)

    held.set()
    hold = Recorder(10, held.clear)  # after the commit of step 9 there is none
    with pytest.raises(TrainingPreempted) as caught:
        make_trainer(tmp_path / "one", callback, hold, At("on_train_end", act), save_steps=4).train()
    committed = caught.value.step or 0
    assert (caught.value.code, committed < STEPS) == (75, True)
    assert kinds(from_store)[-1] == "preempted"
    held.set()
    recorder = Recorder()
    trainer = make_trainer(tmp_path / "two", SpotCallback(args=QUIET), recorder)
    trainer.train()
    assert list(recorder.losses) == list(range(committed + 1, STEPS + 1))
    assert same(weights(trainer), peace[0])
    assert kinds(from_store)[-1] == "finished"


def test_a_notice_that_only_another_rank_hears_after_the_last_step_ends_the_wait_for_the_last_upload(
    tmp_path: Path, zygote: Zygote
) -> None:
    (port,) = free_ports(1)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).parent.parent / "scripts" / "late_notice.py")]
    with zygote.forking():
        ranks = [
            subprocess.Popen(
                command,
                cwd=tmp_path,
                env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in ("0", "1")
        ]
    try:
        said = [rank.communicate(timeout=PATIENCE_S)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [75, 75], said
    *_, last = Run(str(tmp_path / "run")).events()
    assert (last.kind, last.data["step"], last.data["committed_step"]) == ("preempted", 4, 2)
    assert "TERMINATE from another rank" in said[0]


# -- with an upload in flight -----------------------------------------------------------------------------------------


def test_an_upload_in_flight_ends_for_the_newer_checkpoint_that_alone_can_make_it(
    from_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, put_file = threading.Event(), MemoryStore.put_file

    def put_slowly(self: MemoryStore, key: str, path: Path, progress: Any = None) -> None:
        while "checkpoint-3/" in key and not gate.wait(0.01):
            progress(0)
        put_file(self, key, path, progress)

    monkeypatch.setattr(MemoryStore, "put_file", put_slowly)
    # As if the link were so slow that one checkpoint takes ten seconds.
    slow = Measured(bytes_per_s=1e5, in_flight_bytes=10**6, waiting_bytes=10**6)
    monkeypatch.setattr(RunSession, "measured", lambda self: replace(slow, save_s=0.1, size_bytes=10**6))
    callback = listening(tmp_path / "notice")

    def act() -> None:
        terminate_in(tmp_path / "notice", 18)
        wait_for(lambda: heard(callback))

    with pytest.raises(TrainingPreempted) as caught:
        make_trainer(tmp_path / "one", callback, Recorder(5, act)).train()
    gate.set()
    assert caught.value.step == 5
    assert steps(from_store) == [5]


def test_a_save_that_can_not_be_committed_is_skipped_for_the_upload_in_flight(
    from_store: str, tmp_path: Path, peace: Any, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = Measured(save_s=60.0, size_bytes=10**9, bytes_per_s=1e6, in_flight_bytes=10**7)
    monkeypatch.setattr(RunSession, "measured", lambda self: huge)
    callback, recorder = listening(tmp_path / "notice"), SaveRecorder()

    def act() -> None:
        terminate_in(tmp_path / "notice", 60)
        wait_for(lambda: heard(callback))

    release = At("on_train_end", held.set)
    with pytest.raises(TrainingPreempted) as caught:
        make_trainer(tmp_path / "one", callback, recorder, release, Recorder(5, act)).train()
    assert (caught.value.step, recorder.saved, steps(from_store)) == (3, [3], [3])
    monkeypatch.undo()
    monkeypatch.setenv("HF_SPOT_STORE", from_store)
    trainer = make_trainer(tmp_path / "two", SpotCallback(args=QUIET))
    trainer.train()
    assert same(weights(trainer), peace[0])
