"""A claim tells what the machine is and what it costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_spot.errors import ConfigError
from hf_spot.notices import detect
from hf_spot.run.machine_info import KEYS, VARIABLE, about_this_machine, this_machine
from hf_spot.testing import FakeIMDS

IDENTITY = {
    "instance-id": "i-0123456789abcdef0",
    "instance-type": "p4d.24xlarge",
    "placement/availability-zone": "us-east-1a",
    "placement/region": "us-east-1",
    "instance-life-cycle": "spot",
}
PRICE = {"price_usd_per_hour": 9.83, "price_source": "a contract", "price_time": "2026-01-31T12:00:00Z"}


def test_a_machine_of_ec2_says_what_it_is() -> None:
    with FakeIMDS(metadata=IDENTITY) as imds:
        told = this_machine(imds.env())
    assert tuple(sorted(told)) == tuple(sorted(KEYS))
    assert {key: value for key, value in told.items() if value is not None} == {
        "cloud": "aws",
        "instance_id": "i-0123456789abcdef0",
        "instance_type": "p4d.24xlarge",
        "zone": "us-east-1a",
        "region": "us-east-1",
        "market": "spot",
    }


def test_what_the_environment_says_counts_and_the_rest_is_asked() -> None:
    with FakeIMDS(metadata=IDENTITY) as imds:
        told = this_machine({**imds.env(), VARIABLE: json.dumps({**PRICE, "zone": "somewhere"})})
    assert (told["price_usd_per_hour"], told["zone"], told["instance_type"]) == (9.83, "somewhere", "p4d.24xlarge")


def test_what_is_told_completely_is_not_asked() -> None:
    known = dict.fromkeys(("instance_id", "instance_type", "zone", "region"), "x")
    with FakeIMDS(metadata=IDENTITY) as imds:
        this_machine({**imds.env(), VARIABLE: json.dumps({**known, "market": "spot"})})
        assert imds.requests == []


def test_another_machine_is_not_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(detect, "DMI", tmp_path)
    assert this_machine({"AWS_EC2_METADATA_DISABLED": "true"}) == dict.fromkeys(KEYS)


def test_a_service_that_knows_little_or_says_nothing_is_no_error() -> None:
    with FakeIMDS(metadata={"instance-type": "p4d.24xlarge", "instance-life-cycle": "scheduled"}) as imds:
        told = this_machine(imds.env())
        assert (told["instance_type"], told["instance_id"], told["market"]) == ("p4d.24xlarge", None, None)
        imds.fail(403, times=9)
        assert this_machine(imds.env())["instance_type"] is None
        imds.stall(30)
        assert this_machine(imds.env())["cloud"] == "aws"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("{", "is not JSON"),
        ("9.83", "is not a JSON object"),
        ('{"price": 9.83}', "has a key 'price'"),
        ('{"price_usd_per_hour": "9.83"}', "a number of dollars"),
        ('{"price_usd_per_hour": true}', "a number of dollars"),
        ('{"on_demand_usd_per_hour": -1}', "a number of dollars"),
        ('{"price_usd_per_hour": NaN}', "a number of dollars"),
        ('{"market": "flea"}', "spot or on-demand"),
        ('{"zone": 1}', "a string"),
        ('{"price_time": "yesterday"}', "a date or time"),
    ],
)
def test_what_can_not_be_meant_is_refused(value: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as error:
        about_this_machine("a test", {VARIABLE: value, "AWS_EC2_METADATA_DISABLED": "true"})
    assert VARIABLE in str(error.value)
    assert error.value.hint.startswith("export ")


def test_the_example_in_the_hint_is_right() -> None:
    with pytest.raises(ConfigError) as error:
        this_machine({VARIABLE: "{"})
    example = error.value.hint.partition("='")[2].removesuffix("'")
    assert this_machine({VARIABLE: example, "AWS_EC2_METADATA_DISABLED": "true"})["price_usd_per_hour"] == 9.83
