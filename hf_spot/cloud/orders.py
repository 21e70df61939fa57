"""Three ways to order machines.

`create_fleet` is the way that AWS recommends: one call, EC2 chooses the pools, and only the instances remain. The others order
one machine.
`request_spot_instances` and `request_spot_fleet` are for accounts that must use them; AWS calls both legacy and discourages
them.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_spot.cloud.ec2 import RUN_TAG, Cloud, Image
from hf_spot.cloud.job import ON_DEMAND, SPOT, Site
from hf_spot.cloud.ladder import Pool
from hf_spot.cloud.network import Network
from hf_spot.errors import CloudError

FLEET_ROLE = "aws-ec2-spot-fleet-tagging-role"
_POLL_S = 5.0
_POLLS = 24  # a legacy request that is not fulfilled in two minutes is cancelled


@dataclass(frozen=True)
class Order:
    """An order for machines from any of some pools of one region.

    Args:
        token: the same for a repeated call, so that it does not start a second machine.
        pools: pools of one region and one market, the preferred one first.
        image: the image to start from.
        site: key pair, security groups.
        user_data: the script that the machine runs.
        tags: tags for the instance, its disk, and all other resources.
        instance_profile: name or ARN, or None.
        disk_gb: size of the encrypted root disk.
        strategy: how EC2 chooses among the pools, as CreateFleet spells it.
        max_price: dollars per hour, or None.
        count: how many machines; fewer may come.
        at_least: none at all if fewer than these can be had, in one zone.
        network: how several machines are connected; None for a single one.
    """

    token: str
    pools: Sequence[Pool]
    image: Image
    site: Site
    user_data: str
    tags: Mapping[str, str]
    instance_profile: str | None
    disk_gb: int
    strategy: str
    max_price: float | None = None
    count: int = 1
    at_least: int = 1
    network: Network | None = None

    @property
    def region(self) -> str:
        """Return the region of all its pools."""
        return self.pools[0].region


@dataclass(frozen=True)
class Outcome:
    """The result of an order.

    Args:
        machines: id and pool of each machine.
        refusals: error code and message by (instance type, subnet) of the refused pools.
    """

    machines: Sequence[tuple[str, Pool]] = ()
    refusals: Mapping[tuple[str, str], tuple[str, str]] = field(default_factory=dict)


def create_fleet(cloud: Cloud, order: Order) -> Outcome:
    """Order machines with ``CreateFleet`` of type ``instant``.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instant-fleet.html

    Raises:
        CloudError: the request itself failed; a refused pool is not an error but part of the outcome.
    """
    market = order.pools[0].market
    together: dict[str, Any] = (
        {"MinTargetCapacity": order.at_least, "SingleAvailabilityZone": True} if order.at_least > 1 else {}
    )
    with _templates(cloud, order) as templates:
        capped = market == SPOT and order.max_price is not None
        price: dict[str, Any] = {"MaxPrice": f"{order.max_price:.4f}"} if capped else {}
        configs = [
            {"LaunchTemplateSpecification": template, "Overrides": [{**_override(order, pool), **price} for pool in pools]}
            for template, pools in templates
        ]
        options: dict[str, Any] = (
            {"OnDemandOptions": {"AllocationStrategy": "lowest-price", **together}}
            if market == ON_DEMAND
            else {
                "SpotOptions": {
                    "AllocationStrategy": order.strategy,
                    "InstanceInterruptionBehavior": "terminate",
                    **together,
                }
            }
        )
        answer = cloud.call(
            "ec2",
            order.region,
            "create_fleet",
            Type="instant",
            ClientToken=order.token,
            LaunchTemplateConfigs=configs,
            TargetCapacitySpecification={"TotalTargetCapacity": order.count, "DefaultTargetCapacityType": market},
            TagSpecifications=[{"ResourceType": "fleet", "Tags": _tags(order.tags)}],
            **options,
        )
    subnets = {template["LaunchTemplateId"]: pools[0].subnet for template, pools in templates}

    def place(told: Mapping[str, Any]) -> tuple[str, str]:
        both = told.get("LaunchTemplateAndOverrides", {})
        override, template = both.get("Overrides", {}), both.get("LaunchTemplateSpecification", {})
        return override.get("InstanceType", ""), override.get("SubnetId") or subnets.get(template.get("LaunchTemplateId"), "")

    refusals = {place(one): (one.get("ErrorCode", ""), one.get("ErrorMessage", "")) for one in answer.get("Errors", ())}
    machines = [
        (str(instance_id), _pool(order.pools, one.get("InstanceType"), place(one)[1]))
        for one in answer.get("Instances", ())
        for instance_id in one["InstanceIds"]
    ]
    return Outcome(machines, refusals)


def request_spot_instances(cloud: Cloud, order: Order, *, sleep: Callable[[float], object]) -> Outcome:
    """Order one machine with ``RequestSpotInstances``, pool after pool. AWS calls this API legacy and discourages it.

    It supports neither tags of an instance nor its metadata options: both are set as soon as the instance exists. A request
    that is not fulfilled in two minutes is cancelled, and never stays in ``pending-evaluation``.

    Raises:
        CloudError: the request itself failed, or an instance could not be secured and was terminated.
    """
    refusals: dict[tuple[str, str], tuple[str, str]] = {}
    for place, pool in enumerate(order.pools):
        price = {} if order.max_price is None else {"SpotPrice": f"{order.max_price:.4f}"}
        data = _launch_data(order)
        for unknown in ("MetadataOptions", "TagSpecifications", "InstanceInitiatedShutdownBehavior"):
            data.pop(unknown, None)
        answer = cloud.call(
            "ec2",
            pool.region,
            "request_spot_instances",
            ClientToken=f"{order.token[:60]}-{place}",
            InstanceCount=1,
            Type="one-time",
            LaunchSpecification={**data, "InstanceType": pool.instance_type, "SubnetId": pool.subnet},
            TagSpecifications=[{"ResourceType": "spot-instances-request", "Tags": _tags(order.tags)}],
            **price,
        )
        request = answer["SpotInstanceRequests"][0]["SpotInstanceRequestId"]
        ids: dict[str, Any] = {"SpotInstanceRequestIds": [request]}

        def look(region: str = pool.region, ids: dict[str, Any] = ids) -> tuple[str | None, str, str]:
            found = cloud.call("ec2", region, "describe_spot_instance_requests", **ids)["SpotInstanceRequests"][0]
            status = found.get("Status", {})
            return found.get("InstanceId"), status.get("Code", ""), status.get("Message", "")

        instance_id, code, message = _poll(look, sleep)
        if instance_id is None:
            cloud.call("ec2", pool.region, "cancel_spot_instance_requests", **ids)
            instance_id, *_ = look()  # between the last look and the cancellation it may have been fulfilled
        if instance_id is not None:
            _secure(cloud, pool.region, instance_id, order)
            return Outcome([(instance_id, pool)], refusals)
        refusals[pool.instance_type, pool.subnet] = code, message
    return Outcome(refusals=refusals)


def request_spot_fleet(cloud: Cloud, order: Order, *, sleep: Callable[[float], object]) -> Outcome:
    """Order one machine with ``RequestSpotFleet``, with ``capacityOptimized`` or ``priceCapacityOptimized``.

    AWS calls this API legacy and discourages it. It needs the role `FLEET_ROLE` in the account. The fleet is cancelled as
    soon as it has its machine, so that it starts no other.

    Raises:
        CloudError: the request itself failed.
    """
    region = order.region
    words = order.strategy.split("-")
    with _template(cloud, order) as template:
        overrides = [{"InstanceType": pool.instance_type, "SubnetId": pool.subnet} for pool in order.pools]
        price = {} if order.max_price is None else {"SpotPrice": f"{order.max_price:.4f}"}
        answer = cloud.call(
            "ec2",
            region,
            "request_spot_fleet",
            SpotFleetRequestConfig={
                "ClientToken": order.token,
                "IamFleetRole": f"arn:aws:iam::{cloud.account()}:role/{FLEET_ROLE}",
                "AllocationStrategy": words[0] + "".join(word.capitalize() for word in words[1:]),
                "TargetCapacity": 1,
                "Type": "request",
                "LaunchTemplateConfigs": [{"LaunchTemplateSpecification": template, "Overrides": overrides}],
                "TagSpecifications": [{"ResourceType": "spot-fleet-request", "Tags": _tags(order.tags)}],
                **price,
            },
        )
        fleet = answer["SpotFleetRequestId"]

        def look() -> tuple[str | None, str, str]:
            found = cloud.call("ec2", region, "describe_spot_fleet_instances", SpotFleetRequestId=fleet)["ActiveInstances"]
            return (found[0]["InstanceId"] if found else None), "", ""

        try:
            instance_id = _poll(look, sleep)[0]
        finally:
            cancelled: dict[str, Any] = {"SpotFleetRequestIds": [fleet], "TerminateInstances": False}
            cloud.call("ec2", region, "cancel_spot_fleet_requests", **cancelled)
        instance_id = instance_id or look()[0]
    if instance_id is None:
        return Outcome(refusals={(pool.instance_type, pool.subnet): ("UnfulfillableCapacity", "") for pool in order.pools})
    found = cloud.call("ec2", region, "describe_instances", InstanceIds=[instance_id])["Reservations"][0]["Instances"][0]
    return Outcome([(instance_id, _pool(order.pools, found["InstanceType"], found.get("SubnetId")))])


def _poll(look: Callable[[], tuple[str | None, str, str]], sleep: Callable[[float], object]) -> tuple[str | None, str, str]:
    for _ in range(_POLLS):
        found = look()
        if found[0] is not None or found[1] not in ("", "pending-evaluation", "pending-fulfillment", "fulfilled"):
            return found
        sleep(_POLL_S)
    return look()


def _secure(cloud: Cloud, region: str, instance_id: str, order: Order) -> None:
    """Set what a legacy request does not support. Terminate the instance on failure: without tags it could not be found."""
    options = {"HttpTokens": "required", "HttpPutResponseHopLimit": 2, "HttpEndpoint": "enabled"}
    try:
        cloud.call("ec2", region, "create_tags", Resources=[instance_id], Tags=_tags(order.tags))
        cloud.call("ec2", region, "modify_instance_metadata_options", InstanceId=instance_id, **options)
        gone = {"InstanceInitiatedShutdownBehavior": {"Value": "terminate"}}
        cloud.call("ec2", region, "modify_instance_attribute", InstanceId=instance_id, **gone)
    except BaseException:
        cloud.terminate(region, [instance_id])
        raise


@contextlib.contextmanager
def _template(cloud: Cloud, order: Order) -> Iterator[dict[str, str]]:
    """Create a launch template for one order, and remove it afterwards."""
    with _templates(cloud, order) as templates:
        yield templates[0][0]


@contextlib.contextmanager
def _templates(cloud: Cloud, order: Order) -> Iterator[Sequence[tuple[dict[str, str], Sequence[Pool]]]]:
    """Create the launch templates for one order, with the pools of each, and remove them afterwards.

    EC2 takes the network interfaces of a machine, and with them its subnet, from its template alone.
    """
    alike: dict[tuple[int, str], list[Pool]] = {}
    for pool in order.pools:
        cards = _cards(order, pool)
        alike.setdefault((cards, pool.subnet if cards else ""), []).append(pool)
    try:
        made = []
        for place, ((cards, subnet), pools) in enumerate(alike.items()):
            name = f"hf-spot-{order.token}{f'-{place}' if place else ''}"
            token = f"{order.token}{f'-{place}' if place else ''}"
            made.append((_make_template(cloud, order, name, token, _launch_data(order, cards, subnet)), pools))
        yield made
    finally:
        cloud.remove_templates(order.region, order.tags[RUN_TAG])


def _make_template(cloud: Cloud, order: Order, name: str, token: str, data: Mapping[str, Any]) -> dict[str, str]:
    try:
        made = cloud.call(
            "ec2",
            order.region,
            "create_launch_template",
            LaunchTemplateName=name,
            ClientToken=token,
            LaunchTemplateData=data,
            TagSpecifications=[{"ResourceType": "launch-template", "Tags": _tags(order.tags)}],
        )["LaunchTemplate"]["LaunchTemplateId"]
    except CloudError as error:
        # Left over from a killed call. The same token, and so the same fleet, needs the same template.
        if error.code != "InvalidLaunchTemplateName.AlreadyExistsException":
            raise
        found = cloud.call("ec2", order.region, "describe_launch_templates", LaunchTemplateNames=[name])
        made = found["LaunchTemplates"][0]["LaunchTemplateId"]
    return {"LaunchTemplateId": made, "Version": "1"}


def _cards(order: Order, pool: Pool) -> int:
    return 0 if order.network is None else order.network.cards.get((pool.instance_type, pool.subnet), 0)


def _override(order: Order, pool: Pool) -> dict[str, str]:
    kind = {"InstanceType": pool.instance_type}
    return kind if _cards(order, pool) else {**kind, "SubnetId": pool.subnet}


def _launch_data(order: Order, cards: int = 0, subnet: str = "") -> dict[str, Any]:
    disk = {"VolumeSize": order.disk_gb, "VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}
    tagged = ("instance", "volume", "network-interface") if cards else ("instance", "volume")
    data: dict[str, Any] = {
        "ImageId": order.image.id,
        "UserData": base64.b64encode(order.user_data.encode()).decode(),
        "BlockDeviceMappings": [{"DeviceName": order.image.root_device, "Ebs": disk}],
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2, "HttpEndpoint": "enabled"},
        "InstanceInitiatedShutdownBehavior": "terminate",
        "TagSpecifications": [{"ResourceType": kind, "Tags": _tags(order.tags)} for kind in tagged],
    }
    groups = [*order.site.security_groups, *([order.network.group] if order.network else [])]
    if cards:
        data["NetworkInterfaces"] = [
            {
                "DeviceIndex": int(card > 0),
                "NetworkCardIndex": card,
                "InterfaceType": "efa",
                "SubnetId": subnet,
                "Groups": groups,
                "DeleteOnTermination": True,
            }
            for card in range(cards)
        ]
    elif groups:
        data["SecurityGroupIds"] = groups
    if order.network and order.network.placement_group:
        data["Placement"] = {"GroupName": order.network.placement_group}
    if order.site.key_name:
        data["KeyName"] = order.site.key_name
    if order.instance_profile:
        data["IamInstanceProfile"] = {"Arn" if order.instance_profile.startswith("arn:") else "Name": order.instance_profile}
    return data


def _pool(pools: Sequence[Pool], instance_type: str | None, subnet: str | None) -> Pool:
    alike = [pool for pool in pools if instance_type in (None, pool.instance_type)] or [*pools]
    return next((pool for pool in alike if pool.subnet == subnet), alike[0])


def _tags(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in tags.items()]
