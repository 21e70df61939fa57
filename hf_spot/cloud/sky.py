"""The same job file as a SkyPilot managed job: SkyPilot finds and replaces machines, hf_spot saves and resumes on them.

`task` is pure and needs no SkyPilot; everything else goes through SkyPilot's own Python interface
(https://docs.skypilot.co/en/latest/reference/api.html#managed-jobs-sdk).
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import yaml

from hf_spot.cloud.job import ANY, PREFERRED, SPOT, Job, Rung
from hf_spot.cloud.wheel import Wheel, install, put, wheel_for
from hf_spot.errors import EXIT_PREEMPTED, CloudError, ConfigError
from hf_spot.run import seal
from hf_spot.runtime import STORE_VARIABLE
from hf_spot.storage.open import open_store
from hf_spot.storage.s3_settings import KMS_KEY_VARIABLE, OWNER_VARIABLE

STRATEGY = "EAGER_NEXT_REGION"
_ENDPOINT = "AWS_ENDPOINT_URL_S3"
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_VENV = "$HOME/.hf-spot-venv"
_USERINFO = re.compile(r"//[^/]*@")
_COPIES_CREDENTIALS = "LOCAL_CREDENTIALS"


def task(job: Job, environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the job as a SkyPilot task. Pure.

    Checkpoints are not file mounts: `hf-spot launch` transfers them itself, complete and in time. Secrets appear by name
    only.

    Args:
        job: the job with its ladder.
        environ: settings of the store to pass on: KMS key and owner of the bucket, another S3 server, a signing key.
    """
    machines = [
        {
            "infra": infra,
            "instance_type": kind,
            "use_spot": rung.market == SPOT,
            **({} if rung.max_price is None else {"max_hourly_cost": rung.max_price}),
            **_image(job, infra),
        }
        for rung in job.ladder
        for infra in _infra(job, rung)
        for kind in rung.instance_types
    ]
    envs = {STORE_VARIABLE: job.store, "AWS_REGION": job.region}
    envs |= {name: environ[name] for name in (KMS_KEY_VARIABLE, OWNER_VARIABLE) if environ.get(name)}
    if job.size.is_fleet:
        envs["HF_SPOT_NUM_MACHINES"] = job.size.option
    if endpoint := _endpoint(environ):
        envs[_ENDPOINT] = _USERINFO.sub("//", endpoint)
    secrets = secret_names(environ)
    return {
        "name": job.name,
        **({"num_nodes": job.size.most} if job.size.is_fleet else {}),
        "resources": {
            "job_recovery": {"strategy": STRATEGY, "recover_on_exit_codes": [EXIT_PREEMPTED]},
            "disk_size": job.disk_gb,
            **({"labels": dict(job.tags)} if job.tags else {}),
            # Within one rung SkyPilot chooses by price; several rungs are tried in order.
            "any_of" if len(job.ladder) == 1 else "ordered": machines,
        },
        "envs": envs,
        **({"secrets": dict.fromkeys(secrets)} if secrets else {}),
        "setup": _setup(job, wheel_for(job.store, environ)),
        "run": f"set -euo pipefail\nexport PATH={_VENV}/bin:$PATH\n{job.run}".rstrip() + "\n",
    }


def secret_names(environ: Mapping[str, str]) -> list[str]:
    """Return the variables a machine needs that must not be stored: the journal key, and keys for a server other than AWS."""
    names = (seal.VARIABLE, *(_KEYS if _endpoint(environ) else ()))
    return [name for name in names if environ.get(name)]


def notes(job: Job) -> list[str]:
    """Return notes about settings of the job file that a SkyPilot task can't express. Pure."""
    found = [f"max_spend: SkyPilot has no budget. See `hf-spot report {job.store}` and sky jobs cancel --name {job.name}"]
    if job.instance_profile:
        found.append(
            f"instance_profile: SkyPilot takes it from ~/.sky/config.yaml: `aws: {{remote_identity: {job.instance_profile}}}`"
        )
    if job.size.is_fleet:
        found.append(f"machines: SkyPilot starts {job.size.most} nodes together, and all of them again when it replaces one")
    if job.deadline is not None:
        found.append("deadline: SkyPilot has no deadline")
    if job.key_name or job.security_groups != "default" or job.subnets != "default":
        found.append(
            "key_name, security_groups, subnets: SkyPilot creates its own; see vpc_name and security_group_name in its config"
        )
    if job.setup:
        found.append("setup: runs as SkyPilot's user, not as root")
    return found


def render(job: Job, environ: Mapping[str, str]) -> str:
    """Return the task as YAML, for `sky jobs launch`, with the notes as comments."""
    first = [f"python -m hf_spot.cloud.wheel {job.store}"] if job.requirements and wheel_for(job.store, environ) else []
    head = "".join(f"# {line}\n" for line in [*first, f"sky jobs launch -n {job.name} FILE", *notes(job)])
    return head + yaml.dump(task(job, environ), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def launch(job: Job, environ: Mapping[str, str] = os.environ) -> list[int]:
    """Start the job as a managed job. Return its ids.

    Raises:
        ConfigError: SkyPilot is not installed, refuses the task, or would copy this machine's credentials to other machines.
        CloudError: SkyPilot could not start it.
    """
    sky = _sky()
    _check_identity(sky, job)
    if job.requirements and (wheel := wheel_for(job.store, environ)) is not None:
        put(open_store(job.store), wheel)
    with _explained("refuses the task", ConfigError):
        made = sky.Task.from_yaml_config(
            task(job, environ), secrets_overrides=[(name, environ[name]) for name in secret_names(environ)]
        )
    with _explained("could not start the job"):
        ids, _ = sky.stream_and_get(sky.jobs.launch(made, name=job.name))
    return [*ids]


def status(job: Job) -> list[dict[str, Any]]:
    """Return SkyPilot's managed jobs of this name, newest first: ``job_id``, ``status``, ``infra``, ``recoveries``,
    ``reason``."""
    sky = _sky()
    with _explained("could not list its jobs"):
        try:
            records, *_ = sky.get(sky.jobs.queue_v2(refresh=True, name_match=job.name))
        except (sky.exceptions.ClusterDoesNotExist, sky.exceptions.ClusterNotUpError):
            records = []  # SkyPilot's jobs controller does not exist or is stopped, so there are no jobs
    found = [
        {
            "job_id": record.job_id,
            "status": record.status.value if record.status else None,
            "infra": record.infra,
            "resources": record.cluster_resources or record.resources,
            "recoveries": record.recovery_count or 0,
            "reason": record.failure_reason,
        }
        for record in records
        if record.job_name == job.name
    ]
    return sorted(found, key=lambda one: -(one["job_id"] or 0))


def logs(job: Job, out: TextIO = sys.stdout) -> int:
    """Print the output of the newest job of this name until it ends. Return SkyPilot's exit code."""
    sky = _sky()
    with _explained("has no logs"):
        return int(sky.jobs.tail_logs(name=job.name, follow=True, output_stream=out) or 0)


def cancel(job: Job) -> None:
    """Cancel all jobs of this name; the training gets a notice first, and saves."""
    sky = _sky()
    with _explained("could not cancel the job"):
        sky.get(sky.jobs.cancel(name=job.name, graceful=True))


# -- inside -----------------------------------------------------------------------------------------------------------


def _endpoint(environ: Mapping[str, str]) -> str | None:
    from hf_spot.storage.s3_connection import endpoint_of_others  # importing boto3 is slow

    return endpoint_of_others(environ)


def _infra(job: Job, rung: Rung) -> list[str]:
    if rung.regions == ANY:
        return ["aws"]
    return [f"aws/{region}" for region in ((job.region,) if rung.regions == PREFERRED else rung.regions)]


def _image(job: Job, infra: str) -> dict[str, Any]:
    """Return the image of a rung. For an image by SSM parameter, SkyPilot uses its own, which also has NVIDIA's driver."""
    region = infra.partition("/")[2]
    images = job.image_id if isinstance(job.image_id, Mapping) else {job.region: job.image_id}
    known = {name: image for name, image in images.items() if not image.startswith("resolve:") and region in ("", name)}
    return {"image_id": known} if known else {}


def _setup(job: Job, wheel: Wheel | None) -> str:
    lines = ["set -euo pipefail"]
    if job.requirements:
        lines += [f"python3 -m venv {_VENV}", f"export PATH={_VENV}/bin:$PATH", install(job.requirements, wheel)]
    else:
        lines += [f"export PATH={_VENV}/bin:$PATH"]
    lines += [job.setup.strip()]
    return "\n".join(line for line in lines if line) + "\n"


def _sky() -> Any:
    try:
        import sky
    except ImportError as error:
        raise ConfigError(f"SkyPilot can't be imported: {error}", hint="pip install 'skypilot[aws]'") from error
    return sky


def _check_identity(sky: Any, job: Job) -> None:
    """Refuse a setup in which SkyPilot would copy this machine's AWS credentials to the others instead of using a role."""
    if not job.instance_profile:
        return
    identity = sky.skypilot_config.get_nested(("aws", "remote_identity"), _COPIES_CREDENTIALS)
    if identity == _COPIES_CREDENTIALS:
        name = re.sub(r".*/", "", job.instance_profile)
        raise ConfigError(
            f"SkyPilot would copy this machine's AWS credentials to the other machines instead of giving them the role {name}",
            hint=f"in ~/.sky/config.yaml:  aws: {{remote_identity: {name}}}",
        )


@contextlib.contextmanager
def _explained(what: str, kind: type[ConfigError] | type[CloudError] = CloudError) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # SkyPilot's exceptions have no common base
        raise kind(f"SkyPilot {what}: {error or type(error).__name__}", hint="sky check aws; sky api info") from error


class _Dumper(yaml.SafeDumper):
    """A dumper that writes scripts as blocks."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)
