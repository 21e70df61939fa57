"""What the error codes of EC2, S3 and the SDK mean, and what to do: the same words wherever a code appears. Pure.

Codes, not texts, are matched: https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html
"""

from __future__ import annotations

from hf_spot.errors import CloudError

NEXT_RUNG = frozenset(
    {
        "InsufficientInstanceCapacity",
        "InsufficientHostCapacity",
        "InsufficientFreeAddressesInSubnet",
        "InvalidFleetConfiguration",
        "MaxFleetCountExceeded",
        "MaxSpotInstanceCountExceeded",
        "ReservationCapacityExceeded",
        "SpotMaxPriceTooLow",
        "UnfulfillableCapacity",
        "Unsupported",
        "VcpuLimitExceeded",
        # What a spot request says instead:
        # https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-request-status.html
        "az-group-constraint",
        "capacity-not-available",
        "constraint-not-fulfillable",
        "limit-exceeded",
        "pending-evaluation",
        "price-too-low",
    }
)
"""Another pool, or another rung, may answer differently."""

LATER = frozenset(
    {
        "InternalError",
        "RequestLimitExceeded",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "Unavailable",
    }
)
"""The same call may work later."""

_QUOTAS = "hf-spot quotas job.yaml"
_MEANINGS = {
    "AuthFailure.ServiceLinkedRoleCreationNotPermitted": (
        "the account has no service-linked role for spot instances, and you may not create it",
        "aws iam create-service-linked-role --aws-service-name spot.amazonaws.com",
    ),
    "MaxSpotInstanceCountExceeded": ("the account's spot quota is used up, or 0", _QUOTAS),
    "limit-exceeded": ("the account's spot quota is used up, or 0", _QUOTAS),
    "VcpuLimitExceeded": ("the account's on-demand quota is used up, or 0", _QUOTAS),
    "InsufficientInstanceCapacity": ("EC2 has no such machine there now", "other types or regions in the ladder, or --watch"),
    "UnfulfillableCapacity": ("EC2 has no such machine there now", "other types or regions in the ladder, or --watch"),
    "capacity-not-available": ("EC2 has no such machine there now", "other types or regions in the ladder, or --watch"),
    "pending-evaluation": (
        "the request was not even evaluated; where the price history is empty, there is no capacity",
        "hf-spot prices TYPE",
    ),
    "SpotMaxPriceTooLow": ("the price is above the rung's max_price", "a higher max_price, or none"),
    "price-too-low": ("the price is above the rung's max_price", "a higher max_price, or none"),
    "Unsupported": ("this zone does not have the instance type", "another zone's subnet, or another region"),
    "InvalidFleetConfiguration": ("this zone does not have the instance type", "another zone's subnet, or another region"),
    "InsufficientFreeAddressesInSubnet": ("the subnet has no free address", "another subnet"),
    "InvalidAMIID.NotFound": (
        "the image does not exist in this region",
        "image_id: resolve:ssm:…, or one image per region: image_id: {us-east-1: ami-…}",
    ),
    "InvalidAMIID.Malformed": ("this is no image's id", "image_id: resolve:ssm:…"),
    "ParameterNotFound": ("the SSM parameter of the image does not exist in this region", "aws ssm get-parameter --name NAME"),
    "InvalidSubnetID.NotFound": ("the subnet does not exist in this region", "aws ec2 describe-subnets --region REGION"),
    "InvalidGroup.NotFound": (
        "the security group does not exist in this region",
        "aws ec2 describe-security-groups --region REGION",
    ),
    "InvalidKeyPair.NotFound": ("the key pair does not exist in this region", "aws ec2 describe-key-pairs --region REGION"),
    "UnauthorizedOperation": ("your credentials do not allow this", "hf-spot doctor"),
    "AccessDenied": ("your credentials do not allow this", "hf-spot doctor"),
    "AccessDeniedException": ("your credentials do not allow this", "hf-spot doctor"),
    "AuthFailure": ("the credentials are wrong, or the region is not enabled for the account", "aws sts get-caller-identity"),
    "InvalidClientTokenId": ("the access key does not exist", "aws sts get-caller-identity"),
    "SignatureDoesNotMatch": ("the secret key does not belong to the access key", "aws configure"),
    "OptInRequired": ("the account is not enabled for this region or service", "aws account list-regions"),
    "DryRunOperation": ("permitted; it proves neither capacity nor quota", "hf-spot quotas job.yaml"),
    "ExpiredToken": ("the session has expired", "aws sso login, or new keys"),
    "ExpiredTokenException": ("the session has expired", "aws sso login, or new keys"),
    "RequestExpired": ("the session has expired, or the clock is wrong", "date -u"),
    "RequestTimeTooSkewed": ("this machine's clock is wrong", "timedatectl set-ntp true"),
    "RequestLimitExceeded": ("too many requests; AWS throttles the account", "try again in a minute"),
    "SlowDown": ("too many requests; S3 throttles the prefix", "try again in a minute"),
    "PermanentRedirect": ("the bucket is in another region", "AWS_REGION=the bucket's region"),
    "NoCredentials": (
        "no AWS credentials were found",
        "aws configure, AWS_PROFILE, or a role; in a container on EC2, the metadata hop limit must be 2",
    ),
    "NoRegion": ("no AWS region is set", "export AWS_REGION=us-east-1"),
}


def explain(code: str, message: str = "", *, doing: str = "") -> CloudError:
    """The error for a code, with what to do about it.

    Args:
        code: as the service spells it, or ``NoCredentials`` or ``NoRegion``.
        message: what the service said.
        doing: what was tried, such as ``CreateFleet in us-east-1``.
    """
    what, hint = _MEANINGS.get(code, (message or "no reason was given", ""))
    if code in ("UnauthorizedOperation", "AccessDenied", "AccessDeniedException") and "iam:PassRole" in message:
        what, hint = (
            "you may not give the instance its role (iam:PassRole)",
            "allow iam:PassRole on the role of instance_profile, or ask whoever administers the account",
        )
    said = f" ({message})" if message and message != what else ""
    return CloudError(f"{doing}{': ' if doing else ''}{what}: {code}{said}", hint=hint, code=code)
