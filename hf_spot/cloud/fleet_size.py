"""How many machines train a job together, as the job file says it: ``machines: 3`` or ``machines: 2:8``. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from hf_spot.yaml_file import Invalid

CLUSTER, ZONE, REGION = "cluster", "zone", "region"
PLACEMENTS = (ZONE, CLUSTER, REGION)
_RANGE = re.compile(r"(\d+)\s*:\s*(\d+)")
_LIKE_THIS = "machines: 3, or machines: 2:8"
_COUNTED = re.compile(r"--(num[-_]machines|machine[-_]rank|main[-_]process[-_]ip|nnodes|node[-_]rank)\b")


@dataclass(frozen=True)
class FleetSize:
    """Between how many machines train together.

    Args:
        least: with fewer, none trains.
        most: more are never started.
    """

    least: int = 1
    most: int = 1

    @property
    def is_fleet(self) -> bool:
        """Return whether more than one machine may train."""
        return self.most > 1

    @property
    def option(self) -> str:
        """Return the value of ``--num_machines``: always a range, so that ``--num_processes`` means those of one machine."""
        return f"{self.least}:{self.most}"

    def __str__(self) -> str:
        return str(self.most) if self.least == self.most else self.option

    @classmethod
    def of(cls, value: Any, path: tuple[Any, ...] = ("machines",)) -> FleetSize:
        """Return the size for a value of the job file. Raises Invalid."""
        if isinstance(value, FleetSize):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            least = most = value
        elif isinstance(value, str) and (found := _RANGE.fullmatch(value.strip())):
            least, most = int(found[1]), int(found[2])
        else:
            hint = f"machines: {value.strip()}" if isinstance(value, str) and value.strip().isdecimal() else _LIKE_THIS
            raise Invalid(path, f"{value!r} is neither a number nor a range such as 2:8", hint=hint)
        if least < 1:
            raise Invalid(path, f"{value!r}: at least one machine trains", hint=_LIKE_THIS)
        if most < least:
            raise Invalid(path, f"{value!r}: the first number must not be above the second", hint=f"machines: {most}:{least}")
        return cls(least, most)


ONE = FleetSize()


def check_run(run: str, size: FleetSize) -> None:
    """Raise Invalid if the shell commands of a fleet's job count its machines themselves."""
    if size.is_fleet and (found := _COUNTED.search(run)):
        raise Invalid(
            ("run",),
            f"{found[0]}: the job file's `machines: {size}` says how many machines train, and they find each other in the run",
            hint=f"remove {found[0]}; --num_processes is the number of processes on each machine",
        )
