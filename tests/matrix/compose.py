"""Trainings composed of parts: each is a dict of plain values, so that it can be printed, drawn and repeated."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Composition = dict[str, Any]

LIBRARIES = {
    "plain": (),
    "lora": ("peft",),
    "lora, a layer unfrozen": ("peft",),
    "lora, modules_to_save": ("peft",),
    "sft": ("datasets", "trl"),
    "sft, lora": ("datasets", "trl", "peft"),
    "dpo": ("datasets", "trl"),
    "grpo": ("datasets", "trl"),
    "sentences": ("datasets", "sentence_transformers"),
}
HAVE_DATA = ("sft", "sft, lora", "dpo", "grpo", "sentences")  # whose data come with them
# What a script does that thinks of nothing special.
USUAL: Composition = {
    "family": "plain",
    "data": "rows",
    "collator": "padded",
    "sampler": "default",
    "loss": "model",
    "workers": 0,
    "persistent": False,
    "optimizer": "adamw_torch",
    "eval": {"strategy": "no", "steps": 4, "on_start": False},
    "schedule": "linear",
    "best": "",
    "saves": {"strategy": "steps", "steps": 4, "limit": None},
    "log": {"strategy": "steps", "steps": 1, "first": False},
    "accumulation": 1,
    "batch": 4,
    "length": "epochs",
    "more": [],
    "callbacks": [],
    "ahead": 1,
    "second": "",
}


def build(made: Composition, out: Path) -> Iterator[Any]:
    """Yield the trainers of a script, one after the other, as the script would make them."""
    yield (first := _trainer(made, out / "first", 22))
    if made["second"] == "other data":
        yield _trainer(made, out / "second", 17)
    elif made["second"] == "same folder":
        yield _trainer(made, out / "first", 17)
    elif made["second"] == "same again":
        yield first
    elif made["second"] == "no reseeding":
        yield _trainer(made, out / "second", 22, reseed=False)


def _trainer(made: Composition, out: Path, rows: int, reseed: bool = True) -> Any:
    import torch
    from transformers import EarlyStoppingCallback

    from tests.matrix import parts

    kinds: dict[str, Any] = {
        "average": parts.Average,
        "thaws": parts.Thaws,
        "remembers": parts.Remembers,
        "draws": parts.DrawsGlobally,
        "rate": parts.ChangesRate,
        "watches": parts.Watches,
        "swaps": parts.Swaps,
    }
    if reseed:
        torch.manual_seed(0)
    family = made["family"]
    model, kind, kind_of_args, given, more = _FAMILIES[family_of(made)](made, rows, out)
    arguments = _settings(made, rows)
    args = kind_of_args(str(out), **(arguments | more))
    callbacks: list[Any] = []
    callbacks += [kinds[name]() for name in made["callbacks"]]
    if made["best"] == "stopping":
        callbacks.append(EarlyStoppingCallback(3))
    if family not in HAVE_DATA:
        given |= {"train_dataset": _data(made, rows), "data_collator": _collator(made)}
        if made["data"] == "levels":
            callbacks.append(parts.Raises(given["train_dataset"]))
        if made["loss"] == "function":
            given["compute_loss_func"] = _loss
        if made["eval"]["strategy"] != "no":
            given["eval_dataset"] = parts.Rows(6)
    kind = _with_parts(made, kind)
    optimizer, scheduler = _optimizer(made, model)
    if optimizer is not None:
        given["optimizers"] = (optimizer, scheduler)
    return kind(model, args=args, callbacks=callbacks, **given)


def _settings(made: Composition, rows: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "per_device_train_batch_size": made["batch"],
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": made["accumulation"],
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "lr_scheduler_type": made["schedule"],
        "save_strategy": made["saves"]["strategy"],
        "save_steps": made["saves"]["steps"],
        "save_total_limit": made["saves"]["limit"],
        "logging_strategy": made["log"]["strategy"],
        "logging_steps": made["log"]["steps"],
        "logging_first_step": made["log"]["first"],
        "eval_strategy": made["eval"]["strategy"],
        "eval_steps": made["eval"]["steps"],
        "eval_on_start": made["eval"]["on_start"],
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
        "bf16": "bf16" in made["more"],
    }
    kwargs = {
        "cosine_with_min_lr": {"min_lr": 1e-4},
        "warmup_stable_decay": {"num_decay_steps": 3},
        "reduce_lr_on_plateau": {"patience": 0, "factor": 0.5},
    }
    if made["schedule"] in kwargs:
        found["lr_scheduler_kwargs"] = kwargs[made["schedule"]]
    if made["schedule"] in ("reduce_lr_on_plateau", "greedy"):
        found["metric_for_best_model"] = "loss"
    if not made["optimizer"].startswith(("own", "look")):
        found["optim"] = made["optimizer"]
    if family_of(made) == "lora":
        found["label_names"] = ["labels"]  # PEFT hides the signature that Trainer would ask
    if made["optimizer"] == "sgd":
        found["optim_args"] = "momentum=0.9"
    if made["best"]:
        found |= {"metric_for_best_model": "loss", "save_strategy": made["eval"]["strategy"]}
        found |= {"save_steps": made["eval"]["steps"], "load_best_model_at_end": made["best"] != "saved"}
        if made["best"] == "saved":
            found["save_strategy"] = "best"
    if made["length"] == "steps" or made.get("data") == "stream":
        found["max_steps"] = 9
    more = {
        "neftune": {"neftune_noise_alpha": 5.0},
        "bf16": {},
        "tokens": {"include_num_input_tokens_seen": "all"},
        "no clipping": {"max_grad_norm": 0.0},
        "drop last": {"dataloader_drop_last": True},
        "seeds": {"data_seed": 5},
    }
    for name in made["more"]:
        found |= more[name]
    if made.get("loss") == "smoothed":
        found["label_smoothing_factor"] = 0.1
    if made.get("sampler") == "unseeded":
        found["accelerator_config"] = {"use_seedable_sampler": False}
    if made.get("sampler") == "by length":
        found["train_sampling_strategy"] = "group_by_length"
    if made.get("workers"):
        found |= {"dataloader_num_workers": made["workers"], "dataloader_persistent_workers": made["persistent"]}
    return found


def family_of(made: Composition) -> str:
    """Return what trains, without its details."""
    return str(made["family"]).partition(",")[0]


def _small() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    )


def _plain(made: Composition, rows: int, out: Path) -> Any:
    from transformers import Trainer, TrainingArguments

    return _small(), Trainer, TrainingArguments, {}, {}


def _lora(made: Composition, rows: int, out: Path) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    more = {"modules_to_save": ["lm_head"]} if "modules_to_save" in made["family"] else {}
    config = LoraConfig(r=2, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True, **more)
    model: Any = get_peft_model(_small(), config)
    if "unfrozen" in made["family"]:
        model.base_model.model.transformer.h[1].ln_1.requires_grad_(True)
    return model, Trainer, TrainingArguments, {}, {}


def _sft(made: Composition, rows: int, out: Path) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.matrix.cases import llama, sentences, tokenizer

    given: dict[str, Any] = {"train_dataset": Dataset.from_dict({"text": sentences(rows)}), "processing_class": tokenizer()}
    if "lora" in made["family"]:
        from peft import LoraConfig

        given["peft_config"] = LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"])
    if made["eval"]["strategy"] != "no":
        given["eval_dataset"] = Dataset.from_dict({"text": sentences(6)})
    if made.get("data") == "stream":
        given["train_dataset"] = given["train_dataset"].to_iterable_dataset(num_shards=2)
    return llama(), SFTTrainer, SFTConfig, given, {"max_length": 16}


def _dpo(made: Composition, rows: int, out: Path) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from tests.matrix.cases import llama, sentences, tokenizer

    words = sentences(rows)
    data = Dataset.from_dict({"prompt": words, "chosen": words[::-1], "rejected": words[5:] + words[:5]})
    given = {"ref_model": llama(), "train_dataset": data, "processing_class": tokenizer()}
    if made["eval"]["strategy"] != "no":
        given["eval_dataset"] = data.select(range(4))
    more = {"max_length": 24, "sync_ref_model": made["ahead"] > 1, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    return llama(), DPOTrainer, DPOConfig, given, more


def _grpo(made: Composition, rows: int, out: Path) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from tests.matrix.cases import llama, sentences, tokenizer

    data = Dataset.from_dict({"prompt": sentences(rows)})
    given = {"reward_funcs": _reward, "train_dataset": data, "processing_class": tokenizer()}
    if made["eval"]["strategy"] != "no":
        given["eval_dataset"] = data.select(range(2))
    more = {"num_generations": 2, "max_completion_length": 4, "num_iterations": made["ahead"], "max_steps": 7}
    more |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "log_completions": False}
    if made["ahead"] == 3:
        more |= {"num_iterations": 1, "steps_per_generation": 2 * made["accumulation"]}
    model = llama()
    if made["ahead"] == 2:
        more |= {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2}
        model.config._name_or_path = str(out.with_name(f"{out.name}-base"))  # where the reference model is loaded from
        model.save_pretrained(model.config._name_or_path)
    return model, GRPOTrainer, GRPOConfig, given, more


def _reward(completions: list[str], **more: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def _sentences(made: Composition, rows: int, out: Path) -> Any:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss, SoftmaxLoss
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel

    from tests.matrix.cases import VOCABULARY, sentences, tokenizer

    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        BertModel(BertConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        model = SentenceTransformer(modules=[Transformer(folder), Pooling(16)], device="cpu")
    columns: dict[str, Any] = {"anchor": sentences(rows), "positive": sentences(rows)[::-1]}
    loss: Any = MultipleNegativesRankingLoss(model)
    if made["ahead"] > 1:
        columns["label"] = [at % 3 for at in range(rows)]
        loss = SoftmaxLoss(model, sentence_embedding_dimension=16, num_labels=3)
    data = Dataset.from_dict(columns)
    given: dict[str, Any] = {"train_dataset": data, "loss": loss}
    if made["eval"]["strategy"] != "no":
        given["eval_dataset"] = data.select(range(4))
    return model, SentenceTransformerTrainer, SentenceTransformerTrainingArguments, given, {}


_FAMILIES: dict[str, Callable[[Composition, int, Path], Any]] = {
    "plain": _plain,
    "lora": _lora,
    "sft": _sft,
    "dpo": _dpo,
    "grpo": _grpo,
    "sentences": _sentences,
}


def _with_parts(made: Composition, trainer: Any) -> Any:
    from tests.matrix import parts

    samplers: dict[str, list[Any]] = {"own generator": [parts.OwnGenerator], "own class": [parts.OwnSampler]}
    losses: dict[str, list[Any]] = {
        "learnt": [parts.LearntLoss],
        "teacher": [parts.Teacher],
        "averaging": [parts.Averaging],
    }
    bases = [*samplers.get(made.get("sampler", ""), []), *losses.get(made.get("loss", ""), [])]
    return type("Composed", (*bases, trainer), {"__module__": parts.__name__}) if bases else trainer


def _loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    import torch

    count = num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum()
    logits = outputs.logits[:, :-1].reshape(-1, outputs.logits.shape[-1])
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum") / count


def _data(made: Composition, rows: int) -> Any:
    import random

    import numpy
    import torch

    from tests.matrix import parts

    name = made["data"]
    if name == "shuffled stream":
        from datasets import Dataset

        listed = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in parts.Rows(rows).rows]
        stream = Dataset.from_list(listed).to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=6)
        return stream.with_format("torch")
    makers: dict[str, Callable[[], Any]] = {
        "rows": lambda: parts.Rows(rows),
        "own torch": lambda: parts.Drawing(rows, torch.Generator().manual_seed(3)),
        "own numpy": lambda: parts.Drawing(rows, numpy.random.default_rng(3)),
        "own python": lambda: parts.Drawing(rows, random.Random(3)),
        "global": lambda: parts.Drawing(rows, None),
        "levels": lambda: parts.Levels(rows),
        "stream": lambda: parts.Stream(rows),
    }
    return makers[name]()


def _collator(made: Composition) -> Any:
    from tests.matrix import parts

    return {"padded": parts.Padded, "counting": parts.Counting, "masking": parts.Masking}[made["collator"]]()


def _optimizer(made: Composition, model: Any) -> tuple[Any, Any]:
    import torch

    from tests.matrix import parts

    trained = [one for one in model.parameters() if one.requires_grad]
    if made["optimizer"] == "own sgd":
        return torch.optim.SGD(trained, 1e-2, momentum=0.9), None
    if made["optimizer"] == "lookahead":
        return parts.Lookahead(trained), None
    if made["optimizer"] == "own adam":
        return torch.optim.Adam(trained, 1e-2, amsgrad=True), None
    if made["optimizer"] == "own with schedule":
        optimizer = torch.optim.NAdam(trained, 1e-2)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=60)
    return None, None
