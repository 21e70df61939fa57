"""A training loop of somebody's own, as it was before hf_spot but for one import: what the tests interrupt.

Dropout, a shuffled loader and a noisy dataset draw from all generators; a scheduler, momentum and an evaluation in the middle
of each epoch have states of their own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from hf_spot import SpotCheckpointManager

EPOCHS = 3
SAMPLES = 24  # in batches of 4: 6 steps an epoch


class Noisy(Dataset):
    """Points with noise of three generators."""

    def __init__(self, count: int, noise: float) -> None:
        self.points = torch.linspace(-1, 1, count * 3).reshape(count, 3)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> torch.Tensor:
        drawn = random.random() + float(np.random.rand()) + torch.rand(3)
        return self.points[index] + self.noise * drawn


class Diary:
    """Tells a test what each step trained, and holds the loop or ends it where the test says so."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.path = Path(options.diary)

    def step(self, step: int, batch: torch.Tensor, loss: torch.Tensor) -> None:
        line = {"step": step, "batch": hashlib.sha256(batch.numpy().tobytes()).hexdigest()[:12], "loss": loss.item()}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        while step == self.options.hold_at and not self.path.with_suffix(".go-on").exists():
            time.sleep(0.005)

    def end(self, model: nn.Module) -> None:
        weights = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
        drawn = [random.random(), float(np.random.rand()), torch.rand(1).item()]
        found = {"weights": hashlib.sha256(weights).hexdigest(), "drawn": drawn}
        self.path.with_suffix(".end").write_text(json.dumps(found))


def seed() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


def make_model() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * SAMPLES // 4)


def main(options: argparse.Namespace) -> None:
    seed()
    torch.set_num_threads(1)
    model, optimizer, scheduler = make_model()
    more = {"persistent_workers": True} if options.persistent else {}
    dataloader = DataLoader(Noisy(SAMPLES, 0.1), batch_size=4, shuffle=True, num_workers=options.workers, **more)
    held_out = DataLoader(Noisy(8, 0.1), batch_size=4)
    diary = Diary(options)

    manager = SpotCheckpointManager(options.checkpoint_dir, save_every_n_steps=4)
    step, epoch = manager.load_latest(model, optimizer, scheduler)
    for epoch in range(epoch, EPOCHS):  # noqa: B020
        for batch in dataloader:
            model.train()
            loss = (model(batch) - batch).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1
            diary.step(step, batch, loss)
            if step % 3 == 0:
                model.eval()
                with torch.no_grad():
                    sum(model(batch).sum() for batch in held_out)
            if step % manager.save_every_n_steps == 0:
                manager.save(model, optimizer, scheduler, step, epoch, loss)
            if step == options.kill_at:
                if options.committed:
                    manager.wait()
                os.kill(os.getpid(), signal.SIGKILL)
            if manager.interrupted:
                manager.save(model, optimizer, scheduler, step, epoch, loss)
                return
    diary.end(model)
    if options.finish:
        manager.finish()


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint_dir")
    parser.add_argument("--diary", required=True)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--persistent", action="store_true")
    parser.add_argument("--hold_at", type=int, default=0)
    parser.add_argument("--kill_at", type=int, default=0)
    parser.add_argument("--committed", action="store_true")
    parser.add_argument("--finish", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
