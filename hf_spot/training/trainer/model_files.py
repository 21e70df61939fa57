"""Writes the model's files as ``save_pretrained`` does, without running it in the training thread.

The first save of a training runs it, and looks at what it writes: if that is one file with tensors of the model's
``state_dict`` as they are, and the configurations, later saves copy these tensors, and the writer thread writes the same
files from the copies. Before each save the tensors are compared with those of the first one: their names, types and shapes,
and which of them are the same. If they differ, ``save_pretrained`` runs again.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, Trainer

from hf_spot.training.saving.async_writer import AsyncCheckpointWriter
from hf_spot.training.upstream import SAVE_PRETRAINED, SERIALIZE_FILE, TENSOR_SPEC

log = logging.getLogger("hf_spot")

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class _Layout:
    """What a file with a model's tensors looks like.

    Args:
        tensors: type and shape of each tensor in the file, in its order, by name.
        same_as: of the other entries of the ``state_dict``, which one in the file has the same memory, by name; empty for those
            that the model says to leave out.
        metadata: of the file.
        configurations: names of the files with configurations.
    """

    tensors: dict[str, tuple[torch.dtype, torch.Size]]
    same_as: dict[str, str]
    metadata: Any
    configurations: frozenset[str]

    def fits(self, state: dict[str, torch.Tensor]) -> bool:
        """Return whether a ``state_dict`` would be written in this way."""
        if len(state) != len(self.tensors) + len(self.same_as):
            return False
        for name, (dtype, shape) in self.tensors.items():
            one = state.get(name)
            if one is None or one.dtype is not dtype or one.shape != shape or not one.is_contiguous():
                return False
        addresses = {one.data_ptr() for one in map(state.__getitem__, self.tensors) if one.numel()}
        apart = len(addresses) == sum(1 for _, shape in self.tensors.values() if shape.numel())
        return apart and all(
            name in state and (not other or _is_same(state[name], state[other])) for name, other in self.same_as.items()
        )


class ModelFiles:
    """Takes the place of a model's ``save_pretrained`` within a save.

    Args:
        trainer: the Trainer.
        behind: copies tensors, and writes files while training continues.
        note: called with the tensors by name that are written to a file.
        tell: called once with a line for people, if ``save_pretrained`` has to run in each save.
    """

    def __init__(
        self,
        trainer: Trainer,
        behind: AsyncCheckpointWriter,
        note: Callable[[dict[str, torch.Tensor]], None],
        tell: Callable[[str], None],
    ) -> None:
        self._trainer = trainer
        self._behind = behind
        self._note = note
        self._tell = tell
        self._layout: _Layout | None = None
        self._model: Any = None  # of the layout
        self._why_not: str | None = None

    @contextlib.contextmanager
    def taken_over(self) -> Iterator[None]:
        """Write the model's files later within the block, which is one of `AsyncCheckpointWriter.capturing`."""
        model: Any = self._trainer.model
        on_cpu = self._trainer.args.device.type == "cpu"  # nobody waits for what is queued on another device
        usable = SAVE_PRETRAINED.trouble() is None and SERIALIZE_FILE.trouble() is None and TENSOR_SPEC.find() is not None
        if not (hasattr(model, "save_pretrained") and on_cpu and usable) or self._why_not is not None:
            yield
            return
        self._why_not = why_unknown(model)
        if self._why_not is not None:
            self._tell(f"training waits while save_pretrained prepares the model's files, because {self._why_not}")
            yield
            return
        with SAVE_PRETRAINED.replaced(model, self._in_place_of):
            yield

    def _in_place_of(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def save_pretrained(save_directory: Any, is_main_process: bool = True, state_dict: Any = None, **more: Any) -> Any:
            model: Any = self._trainer.model
            usual = is_main_process and state_dict is None and not more
            if usual and self._layout is not None and self._model is model:
                state = model.state_dict()
                if self._layout.fits(state):
                    self._write(Path(save_directory), state, self._layout)
                    return None
            with self._learning(Path(save_directory), model) if usual else contextlib.nullcontext():
                return plain(save_directory, is_main_process=is_main_process, state_dict=state_dict, **more)

        return save_pretrained

    def _write(self, folder: Path, state: dict[str, torch.Tensor], layout: _Layout) -> None:
        model: Any = self._trainer.model
        described: Any = TENSOR_SPEC.find()
        self._note({name: state[name] for name in layout.tensors})
        specs = {}
        for name, (dtype, shape) in layout.tensors.items():
            one, kind = state[name], str(dtype).removeprefix("torch.")
            specs[name] = described(dtype=kind, shape=shape, data_ptr=one.data_ptr(), data_len=one.nbytes)
        folder.mkdir(parents=True, exist_ok=True)
        for name, attribute in ((_CONFIG, "config"), (_GENERATION, "generation_config")):
            if name in layout.configurations:  # a model that can't generate has no other one
                frozen = copy.deepcopy(getattr(model, attribute))
                self._behind.call(folder / name, lambda frozen=frozen: frozen.save_pretrained(str(folder)))  # type: ignore[misc]
        SERIALIZE_FILE.of(safetensors.torch)(specs, str(folder / _WEIGHTS), metadata=layout.metadata)

    @contextlib.contextmanager
    def _learning(self, folder: Path, model: Any) -> Iterator[None]:
        """Look at what the block writes."""
        written: list[tuple[Any, str, Any]] = []

        def noting(plain: Callable[..., Any]) -> Callable[..., Any]:
            def serialize(tensors: Any, filename: Any, metadata: Any = None) -> None:
                written.append(({name: (one.data_ptr, one.data_len) for name, one in tensors.items()}, str(filename), metadata))
                plain(tensors, filename, metadata=metadata)

            return serialize

        with SERIALIZE_FILE.replaced(safetensors.torch, noting):
            yield
        self._model, self._layout = model, None
        with self._behind.ours():
            configurations = frozenset(path.name for path in folder.iterdir() if path.name != _WEIGHTS)
        state = model.state_dict()
        if configurations <= {_CONFIG, _GENERATION} and [os.path.basename(path) for _, path, _ in written] == [_WEIGHTS]:
            tensors, _, metadata = written[0]
            left_out = getattr(model, "_keys_to_ignore_on_save", None) or ()
            self._layout = _layout_of(state, tensors, metadata, configurations, left_out)
        if self._layout is None or not self._layout.fits(state):
            self._layout, self._why_not = None, f"{type(model).__name__}'s files are not its state_dict() as it is"
            self._tell(f"training waits while save_pretrained prepares the model's files, because {self._why_not}")


def why_unknown(model: Any) -> str | None:
    """Return why it is unknown what saving a model does; None if it is known."""
    for owner, known in (
        (model, PreTrainedModel),
        (getattr(model, "config", None), PreTrainedConfig),
        (getattr(model, "generation_config", None), GenerationConfig),
    ):
        if owner is not None and getattr(owner.save_pretrained, "__func__", None) is not known.save_pretrained:
            return f"{type(owner).__name__}.save_pretrained is not that of transformers"
    return None


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.dtype is other.dtype


def _layout_of(
    state: dict[str, torch.Tensor],
    written: dict[str, tuple[int, int]],
    metadata: Any,
    configurations: frozenset[str],
    left_out: Collection[str],
) -> _Layout | None:
    """Return the layout of a file; None if it has something else than entries of the ``state_dict`` as they are.

    Args:
        state: the ``state_dict``.
        written: addresses and sizes in bytes of the tensors in the file, by name.
        metadata: of the file.
        configurations: names of the other files.
        left_out: names that the model says to leave out.
    """
    here = {
        name: (one.data_ptr(), one.nbytes)
        for name, one in state.items()
        if type(one) is torch.Tensor and one.device.type == "cpu" and one.layout is torch.strided
    }
    if len(here) != len(state) or any(here.get(name) != place for name, place in written.items()):
        return None
    by_place = {place: name for name, place in written.items()}
    left = {name: "" if name in left_out else by_place.get(place) for name, place in here.items() if name not in written}
    if any(name is None for name in left.values()):
        return None
    tensors = {name: (state[name].dtype, state[name].shape) for name in written}
    return _Layout(tensors, {name: str(other) for name, other in left.items()}, metadata, configurations)
