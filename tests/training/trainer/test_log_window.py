"""What a user reads of an interrupted run is what an undisturbed one tells: log lines, results files, trackers' lines."""

from __future__ import annotations

import functools
import json
import shutil
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from hf_spot import Run, SpotArguments, SpotCallback, TrainingPreempted
from hf_spot.training.session import recognition
from hf_spot.training.trainer.accumulation import Accumulation
from tests.training.conftest import Patient, Recorder, make_trainer, same, weights
from tests.training.test_callback import QUIET, preempt
from tests.training.trainer.test_exactness import PreemptEvaluation, Slow

# Seconds of this machine, and what is divided by them: no two runs have the same.
MEASURED = ("runtime", "_per_second")

CASES: dict[str, dict[str, Any]] = {
    "five steps a line": {"logging_steps": 5},
    "and an accumulation": {"logging_steps": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 2},
    "more steps than the run has": {"logging_steps": 50},
    "the first step": {"logging_steps": 4, "logging_first_step": True},
    "a share of the steps": {"logging_steps": 0.3},
    "epochs": {
        "logging_strategy": "epoch",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "logging_first_step": True,
    },
    "epochs that end within one": {"logging_strategy": "epoch", "max_steps": 9, "per_device_train_batch_size": 4},
    "epochs and their evaluation": {
        "logging_strategy": "epoch",
        "eval_strategy": "epoch",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "reduce_lr_on_plateau",
    },
    "epochs and evaluations within": {
        "logging_strategy": "epoch",
        "eval_strategy": "steps",
        "eval_steps": 3,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
    },
    "evaluated at the start": {"logging_steps": 5, "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 4},
    "evaluated at the start, and the best loaded": {
        "logging_steps": 5,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "load_best_model_at_end": True,
    },
    "two evaluation sets": {
        "logging_steps": 5,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "eval_dataset": lambda data: {"one": data[:4], "two": data[4:8]},
    },
    "a plateau": {
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
    },
    "tokens": {"logging_steps": 5, "include_num_input_tokens_seen": "all"},
    "bf16": {"logging_steps": 5, "bf16": True},
    "averages of its own": {"logging_steps": 5, "kind": "Averaging", "eval_strategy": "steps", "eval_steps": 4},
    "averages of its own, accumulated": {
        "logging_steps": 5,
        "kind": "Averaging",
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
    },
    "losses that are no numbers": {"logging_steps": 5, "kind": "Filtering"},
    "losses that are no numbers, unfiltered": {"logging_steps": 5, "kind": "Filtering", "logging_nan_inf_filter": False},
    "very many operations": {"logging_steps": 5, "kind": "Large"},
    "no schedule of saves": {"logging_steps": 5, "save_strategy": "no"},
    "the best saved": {
        "logging_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "best",
        "metric_for_best_model": "loss",
    },
}


class Averaging(Trainer):
    """Reports more than the loss, as TRL's and sentence-transformers' trainers do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parts: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.largest: dict[str, torch.Tensor] = {}
        self.newest: deque[float] = deque(maxlen=3)
        self.lines = 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, *args, **kwargs)
        loss = (found[0] if isinstance(found, tuple) else found).detach()
        mode = "train" if model.training else "eval"
        self.parts[mode]["perplexity"].append(loss.exp().item())
        self.largest[mode] = torch.maximum(self.largest.get(mode, loss), loss)
        self.newest.append(loss.item())
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"  # type: ignore[union-attr]
        logs.update({f"{mode}_{name}": sum(values) / len(values) for name, values in self.parts[mode].items()})
        logs |= {f"{mode}_largest": self.largest.pop(mode).item()} if mode in self.largest else {}
        self.lines += 1
        logs |= {"newest": sum(self.newest), "lines": self.lines}
        super().log(logs, start_time)
        self.parts[mode].clear()


class Filtering(Trainer):
    """Every third loss is said to be no number."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        return loss * float("nan") if self.state.global_step % 3 == 1 else loss


class Large(Trainer):
    """Has so many floating-point operations that their sum depends on its order."""

    def floating_point_ops(self, inputs: Any) -> int:
        return 10**16 // 3 * (self.state.global_step + 1) + 1


def make(output_dir: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    split, kind = settings.pop("eval_dataset", None), globals()[settings.pop("kind", "Trainer")]
    plain = make_trainer(output_dir, *callbacks, **settings)
    if kind is Trainer and split is None:
        return plain
    data = plain.eval_dataset if split is None else split(plain.train_dataset)
    return kind(  # type: ignore[no-any-return]
        model=plain.model, args=plain.args, train_dataset=plain.train_dataset, eval_dataset=data, callbacks=list(callbacks)
    )


def told(trainer: Trainer) -> list[dict[str, Any]]:
    """All log lines, without what is measured."""
    return [plain(line) for line in trainer.state.log_history]


def plain(line: dict[str, float]) -> dict[str, Any]:
    """A line without what is measured; what is no number equals itself."""
    return {key: value if value == value else None for key, value in line.items() if not key.endswith(MEASURED)}


def keys(trainer: Trainer) -> list[set[str]]:
    return [set(line) for line in trainer.state.log_history]


def results(trainer: Trainer, output: TrainOutput) -> dict[str, Any]:
    """The files that transformers' examples write at their end, without what is measured."""
    trainer.log_metrics("train", output.metrics)
    trainer.save_metrics("train", output.metrics)
    trainer.save_state()
    found = {}
    for name in ("train_results.json", "all_results.json", "trainer_state.json"):
        text = Path(trainer.args.output_dir or "", name).read_text()
        content = json.loads(text.replace(str(trainer.args.output_dir), "…"))
        content.pop("log_history", None)  # see `told`
        if not trainer.args.load_best_model_at_end:
            # Where it is: a checkpoint that a notice has added may be there, and one of another machine may not.
            content.pop("best_model_checkpoint", None)
        if trainer.args.save_strategy == "no":
            content.pop("stateful_callbacks", None)  # they are Trainer's as of the last save
        found[name] = {key: value for key, value in content.items() if not key.endswith(MEASURED)}
    return found


def interrupted(
    store: str, tmp_path: Path, *at_steps: int, callbacks: tuple[TrainerCallback, ...] = (), **settings: Any
) -> tuple[Trainer, TrainOutput]:
    """One launch more than notices, each with another folder, as if in another process."""
    recognition.forget_finished()
    for number, at_step in enumerate(at_steps):
        callback = SpotCallback(store, SpotArguments(notice="signal"))
        with pytest.raises(TrainingPreempted):
            make(
                tmp_path / f"launch-{number}", callback, Patient(callback), Recorder(at_step, preempt(callback)), **settings
            ).train()
    callback = SpotCallback(store, QUIET)
    trainer = make(tmp_path / "last", callback, *callbacks, **settings)
    return trainer, trainer.train()


def peaceful(tmp_path: Path, *callbacks: TrainerCallback, **settings: Any) -> tuple[Trainer, TrainOutput]:
    trainer = make(tmp_path / "peace", *callbacks, **settings)
    return trainer, trainer.train()


def assert_equal(one: tuple[Trainer, TrainOutput], other: tuple[Trainer, TrainOutput]) -> None:
    assert told(one[0]) == told(other[0])
    assert keys(one[0]) == keys(other[0])
    assert repr(one[1].training_loss) == repr(other[1].training_loss)
    assert one[1].metrics.keys() == other[1].metrics.keys()
    assert results(*one) == results(*other)
    assert same(weights(one[0]), weights(other[0]))


def settings_of(case: str) -> dict[str, Any]:
    settings = {"save_steps": 100, **CASES[case]}
    if settings.get("load_best_model_at_end"):
        settings["save_steps"] = settings["eval_steps"]
    return settings


@pytest.fixture(scope="module")
def undisturbed_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Trainer, TrainOutput]]:
    """A case with nobody to disturb it, trained once for all that are compared with it."""
    return functools.cache(lambda case: peaceful(tmp_path_factory.mktemp("undisturbed"), **settings_of(case)))


@pytest.mark.parametrize("at_steps", [(4,), (3, 6, 7)], ids=["once", "three times"])
@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_tells_what_an_undisturbed_one_tells(
    store: str,
    tmp_path: Path,
    case: str,
    at_steps: tuple[int, ...],
    undisturbed_case: Callable[[str], tuple[Trainer, TrainOutput]],
) -> None:
    assert_equal(interrupted(store, tmp_path, *at_steps, **settings_of(case)), undisturbed_case(case))


def test_a_step_that_is_left_in_its_middle_adds_nothing(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "kind": "Averaging",
        "logging_steps": 4,
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 3,
        "save_steps": 100,
        "include_num_input_tokens_seen": "all",
    }
    undisturbed = peaceful(tmp_path, **settings)
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    slow = Slow(callback, 4, 2)
    monkeypatch.setattr("hf_spot.training.callback.Accumulation", functools.partial(Accumulation, clock=slow.clock))
    with pytest.raises(TrainingPreempted) as caught:
        make(tmp_path / "one", slow, callback, **settings).train()
    assert caught.value.step == 3
    assert_equal(interrupted(store, tmp_path, **settings), undisturbed)


@pytest.mark.parametrize("number", [1, 2, 3], ids=["at the start", "the first", "the second"])
def test_an_evaluation_that_a_notice_has_cut_is_told_once(store: str, tmp_path: Path, number: int) -> None:
    settings = {
        "kind": "Averaging",
        "logging_steps": 5,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 100,
        "per_device_eval_batch_size": 2,
    }
    undisturbed = peaceful(tmp_path, **settings)
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    heard = Recorder()
    with pytest.raises(TrainingPreempted) as caught:
        make(tmp_path / "one", PreemptEvaluation(callback, number), callback, heard, **settings).train()
    assert caught.value.step == {1: None, 2: 4, 3: 8}[number]
    assert heard.evaluated == [0, 4, 8][: number - 1]
    assert_equal(interrupted(store, tmp_path, **settings), undisturbed)


@pytest.mark.parametrize("at_steps", [(5,), (2, 5, 6)], ids=["once", "three times"])
def test_early_stopping_counts_no_evaluation_twice(store: str, tmp_path: Path, at_steps: tuple[int, ...]) -> None:
    settings = {
        "logging_steps": 3,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "num_train_epochs": 4,
        "metric_for_best_model": "loss",
        "load_best_model_at_end": True,
        "learning_rate": 0.5,
    }
    undisturbed = make(tmp_path / "peace", EarlyStoppingCallback(3), **settings)
    output = undisturbed.train()
    assert 6 < output.global_step < undisturbed.state.max_steps
    for number, at_step in enumerate(at_steps):
        callback = SpotCallback(store, SpotArguments(notice="signal"))
        act = Recorder(at_step, preempt(callback))
        with pytest.raises(TrainingPreempted):
            make(tmp_path / f"launch-{number}", callback, EarlyStoppingCallback(3), act, **settings).train()
    trainer = make(tmp_path / "last", SpotCallback(store, QUIET), EarlyStoppingCallback(3), **settings)
    assert_equal((trainer, trainer.train()), (undisturbed, output))


def test_a_training_that_dies_is_told_from_its_last_commit_on(store: str, tmp_path: Path) -> None:
    settings = {"logging_steps": 5, "save_steps": 4}
    undisturbed = peaceful(tmp_path, **settings)

    def die() -> None:
        raise ZeroDivisionError

    callback = SpotCallback(store, QUIET)
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "one", callback, Patient(callback), Recorder(11, die), **settings).train()
    newest = Run(store).latest()
    assert newest is not None and newest.step == 8
    assert_equal(interrupted(store, tmp_path, **settings), undisturbed)


FINISHED: dict[str, dict[str, Any]] = {
    "steps": {"logging_steps": 5},
    "epochs": {"logging_strategy": "epoch", "eval_strategy": "epoch"},
    "epochs that end within one": {"logging_strategy": "epoch", "eval_strategy": "epoch", "max_steps": 7},
    "evaluated last": {"logging_steps": 5, "eval_strategy": "steps", "eval_steps": 4},
    "the best loaded": {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 3, "load_best_model_at_end": True},
    "averages of its own": {"logging_steps": 5, "kind": "Averaging", "eval_strategy": "epoch"},
}


@pytest.mark.parametrize("by_notice", [False, True], ids=["it has ended", "a notice in its last step"])
@pytest.mark.parametrize("case", FINISHED)
def test_a_finished_training_that_is_started_again_returns_what_it_returned(
    store: str, tmp_path: Path, case: str, by_notice: bool
) -> None:
    settings = {"save_steps": 100, **FINISHED[case]}
    undisturbed = peaceful(tmp_path, **settings)
    heard = Heard()
    if by_notice:
        last = undisturbed[0].state.global_step
        assert_equal(interrupted(store, tmp_path, last, callbacks=(heard,), **settings), undisturbed)
        assert heard.lines == told(undisturbed[0])[-len(heard.lines) :]
        assert heard.lines
    else:
        assert_equal(interrupted(store, tmp_path, 2, **settings), undisturbed)
        assert_equal(interrupted(store, tmp_path / "again", callbacks=(heard,), **settings), undisturbed)
        assert not heard.lines  # trackers have these lines
    assert undisturbed[0].evaluate().keys() == interrupted(store, tmp_path / "third", **settings)[0].evaluate().keys()


class Heard(TrainerCallback):
    """What a tracker hears; kept where no checkpoint takes it along, as a tracker does."""

    _kept: ClassVar[WeakKeyDictionary[Heard, list[dict[str, Any]]]] = WeakKeyDictionary()

    @property
    def lines(self) -> list[dict[str, Any]]:
        return self._kept.setdefault(self, [])

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        line = {key: value for key, value in logs.items() if not key.startswith("spot/")}
        self.lines.append({**plain(line), "step": state.global_step})


def test_a_stop_adds_no_line_for_trackers(store: str, tmp_path: Path) -> None:
    settings = {"logging_steps": 5, "save_steps": 100, "eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True}
    peace, heard = Heard(), Heard()
    peaceful(tmp_path, peace, **settings)
    for number, at_step in enumerate((4, 6, 7, 12)):
        callback = SpotCallback(store, SpotArguments(notice="signal"))
        with pytest.raises(TrainingPreempted):
            make(tmp_path / f"launch-{number}", callback, heard, Recorder(at_step, preempt(callback)), **settings).train()
    make(tmp_path / "last", SpotCallback(store, QUIET), heard, **settings).train()
    assert heard.lines == peace.lines


def board(folder: Path) -> dict[str, Any]:
    """What TensorBoard reads in a folder: scalars, and how often each text."""
    read = EventAccumulator(str(folder))
    read.Reload()
    tags = [tag for tag in read.Tags()["scalars"] if not tag.endswith(MEASURED) and "/spot/" not in tag]
    scalars = {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in tags}
    return scalars | {tag: len(read.Tensors(tag)) for tag in read.Tags()["tensors"]}


@pytest.mark.parametrize("by_name", [True, False], ids=["a folder by name", "Trainer's own folder"])
def test_tensorboard_shows_what_it_shows_of_an_undisturbed_run(
    store: str, tmp_path: Path, by_name: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "logging_steps": 2,
        "save_steps": 4,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "report_to": "tensorboard",
    }
    stamps = iter(f"runs/at-{number}" for number in range(9))
    monkeypatch.setattr("transformers.integrations.integration_utils.default_logdir", lambda: next(stamps))
    if by_name:
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "peace-board"))
    peaceful(tmp_path, **settings)
    if by_name:
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))

    def die() -> None:
        raise ZeroDivisionError

    callback = SpotCallback(store, SpotArguments(notice="signal"))
    with pytest.raises(TrainingPreempted):
        make(tmp_path / "out", callback, Recorder(3, preempt(callback)), **settings).train()
    callback = SpotCallback(store, QUIET)
    with pytest.raises(ZeroDivisionError):  # steps 9 and 10 are told, and done again
        make(tmp_path / "out", callback, Patient(callback), Recorder(11, die), **settings).train()
    make(tmp_path / "out", SpotCallback(store, QUIET), **settings).train()
    boards = ("board", "peace-board") if by_name else ("out/runs/at-1", "peace/runs/at-0")
    one, other = (board(tmp_path / folder) for folder in boards)
    assert one == other
    assert [step for step, _ in one["train/loss"]] == [2, 4, 6, 8, 10, 12]
    assert one["args/text_summary"] == 1


def test_a_checkpoint_without_a_window_is_named(store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = str(tmp_path / "run")
    callback = SpotCallback(url, SpotArguments(notice="signal"))
    with pytest.raises(TrainingPreempted):
        make(tmp_path / "one", callback, Recorder(7, preempt(callback)), logging_steps=5).train()
    trainer = make(tmp_path / "two", SpotCallback(url, QUIET), logging_steps=5)
    plain = Trainer._inner_training_loop

    def forget(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        shutil.rmtree(tmp_path / "two" / "checkpoint-7" / "log_window")
        return plain(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_inner_training_loop", forget)
        trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [5, 10]
    assert any("checkpoint-7 does not contain the losses" in record.getMessage() for record in caplog.records)
