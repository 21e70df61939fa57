"""Whole commands, Python's start included: ``python tests/benchmarks/commands.py [--gb 1.1] [--rounds 5] [--json FILE]``.

``hf-spot checkpoints push`` and ``pull`` of a checkpoint in memory (``/dev/shm``), in turn with s5cmd, on an S3 server that
only moves bytes (`sink.py`). What counts is the best wall time of the rounds; processor seconds are printed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def timed(command: list[str]) -> dict[str, float]:
    """Run a command, and return its wall and processor seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    took_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"s": took_s, "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    from transfers import commands, make_checkpoint, sink

    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clients = ["hf-spot", *(["s5cmd"] if shutil.which("s5cmd") else [])]
    best: dict[str, dict[str, dict[str, float]]] = {"push": {}, "pull": {}}
    with tempfile.TemporaryDirectory(prefix="hf_spot-commands-", dir="/dev/shm") as scratch:
        folder = make_checkpoint(Path(scratch) / "checkpoint-1", int(options.gb * 1e9))
        with sink(folder):
            for number in range(options.rounds):
                for client in clients:
                    back, name = Path(scratch) / "back", f"{client}-{number}"
                    back.mkdir()
                    ours = [sys.executable, "-m", "hf_spot", "checkpoints"]
                    steps: dict[str, Any] = {
                        "push": [*ours, "push", f"s3://sink/{name}", str(folder)],
                        "pull": [*ours, "pull", f"s3://sink/{name}", str(back)],
                    }
                    if client == "s5cmd":
                        steps = {
                            "push": commands("s5cmd", "up", str(folder), name),
                            "pull": commands("s5cmd", "down", str(back), name),
                        }
                    for what, command in steps.items():
                        found = timed(command)
                        old = best[what].setdefault(client, found)
                        best[what][client] = {key: min(old[key], found[key]) for key in found}
                    shutil.rmtree(back)
    for what, found in best.items():
        for client, one in found.items():
            print(f"{what} {options.gb:g} GB, {client:8} {one['s']:6.2f} s  {one['cpu_s']:5.2f} processor seconds")
        if "s5cmd" in found:
            print(f"{what}: hf-spot takes {found['hf-spot']['s'] / found['s5cmd']['s']:.2f} of s5cmd's time")
    if options.json:
        options.json.write_text(json.dumps(best, indent=1))


if __name__ == "__main__":
    main()
