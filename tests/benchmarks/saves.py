"""How long training stands still for a save, and how fast its steps are meanwhile: ``python tests/benchmarks/saves.py``.

Three trainings of the same model, on the CPU or with ``--gpu`` on a GPU, each in a process of its own: one that never saves,
Trainer's own with its saves, and one with a `SpotCallback` whose run is a directory. The peers are Trainer's own save, and one
copy of the state into memory that is there already (weights, and AdamW's two moments).

``--ranks 2`` trains under DDP, ``--ranks 2 --fsdp`` with the model sharded by FSDP2; the figures are those of rank 0, and a
copy is one of what this rank holds. Trainer's own sharded save also waits until the disk has its files (fsync).

A save has two parts: what Trainer waits for at once, and what the next optimizer step then waits for, because copies are made
beside the forward and backward. Both count (``stall_s`` of the journal). Beside the seconds the processor time of the training
thread is shown, which other programs on the machine disturb less.

On a GPU all that is queued counts, too: the watch is stopped when the GPU has done it, and the copy goes to pinned memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

STEPS, SAVE_STEPS, WIDTH = 50, 10, 768


class Stopwatch:
    """Seconds of each save, with all that follows it before the next step; of each step without that; and when they ended.

    Args:
        trainer: whose saves and steps.
        settle: waits until what was queued has been done.
    """

    def __init__(self, trainer: Any, settle: Callable[[], None]) -> None:
        self.saves_s: list[float] = []
        self.saves_cpu_s: list[float] = []
        self.steps_s: list[float] = []
        self.saved_at: list[float] = []
        self.step_ended_at: list[float] = []
        plain_after, plain_step = trainer._maybe_log_save_evaluate, trainer.training_step
        self._step_began: float | None = None

        def after(*args: Any, **kwargs: Any) -> None:
            settle()
            began, began_cpu = time.perf_counter(), time.thread_time()
            if self._step_began is not None:
                self.steps_s.append(began - self._step_began)
                self.step_ended_at.append(time.time())
                self._step_began = None  # Trainer comes here once more when all has ended, and the last save with it
            saves = trainer.control.should_save
            plain_after(*args, **kwargs)
            if saves:
                settle()
                self.saves_s.append(time.perf_counter() - began)
                self.saves_cpu_s.append(time.thread_time() - began_cpu)
                self.saved_at.append(time.time())

        def step(*args: Any, **kwargs: Any) -> Any:
            self._step_began = time.perf_counter()
            return plain_step(*args, **kwargs)

        trainer._maybe_log_save_evaluate, trainer.training_step = after, step


def train(kind: str, layers: int, threads: int, folder: Path, sharded: bool, gpu: bool) -> dict[str, Any]:
    """One training; what it took this rank."""
    import torch
    import torch.distributed as dist
    from accelerate.state import PartialState
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    from hf_spot import Run, SpotArguments, SpotCallback

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    more: dict[str, Any] = {}
    if sharded:
        wraps = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["GPT2Block"]}
        more = {"fsdp": "full_shard", "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", **wraps}}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20_000, n_positions=64, n_embd=WIDTH, n_layer=layers))
    data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 20_000, (64, 16))]
    arguments = TrainingArguments(
        str(folder / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        save_strategy="no" if kind == "none" else "steps",
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        use_cpu=not gpu,
        disable_tqdm=True,
        **more,
    )
    if sharded:
        PartialState(cpu=True)
        # accelerate shards on GPUs alone; on the CPU it has to be told that this is one.
        PartialState._shared_state |= {"distributed_type": "MULTI_GPU", "device": torch.device("cpu")}
    callbacks = [SpotCallback(str(folder / "run"), SpotArguments(notice="none", keep_checkpoints=0))] if kind == "spot" else []
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)  # type: ignore[arg-type]
    settle = torch.accelerator.synchronize if gpu else lambda: None
    watch = Stopwatch(trainer, settle)
    trainer.train()
    state = [value.data for value in model.parameters()]
    state += [one for kept in trainer.optimizer.state.values() for one in kept.values() if one.numel() > 1]
    state = [one.to_local() if hasattr(one, "to_local") else one for one in state]
    targets = [torch.empty_like(one, device="cpu", pin_memory=gpu) for one in state]
    copies_s, copies_cpu_s = [], []
    for _ in range(4):
        began, began_cpu = time.perf_counter(), time.thread_time()
        for target, one in zip(targets, state, strict=True):
            target.copy_(one, non_blocking=gpu)
        settle()
        copies_s.append(time.perf_counter() - began)
        copies_cpu_s.append(time.thread_time() - began_cpu)
    entries = [one for one in Run(str(folder / "run")).events() if one.kind == "commit"] if callbacks else []
    commits = [one.time.timestamp() for one in entries]
    return {
        "busy_s": _during(watch, commits),
        "state_bytes": sum(one.nbytes for one in state),
        "saves_s": watch.saves_s,
        "saves_cpu_s": watch.saves_cpu_s,
        "stalls_s": [one.data["stall_s"] for one in entries if one.data["stall_s"] is not None],
        "copy_cpu_s": min(copies_cpu_s),
        "steps_s": watch.steps_s,
        "copy_s": min(copies_s),
        "peak_mb": psutil.Process().memory_info().rss / 1e6,
    }


def _during(watch: Stopwatch, commits: list[float]) -> list[float]:
    """The steps that ended while a checkpoint was written or uploaded."""
    spans = list(zip(watch.saved_at, commits, strict=False))
    return [took for took, at in zip(watch.steps_s, watch.step_ended_at, strict=True) if any(a < at < b for a, b in spans)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="of GPT-2, 7 million parameters each, beside 15 million (12)")
    parser.add_argument("--threads", type=int, default=1, help="that train; one core is then free on a machine of two (1)")
    parser.add_argument("--ranks", type=int, default=1, help="that train together (1)")
    parser.add_argument("--fsdp", action="store_true", help="they shard the model, and each writes its shards")
    parser.add_argument("--gpu", action="store_true", help="train on the GPU, not on the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("none", "trainer", "spot"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fsdp and options.ranks < 2:
        parser.error("--fsdp needs --ranks 2")
    if options.gpu and (options.ranks > 1 or not _has_gpu()):
        parser.error("--gpu needs a GPU that torch can use, and is for one rank")
    if options.only:
        found = train(options.only, options.layers, options.threads, options.folder, options.fsdp, options.gpu)
        if os.environ.get("RANK", "0") == "0":
            options.json.write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)  # gloo's threads sometimes abort a process whose interpreter is ending
    each = {}
    for kind in ("none", "trainer", "spot"):
        with tempfile.TemporaryDirectory(prefix="hf_spot-saves-") as scratch:
            _launch(kind, options, Path(scratch))
            each[kind] = json.loads(Path(scratch, "found.json").read_text())
    copy_s = min(one["copy_s"] for one in each.values())
    # The first save meets fresh memory; the last one ends the training, and nothing goes on meanwhile.
    first, later = ({kind: pick(each[kind]["saves_s"]) for kind in ("trainer", "spot")} for pick in (_first, _middle))
    cpu = {kind: _middle(each[kind]["saves_cpu_s"]) for kind in ("trainer", "spot")}
    copy_cpu_s = min(one["copy_cpu_s"] for one in each.values())
    stall_s = _middle(each["spot"]["stalls_s"])
    steps_s, busy_s = statistics.mean(each["none"]["steps_s"][SAVE_STEPS:]), statistics.mean(each["spot"]["busy_s"])
    found = {
        "state_gb": each["spot"]["state_bytes"] / 1e9,
        "threads": options.threads,
        "ranks": options.ranks,
        "sharded": options.fsdp,
        "gpu": options.gpu,
        "copy_s": copy_s,
        "copy_cpu_s": copy_cpu_s,
        "save_s": later,
        "save_cpu_s": cpu,
        "stall_s": stall_s,
        "first_save_s": first,
        "step_s": steps_s,
        "busy_step_s": busy_s,
        "peak_mb": {kind: one["peak_mb"] for kind, one in each.items()},
    }
    of_rank = "" if options.ranks == 1 else f" on each of {options.ranks} ranks, {'sharded' if options.fsdp else 'DDP'}"
    trains = "a GPU trains" if options.gpu else f"{options.ranks * options.threads} of {psutil.cpu_count()} cores train"
    print(f"{found['state_gb']:.2f} GB of state{of_rank}, {trains}")
    print(f"a copy of the state           {copy_s:6.3f} s")
    for kind, name in (("trainer", "Trainer's own save"), ("spot", "with SpotCallback")):
        against = f"{later[kind] / later['trainer']:.2f} of Trainer's, {later[kind] / copy_s:.2f} copies"
        print(f"{name:29} {later[kind]:6.3f} s ({against}); the first {first[kind]:.3f} s")
    print(f"... with the wait at the step {stall_s:6.3f} s ({stall_s / copy_s:.2f} copies)")
    ours = f"{cpu['spot'] / copy_cpu_s:.2f} of a copy's; Trainer's {cpu['trainer']:.3f} s"
    print(f"... processor time of it      {cpu['spot']:6.3f} s ({ours})")
    print(f"a step without saves          {steps_s:6.3f} s")
    print(f"... while one is under way    {busy_s:6.3f} s ({busy_s / steps_s:.2f} of it)")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def _launch(kind: str, options: argparse.Namespace, folder: Path) -> None:
    sizes = ["--layers", str(options.layers), "--threads", str(options.threads)]
    sizes += ["--ranks", str(options.ranks), *["--fsdp"] * options.fsdp, *["--gpu"] * options.gpu]
    command = [sys.executable, __file__, "--only", kind, "--json", str(folder / "found.json"), "--folder", str(folder), *sizes]
    shared = {"WORLD_SIZE": str(options.ranks), "LOCAL_WORLD_SIZE": str(options.ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": "0"}  # they meet in a file
    of_ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(options.ranks)] if options.ranks > 1 else []
    environments = [os.environ | shared | own for own in of_ranks] or [dict(os.environ)]
    said = [folder / f"said-{number}" for number in range(len(environments))]
    ranks = []
    for path, environment in zip(said, environments, strict=True):
        with path.open("w") as file:
            ranks.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
    for rank, path in zip(ranks, said, strict=True):
        if rank.wait():
            raise SystemExit(path.read_text())


def _has_gpu() -> bool:
    import torch

    return torch.accelerator.is_available()


def _first(seconds: list[float]) -> float:
    return seconds[0]


def _middle(seconds: list[float]) -> float:
    return statistics.median(seconds[1:-1])


if __name__ == "__main__":
    main()
