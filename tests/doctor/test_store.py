"""What `hf-spot doctor --store` says of a store: real servers, and roles that lack one permission each."""

from __future__ import annotations

import json
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from hf_spot.cli import main
from hf_spot.doctor import store as module
from hf_spot.doctor.finding import FAIL, OK, WARN, Finding, Notice
from hf_spot.doctor.store import examine, in_time, measured_bytes_per_s
from hf_spot.errors import StoreUnavailable
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.run import Run
from hf_spot.storage import probe
from hf_spot.storage.faulty import Fault, FaultyStore
from hf_spot.storage.iam import policy
from hf_spot.storage.memory import MemoryStore
from tests.servers import CannedS3, Rclone, SeaweedFS, aws_environment

NOTICE = Notice(30.0, "test")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is uploaded to measure."""
    monkeypatch.setattr(module, "SIZES_BYTES", (1 << 16,))


def use(monkeypatch: pytest.MonkeyPatch, env: Mapping[str, str]) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)


def look(store: Any, **options: Any) -> dict[str, Finding]:
    """What was found, by check."""
    findings = [*examine(Run(store), NOTICE, size_bytes=None, **options)]
    assert len({one.check for one in findings}) == len(findings)
    return {one.check: one for one in findings}


def levels(found: Mapping[str, Finding]) -> dict[str, str]:
    return {check: finding.level for check, finding in found.items()}


ALL_GOOD = dict.fromkeys(("list", "write", "read", "conditional", "delete", "uploads", "run", "bandwidth"), OK)


# -- a good one -------------------------------------------------------------------------------------------------------


def test_a_good_store_is_all_ok_and_left_as_it_was(s3_url: str, make_checkpoint: Callable[..., Path]) -> None:
    run = Run(s3_url)
    run.claim()
    request = CommitRequest(step=5)
    run.commit(request, run.upload(make_checkpoint(5), request))
    before = [*run.store.list()]

    found = look(s3_url)

    assert levels(found) == {**ALL_GOOD, "region": OK, "clock": OK}
    assert "1 checkpoint, the newest of step 5" in found["run"].text
    assert "your notice is 30 s (test)" in found["bandwidth"].text
    assert [*run.store.list()] == before


def test_a_directory_is_a_store_too(tmp_path: Path) -> None:
    assert levels(look(tmp_path / "run")) == ALL_GOOD


def test_the_command_tells_whether_a_checkpoint_gets_out_in_time(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["doctor", "--store", s3_url, "--checkpoint-gb", "1e6", "--grace-s", "30", "--json"])
    findings = {one["check"]: one for one in json.loads(capsys.readouterr().out)}
    assert code == 1, "so large a checkpoint fits on no disk"
    assert findings["bandwidth"]["level"] == WARN
    assert "a checkpoint of 1,000,000.0 GB needs " in findings["bandwidth"]["text"]
    assert "your notice is 30 s (--grace-s)" in findings["bandwidth"]["text"]


@pytest.mark.parametrize(
    ("rate", "size", "seconds", "level", "words"),
    [
        (14e9 / 31, 14 * 10**9, 30.0, WARN, "a checkpoint of 14.0 GB needs 31 s, your notice is 30 s"),
        (14e9 / 29, 14 * 10**9, 30.0, OK, "a checkpoint of 14.0 GB needs 29 s, your notice is 30 s"),
        (1e6, 10**7, None, OK, "a checkpoint of 10.0 MB needs 10 s"),
        (1e6, None, 30.0, OK, "--checkpoint-gb"),
    ],
)
def test_a_checkpoint_is_compared_with_the_notice(
    rate: float, size: int | None, seconds: float | None, level: str, words: str
) -> None:
    finding = in_time(rate, size, Notice(seconds, "test"))
    assert finding.level == level
    assert words in finding.text
    assert bool(finding.hint) == (level != OK)


# -- permissions ------------------------------------------------------------------------------------------------------


class Moto:
    """An account with a role for every set of permissions, as moto's server checks them."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._iam = self._client("iam")
        self._client("s3").create_bucket(Bucket="runs")
        self._iam.create_user(UserName="spot")
        key = self._iam.create_access_key(UserName="spot")["AccessKey"]
        self.env = aws_environment(endpoint, key["AccessKeyId"], key["SecretAccessKey"])

    def _client(self, service: str) -> Any:
        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            aws_access_key_id="admin",
            aws_secret_access_key="admin",
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )

    def check(self, after: str) -> None:
        """Whether permissions are checked: after ``0`` requests, or after ``inf``."""
        asked = urllib.request.Request(
            f"{self.endpoint}/moto-api/reset-auth", data=after.encode(), method="POST", headers={"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(asked, timeout=20).close()

    def allow(self, lacking: str | None) -> None:
        """What `hf-spot doctor iam` prints, but for one action."""
        document = policy("s3://runs/mine", {})
        for statement in document["Statement"]:
            statement["Action"] = [action for action in statement["Action"] if action != lacking] or ["s3:ListAllMyBuckets"]
        if lacking != "s3:DeleteObject":  # S3 itself looks at the object, and moto at the bucket
            document["Statement"].append({"Effect": "Allow", "Action": "s3:DeleteObject", "Resource": "arn:aws:s3:::runs"})
        self.check("inf")
        self._iam.put_user_policy(UserName="spot", PolicyName="spot", PolicyDocument=json.dumps(document))
        self.check("0")


@pytest.fixture(scope="module")
def moto() -> Iterator[Moto]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    made = Moto(f"http://{host}:{port}")
    yield made
    made.check("inf")
    server.stop()


@pytest.mark.parametrize(
    ("lacking", "check", "level"),
    [
        (None, "", ""),
        ("s3:ListBucket", "list", FAIL),
        ("s3:PutObject", "write", FAIL),
        ("s3:GetObject", "read", FAIL),
        ("s3:DeleteObject", "delete", FAIL),
        ("s3:ListBucketMultipartUploads", "uploads", WARN),
    ],
)
def test_a_role_that_lacks_one_permission_is_told_which(
    moto: Moto, monkeypatch: pytest.MonkeyPatch, lacking: str | None, check: str, level: str
) -> None:
    use(monkeypatch, moto.env)
    moto.allow(lacking)

    found = look("s3://runs/mine")

    bad = {name: finding.level for name, finding in found.items() if finding.level != OK}
    if lacking is None:
        assert bad == {}
        return
    assert bad.pop(check) == level
    assert f"allow {lacking} on arn:aws:s3:::runs" in found[check].hint
    # Who may not read can't read the journal either.
    assert bad == ({"run": FAIL} if lacking == "s3:GetObject" else {})
    assert ("bandwidth" in found) == (level == WARN or lacking == "s3:ListBucket")


@pytest.mark.parametrize(
    ("identity", "expected"),
    [("reader", {"write": FAIL, "delete": FAIL}), ("writer", {"list": FAIL})],
)
def test_on_a_real_server_each_permission_is_found_apart(
    seaweedfs: SeaweedFS, s3_url: str, monkeypatch: pytest.MonkeyPatch, identity: str, expected: dict[str, str]
) -> None:
    use(monkeypatch, seaweedfs.env_of(identity))
    found = look(s3_url)
    assert {name: finding.level for name, finding in found.items() if finding.level != OK} == expected
    assert all("allow s3:" in found[name].hint for name in expected)
    assert found["read"].level == OK


def test_who_may_neither_write_nor_list_is_not_told_that_he_may_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with CannedS3(403, "AccessDenied") as server:
        use(monkeypatch, server.env())
        found = look("s3://bucket/run")
    assert levels(found) == {
        "region": OK,
        "clock": OK,
        "list": FAIL,
        "write": FAIL,
        "read": WARN,
        "delete": FAIL,
        "uploads": WARN,
    }
    assert "can't check whether objects can be read" in found["read"].text


@pytest.mark.parametrize(
    ("status", "code", "in_hint"),
    [(403, "InvalidAccessKeyId", "aws configure"), (404, "NoSuchBucket", "aws s3 mb"), (400, "ExpiredToken", "aws sso login")],
)
def test_what_fails_every_check_is_told_once(monkeypatch: pytest.MonkeyPatch, status: int, code: str, in_hint: str) -> None:
    with CannedS3(status, code) as server:
        use(monkeypatch, server.env())
        found = look("s3://bucket/run")
    assert {name: finding.level for name, finding in found.items() if finding.level != OK} == {"store": FAIL}
    assert in_hint in found["store"].hint


def test_a_server_that_is_not_there_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with CannedS3(200) as server:
        use(monkeypatch, server.env())
    found = look("s3://bucket/run")
    assert levels(found) == {"store": FAIL}
    assert server.endpoint.removeprefix("http://") in found["store"].hint


def test_a_store_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LIMIT_S", 0.1)
    answers = threading.Event()
    store = FaultyStore(MemoryStore(f"memory://{uuid.uuid4().hex}"), [Fault("list", until=answers, error=None)])
    found = look(store)
    answers.set()
    assert levels(found) == {"store": FAIL}
    assert "no answer within" in found["store"].text


# -- create-if-absent, region, clock ----------------------------------------------------------------------------------


def test_a_server_that_ignores_the_condition_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with Rclone() as server:
        use(monkeypatch, server.env())
        server.make_bucket("bucket")
        found = look("s3://bucket/run")
    assert found["conditional"].level == FAIL
    assert "--allow-unfenced-store" in found["conditional"].hint
    assert found["write"].level == found["read"].level == found["delete"].level == OK


@pytest.mark.parametrize(
    ("bucket", "home", "level", "in_hint"),
    [
        ("us-east-1", None, OK, ""),
        ("us-east-1", "us-east-1", OK, ""),
        ("eu-west-3", None, WARN, "export AWS_REGION=eu-west-3"),
        ("us-east-1", "us-west-2", WARN, "a bucket in us-west-2"),
    ],
)
def test_a_bucket_far_away_is_found(
    monkeypatch: pytest.MonkeyPatch, bucket: str, home: str | None, level: str, in_hint: str
) -> None:
    with CannedS3(200, body="<x/>", headers={"x-amz-bucket-region": bucket}) as server:
        use(monkeypatch, server.env())
        region = next(examine(Run("s3://bucket/run"), NOTICE, size_bytes=None, home=home))
    assert (region.check, region.level) == ("region", level)
    assert in_hint in region.hint


@pytest.mark.parametrize(
    ("ahead", "level"),
    [(timedelta(0), OK), (timedelta(minutes=-5), WARN), (timedelta(hours=1), FAIL), (timedelta(hours=-1), FAIL)],
)
def test_a_wrong_clock_is_measured(s3_url: str, ahead: timedelta, level: str) -> None:
    clock = look(s3_url, now=lambda: datetime.now(timezone.utc) + ahead)["clock"]
    assert clock.level == level
    assert ("chronyc" in clock.hint) == (level != OK)
    assert ("ahead of" if ahead > timedelta(0) else "behind") in clock.text or level == OK


# -- bandwidth --------------------------------------------------------------------------------------------------------


class Line(MemoryStore):
    """A store behind a line that moves so many bytes a second, by a clock of its own."""

    def __init__(self, bytes_per_s: float) -> None:
        super().__init__(f"memory://{uuid.uuid4().hex}")
        self.time_s = 0.0
        self.sizes: list[int] = []
        self._bytes_per_s = bytes_per_s

    def put_file(self, key: str, path: Path, progress: Callable[[int], None] | None = None) -> None:
        size = path.stat().st_size
        self.sizes.append(size)
        for _ in range(16):
            self.time_s += size / 16 / self._bytes_per_s
            assert progress is not None
            progress(size // 16)
        super().put_file(key, path)


@pytest.mark.parametrize(
    ("bytes_per_s", "tried"), [(1e3, (1 << 16,)), (1e6, (1 << 16, 1 << 20)), (1e9, (1 << 16, 1 << 20, 1 << 22))]
)
def test_a_fast_line_is_measured_with_more(monkeypatch: pytest.MonkeyPatch, bytes_per_s: float, tried: Sequence[int]) -> None:
    monkeypatch.setattr(module, "SIZES_BYTES", (1 << 16, 1 << 20, 1 << 22))
    store = Line(bytes_per_s)
    assert measured_bytes_per_s(store, "x", lambda: store.time_s) == pytest.approx(bytes_per_s, rel=0.01)
    assert store.sizes == [*tried]
    assert [*store.list()] == []


def test_an_upload_that_breaks_is_told_and_leaves_nothing() -> None:
    broken = FaultyStore(
        MemoryStore(f"memory://{uuid.uuid4().hex}"), [Fault("put_file", error=lambda: StoreUnavailable("no", hint="repair"))]
    )
    found = look(broken)
    assert (found["bandwidth"].level, found["bandwidth"].hint) == (FAIL, "repair")
    assert [*broken.list()] == []
