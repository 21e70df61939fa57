"""`hf-spot doctor` on an AWS account: checks that cost nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from hf_spot.aws_errors import Kind, explain
from hf_spot.cloud.ec2 import Cloud
from hf_spot.cloud.job import SPOT, Job, Rung
from hf_spot.cloud.quotas import Need, needs
from hf_spot.doctor.finding import FAIL, OK, WARN, Finding
from hf_spot.errors import CloudError, SpotError

_SPOT_ROLE = "AWSServiceRoleForEC2Spot"
_NO_ROLE = "AuthFailure.ServiceLinkedRoleCreationNotPermitted"
_HISTORY = timedelta(days=1)


def account(cloud: Cloud, job: Job | None, now: datetime) -> Iterator[Finding]:
    """Check credentials and, for a job, regions, roles, the permission to start, images, quotas and capacity.

    Args:
        cloud: the account's EC2.
        job: the job to run there, or None.
        now: the current time.
    """
    home = job.region if job else None
    try:
        who = cloud.call("sts", home, "get_caller_identity")
    except CloudError as error:
        yield _failed("credentials", error)
        return
    yield Finding(OK, "credentials", f"{who['Arn']}")
    if job is None:
        return
    try:
        known = cloud.regions(home)
        cloud.check_regions(job.named_regions(), known)
    except SpotError as error:
        yield _failed("regions", error)
        return
    regions = list(dict.fromkeys(region for rung in job.ladder for region in job.regions_of(rung, known)))
    yield Finding(OK, "regions", f"{len(regions)} usable: {', '.join(regions)}")
    if any(rung.market == SPOT for rung in job.ladder):
        yield _spot_role(cloud, job)
    images, problems = _images(cloud, job, regions)
    yield from problems
    if job.region in images:
        yield from _start(cloud, job, images[job.region])
    yield from _ladder(cloud, job, known, now)


def _spot_role(cloud: Cloud, job: Job) -> Finding:
    try:
        cloud.call("iam", job.region, "get_role", RoleName=_SPOT_ROLE)
    except CloudError as error:
        missing = explain(_NO_ROLE)
        if error.code in ("NoSuchEntity", "NoSuchEntityException"):
            found = (
                f"the account has no {_SPOT_ROLE}: EC2 creates it at the first spot request of an identity that may create it"
            )
            return Finding(WARN, "spot role", found, missing.hint)
        return Finding(WARN, "spot role", f"can't check whether the account has {_SPOT_ROLE}: {error.args[0]}", error.hint)
    return Finding(OK, "spot role", f"the account has {_SPOT_ROLE}")


def _images(cloud: Cloud, job: Job, regions: Sequence[str]) -> tuple[dict[str, str], list[Finding]]:
    """Return the image of each region that has one, and the findings."""

    def ask(region: str) -> str | SpotError:
        try:
            return cloud.image(region, job.site(region).image_id).id
        except SpotError as error:
            return error

    answers = dict(zip(regions, cloud.each(regions, ask), strict=True))
    images = {region: found for region, found in answers.items() if isinstance(found, str)}
    findings = [*_grouped("image", {region: found for region, found in answers.items() if isinstance(found, SpotError)})]
    if images:
        findings.insert(0, Finding(OK, "image", f"available in {', '.join(images)}"))
    return images, findings


def _grouped(check: str, errors: Mapping[str, SpotError]) -> Iterator[Finding]:
    """Yield one finding for all regions in which the same failed; the hint is for the first of them."""
    groups: dict[str, dict[str, SpotError]] = {}
    for region, error in errors.items():
        groups.setdefault(str(error.args[0]).replace(region, "REGION"), {})[region] = error
    for alike in groups.values():
        first, error = next(iter(alike.items()))
        text = str(error.args[0])
        others = [region for region in alike if region != first]
        more = f" (the same in {len(others)} more: {', '.join(others)})" if others else ""
        yield Finding(FAIL, check, f"{text}{more}", error.hint)


def _start(cloud: Cloud, job: Job, image: str) -> Iterator[Finding]:
    """Check with a dry run whether an instance with this role, key and network may be started."""
    role = ""
    if job.instance_profile:
        found = _role(cloud, job, job.instance_profile)
        if isinstance(found, Finding):
            yield found
            if found.level == FAIL:
                return
        else:
            role = found
    try:
        cloud.call("ec2", job.region, "run_instances", **_request(job, image))
        raise AssertionError("unreachable: a dry run always ends in an error")
    except CloudError as error:
        answer = error
    known = {"role": role} if role else {}
    meaning = explain(
        answer.code, 0, str(answer.args[0]), region=job.region, permission="ec2:RunInstances", resource="*", **known
    )
    what = f"starting {job.ladder[0].instance_types[0]} in {job.region}" + (f" as {role}" if role else "")
    if meaning.kind is Kind.GRANTED:
        yield Finding(OK, "start", f"{what}: {meaning.means}")
    elif meaning.kind in (Kind.CAPACITY, Kind.QUOTA, Kind.BUSY):
        yield Finding(WARN, "start", str(answer.args[0]), answer.hint)
    else:
        yield Finding(FAIL, "start", f"{what}: {meaning.means}: {answer.code}", meaning.hint)


def _role(cloud: Cloud, job: Job, profile: str) -> str | Finding:
    """Return the ARN of the role in an instance profile, or a finding if there is none."""
    name = profile.rpartition("/")[2]
    try:
        found = cloud.call("iam", job.region, "get_instance_profile", InstanceProfileName=name)
    except CloudError as error:
        if error.code == "NoSuchEntity":
            return Finding(FAIL, "role", explain(error.code, role=f"an instance profile {name}").means, error.hint)
        return Finding(WARN, "role", str(error.args[0]), error.hint)
    roles = found["InstanceProfile"]["Roles"]
    if roles:
        return str(roles[0]["Arn"])
    repair = f"aws iam add-role-to-instance-profile --instance-profile-name {name} --role-name ROLE"
    return Finding(FAIL, "role", f"the instance profile {name} has no role", repair)


def _request(job: Job, image: str) -> dict[str, Any]:
    site = job.site(job.region)
    request: dict[str, Any] = {
        "DryRun": True,
        "MinCount": 1,
        "MaxCount": 1,
        "ImageId": image,
        "InstanceType": job.ladder[0].instance_types[0],
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
    }
    if job.ladder[0].market == SPOT:
        request["InstanceMarketOptions"] = {"MarketType": "spot"}
    if job.instance_profile:
        kind = "Arn" if job.instance_profile.startswith("arn:") else "Name"
        request["IamInstanceProfile"] = {kind: job.instance_profile}
    if site.key_name:
        request["KeyName"] = site.key_name
    if site.security_groups:
        request["SecurityGroupIds"] = [*site.security_groups]
    if site.subnets:
        request["SubnetId"] = site.subnets[0]
    return request


def _ladder(cloud: Cloud, job: Job, known: Sequence[str], now: datetime) -> Iterator[Finding]:
    """Check each rung against the quotas and AWS's capacity."""
    found: list[Need] = []
    try:
        found = needs(cloud, job, known)
    except CloudError as error:
        yield Finding(WARN, "quotas", f"can't be read: {error.args[0]}", error.hint)
    usable = not found
    for index, rung in enumerate(job.ladder):
        name = f"rung {index}"
        mine = [need for need in found if need.rung == index]
        if mine:
            finding = _quota(name, rung, mine)
            yield finding
            if finding.level == FAIL:
                continue
        regions = job.regions_of(rung, known)
        if rung.market == SPOT and regions:
            free = {(need.region, need.instance_type) for need in mine if not need.blocked}
            finding = _capacity(cloud, name, rung, regions, free if mine else None, now)
            yield finding
            if finding.level == FAIL:
                continue
        usable = True
    if not usable:
        yield Finding(
            FAIL, "ladder", "no rung can get a machine", "hf-spot quotas job.yaml, or add types, regions or rungs to the ladder"
        )


def _quota(name: str, rung: Rung, mine: Sequence[Need]) -> Finding:
    offered = [need for need in mine if need.vcpus is not None]
    what = f"{rung.market} {', '.join(rung.instance_types)}"
    if not offered:
        return Finding(
            FAIL,
            name,
            f"{what}: {explain('Unsupported').means.replace('zone', 'region')}",
            f"hf-spot prices {rung.instance_types[0]}",
        )
    blocked = [need for need in offered if need.blocked]
    if not blocked:
        return Finding(OK, name, f"{what}: quotas allow it in {_regions(offered)}")
    first = blocked[0]
    assert first.quota is not None
    code = "MaxSpotInstanceCountExceeded" if rung.market == SPOT else "VcpuLimitExceeded"
    short = f"{first.instance_type} needs {first.vcpus} vCPUs, and {first.quota.name!r} ({first.quota.code}) allows "
    short += f"{first.quota.vcpus:g} in {_regions(blocked)}"
    if len(blocked) == len(offered):
        return Finding(FAIL, name, f"{what}: {short}: {code}", first.command)
    free = [need for need in offered if not need.blocked]
    return Finding(WARN, name, f"{what}: quotas allow it in {_regions(free)}; {short}", first.command)


def _capacity(
    cloud: Cloud, name: str, rung: Rung, regions: Sequence[str], free: set[tuple[str, str]] | None, now: datetime
) -> Finding:
    """Check whether AWS has had such machines lately: a zone with capacity has a spot price."""
    types = rung.instance_types
    try:
        prices = cloud.each(regions, lambda region: cloud.spot_prices(region, types, now - _HISTORY, now))
    except CloudError as error:
        return Finding(WARN, name, f"prices can't be read: {error.args[0]}", error.hint)
    offered = [
        (region, zone)
        for region, found in zip(regions, prices, strict=True)
        for kind, zone in found
        if free is None or (region, kind) in free
    ]
    if not offered:
        nothing = explain("pending-evaluation", instance_type=types[0])
        return Finding(FAIL, name, f"{', '.join(types)} in {', '.join(regions)}: {nothing.means}", nothing.hint)
    return Finding(OK, name, f"has a spot price in {', '.join(sorted({zone for _, zone in offered}))}")


def _regions(found: Sequence[Need]) -> str:
    return ", ".join(dict.fromkeys(need.region for need in found))


def _failed(check: str, error: SpotError) -> Finding:
    return Finding(FAIL, check, str(error.args[0]), error.hint)
