"""``python -m tests.ranges``: how much each machine fetches to resume a sharded training, and whether it is enough.

A model is trained with FSDP2 on the CPU, over gloo. Each rank is a machine, with a disk of its own. A notice ends the training,
the disks are lost, and as many machines as before, or others, resume it. Weights and optimizer states must be those that were
saved. It prints the bytes that the store sent to the machine that got the most, beside those that torch's planner wanted, and
those of the whole checkpoint, which each machine would fetch if it did not choose.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from hf_spot import Run, SpotArguments, SpotCallback, TrainingPreempted
from hf_spot.run import selection
from hf_spot.storage.local import LocalStore
from tests.engines.__main__ import TIMEOUT_S, _free_port
from tests.engines.rows import data, fsdp
from tests.waiting import wait_for

STOP_AT = 3


class Counted:
    """Counts the bytes of files that a store sends to this process; the journal is not counted."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        self._lock = threading.Lock()

    def watch(self, kind: Any) -> None:
        """Count what stores of a class send from now on."""

        def counted(plain: Callable[..., Any]) -> Callable[..., Any]:
            def call(store: Any, key: str, *args: Any) -> Any:
                answer = plain(store, key, *args)
                if not key.startswith("journal/"):
                    with self._lock:
                        self.sent_bytes += args[0].stat().st_size if answer is None else len(answer)
                return answer

            return call

        for name in ("get", "get_range", "get_file"):
            setattr(kind, name, counted(getattr(kind, name)))


def digest(trainer: Trainer, optimizer: Any) -> str:
    """Return a digest of all weights and optimizer states. Every rank must call it."""
    found = hashlib.sha256()
    model: Any = trainer.model
    for name, one in sorted(model.named_parameters()):
        values = [one, *(value for _, value in sorted(optimizer.state[one].items()))]
        for value in values:
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            found.update(name.encode() + whole.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Watch(TrainerCallback):
    """Tells what a rank has when it begins, and what it saves; a notice comes at the beginning of a step."""

    def __init__(self, folder: Path, counted: Counted, spot: SpotCallback, stop: bool) -> None:
        self.folder, self.counted, self.spot, self.stop = folder, counted, spot, stop
        self.trainer: Any = None
        self.wanted_bytes = 0

    def _optimizer(self) -> Any:
        return getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step:
            fetched_unforeseen = self.spot._session.run_session._shards.fetched_bytes
            told = {
                "step": state.global_step,
                "sent": self.counted.sent_bytes,
                "wanted": self.wanted_bytes,
                "unforeseen": fetched_unforeseen,
                "digest": digest(self.trainer, self._optimizer()),
            }
            (self.folder / f"began-{args.process_index}.json").write_text(json.dumps(told))

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self.stop and state.global_step == STOP_AT - 1 and args.process_index == 0:
            (self.folder / "notice").touch()
            session = self.spot._session
            assert session is not None
            wait_for(session.run_session.listener.current, "for the watcher of this rank")

    def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if not self.stop:
            return
        told = {"step": state.global_step, "digest": digest(self.trainer, self._optimizer())}
        (self.folder / f"saved-{args.process_index}.json").write_text(json.dumps(told))


def train(folder: Path, rank: int, width: int, stop: bool, blind: bool) -> int:
    """Be one rank, on a machine of its own. Return the exit code."""
    if blind:
        plain_ranges = selection.ranges_read
        selection.ranges_read = lambda *told: {file: [(0, 1)] for file in plain_ranges(*told)}  # type: ignore[assignment]
    torch.set_num_threads(1)
    counted = Counted()
    counted.watch(LocalStore)
    trainer = fsdp(folder / f"disk-{rank}" / "out", max_steps=STOP_AT + 3, save_strategy="no", logging_steps=1)
    torch.manual_seed(0)
    sizes = {"vocab_size": 65, "hidden_size": width, "intermediate_size": 2 * width, "max_position_embeddings": 16}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    spot = SpotCallback(str(folder / "run"), SpotArguments(notice=f"file:{folder / 'notice'}", allow_batch_change=True))
    watch = Watch(folder, counted, spot, stop)
    trainer = Trainer(model=model, args=trainer.args, train_dataset=data(), callbacks=[spot, watch])
    watch.trainer = trainer
    plain = FileSystemReader.read_data

    def read_data(reader: Any, plan: Any, planner: Any) -> Any:
        watch.wanted_bytes += sum(reader.storage_data[item.storage_index].length for item in plan.items)
        return plain(reader, plan, planner)

    FileSystemReader.read_data = read_data  # type: ignore[method-assign]
    try:
        trainer.train()
    except TrainingPreempted:
        return 75
    dist.barrier()
    return 0


def launch(folder: Path, ranks: int, width: int, *, stop: bool, blind: bool = False) -> list[int]:
    """Train on some machines, and return their exit codes."""
    (folder / "notice").unlink(missing_ok=True)
    port, children = _free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            code = 1
            with (folder / f"log-{rank}.txt").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                places = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
                try:
                    code = train(folder, rank, width, stop, blind)
                except BaseException:
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
        children.append(child)
    deadline, codes = time.monotonic() + TIMEOUT_S, dict.fromkeys(children, 124)
    waiting = list(children)
    while waiting and time.monotonic() < deadline:
        for child in list(waiting):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
                waiting.remove(child)
        time.sleep(0.02)
    for child in waiting:
        os.kill(child, 9)
        os.waitpid(child, 0)
    return list(codes.values())


def told(folder: Path, what: str, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{what}-{rank}.json").read_text()) for rank in range(ranks)]


def save(folder: Path, ranks: int, width: int) -> str:
    """Train on some machines until a notice, and lose their disks. Return what is wrong."""
    folder.mkdir(parents=True)
    codes = launch(folder, ranks, width, stop=True)
    for disk in folder.glob("disk-*"):
        shutil.rmtree(disk)
    return "" if codes == [75] * ranks else f"the first launch ended with {codes}"


def resume(source: Path, folder: Path, before: int, after: int, width: int, *, blind: bool) -> tuple[str, dict[str, float]]:
    """Resume what ``before`` machines have saved on ``after`` machines. Return what is wrong, and megabytes."""
    shutil.copytree(source, folder)
    newest = Run(folder / "run").find()
    codes = launch(folder, after, width, stop=False, blind=blind)
    if codes != [0] * after:
        return f"the second launch ended with {codes}", {}
    saved, began = told(folder, "saved", before), told(folder, "began", after)
    if len({(one["step"], one["digest"]) for one in (*saved, *began)}) != 1:
        return f"weights and optimizer states differ: saved {saved}, resumed {began}", {}
    mb = {name: max(one[name] for one in began) / 1e6 for name in ("sent", "wanted", "unforeseen")}
    mb["all"] = sum(file.size for file in newest.files) / 1e6
    return "", mb


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ranges", description=__doc__.splitlines()[0])
    parser.add_argument(
        "cases",
        nargs="*",
        default=["2", "4", "8", "2:4", "4:2", "4:3", "8:4"],
        metavar="RANKS[:RANKS]",
        help="before, and after",
    )
    parser.add_argument(
        "--blind",
        nargs="*",
        default=[],
        metavar="RANKS[:RANKS]",
        help="foresee nothing: all is fetched when it is loaded",
    )
    parser.add_argument("--width", type=int, default=512, help="of the model (512: 6 million parameters)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave everything that was written there")
    options = parser.parse_args()
    place = options.keep or Path(tempfile.mkdtemp(prefix="hf_spot-ranges-"))
    wrong = 0
    print("machines  checkpoint MB  planner wants MB  fetched MB  of all  unforeseen MB", flush=True)
    cases = [*((case, False) for case in options.cases), *((case, True) for case in options.blind)]
    for number, (case, blind) in enumerate(cases):
        before, _, after = case.partition(":")
        source, why, mb = place / f"saved-{before}", "", {}
        if not source.exists():
            why = save(source, int(before), options.width)
        if not why:
            why, mb = resume(source, place / str(number), int(before), int(after or before), options.width, blind=blind)
        if why:
            print(f"{case:8}  {why}: see {place / str(number)}", flush=True)
            wrong += 1
            continue
        print(
            f"{case:8} {mb['all']:13.2f} {mb['wanted']:17.2f} {mb['sent']:11.2f} {mb['sent'] / mb['all']:7.2f}"
            f" {mb['unforeseen']:14.2f}",
            flush=True,
        )
    if options.keep is None and not wrong:
        shutil.rmtree(place)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
