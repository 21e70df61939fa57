"""Job files for schedulers, ready to submit: one template each, filled with the user's values."""

from __future__ import annotations

import json
import os
import re
import shlex
from importlib import resources
from typing import Any

from hf_spot.errors import ConfigError

STORE = "s3://bucket/runs/my-run"  # example in a recipe without --store
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?")  # valid for Kubernetes, Slurm and SageMaker
_SERVICE = re.compile(
    r"[a-z].*"
)  # https://kubernetes.io/docs/concepts/overview/working-with-objects/names/#rfc-1035-label-names
_SLURM_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")
# A Job needs these for starting machines, which recipes don't do.
_NOTHING_TO_BUY: dict[str, Any] = {"max_spend": 1, "instance_profile": "of-the-launch-template"}
_PLACE = re.compile(r"<<(\w+)>>")


def kubernetes(*, store: str, script: str, name: str, gpus: int, image: str, grace_s: int, nodes: int = 1) -> str:
    """Return a Kubernetes Job as YAML; for several machines an Indexed Job and the Service through which they find each other.

    Args:
        store: URL of the run.
        script: training script with its arguments.
        name: name of the job.
        gpus: GPUs of each pod.
        image: container image.
        grace_s: seconds from the eviction to the kill.
        nodes: number of pods that train together.

    Raises:
        ConfigError: a value can't be used.
    """
    if "://" not in store:
        raise ConfigError(
            f"--store {store}: a directory in a pod is lost with the pod", hint=f"--store {STORE}, or mount a volume yourself"
        )
    # Kubernetes replaces $(NAME) with a variable of the container, and $$(NAME) with $(NAME).
    machine = "$(JOB_COMPLETION_INDEX)", f"{_named(name)}-0.{name}", "29500"
    words = [word.replace("$(", "$$(") for word in _launch(store, script, gpus, nodes)]
    if nodes > 1 and not _SERVICE.fullmatch(name):
        raise ConfigError(
            f"--name {name!r} is not a valid name for a Service: it must begin with a letter", hint=f"--name run-{name}"
        )
    values = {
        "name": name,
        "nodes": nodes,
        "crashes": 3 * nodes,
        "gpus": gpus,
        "image": image,
        "grace_s": _at_least("--grace-s", grace_s, 1),
        "grace_text": str(grace_s),  # an annotation is text
        "arguments": ["launch", *(_meet(*machine) if nodes > 1 else ()), *words],
    }
    filling = {key: json.dumps(value) for key, value in values.items()}  # JSON is YAML
    return _fill("kubernetes.yaml", filling) + (_fill("kubernetes-service.yaml", filling) if nodes > 1 else "")


def slurm(*, store: str, script: str, name: str, gpus: int, time: str, grace_s: int, nodes: int = 1) -> str:
    """Return a batch script for ``sbatch``. Slurm's #SBATCH lines can't be quoted, so their values are validated.

    Args:
        store: URL of the run.
        script: training script with its arguments.
        name: name of the job.
        gpus: GPUs of each node.
        time: time limit in Slurm's format.
        grace_s: seconds between the signal and the time limit.
        nodes: number of machines that train together.

    Raises:
        ConfigError: a value can't be used.
    """
    if not _SLURM_TIME.fullmatch(time):
        raise ConfigError(
            f"--time {time!r} is not a time limit in Slurm's format", hint="--time 24:00:00, or days-hours: --time 2-12"
        )
    values = {
        "name": _named(name),
        "nodes": str(nodes),
        "gpus": str(gpus),
        "time": time,
        "grace_s": str(_at_least("--grace-s", grace_s, 1)),
    }
    command = shlex.join(_launch(store, script, gpus, nodes))
    values["start"] = _fill("slurm-nodes.sh" if nodes > 1 else "slurm-node.sh", {"command": command}).rstrip()
    return _fill("slurm.sh", values)


def ec2(*, store: str, script: str, name: str, gpus: int, region: str, setup: str, hours: int, auto_scaling_group: bool) -> str:
    """Return user data for machines started by an Auto Scaling group, a launch template or Terraform.

    Args:
        store: URL of the run.
        script: training script with its arguments.
        name: name of the job.
        gpus: GPUs of the machine.
        region: region of the machine.
        setup: shell commands that a new machine runs first.
        hours: hours after which the machine shuts down in any case.
        auto_scaling_group: whether the machine belongs to a group, which it leaves, without replacement, after the training.

    Raises:
        ConfigError: a value can't be used.
    """
    from hf_spot.cloud import user_data  # imports YAML, which `hf-spot --help` does not need
    from hf_spot.cloud.job import Job
    from hf_spot.cloud.wheel import wheel_for

    job = Job(
        name=_named(name),
        store=store,
        run=shlex.join(["hf-spot", "launch", *_launch("", script, gpus)]),
        region=region,
        setup=setup,
        **_NOTHING_TO_BUY,
    )
    # https://cloudinit.readthedocs.io/en/latest/reference/user_files.html
    out_of_the_group = (
        f"aws autoscaling terminate-instance-in-auto-scaling-group --region {region} --should-decrement-desired-capacity "
        f'--instance-id "$(cat /var/lib/cloud/data/instance-id)" || {user_data.LEAVE}'
    )
    return user_data.render(
        job,
        [],
        60 * _at_least("--hours", hours, 1),
        made_by="hf-spot recipe ec2",
        fuse=f"{hours} hours are over",
        retire=out_of_the_group if auto_scaling_group else user_data.LEAVE,
        wheel=wheel_for(store, os.environ),
        image_may_have_it=True,
    )


def sagemaker(*, store: str, script: str, name: str, gpus: int, image: str, role: str, instance_type: str, hours: int) -> str:
    """Return a Python script that starts a managed spot training job on SageMaker.

    Args:
        store: URL of the run.
        script: training script with its arguments.
        name: prefix of the job's name.
        gpus: GPUs of the instance.
        image: container image.
        role: ARN of the job's role.
        instance_type: SageMaker's instance type.
        hours: maximum hours of training; the wait for machines may take as long again.

    Raises:
        ConfigError: a value can't be used.
    """
    if not store.startswith("s3://"):
        raise ConfigError(f"--store {store}: a SageMaker job needs a run in S3", hint=f"--store {STORE}")
    values = {
        "store": store.rstrip("/"),
        "name": _named(name),
        "image": image,
        "role": role,
        "instance_type": instance_type,
        "hours": _at_least("--hours", hours, 1),
        "arguments": ["launch", *_launch(store, script, gpus)],
    }
    return _fill("sagemaker.py", {key: repr(value) for key, value in values.items()})


def _launch(store: str, script: str, gpus: int, nodes: int = 1) -> list[str]:
    """Return the arguments of ``hf-spot launch``, without --store if ``store`` is empty."""
    try:
        words = shlex.split(script)
    except ValueError as error:
        raise ConfigError(f"--script {script!r}: {error}", hint="--script 'train.py --epochs 3'") from error
    if not words:
        raise ConfigError("--script is empty", hint="--script train.py")
    _at_least("--nodes", nodes, 1)
    _at_least("--gpus", gpus, 1 if nodes > 1 else 0)
    ranks = ["--num_machines", str(nodes)] if nodes > 1 else []
    ranks += ["--multi_gpu", "--num_processes", str(gpus * nodes)] if gpus * nodes > 1 else []
    return [*(["--store", store] if store else []), *ranks, *words]


def _meet(machine: str, main: str, port: str) -> list[str]:
    return ["--machine_rank", machine, "--main_process_ip", main, "--main_process_port", port]


def _named(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--name {name!r} is not a valid job name", hint="use lower-case letters, digits and hyphens: --name my-run"
        )
    return name


def _at_least(option: str, number: int, least: int) -> int:
    if number < least:
        raise ConfigError(f"{option} {number} must be at least {least}", hint=f"{option} {max(least, 1)}")
    return number


def _fill(template: str, values: dict[str, Any]) -> str:
    text = resources.files(__package__).joinpath(f"{template}.template").read_text(encoding="utf-8")
    return _PLACE.sub(lambda place: str(values[place[1]]), text)
