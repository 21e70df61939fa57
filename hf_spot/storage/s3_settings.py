"""What the user says about S3 outside of boto3's own settings: the store's URL, and two variables."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from hf_spot.errors import ConfigError
from hf_spot.storage.keys import check_key

OWNER_VARIABLE = "HF_SPOT_S3_EXPECTED_BUCKET_OWNER"
KMS_KEY_VARIABLE = "HF_SPOT_S3_SSE_KMS_KEY_ID"

_DIRECTORY_BUCKET = re.compile(r"--[a-z0-9-]+--x-s3$")
_HOST_OF_A_BUCKET = re.compile(  # what stands behind a bucket's name where it is a part of the host
    r"(s3|obs|oss|cos|storage)[.-]|.*\.(amazonaws\.com(\.cn)?|digitaloceanspaces\.com|backblazeb2\.com|wasabisys\.com"
    r"|cloudflarestorage\.com|googleapis\.com|aliyuncs\.com|myhuaweicloud\.com|myqcloud\.com|scw\.cloud|linodeobjects\.com)$"
)
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


def is_directory_bucket(bucket: str) -> bool:
    """Whether a bucket is one of S3 Express One Zone, by its name (https://docs.aws.amazon.com/AmazonS3/latest/userguide)."""
    return _DIRECTORY_BUCKET.search(bucket) is not None


def check_endpoint(endpoint: str, bucket: str) -> None:
    """Refuse an endpoint that names the bucket, as consoles show it: the bucket would be asked for twice.

    Raises:
        ConfigError: it does; the hint has the endpoint without it.
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
        f"the endpoint ends in, or begins with, the name of the bucket {bucket}, which is named again by each request",
        hint=f"export AWS_ENDPOINT_URL={parts.scheme}://{host}{path}",
    )


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
