"""Placement groups, which moto lacks: made, described and deleted as EC2 does."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class PlacementGroup:
    """One of a region.

    Args:
        name: unique in its region.
        strategy: such as ``cluster``.
        tags: of EC2's shape.
        instances: ids of all that were ever launched in it.
    """

    name: str
    strategy: str
    tags: Sequence[Mapping[str, str]]
    id: str = field(default_factory=lambda: f"pg-{secrets.token_hex(8)}")
    instances: list[str] = field(default_factory=list)


class PlacementGroups:
    """Those of all regions.

    Args:
        refuse: makes the error for a code and a message.
        is_alive: whether an instance (region, id) still runs.
    """

    def __init__(self, refuse: Callable[[str, str], Exception], is_alive: Callable[[str, str], bool]) -> None:
        self._refuse, self._is_alive = refuse, is_alive
        self.groups: dict[tuple[str, str], PlacementGroup] = {}

    def create(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        name = asked["GroupName"]
        if (region, name) in self.groups:
            raise self._refuse("InvalidPlacementGroup.Duplicate", f"The placement group '{name}' already exists.")
        tags = [
            tag
            for one in asked.get("TagSpecifications") or ()
            if one["ResourceType"] == "placement-group"
            for tag in one["Tags"]
        ]
        made = self.groups[region, name] = PlacementGroup(name, asked["Strategy"], tags)
        return {"PlacementGroup": _shown(made)}

    def describe(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        found = [one for (where, _), one in self.groups.items() if where == region]
        for one in asked.get("Filters") or ():
            key = one["Name"].removeprefix("tag:")
            found = [group for group in found if any(tag["Key"] == key and tag["Value"] in one["Values"] for tag in group.tags)]
        return {"PlacementGroups": [_shown(one) for one in found]}

    def delete(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        group = self.named(region, asked["GroupName"])
        if any(self._is_alive(region, one) for one in group.instances):
            raise self._refuse(
                "InvalidPlacementGroup.InUse", f"The placement group {group.name} is in use and may not be deleted."
            )
        del self.groups[region, group.name]
        return {}

    def named(self, region: str, name: str) -> PlacementGroup:
        """The group; an error of EC2's without one."""
        if (region, name) not in self.groups:
            raise self._refuse("InvalidPlacementGroup.Unknown", f"The Placement Group '{name}' is unknown.")
        return self.groups[region, name]


def _shown(group: PlacementGroup) -> dict[str, Any]:
    return {
        "GroupName": group.name,
        "GroupId": group.id,
        "State": "available",
        "Strategy": group.strategy,
        "Tags": list(group.tags),
    }
