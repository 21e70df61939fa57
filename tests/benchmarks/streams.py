"""How a stream is resumed at its millionth sample: requests, samples and seconds to the next batch, against reading it again.

Parquet files lie behind a file system of fsspec that fetches blocks as one of HTTP or S3 does, and counts them. Each stream is
read up to the sample, its position is saved as in a checkpoint, and a new loader resumes it; then it is read again from its
start, as without a position. Seconds are without the time of a network.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets import IterableDataset, interleave_datasets, load_dataset
from fsspec import AbstractFileSystem, register_implementation
from fsspec.spec import AbstractBufferedFile
from torch.utils.data import DataLoader

from hf_spot.training.data.stream_position import StreamPosition, why_not

SHARD, BATCH = 20_000, 100
LOG = "HF_SPOT_BENCHMARK_REQUESTS"


class CountedFile(AbstractBufferedFile):
    """A file of which each block is a request."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        note()
        with open(f"/{self.path.lstrip(chr(47))}", "rb") as file:
            file.seek(start)
            return file.read(end - start)


class CountedFiles(AbstractFileSystem):
    """The files of this machine, asked for as those of a server."""

    protocol = "counted"
    cachable = False

    def _open(self, path: str, mode: str = "rb", **more: Any) -> CountedFile:
        return CountedFile(self, path, mode, **more)

    def info(self, path: str, **more: Any) -> dict[str, Any]:
        note()
        return {"name": path, "size": Path("/", path).stat().st_size, "type": "file"}

    def ls(self, path: str, detail: bool = True, **more: Any) -> list[Any]:
        note()
        return [self.info(path)] if detail else [path]


def note() -> None:
    """Count a request, of this process or of a worker."""
    with open(os.environ[LOG], "ab") as log:
        log.write(b".")


def write(folder: Path, samples: int) -> list[str]:
    """Two shards more than are read, each with 20 groups of rows."""
    names = []
    for shard in range(samples // SHARD + 2):
        names.append(f"{shard:04}.parquet")
        numbers = pa.array(range(shard * SHARD, (shard + 1) * SHARD))
        pyarrow.parquet.write_table(pa.table({"number": numbers}), folder / names[-1], row_group_size=SHARD // 20)
    return names


@dataclass
class Seen:
    """What a resume took."""

    requests: int
    seconds: float
    batch: str


def kinds(urls: list[str]) -> dict[str, tuple[Callable[[], IterableDataset], int]]:
    def stream(part: list[str]) -> IterableDataset:
        return load_dataset("parquet", data_files=part, split="train", streaming=True)

    def two() -> IterableDataset:
        parts = [stream(urls[::2]), stream(urls[1::2])]
        return interleave_datasets(parts, probabilities=[0.5, 0.5], seed=1, stopping_strategy="all_exhausted")

    return {
        "as it is": (lambda: stream(urls), 0),
        "shuffled, buffer of 1 000": (lambda: stream(urls).shuffle(seed=1, buffer_size=1000), 0),
        "shuffled, buffer of 10 000": (lambda: stream(urls).shuffle(seed=1, buffer_size=10_000), 0),
        "two, interleaved and shuffled": (lambda: two().shuffle(seed=2, buffer_size=1000), 0),
        "shuffled, two workers": (lambda: stream(urls).shuffle(seed=1, buffer_size=1000), 2),
    }


def loader_of(make: Callable[[], IterableDataset], workers: int) -> DataLoader[Any]:
    stream: Any = make()
    return DataLoader(stream, batch_size=BATCH, num_workers=workers, collate_fn=list)


def measure(make: Callable[[], IterableDataset], workers: int, batches: int) -> tuple[Seen, Seen]:
    loader, position = loader_of(make, workers), StreamPosition()
    assert why_not(loader) is None
    batches_read = position.read(loader, DataLoader.__iter__)
    for _ in range(batches):
        next(batches_read)
    saved = json.loads(json.dumps(position.to_save(batches)))
    expected = str(next(batches_read))
    seen = []
    for at_position in (True, False):
        requests = Path(os.environ[LOG])
        requests.write_bytes(b"")
        began = time.perf_counter()
        loader, position = loader_of(make, workers), StreamPosition()
        resumed = position.go_to(loader, saved) if at_position else None
        again = position.read(loader, DataLoader.__iter__, resumed)
        for _ in range(batches - (resumed.first if resumed else 0)):
            next(again)
        batch = str(next(again))
        seen.append(Seen(requests.stat().st_size, time.perf_counter() - began, batch))
        assert batch == expected
    return seen[0], seen[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, help="before the position (1 000 000)")
    parser.add_argument("--only", nargs="*", metavar="KIND")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    datasets.disable_progress_bars()
    found = {}
    with tempfile.TemporaryDirectory(prefix="streams-") as scratch:
        os.environ["HF_DATASETS_CACHE"] = scratch
        names = write(Path(scratch), options.samples)
        os.environ[LOG] = f"{scratch}/requests"
        register_implementation("counted", CountedFiles)
        for kind, (make, workers) in kinds([f"counted://{scratch}/{name}" for name in names]).items():
            if options.only and kind not in options.only:
                continue
            there, again = measure(make, workers, options.samples // BATCH)
            found[kind] = {"requests": [there.requests, again.requests], "seconds": [there.seconds, again.seconds]}
            print(
                f"{kind:30} at its position: {there.requests:5} requests, {there.seconds:6.1f} s;  "
                f"read again: {again.requests:5} requests, {again.seconds:6.1f} s",
                flush=True,
            )
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))
    os._exit(0)  # threads of streams that were left in the middle


if __name__ == "__main__":
    main()
