"""Real Jupyter kernels, each a process of this Python, ended with its test."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

from tests.waiting import PATIENCE_S
from tests.zygote import Zygote

PRESS_S = 1.2  # longer than what counts as one press


@dataclass
class Outcome:
    """What a cell has shown, and whether the cells below it would have run."""

    status: str = ""
    shown: str = ""
    errors: list[dict[str, Any]] = field(default_factory=list)


class Kernel:
    """A kernel that runs one cell after the other."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self._manager = manager
        self._client = client
        self._asked = ""

    def start(self, cell: str) -> None:
        """Runs a cell, and returns at once."""
        self._asked = self._client.execute(cell)

    def wait_until_shown(self, text: str) -> None:
        """Returns when the cell that runs has printed this."""
        seen = ""
        while text not in seen:
            message = self._next(PATIENCE_S)
            assert message is not None and message["msg_type"] != "error", f"waited in vain for {text!r}: {seen} {message}"
            seen += message["content"].get("text", "")

    def outcome(self) -> Outcome:
        """Waits for the end of the cell."""
        found = Outcome()
        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            assert time.monotonic() < give_up_at, f"the cell does not end: {found}"
            message = self._next(give_up_at - time.monotonic())
            if message is None:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                found.shown += content["text"]
            elif kind == "error":
                found.errors.append(content)
            elif kind == "status" and content["execution_state"] == "idle":
                break
        # A kernel that was slow to start has been asked more than once whether it is there, and answers each time.
        while (reply := self._client.get_shell_msg(timeout=PATIENCE_S))["parent_header"]["msg_id"] != self._asked:
            continue
        found.status = reply["content"]["status"]
        return found

    def run(self, cell: str) -> Outcome:
        """Runs a cell to its end."""
        self.start(cell)
        return self.outcome()

    def interrupt(self) -> None:
        """What the stop button does."""
        self._manager.interrupt_kernel()

    def _next(self, patience_s: float) -> dict[str, Any] | None:
        """The next message of the cell that runs."""
        with contextlib.suppress(queue.Empty):
            while (message := self._client.get_iopub_msg(timeout=patience_s))["parent_header"].get("msg_id") != self._asked:
                continue
            return dict(message)
        return None


@contextmanager
def kernel(folder: Path, environment: Mapping[str, str], zygote: Zygote) -> Iterator[Kernel]:
    """A kernel of its own, which has imported torch.

    Args:
        folder: that it works in.
        environment: besides that of this process.
        zygote: forks it.
    """
    manager = KernelManager()
    with zygote.forking():
        manager.start_kernel(cwd=str(folder), env={**os.environ, "HF_HUB_OFFLINE": "1", **environment})
    group = manager.provisioner.pid  # type: ignore[union-attr]
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=PATIENCE_S)
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)  # the workers that it has forked, too
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
