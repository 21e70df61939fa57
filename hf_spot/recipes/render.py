"""Job files for schedulers, ready to submit: one template each, filled with the user's values."""

from __future__ import annotations

import json
import os
import re
import shlex
import textwrap
from dataclasses import dataclass
from importlib import resources
from typing import Any

from hf_spot.errors import ConfigError

STORE = "s3://bucket/runs/my-run"  # example in a recipe without --store
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?")  # valid for Kubernetes, Slurm and SageMaker
_SERVICE = re.compile(
    r"[a-z].*"
)  # https://kubernetes.io/docs/concepts/overview/working-with-objects/names/#rfc-1035-label-names
_LABEL = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
_SLURM_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")
# A Job needs these for starting machines, which recipes don't do.
_NOTHING_TO_BUY: dict[str, Any] = {"max_spend": 1, "instance_profile": "of-the-launch-template"}
_PLACE = re.compile(r"<<(\w+)>>")


@dataclass(frozen=True)
class Nodes:
    """How many machines train together.

    Args:
        least: with fewer nothing is trained; 0 if the number is fixed.
        most: the number, or the largest number.
    """

    least: int
    most: int

    @property
    def are_elastic(self) -> bool:
        """Return whether the machines come and go."""
        return self.least > 0

    @classmethod
    def of(cls, text: str | int) -> Nodes:
        """Return the value of ``--nodes``: a number, or a range such as ``2:8``. Raises ConfigError."""
        first, colon, last = str(text).partition(":")
        try:
            least, most = int(first), int(last if colon else first)
        except ValueError:
            raise ConfigError(
                f"--nodes {text} is neither a number nor a range",
                hint="--nodes 4, or --nodes 2:8 for machines that come and go",
            ) from None
        if colon and not 1 <= least <= most:
            raise ConfigError(f"--nodes {text} is no range of numbers from 1 on", hint="--nodes 2:8")
        return cls(least if colon else 0, _at_least("--nodes", most, 1))

    def __str__(self) -> str:
        return f"{self.least or self.most}:{self.most}"


@dataclass(frozen=True)
class Pods:
    """What the recipes of Kubernetes, JobSet and Kubeflow Trainer are filled with.

    Args:
        store: URL of the run.
        script: training script with its arguments.
        name: name of the job.
        gpus: GPUs of each pod.
        image: container image.
        grace_s: seconds from the eviction to the kill.
        nodes: number of pods that train together, or a range such as ``2:8``; default: that of the recipe.
        queue: Kueue's local queue.
        priority_class: Kueue's priority class.
    """

    store: str
    script: str
    name: str
    gpus: int
    image: str
    grace_s: int
    nodes: str | int | None = None
    queue: str | None = None
    priority_class: str | None = None


def kubernetes(**options: Any) -> str:
    """Return a Kubernetes Job as YAML; for a fixed number of several machines an Indexed Job and the Service through which they
    find each other, for machines that come and go an Indexed Job alone.

    Args:
        options: the fields of `Pods`; ``nodes`` is 1 by default.

    Raises:
        ConfigError: a value can't be used.
    """
    pods = Pods(**options)
    count = Nodes.of(1 if pods.nodes is None else pods.nodes)
    labels = _kueue(pods, count)
    if count.are_elastic:
        machines, values = _machines(pods, count, "train", with_command=True)
        return _fill(
            "kubernetes-elastic.yaml", {**values, "queue": labels, "machines": textwrap.indent(machines, "  ").rstrip()}
        )
    store, name, gpus = pods.store, pods.name, pods.gpus
    _check_pods_store(store)
    # Kubernetes replaces $(NAME) with a variable of the container, and $$(NAME) with $(NAME).
    machine = "$(JOB_COMPLETION_INDEX)", f"{_named(name)}-0.{name}", "29500"
    words = _quoted_for_kubernetes(_launch(store, pods.script, gpus, count.most))
    if count.most > 1 and not _SERVICE.fullmatch(name):
        raise ConfigError(
            f"--name {name!r} is not a valid name for a Service: it must begin with a letter", hint=f"--name run-{name}"
        )
    texts: dict[str, Any] = {
        "name": name,
        "nodes": count.most,
        "crashes": 3 * count.most,
        "gpus": gpus,
        "image": pods.image,
        "grace_s": _at_least("--grace-s", pods.grace_s, 1),
        "grace_text": str(pods.grace_s),  # an annotation is text
        "arguments": ["launch", *(_meet(*machine) if count.most > 1 else ()), *words],
    }
    filling = _as_yaml(texts) | {"queue": labels}
    return _fill("kubernetes.yaml", filling) + (_fill("kubernetes-service.yaml", filling) if count.most > 1 else "")


def jobset(**options: Any) -> str:
    """Return a JobSet as YAML, for machines that come and go.

    Args:
        options: the fields of `Pods`; ``nodes`` is 1:2 by default.

    Raises:
        ConfigError: a value can't be used.
    """
    return _elastic("jobset.yaml", Pods(**options), "train", indent=10, with_command=True)


def trainjob(**options: Any) -> str:
    """Return a TrainingRuntime and a TrainJob of Kubeflow Trainer 2 as YAML, for machines that come and go. Arguments and
    errors are those of `jobset`."""
    # Kubeflow looks for a container of this name.
    return _elastic("trainjob.yaml", Pods(**options), "node", indent=14, with_command=False)


def _elastic(template: str, pods: Pods, container: str, *, indent: int, with_command: bool) -> str:
    """Return a template that holds the specification of an Indexed Job, for machines that come and go."""
    count = _meeting("1:2" if pods.nodes is None else pods.nodes)
    machines, values = _machines(pods, count, container, with_command=with_command)
    filling = {**values, "queue": _kueue(pods, None), "machines": textwrap.indent(machines, " " * indent).rstrip()}
    return _fill(template, filling)


def _meeting(nodes: str | int) -> Nodes:
    """Return a number of machines that meet in the run; a fixed number is a range of one."""
    count = Nodes.of(nodes)
    return count if count.are_elastic else Nodes(count.most, count.most)


def _machines(pods: Pods, count: Nodes, container: str, *, with_command: bool) -> tuple[str, dict[str, str]]:
    """Return the specification of an Indexed Job of machines that come and go, and its values."""
    _check_pods_store(pods.store)
    values = {
        "name": _named(pods.name),
        "most": count.most,
        "spare": count.most - count.least,
        "container": container,
        "gpus": _at_least("--gpus", pods.gpus, 1),
        "image": pods.image,
        "grace_s": _at_least("--grace-s", pods.grace_s, 1),
        "grace_text": str(pods.grace_s),  # an annotation is text
        "arguments": ["launch", *_quoted_for_kubernetes(_launch_elastic(pods.store, pods.script, pods.gpus, count))],
    }
    filling = _as_yaml(values)
    command = f"        command: [hf-spot]\n        args: {filling['arguments']}\n" if with_command else ""
    return _fill("kubernetes-machines.yaml", {**filling, "command": command}), filling


def _kueue(pods: Pods, count: Nodes | None) -> str:
    """Return the metadata by which Kueue queues a workload; ``count`` is that of a Job, which may get fewer pods."""
    queue, priority_class = pods.queue, pods.priority_class
    named = {"--queue": queue, "--priority-class": priority_class}
    for option, value in named.items():
        if value is not None and not _LABEL.fullmatch(value):
            raise ConfigError(
                f"{option} {value!r} is not a valid name",
                hint=f"{option} my-team; kubectl get localqueues,workloadpriorityclasses",
            )
    if queue is None:
        if priority_class is not None:
            raise ConfigError("--priority-class is Kueue's, and needs a queue", hint="--queue my-queue")
        return ""
    lines = ["  labels:", f"    kueue.x-k8s.io/queue-name: {json.dumps(queue)}"]
    if priority_class is not None:
        lines.append(f"    kueue.x-k8s.io/priority-class: {json.dumps(priority_class)}")
    if count is not None and 0 < count.least < count.most:  # Kueue refuses a smallest number that is the whole
        lines += [
            "  annotations: # admitted with fewer machines where the quota has no room for all",
            f'    kueue.x-k8s.io/job-min-parallelism: "{count.least}"',
            '    kueue.x-k8s.io/job-completions-equal-parallelism: "true"',
        ]
    return "\n".join(lines) + "\n"


def _check_pods_store(store: str) -> None:
    if "://" not in store:
        raise ConfigError(
            f"--store {store}: a directory in a pod is lost with the pod", hint=f"--store {STORE}, or mount a volume yourself"
        )


def _quoted_for_kubernetes(words: list[str]) -> list[str]:
    return [word.replace("$(", "$$(") for word in words]


def _as_yaml(values: dict[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in values.items()}  # JSON is YAML


def slurm(*, store: str, script: str, name: str, gpus: int, time: str, grace_s: int, nodes: str | int = 1) -> str:
    """Return a batch script for ``sbatch``: of one job, or of an array in which each element is a machine that comes and goes.
    Slurm's #SBATCH lines can't be quoted, so their values are validated.

    Args:
        store: URL of the run.
        script: training script with its arguments.
        name: name of the job.
        gpus: GPUs of each node.
        time: time limit in Slurm's format.
        grace_s: seconds between the signal and the time limit.
        nodes: number of machines that train together, or a range such as ``2:8``.

    Raises:
        ConfigError: a value can't be used.
    """
    if not _SLURM_TIME.fullmatch(time):
        raise ConfigError(
            f"--time {time!r} is not a time limit in Slurm's format", hint="--time 24:00:00, or days-hours: --time 2-12"
        )
    count = Nodes.of(nodes)
    values = {
        "name": _named(name),
        "nodes": "1" if count.are_elastic else str(count.most),
        "gpus": str(gpus),
        "time": time,
        "grace_s": str(_at_least("--grace-s", grace_s, 1)),
        "array": "",
        "job": '"$SLURM_JOB_ID"',
        "finished": "",
    }
    if count.are_elastic:
        command = shlex.join(_launch_elastic(store, script, gpus, count))
        # The number of one element is also that of the whole array.
        values |= {"array": f"#SBATCH --array=1-{count.most}\n", "job": '"${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"'}
        values["finished"] = (
            'elif [ "$code" -eq 0 ]; then # finished: no element needs to start any more\n'
            '    scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"\n'
        )
    else:
        command = shlex.join(_launch(store, script, gpus, count.most))
    start = "slurm-array.sh" if count.are_elastic else "slurm-nodes.sh" if count.most > 1 else "slurm-node.sh"
    values["start"] = _fill(start, {"command": command}).rstrip()
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
    words = _words(script)
    _at_least("--nodes", nodes, 1)
    _at_least("--gpus", gpus, 1 if nodes > 1 else 0)
    ranks = ["--num_machines", str(nodes)] if nodes > 1 else []
    ranks += ["--multi_gpu", "--num_processes", str(gpus * nodes)] if gpus * nodes > 1 else []
    return [*(["--store", store] if store else []), *ranks, *words]


def _launch_elastic(store: str, script: str, gpus: int, nodes: Nodes) -> list[str]:
    """Return the arguments of ``hf-spot launch`` on each of the machines that meet in the run."""
    if nodes.most == 1:
        return _launch(store, script, _at_least("--gpus", gpus, 1))
    ranks = ["--num_machines", str(nodes), "--num_processes", str(_at_least("--gpus", gpus, 1))]
    return ["--store", store, *ranks, *_words(script)]


def _words(script: str) -> list[str]:
    try:
        words = shlex.split(script)
    except ValueError as error:
        raise ConfigError(f"--script {script!r}: {error}", hint="--script 'train.py --epochs 3'") from error
    if not words:
        raise ConfigError("--script is empty", hint="--script train.py")
    return words


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
