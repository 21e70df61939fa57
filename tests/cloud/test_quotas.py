"""Which quota counts which instance type, and which rung it blocks."""

from __future__ import annotations

import pytest

from hf_spot.cloud.ec2 import Cloud
from hf_spot.cloud.job import ON_DEMAND, SPOT, Job, Rung
from hf_spot.cloud.quotas import Quota, needs, quota_for, render
from tests.cloud.aws import QUOTAS, Aws

KNOWN = [Quota(code, name, 0) for code, name in QUOTAS]


@pytest.mark.parametrize(
    ("kind", "market", "code"),
    [
        ("p4d.24xlarge", SPOT, "L-7212CCBC"),
        ("p3.16xlarge", SPOT, "L-7212CCBC"),
        ("p5.48xlarge", SPOT, "L-C4BD4855"),
        ("g5.48xlarge", SPOT, "L-3819A6DF"),
        ("vt1.24xlarge", SPOT, "L-3819A6DF"),
        ("m7i.large", SPOT, "L-34B43A08"),
        ("c6gn.large", SPOT, "L-34B43A08"),
        ("p4d.24xlarge", ON_DEMAND, "L-417A185B"),
        ("p5.48xlarge", ON_DEMAND, "L-417A185B"),
        ("g6.xlarge", ON_DEMAND, "L-DB2E81BA"),
        ("t3.micro", ON_DEMAND, "L-1216C47A"),
        ("trn1.32xlarge", SPOT, None),
    ],
)
def test_quotas_are_found_by_their_names(kind: str, market: str, code: str | None) -> None:
    found = quota_for(kind, market, KNOWN)
    assert (found.code if found else None) == code


def test_a_rung_that_is_blocked_comes_with_the_command_that_asks_for_more(aws: Aws) -> None:
    aws.quotas = {"L-7212CCBC": 64, "L-417A185B": 96}
    job = Job(
        name="x",
        store="/mnt/run",
        run="hf-spot launch train.py",
        region="us-east-1",
        max_spend=10,
        ladder=(Rung(("p4d.24xlarge", "g5.48xlarge")), Rung(("p4d.24xlarge",), ON_DEMAND), Rung(("p3dn.24xlarge",), SPOT)),
    )
    found = needs(Cloud(aws.session()), job, ["us-east-1"])
    assert [(need.rung, need.instance_type, need.vcpus, need.blocked) for need in found] == [
        (0, "p4d.24xlarge", 96, True),
        (0, "g5.48xlarge", 192, False),
        (1, "p4d.24xlarge", 96, False),
        (2, "p3dn.24xlarge", 96, True),
    ]
    said = render(found, job)
    assert "rung 0: spot p4d.24xlarge, g5.48xlarge: partly blocked" in said
    assert "rung 1: on-demand p4d.24xlarge: ok" in said
    assert "needs   96 vCPUs, has 64 of L-7212CCBC (All P4, P3 and P2 Spot Instance Requests)" in said
    command = "aws service-quotas request-service-quota-increase --service-code ec2 --region us-east-1"
    assert said.count(f"Try: {command} --quota-code L-7212CCBC --desired-value 96") == 1


def test_where_the_account_has_no_value_of_its_own_awss_default_counts(aws: Aws) -> None:
    cloud = Cloud(aws.session())
    own = cloud.pages

    def without_p(service: str, region: str | None, operation: str, key: str, **asked: object) -> object:
        return [
            one
            for one in own(service, region, operation, key, **asked)
            if operation != "list_service_quotas" or one["QuotaCode"] != "L-7212CCBC"
        ]

    cloud.pages = without_p  # type: ignore[assignment]
    ladder = (Rung(("p4d.24xlarge",)),)
    job = Job(name="x", store="/mnt/run", run="hf-spot launch t.py", region="us-east-1", max_spend=1, ladder=ladder)
    assert needs(cloud, job, ["us-east-1"])[0].blocked
