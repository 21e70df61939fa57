"""Trainers and callbacks that do something with a checkpoint of their own find it whole, and keep the background save."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, Trainer, TrainerCallback

from hf_spot import Run, SpotArguments, SpotCallback, SpotError
from hf_spot.training.saving.async_writer import AsyncCheckpointWriter
from hf_spot.training.saving.unwritten import who_have_imported
from tests.training.conftest import STEPS, Patient, SaveRecorder, make_trainer, same, weights
from tests.training.test_callback import steps
from tests.waiting import PATIENCE_S, wait_for

# -- within a save ----------------------------------------------------------------------------------------------------

MODEL = "model.safetensors"


def nothing(trainer: Trainer, folder: Path) -> None:
    pass


def writes_json(trainer: Trainer, folder: Path) -> None:
    (folder / "extra.json").write_text(json.dumps({"step": trainer.state.global_step}))


def writes_pickle(trainer: Trainer, folder: Path) -> None:
    with open(folder / "extra.pkl", "wb") as file:
        pickle.dump({"step": trainer.state.global_step}, file)


def writes_numpy(trainer: Trainer, folder: Path) -> None:
    np.save(folder / "extra.npy", np.full(3, trainer.state.global_step))


def saves_to_an_open_file(trainer: Trainer, folder: Path) -> None:
    with open(folder / "extra.pt", "wb") as file:
        torch.save({"step": trainer.state.global_step}, file)


def saves_a_tensor_that_changes(trainer: Trainer, folder: Path) -> None:
    changing = torch.full((4,), float(trainer.state.global_step))
    torch.save(changing, folder / "extra.pt")
    changing.zero_()


def saves_a_second_model(trainer: Trainer, folder: Path) -> None:
    second = GPT2LMHeadModel(trainer.model.config)  # type: ignore[union-attr]
    with torch.no_grad():
        for one in second.parameters():
            one.fill_(trainer.state.global_step)
    second.save_pretrained(folder / "second")


def copies(trainer: Trainer, folder: Path) -> None:
    shutil.copy(folder / MODEL, folder / "copied")


def copies_if_there(trainer: Trainer, folder: Path) -> None:
    if os.path.exists(folder / MODEL):  # as older scripts have it
        (folder / "copied").write_bytes(b"")
        shutil.copyfile(folder / MODEL, folder / "copied")


def links(trainer: Trainer, folder: Path) -> None:
    os.link(folder / MODEL, folder / "copied")


def lists(trainer: Trainer, folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    (folder / "listed.json").write_text(json.dumps(names))
    assert MODEL in names


def reads_weights(trainer: Trainer, folder: Path) -> None:
    with safetensors.safe_open(folder / MODEL, "pt") as file:  # type: ignore[attr-defined, no-untyped-call]
        assert file.keys()
    assert safetensors.torch.load_file(folder / MODEL)


def reads_by_torch(trainer: Trainer, folder: Path) -> None:
    assert torch.load(folder / "optimizer.pt", weights_only=True)["state"]


def reads_by_a_library(trainer: Trainer, folder: Path) -> None:
    read = AutoModelForCausalLM.from_pretrained(folder)
    assert same(dict(read.state_dict()), weights(trainer))


def reads_in_threads(trainer: Trainer, folder: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda name: len((folder / name).read_bytes()), [MODEL, "config.json"]))


def reads_in_a_subprocess(trainer: Trainer, folder: Path) -> None:
    subprocess.run(["cmp", folder / MODEL, folder / MODEL], check=True)


def overwrites(trainer: Trainer, folder: Path) -> None:
    (folder / MODEL).write_bytes(b"mine")


def deletes(trainer: Trainer, folder: Path) -> None:
    (folder / "training_args.bin").unlink()


# What a trainer does after ``super()._save(…)`` or ``super()._save_checkpoint(…)``, and how the line about it begins, if
# training must wait.
AFTER = {
    "only calls super": (nothing, None),
    "writes JSON": (writes_json, None),
    "pickles": (writes_pickle, None),
    "writes numpy": (writes_numpy, None),
    "torch.save to a file object": (saves_to_an_open_file, None),
    "torch.save of what changes": (saves_a_tensor_that_changes, None),
    "save_pretrained of a second model": (saves_a_second_model, None),
    "copies": (copies, "copies"),
    "copies if it is there": (copies_if_there, "copies_if_there"),
    "links": (links, "links"),
    "lists": (lists, "lists.<locals>.<genexpr>" if sys.version_info >= (3, 11) else "<genexpr>"),
    "reads with safetensors": (reads_weights, "reads_weights"),
    "reads with torch": (reads_by_torch, "reads_by_torch"),
    "reads with transformers": (reads_by_a_library, "reads_by_a_library"),
    "reads in threads": (reads_in_threads, "reads_in_threads.<locals>.<lambda>" if sys.version_info >= (3, 11) else "<lambda>"),
    "reads in a subprocess": (reads_in_a_subprocess, "(reads_in_a_subprocess|_fork_or_execute)"),
    "overwrites": (overwrites, "overwrites"),
    "deletes": (deletes, "deletes"),
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    made = make_trainer(tmp_path_factory.mktemp("out"), max_steps=1, save_strategy="no")
    made.train()
    return made


@pytest.fixture
def behind() -> Any:
    made = AsyncCheckpointWriter()
    yield made
    made.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save(trainer: Trainer, step: int, act: Callable[[Trainer, Path], None]) -> Path:
    torch.manual_seed(0)
    trainer.state.global_step = step
    trainer._save_checkpoint(trainer.model, None)
    folder = Path(str(trainer.args.output_dir), f"checkpoint-{step}")
    act(trainer, folder)
    return folder


@pytest.mark.parametrize("name", AFTER)
def test_what_a_trainer_does_with_its_files_gives_the_same_files(
    name: str, trainer: Trainer, behind: AsyncCheckpointWriter
) -> None:
    act, who = AFTER[name]
    plain = contents(folder := save(trainer, 7, act))
    shutil.rmtree(folder)
    told: list[str] = []
    with behind.capturing(on_touch=lambda code, touch, waited_s: told.append(code)):
        save(trainer, 7, act)
        with behind._unwritten.ours():
            assert (folder / MODEL).exists() == (who is not None)
    assert behind.wait(PATIENCE_S)
    assert behind.take_error() is None
    assert contents(folder) == plain
    shutil.rmtree(folder)
    assert told[:1] == [] if who is None else re.match(rf"{who} \(\w+.py:\d+\)", told[0]), told


def test_a_file_goes_where_it_was_meant_to(
    behind: AsyncCheckpointWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with behind.capturing():
        torch.save(torch.ones(2), "one.pt")
        safetensors.torch.save_file({"x": torch.ones(2)}, "two.safetensors")
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert behind.wait(PATIENCE_S)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "one.pt", "two.safetensors"]


@pytest.mark.parametrize("by", ["another name of the folder", "its name as bytes"])
def test_a_folder_is_known_by_every_name(by: str, behind: AsyncCheckpointWriter, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with behind.capturing(on_touch=lambda *told: None):
        torch.save(torch.ones(2), tmp_path / "link" / "one.pt")
        if by == "another name of the folder":
            assert (tmp_path / "real" / "one.pt").stat().st_size
        else:
            assert [entry.name for entry in os.scandir(os.fsencode(tmp_path / "real"))] == [b"one.pt"]


# -- in a training ----------------------------------------------------------------------------------------------------


class Files:
    """Who has written each file of weights: the writer thread, or another one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.behind: list[int] = []
        self.at_once: list[int] = []
        self.may_write = threading.Event()
        self.may_write.set()
        plain = safetensors.torch.serialize_file

        def serialize(tensors: Any, filename: Any, metadata: Any = None) -> None:
            by_writer = "writer" in threading.current_thread().name
            (self.behind if by_writer else self.at_once).append(int(Path(filename).parent.name.rpartition("-")[2]))
            assert not by_writer or self.may_write.wait(PATIENCE_S)
            time.sleep(0 if by_writer else 0.01)
            plain(tensors, filename, metadata=metadata)

        monkeypatch.setattr("hf_spot.training.saving.async_writer._plain_serialize", serialize)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Files:
    return Files(monkeypatch)


class OnlySuper(Trainer):
    """Like axolotl's and LLaMA-Factory's: adds to what Trainer writes."""

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        (Path(output_dir) / "tokens_state.json").write_text("{}")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        (Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}") / "processor.json").write_text("{}")


class Temporary(OnlySuper):
    """Writes into a temporary folder, and renames it when it is complete."""

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        folder = Path(output_dir)
        super()._save(str(folder.with_name("tmp-" + folder.name)), state_dict)
        folder.with_name("tmp-" + folder.name).rename(folder)


class Reads(OnlySuper):
    """Uploads its weights, say."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        assert Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}", MODEL).exists()


class Moves(OnlySuper):
    """Puts its checkpoint where nobody looks."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}").rename(Path(str(self.args.output_dir), "best"))


def trained(tmp_path: Path, store: str, kind: type[Trainer], *callbacks: TrainerCallback, **more: Any) -> Trainer:
    callback = SpotCallback(store, SpotArguments(notice="none", keep_checkpoints=0, **more))
    made = make_trainer(tmp_path / "out", callback, Patient(callback), *callbacks)
    made.__class__ = kind
    made.train()
    return made


@pytest.mark.parametrize("kind", [OnlySuper, Temporary, Reads])
def test_a_trainer_of_a_script_keeps_the_background_save(
    kind: type[Trainer], store: str, tmp_path: Path, peace: Any, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trained(tmp_path, store, kind)
    waits = kind is not OnlySuper
    assert files.behind == ([] if waits else [3, 6, 9])  # the last save ends the training
    assert same(weights(trainer), peace[0])
    assert steps(store) == [3, 6, 9, 12]
    assert all(problems == [] for problems in Run(store).verify().values())
    pulled = Run(store).pull(tmp_path / "pulled", 6)
    assert all((pulled / name).stat().st_size for name in (MODEL, "processor.json", "tokens_state.json"))
    lines = [one.message for one in caplog.records if "training waited" in one.message]
    assert len(lines) == waits
    if waits:
        assert re.match(r"\S+_save\w* \(test_unwritten.py:\d+\) touches \S+ of checkpoint-3, ", lines[0])
        assert re.search(r"training waited 0.\d+ s for its files; said once$", lines[0])


def test_a_checkpoint_that_is_moved_away_is_refused_by_name(store: str, tmp_path: Path) -> None:
    with pytest.raises(SpotError, match=r"checkpoint-3 has disappeared during its save: Moves._save\w* has moved it") as told:
        trained(tmp_path, store, Moves)
    assert "copy it instead" in told.value.hint
    assert steps(store) == []


class Uploads(TrainerCallback):
    """Hands the folder to a thread, as the clients of trackers and stores do."""

    def __init__(self, read: Callable[[Path], Any]) -> None:
        self.found: list[Any] = []
        self._read = read

    def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        with ThreadPoolExecutor(1) as pool:
            self.found.append(pool.submit(self._read, folder).result())


READS = {
    "lists": lambda folder: (folder / MODEL).name in os.listdir(folder),
    "stats": lambda folder: os.path.getsize(folder / MODEL) > 0,
    "reads": lambda folder: bool(safetensors.torch.load_file(folder / MODEL)),
    "copies": lambda folder: bool(shutil.copytree(folder, folder.parent.parent / folder.name)),
    "runs a program": lambda folder: subprocess.run(["ls", folder], capture_output=True, text=True).stdout.count(MODEL) == 1,
    "runs one on all": lambda folder: (
        MODEL in subprocess.run(["ls", "-R", folder.parent], capture_output=True, text=True).stdout
    ),
}


@pytest.mark.parametrize("name", READS)
def test_a_callback_that_reads_a_checkpoint_waits_for_it(
    name: str, store: str, tmp_path: Path, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    uploads, seen = Uploads(READS[name]), []  # type: ignore[arg-type]

    def wait(self: AsyncCheckpointWriter, touch: str, plain: Any = AsyncCheckpointWriter._arrived) -> None:
        seen.append(files.may_write.is_set())
        files.may_write.set()
        plain(self, touch)

    files.may_write.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AsyncCheckpointWriter, "_arrived", wait)
        callback = SpotCallback(store, SpotArguments(notice="none"))
        make_trainer(tmp_path / "out", callback, uploads, max_steps=4).train()
    assert uploads.found == [True, True]
    assert seen[0] is False and files.behind == [3]
    assert sum("training waited" in one.message for one in caplog.records) <= 1


def test_a_callback_that_only_listens_does_not_wait(store: str, tmp_path: Path, files: Files) -> None:
    events: list[str] = []

    class Listens(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            events.append(f"told of {state.global_step}")
            assert Path(args.output_dir).is_dir() and os.listdir(args.output_dir)

        def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            if state.global_step == 3:
                wait_for(lambda: files.behind == [3], "for the writer")
                events.append("a step")
                files.may_write.set()

    files.may_write.clear()
    make_trainer(tmp_path / "out", SpotCallback(store, SpotArguments(notice="none")), Listens(), max_steps=4).train()
    assert events == ["told of 3", "a step", "told of 4"]


def test_one_that_waits_for_a_save_that_fails_does_not_end_the_training(
    store: str, tmp_path: Path, peace: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = safetensors.torch.serialize_file

    def full(tensors: Any, filename: Any, metadata: Any = None) -> None:
        if "checkpoint-6" in str(filename):
            raise OSError(28, "No space left on device")
        plain(tensors, filename, metadata=metadata)

    monkeypatch.setattr("hf_spot.training.saving.async_writer._plain_serialize", full)
    trainer = trained(tmp_path, store, OnlySuper, SaveRecorder(), on_save_error="go-on")
    assert same(weights(trainer), peace[0])
    assert steps(store) == [3, 9, STEPS]
    assert "a callback raised FileNotFoundError" in caplog.text


def test_one_that_reads_what_can_not_be_written_does_not_end_the_training(
    store: str, tmp_path: Path, peace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = safetensors.torch.serialize_file

    def full(tensors: Any, filename: Any, metadata: Any = None) -> None:
        if "checkpoint-6" in str(filename):
            raise OSError(28, "No space left on device")
        plain(tensors, filename, metadata=metadata)

    monkeypatch.setattr("hf_spot.training.saving.async_writer._plain_serialize", full)
    trainer = trained(tmp_path, store, Reads, on_save_error="go-on")
    assert same(weights(trainer), peace[0])
    assert steps(store) == [3, 9, STEPS]


def test_a_child_of_a_fork_reads_it_whole(store: str, tmp_path: Path, files: Files) -> None:
    codes = []

    class Forks(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            if (child := os.fork()) == 0:
                os._exit(0 if Path(args.output_dir, f"checkpoint-{state.global_step}", MODEL).exists() else 1)
            codes.append(os.waitpid(child, 0)[1])

    make_trainer(tmp_path / "out", SpotCallback(store, SpotArguments(notice="none")), Forks(), max_steps=4).train()
    assert codes == [0, 0]


def test_modules_that_import_more_when_they_are_asked_for_a_name_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise ModuleNotFoundError(f"{name} needs a package that is missing")

    value, has_it = object(), ModuleType("has_it")
    has_it.safe_open = value  # type: ignore[attr-defined]
    for module in (has_it, Lazy("lazy")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert who_have_imported("safe_open", value) == [has_it]
