"""The slot for what draws a run in a notebook: that needs reports, which stand above this room, so the package fills it in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Display:
    """Turns a run into HTML by the function that was registered last."""

    def __init__(self) -> None:
        self._draw: Callable[[Any], str] | None = None

    def register(self, draw: Callable[[Any], str]) -> None:
        """Have ``draw`` make the HTML of every run from now on."""
        self._draw = draw

    def html_of(self, run: object) -> str | None:
        """Return the HTML of a run; None, by which Jupyter falls back on `repr`, if nothing is registered."""
        return None if self._draw is None else self._draw(run)


display = Display()
