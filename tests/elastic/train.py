"""A fine-tuning that tells which samples each rank has seen in each step: what the stories of `tests.elastic` disturb."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

SAMPLES = 240  # 10 steps of 24, which 1, 2 and 3 machines divide
_DIGIT = 256  # a sample begins with its number, in two tokens


class Numbered(Dataset):
    """Each sample begins with its own number."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rest = torch.Generator().manual_seed(index)
        ids = torch.cat([torch.tensor(divmod(index, _DIGIT)), torch.randint(0, 256, (30,), generator=rest)])
        return {"input_ids": ids, "labels": ids}


class Telling(Trainer):
    """Tells the numbers of the samples."""

    diary: Path

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        numbers = inputs["input_ids"][:, 0] * _DIGIT + inputs["input_ids"][:, 1]
        tell(self.diary, {"in": self.state.global_step + 1, "samples": numbers.tolist()})
        return super().compute_loss(model, inputs, *args, **kwargs)


class Diary(TrainerCallback):
    """Tells each step, and slows it down."""

    def __init__(self, diary: Path, step_s: float, slow: Path | None, hold: Path | None) -> None:
        self.diary, self.step_s, self.slow, self.hold = diary, step_s, slow, hold

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        tell(self.diary, {"step": state.global_step, "at": time.time(), "ranks": args.world_size})
        if self.slow is None or self.slow.exists():
            time.sleep(self.step_s)
        while self.hold is not None and self.hold.exists() and state.global_step > args.save_steps:
            time.sleep(0.02)

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if "loss" in logs and state.is_world_process_zero:
            tell(self.diary, {"logged": state.global_step, "loss": float(logs["loss"]), "rate": float(logs["learning_rate"])})


def tell(diary: Path, line: dict[str, Any]) -> None:
    with diary.open("a") as file:
        file.write(json.dumps(line) + "\n")


def sharded() -> dict[str, Any]:
    """The settings of FSDP2."""
    fsdp = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    return {"fsdp": "full_shard", "fsdp_config": {**fsdp, "transformer_layer_cls_to_wrap": ["GPT2Block"]}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--diary", type=Path, required=True)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--step_s", type=float, default=0.0)
    parser.add_argument("--slow", type=Path, help="a step is only slow while this file exists")
    parser.add_argument("--hold", type=Path, help="after the first step behind the first save, wait while this file exists")
    parser.add_argument("--save_steps", type=int, default=5)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--save_on_each_node", action="store_true")
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 with sharded checkpoints, if there are several ranks")
    options = parser.parse_args()
    torch.manual_seed(0)
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    heads = max(2, options.width // 64)
    config = GPT2Config(
        vocab_size=256,
        n_positions=32,
        n_embd=options.width,
        n_layer=1 if options.width < 256 else 12,
        n_head=heads,
        bos_token_id=None,
        eos_token_id=None,
        **dropout,
    )
    arguments = TrainingArguments(
        output_dir=options.output_dir,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=options.accumulation,
        num_train_epochs=options.epochs,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_steps=options.save_steps,
        save_total_limit=2,
        save_on_each_node=options.save_on_each_node,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        **(sharded() if options.fsdp else {}),
    )
    if options.fsdp:  # accelerate shards on GPUs alone; on the CPU it has to be told that this is one
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = "MULTI_GPU"
    trainer = Telling(
        model=GPT2LMHeadModel(config),
        args=arguments,
        train_dataset=Numbered(options.samples),
        callbacks=[Diary(options.diary, options.step_s, options.slow, options.hold)],
    )
    trainer.diary = options.diary
    trainer.train()


if __name__ == "__main__":
    main()
