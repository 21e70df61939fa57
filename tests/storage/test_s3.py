"""What only S3Store does: settings, transfers in parts, and errors that name their repair."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import botocore.compat
import pytest

from hf_spot.errors import (
    AccessDenied,
    BucketNotFound,
    ConfigError,
    ObjectNotFound,
    SpotError,
    StoreError,
    StoreNotFencing,
    StoreUnavailable,
)
from hf_spot.storage import s3_connection, s3_parts
from hf_spot.storage.open import open_store
from hf_spot.storage.probe import probe
from hf_spot.storage.s3 import S3Store
from hf_spot.storage.s3_settings import KMS_KEY_VARIABLE, OWNER_VARIABLE
from tests.proxy import Exchange, Proxy
from tests.servers import CannedS3, KeyServer, Rclone, SeaweedFS


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    # How long to wait between tries is botocore's business; only that it tries matters here.
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0.0)
    return monkeypatch


def use(environ: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        environ.setenv(name, value)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse") / "model"
    with path.open("wb") as file:
        file.truncate(130 * 1024 * 1024)
    return path


# -- transfers ---------------------------------------------------------------------------------------------------------


def test_a_cancelled_upload_ends_at_once_and_leaves_no_parts_to_pay_for(
    seaweedfs: SeaweedFS, s3_url: str, sparse: Path
) -> None:
    store = S3Store(s3_url)
    store.put("warm", b"")
    cancelled_at = []

    def progress(moved: int) -> None:
        cancelled_at.append(time.monotonic())
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        store.put_file("model", sparse, progress)

    assert time.monotonic() - cancelled_at[0] < 5
    assert len(cancelled_at) == 1, "progress was called again after it had raised"
    uploads = seaweedfs.client().list_multipart_uploads(Bucket="tests", Prefix=s3_url.removeprefix("s3://tests/"))
    assert not uploads.get("Uploads")


def test_a_server_that_vanishes_in_the_middle_is_store_unavailable_and_the_store_recovers_with_it(
    environ: pytest.MonkeyPatch, sparse: Path, tmp_path: Path
) -> None:
    with SeaweedFS() as server:
        server.make_bucket("bucket")
        use(environ, server.env())
        store = S3Store("s3://bucket/run")
        store.put("before", b"kept")

        with pytest.raises(StoreUnavailable, match="can't write s3://bucket/run/model"):
            store.put_file("model", sparse, lambda moved: server.stop())
        with pytest.raises(StoreUnavailable, match="can't read"):
            store.get("before")

        server.start()
        assert store.get("before") == b"kept"
        assert [info.key for info in store.list()] == ["before"]
        store.put_file("model", sparse)
        store.get_file("model", tmp_path / "model")
        assert (tmp_path / "model").stat().st_size == sparse.stat().st_size


def test_a_key_and_an_owner_are_sent_with_every_request_for_which_they_make_sense(
    environ: pytest.MonkeyPatch, sparse: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"x")
    environ.setenv(OWNER_VARIABLE, "123456789012")
    environ.setenv(KMS_KEY_VARIABLE, "alias/runs")
    with CannedS3(403, "AccessDenied") as server:
        use(environ, server.env())
        store = S3Store("s3://bucket/run")
        for attempt in (
            lambda: store.put("k", b""),
            lambda: store.create("k", b""),
            lambda: store.put_file("k", small),
            lambda: store.put_file("k", sparse),
            lambda: store.get("k"),
            lambda: store.get_file("k", tmp_path / "back"),
            lambda: [*store.list()],
            lambda: store.delete(["k"]),
        ):
            with pytest.raises(AccessDenied, match=OWNER_VARIABLE):
                attempt()

        assert server.requests
        for method, path, headers in server.requests:
            assert headers["x-amz-expected-bucket-owner"] == "123456789012", (method, path)
            encrypted = method == "PUT" or "uploads" in path
            assert headers.get("x-amz-server-side-encryption-aws-kms-key-id") == ("alias/runs" if encrypted else None)
        assert any("uploads" in path for _, path, _ in server.requests)


def test_uploads_carry_a_checksum_unless_the_user_has_switched_that_off(environ: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    with CannedS3(200) as server:
        use(environ, server.env())
        S3Store("s3://bucket/run").put_file("k", source)
        environ.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        S3Store("s3://bucket/run").put_file("k", source)

    told = [{name.lower() for name in headers if "checksum" in name.lower()} for _, _, headers in server.requests]
    pytest.importorskip("awscrt")
    assert told == [{"x-amz-checksum-crc64nvme"}, set()]


def test_an_object_too_large_for_one_request_is_copied_in_parts(
    s3_url: str, environ: pytest.MonkeyPatch, three_parts: Path, tmp_path: Path
) -> None:
    environ.setattr(s3_parts, "_MOST_COPIED_BYTES", 6 << 20)
    environ.setattr(s3_parts, "_COPIED_PART_BYTES", 5 << 20)
    store = S3Store(s3_url)
    store.put_file("model", three_parts)
    store.copy("model", "copy")
    store.get_file("copy", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == three_parts.read_bytes()


def test_a_file_that_becomes_shorter_while_it_is_sent_is_said_to_and_leaves_nothing(s3_url: str, tmp_path: Path) -> None:
    source = tmp_path / "model"
    with source.open("wb") as file:
        file.truncate(130 << 20)
    store = S3Store(s3_url)
    with pytest.raises(SpotError, match="became shorter"):
        store.put_file("model", source, lambda moved: os.truncate(source, 1))
    assert [*store.list()] == []


class Breaking(Proxy):
    """Breaks answers off in their middle, as long as there are ``left``."""

    def __init__(self, endpoint: str, left: int) -> None:
        super().__init__(endpoint)
        self.left = left
        self.asked_for: list[str] = []

    def carry(self, exchange: Exchange) -> None:
        """Forwards it, and sends less than it promises."""
        answer = exchange.forward()
        if exchange.method == "GET" and "Range" in exchange.headers:
            self.asked_for.append(exchange.headers["Range"])
            if self.left:
                self.left -= 1
                exchange.answer_in_part(answer, arrives=True)
                return
        exchange.answer(answer)


def test_a_download_goes_on_where_its_answer_broke_off(
    seaweedfs: SeaweedFS, s3_url: str, environ: pytest.MonkeyPatch, three_parts: Path, tmp_path: Path
) -> None:
    S3Store(s3_url).put_file("model", three_parts)
    with Breaking(seaweedfs.endpoint, left=4) as proxy:
        environ.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        moved: list[int] = []
        S3Store(s3_url).get_file("model", tmp_path / "back", moved.append)
        assert (tmp_path / "back").read_bytes() == three_parts.read_bytes()
        assert sum(moved) == three_parts.stat().st_size
        assert len(proxy.asked_for) == 7
        assert len(set(proxy.asked_for)) == 7, "what had come was not asked for again"

        proxy.left = 1000
        with pytest.raises(StoreUnavailable, match="can't read"):
            S3Store(s3_url).get_file("model", tmp_path / "never")
        assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("style", ["path", "virtual"])
def test_other_servers_are_addressed_by_path_unless_the_aws_config_says_otherwise(
    environ: pytest.MonkeyPatch, tmp_path: Path, style: str
) -> None:
    with CannedS3(200) as server:
        use(environ, server.env())
        environ.setenv("AWS_ENDPOINT_URL", server.endpoint.replace("127.0.0.1", "localhost"))
        if style == "virtual":
            config = tmp_path / "config"
            config.write_text("[default]\ns3 =\n  addressing_style = virtual\n")
            environ.setenv("AWS_CONFIG_FILE", str(config))
        client = S3Store("s3://bucket/run")._client
        signed = client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "k"})

    host = "localhost" if style == "path" else "bucket.localhost"
    assert signed.split("/")[2].split(":")[0] == host


def test_objects_that_consoles_make_for_folders_are_not_listed(seaweedfs: SeaweedFS, s3_url: str) -> None:
    store = S3Store(s3_url)
    store.put("e0001/a", b"")
    prefix = s3_url.removeprefix("s3://tests/")
    seaweedfs.client().put_object(Bucket="tests", Key=f"{prefix}/e0001/folder/", Body=b"")

    assert [info.key for info in store.list()] == ["e0001/a"]


def test_a_store_at_the_top_of_a_bucket_works(seaweedfs: SeaweedFS, s3_url: str) -> None:
    seaweedfs.make_bucket("whole-bucket")
    store = S3Store("s3://whole-bucket")

    probe(store)
    store.put("tip.json", b"1")

    assert (store.url, [info.key for info in store.list()]) == ("s3://whole-bucket", ["tip.json"])


def test_opening_a_store_asks_nobody_and_other_stores_do_not_load_boto3() -> None:
    code = (
        "import sys; from hf_spot.storage.open import open_store; open_store('/tmp/x'); open_store('memory://x');"
        "assert 'boto3' not in sys.modules; open_store('s3://bucket/run'); assert 'boto3' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- permissions, on a real server -------------------------------------------------------------------------------------


def test_who_may_not_write_is_told_which_permission_is_missing(
    seaweedfs: SeaweedFS, s3_url: str, monkeypatch: pytest.MonkeyPatch, sparse: Path
) -> None:
    S3Store(s3_url).put("there", b"x")
    use(monkeypatch, seaweedfs.env_of("reader"))
    store = S3Store(s3_url)

    assert store.get("there") == b"x"
    for attempt in (
        lambda: store.put("k", b""),
        lambda: store.create("k", b""),
        lambda: store.put_file("k", sparse),
        lambda: probe(store),
    ):
        with pytest.raises(AccessDenied) as caught:
            attempt()
        assert f"s3:PutObject on arn:aws:s3:::{s3_url.removeprefix('s3://')}/*" in caught.value.hint
    with pytest.raises(AccessDenied) as caught:
        store.delete(["there"])
    assert "s3:DeleteObject" in caught.value.hint


def test_who_may_not_list_is_told_so_by_the_probe_which_cleans_up(
    seaweedfs: SeaweedFS, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin = S3Store(s3_url)
    assert [*admin.list()] == []
    use(monkeypatch, seaweedfs.env_of("writer"))

    with pytest.raises(AccessDenied, match="listing") as caught:
        probe(S3Store(s3_url))

    assert "s3:ListBucket on arn:aws:s3:::tests " in caught.value.hint
    assert [*admin.list()] == []


def test_a_wrong_bucket_is_named(s3_url: str, tmp_path: Path) -> None:
    store = S3Store("s3://no-such-bucket/run")

    with pytest.raises(BucketNotFound, match="no-such-bucket") as caught:
        probe(store)
    assert "aws s3 mb s3://no-such-bucket" in caught.value.hint
    for attempt in (lambda: store.get("k"), lambda: [*store.list()], lambda: store.get_file("k", tmp_path / "x")):
        with pytest.raises(BucketNotFound):
            attempt()


def test_a_wrong_key_id_or_secret_is_told_apart(
    seaweedfs: SeaweedFS, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "NOBODY")
    with pytest.raises(AccessDenied, match="InvalidAccessKeyId"):
        probe(S3Store(s3_url))
    with pytest.raises(AccessDenied, match="InvalidAccessKeyId"):
        S3Store(s3_url).get_file("k", tmp_path / "x")

    use(monkeypatch, seaweedfs.env())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(AccessDenied, match="SignatureDoesNotMatch") as caught:
        probe(S3Store(s3_url))
    assert "wrong" not in str(caught.value)


def test_a_server_that_ignores_create_if_absent_is_refused_or_used_with_a_warning(
    environ: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Rclone() as server:
        server.make_bucket("bucket")
        use(environ, server.env())
        store = open_store("s3://bucket/run")

        with pytest.raises(StoreNotFencing, match="ignores create-if-absent") as caught:
            probe(store)
        assert "--allow-unfenced-store" in caught.value.hint
        assert "allow_unfenced_store=True" in caught.value.hint
        assert [*store.list()] == []

        probe(store, allow_unfenced=True)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert [*store.list()] == []


# -- errors that no server here can be brought to make ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "expected", "in_hint"),
    [
        (403, "AccessDenied", AccessDenied, "s3:GetObject on arn:aws:s3:::bucket/run/*"),
        (403, "InvalidAccessKeyId", AccessDenied, "aws configure list"),
        (403, "SignatureDoesNotMatch", AccessDenied, "aws configure"),
        (400, "ExpiredToken", AccessDenied, "aws sso login"),
        (403, "RequestTimeTooSkewed", AccessDenied, "clock"),
        (404, "NoSuchBucket", BucketNotFound, "aws s3 mb"),
        (404, "NoSuchKey", ObjectNotFound, ""),
        (400, "InvalidBucketName", ConfigError, "bucket"),
        (400, "EntityTooLarge", ConfigError, "5 TB"),
        (503, "SlowDown", StoreUnavailable, "later"),
        (503, "RequestLimitExceeded", StoreUnavailable, "later"),
        (500, "InternalError", StoreUnavailable, "later"),
        (502, "", StoreUnavailable, "later"),
        (429, "TooManyRequests", StoreUnavailable, "later"),
        (400, "KMS.DisabledException", AccessDenied, "HF_SPOT_S3_SSE_KMS_KEY_ID"),
        (403, "InvalidObjectState", StoreError, "restore-object"),
        (418, "Teapot", StoreError, ""),
    ],
)
def test_an_answer_becomes_an_error_by_its_code(
    environ: pytest.MonkeyPatch, status: int, code: str, expected: type[SpotError], in_hint: str, tmp_path: Path
) -> None:
    with CannedS3(status, code) as server:
        use(environ, server.env())
        store = S3Store("s3://bucket/run")
        with pytest.raises(expected) as caught:
            store.get("k")
        assert type(caught.value) is expected
        assert in_hint in caught.value.hint
        assert code in str(caught.value) or expected in (ObjectNotFound, BucketNotFound)
        with pytest.raises(expected) as caught:  # HEAD has no body, and so no code
            store.get_file("k", tmp_path / "x")
        assert type(caught.value) is expected


@pytest.mark.parametrize(
    ("headers", "details", "in_hint"),
    [
        ({"x-amz-bucket-region": "eu-west-3"}, "", "AWS_REGION=eu-west-3"),
        ({}, "<Region>eu-west-3</Region>", "AWS_REGION=eu-west-3"),
        ({}, "", "aws s3api get-bucket-location --bucket bucket"),
        ({"Location": "https://elsewhere/"}, "", "https://"),
    ],
)
def test_a_bucket_in_another_region_is_named_with_the_region(
    environ: pytest.MonkeyPatch, headers: dict[str, str], details: str, in_hint: str
) -> None:
    with CannedS3(301, "PermanentRedirect", headers=headers, details=details) as server:
        use(environ, server.env())
        with pytest.raises(ConfigError) as caught:
            S3Store("s3://bucket/run").get("k")
    assert in_hint in caught.value.hint
    assert len(server.requests) < 10  # botocore would ask again and again where the bucket is


def test_a_create_that_meets_another_is_tried_again_before_it_gives_up(environ: pytest.MonkeyPatch) -> None:
    with CannedS3(409, "ConditionalRequestConflict") as server:
        use(environ, server.env())
        with pytest.raises(StoreUnavailable, match="ConditionalRequestConflict"):
            S3Store("s3://bucket/run").create("k", b"")
    assert len(server.requests) == 4


def test_a_server_that_refuses_the_condition_is_not_fencing(environ: pytest.MonkeyPatch) -> None:
    with CannedS3(501, "NotImplemented") as server:
        use(environ, server.env())
        with pytest.raises(StoreNotFencing, match="refuses create-if-absent"):
            probe(S3Store("s3://bucket/run"))


def test_a_server_without_batched_deletes_gets_single_ones(environ: pytest.MonkeyPatch) -> None:
    with CannedS3(405, "MethodNotAllowed") as server:
        use(environ, server.env())
        with pytest.raises(StoreError, match="MethodNotAllowed"):
            S3Store("s3://bucket/run").delete(["a", "b"])
    assert [(method, path) for method, path, _ in server.requests] == [
        ("POST", "/bucket?delete"),
        ("DELETE", "/bucket/run/a"),
    ]


def test_a_key_that_a_batch_could_not_delete_is_an_error(environ: pytest.MonkeyPatch) -> None:
    body = "<DeleteResult><Error><Key>run/b</Key><Code>AccessDenied</Code></Error></DeleteResult>"
    with CannedS3(200, body=body) as server:
        use(environ, server.env())
        with pytest.raises(AccessDenied, match="run/b"):
            S3Store("s3://bucket/run").delete(["a", "b"])


def test_without_credentials_the_hint_names_what_to_do(environ: pytest.MonkeyPatch) -> None:
    with CannedS3(200) as server:
        use(environ, server.env())
        environ.delenv("AWS_ACCESS_KEY_ID")
        environ.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(AccessDenied, match="credentials") as caught:
            probe(S3Store("s3://bucket/run"))
    assert "aws configure" in caught.value.hint
    assert "hop" in caught.value.hint


@pytest.mark.parametrize(
    ("variable", "value"),
    [("AWS_PROFILE", "nobody"), ("AWS_ENDPOINT_URL", "not a url"), ("AWS_REGION", "no such region!")],
)
def test_settings_that_cannot_be_used_are_config_errors(environ: pytest.MonkeyPatch, variable: str, value: str) -> None:
    with CannedS3(200) as server:
        use(environ, server.env())
        environ.setenv(variable, value)
        with pytest.raises(ConfigError):
            probe(S3Store("s3://bucket/run"))


def test_an_owner_that_is_no_account_id_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OWNER_VARIABLE, "me")

    with pytest.raises(ConfigError, match="account id"):
        S3Store("s3://bucket/run")


def test_an_endpoint_that_refuses_connections_is_unavailable_and_named(environ: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with CannedS3(200) as server:
            use(environ, server.env() | {"AWS_ENDPOINT_URL": endpoint})
        with pytest.raises(StoreUnavailable) as caught:
            probe(S3Store("s3://bucket/run"))
    assert endpoint.removeprefix("http://") in caught.value.hint


def test_an_endpoint_that_never_answers_is_given_up_by_the_probe(environ: pytest.MonkeyPatch) -> None:
    environ.setattr("hf_spot.storage.probe.LIMIT_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        with CannedS3(200) as server:
            use(environ, server.env() | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"})
        with pytest.raises(StoreUnavailable, match="writing"):
            probe(S3Store("s3://bucket/run"))


def test_who_logs_in_again_while_a_training_goes_on_is_heard(
    seaweedfs: SeaweedFS, s3_url: str, environ: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    good = seaweedfs.env()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        environ.delenv(name)
    environ.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    environ.setenv("AWS_EC2_METADATA_DISABLED", "true")

    def log_in(secret: str) -> None:
        lines = ["[default]", f"aws_access_key_id = {good['AWS_ACCESS_KEY_ID']}", f"aws_secret_access_key = {secret}"]
        (tmp_path / "credentials").write_text("\n".join(lines))

    store = S3Store(s3_url)
    with pytest.raises(AccessDenied, match="credentials"):
        store.put("a", b"1")
    log_in("expired")
    with pytest.raises(AccessDenied, match="SignatureDoesNotMatch"):
        store.put("a", b"1")
    log_in(good["AWS_SECRET_ACCESS_KEY"])
    store.put("a", b"1")
    assert store.get("a") == b"1"


class Revoking(Proxy):
    """Refuses what was signed with a revoked key. Calls ``at_part`` when the second part of a file arrives."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.revoked = ""
        self.at_part: Callable[[], None] = lambda: None
        self.seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def carry(self, exchange: Exchange) -> None:
        """Refuses it, or forwards it."""
        with self._lock:
            if "partNumber=2" in exchange.path and not self.revoked:
                self.at_part()
            refused = exchange.access_key == self.revoked
            upload_begins = exchange.method == "POST" and exchange.path.endswith("?uploads")
            self.seen["refused" if refused else "uploads begun" if upload_begins else "carried out"] += 1
        if refused:
            exchange.refuse(400, "ExpiredToken")
        else:
            exchange.answer(exchange.forward())


@pytest.fixture
def three_parts(environ: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file that travels in three parts, of the smallest size that S3 allows."""
    environ.setattr(s3_parts, "PART_BYTES", 5 << 20)
    path = tmp_path / "three-parts"
    path.write_bytes(bytes(11 << 20))
    return path


@pytest.mark.parametrize("source", ["an agent", "a process", "a file"])
def test_credentials_that_are_refused_in_the_middle_of_an_upload_are_renewed_and_the_upload_goes_on(
    seaweedfs: SeaweedFS, s3_url: str, environ: pytest.MonkeyPatch, three_parts: Path, tmp_path: Path, source: str
) -> None:
    """They had an hour to live, as far as anybody knew: nothing but the refusal says that they are worth nothing."""
    config, secret = tmp_path / "config", seaweedfs.secret_key
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        environ.delenv(name)

    def give(key: str) -> None:
        keys.access_key = key
        lines = ["[default]", f"aws_access_key_id = {key}", f"aws_secret_access_key = {secret}"]
        if source == "a process":
            answer = f'{{"Version": 1, "AccessKeyId": "{key}", "SecretAccessKey": "{secret}"}}'
            lines = ["[default]", f"credential_process = echo '{answer}'"]
        config.write_text("\n".join(lines) if source != "an agent" else "")

    with Revoking(seaweedfs.endpoint) as proxy, KeyServer("ADMINKEY", secret) as keys:
        environ.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        environ.setenv("AWS_CONFIG_FILE", str(config))
        if source == "an agent":
            use(environ, keys.env())

        def revoke(old: str, new: str) -> None:
            give(new)
            proxy.revoked = old

        give("ADMINKEY")
        proxy.at_part = lambda: revoke("ADMINKEY", "ADMINKEY2")
        store = S3Store(s3_url)
        store.put_file("model", three_parts)
        assert proxy.seen["uploads begun"] == 1, "the parts that had arrived were not thrown away"
        assert 1 <= proxy.seen["refused"] <= 3

        for step in (
            lambda: store.get_file("model", tmp_path / "back"),
            lambda: store.put("small", b"1"),
            lambda: store.delete(["small"]),
            lambda: [*store.list()],
        ):
            revoke(keys.access_key, "ADMINKEY" if keys.access_key == "ADMINKEY2" else "ADMINKEY2")
            step()
        assert (tmp_path / "back").stat().st_size == three_parts.stat().st_size

        revoke(keys.access_key, keys.access_key)
        with pytest.raises(AccessDenied, match="ExpiredToken") as caught:
            store.put("small", b"1")
        assert secret not in str(caught.value)


def test_a_wrong_clock_is_named_and_the_store_works_again_when_it_is_right(
    s3_url: str, environ: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The server minds the time of a signature, as Amazon does. A quarter of an hour is forgiven."""
    wrong = timedelta(hours=1)
    for signer in ("botocore.auth", "botocore.crt.auth"):
        if clock := getattr(botocore.compat, "get_current_datetime", None):
            environ.setattr(f"{signer}.get_current_datetime", lambda *args, **kwargs: clock(*args, **kwargs) + wrong)
        else:  # before botocore 1.40
            kind = SimpleNamespace(utcnow=lambda: datetime.now(timezone.utc) + wrong)
            environ.setattr(f"{signer}.datetime", SimpleNamespace(datetime=kind, timezone=timezone))
    store = S3Store(s3_url)
    for attempt in (
        lambda: store.create("a", b""),
        lambda: store.put_file("a", Path(__file__)),
        lambda: store.get_file("a", tmp_path / "a"),
        lambda: [*store.list()],
    ):
        with pytest.raises(AccessDenied, match="RequestTimeTooSkewed") as caught:
            attempt()
        assert "clock is wrong" in str(caught.value)
    wrong = timedelta(minutes=-10)
    store.put_file("a", Path(__file__))
    store.get_file("a", tmp_path / "a")


class Elsewhere(Proxy):
    """A bucket in eu-west-3: requests that are signed for another region are sent there, in one of Amazon's ways."""

    def __init__(self, endpoint: str, way: str) -> None:
        super().__init__(endpoint)
        self.way = way
        self.sent_away = 0

    def carry(self, exchange: Exchange) -> None:
        """Forwards it, or sends it away."""
        if "/eu-west-3/s3/" in exchange.headers["Authorization"]:
            exchange.answer(exchange.forward())
            return
        self.sent_away += 1
        if self.way == "301":
            exchange.refuse(301, "PermanentRedirect", headers={"x-amz-bucket-region": "eu-west-3"})
        else:
            exchange.refuse(400, "AuthorizationHeaderMalformed", details="<Region>eu-west-3</Region>")


@pytest.mark.parametrize("way", ["301", "400"])
def test_a_bucket_in_another_region_is_found_and_used(
    seaweedfs: SeaweedFS, s3_url: str, environ: pytest.MonkeyPatch, three_parts: Path, tmp_path: Path, way: str
) -> None:
    with Elsewhere(seaweedfs.endpoint, way) as proxy:
        environ.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = S3Store(s3_url)
        probe(store)
        assert proxy.sent_away == 1, "it has to be found only once"
        store = S3Store(s3_url)
        store.put_file("model", three_parts)
        S3Store(s3_url).get_file("model", tmp_path / "back")
    assert (tmp_path / "back").stat().st_size == three_parts.stat().st_size


class Silent(Proxy):
    """Says nothing to the first of each kind of request for a second, and then carries it out."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.asked: Counter[str] = Counter()
        self._lock = threading.Lock()

    def carry(self, exchange: Exchange) -> None:
        """Forwards it, now or later."""
        kind = f"{exchange.method} {exchange.path.partition('?')[0].rpartition('/')[2]}"
        with self._lock:
            self.asked[kind] += 1
            first = self.asked[kind] == 1
        if first:
            time.sleep(1.0)
        exchange.answer(exchange.forward())


def test_a_small_request_that_meets_silence_is_soon_sent_again_and_a_large_one_is_given_time(
    seaweedfs: SeaweedFS, s3_url: str, environ: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(1 << 20))
    environ.setattr(s3_connection, "_FIRST_SILENCES_S", (0.3, 5.0))
    with Silent(seaweedfs.endpoint) as proxy:
        environ.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = S3Store(s3_url)
        store.create("entry", b"1")
        assert store.get("entry") == b"1"
        store.put_file("large", large)
        store.get_file("large", tmp_path / "back")
        counts = proxy.asked
        assert (counts["PUT entry"], counts["GET entry"], counts["PUT large"], counts["GET large"]) == (2, 2, 1, 1)
