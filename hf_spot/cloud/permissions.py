"""The minimal IAM policy of whoever provisions a job: looks, starts what gets the run's tag, and ends what has it. Pure.

The role of the machines themselves needs only the run's objects (`hf_spot.storage.iam`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from hf_spot.cloud.ec2 import RUN_TAG, tag_value
from hf_spot.cloud.fleet_size import CLUSTER
from hf_spot.cloud.job import SPOT, Job
from hf_spot.storage import iam

LOOK = (
    "ec2:DescribeRegions",
    "ec2:DescribeImages",
    "ec2:DescribeSubnets",
    "ec2:DescribeSecurityGroups",
    "ec2:DescribeInstanceTypeOfferings",
    "ec2:DescribeInstanceTypes",
    "ec2:DescribeInstances",
    "ec2:DescribeSpotInstanceRequests",
    "ec2:DescribeSpotPriceHistory",
    "ec2:DescribeLaunchTemplates",
    "ec2:GetSpotPlacementScores",
    "pricing:GetProducts",
    "servicequotas:ListAWSDefaultServiceQuotas",
    "servicequotas:ListServiceQuotas",
)
# What EC2 creates by these actions, always with tags, and what they only use. An image has no account in its name.
MADE = ("fleet", "instance", "launch-template", "volume")
USED = (
    "image",
    "key-pair",
    "launch-template",
    "network-interface",
    "placement-group",
    "security-group",
    "snapshot",
    "subnet",
)
START = ("ec2:CreateFleet", "ec2:CreateLaunchTemplate", "ec2:RunInstances")
END = ("ec2:TerminateInstances", "ec2:DeleteLaunchTemplate")
GROUPS = ("ec2:CreateSecurityGroup",)
OWN_GROUPS = ("ec2:AuthorizeSecurityGroupIngress", "ec2:AuthorizeSecurityGroupEgress", "ec2:DeleteSecurityGroup")


def policy(job: Job, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return an IAM policy document (version 2012-10-17) for ``hf-spot provision``, ``status`` and ``terminate`` of a job.

    Args:
        job: the job.
        environ: may have ``$AWS_PARTITION``, and the KMS key of the store.

    Raises:
        ConfigError: the KMS key is not given by its ARN.
    """
    partition = environ.get("AWS_PARTITION", "aws")
    run = tag_value(job.store)
    own = {"StringEquals": {f"aws:ResourceTag/{RUN_TAG}": run}}
    is_fleet, is_placed = job.size.is_fleet, job.size.is_fleet and job.placement == CLUSTER
    images = [job.image_id] if isinstance(job.image_id, str) else [*job.image_id.values()]
    look = [
        *LOOK,
        *(["ec2:DescribeKeyPairs"] if job.key_name else []),
        *(["ssm:GetParameter"] if any(one.startswith("resolve:ssm:") for one in images) else []),
        *(["ec2:DescribePlacementGroups"] if is_fleet else []),
    ]
    start = [*START, *(GROUPS if is_fleet else ()), *(["ec2:CreatePlacementGroup"] if is_placed else [])]
    end = [*END, *(OWN_GROUPS if is_fleet else ()), *(["ec2:DeletePlacementGroup"] if is_fleet else [])]
    made = [*MADE, *(["security-group"] if is_fleet else []), *(["placement-group"] if is_placed else [])]
    tagged = {"StringEquals": {f"aws:RequestTag/{RUN_TAG}": run}}

    def each(kinds: Iterable[str]) -> list[str]:
        return [f"arn:{partition}:ec2:*:*:{kind}/*" for kind in sorted(kinds)]

    creating = [name.partition(":")[2] for name in start]
    statements: list[dict[str, Any]] = [
        {"Sid": "Look", "Effect": "Allow", "Action": sorted(look), "Resource": "*"},
        {"Sid": "Start", "Effect": "Allow", "Action": sorted(start), "Resource": each(made), "Condition": tagged},
        {"Sid": "StartFrom", "Effect": "Allow", "Action": ["ec2:CreateFleet", "ec2:RunInstances"], "Resource": each(USED)},
        # EC2 asks this of the fleet; the machines themselves are started by RunInstances, which must tag them.
        {"Sid": "FleetOf", "Effect": "Allow", "Action": ["ec2:CreateFleet"], "Resource": each(("instance", "volume"))},
        {
            "Sid": "TagWhatIsStarted",
            "Effect": "Allow",
            "Action": ["ec2:CreateTags"],
            "Resource": "*",
            "Condition": {"StringEquals": {"ec2:CreateAction": sorted(creating)}},
        },
        {"Sid": "TagOwn", "Effect": "Allow", "Action": ["ec2:CreateTags"], "Resource": "*", "Condition": own},
        {"Sid": "EndOwn", "Effect": "Allow", "Action": sorted(end), "Resource": "*", "Condition": own},
    ]
    if is_fleet:
        statements.append({"Sid": "GroupsIn", "Effect": "Allow", "Action": [*GROUPS], "Resource": each(("vpc",))})
    if job.instance_profile:
        name = job.instance_profile.rpartition("/")[2]
        statements.append(
            {
                "Sid": "GiveTheMachinesTheirRole",
                "Effect": "Allow",
                "Action": ["iam:PassRole"],
                "Resource": f"arn:{partition}:iam::*:role/{name}",
                "Condition": {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}},
            }
        )
    if any(rung.market == SPOT for rung in job.ladder):
        statements.append(
            {
                "Sid": "FirstSpotRequestOfTheAccount",
                "Effect": "Allow",
                "Action": ["iam:CreateServiceLinkedRole"],
                "Resource": f"arn:{partition}:iam::*:role/aws-service-role/spot.amazonaws.com/*",
                "Condition": {"StringEquals": {"iam:AWSServiceName": "spot.amazonaws.com"}},
            }
        )
    if job.store.startswith("s3://"):
        statements += iam.policy(job.store, environ)["Statement"]
    return {"Version": "2012-10-17", "Statement": statements}
