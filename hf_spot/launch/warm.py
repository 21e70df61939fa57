"""Warm spares: the next launch's processes, started while this launch trains, so that a restart has nothing to import.

Two ways round the imports were tried: a process that has imported everything and is forked, and a spare that is started early.
A fork is cheaper, one import for all ranks, but what packages do when they are imported (threads, a device, locks) is copied in
whatever state it is in, and what a child must put right is a long list. A spare is the process that would be started anyway,
with its own command line and environment, so only time has passed in it; `hf_spot.training.warm` says how it waits.
"""

from __future__ import annotations

import contextlib
import json
import logging
import select
import signal
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import psutil

from hf_spot.free_memory import available_and_total_bytes
from hf_spot.launch.process import ProcessTree
from hf_spot.policy.warm import OFF, has_room, nice, wait_s
from hf_spot.runtime import WAITS_ON

log = logging.getLogger("hf_spot")

_LOOK_S = 1.0
_ANSWER_S = 5.0
_MOST_ENDS = 3
_LONGEST_LINE_BYTES = 2**16


class WarmSpares:
    """Keeps the processes of the next launch warm.

    Args:
        mode: the value of ``--warm-spares``.
        ranks: of this machine.
        clock: seconds, monotonic.
    """

    def __init__(self, mode: str, ranks: int, clock: Callable[[], float]) -> None:
        self._mode = mode
        self._ranks = ranks
        self._clock = clock
        self._tree: ProcessTree | None = None
        self._connection: socket.socket | None = None
        self._received = b""
        self._is_ready = False
        self._first_at: float | None = None  # when the launch under way was seen at its first step
        self._looked_at = clock()
        self._next: tuple[list[str], dict[str, str], tuple[signal.Signals, ...]] | None = None
        self._said: set[str] = set()
        self._ended = 0  # spares that have ended by themselves

    def processes(self) -> Collection[psutil.Process]:
        """Return the processes of the spares that wait."""
        return () if self._tree is None else self._tree.processes()

    def begin(self, argv: Sequence[str], environ: Mapping[str, str], signals: Sequence[signal.Signals]) -> None:
        """Note how the processes of the launch under way were started: those of the next one will be started alike.

        Args:
            argv: the command.
            environ: its environment.
            signals: blocked until the command unblocks them.
        """
        self._next = list(argv), dict(environ), tuple(signals)
        self._first_at = None

    def look(self, has_stepped: Callable[[], bool], *, is_idle: bool = False) -> None:
        """Start spares when it is time, and end them when memory is short. Call it all the time.

        Args:
            has_stepped: returns whether the launch under way has done a step.
            is_idle: whether this machine only waits for others.
        """
        now = self._clock()
        if self._mode == OFF or now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        self._first_at = now if self._first_at is None and has_stepped() else self._first_at
        if self._tree is not None:
            self._read(0.0)
            if self._tree is not None and not has_room(self._mode, self._ranks, *available_and_total_bytes(), are_there=True):
                self._say_once("memory is short: no Python is kept warm for a restart any longer")
                self._give_up()
        elif self._first_at is not None and now - self._first_at >= wait_s(self._mode, is_idle=is_idle):
            self._start()

    def take(self, argv: Sequence[str], environ: Mapping[str, str]) -> ProcessTree | None:
        """Return the spares, which now are the processes of a launch; None if there are none that can be.

        Args:
            argv: the command.
            environ: its environment.
        """
        if self._tree is None or self._connection is None:
            return None
        self._read(0.0)
        if self._tree is None or not self._is_ready:
            self.close()
            return None
        with contextlib.suppress(OSError):
            order = {"argv": list(argv), "environ": dict(environ)}
            self._connection.sendall(json.dumps(order).encode() + b"\n")
        answer = self._read(_ANSWER_S)
        tree = self._tree
        if tree is None or "yes" not in answer:
            log.info("a fresh Python starts, since %s", answer.get("no", "the one that was kept warm does not answer"))
            self.close()
            return None
        self._connection.close()
        self._tree = self._connection = None
        tree.begin(self.processes)
        return tree

    def close(self) -> None:
        """End the spares that wait."""
        tree, connection, self._tree, self._connection = self._tree, self._connection, None, None
        if connection is not None:
            connection.close()
        if tree is not None:
            tree.end()

    def _start(self) -> None:
        if self._next is None:
            return
        if not has_room(self._mode, self._ranks, *available_and_total_bytes()):
            self._say_once("there is too little memory to keep a Python warm for a restart (--warm-spares on does so anyway)")
            return
        argv, environ, signals = self._next
        ours, theirs = socket.socketpair()
        self._received, self._is_ready = b"", False
        try:
            environ = {**environ, WAITS_ON: f"{theirs.fileno()},{nice(self._mode)}"}
            self._tree = ProcessTree(argv, environ, signals, apart=True, pass_fds=[theirs.fileno()])
            self._connection = ours
        except OSError as error:
            ours.close()
            self._say_once(f"no Python can be kept warm for a restart: {error}")
            self._give_up()
        finally:
            theirs.close()

    def _read(self, timeout_s: float) -> dict[str, Any]:
        """Return what the spare has said; nothing if it has said nothing. If it has ended, forget it."""
        assert self._connection is not None
        until_s = self._clock() + timeout_s
        answer: dict[str, Any] = {}
        while select.select([self._connection], [], [], max(0.0, until_s - self._clock()))[0]:
            try:
                data = self._connection.recv(_LONGEST_LINE_BYTES)
            except OSError:
                data = b""
            *lines, self._received = (self._received + data).split(b"\n")
            for line in lines:
                answer |= json.loads(line)
            if "ready" in answer:
                self._is_ready = True
                log.debug("a Python is kept warm for a restart")
            if "unfit" in answer:
                self._say_once(f"no Python is kept warm for a restart: {answer['unfit']}")
                self._give_up()
            elif not data:
                self._ended += 1
                if self._ended < _MOST_ENDS:
                    self.close()
                else:
                    self._say_once(f"no Python is kept warm for a restart any longer: {self._ended} of them have ended")
                    self._give_up()
            if answer or not data:
                break
        return answer

    def _give_up(self) -> None:
        self._mode = OFF
        self.close()

    def _say_once(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            log.info("%s", what)
