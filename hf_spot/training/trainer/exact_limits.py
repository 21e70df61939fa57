"""What can't be exact on any number of GPUs, and what may not be: `SpotArguments.exact_on_any_gpus` refuses it, or names it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from hf_spot.errors import ConfigError
from hf_spot.log import warn_for_all
from hf_spot.training.state.data_side import DataSide, parts_of
from hf_spot.training.trainer.exact_metrics import METRICS_ONLY

OPTION = "--exact-on-any-gpus"
WITHOUT = f"omit {OPTION}"

_COLLECTIVE = frozenset(
    [
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_object",
        "all_gather_tensor",
        "all_reduce",
        "all_to_all",
        "all_to_all_single",
        "broadcast",
        "broadcast_object_list",
        "gather",
        "gather_object",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "scatter",
    ]
)


def refuse_what_is_not_exact(trainer: Trainer) -> None:
    """Refuse what can't be exact, before anything is trained, and name what may not be.

    Raises:
        ConfigError: something can't be exact.
    """
    args = trainer.args
    config: Any = args.accelerator_config
    own_loader = type(trainer).get_train_dataloader is not Trainer.get_train_dataloader
    stream = isinstance(trainer.train_dataset, IterableDataset)
    refused = {
        "FSDP adds gradients up in an order that depends on the ranks": trainer.is_fsdp_enabled,
        "DeepSpeed adds gradients up in an order that depends on the ranks": trainer.is_deepspeed_enabled,
        "DataParallel (several GPUs in one process) divides the batch by the number of GPUs": args.n_gpu > 1,
        "fp16's loss scale depends on overflows of single ranks": bool(args.fp16),
        "split_batches=True divides a batch by the number of ranks": bool(config.split_batches),
        "dispatch_batches=True divides batches by the number of ranks": bool(config.dispatch_batches),
        "auto_find_batch_size changes the micro-batches": bool(args.auto_find_batch_size),
        "train_sampling_strategy='batch_rebalance' divides samples by the number of ranks": (
            str(getattr(args, "train_sampling_strategy", "")) == "batch_rebalance"
        ),
        "dataloader_in_order=False makes the order of batches depend on timing": not getattr(args, "dataloader_in_order", True),
        "a dataset without a length is divided by the number of ranks at its end": stream,
        f"{type(trainer).__name__} makes batches of its own": own_loader,
        "KTO's loss uses a mean over the samples of all ranks": _is_a(trainer, "KTOTrainer")
        and getattr(trainer, "calculate_KL", True),
        "loss_type 'bco_pair' uses means over the samples of all ranks": (
            _is_a(trainer, "DPOTrainer") and "bco_pair" in (getattr(args, "loss_type", None) or ())
        ),
    }
    instead = {
        "FSDP": f"--multi_gpu in its place, or {WITHOUT}",
        "DeepSpeed": f"--multi_gpu in its place, or {WITHOUT}",
        "DataParallel": "start one process for each GPU: hf-spot launch --multi_gpu",
        "fp16": "train with bf16=True",
        "auto_find": f"per_device_train_batch_size=… that fits all machines, or {WITHOUT}",
    }
    for why, is_so in refused.items():
        if is_so:
            hint = next((hint for start, hint in instead.items() if why.startswith(start)), f"change that, or {WITHOUT}")
            raise ConfigError(f"{OPTION}: {why}", hint=hint)
    for name, module in trainer.model.named_modules():  # type: ignore[union-attr]
        if isinstance(module, torch.nn.SyncBatchNorm):
            raise ConfigError(
                f"{OPTION}: {name} is a SyncBatchNorm, whose sums depend on the ranks", hint=f"GroupNorm, or {WITHOUT}"
            )
    _name(trainer)


def _name(trainer: Trainer) -> None:
    args = trainer.args
    told = []
    collator: Any = getattr(trainer.data_collator, "data_collator", trainer.data_collator)  # in the one that removes columns
    if getattr(collator, "seed", None) is not None and hasattr(collator, "generator"):
        told.append(f"each rank's {type(collator).__name__} draws from a generator of its own, seeded by seed: omit its seed")
    if args.torch_compile or type(trainer.model).__name__ == "OptimizedModule":
        told.append(
            "torch.compile compiles other kernels for shapes that a rank has seen before: pad all batches to one length"
        )
    substeps = [
        type(one).__name__
        for one in trainer.callback_handler.callbacks
        if type(one).on_substep_end is not TrainerCallback.on_substep_end and not type(one).__module__.startswith("hf_spot.")
    ]
    if substeps:
        told.append(f"on_substep_end of {', '.join(substeps)} is called once for each micro-batch of a rank, not of the step")
    if getattr(args, "precompute_ref_log_probs", False):
        told.append(
            "precompute_ref_log_probs pads its last batch by the number of ranks, so rewards may differ in their last digits"
        )
    if own := DataSide([*parts_of(trainer.train_dataset), *parts_of(trainer.data_collator)]).names:
        told.append(
            f"the data draw from generators of their own ({', '.join(own[:3])}), which each rank uses for its batches only"
        )
    if trainer.args.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        told.append("some GPU kernels add in another order each time: set full_determinism=True")
    rows = _length(trainer.eval_dataset)
    if args.eval_strategy != "no" and rows is not None and rows % args.per_device_eval_batch_size:
        told.append(
            f"the last of {rows} evaluation samples are padded by the number of ranks, so eval metrics may differ in their "
            f"last digits: let per_device_eval_batch_size ({args.per_device_eval_batch_size}) divide {rows}"
        )
    for one in told:
        warn_for_all("%s: %s", OPTION, one)


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def _is_a(trainer: Trainer, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(trainer).__mro__)


@contextlib.contextmanager
def looking_for_collective_calls() -> Iterator[None]:
    """Name code that asks other ranks within the block, since what it is told depends on how many there are."""
    found: set[str] = set()
    before = sys.getprofile()

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name in _COLLECTIVE and _module_of(frame).startswith("torch.distributed"):
            asking = frame.f_back
            while asking is not None and _module_of(asking).partition(".")[0] in ("torch", "accelerate", "contextlib"):
                asking = asking.f_back
            if asking is not None and not _is_known(_module_of(asking)):
                found.add(f"{asking.f_code.co_name} ({asking.f_code.co_filename}:{asking.f_lineno})")

    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)
    for one in sorted(found):
        warn_for_all(
            "%s: %s asks other ranks: if a loss depends on their answers, it depends on the number of GPUs", OPTION, one
        )


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_known(module: str) -> bool:
    return module.partition(".")[0] in ("hf_spot", "transformers") or module in METRICS_ONLY
