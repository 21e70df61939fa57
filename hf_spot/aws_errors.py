"""What the errors of AWS mean, and what to type next: the one table by which everything in hf_spot explains them.

Pure. Errors are told by their code, because texts differ between servers and versions. The names of botocore's exceptions
count as codes, too: those are for what went wrong before, or instead of, an answer. Sources: the error codes of EC2
(https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html), of S3
(https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html), and the states of spot requests
(https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-request-status.html).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

HOP_LIMIT = "aws ec2 modify-instance-metadata-options --http-put-response-hop-limit 2 --instance-id ID"
"""What lets a container on EC2 reach the metadata service."""
ELSEWHERE = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301", "307")
"""How S3 says that a bucket is in another region."""


class Kind(str, Enum):
    """What sort of trouble a code stands for."""

    GRANTED = "granted"  # a dry run that would have been carried out
    PERMISSION = "permission"  # the identity is known, and may not
    CREDENTIALS = "credentials"  # missing, wrong or expired
    SETTING = "setting"  # a value that can't be used there
    MISSING = "missing"  # what a request names does not exist
    BUSY = "busy"  # the same request may work later
    CAPACITY = "capacity"  # no such machine there now: another zone, region or type may have one
    QUOTA = "quota"  # the account may not have so many
    OTHER = "other"


@dataclass(frozen=True)
class Meaning:
    """What a code means.

    Args:
        kind: of trouble.
        means: in words.
        hint: the next command to type or setting to change; empty when there is none. Braces name what the caller of
            `explain` may know; what it does not know stays there in capitals.
    """

    kind: Kind
    means: str = ""
    hint: str = ""


def explain(code: str, status: int = 0, message: str = "", **known: str) -> Meaning:
    """What an error means; for a code that is not in the table, what its HTTP status says.

    Args:
        code: as the service sent it, or the name of botocore's exception; S3's answers to HEAD have the status for a code.
        status: of the HTTP response, 0 when not known.
        message: read for one thing only: whether a refusal to start a machine is about the role it would get.
        known: what stands for the names in braces: ``bucket``, ``region``, ``permission``, ``resource``, ``instance_type``,
            ``image``, ``role``.
    """
    filled = _Known(known)
    found = TABLE.get(code)
    if code == "UnauthorizedOperation" and "iam:PassRole" in message:
        found = _PASS_ROLE
    if found is None:
        number = int(code) if code.isdigit() else status
        if code.startswith("KMS."):
            found = _KMS
        elif number >= 500 or number == 429:
            found = _IN_TROUBLE
        elif number == 403:
            found = TABLE["AccessDenied"]
        else:
            return Meaning(Kind.OTHER, message)
    return replace(found, means=found.means.format_map(filled), hint=found.hint.format_map(filled))


def code_of(error: BaseException | None) -> str:
    """The code of an exception of botocore (or of one that such an exception caused), without importing botocore; empty
    when it has none."""
    while error is not None:
        response: Any = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        for kind in type(error).__mro__:
            if kind.__name__ in TABLE and kind.__module__.partition(".")[0] in _LIBRARIES:
                return kind.__name__
        error = error.__cause__
    return ""


def message_of(error: BaseException | None) -> str:
    """What the service said beside the code."""
    while error is not None:
        response: Any = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Message", ""))
        error = error.__cause__
    return ""


_LIBRARIES = ("botocore", "s3transfer", "urllib3")


class _Known(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return name.upper()


_LATER = "the same call should work later"
_LOGIN = "aws sso login, or new ones in AWS_SESSION_TOKEN"
_CLOCK = "set the clock: timedatectl; sudo chronyc makestep"
_WHO = "aws sts get-caller-identity"
_QUOTAS = "hf-spot quotas job.yaml"
_WAIT = "hf-spot provision job.yaml --watch, which tries the whole ladder again; more types or regions in the ladder help most"

_EXPIRED = Meaning(Kind.CREDENTIALS, "the session has expired", _LOGIN)
_FORBIDDEN = Meaning(
    Kind.PERMISSION,
    "your credentials do not allow this",
    f"allow {{permission}} on {{resource}} for the role or user of: {_WHO}",
)
_KEY_UNKNOWN = Meaning(
    Kind.CREDENTIALS, "this access key is not known there", "aws configure list; is AWS_ENDPOINT_URL the right one?"
)
_SIGNATURE = Meaning(Kind.CREDENTIALS, "the secret key does not fit the access key", "aws configure")
_SKEWED = Meaning(Kind.CREDENTIALS, "this machine's clock is wrong", _CLOCK)
_TOKEN = Meaning(
    Kind.CREDENTIALS, "AWS_SESSION_TOKEN does not belong to this access key", "unset AWS_SESSION_TOKEN, or set all three anew"
)
_NO_BUCKET = Meaning(Kind.MISSING, "the bucket {bucket} does not exist", "check the bucket's name, or: aws s3 mb s3://{bucket}")
_ELSEWHERE = Meaning(
    Kind.SETTING,
    "the bucket is in another region",
    "set AWS_REGION to the answer of: aws s3api get-bucket-location --bucket {bucket}",
)
_THROTTLED = Meaning(Kind.BUSY, "too many requests: the service throttles them", _LATER)
_IN_TROUBLE = Meaning(Kind.BUSY, "the service is busy or in trouble", _LATER)
_DAMAGED = Meaning(Kind.BUSY, "the data was damaged or cut off on the way", _LATER)
_DECIDED = Meaning(Kind.BUSY, "another request for the same is just being decided", _LATER)
_REPLACED = Meaning(Kind.BUSY, "it was replaced meanwhile", _LATER)
_KMS = Meaning(
    Kind.PERMISSION,
    "encryption failed",
    "the bucket's KMS key, or $HF_SPOT_S3_SSE_KMS_KEY_ID: is it enabled, in this region, and allowed to you?",
)
_PASS_ROLE = Meaning(
    Kind.PERMISSION,
    "this identity may not give the instance its role",
    f"allow iam:PassRole on {{role}} for the role or user of: {_WHO}",
)
_LACKING = Meaning(
    Kind.CREDENTIALS,
    "no AWS credentials were found",
    f"aws configure; on EC2 attach an instance profile, and for a container raise the metadata hop limit: {HOP_LIMIT}",
)
_NOT_LOGGED_IN = Meaning(Kind.CREDENTIALS, "nobody is logged in", "aws sso login")
_SOURCE_FAILS = Meaning(Kind.BUSY, "the source of the credentials fails", _WHO)
_UNREACHED = Meaning(
    Kind.BUSY,
    "no answer",
    "does this machine reach {endpoint} (route, VPC endpoint, security group, proxy, AWS_ENDPOINT_URL)?",
)
_FULL = Meaning(Kind.CAPACITY, "AWS has no such machine to give there now", _WAIT)
_NOT_THERE = Meaning(
    Kind.CAPACITY,
    "this zone does not have the type",
    "aws ec2 describe-instance-type-offerings --location-type availability-zone --region {region} "
    "--filters Name=instance-type,Values={instance_type}",
)
_NO_CAPACITY_EVER = Meaning(
    Kind.CAPACITY,
    "no price history: nothing of this type is offered there as spot, and a request would wait in pending-evaluation",
    "hf-spot prices {instance_type} shows where it is; name other regions or types in the ladder",
)
_PRICE = Meaning(
    Kind.CAPACITY,
    "the spot price is above the highest that was allowed",
    "hf-spot prices {instance_type}; or a higher max_price",
)
_SPOT_QUOTA = Meaning(Kind.QUOTA, "the account's spot quota is used up, or 0", _QUOTAS)
_ON_DEMAND_QUOTA = Meaning(Kind.QUOTA, "the account's on-demand quota is used up, or 0", _QUOTAS)
_NO_IMAGE = Meaning(
    Kind.MISSING,
    "the image {image} does not exist in {region}: AMIs are regional",
    "image_id: resolve:ssm:… in the job file, or {{{region}: ami-…}} after aws ec2 copy-image --region {region} …",
)
_NO_NETWORK = Meaning(Kind.MISSING, "{region} has no default network", "aws ec2 create-default-vpc --region {region}")

TABLE: dict[str, Meaning] = {
    # -- who asks
    "AccessDenied": _FORBIDDEN,
    "AccessDeniedException": _FORBIDDEN,
    "AllAccessDisabled": _FORBIDDEN,
    "UnauthorizedAccess": _FORBIDDEN,
    "UnauthorizedOperation": _FORBIDDEN,
    "403": _FORBIDDEN,
    "InvalidAccessKeyId": _KEY_UNKNOWN,
    "InvalidClientTokenId": _KEY_UNKNOWN,
    "UnrecognizedClientException": _KEY_UNKNOWN,
    "AuthFailure": Meaning(
        Kind.CREDENTIALS, "the credentials are not known there, or the account has not switched the region on", _WHO
    ),
    "SignatureDoesNotMatch": _SIGNATURE,
    "IncompleteSignature": _SIGNATURE,
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "InvalidToken": _TOKEN,
    "InvalidSecurity": Meaning(Kind.CREDENTIALS, "these credentials are not valid", "aws configure list"),
    "NotSignedUp": Meaning(Kind.CREDENTIALS, "this account is not signed up for the service", _WHO),
    "OptInRequired": Meaning(
        Kind.CREDENTIALS,
        "this account has not switched the region or service on",
        "aws account enable-region --region-name {region}",
    ),
    "AccountProblem": Meaning(Kind.CREDENTIALS, "AWS has a problem with this account, often an unpaid bill", "see the console"),
    "PendingVerification": Meaning(Kind.CREDENTIALS, "AWS is still checking this account", "try again in some hours"),
    "RequestTimeTooSkewed": _SKEWED,
    "RequestExpired": Meaning(
        Kind.CREDENTIALS, "this machine's clock is wrong, or the session has expired", f"{_CLOCK}; {_LOGIN}"
    ),
    "RequestInTheFuture": _SKEWED,
    "NoCredentialsError": _LACKING,
    "PartialCredentialsError": _LACKING,
    "SSOError": _NOT_LOGGED_IN,
    "TokenRetrievalError": _NOT_LOGGED_IN,
    "CredentialRetrievalError": _SOURCE_FAILS,
    "MetadataRetrievalError": _SOURCE_FAILS,
    "ProfileNotFound": Meaning(Kind.SETTING, "there is no such profile", "aws configure list-profiles"),
    # -- where
    "NoRegionError": Meaning(Kind.SETTING, "no region is set", "export AWS_REGION=us-east-1, the region of the bucket"),
    "SSLError": Meaning(
        Kind.BUSY,
        "the server's certificate is not trusted",
        "for a certificate of your own: export AWS_CA_BUNDLE=/path/to/ca.pem",
    ),
    "ConnectionError": _UNREACHED,
    "HTTPClientError": _UNREACHED,
    "IncompleteReadError": _UNREACHED,
    "ChecksumError": _UNREACHED,
    "FlexibleChecksumError": _UNREACHED,
    "RetriesExceededError": _UNREACHED,
    "HTTPError": _UNREACHED,
    "ResponseParserError": _DAMAGED,
    # -- S3
    "NoSuchBucket": _NO_BUCKET,
    "404": _NO_BUCKET,
    **dict.fromkeys(ELSEWHERE, _ELSEWHERE),
    "InvalidBucketName": Meaning(
        Kind.SETTING, "no bucket can have this name", "s3://bucket/prefix, where bucket is an existing bucket's name"
    ),
    "EntityTooLarge": Meaning(
        Kind.SETTING, "the file is too large", "an object may have 5 TB at most, on some servers less: save sharded"
    ),
    "KeyTooLongError": Meaning(Kind.SETTING, "the file's name is too long", "a shorter prefix in --store"),
    "InvalidRequest": Meaning(
        Kind.SETTING,
        "the server does not understand the request",
        "is the server's S3 too old? Try: export AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
    ),
    "InvalidStorageClass": Meaning(Kind.SETTING, "no such storage class", "a storage class that this server knows"),
    "InvalidObjectState": Meaning(Kind.OTHER, "a lifecycle rule has archived the object", "aws s3api restore-object"),
    "SlowDown": _THROTTLED,
    "RequestLimitExceeded": _THROTTLED,
    "Throttling": _THROTTLED,
    "ThrottlingException": _THROTTLED,
    "TooManyRequestsException": _THROTTLED,
    "ServiceUnavailable": _IN_TROUBLE,
    "Unavailable": _IN_TROUBLE,
    "InternalError": _IN_TROUBLE,
    "InternalFailure": _IN_TROUBLE,
    "RequestTimeout": _IN_TROUBLE,
    "BadDigest": _DAMAGED,
    "XAmzContentChecksumMismatch": _DAMAGED,
    "IncompleteBody": _DAMAGED,
    "OperationAborted": _DECIDED,
    "ConditionalRequestConflict": _DECIDED,
    "NoSuchUpload": Meaning(Kind.BUSY, "a lifecycle rule or another process has aborted the upload", _LATER),
    "PreconditionFailed": _REPLACED,
    "412": _REPLACED,
    # -- EC2
    "DryRunOperation": Meaning(Kind.GRANTED, "allowed; whether there is quota and capacity, a dry run does not tell"),
    "AuthFailure.ServiceLinkedRoleCreationNotPermitted": Meaning(
        Kind.PERMISSION,
        "the account lacks the service-linked role for spot, and this identity may not create it",
        "aws iam create-service-linked-role --aws-service-name spot.amazonaws.com",
    ),
    "MaxSpotInstanceCountExceeded": _SPOT_QUOTA,
    "limit-exceeded": _SPOT_QUOTA,
    "VcpuLimitExceeded": _ON_DEMAND_QUOTA,
    "MaxFleetCountExceeded": Meaning(
        Kind.QUOTA, "the account has too many fleets there", "aws ec2 describe-fleets --region {region}"
    ),
    "InsufficientInstanceCapacity": _FULL,
    "InsufficientHostCapacity": _FULL,
    "Server.InsufficientInstanceCapacity": _FULL,
    "az-group-constraint": _FULL,
    "constraint-not-fulfillable": _FULL,
    "UnfulfillableCapacity": _FULL,
    "capacity-not-available": _FULL,
    "pending-evaluation": _NO_CAPACITY_EVER,
    "ReservationCapacityExceeded": Meaning(Kind.CAPACITY, "the capacity reservation is used up", _WAIT),
    "SpotMaxPriceTooLow": _PRICE,
    "price-too-low": _PRICE,
    "Unsupported": _NOT_THERE,
    "InvalidFleetConfiguration": _NOT_THERE,
    "InsufficientFreeAddressesInSubnet": Meaning(
        Kind.CAPACITY,
        "the subnet has no free address",
        "aws ec2 describe-subnets --region {region}; name another in the job file",
    ),
    "InvalidAMIID.NotFound": _NO_IMAGE,
    "InvalidAMIID.Unavailable": _NO_IMAGE,
    "InvalidAMIID.Malformed": Meaning(Kind.SETTING, "{image} is no image's id", "image_id: resolve:ssm:…, or ami-…"),
    "ParameterNotFound": Meaning(
        Kind.MISSING,
        "{region} has no such SSM parameter",
        "aws ssm get-parameters-by-path --recursive --path /aws/service/deeplearning/ami --region {region}",
    ),
    "InvalidGroup.NotFound": Meaning(
        Kind.MISSING, "{region} has no such security group", "aws ec2 describe-security-groups --region {region}"
    ),
    "InvalidSubnetID.NotFound": Meaning(
        Kind.MISSING, "{region} has no such subnet", "aws ec2 describe-subnets --region {region}"
    ),
    "InvalidKeyPair.NotFound": Meaning(
        Kind.MISSING, "{region} has no such key pair", "aws ec2 describe-key-pairs --region {region}"
    ),
    "InvalidInstanceType": Meaning(Kind.SETTING, "no such instance type", "aws ec2 describe-instance-types --region {region}"),
    "NoSuchEntity": Meaning(Kind.MISSING, "IAM does not know {role}", "aws iam list-instance-profiles"),
    "VPCIdNotSpecified": _NO_NETWORK,
}
