"""The network of a job's machines: a security group in which they, and nobody else, reach each other, and placement groups.

Both cost nothing, have the run's tags, are found again by these, and are removed when no machine needs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_spot.cloud.ec2 import RUN_TAG, Cloud, Kind, Subnet, tag_value, token_for
from hf_spot.errors import CloudError

_EXISTS = ("InvalidGroup.Duplicate", "InvalidPlacementGroup.Duplicate", "InvalidPermission.Duplicate")
_IN_USE = ("DependencyViolation", "InvalidPlacementGroup.InUse", "InvalidGroup.InUse")
_GONE = ("InvalidGroup.NotFound", "InvalidPlacementGroup.Unknown")


@dataclass(frozen=True)
class Network:
    """How a machine of several is connected.

    Args:
        group: id of the security group of the job's machines.
        placement_group: name of the cluster placement group; None for none.
        cards: by (instance type, subnet), how many network interfaces are EFAs; 0 for an ordinary interface.
    """

    group: str
    placement_group: str | None
    cards: Mapping[tuple[str, str], int]


def efa_interfaces(kind: Kind, subnet: Subnet) -> int:
    """Return how many EFAs a machine gets: one for each of its network cards, but a single one in a public subnet, because EC2
    gives a public address, without which nothing outside is reached there, only to machines with one interface."""
    return min(kind.efa_cards, 1) if subnet.is_public else kind.efa_cards


class Networks:
    """Makes and removes the groups of a run.

    Args:
        cloud: the account's EC2.
        run: URL of the run.
        tags: of everything that is made.
    """

    def __init__(self, cloud: Cloud, run: str, tags: Mapping[str, str]) -> None:
        self._cloud = cloud
        self._run = run
        self._tags = {**tags, RUN_TAG: tag_value(run)}

    def security_group(self, region: str, vpc: str) -> str:
        """Return the id of the group whose members reach each other, made if there is none. Raises CloudError.

        An EFA needs rules for the group itself in both directions; what is open to the outside is what EC2 gives each group:
        out, not in.
        """
        found = self._security_groups(region, vpc)
        if not found:
            try:
                made = self._call(
                    region,
                    "create_security_group",
                    GroupName=self._name(vpc),
                    Description="machines that train together, by hf-spot provision",
                    VpcId=vpc,
                    TagSpecifications=self._tagged("security-group"),
                )
                found = [{"GroupId": made["GroupId"], "IpPermissions": [], "IpPermissionsEgress": []}]
            except CloudError as error:
                if error.code not in _EXISTS:
                    raise
                found = self._security_groups(region, vpc)
        group = found[0]
        rule = [{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group["GroupId"]}]}]
        for operation, key in (
            ("authorize_security_group_ingress", "IpPermissions"),
            ("authorize_security_group_egress", "IpPermissionsEgress"),
        ):
            if not any(_is_of(one, group["GroupId"]) for one in group.get(key, ())):
                try:
                    self._call(region, operation, GroupId=group["GroupId"], IpPermissions=rule)
                except CloudError as error:
                    if error.code not in _EXISTS:
                        raise
        return str(group["GroupId"])

    def placement_group(self, region: str, zone: str) -> str:
        """Return the name of the cluster placement group of a zone, made if there is none. Raises CloudError."""
        name = self._name(zone)
        try:
            self._call(
                region,
                "create_placement_group",
                GroupName=name,
                Strategy="cluster",
                TagSpecifications=self._tagged("placement-group"),
            )
        except CloudError as error:
            if error.code not in _EXISTS:
                raise
        return name

    def remove(self, regions: Sequence[str]) -> list[str]:
        """Remove all groups of the run in these regions. Return those that machines still use; raises CloudError."""
        left = []
        for region in regions:
            for group in self._security_groups(region):
                left += self._drop(region, "delete_security_group", str(group["GroupId"]), GroupId=group["GroupId"])
            filters = {"Filters": [{"Name": f"tag:{RUN_TAG}", "Values": [self._tags[RUN_TAG]]}]}
            for group in self._call(region, "describe_placement_groups", **filters)["PlacementGroups"]:
                left += self._drop(region, "delete_placement_group", str(group["GroupName"]), GroupName=group["GroupName"])
        return left

    def _drop(self, region: str, operation: str, name: str, **which: str) -> list[str]:
        try:
            self._call(region, operation, **which)
        except CloudError as error:
            if error.code in _IN_USE:
                return [name]
            if error.code not in _GONE:
                raise
        return []

    def _security_groups(self, region: str, vpc: str = "") -> list[dict[str, Any]]:
        filters = [{"Name": f"tag:{RUN_TAG}", "Values": [self._tags[RUN_TAG]]}]
        filters += [{"Name": "vpc-id", "Values": [vpc]}] if vpc else []
        return [*self._cloud.pages("ec2", region, "describe_security_groups", "SecurityGroups", Filters=filters)]

    def _call(self, region: str, operation: str, **arguments: Any) -> Any:
        return self._cloud.call("ec2", region, operation, **arguments)

    def _tagged(self, kind: str) -> list[dict[str, Any]]:
        return [{"ResourceType": kind, "Tags": [{"Key": key, "Value": value} for key, value in self._tags.items()]}]

    def _name(self, where: str) -> str:
        return f"hf-spot-{token_for(self._run)[:12]}-{where}"


def _is_of(rule: Mapping[str, Any], group: str) -> bool:
    return rule.get("IpProtocol") == "-1" and any(one.get("GroupId") == group for one in rule.get("UserIdGroupPairs", ()))
