"""``python -m tests.kinds [--only PART …]``: trains each kind of model, adapter and setting, with a notice in the middle.

Each training ends as plain Trainer's: weights, log lines, and the files of its fourth checkpoint. What plain Trainer can't
train here, such as an optimizer whose package is not installed, is skipped, with its reason.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from hf_spot import SpotArguments, SpotCallback, TrainingPreempted
from hf_spot.training.state.proof import digest_of
from tests.kinds.models import KINDS, Kind, Samples, llama, words
from tests.kinds.settings import SETTINGS
from tests.training.conftest import Recorder
from tests.training.test_callback import preempt

STEPS, INTERRUPTED, COMPARED = 6, 3, 4
# What depends on the clock, the folder or the number of launches.
NOT_COMPARED = ("training_args.bin", "trainer_state.json", "README.md")
BY_CONTENTS = ".pt"  # `torch.save` writes equal values in different ways


def trainer_of(kind: Kind, settings: dict[str, Any], out: Path, *callbacks: TrainerCallback) -> Trainer:
    """Return a training of a kind with some settings."""
    set_seed(3)
    model = kind.make()
    set_seed(7)
    usual: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "save_steps": 1,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "seed": 5,
        "remove_unused_columns": False,
    }
    data = Samples(kind.sample)
    return Trainer(
        model,
        TrainingArguments(str(out), **(usual | settings)),
        train_dataset=data,
        eval_dataset=torch.utils.data.Subset(data, range(6)),
        callbacks=[*callbacks],
    )


def ending_of(trainer: Trainer, out: Path) -> dict[str, Any]:
    """Return what is compared: weights, log lines, and files of a checkpoint."""
    assert trainer.model is not None
    lines = [
        {name: line[name] for name in sorted(line) if not name.endswith(("_runtime", "_per_second")) and "spot/" not in name}
        for line in trainer.state.log_history
    ]
    files = {}
    for path in sorted((out / f"checkpoint-{COMPARED}").glob("*")):
        if path.suffix == BY_CONTENTS:
            files[path.name] = digest_of(torch.load(path, weights_only=False))
        elif path.is_file() and path.name not in NOT_COMPARED and path.suffix != ".pth":
            files[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"weights": digest_of(dict(trainer.model.state_dict())), "log lines": lines, "files": files}


def play(kind: Kind, settings: dict[str, Any], folder: Path) -> str:
    """Train alone, and with a notice; return what differs, or nothing.

    Raises:
        RuntimeError: the notice did not end the training.
    """
    alone = trainer_of(kind, settings, folder / "alone")
    alone.train()
    out, store = folder / "out", str(folder / "run")
    spot = SpotCallback(store, SpotArguments(notice="signal", keep_checkpoints=0))
    try:
        trainer_of(kind, settings, out, spot, Recorder(INTERRUPTED, preempt(spot))).train()
        raise RuntimeError("the notice did not end the training")
    except TrainingPreempted:
        pass
    trainer = trainer_of(kind, settings, out, SpotCallback(store, SpotArguments(notice="none", keep_checkpoints=0)))
    trainer.train()
    wanted, found = ending_of(alone, folder / "alone"), ending_of(trainer, out)
    return ", ".join(name for name in wanted if wanted[name] != found[name])


def main() -> int:
    """Print a line for each, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names, or parts of them")
    parser.add_argument("--folder", type=Path, help="where to train; it is kept (default: a temporary one)")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="hf_spot-kinds-"))
    rows = [(name, kind, {}) for name, kind in KINDS.items()]
    rows += [(name, Kind(llama, words), settings) for name, settings in SETTINGS.items()]
    wrong = skipped = played = 0
    for at, (name, kind, settings) in enumerate(rows):
        if options.only and not any(part in name for part in options.only):
            continue
        began_s, here = time.monotonic(), folder / str(at)
        try:
            trainer_of(kind, settings, here / "probe").train()
        except Exception as error:
            skipped += 1
            print(f"{name:40} skipped: {' '.join(str(error).split())[:100]}", flush=True)
            continue
        try:
            told = play(kind, settings, here)
        except Exception as error:
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        played, wrong = played + 1, wrong + bool(told)
        print(f"{name:40} {time.monotonic() - began_s:5.1f} s  {f'DIFFERENT: {told}' if told else 'same'}", flush=True)
        shutil.rmtree(here, ignore_errors=True)
    print(f"{played} kinds, {wrong} different, {skipped} skipped")
    if options.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
