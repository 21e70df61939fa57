"""Trainings in a real Jupyter kernel: interrupted, forked, and in a thread."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hf_spot.run.run import Run
from tests.notebooks.kernels import PRESS_S, Kernel, kernel
from tests.servers import free_ports
from tests.zygote import Zygote

ROOT = Path(__file__).resolve().parents[2]

SETUP = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import threading
import time
from pathlib import Path


def train(slow_from=1000, store="run", **settings):
    from hf_spot import SpotCallback
    from tests.training.conftest import Recorder, make_trainer

    class Slow(Recorder):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step >= slow_from:
                time.sleep(0.2)

        def on_step_end(self, args, state, control, **kwargs):
            print(f"rank {{args.process_index}} has done {{state.global_step}}\\n", end="", flush=True)

    make_trainer(Path("out"), Slow(), SpotCallback(store), **settings).train()
    print("trained\\n", end="", flush=True)


class SlowData:
    def __len__(self):
        return 200

    def __getitem__(self, at):
        import torch

        time.sleep(0.1)
        row = torch.tensor([at % 64] * 16)
        return {{"input_ids": row, "labels": row}}
"""


@contextmanager
def started(folder: Path, zygote: Zygote) -> Iterator[Kernel]:
    with kernel(folder, {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}, zygote) as found:
        assert found.run(SETUP).status == "ok"
        yield found


@pytest.fixture(scope="module")
def kernel_of_all(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Iterator[Kernel]:
    with started(tmp_path_factory.mktemp("kernel"), zygote) as found:
        yield found


@pytest.fixture
def notebook(kernel_of_all: Kernel, tmp_path: Path) -> Kernel:
    """One kernel for several tests, as people use it: each in a folder of its own."""
    assert kernel_of_all.run(f"import os; os.chdir({str(tmp_path)!r})").status == "ok"
    return kernel_of_all


def told(notebook: Kernel) -> str:
    """The error below the cell that ended, without colours."""
    outcome = notebook.outcome()
    assert outcome.status == "error" and len(outcome.errors) == 1, outcome
    assert "To exit" not in outcome.shown and "Warning" not in outcome.shown, outcome.shown
    return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(outcome.errors[0]["traceback"]))


def test_the_stop_button_commits_first_and_the_cell_goes_on_when_it_is_run_again(notebook: Kernel, tmp_path: Path) -> None:
    # The next step wants data which its worker has not made yet: the worker must outlive the interrupt.
    cell = "train(train_dataset=SlowData, max_steps=8, dataloader_num_workers=1, dataloader_prefetch_factor=1)"
    notebook.start(cell)
    notebook.wait_until_shown("has done 2")
    notebook.interrupt()
    error = told(notebook)
    step = Run(tmp_path / "run").latest().step  # type: ignore[union-attr]
    assert f"interrupted at step {step}; step {step} is committed to {tmp_path / 'run'}" in error
    assert "Run this cell again" in error
    assert len(error.strip().splitlines()) <= 5
    assert 2 < step < 8
    again = notebook.run(cell)
    assert again.status == "ok" and f"resuming from step {step}" in again.shown
    assert notebook.run("import signal; assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN").status == "ok"


STUCK = """
class Stuck(SlowData):
    def __getitem__(self, at):
        import signal

        keyboard = signal.getsignal(signal.SIGINT).__self__
        print("stuck", flush=True)
        while keyboard.poll() is None:
            time.sleep(0.02)
        print("heard", flush=True)
        time.sleep(600)

train(train_dataset=Stuck)
"""


def test_whoever_presses_stop_again_does_not_wait_for_the_step(notebook: Kernel, tmp_path: Path) -> None:
    notebook.start(STUCK)
    notebook.wait_until_shown("stuck")
    notebook.interrupt()
    notebook.wait_until_shown("heard")
    time.sleep(PRESS_S)
    notebook.interrupt()
    assert "KeyboardInterrupt" in told(notebook)
    assert [entry.kind for entry in Run(tmp_path / "run").events()] == ["claim", "training", "failed"]
    assert notebook.run("1 + 1").status == "ok"


def test_a_training_in_a_thread_goes_on_without_signals(notebook: Kernel, tmp_path: Path) -> None:
    outcome = notebook.run("thread = threading.Thread(target=train)\nthread.start()\nthread.join()")
    assert outcome.status == "ok" and "trained" in outcome.shown
    assert "signals (SIGTERM,SIGUSR1,SIGHUP) can't be received: training does not run in the main thread" in outcome.shown
    assert Run(tmp_path / "run").state().checkpoints[-1].complete


@pytest.mark.slow
def test_the_workers_of_a_notebook_launcher_commit_before_they_end(tmp_path: Path, zygote: Zygote) -> None:
    launch = "from accelerate import notebook_launcher\nnotebook_launcher(train, (2,), num_processes=2, use_port='%d')"
    with started(tmp_path, zygote) as notebook:
        notebook.start(launch % free_ports(1)[0])
        notebook.wait_until_shown("rank 0 has done 2")
        notebook.interrupt()
        outcome = notebook.outcome()
    latest = Run(tmp_path / "run").latest()
    assert latest is not None and latest.reason == "notice" and latest.details["world_size"] == 2
    assert f"interrupted at step {latest.step}; step {latest.step} is committed" in outcome.shown
    assert "Restart the kernel" in outcome.shown and outcome.status == "error"


def test_a_finished_cell_that_is_run_again_loads_what_is_finished_and_says_so(notebook: Kernel, tmp_path: Path) -> None:
    setup = (
        "import logging\n"
        "from pathlib import Path\n"
        "from hf_spot import SpotCallback\n"
        "from tests.training.conftest import make_trainer\n"
        "logging.getLogger('hf_spot').setLevel(logging.INFO)\n"
        "trainer = make_trainer(Path('out'), SpotCallback('run'))\n"
    )
    cell = "result = trainer.train()\nprint('trained', result.global_step, len(trainer.state.log_history))"
    assert notebook.run(setup).status == "ok"
    first = notebook.run(cell)
    again = notebook.run(cell)
    assert (first.status, again.status) == ("ok", "ok")
    assert "trained 12" in first.shown and "trained 12" in again.shown
    assert "the finished training 1 is loaded, and nothing is left to train" in again.shown
    found = Run(str(tmp_path / "run")).state().checkpoints  # one whose upload waited gives way to the next
    assert {ref.training for ref in found} == {1} and found[-1].step == 12
    # A second `train()` in another cell trains on, from the trained weights, and in a new kernel both are known again.
    assert "trained 12" in notebook.run(f"{cell}  # once more").shown
    assert {ref.training for ref in Run(str(tmp_path / "run")).state().checkpoints} == {1, 2}
    notebook.run("from hf_spot.training.session import recognition\nrecognition.forget_finished()")
    notebook.run(setup)
    for number, text in ((1, cell), (2, f"{cell}  # once more")):
        assert f"the finished training {number} is loaded" in notebook.run(text).shown
