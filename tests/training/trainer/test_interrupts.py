"""Ctrl-C in a plain script: saved and committed first."""

from __future__ import annotations

import pickle
import signal
from pathlib import Path

import pytest

from hf_spot import Run, SpotArguments, SpotCallback, TrainingInterrupted, TrainingPreempted
from tests.training.conftest import Recorder, make_trainer, same, weights
from tests.waiting import wait_for


@pytest.fixture(autouse=True)
def usual_handler():  # type: ignore[no-untyped-def]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_commits_first_and_the_same_command_goes_on(tmp_path: Path, store: str, peace) -> None:  # type: ignore[no-untyped-def]
    callback = SpotCallback(store)

    def press_until_heard() -> None:
        press()
        wait_for(lambda: callback._session.run_session.listener.newest)  # type: ignore[union-attr]  # steps are faster than the watcher

    with pytest.raises(KeyboardInterrupt) as ended:
        make_trainer(tmp_path, Recorder(5, press_until_heard), callback).train()
    assert isinstance(ended.value, TrainingPreempted) and isinstance(ended.value, SystemExit) and ended.value.code == 75
    step = Run(store).latest().step  # type: ignore[union-attr]
    assert step == 5
    assert ended.value.step == step
    assert (
        str(ended.value)
        == f"interrupted at step {step}; step {step} is committed to {store}.\nStart the same command again to resume."
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    trainer = make_trainer(tmp_path / "again", SpotCallback(store))
    trainer.train()
    assert same(weights(trainer), peace[0])


def test_who_listens_to_nothing_is_interrupted_as_ever(tmp_path: Path, store: str) -> None:
    with pytest.raises(KeyboardInterrupt) as ended:
        make_trainer(tmp_path, Recorder(5, press), SpotCallback(store, SpotArguments(notice="none"))).train()
    assert not isinstance(ended.value, SystemExit)
    assert [entry.kind for entry in Run(store).events()][-1] == "failed"


def test_it_stays_what_it_is_on_its_way_to_the_other_ranks() -> None:
    told = pickle.loads(pickle.dumps(TrainingInterrupted("at step 3", step=3)))
    assert type(told) is TrainingInterrupted and told.step == 3 and str(told) == "at step 3" and told.code == 75
