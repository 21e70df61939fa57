"""Files of a model that the writer thread writes without ``save_pretrained`` are those that it would have written."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2ForTokenClassification, GPT2LMHeadModel, PreTrainedModel, TrainerCallback

from hf_spot import SpotArguments, SpotCallback
from tests.training.conftest import make_trainer
from tests.training.saving.test_beside import Copies, latest

__all__ = ["latest"]
QUIET = SpotArguments(notice="none", keep_checkpoints=0, cadence="fixed")
NOT_OF_THE_MODEL = ("training_args.bin", "trainer_state.json")


def config() -> GPT2Config:
    return GPT2Config(vocab_size=64, n_positions=16, n_embd=48, n_layer=1, n_head=2)


class Counting(GPT2LMHeadModel):
    """A buffer that each forward changes, and a key that is never saved."""

    _keys_to_ignore_on_save = ("secret",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("seen", torch.zeros(2048))
        self.register_buffer("secret", torch.zeros(8))

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        self.seen += 1
        return super().forward(input_ids, labels=labels, **kwargs)


class WithNotes(GPT2LMHeadModel):
    """Writes a file of its own."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        Path(save_directory, "notes.txt").write_text(str(self.lm_head.weight.sum().item()))


class Halved(GPT2LMHeadModel):
    """Its ``state_dict`` is not what the model has in memory."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: one / 2 for name, one in super().state_dict(*args, **kwargs).items()}


def sharded() -> Any:
    model = GPT2LMHeadModel(config())
    model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size="20KB")  # type: ignore[method-assign]
    return model


def classifier() -> Any:
    """Return a model that can't generate, and has no configuration for it."""
    return GPT2ForTokenClassification(GPT2Config(vocab_size=64, n_positions=16, n_embd=48, n_layer=1, n_head=2, num_labels=64))


def adapter() -> Any:
    settings = peft.LoraConfig(r=16, target_modules=["c_attn"], modules_to_save=["ln_f"], fan_in_fan_out=True)
    return peft.get_peft_model(GPT2LMHeadModel(config()), settings)


class Untying(TrainerCallback):
    """Gives the head weights of its own before the fourth step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 3:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() + 1)


class Configuring(TrainerCallback):
    """Changes the configuration in each step, before and after its save."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.config.steps = {"done": state.global_step}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if hasattr(model.config, "steps"):
            model.config.steps["done"] = -1
        model.generation_config.max_new_tokens = 7 + state.global_step


def digests(out: Path) -> dict[str, str]:
    found = {}
    for path in sorted(out.glob("checkpoint-*/*")):
        if path.is_file() and path.name not in NOT_OF_THE_MODEL:
            found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


# The model, callbacks, and how often `save_pretrained` runs in six saves: in the first one, and in the last one, which ends the
# training and is written at once.
CASES: dict[str, tuple[Callable[[], Any], list[type[TrainerCallback]], int]] = {
    "plain": (lambda: GPT2LMHeadModel(config()), [], 2),
    "no generation": (classifier, [], 2),
    "a buffer and a key that is left out": (lambda: Counting(config()), [], 2),
    "a configuration that changes": (lambda: GPT2LMHeadModel(config()), [Configuring], 2),
    "weights that are untied": (lambda: GPT2LMHeadModel(config()), [Untying], 3),
    "a file of its own": (lambda: WithNotes(config()), [], 6),
    "another state_dict": (lambda: Halved(config()), [], 6),
    "shards": (sharded, [], 6),
    "adapter": (adapter, [], 0),  # peft has its own
}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
@pytest.mark.parametrize("name", CASES)
def test_the_files_are_those_of_save_pretrained(
    name: str, store: str, tmp_path: Path, latest: Copies, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, others, expected = CASES[name]
    calls, plain_save, found = [], PreTrainedModel.save_pretrained, []

    @functools.wraps(plain_save)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return plain_save(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", counted)
    for folder, spot in (("plain", []), ("spot", [SpotCallback(store, QUIET)])):
        calls.clear()
        with caplog.at_level(logging.INFO, "hf_spot"):
            settings = {"model": model, "save_steps": 1, "max_steps": 6}
            make_trainer(tmp_path / folder, *(one() for one in others), *spot, **settings).train()
        found.append(digests(tmp_path / folder))
    assert found[1] == found[0] and len(found[0]) > 6
    assert len(calls) == expected
    carried = [path.parent.parent.name for path in (tmp_path / "spot").glob("checkpoint-*/hf_spot_state/*.safetensors")]
    assert carried == [] or name == "another state_dict"  # no weight is written twice
    told = expected in (0, 6)
    assert caplog.text.count("training waits while save_pretrained prepares the model's files, because") == told
