"""Copies that are made beside the training are those of the step that was saved, whatever the training does meanwhile.

The copies are made as late as possible here: when somebody waits for them. So whatever is not held back is seen in a file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback

from hf_spot import Run, SpotArguments, SpotCallback
from hf_spot.training.saving.hidden_writes import HiddenWrites
from hf_spot.training.saving.later_copies import LaterCopies, are_finite
from hf_spot.training.saving.live_tensors import LiveTensors
from hf_spot.training.saving.state_gate import StateGate
from tests.training.conftest import make_trainer

QUIET = SpotArguments(notice="none", keep_checkpoints=0)
FILES = ("model.safetensors", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


class Copies:
    """How many tensors each save has left for later."""

    def __init__(self) -> None:
        self.numbers: list[int] = []


@pytest.fixture
def latest(monkeypatch: pytest.MonkeyPatch) -> Copies:
    """Lets the writer thread copy only when somebody waits for it."""
    told, plain = Copies(), LaterCopies.run

    def run(self: LaterCopies) -> None:
        told.numbers.append(len(self))
        while not (self._is_hurried or self.is_confirmed()):
            time.sleep(0.001)
        plain(self)

    monkeypatch.setattr(LaterCopies, "run", run)
    return told


def large() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=48, n_layer=1, n_head=2))


def digests(out: Path) -> dict[str, str]:
    files = [path for path in out.rglob("*") if path.name in FILES and path.parent.name.startswith("checkpoint-")]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def compared(
    tmp_path: Path, store: str, kind: type[Trainer] | None = None, callback: Callable[[], Any] | None = None, **settings: Any
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the files of all saves of a training without hf_spot, and of the same with it."""
    found = []
    for name, spot in (("plain", []), ("spot", [SpotCallback(store, QUIET)])):
        others = [] if callback is None else [callback()]
        made = make_trainer(tmp_path / name, *others, *spot, **({"model": large, "save_steps": 1, "max_steps": 5} | settings))
        if kind is not None:
            made.__class__ = kind
        for one in others:
            one.trainer = made
        made.train()
        found.append(digests(tmp_path / name))
    return found[0], found[1]


def adapter() -> Any:
    return peft.get_peft_model(large(), peft.LoraConfig(r=16, target_modules=["c_attn"], fan_in_fan_out=True))


def with_checkpointing() -> Any:
    model = large()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # before 5.24
    enable()
    return model


SETTINGS: dict[str, dict[str, Any]] = {
    "fused": {},
    "foreach": {"optim": "adamw_torch"},
    "for loop": {"optim": "adamw_torch", "optim_args": "foreach=False"},
    "sgd": {"optim": "sgd"},
    "adafactor": {"optim": "adafactor"},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "checkpointing": {"model": with_checkpointing},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2},
    "epochs": {"num_train_epochs": 3, "max_steps": -1, "save_strategy": "epoch", "eval_strategy": "epoch"},
    "workers": {"dataloader_num_workers": 1, "num_train_epochs": 2, "max_steps": -1, "save_steps": 4},
    "lora": {"model": adapter},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 4},
}


DYNAMO = pytest.mark.filterwarnings(
    "ignore:.*script_method. is deprecated",
    "ignore:The .grad attribute",
    "ignore:Profiler",
    "ignore:.is_gradient_checkpointing",
)


@DYNAMO
@pytest.mark.parametrize("name", SETTINGS)
def test_every_file_is_that_of_a_training_that_waits(name: str, store: str, tmp_path: Path, latest: Copies) -> None:
    if name == "compiled":
        torch._dynamo.reset()
    plain, spot = compared(tmp_path, store, **SETTINGS[name])
    assert plain and spot == plain
    assert latest.numbers and min(latest.numbers[1:] or latest.numbers) > 0


class Writer(TrainerCallback):
    """Changes weights in an event, in one of the ways that there are."""

    per_launch = ("trainer", "held")

    def __init__(self, event: str, way: str, from_step: int = 0) -> None:
        self.trainer: Any = None
        self.held: Any = None
        self.way = way
        self.from_step = from_step
        setattr(self, event, self.act)

    def act(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write(self, self.trainer, self.way)


def write(one: Any, trainer: Any, way: str) -> None:
    if trainer.state.global_step < one.from_step:
        return
    weight = trainer.model.transformer.h[0].attn.c_attn.weight
    if way == "counted":
        with torch.no_grad():
            weight.mul_(0.99)
    elif way == "data":
        weight.data.mul_(0.99)
    elif way == "numpy":
        weight.detach().numpy()[:] *= 0.99
    elif way == "storage":
        torch.empty(0).set_(weight.untyped_storage()).mul_(0.99)
    elif way == "fused":  # nobody counts what it writes
        more = {"weight_decay": 0.0, "momentum": 0.0, "lr": 0.1, "dampening": 0.0, "nesterov": False, "maximize": False}
        with torch.no_grad():
            torch._fused_sgd_([weight], [torch.ones_like(weight)], [], is_first_step=True, **more)
    elif way == "another":
        weight.data = weight.data * 0.99
    elif way == "state":
        trainer.optimizer.state[weight].get("exp_avg", weight.detach()).data.mul_(0.99)
    elif way == "held":
        if one.held is None:
            one.held = weight.data
        one.held.mul_(0.99)
    elif way == "held array":
        if one.held is None:
            one.held = weight.detach().numpy()
        one.held *= 0.99


EVENTS = ("on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_substep_end")
UNCOUNTED = ("fused",)
WAYS = ("counted", *UNCOUNTED, "data", "numpy", "storage", "another", "state", "held", "held array")


@pytest.mark.parametrize(
    ("event", "way"), [*((event, "data") for event in EVENTS), ("on_step_begin", "counted"), ("on_step_begin", "fused")]
)
def test_callbacks_may_write_into_weights(event: str, way: str, store: str, tmp_path: Path, latest: Copies) -> None:
    more = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1} if event == "on_substep_end" else {}
    plain, spot = compared(tmp_path, store, callback=lambda: Writer(event, way), **more)
    assert spot == plain


class WritesInLoss(Trainer):
    """A loss that changes weights: a clipping, or an average."""

    way = "data"
    from_step = 0
    held: Any = None

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        write(self, self, self.way)
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("way", WAYS)
def test_a_forward_may_write_into_weights(
    way: str, store: str, tmp_path: Path, latest: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type("Written", (WritesInLoss,), {"way": way})
    plain, spot = compared(tmp_path, store, kind)
    lost = {name for name in plain if name.startswith("checkpoint-1/")} if way in UNCOUNTED else set()
    assert spot == {name: digest for name, digest in plain.items() if name not in lost}


@pytest.mark.parametrize("way", ["counted", "fused", "data", "held array"])
def test_a_write_that_comes_later_is_never_in_a_commit(
    way: str, store: str, tmp_path: Path, latest: Copies, caplog: pytest.LogCaptureFixture
) -> None:
    kind = type("WrittenLater", (WritesInLoss,), {"way": way, "from_step": 2})
    with caplog.at_level(logging.INFO, "hf_spot"):
        plain, spot = compared(tmp_path, store, kind)
    assert spot.items() <= plain.items()
    missing = {name.partition("/")[0] for name in plain.keys() - spot.keys()}
    assert missing == ({"checkpoint-2"} if way in ("counted", *UNCOUNTED) else set())
    commits = {entry.data["step"] for entry in Run(store).events() if entry.kind == "commit"}
    assert 5 in commits and not (missing and 2 in commits)
    if missing:
        assert caplog.text.count("checkpoint-2 is not saved: weight transformer.h.0.attn.c_attn.weight was written to") == 1
        assert caplog.text.count("training waits while a save copies its state, because") == 1


def test_a_weight_that_is_written_to_in_the_first_step_costs_no_save(
    store: str, tmp_path: Path, latest: Copies, caplog: pytest.LogCaptureFixture
) -> None:
    kind = type("WrittenAlways", (WritesInLoss,), {"way": "counted"})
    with caplog.at_level(logging.INFO, "hf_spot"):
        plain, spot = compared(tmp_path, store, kind)
    assert spot == plain and latest.numbers == []
    assert "because transformer.h.0.attn.c_attn.weight is written to before the optimizer's step" in caplog.text


# -- optimizers -------------------------------------------------------------------------------------------------------


class Several(torch.optim.Optimizer):
    """Two optimizers that look like one."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        half = len(parameters) // 2
        self.parts = [torch.optim.AdamW(parameters[:half], fused=True), torch.optim.SGD(parameters[half:], 0.1, fused=True)]
        self.param_groups = [group for one in self.parts for group in one.param_groups]

    def step(self, closure: Any = None) -> Any:
        for one in self.parts:
            one.step()


class InBackward(Trainer):
    """Every weight is changed as soon as its gradient is there, by an optimizer of its own."""

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            for weight in self.model.parameters():
                own = torch.optim.SGD([weight], 0.1, momentum=0.9, fused=True)

                def step(weight: Any, own: Any = own) -> None:
                    own.step()
                    own.zero_grad()

                weight.register_post_accumulate_grad_hook(step)
            self.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
        return self.optimizer


class WithSeveral(Trainer):
    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.optimizer = Several(list(self.model.parameters()))
        return self.optimizer


class Uncounted(Trainer):
    """An optimizer that torch knows nothing of changes the weights in the backward, as LOMO does."""

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            for weight in self.model.parameters():

                def change(one: Any) -> None:
                    one.data.sub_(one.grad, alpha=0.1)
                    one.grad = None

                weight.register_post_accumulate_grad_hook(change)
            self.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
        return self.optimizer


class UncountedByName(Uncounted):
    """The same, but there is an optimizer that has the weights, and does nothing."""

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            super().create_optimizer()
            self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        return self.optimizer


class Compiled(Trainer):
    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            torch._dynamo.reset()
            self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
            self.optimizer.step = torch.compile(self.optimizer.step, backend="eager")  # type: ignore[method-assign]
        return self.optimizer


@DYNAMO
@pytest.mark.parametrize("kind", [WithSeveral, InBackward, Uncounted, UncountedByName, Compiled])
def test_optimizers_of_all_kinds_are_held_back(kind: type[Trainer], store: str, tmp_path: Path, latest: Copies) -> None:
    plain, spot = compared(tmp_path, store, kind)
    assert spot == plain


def trained(optimizer: Callable[..., Any] = torch.optim.AdamW, **more: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
    made = optimizer(model.parameters(), **more)
    model(torch.randn(8, 64)).sum().backward()
    made.step()
    return model, made


def test_only_what_an_optimizer_has_changed_through_the_gate_is_left_for_later() -> None:
    gate = StateGate()
    gate.watch_steps()
    model, optimizer = trained()
    weight, other = model[0].weight, model[2].weight
    assert len(LiveTensors(model, [])) == 0  # nobody has seen its step
    assert len(LiveTensors(model, gate.stepped())) == 2 * 3
    gate.step_begins()
    assert gate.stepped() == []
    optimizer.step()
    alias, array, other.requires_grad = weight.data, optimizer.state[other]["exp_avg"].numpy(), True
    live = LiveTensors(model, gate.stepped())
    assert live.at(weight.data_ptr(), weight.nbytes) is None and live.at(other.data_ptr(), other.nbytes) is other
    assert len(live) == 2 * 3 - 2
    del alias, array
    assert len(LiveTensors(model, gate.stepped())) == 2 * 3
    model.share_memory()
    assert len(LiveTensors(model, gate.stepped())) == 2 * 2  # the optimizer's states alone
    gate.close()


def test_schedule_free_optimizers_change_weights_before_a_forward() -> None:
    class ScheduleFree(torch.optim.AdamW):
        def train(self) -> None:
            """As schedule-free optimizers have it."""

    model, optimizer = trained(ScheduleFree)
    assert len(LiveTensors(model, [optimizer])) == 0


@pytest.mark.parametrize("more", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_a_step_waits_for_the_copies(more: dict[str, Any]) -> None:
    gate = StateGate()
    gate.watch_steps()
    model, optimizer = trained(**more)
    weight = model[0].weight
    before, target = weight.detach().clone(), torch.zeros(weight.nbytes, dtype=torch.uint8)
    later, waited = LaterCopies(), []
    later.add(weight, target)
    gate.shut(later, waited.append)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.full((8, 64), float("inf"))).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    # A scaler skips the step; a fused optimizer is called, and skips it itself.
    assert gate.is_shut == (not more.get("fused")) and target.any() == (not gate.is_shut)
    optimizer.zero_grad()
    model(torch.randn(8, 64)).sum().backward()
    optimizer.step()
    assert not gate.is_shut and len(waited) == 1
    assert torch.equal(target.view(torch.float32).view(64, 64), before) and not torch.equal(weight, before)
    assert later.written_to == []
    gate.close()


def test_a_write_during_a_copy_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count of a write grows when the write has ended: the copy may see it before."""
    model, _ = trained()
    weight = model[0].weight
    later = LaterCopies()
    later.add(weight, torch.zeros(weight.nbytes, dtype=torch.uint8))
    later.run()
    with torch.no_grad():
        weight[0, 1] += 1  # between two of the values that are compared
    later.confirm()
    assert later.written_to == [weight.data_ptr()]


def test_a_forked_child_waits_for_nothing() -> None:
    gate = StateGate()
    gate.watch_steps()
    model, _ = trained()
    later = LaterCopies()
    later.add(model[0].weight, torch.zeros(model[0].weight.nbytes, dtype=torch.uint8))
    gate.shut(later, lambda waited_s: None)
    child = os.fork()
    if child == 0:
        gate.pass_through()
        model[0].weight.data  # noqa: B018
        os._exit(0 if gate.is_shut and not later.is_confirmed() else 1)
    assert os.waitpid(child, 0)[1] == 0
    gate.close()


def test_an_error_of_a_copy_opens_the_gate_and_fails_the_save() -> None:
    model, _ = trained()
    later, gate = LaterCopies(), StateGate()
    later.add(model[0].weight, torch.zeros(model[0].weight.nbytes, dtype=torch.uint8))
    later._copies[0].target = None  # type: ignore[assignment]
    gate.shut(later, lambda waited_s: None)
    gate.pass_through()
    assert not gate.is_shut
    with pytest.raises(AttributeError):
        later.run()
    gate.close()


def test_others_than_the_training_wait_too_but_do_not_open_the_gate() -> None:
    gate = StateGate()
    gate.watch_steps()
    model, optimizer = trained()
    weight, target = model[0].weight, torch.zeros(model[0].weight.nbytes, dtype=torch.uint8)
    later = LaterCopies()
    later.add(weight, target)
    gate.shut(later, lambda waited_s: None)
    thread = threading.Thread(target=optimizer.step)
    thread.start()
    thread.join()
    assert gate.is_shut and target.any()
    gate.close()


def test_names_of_torch_are_as_before(store: str, tmp_path: Path, latest: Copies) -> None:
    before = [vars(torch.Tensor).get(name) for name in ("data", "numpy", "untyped_storage", "storage", "data_ptr")]
    compared(tmp_path, store, max_steps=3)
    assert [vars(torch.Tensor).get(name) for name in ("data", "numpy", "untyped_storage", "storage", "data_ptr")] == before


def test_two_who_watch_end_in_any_order() -> None:
    before = vars(torch.Tensor).get("data")
    asked: list[str] = []
    one, other = (HiddenWrites(lambda name=name: asked.append(name)) for name in ("one", "other"))  # type: ignore[misc]
    tensor = torch.ones(4)
    memory = frozenset({tensor.untyped_storage().data_ptr()})
    one.watch(memory)
    other.watch(memory)
    one.close()
    tensor.data = torch.zeros(4)  # memory of its own: nobody needs to wait
    assert asked == []
    memory_of_new = frozenset({tensor.untyped_storage().data_ptr()})
    other.watch(memory_of_new)
    assert tensor.data.sum() == 0 and asked == ["other"]
    other.close()
    other.close()
    assert vars(torch.Tensor).get("data") is before


@pytest.mark.parametrize(
    "kind",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64],
)
def test_numbers_that_are_not_finite_are_found_among_the_bytes(kind: torch.dtype) -> None:
    def bytes_of(value: float) -> torch.Tensor:
        numbers = torch.full((9,), -1.0).to(kind)
        numbers[4] = torch.tensor(value, dtype=torch.float64).to(kind)
        return numbers.view(torch.uint8)

    most = torch.finfo(kind).max
    for value in (0.0, -0.0, 1.0, most, -most, torch.finfo(kind).tiny):
        assert are_finite(bytes_of(value), kind), value
    for value in (torch.nan, -torch.nan, *([] if kind is torch.float8_e4m3fn else [torch.inf, -torch.inf])):
        assert are_finite(bytes_of(value), kind) is False, value


def test_whole_numbers_are_finite_and_some_types_are_unknown() -> None:
    assert are_finite(torch.full((8,), 255, dtype=torch.uint8), torch.int32)
    assert are_finite(torch.empty(0, dtype=torch.uint8), torch.float32)
    assert are_finite(torch.ones(8, dtype=torch.uint8), torch.float8_e8m0fnu) is None
