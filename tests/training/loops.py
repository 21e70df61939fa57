"""Loops of one's own in processes of their own, which real signals end. They are forked from one that has imported torch."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.waiting import PATIENCE_S, wait_for

SCRIPTS = Path(__file__).parent / "scripts"
_context = multiprocessing.get_context("forkserver")
# torch imports the last two when the first optimizer and the first DDP model are made, which takes longer than these loops.
_context.set_forkserver_preload(
    ["torch", "numpy", "hf_spot.training.manager", "accelerate", "torch._dynamo", "torch.distributed.fsdp"]
)


def run_script(script: str, argv: list[str], log: str, env: dict[str, str], home_made: bool) -> None:
    """What a process does: the script as ``__main__``, with its output in a file."""
    os.environ.update(env)
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2  # seconds that torch waits at the end for each worker
    sys.argv = [script, *argv]
    if home_made:
        import hf_spot
        from tests.training.home_made import SpotCheckpointManager

        hf_spot.SpotCheckpointManager = SpotCheckpointManager  # type: ignore[assignment, misc]
    runpy.run_path(script, run_name="__main__")


@dataclass
class Loop:
    """One or more ranks of a running script."""

    processes: list[BaseProcess]
    diary: Path
    log: Path

    def lines(self) -> list[dict[str, Any]]:
        text = self.diary.read_text() if self.diary.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait_for_step(self, step: int) -> None:
        wait_for(lambda: self._reached(step) or self._has_ended(), f"for step {step}: {self.text()}")
        assert self._reached(step), self.text()

    def interrupt(self, number: int = signal.SIGTERM, rank: int = 0) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait_until_it_says(self, text: str) -> None:
        wait_for(lambda: text in self.text() or self._has_ended(), f"for {text!r}: {self.text()}")

    def go_on_when_it_says(self, text: str) -> None:
        """Ends the hold of ``--hold_at`` as soon as ``text`` is in the output."""
        self.wait_until_it_says(text)
        self.diary.with_suffix(".go-on").touch()

    def wait(self) -> int:
        """The exit code of rank 0; -9 after a kill."""
        for process in self.processes:
            process.join(PATIENCE_S)
            assert process.exitcode is not None, self.text()
        self.diary.with_suffix(".go-on").unlink(missing_ok=True)
        code = self.processes[0].exitcode
        assert code is not None
        return code

    def end(self) -> dict[str, Any]:
        """Weights, and what the generators draw next, of a loop that came to its end."""
        path = self.diary.with_suffix(".end")
        assert path.exists(), self.text()
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _reached(self, step: int) -> bool:
        return max((line["step"] for line in self.lines()), default=0) >= step

    def _has_ended(self) -> bool:
        return all(process.exitcode is not None for process in self.processes)


class Loops:
    """Starts scripts with a diary in one folder.

    Args:
        folder: for diaries and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[BaseProcess] = []

    def start(
        self,
        name: str,
        *argv: str,
        script: str = "own_loop.py",
        env: dict[str, str] | None = None,
        home_made: bool = False,
        ranks: int = 1,
        diary: str | None = None,
    ) -> Loop:
        path, log = self.folder / f"{diary or name}.json", self.folder / f"{name}.log"
        options = ["--checkpoint_dir", str(self.folder / name), "--diary", str(path), *argv]
        processes: list[BaseProcess] = []
        for rank in range(ranks):
            told = {"XDG_CACHE_HOME": str(self.folder / "cache"), "OMP_NUM_THREADS": "1", **(env or {})}
            if ranks > 1:
                told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # accelerate wants them; the file is where they meet
                told |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                told["RENDEZVOUS"] = str(self.folder / f"meet-{name}-{len(self._started) - rank}")
            process = _context.Process(target=run_script, args=(str(SCRIPTS / script), options, str(log), told, home_made))
            process.start()
            processes.append(process)
            self._started.append(process)
        return Loop(processes, path, log)

    def run(self, name: str, *argv: str, **how: Any) -> Loop:
        """To its end, which must be a good one."""
        loop = self.start(name, *argv, **how)
        code = loop.wait()
        assert code == 0, loop.text()
        return loop

    def close(self) -> None:
        for process in self._started:
            if process.is_alive():
                process.kill()
            process.join(PATIENCE_S)
            process.close()


@contextlib.contextmanager
def loops_in(folder: Path) -> Iterator[Loops]:
    """Ends what is left."""
    loops = Loops(folder)
    try:
        yield loops
    finally:
        loops.close()
