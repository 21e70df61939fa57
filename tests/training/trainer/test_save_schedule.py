"""Saves that are added to Trainer's own: when, on whose clock, and that they change nothing but the checkpoints."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from hf_spot import Run, SpotArguments, SpotCallback, TrainingPreempted
from hf_spot.errors import ConfigError
from hf_spot.policy.cadence import History, Interruptions, SaveCost, best_interval_s, learn
from hf_spot.run.history import Past
from hf_spot.storage.memory import MemoryStore
from hf_spot.training.trainer.save_schedule import Cadence, FirstSave
from tests.training.conftest import STEPS, Patient, Recorder, SaveRecorder, make_trainer, same, weights
from tests.training.test_callback import QUIET, preempt, steps, train_until_preempted
from tests.training.trainer.test_exactness import mask
from tests.training.trainer.test_notices import At
from tests.waiting import PATIENCE_S, wait_for

AUTO = SpotArguments(notice="none", keep_checkpoints=0, cadence="auto")


def reasons(store: str) -> dict[int, str]:
    return {entry.data["step"]: entry.data["reason"] for entry in Run(store).events() if entry.kind == "commit"}


@pytest.fixture
def due_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts fixed steps in the place of the clock."""

    def put(*chosen: int) -> None:
        monkeypatch.setattr(Cadence, "is_due", lambda self: self._trainer.state.global_step in chosen)

    return put


# -- a first save that is far away --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"save_strategy": "no"}, "step 1000, the last one, in about 166 minutes"),
        ({"save_strategy": "steps", "save_steps": 5000}, "step 1000, the last one"),
        ({"save_strategy": "steps", "save_steps": 500}, "step 500, in about 83 minutes"),
        ({"save_strategy": "steps", "save_steps": 100}, None),
        ({"save_strategy": "steps", "save_steps": 500, "cadence": "auto"}, None),
        ({"save_strategy": "steps", "save_steps": 500, "saved": True}, None),
        ({"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "loss"}, None),
    ],
)
def test_a_first_save_that_is_far_away_is_told_within_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], told: str | None
) -> None:
    settings = dict(settings)
    saved, arguments = settings.pop("saved", False), SpotArguments(cadence=settings.pop("cadence", "fixed"))
    trainer, now = make_trainer(tmp_path, **settings), [0.0]
    trainer.state.max_steps, trainer.state.save_steps = 1000, trainer.args.save_steps
    first = FirstSave(trainer, arguments, lambda: now[0])
    for step in range(20):
        trainer.state.global_step, now[0] = step, step * 10.0
        first.look()
        if saved and step == 2:
            first.saved()
        assert now[0] <= 30.0 or told is None or caplog.records
    messages = [record.getMessage() for record in caplog.records if "first save" in record.getMessage()]
    assert len(messages) == (told is not None)
    assert told is None or told in messages[0]


# -- what an added save is ---------------------------------------------------------------------------------------------


def test_saves_are_added_and_none_is_taken_away(store: str, tmp_path: Path, peace: Any, due_after: Any) -> None:
    due_after(1, 3, 4, STEPS)
    callback, recorder = SpotCallback(store, AUTO), Recorder()
    trainer = make_trainer(tmp_path, callback, Patient(callback), recorder)
    trainer.train()
    assert reasons(store) == {1: "cadence", 3: "schedule", 4: "cadence", 6: "schedule", 9: "schedule", 12: "end"}
    assert same(weights(trainer), peace[0])
    assert recorder.losses == peace[1]


def test_without_being_asked_nothing_is_added(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_spot.training.trainer.save_schedule.next_save_s", lambda *_: 0.0)
    callback = SpotCallback(store, SpotArguments(notice="none", cadence="fixed"))
    make_trainer(tmp_path, callback, Patient(callback)).train()
    assert set(reasons(store).values()) == {"schedule", "end"}


def test_a_training_that_never_saves_by_itself_is_saved(store: str, tmp_path: Path, peace: Any, due_after: Any) -> None:
    due_after(5, 7, STEPS)
    callback = SpotCallback(store, AUTO)
    trainer = make_trainer(tmp_path, callback, Patient(callback), save_strategy="no")
    trainer.train()
    assert reasons(store) == {5: "cadence", 7: "cadence", 12: "end"}
    assert same(weights(trainer), peace[0])


KEEP_THE_BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1, "learning_rate": 0.3}


@pytest.mark.parametrize(
    "settings",
    [
        {
            "data_collator": mask,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 3,
            "dataloader_num_workers": 1,
        },
        {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 4, **KEEP_THE_BEST},
        {"eval_strategy": "epoch", "save_strategy": "epoch", **KEEP_THE_BEST},
        {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "best", **KEEP_THE_BEST},
    ],
    ids=["random in a worker", "best of steps", "best of epochs", "only the best"],
)
def test_a_save_after_every_step_changes_nothing(
    store: str, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 6, "per_device_eval_batch_size": 2, **settings}
    monkeypatch.setattr(Cadence, "is_due", lambda self: True)
    in_peace = SaveRecorder()
    undisturbed = make_trainer(tmp_path / "peace", in_peace, **settings)
    undisturbed.train()
    callback, first = SpotCallback(store, SpotArguments(notice="signal", cadence="auto")), SaveRecorder()
    stop_at = max(in_peace.losses) // 2 + 1
    with pytest.raises(TrainingPreempted):
        make_trainer(tmp_path / "one", callback, first, Recorder(stop_at, preempt(callback)), **settings).train()
    second = SaveRecorder()
    trainer = make_trainer(tmp_path / "two", SpotCallback(store, AUTO), second, **settings)
    trainer.train()
    assert first.losses | second.losses == in_peace.losses
    assert first.evaluated + second.evaluated == in_peace.evaluated
    assert same(weights(trainer), weights(undisturbed))
    assert trainer.state.best_metric == undisturbed.state.best_metric
    assert trainer.state.best_global_step == undisturbed.state.best_global_step
    assert history(trainer) == history(undisturbed)
    saved = {*first.saved, *second.saved}
    assert set(in_peace.saved) <= saved
    assert len(saved) > len(in_peace.saved)


def history(trainer: Any) -> list[dict[str, Any]]:
    """Trainer's log without the seconds that something took, and without its last line, which counts one launch."""
    lines = trainer.state.log_history[:-1]
    return [{name: one for name, one in line.items() if "runtime" not in name and "per_second" not in name} for line in lines]


def test_what_was_added_takes_nobodys_place(store: str, tmp_path: Path, due_after: Any) -> None:
    due_after(4, 5, 7, 8)
    callback = SpotCallback(store, SpotArguments(notice="none", keep_checkpoints=2))
    recorder = Recorder(9, lambda: kept.extend(sorted(path.name for path in tmp_path.glob("checkpoint-*"))))
    kept: list[str] = []
    make_trainer(tmp_path, callback, Patient(callback), recorder, save_total_limit=2).train()
    assert kept == ["checkpoint-3", "checkpoint-6"]
    assert steps(store) == [9, 12]


def test_while_a_checkpoint_is_on_its_way_none_is_added(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived, put_file = threading.Event(), MemoryStore.put_file

    def put(self: MemoryStore, key: str, path: Path, progress: Any = None) -> None:
        assert arrived.wait(PATIENCE_S)
        put_file(self, key, path, progress)

    monkeypatch.setattr(MemoryStore, "put_file", put)
    monkeypatch.setattr("hf_spot.training.trainer.save_schedule.next_save_s", lambda *_: 0.0)
    recorder = SaveRecorder()
    make_trainer(tmp_path, SpotCallback(store, AUTO), recorder, At("on_train_end", arrived.set), save_strategy="no").train()
    assert recorder.saved == [STEPS]
    assert reasons(store) == {1: "cadence", STEPS: "end"}


# -- when --------------------------------------------------------------------------------------------------------------


class Watch:
    """Both clocks of a `Cadence`, and what it asks."""

    def __init__(self, output_dir: Path, arguments: SpotArguments, **settings: Any) -> None:
        self.seconds, self.is_busy = 1000.0, False
        self.trainer = make_trainer(output_dir, **settings)
        self.trainer.state.max_steps, self.trainer.state.num_train_epochs = 1200, 4
        self.trainer.state.save_steps = int(self.trainer.args.save_steps)
        self.cadence = Cadence(self.trainer, arguments, lambda: self.is_busy, self.now, lambda: self.seconds)

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=self.seconds)

    def steps_to_save(self, step_s: float = 1.0, most: int = 2000) -> int | None:
        """Trains until a save is due; how many steps that took."""
        for done in range(1, most + 1):
            self.seconds += step_s
            self.trainer.state.global_step += 1
            if self.cadence.is_due():
                return done
        return None

    def save(self, stall_s: float, upload_s: float) -> None:
        self.seconds += stall_s
        self.cadence.saved(stall_s)
        self.cadence.committed(stall_s, upload_s)


EXPECTED = {"time_between_interruptions_s": 3600.0, "share_without_notice": 0.5}


def auto(**settings: Any) -> SpotArguments:
    return SpotArguments(**{"cadence": "auto", "max_interval_s": 1e6, **EXPECTED, **settings})


def test_the_first_save_measures_and_the_next_comes_when_it_is_worth_it(tmp_path: Path) -> None:
    watch = Watch(tmp_path, auto(), save_strategy="no")
    watch.cadence.began()
    assert watch.steps_to_save() is not None
    watch.save(stall_s=0.5, upload_s=2.0)
    quiet = learn(Interruptions(3600.0, 0.5), History())
    parts = round(1200 / best_interval_s(0.5, quiet))  # the last step is saved anyway
    assert watch.steps_to_save() == pytest.approx(1200 / parts, rel=0.1)


def test_what_the_journal_tells_is_taken_into_account(tmp_path: Path) -> None:
    found = []
    for history in (History(), History(3600.0, 0, 40), History(360_000.0, 5, 0)):
        watch = Watch(tmp_path, auto(), save_strategy="no")
        watch.cadence.began()
        watch.cadence.remember(Past(history, watch.now(), SaveCost(0.5, 2.0)))
        found.append(watch.steps_to_save() or 0)
    settings, often, seldom = found
    assert often < settings / 2
    assert seldom > settings * 2


def test_the_longest_interval_is_kept(tmp_path: Path) -> None:
    watch = Watch(tmp_path, auto(max_interval_s=20.0, share_without_notice=0.0), save_strategy="no")
    watch.cadence.began()
    watch.save(stall_s=5.0, upload_s=2.0)
    assert watch.steps_to_save() == 20


def test_an_upload_is_never_joined_by_another(tmp_path: Path) -> None:
    watch = Watch(tmp_path, auto(max_interval_s=20.0), save_strategy="no")
    watch.cadence.began()
    watch.is_busy = True
    assert watch.steps_to_save(most=100) is None
    watch.is_busy = False
    assert watch.steps_to_save() == 1
    watch.save(stall_s=0.1, upload_s=70.0)
    assert (watch.steps_to_save() or 0) >= 70


def test_no_save_is_added_where_trainer_saves_often_enough(tmp_path: Path) -> None:
    watch = Watch(tmp_path, auto(), save_steps=60)
    watch.cadence.began()
    watch.save(stall_s=0.5, upload_s=2.0)
    for _ in range(5):
        assert watch.steps_to_save(most=60) is None
        assert watch.cadence.due_in_s() == pytest.approx(60.0, abs=1.0)
        watch.save(stall_s=0.5, upload_s=2.0)


@pytest.mark.parametrize("settings", [{"save_steps": 300}, {"save_strategy": "epoch"}], ids=["steps", "epochs"])
def test_added_saves_stand_evenly_between_trainers(tmp_path: Path, settings: dict[str, Any]) -> None:
    watch = Watch(tmp_path, auto(), **settings)
    watch.cadence.began()
    watch.save(stall_s=1.0, upload_s=2.0)
    parts = round(300 / best_interval_s(1.0, Interruptions(3600.0, 0.5)))
    assert parts > 1
    for part in range(1, parts):
        assert watch.steps_to_save() == pytest.approx(300 / parts, abs=2), part
        watch.save(stall_s=1.0, upload_s=2.0)
    assert watch.steps_to_save(most=300 - watch.trainer.state.global_step) is None


def test_a_save_that_failed_is_not_tried_again_at_the_next_step(tmp_path: Path) -> None:
    watch = Watch(tmp_path, auto(), save_strategy="no")
    watch.cadence.began()
    first = watch.steps_to_save()
    watch.cadence.saved(None)  # it began, and nobody says that it ended
    assert watch.steps_to_save() == pytest.approx(first, abs=2)


def test_with_a_fixed_cadence_no_clock_is_read(tmp_path: Path) -> None:
    watch = Watch(tmp_path, SpotArguments(cadence="fixed"))
    watch.cadence.began()
    watch.cadence.saved(1.0)
    del watch.seconds  # reading it would raise
    assert not watch.cadence.is_due()
    assert watch.cadence.due_in_s() is None


# -- what is told and learnt --------------------------------------------------------------------------------------------


def test_a_launch_learns_from_the_one_before(store: str, tmp_path: Path) -> None:
    train_until_preempted(store, tmp_path / "one", 5)
    callback = SpotCallback(store, AUTO)
    learnt: list[Any] = []

    def look() -> None:
        session = callback._session
        assert session is not None
        learnt.append(wait_for(lambda: session.commits.past))

    make_trainer(tmp_path / "two", callback, Patient(callback), Recorder(6, look)).train()
    [past] = learnt
    assert (past.history.announced, past.history.unannounced, past.steps_lost) == (1, 0, 0)
    assert past.history.uptime_s > 0
    assert past.cost.stall_s is not None
    last = Run(store).latest()
    assert last is not None
    assert last.details["history"]["announced"] == 1
    assert last.details["history"]["uptime_s"] > past.history.uptime_s


def test_commits_and_endings_tell_where_the_time_went(store: str, tmp_path: Path) -> None:
    train_until_preempted(store, tmp_path / "one", 5)
    callback = SpotCallback(store, QUIET)
    make_trainer(tmp_path / "two", callback, Patient(callback)).train()
    launches: list[list[Any]] = []
    for entry in Run(store).events():
        if entry.kind == "claim":
            launches.append([entry])
        elif "timing" in entry.data:
            launches[-1].append(entry)
    assert [[entry.kind for entry in launch] for launch in launches] == [
        ["claim", "commit", "commit", "preempted"],
        ["claim", "commit", "commit", "commit", "finished"],
    ]
    for (claim, *entries), resumed in zip(launches, (0, 5), strict=True):
        before: dict[str, Any] = {}
        for entry in entries:
            timing = entry.data["timing"]
            assert timing["step"] == entry.data["step"]
            assert timing["steps"] == timing["step"] - resumed
            assert (timing["restore_s"] is not None) == (resumed > 0)
            spent_s = timing["first_step_s"] + timing["steps_s"] + timing["stalled_s"]
            assert 0 < spent_s <= (entry.time - claim.time).total_seconds() + 0.01
            assert all(timing[name] >= value for name, value in before.items() if value is not None)
            before = timing
            if entry.kind == "commit":
                assert entry.data["upload_s"] > 0
                assert 0 < entry.data["stall_s"] <= timing["stalled_s"] + 0.001
    assert json.dumps(launches[-1][-1].data["timing"])


# -- settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cadence": "always"}, "cadence='always' must be one of fixed, auto"),
        ({"max_interval_s": 0.0}, "max_interval_s=0.0 must be positive"),
        ({"max_interval_s": float("inf")}, "max_interval_s=inf"),
        ({"time_between_interruptions_s": -1.0}, "time_between_interruptions_s=-1.0 must be positive"),
        ({"time_between_interruptions_s": float("nan")}, "time_between_interruptions_s=nan"),
        ({"share_without_notice": 1.5}, "share_without_notice=1.5 must be from 0 to 1"),
        ({"share_without_notice": float("nan")}, "share_without_notice=nan"),
    ],
)
def test_settings_that_can_not_be_used_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")) as caught:
        SpotArguments(**settings)
    assert caught.value.hint


def test_added_saves_make_no_more_requests_than_they_may(tmp_path: Path) -> None:
    found = []
    for most in (20_000, 360):
        watch = Watch(tmp_path, auto(max_writes_per_hour=most), save_strategy="no")
        watch.cadence.began()
        watch.steps_to_save()
        watch.seconds += 0.01
        watch.cadence.saved(0.01)
        watch.cadence.committed(0.01, 0.1, writes=12)
        found.append(watch.steps_to_save() or 0)
    often, bounded = found
    assert often < 60
    assert bounded >= 120  # 12 writes of 360 in an hour
