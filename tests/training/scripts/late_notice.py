"""Trains on two ranks; rank 1 alone hears that the machine goes, after the last step, while a file of that step is held up."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from plain import Bytes
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from hf_spot import Run, SpotArguments, SpotCallback
from hf_spot.policy import restarts
from hf_spot.storage.local import LocalStore

RANK, STEPS = int(os.environ["RANK"]), 4
put_file = LocalStore.put_file


def put_file_slowly(self, key, path, *rest):  # type: ignore[no-untyped-def]
    while f"checkpoint-{STEPS}/" in key:
        time.sleep(0.1)
    put_file(self, key, path, *rest)


class Notice(TrainerCallback):
    def on_train_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if RANK == 1:
            while Run("run").latest() is None:  # step 2 is not what the notice is about
                time.sleep(0.1)
            Path("notice-1").write_text(json.dumps({"deadline_s": 1}))


restarts.LATE_S = 0.0
LocalStore.put_file = put_file_slowly  # type: ignore[method-assign]
shape = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=256, n_positions=32, bos_token_id=0, eos_token_id=0)
spot = SpotCallback("run", SpotArguments(notice=f"file:notice-{RANK}", drain_timeout_s=3600))
options = TrainingArguments("out", max_steps=STEPS, save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
Trainer(GPT2LMHeadModel(shape), options, train_dataset=Bytes(64), callbacks=[Notice(), spot]).train()
