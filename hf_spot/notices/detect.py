"""Which sources of notices to listen to on this machine, found without asking the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError
from hf_spot.notices import aws
from hf_spot.notices.aws import IMDSSource
from hf_spot.notices.file import FILE_VARIABLE, FileSource
from hf_spot.notices.notice import NoticeSource
from hf_spot.notices.signals import SignalSource

DMI = Path("/sys/class/dmi/id")
HYPERVISOR_UUID = Path("/sys/hypervisor/uuid")


def sources(
    arguments: SpotArguments,
    *,
    environ: Mapping[str, str],
    dmi: Path = DMI,
    hypervisor_uuid: Path = HYPERVISOR_UUID,
) -> list[NoticeSource]:
    """The sources that ``arguments.notice`` names, ready to be given to a `Watcher`.

    ``auto`` is signals, the metadata service of the cloud that this machine is in, and a file if the environment names
    one. What the machine is, is read from files that the kernel fills (DMI): that takes a moment, not a timeout.

    Args:
        arguments: settings.
        environ: the environment.
        dmi: folder with ``sys_vendor`` and ``product_uuid``.
        hypervisor_uuid: file of Xen machines.

    Raises:
        ConfigError: a named source can't be used here.
    """
    names = list(dict.fromkeys(name.strip() for name in arguments.notice.split(",") if name.strip()))
    if names == ["none"]:
        return []
    if names == ["auto"]:
        names = ["signal"]
        names += [name for name, is_here in _CLOUDS.items() if is_here(environ, dmi, hypervisor_uuid)]
        names += ["file"] if environ.get(FILE_VARIABLE) else []
    made = []
    for name in names:
        base, _, path = name.partition(":")
        made.append(_MAKERS[base](arguments, environ, path))
    return made


def _make_file(arguments: SpotArguments, environ: Mapping[str, str], path: str) -> NoticeSource:
    path = path or environ.get(FILE_VARIABLE, "")
    if not path:
        raise ConfigError("notice='file': no file is named", hint=f"--notice file:/a/path, or set {FILE_VARIABLE}")
    return FileSource(path)


# Another cloud is a line in each of the two tables, and its name in `hf_spot.arguments.NOTICE_NAMES`.
_MAKERS: dict[str, Callable[[SpotArguments, Mapping[str, str], str], NoticeSource]] = {
    "signal": lambda arguments, environ, path: SignalSource(arguments.signals.split(","), arguments.grace_s),
    "imds": lambda arguments, environ, path: IMDSSource.from_environ(environ),
    "file": _make_file,
}


def is_ec2(environ: Mapping[str, str], dmi: Path = DMI, hypervisor_uuid: Path = HYPERVISOR_UUID) -> bool:
    """Whether this machine is one of EC2, or the environment leads to a metadata service as EC2 has it."""
    if aws.is_disabled(environ):
        return False
    return (
        bool(environ.get(aws.ENDPOINT_VARIABLE))
        or _first_line(dmi / "sys_vendor") == "Amazon EC2"
        or _first_line(hypervisor_uuid).lower().startswith("ec2")
        or _first_line(dmi / "product_uuid").lower().startswith("ec2")
    )


_CLOUDS: dict[str, Callable[[Mapping[str, str], Path, Path], bool]] = {"imds": is_ec2}


def _first_line(path: Path) -> str:
    """Empty when the file is missing, or is for root only as product_uuid is."""
    try:
        return path.read_text(errors="replace").strip().partition("\n")[0]
    except OSError:
        return ""
