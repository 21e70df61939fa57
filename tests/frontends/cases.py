"""The commands of `tests.frontends`, on models of a few thousand parameters, and the files that they read."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
PLAIN = HERE.parent / "training" / "scripts" / "plain.py"
ROWS = HERE.parent / "engines" / "rows.py"


@dataclass(frozen=True)
class Case:
    """A command that people type.

    Args:
        name: of the case.
        command: as it is typed, in a folder that `prepare` has filled; ``{out}`` is the folder for its results, ``{port}`` a
            free port for its ranks.
        needs: packages, by their names on PyPI.
        quick: the test suite runs it, too.
        weights: pattern of the files with the final weights, below ``{out}``.
        environ: variables that it needs besides.
        ranks: it has several, and its launcher ends the others when one of them fails.
    """

    name: str
    command: str
    needs: tuple[str, ...] = ()
    quick: bool = False
    weights: str = "*.safetensors"
    environ: Mapping[str, str] = field(default_factory=dict)
    ranks: bool = False


TRL = (
    "--model_name_or_path tiny --output_dir {out} --per_device_train_batch_size 4 --num_train_epochs 2 --save_steps 5 "
    "--logging_steps 1 --report_to none --use_cpu --learning_rate 1e-3 --seed 1"
)
EXAMPLE = (
    "--output_dir {out} --do_train --do_eval --per_device_train_batch_size 4 --num_train_epochs 2 --save_steps 5 "
    "--eval_strategy steps --eval_steps 5 --logging_steps 1 --report_to none --use_cpu --learning_rate 1e-3 --seed 1"
)
RANKS = "torchrun --master_port {port} --nproc_per_node 2"
DEEPSPEED = "deepspeed --master_port {port} --num_gpus 2"
ON_CPU = {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}  # of DeepSpeed
SCRIPT = "--output_dir {out}/train --weights {out} --step_s 0.05"

CASES = [
    Case("python", f"python plain.py {SCRIPT}"),
    Case("python-m", f"python -m plain {SCRIPT}"),
    Case("bash", f"bash train.sh {SCRIPT}"),
    Case("executable", f"./train.sh {SCRIPT}"),
    Case("torchrun", f"{RANKS} plain.py {SCRIPT}", ranks=True),
    Case("accelerate", f"accelerate launch --cpu --num_processes 1 plain.py {SCRIPT}"),
    Case("bash-torchrun", f"bash ranks.sh {{port}} {SCRIPT}"),
    Case("torchrun-fsdp2", f"{RANKS} engine.py FSDP2 {{out}}", ranks=True),
    Case("deepspeed", f"{DEEPSPEED} engine.py ZeRO-2 {{out}}", ("deepspeed",), environ=ON_CPU, ranks=True),
    Case(
        "deepspeed-zero3", f"{DEEPSPEED} engine.py 'ZeRO-3, not gathered' {{out}}", ("deepspeed",), environ=ON_CPU, ranks=True
    ),
    Case(
        "accelerate-deepspeed",
        "accelerate launch --use_deepspeed --zero_stage 2 --main_process_port {port} --num_processes 2 engine.py ZeRO-2 {out}",
        ("deepspeed",),
        environ=ON_CPU,
        ranks=True,
    ),
    Case("run-clm", f"python examples.py clm --model_name_or_path tiny --train_file texts.txt {EXAMPLE}"),
    Case("run-glue", f"python examples.py glue --model_name_or_path tiny-bert --train_file pairs.json {EXAMPLE}"),
    Case("run-clm-ranks", f"{RANKS} examples.py clm --model_name_or_path tiny --train_file texts.txt {EXAMPLE}", ranks=True),
    Case(
        "run-glue-ranks",
        f"{RANKS} examples.py glue --model_name_or_path tiny-bert --train_file pairs.json {EXAMPLE}",
        ranks=True,
    ),
    *(
        Case(f"loop-{kind}", f"{RANKS} loops.py {kind} {{out}}", ranks=True)
        for kind in ("nlp", "streams-by-shard", "streams-by-sample", "streams-dispatched", "streams-split")
    ),
    Case("loop-nlp-from-a-state", "bash resumed.sh {port} nlp {out}"),
    Case("trl-sft", f"trl sft --dataset_name ./sft --max_length 64 {TRL}", ("trl",), quick=True),
    Case("trl-sft-lora", f"trl sft --dataset_name ./sft --max_length 64 --use_peft --lora_r 4 {TRL}", ("trl", "peft")),
    Case("trl-dpo", f"trl dpo --dataset_name ./preferences {TRL}", ("trl",)),
    Case("trl-reward", f"trl reward --dataset_name ./preferences {TRL}", ("trl",)),
    Case(
        "trl-grpo",
        "trl grpo --dataset_name ./preferences --reward_funcs rewards.various --num_generations 4 --max_completion_length 8 "
        f"{TRL}",
        ("trl",),
    ),
    Case(
        "trl-sft-streaming", f"trl sft --dataset_name ./sft --dataset_streaming --max_steps 24 --max_length 64 {TRL}", ("trl",)
    ),
    Case("setfit", "python setfit_train.py {out}", ("setfit",)),
    Case("sentence-transformers-fit", "python fit.py {out}", ("sentence-transformers",)),
    Case("llamafactory", "llamafactory-cli train llamafactory.yaml output_dir={out}", ("llamafactory",)),
    Case(
        "axolotl",
        "axolotl train axolotl.yaml --output-dir {out}",
        ("axolotl",),
        environ={"CUDA_VISIBLE_DEVICES": "", "AXOLOTL_DO_NOT_TRACK": "1"},
    ),
    Case("unsloth", "python unsloth_train.py {out}", ("unsloth",), environ={"CUDA_VISIBLE_DEVICES": ""}),
    Case(
        "swift",
        "swift sft --model tiny-llama --model_type llama --template dummy --dataset ./sft.jsonl --tuner_type full "
        "--output_dir {out} --add_version false --per_device_train_batch_size 4 --gradient_accumulation_steps 1 "
        "--num_train_epochs 2 --save_steps 5 "
        "--logging_steps 1 --report_to none --use_cpu true --learning_rate 1e-3 --seed 1 --split_dataset_ratio 0 "
        "--torch_dtype float32",
        ("ms-swift",),
        weights="checkpoint-24/*.safetensors",
    ),
]

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "fast", "slow"]
MAKE_MODELS = """
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed,
)

set_seed(0)
vocabulary = {name: number for number, name in enumerate([
    "<pad>", "<eos>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()),
])}
tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
made.chat_template = "{% for one in messages %}{{ one['role'] }}: {{ one['content'] }}\\n{% endfor %}"
made.save_pretrained("tiny")
config = GPT2Config(vocab_size=len(vocabulary), n_positions=128, n_embd=32, n_layer=1, n_head=2)
config.bos_token_id = config.eos_token_id = 1
config.pad_token_id = 0
GPT2LMHeadModel(config).save_pretrained("tiny")
sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
BertModel(BertConfig(vocab_size=len(vocabulary), pad_token_id=0, **sizes)).save_pretrained("tiny-bert")
sizes["num_key_value_heads"] = 2
llama = LlamaConfig(vocab_size=len(vocabulary), pad_token_id=0, bos_token_id=1, eos_token_id=1, **sizes)
LlamaForCausalLM(llama).save_pretrained("tiny-llama")
for name in ("tiny-bert", "tiny-llama"):
    made.save_pretrained(name)
"""


def prepare(folder: Path) -> None:
    """Write data, scripts and settings; models are written by `MAKE_MODELS`, in the environment that trains."""
    chance = random.Random(0)

    def words(count: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(count))

    texts = [{"text": words(12)} for _ in range(48)]
    pairs = [{"prompt": "say ", "chosen": words(6), "rejected": words(6)} for _ in range(48)]
    instructions = [{"instruction": words(4), "input": "", "output": words(8)} for _ in range(48)]
    messages = [
        {"messages": [{"role": "user", "content": words(4)}, {"role": "assistant", "content": words(8)}]} for _ in range(48)
    ]
    sentences = [{"sentence1": words(4), "sentence2": words(4), "label": chance.randrange(2)} for _ in range(48)]
    (folder / "pairs.json").write_text("".join(json.dumps(row) + "\n" for row in sentences))
    (folder / "texts.txt").write_text("".join(words(12) + "\n" for _ in range(90)))
    for name, rows in (("sft/train", texts), ("preferences/train", pairs), ("sft", messages)):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "instructions.json").write_text(json.dumps(instructions))
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "instructions.json"}}))
    for path in (PLAIN, ROWS, *HERE.glob("scripts/*")):
        if path.is_file():
            shutil.copy(path, folder)
    (folder / "make_models.py").write_text(MAKE_MODELS)
