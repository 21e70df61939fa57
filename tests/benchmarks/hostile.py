"""What a store in trouble costs a step: ``python tests/benchmarks/hostile.py [--steps 100] [--seed 0] [--json FILE]``.

One training, over a real S3 server behind a proxy: in peace, with a quarter of all requests failing, over a slow link, and in
peace again. The second peace tells how much of a difference is noise. All run on the same machine, server and proxy included.
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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.hostile import Hostile, SlowLink
from tests.proxy import Proxy
from tests.servers import SeaweedFS

FAILING = 0.25  # share of the requests
SLOW_BYTES_PER_S = 2e6


def train(url: str, output_dir: str, steps: int) -> None:
    """The training; prints the seconds of each step, those of saves included."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    from hf_spot import SpotArguments, SpotCallback

    torch.set_num_threads(1)
    torch.manual_seed(0)
    took_s: list[float] = []
    began = time.perf_counter()

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            nonlocal began
            if took_s:
                took_s.append(time.perf_counter() - began)
            else:
                took_s.append(0.0)  # the first step begins after the start
            began = time.perf_counter()

    config = GPT2Config(vocab_size=256, n_positions=64, n_embd=192, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
    arguments = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=8,
        max_steps=steps,
        save_steps=20,
        save_total_limit=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    windows = torch.randint(256, (64, 64), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": window, "labels": window} for window in windows]
    settings = SpotArguments(notice="none", drain_timeout_s=60)
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=data, callbacks=[SpotCallback(url, settings), Watch()])  # type: ignore[arg-type]
    failed = None
    try:
        trainer.train()
    except Exception as error:  # the last commit may be late: the steps are what is measured
        failed = type(error).__name__
    print(json.dumps({"steps_s": took_s[1:], "failed": failed}))


def measure(name: str, server: SeaweedFS, proxy: Proxy, steps: int, folder: Path) -> dict[str, Any]:
    with proxy:
        env = {**os.environ, **server.env(), "AWS_ENDPOINT_URL": proxy.endpoint, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--steps", str(steps), "--train", f"s3://tests/{folder.name}", str(folder)]
        done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    told = json.loads(done.stdout.splitlines()[-1])
    steps_s = told["steps_s"]
    failed = proxy.faults.total() if isinstance(proxy, Hostile) else 0
    return {
        "name": name,
        "median_ms": 1e3 * statistics.median(steps_s),
        "mean_ms": 1e3 * statistics.mean(steps_s),
        "requests_failed": failed,
        "failed": told["failed"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(*options.train, options.steps)
        return
    with SeaweedFS() as server, tempfile.TemporaryDirectory() as folder:
        server.make_bucket("tests")
        stores: list[tuple[str, Proxy]] = [
            ("in peace", Proxy(server.endpoint)),
            ("a quarter of all requests fails", Hostile(server.endpoint, options.seed, FAILING)),
            (f"{SLOW_BYTES_PER_S / 1e6:.0f} MB/s", SlowLink(server.endpoint, SLOW_BYTES_PER_S)),
            ("in peace again", Proxy(server.endpoint)),
        ]
        found = [
            measure(name, server, proxy, options.steps, Path(folder, f"run-{number}"))
            for number, (name, proxy) in enumerate(stores)
        ]
    for one in found:
        one["ratio"] = one["median_ms"] / found[0]["median_ms"]
        one["ratio_of_means"] = one["mean_ms"] / found[0]["mean_ms"]
        print(
            f"{one['name']:32} median {one['median_ms']:6.1f} ms ({one['ratio']:.2f}), mean {one['mean_ms']:6.1f} ms "
            f"({one['ratio_of_means']:.2f}), requests failed: {one['requests_failed']}, "
            f"ended with {one['failed'] or 'a commit'}"
        )
    if options.json:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
