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
_SERVICE = re.compile(
    r"[a-z].*"
)  # https://kubernetes.io/docs/concepts/overview/working-with-objects/names/#rfc-1035-label-names
_SLURM_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")
# A job file says these too, for whoever starts machines by it.
_NOTHING_TO_BUY: dict[str, Any] = {"max_spend": 1, "instance_profile": "of-the-launch-template"}
_PLACE = re.compile(r"<<(\w+)>>")


def kubernetes(*, store: str, script: str, name: str, gpus: int, image: str, grace_s: int, nodes: int = 1) -> str:
    """A Kubernetes Job, YAML; for several machines an Indexed one, and the Service by whose name they find the first of them.

    Args:
        store: URL of the run.
        script: that trains, with its arguments.
        name: of the job.
        gpus: of each pod.
        image: of the container.
        grace_s: seconds from the eviction to the kill.
        nodes: how many pods train together.

    Raises:
        ConfigError: a value can't be used.
    """
    if "://" not in store:
        raise ConfigError(
            f"--store {store}: a directory in a pod is gone with the pod", hint=f"--store {STORE}, or mount a volume yourself"
        )
    # Kubernetes replaces $(NAME) by a variable of the container, and $$(NAME) by $(NAME).
    machine = "$(JOB_COMPLETION_INDEX)", f"{_named(name)}-0.{name}", "29500"
    words = [word.replace("$(", "$$(") for word in _launch(store, script, gpus, nodes)]
    if nodes > 1 and not _SERVICE.fullmatch(name):
        raise ConfigError(f"--name {name!r} is no name for a Service: it begins with no letter", hint=f"--name run-{name}")
    values = {
        "name": name,
        "nodes": nodes,
        "crashes": 3 * nodes,
        "gpus": gpus,
        "image": image,
        "grace_s": _whole("--grace-s", grace_s, 1),
        "grace_text": str(grace_s),  # an annotation is text
        "arguments": ["launch", *(_meet(*machine) if nodes > 1 else ()), *words],
    }
    filling = {key: json.dumps(value) for key, value in values.items()}  # JSON is YAML
    return _fill("kubernetes.yaml", filling) + (_fill("kubernetes-service.yaml", filling) if nodes > 1 else "")


def slurm(*, store: str, script: str, name: str, gpus: int, time: str, grace_s: int, nodes: int = 1) -> str:
    """A batch script for ``sbatch``. Its lines for Slurm take no quotes, so what stands there is checked.

    Args:
        store: URL of the run.
        script: that trains, with its arguments.
        name: of the job.
        gpus: of each node.
        time: the limit, as Slurm writes it.
        grace_s: how many seconds before it the signal comes.
        nodes: how many machines train together.

    Raises:
        ConfigError: a value can't be used.
    """
    if not _SLURM_TIME.fullmatch(time):
        raise ConfigError(f"--time {time!r} is no time limit of Slurm", hint="--time 24:00:00, or days-hours: --time 2-12")
    values = {
        "name": _named(name),
        "nodes": str(nodes),
        "gpus": str(gpus),
        "time": time,
        "grace_s": str(_whole("--grace-s", grace_s, 1)),
    }
    command = shlex.join(_launch(store, script, gpus, nodes))
    values["start"] = _fill("slurm-nodes.sh" if nodes > 1 else "slurm-node.sh", {"command": command}).rstrip()
    return _fill("slurm.sh", values)


def ec2(*, store: str, script: str, name: str, gpus: int, region: str, setup: str, hours: int, auto_scaling_group: bool) -> str:
    """User data for machines that somebody else starts: an Auto Scaling group, a launch template, Terraform.

    Args:
        store: URL of the run.
        script: that trains, with its arguments.
        name: of the job.
        gpus: of the machine.
        region: of the machine.
        setup: shell commands that a new machine runs first.
        hours: after which the machine goes away, whatever happens.
        auto_scaling_group: the machine belongs to one, and leaves it when the training has ended, without being replaced.

    Raises:
        ConfigError: a value can't be used.
    """
    from hf_spot.cloud import user_data  # which knows YAML, and `hf-spot --help` asks this module for a default
    from hf_spot.cloud.job import Job

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
        60 * _whole("--hours", hours, 1),
        made_by="hf-spot recipe ec2",
        fuse=f"{hours} hours are over",
        retire=out_of_the_group if auto_scaling_group else user_data.LEAVE,
    )


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
        "arguments": ["launch", *_launch(store, script, gpus)],
    }
    return _fill("sagemaker.py", {key: repr(value) for key, value in values.items()})


def _launch(store: str, script: str, gpus: int, nodes: int = 1) -> list[str]:
    """What stands behind ``hf-spot launch``; a store in the environment is not named."""
    try:
        words = shlex.split(script)
    except ValueError as error:
        raise ConfigError(f"--script {script!r}: {error}", hint="--script 'train.py --epochs 3'") from error
    if not words:
        raise ConfigError("--script is empty", hint="--script train.py")
    _whole("--nodes", nodes, 1)
    _whole("--gpus", gpus, 1 if nodes > 1 else 0)
    ranks = ["--num_machines", str(nodes)] if nodes > 1 else []
    ranks += ["--multi_gpu", "--num_processes", str(gpus * nodes)] if gpus * nodes > 1 else []
    return [*(["--store", store] if store else []), *ranks, *words]


def _meet(machine: str, main: str, port: str) -> list[str]:
    return ["--machine_rank", machine, "--main_process_ip", main, "--main_process_port", port]


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
