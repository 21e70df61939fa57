"""Shielded DataLoader workers: a signal from anywhere is passed on to the training, the parent's ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest
from torch.utils.data import DataLoader, dataloader
from torch.utils.data._utils import worker

from hf_spot.notices.signals import SignalSource
from hf_spot.training.data.worker_processes import shield
from tests.waiting import PATIENCE_S, wait_for


@pytest.fixture
def loaders_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the shield off at the end."""
    monkeypatch.setattr(worker, "_worker_loop", worker._worker_loop)
    iterator = dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(iterator, "__init__", iterator.__init__)


def send_from_elsewhere(process: int, name: str) -> None:
    subprocess.run([sys.executable, "-c", f"import os, signal; os.kill({process}, signal.{name})"], check=True)


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.usefixtures("loaders_of_torch")
def test_a_worker_passes_on_what_its_training_takes_for_a_notice(context: str) -> None:
    shield()
    source = SignalSource(("SIGTERM", "SIGUSR1"))
    source.install()
    try:
        batches = iter(DataLoader(range(100), num_workers=1, multiprocessing_context=context))
        next(batches)
        send_from_elsewhere(batches._workers[0].pid, "SIGINT")  # of a keyboard: the training gets its own
        send_from_elsewhere(batches._workers[0].pid, "SIGUSR1")
        wait_for(lambda: source.count == 1, "for SIGUSR1")
        assert source.count_of("SIGUSR1") == 1
        assert sum(1 for _ in batches) == 99
    finally:
        source.restore()


@pytest.mark.usefixtures("loaders_of_torch")
def test_a_worker_names_a_signal_that_is_no_notice(capfd: pytest.CaptureFixture[str]) -> None:
    shield()
    batches = iter(DataLoader(range(100), num_workers=1, multiprocessing_context="spawn"))
    next(batches)
    send_from_elsewhere(batches._workers[0].pid, "SIGUSR1")
    said = ""

    def is_named() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "has ignored SIGUSR1: signals are no notice for this training" in said

    wait_for(is_named, "for a line")
    assert sum(1 for _ in batches) == 99


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.usefixtures("loaders_of_torch")
def test_a_worker_outlives_a_stranger_and_obeys_its_parent(context: str) -> None:
    shield()
    loader = DataLoader(range(100), num_workers=1, persistent_workers=True, multiprocessing_context=context)
    batches = iter(loader)
    next(batches)
    (process,) = (psutil.Process(one.pid) for one in batches._workers)
    for name in ("SIGTERM", "SIGUSR1"):
        send_from_elsewhere(process.pid, name)
    assert sum(1 for _ in batches) == 99
    assert process.is_running()
    os.kill(process.pid, signal.SIGTERM)
    batches._workers[0].join(PATIENCE_S)
    assert batches._workers[0].exitcode == 0
