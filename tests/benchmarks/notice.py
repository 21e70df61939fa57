"""How long it takes from a notice to its commit: ``python tests/benchmarks/notice.py [--layers 12] [--json FILE]``.

A training on the CPU whose checkpoints go to an S3 server that only moves bytes (`sink.py`). It saves twice, which tells what
the link carries, and then hears a notice. Measured is the time from the decision at the end of that step until the commit
stands; the peer is the time in which that link carries the checkpoint's bytes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

SAVE_STEPS, NOTICE_STEP = 8, 20


def train(layers: int, threads: int, folder: Path) -> dict[str, Any]:
    """One training until its preemption."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    from hf_spot import Run, SpotArguments, SpotCallback, TrainingPreempted
    from hf_spot.training.trainer.trainer_session import TrainerSession

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20_000, n_positions=64, n_embd=768, n_layer=layers))
    data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 20_000, (64, 16))]
    arguments = TrainingArguments(
        str(folder / "out"),
        max_steps=1000,
        per_device_train_batch_size=1,
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    url, decided_at = "s3://sink/notice", []
    plain_decide = TrainerSession._decide

    def decide(self: TrainerSession, *args: Any) -> Any:
        decided_at.append(time.time())
        return plain_decide(self, *args)

    TrainerSession._decide = decide  # type: ignore[method-assign]

    class Announcer(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == NOTICE_STEP:
                (folder / "notice").touch()

    callbacks: Any = [Announcer(), SpotCallback(url, SpotArguments(notice=f"file:{folder / 'notice'}"))]
    try:
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks).train()
    except TrainingPreempted:
        committed = [entry for entry in Run(url).events() if entry.kind == "commit"]
    sizes = [sum(file["size"] for file in entry.data["files"]) for entry in committed]
    carried = committed[-2].data["upload_s"]
    return {
        "gb": sizes[-1] / 1e9,
        "notice_to_commit_s": committed[-1].time.timestamp() - decided_at[0],
        "save_s": committed[-1].data["save_s"],
        "carried_s": sizes[-1] * carried / sizes[-2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="of GPT-2, 7 million parameters each, beside 15 million (12)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    from transfers import sink

    logging.basicConfig(level=os.environ.get("LOG", "ERROR"))
    with tempfile.TemporaryDirectory(prefix="hf_spot-notice-") as scratch, sink(Path(scratch)):
        found = train(options.layers, options.threads, Path(scratch))
    wanted_s = 1.3 * found["carried_s"] + 1
    print(f"{found['gb']:.2f} GB: from the notice to its commit {found['notice_to_commit_s']:.2f} s, of which", end=" ")
    print(f"{found['save_s']:.2f} s until the files were written; the link carries them in {found['carried_s']:.2f} s")
    print(f"that is {found['notice_to_commit_s'] / wanted_s:.2f} of 1.3 times that and a second")
    if options.json:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
