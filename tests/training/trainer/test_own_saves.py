"""A save that only hf_spot needs is seen by nobody else: not by people, rotation, or trackers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_spot import Run, SpotArguments, SpotCallback
from hf_spot.run.local_copies import record
from hf_spot.run.output_folder import enter, own_save
from hf_spot.training.trainer.save_schedule import Cadence
from tests.run.test_local_copies import REQUEST, claimed, save
from tests.small_disk import SmallDisk, why_not
from tests.training.conftest import Patient, Recorder, make_trainer, same, weights

AUTO = SpotArguments(notice="none", keep_checkpoints=0, cadence="auto")
OWN = Path(".hf_spot", "saves")
needs_disks = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(autouse=True)
def due(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has a save added after each step, or after those that are named."""

    def put(*chosen: int) -> None:
        monkeypatch.setattr(Cadence, "is_due", lambda self: self._trainer.state.global_step in chosen)

    put(*range(1, 99))
    return put


class Tracker(TrainerCallback):
    """What the callbacks of a script see and are told."""

    per_launch = ("told", "seen")

    def __init__(self) -> None:
        self.told: list[int] = []
        self.seen: list[tuple[list[str], str | None]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        names = sorted(path.name for path in Path(args.output_dir).glob("*") if path.name != ".hf_spot")
        self.seen.append((names, get_last_checkpoint(args.output_dir) if names else None))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.append(state.global_step)


class Asking(TrainerCallback):
    """Asks for a save in an event."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self.ask)

    def ask(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save or state.global_step == self.step


def reasons(store: str) -> dict[int, str]:
    return {entry.data["step"]: entry.data["reason"] for entry in Run(store).events() if entry.kind == "commit"}


def states(out: Path) -> dict[str, Any]:
    """What is in the checkpoints' files about the course of the training, and which files there are."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_file() and "hf_spot" not in name:
            found[name] = None
            if path.name == "trainer_state.json":
                told = json.loads(path.read_text().replace(str(out), "OUT"))
                timed = ("_runtime", "_per_second", "total_flos", "spot/")
                lines = [
                    {key: one for key, one in line.items() if not any(word in key for word in timed)}
                    for line in told["log_history"]
                ]
                found[name] = told | {"log_history": lines}
    return found


SETTINGS: dict[str, dict[str, Any]] = {
    "rotated": {"save_total_limit": 2},
    "never": {"save_strategy": "no"},
    "epochs": {"save_strategy": "epoch", "num_train_epochs": 2, "save_total_limit": 1, "eval_strategy": "epoch"},
    "best": {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "metric_for_best_model": "loss",
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "learning_rate": 0.3,
    },
    "judged by steps": {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "save_steps": 5},
    "judged": {"eval_strategy": "epoch", "num_train_epochs": 3, "metric_for_best_model": "loss", "save_steps": 5},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_script_sees_what_it_sees_without_hf_spot(name: str, store: str, tmp_path: Path) -> None:
    trackers, made = [Tracker(), Tracker()], []
    for folder, spot in (("plain", None), ("spot", SpotCallback(store, AUTO))):
        more = [] if spot is None else [spot, Patient(spot)]
        made.append(make_trainer(tmp_path / folder, *more, trackers[len(made)], **SETTINGS[name]))
        made[-1].train()
    plain, spot = ([(names, last and Path(last).name) for names, last in one.seen] for one in trackers)
    assert spot == plain
    assert trackers[0].told == (trackers[1].told[:-1] if name == "never" else trackers[1].told)  # the end is saved in any case
    assert [reason for reason in reasons(store).values() if reason == "cadence"]
    found = states(tmp_path / "spot")
    for path, told in states(tmp_path / "plain").items():
        assert found[path] == told, path
    assert not [*(tmp_path / "spot" / OWN).rglob("*")], reasons(store)
    best = [str(one.state.best_model_checkpoint).replace(str(tmp_path), "") for one in made]
    assert best[1] == best[0].replace("plain", "spot")
    assert same(weights(made[0]), weights(made[1]))


def test_a_launch_resumes_from_it(store: str, tmp_path: Path, peace: Any, due: Callable[..., None]) -> None:
    class Failing(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise ZeroDivisionError

    due(4, 5)
    out, callback = tmp_path / "out", SpotCallback(store, AUTO)
    with pytest.raises(ZeroDivisionError):
        make_trainer(out, callback, Patient(callback), Failing(), save_strategy="no").train()
    assert reasons(store) == {4: "cadence", 5: "cadence"}
    assert [path.name for path in out.rglob("checkpoint-*")] == ["checkpoint-5"]
    assert get_last_checkpoint(str(out)) is None
    due()
    again = make_trainer(out, SpotCallback(store, AUTO), save_strategy="no")
    again.train()
    assert Run(store).checkpoints()[-1].step == 12
    assert not (out / OWN).exists()
    assert same(weights(again), peace[0])


@pytest.mark.parametrize(("event", "step"), [("on_step_end", 4), ("on_log", 4), ("on_epoch_end", 12), ("on_epoch_end", 24)])
def test_a_save_that_somebody_has_asked_for_is_where_it_belongs(event: str, step: int, store: str, tmp_path: Path) -> None:
    tracker, callback = Tracker(), SpotCallback(store, AUTO)
    others = [tracker, callback, Patient(callback)]
    others.insert(0 if step == 24 else 3, Asking(event, step))
    make_trainer(tmp_path, *others, save_strategy="no", num_train_epochs=3, logging_steps=1).train()
    assert step in tracker.told
    assert (tmp_path / f"checkpoint-{step}" / "trainer_state.json").exists()
    assert len([entry for entry in Run(store).events() if entry.kind == "commit" and entry.data["step"] == step]) == 1


def test_an_end_that_comes_early_is_committed(store: str, tmp_path: Path) -> None:
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "loss",
        "learning_rate": 9.0,
        "save_steps": 2,
    }
    callback = SpotCallback(store, AUTO)
    made = make_trainer(
        tmp_path,
        EarlyStoppingCallback(1),
        callback,
        Patient(callback),
        load_best_model_at_end=True,
        **settings,
    )
    made.train()
    newest = Run(store).latest()
    assert newest is not None and newest.ref.complete and newest.step == made.state.global_step < 12


@pytest.mark.parametrize("event", ["on_epoch_end", "on_evaluate"])
def test_an_end_after_a_step_that_is_saved_already_is_committed_as_the_end(event: str, store: str, tmp_path: Path) -> None:
    class Ending(TrainerCallback):
        def __init__(self) -> None:
            setattr(self, event, self.end)

        def end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    callback = SpotCallback(store, AUTO)
    settings = {"eval_strategy": "steps", "eval_steps": 12, "save_strategy": "no", "num_train_epochs": 2}
    make_trainer(tmp_path, callback, Patient(callback), Ending(), **settings).train()
    newest = Run(store).latest()
    assert newest is not None and newest.step == 12 and newest.ref.complete and not newest.ref.added


def test_a_trainer_that_does_more_than_save_gets_no_added_saves(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Copying(Trainer):
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            (Path(self.args.output_dir) / f"copied-{self.state.global_step}").touch()

    callback = SpotCallback(store, AUTO)
    made = make_trainer(tmp_path, callback, Patient(callback), save_steps=6)
    made.__class__ = Copying
    with caplog.at_level(logging.INFO, "hf_spot"):
        made.train()
    assert reasons(store) == {6: "schedule", 12: "end"}
    assert caplog.text.count("adds no saves to this training, because Copying._save_checkpoint is the script's own") == 1


def test_a_push_of_each_checkpoint_is_none_of_an_added_save(store: str, tmp_path: Path) -> None:
    pushed: list[str] = []

    class Pushing(Trainer):
        def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
            pushed.append(Path(checkpoint_folder).name)

    callback = SpotCallback(store, AUTO)
    made = make_trainer(tmp_path, callback, Patient(callback), save_steps=6)
    made.__class__, made.args.push_to_hub = Pushing, True
    made.train()
    assert pushed == ["checkpoint-6", "checkpoint-12"]
    assert reasons(store) == dict.fromkeys(range(1, 12), "cadence") | {6: "schedule", 12: "end"}


def test_what_is_kept_in_the_store_is_what_trainer_has_saved_and_the_newest(
    store: str, tmp_path: Path, due: Callable[..., None]
) -> None:
    due(1, 2, 4, 5, 7, 8, 10)
    callback, kept = SpotCallback(store, replace(AUTO, keep_checkpoints=2)), {}

    class Noting(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kept[state.global_step] = [ref.step for ref in Run(store).state().checkpoints]

    make_trainer(tmp_path, callback, Patient(callback), Noting(), save_steps=3).train()
    assert kept[6] == [3, 4, 5] and kept[9] == [3, 6, 7, 8] and kept[12] == [6, 9, 10]
    assert [ref.step for ref in Run(store).state().checkpoints] == [9, 10, 12]


@needs_disks
def test_an_added_save_that_fails_ends_no_training(
    store: str, tmp_path: Path, due: Callable[..., None], caplog: pytest.LogCaptureFixture, peace: Any
) -> None:
    due(4, 5)
    with SmallDisk(tmp_path / "disk", size_kb=16 << 10) as disk:
        acts = [Recorder(4, lambda: disk.fill(48)), Recorder(6, disk.empty)]
        callback = SpotCallback(store, AUTO)
        made = make_trainer(disk.path / "out", callback, Patient(callback), *acts, save_steps=6)
        made.train()
        assert reasons(store) == {6: "schedule", 12: "end"}
        assert not [*(disk.path / "out" / OWN).rglob("*")]
    assert "checkpoint-4 can't be saved" in caplog.text and "training goes on" in caplog.text
    assert same(weights(made), peace[0])


@pytest.fixture
def by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("hf_spot.training.trainer.save_schedule.next_save_s", lambda *_: 0.0)


@needs_disks
def test_a_disk_without_room_for_trainers_next_save_gets_none_before_it(
    store: str, tmp_path: Path, by_the_clock: None, caplog: pytest.LogCaptureFixture
) -> None:
    with SmallDisk(tmp_path / "disk", size_kb=16 << 10) as disk:
        callback = SpotCallback(store, AUTO)
        acts = [Recorder(7, lambda: disk.fill(disk_left_kb[0]))]
        disk_left_kb = [0]

        class Measuring(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 5:
                    disk_left_kb[0] = sum(file.size for file in Run(store).checkpoints()[-1].files) * 2 // 1024

        made = make_trainer(disk.path / "out", callback, Patient(callback), Measuring(), *acts, save_steps=12)
        made.train()
    added = [step for step, reason in reasons(store).items() if reason == "cadence"]
    assert added and max(added) <= 6
    assert caplog.text.count("--cadence auto adds no save for now") == 1


@pytest.mark.parametrize(
    ("is_recorded", "step", "committed", "expected"),
    [
        (True, 10, 5, ["checkpoint-10"]),  # whole, and not committed yet
        (False, 10, 5, []),  # perhaps torn
        (False, 10, 10, ["checkpoint-10"]),  # needn't be fetched
        (False, 10, 20, []),  # an older commit
    ],
)
def test_what_a_killed_launch_has_left_is_of_use_or_deleted(
    is_recorded: bool, step: int, committed: int, expected: list[str], tmp_path: Path
) -> None:
    run, out = claimed(), tmp_path / "out"
    first = save(tmp_path / "first", committed)
    request = replace(REQUEST, step=committed)
    run.commit(request, run.upload(first, request))
    enter(run, out, keep=False)
    folder = own_save(out, step)
    save(folder.parent, step)
    if is_recorded:
        record(run, out, folder, REQUEST)
    enter(run, out, keep=False)
    assert sorted(path.name for path in out.glob("*") if path.name != ".hf_spot") == expected
    assert not (out / OWN).exists()
