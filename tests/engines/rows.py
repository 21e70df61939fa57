"""What is trained with each engine: a tiny model on two ranks, on the CPU, as a script would train it on GPUs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

STOPS = ("notice@5", "kill@8")


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        make: returns the trainer, which writes to a folder.
        needs: the package that it needs.
        stops: where it is interrupted, one launch each.
        refused: the launch ends with 2, and says this.
        says: the launch says this, and a resumed one may differ.
        ranks: processes.
        later_ranks: processes of the launches behind the first one, if it is another number.
    """

    make: Callable[[Path], Trainer]
    needs: str = ""
    stops: tuple[str, ...] = STOPS
    refused: str = ""
    says: str = ""
    ranks: int = 2
    later_ranks: int = 0


def settings(output_dir: Path, **more: Any) -> TrainingArguments:
    """Return the arguments of 12 steps, saved after every third."""
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "save_steps": 3,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**(defaults | more))


def model(**more: Any) -> LlamaForCausalLM:
    """Return a model with 65 words, which two ranks can't halve."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 65, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 16}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "attention_dropout": 0.1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **more))


def data() -> list[dict[str, torch.Tensor]]:
    """Return 96 rows of 16 tokens."""
    return [
        {"input_ids": row, "labels": row} for row in torch.randint(0, 64, (96, 16), generator=torch.Generator().manual_seed(7))
    ]


# -- DeepSpeed --------------------------------------------------------------------------------------------------------


def import_deepspeed() -> None:
    """Import DeepSpeed for the CPU."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    importlib.import_module("deepspeed")


def cpu_for_deepspeed() -> None:
    """Tell accelerate and DeepSpeed that two processes without GPUs may use it, over gloo."""
    import_deepspeed()
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def device(self: Any) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.DEEPSPEED)
    PartialState.set_device = device
    # By its full name: the attribute ``torch`` of ``deepspeed.comm`` is torch itself.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]


def deepspeed(output_dir: Path, stage: int, config: dict[str, Any] | None = None, **more: Any) -> Trainer:
    """Return a training with ZeRO.

    Args:
        output_dir: where it writes.
        stage: of ZeRO.
        config: more of ``zero_optimization``.
        more: settings.
    """
    cpu_for_deepspeed()
    zero = {"stage": stage, **(config or {})}
    engine = {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it would have to be compiled
        **more.pop("engine", {}),
    }
    rows = more.pop("rows", None) or data()
    args = settings(output_dir, deepspeed=engine, optim="adamw_torch", use_cpu=False, **more)
    return Trainer(model=model(), args=args, train_dataset=rows, eval_dataset=data()[:8])


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Passes of five batches on two ranks, which two micro-batches for each step don't divide."""

    def __iter__(self) -> Any:
        return iter(data()[:20])


GATHER = {"stage3_gather_16bit_weights_on_model_save": True}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
BEST: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
DS: dict[str, Any] = {"needs": "deepspeed"}

# -- FSDP2, and what can't be resumed -----------------------------------------------------------------------------------


def _seem_like_gpus() -> None:
    """Tell accelerate, which shards on GPUs alone, that the CPU is one."""
    PartialState(cpu=True)
    PartialState._shared_state |= {"distributed_type": "MULTI_GPU", "device": torch.device("cpu")}


def offloaded(output_dir: Path) -> Trainer:
    """Return a training with FSDP2 whose parameters are on the CPU, in memory that is not pinned: there is no GPU for that."""
    CPUOffloadPolicy.__init__.__defaults__ = (False,)  # type: ignore[misc]
    return fsdp(output_dir, "full_shard offload")


def fsdp(output_dir: Path, options: str = "full_shard", state: str = "SHARDED_STATE_DICT", **more: Any) -> Trainer:
    """Return a training with FSDP2.

    Args:
        output_dir: where it writes.
        options: of ``TrainingArguments(fsdp=…)``.
        state: how its state is saved.
        more: settings.
    """
    config = {
        "version": 2,
        "state_dict_type": state,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "cpu_ram_efficient_loading": "false",
    }
    args = settings(output_dir, fsdp=options, fsdp_config=config, **more)
    _seem_like_gpus()
    return Trainer(model=model(), args=args, train_dataset=data())


def settings_and_model(output_dir: Path, parallel: ParallelismConfig) -> Trainer:
    """Return a training of which accelerate is told how to divide it."""
    args = settings(output_dir, parallelism_config=parallel)
    _seem_like_gpus()
    return Trainer(model=model(), args=args, train_dataset=data())


def divided_by_transformers(output_dir: Path) -> Trainer:
    """Return a training of a model that ``from_pretrained`` divides, with the setting that transformers demands for it."""
    from transformers.distributed import DistributedConfig

    args = settings(output_dir, save_strategy="no")
    if args.process_index == 0:
        model().save_pretrained(output_dir.with_name("model"))
    PartialState().wait_for_everyone()
    loaded = LlamaForCausalLM.from_pretrained(output_dir.with_name("model"), distributed_config=DistributedConfig(fsdp_size=2))
    return Trainer(model=loaded, args=args, train_dataset=data())


def replicated(output_dir: Path) -> Trainer:
    """Return a training with DDP."""
    return Trainer(model=model(), args=settings(output_dir), train_dataset=data())


ROWS: dict[str, Row] = {
    "DDP": Row(replicated),
    "FSDP2": Row(fsdp),
    "FSDP2, whole state": Row(lambda folder: fsdp(folder, state="FULL_STATE_DICT")),
    "FSDP2, parameters on the CPU": Row(offloaded),
    "HSDP, 2 x 2": Row(
        lambda folder: fsdp(folder, parallelism_config=ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)), ranks=4
    ),
    "DistributedConfig": Row(divided_by_transformers, refused="divided among the ranks when it was loaded"),
    "tensor parallel": Row(
        lambda folder: settings_and_model(folder, ParallelismConfig(tp_size=2)), refused="ParallelismConfig(tp_size=2)"
    ),
    "context parallel": Row(
        lambda folder: fsdp(folder, parallelism_config=ParallelismConfig(cp_size=2)), refused="ParallelismConfig(cp_size=2)"
    ),
    "ZeRO-1": Row(lambda folder: deepspeed(folder, 1), **DS),
    "ZeRO-2": Row(lambda folder: deepspeed(folder, 2, gradient_accumulation_steps=2), **DS),
    "ZeRO-3, gathered": Row(lambda folder: deepspeed(folder, 3, GATHER), **DS),
    "ZeRO-3, not gathered": Row(lambda folder: deepspeed(folder, 3), **DS),
    "ZeRO-2, optimizer on the CPU": Row(lambda folder: deepspeed(folder, 2, OFFLOADED), **DS),
    "ZeRO-3, optimizer on the CPU": Row(lambda folder: deepspeed(folder, 3, OFFLOADED | GATHER), **DS),
    "ZeRO-3, best model": Row(lambda folder: deepspeed(folder, 3, **BEST), **DS),
    "ZeRO-2, files of the older format": Row(
        lambda folder: deepspeed(folder, 2, engine={"checkpoint": {"checkpoint_serialization": False}}), **DS
    ),
    "ZeRO-2, gradients that wait at a save": Row(
        lambda folder: deepspeed(folder, 2, rows=Stream(), gradient_accumulation_steps=2, save_strategy="epoch"),
        stops=("",),
        says="gradients of micro-batches that wait for the next step can't be saved",
        **DS,
    ),
    "ZeRO-2, another number of ranks": Row(
        lambda folder: deepspeed(folder, 2),
        ranks=2,
        later_ranks=1,
        refused="among 2 ranks, and can't divide it among the 1",
        **DS,
    ),
}
