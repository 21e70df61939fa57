"""The steps of transformers' ``run_clm.py`` and ``run_glue.py``, with their results files: ``examples.py clm|glue OPTIONS``."""

import itertools
import math
import sys
from dataclasses import dataclass

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

BLOCK = 64  # tokens


@dataclass
class What:
    """Model and data."""

    model_name_or_path: str
    train_file: str


def blocks(rows):
    """Cut the tokens of many rows into blocks of one length."""
    joined = {name: list(itertools.chain(*values)) for name, values in rows.items()}
    whole = len(joined["input_ids"]) // BLOCK * BLOCK
    cut = {name: [values[i : i + BLOCK] for i in range(0, whole, BLOCK)] for name, values in joined.items()}
    return {**cut, "labels": [list(one) for one in cut["input_ids"]]}


task = sys.argv.pop(1)
what, args = HfArgumentParser((What, TrainingArguments)).parse_args_into_dataclasses()
set_seed(args.seed)
is_clm = task == "clm"
data = load_dataset("text" if is_clm else "json", data_files={"train": what.train_file, "validation": what.train_file})
tokenizer = AutoTokenizer.from_pretrained(what.model_name_or_path)
kind = AutoModelForCausalLM if is_clm else AutoModelForSequenceClassification
model = kind.from_pretrained(what.model_name_or_path)
with args.main_process_first(desc="tokens"):
    if is_clm:
        data = data.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns=["text"]).map(blocks, batched=True)
    else:
        padded = {"padding": "max_length", "max_length": BLOCK, "truncation": True}
        data = data.map(lambda rows: tokenizer(rows["sentence1"], rows["sentence2"], **padded), batched=True)


def accuracy(predicted):
    """Return the share of labels that are right."""
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


trainer = Trainer(
    model=model,
    args=args,
    train_dataset=data["train"],
    eval_dataset=data["validation"],
    processing_class=tokenizer,
    data_collator=default_data_collator,
    compute_metrics=None if is_clm else accuracy,
)
metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
trainer.save_model()
metrics["train_samples"] = len(data["train"])
trainer.log_metrics("train", metrics)
trainer.save_metrics("train", metrics)
trainer.save_state()
metrics = trainer.evaluate()
metrics["eval_samples"] = len(data["validation"])
if is_clm:
    metrics["perplexity"] = math.exp(metrics["eval_loss"])
trainer.log_metrics("eval", metrics)
trainer.save_metrics("eval", metrics)
trainer.create_model_card(finetuned_from=what.model_name_or_path)
