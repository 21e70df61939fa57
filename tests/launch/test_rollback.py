"""A loss that is not finite on one rank: all ranks go back to the newest checkpoint and pass over its step."""

from __future__ import annotations

import pytest

from hf_spot.run.run import Run
from tests.launch.conftest import PLAIN, Launch, Launcher, of_ranks

WRONG_STEP = 7
EXPLODING = f"""
import math, os, runpy, sys
import torch
from transformers import Trainer


class Explode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss * math.nan

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


how, *sys.argv = sys.argv[1:]
plain_loss, plain_step = Trainer.compute_loss, Trainer.training_step


def compute_loss(self, *args, **kwargs):
    loss = plain_loss(self, *args, **kwargs)
    is_wrong = how == "explode" and self.state.global_step + 1 == {WRONG_STEP} and os.environ["RANK"] == "1"
    return Explode.apply(loss) if is_wrong else loss


def training_step(self, *args, **kwargs):
    passes_over = how == "pass-over" and self.state.global_step + 1 == {WRONG_STEP}
    return torch.zeros(()) if passes_over else plain_step(self, *args, **kwargs)


Trainer.compute_loss = compute_loss
if how == "pass-over":
    Trainer.training_step = training_step
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.proof  # on one rank: tests/training/test_not_finite.py
def test_a_loss_that_is_not_finite_on_one_rank_rolls_all_back(launcher: Launcher) -> None:
    script = launcher.tmp_path / "exploding.py"
    script.write_text(EXPLODING)

    def launch(how: str, *options: str) -> Launch:
        number = len(launcher.launches) + 1
        places = ["--output_dir", f"out-{number}", "--weights", f"weights-{number}", "--save_steps", "3", "--epochs", "1"]
        store = str(launcher.tmp_path / f"run-{number}")
        options = ("--notice", "none", *of_ranks(2), *options)
        return launcher.start_known(store, [script, how, PLAIN, *places], options=list(options))

    twin = launch("pass-over")
    assert twin.wait() == 0, twin.text()
    undisturbed = launcher.weights()
    rolled_back = launch("explode", "--on-nan", "rollback")
    assert rolled_back.wait() == 0, rolled_back.text()
    assert launcher.weights() == undisturbed
    entries = list(Run(launcher.tmp_path / "run-2").events())
    [told] = [entry.data for entry in entries if entry.kind == "rollback"]
    assert (told["step"], told["committed_step"], told["span"]) == (8, 6, [WRONG_STEP, WRONG_STEP])
    # The rank that met it says so, although its launch ends in the same moment.
    assert f"step {WRONG_STEP}: the loss is nan" in rolled_back.text() and "(rank 1)" in rolled_back.text()
