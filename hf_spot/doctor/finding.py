"""Finding: the result of one check of `hf-spot doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """One line of output.

    Args:
        level: `OK`; `WARN` for a limitation, or if the check was not possible; `FAIL` for what does not work.
        check: name of the check, one or two words.
        text: the result.
        hint: the next command to type; empty if none is needed.
    """

    level: str
    check: str
    text: str
    hint: str = ""

    def __str__(self) -> str:
        line = f"{self.level:<4}  {self.check:<12}  {self.text}"
        return f"{line}\n      Try: {self.hint}" if self.hint else line


class Notice(NamedTuple):
    """The time between a preemption notice and the end of this machine.

    Args:
        seconds: None if unknown.
        by: source of this value.
    """

    seconds: float | None
    by: str
