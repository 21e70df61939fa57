"""``sharded.py FOLDER SCENE…``: one of the ranks that shard their model, by FSDP on the CPU; what they see is kept as JSON.

All scenes of a launch are one after the other in the same processes, because importing torch takes longer than training.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from hf_spot import Run, SpotArguments, SpotCallback
from hf_spot.errors import ConfigError, SpotError
from hf_spot.training.ranks.agreement import Agreement
from hf_spot.training.saving import async_writer
from hf_spot.training.saving.async_writer import AsyncCheckpointWriter
from hf_spot.training.saving.later_copies import LaterCopies
from tests.waiting import PATIENCE_S, wait_for

RANK = int(os.environ["RANK"])
SCENES: dict[str, Callable[[Path], dict[str, Any]]] = {}


class Before(TrainerCallback):
    """Acts before chosen steps."""

    def __init__(self, acts: dict[int, Callable[[], None]]) -> None:
        self._acts = acts

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self._acts.get(state.global_step + 1, lambda: None)()


def sharding(output_dir: Path, version: int, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    """A tiny model of 65 words, which two ranks can't halve: 12 steps, a save after every third."""
    AcceleratorState._reset_state()
    torch.manual_seed(0)
    sizes = {"vocab_size": 65, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 16}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (96, 16))]
    fsdp: dict[str, Any] = {
        "version": version,
        "state_dict_type": "SHARDED_STATE_DICT",
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "sync_module_states": "false",
        "cpu_ram_efficient_loading": "false",
    }
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "save_steps": 3,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "fsdp": "full_shard",
        "fsdp_config": fsdp,
    }
    args = TrainingArguments(**(defaults | settings))
    PartialState(cpu=True)
    # accelerate shards on GPUs alone; on the CPU it has to be told that this is one.
    PartialState._shared_state |= {"distributed_type": "MULTI_GPU", "device": torch.device("cpu")}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    return Trainer(model=model, args=args, train_dataset=data, callbacks=list(callbacks))


def spot(run: Path, **settings: Any) -> SpotCallback:
    return SpotCallback(str(run), SpotArguments(notice="none", keep_checkpoints=0, on_save_error="go-on", **settings))


def local(trainer: Trainer) -> list[list[float]]:
    """This rank's part of the weights."""
    values = [one.to_local() if hasattr(one, "to_local") else one for one in trainer.model.parameters()]
    return [one.detach().flatten().tolist() for one in values]


def shard(folder: Path, step: int, rank: int = RANK, of: str = "optimizer_0") -> Path:
    return folder / f"checkpoint-{step}" / of / f"__{rank}_0.distcp"


def commits(run: Path) -> list[int]:
    return [entry.data["step"] for entry in Run(run).events() if entry.kind == "commit"]


class Log(logging.Handler):
    """What hf_spot says on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __enter__(self) -> Log:
        logging.getLogger("hf_spot").addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger("hf_spot").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.lines.append(record.getMessage())


def behind_the_training(folder: Path, version: int, out: Path) -> dict[str, Any]:
    """Trainer alone, and the same with a run; the writer of rank 1 is held, first before its shards, then behind them."""
    plain = sharding(folder / "plain", version, save_total_limit=4)
    plain.train()
    run, may_write, may_end = folder / "run", folder / "may write", folder / "may end"
    plain_together, plain_open, names = async_writer._plain_save_together, async_writer._plain_open, []

    def together(*args: Any, **kwargs: Any) -> None:
        names.append(threading.current_thread().name)
        assert RANK == 0 or wait_for(may_write.exists)
        plain_together(*args, **kwargs)

    def opened(path: Any) -> Any:
        if RANK == 1 and "checkpoint-6" in str(path):
            wait_for(may_end.exists)
        assert plain_open is not None
        return plain_open(path)

    seen: dict[str, Any] = {}

    def before_5() -> None:
        seen["shards while rank 1 is held"] = [shard(out, 3, rank).exists() for rank in (0, 1)]
        seen["commits while rank 1 is held"] = commits(run)
        may_write.touch()

    def before_8() -> None:
        if RANK == 0:
            wait_for(lambda: (out / "checkpoint-6" / "scheduler.pt").exists(), "for all that rank 0 writes")
        seen["commits while a file of rank 1 is missing"] = commits(run)
        seen["older ones meanwhile"] = sorted(path.name for path in out.glob("checkpoint-*"))
        dist.barrier()
        may_end.touch()

    def before_9() -> None:
        settled(callback)
        dist.barrier()  # rank 0 rotates
        seen["older ones afterwards"] = sorted(path.name for path in out.glob("checkpoint-*"))

    callback = spot(run)
    acts: dict[int, Callable[[], None]] = {5: before_5, 6: lambda: settled(callback), 8: before_8}
    acts |= {9: before_9, 11: lambda: settled(callback)}
    trainer = sharding(out, version, callback, Before(acts), save_total_limit=1)
    async_writer._plain_save_together, async_writer._plain_open = together, opened
    try:
        trainer.train()
    finally:
        async_writer._plain_save_together, async_writer._plain_open = plain_together, plain_open
    return seen | {"threads": names, "same": local(trainer) == local(plain), "commits": commits(run)}


def settled(callback: Any) -> None:
    session = callback._session
    assert session.commits.behind.wait(PATIENCE_S)
    assert session.run_session.uploader is None or session.run_session.uploader.drain(PATIENCE_S)


def scene(act: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    SCENES[act.__name__] = act
    return act


@scene
def fsdp2(folder: Path) -> dict[str, Any]:
    """Sharded by DTensors, on one disk."""
    return behind_the_training(folder, 2, folder / "out")


@scene
def fsdp1(folder: Path) -> dict[str, Any]:
    """Sharded by ShardedTensors, on a disk for each rank."""
    return behind_the_training(folder, 1, folder / f"out-{RANK}")


@scene
def mutating(folder: Path) -> dict[str, Any]:
    """Shards, and a tensor that both ranks have, change as fast as they can while they are written."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (2,))
    parts = {f"layer {number}": torch.zeros(50_000) for number in range(10)} | {"turned": torch.zeros(300, 200).t()}
    state: dict[str, Any] = {name: DTensor.from_local(part, mesh, [Shard(0)]) for name, part in parts.items()}
    state["of all"] = parts["of all"] = torch.zeros(1000)
    behind, group = AsyncCheckpointWriter(ranks=Agreement(2)), Agreement(2)
    found, places = [], set()
    for step in range(3):
        for part in parts.values():
            part.fill_(step)
        path = folder / str(step)
        with behind.capturing():
            dcp.save(state_dict={"state": state}, storage_writer=dcp.FileSystemWriter(path), planner=dcp.DefaultSavePlanner())
            assert behind._arena is not None
            places.add((behind._arena._used, id(behind._arena._memory)))
            written_at_once = path.exists()
            dist.barrier()  # behind it the other rank begins to write
        written, changes = threading.Event(), 0
        behind.then(written.set)
        while not written.is_set() or changes < 3:
            for part in parts.values():
                part.add_(1)
            changes += 1
        loaded = {"state": {name: torch.empty(value.size()) for name, value in state.items()}}
        dcp.load(loaded, storage_reader=dcp.FileSystemReader(path))
        one_step = all(bool((value == step).all()) for value in loaded["state"].values())
        found.append({"written at once": written_at_once, "one step": one_step})
    behind.close()
    group.close()
    return {"each": found, "places": len(places)}


@scene
def no_memory(folder: Path) -> dict[str, Any]:
    """Rank 1 has no room for its shards; rank 0 has."""
    behind = AsyncCheckpointWriter(limit_bytes=0 if RANK == 1 else None, ranks=Agreement(2))
    there = []
    with Log() as log:
        for number in range(2):
            path = folder / str(number)
            with behind.capturing():
                dcp.save(
                    state_dict={"state": {f"of {RANK}": torch.full((1000,), 1.0)}},
                    storage_writer=dcp.FileSystemWriter(path),
                    planner=dcp.DefaultSavePlanner(),
                )
                there.append((path / ".metadata").exists())
            assert behind.wait(PATIENCE_S)
    behind.close()
    return {"there": there, "said": log.lines}


@scene
def odd(folder: Path) -> dict[str, Any]:
    """Whatever a rank may have, written by torch at once, and behind a training; and one that can only be written at once."""
    wide = torch.randn(6, 8)
    values: dict[str, Any] = {
        "turned": wide.t(),
        "a view": wide[2:4],
        "every other": wide[:, ::2],
        "one column": wide[:, 3:4],
        "nothing": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
        "half": torch.randn(3).to(torch.bfloat16),
        "number": torch.tensor(3),
        "trained": torch.nn.Parameter(torch.randn(3)),
        "no tensors": {"lr": 0.1, "betas": (0.9, 0.999), "name": "ä" * 100},
    }
    behind = AsyncCheckpointWriter(ranks=Agreement(2))
    found, said = [], Log()
    for more in ({}, {"conjugate": torch.randn(3, dtype=torch.complex64).conj()} if RANK == 1 else {}):
        state = {"state": {f"{name} of {RANK}": value for name, value in (values | more).items()}}
        for kind, captures in (("plain", contextlib.nullcontext()), ("spot", behind.capturing())):
            path = folder / f"{kind}-{len(found)}"
            with captures, said:
                dcp.save(state_dict=state, storage_writer=dcp.FileSystemWriter(path), planner=dcp.DefaultSavePlanner())
                at_once = path.exists()
                dist.barrier()
        assert behind.wait(PATIENCE_S)
        kinds = [(folder / f"{kind}-{len(found)}" / f"__{RANK}_0.distcp").read_bytes() for kind in ("plain", "spot")]
        found.append({"at once": at_once, "same": kinds[0] == kinds[1]})
    behind.close()

    alone = AsyncCheckpointWriter(ranks=Agreement(1))  # of a training of one rank: nobody else is asked
    state = {"state": values}
    folders = [folder / f"alone-{RANK}-{kind}" for kind in ("plain", "spot")]
    for path, captures, how in zip(
        folders, (contextlib.nullcontext(), alone.capturing()), ({"no_dist": True}, {}), strict=True
    ):
        with captures:
            dcp.save(state_dict=state, storage_writer=dcp.FileSystemWriter(path), planner=dcp.DefaultSavePlanner(), **how)
            at_once = path.exists()
    alone.close()
    kinds = [(path / "__0_0.distcp").read_bytes() for path in folders]
    return {"each": found, "said": said.lines, "alone": {"at once": at_once, "same": kinds[0] == kinds[1]}}


@scene
def one_reads(folder: Path) -> dict[str, Any]:
    """A callback of rank 1 alone may read what is saved."""
    out, there = folder / "out", []

    class Reads(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            there.append([shard(out, state.global_step, rank).exists() for rank in (0, 1)])

    callback = spot(folder / "run")
    sharding(out, 2, callback, *[Reads()] * RANK, max_steps=4, save_steps=2).train()
    return {"there": there}


@scene
def trouble(folder: Path) -> dict[str, Any]:
    """Rank 1 can't write a file as long as its shards when step 6 is saved, nor any other when step 12 is."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    out, run = folder / "out", folder / "run"
    callback = spot(run)
    folders = []

    def limit(size: int) -> None:
        settled(callback)
        if RANK == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def look() -> None:
        settled(callback)
        dist.barrier()  # rank 0 removes what is torn
        folders.append(sorted(path.name for path in out.glob("*checkpoint-*")))
        limit(resource.RLIM_INFINITY)

    acts: dict[int, Callable[[], None]] = {5: lambda: limit(30_000), 8: look, 11: lambda: limit(1000), 14: look}
    acts |= {step: lambda: settled(callback) for step in (6, 9, 12, 15)}
    trainer = sharding(out, 2, callback, Before(acts), save_total_limit=1, max_steps=15)
    with Log() as log:
        trainer.train()
    return {"folders": folders, "commits": commits(run), "said": log.lines, "step": trainer.state.global_step}


@scene
def refused(folder: Path) -> dict[str, Any]:
    """Trainings that Trainer can't resume."""
    said, steps = [], []
    for variable in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))]:
        del os.environ[variable]  # left by the trainings before
    for name, parallel, more in (("tp", {"tp_size": 2}, {"fsdp": None, "fsdp_config": None}), ("cp", {"cp_size": 2}, {})):
        trainer = sharding(folder / name, 2, spot(folder / "run"), parallelism_config=ParallelismConfig(**parallel), **more)
        said.append(how_it_ends(trainer))
        steps.append(trainer.state.global_step)
    AcceleratorState._reset_state()
    del os.environ["ACCELERATE_USE_FSDP"]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_attention_heads=2))
    if RANK == 0:
        model.save_pretrained(folder / "model")
    dist.barrier()
    divided = LlamaForCausalLM.from_pretrained(folder / "model", distributed_config=DistributedConfig(fsdp_size=2))
    args = TrainingArguments(str(folder / "out"), max_steps=2, save_strategy="no", report_to="none", use_cpu=True)
    row = torch.zeros(16, dtype=torch.int64)
    data = [{"input_ids": row, "labels": row}] * 8
    trainer = Trainer(model=divided, args=args, train_dataset=data, callbacks=[spot(folder / "run")])
    said.append(how_it_ends(trainer))
    return {"said": said, "steps": [*steps, trainer.state.global_step], "run": (folder / "run" / "journal").exists()}


def how_it_ends(trainer: Trainer) -> str:
    try:
        trainer.train()
    except ConfigError as error:
        return f"{error} ({error.hint})"
    return "trained"


@scene
def replicated(folder: Path) -> dict[str, Any]:
    """Both ranks hold the whole model (DDP), and rank 0 copies it as late as it can; then a weight becomes NaN on both."""
    plain_run, left = LaterCopies.run, []

    def run(self: LaterCopies) -> None:
        left.append(len(self))
        assert wait_for(lambda: self._is_hurried or self.is_confirmed())
        plain_run(self)

    LaterCopies.run = run  # type: ignore[method-assign]

    def train(out: Path, *callbacks: TrainerCallback) -> Trainer:
        AcceleratorState._reset_state()
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        )
        data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (96, 16))]
        args = TrainingArguments(
            str(out), max_steps=6, save_steps=1, learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True
        )
        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=list(callbacks))
        for one in callbacks:
            if isinstance(one, Before):
                one._acts[5] = lambda: trainer.optimizer.state[next(trainer.model.parameters())]["exp_avg"].fill_(torch.nan)
        with contextlib.suppress(SpotError):
            trainer.train()
        return trainer

    def files(out: Path) -> dict[str, str]:
        names = ("model.safetensors", "optimizer.pt", f"rng_state_{RANK}.pth")
        found = [path for path in out.glob("checkpoint-*/*") if path.name in names]
        return {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in found}

    train(folder / "plain")
    train(folder / "out", spot(folder / "run"))
    distributed = str(AcceleratorState().distributed_type)
    wrong = train(folder / "wrong", spot(folder / "wrong-run"), Before({}))
    LaterCopies.run = plain_run  # type: ignore[method-assign]
    return {
        "distributed": distributed,
        "plain": files(folder / "plain"),
        "spot": files(folder / "out"),
        "left for later": left,
        "step of the end": wrong.state.global_step,
        "commits": commits(folder / "wrong-run"),
    }


@scene
def killed(folder: Path) -> dict[str, Any]:
    """Rank 1 dies in the middle of the shards of step 6."""
    callback = spot(folder / "run")
    plain_together, saves = async_writer._plain_save_together, []

    def together(*args: Any, **kwargs: Any) -> None:
        saves.append(0)
        if RANK == 1 and len(saves) == 4:  # each save is two: of the weights and of the optimizer
            os.kill(os.getpid(), signal.SIGKILL)
        plain_together(*args, **kwargs)

    async_writer._plain_save_together = together
    trainer = sharding(folder / "out", 2, callback, Before({5: lambda: settled(callback)}))
    trainer.train()
    return {}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=RANK, world_size=int(os.environ["WORLD_SIZE"]))
    for name in sys.argv[2:]:
        (folder / name).mkdir(exist_ok=True)
        facts = SCENES[name](folder / name)
        (folder / f"{name}-{RANK}.json").write_text(json.dumps(facts))
        dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads sometimes abort a process whose interpreter is ending


if __name__ == "__main__":
    main()
