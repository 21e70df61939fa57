"""Shielded DataLoader workers: a signal from anywhere does nothing, the parent's ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest
from torch.utils.data import DataLoader, dataloader
from torch.utils.data._utils import worker

from hf_spot.training.data.worker_processes import shield
from tests.waiting import PATIENCE_S


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_worker_outlives_a_stranger_and_obeys_its_parent(context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_worker_loop", worker._worker_loop)
    iterator = dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(iterator, "__init__", iterator.__init__)
    shield()
    loader = DataLoader(range(100), num_workers=1, persistent_workers=True, multiprocessing_context=context)
    batches = iter(loader)
    next(batches)
    (process,) = (psutil.Process(one.pid) for one in batches._workers)
    for name in ("SIGTERM", "SIGUSR1"):
        subprocess.run([sys.executable, "-c", f"import os, signal; os.kill({process.pid}, signal.{name})"], check=True)
    assert sum(1 for _ in batches) == 99
    assert process.is_running()
    os.kill(process.pid, signal.SIGTERM)
    batches._workers[0].join(PATIENCE_S)
    assert batches._workers[0].exitcode == 0
