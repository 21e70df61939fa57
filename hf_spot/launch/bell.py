"""A bell that one thread rings and another one waits for, together with other things that a system call can wait for."""

from __future__ import annotations

import contextlib
import socket


class Bell:
    """Can be read from, for ``select``, once it has been rung."""

    def __init__(self) -> None:
        self._rope, self._clapper = socket.socketpair()
        self._rope.setblocking(False)
        self._clapper.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._clapper.fileno()

    def ring(self) -> None:
        """Ring; once is enough, until `silence`."""
        with contextlib.suppress(OSError):  # it is full, or closed: nobody needs another ring
            self._rope.send(b"!")

    def silence(self) -> None:
        """Forget that it was rung."""
        with contextlib.suppress(BlockingIOError):
            while self._clapper.recv(4096):
                continue

    def close(self) -> None:
        """Close the descriptors."""
        self._rope.close()
        self._clapper.close()
