"""Trains a tiny model in a Trainer or a loop of its own, and hangs after a step in one of several ways."""

from __future__ import annotations

import argparse
import ctypes
import os
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

HANGS = ("none", "worker", "callback", "lock", "c", "gil", "collective", "leaves", "dies", "evaluation")


class Rows(Dataset):
    def __init__(self, stuck: int | None, marker: Path | None) -> None:
        self.stuck, self.marker = stuck, marker

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == self.stuck and may_hang(self.marker):
            wait_in_a_worker()
        row = torch.full((8,), float(index) / 64)
        return {"row": row, "labels": row.sum().reshape(1)}


def wait_in_a_worker() -> None:
    while True:
        time.sleep(0.1)


def may_hang(marker: Path | None) -> bool:
    """Whether to hang: always, or, with a marker, the first time only."""
    if marker is None:
        return True
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def forward(self, row: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.layer(row)
        return {"loss": nn.functional.mse_loss(out, labels), "logits": out}


def is_this_rank(options: argparse.Namespace) -> bool:
    wanted = options.hang in ("leaves", "dies") if options.rank is None else options.rank
    return int(os.environ.get("RANK", "0")) == wanted


def hang(kind: str) -> None:
    """Hang in this thread, as bugs do."""
    if kind == "callback":
        spin_for_ever()
    elif kind == "lock":
        deadlock()
    elif kind == "c":
        ctypes.CDLL(None).sleep(100_000)  # releases the GIL
    elif kind == "gil":
        ctypes.PyDLL(None).sleep(100_000)  # keeps it: no other thread runs any more
    elif kind == "collective":
        dist.barrier()  # the others are in the next step's all-reduce
    elif kind == "leaves":
        raise SystemExit(0)
    elif kind == "dies":
        os._exit(0)


def spin_for_ever() -> None:
    while True:
        pass


def deadlock() -> None:
    lock = threading.Lock()
    with lock, lock:
        pass


def in_trainer(options: argparse.Namespace, marker: Path | None) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Hang(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            time.sleep(options.step_s)
            due = state.global_step == options.at and options.hang not in ("none", "worker", "evaluation")
            if due and is_this_rank(options) and may_hang(marker):
                hang(options.hang)

        def on_prediction_step(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            if options.hang == "evaluation" and state.global_step >= options.at and may_hang(marker):
                spin_for_ever()

    arguments = TrainingArguments(
        output_dir=options.output_dir,
        per_device_train_batch_size=4,
        max_steps=options.steps,
        save_steps=4,
        eval_strategy="steps" if options.hang == "evaluation" else "no",
        eval_steps=4,
        logging_steps=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_num_workers=2 if options.hang == "worker" else 0,
        seed=1,
    )
    rows = Rows(40 if options.hang == "worker" else None, marker)
    Trainer(Model(), arguments, train_dataset=rows, eval_dataset=Rows(None, None), callbacks=[Hang()]).train()


def in_a_loop(options: argparse.Namespace, marker: Path | None) -> None:
    from hf_spot import SpotCheckpointManager

    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    manager = SpotCheckpointManager(save_every_n_steps=4)
    step, epoch = manager.load_latest(model, optimizer)
    loader = DataLoader(Rows(None, None), batch_size=4, shuffle=True)
    while step < options.steps:
        for batch in loader:
            optimizer.zero_grad()
            model(**batch)["loss"].backward()
            optimizer.step()
            step += 1
            time.sleep(options.step_s)
            if step % manager.save_every_n_steps == 0 or manager.interrupted:
                manager.save(model, optimizer, None, step, epoch)
            if step == options.at and may_hang(marker):
                hang(options.hang)
            if step >= options.steps:
                break
        epoch += 1
    manager.finish()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--hang", choices=HANGS, default="none")
    parser.add_argument("--rank", type=int, help="that hangs (0; 1 if it dies)")
    parser.add_argument("--at", type=int, default=6)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--step_s", type=float, default=0.0)
    parser.add_argument("--once", help="hang only while this file does not exist")
    parser.add_argument("--loop", action="store_true")
    options = parser.parse_args()
    marker = Path(options.once) if options.once else None
    (in_a_loop if options.loop else in_trainer)(options, marker)


if __name__ == "__main__":
    main()
