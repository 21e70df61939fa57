"""Verifies every resume: compares the state before the first step with the state at the save."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from hf_spot.errors import ConfigError
from hf_spot.policy.changes import changes_schedule, may_change_batches
from hf_spot.training.state.carried import FOLDER, CarriedState
from hf_spot.training.state.proof import Part, differences, differing_tensors, digest_of, flat, part_of
from hf_spot.training.trainer.random_states import RandomStates
from hf_spot.training.trainer.resume_fixes import counters
from hf_spot.training.trainer.weights import classes_allowed

log = logging.getLogger("hf_spot")

WEIGHTS, OPTIMIZER, SCHEDULER = "weights", "optimizer", "scheduler"
COUNTERS, STATEFUL_CALLBACKS, OWN = "counters", "callbacks", "state of the script"
RANDOM, NEXT_BATCH = "random states", "next batch"
_RANKS = "ranks"
_STATE_COUNTERS = ("global_step", "epoch", "num_input_tokens_seen", "best_metric", "best_global_step")


class Proof:
    """Records the state of the training at each save, and compares it at a resume.

    Args:
        trainer: the Trainer.
        random_states: random states of this training.
        carried: state of this training that Trainer does not save.
        on_mismatch: ``stop`` ends a resumed training that differs; ``warn`` logs the difference and continues.
    """

    def __init__(self, trainer: Trainer, random_states: RandomStates, carried: CarriedState, on_mismatch: str) -> None:
        self._trainer = trainer
        self._random_states = random_states
        self._carried = carried
        self._on_mismatch = on_mismatch
        self._name = f"proof_{trainer.args.process_index}.json"
        self._saved: dict[str, Part] | None = None
        self._wrong: list[str] = []
        self._verified: list[str] = []
        self._newest: dict[str, str] = {}

    # -- at a save ----------------------------------------------------------------------------------------------------

    def save(self, checkpoint: Path, write: Callable[[Path, str], None]) -> None:
        """Add this rank's record to a checkpoint.

        Args:
            checkpoint: folder of the checkpoint.
            write: writes text to a file, now or later.
        """
        parts = {
            _RANKS: {"count": self._trainer.args.world_size},
            SCHEDULER: part_of(flat(_scheduler(self._trainer))),
            COUNTERS: self._counters(),
            STATEFUL_CALLBACKS: self._callbacks(),
            OWN: part_of(self._carried.marks_at_save),
            RANDOM: self._random_states.digests(),
        }
        if (next_batch := self._random_states.next_batch()) is not None:
            parts[NEXT_BATCH] = next_batch
        folder = checkpoint / FOLDER
        folder.mkdir(exist_ok=True)
        write(folder / self._name, json.dumps(parts))
        self._newest = {name: digest_of(part) for name, part in parts.items()}

    @property
    def newest(self) -> dict[str, str]:
        """Return a digest for each part of the newest save on this rank."""
        return dict(self._newest)

    def _counters(self) -> Part:
        state = self._trainer.state
        return part_of({name: getattr(state, name) for name in _STATE_COUNTERS} | counters(self._trainer))

    def _callbacks(self) -> Part:
        states: dict[str, Any] = {}
        for one in self._trainer.callback_handler.callbacks:
            if isinstance(one, ExportableState):
                states.setdefault(type(one).__name__, []).append(one.state()["attributes"])
        return part_of(flat(states))

    # -- at a resume --------------------------------------------------------------------------------------------------

    def expect(self, checkpoint: Path, changed: Collection[str]) -> None:
        """Load the record of the checkpoint to compare with; checkpoints of an earlier hf_spot have none.

        Args:
            checkpoint: folder of the checkpoint.
            changed: names of settings that have changed since it was saved; what follows from them is no mismatch.
        """
        path = checkpoint / FOLDER / self._name
        if path.exists():
            saved = json.loads(path.read_text())
            if (
                saved[_RANKS]["count"] != self._trainer.args.world_size
            ):  # the ranks' random numbers are then distributed differently
                saved = {part: found for part, found in saved.items() if part not in (RANDOM, NEXT_BATCH)}
            if changes_schedule(changed):
                saved.pop(SCHEDULER, None)
            if may_change_batches(changed):
                saved.pop(NEXT_BATCH, None)
            self._saved = saved
            self._random_states.expect(saved.get(NEXT_BATCH))

    @property
    def is_expecting(self) -> bool:
        """Return whether the record of a checkpoint is loaded."""
        return self._saved is not None

    def compare_loaded(self, checkpoint: Path) -> None:
        """Compare the state after everything was loaded, including what callbacks create in ``on_train_begin``."""
        if self._saved is None:
            return
        self._compare(SCHEDULER, part_of(flat(_scheduler(self._trainer))))
        self._compare(COUNTERS, self._counters())
        self._compare_common(STATEFUL_CALLBACKS, self._callbacks())
        self._compare_common(OWN, part_of(self._carried.marks()))
        self._note(WEIGHTS, *_weights(self._trainer, checkpoint))
        self._note(OPTIMIZER, *_optimizer(self._trainer, checkpoint))

    def _compare(self, part: str, live: Part) -> None:
        assert self._saved is not None
        if part in self._saved:
            self._note(part, differences(part, self._saved[part], live), len(live))

    def _compare_common(self, part: str, live: Part) -> None:
        """Compare what both launches have: a script may pass other callbacks than before."""
        assert self._saved is not None
        saved = self._saved.get(part, {})
        self._saved[part] = {name: found for name, found in saved.items() if name in live}
        self._compare(part, {name: found for name, found in live.items() if name in saved})

    def _note(self, part: str, wrong: list[str], compared: int) -> None:
        self._wrong += wrong
        if compared and not wrong:
            self._verified.append(part)

    def conclude(self, gather: Callable[[Any], list[Any]]) -> list[str] | None:
        """Finish the comparison before the first step of a resumed training. Every rank must call it once.

        Args:
            gather: returns the values of all ranks.

        Returns:
            The parts that are the same as at the save; None if there is no record to compare with.

        Raises:
            ConfigError: something differs, and ``on_mismatch`` is ``stop``.
        """
        told = self._saved is not None
        if self._saved is not None:
            self._compare_restored(self._saved)
        self._saved = None
        # A rank that did not exist at the save has nothing to compare, but must take part in the exchange.
        wrong = [f"rank {rank}: {one}" if rank else one for rank, found in enumerate(gather(self._wrong)) for one in found]
        if wrong and self._on_mismatch == "stop":
            raise ConfigError(
                "the resumed training differs from what was saved: " + "; ".join(wrong),
                hint="report this with the output of hf-spot doctor; to resume anyway: --on-mismatch warn",
            )
        for one in wrong:
            log.warning("the resumed training differs from what was saved; training goes on: %s", one)
        return self._verified if told else None

    def _compare_restored(self, expected: dict[str, Part]) -> None:
        """Compare what is restored only when the first epoch begins."""
        if (live := self._random_states.restored_digests) is not None and RANDOM in expected:
            # Some samplers create their generator only when they are first iterated.
            saved = expected.get(RANDOM, {})
            expected[RANDOM] = {name: one for name, one in saved.items() if name in live or not name.startswith("data.")}
            self._compare(RANDOM, {name: one for name, one in live.items() if name in saved or not name.startswith("data.")})
        elif RANDOM in expected:
            self._wrong.append(f"{RANDOM}: never restored")
        drawn, batch = self._random_states.drawn_batch, expected.get(NEXT_BATCH)
        if (
            batch is not None and drawn is not None and batch.get("of") == drawn["of"]
        ):  # otherwise steps are composed differently
            self._compare(NEXT_BATCH, drawn)


def _scheduler(trainer: Trainer) -> Any:
    return {} if trainer.lr_scheduler is None else trainer.lr_scheduler.state_dict()


def _weights(trainer: Trainer, checkpoint: Path) -> tuple[list[str], int]:
    """Compare the model with the checkpoint's files, which were verified when they were restored."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.model is None:
        return [], 0
    live = dict(trainer.model.state_dict())
    adapters = sorted(checkpoint.glob("adapter_model.safetensors"))
    if adapters:
        from peft import get_peft_model_state_dict

        live = get_peft_model_state_dict(trainer.model)
    wrong: list[str] = []
    compared = 0
    for file in adapters or sorted(checkpoint.glob("model*.safetensors")):
        told, count = differing_tensors(WEIGHTS, safetensors.torch.load_file(file), live)
        wrong, compared = wrong + told, compared + count
    return wrong, compared


def _optimizer(trainer: Trainer, checkpoint: Path) -> tuple[list[str], int]:
    path = checkpoint / "optimizer.pt"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.optimizer is None or not path.exists():
        return [], 0
    with classes_allowed(trainer.optimizer, checkpoint):
        saved = flat(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
    live = flat(trainer.optimizer.state_dict())
    tensors = {name: one for name, one in saved.items() if isinstance(one, torch.Tensor)}
    wrong, compared = differing_tensors(
        OPTIMIZER, tensors, {n: one for n, one in live.items() if isinstance(one, torch.Tensor)}
    )
    rest = {name: one for name, one in saved.items() if name not in tensors}
    return wrong + differences(OPTIMIZER, part_of(rest), part_of({name: live.get(name) for name in rest})), compared + len(rest)
