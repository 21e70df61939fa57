"""Output to a terminal that may go away: an ssh connection is lost, tmux is killed, a window is closed."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO


def outlive_terminal() -> None:
    """Have this process print into nothing once its terminal is gone; printing would raise OSError, in the middle of a step."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            lasts = not isinstance(stream, io.TextIOWrapper) or not stream.isatty()
        except ValueError:  # closed
            continue
        if not lasts:
            wrapped = _wrap(stream)
            setattr(sys, name, wrapped)
            setattr(sys, f"__{name}__", wrapped)


def _wrap(stream: TextIO) -> TextIO:
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Terminal(stream.fileno())),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=True,
    )


class _Terminal(io.RawIOBase):
    def __init__(self, number: int) -> None:
        self._number = number

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def write(self, data: object) -> int:
        try:
            return os.write(self._number, data)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._number)  # for what is not written by Python, and for children, too
        os.close(nothing)
        return os.write(self._number, data)  # type: ignore[arg-type]
