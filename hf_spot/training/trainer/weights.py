"""Weights that have other names in a checkpoint than in the model.

``save_pretrained`` writes the Hub's names (mixtures of experts, vision transformers, vision-language models), and
``from_pretrained`` translates them back; Trainer's resume does not: it continues with those layers as initialised, and only
logs a warning (https://github.com/huggingface/transformers/issues/48805, seen with 5.23). Of a model to which
``add_adapter`` has added an adapter, ``save_pretrained`` writes the adapter alone, which Trainer does not look for.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import PreTrainedModel, Trainer

from hf_spot.errors import ConfigError, CorruptCheckpoint, SpotError
from hf_spot.training.data.rng import capture, capture_gpus, restore
from hf_spot.training.upstream import HAS_ADAPTER, LOAD_FROM_CHECKPOINT, LOAD_OPTIMIZER, WARN_AFTER_LOAD

log = logging.getLogger("hf_spot")

_ADAPTER = "adapter_model.safetensors"
_OF_PEFT_MODELS = "base_model.model."  # transformers writes the names that they have in a model of PEFT's


@contextmanager
def all_weights_loaded(trainer: Trainer) -> Iterator[None]:
    """Load all weights of a checkpoint at a resume within the block."""
    plain_load = LOAD_FROM_CHECKPOINT.of(trainer)

    def load(resume_from_checkpoint: str, *model: torch.nn.Module) -> None:  # sentence-transformers' method takes no model
        results: list[Any] = []
        WARN_AFTER_LOAD.set(trainer, results.append)
        trained = [(one, one.requires_grad) for one in trainer.model.parameters()]  # type: ignore[union-attr]
        target: Any = model[0] if model else trainer.model
        try:
            with _fitting("model", resume_from_checkpoint):
                if HAS_ADAPTER.is_on(target) and HAS_ADAPTER.of(target):
                    _load_adapter(target, Path(resume_from_checkpoint))
                else:
                    plain_load(resume_from_checkpoint, *model)
        finally:
            WARN_AFTER_LOAD.restore(trainer)
        for one, is_trained in trained:
            if one.requires_grad != is_trained:  # PEFT freezes all adapters but the one that it has loaded last
                one.requires_grad_(is_trained)
        for result in results:
            if result.missing_keys and result.unexpected_keys and isinstance(target, PreTrainedModel):
                _load_translated(target, resume_from_checkpoint)
            else:
                WARN_AFTER_LOAD.of(trainer)(result)

    plain_load_optimizer = LOAD_OPTIMIZER.of(trainer)

    def load_optimizer(checkpoint: str | None) -> None:
        with _fitting("optimizer", str(checkpoint)), classes_allowed(trainer.optimizer, checkpoint):
            plain_load_optimizer(checkpoint)
        if checkpoint is not None:
            _find_keys_again(trainer.optimizer)

    LOAD_FROM_CHECKPOINT.set(trainer, load)
    LOAD_OPTIMIZER.set(trainer, load_optimizer)
    try:
        yield
    finally:
        LOAD_FROM_CHECKPOINT.restore(trainer)
        LOAD_OPTIMIZER.restore(trainer)


@contextmanager
def _fitting(what: str, checkpoint: str) -> Iterator[None]:
    """Name what torch and PEFT raise within the block if this launch has built something else than was saved."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, SpotError):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            f"the {what} of this launch does not fit {Path(checkpoint).name}: {' '.join(lines[:3])}",
            hint="before train(), give the model the parameters and adapters of the checkpoint, with the same ones trained",
        ) from error


@contextmanager
def classes_allowed(optimizer: Any, checkpoint: Path | str | None) -> Iterator[None]:
    """Let torch create objects that an optimizer keeps in its state within the block: GaLore's and APOLLO's projections.

    Trainer alone loads numbers and tensors only, and fails. Classes are of the optimizer's own package, which this process has
    imported.

    Args:
        optimizer: the optimizer.
        checkpoint: folder of the checkpoint, whose files are verified; None if there is none.
    """
    file = None if checkpoint is None else Path(checkpoint, "optimizer.pt")
    if file is None or not file.is_file():
        yield
        return
    package = _package(optimizer)
    wanted = [name for name in torch.serialization.get_unsafe_globals_in_checkpoint(file) if name.partition(".")[0] == package]
    classes = [getattr(sys.modules[module], name) for module, _, name in (one.rpartition(".") for one in wanted)]
    with torch.serialization.safe_globals(classes):
        yield


def _package(optimizer: Any) -> str:
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return type(inner).__module__.partition(".")[0]


def _find_keys_again(optimizer: Any) -> None:
    """Let dictionaries that an optimizer keeps by parameter in its groups have the parameters of this launch as keys.

    A file has copies of the keys, which nobody finds: GrokAdamW would begin again. They are as the parameters are, which have
    just been loaded.
    """
    for group in getattr(optimizer, "param_groups", ()):
        for held in group.values():
            if not isinstance(held, dict) or not all(isinstance(key, torch.Tensor) for key in held):
                continue
            free = [one for one in group["params"] if one not in held]
            items = list(held.items())
            held.clear()
            for key, value in items:
                found = next((one for one in free if one.shape == key.shape and torch.equal(one.detach(), key.to(one))), key)
                free = [one for one in free if one is not found]
                held[found] = value


def _load_adapter(model: Any, checkpoint: Path) -> None:
    """Load the adapter that ``add_adapter`` has given a model of transformers."""
    import peft

    saved = safetensors.torch.load_file(checkpoint / _ADAPTER)
    state = {name.removeprefix(_OF_PEFT_MODELS): value for name, value in saved.items()}
    name = model.active_adapters()[0]
    here = peft.get_peft_model_state_dict(model, adapter_name=name)
    if {key: one.shape for key, one in here.items()} != {key: one.shape for key, one in state.items()}:
        other = sorted(here.keys() ^ state.keys()) or [key for key in here if here[key].shape != state[key].shape]
        raise ValueError(f"adapter {name!r} has other weights: {', '.join(other[:3])}{' and others' if other[3:] else ''}")
    peft.set_peft_model_state_dict(model, state, adapter_name=name)


def _load_translated(model: PreTrainedModel, checkpoint: str) -> None:
    # A dtype that holds every weight without rounding, because `from_pretrained` converts all weights to one.
    dtype = functools.reduce(torch.promote_types, {value.dtype for value in model.parameters()}, torch.bfloat16)
    before = capture() | capture_gpus()
    load: Any = type(model).from_pretrained
    loaded, told = load(checkpoint, config=model.config, dtype=dtype, output_loading_info=True)
    restore(before)
    if lost := {*told["missing_keys"], *map(str, told["mismatched_keys"])}:
        raise CorruptCheckpoint(
            f"{checkpoint} does not hold all of {type(model).__name__}; missing: {', '.join(sorted(lost)[:5])}",
            hint="is this the model that the run began with?",
        )
    model.load_state_dict(loaded.state_dict(), strict=False)
    model.tie_weights()
    log.info("translated the checkpoint's weights from the Hub's names; Trainer would have left some layers as initialised")
