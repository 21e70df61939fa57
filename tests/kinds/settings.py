"""Settings of `TrainingArguments`: optimizers, schedules, and others that change what a step does."""

from __future__ import annotations

from typing import Any

from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

_EACH_STEP: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1}
_OF_SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_stable_steps": 2, "num_decay_steps": 2},
    "polynomial": {"power": 2.0},
    "cosine_with_restarts": {"num_cycles": 2},
}
_NEED_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")

SETTINGS: dict[str, dict[str, Any]] = {
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "bf16": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 3},
    "no clipping": {"max_grad_norm": 0.0},
    "NEFTune": {"neftune_noise_alpha": 5},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "the best model": {**_EACH_STEP, "load_best_model_at_end": True, "metric_for_best_model": "loss"},
    "by epoch": {
        "max_steps": -1,
        "num_train_epochs": 2,
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
    },
    "the first line": {"logging_first_step": True, "logging_steps": 4},
    "an evaluation first": {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2},
    "evaluations in parts": {**_EACH_STEP, "eval_accumulation_steps": 1},
    "compiled": {"torch_compile": True},
    "the largest batch": {"auto_find_batch_size": True},
    "dropped rest": {"dataloader_drop_last": True, "per_device_train_batch_size": 5},
    "one checkpoint": {"save_total_limit": 1},
    "tokens": {"include_num_input_tokens_seen": "all"},
    "deterministic": {"full_determinism": True},
    "workers": {"dataloader_num_workers": 2},
    "persistent workers": {**_EACH_STEP, "dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    "callbacks restored by Trainer": {"restore_callback_states_from_checkpoint": True},
}
for _one in SchedulerType:
    _more = _EACH_STEP if _one.value in _NEED_EVALUATIONS else {}
    SETTINGS[f"schedule {_one.value}"] = {
        "lr_scheduler_type": _one.value,
        "lr_scheduler_kwargs": _OF_SCHEDULES.get(_one.value, {}),
        "warmup_steps": 2,
        **_more,
    }
for _optimizer in OptimizerNames:
    _targets = {"optim_target_modules": ["self_attn", "mlp"]} if _optimizer.value.startswith(("galore", "apollo")) else {}
    SETTINGS[f"optimizer {_optimizer.value}"] = {"optim": _optimizer.value, **_targets}
