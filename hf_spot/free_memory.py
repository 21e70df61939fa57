"""Memory that may still be allocated, on this machine or in the control groups that limit this process: a container, a job of
Slurm, a slice of systemd. Files that are only cached count as free, because the kernel drops them first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def available_and_total_bytes(groups: Path = _GROUPS, own_groups: Path = _OWN_GROUPS) -> tuple[int, int]:
    """Return the bytes that may still be allocated, and all of them, by the limit that leaves the least.

    Args:
        groups: where the control groups are mounted, of version 1 or 2.
        own_groups: the file that names those of this process.
    """
    machine = psutil.virtual_memory()
    left, total = min([(machine.available, machine.total), *_limits(groups, own_groups)])
    return max(0, left), total


def _limits(groups: Path, own_groups: Path) -> Iterator[tuple[int, int]]:
    """Yield what each group above this process leaves, and its limit."""
    with contextlib.suppress(OSError):  # no control groups
        for line in own_groups.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds:
                top, names = groups, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in kinds.split(","):
                top = groups / "memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            # In a container the path may be that of its host, and what is mounted begins at the container.
            for each in (one := PurePosixPath(path.lstrip("/")), *one.parents):
                with contextlib.suppress(OSError, ValueError, KeyError):  # not there, or without a limit ("max")
                    limit, used = (int((top / each / name).read_text()) for name in names[:2])
                    told = dict(row.split() for row in (top / each / "memory.stat").read_text().splitlines())
                    yield limit - used + int(told[names[2]]), limit
