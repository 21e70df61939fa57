"""What the user says about S3 outside of boto3's own settings: the store's URL, and two variables."""

from __future__ import annotations

import os
import re

from hf_spot.errors import ConfigError
from hf_spot.storage.keys import check_key

OWNER_VARIABLE = "HF_SPOT_S3_EXPECTED_BUCKET_OWNER"
KMS_KEY_VARIABLE = "HF_SPOT_S3_SSE_KMS_KEY_ID"

_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")


def parse(url: str) -> tuple[str, str]:
    """Bucket and prefix of ``s3://bucket/prefix``. Raises ConfigError."""
    rest = url.removeprefix("s3://")
    bucket, _, prefix = rest.partition("/")
    if "@" in bucket:
        raise ConfigError("credentials don't belong into the store's URL", hint="aws configure, or AWS_PROFILE")
    if rest == url or not _BUCKET.match(bucket):
        raise ConfigError(f"{url!r}: {bucket!r} is no bucket's name", hint="s3://bucket/prefix")
    if "?" in prefix or "#" in prefix:
        raise ConfigError(f"{url!r}: no parameters, please", hint="set AWS_ENDPOINT_URL_S3, AWS_PROFILE or AWS_REGION")
    prefix = prefix.strip("/")
    return bucket, check_key(prefix) if prefix else ""


def owner() -> dict[str, str]:
    """What every request says of the account that the bucket must belong to."""
    account = os.environ.get(OWNER_VARIABLE, "")
    if account and not re.fullmatch(r"\d{12}", account):
        raise ConfigError(f"{OWNER_VARIABLE}={account!r} is no account id", hint="aws sts get-caller-identity")
    return {"ExpectedBucketOwner": account} if account else {}


def encryption() -> dict[str, str]:
    """What every upload says of its encryption."""
    key = os.environ.get(KMS_KEY_VARIABLE, "")
    return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": key} if key else {}
