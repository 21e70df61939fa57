"""The same job file as a job of Hugging Face Jobs: what is asked of the service, and what runs in its container. Pure.

The key ``hf_jobs`` says what only this service needs; ``name``, ``store``, ``run``, ``setup``, ``requirements`` and
``max_spend`` mean what they mean on EC2, and what the service has nothing for is named.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_spot import yaml_file
from hf_spot.cloud.fleet_size import FleetSize
from hf_spot.cloud.job import HUB_SECTION, Job
from hf_spot.cloud.wheel import Wheel, install
from hf_spot.errors import ConfigError
from hf_spot.run import seal
from hf_spot.runtime import STORE_VARIABLE
from hf_spot.storage.s3_settings import KMS_KEY_VARIABLE, OWNER_VARIABLE
from hf_spot.yaml_file import Invalid, check_keys

TOKEN = "HF_TOKEN"
RUN_LABEL, START_LABEL = "hf-spot-run", "hf-spot-start"
_IMAGE = "python:3.12"
_WHEELS = "/hf-spot-wheels"  # where the container sees those of a run on the Hub
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_SESSION = "AWS_SESSION_TOKEN"
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "HF_ENDPOINT")
_USED = ("name", "store", "run", "setup", "requirements", "max_spend", "region", "machines")
_EXAMPLE = f"{HUB_SECTION}: {{flavor: a10g-small, timeout: 24h}}"
_NAME = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")
_HUB_STORE = re.compile(r"hf://(?:(?P<type>models|datasets|buckets)/)?(?P<id>[\w.-]+/[\w.-]+)/(?P<path>.+)")
_S3_STORE = re.compile(r"s3://[^/]+/.+")
_TIMEOUT = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>[smhd])")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SHORTEST_S = 600
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_KEY(_ID)?|PRIVATE_KEY)$", re.IGNORECASE)
_MOUNT = re.compile(
    r"hf://(?:(?P<type>models|datasets|spaces|buckets)/)?(?P<id>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w.-]+))?(?:/(?P<path>[^:]+))?"
    r":(?P<mount>/[^:]+)(?::(?P<mode>ro|rw))?"
)
_COUNTED = re.compile(r"--(num[-_]machines|machine[-_]rank|main[-_]process[-_]ip)\b")

_SCRIPT = """\
set -euo pipefail
# Made by `hf-spot jobs run` for {name}: {store}
folder=$(mktemp -d)
mkdir "$folder/training"
cd "$folder/training"
export PYTHONUNBUFFERED=1
{install}
{setup}
{run}
exec python3 -m hf_spot.cloud.hub_machine "$folder/run" --timeout-s {timeout_s}
"""
_VENV = """\
python3 -m venv --system-site-packages "$folder/venv"
export PATH="$folder/venv/bin:$PATH"
"""


@dataclass(frozen=True)
class HubMachines:
    """The key ``hf_jobs`` of a job file.

    Args:
        flavor: the service's name of a kind of machine, such as ``a10g-small``.
        timeout: after which the service ends a job: a number with ``s``, ``m``, ``h`` or ``d``.
        image: container image.
        attempts: how often the service starts a job at most, the first time included.
        namespace: user or organization that pays; None for the owner of the token.
        secrets: names of environment variables whose values the job gets as secrets.
        env: environment variables that everybody may read.
        volumes: repositories and buckets to mount, such as ``hf://datasets/owner/name:/data``.

    Raises:
        ConfigError: a value that can't be used.
    """

    flavor: str
    timeout: str
    image: str = _IMAGE
    attempts: int = 1
    namespace: str | None = None
    secrets: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    volumes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("flavor", "image", *(("namespace",) if self.namespace is not None else ())):
            _text(getattr(self, name), (name,), f"{name}: {_EXAMPLES[name]}")
        found = _TIMEOUT.fullmatch(self.timeout) if isinstance(self.timeout, str) else None
        if not found or self.timeout_s < _SHORTEST_S:
            raise Invalid(
                ("timeout",), f"{self.timeout!r} is not a time of ten minutes or more", hint="timeout: 24h, 90m or 2d"
            )
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int) or self.attempts < 1:
            raise Invalid(("attempts",), f"{self.attempts!r} must be a whole number from 1 on", hint="attempts: 3")
        for name in ("secrets", "volumes"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise Invalid((name,), f"{value!r} is not a list", hint=f"{name}: [{_EXAMPLES[name]}]")
            object.__setattr__(self, name, tuple(value))
        for index, name in enumerate(self.secrets):
            if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
                hint = f"secrets: [{name.partition('=')[0]}]" if isinstance(name, str) else "secrets: [WANDB_API_KEY]"
                raise Invalid(
                    ("secrets", index), "is not the name of an environment variable", hint=f"{hint}; the value stays here"
                )
        self._check_env()
        for index, volume in enumerate(self.volumes):
            if not isinstance(volume, str) or not _MOUNT.fullmatch(volume):
                raise Invalid(("volumes", index), f"{volume!r} is not a volume", hint=f"volumes: [{_EXAMPLES['volumes']}]")

    @property
    def timeout_s(self) -> int:
        """Return the timeout in seconds."""
        found = _TIMEOUT.fullmatch(self.timeout)
        assert found is not None
        return int(float(found["number"]) * _UNITS_S[found["unit"]])

    def _check_env(self) -> None:
        if not isinstance(self.env, Mapping):
            raise Invalid(("env",), f"{self.env!r} is not a mapping", hint="env: {WANDB_PROJECT: mine}")
        for name, value in self.env.items():
            if not _VARIABLE.fullmatch(str(name)):
                raise Invalid(("env", name), "is not the name of an environment variable", hint="env: {WANDB_PROJECT: mine}")
            if not isinstance(value, str):
                raise Invalid(("env", name), "must be text", hint=f'env: {{{name}: "{value}"}}')
            if _SECRET.search(name) or name in self.secrets:
                raise Invalid(
                    ("env", name),
                    "would be shown to everybody who may see the job",
                    hint=f"remove its value from this file; export {name}=…, and {HUB_SECTION}: {{secrets: [{name}]}}",
                )


_EXAMPLES = {
    "flavor": "a10g-small",
    "image": _IMAGE,
    "namespace": "my-organization",
    "timeout": "24h",
    "secrets": "WANDB_API_KEY",
    "volumes": "hf://datasets/owner/name:/data",
}


@dataclass(frozen=True)
class HubJob:
    """A training as a job of Hugging Face Jobs. Everything is validated at construction.

    Args:
        name: name of the job, and a label of it.
        store: URL of the run, on the Hub or in S3.
        run: shell commands that start the training with ``hf-spot launch``; ``$HF_SPOT_STORE`` is set for them.
        section: that of ``hf_jobs``.
        setup: shell commands that run first.
        requirements: packages that pip installs before that; empty if the image has hf_spot.
        max_spend: dollars for the whole run, or None.
        region: of the bucket in S3, or None.
        machines: how many train together: a number, or a range such as ``2:8``.
        unused: keys of the file that this service has nothing for.

    Raises:
        ConfigError: a value that can't be used.
    """

    name: str
    store: str
    run: str
    section: HubMachines
    setup: str = ""
    requirements: tuple[str, ...] = ("hf_spot",)
    max_spend: float | None = None
    region: str | None = None
    machines: int | str | FleetSize = 1
    unused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(_text(self.name, ("name",), "name: my-run")) or len(self.name) > 60:
            raise Invalid(("name",), f"{self.name!r} is not a valid name", hint="up to 60 letters, digits, '-', '_' and '.'")
        self._check_store()
        object.__setattr__(self, "machines", FleetSize.of(self.machines))
        if "hf-spot launch" not in " ".join(_text(self.run, ("run",), "run: hf-spot launch train.py").split()):
            raise Invalid(("run",), "does not start the training with `hf-spot launch`", hint="run: hf-spot launch train.py")
        if re.search(r"--store\b", self.run):
            raise Invalid(("run",), "names the store again", hint=f"remove --store: the job file's store {self.store} is used")
        if found := _COUNTED.search(self.run):
            raise Invalid(
                ("run",),
                f"{found[0]}: the job file says how many machines train, and they find each other in the run",
                hint=f"remove {found[0]}, and for several machines: machines: 2:8",
            )
        if self.store.startswith("hf://buckets/") and "--allow-unfenced-store" not in self.run:
            raise Invalid(
                ("store",),
                "a bucket of the Hub can't keep two launches of one run apart",
                hint="hf://owner/name/prefix, a model repository; or run: hf-spot launch --allow-unfenced-store …",
            )
        if not isinstance(self.setup, str):
            raise Invalid(("setup",), f"{self.setup!r} is not a shell script", hint="setup: |")
        if isinstance(self.requirements, str) or not isinstance(self.requirements, Sequence):
            raise Invalid(("requirements",), f"{self.requirements!r} is not a list", hint="requirements: [hf_spot]")
        object.__setattr__(self, "requirements", tuple(self.requirements))
        spend = self.max_spend
        if spend is not None and (isinstance(spend, bool) or not isinstance(spend, (int, float)) or not 0 < spend < 1e9):
            raise Invalid(
                ("max_spend",), f"{spend!r} must be a number of dollars above 0", hint="max_spend: 150, for the whole run"
            )

    @property
    def count(self) -> int:
        """Return how many jobs to start: one for each machine."""
        return self.size.most

    @property
    def size(self) -> FleetSize:
        """Return how many machines train together."""
        assert isinstance(self.machines, FleetSize)
        return self.machines

    @property
    def labels(self) -> dict[str, str]:
        """Return the labels by which the jobs of this run are found again."""
        return {RUN_LABEL: hashlib.sha256(self.store.rstrip("/").encode()).hexdigest()[:16]}

    @property
    def group(self) -> str | None:
        """Return the name of the network in which several machines reach each other; None for one machine."""
        return f"hf-spot-{self.labels[RUN_LABEL]}" if self.count > 1 else None

    def _check_store(self) -> None:
        store = _text(self.store, ("store",), "store: hf://owner/name/my-run")
        if not _HUB_STORE.fullmatch(store) and not _S3_STORE.fullmatch(store):
            raise Invalid(
                ("store",),
                f"{store!r}: a job of Hugging Face Jobs reaches runs on the Hub and in S3",
                hint="store: hf://owner/name/my-run, or s3://bucket/runs/my-run",
            )


def load(path: str | Path) -> HubJob:
    """Read a job file. Raises ConfigError, whose message names line, key and fix."""
    return parse(yaml_file.read(Path(path)), str(path))


def parse(text: str, where: str = "job.yaml") -> HubJob:
    """Parse the text of a job file; ``where`` names it in errors. Raises ConfigError."""
    return yaml_file.parse(text, where, _job)


def _job(value: Any) -> HubJob:
    if not isinstance(value, dict):
        raise Invalid((), "a job file must be a mapping of keys and values", hint="name: my-run")
    check_keys(value, [*(one.name for one in fields(Job)), HUB_SECTION], ())
    for name, hint in (
        ("name", "name: my-run"),
        ("store", "store: hf://owner/name/my-run"),
        ("run", "run: hf-spot launch train.py"),
    ):
        if name not in value:
            raise Invalid((), f"{name} is missing", hint=hint)
    section = value.get(HUB_SECTION)
    if not isinstance(section, dict):
        problem = "is missing" if HUB_SECTION not in value else "is not a mapping"
        raise Invalid((HUB_SECTION,) if HUB_SECTION in value else (), f"{HUB_SECTION} {problem}", hint=_EXAMPLE)
    made = _machines(section)
    unused = tuple(name for name in value if name not in (*_USED, HUB_SECTION))
    return HubJob(section=made, unused=unused, **{name: value[name] for name in _USED if name in value})


def _machines(section: dict[str, Any]) -> HubMachines:
    check_keys(section, [one.name for one in fields(HubMachines)], (HUB_SECTION,))
    for one in fields(HubMachines):
        if one.default is MISSING and one.default_factory is MISSING and one.name not in section:
            why = ": the service ends a job without one after a time of its own" if one.name == "timeout" else ""
            raise Invalid((HUB_SECTION,), f"{one.name} is missing{why}", hint=f"{one.name}: {_EXAMPLES[one.name]}")
    try:
        return HubMachines(**section)
    except Invalid as error:
        raise Invalid((HUB_SECTION, *error.path), error.args[0].partition(": ")[2], hint=error.hint) from error


def _text(value: Any, path: tuple[Any, ...], hint: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Invalid(path, f"{value!r} is not text", hint=hint)
    return value


# -- what is asked of the service -------------------------------------------------------------------------------------


def notes(job: HubJob) -> list[str]:
    """Return what a user must know about this job before it starts."""
    found = []
    if job.unused:
        found.append(f"Hugging Face Jobs has nothing for {', '.join(job.unused)}")
    if job.section.attempts == 1:
        found.append(f"attempts is 1: after a preemption or the timeout, `hf-spot jobs run` starts the next job of {job.name}")
    return found


def secret_names(job: HubJob, environ: Mapping[str, str]) -> list[str]:
    """Return the variables whose values the job gets as secrets: those that the file names, those of the store, and the key of
    the journal."""
    needed = [TOKEN] if job.store.startswith("hf://") else [*_KEYS, *([_SESSION] if environ.get(_SESSION) else [])]
    if environ.get(seal.VARIABLE):
        needed.append(seal.VARIABLE)
    return list(dict.fromkeys([*needed, *job.section.secrets]))


def secrets(job: HubJob, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the values of the secrets.

    Args:
        job: the job.
        environ: the environment, with the token of the login as ``HF_TOKEN``.

    Raises:
        ConfigError: one is not set.
    """
    names = secret_names(job, environ)
    missing = [name for name in names if not environ.get(name)]
    if TOKEN in missing:
        raise ConfigError(
            f"a job can't use {job.store} without a token, and this machine is not logged in",
            hint=f"hf auth login, or export {TOKEN}=…",
        )
    if missing:
        why = f"{HUB_SECTION}.secrets" if missing[0] in job.section.secrets else f"the store {job.store}"
        raise ConfigError(
            f"{', '.join(missing)} is not set here, and {why} needs it in the job",
            hint=" ".join(["export", *(f"{name}=…" for name in missing)]),
        )
    return {name: environ[name] for name in names}


def environment(job: HubJob, environ: Mapping[str, str], price_usd_per_hour: float | None) -> dict[str, str]:
    """Return the variables of the job that are no secrets."""
    machine = {"cloud": "huggingface", "instance_type": job.section.flavor, "market": "on-demand"}
    if price_usd_per_hour is not None:
        machine |= {"price_usd_per_hour": price_usd_per_hour, "price_source": "Hugging Face's prices of Jobs"}  # type: ignore[dict-item]
    made = {STORE_VARIABLE: job.store, "HF_SPOT_MACHINE": json.dumps(machine)}
    if job.size.is_fleet:
        made["HF_SPOT_NUM_MACHINES"] = job.size.option
    if job.region and job.store.startswith("s3://"):
        made["AWS_REGION"] = job.region
    passed = (KMS_KEY_VARIABLE, OWNER_VARIABLE, *_ENDPOINTS)
    made |= {name: re.sub(r"//[^/]*@", "//", environ[name]) for name in passed if environ.get(name)}
    return {**made, **job.section.env}


def volumes(job: HubJob, wheel: Wheel | None) -> list[dict[str, Any]]:
    """Return the mounts of the job, as arguments of ``huggingface_hub.Volume``."""
    found = []
    for text in job.section.volumes:
        mount = _MOUNT.fullmatch(text)
        assert mount is not None
        found.append(_volume(mount["type"], mount["id"], mount["mount"], mount["path"], mount["mode"], mount["revision"]))
    if wheel is not None and (place := _HUB_STORE.fullmatch(job.store)) and job.requirements:
        found.append(
            _volume(place["type"], place["id"], _WHEELS, f"{place['path'].rstrip('/')}/wheels/{wheel.digest}", "ro", None)
        )
    return found


def _volume(
    kind: str | None, source: str, mount_path: str, path: str | None, mode: str | None, revision: str | None
) -> dict[str, Any]:
    made: dict[str, Any] = {"type": (kind or "models").removesuffix("s"), "source": source, "mount_path": mount_path}
    more = {"path": path, "read_only": None if mode is None else mode == "ro", "revision": revision}
    return made | {name: value for name, value in more.items() if value is not None}


def command(job: HubJob, wheel: Wheel | None) -> list[str]:
    """Return the command of the container. It holds no secret."""
    script = _SCRIPT.format(
        name=job.name,
        store=job.store,
        install=_install(job, wheel),
        setup=_file("setup", job.setup) + '\nbash -euo pipefail "$folder/setup"' if job.setup.strip() else "",
        run=_file("run", job.run),
        timeout_s=job.section.timeout_s,
    )
    return ["bash", "-c", re.sub(r"\n{2,}", "\n", script)]


def _install(job: HubJob, wheel: Wheel | None) -> str:
    if not job.requirements:
        return "# requirements: [] means that the image has hf_spot"
    if wheel is None or not job.store.startswith("hf://") or wheel.url.startswith("https://"):
        return _VENV + install(job.requirements, wheel)
    own = [one for one in job.requirements if re.match(r"hf[-_.]spot\b", one, re.IGNORECASE)]
    others = [one for one in job.requirements if one not in own]
    if not own:
        return _VENV + f"pip install {shlex.join(others)}"
    extras = next((found[0] for one in own if (found := re.search(r"\[[^\]]*\]", one))), "")
    check = f"cp {_WHEELS}/{wheel.name} .\necho '{wheel.digest}  {wheel.name}' | sha256sum --check --strict"
    return _VENV + f"{check}\npip install {shlex.join([f'./{wheel.name}{extras}', *others])}"


def _file(name: str, text: str) -> str:
    end = "END"
    while end in text.splitlines():
        end += "_"
    return f"cat > \"$folder/{name}\" <<'{end}'\n{text.rstrip()}\n{end}"


def most_usd(job: HubJob, price_usd_per_hour: float, machines: int) -> float:
    """Return the dollars that jobs cost at most: every attempt of each runs until the timeout."""
    return price_usd_per_hour * job.section.timeout_s / 3600 * job.section.attempts * machines
