"""Job files for schedulers, ready to be submitted: a template for each, filled with what the user says."""

from __future__ import annotations

import json
import re
import shlex
from importlib import resources
from typing import Any

from hf_spot.errors import ConfigError

STORE = "s3://bucket/runs/my-run"  # what a recipe shows when nothing is said
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?")  # what Kubernetes, Slurm and SageMaker all take
_SLURM_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")
_PLACE = re.compile(r"<<(\w+)>>")


def kubernetes(*, store: str, script: str, name: str, gpus: int, image: str, grace_s: int) -> str:
    """A Kubernetes Job, YAML.

    Args:
        store: URL of the run.
        script: that trains, with its arguments.
        name: of the job.
        gpus: of the pod.
        image: of the container.
        grace_s: seconds from the eviction to the kill.

    Raises:
        ConfigError: a value can't be used.
    """
    if "://" not in store:
        raise ConfigError(
            f"--store {store}: a directory in a pod is gone with the pod", hint=f"--store {STORE}, or mount a volume yourself"
        )
    values = {
        "name": _named(name),
        "gpus": gpus,
        "image": image,
        "grace_s": _whole("--grace-s", grace_s, 1),
        "grace_text": str(grace_s),  # an annotation is text
        "arguments": [word.replace("$(", "$$(") for word in _launch(store, script, gpus)],  # else Kubernetes expands it
    }
    return _fill("kubernetes.yaml", {key: json.dumps(value) for key, value in values.items()})  # JSON is YAML


def slurm(*, store: str, script: str, name: str, gpus: int, time: str, grace_s: int) -> str:
    """A batch script for ``sbatch``. Its lines for Slurm take no quotes, so what stands there is checked.

    Args:
        store: URL of the run.
        script: that trains, with its arguments.
        name: of the job.
        gpus: of the node.
        time: the limit, as Slurm writes it.
        grace_s: how many seconds before it the signal comes.

    Raises:
        ConfigError: a value can't be used.
    """
    if not _SLURM_TIME.fullmatch(time):
        raise ConfigError(f"--time {time!r} is no time limit of Slurm", hint="--time 24:00:00, or days-hours: --time 2-12")
    values = {
        "name": _named(name),
        "gpus": str(gpus),
        "time": time,
        "grace_s": str(_whole("--grace-s", grace_s, 1)),
        "command": shlex.join(["hf-spot", *_launch(store, script, gpus)]),
    }
    return _fill("slurm.sh", values)


def sagemaker(*, store: str, script: str, name: str, gpus: int, image: str, role: str, instance_type: str, hours: int) -> str:
    """A Python script that starts a managed spot training job of SageMaker.

    Args:
        store: URL of the run.
        script: that trains, with its arguments.
        name: the beginning of the job's name.
        gpus: of the instance.
        image: of the container.
        role: ARN of the role that the job has.
        instance_type: of SageMaker.
        hours: that the training may take; the wait for machines may take as many again.

    Raises:
        ConfigError: a value can't be used.
    """
    if not store.startswith("s3://"):
        raise ConfigError(f"--store {store}: a job of SageMaker keeps its run in S3", hint=f"--store {STORE}")
    values = {
        "store": store.rstrip("/"),
        "name": _named(name),
        "image": image,
        "role": role,
        "instance_type": instance_type,
        "hours": _whole("--hours", hours, 1),
        "arguments": _launch(store, script, gpus),
    }
    return _fill("sagemaker.py", {key: repr(value) for key, value in values.items()})


def _launch(store: str, script: str, gpus: int) -> list[str]:
    try:
        words = shlex.split(script)
    except ValueError as error:
        raise ConfigError(f"--script {script!r}: {error}", hint="--script 'train.py --epochs 3'") from error
    if not words:
        raise ConfigError("--script is empty", hint="--script train.py")
    _whole("--gpus", gpus, 0)
    ranks = ["--multi_gpu", "--num_processes", str(gpus)] if gpus > 1 else []
    return ["launch", "--store", store, *ranks, *words]


def _named(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--name {name!r} is no name for a job", hint="small letters, digits and hyphens: --name my-run")
    return name


def _whole(option: str, number: int, least: int) -> int:
    if number < least:
        raise ConfigError(f"{option} {number} must be at least {least}", hint=f"{option} {max(least, 1)}")
    return number


def _fill(template: str, values: dict[str, Any]) -> str:
    text = resources.files(__package__).joinpath(f"{template}.template").read_text(encoding="utf-8")
    return _PLACE.sub(lambda place: str(values[place[1]]), text)
