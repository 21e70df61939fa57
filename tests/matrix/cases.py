"""What people train: each case makes a trainer as a script would, from a small configuration, and knows nothing of hf_spot."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.utils.data import IterableDataset
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from tests.matrix.compose import LIBRARIES, USUAL, Composition, build

SAMPLES, LENGTH, VOCABULARY = 42, 16, 64  # 42 = 10 batches of 4 and a remainder


@dataclass(frozen=True)
class Case:
    """One row of the matrix.

    Args:
        make: gives the trainer that writes to a folder, or several that a script trains one after the other; None for a command
            that is not ours.
        command: for such a one, what stands behind ``python`` (or ``hf-spot launch``) to train into a folder.
        ranks: processes; several of them under gloo.
        stops: where it is interrupted, one launch each: ``notice@5`` while step 5 is under way, ``term`` (SIGTERM to the
            launcher), ``kill`` (kill -9 of everything). A command that is not ours is interrupted as soon as that step is
            committed. Steps are counted through all trainings of a script.
        needs: packages beyond the test extra.
        impossible: why the row can't be identical; empty when it must be.
        refused: the launch must end with 2, and say this.
        quick: part of CI, with these stops alone: the other kinds are played with the same training elsewhere.
    """

    make: Callable[[Path], Trainer | Iterator[Trainer]] | None = None
    command: Callable[[Path], list[str]] | None = None
    ranks: int = 1
    stops: tuple[str, ...] = ("notice@4", "kill@15")
    needs: tuple[str, ...] = ()
    impossible: str = ""
    refused: str = ""
    quick: tuple[str, ...] = ()


CASES: dict[str, Case] = {}


def case(name: str, **about: Any) -> Callable[[Callable[[Path], Trainer]], Callable[[Path], Trainer]]:
    def add(make: Callable[[Path], Trainer]) -> Callable[[Path], Trainer]:
        CASES[name] = Case(make, **about)
        return make

    return add


def settings(output_dir: Path, kind: type[TrainingArguments] = TrainingArguments, **more: Any) -> Any:
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 3,
        "logging_steps": 1,
        "save_steps": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
        "bf16": False,
    }
    return kind(**(defaults | more))


def ids(count: int = SAMPLES, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(7))


def texts(count: int = SAMPLES, length: int = LENGTH) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part, "labels": part} for part in ids(count, length)]


def gpt2(**more: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2, **more))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    config.attention_dropout = 0.1
    config.pad_token_id = 0
    return LlamaForCausalLM(config)


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "<mask>": 3} | {f"w{i}": i for i in range(4, VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def sentences(count: int = SAMPLES, length: int = LENGTH) -> list[str]:
    chosen = random.Random(5)
    return [" ".join(f"w{word}" for word in row[: chosen.randrange(5, length)].tolist()) for row in ids(count, length)]


def plain(
    output_dir: Path, model: Any = None, data: Any = None, callbacks: Any = (), collator: Any = None, **more: Any
) -> Trainer:
    return Trainer(
        model=model or gpt2(),
        args=settings(output_dir, **more),
        train_dataset=data or texts(),
        eval_dataset=texts(8),
        data_collator=collator,
        callbacks=list(callbacks),
    )


def simple(name: str, more: dict[str, Any], **about: Any) -> None:
    CASES[name] = Case(lambda output_dir: plain(output_dir, **more), **about)


simple("GPT-2 with dropout", {}, stops=("notice@4", "term@12", "kill@18"))
simple("accumulation with a remainder", {"gradient_accumulation_steps": 4, "save_steps": 2}, stops=("notice@2", "term@4"))
simple("cosine schedule", {"lr_scheduler_type": "cosine"}, stops=("term@11",))
simple(
    "schedule that follows the loss", {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}
)
simple("Adafactor", {"optim": "adafactor"})
simple("SGD with momentum", {"optim": "sgd", "optim_args": "momentum=0.9"})
simple("noise in the embeddings (NEFTune)", {"neftune_noise_alpha": 5.0})
simple("label smoothing", {"label_smoothing_factor": 0.1}, stops=("kill@7", "kill@14"))
simple("group_by_length", {"train_sampling_strategy": "group_by_length"}, stops=("notice@4", "notice@15"))
simple("a sampler without a seed", {"accelerator_config": {"use_seedable_sampler": False}}, stops=("notice@15",))
simple("dispatched batches", {"accelerator_config": {"dispatch_batches": True}}, stops=("notice@15",))
simple("split batches", {"accelerator_config": {"split_batches": True}}, stops=("notice@15",))
simple("at the end of an epoch", {}, stops=("notice@11", "kill@13"))
simple("save_strategy epoch", {"save_strategy": "epoch"}, stops=("notice@4", "kill@16"))
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 4}
simple("best model at the end, one checkpoint kept", {**BEST, "save_total_limit": 1})
simple("save_strategy best", {**BEST, "save_strategy": "best", "learning_rate": 0.02})
simple("auto_find_batch_size", {"auto_find_batch_size": True})
simple("DataLoader workers", {"dataloader_num_workers": 2}, stops=("notice@4", "term@15"))
simple("gradient checkpointing", {"gradient_checkpointing": True})
simple("save_only_model", {"save_only_model": True}, refused="save_only_model", stops=("notice@4",))
simple(
    "ignore_data_skip",
    {"ignore_data_skip": True},
    impossible="it asks for other data; warned about at start",
    stops=("notice@4",),
)


@case("Llama in bf16")
def _(output_dir: Path) -> Trainer:
    return plain(output_dir, model=llama(), bf16=True)


@case("model_init")
def _(output_dir: Path) -> Trainer:
    return Trainer(model_init=lambda trial: gpt2(), args=settings(output_dir), train_dataset=texts())


@case("EarlyStopping", stops=("notice@6", "kill@9"))
def _(output_dir: Path) -> Trainer:
    more = {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.5, "metric_for_best_model": "loss"}
    return plain(output_dir, callbacks=[EarlyStoppingCallback(5)], **more)


class Stream(IterableDataset):
    """A stream whose end is not known before."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from texts()


@case("stream, within its first pass", stops=("notice@4", "kill@8"))
def _(output_dir: Path) -> Trainer:
    return plain(output_dir, data=Stream(), max_steps=10)


@case("stream, past its first pass", stops=("notice@15",))
def _(output_dir: Path) -> Trainer:
    return plain(output_dir, data=Stream(), max_steps=24)


def masked(length: int = LENGTH) -> tuple[Any, list[dict[str, Any]]]:
    data = [{"input_ids": part.tolist()} for part in ids(SAMPLES, length)]
    return DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.3), data


# tests/training/trainer/test_exactness.py gives notice to trainings with masked tokens.
@case("masked tokens (MLM)", quick=("kill@15",), stops=("notice@4", "kill@15"))
def _(output_dir: Path) -> Trainer:
    collator, data = masked()
    return plain(output_dir, data=data, collator=collator, eval_strategy="no")


@case("masked tokens in DataLoader workers", stops=("notice@4", "kill@15"))
def _(output_dir: Path) -> Trainer:
    collator, data = masked()
    return plain(output_dir, data=data, collator=collator, dataloader_num_workers=2)


class Augmented(torch.utils.data.Dataset):
    """Images with chance in them."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index))
        if random.random() < 0.5:
            pixels = pixels.flip(2)
        noise = torch.from_numpy(numpy.random.normal(0, 0.01, (3, 16, 16))).float()
        return {"pixel_values": pixels + noise, "labels": index % 4}


@case("ViT with augmentation")
def _(output_dir: Path) -> Trainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=16, patch_size=8, num_labels=4, hidden_dropout_prob=0.1, **sizes)
    return plain(output_dir, model=ViTForImageClassification(config), data=Augmented())


@case("BatchNorm (ResNet), accumulated", stops=("notice@4", "kill@9"))
def _(output_dir: Path) -> Trainer:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=4, layer_type="basic")
    return plain(output_dir, model=ResNetForImageClassification(config), data=Augmented(), gradient_accumulation_steps=2)


@case("Seq2SeqTrainer that generates to evaluate")
def _(output_dir: Path) -> Trainer:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes))
    more = {"predict_with_generate": True, "generation_max_length": 8, "eval_strategy": "steps", "eval_steps": 3}
    args = settings(output_dir, Seq2SeqTrainingArguments, **more)
    return Seq2SeqTrainer(model=model, args=args, train_dataset=texts(), eval_dataset=texts(4), processing_class=tokenizer())


# -- the family -------------------------------------------------------------------------------------------------------


@case("datasets, streaming and shuffled", needs=("datasets",), stops=("notice@4", "kill@8"))
def _(output_dir: Path) -> Trainer:
    from datasets import Dataset

    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids().tolist()])
    stream = data.to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=10)
    return plain(output_dir, data=stream.with_format("torch"), max_steps=10)


@case("PEFT LoRA", needs=("peft",))
def _(output_dir: Path) -> Trainer:
    from peft import LoraConfig, get_peft_model

    return plain(output_dir, model=get_peft_model(llama(), LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj"])))


@case("PEFT QLoRA, 4 bits", needs=("peft", "bitsandbytes"))
def _(output_dir: Path) -> Trainer:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    folder = output_dir.with_name(f"{output_dir.name}-base")
    llama().save_pretrained(folder)
    quantized = LlamaForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    )
    model = get_peft_model(prepare_model_for_kbit_training(quantized), LoraConfig(r=4, target_modules=["q_proj"]))
    return plain(output_dir, model=model)


def sft(output_dir: Path, **more: Any) -> Trainer:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    peft = more.pop("peft_config", None)
    args = settings(output_dir, SFTConfig, max_length=32, **more)
    data = Dataset.from_dict({"text": sentences()})
    return SFTTrainer(llama(), args=args, train_dataset=data, processing_class=tokenizer(), peft_config=peft)


TRL = {"needs": ("trl", "datasets")}
CASES["TRL SFT"] = Case(sft, **TRL)
CASES["TRL SFT with packing"] = Case(
    lambda output_dir: sft(output_dir, packing=True, num_train_epochs=4), stops=("notice@3",), **TRL
)


@case("TRL SFT with LoRA", needs=("trl", "datasets", "peft"))
def _(output_dir: Path) -> Trainer:
    from peft import LoraConfig

    return sft(output_dir, peft_config=LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj"]))


@case("TRL DPO", **TRL)
def _(output_dir: Path) -> Trainer:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    words = sentences()
    data = Dataset.from_dict({"prompt": words, "chosen": words[::-1], "rejected": words[5:] + words[:5]})
    args = settings(output_dir, DPOConfig, max_length=32)
    return DPOTrainer(llama(), llama(), args=args, train_dataset=data, processing_class=tokenizer())


@case("TRL GRPO", stops=("notice@4", "kill@9"), **TRL)
def _(output_dir: Path) -> Trainer:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], **more: Any) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    args = settings(output_dir, GRPOConfig, num_generations=2, max_completion_length=6, max_steps=12)
    data = Dataset.from_dict({"prompt": sentences()})
    return GRPOTrainer(llama(), reward_funcs=reward, args=args, train_dataset=data, processing_class=tokenizer())


@case("TRL reward model", **TRL)
def _(output_dir: Path) -> Trainer:
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(0)
    config = llama().config
    config.num_labels = 1
    words = sentences()
    data = Dataset.from_dict({"chosen": words, "rejected": words[::-1]})
    args = settings(output_dir, RewardConfig, max_length=32)
    model = LlamaForSequenceClassification(config)
    return RewardTrainer(model, args=args, train_dataset=data, processing_class=tokenizer())


def trl_sft(output_dir: Path) -> list[str]:
    base = output_dir.with_name(f"{output_dir.name}-base")
    llama().save_pretrained(base / "model")
    tokenizer().save_pretrained(base / "model")
    (base / "data").mkdir()
    lines = [json.dumps({"text": sentence}) for sentence in sentences()]
    (base / "data" / "train.jsonl").write_text("\n".join(lines))
    options = ["--model_name_or_path", base / "model", "--dataset_name", base / "data", "--output_dir", output_dir]
    options += ["--per_device_train_batch_size", 2, "--num_train_epochs", 12, "--max_length", 32, "--dtype", "float32"]
    options += ["--save_steps", 6, "--save_total_limit", 2, "--logging_steps", 1, "--use_cpu", "--bf16", "False"]
    options += ["--report_to", "none", "--disable_tqdm", "True", "--lr_scheduler_type", "cosine"]
    return ["-m", "trl.scripts.sft", *map(str, options)]


CASES["TRL's own command (trl.scripts.sft)"] = Case(command=trl_sft, stops=("notice@12", "kill@60"), **TRL)


@case("sentence-transformers", needs=("sentence_transformers", "datasets"))
def _(output_dir: Path) -> Trainer:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = output_dir.with_name(f"{output_dir.name}-base")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    words = Transformer(str(folder))
    model = SentenceTransformer(modules=[words, Pooling(16)], device="cpu")
    data = Dataset.from_dict({"anchor": sentences(), "positive": sentences()[::-1]})
    args = settings(output_dir, SentenceTransformerTrainingArguments)
    return SentenceTransformerTrainer(model, args=args, train_dataset=data, loss=MultipleNegativesRankingLoss(model))


# -- settings, in each library ----------------------------------------------------------------------------------------


COMPOSED: dict[str, Composition] = {}


def composed(name: str, stops: tuple[str, ...] = ("notice@4", "kill@9"), ranks: int = 1, **changed: Any) -> None:
    """Add a row for `USUAL` with some parts changed."""
    made = COMPOSED[name] = USUAL | changed
    needs = LIBRARIES[made["family"]]
    CASES[name] = Case(lambda output_dir: build(made, output_dir), stops=stops, ranks=ranks, needs=needs)


EVALUATED = {"strategy": "steps", "steps": 3, "on_start": False}
ON_START = {"strategy": "steps", "steps": 5, "on_start": True}
RARELY_LOGGED = {"strategy": "steps", "steps": 5, "first": False}
for library, family in {
    "Trainer": "plain",
    "PEFT": "lora",
    "TRL SFT": "sft",
    "TRL DPO": "dpo",
    "TRL GRPO": "grpo",
    "sentence-transformers": "sentences",
}.items():
    short = ("notice@3", "kill@6") if family == "grpo" else ("notice@4", "kill@9")  # it has 7 steps
    composed(f"{library}: logging_steps=5, eval_on_start", short, family=family, log=RARELY_LOGGED, eval=ON_START)
    composed(f"{library}: EMA, layers that thaw", short, family=family, callbacks=["average", "thaws"])
    composed(f"{library}: a loss that learns", short, family=family, loss="learnt")
    composed(f"{library}: best model, early stopping", short, family=family, best="stopping", eval=EVALUATED)
    in_both = ("notice@4", "kill@10", "term@12") if family == "grpo" else ("notice@4", "kill@15", "term@16")
    composed(f"{library}: two trainings", in_both, family=family, second="other data")
for library, family in {"Trainer": "plain", "PEFT": "lora", "TRL SFT": "sft", "TRL DPO": "dpo"}.items():
    composed(f"{library}: a sampler with its own generator", family=family, sampler="own generator")
    composed(f"{library}: a sampler of the script", family=family, sampler="own class", accumulation=2, stops=("notice@3",))
    composed(f"{library}: train() twice", ("notice@4", "kill@15"), family=family, second="same again")
composed("PEFT: a layer unfrozen by hand", family="lora, a layer unfrozen")
composed("PEFT: modules_to_save", family="lora, modules_to_save")
composed("TRL SFT with LoRA: log lines and EMA", family="sft, lora", log=RARELY_LOGGED, callbacks=["average"])
composed("TRL DPO: sync_ref_model", family="dpo", ahead=2)
composed("TRL GRPO: num_iterations=2, sync_ref_model", ("notice@4", "kill@6"), family="grpo", ahead=2)
composed("TRL GRPO: steps_per_generation", ("notice@4", "kill@6"), family="grpo", ahead=3)
composed("sentence-transformers: SoftmaxLoss", family="sentences", ahead=2)
composed("Trainer: a stream and workers", ("notice@4", "kill@8"), data="stream", workers=2, length="steps")
composed("TRL SFT: a stream and workers", ("notice@4", "kill@8"), family="sft", data="stream", workers=2)
for data in ("own torch", "own numpy", "own python", "levels"):
    composed(f"Trainer: data with state ({data})", data=data, collator="counting")
composed("Trainer: a momentum teacher", loss="teacher")
composed("Trainer: means of its own in log lines", loss="averaging", log=RARELY_LOGGED, eval=ON_START)
for optimizer in ("own sgd", "lookahead", "own adam", "own with schedule", "adagrad", "rmsprop"):
    composed(f"Trainer: optimizer ({optimizer})", optimizer=optimizer, accumulation=2, stops=("notice@3", "kill@5"))
for schedule in ("constant_with_warmup", "cosine_with_min_lr", "warmup_stable_decay", "inverse_sqrt", "polynomial", "greedy"):
    composed(f"Trainer: {schedule}", schedule=schedule, eval=EVALUATED)
BORDERS = ("watches", "swaps", "thaws")
composed("Trainer: callbacks at the borders of passes", ("notice@4", "kill@9"), callbacks=BORDERS, eval=EVALUATED)
composed("Trainer: the same, of a stream", ("notice@4", "kill@8"), callbacks=BORDERS, data="stream", length="steps")

# -- several ranks ----------------------------------------------------------------------------------------------------

TWO = {"ranks": 2, "stops": ("notice@3", "kill@8")}
simple("DDP", {}, quick=("kill@8",), **TWO)  # tests/launch/test_supervisor.py and test_machines.py give notice
simple("DDP, accumulated", {"gradient_accumulation_steps": 2}, ranks=2, stops=("notice@2", "term@5"))
simple("DDP, group_by_length", {"train_sampling_strategy": "group_by_length"}, **TWO)
simple("DDP, dispatched batches", {"accelerator_config": {"dispatch_batches": True}}, **TWO)
simple("DDP, a sampler without a seed", {"accelerator_config": {"use_seedable_sampler": False}}, **TWO)
simple("DDP, evaluations and the best model", {**BEST, "eval_steps": 2, "save_steps": 2}, **TWO)
TWICE = ("notice@2", "kill@5")  # of 6 steps
composed("DDP: callbacks at the borders of passes", TWICE, ranks=2, callbacks=BORDERS, eval=EVALUATED)
composed("DDP: logging_steps=5, eval_on_start", TWICE, ranks=2, log=RARELY_LOGGED, eval=ON_START)
composed("DDP: a momentum teacher", TWICE, ranks=2, loss="teacher", callbacks=["average"])
composed("DDP: data with state (own torch)", TWICE, ranks=2, data="own torch", collator="counting", callbacks=["remembers"])
composed("DDP: two trainings", ("notice@2", "kill@7"), ranks=2, second="other data")


@case("DDP, masked tokens", **TWO)
def _(output_dir: Path) -> Trainer:
    collator, data = masked()
    return plain(output_dir, data=data, collator=collator)


@case("DDP, dispatched batches, masked tokens", ranks=2, stops=("term@3", "kill@8"))
def _(output_dir: Path) -> Trainer:
    collator, data = masked()
    more = {"accelerator_config": {"dispatch_batches": True}, "dataloader_num_workers": 2}
    return plain(output_dir, data=data[:-1], collator=collator, **more)


@case("DDP, PEFT LoRA", needs=("peft",), **TWO)
def _(output_dir: Path) -> Trainer:
    from peft import LoraConfig, get_peft_model

    return plain(output_dir, model=get_peft_model(llama(), LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj"])))


@case("DDP, TRL SFT", ranks=2, needs=("trl", "datasets"), stops=("notice@3", "kill@8"))
def _(output_dir: Path) -> Trainer:
    return sft(output_dir)


composed("DDP, log lines and EMA", ("notice@2", "kill@5"), 2, log=RARELY_LOGGED, eval=ON_START, callbacks=["average"])
composed("DDP, a sampler of the script", ("notice@2", "kill@5"), 2, sampler="own class")
composed("DDP, a layer unfrozen beside LoRA", ("notice@2", "kill@5"), 2, family="lora, a layer unfrozen")
composed("DDP, two trainings", ("notice@2", "kill@8"), 2, second="other data", best="loaded", eval=EVALUATED)


def sharded(output_dir: Path, state_dict_type: str, **more: Any) -> Trainer:
    from accelerate.state import PartialState

    fsdp = {"version": 2, "state_dict_type": state_dict_type, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    fsdp["transformer_layer_cls_to_wrap"] = ["LlamaDecoderLayer"]
    args = settings(output_dir, fsdp="full_shard", fsdp_config=fsdp, **more)
    PartialState(cpu=True)
    # accelerate shards on GPUs alone; on the CPU it has to be told that this is one.
    PartialState._shared_state["distributed_type"] = "MULTI_GPU"
    return Trainer(model=llama(), args=args, train_dataset=texts())


CASES["FSDP2, sharded state"] = Case(
    lambda output_dir: sharded(output_dir, "SHARDED_STATE_DICT"),
    quick=("kill@8",),  # tests/launch/test_machines.py gives notice
    **TWO,
)
CASES["FSDP2, full state"] = Case(lambda output_dir: sharded(output_dir, "FULL_STATE_DICT"), **TWO)
CASES["FSDP2, sharded state, accumulated"] = Case(
    lambda output_dir: sharded(output_dir, "SHARDED_STATE_DICT", gradient_accumulation_steps=2),
    ranks=2,
    stops=("notice@2", "term@5"),
)
