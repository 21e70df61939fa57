"""The processes of a launch, as the launcher waits for them."""

from __future__ import annotations

import contextlib
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from hf_spot.launch.bell import Bell
from hf_spot.launch.process import ProcessTree
from tests.waiting import PATIENCE_S, wait_for


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system can't wait for two things at once: the launcher polls")
def test_a_wait_ends_at_once_when_the_bell_rings_and_when_the_command_ends() -> None:
    tree = ProcessTree(["sleep", "600"], os.environ)
    with contextlib.closing(Bell()) as bell, ThreadPoolExecutor(1) as pool:
        try:
            waiting = pool.submit(tree.wait, PATIENCE_S, bell)
            with pytest.raises(TimeoutError):
                waiting.result(0.05)
            bell.ring()
            assert waiting.result(PATIENCE_S / 10) is None
            bell.ring()
            bell.ring()
            assert tree.wait(PATIENCE_S, bell) is None
            waiting = pool.submit(tree.wait, PATIENCE_S, bell)  # it has been silenced
            with pytest.raises(TimeoutError):
                waiting.result(0.05)
            command = wait_for(lambda: [one for one in tree.processes() if one.name() == "sleep"], "for the command")[0]
            command.send_signal(signal.SIGKILL)
            assert waiting.result(PATIENCE_S / 10) == 128 + signal.SIGKILL
        finally:
            tree.end()
            bell.ring()


def test_who_is_killed_need_not_be_awaited_and_is_gone_at_the_end() -> None:
    tree = ProcessTree(["sh", "-c", "sleep 600 & sleep 600"], os.environ)
    try:
        wait_for(lambda: len([one for one in tree.processes() if one.name() == "sleep"]) == 2, "for the commands")
        left = tree.processes()
        tree.kill()
    finally:
        tree.end()
    assert len(left) >= 4 and not any(one.is_running() for one in left)
