"""What `hf-spot doctor --job` says of an AWS account: a moto server, and AWS's own answers for what moto lacks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse

from hf_spot.cli import main
from hf_spot.cloud import ec2
from hf_spot.cloud.ec2 import Cloud
from hf_spot.cloud.job import ANY, ON_DEMAND, SPOT, Job, Rung
from hf_spot.doctor.account import _grouped, account
from hf_spot.doctor.finding import FAIL, OK, WARN, Finding
from hf_spot.errors import CloudError
from tests.cloud.aws import REGIONS, Aws

P4D, G5 = "p4d.24xlarge", "g5.48xlarge"
LADDER = (Rung((P4D,), SPOT), Rung((P4D,), SPOT, ANY), Rung((G5,), SPOT, ("us-west-2",)), Rung((P4D,), ON_DEMAND))
ROLE = "arn:aws:iam::123456789012:role/trainer"
TRUST = json.dumps({"Version": "2012-10-17", "Statement": []})


@pytest.fixture
def job(aws: Aws) -> Job:
    """A job for which everything is prepared."""
    iam = aws.client(service="iam")
    iam.create_role(  # create_service_linked_role of moto gives it another name than AWS does
        RoleName="AWSServiceRoleForEC2Spot", Path="/aws-service-role/spot.amazonaws.com/", AssumeRolePolicyDocument=TRUST
    )
    iam.create_role(RoleName="trainer", AssumeRolePolicyDocument=TRUST)
    iam.create_instance_profile(InstanceProfileName="trainer")
    iam.add_role_to_instance_profile(InstanceProfileName="trainer", RoleName="trainer")
    return Job(
        name="llama",
        store="s3://bucket/run",
        run="hf-spot launch train.py",
        region="us-east-1",
        max_spend=500,
        image_id={region: aws.image(region) for region in REGIONS},
        instance_profile="trainer",
        ladder=LADDER,
    )


def look(aws: Aws, job: Job | None) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for one in account(Cloud(aws.session()), job, aws.clock.now()):
        found.setdefault(one.check, []).append(one)
    return found


def bad(found: dict[str, list[Finding]]) -> dict[str, Finding]:
    """What is not ok, one for each check."""
    return {check: one for check, findings in found.items() for one in findings if one.level != OK}


def test_an_account_that_is_prepared_is_all_ok(aws: Aws, job: Job) -> None:
    found = look(aws, job)
    assert bad(found) == {}
    assert [*found] == ["credentials", "regions", "spot role", "image", "start", "rung 0", "rung 1", "rung 2", "rung 3"]
    assert "arn:aws:" in found["credentials"][0].text
    assert "neither" not in found["start"][0].text and ROLE in found["start"][0].text
    assert aws.instances("pending", "running") == [], "a dry run starts nothing"


def test_without_a_job_only_the_credentials_are_looked_at(aws: Aws) -> None:
    assert [*look(aws, None)] == ["credentials"]


def test_without_credentials_nothing_else_is_asked(aws: Aws, job: Job) -> None:
    found = [*account(Cloud(aws.session(credentials=False)), job, aws.clock.now())]
    assert [(one.check, one.level) for one in found] == [("credentials", FAIL)]
    assert "--http-put-response-hop-limit 2" in found[0].hint


Change = Callable[[Aws, Job], Job]


def fails(operation: str, code: str) -> Change:
    def change(aws: Aws, job: Job) -> Job:
        aws.fail[operation] = [code]
        return job

    return change


def without_role(aws: Aws, job: Job) -> Job:
    iam = aws.client(service="iam")
    iam.remove_role_from_instance_profile(InstanceProfileName="trainer", RoleName="trainer")
    return job


def quota(code: str) -> Change:
    def change(aws: Aws, job: Job) -> Job:
        aws.quotas[code] = 64
        return job

    return change


def no_p4d(aws: Aws, job: Job) -> Job:
    del aws.spot[P4D]
    return job


TROUBLE: dict[str, tuple[Change, dict[str, tuple[str, str]]]] = {
    "expired": (fails("GetCallerIdentity", "ExpiredToken"), {"credentials": (FAIL, "aws sso login")}),
    "unknown region": (
        lambda aws, job: dataclasses.replace(job, region="us-east-3", image_id="resolve:ssm:/x"),
        {"regions": (FAIL, "did you mean us-east-1?")},
    ),
    "no service-linked role": (
        fails("GetRole", "NoSuchEntity"),
        {"spot role": (WARN, "aws iam create-service-linked-role --aws-service-name spot.amazonaws.com")},
    ),
    "may not look at roles": (fails("GetRole", "AccessDenied"), {"spot role": (WARN, "allow iam:GetRole")}),
    "no instance profile": (
        lambda aws, job: dataclasses.replace(job, instance_profile="arn:aws:iam::123456789012:instance-profile/lost"),
        {"role": (FAIL, "aws iam list-instance-profiles")},
    ),
    "a profile without a role": (without_role, {"role": (FAIL, "aws iam add-role-to-instance-profile")}),
    "may not start": (fails("RunInstances", "UnauthorizedOperation"), {"start": (FAIL, "allow ec2:RunInstances")}),
    "throttled": (fails("RunInstances", "RequestLimitExceeded"), {"start": (WARN, "later")}),
    "no such key": (
        fails("RunInstances", "InvalidKeyPair.NotFound"),
        {"start": (FAIL, "aws ec2 describe-key-pairs --region us-east-1")},
    ),
    "no image in one region": (
        lambda aws, job: dataclasses.replace(job, image_id={**_images(job), "us-west-2": "ami-12345678"}),
        {"image": (FAIL, "resolve:ssm:")},
    ),
    "may not read quotas": (
        fails("ListServiceQuotas", "AccessDeniedException"),
        {"quotas": (WARN, "servicequotas:ListServiceQuotas")},
    ),
    "spot quota": (
        quota("L-7212CCBC"),
        {"rung 0": (FAIL, "--quota-code L-7212CCBC --desired-value 96"), "rung 1": (FAIL, "L-7212CCBC")},
    ),
    "on-demand quota": (quota("L-417A185B"), {"rung 3": (FAIL, "L-417A185B")}),
    "no capacity": (no_p4d, {"rung 0": (FAIL, "hf-spot prices p4d.24xlarge"), "rung 1": (FAIL, "hf-spot prices")}),
    "prices can't be read": (
        lambda aws, job: (fails("DescribeSpotPriceHistory", "RequestLimitExceeded"))(
            aws, dataclasses.replace(job, ladder=LADDER[:1])
        ),
        {"rung 0": (WARN, "later")},
    ),
}


def _images(job: Job) -> Any:
    return job.image_id


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_is_found_with_its_repair(aws: Aws, job: Job, name: str) -> None:
    change, expected = TROUBLE[name]
    found = bad(look(aws, change(aws, job)))
    assert {check: one.level for check, one in found.items()} == {check: level for check, (level, _) in expected.items()}
    for check, (_, words) in expected.items():
        assert words in found[check].hint, check


@contextlib.contextmanager
def heard(cloud: Cloud, event: str, handler: Callable[..., Any]) -> Iterator[None]:
    """Calls ``handler`` at an event of botocore in the job's region."""
    events = cloud.client("ec2", "us-east-1").meta.events
    events.register_first(event, handler)
    yield
    events.unregister(event, handler)  # clients are shared


def test_a_role_that_may_not_be_passed_on_is_named(aws: Aws, job: Job) -> None:
    said = {"Code": "UnauthorizedOperation", "Message": f"is not authorized to perform: iam:PassRole on resource: {ROLE}"}

    def refuse(**kwargs: Any) -> Any:
        return AWSResponse("http://canned", 403, {}, None), {"Error": said, "ResponseMetadata": {}}

    cloud = Cloud(aws.session())
    with heard(cloud, "before-call.ec2.RunInstances", refuse):
        found = {one.check: one for one in account(cloud, job, aws.clock.now())}
    assert found["start"].level == FAIL
    assert f"allow iam:PassRole on {ROLE}" in found["start"].hint


def test_no_price_history_means_no_capacity(aws: Aws, job: Job) -> None:
    del aws.spot[P4D]
    assert "would wait in pending-evaluation" in bad(look(aws, job))["rung 0"].text


def test_a_ladder_of_which_nothing_is_left_fails_as_a_whole(aws: Aws, job: Job) -> None:
    aws.quotas = {"L-7212CCBC": 0, "L-417A185B": 0, "L-3819A6DF": 0}
    assert bad(look(aws, job))["ladder"].level == FAIL
    aws.quotas = {"L-7212CCBC": 0, "L-417A185B": 0}
    assert "ladder" not in look(aws, job)


def test_a_region_with_quota_but_without_capacity_does_not_count(aws: Aws, job: Job) -> None:
    """Quotas allow it where there is none, and there is some where quotas do not allow it."""
    wide = Rung((P4D, G5), SPOT, ("us-east-1",))
    aws.quotas = {"L-7212CCBC": 0}
    del aws.spot[G5]
    found = look(aws, dataclasses.replace(job, ladder=(wide,)))
    assert [one.level for one in found["rung 0"]] == [WARN, FAIL]
    assert "ladder" in found


def test_prices_of_long_ago_do_not_count(aws: Aws, job: Job) -> None:
    asked: list[dict[str, Any]] = []
    cloud = Cloud(aws.session())
    with heard(cloud, "provide-client-params.ec2.DescribeSpotPriceHistory", lambda params, **kwargs: asked.append(params)):
        [*account(cloud, job, aws.clock.now())]
    assert asked and all(aws.clock.now() - one["StartTime"] == timedelta(days=1) for one in asked)


def test_the_command_checks_the_account_for_a_job(
    aws: Aws, job: Job, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its store, too: for that a job file is enough."""
    monkeypatch.setattr("hf_spot.doctor.store.SIZES_BYTES", (1 << 16,))
    monkeypatch.setattr(ec2, "Cloud", lambda: Cloud(aws.session()))
    assert not isinstance(job.image_id, str)
    path = tmp_path / "job.yaml"
    path.write_text(
        f"name: llama\nstore: {s3_url}\nrun: hf-spot launch train.py\nregion: us-east-1\nmax_spend: 5\n"
        f"instance_profile: trainer\nimage_id: {job.image_id['us-east-1']}\n"
        f"ladder: [{{instance_types: [{P4D}]}}]\n"
    )
    assert main(["doctor", "--job", str(path), "--json", "--checkpoint-gb", "0.001"]) == 0
    found = {one["check"]: one for one in json.loads(capsys.readouterr().out)}
    assert {"list", "conditional", "disk", "credentials", "start", "rung 0"} <= set(found)
    assert "your notice is 120 s (EC2)" in found["bandwidth"]["text"]


def test_one_failure_in_many_regions_is_one_finding() -> None:
    errors = {
        f"us-east-{number}": CloudError(f"DescribeImages in us-east-{number}: no such image", hint="look")
        for number in range(38)
    }
    errors["eu-west-1"] = CloudError("no answer")
    found = [*_grouped("image", errors)]
    assert [(one.level, one.hint) for one in found] == [(FAIL, "look"), (FAIL, "")]
    assert found[0].text.startswith("DescribeImages in us-east-0: no such image (the same in 37 more: us-east-1, us-east-2, ")
    assert found[1].text == "no answer"
