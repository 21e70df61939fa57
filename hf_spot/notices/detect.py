"""Choosing the sources of notices on this machine, without network access."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

from hf_spot.arguments import SpotArguments, notice_plugins
from hf_spot.errors import ConfigError
from hf_spot.notices import alibaba, aws, azure, gcp, slurm
from hf_spot.notices.alibaba import AlibabaSource
from hf_spot.notices.aws import IMDSSource
from hf_spot.notices.azure import AzureSource
from hf_spot.notices.file import FILE_VARIABLE, FileSource
from hf_spot.notices.gcp import GCPSource
from hf_spot.notices.notice import NoticeSource
from hf_spot.notices.signals import SignalSource
from hf_spot.notices.slurm import SlurmSource

log = logging.getLogger("hf_spot")

DMI = Path("/sys/class/dmi/id")
HYPERVISOR_UUID = Path("/sys/hypervisor/uuid")
GRACE_VARIABLE = "HF_SPOT_GRACE_S"

_SAGEMAKER_GRACE_S = 120.0  # https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_StoppingCondition.html
_AZURE_ASSET_TAG = "7783-7084-3265-9085-8269-3286-77"  # identifies Azure; the vendor is the same for all of Hyper-V


def sources(
    arguments: SpotArguments,
    *,
    environ: Mapping[str, str],
    dmi: Path = DMI,
    hypervisor_uuid: Path = HYPERVISOR_UUID,
) -> list[NoticeSource]:
    """Return the sources that ``arguments.notice`` names, for a `Watcher`.

    ``auto`` selects signals, the metadata service of this machine's cloud, the time limit of a Slurm job, a file if the
    environment names one, and plugins that declare that they apply here. The machine is identified by files that the
    kernel provides (DMI) and by the environment, which never has to wait for a timeout.

    Args:
        arguments: settings.
        environ: the environment.
        dmi: folder with ``sys_vendor``, ``product_name``, ``product_uuid`` and ``chassis_asset_tag``.
        hypervisor_uuid: file that exists on Xen machines.

    Raises:
        ConfigError: a named source can't be used here.
    """
    names = list(dict.fromkeys(name.strip() for name in arguments.notice.split(",") if name.strip()))
    if names == ["none"]:
        return []
    found: list[NoticeSource] = []
    if names == ["auto"]:
        machine = _Machine(environ, dmi, hypervisor_uuid)
        names = ["signal", *(name for name, is_here in _IS_HERE.items() if is_here(machine))]
        found = [made for name, plugin in notice_plugins().items() if (made := _plugin_for_auto(name, plugin, environ))]
    for name in names:
        base, _, text = name.partition(":")
        make = _MAKERS.get(base) or _plugin(base)
        found.append(make(arguments, environ, text))
    return found


def grace_s(arguments: SpotArguments, environ: Mapping[str, str]) -> float | None:
    """Return the seconds from a signal to the kill: the setting, else the environment's, else the platform's, or None.

    Raises:
        ConfigError: $HF_SPOT_GRACE_S is not a positive number.
    """
    if arguments.grace_s is not None:
        return arguments.grace_s
    if text := environ.get(GRACE_VARIABLE, "").strip():
        return _seconds(text, f"{GRACE_VARIABLE}={text}", f"{GRACE_VARIABLE}=30")
    return _SAGEMAKER_GRACE_S if _is_sagemaker(environ) else None


# -- by name -----------------------------------------------------------------------------------------------------------

_Maker = Callable[[SpotArguments, Mapping[str, str], str], NoticeSource]


def _make_file(arguments: SpotArguments, environ: Mapping[str, str], path: str) -> NoticeSource:
    path = path or environ.get(FILE_VARIABLE, "")
    if not path:
        raise ConfigError("notice='file' needs a path", hint=f"--notice file:/a/path, or set {FILE_VARIABLE}")
    return FileSource(path)


def _seconds_of(name: str, text: str) -> float | None:
    return _seconds(text, f"notice='{name}:{text}'", f"--notice {name}:120") if text else None


def _seconds(text: str, what: str, hint: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(f"{what} is not a positive number of seconds", hint=hint)
    return seconds


# To add a cloud, add a line to both tables, and its name to `hf_spot.arguments.NOTICE_NAMES`.
_MAKERS: dict[str, _Maker] = {
    "signal": lambda arguments, environ, text: SignalSource(arguments.signals.split(","), grace_s(arguments, environ)),
    "imds": lambda arguments, environ, text: IMDSSource.from_environ(environ),
    "gcp": lambda arguments, environ, text: GCPSource.from_environ(environ, _seconds_of("gcp", text)),
    "azure": lambda arguments, environ, text: AzureSource.from_environ(environ),
    "alibaba": lambda arguments, environ, text: AlibabaSource.from_environ(environ),
    "slurm": lambda arguments, environ, text: SlurmSource.from_environ(environ, _seconds_of("slurm", text)),
    "file": _make_file,
}


def is_ec2(environ: Mapping[str, str], dmi: Path = DMI, hypervisor_uuid: Path = HYPERVISOR_UUID) -> bool:
    """Return whether this machine is on EC2, or the environment names a metadata service like that of EC2."""
    return _is_ec2(_Machine(environ, dmi, hypervisor_uuid))


def _plugin(name: str) -> _Maker:
    def make(arguments: SpotArguments, environ: Mapping[str, str], text: str) -> NoticeSource:
        plugin = notice_plugins()[name]
        try:
            factory = plugin.load()
            made = factory(text) if text else factory()
        except Exception as error:
            raise ConfigError(
                f"notice={name!r}: {plugin.value} can't be used: {type(error).__name__}: {error}",
                hint=f"""python -c "import {plugin.module}" """.strip(),
            ) from error
        if not isinstance(made, NoticeSource):
            raise ConfigError(
                f"notice={name!r}: {plugin.value} returns a {type(made).__name__}, which is not a hf_spot.NoticeSource",
                hint="it needs name, interval_s and poll()",
            )
        return made

    return make


def _plugin_for_auto(name: str, plugin: EntryPoint, environ: Mapping[str, str]) -> NoticeSource | None:
    """Return a plugin's source if its ``is_here(environ)`` is true. A broken plugin must not keep a training from starting."""
    try:
        is_here = getattr(plugin.load(), "is_here", None)
        if is_here is not None and is_here(environ):
            return _plugin(name)(SpotArguments(), environ, "")
    except Exception as error:
        log.warning("skipping the source of notices %r (%s): %s: %s", name, plugin.value, type(error).__name__, error)
    return None


# -- by what the machine is --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Machine:
    environ: Mapping[str, str]
    dmi: Path
    hypervisor_uuid: Path

    def read(self, name: str) -> str:
        return _first_line(self.dmi / name)


def _is_ec2(machine: _Machine) -> bool:
    # A SageMaker container runs on EC2 but can't reach the metadata service.
    if aws.is_disabled(machine.environ) or _is_sagemaker(machine.environ):
        return False
    return (
        bool(machine.environ.get(aws.ENDPOINT_VARIABLE))
        or machine.read("sys_vendor") == "Amazon EC2"
        or _first_line(machine.hypervisor_uuid).lower().startswith("ec2")
        or machine.read("product_uuid").lower().startswith("ec2")
    )


def _is_gcp(machine: _Machine) -> bool:
    if machine.environ.get(gcp.DISABLED_VARIABLE, "").strip().lower() == "true":
        return False
    return bool(machine.environ.get(gcp.HOST_VARIABLE)) or machine.read("product_name") in ("Google", "Google Compute Engine")


def _is_azure(machine: _Machine) -> bool:
    return bool(machine.environ.get(azure.ENDPOINT_VARIABLE)) or machine.read("chassis_asset_tag") == _AZURE_ASSET_TAG


def _is_alibaba(machine: _Machine) -> bool:
    return bool(machine.environ.get(alibaba.ENDPOINT_VARIABLE)) or machine.read("product_name") == "Alibaba Cloud ECS"


def _is_sagemaker(environ: Mapping[str, str]) -> bool:
    return bool(environ.get("TRAINING_JOB_ARN") or environ.get("SM_TRAINING_ENV"))


_IS_HERE: dict[str, Callable[[_Machine], bool]] = {
    "imds": _is_ec2,
    "gcp": _is_gcp,
    "azure": _is_azure,
    "alibaba": _is_alibaba,
    "slurm": lambda machine: slurm.ends_at(machine.environ) is not None,
    "file": lambda machine: bool(machine.environ.get(FILE_VARIABLE)),
}


def _first_line(path: Path) -> str:
    """Return the first line, or "" if the file is missing or readable by root only, as product_uuid is."""
    try:
        return path.read_text(errors="replace").strip().partition("\n")[0]
    except OSError:
        return ""
