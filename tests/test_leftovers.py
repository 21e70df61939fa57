"""A test run that is killed leaves nothing that stands in the way of the next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import leftovers
from tests.small_disk import why_not

ROOT = Path(__file__).resolve().parent.parent
MAKES = """
import sys, tempfile
from pathlib import Path
from tests import leftovers
from tests.small_disk import SmallDisk
with SmallDisk(Path(sys.argv[1]), size_kb=64):
    print(tempfile.mkdtemp(prefix=leftovers.name(), dir=leftovers.MEMORY), flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.skipif(not os.access(leftovers.MEMORY, os.W_OK), reason="this system has no /dev/shm")
def test_what_a_killed_process_has_left_is_removed_and_what_a_living_one_needs_is_not(tmp_path: Path) -> None:
    disks = [tmp_path / "one", tmp_path / "other"]
    killed, living = [
        subprocess.Popen(
            [sys.executable, "-c", MAKES, disk], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for disk in disks
    ]
    with killed, living:
        in_memory = [Path(one.stdout.readline().strip()) for one in (killed, living) if one.stdout]
        killed.kill()
        killed.wait()
        assert [os.path.ismount(disk) for disk in disks] == [folder.exists() for folder in in_memory] == [True, True]
        leftovers.remove()
        assert [os.path.ismount(disk) for disk in disks] == [folder.exists() for folder in in_memory] == [False, True]
    in_memory[1].rmdir()
    assert not os.path.ismount(disks[1])
