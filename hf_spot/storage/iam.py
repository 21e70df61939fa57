"""The minimal permissions that a role or user needs for a run in S3: only the run's own objects."""

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
    """Return an IAM policy document (version 2012-10-17) for the run at ``url``.

    Listing is allowed for the run's prefix. A request without a prefix must be allowed, too: when an object does not exist, S3
    requires this permission, and answers "access denied" instead of "not found" without it.

    Args:
        url: ``s3://bucket/prefix``.
        environ: may have ``$HF_SPOT_S3_SSE_KMS_KEY_ID`` and ``$AWS_PARTITION``.

    Raises:
        ConfigError: ``url`` is not an S3 URL, or the KMS key is not given by its ARN.
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
