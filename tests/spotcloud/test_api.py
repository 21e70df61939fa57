"""The local spot cloud refuses, prices and remembers as EC2 does; asked with boto3, as everybody asks EC2."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.spotcloud.api import IMAGE
from tests.spotcloud.cloud import BY_USER, SpotCloud
from tests.spotcloud.market import ON_DEMAND, RECLAIMED, Change, Market, Pool
from tests.waiting import wait_for

REGION = "us-east-1"
P4D = "p4d.24xlarge"  # which moto offers in the zones a to d
NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[SpotCloud]:
    market = Market(NOW - timedelta(days=10))
    for number, zone in enumerate("abcd"):
        market.set_price(Pool(P4D, f"{REGION}{zone}"), 5.0 + number, NOW - timedelta(days=1))
    with SpotCloud(tmp_path, market=market, now=lambda: NOW) as made:
        yield made


@pytest.fixture
def ec2(cloud: SpotCloud) -> Any:
    return cloud.client(region=REGION)


def template(ec2: Any, name: str = "job", **more: Any) -> dict[str, str]:
    data = {
        "ImageId": IMAGE,
        "UserData": base64.b64encode(b"#!/bin/sh\n").decode(),
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
        "InstanceInitiatedShutdownBehavior": "terminate",
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 50, "Encrypted": True}}],
        "TagSpecifications": [{"ResourceType": "instance", "Tags": [{"Key": "run", "Value": "mine"}]}],
        **more,
    }
    made = ec2.create_launch_template(LaunchTemplateName=name, LaunchTemplateData=data)["LaunchTemplate"]
    return {"LaunchTemplateId": made["LaunchTemplateId"], "Version": "1"}


def fleet(ec2: Any, of: dict[str, str], *types: str, market: str = "spot", **more: Any) -> Any:
    overrides = [{"InstanceType": one} for one in types or [P4D]]
    asked: dict[str, Any] = {
        "Type": "instant",
        "LaunchTemplateConfigs": [{"LaunchTemplateSpecification": of, "Overrides": overrides}],
        "TargetCapacitySpecification": {"TotalTargetCapacity": 1, "DefaultTargetCapacityType": market},
    }
    return ec2.create_fleet(**{**asked, **more})


def described(ec2: Any, instance_id: str) -> Any:
    return ec2.describe_instances(InstanceIds=[instance_id])["Reservations"][0]["Instances"][0]


def refused(call: Any, *arguments: Any, **more: Any) -> str:
    with pytest.raises(ClientError) as caught:
        call(*arguments, **more)
    return str(caught.value.response["Error"]["Code"])


# -- fleets -----------------------------------------------------------------------------------------------------------


def test_a_fleet_starts_in_the_cheapest_pool_what_its_template_says(cloud: SpotCloud, ec2: Any) -> None:
    made = fleet(ec2, template(ec2))
    assert made["Errors"] == []
    [started] = made["Instances"]
    instance = described(ec2, *started["InstanceIds"])
    assert instance["Placement"]["AvailabilityZone"] == "us-east-1a"
    assert (instance["InstanceLifecycle"], instance["LaunchTime"]) == ("spot", NOW)
    tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
    assert tags == {"run": "mine", "aws:ec2:fleet-id": made["FleetId"]}
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    [volume] = ec2.describe_volumes(VolumeIds=[instance["BlockDeviceMappings"][0]["Ebs"]["VolumeId"]])["Volumes"]
    assert (volume["Size"], volume["Encrypted"]) == (50, True)
    said = ec2.describe_instance_attribute(InstanceId=instance["InstanceId"], Attribute="userData")["UserData"]["Value"]
    assert base64.b64decode(said) == b"#!/bin/sh\n"
    assert cloud.running() == [instance["InstanceId"]]


def test_a_fleet_that_finds_no_machine_is_no_error_of_the_call(cloud: SpotCloud, ec2: Any) -> None:
    cloud.market.close(P4D, "us-east-1[abc]")  # the fourth pool has machines, but three are tried
    made = fleet(ec2, template(ec2))
    assert made["ResponseMetadata"]["HTTPStatusCode"] == 200
    assert made["Instances"] == []
    codes = [error["ErrorCode"] for error in made["Errors"]]
    assert codes == ["InsufficientInstanceCapacity"] * 3 + ["UnfulfillableCapacity"]
    assert {error["Lifecycle"] for error in made["Errors"]} == {"spot"}
    assert made["Errors"][0]["LaunchTemplateAndOverrides"]["Overrides"] == {"InstanceType": P4D}
    assert cloud.running() == []


def test_a_fleet_passes_over_pools_without_capacity(cloud: SpotCloud, ec2: Any) -> None:
    cloud.market.close(P4D, "us-east-1[ab]")
    [started] = fleet(ec2, template(ec2))["Instances"]
    assert described(ec2, *started["InstanceIds"])["Placement"]["AvailabilityZone"] == "us-east-1c"


@pytest.mark.parametrize(
    ("market", "code", "name"),
    [("spot", "MaxSpotInstanceCountExceeded", "L-7212CCBC"), (ON_DEMAND, "VcpuLimitExceeded", "L-417A185B")],
)
def test_a_quota_counts_what_runs_already(cloud: SpotCloud, ec2: Any, market: str, code: str, name: str) -> None:
    cloud.api.quotas[(name, REGION)] = 96.0  # one p4d.24xlarge
    of = template(ec2)
    [first] = fleet(ec2, of, market=market)["Instances"]
    assert fleet(ec2, of, market=market)["Errors"][0]["ErrorCode"] == code
    ec2.terminate_instances(InstanceIds=first["InstanceIds"])
    assert fleet(ec2, of, market=market)["Instances"]


def test_a_price_above_the_cap_is_refused(cloud: SpotCloud, ec2: Any) -> None:
    of = template(ec2)
    codes = [error["ErrorCode"] for error in fleet(ec2, of, SpotOptions={"MaxTotalPrice": "4.99"})["Errors"]]
    assert codes[0] == "SpotMaxPriceTooLow"
    assert fleet(ec2, of, SpotOptions={"MaxTotalPrice": "5.01"})["Instances"]


def test_a_type_that_a_zone_does_not_have_is_a_wrong_configuration(ec2: Any) -> None:
    [subnet] = ec2.describe_subnets(Filters=[{"Name": "availability-zone", "Values": ["us-east-1f"]}])["Subnets"]
    override = [{"InstanceType": P4D, "SubnetId": subnet["SubnetId"]}]
    config = [{"LaunchTemplateSpecification": template(ec2), "Overrides": override}]
    [error] = fleet(ec2, {}, LaunchTemplateConfigs=config)["Errors"]
    assert error["ErrorCode"] == "InvalidFleetConfiguration"
    assert error["LaunchTemplateAndOverrides"]["Overrides"] == override[0]


def test_a_template_or_image_that_does_not_exist_fails_the_call(ec2: Any) -> None:
    nothing = {"LaunchTemplateId": "lt-0123456789abcdef0", "Version": "1"}
    assert refused(fleet, ec2, nothing) == "InvalidLaunchTemplateId.NotFoundException"
    assert refused(fleet, ec2, template(ec2, ImageId="ami-0123456789abcdef0")) == "InvalidAMIID.NotFound"


# -- asked twice ------------------------------------------------------------------------------------------------------


def test_one_client_token_is_one_machine_even_when_the_answer_was_lost(cloud: SpotCloud, ec2: Any) -> None:
    of = template(ec2)
    cloud.api.lose_answer("CreateFleet")  # botocore asks again
    first = fleet(ec2, of, ClientToken="one")
    again = fleet(ec2, of, ClientToken="one")
    assert first["FleetId"] == again["FleetId"]
    assert cloud.running() == first["Instances"][0]["InstanceIds"]
    assert cloud.api.calls["CreateFleet"] == 3
    assert fleet(ec2, of, ClientToken="two")["FleetId"] != first["FleetId"]
    assert refused(fleet, ec2, of, "p4de.24xlarge", ClientToken="one") == "IdempotentParameterMismatch"


def test_a_dry_run_starts_nothing(cloud: SpotCloud, ec2: Any) -> None:
    assert refused(fleet, ec2, template(ec2), DryRun=True) == "DryRunOperation"
    assert cloud.running() == []


def test_a_fault_is_answered_as_often_as_was_asked_for(cloud: SpotCloud, ec2: Any) -> None:
    cloud.api.fail("DescribeRegions", "UnauthorizedOperation", status=403)
    assert refused(ec2.describe_regions) == "UnauthorizedOperation"
    assert ec2.describe_regions()["Regions"]


# -- the other ways to a machine --------------------------------------------------------------------------------------


def run(ec2: Any, **more: Any) -> str:
    asked = {"ImageId": IMAGE, "InstanceType": P4D, "MinCount": 1, "MaxCount": 1}
    return str(ec2.run_instances(**{**asked, **more})["Instances"][0]["InstanceId"])


def test_run_instances_fails_without_capacity_and_takes_the_zone_that_has_some(cloud: SpotCloud, ec2: Any) -> None:
    cloud.market.close(P4D, "us-east-1[abd]", ON_DEMAND)
    assert described(ec2, run(ec2))["Placement"]["AvailabilityZone"] == "us-east-1c"
    assert refused(run, ec2, Placement={"AvailabilityZone": "us-east-1a"}) == "InsufficientInstanceCapacity"
    assert refused(run, ec2, Placement={"AvailabilityZone": "us-east-1f"}) == "Unsupported"
    spot = {"MarketType": "spot", "SpotOptions": {"MaxPrice": "1"}}
    assert refused(run, ec2, InstanceMarketOptions=spot) == "SpotMaxPriceTooLow"


def test_a_spot_request_waits_until_there_is_a_machine(cloud: SpotCloud, ec2: Any) -> None:
    cloud.market.close(P4D)
    wanted = {"ImageId": IMAGE, "InstanceType": P4D, "Placement": {"AvailabilityZone": "us-east-1b"}}
    [request] = ec2.request_spot_instances(LaunchSpecification=wanted)["SpotInstanceRequests"]

    def look() -> Any:
        name = request["SpotInstanceRequestId"]
        return ec2.describe_spot_instance_requests(SpotInstanceRequestIds=[name])["SpotInstanceRequests"][0]

    assert (look()["State"], look()["Status"]["Code"]) == ("open", "capacity-not-available")
    cloud.market.open(P4D, "us-east-1b")
    wait_for(lambda: look()["State"] == "active", "for the machine")
    pool = cloud.bill.stays[look()["InstanceId"]].pool
    assert pool == Pool(P4D, "us-east-1b")
    assert cloud.reclaim(pool) == [look()["InstanceId"]]
    assert (look()["State"], look()["Status"]["Code"]) == ("closed", "instance-terminated-no-capacity")


def test_a_spot_fleet_tells_what_became_of_it(cloud: SpotCloud, ec2: Any) -> None:
    cloud.market.close(P4D)
    configs = [{"LaunchTemplateSpecification": template(ec2), "Overrides": [{"InstanceType": P4D}]}]
    config = {"IamFleetRole": "arn:aws:iam::123456789012:role/f", "TargetCapacity": 1, "LaunchTemplateConfigs": configs}
    name = ec2.request_spot_fleet(SpotFleetRequestConfig={**config, "ClientToken": "one"})["SpotFleetRequestId"]
    assert ec2.request_spot_fleet(SpotFleetRequestConfig={**config, "ClientToken": "one"})["SpotFleetRequestId"] == name
    history = ec2.describe_spot_fleet_request_history(SpotFleetRequestId=name, StartTime=NOW - timedelta(hours=1))
    assert history["HistoryRecords"][0]["EventInformation"]["EventSubType"] == "InsufficientInstanceCapacity"
    cloud.market.open(P4D)

    def active() -> Any:
        return ec2.describe_spot_fleet_instances(SpotFleetRequestId=name)["ActiveInstances"]

    wait_for(active, "for the machine")
    assert [one["InstanceId"] for one in active()] == cloud.running()
    ec2.cancel_spot_fleet_requests(SpotFleetRequestIds=[name], TerminateInstances=True)
    [left] = ec2.describe_spot_fleet_requests(SpotFleetRequestIds=[name])["SpotFleetRequestConfigs"]
    assert left["SpotFleetRequestState"] == "cancelled_terminating"
    wait_for(lambda: not cloud.running(), "for its end")


# -- what is asked before ---------------------------------------------------------------------------------------------


def test_prices_are_told_by_zone_newest_first_and_in_pages(ec2: Any) -> None:
    asked: dict[str, Any] = {"InstanceTypes": [P4D], "ProductDescriptions": ["Linux/UNIX"]}
    asked["StartTime"] = NOW - timedelta(hours=1)
    pages = list(ec2.get_paginator("describe_spot_price_history").paginate(**asked, PaginationConfig={"PageSize": 3}))
    found = [one for page in pages for one in page["SpotPriceHistory"]]
    assert [len(page["SpotPriceHistory"]) for page in pages] == [3, 1]
    assert {one["AvailabilityZone"][-1]: float(one["SpotPrice"]) for one in found} == {"a": 5.0, "b": 6.0, "c": 7.0, "d": 8.0}
    older = ec2.describe_spot_price_history(**{**asked, "StartTime": NOW - timedelta(days=5)})["SpotPriceHistory"]
    assert len(older) == 8
    assert older[0]["Timestamp"] > older[-1]["Timestamp"]
    assert ec2.describe_spot_price_history(**{**asked, "InstanceTypes": ["p3.16xlarge"]})["SpotPriceHistory"] == []


def test_scores_tell_where_there_is_capacity_to_those_who_name_three_types(cloud: SpotCloud, ec2: Any) -> None:
    cloud.market.close(zone="us-east-1*")

    def scores(*types: str) -> dict[str, int]:
        said = ec2.get_spot_placement_scores(InstanceTypes=types, TargetCapacity=1, RegionNames=[REGION, "us-west-2"])
        return {one["Region"]: one["Score"] for one in said["SpotPlacementScores"]}

    assert scores(P4D, "p4de.24xlarge", "g5.48xlarge") == {REGION: 1, "us-west-2": 9}
    assert scores(P4D) == {REGION: 1, "us-west-2": 3}


def test_quotas_and_full_prices_have_the_shapes_of_their_services(cloud: SpotCloud) -> None:
    cloud.api.quotas[("L-7212CCBC", "us-west-2")] = 0.0
    quotas = cloud.client("service-quotas", "us-west-2")
    found = {one["QuotaName"]: one["Value"] for one in quotas.list_service_quotas(ServiceCode="ec2")["Quotas"]}
    assert found["All P4, P3 and P2 Spot Instance Requests"] == 0.0
    assert refused(quotas.get_service_quota, ServiceCode="ec2", QuotaCode="L-00000000") == "NoSuchResourceException"
    default = quotas.get_aws_default_service_quota(ServiceCode="ec2", QuotaCode="L-417A185B")["Quota"]
    assert default["QuotaName"] == "Running On-Demand P instances"
    filters = {"instanceType": P4D, "regionCode": "us-west-2", "operatingSystem": "Linux", "tenancy": "Shared"}
    wanted = [{"Type": "TERM_MATCH", "Field": name, "Value": value} for name, value in filters.items()]
    [product] = cloud.client("pricing").get_products(ServiceCode="AmazonEC2", Filters=wanted)["PriceList"]
    [term] = json.loads(product)["terms"]["OnDemand"].values()
    [dimension] = term["priceDimensions"].values()
    assert (dimension["unit"], float(dimension["pricePerUnit"]["USD"])) == ("Hrs", 21.957642)


def test_a_weather_of_hours_takes_moments(tmp_path: Path) -> None:
    clock = [NOW]
    pool, hour = Pool(P4D, "us-east-1a"), 3600.0
    changes = [
        Change(2 * hour, pool, "price", price=40.0),
        Change(3 * hour, pool, "reclaim"),
        Change(5 * hour, pool, "open"),
    ]
    market = Market(NOW - timedelta(days=1))
    market.set_price(pool, 2.0, NOW - timedelta(hours=1))
    with SpotCloud(tmp_path, market=market, now=lambda: clock[0]) as cloud:
        cloud.play(changes)
        ec2 = cloud.client(region=REGION)
        market.close()
        market.open(P4D, "us-east-1a")
        [name] = fleet(ec2, template(ec2))["Instances"][0]["InstanceIds"]
        clock[0] = NOW + timedelta(hours=2)
        wait_for(lambda: market.price(pool, clock[0]) == 40.0, "for the price")
        assert cloud.running() == [name]
        clock[0] = NOW + timedelta(hours=3)
        wait_for(lambda: not cloud.running(), "for the end")
        assert fleet(ec2, template(ec2, "again"))["Instances"] == []
        assert cloud.bill.charged(clock[0]) == pytest.approx(2 * 2.0 + 1 * 40.0)
        clock[0] = NOW + timedelta(hours=5)
        wait_for(lambda: market.has_capacity(pool), "for machines")


def test_ec2_says_why_an_instance_ended(cloud: SpotCloud, ec2: Any) -> None:
    of = template(ec2)
    taken, ended = (fleet(ec2, of)["Instances"][0]["InstanceIds"][0] for _ in range(2))
    ec2.terminate_instances(InstanceIds=[ended])
    wait_for(lambda: cloud.running() == [taken], "for the bill to notice")
    cloud.take(taken)
    for name, reason in ((taken, RECLAIMED), (ended, BY_USER)):
        instance = described(ec2, name)
        assert (instance["State"]["Name"], instance["StateReason"]["Code"]) == ("terminated", reason)
        assert cloud.bill.stays[name].reason == reason
