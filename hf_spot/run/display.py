"""The slot for what draws a run in a notebook: that needs reports, which stand above this room, so the package fills it in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Display:
    """Turns a run into HTML and into text by the functions that were registered last."""

    def __init__(self) -> None:
        self._draw: Callable[[Any], str] | None = None
        self._write: Callable[[Any], str] | None = None

    def register(self, draw: Callable[[Any], str], write: Callable[[Any], str]) -> None:
        """Have ``draw`` make the HTML, and ``write`` the text, of every run from now on."""
        self._draw = draw
        self._write = write

    def text_of(self, run: object) -> str | None:
        """Return the text of a run; None if nothing is registered."""
        return None if self._write is None else self._write(run)

    def html_of(self, run: object) -> str | None:
        """Return the HTML of a run; None, by which Jupyter falls back on `repr`, if nothing is registered."""
        return None if self._draw is None else self._draw(run)


display = Display()
