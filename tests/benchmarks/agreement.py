"""What it costs a step that the ranks agree: ``python tests/benchmarks/agreement.py [--ranks 2] [--json FILE]``.

The peer is a blocking all-reduce of one number in gloo, at the same place of the same step, in the same run. Between asking
and answering stands what the optimizer does in a real step: here, matrix products for ``--work-ms``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from hf_spot.training.ranks.agreement import Agreement
from hf_spot.training.ranks.ballot import Ballot


def measure(rank: int, ranks: int, meeting: str, steps: int, work_ms: float, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    agreement = Agreement(ranks)
    matrix = torch.randn(64, 64)

    def work() -> None:
        until = time.perf_counter() + work_ms / 1e3
        while time.perf_counter() < until:
            matrix @ matrix

    def hidden() -> float:
        began = time.perf_counter()
        agreement.ask(Ballot())
        asked = time.perf_counter()
        work()
        working = time.perf_counter()
        agreement.answer()
        return asked - began + time.perf_counter() - working

    def blocking() -> float:
        work()
        began = time.perf_counter()
        flag = torch.zeros(1)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        flag.item()
        return time.perf_counter() - began

    found: dict[str, list[float]] = {"all_reduce": [], "agreement": []}
    for _ in range(steps):
        for name, act in (("all_reduce", blocking), ("agreement", hidden)):
            dist.barrier()  # as the backward pass of a real step does
            found[name].append(act() * 1e6)
    if rank == 0:
        Path(out).write_text(json.dumps({name: statistics.median(times) for name, times in found.items()}))
    agreement.close()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--work-ms", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments: Any = (options.ranks, f"{folder}/meeting", options.steps, options.work_ms, f"{folder}/out")
        torch.multiprocessing.spawn(measure, arguments, nprocs=options.ranks)
        found = json.loads(Path(folder, "out").read_text())
    found["ratio"] = found["agreement"] / found["all_reduce"]
    print(
        f"{options.ranks} ranks, median of {options.steps} steps: a blocking all-reduce {found['all_reduce']:.0f} us,", end=" "
    )
    print(f"asking and hearing the answer {found['agreement']:.0f} us: {found['ratio']:.2f} of it")
    if options.json:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
