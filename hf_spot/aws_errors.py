"""The table that explains AWS errors, with the next command to type. All of hf_spot uses it.

Pure. Errors are recognised by their code, because texts differ between servers and versions. The names of botocore's
exceptions also count as codes: they cover failures before, or instead of, a response. Sources: the error codes of EC2
(https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html), of S3
(https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html), and the states of spot requests
(https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-request-status.html).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from hf_spot.suggestions import nearest

HOP_LIMIT = "aws ec2 modify-instance-metadata-options --http-put-response-hop-limit 2 --instance-id ID"
"""The command that lets a container on EC2 reach the metadata service."""
ELSEWHERE = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301", "307")
"""Codes by which S3 says that a bucket is in another region."""


class Kind(str, Enum):
    """The kind of failure that a code stands for."""

    GRANTED = "granted"  # a dry run that would have succeeded
    PERMISSION = "permission"  # the identity is known but not allowed
    CREDENTIALS = "credentials"  # missing, wrong or expired
    SETTING = "setting"  # a value that can't be used with this service
    MISSING = "missing"  # something that the request names does not exist
    BUSY = "busy"  # the same request may work later
    CAPACITY = "capacity"  # no such machine available: another zone, region or type may have one
    QUOTA = "quota"  # the account's limit is reached
    OTHER = "other"


@dataclass(frozen=True)
class Meaning:
    """The meaning of a code.

    Args:
        kind: the kind of failure.
        means: the explanation, for people.
        hint: the next command to type or setting to change; empty when there is none. Names in braces are filled with what
            the caller of `explain` knows; unknown ones appear in capitals.
    """

    kind: Kind
    means: str = ""
    hint: str = ""


def explain(code: str, status: int = 0, message: str = "", **known: str) -> Meaning:
    """Return the meaning of an error, by its code or else by its HTTP status.

    Args:
        code: as the service sent it, or the name of botocore's exception; for S3's answers to HEAD the code is the status.
        status: status of the HTTP response; 0 if unknown.
        message: the message of the service; it distinguishes some refusals with the same code.
        known: values for the names in braces: ``bucket``, ``region``, ``permission``, ``resource``, ``instance_type``,
            ``image``, ``role``.
    """
    filled = _Known(known)
    if "endpoint" not in known:
        filled["endpoint"] = host[1] if (host := _HOST.search(message)) else "the service"
    found = TABLE.get(code)
    if found is None or found.kind is Kind.PERMISSION:
        known_here = [(words, meaning) for words, meaning in _BY_WORDS if meaning is not _NO_ROOM or "bucket" in known]
        found = next((meaning for words, meaning in known_here if words.search(message)), found)
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
    meant = nearest_region(known.get("region") or _region_in(filled["endpoint"])) if found is _UNREACHED else None
    hint = f"is the region misspelled? The nearest that exists is {meant}" if meant else found.hint.format_map(filled)
    return replace(found, means=found.means.format_map(filled), hint=hint)


def region_of(environ: Mapping[str, str]) -> str | None:
    """Return the region in ``AWS_REGION``, or None. AWS's command line and its other SDKs read it, but boto3 does not."""
    return environ.get("AWS_REGION") or None


def nearest_region(name: str) -> str | None:
    """Return the region of AWS that a name is most likely a misspelling of; None if it is one, or is like none."""
    if not name or name in REGIONS:
        return None
    return nearest(name, REGIONS)


def _region_in(host: str) -> str:
    """Return what stands where a host name of AWS has its region; empty if nothing does."""
    labels = host.removesuffix(".cn").removesuffix(".amazonaws.com").split(".")
    return labels[-1] if len(labels) > 1 and ".amazonaws.com" in host and "-" in labels[-1] else ""


def code_of(error: BaseException | None) -> str:
    """Return the code of a botocore exception, or of an exception caused by one, without importing botocore; empty if it
    has none."""
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
    """Return the message that the service sent with the code; empty if there is none."""
    while error is not None:
        response: Any = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Message") or "")
        error = error.__cause__
    return ""


_HOST = re.compile(r"https?://([^/\s\"']+)")
REGIONS = (
    *("us-east-1", "us-east-2", "us-west-1", "us-west-2", "ca-central-1", "ca-west-1", "mx-central-1", "sa-east-1"),
    *("eu-central-1", "eu-central-2", "eu-north-1", "eu-south-1", "eu-south-2", "eu-west-1", "eu-west-2", "eu-west-3"),
    *("ap-east-1", "ap-east-2", "ap-northeast-1", "ap-northeast-2", "ap-northeast-3", "ap-south-1", "ap-south-2"),
    *("ap-southeast-1", "ap-southeast-2", "ap-southeast-3", "ap-southeast-4", "ap-southeast-5", "ap-southeast-6"),
    *("ap-southeast-7", "af-south-1", "il-central-1", "me-central-1", "me-south-1", "cn-north-1", "cn-northwest-1"),
    *("us-gov-east-1", "us-gov-west-1", "eusc-de-east-1"),
)
"""AWS's regions when this was written, for suggestions only: a new one is not refused."""
_LIBRARIES = ("botocore", "s3transfer", "urllib3")


def speaks_of_checksums(message: str) -> bool:
    """Return whether an error message refuses the checksums that boto3 sends with an upload."""
    return bool(_CHECKSUMS.search(message))


class _Known(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return name.upper()


_LATER = "the same call should work later"
_LOGIN = "aws sso login, or set a new AWS_SESSION_TOKEN"
_CLOCK = "set the clock: timedatectl; sudo chronyc makestep"
_WHO = "aws sts get-caller-identity"
_QUOTAS = "hf-spot quotas job.yaml"
_WAIT = "hf-spot provision job.yaml --watch, which retries the whole ladder; more types or regions in the ladder help most"

_EXPIRED = Meaning(Kind.CREDENTIALS, "the session has expired", _LOGIN)
_FORBIDDEN = Meaning(
    Kind.PERMISSION,
    "your credentials do not allow this",
    f"allow {{permission}} on {{resource}} for the role or user of: {_WHO}",
)
_KEY_UNKNOWN = Meaning(
    Kind.CREDENTIALS, "the service does not know this access key", "aws configure list; is AWS_ENDPOINT_URL correct?"
)
_SIGNATURE = Meaning(Kind.CREDENTIALS, "the secret key does not match the access key", "aws configure")
_SKEWED = Meaning(Kind.CREDENTIALS, "this machine's clock is wrong", _CLOCK)
_TOKEN = Meaning(
    Kind.CREDENTIALS,
    "AWS_SESSION_TOKEN does not belong to this access key",
    "unset AWS_SESSION_TOKEN, or set all three variables again",
)
_NO_BUCKET = Meaning(Kind.MISSING, "the bucket {bucket} does not exist", "check the bucket's name, or: aws s3 mb s3://{bucket}")
_ELSEWHERE = Meaning(
    Kind.SETTING,
    "the bucket is in another region",
    "set AWS_REGION to the answer of: aws s3api get-bucket-location --bucket {bucket}",
)
_THROTTLED = Meaning(Kind.BUSY, "too many requests: the service is throttling", _LATER)
_IN_TROUBLE = Meaning(Kind.BUSY, "the service is overloaded or failing", _LATER)
_DAMAGED = Meaning(Kind.BUSY, "the data was damaged or truncated in transit", _LATER)
_DECIDED = Meaning(Kind.BUSY, "another request for the same object is still in progress", _LATER)
_REPLACED = Meaning(Kind.BUSY, "the object was replaced in the meantime", _LATER)
_KMS = Meaning(
    Kind.PERMISSION,
    "encryption failed",
    "check the bucket's KMS key or $HF_SPOT_S3_SSE_KMS_KEY_ID: is it enabled, in this region, and are you allowed to use it?",
)
_PASS_ROLE = Meaning(
    Kind.PERMISSION,
    "this identity may not pass the role to the instance",
    f"allow iam:PassRole on {{role}} for the role or user of: {_WHO}",
)
_LACKING = Meaning(
    Kind.CREDENTIALS,
    "no AWS credentials were found",
    f"aws configure; on EC2 attach an instance profile, and for a container raise the metadata hop limit: {HOP_LIMIT}",
)
_NOT_LOGGED_IN = Meaning(Kind.CREDENTIALS, "you are not logged in", "aws sso login")
SOURCE_FAILS = Meaning(Kind.BUSY, "the credential source failed", _WHO)
_UNREACHED = Meaning(
    Kind.BUSY,
    "no answer",
    "check that this machine can reach {endpoint} (route, VPC endpoint, security group, proxy, AWS_ENDPOINT_URL)",
)
_FULL = Meaning(Kind.CAPACITY, "AWS has no capacity for this type there at the moment", _WAIT)
_NOT_THERE = Meaning(
    Kind.CAPACITY,
    "this zone does not offer the type",
    "aws ec2 describe-instance-type-offerings --location-type availability-zone --region {region} "
    "--filters Name=instance-type,Values={instance_type}",
)
_NO_CAPACITY_EVER = Meaning(
    Kind.CAPACITY,
    "no price history: this type is not offered there as spot, and a request would wait in pending-evaluation",
    "hf-spot prices {instance_type} shows where it is offered; add other regions or types to the ladder",
)
_PRICE = Meaning(
    Kind.CAPACITY,
    "the spot price is above the maximum price",
    "hf-spot prices {instance_type}, or raise max_price",
)
_SPOT_QUOTA = Meaning(Kind.QUOTA, "the account's spot quota is used up, or 0", _QUOTAS)
_ON_DEMAND_QUOTA = Meaning(Kind.QUOTA, "the account's on-demand quota is used up, or 0", _QUOTAS)
_NO_IMAGE = Meaning(
    Kind.MISSING,
    "the image {image} does not exist in {region}: AMIs are regional",
    "image_id: resolve:ssm:… in the job file, or {{{region}: ami-…}} after aws ec2 copy-image --region {region} …",
)
_NO_NETWORK = Meaning(Kind.MISSING, "{region} has no default network", "aws ec2 create-default-vpc --region {region}")

_DENIED = Meaning(
    Kind.PERMISSION,
    "a policy denies this explicitly, which no other permission can override",
    "see the server's message for the kind of policy; that of the bucket: aws s3api get-bucket-policy --bucket {bucket}",
)
_REQUESTER_PAYS = Meaning(
    Kind.PERMISSION,
    "the bucket requires the requester to pay (Requester Pays), which hf_spot does not support",
    "use another bucket, or: aws s3api put-bucket-request-payment --bucket {bucket} "
    "--request-payment-configuration Payer=BucketOwner",
)
_NO_ROOM = Meaning(
    Kind.QUOTA,
    "the store has no space left for this account or bucket",
    "hf-spot checkpoints prune RUN --save-total-limit 1, or ask your provider for a larger quota; uploads are retried",
)
_NOT_SUPPORTED = Meaning(
    Kind.SETTING,
    "the server does not support this request",
    "upgrade the server, or use another store; for an old server: export AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
)
_BY_WORDS = (
    (re.compile("iam:PassRole"), _PASS_ROLE),
    (re.compile("explicit deny", re.IGNORECASE), _DENIED),
    (re.compile("requester[ -]?pays?", re.IGNORECASE), _REQUESTER_PAYS),
    (re.compile(r"quota|\bcap (is )?exceeded|storage cap|storage full", re.IGNORECASE), _NO_ROOM),
)
"""Refusals recognised by their message, because their code is that of a missing permission or not in the table."""
_CHECKSUMS = re.compile(
    r"checksum|crc-?(32|64)|x-amz-(sdk|trailer|content-sha256|checksum)|trailer|STREAMING-|aws-chunked|unsupported header"
    r"|header you provided implies",
    re.IGNORECASE,
)

TABLE: dict[str, Meaning] = {
    # -- credentials
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
        Kind.CREDENTIALS, "the credentials are unknown there, or the account has not enabled the region", _WHO
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
        "this account has not enabled the region or service",
        "aws account enable-region --region-name {region}",
    ),
    "AccountProblem": Meaning(
        Kind.CREDENTIALS, "AWS reports a problem with this account, often an unpaid bill", "look at the AWS console"
    ),
    "PendingVerification": Meaning(Kind.CREDENTIALS, "AWS is still verifying this account", "try again in a few hours"),
    "RequestTimeTooSkewed": _SKEWED,
    "RequestExpired": Meaning(
        Kind.CREDENTIALS, "this machine's clock is wrong, or the session has expired", f"{_CLOCK}; {_LOGIN}"
    ),
    "RequestInTheFuture": _SKEWED,
    "NoCredentialsError": _LACKING,
    "PartialCredentialsError": _LACKING,
    "SSOError": _NOT_LOGGED_IN,
    "TokenRetrievalError": _NOT_LOGGED_IN,
    "CredentialRetrievalError": SOURCE_FAILS,
    "MetadataRetrievalError": SOURCE_FAILS,
    "ProfileNotFound": Meaning(Kind.SETTING, "this profile does not exist", "aws configure list-profiles"),
    # -- region and connection
    "NoRegionError": Meaning(
        Kind.SETTING, "no region is set", "set the region of the bucket, for example: export AWS_REGION=us-east-1"
    ),
    "SSLError": Meaning(
        Kind.BUSY,
        "the server's certificate is not trusted",
        "for a private certificate authority: export AWS_CA_BUNDLE=/path/to/ca.pem",
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
        Kind.SETTING, "this is not a valid bucket name", "use s3://bucket/prefix with the name of an existing bucket"
    ),
    "EntityTooLarge": Meaning(
        Kind.SETTING, "the file is too large", "objects are limited to 5 TB, on some servers less: save sharded checkpoints"
    ),
    "KeyTooLongError": Meaning(Kind.SETTING, "the file's name is too long", "use a shorter prefix in --store"),
    "InvalidRequest": Meaning(
        Kind.SETTING,
        "the server does not understand the request",
        "for an older S3 server: export AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
    ),
    **dict.fromkeys(
        (
            *("QuotaExceeded", "StorageQuotaExceeded", "BucketQuotaExceeded", "XMinioAdminBucketQuotaExceeded"),
            *("XMinioStorageFull", "InsufficientStorage", "InsufficientStorageSpace", "507"),
        ),
        _NO_ROOM,
    ),
    "UserProjectMissing": _REQUESTER_PAYS,
    "NotImplemented": _NOT_SUPPORTED,
    "501": _NOT_SUPPORTED,
    "InvalidStorageClass": Meaning(Kind.SETTING, "no such storage class", "use a storage class that this server supports"),
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
    "DryRunOperation": Meaning(Kind.GRANTED, "allowed; a dry run does not check quota and capacity"),
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
        "the subnet has no free IP address",
        "aws ec2 describe-subnets --region {region}; then name another subnet in the job file",
    ),
    "InvalidAMIID.NotFound": _NO_IMAGE,
    "InvalidAMIID.Unavailable": _NO_IMAGE,
    "InvalidAMIID.Malformed": Meaning(Kind.SETTING, "{image} is not an image id", "set image_id to resolve:ssm:… or ami-…"),
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
