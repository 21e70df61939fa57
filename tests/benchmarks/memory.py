"""How much memory the upload of a large checkpoint takes: ``python tests/benchmarks/memory.py --gb 50``.

A process that does nothing else uploads and commits a folder of sparse files to an S3 server that throws the bytes away
(`sink.py`), and prints one line of JSON: the seconds, and the peak of its resident memory, Python and boto3 included. It has to
stay below 512 MB whatever the size.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.run import Run
from hf_spot.run.upload import Uploader

_SHARD_BYTES = 5_000_000_000  # as save_pretrained makes them, or somewhat larger
_PATIENCE_S = 3600.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=50.0, help="size of the folder, in 10^9 bytes")
    options = parser.parse_args()
    sink = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("sink.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert sink.stdin is not None and sink.stdout is not None
    endpoint = sink.stdout.readline().strip()
    os.environ.update(
        AWS_ENDPOINT_URL=endpoint,
        AWS_ACCESS_KEY_ID="sink",
        AWS_SECRET_ACCESS_KEY="sink",
        AWS_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
        AWS_CONFIG_FILE=os.devnull,
        AWS_SHARED_CREDENTIALS_FILE=os.devnull,
    )
    with tempfile.TemporaryDirectory(prefix="hf_spot-memory-") as folder:
        checkpoint = _make_checkpoint(Path(folder) / "checkpoint-1", int(options.gb * 1e9))
        run = Run("s3://sink/run")
        run.claim()
        before_mb = _peak_mb()
        began = time.monotonic()
        uploader = Uploader(run, Path(folder) / "pins")
        uploader.submit(checkpoint, CommitRequest(step=1))
        committed = uploader.drain(_PATIENCE_S)
        took_s = time.monotonic() - began
        uploader.close()
    sink.stdin.close()
    came_in_gb = int(sink.stdout.read()) / 1e9
    sink.wait()
    found = {"gb": options.gb, "committed": committed, "came_in_gb": round(came_in_gb, 3), "seconds": round(took_s, 1)}
    print(json.dumps(found | {"before_mb": round(before_mb), "peak_mb": round(_peak_mb())}))


def _make_checkpoint(folder: Path, size_bytes: int) -> Path:
    """Two thirds are the optimizer's, in one file; the rest are shards of the model."""
    folder.mkdir()
    for name in ("scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (folder / name).write_bytes(b"small")
    left = size_bytes // 3
    sizes = {"optimizer.pt": size_bytes - left}
    while left:
        part = min(left, _SHARD_BYTES)
        sizes[f"model-{len(sizes):05d}.safetensors"] = part
        left -= part
    for name, size in sizes.items():
        with (folder / name).open("wb") as file:
            file.truncate(size)
    return folder


def _peak_mb() -> float:
    """Of this process since its program began: `getrusage` would count the process that it was forked from, too."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1000


if __name__ == "__main__":
    main()
