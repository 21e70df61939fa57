"""Output to a terminal: colours, and what to do once it is gone (a lost ssh connection, a killed tmux, a closed window)."""

from __future__ import annotations

import errno
import io
import os
import sys
import unicodedata
from collections.abc import Mapping
from enum import Enum
from typing import TextIO


class Style(Enum):
    """How a text looks in a terminal; the values are the parameters of ANSI's sequence "select graphic rendition"."""

    HEADING = "1"
    OK = "32"
    WARN = "33"
    FAIL = "31"
    ALERT = "1;33"
    FAINT = "2"


def paint(text: str, style: Style, stream: TextIO, environ: Mapping[str, str] = os.environ) -> str:
    """Return a text with its colour, or as it is where the stream shows none.

    Args:
        text: to print.
        style: how it should look.
        stream: where it will be printed.
        environ: the environment: ``NO_COLOR`` and ``FORCE_COLOR`` decide, and otherwise whether the stream is a terminal.
    """
    return f"\033[{style.value}m{text}\033[0m" if shows_colours(stream, environ) else text


def shows_colours(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether colours should be printed to a stream."""
    if environ.get("NO_COLOR"):
        return False
    if environ.get("FORCE_COLOR", "0") != "0":
        return True
    try:
        return environ.get("TERM") != "dumb" and stream.isatty()
    except ValueError:  # closed
        return False


def columns_of(text: str) -> int:
    """Return how many columns of a terminal a text takes: letters of East Asia take two, accents on a letter none."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.category(letter) in ("Mn", "Me") for letter in text)


def padded(text: str, width: int, *, is_right: bool) -> str:
    """Return a text filled with blanks to a width in columns, at its left if it is aligned right."""
    blanks = " " * (width - columns_of(text))
    return blanks + text if is_right else text + blanks


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
