"""What is asked of EC2 and its neighbours (SSM for images, Pricing, STS), and nothing that is decided."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, TypeVar

import boto3
from botocore import exceptions as aws
from botocore.config import Config

from hf_spot.aws_errors import code_of, message_of
from hf_spot.cloud.ec2_errors import LATER, explain
from hf_spot.cloud.job import ON_DEMAND, SPOT
from hf_spot.cloud.ladder import Price
from hf_spot.errors import CloudError, ConfigError

RUN_TAG, RUNG_TAG, WALK_TAG, STOP_TAG = "hf-spot:run", "hf-spot:rung", "hf-spot:walk", "hf-spot:stop"
LIVE = ("pending", "running", "stopping", "shutting-down")
SPOT_SOURCE = "EC2 DescribeSpotPriceHistory"
ON_DEMAND_SOURCE = "AWS Price List GetProducts"
_PRICING_REGION = "us-east-1"  # the API stands in three regions only, and speaks of all
_EVERYBODY = ("0.0.0.0/0", "::/0")
_MOST_THREADS = 8
_PREFIXES = {"service-quotas": "servicequotas"}  # what IAM calls a service that boto3 calls otherwise

T = TypeVar("T")


@dataclass(frozen=True)
class Image:
    """An AMI: its id, and the device that its root disk is."""

    id: str
    root_device: str


@dataclass(frozen=True)
class Subnet:
    """A subnet, its zone, and the network that it belongs to."""

    id: str
    zone: str
    vpc: str


@dataclass(frozen=True)
class Instance:
    """An instance of a run, as EC2 describes it.

    Args:
        id: its id.
        region: its name.
        zone: its availability zone.
        instance_type: such as ``p4d.24xlarge``.
        market: ``spot`` or ``on-demand``.
        state: ``pending``, ``running``, ``shutting-down``, ``terminated``, ``stopping`` or ``stopped``.
        began: when it was launched.
        ended: when it ended, where EC2 says it.
        reason: EC2's code for why it ended; empty while it lives.
        tags: all of them.
    """

    id: str
    region: str
    zone: str
    instance_type: str
    market: str
    state: str
    began: datetime
    ended: datetime | None = None
    reason: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


class Cloud:
    """The account's EC2, in all regions. Clients are made when they are first used; safe to use from several threads.

    Args:
        session: a boto3 session; default: one with the usual settings of AWS.

    Every method raises CloudError, whose ``code`` is AWS's.
    """

    def __init__(self, session: Any = None) -> None:
        with _explained("", "AWS", ""):
            self._session: Any = session or boto3.Session()
        self._clients: dict[tuple[str, str | None], Any] = {}
        self._on_demand: dict[tuple[str, str], Price | None] = {}

    def client(self, service: str, region: str | None = None) -> Any:
        """A boto3 client; without a region, of the one that is set."""
        key = service, region
        if key not in self._clients:
            config = Config(
                retries={"mode": "standard", "total_max_attempts": 4},
                connect_timeout=10,
                read_timeout=60,
                user_agent_extra="hf_spot",
            )
            with _explained("", service, region or ""):
                self._clients[key] = self._session.client(service, region_name=region, config=config)
        return self._clients[key]

    def call(self, service: str, region: str | None, operation: str, **arguments: Any) -> Any:
        """One request, with the errors explained."""
        client = self.client(service, region)
        with _explained(operation, service, client.meta.region_name):
            return getattr(client, operation)(**arguments)

    def pages(self, service: str, region: str | None, operation: str, key: str, **arguments: Any) -> Iterator[Any]:
        """Everything under ``key`` in all pages of an answer."""
        client = self.client(service, region)
        with _explained(operation, service, client.meta.region_name):
            for page in client.get_paginator(operation).paginate(**arguments):
                yield from page.get(key, ())

    def each(self, regions: Sequence[str], ask: Callable[[str], T], *, services: Sequence[str] = ("ec2",)) -> list[T]:
        """Asks several regions at the same time; the answers in their order.

        Args:
            regions: names.
            ask: is called with each of them, from several threads.
            services: that it asks.
        """
        for service in services:  # making a client is not safe from several threads; using one is
            for region in (_PRICING_REGION,) if service == "pricing" else regions:
                self.client(service, region)
        with ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="hf_spot-ec2") as pool:
            return list(pool.map(ask, regions))

    # -- what there is ------------------------------------------------------------------------------------------------

    def regions(self, near: str | None = None) -> list[str]:
        """The names of the regions that the account can use.

        Args:
            near: a region that is asked; default: the one that is set.
        """
        found = self.call("ec2", near, "describe_regions", AllRegions=False)["Regions"]
        return sorted(region["RegionName"] for region in found)

    def check_regions(self, wanted: Iterable[str], known: Sequence[str]) -> None:
        """Raises ConfigError for a region that the account can't use."""
        for region in wanted:
            if region not in known:
                near = difflib.get_close_matches(region, known, 1)
                raise ConfigError(
                    f"{region!r} is no region that this account can use",
                    hint=f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}",
                )

    def image(self, region: str, image_id: str) -> Image:
        """The AMI behind an id or ``resolve:ssm:PARAMETER``."""
        if image_id.startswith("resolve:ssm:"):
            name = image_id.removeprefix("resolve:ssm:")
            image_id = self.call("ssm", region, "get_parameter", Name=name)["Parameter"]["Value"]
        found = self.call("ec2", region, "describe_images", ImageIds=[image_id])["Images"]
        if not found:
            raise explain("InvalidAMIID.NotFound", doing=f"DescribeImages in {region}", image=image_id, region=region)
        return Image(image_id, found[0]["RootDeviceName"])

    def subnets(self, region: str, ids: Sequence[str]) -> list[Subnet]:
        """Subnets by id, or without ids the default subnet of each zone."""
        asked: dict[str, Any] = {"SubnetIds": [*ids]} if ids else {"Filters": [_filter("default-for-az", "true")]}
        found = list(self.pages("ec2", region, "describe_subnets", "Subnets", **asked))
        if not found:
            raise CloudError(
                f"{region} has no default subnet", hint=f"subnets: {{{region}: [subnet-…]}}, or aws ec2 create-default-vpc"
            )
        return [Subnet(one["SubnetId"], one["AvailabilityZone"], one["VpcId"]) for one in found]

    def check_groups(self, region: str, ids: Sequence[str], vpc: str) -> None:
        """Raises ConfigError when a security group (or, without ids, the network's default one) lets the whole world in."""
        asked: dict[str, Any] = (
            {"GroupIds": [*ids]} if ids else {"Filters": [_filter("vpc-id", vpc), _filter("group-name", "default")]}
        )
        for group in self.pages("ec2", region, "describe_security_groups", "SecurityGroups", **asked):
            for rule in group["IpPermissions"]:
                ranges = [one["CidrIp"] for one in rule.get("IpRanges", ())] + [
                    one["CidrIpv6"] for one in rule.get("Ipv6Ranges", ())
                ]
                if world := next((one for one in ranges if one in _EVERYBODY), None):
                    port = rule.get("FromPort", "any")
                    raise ConfigError(
                        f"security_groups: {group['GroupId']} in {region} lets the whole internet in (port {port}, {world}); "
                        "a training needs no way in",
                        hint=f"aws ec2 revoke-security-group-ingress --region {region} --group-id {group['GroupId']} …, "
                        "or another group",
                    )

    def check_key(self, region: str, name: str) -> None:
        """Raises CloudError when the key pair does not exist."""
        self.call("ec2", region, "describe_key_pairs", KeyNames=[name])

    def offered(self, region: str, types: Sequence[str]) -> set[tuple[str, str]]:
        """Which instance types which zones have at all, as (type, zone)."""
        asked = {"LocationType": "availability-zone", "Filters": [_filter("instance-type", *types)]}
        found = self.pages("ec2", region, "describe_instance_type_offerings", "InstanceTypeOfferings", **asked)
        return {(one["InstanceType"], one["Location"]) for one in found}

    def vcpus(self, region: str, types: Sequence[str]) -> dict[str, int]:
        """vCPUs by instance type, of those that the region has."""
        asked = {"Filters": [_filter("instance-type", *types)]}
        found = self.pages("ec2", region, "describe_instance_types", "InstanceTypes", **asked)
        return {one["InstanceType"]: one["VCpuInfo"]["DefaultVCpus"] for one in found}

    # -- what it costs ------------------------------------------------------------------------------------------------

    def spot_prices(
        self, region: str, types: Sequence[str], since: datetime, until: datetime
    ) -> dict[tuple[str, str], list[Price]]:
        """The spot price of Linux, oldest first, by (type, zone); the first is the one that held at ``since``.

        A pool without any price has no capacity there at all.
        """
        found: dict[tuple[str, str], list[Price]] = {}
        asked: dict[str, Any] = {"InstanceTypes": [*types], "ProductDescriptions": ["Linux/UNIX"]}
        asked |= {"StartTime": since, "EndTime": until}
        for one in self.pages("ec2", region, "describe_spot_price_history", "SpotPriceHistory", **asked):
            price = Price(float(one["SpotPrice"]), one["Timestamp"].astimezone(timezone.utc), SPOT_SOURCE)
            found.setdefault((one["InstanceType"], one["AvailabilityZone"]), []).append(price)
        for prices in found.values():
            prices.sort(key=lambda price: price.time)
        return found

    def scores(self, types: Sequence[str], regions: Sequence[str]) -> dict[str, int]:
        """How likely AWS thinks a spot request is to succeed, 1 to 10, by region; regions may be missing."""
        asked: dict[str, Any] = {"InstanceTypes": [*types], "TargetCapacity": 1, "RegionNames": [*regions]}
        found = self.pages("ec2", regions[0], "get_spot_placement_scores", "SpotPlacementScores", **asked)
        return {one["Region"]: one["Score"] for one in found}

    def on_demand_price(self, instance_type: str, region: str) -> Price | None:
        """The full price of Linux on shared hardware, or None when the price list has none."""
        key = instance_type, region
        if key not in self._on_demand:
            self._on_demand[key] = self._look_up(instance_type, region)
        return self._on_demand[key]

    def _look_up(self, instance_type: str, region: str) -> Price | None:
        wanted = {
            "instanceType": instance_type,
            "regionCode": region,
            "operatingSystem": "Linux",
            "tenancy": "Shared",
            "preInstalledSw": "NA",
            "capacitystatus": "Used",
        }
        filters = [{"Type": "TERM_MATCH", "Field": name, "Value": value} for name, value in wanted.items()]
        found = self.pages("pricing", _PRICING_REGION, "get_products", "PriceList", ServiceCode="AmazonEC2", Filters=filters)
        for product in map(json.loads, found):
            for term in product.get("terms", {}).get("OnDemand", {}).values():
                for dimension in term["priceDimensions"].values():
                    usd = float(dimension["pricePerUnit"].get("USD", 0))
                    if dimension["unit"] == "Hrs" and usd > 0:
                        return Price(usd, _moment(term["effectiveDate"]), ON_DEMAND_SOURCE)
        return None

    # -- instances ----------------------------------------------------------------------------------------------------

    def instances(self, region: str, run: str) -> list[Instance]:
        """A run's instances in a region, oldest first; EC2 forgets terminated ones within about an hour."""
        filters = [_filter(f"tag:{RUN_TAG}", tag_value(run))]
        found = self.pages("ec2", region, "describe_instances", "Reservations", Filters=filters)
        instances = [_instance(one, region) for reservation in found for one in reservation["Instances"]]
        return sorted(instances, key=lambda one: (one.began, one.id))

    def tag_requested(self, region: str, run: str) -> None:
        """Gives instances of legacy spot requests the tags of their request, should nobody have lived to do it."""
        filters = [_filter(f"tag:{RUN_TAG}", tag_value(run)), _filter("state", "active")]
        for one in self.pages("ec2", region, "describe_spot_instance_requests", "SpotInstanceRequests", Filters=filters):
            if instance_id := one.get("InstanceId"):
                self.call("ec2", region, "create_tags", Resources=[instance_id], Tags=one["Tags"])

    def terminate(self, region: str, ids: Sequence[str], *, stop: bool = False) -> None:
        """Ends instances; their systems are shut down first, so that a training saves.

        Args:
            region: that they are in.
            ids: theirs.
            stop: tell a ``--watch`` that no other machine is wanted.
        """
        if stop:
            tags = [{"Key": STOP_TAG, "Value": "true"}]
            self.call("ec2", region, "create_tags", Resources=[*ids], Tags=tags)
        self.call("ec2", region, "terminate_instances", InstanceIds=[*ids])

    def remove_templates(self, region: str, run: str) -> None:
        """Removes the launch templates that were made for a run. Instances do not need them once they are launched."""
        filters = [_filter(f"tag:{RUN_TAG}", tag_value(run))]
        for one in [*self.pages("ec2", region, "describe_launch_templates", "LaunchTemplates", Filters=filters)]:
            try:
                self.call("ec2", region, "delete_launch_template", LaunchTemplateId=one["LaunchTemplateId"])
            except CloudError as error:
                if not error.code.startswith("InvalidLaunchTemplate"):  # somebody else did it
                    raise

    def account(self) -> str:
        """The account's id."""
        return str(self.call("sts", None, "get_caller_identity")["Account"])


def token_for(*parts: object) -> str:
    """A client token: the same for the same parts, 40 characters."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:40]


def tag_value(text: str) -> str:
    """``text`` as the value of a tag: what is too long, or has characters that tags can't have, is named by its hash."""
    if len(text) <= 256 and re.fullmatch(r"[\w .:/=+\-@]*", text):
        return text
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


# -- inside -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _explained(operation: str, service: str, region: str) -> Iterator[None]:
    doing = f"{_camel(operation)} in {region}" if operation else service
    known = {"permission": f"{_PREFIXES.get(service, service)}:{_camel(operation)}", "resource": "*", "region": region}
    try:
        yield
    except aws.ClientError as error:
        raise explain(code_of(error), message_of(error), doing=doing, **known) from error
    except (aws.BotoCoreError, ValueError) as error:
        raise explain(code_of(error) or type(error).__name__, str(error), doing=doing, **known) from error


def is_passing(error: CloudError) -> bool:
    """Whether the same call may work later: throttling, a server's trouble, a network that is away."""
    return error.code in LATER or error.code.startswith("5")


@functools.cache
def _camel(operation: str) -> str:
    return "".join(word.capitalize() for word in operation.split("_"))


def _filter(name: str, *values: str) -> dict[str, Any]:
    return {"Name": name, "Values": [*values]}


def _instance(said: Mapping[str, Any], region: str) -> Instance:
    transition = re.search(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)", said.get("StateTransitionReason") or "")
    state = said["State"]["Name"]
    return Instance(
        id=said["InstanceId"],
        region=region,
        zone=said.get("Placement", {}).get("AvailabilityZone", ""),
        instance_type=said["InstanceType"],
        market=SPOT if said.get("InstanceLifecycle") == "spot" else ON_DEMAND,
        state=state,
        began=said["LaunchTime"].astimezone(timezone.utc),
        ended=_moment(transition[1]) if transition else None,
        reason="" if state in ("pending", "running") else said.get("StateReason", {}).get("Code", ""),
        tags={tag["Key"]: tag["Value"] for tag in said.get("Tags", ())},
    )


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))  # Python 3.10 does not know the suffix Z
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
