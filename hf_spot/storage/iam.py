"""The least that a role or user must be allowed so that a run in S3 works: nothing but the run's own objects."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from hf_spot.errors import ConfigError
from hf_spot.storage.s3_settings import KMS_KEY_VARIABLE, parse

OBJECTS = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")
BUCKET = ("s3:ListBucket", "s3:ListBucketMultipartUploads")
KEY = ("kms:GenerateDataKey", "kms:Decrypt")


def policy(url: str, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """An IAM policy document (version 2012-10-17) for the run at ``url``.

    Listing is allowed for the run's prefix. A request that names no prefix has to be allowed, too: S3 asks for this
    permission when an object does not exist, and says "access denied" instead of "not found" without it.

    Args:
        url: ``s3://bucket/prefix``.
        environ: where ``$HF_SPOT_S3_SSE_KMS_KEY_ID`` and ``$AWS_PARTITION`` may stand.

    Raises:
        ConfigError: no S3 URL, or a KMS key that is not named by its ARN.
    """
    name, prefix = parse(url)
    prefix = re.sub(r"[*?$]", r"${\g<0>}", prefix)
    bucket = f"arn:{environ.get('AWS_PARTITION', 'aws')}:s3:::{name}"
    listing: dict[str, Any] = {"Sid": "List", "Effect": "Allow", "Action": [BUCKET[0]], "Resource": bucket}
    if prefix:
        listing["Condition"] = {"StringLikeIfExists": {"s3:prefix": [f"{prefix}/*"]}}
    objects = f"{bucket}/{prefix}/*" if prefix else f"{bucket}/*"
    statements = [
        {"Sid": "Objects", "Effect": "Allow", "Action": [*OBJECTS], "Resource": objects},
        listing,
        {"Sid": "FindUnfinishedUploads", "Effect": "Allow", "Action": [BUCKET[1]], "Resource": bucket},
    ]
    if key := environ.get(KMS_KEY_VARIABLE):
        if not key.startswith("arn:"):
            raise ConfigError(
                f"${KMS_KEY_VARIABLE}={key!r}: a policy names a key by its ARN",
                hint=f"aws kms describe-key --key-id {key} --query KeyMetadata.Arn",
            )
        statements.append({"Sid": "Key", "Effect": "Allow", "Action": [*KEY], "Resource": key})
    return {"Version": "2012-10-17", "Statement": statements}
