"""The loop of `own_loop.py` for two ranks under DDP: with a plain manager, or with accelerate."""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).parent))
from own_loop import EPOCHS, SAMPLES, Diary, Noisy, make_model, parse, seed

from hf_spot import SpotCheckpointManager


def plain(options: argparse.Namespace) -> None:
    seed()
    model, optimizer, scheduler = make_model()
    draw_apart()
    rank = dist.get_rank()
    model = DistributedDataParallel(model)
    data = Noisy(SAMPLES, 0.1)
    sampler = DistributedSampler(data)
    dataloader = DataLoader(data, batch_size=2, sampler=sampler)
    diary = Diary(options)
    manager = SpotCheckpointManager(options.checkpoint_dir, save_every_n_steps=4)
    step, epoch = manager.load_latest(model, optimizer, scheduler)
    for epoch in range(epoch, EPOCHS):  # noqa: B020
        sampler.set_epoch(epoch)
        for batch in dataloader:
            loss = (model(batch) - batch).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1
            if rank == 0:
                diary.step(step, batch, loss)
            if step % manager.save_every_n_steps == 0:
                manager.save(model, optimizer, scheduler, step, epoch, loss)
            if manager.interrupted:
                manager.save(model, optimizer, scheduler, step, epoch, loss)
                return
    if rank == 0:
        diary.end(model)


def accelerated(options: argparse.Namespace) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    seed()
    model, optimizer, scheduler = make_model()
    dataloader = DataLoader(Noisy(SAMPLES, 0.1), batch_size=2, shuffle=True, num_workers=options.workers)
    model, optimizer, dataloader, scheduler = accelerator.prepare(model, optimizer, dataloader, scheduler)
    draw_apart()
    diary = Diary(options)
    manager = SpotCheckpointManager.for_accelerator(accelerator, options.checkpoint_dir, save_every_n_steps=4)
    step, epoch = manager.load_latest()
    for epoch in range(epoch, EPOCHS):  # noqa: B020
        for batch in dataloader:
            with accelerator.accumulate(model):
                loss = (model(batch) - batch).pow(2).mean()
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            if accelerator.is_main_process:
                diary.step(step, batch, loss)
            if step % manager.save_every_n_steps == 0:
                manager.save(step, epoch, loss)
            if manager.interrupted:
                manager.save(step, epoch, loss)
                return
    if accelerator.is_main_process:
        diary.end(accelerator.unwrap_model(model))


def draw_apart() -> None:
    """Ranks draw other numbers from here on."""
    rank = int(os.environ.get("RANK", "0"))
    random.seed(10 + rank)
    np.random.seed(20 + rank)
    torch.manual_seed(30 + rank)


if __name__ == "__main__":
    if os.environ.get("RANK") == "1" and "NOTICE_OF_RANK_1" in os.environ:
        os.environ["HF_SPOT_NOTICE_FILE"] = os.environ["NOTICE_OF_RANK_1"]
    torch.set_num_threads(1)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        meeting = f"file://{os.environ['RENDEZVOUS']}" if "RENDEZVOUS" in os.environ else None
        dist.init_process_group("gloo", init_method=meeting, rank=int(os.environ["RANK"]), world_size=ranks)
    arguments = sys.argv[1:]
    if "--accelerate" in arguments:
        arguments.remove("--accelerate")
        accelerated(parse(arguments))
    else:
        plain(parse(arguments))
    if ranks > 1:
        dist.destroy_process_group()
