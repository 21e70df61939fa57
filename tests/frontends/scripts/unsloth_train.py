"""Unsloth: the whole model, on a CPU, with TRL's trainer as Unsloth has rewritten it."""

import sys

from unsloth import FastLanguageModel  # isort: skip  # before transformers and TRL
import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

model, tokenizer = FastLanguageModel.from_pretrained(
    "./tiny-llama", max_seq_length=64, dtype=torch.float32, load_in_4bit=False, full_finetuning=True
)
arguments = SFTConfig(
    output_dir=f"{sys.argv[1]}/checkpoints",
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    num_train_epochs=2,
    save_steps=5,
    logging_steps=1,
    report_to="none",
    use_cpu=True,
    learning_rate=1e-3,
    seed=1,
    dataset_text_field="text",
)
data = load_dataset("json", data_files="sft/train.jsonl", split="train")
SFTTrainer(model=model, processing_class=tokenizer, train_dataset=data, args=arguments).train()
model.save_pretrained(sys.argv[1])
