"""The policy that `hf-spot doctor iam` prints is enough for a run, and allows nothing but the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hf_spot.cli import main
from hf_spot.errors import AccessDenied, ConfigError
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.run import Run
from hf_spot.storage.iam import policy
from tests.servers import SeaweedFS

# What SeaweedFS calls these permissions.
ACTIONS = {
    "s3:GetObject": "Read",
    "s3:PutObject": "Write",
    "s3:DeleteObject": "Write",
    "s3:AbortMultipartUpload": "Write",
    "s3:ListBucket": "List",
    "s3:ListBucketMultipartUploads": "List",
}


def allowed(document: dict[str, Any]) -> set[str]:
    return {action for statement in document["Statement"] for action in statement["Action"]}


class Limited(SeaweedFS):
    """A server with one more identity, which may do what the policy says in one bucket."""

    IDENTITIES: Mapping[str, Sequence[str]] = {
        **SeaweedFS.IDENTITIES,
        "spot": tuple(sorted({f"{ACTIONS[action]}:runs" for action in allowed(policy("s3://runs/mine", {}))})),
    }


@pytest.fixture(scope="module")
def server() -> Iterator[Limited]:
    with Limited() as server:
        for bucket in ("runs", "others"):
            server.make_bucket(bucket)
        yield server


def test_a_role_with_this_policy_can_do_all_that_a_run_needs_and_nothing_elsewhere(
    server: Limited, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.env_of("spot").items():
        monkeypatch.setenv(name, value)
    left = server.client().create_multipart_upload(Bucket="runs", Key="mine/e0001/checkpoint-5/optimizer.pt")
    assert left["UploadId"]
    for launch in (1, 2):
        run = Run("s3://runs/mine")
        assert run.claim() == launch
        run.collect_garbage()
        for step in (5 * launch, 5 * launch + 1):
            request = CommitRequest(step=step)
            folder = make_checkpoint(step)
            (folder / "base.safetensors").write_bytes(bytes(1 << 20))  # is copied in the store the second time
            run.commit(request, run.upload(folder, request))
        run.prune(1)
        run.pull(tmp_path / f"pulled-{launch}")
    assert server.client().list_multipart_uploads(Bucket="runs").get("Uploads", []) == []
    with pytest.raises(AccessDenied):
        Run("s3://others/mine").claim()


def test_the_command_prints_the_policy_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "iam", "--store", "s3://bucket/runs/my-run"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == policy("s3://bucket/runs/my-run", {})
    resources = {statement["Sid"]: statement["Resource"] for statement in printed["Statement"]}
    assert resources["Objects"] == "arn:aws:s3:::bucket/runs/my-run/*"
    assert resources["List"] == resources["FindUnfinishedUploads"] == "arn:aws:s3:::bucket"
    assert printed["Statement"][1]["Condition"] == {"StringLikeIfExists": {"s3:prefix": ["runs/my-run/*"]}}


def test_a_key_and_wildcards_and_what_is_no_bucket() -> None:
    key = "arn:aws:kms:us-east-1:111122223333:key/abc"
    document = policy("s3://bucket/a*b", {"HF_SPOT_S3_SSE_KMS_KEY_ID": key})
    assert document["Statement"][-1]["Resource"] == key
    assert document["Statement"][0]["Resource"] == "arn:aws:s3:::bucket/a${*}b/*"
    with pytest.raises(ConfigError, match="ARN"):
        policy("s3://bucket/a", {"HF_SPOT_S3_SSE_KMS_KEY_ID": "alias/mine"})
    with pytest.raises(ConfigError, match="not the name of a bucket"):
        policy("/mnt/efs/run", {})
