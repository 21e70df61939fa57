"""A row of `tests.engines`, trained as a script on the ranks of a launcher: ``engine.py ROW OUT``."""

import os
import sys
from pathlib import Path

import torch
from rows import ROWS
from safetensors.torch import save_file

torch.set_num_threads(1)
name, out = sys.argv[-2:]
trainer = ROWS[name].make(Path(out) / "train")
trainer.train()
parts = {}
for key, parameter in trainer.model.named_parameters():
    part = getattr(parameter, "ds_tensor", parameter)  # DeepSpeed's part of it
    parts[key] = (part.to_local() if hasattr(part, "to_local") else part).detach().cpu().contiguous().clone()
save_file(parts, Path(out) / f"rank-{trainer.args.process_index}.safetensors")
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)  # gloo's threads sometimes abort a process whose interpreter is ending
