"""The MLflow run of a training. MLflow chooses its ids itself, so ours is a tag."""

from __future__ import annotations

import importlib
import os

TAG = "hf_spot.training"


def mlflow_run(id: str, experiment: str | None, name: str | None) -> str | None:
    """Return MLflow's id of the run with a tracker id, which is created if there is none.

    Args:
        id: the tracker id of the training.
        experiment: name of the experiment, created if there is none; None for ``$MLFLOW_EXPERIMENT_ID``, or MLflow's default.
        name: name for a new run; None lets MLflow choose one.

    Returns:
        None if the script has begun a run itself.
    """
    mlflow = importlib.import_module("mlflow")
    if mlflow.active_run() is not None:
        return None
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    client = mlflow.MlflowClient(None if mlflow.is_tracking_uri_set() else uri)
    if experiment:
        known = client.get_experiment_by_name(experiment)
        where = client.create_experiment(experiment) if known is None else known.experiment_id
    else:
        where = os.environ.get("MLFLOW_EXPERIMENT_ID") or "0"
    found = client.search_runs([where], filter_string=f"tags.`{TAG}` = '{id}'", max_results=1)
    run = found[0] if found else client.create_run(where, tags={TAG: id}, run_name=name)
    return str(run.info.run_id)


def run_with_tag(id: str) -> str | None:
    """Return MLflow's id of the run with a tracker id, in any experiment; None if there is none."""
    client = importlib.import_module("mlflow").MlflowClient()
    everywhere = [one.experiment_id for one in client.search_experiments()]
    found = client.search_runs(everywhere, filter_string=f"tags.`{TAG}` = '{id}'", max_results=1)
    return str(found[0].info.run_id) if found else None
