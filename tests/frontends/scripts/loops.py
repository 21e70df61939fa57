"""Loops with accelerate, which train on the ranks of a launcher: ``loops.py KIND OUT``, under `hf-spot launch` or not.

``streams-…`` trains on a stream that is divided among the ranks in one of accelerate's ways. ``nlp`` has the parts of
accelerate's complete examples: epochs with an evaluation, and states that it saves itself every few steps.
``--resume_from_checkpoint FOLDER`` begins at one of them, as the examples do, in a run that has no checkpoint yet.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

from hf_spot import SpotCheckpointManager

EPOCHS, SAVE_STEPS, SAMPLES, TOKENS = 2, 5, 96, 12
STEP_S = float(os.environ.get("FRONTENDS_STEP_S", "0"))
STREAMS = {  # shards, and how accelerate divides them
    "streams-by-shard": (8, {"dispatch_batches": False}),
    "streams-by-sample": (1, {"dispatch_batches": False}),
    "streams-dispatched": (5, {"dispatch_batches": True}),
    "streams-split": (5, {"dispatch_batches": True, "split_batches": True}),
}


def pairs(shards, each):
    """Yield tokens with a label, so many for each shard."""
    for shard in shards:
        for number in range(each):
            ids = torch.randint(1, 64, (TOKENS,), generator=torch.Generator().manual_seed(shard * 1000 + number)).tolist()
            yield {"input_ids": ids, "labels": ids[0] % 2}


def collate(rows):
    """Mask words at random."""
    ids = torch.tensor([one["input_ids"] for one in rows])
    return {
        "input_ids": torch.where(torch.rand(ids.shape) < 0.1, 0, ids),
        "labels": torch.tensor([one["labels"] for one in rows]),
    }


def training_data(kind, batch):
    """Return the loader, and the settings by which accelerate divides it."""
    if kind == "nlp":
        rows, divided = Dataset.from_generator(pairs, gen_kwargs={"shards": [0], "each": SAMPLES}), {}
    else:
        shards, divided = STREAMS[kind]
        rows = IterableDataset.from_generator(
            pairs, gen_kwargs={"shards": list(range(shards)), "each": SAMPLES // shards}
        ).shuffle(seed=3, buffer_size=10)
    size = 2 * batch if divided.get("split_batches") else batch
    return torch.utils.data.DataLoader(rows, batch_size=size, collate_fn=collate, shuffle=kind == "nlp"), divided


def evaluate(accelerator, model, held_out):
    """Return the loss and the share of labels that are right, of all ranks."""
    model.eval()
    losses, right, count = [], 0, 0
    for batch in held_out:
        with torch.no_grad():
            told = model(**batch)
        losses.append(accelerator.gather_for_metrics(told.loss.reshape(1)))
        predictions, references = accelerator.gather_for_metrics((told.logits.argmax(dim=-1), batch["labels"]))
        right, count = right + int((predictions == references).sum()), count + len(references)
    model.train()
    return {"eval_loss": float(torch.cat(losses).mean()), "eval_accuracy": right / count}


def main():
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["nlp", *STREAMS])
    parser.add_argument("out", type=Path)
    parser.add_argument("--resume_from_checkpoint", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    loader, divided = training_data(options.kind, batch=4)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**divided))
    set_seed(42)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=16, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = get_linear_schedule_with_warmup(optimizer, 4, 48)
    held_out = torch.utils.data.DataLoader(list(pairs([7], 22)), batch_size=4, collate_fn=collate)
    model, optimizer, loader, held_out, scheduler = accelerator.prepare(model, optimizer, loader, held_out, scheduler)
    # Without hf-spot launch there is no run, so it gets one of its own.
    store = None if "HF_SPOT_RUNTIME_DIR" in os.environ else f"{options.out}-alone"
    manager = SpotCheckpointManager.for_accelerator(accelerator, store, save_every_n_steps=SAVE_STEPS)
    step, first = manager.load_latest()
    left = loader
    if step == 0 and options.resume_from_checkpoint:
        accelerator.load_state(str(options.resume_from_checkpoint))
        step = int(options.resume_from_checkpoint.name.removeprefix("step_"))
        first, passed = divmod(step, len(loader))
        left = accelerator.skip_first_batches(loader, passed)
    told = []
    for epoch in range(first, EPOCHS):
        for batch in left:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            time.sleep(STEP_S)
            if STEP_S and os.environ.get("RANK") == "1" and Path("raise-once").exists():
                Path("raise-once").unlink()
                raise RuntimeError("this rank fails once")
            if options.kind == "nlp" and step % SAVE_STEPS == 0:
                accelerator.save_state(str(options.out / f"step_{step}"))
            if manager.interrupted or step % SAVE_STEPS == 0:
                manager.save(step, epoch, loss)
            if manager.interrupted:
                sys.exit(75)
        left = loader
        told.append({"epoch": epoch, "step": step, **evaluate(accelerator, model, held_out)})
    if accelerator.is_main_process:
        (options.out / "all_results.json").write_text(json.dumps(told[-1]))
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(options.out, is_main_process=accelerator.is_main_process)
    manager.finish()
    accelerator.end_training()


if __name__ == "__main__":
    main()
