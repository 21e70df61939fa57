"""Prices of AWS's price list, which is in three regions and holds the prices of all."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hf_spot.cloud.ec2 import Cloud, price_list_regions
from hf_spot.errors import CloudError
from tests.cloud.aws import Aws


@pytest.mark.parametrize(
    ("region", "places"),
    [
        ("us-west-2", ("us-east-1", "eu-central-1", "ap-south-1")),
        ("eu-west-1", ("us-east-1", "eu-central-1", "ap-south-1")),
        ("ap-northeast-1", ("us-east-1", "ap-south-1", "eu-central-1")),
        ("cn-north-1", ("cn-northwest-1",)),
    ],
)
def test_a_regions_prices_are_in_the_lists_of_its_partition(region: str, places: tuple[str, ...]) -> None:
    assert price_list_regions(region) == places


@pytest.mark.parametrize("code", ["AccessDeniedException", "RequestLimitExceeded"])
def test_where_one_list_refuses_the_next_one_is_asked_and_the_answer_kept(aws: Aws, code: str) -> None:
    cloud = Cloud(aws.session())
    aws.fail = {"GetProducts": [code]}
    price = cloud.on_demand_price("p4d.24xlarge", "eu-west-1")
    assert price is not None and price.usd_per_hour == 22.0
    asked = [region for name, region in aws.calls if name == "GetProducts"]
    assert (asked[0], asked[-1]) == ("us-east-1", "eu-central-1")
    assert cloud.on_demand_price("p4d.24xlarge", "eu-west-1") is price
    assert len([name for name, _ in aws.calls if name == "GetProducts"]) == len(asked)


def test_if_all_lists_refuse_the_error_is_the_last_ones(aws: Aws) -> None:
    aws.fail = {"GetProducts": ["AccessDeniedException"] * 3}
    with pytest.raises(CloudError, match="GetProducts in ap-south-1") as caught:
        Cloud(aws.session()).on_demand_price("p4d.24xlarge", "us-west-2")
    assert caught.value.code == "AccessDeniedException"


@pytest.mark.parametrize(("region", "usd"), [("cn-north-1", 150.0), ("us-east-1", None)])
def test_prices_in_yuan_are_those_of_china_alone(region: str, usd: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    dimension = {"unit": "Hrs", "pricePerUnit": {"CNY": "150"}}
    terms = {"OnDemand": {"x": {"effectiveDate": "2025-06-01T00:00:00Z", "priceDimensions": {"y": dimension}}}}

    def pages(self: Cloud, service: str, where: str, *words: str, **asked: Any) -> list[str]:
        return [json.dumps({"terms": terms})]

    monkeypatch.setattr(Cloud, "pages", pages)
    price = Cloud(object()).on_demand_price("p4d.24xlarge", region)
    assert (price and price.usd_per_hour) == usd
