"""Reads what trackers have written, with their own readers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 32768
_CHUNK = struct.Struct("<IHB")
MEASURED = ("runtime", "_per_second", "spot/", "/total_flos")


@dataclass(frozen=True)
class Row:
    """One line of a tracker.

    Args:
        number: W&B's step: the row's number in its run.
        step: Trainer's step.
        values: what it says.
    """

    number: int
    step: int
    values: dict[str, Any]


@dataclass
class WandbFile:
    """One ``.wandb`` file: what one launch has written offline."""

    path: Path
    id: str = ""
    rows: list[Row] = field(default_factory=list)
    began_ns: int = 0
    ended: bool = False


@dataclass
class MlflowRun:
    """One run of MLflow: its metrics as (step, value), without those that are measured."""

    id: str
    status: str
    metrics: dict[str, list[tuple[int, float]]]


def values(rows: list[Row]) -> list[tuple[int, dict[str, Any]]]:
    """Return what rows say, without seconds and what a tracker adds itself."""
    kept = []
    for row in rows:
        said = {name: value for name, value in row.values.items() if not any(part in name for part in MEASURED)}
        kept.append((row.step, said))
    return kept


def read_wandb(folder: Path) -> list[WandbFile]:
    """Return the offline runs below a folder, in the order of their beginning."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        file = WandbFile(path)
        for data in _records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run" and not file.id:
                file.id, file.began_ns = record.run.run_id, record.run.start_time.ToNanoseconds()
            file.ended |= record.WhichOneof("record_type") == "exit"
            if record.WhichOneof("record_type") == "history":
                said = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                number = record.history.step.num if record.history.HasField("step") else said["_step"]
                step = said.pop("train/global_step", -1)
                file.rows.append(Row(number, step, {name: value for name, value in said.items() if not name.startswith("_")}))
        found.append(file)
    return sorted(found, key=lambda file: file.began_ns)


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file of W&B's: a log in the format of LevelDB, which W&B's newest Python can only write.

    Each block of 32 KiB holds chunks: checksum, length, and whether it is a whole record, or its first, middle or last part.
    """
    at, parts = 7, b""  # behind the magic
    while at + _CHUNK.size <= len(data):
        left = _BLOCK_BYTES - at % _BLOCK_BYTES
        if left < _CHUNK.size:
            at += left
            continue
        _, length, kind = _CHUNK.unpack_from(data, at)
        part, at = data[at + _CHUNK.size : at + _CHUNK.size + length], at + _CHUNK.size + length
        if kind == 0 or len(part) < length:  # the launch was killed while it wrote
            return
        parts = part if kind in (1, 2) else parts + part
        if kind in (1, 4):
            yield parts


def read_mlflow(uri: str, experiment: str) -> list[MlflowRun]:
    """Return the runs of an experiment in a tracking store or server."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    found = []
    for run in client.search_runs([client.get_experiment_by_name(experiment).experiment_id]):
        metrics = {}
        for name in run.data.metrics:
            if not any(part in name for part in (*MEASURED, "total_flos")):
                metrics[name] = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]
        found.append(MlflowRun(run.info.run_id, run.info.status, metrics))
    return found


def read_trackio(project: str) -> dict[str, list[Row]]:
    """Return the rows of a local project's runs, by their names."""
    from trackio.sqlite_storage import SQLiteStorage

    found = {}
    for name in SQLiteStorage.get_runs(project):
        rows = []
        for number, said in enumerate(SQLiteStorage.get_logs(project, name)):
            step = said.pop("train/global_step", said.get("step", -1))  # a loop says no more than the step of each line
            rows.append(Row(number, step, {name: value for name, value in said.items() if name not in ("timestamp", "step")}))
        found[name] = rows
    return found
