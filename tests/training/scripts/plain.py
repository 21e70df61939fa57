"""An ordinary fine-tuning script that has never heard of hf_spot: what the end-to-end tests interrupt."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments


class Bytes(Dataset):
    """Windows of this file's own text, byte by byte."""

    def __init__(self, count: int, length: int = 32) -> None:
        text = torch.tensor(list(Path(__file__).read_bytes()))
        self.windows = [text[(i * 7) % (len(text) - length) :][:length].long() for i in range(count)]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


class Diary(TrainerCallback):
    """Writes every step's loss and learning rate, and slows or holds training so that a test can hit a chosen step."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path, self.step_s, self.eval_batch_s = options.diary, options.step_s, options.eval_batch_s
        self.hold_at, self.go_on = options.hold_at, Path(options.output_dir, "go-on")

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        time.sleep(self.step_s)

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        while state.global_step == self.hold_at and not self.go_on.exists():
            time.sleep(0.02)

    def on_prediction_step(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        time.sleep(self.eval_batch_s)

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if self.path and "loss" in logs:
            line = {name: value for name, value in logs.items() if not name.startswith("spot/")}  # seconds are never the same
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": state.global_step, **line}) + "\n")


class Ballast(TrainerCallback):
    """Makes checkpoints large."""

    def __init__(self, size_mb: int) -> None:
        self.size_mb = size_mb

    def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.is_world_process_zero:
            with open(Path(args.output_dir, f"checkpoint-{state.global_step}", "ballast"), "wb") as file:
                file.write(f"{state.global_step}".encode())
                file.truncate(self.size_mb << 20)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--diary")
    parser.add_argument("--weights", required=True, help="where the final weights go")
    parser.add_argument("--step_s", type=float, default=0.0)
    parser.add_argument("--hold_at", type=int, help="after this step, wait for a file go-on in output_dir")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--eval_batch_s", type=float, default=0.0)
    parser.add_argument("--save_steps", type=int, default=5)
    parser.add_argument("--evaluate", default="no")
    parser.add_argument("--eval_steps", type=int, default=7)
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--save_on_each_node", action="store_true")
    parser.add_argument("--ballast_mb", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(0)
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), options.dropout)
    config = GPT2Config(vocab_size=256, n_positions=32, n_embd=32, n_layer=1, n_head=2, **dropout)
    arguments = TrainingArguments(
        output_dir=options.output_dir,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=options.epochs,
        learning_rate=1e-3,
        warmup_steps=4,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_steps=options.save_steps,
        save_on_each_node=options.save_on_each_node,
        eval_strategy=options.evaluate,
        eval_steps=options.eval_steps,
        save_total_limit=2,
        load_best_model_at_end=options.best,
        save_strategy="best" if options.best else "steps",
        metric_for_best_model="loss" if options.best else None,
        dataloader_num_workers=options.workers,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
    )
    trainer = Trainer(
        model=GPT2LMHeadModel(config),
        args=arguments,
        train_dataset=Bytes(122),  # 122 = 15 steps of 8 and a remainder, twice
        eval_dataset=Bytes(20),
        callbacks=[Diary(options), *([Ballast(options.ballast_mb)] if options.ballast_mb else [])],
    )
    trainer.train()
    # Must never run after a preemption: a half-trained model would be published.
    trainer.save_model(options.weights)


if __name__ == "__main__":
    main()
