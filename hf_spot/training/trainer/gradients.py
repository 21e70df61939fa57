"""Gradients that wait for more micro-batches when a checkpoint is saved.

A pass over a stream may end between two optimizer steps. Trainer keeps the gradients of the micro-batches that are left over,
and the first step of the next pass adds to them. No checkpoint of Trainer contains gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from transformers import Trainer

from hf_spot.log import warn_for_all
from hf_spot.training.state.carried import FOLDER

log = logging.getLogger("hf_spot")


class WaitingGradients:
    """Saves and restores the gradients that wait at a save. Each rank has its own: they are not averaged yet.

    Args:
        trainer: the Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._waited = self._abandoned = self._told = False

    def pass_begins(self, resumed: Path | None) -> None:
        """Restore the gradients of a checkpoint, and note whether the pass begins with some.

        Args:
            resumed: the checkpoint, if this is the first pass after a resume.
        """
        if resumed is not None:
            self._restore(resumed)
        self._waited = any(True for _ in self._waiting())

    @property
    def in_step(self) -> bool:
        """Return whether the step under way adds to gradients that waited. It began before the pass."""
        return self._waited

    def step_ended(self) -> None:
        """Note that an optimizer step has used the gradients that waited."""
        self._waited = False

    def abandon_step(self) -> None:
        """Save no gradients any more: those that are there belong to the abandoned step."""
        self._abandoned = True

    def save(self, checkpoint: Path) -> None:
        """Add the gradients that wait to a checkpoint."""
        waiting = {} if self._abandoned else dict(self._waiting())
        if not waiting:
            return
        if not self._told:
            self._told = True
            log.info("gradients of micro-batches that wait for the next step are saved, too")
        (checkpoint / FOLDER).mkdir(exist_ok=True)
        safetensors.torch.save_file(
            {name: value.contiguous() for name, value in waiting.items()}, checkpoint / FOLDER / self._name
        )

    @property
    def _name(self) -> str:
        return f"gradients_{self._trainer.args.process_index}.safetensors"

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._trainer.model is not None:
            yield from self._trainer.model.named_parameters()

    def _waiting(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._trainer.is_deepspeed_enabled and not self._trainer.accelerator.sync_gradients:
            self._tell_not_saved()  # DeepSpeed has them in places of its own
        for name, weight in self._weights():
            if weight.grad is None:
                continue
            if hasattr(weight.grad, "to_local") or weight.grad.layout is not torch.strided:
                self._tell_not_saved()
            elif weight.grad.any():
                yield name, weight.grad.detach()

    def _tell_not_saved(self) -> None:
        if not self._told:
            self._told = True
            warn_for_all(
                "gradients of micro-batches that wait for the next step can't be saved, as they are sparse, DeepSpeed's or "
                "divided among ranks: a resumed run differs there; for exact results let gradient_accumulation_steps divide "
                "the batches of a pass"
            )

    def _restore(self, checkpoint: Path) -> None:
        path = checkpoint / FOLDER / self._name
        if not path.exists():
            if any((checkpoint / FOLDER).glob("gradients_*")):
                warn_for_all("gradients that waited at the save are those of other ranks: results will not be bit-exact")
            return
        saved = safetensors.torch.load_file(path)
        for name, weight in self._weights():
            if name in saved:
                weight.grad = saved[name].to(weight.device)
