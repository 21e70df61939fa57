"""What objects of a script can keep: each kind that changes is saved and comes back, or is named. Without a training."""

from __future__ import annotations

import array
import collections
import contextvars
import ctypes
import dataclasses
import enum
import functools
import io
import itertools
import multiprocessing
import pathlib
import queue
import random
import types
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from hf_spot.training.state import walk as walk_module
from hf_spot.training.state.carried import CarriedState
from hf_spot.training.state.data_side import DataSide, from_json, parts_of, to_json
from hf_spot.training.state.walk import Walk
from hf_spot.training.trainer.random_states import _still_in


class Holder:
    x: Any


class Row(dict[str, Any]):
    __getattr__ = dict.__getitem__


class Lines(list[Any]):
    pass


class Tensor(torch.Tensor):
    pass


class Flags(enum.Flag):
    A = 1
    B = 2


@dataclasses.dataclass
class Record:
    n: int = 0
    seen: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Frozen:
    n: int = 0


class Nothing:
    """The files of a checkpoint."""

    def holds(self, name: str, tensor: torch.Tensor) -> bool:
        return False


def put(key: Any, value: Any) -> Callable[[Any], Any]:
    return lambda h: h.x.__setitem__(key, value)


def give(name: str, value: Any) -> Callable[[Any], Any]:
    return lambda h: setattr(h.x, name, value)


def other(make: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda h: setattr(h, "x", make())


MODEL = torch.nn.Linear(2, 2)
KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "array": (lambda: array.array("d", [0.0]), put(0, 5.0)),
    "ctypes": (lambda: ctypes.c_int(0), give("value", 4)),
    "ctypes array": (lambda: (ctypes.c_int * 3)(), put(0, 4)),
    "shared number": (lambda: multiprocessing.Value("i", 0), give("value", 3)),
    "shared array": (lambda: multiprocessing.Array("d", [0, 0]), put(0, 3)),
    "namespace": (lambda: types.SimpleNamespace(n=0), give("n", 3)),
    "UserDict": (lambda: collections.UserDict(a=1), put("a", 2)),
    "ChainMap": (lambda: collections.ChainMap({}, {"a": 1}), put("a", 2)),
    "text in memory": (io.StringIO, lambda h: h.x.write("abc")),
    "bytes in memory": (io.BytesIO, lambda h: h.x.write(b"abc")),
    "queue": (queue.Queue, lambda h: h.x.put(3)),
    "priority queue": (queue.PriorityQueue, lambda h: h.x.put(3)),
    "context variable": (lambda: contextvars.ContextVar("of a test"), lambda h: h.x.set(3)),
    "bit generator": (lambda: numpy.random.PCG64(1), lambda h: h.x.random_raw()),
    "structured array": (lambda: numpy.zeros(2, dtype=[("a", "i4"), ("b", "f8", (2,))]), put(0, (3, [4.0, 5.0]))),
    "records": (lambda: numpy.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]), give("a", [5])),
    "tensor of a class": (lambda: torch.ones(3).as_subclass(Tensor), lambda h: h.x.add_(1)),
    "range": (lambda: range(3), other(lambda: range(1, 9, 2))),
    "slice": (lambda: slice(0, 3), other(lambda: slice(0, 5))),
    "path": (lambda: pathlib.Path("/a"), other(lambda: pathlib.Path("/b"))),
    "UUID": (lambda: uuid.UUID(int=1), other(lambda: uuid.UUID(int=2))),
    "several flags": (lambda: Flags.A, other(lambda: Flags.A | Flags.B)),
    "class of lists": (lambda: Lines([1]), lambda h: h.x.append(2)),
    "class of dictionaries": (lambda: Row(a=1), put("a", 2)),
    "many numbers by name": (lambda: {str(at): 0.0 for at in range(5000)}, put("7", 3.0)),
    "nested factories": (
        lambda: collections.defaultdict(lambda: collections.defaultdict(float)),
        lambda h: h.x["a"].__setitem__("b", 3.0),
    ),
    "frozen object, replaced": (Frozen, other(lambda: Frozen(3))),
    "object that comes later": (lambda: None, other(lambda: Record(7, [1]))),
    "objects in a list that grows": (list, lambda h: h.x.extend([Record(3), Record(4)])),
    "objects in a dictionary that grows": (dict, put("a", Record(3))),
    "deep inside": (lambda: {"a": {"b": {"c": {"d": {"e": {"f": {"g": [Record()]}}}}}}}, lambda h: deepest(h.x).__init__(5)),
    "weakly held": (lambda: weakref.WeakKeyDictionary({MODEL: 0}), put(MODEL, 3)),
    "another class": (lambda: Record, other(lambda: Frozen)),
    "attribute of a module": (lambda: torch.nn.Linear(2, 2), give("scale", 3.0)),
}
NAMED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), other(lambda: (2 * torch.eye(3)).to_sparse())),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
        other(lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8)),
    ),
    "of several lengths": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        other(lambda: torch.nested.nested_tensor([torch.ones(2)])),
    ),
    "masked array": (lambda: numpy.ma.masked_array([1.0, 2.0], mask=[0, 1]), put(0, 9.0)),
    "array of objects": (lambda: numpy.array([1, "a", None], dtype=object), put(0, 9)),
    "simple queue": (queue.SimpleQueue, lambda h: h.x.put(3)),
    "seeds": (lambda: numpy.random.SeedSequence(1), lambda h: h.x.spawn(1)),
    "function of the same name": (lambda: lambda: 1, other(lambda: lambda: 2)),
    "partial": (lambda: functools.partial(max, [1]), other(lambda: functools.partial(max, [2]))),
    "what a cache has drawn": (lambda: functools.lru_cache(lambda at: random.random()), lambda h: h.x(3)),
    "iterator": (itertools.count, lambda h: next(h.x)),
    "many lists": (lambda: [[0.0] for _ in range(2000)], lambda h: [one.append(1.0) for one in h.x]),
}


def deepest(value: Any) -> Any:
    while not isinstance(value, Record):
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    return value


def carried(make: Callable[[], Any]) -> tuple[Holder, CarriedState]:
    holder = Holder()
    holder.x = make()
    state = CarriedState(lambda walk: walk.value("h", holder), Walk, list, 0)
    state.look()
    return holder, state


def save(state: CarriedState, folder: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    return state.save(folder, Nothing(), lambda path, text: path.write_text(text) and None)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_and_comes_back(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    make, change = KINDS[kind]
    holder, state = carried(make)
    assert save(state, tmp_path / "checkpoint-1") == []
    change(holder)
    assert save(state, tmp_path / "checkpoint-2")
    _, resumed = carried(make)
    resumed.keep()
    resumed.restore(tmp_path / "checkpoint-2")
    assert "not restored" not in caplog.text and "can't be saved" not in caplog.text
    assert resumed.marks() == state.marks() != {}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", NAMED)
def test_what_can_not_be_saved_is_named(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    make, change = NAMED[kind]
    holder, state = carried(make)
    save(state, tmp_path / "checkpoint-1")
    assert "can't be saved" not in caplog.text
    change(holder)
    assert save(state, tmp_path / "checkpoint-2") == []
    assert "h.x" in caplog.text and "changes in this training and can't be saved" in caplog.text


def test_a_model_that_is_copied_later_is_copied_at_the_resume(tmp_path: Path) -> None:
    def training() -> tuple[Holder, torch.nn.Module, CarriedState]:
        holder, model = Holder(), torch.nn.Sequential(torch.nn.Linear(2, 2))
        holder.x = None

        def find(walk: Walk) -> Any:
            yield from walk.module("model", model)
            yield from walk.value("h", holder)

        state = CarriedState(find, Walk, list, 0)
        state.look()
        return holder, model, state

    holder, _, state = training()
    holder.x = torch.nn.Sequential(torch.nn.Linear(2, 2)).requires_grad_(False)
    save(state, tmp_path / "checkpoint-1")
    again, model, resumed = training()
    resumed.restore(tmp_path / "checkpoint-1")
    assert torch.equal(again.x[0].weight, holder.x[0].weight) and not again.x[0].weight.requires_grad
    assert again.x is not model and model[0].weight.requires_grad  # type: ignore[index, union-attr]


# -- what each launch has of its own ----------------------------------------------------------------------------------


def test_a_script_says_what_belongs_to_one_launch(tmp_path: Path) -> None:
    code = """
per_launch = ("began",)
began, counted = 0, 0
def make():
    seen, kept = [], []
    def count():
        global began, counted
        began, counted = began + 1, counted + 1
        seen.append(1)
        kept.append(1)
    count.per_launch = ("seen",)
    return count
"""
    module: dict[str, Any] = {"__name__": "__main__"}
    exec(code, module)
    holder, state = carried(module["make"])
    holder.x()
    assert save(state, tmp_path / "checkpoint-1") == ["h.x.kept", "__main__.counted"]


# -- data that are made while it changes ------------------------------------------------------------------------------

CALLS = 0


class Counts:
    calls, seen = 0, collections.Counter()  # type: ignore[var-annotated]
    dice: Any = None

    def __call__(self, rows: Any) -> Any:
        global CALLS
        CALLS += 1
        Counts.calls += 1
        Counts.seen["rows"] += 1
        self.dice = self.dice or numpy.random.default_rng(3)
        self.count = getattr(self, "count", array.array("l", [0]))
        self.count[0] += 1
        return CALLS, Counts.calls, Counts.seen["rows"], self.count[0], float(self.dice.random())


@pytest.mark.parametrize("handed", ["itself", "to set_transform", "to map"])
def test_what_a_part_of_the_data_keeps_outside_of_itself_is_captured(handed: str) -> None:
    part: Any = Counts()
    if handed != "itself":
        datasets = pytest.importorskip("datasets")
        whole = datasets.Dataset.from_dict({"a": [1, 2]})
        if handed == "to map":
            whole = whole.to_iterable_dataset().map(part)
        else:
            whole.set_transform(part)
    side = DataSide(parts_of(part if handed == "itself" else whole))
    part([])
    before = from_json(to_json(side.capture()))
    wanted = [part([]), part([])]
    side.restore(before)
    assert [part([]), part([])] == wanted


def test_what_grows_too_large_in_a_pass_is_not_reset_to_its_start() -> None:
    class Cache:
        def __init__(self) -> None:
            self.of: dict[int, Any] = {}

    part = Cache()
    side = DataSide(parts_of(part))
    began = side.capture()
    part.of[1] = torch.ones(2)
    assert _still_in(side.capture(), began) == {}


def test_more_objects_than_a_save_can_look_through_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk_module, "MOST_OBJECTS", 20)
    first, second = Holder(), Holder()
    first.x, second.x = [Holder() for _ in range(30)], 0
    for one in first.x:
        one.x = 0

    def find(walk: Walk) -> Any:
        yield from walk.value("first", first)
        yield from walk.value("second", second)

    state = CarriedState(find, Walk, list, 0)
    state.look()
    first.x[0].x = -1
    for _ in range(2):
        save(state, tmp_path)
    assert caplog.text.count("first.x[18] and what comes after it are not looked into") == 1
    assert state.marks().keys() == {"first.x[0].x"}
