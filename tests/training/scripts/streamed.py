"""Trains on two ranks over streams and dispatched batches: undisturbed, interrupted, resumed. Prints what they saw, as JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from datasets import IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from hf_spot import SpotArguments, SpotCallback, SpotCheckpointManager

RANK = int(os.environ["RANK"])
SAVED, INTERRUPTED, STEPS, IN_THE_SECOND_PASS = 10, 12, 24, 18  # one pass has 16 steps, of 3 samples on each rank
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


def plain(batch: list[Any]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([one["input_ids"] for one in batch])
    return {"input_ids": ids, "labels": ids}


def loop(kind: str, folder: Path, *, interrupt: bool = False) -> dict[str, Any]:
    """The same in a loop of one's own with accelerate."""
    make, more = KINDS[kind]
    torch.manual_seed(0)
    shape = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**more["accelerator_config"]))
    model = GPT2LMHeadModel(shape)
    loader = torch.utils.data.DataLoader(
        make(),
        batch_size=6 if "split" in kind else 3,
        collate_fn=more.get("data_collator", plain),
        num_workers=more.get("dataloader_num_workers", 0),
    )
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
    arguments = SpotArguments(notice="none")
    losses: dict[int, float] = {}
    read.clear()
    managed = SpotCheckpointManager.for_accelerator(accelerator, str(folder / "run"), args=arguments)
    with contextlib.suppress(Interrupted), managed as manager:
        step, first_pass = manager.load_latest()
        for number in range(first_pass, 2):
            for batch in loader:
                if interrupt and step == INTERRUPTED:
                    manager.wait()
                    raise Interrupted
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                losses[step] = loss.item()
                if step == SAVED:
                    manager.save(step, number)
                if step == IN_THE_SECOND_PASS:
                    break
        assert not interrupt
    weights = sum(float(one.double().sum()) for one in model.parameters())
    return {"losses": losses, "weights": weights, "read": len(read)}


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
    for name in sys.argv[2:]:
        kind = name.removeprefix("loop, ")
        how = train if kind == name else loop
        place = folder / name.replace(", ", "-").replace(" ", "-")
        whole = how(kind, place / "whole")
        first = how(kind, place / "interrupted", interrupt=True)
        told.lines.clear()
        rest = how(kind, place / "interrupted")
        seen = {
            "kind": name,
            "equal": {**first["losses"], **rest["losses"]} == whole["losses"] and rest["weights"] == whole["weights"],
            "read": [whole["read"], rest["read"]],
            "told": [line for line in told.lines if "stream" in line or "again" in line or "unknown" in line],
        }
        print(json.dumps(seen), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
