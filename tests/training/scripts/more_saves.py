"""plain.py, where rank 0's clock says that a save is due as step 11 ends; nobody asks the others'."""

from __future__ import annotations

import os

import plain

from hf_spot.training.trainer.save_schedule import Cadence


def is_due(self: Cadence) -> bool:
    assert os.environ["RANK"] == "0"
    return self._trainer.state.global_step == 10


Cadence.is_due = is_due

if __name__ == "__main__":
    plain.main()
