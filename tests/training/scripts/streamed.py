"""Trains on two ranks over streams and dispatched batches: undisturbed, interrupted, resumed. Prints what they saw, as JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from hf_spot import SpotArguments, SpotCallback

RANK = int(os.environ["RANK"])
SAVED, INTERRUPTED, STEPS = 10, 12, 24  # one pass has 16 steps, of 3 samples on each rank
read: list[tuple[int, int]] = []


def samples(shards: list[int], each: int) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for number in range(each):
            read.append((shard, number))
            ids = torch.randint(64, (16,), generator=torch.Generator().manual_seed(shard * 1000 + number)).tolist()
            yield {"input_ids": ids, "labels": ids}


def stream(shards: int, each: int) -> IterableDataset:
    made = IterableDataset.from_generator(samples, gen_kwargs={"shards": list(range(shards)), "each": each})
    return made.shuffle(seed=3, buffer_size=6)


def rows(number: int) -> list[dict[str, Any]]:
    return list(samples([0], number))


class Drawing:
    """Masks at random."""

    def __call__(self, batch: list[Any]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([one["input_ids"] for one in batch])
        return {"input_ids": torch.where(torch.rand(ids.shape) < 0.1, 0, ids), "labels": ids}


DISPATCHED, DIVIDED = {"dispatch_batches": True}, {"dispatch_batches": False}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dispatched": (lambda: stream(5, 19), {"accelerator_config": DISPATCHED}),  # the last batch lacks a sample
    "dispatched, by workers": (lambda: stream(5, 19), {"accelerator_config": DISPATCHED, "dataloader_num_workers": 2}),
    "dispatched and split": (lambda: stream(5, 19), {"accelerator_config": {**DISPATCHED, "split_batches": True}}),
    "divided by sample": (lambda: stream(1, 95), {"accelerator_config": DIVIDED}),
    "divided by shard": (lambda: stream(8, 12), {"accelerator_config": DIVIDED}),
    # 95 samples: the last batch is completed with one of the first
    "of a length, drawing": (lambda: rows(95), {"accelerator_config": DISPATCHED, "data_collator": Drawing()}),
    "of a length, split, drawing": (
        lambda: rows(95),
        {"accelerator_config": {**DISPATCHED, "split_batches": True}, "data_collator": Drawing()},
    ),
    "of a length, drawing in workers": (
        lambda: rows(95),
        {
            "accelerator_config": DISPATCHED,
            "data_collator": Drawing(),
            "dataloader_num_workers": 2,
            "gradient_accumulation_steps": 2,  # two passes
        },
    ),
    "dispatched, drawing": (lambda: stream(5, 19), {"accelerator_config": DISPATCHED, "data_collator": Drawing()}),
}


class Interrupted(Exception):
    pass


class Watching(TrainerCallback):
    def __init__(self, interrupt: bool) -> None:
        self.interrupt, self.losses = interrupt, {}

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self.interrupt and state.global_step == INTERRUPTED:
            raise Interrupted

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if "loss" in logs:
            self.losses[state.global_step] = logs["loss"]


def train(kind: str, folder: Path, *, interrupt: bool = False) -> dict[str, Any]:
    make, more = KINDS[kind]
    more = dict(more)
    torch.manual_seed(0)
    shape = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0)
    collator, watching = more.pop("data_collator", None), Watching(interrupt)
    options = TrainingArguments(
        str(folder / "out"),
        max_steps=STEPS,
        save_steps=SAVED,
        per_device_train_batch_size=6 if "split" in kind else 3,
        logging_steps=1,
        use_cpu=True,
        ddp_backend="gloo",
        report_to=[],
        disable_tqdm=True,
        **more,
    )
    spot = SpotCallback(str(folder / "run"), SpotArguments(notice="none"))
    trainer = Trainer(GPT2LMHeadModel(shape), options, train_dataset=make(), data_collator=collator, callbacks=[watching, spot])
    read.clear()
    try:
        trainer.train()
    except Interrupted:
        assert interrupt
    weights = sum(float(one.double().sum()) for one in trainer.model.parameters())
    return {"losses": watching.losses, "weights": weights, "read": len(read)}


class Told(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main() -> None:
    told = Told()
    log = logging.getLogger("hf_spot")
    log.setLevel(logging.INFO)
    log.addHandler(told)
    folder = Path(sys.argv[1])
    for kind in sys.argv[2:] or KINDS:
        place = folder / kind.replace(", ", "-").replace(" ", "-")
        whole = train(kind, place / "whole")
        first = train(kind, place / "interrupted", interrupt=True)
        told.lines.clear()
        rest = train(kind, place / "interrupted")
        seen = {
            "kind": kind,
            "equal": {**first["losses"], **rest["losses"]} == whole["losses"] and rest["weights"] == whole["weights"],
            "read": [whole["read"], rest["read"]],
            "told": [line for line in told.lines if "stream" in line or "dispatch" in line],
        }
        print(json.dumps(seen), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
