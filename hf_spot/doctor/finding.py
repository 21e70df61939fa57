"""Finding: what one check of `hf-spot doctor` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """One line.

    Args:
        level: `OK`; `WARN` for what works and may disappoint, or could not be found out; `FAIL` for what does not work.
        check: what was looked at, in one or two words.
        text: what was found.
        hint: what to type next; empty where nothing is to be done.
    """

    level: str
    check: str
    text: str
    hint: str = ""

    def __str__(self) -> str:
        line = f"{self.level:<4}  {self.check:<12}  {self.text}"
        return f"{line}\n      Try: {self.hint}" if self.hint else line


class Notice(NamedTuple):
    """How long this machine lives after it was told that it has to go.

    Args:
        seconds: None when nobody knows.
        by: who says so.
    """

    seconds: float | None
    by: str
