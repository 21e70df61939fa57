"""How cost grows: ``python tests/benchmarks/growth.py [--json FILE]``.

Uploads and restores of 10 MB to 5 GB in five files, and of 100 MB in 1 to 10 000 files, to an S3 server that only moves bytes
(`sink.py`), with the processor seconds of this process; beside them a plain copy of the same files within memory: what grows
there is the kernel's. And what it costs to open a run whose journal has 10 to 100 000 entries, in requests, and in time beside
them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.run import Run
from hf_spot.storage.faulty import FaultyStore
from hf_spot.storage.memory import MemoryStore

_TOLD = (
    "commit {up_s:6.2f} s ({up_cpu_s:.2f} of a processor), restore {down_s:6.2f} s ({down_cpu_s:.2f}),"
    " plain copy {copy_s:6.2f} s ({copy_cpu_s:.2f})"
)
SIZES_MB, COUNTS, ENTRIES = (10, 100, 1000, 5000), (1, 100, 10_000), (10, 1000, 100_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    from transfers import make_checkpoint, sink

    found: dict[str, list[dict[str, Any]]] = {"bytes": [], "files": [], "journal": []}
    for size_mb in SIZES_MB:
        with tempfile.TemporaryDirectory(prefix="hf_spot-growth-", dir="/dev/shm") as scratch:
            folder = make_checkpoint(Path(scratch) / "checkpoint-1", size_mb * 1_000_000)
            with sink(folder):
                found["bytes"].append({"mb": size_mb, **there_and_back(folder)})
        tell(f"{{mb:6}} MB in 5 files: {_TOLD}", found["bytes"][-1])
    for count in COUNTS:
        with tempfile.TemporaryDirectory(prefix="hf_spot-growth-", dir="/dev/shm") as scratch:
            folder = make_checkpoint(Path(scratch) / "checkpoint-1", 3)
            for number in range(count):
                (folder / f"{number}.distcp").write_bytes(os.urandom(100_000_000 // count))
            with sink(folder):
                found["files"].append({"files": count, **there_and_back(folder)})
        tell(f"100 MB in {{files:6}} files: {_TOLD}", found["files"][-1])
    for count in ENTRIES:
        found["journal"].append({"entries": count, **open_journal(count)})
        tell("a journal of {entries:6} entries: {requests} requests and {ms:.1f} ms to open", found["journal"][-1])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def tell(line: str, values: dict[str, Any]) -> None:
    print(line.format(**values), flush=True)


def there_and_back(folder: Path) -> dict[str, float]:
    """Seconds to commit a folder, to have it back, and to copy it."""
    run = Run("s3://sink/run")
    run.claim()
    request, back = CommitRequest(step=1), folder.parent / "back"
    found: dict[str, float] = {}
    for name, act in (
        ("up", lambda: run.commit(request, run.upload(folder, request))),
        ("down", lambda: run.pull(back)),
        ("copy", lambda: shutil.copytree(folder, back)),
    ):
        cpu_s = time.process_time()
        found[f"{name}_s"] = seconds(act)
        found[f"{name}_cpu_s"] = time.process_time() - cpu_s
        shutil.rmtree(back, ignore_errors=True)
    return found


def open_journal(count: int) -> dict[str, float]:
    """What the newest state costs a reader that knows nothing yet. A launch or a notice is what most entries are."""
    url = f"memory://{uuid.uuid4().hex}"
    writer = Run(MemoryStore(url))
    writer.claim()
    for number in range(count - 1):
        writer.record("notice", {"number": number})
    store = FaultyStore(MemoryStore(url))
    took_s = seconds(lambda: Run(store).state())
    return {"requests": len(store.calls), "ms": 1000 * took_s}


def seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
