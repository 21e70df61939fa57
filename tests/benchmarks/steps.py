"""What SpotCallback costs a step: ``python tests/benchmarks/steps.py [--steps 400] [--json FILE]``.

The time spent in the callback's methods and in what it does where a batch is drawn, per step of a real Trainer, with one rank
and with two (gloo), less what reading the clock takes. The model and the optimizer work for ``--work-ms`` each: the ranks agree
while the optimizer works.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing


def measure(rank: int, ranks: int, folder: str, steps: int, work_ms: float) -> None:
    torch.set_num_threads(1)
    os.environ.update(HF_HUB_OFFLINE="1")
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="1")
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from hf_spot import SpotArguments, SpotCallback
    from hf_spot.training.trainer.random_states import RandomStates

    class Stopwatch:
        """Seconds in methods that are wrapped, and how often one was called."""

        def __init__(self) -> None:
            self.spent_s, self.calls, self._depth = 0.0, 0, 0

        def wrap(self, act: Any) -> Any:
            @functools.wraps(act)
            def timing(*args: Any, **kwargs: Any) -> Any:
                self._depth += 1
                began = time.perf_counter()
                try:
                    return act(*args, **kwargs)
                finally:
                    self._depth -= 1
                    if not self._depth:
                        self.spent_s += time.perf_counter() - began
                        self.calls += 1

            return timing

        def take(self) -> tuple[float, int]:
            taken, self.spent_s, self.calls = (self.spent_s, self.calls), 0.0, 0
            return taken

    def work() -> None:
        until = time.perf_counter() + work_ms / 1e3
        while time.perf_counter() < until:
            pass

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 1)

        def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            work()
            return {"loss": self.layer(x).mean()}

    class Optimizer(torch.optim.SGD):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            work()
            return super().step(*args, **kwargs)

    ours, nothing = Stopwatch(), Stopwatch()

    class Nothing(TrainerCallback):
        """Shows what the stopwatch itself takes."""

        @nothing.wrap
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            """As little as can be done."""

    class Diary(TrainerCallback):
        def __init__(self) -> None:
            self.ours: list[tuple[float, int]] = []
            self.nothing: list[tuple[float, int]] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ours.append(ours.take())
            self.nothing.append(nothing.take())

    for name in [name for name in vars(SpotCallback) if name.startswith("on_")]:
        setattr(SpotCallback, name, ours.wrap(getattr(SpotCallback, name)))
    RandomStates.drawn = ours.wrap(RandomStates.drawn)  # type: ignore[method-assign]
    data = [{"x": torch.randn(8), "labels": torch.zeros(1)} for _ in range(64)]
    arguments = TrainingArguments(
        output_dir=f"{folder}/out",
        max_steps=steps,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        logging_strategy="no",
        disable_tqdm=True,
    )
    spot = SpotCallback(f"{folder}/run", SpotArguments(notice=f"signal,file:{folder}/notice"))
    model = Model()
    diary = Diary()
    callbacks: Any = [Nothing(), spot, diary]
    Trainer(model, arguments, train_dataset=data, callbacks=callbacks, optimizers=(Optimizer(model.parameters()), None)).train()
    if rank == 0:
        clock_s = statistics.median(spent / calls for spent, calls in diary.nothing[10:-1])
        each_s = [spent - calls * clock_s for spent, calls in diary.ours[10:-1]]
        Path(folder, "out.json").write_text(json.dumps(statistics.median(each_s) * 1e6))
    if ranks > 1:
        torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--work-ms", type=float, default=3.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {}
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(measure, (ranks, folder, options.steps, options.work_ms), nprocs=ranks)
            found[f"{ranks}_us"] = json.loads(Path(folder, "out.json").read_text())
        print(f"{ranks} rank{'s' * (ranks > 1)}: {found[f'{ranks}_us']:.0f} us a step, median of {options.steps}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
