"""What ``--exact-on-any-gpus`` costs a step: ``python tests/benchmarks/any_gpus.py [--ranks 1 2 4] [--json FILE]``.

The peer is plain DistributedDataParallel with gradient accumulation, on the same model and batches, in the same processes:
steps of both kinds take turns, and a ratio is the median of those of each turn. A step is the micro-batches of a rank, the
exchange of gradients, clipping and AdamW. On a loaded machine believe the processor time. Memory is the most that a process
of its own held, beyond what it held before its first step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing
from transformers import GPT2Config, GPT2LMHeadModel

from hf_spot.training.data.micro_batches import seeded
from hf_spot.training.ranks.exact_gradients import ExactGradients

TOKENS = (4, 128)  # of a micro-batch
KINDS = ("plain", "exact")


def _step_of(kind: str, ranks: int, each: int) -> tuple[Callable[[], None], int]:
    """Return a training's step, and the number of parameters."""
    torch.manual_seed(0)
    inside = GPT2LMHeadModel(GPT2Config(vocab_size=8000, n_positions=128, n_embd=256, n_layer=4, n_head=4))
    model: Any = torch.nn.parallel.DistributedDataParallel(inside) if ranks > 1 else inside
    optimizer = torch.optim.AdamW(inside.parameters(), lr=1e-3)
    batches = torch.randint(8000, (each, *TOKENS))
    sums = ExactGradients(inside.parameters, ranks)
    quiet = getattr(model, "no_sync", contextlib.nullcontext)

    def plain() -> None:
        for number, batch in enumerate(batches):
            with quiet() if number < each - 1 else contextlib.nullcontext():
                (model(input_ids=batch, labels=batch).loss / each).backward()

    def exact() -> None:
        sums.begin(each * ranks)
        losses = []
        for number, batch in enumerate(batches):
            sending = sums.sending() if number == each - 1 else contextlib.nullcontext()
            with quiet(), seeded(number), sending:
                loss = model(input_ids=batch, labels=batch).loss / (each * ranks)
                loss.backward()
            sums.add()
            losses.append(float(loss.detach()))
        sums.finish(losses)

    def step() -> None:
        plain() if kind == "plain" else exact()
        torch.nn.utils.clip_grad_norm_(inside.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(one.numel() for one in inside.parameters())


def _join(rank: int, ranks: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)


def measure(rank: int, ranks: int, meeting: str, each: int, steps: int, out: str) -> None:
    """Measure steps of both kinds in turn."""
    _join(rank, ranks, meeting)
    made = {kind: _step_of(kind, ranks, each)[0] for kind in KINDS}
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for number in range(steps + 2):
        for kind in KINDS if number % 2 else KINDS[::-1]:
            step = made[kind]
            dist.barrier()
            began = time.perf_counter(), time.process_time()
            step()
            if number >= 2:
                found[kind].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def hold(rank: int, ranks: int, meeting: str, each: int, kind: str, out: str) -> None:
    """Measure the most memory that steps of a kind take."""
    _join(rank, ranks, meeting)
    step, parameters = _step_of(kind, ranks, each)
    before = psutil.Process().memory_info().rss
    for _ in range(3):
        step()
    if rank == 0:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        Path(out).write_text(json.dumps([most - before, parameters]))
    dist.destroy_process_group()


def _spawned(act: Any, ranks: int, *more: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out"
        torch.multiprocessing.spawn(act, (ranks, f"{folder}/meeting", *more, out), nprocs=ranks)
        return json.loads(Path(out).read_text())


def main() -> None:
    """Measure, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--each", type=int, nargs="*", default=[1, 4], help="micro-batches of a rank")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for ranks in options.ranks:
        for each in options.each:
            times = _spawned(measure, ranks, each, options.steps)
            wall = {kind: statistics.median(one[0] for one in times[kind]) for kind in KINDS}
            ratio, processor_ratio = (
                statistics.median(exact[at] / plain[at] for plain, exact in zip(*(times[kind] for kind in KINDS), strict=True))
                for at in (0, 1)
            )
            held = {kind: _spawned(hold, ranks, each, kind) for kind in KINDS}
            more = (held["exact"][0] - held["plain"][0]) / held["plain"][1]
            ms = {kind: wall[kind] * 1e3 for kind in KINDS}
            row = {
                "ranks": ranks,
                "each": each,
                "ms": ms,
                "ratio": ratio,
                "processor_ratio": processor_ratio,
                "bytes_per_parameter": {kind: held[kind][0] / held[kind][1] for kind in KINDS},
            }
            found.append(row)
            print(
                f"{ranks} ranks, {each} micro-batches each: plain {ms['plain']:.0f} ms, exact {ms['exact']:.0f} ms: "
                f"{row['ratio']:.2f}; processor time {row['processor_ratio']:.2f}; {more:+.1f} bytes a parameter",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
