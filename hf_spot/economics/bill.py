"""The bill of a run's machines, as `hf-spot provision` has written it into the journal. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hf_spot.policy.words import counted
from hf_spot.run.journal import Entry


@dataclass(frozen=True)
class Bill:
    """What the machines of a run have cost from their launch to their end, boot and shutdown included.

    Args:
        machines: the newest record of each, by its id.
    """

    machines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def after(self, entry: Entry) -> Bill:
        """Return the bill after one more entry of the journal."""
        one = entry.data.get("machine")
        if entry.kind != "machine" or not isinstance(one, dict) or not isinstance(one.get("instance_id"), str):
            return self
        if entry.data.get("event") == "started" and one["instance_id"] in self.machines:
            return self
        return replace(self, machines={**self.machines, one["instance_id"]: one})

    @property
    def ended(self) -> list[Mapping[str, Any]]:
        """Return the records of the machines that have ended."""
        return [one for one in self.machines.values() if one.get("ended")]

    @property
    def machines_usd(self) -> float:
        """Return what the machines that have ended have cost, in dollars, without their disks."""
        return sum(_dollars(one, "cost_usd") for one in self.ended)

    @property
    def disks_usd(self) -> float:
        """Return what their disks have cost, in dollars."""
        return sum(_dollars(one, "disk_usd") for one in self.ended)

    @property
    def bound(self) -> str:
        """Return ``at most``, ``at least`` or ``about`` if the end of a machine is not known exactly; otherwise nothing."""
        found = {str(one["cost_bound"]) for one in self.ended if one.get("cost_bound") and _dollars(one, "cost_usd")}
        return "about" if len(found) > 1 else next(iter(found), "")

    def to_data(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "machines": len(self.machines),
            "ended": len(self.ended),
            "machines_usd": self.machines_usd,
            "disks_usd": self.disks_usd,
            "bound": self.bound,
        }

    def lines(self) -> Iterator[str]:
        """Yield the bill as a sentence; nothing if no machine has ended."""
        if not self.ended:
            return
        free = sum(not _dollars(one, "cost_usd") for one in self.ended)
        bound = f"{self.bound} " if self.bound else ""
        words = f"Bill: {bound}${self.machines_usd:,.2f} for {counted(len(self.ended), 'machine')} from launch to end"
        words += f", {free} of them free" if free else ""
        words += f", and ${self.disks_usd:,.2f} for their disks" if self.disks_usd else ""
        left = len(self.machines) - len(self.ended)
        unended = f" {counted(left, 'machine')} {'has' if left == 1 else 'have'} not ended: hf-spot status." if left else ""
        yield f"{words}.{unended}"


def _dollars(one: Mapping[str, Any], key: str) -> float:
    usd = one.get(key)
    return float(usd) if isinstance(usd, (int, float)) and not isinstance(usd, bool) and math.isfinite(usd) else 0.0
