"""What the audit of a save and the proof of a resume cost: ``python tests/benchmarks/proof.py``.

One training each of a whole model and of a LoRA adapter beside a frozen one, with a `SpotCallback` whose run is a directory,
and the same with Trainer alone. Counted is processor time, which other programs on the machine don't change much, and time on
the clock. The peer of the audit is Trainer's own save; that of the proof, Trainer's own loading of weights and optimizer.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS, SAVE_STEPS, WIDTH, VOCABULARY = 24, 4, 768, 20_000


class Spent:
    """Seconds in functions, of this thread's processor and of the clock, for each call of the outermost one."""

    def __init__(self) -> None:
        self.cpu_s: dict[str, list[float]] = {}
        self.wall_s: dict[str, list[float]] = {}
        self._inside: set[str] = set()

    def watch(self, name: str, owner: Any, method: str, *, threads: bool = False) -> None:
        """Count the calls of a method under a name; with ``threads`` the processor time of the whole process."""
        plain, clock = getattr(owner, method), time.process_time if threads else time.thread_time

        @functools.wraps(plain)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if name in self._inside:
                return plain(*args, **kwargs)
            self._inside.add(name)
            cpu, wall = clock(), time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                self._inside.discard(name)
                self.cpu_s.setdefault(name, []).append(clock() - cpu)
                self.wall_s.setdefault(name, []).append(time.perf_counter() - wall)

        setattr(owner, method, counted)


def make(folder: Path, layers: int, adapter: bool, steps: int, callbacks: Any) -> Any:
    """Return a trainer of a GPT-2, whole or with an adapter."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=layers))
    if adapter:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True))
    data = [{"input_ids": row, "labels": row} for row in torch.randint(0, VOCABULARY, (64, 16))]
    arguments = TrainingArguments(
        str(folder / "out"),
        max_steps=steps,
        per_device_train_batch_size=1,
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)  # type: ignore[arg-type]


def train(kind: str, layers: int, adapter: bool, folder: Path) -> dict[str, Any]:
    """One training and, with hf_spot, one resume; the seconds of each part."""
    from transformers import Trainer

    spent = Spent()
    if kind == "trainer":
        spent.watch("save", Trainer, "_save_checkpoint", threads=True)
        make(folder, layers, adapter, STEPS, []).train()
        make(folder, layers, adapter, STEPS, []).train(resume_from_checkpoint=str(folder / "out" / f"checkpoint-{STEPS}"))
        return {"cpu_s": spent.cpu_s, "wall_s": spent.wall_s}
    from hf_spot import SpotArguments, SpotCallback
    from hf_spot.training.session.recognition import forget_finished
    from hf_spot.training.state.carried import CarriedState
    from hf_spot.training.trainer.own_state import SavedTensors
    from hf_spot.training.trainer.proof import Proof

    for owner, method, name in (
        (CarriedState, "look", "look"),
        (SavedTensors, "_note", "audit"),
        (CarriedState, "save", "audit"),
        (Proof, "save", "audit"),
        (Proof, "expect", "proof"),
        (Proof, "compare_loaded", "proof"),
        (Proof, "conclude", "proof"),
    ):
        spent.watch(name, owner, method)
    spent.watch("load", Trainer, "_load_from_checkpoint")
    spent.watch("load", Trainer, "_load_optimizer_and_scheduler")
    settings = SpotArguments(notice="none", keep_checkpoints=0)
    make(folder, layers, adapter, STEPS, [SpotCallback(str(folder / "run"), settings)]).train()
    audits = {name: list(values) for name, values in spent.cpu_s.items()}
    bytes_saved = sum(file.stat().st_size for file in (folder / "out" / f"checkpoint-{STEPS}").rglob("*") if file.is_file())
    forget_finished()
    longer = make(folder, layers, adapter, STEPS + 1, [SpotCallback(str(folder / "run"), settings)])
    longer.train()
    return {"cpu_s": spent.cpu_s, "wall_s": spent.wall_s, "audit_calls": len(audits["audit"]), "gb": bytes_saved / 1e9}


def measure(layers: int, adapter: bool) -> dict[str, Any]:
    """Run both trainings in processes of their own; return seconds and ratios."""
    each = {}
    for kind in ("trainer", "spot"):
        with tempfile.TemporaryDirectory(prefix="hf_spot-proof-") as scratch:
            out = Path(scratch, "found.json")
            what = ["--only", kind, "--layers", str(layers), "--json", str(out), "--folder", scratch, *["--adapter"] * adapter]
            done = subprocess.run([sys.executable, __file__, *what], capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            each[kind] = json.loads(out.read_text())
    saves = STEPS // SAVE_STEPS
    spot, found = each["spot"], {"gb": each["spot"]["gb"]}
    for clock in ("cpu_s", "wall_s"):
        save_s = statistics.median(each["trainer"][clock]["save"][1:])
        audit_s = sum(spot[clock]["audit"][: spot["audit_calls"]]) / saves
        proof_s, load_s = sum(spot[clock]["proof"]), sum(spot[clock]["load"])
        found |= {f"save_{clock}": save_s, f"audit_{clock}": audit_s, f"audit_of_save_{clock}": audit_s / save_s}
        found |= {f"proof_{clock}": proof_s, f"load_{clock}": load_s, f"look_{clock}": statistics.mean(spot[clock]["look"])}
    return found


def _lines(found: dict[str, float]) -> list[str]:
    rows: dict[str, list[str]] = {}
    for clock in ("cpu_s", "wall_s"):
        audit_s, proof_s = found[f"audit_{clock}"], found[f"proof_{clock}"]
        for what, shown in (
            ("Trainer's own save", f"{found[f'save_{clock}']:.3f}"),
            ("the audit of a save", f"{audit_s:.4f} ({found[f'audit_of_save_{clock}']:.1%} of it)"),
            ("Trainer loads weights, optimizer", f"{found[f'load_{clock}']:.3f}"),
            ("the proof of a resume", f"{proof_s:.3f} ({proof_s / found['gb']:.2f} a GB)"),
            ("the first look, once a launch", f"{found[f'look_{clock}']:.4f}"),
        ):
            rows.setdefault(what, []).append(shown)
    return [f"  {what:33} {cpu:>22} {wall:>22}" for what, (cpu, wall) in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="of GPT-2, 7 million parameters each, beside 15 million (12)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--adapter", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("trainer", "spot"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        options.json.write_text(json.dumps(train(options.only, options.layers, options.adapter, options.folder)))
        sys.stdout.flush()
        os._exit(0)
    found = {}
    for name, adapter in (("a whole model", False), ("a LoRA adapter", True)):
        found[name] = one = measure(options.layers, adapter)
        print(f"{name}: checkpoints of {one['gb']:.2f} GB (seconds of the processor, and on the clock)")
        for line in _lines(one):
            print(line)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
