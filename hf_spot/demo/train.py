"""An ordinary Trainer script: a small GPT-2 learns, byte by byte, the English text of Python's built-in help.

It does not use hf_spot. `hf-spot demo` runs it with interruptions under ``hf-spot launch`` and without under plain ``python``,
and compares. Try it yourself: ``python train.py --output_dir out``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

LENGTH = 64  # bytes the model sees at once
WINDOWS = 1757  # one epoch: 110 optimizer steps of 2 times 8 windows; the last step has fewer


class Text(Dataset[dict[str, torch.Tensor]]):
    """Windows of Python's help texts; a byte is a token."""

    def __init__(self) -> None:
        self.text = "\n".join(topics[name] for name in sorted(topics)).encode()[: WINDOWS * LENGTH]

    def __len__(self) -> int:
        return len(self.text) // LENGTH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = torch.tensor(list(self.text[index * LENGTH :][:LENGTH]))
        return {"input_ids": window, "labels": window}


class LossFile(TrainerCallback):
    """Appends every step's loss and learning rate to a file as a line of JSON."""

    def __init__(self, path: Path, min_step_s: float) -> None:
        self.path = path
        self.min_step_s = min_step_s
        self.began = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record when the step begins."""
        self.began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Wait until the step has taken ``min_step_s``."""
        time.sleep(max(0.0, self.began + self.min_step_s - time.monotonic()))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append the line of a step."""
        if logs and "loss" in logs:
            line = {"step": state.global_step, "loss": logs["loss"], "learning_rate": logs["learning_rate"]}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def main() -> None:
    """Train, and save the finished model in ``OUTPUT_DIR/final``."""
    parser = argparse.ArgumentParser(description="Train a tiny GPT-2 on Python's help texts.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--losses", type=Path, default=Path("losses.jsonl"), metavar="FILE")
    parser.add_argument("--min_step_s", type=float, default=0.0, help="minimum seconds of a step, to imitate a larger model")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=96, n_layer=2, n_head=4)  # dropout is 0.1
    trainer = Trainer(
        model=GPT2LMHeadModel(config),
        args=TrainingArguments(
            output_dir=str(options.output_dir),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            num_train_epochs=options.epochs,
            learning_rate=3e-3,
            warmup_steps=20,
            lr_scheduler_type="cosine",
            logging_steps=1,
            save_steps=20,
            save_total_limit=2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=7,
        ),
        train_dataset=Text(),
        callbacks=[LossFile(options.losses, options.min_step_s)],
    )
    trainer.train()
    trainer.save_model(str(options.output_dir / "final"))


if __name__ == "__main__":
    main()
