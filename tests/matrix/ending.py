"""What a training has left in the end, apart from its seconds: state, log lines, results files, trackers' lines."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy
import torch

# Seconds of this machine, and what is divided by them: no two runs have the same.
MEASURED = ("runtime", "_per_second", "step_time")
_OF_HF_SPOT = "spot/"  # its own measurements, which nobody else has
RESULTS = ("train_results.json", "all_results.json", "trainer_state.json")
_GENERATORS = (torch.Generator, numpy.random.Generator, numpy.random.RandomState, random.Random)
_LONGEST = 70


def digest(value: Any) -> str:
    """Return a digest of a value: of all bytes of its tensors, and the states of its generators."""
    found = hashlib.sha256()
    _feed(found, value, 0)
    return found.hexdigest()[:16]


def _feed(found: Any, value: Any, depth: int) -> None:
    if isinstance(value, torch.Tensor):
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        found.update(f"{whole.dtype}{tuple(whole.shape)}".encode())
        found.update(
            whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b""
        )
    elif isinstance(value, torch.nn.Module):
        _feed(found, dict(value.state_dict()), depth)
    elif isinstance(value, _GENERATORS):
        _feed(found, _state_of(value), depth)
    elif isinstance(value, numpy.ndarray):
        found.update(f"{value.dtype}{value.shape}".encode() + numpy.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping) or hasattr(value, "keys"):
        for key in sorted(value.keys(), key=repr):
            found.update(repr(key).encode())
            _feed(found, value[key], depth)
    elif isinstance(value, Set):
        found.update(repr(sorted(map(repr, value))).encode())
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        found.update(f"[{len(value)}".encode())
        for one in value:
            _feed(found, one, depth)
    elif " at 0x" in (text := repr(value)):
        found.update(type(value).__name__.encode())
        if depth < 2 and type(value).__module__.startswith(("tests.", "__main__")):
            _feed(found, {name: one for name, one in vars(value).items() if name not in _left_out(value)}, depth + 1)
    else:
        found.update(f"{type(value).__name__} {text};".encode())


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, numpy.random.Generator):
        return generator.bit_generator.state
    return generator.get_state() if isinstance(generator, numpy.random.RandomState) else generator.getstate()


def _left_out(owner: Any) -> set[str]:
    return {name for kind in type(owner).__mro__ for name in vars(kind).get("per_launch", ())}


def ending(trainer: Any, result: Any, folder: Path) -> dict[str, Any]:
    """Return what a training has left, as JSON, by names.

    Args:
        trainer: after ``train()``.
        result: what ``train()`` returned.
        folder: its ``output_dir``, where the results files are written as scripts do it.
    """
    trainer.save_metrics("train", result.metrics)
    if trainer.args.eval_strategy != "no":
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()
    callbacks = [one for one in trainer.callback_handler.callbacks if not _is_of_library(one)]
    found = {
        "weights": {
            name: digest(value) for name, value in trainer.model.state_dict().items() if isinstance(value, torch.Tensor)
        },
        "optimizer": _leaves(getattr(trainer.optimizer, "state_dict", dict)()),
        "schedule": _leaves(getattr(trainer.lr_scheduler, "state_dict", dict)()),
        "log_history": _unmeasured(trainer.state.log_history),
        "train()": _unmeasured({"steps": result.global_step, "loss": result.training_loss, **result.metrics}),
        "callbacks": {f"{at} {type(one).__name__}": digest(one) for at, one in enumerate(callbacks)},
        "random states": digest([random.getstate(), numpy.random.get_state(), torch.get_rng_state()]),
    }
    for name in ("log_variance", "teacher", "ref_model", "train_dataset", "data_collator", "loss"):
        part = getattr(trainer, name, None)
        if part is not None:
            found[name] = digest(part)
    for name in RESULTS:
        if trainer.is_world_process_zero() and (folder / name).exists():  # which writes them
            found[name] = _unmeasured(json.loads((folder / name).read_text()))
    if isinstance(found.get("trainer_state.json"), dict):
        best = found["trainer_state.json"].get("best_model_checkpoint")
        found["trainer_state.json"]["best_model_checkpoint"] = best and Path(best).name
        # As of the newest save; and a run that can be resumed saves in the end, too.
        found["trainer_state.json"].pop("stateful_callbacks", None)
    return dict(json.loads(json.dumps(found)))


def left_by_a_command(out: Path, optimizer: Any, log_history: Any) -> dict[str, Any]:
    """Return what a command has left in its folder, as far as `ending` knows it, too.

    Args:
        out: its ``output_dir``.
        optimizer: of its last checkpoint.
        log_history: as well.
    """
    files = {name: _unmeasured(json.loads((out / name).read_text())) for name in RESULTS[:2] if (out / name).exists()}
    return {"optimizer": _leaves(optimizer), "log_history": _unmeasured(log_history), **files}


def _is_of_library(callback: Any) -> bool:
    return type(callback).__module__.partition(".")[0] in (
        "hf_spot",
        "transformers",
        "trl",
        "sentence_transformers",
    ) or hasattr(callback, "not_of_training")


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        pairs = [(f"{name}.{key}", one) for key, one in value.items()]
    elif isinstance(value, (list, tuple)):
        pairs = [(f"{name}[{at}]", one) for at, one in enumerate(value)]
    else:
        return {name: digest(value) if isinstance(value, torch.Tensor) else repr(value)}
    return {path: leaf for key, one in pairs for path, leaf in _leaves(one, key).items()}


def _unmeasured(value: Any) -> Any:
    """Leave out all seconds, at any depth."""
    if isinstance(value, Mapping):
        counted = {key: one for key, one in value.items() if not str(key).startswith(_OF_HF_SPOT)}
        return {key: _unmeasured(one) for key, one in counted.items() if not str(key).endswith(MEASURED)}
    return [_unmeasured(one) for one in value] if isinstance(value, (list, tuple)) else value


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Return the paths at which two endings differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return [
            told for key in keys for told in differences(one.get(key), other.get(key), f"{name}.{key}" if name else str(key))
        ]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [told for at, pair in enumerate(zip(one, other, strict=True)) for told in differences(*pair, f"{name}[{at}]")]
    if one == other or (one != one and other != other):
        return []
    return [f"{name}: {_brief(one)} undisturbed, {_brief(other)} interrupted"]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def tracker_lines(files: Sequence[Path]) -> list[Any]:
    """Return what a tracker shows in the end: of each step the newest line of each kind.

    Args:
        files: of `parts.Writes`, in the order of the launches.
    """
    newest: dict[str, Any] = {}
    for file in files:
        for text in file.read_text().splitlines() if file.exists() else ():
            line = _unmeasured(json.loads(text))
            newest[f"{line['step']:06} {sorted(line)}"] = line
    return [newest[key] for key in sorted(newest)]
