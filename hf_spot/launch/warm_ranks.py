"""The ranks of a warm agent: spares that are its children, as its ranks will be. Torchrun gets them where it starts Pythons."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed.run
from accelerate.commands.launch import main

from hf_spot.policy.warm import same_command
from hf_spot.runtime import WAITS_ON
from hf_spot.training.upstream import RUN_RANKS, START_CHILD

_ANSWER_S = 5.0
_LONGEST_LINE_BYTES = 2**16
_CWD, _ENVIRON, _PIPES, _NEW_SESSION = 4, 5, slice(9, 15), 20  # parameters of START_CHILD, behind the command

log = logging.getLogger("hf_spot")


class _Asked(BaseException):
    """Ends accelerate's launcher once it has told how it starts ranks; it handles exceptions."""


@dataclass(frozen=True)
class Start:
    """How a rank is started.

    Args:
        words: its command line.
        environ: its environment.
        new_session: whether it gets a session of its own.
    """

    words: list[str]
    environ: dict[str, str]
    new_session: bool

    @property
    def place(self) -> str:
        """Return its number on this machine; empty if it is the only one, and accelerate starts it without torchrun."""
        return self.environ.get("LOCAL_RANK", "")


class WarmRanks:
    """Starts the ranks that the arguments of this process ask for, as spares.

    Args:
        nice: the priority of their imports.
        outputs: where the standard output and the standard error of this process go, if they are held back.
    """

    def __init__(self, nice: int, outputs: Mapping[int, int]) -> None:
        self._ranks: dict[str, tuple[Start, subprocess.Popen[bytes], socket.socket]] = {}
        self._given: list[subprocess.Popen[bytes]] = []  # kept, so that nobody waits for them but their new owners
        for start in how_ranks_start():
            ours, theirs = socket.socketpair()
            environ = {**start.environ, WAITS_ON: f"{theirs.fileno()},{nice}"}
            process = subprocess.Popen(
                start.words,
                env=environ,
                stdout=outputs.get(1),
                stderr=outputs.get(2),
                start_new_session=start.new_session,
                pass_fds=[theirs.fileno()],
            )
            theirs.close()
            self._ranks[start.place] = start, process, ours

    def connections(self) -> dict[socket.socket, Callable[[], str | bool]]:
        """Return the connections to the spares, each with a function that reads it: True once the spare is ready, or why it
        never will be."""
        return {ours: functools.partial(_is_ready, ours) for _, _, ours in self._ranks.values()}

    @contextlib.contextmanager
    def given(self) -> Iterator[None]:
        """Let each start of such a rank within the block take its spare, if that is fit for it."""

        def make(plain: Callable[..., None]) -> Callable[..., None]:
            def start(popen: Any, args: Any, *more: Any) -> None:
                if not self._give(popen, args, *more):
                    plain(popen, args, *more)

            return start

        with START_CHILD.replaced(subprocess.Popen, make):
            yield

    def _give(self, popen: Any, args: Any, *more: Any) -> bool:
        """Make a spare the process of this object, and return True; False if a fresh Python must be."""
        environ = more[_ENVIRON] or {}
        place = environ.get("LOCAL_RANK", "")
        if not place and len(self._ranks) == 1:  # it is alone now, and the spare was started for one of several machines
            place = next(iter(self._ranks))
        if place not in self._ranks or not same_command(self._ranks[place][0].words, list(args)):  # another program
            return False
        start, process, ours = self._ranks.pop(place)
        is_alike = set(more[_PIPES]) == {-1} and more[_CWD] is None and start.new_session >= bool(more[_NEW_SESSION])
        why = _order(ours, list(args), environ) if is_alike else "torchrun starts it in another way"
        ours.close()
        if why is None:
            popen.pid = process.pid
            self._given.append(process)
            return True
        process.kill()
        process.wait()
        log.info("a fresh Python starts, since %s", why)
        return False


def how_ranks_start() -> list[Start]:
    """Return how accelerate would start the ranks of this process's arguments."""
    found: list[Start] = []

    def run(args: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:  # torchrun would create one, and leave it
            args.log_dir = folder
            config, program, words = torch.distributed.run.config_from_args(args)
        for number in range(config.nproc_per_node):
            first = int(config.rdzv_configs.get("rank") or 0) * config.nproc_per_node  # a machine may keep its number
            of_rank = {"LOCAL_RANK": str(number), "RANK": str(first + number)}
            of_machine = {"LOCAL_WORLD_SIZE": str(config.nproc_per_node)}
            found.append(Start([str(program), *map(str, words)], {**os.environ, **of_rank, **of_machine}, True))
        raise _Asked

    def start(popen: Any, args: Any, *more: Any) -> None:
        found.append(Start(list(args), dict(more[_ENVIRON]), bool(more[_NEW_SESSION])))
        raise _Asked

    before, level, argv = dict(os.environ), logging.root.manager.disable, list(sys.argv)
    # Accelerate refuses a port that is in use, which the launch under way uses. The last one that is given counts.
    with socket.create_server(("", 0)) as probe:
        port = probe.getsockname()[1]
    at = next((place for place, word in enumerate(argv) if word in ("-m", "--module")), len(argv))
    sys.argv[at:at] = ["--main_process_port", str(port)]
    logging.disable()  # accelerate says it all again when it starts them
    try:
        with (
            RUN_RANKS.replaced(torch.distributed.run, lambda _: run),
            START_CHILD.replaced(subprocess.Popen, lambda _: start),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.suppress(_Asked),
        ):
            main()
    finally:
        logging.disable(level)
        sys.argv[:] = argv
        os.environ.clear()
        os.environ.update(before)
    return found


def _is_ready(connection: socket.socket) -> str | bool:
    try:
        told = json.loads(connection.recv(_LONGEST_LINE_BYTES) or b"{}")
    except (OSError, ValueError) as error:
        return str(error)
    return "ready" in told or str(told.get("unfit") or told.get("gone") or "the spare of a rank has ended")


def _order(connection: socket.socket, argv: list[str], environ: dict[str, str]) -> str | None:
    """Tell a spare to be the process with these arguments and variables. Return why it can't be, or None."""
    try:
        connection.settimeout(_ANSWER_S)
        connection.sendall(json.dumps({"argv": argv, "environ": environ}).encode() + b"\n")
        told = json.loads(connection.recv(_LONGEST_LINE_BYTES) or b"{}")
    except (OSError, ValueError) as error:
        return f"the one that was kept warm does not answer: {error}"
    return None if "yes" in told else str(told.get("no", "the one that was kept warm has ended"))
