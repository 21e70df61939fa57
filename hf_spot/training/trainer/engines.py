"""Engines that divide a model among ranks: DeepSpeed, FSDP, and what transformers and accelerate offer besides."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from hf_spot.errors import ConfigError
from hf_spot.log import warn_for_all
from hf_spot.policy.resize import Batches, divided_otherwise
from hf_spot.training.upstream import CHECKPOINT_ENGINE, PEFT_CONFIG

_INSTEAD = "shard it with TrainingArguments(fsdp='full_shard') or DeepSpeed instead, which hf_spot saves and resumes exactly"


def refuse_what_can_not_be_resumed(trainer: Trainer) -> None:
    """Refuse, before anything is trained, what Trainer can't save and resume exactly: how the model is divided, and settings.

    Args:
        trainer: the Trainer, before ``train()`` does anything.

    Raises:
        ConfigError: the model is divided in such a way, or there is such a setting.
    """
    _refuse_settings(trainer.args)
    if PEFT_CONFIG.is_on(trainer.model) and any(_is_adalora(one) for one in PEFT_CONFIG.of(trainer.model).values()):
        warn_for_all(
            "AdaLoRA's checkpoints leave out the ranks that update_and_allocate() has dropped, and PEFT can't load them into a "
            "model that begins with all ranks: a training that has dropped some can't be resumed. Use LoRA on machines that "
            "may be taken away"
        )
    if divided := divided_otherwise(trainer.accelerator.parallelism_config):
        raise ConfigError(
            f"{divided}: Trainer can't save and resume tensor, context and sequence parallel "
            "trainings exactly (https://github.com/huggingface/transformers/issues/48569)",
            hint=_INSTEAD,
        )
    if trainer.is_deepspeed_enabled and (size := _autotp_size(trainer)) > 1:
        raise ConfigError(
            f'DeepSpeed\'s "tensor_parallel": {{"autotp_size": {size}}} can\'t be resumed exactly',
            hint='use ZeRO ("zero_optimization") instead',
        )
    if not trainer.is_fsdp_enabled and trainer.model is not None and any(map(_is_divided, trainer.model.parameters())):
        raise ConfigError(
            "the model was divided among the ranks when it was loaded (DistributedConfig, tp_plan): Trainer can't resume its "
            "optimizer",
            hint=_INSTEAD,
        )


def _refuse_settings(args: TrainingArguments) -> None:
    if args.save_only_model:
        raise ConfigError(
            "TrainingArguments(save_only_model=True) leaves nothing to resume from", hint="set save_only_model=False"
        )
    if getattr(args, "enable_jit_checkpoint", False):
        raise ConfigError(
            "TrainingArguments(enable_jit_checkpoint=True) and SpotCallback would both handle SIGTERM",
            hint="set enable_jit_checkpoint=False",
        )
    if args.ignore_data_skip:
        warn_for_all("ignore_data_skip=True: a resumed run trains on other data than an uninterrupted one; set it to False")


def refuse_other_ranks(trainer: Trainer, before: Batches, now: Batches) -> None:
    """Refuse to resume with another number of ranks what DeepSpeed has divided among them.

    Args:
        trainer: the Trainer, about to resume.
        before: the batches of the checkpoint.
        now: the batches of this launch.

    Raises:
        ConfigError: the number of ranks is another one, and ZeRO's state depends on it.
    """
    if trainer.is_deepspeed_enabled and before.world_size != now.world_size and _zero_stage(trainer):
        raise ConfigError(
            f"DeepSpeed has divided the optimizer of this run's checkpoint among {before.world_size} ranks, and can't divide "
            f"it among the {now.world_size} of this launch",
            hint=f"start it with {before.world_size} ranks again: --num_processes {before.world_size} of hf-spot launch or "
            f"accelerate, --num_gpus {before.world_size} of deepspeed, --nproc_per_node {before.world_size} of torchrun",
        )


def why_written_at_once(trainer: Trainer) -> str | None:
    """Return why the files of an engine can't be written while the training continues; None if they can."""
    if not trainer.is_deepspeed_enabled:
        return None
    engine: Any = trainer.model_wrapped
    if not CHECKPOINT_ENGINE.is_on(engine):
        return None  # the training has not begun
    writer = type(CHECKPOINT_ENGINE.of(engine)).__name__
    if writer != "TorchCheckpointEngine":
        return f"DeepSpeed's {writer} writes the files itself"
    if engine.zero_nvme_offload_optimizer():
        return "DeepSpeed copies the files of an optimizer on NVMe"
    return None


def _zero_stage(trainer: Trainer) -> int:
    return int(trainer.accelerator.state.deepspeed_plugin.zero_stage)


def _autotp_size(trainer: Trainer) -> int:
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    return int((config.get("tensor_parallel") or {}).get("autotp_size") or 0)


def _is_adalora(config: Any) -> bool:
    return str(getattr(config.peft_type, "value", config.peft_type)) == "ADALORA"


def _is_divided(parameter: Any) -> bool:
    return isinstance(parameter, DTensor) or isinstance(parameter.data, DTensor)
