"""From the command to the first resumed step: ``python tests/benchmarks/resume.py [--layers 12] [--json FILE]``.

A training of GPT-2's size is preempted, and its checkpoint lies in an S3 server (SeaweedFS, on this machine). Then two ways to
go on, on an empty disk. The peer does one thing after the other: it downloads the checkpoint, starts ``accelerate launch``,
imports, loads, and steps. ``hf-spot launch`` downloads while Python imports.

The server, which would have processors of its own, takes only what the client leaves idle (nice 19).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

HERE = Path(__file__).parent

SCRIPT = """
import json, os, sys, time
tell = lambda what: print(json.dumps([what, time.time()]), file=open("diary", "a"), flush=True)
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
torch.manual_seed(0)
torch.set_num_threads(1)
model = GPT2LMHeadModel(GPT2Config(vocab_size=20_000, n_positions=64, n_embd=768, n_layer=int(os.environ["LAYERS"])))
rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 20_000, (64, 16))]
arguments = TrainingArguments(
    "out", max_steps=1000, per_device_train_batch_size=1, save_strategy="no", logging_strategy="no", report_to="none",
    use_cpu=True, disable_tqdm=True,
)
class Diary(TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
        tell("loaded")
    def on_step_end(self, *args, **kwargs):
        tell("step")
trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Diary()])
tell("imported")
trainer.train(resume_from_checkpoint=os.environ.get("RESUME_FROM"))
"""


def first_step(command: list[str], folder: Path, environ: dict[str, str]) -> dict[str, float]:
    """Starts it in ``folder``; seconds to each thing that its diary tells, for the first time."""
    began = time.time()
    process = subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    diary = folder / "diary"
    while not (diary.exists() and '"step"' in diary.read_text()):
        if process.poll() is not None:
            raise SystemExit(f"{command} ended with {process.returncode}")
        time.sleep(0.01)
    tree = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    for one in psutil.wait_procs(tree, timeout=5)[1]:  # what accelerate leaves behind goes on writing
        one.kill()
    psutil.wait_procs(tree)
    told: dict[str, float] = {"code": code}
    for line in diary.read_text().splitlines():
        what, at = json.loads(line)
        told.setdefault(what, at - began)
    diary.unlink()
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="of GPT-2, 7 million parameters each, beside 15 million (12)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE.parent.parent))
    from tests.servers import SeaweedFS

    class Aside(SeaweedFS):
        def command(self) -> list[str]:
            return ["nice", "-n", "19", *super().command()]

    with Aside() as server, tempfile.TemporaryDirectory(prefix="hf_spot-resume-") as scratch:
        server.make_bucket("tests")
        settings = {"LAYERS": str(options.layers), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        os.environ.update(server.env())
        environ = {**os.environ, **settings}
        folder = Path(scratch)
        (folder / "train.py").write_text(SCRIPT)
        accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "train.py"]
        launch = [sys.executable, "-m", "hf_spot", "launch", "--store", "s3://tests/run", "--num_processes", "1", "train.py"]
        told = first_step(launch, folder, environ)
        assert told["code"] == 75, told

        from hf_spot.run.run import Run

        size_gb = Run("s3://tests/run").find().ref.size_bytes / 1e9
        ours, peers = [], []
        for number in range(options.rounds):
            # Each launch commits once more, so that the state does not change between the two ways.
            shutil.rmtree(folder / "out", ignore_errors=True)
            began = time.time()
            pulled = Run("s3://tests/run").pull(folder / f"pulled-{number}")
            download_s = time.time() - began
            told = first_step(accelerate, folder, {**environ, "RESUME_FROM": str(pulled)})
            peers.append({"download_s": download_s, "imports_s": told["imported"], "load_s": told["step"] - told["imported"]})
            shutil.rmtree(folder / "out", ignore_errors=True)
            shutil.rmtree(pulled)
            ours.append(first_step(launch, folder, environ)["step"])
    peer = min(peers, key=lambda one: sum(one.values()))
    after_each_other_s = sum(peer.values())
    overlapped_s = max(peer["download_s"], peer["imports_s"]) + peer["load_s"]
    found = {"gb": size_gb, "launch_s": min(ours), **peer, "after_each_other_s": after_each_other_s}
    print(f"{size_gb:.2f} GB in S3, {os.cpu_count()} cores shared with the server")
    parts = [
        f"{name} {peer[key]:.1f} s" for name, key in (("download", "download_s"), ("imports", "imports_s"), ("load", "load_s"))
    ]
    print(", ".join(parts))
    print(f"one after the other          {after_each_other_s:5.1f} s")
    print(f"download beside the imports  {overlapped_s:5.1f} s at best")
    print(f"hf-spot launch               {min(ours):5.1f} s ({min(ours) / after_each_other_s:.2f} of one after the other)")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
