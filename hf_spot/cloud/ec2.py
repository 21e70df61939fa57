"""All requests to EC2 and related services (SSM for images, Pricing, STS), without any decisions."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, TypeVar

import boto3
from botocore import exceptions as aws
from botocore.config import Config

from hf_spot.aws_errors import code_of, message_of, region_of
from hf_spot.cloud.ec2_errors import LATER, explain
from hf_spot.cloud.ending import SpotStatus
from hf_spot.cloud.job import ON_DEMAND, SPOT
from hf_spot.cloud.ladder import Price
from hf_spot.errors import CloudError, ConfigError

RUN_TAG, RUNG_TAG, WALK_TAG, STOP_TAG = "hf-spot:run", "hf-spot:rung", "hf-spot:walk", "hf-spot:stop"
LIVE = ("pending", "running", "stopping", "shutting-down")
SPOT_SOURCE = "EC2 DescribeSpotPriceHistory"
ON_DEMAND_SOURCE = "AWS Price List GetProducts"
HOURS_OF_A_MONTH = 730.0  # as AWS's own calculator has it
_PRICE_LISTS = ("us-east-1", "eu-central-1", "ap-south-1")  # where the API exists; each covers all regions
_PRICE_LISTS_OF_CHINA = ("cn-northwest-1",)
# An organisation may forbid a region, and a network may not reach it: then another one has the same prices.
_ELSEWHERE = frozenset({"AccessDeniedException", "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError"})
_EVERYBODY = ("0.0.0.0/0", "::/0")
_MOST_THREADS = 8
_MOST_VALUES = 200  # of a filter
_PREFIXES = {"service-quotas": "servicequotas"}  # services whose name in IAM differs from boto3's

T = TypeVar("T")


@dataclass(frozen=True)
class Image:
    """An AMI: its id, and the device name of its root disk."""

    id: str
    root_device: str


@dataclass(frozen=True)
class Subnet:
    """A subnet, its availability zone, its VPC, and whether it gives public addresses (to machines with one interface)."""

    id: str
    zone: str
    vpc: str
    is_public: bool = False


@dataclass(frozen=True)
class Kind:
    """An instance type.

    Args:
        vcpus: of a machine.
        gpus: of a machine.
        efa_cards: network cards that can have an EFA (Elastic Fabric Adapter); 0 if the type has none.
        clusters: whether its machines can be in a cluster placement group.
    """

    vcpus: int
    gpus: int
    efa_cards: int
    clusters: bool


@dataclass(frozen=True)
class Instance:
    """An instance of a run, as EC2 describes it.

    Args:
        id: id of the instance.
        region: name of the region.
        zone: name of the availability zone.
        instance_type: such as ``p4d.24xlarge``.
        market: ``spot`` or ``on-demand``.
        state: ``pending``, ``running``, ``shutting-down``, ``terminated``, ``stopping`` or ``stopped``.
        began: when it was launched.
        ended: when it was told to end, if EC2 says so.
        reason: EC2's code for why it ended; empty while it is live.
        tags: all tags.
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
    """The account's EC2, in all regions. Clients are created on first use; safe to use from several threads.

    Every method raises CloudError, whose ``code`` is AWS's.

    Args:
        session: a boto3 session; default: one with the usual AWS settings.
    """

    def __init__(self, session: Any = None) -> None:
        with _explained("", "AWS", ""):
            self._session: Any = session or boto3.Session(region_name=region_of(os.environ))
        self._clients: dict[tuple[str, str | None], Any] = {}
        self._listed_prices: dict[tuple[object, ...], Price | None] = {}

    def client(self, service: str, region: str | None = None) -> Any:
        """Return a boto3 client, by default for the configured region."""
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
        """Send one request; errors are explained."""
        client = self.client(service, region)
        with _explained(operation, service, client.meta.region_name):
            return getattr(client, operation)(**arguments)

    def pages(self, service: str, region: str | None, operation: str, key: str, **arguments: Any) -> Iterator[Any]:
        """Yield the items under ``key`` of all pages of a response."""
        client = self.client(service, region)
        with _explained(operation, service, client.meta.region_name):
            for page in client.get_paginator(operation).paginate(**arguments):
                yield from page.get(key, ())

    def each(self, regions: Sequence[str], ask: Callable[[str], T], *, services: Sequence[str] = ("ec2",)) -> list[T]:
        """Query several regions in parallel. Return the results in the order of the regions.

        Args:
            regions: names of the regions.
            ask: called with each region, from several threads.
            services: the services that ``ask`` uses.
        """
        for service in services:  # creating a client is not thread-safe; using one is
            for region in regions:
                for place in price_list_regions(region) if service == "pricing" else (region,):
                    self.client(service, place)
        with ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="hf_spot-ec2") as pool:
            return list(pool.map(ask, regions))

    # -- resources ----------------------------------------------------------------------------------------------------

    def regions(self, near: str | None = None) -> list[str]:
        """Return the names of the regions that the account can use.

        Args:
            near: the region to query; default: the configured one.
        """
        found = self.call("ec2", near, "describe_regions", AllRegions=False)["Regions"]
        return sorted(region["RegionName"] for region in found)

    def check_regions(self, wanted: Iterable[str], known: Sequence[str]) -> None:
        """Raise ConfigError for a region that the account can't use."""
        for region in wanted:
            if region not in known:
                near = difflib.get_close_matches(region, known, 1)
                raise ConfigError(
                    f"{region!r} is not a region that this account can use",
                    hint=f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}",
                )

    def image(self, region: str, image_id: str) -> Image:
        """Return the AMI for an id or ``resolve:ssm:PARAMETER``."""
        if image_id.startswith("resolve:ssm:"):
            name = image_id.removeprefix("resolve:ssm:")
            image_id = self.call("ssm", region, "get_parameter", Name=name)["Parameter"]["Value"]
        found = self.call("ec2", region, "describe_images", ImageIds=[image_id])["Images"]
        if not found:
            raise explain("InvalidAMIID.NotFound", doing=f"DescribeImages in {region}", image=image_id, region=region)
        return Image(image_id, found[0]["RootDeviceName"])

    def subnets(self, region: str, ids: Sequence[str]) -> list[Subnet]:
        """Return subnets by id, or without ids the default subnet of each zone."""
        query: dict[str, Any] = {"SubnetIds": [*ids]} if ids else {"Filters": [_filter("default-for-az", "true")]}
        found = list(self.pages("ec2", region, "describe_subnets", "Subnets", **query))
        if not found:
            raise CloudError(
                f"{region} has no default subnet", hint=f"subnets: {{{region}: [subnet-…]}}, or aws ec2 create-default-vpc"
            )
        return [
            Subnet(one["SubnetId"], one["AvailabilityZone"], one["VpcId"], bool(one.get("MapPublicIpOnLaunch")))
            for one in found
        ]

    def check_groups(self, region: str, ids: Sequence[str], vpc: str) -> None:
        """Raise ConfigError if a security group (or, without ids, the VPC's default group) is open to the internet."""
        query: dict[str, Any] = (
            {"GroupIds": [*ids]} if ids else {"Filters": [_filter("vpc-id", vpc), _filter("group-name", "default")]}
        )
        for group in self.pages("ec2", region, "describe_security_groups", "SecurityGroups", **query):
            for rule in group["IpPermissions"]:
                ranges = [one["CidrIp"] for one in rule.get("IpRanges", ())] + [
                    one["CidrIpv6"] for one in rule.get("Ipv6Ranges", ())
                ]
                if world := next((one for one in ranges if one in _EVERYBODY), None):
                    port = rule.get("FromPort", "any")
                    raise ConfigError(
                        f"security_groups: {group['GroupId']} in {region} is open to the internet (port {port}, {world}); "
                        "a training needs no inbound access",
                        hint=f"aws ec2 revoke-security-group-ingress --region {region} --group-id {group['GroupId']} …, "
                        "or use another group",
                    )

    def check_key(self, region: str, name: str) -> None:
        """Raise CloudError if the key pair does not exist."""
        self.call("ec2", region, "describe_key_pairs", KeyNames=[name])

    def offered(self, region: str, types: Sequence[str]) -> set[tuple[str, str]]:
        """Return which zones offer which instance types, as (type, zone)."""
        query = {"LocationType": "availability-zone", "Filters": [_filter("instance-type", *types)]}
        found = self.pages("ec2", region, "describe_instance_type_offerings", "InstanceTypeOfferings", **query)
        return {(one["InstanceType"], one["Location"]) for one in found}

    def vcpus(self, region: str, types: Sequence[str]) -> dict[str, int]:
        """Return the vCPUs of each instance type that the region offers."""
        return {name: kind.vcpus for name, kind in self.kinds(region, types).items()}

    def kinds(self, region: str, types: Sequence[str]) -> dict[str, Kind]:
        """Return each of the instance types that the region offers."""
        query = {"Filters": [_filter("instance-type", *types)]}
        found = self.pages("ec2", region, "describe_instance_types", "InstanceTypes", **query)
        return {one["InstanceType"]: _kind(one) for one in found}

    # -- prices -------------------------------------------------------------------------------------------------------

    def spot_prices(
        self, region: str, types: Sequence[str], since: datetime, until: datetime
    ) -> dict[tuple[str, str], list[Price]]:
        """Return the spot prices of Linux, oldest first, by (type, zone); the first one applied at ``since``.

        A pool without any price has no spot capacity.
        """
        found: dict[tuple[str, str], list[Price]] = {}
        query: dict[str, Any] = {"InstanceTypes": [*types], "ProductDescriptions": ["Linux/UNIX"]}
        query |= {"StartTime": since, "EndTime": until}
        for one in self.pages("ec2", region, "describe_spot_price_history", "SpotPriceHistory", **query):
            price = Price(float(one["SpotPrice"]), one["Timestamp"].astimezone(timezone.utc), SPOT_SOURCE)
            found.setdefault((one["InstanceType"], one["AvailabilityZone"]), []).append(price)
        for prices in found.values():
            prices.sort(key=lambda price: price.time)
        return found

    def scores(self, types: Sequence[str], regions: Sequence[str]) -> dict[str, int]:
        """Return AWS's estimate, 1 to 10, that a spot request succeeds, by region; regions may be missing."""
        query: dict[str, Any] = {"InstanceTypes": [*types], "TargetCapacity": 1, "RegionNames": [*regions]}
        found = self.pages("ec2", regions[0], "get_spot_placement_scores", "SpotPlacementScores", **query)
        return {one["Region"]: one["Score"] for one in found}

    def on_demand_price(self, instance_type: str, region: str) -> Price | None:
        """Return the on-demand price of Linux on shared hardware; None if the price list has none in dollars."""
        return self._listed(
            "Hrs",
            instanceType=instance_type,
            regionCode=region,
            operatingSystem="Linux",
            tenancy="Shared",
            preInstalledSw="NA",
            capacitystatus="Used",
        )

    def disk_price(self, region: str) -> Price | None:
        """Return the price of a gigabyte of a gp3 disk in dollars per hour; None if the price list has none in dollars."""
        found = self._listed("GB-Mo", productFamily="Storage", volumeApiName="gp3", regionCode=region)
        return None if found is None else replace(found, usd_per_hour=found.usd_per_hour / HOURS_OF_A_MONTH)

    def traffic_price(self, source: str, target: str) -> Price | None:
        """Return the price of a gigabyte in dollars that leaves a region, or None if the price list has none in dollars.

        It is that of the first gigabytes of a month, which is the highest.

        Args:
            source: name of the region.
            target: name of another region; the same for traffic between its zones; empty for the internet.
        """
        kind = "AWS Outbound" if not target else "IntraRegion" if target == source else "InterRegion Outbound"
        where = {"fromRegionCode": source, "transferType": kind, **({"toRegionCode": target} if target else {})}
        return self._listed("GB", service="AWSDataTransfer", region=source, **where)

    def _listed(self, unit: str, *, service: str = "AmazonEC2", region: str = "", **wanted: str) -> Price | None:
        key = unit, service, *sorted(wanted.items())
        if key not in self._listed_prices:
            filters = [{"Type": "TERM_MATCH", "Field": name, "Value": value} for name, value in wanted.items()]
            asked: dict[str, Any] = {"ServiceCode": service, "Filters": filters}
            self._listed_prices[key] = self._look_up(unit, region or wanted["regionCode"], asked)
        return self._listed_prices[key]

    def _look_up(self, unit: str, region: str, asked: Mapping[str, Any]) -> Price | None:
        found = []
        for product in map(json.loads, self._products(region, asked)):
            for term in product.get("terms", {}).get("OnDemand", {}).values():
                for dimension in term["priceDimensions"].values():
                    prices = dimension["pricePerUnit"]  # in China in yuan, as spot prices are there
                    usd = float(prices.get("USD") or (prices.get("CNY", 0) if region.startswith("cn-") else 0))
                    if dimension["unit"] == unit and usd > 0:
                        begin = float(dimension.get("beginRange") or 0)  # of a price that falls with the amount
                        found.append((begin, Price(usd, _moment(term["effectiveDate"]), ON_DEMAND_SOURCE)))
        return min(found, key=lambda one: one[0])[1] if found else None

    def _products(self, region: str, asked: Mapping[str, Any]) -> list[Any]:
        """Return what the price list has, from the first of its places that answers: each has the prices of all regions."""
        places = price_list_regions(region)
        for place in places:
            try:
                return [*self.pages("pricing", place, "get_products", "PriceList", **asked)]
            except CloudError as error:
                if place == places[-1] or not (is_temporary(error) or error.code in _ELSEWHERE):
                    raise
        return []

    # -- instances ----------------------------------------------------------------------------------------------------

    def instances(self, region: str, run: str) -> list[Instance]:
        """Return a run's instances in a region, oldest first. EC2 forgets terminated ones within about an hour."""
        filters = [_filter(f"tag:{RUN_TAG}", tag_value(run))]
        found = self.pages("ec2", region, "describe_instances", "Reservations", Filters=filters)
        instances = [_instance(one, region) for reservation in found for one in reservation["Instances"]]
        return sorted(instances, key=lambda one: (one.began, one.id))

    def spot_statuses(self, region: str, ids: Sequence[str]) -> dict[str, SpotStatus]:
        """Return the status of the spot requests of instances, by their ids; EC2 keeps them longer than the instances.

        Those of machines at full price, and those that it has forgotten, are missing.
        """
        found: dict[str, SpotStatus] = {}
        for place in range(0, len(ids), _MOST_VALUES):
            filters = [_filter("instance-id", *ids[place : place + _MOST_VALUES])]
            for one in self.pages("ec2", region, "describe_spot_instance_requests", "SpotInstanceRequests", Filters=filters):
                status = one.get("Status", {})
                if status.get("Code") and status.get("UpdateTime") is not None:
                    found[one["InstanceId"]] = SpotStatus(status["Code"], status["UpdateTime"].astimezone(timezone.utc))
        return found

    def tag_requested(self, region: str, run: str) -> None:
        """Give instances of legacy spot requests the tags of their request, in case the requesting process died first."""
        filters = [_filter(f"tag:{RUN_TAG}", tag_value(run)), _filter("state", "active")]
        for one in self.pages("ec2", region, "describe_spot_instance_requests", "SpotInstanceRequests", Filters=filters):
            if instance_id := one.get("InstanceId"):
                self.call("ec2", region, "create_tags", Resources=[instance_id], Tags=one["Tags"])

    def terminate(self, region: str, ids: Sequence[str], *, stop: bool = False) -> None:
        """Terminate instances. Their systems shut down first, so that a training saves.

        Args:
            region: region of the instances.
            ids: ids of the instances.
            stop: tag them, so that a ``--watch`` starts no other machine.
        """
        if stop:
            tags = [{"Key": STOP_TAG, "Value": "true"}]
            self.call("ec2", region, "create_tags", Resources=[*ids], Tags=tags)
        self.call("ec2", region, "terminate_instances", InstanceIds=[*ids])

    def remove_templates(self, region: str, run: str) -> None:
        """Remove the launch templates of a run. Instances do not need them once they are launched."""
        filters = [_filter(f"tag:{RUN_TAG}", tag_value(run))]
        for one in [*self.pages("ec2", region, "describe_launch_templates", "LaunchTemplates", Filters=filters)]:
            try:
                self.call("ec2", region, "delete_launch_template", LaunchTemplateId=one["LaunchTemplateId"])
            except CloudError as error:
                if not error.code.startswith("InvalidLaunchTemplate"):  # already removed by another process
                    raise

    def account(self) -> str:
        """Return the id of the account."""
        return str(self.call("sts", None, "get_caller_identity")["Account"])


def price_list_regions(region: str) -> tuple[str, ...]:
    """Return the regions whose price list has the prices of a region: us-east-1 first, then the nearest. Pure."""
    if region.startswith("cn-"):
        return _PRICE_LISTS_OF_CHINA
    near = {"eu": "eu-central-1", "ap": "ap-south-1"}.get(region.partition("-")[0], _PRICE_LISTS[0])
    return (_PRICE_LISTS[0], *sorted(_PRICE_LISTS[1:], key=lambda place: place != near))


def token_for(*parts: object) -> str:
    """Return a client token of 40 characters, the same for the same parts."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:40]


def tag_value(text: str) -> str:
    """Return ``text`` as the value of a tag, or its hash if it is too long or has characters that tags can't have."""
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


def is_temporary(error: CloudError) -> bool:
    """Return whether the same call may work later: throttling, a server error, a network failure."""
    return error.code in LATER or error.code.startswith("5")


@functools.cache
def _camel(operation: str) -> str:
    return "".join(word.capitalize() for word in operation.split("_"))


def _filter(name: str, *values: str) -> dict[str, Any]:
    return {"Name": name, "Values": [*values]}


def _kind(stated: Mapping[str, Any]) -> Kind:
    network = stated.get("NetworkInfo", {})
    cards = network.get("NetworkCards") or [{}]
    efa = network.get("EfaInfo", {}).get("MaximumEfaInterfaces", 1) if network.get("EfaSupported") else 0
    return Kind(
        vcpus=stated["VCpuInfo"]["DefaultVCpus"],
        gpus=sum(one["Count"] for one in stated.get("GpuInfo", {}).get("Gpus", ())),
        efa_cards=min(efa, len(cards)),
        clusters="cluster" in stated.get("PlacementGroupInfo", {}).get("SupportedStrategies", ()),
    )


def _instance(stated: Mapping[str, Any], region: str) -> Instance:
    transition = re.search(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)", stated.get("StateTransitionReason") or "")
    state = stated["State"]["Name"]
    return Instance(
        id=stated["InstanceId"],
        region=region,
        zone=stated.get("Placement", {}).get("AvailabilityZone", ""),
        instance_type=stated["InstanceType"],
        market=SPOT if stated.get("InstanceLifecycle") == "spot" else ON_DEMAND,
        state=state,
        began=stated["LaunchTime"].astimezone(timezone.utc),
        ended=_moment(transition[1]) if transition else None,
        reason="" if state in ("pending", "running") else stated.get("StateReason", {}).get("Code", ""),
        tags={tag["Key"]: tag["Value"] for tag in stated.get("Tags", ())},
    )


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))  # Python 3.10 does not know the suffix Z
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
