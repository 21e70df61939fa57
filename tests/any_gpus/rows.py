"""What is trained on several numbers of ranks: tiny models on the CPU, as a script would train them on GPUs."""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

WORDS = 60
MICRO_BATCHES = 12  # of a step: as many for each rank on 1, 2, 3 and 4 ranks
EVALUATED = 22  # samples: 11 batches, which no other number of ranks divides
EVALUATIONS = {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 2}
ROWS_OF_DATA = 100  # 50 micro-batches: the fifth step of an epoch has only two


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        make: returns the trainer for a folder, given the micro-batches of a rank.
        needs: the package that it needs.
    """

    make: Callable[[Path, int], Trainer]
    needs: str = ""


def _settings(kind: type[TrainingArguments], output_dir: Path, each: int, **more: Any) -> Any:
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": int(os.environ.get("STEPS", 10)),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": each,
        "save_steps": 3,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
    }
    return kind(**(defaults | more))


class Words(torch.utils.data.Dataset):
    """Sequences of different lengths, with a class each."""

    def __init__(self, *, classes: bool = False, augmented: bool = False) -> None:
        numbers = torch.Generator().manual_seed(3)
        lengths = torch.randint(6, 14, (ROWS_OF_DATA,), generator=numbers).tolist()
        self.rows = [torch.randint(4, WORDS, (length,), generator=numbers).tolist() for length in lengths]
        self.classes = classes
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> dict[str, Any]:
        words = list(self.rows[at])
        if self.augmented:
            words[random.randrange(len(words))] = 4 + int(numpy.random.randint(WORDS - 4))
        return {"input_ids": words, **({"labels": at % 3} if self.classes else {})}


def padded(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a batch; without classes the words themselves are to be predicted."""
    longest = max(len(one["input_ids"]) for one in samples)
    words = torch.tensor([[*one["input_ids"], *[0] * (longest - len(one["input_ids"]))] for one in samples])
    mask = (words != 0).long()
    labels = words.masked_fill(words == 0, -100)
    if "labels" in samples[0]:
        labels = torch.tensor([one["labels"] for one in samples])
    return {"input_ids": words, "attention_mask": mask, "labels": labels}


def masked(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a batch in which a quarter of the words is hidden, others each time."""
    batch = padded(samples)
    hidden = (torch.rand(batch["input_ids"].shape) < 0.25) & (batch["attention_mask"] == 1)
    batch["labels"] = batch["labels"].masked_fill(~hidden, -100)
    batch["input_ids"] = batch["input_ids"].masked_fill(hidden, 3)
    return batch


def _gpt2() -> GPT2LMHeadModel:
    set_seed(5)
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=32, n_embd=24, n_layer=2, n_head=2, pad_token_id=0))


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    set_seed(5)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=WORDS, max_position_embeddings=32, attention_dropout=0.1, pad_token_id=0, **sizes)
    )


def _bert(kind: str, **more: Any) -> Any:
    from transformers.models.bert import modeling_bert

    set_seed(5)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = modeling_bert.BertConfig(vocab_size=WORDS, max_position_embeddings=32, pad_token_id=0, **sizes, **more)
    return getattr(modeling_bert, kind)(config)


def _plain(output_dir: Path, each: int) -> Trainer:
    args = _settings(TrainingArguments, output_dir, each, include_num_input_tokens_seen="all")
    return Trainer(_gpt2(), args, train_dataset=Words(), data_collator=padded)


def _accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def _best(output_dir: Path, each: int) -> Trainer:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "save_steps": 2, "eval_steps": 2}
    args = _settings(TrainingArguments, output_dir, each, logging_steps=3, **EVALUATIONS | best)
    model, some = _bert("BertForSequenceClassification", num_labels=3), Words(classes=True)
    some.rows = some.rows[:EVALUATED]
    return Trainer(
        model,
        args,
        train_dataset=Words(classes=True),
        eval_dataset=some,
        data_collator=padded,
        compute_metrics=_accuracy,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
    )


def _mixed(output_dir: Path, each: int) -> Trainer:
    args = _settings(TrainingArguments, output_dir, each, bf16=True, gradient_checkpointing=True, max_grad_norm=0.1)
    return Trainer(_llama(), args, train_dataset=Words(), data_collator=padded)


def _masked(output_dir: Path, each: int) -> Trainer:
    args = _settings(TrainingArguments, output_dir, each, dataloader_num_workers=1, optim="adafactor")
    return Trainer(_bert("BertForMaskedLM"), args, train_dataset=Words(augmented=True), data_collator=masked)


class OwnLoss(Trainer):
    """Computes its loss itself, as a mean of each micro-batch."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        loss = torch.nn.functional.cross_entropy(logits + 0.1 * torch.randn_like(logits), labels)
        return (loss, logits) if return_outputs else loss


def _own_loss(output_dir: Path, each: int) -> Trainer:
    args = _settings(TrainingArguments, output_dir, each, train_sampling_strategy="group_by_length", weight_decay=0.1)
    model = _bert("BertForSequenceClassification", num_labels=3)
    return OwnLoss(model, args, train_dataset=Words(classes=True), data_collator=padded)


def _smoothed(output_dir: Path, each: int) -> Trainer:
    from peft import LoraConfig, get_peft_model

    args = _settings(TrainingArguments, output_dir, each, label_smoothing_factor=0.1)
    model = get_peft_model(_gpt2(), LoraConfig(r=4, lora_dropout=0.2, target_modules=["c_attn"], fan_in_fan_out=True))
    return Trainer(model, args, train_dataset=Words(), data_collator=padded)


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(3, WORDS))]
    inside = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inside.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inside, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _sentence(row: list[int]) -> str:
    return " ".join(f"w{word}" for word in row)


def _packed(output_dir: Path, each: int) -> Trainer:
    return _sft(output_dir, each, packing=True, max_length=20)


def _sft(output_dir: Path, each: int, **more: Any) -> Trainer:
    datasets, trl = importlib.import_module("datasets"), importlib.import_module("trl")
    settings = {"neftune_noise_alpha": 5.0, "max_length": 16, "logging_steps": 3, **EVALUATIONS, **more}
    args = _settings(trl.SFTConfig, output_dir, each, **settings)
    data = datasets.Dataset.from_dict({"text": [_sentence(row) for row in Words().rows]})
    some = data.select(range(EVALUATED))
    trainer: Trainer = trl.SFTTrainer(_gpt2(), args, train_dataset=data, eval_dataset=some, processing_class=_tokenizer())
    return trainer


def _dpo(output_dir: Path, each: int) -> Trainer:
    datasets, trl = importlib.import_module("datasets"), importlib.import_module("trl")
    args = _settings(trl.DPOConfig, output_dir, each, max_length=24, **EVALUATIONS)
    rows = Words().rows
    data = datasets.Dataset.from_dict(
        {
            "prompt": [_sentence(row[:3]) for row in rows],
            "chosen": [" " + _sentence(row[3:]) for row in rows],
            "rejected": [" " + _sentence(row[:2]) for row in rows],
        }
    )
    some = data.select(range(EVALUATED))
    return trl.DPOTrainer(  # type: ignore[no-any-return]
        _gpt2(), _gpt2(), args=args, train_dataset=data, eval_dataset=some, processing_class=_tokenizer()
    )


def _experts(output_dir: Path, each: int) -> Trainer:
    from transformers import MixtralConfig, MixtralForCausalLM

    set_seed(5)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": True, "attention_dropout": 0.1}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=WORDS, max_position_embeddings=32, pad_token_id=0, **sizes, **more))
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    return Trainer(
        model, _settings(TrainingArguments, output_dir, each, **checkpointing), train_dataset=Words(), data_collator=padded
    )


class OwnStep(Trainer):
    """Computes gradients and draws samples itself, as scripts do."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.WeightedRandomSampler([1.0 + at % 3 for at in range(ROWS_OF_DATA)], ROWS_OF_DATA)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        loss = model(**self._prepare_inputs(inputs)).loss / self.args.gradient_accumulation_steps
        self.accelerator.backward(loss)
        for one in model.parameters():
            one.grad.clamp_(-0.01, 0.01)
        return loss.detach()


class Noise(torch.optim.AdamW):
    """Adds random numbers to what it trains."""

    def step(self, closure: Any = None) -> Any:
        """Do a step."""
        done = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for one in group["params"]:
                    one.add_(torch.randn_like(one), alpha=1e-3)
        return done


def _own_step(output_dir: Path, each: int) -> Trainer:
    args = _settings(TrainingArguments, output_dir, each, dataloader_drop_last=True, max_grad_norm=0.0)
    model = _gpt2()
    return OwnStep(
        model, args, train_dataset=Words(), data_collator=padded, optimizers=(Noise(model.parameters(), lr=1e-2), None)
    )


def _rewarded(output_dir: Path, each: int) -> Trainer:
    datasets, trl = importlib.import_module("datasets"), importlib.import_module("trl")
    from transformers import GPT2ForSequenceClassification

    set_seed(5)
    sizes = {"n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 2}
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=WORDS, pad_token_id=0, num_labels=1, **sizes))
    args = _settings(trl.RewardConfig, output_dir, each, max_length=24, center_rewards_coefficient=0.01, **EVALUATIONS)
    rows = Words().rows
    data = datasets.Dataset.from_dict({"chosen": list(map(_sentence, rows)), "rejected": [_sentence(row[:4]) for row in rows]})
    some = data.select(range(EVALUATED))
    trainer: Trainer = trl.RewardTrainer(model, args=args, train_dataset=data, eval_dataset=some, processing_class=_tokenizer())
    return trainer


ROWS: dict[str, Row] = {
    "GPT-2 with dropout": Row(_plain),
    "Llama, bf16, checkpointing, clipping": Row(_mixed),
    "BERT, random masks, a worker": Row(_masked),
    "own loss, by length": Row(_own_loss),
    "best model of evaluations": Row(_best),
    "LoRA, label smoothing": Row(_smoothed, needs="peft"),
    "SFT with NEFTune": Row(_sft, needs="trl"),
    "SFT, packed": Row(_packed, needs="trl"),
    "DPO": Row(_dpo, needs="trl"),
    "experts, reentrant checkpointing": Row(_experts),
    "own step, sampler and optimizer": Row(_own_step),
    "reward model": Row(_rewarded, needs="trl"),
}
