"""What a test run that was killed has left on this machine: mounted disks, which stand in the way when pytest removes its old
folders, and folders in memory. They are named for the process that made them, and go when that is gone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import psutil

MEMORY = Path("/dev/shm")
_NAME = re.compile(r"hf_spot-tests-(\d+)-")


def name() -> str:
    """The beginning of a name, or the whole one, for what this process makes."""
    return f"hf_spot-tests-{os.getpid()}-"


def remove() -> None:
    """Removes what nobody needs any more. What belongs to a process that lives is left alone."""
    for disk in psutil.disk_partitions(all=True):
        if _is_left(disk.device):
            subprocess.run(["umount", "--lazy", disk.mountpoint], capture_output=True)  # another run may be doing the same
    for folder in MEMORY.glob("hf_spot-tests-*"):
        if _is_left(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def _is_left(device: str) -> bool:
    found = _NAME.match(device)
    return found is not None and not psutil.pid_exists(int(found[1]))
