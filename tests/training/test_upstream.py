"""Names of other libraries: each is there, each is still called by its library, and each that goes away is told or refused."""

from __future__ import annotations

import ast
import functools
import importlib
import io
import json
import logging
import os
import re
import signal
import sys
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import accelerate.commands.launch
import numpy
import peft
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint
import tqdm
import transformers.modeling_utils
from accelerate import Accelerator, DataLoaderConfiguration, FullyShardedDataParallelPlugin
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils.fsdp_utils import load_fsdp_model, save_fsdp_model
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
from torch.utils.data import BatchSampler, DataLoader
from transformers import (
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_spot import Run, SpotArguments, SpotCallback
from hf_spot.errors import ConfigError
from hf_spot.policy.hangs import Phase
from hf_spot.runtime import PhaseTeller, Runtime
from hf_spot.storage import s3_parts
from hf_spot.storage.open import open_store
from hf_spot.training import upstream
from hf_spot.training.saving import hidden_writes
from hf_spot.training.session.phases import Phases
from hf_spot.training.upstream import TABLE, check, versions
from hf_spot.training.upstream.name import Name, Scope, accepts
from tests.matrix.cases import sft
from tests.training.conftest import make_trainer
from tests.training.test_callback import QUIET, train_until_preempted

ROOT = Path(__file__).resolve().parent.parent.parent
# What a training imports only when it needs it.
FOR_SOME = (
    "accelerate.data_loader",
    "accelerate.utils.launch",
    "botocore.client",
    "botocore.credentials",
    "botocore.endpoint",
    "botocore.response",
    "datasets.iterable_dataset",
    "google.cloud.storage.client",
    "hf_xet",
    "peft.peft_model",
    "torch._dynamo.eval_frame",
    "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.run",
    "trl.trainer.sft_trainer",
    "urllib3.response",
)
LIBRARIES = {"accelerate", "botocore", "datasets", "numpy", "safetensors", "torch", "transformers", "trl", "tqdm", "urllib3"}


def name_of(one: Name) -> str:
    return f"{one.owner}.{one.name}" + ("(no_dist)" if "no_dist" in one.takes and "state_dict" not in one.takes else "")


@pytest.fixture(scope="module", autouse=True)
def all_imported() -> None:
    for module in FOR_SOME:
        importlib.import_module(module)


def skip_if_of_other_versions(one: Name) -> None:
    if one.only.startswith("transformers from") and not upstream.ONLY[one.only](None):
        pytest.skip(f"{one.only} only")
    if one.library == "aim":
        pytest.importorskip("aim", reason="needs aim: pip install aim")
    if one.library == "deepspeed":
        pytest.importorskip("deepspeed.runtime.engine", reason="needs deepspeed: see CONTRIBUTING.md")


@pytest.fixture
def needed_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each training needs each name, but for those of other versions."""
    versions_only = {only: needs for only, needs in upstream.ONLY.items() if only.startswith("transformers from")}
    monkeypatch.setattr(upstream, "ONLY", dict.fromkeys(upstream.ONLY, lambda trainer: True) | versions_only)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, logger="hf_spot")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "hf_spot"]


# -- the check ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("needed_by_all")
@pytest.mark.parametrize("scope", Scope)
def test_nothing_is_said_of_the_libraries_that_the_suite_runs_with(scope: Scope, told: Callable[[], list[str]]) -> None:
    check(scope, object())
    assert told() == []


def _away(one: Name, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the library one that has another name for it."""
    module, _, kind = one.owner.partition(":")
    home = sys.modules[module]
    if one.kind == "attribute":
        renamed = types.new_class(kind, (), {}, lambda members: members.update(_renamed(getattr(home, kind), one.name)))
        monkeypatch.setattr(home, kind, renamed)
    elif not kind:
        monkeypatch.delattr(home, one.name)
    elif one.name.startswith("__"):  # each class has such a one
        monkeypatch.delattr(home, kind)
    elif isinstance(getattr(getattr(home, kind), one.name), types.FunctionType):
        for base in getattr(home, kind).__mro__:
            if one.name in vars(base):
                monkeypatch.delattr(base, one.name)
    else:  # compiled
        monkeypatch.setattr(home, kind, type(kind, (), {}))


def _renamed(kind: type, name: str) -> dict[str, Any]:
    """The methods of a class, with another name for one of its attributes."""
    methods: dict[str, Any] = {}
    for one in reversed(kind.__mro__):
        for key, value in vars(one).items():
            function = value
            while hasattr(function, "__wrapped__"):
                function = function.__wrapped__
            if isinstance(function, types.FunctionType) and key != name:
                code = function.__code__
                names = tuple(f"{other}_2" if other == name else other for other in code.co_names)
                methods[key] = types.FunctionType(
                    code.replace(co_names=names), function.__globals__, key, function.__defaults__, function.__closure__
                )
    return methods


def _of_library(one: Name, function: types.FunctionType) -> types.FunctionType:
    """The function, as if its code stood in the library."""
    made = types.FunctionType(function.__code__, {"__name__": one.owner.partition(":")[0]})
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _assert_told(one: Name, what: str, told: Callable[[], list[str]]) -> None:
    scope = next(scope for scope in Scope if one.scope & scope)
    if one.refused:
        with pytest.raises(ConfigError, match=re.escape(one.without)) as refused:
            check(scope, object())
        said, hint = refused.value.args[0], refused.value.hint
    else:
        check(scope, object())
        (line,) = told()
        said, _, hint = line.rpartition("To fix this: ")
        assert one.without in line
    assert what in said
    assert versions.version_of(one.library) in said
    assert hint.startswith("pip install ")


@pytest.mark.usefixtures("needed_by_all")
@pytest.mark.parametrize("one", TABLE, ids=name_of)
def test_a_name_that_is_gone_is_named_with_what_is_lost(
    one: Name, told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_if_of_other_versions(one)
    _away(one, monkeypatch)
    _assert_told(one, f"has no {one.shown}" if not one.name.startswith("__") else "has no ", told)


@pytest.mark.usefixtures("needed_by_all")
@pytest.mark.parametrize("one", [one for one in TABLE if one.takes not in ("", "…")], ids=name_of)
def test_a_name_with_other_parameters_is_named_with_what_is_lost(
    one: Name, told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, kind = one.owner.partition(":")
    home = getattr(sys.modules[module], kind) if kind else sys.modules[module]
    monkeypatch.setattr(home, one.name, _of_library(one, lambda self, something_else: None))
    _assert_told(one, f"has changed the parameters of {one.shown}", told)


@pytest.mark.parametrize(
    ("takes", "function", "accepted"),
    [
        ("a, b", lambda a, b: 0, True),
        ("a, b", lambda a, b=1, c=2: 0, True),
        ("a, b", lambda a, b, c: 0, False),
        ("a, b, …", lambda a, b, c: 0, True),
        ("a, b", lambda b, a: 0, False),
        ("a, b", lambda a: 0, False),
        ("a, b", lambda a, *rest: 0, True),
        ("a, b", lambda *args, **kwargs: 0, True),
        ("a, *, b", lambda a, x=1, *, b: 0, True),
        ("a, *, b", lambda a, b=1: 0, True),
        ("a, *, b", lambda a, **kwargs: 0, True),
        ("a, *, b", lambda a, c=1: 0, False),
        ("*, b, …", lambda x, b: 0, True),
        ("", lambda: 0, True),
        ("", lambda a=1: 0, True),
        ("", lambda a: 0, False),
        ("", lambda *, a: 0, False),
        ("a", functools.wraps(lambda a: 0)(lambda *args: 0), True),
        ("a", functools.wraps(lambda b: 0)(lambda *args: 0), False),
    ],
)
def test_what_counts_as_other_parameters(takes: str, function: Any, accepted: bool) -> None:
    assert accepts(function, takes, bound=False) == accepted


def test_what_somebody_else_has_put_there_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(self: Trainer, *, nothing_of_that: int) -> None:
        """As packages do that make trainers faster."""

    monkeypatch.setattr(Trainer, "_evaluate", other)
    assert upstream.EVALUATE.trouble() is None
    assert upstream.EVALUATE.find() is other
    monkeypatch.setattr(Trainer, "_evaluate", _of_library(upstream.EVALUATE, other))
    assert upstream.EVALUATE.trouble() == "has changed the parameters of Trainer._evaluate"
    assert upstream.EVALUATE.find() is None


def test_a_name_that_this_training_does_not_need_may_be_missing(
    tmp_path: Path, told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Trainer, "_init_training_state")  # for data without a length
    changed = _of_library(upstream.STORAGE_CPU, lambda self, x: None)
    monkeypatch.setattr(torch.UntypedStorage, "cpu", changed)  # for GPUs
    check(Scope.TRAINER, make_trainer(tmp_path))
    check(Scope.LOOP)
    assert told() == []


def test_the_check_takes_no_time(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    taken_s = []
    for _ in range(5):
        began_s = time.process_time()
        check(Scope.TRAINER, trainer)
        taken_s.append(time.process_time() - began_s)
    assert min(taken_s) < 0.01


def test_what_is_replaced_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Base:
        def method(self) -> str:
            return "plain"

    class Kind(Base):
        pass

    monkeypatch.setattr(versions, "Kind", Kind, raising=False)
    one, held = Name("hf_spot.training.upstream.versions:Kind", "method", "method", "", (), ""), Kind()
    with one.replaced(held, lambda plain: lambda: f"not {plain()}"):
        assert held.method() == "not plain"
        assert one.plain(held)() == "plain"
    assert "method" not in vars(held)
    with one.replaced(Kind, lambda plain: lambda self: f"not {plain(self)}"):
        assert held.method() == "not plain"
    assert held.method() == "plain"
    one.set(held, lambda: "set")
    one.restore(held)
    one.restore(held)
    assert held.method() == "plain"


# -- the table and our own code ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", TABLE, ids=name_of)
def test_a_name_is_used_by_those_that_the_table_names(one: Name) -> None:
    constant = next(key for key, value in vars(upstream).items() if value is one)
    for user in one.users:
        source = ROOT / "hf_spot" / f"{user.replace('.', '/')}.py"
        words = {node.id for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Name)}
        mentioned = constant in words or re.search(rf"\b{one.name}\b", source.read_text())
        assert mentioned or one.name == "__iter__", user
    if not one.users[0].startswith(("storage.", "run.")):
        users = {
            str(path.relative_to(ROOT / "hf_spot")).removesuffix(".py").replace("/", ".")
            for path in (ROOT / "hf_spot").rglob("*.py")
            if path.parent.name != "upstream" and re.search(rf"\b{constant}\b", path.read_text())
        }
        assert users <= {*one.users}


def test_the_tested_versions_are_those_that_the_suite_installs() -> None:
    pinned: dict[str, list[str]] = {name: [] for name in versions.TESTED}
    for file in ("lowest.txt", "constraints.txt"):
        for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "tests" / file).read_text(), re.MULTILINE):
            if name in pinned and version not in pinned[name]:
                pinned[name].append(version)
    assert {name: tuple(found) for name, found in pinned.items()} == versions.TESTED


# -- versions ---------------------------------------------------------------------------------------------------------------


def test_a_version_that_was_never_tested_is_named_once(told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_told", set())
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.99.1")
    monkeypatch.setattr(accelerate, "__version__", "1.16.0")
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("RANK", "1")
        check(Scope.LOOP)
    assert told() == []
    monkeypatch.setattr(versions, "_told", set())
    check(Scope.LOOP)
    check(Scope.LOOP)
    assert told() == [
        "hf_spot's tests have not run with accelerate 1.16.0 (only with 1.10.1 and 1.15.0), "
        "transformers 5.99.1 (only with 5.6.0 and 5.23.0)"
    ]


def test_other_versions_than_those_of_the_checkpoint_are_named_in_one_line() -> None:
    before = versions.versions()
    assert before.keys() >= {"hf_spot", "transformers", "torch", "accelerate"}
    assert versions.version_changes({"versions": before}) == versions.version_changes({}) == []
    told = versions.version_changes({"versions": {**before, "torch": "2.12.0", "peft": "0.1", "gone": "1"}})
    now = versions.versions()
    changed = [f"torch 2.12.0 → {now['torch']}"] + ([f"peft 0.1 → {now['peft']}"] if "peft" in now else [])
    assert told == [f"versions have changed: {', '.join(changed)}; results may differ in the last bits"]


# -- the libraries still call what is replaced, and set what is read ----------------------------------------------------------


def _library_of(frame: types.FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


class _Read:
    """Takes the place of an attribute of a class's objects, and counts when its library reads or sets it."""

    def __init__(self, one: Name, counted: Counter[Name], default: Any) -> None:
        self._one, self._counted, self._default = one, counted, default

    def __get__(self, held: Any, kind: type | None = None) -> Any:
        if held is None:
            return self._default
        self._count(sys._getframe(1))
        try:
            return vars(held)[self._one.name]
        except KeyError:
            raise AttributeError(self._one.name) from None

    def __set__(self, held: Any, value: Any) -> None:
        self._count(sys._getframe(1))
        vars(held)[self._one.name] = value

    def __delete__(self, held: Any) -> None:
        del vars(held)[self._one.name]

    def _count(self, user: types.FrameType) -> None:
        if _library_of(user) in LIBRARIES:
            self._counted[self._one] += 1


class _ReadTable(dict[Any, Any]):
    """Takes the place of a table, and counts when somebody looks into it."""

    def __init__(self, one: Name, counted: Counter[Name], plain: dict[Any, Any]) -> None:
        super().__init__(plain)
        self._one, self._counted = one, counted

    def __getitem__(self, key: Any) -> Any:
        self._counted[self._one] += 1
        return super().__getitem__(key)


def _counting(one: Name, counted: Counter[Name], answer: Callable[[Any], Any] | None = None) -> Callable[[Any], Any]:
    def make(plain: Any) -> Any:
        @functools.wraps(plain, updated=())
        def count(*args: Any, **kwargs: Any) -> Any:
            if _library_of(sys._getframe(1)) in LIBRARIES:
                counted[one] += 1
            return plain(*args, **kwargs) if answer is None else answer(*args, **kwargs)

        return count

    return make


def _watch(one: Name, counted: Counter[Name], undo: ExitStack) -> None:
    module, _, kind = one.owner.partition(":")
    home: Any = one.home() if not (kind and one.kind == "attribute") else getattr(sys.modules[module], kind)
    if one.kind == "attribute":
        undo.enter_context(replaced(home, one.name, _Read(one, counted, vars(home).get(one.name))))
    elif one is upstream.TYPES:
        undo.enter_context(one.replaced(home, lambda plain: _ReadTable(one, counted, plain)))
    elif one is upstream.PUSH_FROM_CHECKPOINT:
        undo.enter_context(one.replaced(home, _counting(one, counted, lambda *args: None)))  # no Hub is here
    elif one is upstream.STORAGE_CPU:
        undo.enter_context(one.replaced(home, _counting(one, counted, lambda held: torch.UntypedStorage(held.nbytes()))))
    elif kind:
        undo.enter_context(one.replaced(home, _counting(one, counted)))
    else:  # other modules of the library may have it by name
        make = _counting(one, counted)
        plain = getattr(home, one.name)
        for other in list(sys.modules.values()):
            if getattr(other, "__name__", "").partition(".")[0] == one.library and vars(other).get(one.name) is plain:
                undo.enter_context(one.replaced(other, make))


@contextmanager
def replaced(home: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(home).get(name, replaced)
    setattr(home, name, value)
    try:
        yield
    finally:
        if before is replaced:
            delattr(home, name)
        else:
            setattr(home, name, before)


# Those that can't be counted this way; each has a test below, or is what a store's own tests go through.
OTHERWISE = {
    upstream.TRAIN: "a script calls it",
    upstream.FOREACH_COPY: "test_what_is_copied_together_is_copied",
    upstream.EXPORTABLE: "test_early_stopping_is_saved_by_its_state",
    upstream.TRAIN_TOKENS: "test_trl_counts_tokens",
    upstream.OWN_METRICS: "test_trl_logs_means_of_its_metrics",
    upstream.SAFE_OPEN: "test_transformers_reads_weights_by_its_name",
    upstream.PEFT_CONFIG: "test_a_model_with_adapters_says_so",
    upstream.TENSORBOARD_DIR: "tests/training/trainer/test_log_window.py",
    upstream.TENSORBOARD_WRITER: "tests/training/trainer/test_log_window.py",
    upstream.SUMMARY_WRITER: "tests/training/trainer/test_log_window.py",
    upstream.WANDB_SET_UP: "tests/training/trainer/test_trackers.py",
    upstream.MLFLOW_SET_UP: "tests/training/trainer/test_trackers.py",
    upstream.TRACKIO_SET_UP: "tests/training/trainer/test_trackers.py",
    upstream.SWANLAB_SET_UP: "test_trackers_remember_that_they_are_set_up",
    upstream.COMET_SET_UP: "test_trackers_remember_that_they_are_set_up",
    upstream.CLEARML_SET_UP: "test_trackers_remember_that_they_are_set_up",
    upstream.DVCLIVE_SET_UP: "test_trackers_remember_that_they_are_set_up",
    upstream.AIM_HASH: "tests/training/trainer/test_trackers.py",
    upstream.AIM_RUN: "tests/training/trainer/test_trackers.py",
    upstream.WRITE_RECORD: "test_torch_writes_records",
    upstream.SERIALIZATION_SETTINGS: "tests/training/saving/test_async_writer.py",
    upstream.FAILURES: "test_torch_tells_what_a_rank_could_not_write",
    upstream.START_WORKERS: "test_torch_starts_workers_as_it_did",
    upstream.WORKER_LOOP: "test_torch_starts_workers_as_it_did",
    upstream.SHARD: "test_accelerate_makes_its_loaders",
    upstream.DISPATCHER: "test_accelerate_makes_its_loaders",
    upstream.COMPILATIONS: "test_a_compilation_tells_its_beginning_and_its_end",
    upstream.ORIGINAL_MODULE: "test_a_compiled_model_holds_the_plain_one",
    upstream.AGENT_HANDLER: "test_the_agent_of_torch_handles_signals",
    upstream.NUMPY_RANDOM: "test_numpy_draws_from_the_generator_that_is_looked_at",
    upstream.NUMPY_BITS: "test_numpy_draws_from_the_generator_that_is_looked_at",
    upstream.S3_BODY: "test_downloads_from_s3_read_from_the_connection",
    upstream.S3_ANSWER: "test_downloads_from_s3_read_from_the_connection",
    upstream.S3_PROMPTER: "tests/run/test_credential_sources.py",
    upstream.S3_ENDPOINT: "test_downloads_from_s3_read_from_the_connection",
    upstream.S3_SESSION: "test_downloads_from_s3_read_from_the_connection",
    upstream.XET_SESSION: "tests/storage/test_contract.py",
    upstream.XET_UPLOAD: "tests/storage/test_contract.py",
    upstream.XET_DOWNLOAD: "tests/storage/test_contract.py",
    upstream.GCS_HTTP: "tests/storage/test_contract.py",
    upstream.BARS: "test_bars_know_each_other",
    upstream.SAVE_ALONE: "what SAVE_TOGETHER is given",
    upstream.RUN_RANKS: "tests/launch/test_warm.py",
    upstream.START_CHILD: "tests/launch/test_warm.py",
    upstream.CHECKPOINT_ENGINE: "python -m tests.engines",
    upstream.ITERATE_BUFFER: "tests/training/data/test_stream_position.py",
    upstream.ARROW_OF_BUFFER: "tests/training/data/test_stream_position.py",
    upstream.BEGIN_STATE_OF_BUFFER: "tests/training/data/test_stream_position.py",
    upstream.LOAD_STATE_OF_BUFFER: "tests/training/data/test_stream_position.py",
    upstream.STATE_OF_STREAM: "tests/training/data/test_stream_position.py",
    upstream.LOAD_STATE_OF_STREAM: "tests/training/data/test_stream_position.py",
    upstream.START_OF_STREAM: "tests/training/data/test_stream_position.py",
    upstream.PREPARE_STREAM: "tests/training/data/test_stream_position.py",
    upstream.STREAM_SHARD: "tests/training/trainer/test_stream_ranks.py",
    upstream.PIN_MEMORY: "test_torch_pins_what_says_how",
    **dict.fromkeys(hidden_writes._HIDDEN, "tests/training/saving/test_beside.py"),
    upstream.STORAGE_HANDLE: "tests/training/saving/test_beside.py",
    upstream.USE_COUNT: "tests/training/saving/test_beside.py",
}


@pytest.fixture(scope="module")
def called(all_imported: None, tmp_path_factory: pytest.TempPathFactory) -> Counter[Name]:
    """How often the libraries use each name in a few small trainings, in which hf_spot has no part."""
    folder, counted = tmp_path_factory.mktemp("called"), Counter[Name]()
    with ExitStack() as undo:
        for one in TABLE:
            if one not in OTHERWISE:
                _watch(one, counted, undo)
        _train(folder)
        _iterate(folder)
        _save_parts(folder)
        _launch(folder, undo)
    return counted


def _train(folder: Path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    steps = {"eval_strategy": "steps", "eval_steps": 3, "gradient_accumulation_steps": 2, "max_steps": 6}
    trainer = make_trainer(folder / "one", EarlyStoppingCallback(99), **best, **steps)
    trainer.train()
    trainer.args.push_to_hub = True
    trainer._save_checkpoint(trainer.model, None)
    make_trainer(folder / "one", **steps).train(resume_from_checkpoint=str(folder / "one" / "checkpoint-3"))
    dispatched = {"accelerator_config": {"dispatch_batches": True}, "max_steps": 3, "save_steps": 2}
    make_trainer(folder / "two", **dispatched).train()
    make_trainer(folder / "two", **dispatched).train(resume_from_checkpoint=str(folder / "two" / "checkpoint-2"))


def _iterate(folder: Path) -> None:
    """What only loops use."""
    model = torch.nn.Linear(1, 1)
    accelerator = Accelerator(cpu=True)
    loader = DataLoader(torch.ones(4, 1), num_workers=1, persistent_workers=True, shuffle=True, multiprocessing_context="fork")
    accelerator.prepare(model, torch.optim.SGD(model.parameters()), loader)
    for _ in range(2):
        list(loader)
    accelerator.save_state(str(folder / "loop"))
    list(BatchSamplerShard(BatchSampler(range(4), 2, drop_last=False), num_processes=2))  # what several ranks use


def _save_parts(folder: Path) -> None:
    """What is saved and loaded by FSDP, and saved from a GPU, on one CPU."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that nobody else is there
        save_fsdp_model(plugin, Accelerator(cpu=True), torch.nn.Linear(1, 1), str(folder))
        load_fsdp_model(plugin, Accelerator(cpu=True), torch.nn.Linear(1, 1), str(folder))
    torch.save(torch.UntypedStorage(8, device="meta"), folder / "device.pt")
    safetensors.torch.load(safetensors.torch.save({"one": torch.ones(1)}))


def _launch(folder: Path, undo: ExitStack) -> None:
    (folder / "script.py").write_text("")
    command = ["accelerate-launch", "--cpu", "--num_processes", "1", str(folder / "script.py")]
    undo.enter_context(replaced(sys, "argv", command))
    accelerate.commands.launch.main()


@pytest.mark.parametrize("one", [one for one in TABLE if one not in OTHERWISE], ids=name_of)
def test_the_library_still_uses_a_name(one: Name, called: Counter[Name]) -> None:
    skip_if_of_other_versions(one)
    assert called[one] > 0


def test_what_is_proven_otherwise_is_proven() -> None:
    for test in OTHERWISE.values():
        assert test in globals() or (ROOT / test).is_file() or " " in test


def test_what_is_copied_together_is_copied() -> None:
    copies = [torch.zeros(2), torch.zeros(3)]
    upstream.FOREACH_COPY.find()(copies, [torch.ones(2), torch.ones(3)])
    assert [copy.sum().item() for copy in copies] == [2, 3]


def test_early_stopping_is_saved_by_its_state(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    stopping = EarlyStoppingCallback(99)
    assert isinstance(stopping, upstream.EXPORTABLE.find())
    trainer = make_trainer(tmp_path, stopping, max_steps=3, **settings)
    trainer.train()
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert saved["EarlyStoppingCallback"]["attributes"] == {"early_stopping_patience_counter": 0}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own settings are older than transformers
def test_trl_counts_tokens(tmp_path: Path) -> None:
    trainer = sft(tmp_path, max_steps=2)
    assert upstream.TRAIN_TOKENS.of(trainer) == 0
    trainer.train()
    assert upstream.TRAIN_TOKENS.of(trainer) == trainer.state.log_history[-2]["num_tokens"] > 0
    assert not upstream.TRAIN_TOKENS.is_on(make_trainer(tmp_path))  # as `resume_fixes.counters` has it


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trl_logs_means_of_its_metrics(tmp_path: Path) -> None:
    trainer = sft(tmp_path, max_steps=1)
    upstream.OWN_METRICS.of(trainer)["train"]["entropy"] = [0.0] * 10**6  # a mean over these and one more
    trainer.train()
    assert 0 < trainer.state.log_history[-2]["entropy"] < 1e-4
    assert not upstream.OWN_METRICS.is_on(make_trainer(tmp_path))


def test_transformers_reads_weights_by_its_name(tmp_path: Path) -> None:
    assert transformers.modeling_utils.safe_open is safetensors.torch.safe_open is upstream.SAFE_OPEN.find()


@pytest.mark.parametrize(
    "one", [getattr(upstream, f"{name}_SET_UP") for name in ("SWANLAB", "COMET", "CLEARML", "DVCLIVE")], ids=name_of
)
def test_trackers_remember_that_they_are_set_up(one: Name, tmp_path: Path) -> None:
    kind: Any = one.home()
    callback, calls = object.__new__(kind), []
    callback.setup = lambda *args, **kwargs: calls.append(args)
    callback._clearml = object()
    for has_begun in (False, True):
        one.set(callback, has_begun)
        callback.on_train_begin(TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl())
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks an older transformers
def test_a_model_with_adapters_says_so() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    plain = LlamaForCausalLM(LlamaConfig(**sizes))
    assert not upstream.PEFT_CONFIG.is_on(plain)
    assert upstream.PEFT_CONFIG.is_on(peft.get_peft_model(plain, peft.LoraConfig(r=1, target_modules=["q_proj"])))


def test_torch_writes_records(tmp_path: Path) -> None:
    records = []

    class Writer:
        def __enter__(self) -> Writer:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def write_record(self, name: str, data: Any, size: int) -> None:
            records.append((name, size))

    with upstream.OPEN_ZIPFILE.replaced(torch.serialization, lambda plain: lambda file: Writer()):
        torch.save({"one": torch.ones(2)}, str(tmp_path / "file"))
    assert ("data/0", 8) in records


def test_torch_tells_what_a_rank_could_not_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointException) as failed:
            torch.distributed.checkpoint.save({"one": torch.ones(1)}, checkpoint_id=str(tmp_path / "file" / "x"), no_dist=True)
    assert isinstance(upstream.FAILURES.of(failed.value)[0][0], OSError)


def test_torch_starts_workers_as_it_did(tmp_path: Path) -> None:
    started, marked = Counter[Name](), tmp_path / "marked"
    plain_loop = upstream.WORKER_LOOP.find()

    def loop(*args: Any) -> None:
        marked.write_text(f"{len(args)} {args[10]}")
        plain_loop(*args)

    with (
        upstream.START_WORKERS.replaced(upstream.START_WORKERS.home(), _counting(upstream.START_WORKERS, started)),
        upstream.WORKER_LOOP.replaced(upstream.WORKER_LOOP.home(), lambda plain: loop),
    ):
        assert len(list(DataLoader([1, 2], num_workers=1, multiprocessing_context="fork"))) == 2
    assert started[upstream.START_WORKERS] == 1
    assert marked.read_text() == "14 0"


def test_torch_pins_what_says_how() -> None:
    class Held:
        def pin_memory(self) -> str:
            return "pinned"

    assert upstream.PIN_MEMORY.find()([Held()], None) == ["pinned"]


def test_accelerate_makes_its_loaders() -> None:
    for dispatch in (False, True):
        config = DataLoaderConfiguration(dispatch_batches=dispatch)
        loader = Accelerator(cpu=True, dataloader_config=config).prepare(DataLoader([1, 2]))
        assert isinstance(loader, upstream.SHARD.find()) != dispatch
        assert isinstance(loader, upstream.DISPATCHER.find()) == dispatch


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of its own parts
def test_a_compiled_model_holds_the_plain_one() -> None:
    model = torch.nn.Linear(1, 1)
    compiled = torch.compile(model)
    assert upstream.ORIGINAL_MODULE.of(compiled) is model
    assert [*compiled.state_dict()] == ["_orig_mod.weight", "_orig_mod.bias"]


def test_a_compilation_tells_its_beginning_and_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_spot.training.session.phases.answer_with_stacks", lambda runtime: None)
    runtime = Runtime("run", 1, tmp_path, SpotArguments())
    phases, during = Phases(runtime), []

    def backend(graph: Any, inputs: Any) -> Any:
        during.append(PhaseTeller.read(runtime.phase_path))
        return graph.forward

    compiled = torch.compile(lambda value: value + 1, backend=backend)
    phases.tell(Phase.STEP, 3)
    phases.watch_compilations()
    compiled(torch.ones(1))
    assert [told and told[1] for told in during] == [Phase.COMPILING]
    assert runtime.read_phases()[os.getpid()][1:3] == (Phase.STEP, 3)
    phases.close()
    before = runtime.read_phases()
    torch.compile(lambda value: value + 2, backend=backend)(torch.ones(1))
    assert runtime.read_phases() == before


def test_the_agent_of_torch_handles_signals(tmp_path: Path) -> None:
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
    try:
        started = start_processes("true", "true", {0: ()}, {0: {}}, DefaultLogsSpecs(str(tmp_path)))
        handler = signal.getsignal(signal.SIGTERM)
        started.wait()
    finally:
        for one, was in before.items():
            signal.signal(one, was)
    assert handler is upstream.AGENT_HANDLER.find()


def test_numpy_draws_from_the_generator_that_is_looked_at() -> None:
    state = upstream.NUMPY_RANDOM.find()
    assert numpy.random.get_state.__self__ is state
    assert state.get_state()[1].tolist() == upstream.NUMPY_BITS.of(state).state["state"]["key"].tolist()


def test_downloads_from_s3_read_from_the_connection(s3_url: str, tmp_path: Path) -> None:
    counted = Counter[Name]()
    store, straight = open_store(s3_url), []

    class Answer(s3_parts._Answer):
        def __init__(self, body: Any) -> None:
            super().__init__(body)
            straight.append(self._plain is not None)

    (tmp_path / "file").write_bytes(b"x" * 1000)
    store.put_file("key", tmp_path / "file")
    with ExitStack() as undo:
        _watch(upstream.S3_ENDPOINT, counted, undo)
        _watch(upstream.S3_SESSION, counted, undo)
        undo.enter_context(replaced(s3_parts, "_Answer", Answer))
        store.get_file("key", tmp_path / "copy")
    assert straight == [True]
    assert counted[upstream.S3_ENDPOINT] > 0
    assert counted[upstream.S3_SESSION] > 0


def test_bars_know_each_other() -> None:
    with tqdm.tqdm(total=1, file=io.StringIO()) as bar:
        assert bar in upstream.BARS.of(tqdm.tqdm)


# -- in a training --------------------------------------------------------------------------------------------------------


def test_a_training_that_can_not_be_protected_is_refused_before_it_begins(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, SpotCallback(store, QUIET))
    monkeypatch.delattr(Trainer, "_run_epoch")
    with pytest.raises(ConfigError, match=r"has no Trainer\._run_epoch"):
        trainer.train()
    assert ConfigError.exit_code == 2
    assert Run(store).state().launch == 0
    assert [*tmp_path.iterdir()] == []


def test_a_training_that_only_gets_slower_is_told(
    store: str, tmp_path: Path, told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(file: Any) -> Any:
        return plain(file)  # type: ignore[name-defined]  # noqa: F821

    library = {"__name__": "torch.serialization", "plain": upstream.OPEN_ZIPFILE.find()}
    monkeypatch.setattr(torch.serialization, "_open_zipfile_writer", types.FunctionType(changed.__code__, library))
    make_trainer(tmp_path, SpotCallback(store, QUIET), max_steps=3).train()
    assert told() == [
        f"torch {torch.__version__} has changed the parameters of torch.serialization._open_zipfile_writer: training waits "
        'until a checkpoint is written. To fix this: pip install "torch==2.13.0"'
    ]
    newest = Run(store).latest()
    assert newest is not None and newest.ref.complete


def test_a_commit_has_the_versions_and_the_next_launch_names_what_has_changed(
    store: str, tmp_path: Path, told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_until_preempted(store, tmp_path / "one", 5)
    newest = Run(store).latest()
    assert newest is not None
    saved = newest.details["versions"]
    assert saved == versions.versions()
    plain = versions.version_of
    monkeypatch.setattr(versions, "version_of", lambda name: "2.12.0" if name == "torch" else plain(name))
    monkeypatch.setattr(versions, "_told", {("torch", "2.12.0")})
    make_trainer(tmp_path / "two", SpotCallback(store, QUIET)).train()
    changed = [line for line in told() if "versions have changed" in line]
    assert len(changed) == 1
    assert f"since step 5 was saved, versions have changed: torch {saved['torch']} → 2.12.0;" in changed[0]


def test_what_a_script_has_put_on_its_trainer_is_still_called(store: str, tmp_path: Path) -> None:
    """A method that hf_spot wraps may be the script's own, on the object alone."""
    trainer = make_trainer(tmp_path, SpotCallback(store, SpotArguments(notice="none")), eval_strategy="epoch")
    called: Counter[str] = Counter()

    def counting(name: str) -> Any:
        plain = getattr(trainer, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            called[name] += 1
            return plain(*args, **kwargs)

        return count

    own = {name: counting(name) for name in ("training_step", "_evaluate", "_save_checkpoint", "_maybe_log_save_evaluate")}
    for name, method in own.items():
        setattr(trainer, name, method)
    trainer.train()
    assert called["training_step"] == 12
    assert called["_evaluate"] == 1
    assert called["_save_checkpoint"] == 4
    assert called["_maybe_log_save_evaluate"] > 0
    assert {name: vars(trainer)[name] for name in own} == own
