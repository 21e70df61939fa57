"""Real Jupyter kernels, each a process of this Python, ended with its test."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

from tests.waiting import PATIENCE_S


@dataclass
class Outcome:
    """What a cell has shown, and whether the cells below it would have run."""

    status: str = ""
    shown: str = ""
    errors: list[dict[str, Any]] = field(default_factory=list)


class Kernel:
    """A kernel that runs one cell after the other."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self.manager = manager
        self._client = client
        self._asked = ""

    def start(self, cell: str) -> None:
        """Runs a cell, and returns at once."""
        self._asked = self._client.execute(cell)

    def wait_until_shown(self, text: str) -> None:
        """Returns when the cell that runs has printed this."""
        seen = ""
        while text not in seen:
            try:
                message = self._client.get_iopub_msg(timeout=PATIENCE_S)
            except queue.Empty:
                raise AssertionError(f"waited in vain for {text!r} in {seen!r}") from None
            if message["parent_header"].get("msg_id") != self._asked:
                continue
            seen += message["content"].get("text", "")
            assert message["msg_type"] != "error", message["content"]

    def outcome(self) -> Outcome:
        """Waits for the end of the cell."""
        found = Outcome()
        while True:
            message = self._client.get_iopub_msg(timeout=PATIENCE_S)
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != self._asked:
                continue
            if kind == "stream":
                found.shown += content["text"]
            elif kind in ("execute_result", "display_data"):
                found.shown += content["data"].get("text/plain", "")
            elif kind == "error":
                found.errors.append(content)
            elif kind == "status" and content["execution_state"] == "idle":
                break
        reply = self._client.get_shell_msg(timeout=PATIENCE_S)
        assert reply["parent_header"]["msg_id"] == self._asked
        found.status = reply["content"]["status"]
        return found

    def run(self, cell: str) -> Outcome:
        """Runs a cell to its end."""
        self.start(cell)
        return self.outcome()

    def interrupt(self) -> None:
        """What the stop button does."""
        self.manager.interrupt_kernel()


@contextmanager
def kernel(folder: Path, environment: Mapping[str, str]) -> Iterator[Kernel]:
    """A fresh kernel.

    Args:
        folder: that it works in.
        environment: besides that of this process.
    """
    manager = KernelManager()
    manager.start_kernel(cwd=str(folder), env={**os.environ, "HF_HUB_OFFLINE": "1", **environment})
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=PATIENCE_S)
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
