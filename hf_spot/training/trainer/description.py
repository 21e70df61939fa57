"""Describes what a training trains, so that another launch knows it again and can tell what has changed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_spot.policy.trainings import FOLDER, OF_MODEL, PARAMETERS, WEIGHTS
from hf_spot.training.state.described import dtypes_of, parameters_of, weights_of
from hf_spot.training.state.sampled import digest_of, rows_of
from hf_spot.training.state.values import is_plain
from hf_spot.training.state.walk import is_of_script
from hf_spot.training.trainer.own_state import names_of_trainer
from hf_spot.training.upstream import PEFT_CONFIG

log = logging.getLogger("hf_spot")

_LONGEST = 80  # characters of a value that is kept as it is; of a longer one its digest is
# Settings that don't say what is trained: where and when something is written, measured, evaluated or shown, on which devices.
_LEFT_OUT = tuple(
    "output_dir run_name project hub_ push_to_hub log report_to disable_tqdm save_ eval_ do_ per_device_eval metric_for "  # noqa: SIM905
    "greater_is load_best include_ trackio skip_memory prediction_loss batch_eval bf16_full_eval fp16_full_eval use_cache "
    "dataloader_num_workers dataloader_p dataloader_multi dataloader_in_order dataset_num_proc remove_unused auto_find "
    "ddp_ deepspeed fsdp accelerator_config parallelism local_rank use_cpu _n_gpu vllm_ use_vllm debug "
    "torch_compile torch_empty gradient_checkpointing activation_checkpointing full_determinism "
    "resume_from restore_callback ignore_data enable_jit".split()
)
_SECRET = ("token", "password", "secret", "api_key")


def describe(trainer: Trainer, output_dir: Path) -> dict[str, str | None]:
    """Return named values that tell this training from others; None stands for a value that can't be looked at.

    Nothing is read but a sample of the weights and of the data: it takes milliseconds.

    Args:
        trainer: the Trainer, before ``train()`` does anything.
        output_dir: where this training's checkpoints are written.
    """
    every: dict[str, Any] = trainer.args.to_dict()  # type: ignore[no-untyped-call]
    settings = {name: _shown(value) for name, value in every.items() if _counts(name)}
    return {
        PARAMETERS: parameters_of(trainer.model),
        WEIGHTS: weights_of(trainer.model),
        FOLDER: output_dir.absolute().name,
        "trainer": type(trainer).__name__,
        "dtype": dtypes_of(trainer.model),
        "data": _looked_at("the training data", lambda: digest_of(trainer.train_dataset)),
        "rows": _looked_at("the length of the training data", lambda: str(rows_of(trainer.train_dataset))),
        **settings,
        **_model_settings(trainer.model),
        **_objects(trainer),
    }


def _model_settings(model: Any) -> dict[str, str]:
    """Return the plain values of a model's configuration and of its adapters': dropout, for example, changes no shape."""
    config: Any = getattr(model, "config", None)
    found = _plain_settings(OF_MODEL, config.to_dict()) if callable(getattr(config, "to_dict", None)) else {}
    if PEFT_CONFIG.is_on(model):
        for name, adapter in PEFT_CONFIG.of(model).items():
            found |= _plain_settings(f"{OF_MODEL}{name}.", adapter.to_dict())
    return found


def _plain_settings(prefix: str, values: Mapping[Any, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in values.items():
        if not isinstance(name, str) or name.startswith("_") or name.endswith(_NOT_OF_MODELS):
            continue
        if isinstance(value, dict):
            found |= _plain_settings(f"{prefix}{name}.", value)
        elif isinstance(value, (bool, int, float, str)):
            found[f"{prefix}{name}"] = _shown(str(getattr(value, "value", value)) if isinstance(value, str) else value)
    return found


# Names, places and versions; what belongs to the use of a model, or is set by what it trains on.
_NOT_OF_MODELS = (
    *("name_or_path", "version", "revision", "_token_id", "problem_type", "use_cache", "inference_mode"),
    *("dtype", "id2label", "label2id", "auto_mapping"),
)


def _looked_at(what: str, look: Callable[[], str]) -> str | None:
    """Return what ``look`` finds; None if the script's own objects raise an error, which is reported."""
    try:
        return look()
    except Exception as error:
        log.info("%s can't tell this training from others: %s: %s", what, type(error).__name__, error)
        return None


def _counts(setting: str) -> bool:
    return not setting.startswith(_LEFT_OUT) and not any(word in setting.lower() for word in _SECRET)


def _shown(value: Any) -> str:
    if isinstance(value, str) and os.path.isabs(value):
        value = Path(value).name  # another machine may have it elsewhere
    shown = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return shown if len(shown) <= _LONGEST else hashlib.sha256(shown.encode()).hexdigest()[:16]


def _objects(trainer: Trainer) -> dict[str, str | None]:
    """Return the plain values that a script has given its own objects: it may train with one value after another."""
    collator = _looked_at("the data collator", lambda: digest_of(_plain_attributes(trainer.data_collator)))
    found: dict[str, str | None] = {"collator.": collator}
    if trainer.compute_loss_func is not None:
        found["loss."] = _looked_at("the loss function", lambda: digest_of(trainer.compute_loss_func))
    if is_of_script(type(trainer)):
        own = names_of_trainer()
        values = {name: value for name, value in vars(trainer).items() if name not in own and not name.startswith("_")}
        found |= {f"trainer.{name}": _shown(value) for name, value in values.items() if isinstance(value, (bool, int, float))}
    return found


def _plain_attributes(collator: Any) -> Any:
    attributes = getattr(collator, "__dict__", None)
    return collator if not attributes else {name: value for name, value in attributes.items() if is_plain(value)}
