"""The user's settings for S3 that boto3 does not have: the store's URL, and two variables."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from hf_spot.errors import ConfigError
from hf_spot.storage.keys import check_key

OWNER_VARIABLE = "HF_SPOT_S3_EXPECTED_BUCKET_OWNER"
KMS_KEY_VARIABLE = "HF_SPOT_S3_SSE_KMS_KEY_ID"

_DIRECTORY_BUCKET = re.compile(r"--[a-z0-9-]+--x-s3$")
_HOST_OF_A_BUCKET = re.compile(  # the rest of a host name that begins with a bucket's name
    r"(s3|obs|oss|cos|storage)[.-]|.*\.(amazonaws\.com(\.cn)?|digitaloceanspaces\.com|backblazeb2\.com|wasabisys\.com"
    r"|cloudflarestorage\.com|googleapis\.com|aliyuncs\.com|myhuaweicloud\.com|myqcloud\.com|scw\.cloud|linodeobjects\.com)$"
)
_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")


def parse(url: str) -> tuple[str, str]:
    """Return the bucket and the prefix of ``s3://bucket/prefix``. Raises ConfigError."""
    rest = url.removeprefix("s3://")
    bucket, _, prefix = rest.partition("/")
    if "@" in bucket:
        raise ConfigError("credentials don't belong in the store's URL", hint="aws configure, or AWS_PROFILE")
    if rest == url or not _BUCKET.match(bucket):
        raise ConfigError(f"{url!r}: {bucket!r} is not the name of a bucket", hint="s3://bucket/prefix")
    if "?" in prefix or "#" in prefix:
        raise ConfigError(f"{url!r}: the URL can't have parameters", hint="set AWS_ENDPOINT_URL_S3, AWS_PROFILE or AWS_REGION")
    prefix = prefix.strip("/")
    return bucket, check_key(prefix) if prefix else ""


def is_directory_bucket(bucket: str) -> bool:
    """Return whether a bucket's name is one of S3 Express One Zone (https://docs.aws.amazon.com/AmazonS3/latest/userguide)."""
    return _DIRECTORY_BUCKET.search(bucket) is not None


def check_endpoint(endpoint: str, bucket: str) -> None:
    """Refuse an endpoint that contains the bucket's name, as consoles show it: each request would have the name twice.

    Raises:
        ConfigError: the endpoint contains it; the hint has the endpoint without it.
    """
    parts = urlsplit(endpoint)
    host, path = parts.netloc.rpartition("@")[2], parts.path.rstrip("/")
    if path.endswith(f"/{bucket}"):
        path = path.removesuffix(f"/{bucket}")
    elif _HOST_OF_A_BUCKET.match(host.removeprefix(f"{bucket}.")) and host.startswith(f"{bucket}."):
        host = host.removeprefix(f"{bucket}.")
    else:
        return
    raise ConfigError(
        f"the endpoint begins or ends with the name of the bucket {bucket}, which each request adds again",
        hint=f"export AWS_ENDPOINT_URL={parts.scheme}://{host}{path}",
    )


def owner() -> dict[str, str]:
    """Return the arguments by which every request names the account that must own the bucket. Raises ConfigError."""
    account = os.environ.get(OWNER_VARIABLE, "")
    if account and not re.fullmatch(r"\d{12}", account):
        raise ConfigError(f"{OWNER_VARIABLE}={account!r} is not an account id", hint="aws sts get-caller-identity")
    return {"ExpectedBucketOwner": account} if account else {}


def encryption() -> dict[str, str]:
    """Return the arguments by which every upload requests its encryption."""
    key = os.environ.get(KMS_KEY_VARIABLE, "")
    return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": key} if key else {}
