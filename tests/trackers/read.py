"""Read what trackers have of a case, with their own readers, and print it as JSON: tracker, id of the run, step, loss."""

from __future__ import annotations

import csv
import json
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from tests.tracker_files import read_trackio, read_wandb

Curve = list[tuple[int, float]]  # step and loss
Runs = dict[str, Curve]


def wandb(folder: Path, project: str) -> Runs:
    """The newest folder of each id."""
    return {
        file.id: [(one.step, one.values["train/loss"]) for one in file.rows if "train/loss" in one.values]
        for file in read_wandb(folder)
        if file.id  # a launch that was killed at once has written nothing
    }


def wandb_rows(folder: Path, project: str) -> Runs:
    """The rows of all folders of an id, by their numbers, as a server merges them."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for file in read_wandb(folder):
        if not file.id:  # a launch that was killed before W&B had written anything
            continue
        found[file.id] |= {one.number: one.values["train/loss"] for one in file.rows if "train/loss" in one.values}
    return {id: sorted(rows.items()) for id, rows in found.items()}


def mlflow(folder: Path, project: str) -> Runs:
    import mlflow as library

    client, found = library.MlflowClient(), {}
    for run in client.search_runs([client.get_experiment_by_name(project).experiment_id]):
        names = [name for name in run.data.metrics if name in ("loss", "train/loss")]
        found[run.info.run_id] = [
            (one.step, one.value) for name in names for one in client.get_metric_history(run.info.run_id, name)
        ]
    return found


def trackio(folder: Path, project: str) -> Runs:
    return {
        name: [
            (one.step if one.step >= 0 else one.number + 1, one.values["train/loss"])
            for one in rows
            if "train/loss" in one.values
        ]
        for name, rows in read_trackio(project).items()
    }


def tensorboard(folder: Path, project: str) -> Runs:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for place in sorted({one.parent for one in folder.rglob("events.out.tfevents.*")}):
        board = EventAccumulator(str(place), size_guidance={"scalars": 0})
        board.Reload()
        found[str(place.relative_to(folder))] = [(one.step, one.value) for one in board.Scalars("train/loss")]
    return found


def swanlab(folder: Path, project: str) -> Runs:
    """The folders of each id over each other: Trainer's newest one has the whole curve, a loop's has the lines of its launch.

    Columns have numbers, so the loss is the one that begins with the first loss, and in a loop the same one later.
    """
    first, found, columns = float((folder / "first-loss").read_text()), {}, {}
    for place in sorted((folder / "swanlog").glob("run-*"), key=lambda one: one.name.split("-")[1]):
        id = place.name.split("-")[2]
        read = {
            column.name: [json.loads(line) for file in sorted(column.glob("*.log")) for line in file.read_text().splitlines()]
            for column in (place / "logs").glob("*")
        }
        begun = next((name for name, rows in read.items() if rows and rows[0]["data"] == first), None)
        columns[id] = begun or columns.get(id)
        curve = {} if begun else found.get(id, {})
        found[id] = curve | {one["index"]: one["data"] for one in read.get(columns[id], [])}
    return {id: sorted(curve.items()) for id, curve in found.items()}


def comet_ml(folder: Path, project: str) -> Runs:
    """The newest archive of each key. A killed launch leaves none."""
    found: Runs = {}
    for path in sorted((folder / "comet").glob("*.zip"), key=lambda one: one.stat().st_mtime_ns):
        with zipfile.ZipFile(path) as archive:
            lines = [json.loads(line) for line in archive.read("messages.json").decode().splitlines()]
        # Comet also takes what is written for TensorBoard, under the same names and steps.
        metrics = [one["payload"]["metric"] for one in lines if one["type"] == "metric_msg"]
        found[path.stem.split("-")[0]] = sorted(
            {(one["step"], one["metricValue"]) for one in metrics if one["metricName"] == "train/loss"}
        )
    return found


def dvclive(folder: Path, project: str) -> Runs:
    """It numbers lines from 0, and each step has one here."""
    with (folder / "dvclive" / "plots" / "metrics" / "loss.tsv").open() as file:
        return {"dvclive": [(int(one["step"]) + 1, float(one["loss"])) for one in csv.DictReader(file, delimiter="\t")]}


def aim(folder: Path, project: str) -> Runs:
    """What Aim shows: runs that are not archived. A run that was killed can only be read as one that is continued."""
    from aim import Repo, Run

    repo, found = Repo.from_path(str(folder)), {}
    for hash in repo.list_all_runs():
        run = Run(hash, repo=repo, system_tracking_interval=None, capture_terminal_logs=False, log_system_params=False)
        curve = [one for one in run.metrics() if one.name == "loss" and not one.context.to_dict()]
        if not run.archived:
            rows = [] if not curve else curve[0].dataframe().itertuples()
            found[run.hash] = [(int(row.step), float(row.value)) for row in rows]
        run.close()
    return found


READERS: dict[str, Callable[[Path, str], Runs]] = {
    one.__name__: one for one in (wandb, wandb_rows, mlflow, trackio, tensorboard, swanlab, comet_ml, dvclive, aim)
}


def main() -> None:
    folder, project, *names = sys.argv[1:]
    print(json.dumps({name: READERS[name](Path(folder), project) for name in names}))


if __name__ == "__main__":
    main()
