"""plain.py, but what its steps give differs from process to process: the loss after a step, or the order of the data."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import Sampler
from transformers import Trainer

sys.path.insert(0, str(Path(__file__).parent))
import plain

NOISY_FROM = int(os.environ.get("NOISY_FROM", "0"))  # step
OTHER_ORDER_FROM = int(os.environ.get("OTHER_ORDER_FROM", "0"))  # sample of an epoch
SEND_S = os.environ.get("SEND_S")
UPLOADS_UP_TO = int(os.environ.get("UPLOADS_UP_TO", "0"))  # step
UPLOADS_AGAIN = Path(os.environ.get("UPLOADS_AGAIN", "/nonexistent"))  # a file


class Restless(Sampler[int]):
    """The same order in every process up to a sample, another one from there on."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield from range(OTHER_ORDER_FROM)
        rest = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "big"))
        yield from (torch.randperm(self.count - OTHER_ORDER_FROM, generator=rest) + OTHER_ORDER_FROM).tolist()


class Noisy(Trainer):
    """Adds noise that no seed fixes."""

    def compute_loss(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        loss = super().compute_loss(*args, **kwargs)
        noise = int.from_bytes(os.urandom(2), "big") / 1e6
        return loss * (1 + noise) if NOISY_FROM and self.state.global_step + 1 >= NOISY_FROM else loss

    def _get_train_sampler(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return Restless(122) if OTHER_ORDER_FROM else super()._get_train_sampler(*args, **kwargs)


if SEND_S:
    from hf_spot.training.session import step_teller

    step_teller.SEND_S = float(SEND_S)
if UPLOADS_UP_TO:
    from hf_spot import Run

    plain_upload = Run.upload

    def upload(run, folder, request, **more):  # type: ignore[no-untyped-def]
        while request.step > UPLOADS_UP_TO and not UPLOADS_AGAIN.exists():  # a network that carries nothing any more
            time.sleep(0.1)
        return plain_upload(run, folder, request, **more)

    Run.upload = upload  # type: ignore[method-assign]
plain.Trainer = Noisy  # type: ignore[misc]
plain.main()
