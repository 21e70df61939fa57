"""Whether a policy permits what EC2 asks for: by action, resource and condition, for each resource of a call.

moto's enforcement knows actions alone: of EC2's calls it asks with the resource ``*``, and without the tags that conditions are
about; a condition whose key it is not given counts as met, and one that is not met denies, also where another statement allows.
So its statements match actions and resources here, and conditions are met as IAM's documentation says: all of them, and not
without a value.
https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_elements_condition_operators.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moto.iam.access_control import IAMPolicyStatement, PermissionResult

RUN = ("image", "key-pair", "network-interface", "placement-group", "security-group", "subnet")


@dataclass(frozen=True)
class Need:
    """What a call needs.

    Args:
        action: such as ``ec2:RunInstances``.
        resource: its ARN, or ``*``.
        context: values by condition key.
    """

    action: str
    resource: str = "*"
    context: Mapping[str, str] = field(default_factory=dict)


def is_permitted(policy: Mapping[str, Any], need: Need) -> bool:
    """By a statement that allows it, and none that denies it."""
    found = [one["Effect"] for one in policy["Statement"] if _concerns(one, need) and _is_met(one.get("Condition", {}), need)]
    return "Allow" in found and "Deny" not in found


def _concerns(statement: Mapping[str, Any], need: Need) -> bool:
    plain = {name: value for name, value in statement.items() if name != "Condition"}
    return IAMPolicyStatement(plain).is_action_permitted(need.action, need.resource) is not PermissionResult.NEUTRAL


def _is_met(conditions: Mapping[str, Mapping[str, Any]], need: Need) -> bool:
    for operator, keys in conditions.items():
        assert operator == "StringEquals", f"teach this file {operator}"
        for key, wanted in keys.items():
            if need.context.get(key) not in ([wanted] if isinstance(wanted, str) else wanted):
                return False
    return True


def needs(
    action: str,
    asked: Mapping[str, Any],
    template: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    tags_of: Callable[[str], Mapping[str, str]],
    account: str,
) -> Iterator[Need]:
    """What a call of EC2 needs, by the Service Authorization Reference.

    Args:
        action: such as ``CreateFleet``.
        asked: its parameters.
        template: gives the launch data that a launch template's specification names.
        tags_of: gives the tags of a resource by its id.
        account: of the caller.
    """
    name = f"ec2:{action}"
    if action == "CreateFleet":
        yield from _made(name, "fleet", asked, account)
        for config in asked["LaunchTemplateConfigs"]:
            data = template(config["LaunchTemplateSpecification"])
            yield from (Need(name, _arn(kind, account)) for kind in (*RUN, "instance", "launch-template", "volume"))
            yield from (Need("ec2:RunInstances", _arn(kind, account)) for kind in (*RUN, "launch-template"))
            for kind in ("instance", "volume"):
                yield from _made("ec2:RunInstances", kind, data, account)
            if profile := data.get("IamInstanceProfile"):
                role = f"arn:aws:iam::{account}:role/{(profile.get('Name') or profile['Arn']).rpartition('/')[2]}"
                yield Need("iam:PassRole", role, {"iam:PassedToService": "ec2.amazonaws.com"})
    elif action == "CreateLaunchTemplate":
        yield from _made(name, "launch-template", asked, account)
    elif action == "CreateSecurityGroup":
        yield from _made(name, "security-group", asked, account)
        yield Need(name, _arn("vpc", account))
    elif action == "CreatePlacementGroup":
        yield from _made(name, "placement-group", asked, account)
    elif ids := _ids(action, asked):
        for one in ids:
            yield Need(name, _arn("x", account, one), {f"aws:ResourceTag/{key}": value for key, value in tags_of(one).items()})
    else:
        yield Need(name)


def _made(action: str, kind: str, asked: Mapping[str, Any], account: str) -> Iterator[Need]:
    """To make something needs its tags in the call, and to tag needs that it is made."""
    found = [one["Tags"] for one in asked.get("TagSpecifications") or () if one["ResourceType"] == kind]
    tags = {f"aws:RequestTag/{tag['Key']}": tag["Value"] for tag in (found[0] if found else ())}
    yield Need(action, _arn(kind, account), tags)
    if tags:
        yield Need("ec2:CreateTags", _arn(kind, account), {**tags, "ec2:CreateAction": action.partition(":")[2]})


def _ids(action: str, asked: Mapping[str, Any]) -> Sequence[str]:
    if action == "TerminateInstances":
        return tuple(asked["InstanceIds"])
    if action == "CreateTags":
        return tuple(asked["Resources"])
    if action.startswith(("Delete", "Authorize")):
        return tuple(str(asked[key]) for key in ("LaunchTemplateId", "GroupId", "GroupName") if asked.get(key))[:1]
    return ()


def _arn(kind: str, account: str, name: str = "x") -> str:
    return f"arn:aws:ec2:us-east-1:{account}:{kind}/{name}"
