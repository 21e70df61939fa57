"""Three ways to order a machine.

`create_fleet` is the way that AWS recommends: one call, EC2 chooses the pool, and only the instance remains.
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
from hf_spot.errors import CloudError

FLEET_ROLE = "aws-ec2-spot-fleet-tagging-role"
_POLL_S = 5.0
_POLLS = 24  # a legacy request that is not fulfilled in two minutes is cancelled


@dataclass(frozen=True)
class Order:
    """An order for one machine from any of some pools of one region.

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

    @property
    def region(self) -> str:
        """Return the region of all its pools."""
        return self.pools[0].region


@dataclass(frozen=True)
class Outcome:
    """The result of an order.

    Args:
        instance_id: id of the machine; None if there is none.
        pool: pool of the machine.
        refusals: error code and message by (instance type, subnet) of the refused pools.
    """

    instance_id: str | None = None
    pool: Pool | None = None
    refusals: Mapping[tuple[str, str], tuple[str, str]] = field(default_factory=dict)


def create_fleet(cloud: Cloud, order: Order) -> Outcome:
    """Order one machine with ``CreateFleet`` of type ``instant``.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instant-fleet.html

    Raises:
        CloudError: the request itself failed; a refused pool is not an error but part of the outcome.
    """
    market = order.pools[0].market
    with _template(cloud, order) as template:
        capped = market == SPOT and order.max_price is not None
        price: dict[str, Any] = {"MaxPrice": f"{order.max_price:.4f}"} if capped else {}
        overrides = [{"InstanceType": pool.instance_type, "SubnetId": pool.subnet, **price} for pool in order.pools]
        options: dict[str, Any] = (
            {"OnDemandOptions": {"AllocationStrategy": "lowest-price"}}
            if market == ON_DEMAND
            else {"SpotOptions": {"AllocationStrategy": order.strategy, "InstanceInterruptionBehavior": "terminate"}}
        )
        answer = cloud.call(
            "ec2",
            order.region,
            "create_fleet",
            Type="instant",
            ClientToken=order.token,
            LaunchTemplateConfigs=[{"LaunchTemplateSpecification": template, "Overrides": overrides}],
            TargetCapacitySpecification={"TotalTargetCapacity": 1, "DefaultTargetCapacityType": market},
            TagSpecifications=[{"ResourceType": "fleet", "Tags": _tags(order.tags)}],
            **options,
        )
    refusals = {}
    for error in answer.get("Errors", ()):
        tried = error.get("LaunchTemplateAndOverrides", {}).get("Overrides", {})
        key = tried.get("InstanceType", ""), tried.get("SubnetId", "")
        refusals[key] = error.get("ErrorCode", ""), error.get("ErrorMessage", "")
    for started in answer.get("Instances", ()):
        got = started.get("LaunchTemplateAndOverrides", {}).get("Overrides", {})
        for instance_id in started["InstanceIds"]:
            return Outcome(instance_id, _pool(order.pools, started.get("InstanceType"), got.get("SubnetId")), refusals)
    return Outcome(refusals=refusals)


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
            return Outcome(instance_id, pool, refusals)
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
    return Outcome(instance_id, _pool(order.pools, found["InstanceType"], found.get("SubnetId")))


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
    name = f"hf-spot-{order.token}"
    try:
        made = cloud.call(
            "ec2",
            order.region,
            "create_launch_template",
            LaunchTemplateName=name,
            ClientToken=order.token,
            LaunchTemplateData=_launch_data(order),
            TagSpecifications=[{"ResourceType": "launch-template", "Tags": _tags(order.tags)}],
        )["LaunchTemplate"]["LaunchTemplateId"]
    except CloudError as error:
        # Left over from a killed call. The same token, and so the same fleet, needs the same template.
        if error.code != "InvalidLaunchTemplateName.AlreadyExistsException":
            raise
        found = cloud.call("ec2", order.region, "describe_launch_templates", LaunchTemplateNames=[name])
        made = found["LaunchTemplates"][0]["LaunchTemplateId"]
    try:
        yield {"LaunchTemplateId": made, "Version": "1"}
    finally:
        cloud.remove_templates(order.region, order.tags[RUN_TAG])


def _launch_data(order: Order) -> dict[str, Any]:
    disk = {"VolumeSize": order.disk_gb, "VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}
    data: dict[str, Any] = {
        "ImageId": order.image.id,
        "UserData": base64.b64encode(order.user_data.encode()).decode(),
        "BlockDeviceMappings": [{"DeviceName": order.image.root_device, "Ebs": disk}],
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2, "HttpEndpoint": "enabled"},
        "InstanceInitiatedShutdownBehavior": "terminate",
        "TagSpecifications": [{"ResourceType": kind, "Tags": _tags(order.tags)} for kind in ("instance", "volume")],
    }
    if order.site.security_groups:
        data["SecurityGroupIds"] = [*order.site.security_groups]
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
