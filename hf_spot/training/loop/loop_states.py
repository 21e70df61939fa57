"""The state of a custom loop as the files of a checkpoint, named as Trainer names its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from hf_spot.errors import ConfigError
from hf_spot.policy.trainings import PARAMETERS, WEIGHTS
from hf_spot.training.loop.loop_steps import inner_of
from hf_spot.training.saving.disk_errors import says_full
from hf_spot.training.saving.finite import optimized_weights, optimizer_states, trained_weights
from hf_spot.training.state.described import dtypes_of, parameters_of, weights_of
from hf_spot.training.upstream import OPTIMIZERS, ORIGINAL_MODULE, PREPARED_MODELS, REGISTERED, SCHEDULERS
from hf_spot.training.upstream.name import Name

_SHOWN = 5  # names of weights, in an error
_REGISTERED = "registered.pt"


class LoopState(Protocol):
    """What is saved and loaded, apart from random states and data loaders."""

    how_to_save: str  # other objects: for people

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the weights that are trained, and the states of their optimizers, by names for people."""

    def models(self) -> list[nn.Module]:
        """Return the models that are saved."""

    def optimizers(self) -> list[Any]:
        """Return the optimizers that are saved."""

    def others(self) -> list[Any]:
        """Return the other objects that are saved."""

    def describe(self) -> dict[str, str | None]:
        """Return named values that tell this training from others."""

    def not_saved(self) -> list[str]:
        """Return what is trained, or changes in training, and is in no checkpoint: one line each."""

    def write(self, folder: Path, *, is_main: bool) -> None:
        """Write the state. Every rank must call it."""

    def read(self, folder: Path) -> None:
        """Load the state. Every rank must call it. Raises ConfigError if it is of another training."""


class PlainState:
    """A model with its optimizer and scheduler. All ranks hold the same state (DDP), and rank 0 writes it.

    Args:
        model: the model, wrapped or not.
        optimizer: None if there is none.
        scheduler: None if there is none.
        registered: further objects with ``state_dict`` and ``load_state_dict``, in the same order in each launch.

    Raises:
        ConfigError: the model is sharded.
    """

    def __init__(self, model: nn.Module, optimizer: Any, scheduler: Any, registered: Sequence[Any] = ()) -> None:
        self._model = _unwrapped(model)
        self._registered = registered
        self.how_to_save = "manager.register(…) before load_latest"
        self._others = {"optimizer.pt": optimizer, "scheduler.pt": scheduler}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of the model that are trained, and of the optimizer."""
        yield from trained_weights(self._model)
        yield from optimizer_states(self._others["optimizer.pt"])

    def models(self) -> list[nn.Module]:
        """Return the model."""
        return [self._model]

    def optimizers(self) -> list[Any]:
        """Return the optimizer, if there is one."""
        return [one for one in [self._others["optimizer.pt"]] if one is not None]

    def others(self) -> list[Any]:
        """Return what is registered."""
        return list(self._registered)

    def describe(self) -> dict[str, str | None]:
        """Describe the model, and the settings of the optimizer that it begins with."""
        return _described(self.models(), self.optimizers())

    def not_saved(self) -> list[str]:
        """Name parameters of the optimizer that the model lacks, and a scheduler that was not passed."""
        return _not_saved(
            self.models(),
            self.optimizers(),
            [self._others["scheduler.pt"]],
            "manager.load_latest(model, optimizer, scheduler)",
        )

    def write(self, folder: Path, *, is_main: bool) -> None:
        """Write model.safetensors, optimizer.pt and scheduler.pt."""
        if not is_main:
            return
        try:
            save_model(self._model, str(folder / "model.safetensors"))
        except (RuntimeError, AttributeError, KeyError) as error:
            # safetensors can't store tensors that overlap partly, or state that is not a tensor.
            if says_full(error):
                raise
            (folder / "model.safetensors").unlink(missing_ok=True)
            torch.save(self._model.state_dict(), folder / "pytorch_model.bin")
        for name, part in self._others.items():
            torch.save(None if part is None else part.state_dict(), folder / name)
        if self._registered:
            torch.save([(type(one).__name__, one.state_dict()) for one in self._registered], folder / _REGISTERED)

    def read(self, folder: Path) -> None:
        """Load the files. They have been verified: only what this run has written is unpickled."""
        try:
            if (folder / "model.safetensors").exists():
                missing, unexpected = load_model(self._model, str(folder / "model.safetensors"), strict=False)
            else:
                state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=False)
                missing, unexpected = self._model.load_state_dict(state, strict=False)
        except RuntimeError as error:  # torch names the tensors whose shapes differ
            raise _of_another(folder, f"{type(self._model).__name__}: {error}") from error
        if missing or unexpected:
            told = [f"{what} {_some(names)}" for what, names in (("it lacks", missing), ("it has", unexpected)) if names]
            raise _of_another(folder, f"for {type(self._model).__name__} {'; '.join(told)}")
        for name, part in self._others.items():
            state = torch.load(folder / name, map_location="cpu", weights_only=False)
            if part is None:
                continue
            if state is None:
                raise _of_another(folder, f"it was saved without the state for {type(part).__name__}")
            try:
                part.load_state_dict(state)
            except (ValueError, KeyError, RuntimeError) as error:
                raise _of_another(folder, f"{type(part).__name__}: {error}") from error
        self._read_registered(folder)

    def _read_registered(self, folder: Path) -> None:
        path = folder / _REGISTERED
        states = torch.load(path, map_location="cpu", weights_only=False) if path.exists() else []
        names, kinds = [name for name, _ in states], [type(one).__name__ for one in self._registered]
        if names != kinds:
            told = [", ".join(one) or "nothing" for one in (names, kinds)]
            raise _of_another(folder, f"registered were {told[0]}, and now {told[1]}")
        for one, (name, state) in zip(self._registered, states, strict=True):
            try:
                one.load_state_dict(state)
            except (ValueError, KeyError, RuntimeError) as error:
                raise _of_another(folder, f"{name}: {error}") from error


class AcceleratorState:
    """What an ``accelerate.Accelerator`` has prepared and registered, saved by ``save_state`` and loaded by ``load_state``.

    Args:
        accelerator: has prepared the model, optimizer and scheduler.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.how_to_save = "accelerator.register_for_checkpointing(…) before load_latest"

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of the prepared optimizers and of what they train."""
        for optimizer in self.optimizers():
            yield from optimized_weights(optimizer)
            yield from optimizer_states(optimizer)

    def models(self) -> list[nn.Module]:
        """Return the prepared models."""
        return self._prepared(PREPARED_MODELS)

    def optimizers(self) -> list[Any]:
        """Return the prepared optimizers."""
        return self._prepared(OPTIMIZERS)

    def others(self) -> list[Any]:
        """Return the accelerator's gradient scaler, and what is registered with it."""
        found = [*self._prepared(REGISTERED), getattr(self._accelerator, "scaler", None)]
        return [one for one in found if one is not None]

    def describe(self) -> dict[str, str | None]:
        """Describe the prepared models, and the settings of the optimizers that they begin with."""
        return _described(self.models(), self.optimizers())

    def not_saved(self) -> list[str]:
        """Name parameters of the optimizers that the prepared models lack, and a scheduler that was not prepared."""
        how = "accelerator.prepare(model, optimizer, scheduler)"
        return _not_saved(self.models(), self.optimizers(), self._prepared(SCHEDULERS), how)

    def _prepared(self, name: Name) -> list[Any]:
        return list(name.of(self._accelerator)) if name.is_on(self._accelerator) else []

    def write(self, folder: Path, *, is_main: bool) -> None:
        """Write the files under accelerate's names."""
        self._accelerator.save_state(str(folder))
        if is_main and not any(folder.glob("scheduler*")):
            torch.save(None, folder / "scheduler.pt")

    def read(self, folder: Path) -> None:
        """Load the state into what is prepared."""
        try:
            self._accelerator.load_state(str(folder))
        except (RuntimeError, ValueError, KeyError) as error:
            raise _of_another(folder, str(error)) from error


def _described(models: list[Any], optimizers: list[Any]) -> dict[str, str | None]:
    """Return named values that tell a training from others. An optimizer of another kind than torch's has no settings."""
    settings = [getattr(one, "param_groups", None) or [{}] for one in optimizers]
    rates = [group.get("initial_lr", group.get("lr")) for groups in settings for group in groups]
    weights = [weights_of(one) for one in models]
    return {
        PARAMETERS: ", ".join(parameters_of(one) for one in models),
        WEIGHTS: None if None in weights else ", ".join(filter(None, weights)),
        "dtype": ", ".join(dtypes_of(one) for one in models),
        "optim": ", ".join(type(inner_of(one)).__name__ for one in optimizers),
        "learning_rate": ", ".join(f"{float(one):g}" for one in rates if one is not None),
    }


def _not_saved(models: list[Any], optimizers: list[Any], schedulers: list[Any], how: str) -> list[str]:
    """Return what the optimizers show to be trained, or to change, and was not handed over; ``how`` to do it."""
    known = {id(one) for model in models for one in model.parameters()}
    found = []
    for optimizer in optimizers:
        groups = getattr(optimizer, "param_groups", None) or []
        kind = type(inner_of(optimizer)).__name__
        strange = sum(id(one) not in known for group in groups for one in group["params"])
        if strange:
            found.append(
                f"{kind} trains {strange} parameters that are in no model of the checkpoint, so that a resume starts them "
                "anew: put all that is trained into one nn.ModuleDict, or use SpotCheckpointManager.for_accelerator"
            )
        if any("initial_lr" in group for group in groups) and not any(schedulers):
            found.append(f"a scheduler changes the learning rate of {kind}, and is in no checkpoint: {how}")
    return found


def _unwrapped(model: Any) -> nn.Module:
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif ORIGINAL_MODULE.is_on(model):  # torch.compile's
            model = ORIGINAL_MODULE.of(model)
        else:
            break
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"a {type(model).__name__} is not a model", hint="manager.save(model, optimizer, scheduler, step, epoch, loss)"
        )
    if any(hasattr(value, "full_tensor") for value in model.parameters()) or "FullySharded" in type(model).__name__:
        raise ConfigError(
            "the model is sharded (FSDP): one rank can't save it",
            hint="manager = SpotCheckpointManager.for_accelerator(accelerator, checkpoint_dir)",
        )
    return model


def _of_another(folder: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{folder.name} was saved from another model or optimizer: {why}",
        hint="use the model that this run began with, or another checkpoint_dir",
    )


def _some(names: Any) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:_SHOWN]) + (f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else "")
