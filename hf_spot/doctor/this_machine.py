"""`hf-spot doctor` on this machine. Of the network only the metadata service is queried, and only on machines known to have
one."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement

from hf_spot.aws_errors import HOP_LIMIT
from hf_spot.doctor.finding import FAIL, OK, WARN, Finding, Notice
from hf_spot.errors import SpotError
from hf_spot.notices.aws import DISABLED_VARIABLE, IMDSSource
from hf_spot.notices.notice import NoticeSource

_SHOWN = ("hf_spot", "Python", "torch", "transformers", "accelerate", "boto3")
_SHELLS = ("sh", "bash", "dash", "ash", "zsh")
_LOCAL = ("signal", "file")  # sources of notices that need no network
# See the table of notices in https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html,
# https://cloud.google.com/compute/docs/instances/spot and
# https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events.
_NOTICES_S = {"imds": (120.0, "EC2"), "gcp": (30.0, "Google Cloud"), "azure": (30.0, "Azure")}
_SMI_S = 20.0


def notice_of(environ: Mapping[str, str], clouds: Sequence[str], grace_s: float | None) -> Notice:
    """Return how long this machine lives after a notice, if that is known. Pure.

    Args:
        environ: the environment.
        clouds: names of this machine's metadata services.
        grace_s: the user's value, or None.
    """
    if grace_s is not None:
        return Notice(grace_s, "--grace-s")
    if environ.get("KUBERNETES_SERVICE_HOST"):
        return Notice(30.0, "Kubernetes")
    if environ.get("SLURM_JOB_ID"):
        return Notice(30.0, "Slurm")
    if environ.get("SM_TRAINING_ENV") or environ.get("TRAINING_JOB_NAME"):
        return Notice(120.0, "SageMaker")
    for name in clouds:
        if name in _NOTICES_S:
            return Notice(*_NOTICES_S[name])
    return Notice(None, "")


def machine(
    environ: Mapping[str, str],
    sources: Sequence[NoticeSource],
    notice: Notice,
    *,
    root: Path = Path("/"),
) -> Iterator[Finding]:
    """Check versions, metadata service, grace period, signals and GPU.

    Args:
        environ: the environment.
        sources: the sources of notices on this machine.
        notice: time between a notice and the end of the machine.
        root: root of the file system.
    """
    contained = bool(environ.get("KUBERNETES_SERVICE_HOST")) or any(
        (root / name).exists() for name in (".dockerenv", "run/.containerenv")
    )
    yield from _versions()
    yield from _metadata(environ, sources, contained)
    yield _grace(environ, notice)
    if contained:
        yield from _signals(root)
    yield _gpu(environ)


def _versions() -> Iterator[Finding]:
    try:
        wanted = [Requirement(line) for line in importlib.metadata.requires("hf_spot") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            WARN, "versions", "hf_spot is not installed as a package, so its requirements are unknown", "pip install ."
        )
        return
    has, wrong = {"hf_spot": importlib.metadata.version("hf_spot"), "Python": platform.python_version()}, False
    for one in wanted:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            has[one.name] = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            wrong = True
            yield Finding(FAIL, "versions", f"{one.name} is not installed", f"pip install '{one}'")
            continue
        if not one.specifier.contains(has[one.name], prereleases=True):
            wrong = True
            found = f"{one.name} {has[one.name]} is not supported: hf_spot needs {one.specifier}"
            yield Finding(FAIL, "versions", found, f"pip install '{one}'")
    if not wrong:
        yield Finding(OK, "versions", ", ".join(f"{name} {has[name]}" for name in _SHOWN if name in has))


def _metadata(environ: Mapping[str, str], sources: Sequence[NoticeSource], contained: bool) -> Iterator[Finding]:
    remote = [source for source in sources if source.name not in _LOCAL]
    for source in remote:
        where = getattr(source, "where", source.name)
        try:
            notice = source.poll()
            if notice is not None:
                found = f"{where} announces the end of this machine: {notice.kind.value} ({notice.id})"
                yield Finding(WARN, "metadata", found, "hf-spot watch")
            elif contained or not isinstance(source, IMDSSource):
                yield Finding(OK, "metadata", f"{where} answers: no notice")
            elif source.has_a_hop_to_spare():
                yield Finding(OK, "metadata", f"{where} answers, also to containers (hop limit 2 or more): no notice")
            else:
                yield Finding(WARN, "metadata", f"{where} answers, but not to containers: the hop limit is 1", HOP_LIMIT)
        except SpotError as error:
            yield Finding(FAIL, "metadata", f"notices can't be detected: {error.args[0]}", error.hint)
    if not remote and environ.get(DISABLED_VARIABLE, "").strip().lower() == "true":
        found = f"{DISABLED_VARIABLE}=true: if this is EC2, its notices are not detected"
        yield Finding(WARN, "metadata", found, f"unset {DISABLED_VARIABLE}")
    elif not remote:
        yield Finding(OK, "metadata", "no known cloud: only signals and files can announce a preemption here")


def _grace(environ: Mapping[str, str], notice: Notice) -> Finding:
    if notice.by == "Kubernetes":
        return Finding(
            WARN,
            "notice",
            "Kubernetes kills a pod 30 s after SIGTERM (15 s on a spot node of GKE) unless terminationGracePeriodSeconds is "
            "longer, which a pod can't see",
            "use --grace-s N with this command and with hf-spot launch, and terminationGracePeriodSeconds: N in the pod",
        )
    if notice.by == "Slurm":
        return Finding(
            WARN,
            "notice",
            "Slurm sends no signal ahead of a time limit unless configured, and kills 30 s (KillWait) after SIGTERM",
            "use #SBATCH --signal=B:USR1@120 --requeue in the job, and hf-spot launch --grace-s 120",
        )
    if notice.seconds is None:
        return Finding(
            OK, "notice", "nothing is known to end this machine; if something does, set its grace period with --grace-s"
        )
    return Finding(OK, "notice", f"{notice.seconds:g} s from notice to end ({notice.by})")


def _signals(root: Path) -> Iterator[Finding]:
    try:
        first = (root / "proc/1/comm").read_text().strip()
    except OSError:
        return
    if first in _SHELLS:
        found = f"the container's first process is {first}, which does not forward SIGTERM to its children"
        yield Finding(
            WARN, "signals", found, 'use exec hf-spot launch … as its last command, or ["hf-spot", "launch", …] without a shell'
        )
    else:
        yield Finding(OK, "signals", f"SIGTERM reaches {first}, the container's first process")


def disk(folder: Path, size_bytes: int | None) -> Finding:
    """Check whether checkpoints fit on the disk.

    Args:
        folder: where they would be written.
        size_bytes: size of a checkpoint, or None.
    """
    free = shutil.disk_usage(folder).free
    has = f"{folder} has {free / 1e9:,.1f} GB free"
    if size_bytes is None:
        return Finding(OK, "disk", f"{has}; the size of a checkpoint is not known yet (set --checkpoint-gb)")
    needs = f"a checkpoint needs {size_bytes / 1e9:,.1f} GB"
    repair = "move output_dir to a larger disk, or free some space: du -xh --max-depth=2 / | sort -h | tail"
    if free < size_bytes:
        return Finding(FAIL, "disk", f"{has}, and {needs}", repair)
    if free < 2 * size_bytes:
        return Finding(
            WARN, "disk", f"{has}, and {needs}: the next one is written while the previous one is still uploading", repair
        )
    return Finding(OK, "disk", f"{has}, and {needs}")


def _gpu(environ: Mapping[str, str]) -> Finding:
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        return Finding(WARN, "gpu", "no nvidia-smi: training would run on the CPU", "use an image with NVIDIA's driver")
    fields = "--query-gpu=name,memory.total,driver_version"
    try:
        done = subprocess.run(
            [program, fields, "--format=csv,noheader"], capture_output=True, text=True, timeout=_SMI_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(FAIL, "gpu", f"nvidia-smi does not work: {error}", "sudo dmesg | grep -i nvrm")
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not lines:
        output = (done.stderr.strip() or done.stdout.strip() or "no GPU").partition("\n")[0]
        return Finding(FAIL, "gpu", f"nvidia-smi finds no GPU: {output}", "sudo dmesg | grep -i nvrm")
    name, memory, driver = [*lines[0].split(", "), "?", "?"][:3]
    return Finding(OK, "gpu", f"{len(lines)} {name}, {memory}, driver {driver}")
