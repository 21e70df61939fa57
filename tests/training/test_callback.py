"""SpotCallback in an ordinary script, without a launcher."""

from __future__ import annotations

import json
import logging
import os
import runpy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from hf_spot import ConfigError, CorruptCheckpoint, Run, SpotArguments, SpotCallback, TrainingPreempted
from hf_spot.arguments import SpotArguments as Settings
from hf_spot.errors import Fenced
from hf_spot.run.machine_info import KEYS
from hf_spot.storage.open import open_store
from hf_spot.training.trainer.engines import refuse_what_can_not_be_resumed
from tests.training.conftest import STEPS, Patient, Recorder, make_trainer, same, weights
from tests.waiting import wait_for

QUIET = Settings(notice="none")


def preempt(callback: SpotCallback) -> Callable[[], None]:
    """Sends this process a real SIGTERM and waits until the callback's watcher has heard it."""

    def act() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        session = callback._session
        assert session is not None
        wait_for(lambda: session.run_session.listener.newest is not None)

    return act


def kinds(store: str) -> list[str]:
    return [entry.kind for entry in Run(store).events()]


def steps(store: str) -> list[int]:
    return [ref.step for ref in Run(store).state().checkpoints]


def train_until_preempted(store: str, output_dir: Path, at_step: int, **settings: object) -> Recorder:
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    recorder = Recorder(at_step, preempt(callback))
    with pytest.raises(TrainingPreempted) as caught:
        make_trainer(output_dir, callback, Patient(callback), recorder, **settings).train()
    assert caught.value.code == 75
    assert caught.value.step == at_step
    assert str(at_step) in str(caught.value)
    return recorder


def test_a_callback_alone_changes_nothing(store: str, tmp_path: Path, peace) -> None:  # type: ignore[no-untyped-def]
    recorder, callback = Recorder(), SpotCallback(store, QUIET)
    trainer = make_trainer(tmp_path, callback, Patient(callback), recorder)
    assert trainer.train().global_step == STEPS
    assert same(weights(trainer), peace[0])
    assert recorder.losses == peace[1]
    assert steps(store) == [6, 9, 12]
    assert kinds(store)[-1] == "finished"
    claim = next(Run(store).events()).data
    assert claim["machine"].keys() == set(KEYS)
    assert {"hostname", "pid", "versions", "stage"} <= claim.keys()


@pytest.mark.parametrize("at_step", [1, 5, 6, 11])
def test_after_a_signal_the_next_machine_goes_on_to_the_same_model(store: str, tmp_path: Path, peace, at_step: int) -> None:  # type: ignore[no-untyped-def]
    first = train_until_preempted(store, tmp_path / "one", at_step)
    assert [kind for kind in kinds(store) if kind != "prune"][-2:] == ["commit", "preempted"]
    second = Recorder()
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, QUIET), second)
    trainer.train()
    assert same(weights(trainer), peace[0])
    assert list(second.losses) == list(range(at_step + 1, STEPS + 1))
    assert first.losses | second.losses == peace[1]


def test_a_signal_in_the_last_step_leaves_a_finished_training(store: str, tmp_path: Path, peace) -> None:  # type: ignore[no-untyped-def]
    train_until_preempted(store, tmp_path / "one", STEPS)
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, QUIET))
    assert trainer.train().global_step == STEPS
    assert same(weights(trainer), peace[0])


def test_nobody_evaluates_or_reloads_the_best_after_a_notice(store: str, tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 5, "load_best_model_at_end": True}
    quiet = Recorder()
    undisturbed = make_trainer(tmp_path / "peace", quiet, **settings)
    undisturbed.train()
    first = train_until_preempted(store, tmp_path / "one", 5, **settings)
    assert first.evaluated == []
    second = Recorder()
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, QUIET), second, **settings)
    trainer.train()
    assert same(weights(trainer), weights(undisturbed))
    assert second.evaluated == [5, *[step for step in quiet.evaluated if step > 5]]
    assert trainer.state.best_metric == undisturbed.state.best_metric


def test_the_best_is_not_reloaded_over_what_was_preempted(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer

    reloaded = []
    monkeypatch.setattr(Trainer, "_load_best_model", lambda self: reloaded.append(self.state.global_step))
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    train_until_preempted(store, tmp_path / "one", 5, **settings, save_total_limit=1)
    assert reloaded == []
    assert (tmp_path / "one" / "checkpoint-5").exists()
    make_trainer(tmp_path / "two", SpotCallback(store, QUIET), **settings).train()
    assert reloaded == [STEPS]


def test_starting_afresh_is_one_word_and_keeps_what_is_in_the_run(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_until_preempted(store, tmp_path / "one", 4)
    recorder = Recorder()
    make_trainer(tmp_path / "two", SpotCallback(store, QUIET), recorder).train(resume_from_checkpoint=False)
    assert list(recorder.losses) == list(range(1, STEPS + 1))
    assert "begins from the start, although step 4 of this training is committed" in caplog.text


@pytest.mark.parametrize(
    ("where", "default", "resumes"),
    [("site-packages", "False", True), ("site-packages", "None", False), ("src", "False", False)],
)
def test_a_default_of_a_library_that_trains_is_no_wish_to_start_afresh(
    store: str, tmp_path: Path, where: str, default: str, resumes: bool
) -> None:
    library = tmp_path / where / "library.py"
    library.parent.mkdir()
    library.write_text(
        f"def fit(trainer, resume_from_checkpoint={default}): trainer.train(resume_from_checkpoint=resume_from_checkpoint)"
    )
    fit = runpy.run_path(str(library))["fit"]
    train_until_preempted(store, tmp_path / "one", 4)
    recorder = Recorder()
    fit(make_trainer(tmp_path / "two", SpotCallback(store, QUIET), recorder), *([] if resumes else [False]))
    assert min(recorder.losses) == (5 if resumes else 1)


def test_a_second_training_in_one_process_is_its_own(store: str, tmp_path: Path) -> None:
    recorder, plain_recorder = Recorder(), Recorder()
    plain = make_trainer(tmp_path / "plain", plain_recorder)
    plain.train()
    plain.train()
    trainer = make_trainer(tmp_path / "spot", SpotCallback(store, QUIET), recorder)
    trainer.train()
    trainer.train()
    assert same(weights(trainer), weights(plain))
    assert recorder.losses == plain_recorder.losses
    assert [ref.training for ref in Run(store).state().checkpoints] == [1, 2, 2, 2]


def test_after_a_preemption_the_cell_of_a_notebook_can_be_run_again(store: str, tmp_path: Path, peace) -> None:  # type: ignore[no-untyped-def]
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    recorder = Recorder(5, preempt(callback))
    trainer = make_trainer(tmp_path, callback, recorder)
    with pytest.raises(TrainingPreempted):
        trainer.train()
    recorder._at_step = 0
    trainer.train()
    assert same(weights(trainer), peace[0])
    assert recorder.losses == peace[1]


def test_a_finished_run_is_loaded_and_not_trained(store: str, tmp_path: Path, peace) -> None:  # type: ignore[no-untyped-def]
    make_trainer(tmp_path / "one", SpotCallback(store, QUIET)).train()
    before = kinds(store)
    recorder = Recorder()

    from hf_spot.training.session import recognition

    recognition.forget_finished()  # as in a new process
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, QUIET), recorder)
    assert trainer.train().global_step == STEPS
    assert recorder.losses == {}
    assert same(weights(trainer), peace[0])
    assert kinds(store) == before


def test_without_a_store_the_output_dir_is_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_SPOT_STORE", raising=False)
    callback = SpotCallback(args=QUIET)
    make_trainer(tmp_path / "out", callback, Patient(callback)).train()
    assert steps(str(tmp_path / "out")) == [6, 9, 12]
    assert (tmp_path / "out" / "checkpoint-12" / "model.safetensors").exists()


def test_the_store_may_come_from_the_environment(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPOT_STORE", store)
    callback = SpotCallback(args=QUIET)
    make_trainer(tmp_path / "out", callback, Patient(callback)).train()
    assert steps(store) == [6, 9, 12]


def test_the_limit_holds_in_the_store_and_the_best_stays(store: str, tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_total_limit": 1, "learning_rate": 0.5}
    trainer = make_trainer(
        tmp_path, SpotCallback(store, Settings(notice="none", keep_checkpoints=1)), metric_for_best_model="loss", **settings
    )
    trainer.train()
    refs = Run(store).state().checkpoints
    assert trainer.state.best_global_step < STEPS, "this learning rate should make it worse"
    assert {(ref.step, ref.best) for ref in refs} == {(trainer.state.best_global_step, True), (STEPS, False)}


def damage(store: str, step: int, name: str = "model.safetensors") -> None:
    prefix = next(ref.prefix for ref in Run(store).state().checkpoints if ref.step == step)
    objects = open_store(store)
    data = objects.get(f"{prefix}/{name}")
    objects.put(f"{prefix}/{name}", data[:-1] + bytes([data[-1] ^ 1]))


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_taken(store: str, tmp_path: Path, peace, caplog) -> None:  # type: ignore[no-untyped-def]
    train_until_preempted(store, tmp_path / "one", 8)
    damage(store, 8)
    recorder = Recorder()
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, QUIET), recorder)
    with caplog.at_level(logging.ERROR, logger="hf_spot"):
        trainer.train()
    assert "checkpoint-8" in caplog.text
    assert min(recorder.losses) == 7
    assert same(weights(trainer), peace[0])


def test_when_no_checkpoint_is_whole_nothing_is_trained(store: str, tmp_path: Path) -> None:
    train_until_preempted(store, tmp_path / "one", 4)
    for step in steps(store):
        damage(store, step, "optimizer.pt")
    recorder = Recorder()
    with pytest.raises(CorruptCheckpoint, match="none of the"):
        make_trainer(tmp_path / "two", SpotCallback(store, QUIET), recorder).train()
    assert recorder.losses == {}


def test_a_torn_local_folder_is_set_aside(store: str, tmp_path: Path, peace) -> None:  # type: ignore[no-untyped-def]
    train_until_preempted(store, tmp_path / "out", 4)
    (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    torn = tmp_path / "out" / "checkpoint-9"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    for leftover in ("pins-1-1/1-4-abc", "restore-17-42-checkpoint-4"):
        (tmp_path / "out" / ".hf_spot" / leftover).mkdir(parents=True)
    trainer = make_trainer(tmp_path / "out", SpotCallback(store, QUIET))
    trainer.train()
    assert same(weights(trainer), peace[0])
    assert (tmp_path / "out" / "torn-checkpoint-9" / "model.safetensors").read_bytes() == b"half"
    assert [path.name for path in (tmp_path / "out" / ".hf_spot").iterdir()] == ["run"]


def test_an_advisory_saves_and_goes_on(store: str, tmp_path: Path, peace) -> None:  # type: ignore[no-untyped-def]
    notice = tmp_path / "notice"
    callback = SpotCallback(store, Settings(notice=f"file:{notice}", keep_checkpoints=0))

    def act() -> None:
        notice.write_text(json.dumps({"kind": "ADVISORY", "id": "one"}))
        session = callback._session
        assert session is not None
        wait_for(lambda: session.run_session.listener.newest is not None)

    trainer = make_trainer(tmp_path / "out", callback, Patient(callback), Recorder(5, act))
    trainer.train()
    assert same(weights(trainer), peace[0])
    assert [(one.step, one.reason) for one in Run(store).checkpoints()] == [
        (3, "schedule"),
        (5, "advisory"),
        (6, "schedule"),
        (9, "schedule"),
        (12, "end"),
    ]


def test_a_crash_is_told_to_the_journal_after_the_upload_under_way(store: str, tmp_path: Path) -> None:
    def act() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, SpotCallback(store, QUIET), Recorder(4, act)).train()
    assert kinds(store) == ["claim", "training", "commit", "failed"]


def test_a_launch_that_was_taken_over_stops_and_says_so(store: str, tmp_path: Path) -> None:
    callback = SpotCallback(store, QUIET)

    def act() -> None:
        Run(store).claim({"by": "another machine"})

    trainer = make_trainer(tmp_path, callback, Recorder(5, act), num_train_epochs=50)
    with pytest.raises(Fenced):
        trainer.train()
    assert trainer.state.global_step < 600
    assert kinds(store)[-1] == "claim"


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"save_only_model": True}, "save_only_model"), ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint")],
)
def test_what_can_not_be_resumed_is_refused_before_training(store: str, tmp_path: Path, settings, word: str) -> None:  # type: ignore[no-untyped-def]
    recorder = Recorder()
    with pytest.raises(ConfigError, match=word):
        make_trainer(tmp_path, SpotCallback(store, QUIET), recorder, **settings).train()
    assert recorder.losses == {}
    assert Run(store).state().number == 0


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_an_adapter_that_can_not_be_resumed_is_named_before_training(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def adapted(kind: type, **settings: Any) -> Any:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2))
        return peft.get_peft_model(model, kind(target_modules=["c_attn"], fan_in_fan_out=True, **settings))

    def told(kind: type, **settings: Any) -> bool:
        caplog.clear()
        trainer = make_trainer(tmp_path / kind.__name__, model=lambda: adapted(kind, **settings))
        refuse_what_can_not_be_resumed(trainer)
        return "update_and_allocate() has dropped" in caplog.text

    assert told(peft.AdaLoraConfig, total_step=10, tinit=1, tfinal=1)
    assert not told(peft.LoraConfig)


def test_another_accumulation_is_refused_with_the_setting_that_brings_it_back(store: str, tmp_path: Path) -> None:
    train_until_preempted(store, tmp_path / "one", 5)
    recorder = Recorder()
    with pytest.raises(ConfigError, match="2 a device x 1 accumulated x 1 ranks = 2") as caught:
        make_trainer(tmp_path / "two", SpotCallback(store, QUIET), recorder, gradient_accumulation_steps=2).train()
    assert "--gradient_accumulation_steps 1" in caught.value.hint
    assert recorder.losses == {}


def without_dropout() -> GPT2LMHeadModel:
    none = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2, **none))


def test_a_smaller_batch_is_accumulated_so_that_each_step_keeps_its_samples(store: str, tmp_path: Path) -> None:
    settings = {"model": without_dropout, "num_train_epochs": 2}
    undisturbed = make_trainer(tmp_path / "peace", **settings)
    undisturbed.train()
    train_until_preempted(store, tmp_path / "one", 17, **settings)
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, QUIET), per_device_train_batch_size=1, **settings)
    assert trainer.train().global_step == undisturbed.state.global_step
    assert (trainer.args.gradient_accumulation_steps, trainer.args.per_device_train_batch_size) == (2, 1)
    for line, other in zip(trainer.state.log_history[:-1], undisturbed.state.log_history[:-1], strict=True):
        assert line == pytest.approx(other, rel=1e-4)


def test_another_batch_can_be_accepted(store: str, tmp_path: Path) -> None:
    train_until_preempted(store, tmp_path / "one", 5)
    callback = SpotCallback(store, Settings(notice="none", allow_batch_change=True))
    trainer = make_trainer(tmp_path / "two", callback, per_device_train_batch_size=1)
    assert trainer.train().global_step == 2 * STEPS


def test_two_callbacks_are_one_too_many(store: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two SpotCallbacks"):
        make_trainer(tmp_path, SpotCallback(store, QUIET), SpotCallback(store, QUIET)).train()


def test_handlers_and_threads_are_given_back(store: str, tmp_path: Path) -> None:
    import threading

    def ours() -> set[str]:
        return {thread.name for thread in threading.enumerate() if thread.name.startswith("hf_spot")}

    before = ours()
    handler = signal.getsignal(signal.SIGTERM)
    make_trainer(tmp_path, SpotCallback(store, SpotArguments(notice="signal"))).train()
    assert signal.getsignal(signal.SIGTERM) is handler
    wait_for(lambda: ours() <= before)
