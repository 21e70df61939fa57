"""What is written behind a training's back is what Trainer would have written, to the byte."""

from __future__ import annotations

import ctypes
import logging
import shutil
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_spot import Run, SpotArguments, SpotCallback, SpotError
from hf_spot.training.saving import async_writer
from hf_spot.training.saving.async_writer import AsyncCheckpointWriter, free_bytes
from hf_spot.training.saving.frozen import Changeable, Frozen
from tests.small_disk import SmallDisk, why_not
from tests.training.conftest import STEPS, Patient, Recorder, make_trainer, same, weights
from tests.training.test_callback import QUIET, kinds, steps
from tests.waiting import PATIENCE_S, wait_for


@pytest.fixture
def behind() -> Any:
    made = AsyncCheckpointWriter()
    yield made
    made.close()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    data = [{"input_ids": torch.arange(16), "labels": torch.arange(16)}] * 8
    folder = str(tmp_path_factory.mktemp("out"))
    args = TrainingArguments(folder, max_steps=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True)
    made = Trainer(model=model, args=args, train_dataset=data)
    made.train()
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save(trainer: Trainer, step: int) -> Path:
    trainer.state.global_step = step
    trainer._save_checkpoint(trainer.model, None)
    return Path(trainer.args.output_dir, f"checkpoint-{step}")


ODD: dict[str, Any] = {
    "tied": (one := torch.randn(7, 5)),
    "again": one,
    "a view": one[2:4],
    "turned": one.t(),
    "nothing": torch.empty(0, 3),
    "flags": torch.tensor([True, False]),
    "half": torch.randn(3).to(torch.bfloat16),
    "number": torch.tensor(3),
    "no tensors": {"lr": 0.1, "betas": (0.9, 0.999), "name": "ä" * 100},
}


def test_the_files_are_those_of_trainer(trainer: Trainer, behind: AsyncCheckpointWriter) -> None:
    plain = contents(folder := save(trainer, 7))
    shutil.rmtree(folder)
    with behind.capturing():
        save(trainer, 7)
        assert not (folder / "model.safetensors").exists() and not (folder / "optimizer.pt").exists()
    assert behind.wait(PATIENCE_S)
    assert behind.take_error() is None
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= plain.keys()
    assert contents(folder) == plain


def test_odd_values_are_written_as_torch_writes_them(behind: AsyncCheckpointWriter, tmp_path: Path) -> None:
    torch.save(ODD, tmp_path / "odd.pt")
    plain = (tmp_path / "odd.pt").read_bytes()
    (tmp_path / "odd.pt").unlink()
    with behind.capturing():
        torch.save(ODD, tmp_path / "odd.pt")
        assert not (tmp_path / "odd.pt").exists()
    assert behind.wait(PATIENCE_S)
    assert (tmp_path / "odd.pt").read_bytes() == plain


@pytest.mark.parametrize("is_later", [True, False])
def test_what_changes_right_after_a_save_is_written_as_it_was(
    is_later: bool, behind: AsyncCheckpointWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, number, serialized = {"lr": 0.1, "steps": [1, [2]]}, torch.arange(4), []
    pair = (number, 3) if not is_later else [number, 3]  # a tuple of tensors is serialized at once
    held = {"state": {0: {"step": number, "half": number[2:]}}, "groups": [inner, inner], "pair": pair, "again": number}
    plain_save = async_writer._plain_save

    def noting(*args: Any) -> None:
        serialized.append(threading.current_thread() is not threading.main_thread())
        plain_save(*args)

    monkeypatch.setattr(async_writer, "_plain_save", noting)
    torch.save(held, tmp_path / "odd.pt")
    plain = (tmp_path / "odd.pt").read_bytes()
    with behind.capturing():
        torch.save(held, tmp_path / "odd.pt")
        inner["lr"], inner["more"] = 0.2, 1
        inner["steps"][1].append(3)
        held["state"][0]["step"] = torch.zeros(9)
        number.zero_()
        number.data = torch.ones(7)
    assert behind.wait(PATIENCE_S)
    assert behind.take_error() is None
    assert (tmp_path / "odd.pt").read_bytes() == plain
    assert serialized == [is_later]


@pytest.mark.parametrize(
    "value",
    [
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(2, requires_grad=True),
        OrderedDict(a=torch.ones(2)),
        {"of": (torch.ones(2),)},
        {"bits": torch.ones(2, dtype=torch.complex64).conj()},
        {"set": {1, 2}},
        {(1, 2): numpy.float64(3)},
    ],
    ids=["parameter", "grad", "ordered", "tuple", "conjugated", "set", "numpy"],
)
def test_what_can_not_be_kept_is_serialized_at_once(value: Any, behind: AsyncCheckpointWriter, tmp_path: Path) -> None:
    with pytest.raises(Changeable):
        Frozen(value)
    torch.save(value, tmp_path / "odd.pt")
    plain = (tmp_path / "odd.pt").read_bytes()
    with behind.capturing():
        torch.save(value, tmp_path / "odd.pt")
    assert behind.wait(PATIENCE_S)
    assert (tmp_path / "odd.pt").read_bytes() == plain


def test_memory_of_two_types_is_refused_in_the_save(behind: AsyncCheckpointWriter, tmp_path: Path) -> None:
    one = torch.arange(4)
    with behind.capturing(), pytest.raises(RuntimeError, match="different types"):
        torch.save({"one": one, "other": one.view(torch.float64)}, tmp_path / "odd.pt")


def test_what_is_to_be_saved_without_data_is(behind: AsyncCheckpointWriter, tmp_path: Path) -> None:
    with torch.serialization.skip_data():
        torch.save({"one": torch.ones(4)}, tmp_path / "odd.pt")
        plain = (tmp_path / "odd.pt").stat().st_size
        with behind.capturing():
            torch.save({"one": torch.ones(4)}, tmp_path / "odd.pt")
    assert (tmp_path / "odd.pt").stat().st_size == plain
    assert torch.load(tmp_path / "odd.pt")["one"].tolist() != [1, 1, 1, 1]


def test_a_record_that_may_change_after_the_save_is_written_at_once(behind: AsyncCheckpointWriter, tmp_path: Path) -> None:
    kept, changed, later = torch.arange(8), ctypes.create_string_buffer(b"before"), torch.ones(4)
    with behind.capturing(), torch.serialization._open_zipfile_writer(str(tmp_path / "odd.pt")) as file:  # as in torch.save
        file.write_record("kept", kept.untyped_storage(), 64)
        file.write_record("text", "as it is", 8)
        file.write_record("address", ctypes.addressof(changed), 6)
        changed.value = b"AFTER!"
        file.write_record("later", later.untyped_storage(), 16)
        kept.zero_()
        later.zero_()
    assert behind.wait(PATIENCE_S)
    assert behind.take_error() is None
    read = torch._C.PyTorchFileReader(str(tmp_path / "odd.pt"))
    assert read.get_record("address") == b"before"
    assert read.get_record("text") == b"as it is"
    assert torch.frombuffer(bytearray(read.get_record("kept")), dtype=torch.int64).tolist() == list(range(8))
    assert torch.frombuffer(bytearray(read.get_record("later")), dtype=torch.float32).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("limit_bytes", [0, 64, 5000])
def test_what_does_not_fit_is_written_at_once_and_said_once(
    limit_bytes: int, trainer: Trainer, caplog: pytest.LogCaptureFixture
) -> None:
    plain = contents(save(trainer, 9))
    behind = AsyncCheckpointWriter(limit_bytes)
    with caplog.at_level(logging.WARNING, "hf_spot"):
        for _ in range(2):
            with behind.capturing():
                folder = save(trainer, 9)
                assert (folder / "model.safetensors").read_bytes() == plain["model.safetensors"]
            assert behind.wait(PATIENCE_S)
            assert contents(folder) == plain
    assert len(caplog.records) == 1
    behind.close()


def test_a_save_never_mixes_two_steps(behind: AsyncCheckpointWriter, tmp_path: Path) -> None:
    weights = {f"layer {number}": torch.zeros(50_000) for number in range(20)}
    for step in range(3):
        for one in weights.values():
            one.fill_(step)
        with behind.capturing():
            safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
            torch.save(weights, tmp_path / "optimizer.pt")
        written, changes = threading.Event(), 0
        behind.then(written.set)
        while not written.is_set() or changes < 3:
            for one in weights.values():
                one.add_(1)
            changes += 1
        saved = [safetensors.torch.load_file(tmp_path / "model.safetensors"), torch.load(tmp_path / "optimizer.pt")]
        assert all(bool((value == step).all()) for one in saved for value in one.values())


def test_only_the_training_thread_is_captured(behind: AsyncCheckpointWriter, tmp_path: Path) -> None:
    def elsewhere() -> None:
        torch.save(ODD, tmp_path / "other.pt")
        safetensors.torch.save_file({"x": torch.ones(3)}, tmp_path / "other.safetensors")

    with behind.capturing():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert torch.load(tmp_path / "other.pt")["number"] == 3
        assert safetensors.torch.load_file(tmp_path / "other.safetensors")["x"].sum() == 3
    torch.save(ODD, tmp_path / "after.pt")
    assert (tmp_path / "after.pt").exists()


def test_what_can_not_be_written_is_told_and_nothing_follows_it(behind: AsyncCheckpointWriter, tmp_path: Path) -> None:
    followed = threading.Event()
    with behind.capturing():
        torch.save(ODD, tmp_path / "no folder" / "odd.pt")
    behind.then(followed.set)
    assert behind.wait(PATIENCE_S)
    assert "no folder" in str(behind.take_error())
    assert not followed.is_set()
    with behind.capturing():  # the next one is another matter
        torch.save(ODD, tmp_path / "odd.pt")
    behind.then(followed.set)
    assert behind.wait(PATIENCE_S)
    assert followed.is_set()
    assert behind.take_error() is None


def test_an_error_of_the_save_itself_is_raised_where_it_happens(behind: AsyncCheckpointWriter, tmp_path: Path) -> None:
    shared = torch.zeros(8)
    with pytest.raises(RuntimeError, match="share memory"), behind.capturing():
        safetensors.torch.save_file({"one": shared, "other": shared}, tmp_path / "model.safetensors")
    with pytest.raises(AttributeError, match="local object"), behind.capturing():
        torch.save(lambda: None, tmp_path / "odd.pt")
    assert behind.wait(PATIENCE_S)
    assert list(tmp_path.iterdir()) == []


def test_the_memory_of_one_save_is_that_of_the_next(behind: AsyncCheckpointWriter, tmp_path: Path) -> None:
    weights = {"w": torch.ones(1 << 20)}
    places = set()
    for _ in range(3):
        with behind.capturing():
            torch.save(weights, tmp_path / "w.pt")
            assert behind._arena is not None
            places.add((behind._arena._used, id(behind._arena._memory)))
        assert behind.wait(PATIENCE_S)
    assert len(places) == 1


def test_a_container_that_has_less_memory_than_its_machine_counts() -> None:
    assert 0 < free_bytes() < 1 << 50


# -- in a training ----------------------------------------------------------------------------------------------------


class Slow:
    """Takes the place of safetensors: what is behind a training's back waits until it may be written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_write = threading.Event()
        self.threads: list[str] = []
        plain = safetensors.torch.serialize_file

        def serialize(*args: Any, **kwargs: Any) -> None:
            self.threads.append(threading.current_thread().name)
            assert threading.current_thread() is threading.main_thread() or self.may_write.wait(PATIENCE_S)
            plain(*args, **kwargs)

        monkeypatch.setattr("hf_spot.training.saving.async_writer._plain_serialize", serialize)

    @property
    def behind(self) -> int:
        return sum("writer" in name for name in self.threads)


def test_training_goes_on_while_a_checkpoint_is_written_and_commits_what_it_was(
    store: str, tmp_path: Path, peace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, during = Slow(monkeypatch), []

    def act() -> None:  # before step 6, behind the save of step 3, and before the next
        during.extend([(tmp_path / "out/checkpoint-3/model.safetensors").exists(), kinds(store)])
        slow.may_write.set()

    callback = SpotCallback(store, SpotArguments(notice="none", keep_checkpoints=0))
    trainer = make_trainer(tmp_path / "out", callback, Recorder(6, act), Patient(callback, after_step=6))
    trainer.train()
    assert during == [False, ["claim", "training"]]
    assert slow.behind == 3  # the last of the four ends the training
    assert steps(store) == [3, 6, 9, 12]
    assert same(weights(trainer), peace[0])
    assert all(problems == [] for problems in Run(store).verify().values())
    elsewhere = make_trainer(tmp_path / "plain", save_total_limit=4)
    elsewhere.train()
    for step in (3, 6, 9, 12):
        model, optimizer = (tmp_path / "plain" / f"checkpoint-{step}" / name for name in ("model.safetensors", "optimizer.pt"))
        pulled = Run(store).pull(tmp_path / "pulled", step)
        assert (pulled / "model.safetensors").read_bytes() == model.read_bytes()
        assert (pulled / "optimizer.pt").read_bytes() == optimizer.read_bytes()


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("answer", ["stop", "go-on"])
def test_a_disk_that_is_full_behind_a_training_is_met_again_by_the_next_save(
    answer: str, store: str, tmp_path: Path, peace: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with SmallDisk(tmp_path / "disk", size_kb=16 << 10) as disk:
        out = disk.path / "out"
        callback = SpotCallback(store, SpotArguments(notice="none", on_save_error=answer))
        trainer = make_trainer(out, callback, Patient(callback), Recorder(5, lambda: disk.fill(64)), Recorder(10, disk.empty))
        if answer == "stop":
            with pytest.raises(SpotError, match=r"checkpoint-9 can't be saved.*No space left"):
                trainer.train()
        else:
            trainer.train()
            assert same(weights(trainer), peace[0])
        assert not (out / "checkpoint-6").exists()
    assert "checkpoint-6 can't be saved" in caplog.text
    assert steps(store) == ([3] if answer == "stop" else [3, STEPS])
    assert all(problems == [] for problems in Run(store).verify().values())


def test_a_crash_behind_a_save_commits_it_first(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)

    def crash() -> None:
        wait_for(lambda: slow.behind == 1, "for the writer")
        threading.Timer(0.1, slow.may_write.set).start()
        raise ValueError("a bug in the script")

    with pytest.raises(ValueError, match="a bug in the script"):
        make_trainer(tmp_path, SpotCallback(store, QUIET), Recorder(5, crash)).train()
    assert kinds(store) == ["claim", "training", "commit", "failed"]
    assert steps(store) == [3]
