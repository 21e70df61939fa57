"""Hugging Face Jobs, through huggingface_hub's own client: start, list, read and cancel the jobs of a run.

`hf_spot.cloud.hub_job` says what is asked; this module asks. No message of it shows the value of a secret.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from huggingface_hub import HfApi, JobInfo, JobStage, Volume, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from hf_spot.cloud import hub_job
from hf_spot.cloud.hub_job import START_LABEL, TOKEN, HubJob
from hf_spot.cloud.job import HUB_SECTION
from hf_spot.cloud.wheel import VARIABLE, Wheel, build, wheel_for
from hf_spot.economics.report import summarise
from hf_spot.errors import CloudError, ConfigError
from hf_spot.run.run import Run
from hf_spot.storage.hub_connection import log_in, network_trouble

_ENDED = {JobStage.COMPLETED, JobStage.CANCELED, JobStage.ERROR, JobStage.DELETED}
_NEEDED = ("attempts", "network_group", "secrets", "volumes", "labels")
_TOKENS = "https://huggingface.co/settings/tokens"
_BILLING = "https://huggingface.co/settings/billing"
_HOURS = {"minute": 60.0, "hour": 1.0, "second": 3600.0}
_ASK_AGAIN_S = (0.0, 1.0, 3.0)


@dataclass(frozen=True)
class Hardware:
    """A flavor of the service: its name, what it is in words, and dollars per hour."""

    name: str
    about: str
    usd_per_hour: float


@dataclass(frozen=True)
class Started:
    """A job of a run: its id, ``stage`` as the service names it, message, flavor, attempts at most, address, and times."""

    id: str
    stage: str
    message: str | None
    flavor: str | None
    attempts: int
    url: str
    created: datetime | None
    running_s: int | None

    @property
    def is_active(self) -> bool:
        """Return whether it may still run."""
        return self.stage not in _ENDED

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        created = self.created.isoformat() if self.created else None
        return {**{name: value for name, value in vars(self).items() if name != "created"}, "created": created}


class HubService:
    """The service, for one job file.

    Args:
        job: the job.
        environ: the environment.
        sleep: waits for some seconds.

    Raises:
        ConfigError: this huggingface_hub can't start such jobs, or the machine is not logged in.
    """

    def __init__(self, job: HubJob, environ: Mapping[str, str], sleep: Callable[[float], None] = time.sleep) -> None:
        known = inspect.signature(HfApi.run_job).parameters if hasattr(HfApi, "run_job") else {}
        if missing := [name for name in _NEEDED if name not in known]:
            raise ConfigError(
                f"this huggingface_hub does not know {', '.join(missing)} of Hugging Face Jobs",
                hint="pip install --upgrade huggingface_hub",
            )
        token = get_token()
        if token is None:
            raise ConfigError("Hugging Face Jobs needs a token, and this machine is not logged in", hint=log_in)
        self.job = job
        self._environ = {**environ, TOKEN: token}
        self._sleep = sleep
        self._api = HfApi(endpoint=environ.get("HF_ENDPOINT") or constants.ENDPOINT, token=token, library_name="hf_spot")
        self._namespace = job.section.namespace

    @property
    def namespace(self) -> str:
        """Return the user or organization that pays. Raises CloudError."""
        if self._namespace is None:
            with self._explained("say whose token this is"):
                self._namespace = str(self._api.whoami()["name"])
        return self._namespace

    def hardware(self) -> Hardware:
        """Return the flavor of the job.

        Raises:
            ConfigError: there is none of this name; the message lists those that exist.
            CloudError: the service does not answer, or refuses.
        """
        with self._explained("list its hardware"):
            found = self._api.list_jobs_hardware()
        known = [
            Hardware(one.name, f"{one.pretty_name}, {one.cpu}, {one.ram}", one.unit_cost_usd * _per_hour(one.unit_label))
            for one in found
        ]
        wanted = self.job.section.flavor
        for one in known:
            if one.name == wanted:
                return one
        listed = ", ".join(f"{one.name} (${one.usd_per_hour:.2f}/h)" for one in known)
        raise ConfigError(
            f"{HUB_SECTION}.flavor: {wanted!r} does not exist. There are: {listed}",
            hint=f"flavor: {_nearest(wanted, [one.name for one in known])}",
        )

    def jobs(self) -> list[Started]:
        """Return the jobs of this run that the service remembers, newest first. Raises CloudError."""
        return self._listed(self.job.labels)

    def check_spend(self, run: Run, hardware: Hardware, machines: int) -> float:
        """Return the dollars that new jobs cost at most.

        Raises:
            ConfigError: that is more than what is left of ``max_spend``.
        """
        job = self.job
        most = hub_job.most_usd(job, hardware.usd_per_hour, machines)
        if job.max_spend is not None:
            used = summarise(run.events()).cost_usd or 0.0
            if used + most > job.max_spend:
                raise ConfigError(
                    f"max_spend: {machines} x {job.section.attempts} attempts of {job.section.timeout} on {hardware.name} "
                    f"cost ${most:.2f} at most, and ${max(0.0, job.max_spend - used):.2f} of ${job.max_spend:.2f} are left",
                    hint=f"a shorter {HUB_SECTION}.timeout, fewer attempts, or max_spend: {used + most:.0f}",
                )
        return most

    def request(self, hardware: Hardware) -> dict[str, Any]:
        """Return the arguments of ``huggingface_hub.run_job`` for one machine, without the values of secrets."""
        job = self.job
        made = {
            "image": job.section.image,
            "command": hub_job.command(job, self.wheel()),
            "env": hub_job.environment(job, self._environ, hardware.usd_per_hour),
            "flavor": hardware.name,
            "timeout": job.section.timeout_s,
            "attempts": job.section.attempts,
            "name": job.name,
            "labels": job.labels,
            "volumes": hub_job.volumes(job, self.wheel()),
        }
        return made | ({"network_group": job.group} if job.group else {})

    def secrets(self) -> dict[str, str]:
        """Return the secrets of the job. Raises ConfigError: one is not set."""
        return hub_job.secrets(self.job, self._environ)

    def wheel(self) -> Wheel | None:
        """Return the wheel of hf_spot that the job installs; None if its image must have hf_spot."""
        if not self.job.requirements:
            return None
        found = wheel_for(self.job.store, self._environ)
        if found is not None or not self.job.store.startswith("hf://"):
            return found
        name, data = build()
        made = Wheel(name, hashlib.sha256(data).hexdigest(), "")
        return Wheel(made.name, made.digest, f"{self.job.store.rstrip('/')}/{made.key}")

    def put_wheel(self, run: Run) -> None:
        """Put the wheel into the run, unless ``$HF_SPOT_WHEEL`` names another one. Raises StoreError."""
        wheel = self.wheel()
        if wheel is not None and not self._environ.get(VARIABLE):
            run.store.create(wheel.key, build()[1])

    def start(self, hardware: Hardware) -> Started:
        """Start one job. If the answer is lost, the service is asked whether the job exists.

        Raises:
            ConfigError: a secret is not set.
            CloudError: the service refuses, or does not answer.
        """
        asked = self.request(hardware)
        mark = uuid.uuid4().hex
        labels = {**asked.pop("labels"), START_LABEL: mark}
        volumes = [Volume(**one) for one in asked.pop("volumes")]
        secrets = self.secrets()
        try:
            with self._explained(f"start {self.job.name}"):
                made = self._api.run_job(
                    **asked, labels=labels, volumes=volumes or None, secrets=secrets, namespace=self.namespace
                )
        except CloudError as error:
            if error.code != _LOST:
                raise
            for wait_s in _ASK_AGAIN_S:
                self._sleep(wait_s)
                with contextlib.suppress(CloudError):
                    if there := self._listed({START_LABEL: mark}):
                        return there[0]
            raise
        return _started(made)

    def logs(self, job_id: str, *, follow: bool, tail: int | None) -> Iterator[str]:
        """Yield the lines of a job's output. Raises CloudError."""
        with self._explained(f"show the output of {job_id}"):
            yield from self._api.fetch_job_logs(job_id=job_id, follow=follow, tail=tail, namespace=self.namespace)

    def cancel(self, job_id: str) -> None:
        """Cancel a job. Raises CloudError."""
        with self._explained(f"cancel {job_id}"):
            self._api.cancel_job(job_id=job_id, namespace=self.namespace)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _listed(self, labels: Mapping[str, str]) -> list[Started]:
        with self._explained("list its jobs"):
            found = [_started(one) for one in self._api.list_jobs(labels=dict(labels), namespace=self.namespace)]
        return sorted(found, key=lambda one: one.created.timestamp() if one.created else 0.0, reverse=True)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except _trouble() as error:
            raise self._explain(what, error) from None  # the client's exception may hold the request, with its secrets

    def _explain(self, what: str, error: Exception) -> CloudError | ConfigError:
        could_not = f"Hugging Face Jobs could not {what}"
        if isinstance(error, OfflineModeIsEnabled):
            return ConfigError(f"{could_not}: huggingface_hub is in offline mode", hint="unset HF_HUB_OFFLINE")
        if not isinstance(error, HfHubHTTPError):
            return CloudError(
                f"{could_not}: {self._without_secrets(str(error) or type(error).__name__)}",
                code=_LOST,
                hint=f"can this machine reach {self._api.endpoint}? Then: hf-spot jobs ps",
            )
        status = error.response.status_code
        told = self._without_secrets(error.server_message or error.response.reason_phrase or str(status))
        hints = {
            401: log_in,
            402: f"add credit: {_BILLING}",
            403: f"a token that may start and manage jobs of {self._namespace or 'this account'}: {_TOKENS}",
            404: f"hf-spot jobs ps, or {HUB_SECTION}.namespace: the user or organization that may run jobs",
            429: "fewer requests: try again in a minute",
        }
        return CloudError(
            f"{could_not}: {told} ({status})",
            code=str(status),
            hint=hints.get(status, "try again" if status >= 500 else "hf-spot jobs run --dry-run shows what is asked"),
        )

    def _without_secrets(self, text: str) -> str:
        for name in hub_job.secret_names(self.job, self._environ):
            if len(value := self._environ.get(name, "")) > 3:
                text = text.replace(value, f"${name}")
        return text


_LOST = "lost"  # whether the service has done it is not known


def _started(info: JobInfo) -> Started:
    stage = info.status.stage
    return Started(
        id=info.id,
        stage=stage.value if isinstance(stage, JobStage) else str(stage),
        message=info.status.message,
        flavor=None if info.flavor is None else str(getattr(info.flavor, "value", info.flavor)),
        attempts=(info.retry or 0) + 1,
        url=info.url,
        created=info.created_at,
        running_s=info.durations.running_secs if info.durations else None,
    )


def _trouble() -> tuple[type[Exception], ...]:
    return (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, *network_trouble())


def _per_hour(unit: str) -> float:
    if unit not in _HOURS:
        raise CloudError(f"Hugging Face Jobs has prices per {unit}, which this version does not know", hint="update hf_spot")
    return _HOURS[unit]


def _nearest(word: str, known: Sequence[str]) -> str:
    from hf_spot.suggestions import nearest

    return nearest(word, known) or (known[0] if known else "a10g-small")
