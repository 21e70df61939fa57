"""One table explains what AWS says no to, wherever it says it."""

from __future__ import annotations

import string

import boto3
import botocore.parsers
import pytest
import s3transfer.exceptions
import urllib3.exceptions
from botocore import exceptions as aws
from botocore.stub import Stubber

from hf_spot.aws_errors import TABLE, Kind, code_of, explain, message_of
from hf_spot.errors import AccessDenied
from hf_spot.storage.s3 import S3Store
from tests.servers import CannedS3

KNOWN = {"bucket", "region", "permission", "resource", "instance_type", "image", "role", "endpoint"}


@pytest.mark.parametrize(
    ("code", "kind", "in_hint"),
    [
        ("AuthFailure.ServiceLinkedRoleCreationNotPermitted", Kind.PERMISSION, "create-service-linked-role"),
        ("MaxSpotInstanceCountExceeded", Kind.QUOTA, "hf-spot quotas"),
        ("VcpuLimitExceeded", Kind.QUOTA, "hf-spot quotas"),
        ("InsufficientInstanceCapacity", Kind.CAPACITY, "hf-spot provision"),
        ("UnfulfillableCapacity", Kind.CAPACITY, "hf-spot provision"),
        ("SpotMaxPriceTooLow", Kind.CAPACITY, "hf-spot prices"),
        ("Unsupported", Kind.CAPACITY, "Values=p4d.24xlarge"),
        ("InvalidFleetConfiguration", Kind.CAPACITY, "--region eu-west-3"),
        ("InvalidAMIID.NotFound", Kind.MISSING, "--region eu-west-3"),
        ("UnauthorizedOperation", Kind.PERMISSION, "allow ec2:RunInstances"),
        ("DryRunOperation", Kind.GRANTED, ""),
        ("NoCredentialsError", Kind.CREDENTIALS, "--http-put-response-hop-limit 2"),
        ("NoRegionError", Kind.SETTING, "AWS_REGION"),
        ("AccessDenied", Kind.PERMISSION, "allow ec2:RunInstances"),
        ("SlowDown", Kind.BUSY, "later"),
        ("RequestTimeTooSkewed", Kind.CREDENTIALS, "chronyc"),
        ("PermanentRedirect", Kind.SETTING, "get-bucket-location"),
        ("ExpiredToken", Kind.CREDENTIALS, "aws sso login"),
        ("RequestLimitExceeded", Kind.BUSY, "later"),
        ("pending-evaluation", Kind.CAPACITY, "hf-spot prices"),
    ],
)
def test_what_people_meet_is_explained_with_the_next_command(code: str, kind: Kind, in_hint: str) -> None:
    found = explain(code, region="eu-west-3", instance_type="p4d.24xlarge", permission="ec2:RunInstances")
    assert found.kind is kind
    assert found.means
    assert in_hint in found.hint
    assert bool(found.hint) == (kind is not Kind.GRANTED)


def test_every_entry_says_what_to_do_and_names_only_what_callers_know() -> None:
    for code, meaning in TABLE.items():
        names = {name for text in (meaning.means, meaning.hint) for _, name, _, _ in string.Formatter().parse(text) if name}
        assert names <= KNOWN, code
        assert meaning.hint or meaning.kind is Kind.GRANTED, code


def test_what_a_caller_does_not_know_is_left_for_the_reader() -> None:
    assert "--region REGION" in explain("InvalidAMIID.NotFound").hint
    assert explain("InvalidAMIID.NotFound", image="ami-1", region="eu-west-3").means.startswith(
        "the image ami-1 does not exist"
    )


def test_a_refused_start_is_told_from_a_refused_role() -> None:
    message = "You are not authorized to perform this operation. User: arn:… is not authorized to perform: iam:PassRole on …"
    assert (
        "iam:PassRole on arn:aws:iam::1:role/x"
        in explain("UnauthorizedOperation", message=message, role="arn:aws:iam::1:role/x").hint
    )
    assert "iam:PassRole" not in explain("UnauthorizedOperation").hint


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [("Strange", 503, Kind.BUSY), ("502", 0, Kind.BUSY), ("", 429, Kind.BUSY), ("Strange", 403, Kind.PERMISSION)],
)
def test_a_code_that_nobody_knows_is_told_by_its_status(code: str, status: int, kind: Kind) -> None:
    assert explain(code, status=status).kind is kind


def test_of_a_code_and_status_that_say_nothing_the_services_own_words_are_kept() -> None:
    found = explain("Strange", status=400, message="no {such} thing")
    assert (found.kind, found.means, found.hint) == (Kind.OTHER, "no {such} thing", "")


@pytest.mark.parametrize(
    "name", [name for name in TABLE if name.endswith("Error") and name not in ("InternalError", "KeyTooLongError")]
)
def test_an_exception_of_the_libraries_is_known_by_its_name(name: str) -> None:
    modules = (aws, botocore.parsers, s3transfer.exceptions, urllib3.exceptions)
    kinds = [getattr(module, name, None) for module in modules]
    assert any(isinstance(kind, type) for kind in kinds)


def test_the_same_code_is_explained_the_same_way_by_a_store_and_for_a_client_of_ec2(monkeypatch: pytest.MonkeyPatch) -> None:
    with CannedS3(400, "ExpiredToken") as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        with pytest.raises(AccessDenied) as told:
            S3Store("s3://bucket/run").get("k")
    ec2 = boto3.client("ec2", region_name="us-east-1")
    with Stubber(ec2) as stub:
        stub.add_client_error("describe_regions", "ExpiredToken", "said so")
        with pytest.raises(aws.ClientError) as raised:
            ec2.describe_regions()
    assert code_of(raised.value) == code_of(told.value) == "ExpiredToken"
    assert message_of(raised.value) == "said so"
    meaning = explain(code_of(raised.value))
    assert meaning.means in str(told.value)
    assert meaning.hint == told.value.hint


def test_no_answer_has_a_code_too() -> None:
    assert code_of(aws.EndpointConnectionError(endpoint_url="x")) == "ConnectionError"
    assert code_of(aws.SSLError(endpoint_url="x", error="y")) == "SSLError"
    assert code_of(AccessDenied("of ours")) == code_of(ValueError("x")) == code_of(None) == ""


@pytest.mark.parametrize(
    ("message", "known", "hint"),
    [
        ('Could not connect to the endpoint URL: "https://ec2.us-esat-1.amazonaws.com/"', {}, "us-east-1"),
        ('Could not connect to the endpoint URL: "https://b.s3.eu-wset-3.amazonaws.com/k"', {}, "eu-west-3"),
        (
            'Could not connect to the endpoint URL: "https://ec2.us-east-1.amazonaws.com/"',
            {},
            "can reach ec2.us-east-1.amazonaws.com",
        ),
        ("no answer", {"region": "us-esat-1"}, "us-east-1"),
        ("no answer", {}, "can reach the service"),
    ],
)
def test_who_does_not_answer_is_named(message: str, known: dict[str, str], hint: str) -> None:
    assert hint in explain("ConnectionError", message=message, **known).hint
