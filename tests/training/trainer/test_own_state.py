"""State that no file of Trainer's holds, of each kind that a script can make: a resumed training ends as an undisturbed one."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import peft
import pytest
import torch
import torch.nn.utils.prune
from transformers import (
    GPT2Config,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_spot import Run, SpotArguments, SpotCallback, TrainingPreempted
from hf_spot.training.state.carried import FOLDER
from hf_spot.training.state.values import decode, encode, mark_of, put_into
from tests.matrix.parts import Counting, Stream
from tests.training.conftest import Patient, Recorder
from tests.training.test_callback import preempt

STEPS = 12
SHAPE = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows whose making depends on what the class below it keeps."""

    def __init__(self) -> None:
        self.rows = torch.randint(0, 64, (24, 16), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> torch.Tensor:
        return self.rows[index]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.row(index)
        return {"input_ids": row, "labels": row}


def make(out: Path, kind: type[Trainer] = Trainer, callbacks: Any = (), data: Any = None, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    arguments = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "save_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    more = {name: settings.pop(name) for name in ("data_collator", "optimizers", "model", "eval_dataset") if name in settings}
    model = more.pop("model", None) or GPT2LMHeadModel(SHAPE)
    if callable(more.get("optimizers")):
        more["optimizers"] = (more["optimizers"](model), None)
    return kind(
        model,
        TrainingArguments(str(out), **(arguments | settings)),
        train_dataset=data or Rows(),
        callbacks=[*callbacks],
        **more,
    )


# -- what scripts make ------------------------------------------------------------------------------------------------


class Average(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        self.of = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        self.first = model.transformer.ln_f.bias.detach().clone()  # never changes, and would be another one after a resume

    def on_step_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        for name, weight in model.named_parameters():
            self.of[name].lerp_(weight.detach(), 0.1)


class Projection:
    """What GaLore and APOLLO keep of each parameter in their state: no number and no tensor."""

    def __init__(self) -> None:
        self.steps = 0


class Projecting(torch.optim.SGD):
    """Keeps objects in its state, and more by parameter in its groups, as GrokAdamW does."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            by_parameter = group.setdefault("slow", {})
            for one in group["params"]:
                kept = self.state[one].setdefault("projection", Projection())
                kept.steps += 1
                slow = by_parameter.setdefault(one, torch.zeros_like(one))
                slow.lerp_(one.grad, 1 / kept.steps)
                one.grad = slow.clone()
        return super().step(closure)


class Counted(torch.optim.Adam):
    """Keeps an object in its state, on which its steps depend."""

    def step(self, closure: Any = None) -> Any:
        (one,) = self.param_groups[0]["params"]
        kept = self.state[one].get("projection")
        one.grad /= 1 + (kept.steps if kept else 0)
        done = super().step(closure)
        self.state[one].setdefault("projection", Projection()).steps += 1
        return done


def layerwise(out: Path) -> Trainer:
    """Return a training whose parameters are stepped in their backward pass, by hooks of a library."""
    made: dict[str, Any] = {"__name__": "transformers.trainer_optimizer"}
    exec(
        "def hook_of(by_parameter):\n"
        "    def hook(parameter):\n"
        "        by_parameter[parameter].step()\n"
        "        by_parameter[parameter].zero_grad()\n"
        "    return hook\n",
        made,
    )
    trainer = make(out, optimizers=lambda model: torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2))
    assert trainer.model is not None
    every = list(trainer.model.parameters())
    hook = made["hook_of"]({one: Counted([one], lr=1e-2) for one in every})
    for one in every:
        one.register_post_accumulate_grad_hook(hook)
    return trainer


class LevelOfTheModel(TrainerCallback):
    """Counts in a private attribute of a library's model, which is not there when the training begins."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        model.transformer.ln_f.bias.data.add_(getattr(model, "_level", 0.0))
        model._level = getattr(model, "_level", 0.0) + 0.01


def head_beside_an_adapter(out: Path) -> Trainer:
    """Return a training of an adapter that ``add_adapter`` has added, and of a layer that its file does not have."""
    trainer = make(out)
    model: Any = trainer.model
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    model.transformer.ln_f.requires_grad_(True)
    return trainer


class Meter:
    """Keeps what is no value."""

    def __init__(self) -> None:
        self.of = object()


class Meters(TrainerCallback):
    def __init__(self) -> None:
        self.meters: dict[str, Any] = {"train": collections.defaultdict(Meter), "eval": collections.defaultdict(int)}
        self.lists: dict[str, Any] = {"train": [[1, 2], []]}

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        assert self.meters["train"]["loss"].of is not None
        self.meters["eval"]["steps"] += state.global_step
        self.lists["now"] = Meter()
        self.lists["train"][1].append(state.global_step)


class Plain(TrainerCallback):
    def __init__(self) -> None:
        self.count, self.largest, self.seen, self.by_step = 0, float("-inf"), [], {}  # type: ignore[var-annotated]
        self.newest: collections.deque[int] = collections.deque(maxlen=3)
        self.told, self.array, self.dice = set(), numpy.zeros(3), random.Random(5)  # type: ignore[var-annotated]
        self.late: Any = None

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.count += 1
        self.largest = max(self.largest, self.dice.random())
        self.seen.append((state.global_step, None, b"\0"))
        self.by_step[state.global_step] = numpy.float32(state.global_step) / 3
        self.newest.append(state.global_step)
        self.told.add(f"step {state.global_step}")
        self.array += self.dice.random()
        if state.global_step > 2:
            self.late = {"tensor": torch.full((2,), state.global_step / 3, dtype=torch.bfloat16)}

    def found(self) -> Any:
        return [mark_of(value) for value in vars(self).values()]


class LearntLoss(Trainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log_variance = torch.nn.Parameter(torch.zeros(()))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.add_param_group({"params": [self.log_variance]})
        return optimizer

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, **kwargs) * torch.exp(-self.log_variance) + self.log_variance


class Teacher(Trainer):
    """A momentum teacher, whose answers the loss asks for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = GPT2LMHeadModel(SHAPE).eval().requires_grad_(False)
        self.teacher.load_state_dict(self.model.state_dict())  # type: ignore[union-attr]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        wanted = self.teacher(input_ids=inputs["input_ids"]).logits
        for own, followed in zip(self.teacher.parameters(), model.parameters(), strict=True):
            own.data.lerp_(followed.data, 0.1)
        loss = loss + torch.nn.functional.mse_loss(outputs.logits, wanted)
        return (loss, outputs) if return_outputs else loss


class Lookahead(torch.optim.AdamW):
    """Slow weights that are in no state_dict."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=1e-2)
        self.steps = 0
        self.slow = [weight.detach().clone() for group in self.param_groups for weight in group["params"]]

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        self.steps += 1
        if self.steps % 3 == 0:
            with torch.no_grad():
                for slow, fast in zip(self.slow, (w for g in self.param_groups for w in g["params"]), strict=True):
                    slow.lerp_(fast, 0.5)
                    fast.copy_(slow)


class Levels(Rows):
    """Rows that a callback makes harder."""

    def __init__(self) -> None:
        super().__init__()
        self.level = 0

    def row(self, index: int) -> torch.Tensor:
        return (self.rows[index] + self.level) % 64


class Raises(TrainerCallback):
    def __init__(self, data: Levels, every: int) -> None:
        self.data, self.every = data, every

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.data.level += state.global_step % self.every == 0


class Noisy(Rows):
    """Rows with noise from a generator of their own."""

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.generator = generator

    def row(self, index: int) -> torch.Tensor:
        if isinstance(self.generator, torch.Generator):
            noise = int(torch.randint(0, 9, (), generator=self.generator))
        elif isinstance(self.generator, numpy.random.Generator):
            noise = int(self.generator.integers(0, 9))
        else:
            noise = int(self.generator.randint(0, 9))
        return (self.rows[index] + noise) % 64


class NoisyCollator:
    def __init__(self) -> None:
        self.dice, self.calls = random.Random(3), 0

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        self.calls += 1
        batch = (torch.stack([row["input_ids"] for row in rows]) + self.dice.randrange(9) + self.calls) % 64
        return {"input_ids": batch, "labels": batch}


class OwnSampler(Trainer):
    """A sampler with a generator of its own, which draws another order in each epoch."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.RandomSampler(self.train_dataset, generator=torch.Generator().manual_seed(7))  # type: ignore[arg-type]


class Shuffled(torch.utils.data.Sampler):  # type: ignore[type-arg]
    def __init__(self, length: int) -> None:
        self.length, self.dice, self.passes = length, numpy.random.RandomState(2), 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter(self.dice.permutation(self.length).tolist())

    def __len__(self) -> int:
        return self.length


class WrittenSampler(Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return Shuffled(len(self.train_dataset))  # type: ignore[arg-type]


class Unhurried(Shuffled):
    """Draws each row when it is asked for it, by weights that it lowers."""

    def __iter__(self) -> Any:
        self.weights = numpy.ones(self.length)
        for _ in range(self.length):
            row = int(self.dice.choice(self.length, p=self.weights / self.weights.sum()))
            self.weights[row] *= 0.5
            yield row


class UnhurriedSampler(Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return Unhurried(len(self.train_dataset))  # type: ignore[arg-type]


class Thaws(TrainerCallback):
    """Trains the head alone for an epoch."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == 0:
            model.transformer.h.requires_grad_(False)

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if state.epoch == 1:
            model.transformer.h.requires_grad_(True)


class Buffered(GPT2LMHeadModel):
    """A buffer that is in no state_dict, and a counter beside it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("scale", torch.ones(()), persistent=False)
        self.forwards = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.scale *= 0.97
        self.forwards += 1
        found = super().forward(*args, **kwargs)
        found.loss = found.loss * self.scale + self.forwards * 0.0
        return found


def unfrozen_beside_lora(out: Path) -> Trainer:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(GPT2LMHeadModel(SHAPE), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    model.base_model.model.transformer.ln_f.weight.requires_grad = True
    return make(out, model=model)


def with_levels(out: Path) -> Trainer:
    data = Levels()
    return make(out, data=data, callbacks=[Raises(data, 3)])


# -- state outside of the objects' own attributes ---------------------------------------------------------------------


class Phase(enum.Enum):
    WARM = 1
    MAIN = 3


Pair = collections.namedtuple("Pair", "first second")


class Gentle:
    def weight(self) -> float:
        return 1.0


class Hard:
    def weight(self) -> float:
        return 2.0


CALLS = 0


class Everywhere(Trainer):
    """Keeps state in its class, in a global variable, in an enumeration, in the class of an object, and in long containers."""

    calls = 0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        global CALLS
        CALLS += 1
        Everywhere.calls += 1
        found = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = found[0] * self.phase.value * self.strategy.weight() / CALLS + self.newest[-1] / Everywhere.calls
        row = int(inputs["input_ids"][0, 0])
        loss = loss * (1 + self.by_row[row])
        self.by_row[row] += float(found[0].detach())
        self.newest.append(self.by_row[row])
        self.pair = Pair(self.pair.first + 1, self.pair.second)
        self.share += decimal.Decimal("0.1")
        return (loss * float(self.share), found[1]) if return_outputs else loss * float(self.share)


class Moves(TrainerCallback):
    """Changes settings, a dropout, the model's configuration, and objects of the Trainer."""

    def on_step_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == 2:
            args.max_grad_norm = 0.1
            model.transformer.drop.p = 0.4
            self.trainer.phase, self.trainer.strategy = Phase.MAIN, Hard()
        model.config.note = (model.config.note or 0) + 1


class Attached(torch.optim.SGD):
    """Attaches its momentum to the parameters."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                held = getattr(parameter, "speed", None)
                parameter.speed = parameter.grad.clone() if held is None else held.mul_(0.9).add_(parameter.grad)
                parameter.grad.copy_(parameter.speed)
        return super().step(closure)


class Counts(Rows):
    """Counts in a list and in an array while batches are made, ahead of the training."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.times = numpy.zeros(24, dtype=numpy.int64)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.seen.append(index)
        self.times[index] += 1
        row = (self.row(index) + len(self.seen) + int(self.times.sum())) % 64
        return {"input_ids": row, "labels": row}


def everywhere(out: Path, **settings: Any) -> Trainer:
    global CALLS
    CALLS, Everywhere.calls = 0, 0
    dice, drawn, scale, passes = random.Random(4), [0], 1.0, [0]

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        drawn[0] += dice.randrange(3)
        batch = (torch.stack([row["input_ids"] for row in rows]) + drawn[0]) % 64
        return {"input_ids": batch, "labels": batch}

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal scale
        scale *= 0.98
        return output * scale

    torch.manual_seed(0)
    model = GPT2LMHeadModel(SHAPE)
    model.config.note = None
    model.transformer.ln_f.register_forward_hook(hook)
    forward = model.lm_head.forward

    def scaled(hidden: torch.Tensor) -> torch.Tensor:
        passes[0] += 1
        return forward(hidden) / passes[0]

    model.lm_head.forward = scaled
    moves = Moves()
    trainer: Any = make(
        out,
        Everywhere,
        callbacks=[moves],
        data=Counts(),
        data_collator=collate,
        model=model,
        optimizers=lambda model: Attached(model.parameters(), lr=1e-3),
        **settings,
    )
    trainer.phase, trainer.strategy, trainer.share = Phase.WARM, Gentle(), decimal.Decimal(1)
    trainer.by_row, trainer.newest = [0.0] * 2000, collections.deque([0.0] * 1500, maxlen=1500)
    moves.trainer, trainer.pair = trainer, Pair(0, "same")
    return trainer  # type: ignore[no-any-return]


CASES: dict[str, tuple[Callable[[Path], Trainer], Callable[[Trainer], Any]]] = {
    "an average in a callback": (
        lambda out: make(out, callbacks=[Average()]),
        lambda trainer: (mark_of(of(trainer, Average).of), mark_of(of(trainer, Average).first)),
    ),
    "plain values of a callback": (lambda out: make(out, callbacks=[Plain()]), lambda trainer: of(trainer, Plain).found()),
    "items beside objects in a dictionary": (
        lambda out: make(out, callbacks=[Meters()]),
        lambda trainer: (
            type(of(trainer, Meters).meters["eval"]),
            of(trainer, Meters).meters["eval"]["steps"],
            of(trainer, Meters).lists["train"],
        ),
    ),
    "a loss that learns": (lambda out: make(out, LearntLoss), lambda trainer: mark_of(trainer.log_variance)),
    "a momentum teacher": (
        lambda out: make(out, Teacher),
        lambda trainer: mark_of(list(trainer.teacher.state_dict().values())),
    ),
    "a layer unfrozen beside LoRA": (unfrozen_beside_lora, lambda trainer: None),
    "a lookahead optimizer": (
        lambda out: make(out, optimizers=lambda model: Lookahead(model.parameters())),
        lambda trainer: None,
    ),
    "an optimizer with objects, and more by parameter": (
        lambda out: make(out, optimizers=lambda model: Projecting(model.parameters(), lr=1e-2)),
        lambda trainer: [one["projection"].steps for one in trainer.optimizer.state_dict()["state"].values()],
    ),
    "a number at a model of a library": (
        lambda out: make(out, callbacks=[LevelOfTheModel()]),
        lambda trainer: trainer.model._level,
    ),
    "a layer beside an adapter of the model's own": (head_beside_an_adapter, lambda trainer: None),
    "optimizers that hooks of a library step": (layerwise, lambda trainer: None),
    "a level that a callback raises on the data set": (with_levels, lambda trainer: trainer.train_dataset.level),
    "a generator of torch in the data set": (
        lambda out: make(out, data=Noisy(torch.Generator().manual_seed(3))),
        lambda trainer: None,
    ),
    "a generator of numpy in the data set": (
        lambda out: make(out, data=Noisy(numpy.random.default_rng(3))),
        lambda trainer: None,
    ),
    "a generator of Python in the data set": (lambda out: make(out, data=Noisy(random.Random(3))), lambda trainer: None),
    "a collator that draws and counts": (
        lambda out: make(out, data_collator=NoisyCollator()),
        lambda trainer: trainer.data_collator.calls,
    ),
    "a collator that draws and counts, of a stream": (
        lambda out: make(out, data=Stream(24), data_collator=Counting(), max_steps=STEPS),
        lambda trainer: trainer.data_collator.calls,
    ),
    "a sampler with a generator of its own": (lambda out: make(out, OwnSampler), lambda trainer: None),
    "a sampler that the script has written": (lambda out: make(out, WrittenSampler), lambda trainer: None),
    "state outside of objects' attributes": (
        everywhere,
        lambda trainer: (
            CALLS,
            Everywhere.calls,
            [one.value for one in Phase],
            trainer.phase,
            type(trainer.strategy),
            trainer.share,
            trainer.pair,
            list(trainer.newest),
            trainer.by_row,
            trainer.args.max_grad_norm,
            trainer.model.config.note,
            trainer.train_dataset.seen,
            trainer.train_dataset.times.tolist(),
        ),
    ),
    "a sampler that draws when it is asked": (lambda out: make(out, UnhurriedSampler), lambda trainer: None),
    "a collator that draws and counts, in workers": (
        lambda out: make(out, data_collator=NoisyCollator(), dataloader_num_workers=2),
        lambda trainer: None,
    ),
    "layers that thaw": (lambda out: make(out, callbacks=[Thaws()]), lambda trainer: None),
    "a buffer that is not persistent": (
        lambda out: make(out, model=seeded(Buffered), remove_unused_columns=False),
        lambda trainer: (mark_of(trainer.model.scale), trainer.model.forwards),
    ),
}


def seeded(kind: type[Any]) -> Any:
    torch.manual_seed(0)
    return kind(SHAPE)


def of(trainer: Trainer, kind: type[Any]) -> Any:
    return next(one for one in trainer.callback_handler.callbacks if isinstance(one, kind))


def weights(trainer: Trainer) -> Any:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("at_step", [3, 6, 9])
@pytest.mark.parametrize("case", CASES)
def test_it_comes_back(store: str, tmp_path: Path, case: str, at_step: int) -> None:
    make_one, found = CASES[case]
    alone, losses = make_one(tmp_path / "alone"), Recorder()
    alone.add_callback(losses)
    alone.train()
    wanted_state = found(alone)

    callback = SpotCallback(store, SpotArguments(notice="signal"))
    first = make_one(tmp_path / "one")
    for one in (callback, Patient(callback), Recorder(at_step, preempt(callback))):
        first.add_callback(one)
    with pytest.raises(TrainingPreempted):
        first.train()
    second, again = make_one(tmp_path / "two"), SpotCallback(store, SpotArguments(notice="none"))
    recorder = Recorder()
    for one in (again, Patient(again), recorder):
        second.add_callback(one)
    second.train()

    assert {step: losses.losses[step] for step in recorder.losses} == recorder.losses
    ended, wanted = weights(second), weights(alone)
    assert [name for name in wanted if not torch.equal(wanted[name], ended[name])] == []
    assert found(second) == wanted_state


def _experts() -> Any:
    """Return a model that ``save_pretrained`` translates, and that sets itself up in its first forward pass."""
    small = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=64, output_router_logits=True, **small, **heads))


def _classes() -> Any:
    return GPT2ForTokenClassification(GPT2Config(**SHAPE.to_diff_dict() | {"num_labels": 64}))


@pytest.mark.parametrize("model", [None, _experts, _classes])
def test_a_training_without_state_of_its_own_gets_no_more_than_its_proof(store: str, tmp_path: Path, model: Any) -> None:
    callback = SpotCallback(store, SpotArguments(notice="none"))
    make(tmp_path / "out", callbacks=[callback, Patient(callback)], **({"model": model()} if model else {})).train()
    names = {file.path for one in Run(store).checkpoints() for file in one.files}
    assert {name for name in names if name.startswith(FOLDER)} == {f"{FOLDER}/proof_0.json"}


def test_plain_trainer_and_from_pretrained_are_not_disturbed_by_it(store: str, tmp_path: Path) -> None:
    callback = SpotCallback(store, SpotArguments(notice="none"))
    trainer = make(tmp_path / "out", callbacks=[callback, Patient(callback), Average()])
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-8"
    assert (checkpoint / FOLDER / "state_0.safetensors").exists()
    loaded = GPT2LMHeadModel.from_pretrained(checkpoint)
    assert loaded.num_parameters() == trainer.model.num_parameters()  # type: ignore[union-attr]
    plain = make(tmp_path / "plain")
    assert plain.train(resume_from_checkpoint=str(checkpoint)).global_step == STEPS


class Clock(TrainerCallback):
    per_launch = ("steps_here",)

    def __init__(self) -> None:
        self.steps = self.steps_here = 0

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.steps, self.steps_here = self.steps + 1, self.steps_here + 1


def test_a_class_may_say_what_is_each_launchs_own(store: str, tmp_path: Path) -> None:
    callback, clock = SpotCallback(store, SpotArguments(notice="signal")), Clock()
    first = make(tmp_path / "one", callbacks=[callback, Patient(callback), Recorder(5, preempt(callback))])
    first.add_callback(clock)
    with pytest.raises(TrainingPreempted):
        first.train()
    again, resumed = SpotCallback(store, SpotArguments(notice="none")), Clock()
    make(tmp_path / "two", callbacks=[again, Patient(again), resumed]).train()
    assert (clock.steps, resumed.steps, resumed.steps_here) == (5, STEPS, STEPS - 5)


FOLDER_OF_DATA = "unset"


class OnDisk(Rows):
    """Knows where its rows are, in two ways, and counts what it reads."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        global FOLDER_OF_DATA
        self.folder = FOLDER_OF_DATA = folder
        self.read = self.lost = 0

    def row(self, index: int) -> torch.Tensor:
        self.read += 1
        self.lost += self.folder != FOLDER_OF_DATA
        return (self.rows[index] + self.read) % 64


@pytest.mark.parametrize("workers", [0, 1])
def test_what_never_changes_is_that_of_each_machine(store: str, tmp_path: Path, workers: int) -> None:
    settings: dict[str, Any] = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    alone, losses = make(tmp_path / "alone", data=OnDisk("/one"), **settings), Recorder()
    alone.add_callback(losses)
    alone.train()
    callback = SpotCallback(store, SpotArguments(notice="signal"))
    callbacks = [callback, Patient(callback), Recorder(5, preempt(callback))]
    with pytest.raises(TrainingPreempted):
        make(tmp_path / "one", callbacks=callbacks, data=OnDisk("/one"), **settings).train()
    again, data, recorder = SpotCallback(store, SpotArguments(notice="none")), OnDisk("/two"), Recorder()
    make(tmp_path / "two", callbacks=[again, Patient(again), recorder], data=data, **settings).train()
    assert recorder.losses
    assert {step: losses.losses[step] for step in recorder.losses} == recorder.losses
    assert (data.folder, FOLDER_OF_DATA, data.lost) == ("/two", "/two", 0)


class Opaque(TrainerCallback):
    def __init__(self) -> None:
        self.lines = {number: object() for number in range(2)}
        self.rows = [object()] * 2000

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.rows.append(state.global_step)


def test_what_can_not_be_saved_is_named_once(store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = SpotCallback(store, SpotArguments(notice="none"))
    make(tmp_path / "out", callbacks=[callback, Patient(callback), Opaque()]).train()
    assert caplog.text.count("callbacks.Opaque.rows changes in this training and can't be saved") == 1


@pytest.mark.parametrize(
    "value",
    [
        None,
        -0.1,
        float("nan"),
        b"\0\xff",
        (1, [2.5, {"a": {3, "b"}}], frozenset({4})),
        {(1, "x"): [torch.arange(3, dtype=torch.bfloat16), numpy.eye(2, dtype=numpy.float16)]},
        collections.deque([1, 2], maxlen=2),
        collections.Counter("abba"),
        collections.OrderedDict([("z", 1), ("a", 2)]),
        numpy.int8(-3),
        torch.float16,
        Phase.MAIN,
        Hard,
        everywhere,
        1 - 2j,
        decimal.Decimal("0.10"),
        datetime.timedelta(days=-1, microseconds=3),
        datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.timezone.utc),
        bytearray(b"\xff"),
        [0.1] * 1001,
        dict.fromkeys(range(1001)),
        collections.deque(range(2000), maxlen=2000),
    ],
    ids=lambda value: type(value).__name__,  # of sets each worker would read another order
)
def test_values_survive_their_way_through_json(value: Any) -> None:
    import json

    tensors: dict[str, torch.Tensor] = {}
    written = json.loads(json.dumps(encode(value, tensors, "x")))
    again = decode(written, tensors)
    assert type(again) is type(value)
    assert mark_of(again) == mark_of(value)


def test_who_else_holds_a_value_sees_it_restored() -> None:
    tensor, numbers = torch.zeros(2), [1, 2, 3]
    held = {"tensor": tensor, "numbers": numbers, "gone": 1}
    assert put_into(held, {"tensor": torch.ones(2), "numbers": [4], "new": 2}) is held
    assert (tensor.tolist(), numbers, set(held)) == ([1.0, 1.0], [4], {"tensor", "numbers", "new"})


class Reads(Trainer):
    """Reads other data in its loss."""

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        next(self.others)
        next(self.batches)
        return super().compute_loss(model, inputs, **kwargs)


class Prunes(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == 3:
            torch.nn.utils.prune.l1_unstructured(model.transformer.h[0].mlp.c_fc, "weight", 0.3)


def test_iterators_and_another_structure_of_the_model_are_named(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = SpotCallback(store, SpotArguments(notice="none"))
    trainer: Any = make(tmp_path / "out", Reads, callbacks=[callback, Patient(callback), Prunes()], max_steps=8)
    trainer.others, trainer.unread = iter(range(100)), iter(range(100))
    trainer.batches = iter(torch.utils.data.DataLoader(range(100)))
    trainer.train()
    for name in ("others", "batches"):
        assert caplog.text.count(f"trainer.{name} changes in this training and can't be saved") == 1
    assert "unread" not in caplog.text
    assert caplog.text.count("changes which parameters its model has (model.transformer.h.0.mlp.c_fc.weight") == 1


def test_a_trainer_without_a_hash_is_trained(store: str, tmp_path: Path) -> None:
    class Equal(Trainer):
        def __eq__(self, other: object) -> bool:
            return True

    callback = SpotCallback(store, SpotArguments(notice="none"))
    trainer = make(tmp_path / "out", Equal, callbacks=[callback, Patient(callback)], max_steps=2)
    assert trainer.train().global_step == 2
