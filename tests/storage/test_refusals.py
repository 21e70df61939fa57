"""What servers say when they refuse, in their own words: each message has the code, those words, and what to type."""

from __future__ import annotations

import re
from collections.abc import Callable
from xml.sax.saxutils import escape

import pytest

from hf_spot.cli import main
from hf_spot.errors import AccessDenied, BucketNotFound, ConfigError, SpotError, StoreError, StoreUnavailable
from hf_spot.storage.probe import probe
from hf_spot.storage.s3 import S3Store
from tests.proxy import Answer, Exchange, Proxy
from tests.servers import CannedS3, SeaweedFS, client

CHECKSUMS = "AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
ARN = "User: arn:aws:sts::111122223333:assumed-role/spot/i-0 is not authorized to perform: s3:PutObject on resource: "
# Who says it, status, code, words, our error, what means it, what to type.
REFUSALS: list[tuple[str, int, str, str, type[SpotError], str, str]] = [
    ("Ceph", 403, "QuotaExceeded", "", StoreUnavailable, "no space left for this account or bucket", "--save-total-limit"),
    (
        "MinIO",
        507,
        "XMinioStorageFull",
        "Storage backend has reached its minimum free drive threshold.",
        StoreUnavailable,
        "no space left",
        "prune",
    ),
    (
        "MinIO",
        400,
        "XMinioAdminBucketQuotaExceeded",
        "Bucket quota exceeded",
        StoreUnavailable,
        "no space left for this account or bucket",
        "larger quota",
    ),
    (
        "Backblaze",
        403,
        "AccessDenied",
        "Cannot upload files, storage cap exceeded.",
        StoreUnavailable,
        "no space left for this account or bucket",
        "prune",
    ),
    (
        "Wasabi",
        403,
        "Strange",
        "Storage quota reached for this account",
        StoreUnavailable,
        "no space left for this account or bucket",
        "prune",
    ),
    (
        "AWS",
        403,
        "AccessDenied",
        f'{ARN}"x" with an explicit deny in a resource-based policy',
        AccessDenied,
        "denies",
        "get-bucket-policy",
    ),
    (
        "AWS",
        403,
        "AccessDenied",
        f'{ARN}"x" with an explicit deny in a service control policy',
        AccessDenied,
        "denies",
        "server's message for the kind of policy",
    ),
    (
        "AWS",
        403,
        "AccessDenied",
        f"{ARN}because no identity-based policy allows it",
        AccessDenied,
        "do not allow",
        "allow s3:PutObject",
    ),
    ("AWS", 403, "AccessDenied", "Access denied. Bucket is Requester Pays", AccessDenied, "pay", "put-bucket-request-payment"),
    (
        "Google",
        400,
        "UserProjectMissing",
        "Bucket is requester pays bucket but no user project provided.",
        AccessDenied,
        "pay",
        "BucketOwner",
    ),
    (
        "Backblaze",
        400,
        "InvalidArgument",
        "Unsupported header 'x-amz-checksum-crc64nvme' received for this API call.",
        StoreError,
        "",
        CHECKSUMS,
    ),
    (
        "Google",
        403,
        "SignatureDoesNotMatch",
        "The request signature we calculated does not match",
        AccessDenied,
        "checksum",
        CHECKSUMS,
    ),
    ("Google", 400, "MalformedSecurityHeader", "Your request has a malformed header.", StoreError, "", CHECKSUMS),
    (
        "Huawei OBS",
        400,
        "InvalidRequest",
        "x-amz-sdk-checksum-algorithm specified, but no corresponding header",
        ConfigError,
        "",
        CHECKSUMS,
    ),
    (
        "Cloudflare",
        501,
        "NotImplemented",
        "STREAMING-UNSIGNED-PAYLOAD-TRAILER not implemented",
        ConfigError,
        "support",
        CHECKSUMS,
    ),
    (
        "Alibaba",
        400,
        "InvalidArgument",
        "aws-chunked encoding is not supported with the specified x-amz-content-sha256",
        StoreError,
        "",
        CHECKSUMS,
    ),
    ("Oracle", 400, "BadDigest", "The checksum could not be verified", StoreUnavailable, "damaged", CHECKSUMS),
    (
        "AWS",
        403,
        "InvalidAccessKeyId",
        "The AWS Access Key Id you provided does not exist in our records.",
        AccessDenied,
        "",
        "aws configure list",
    ),
    (
        "AWS",
        403,
        "RequestTimeTooSkewed",
        "The difference between the request time and the server's time is too large.",
        AccessDenied,
        "clock",
        "chronyc",
    ),
    ("AWS", 404, "NoSuchBucket", "The specified bucket does not exist", BucketNotFound, "does not exist", "aws s3 mb"),
    ("AWS", 503, "SlowDown", "Please reduce your request rate.", StoreUnavailable, "too many requests", "later"),
    ("AWS", 403, "AllAccessDisabled", "All access to this object has been disabled.", AccessDenied, "", "s3:PutObject"),
    ("somebody", 418, "Teapot", "I am short and stout", StoreError, "short and stout", ""),
]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REQUEST_CHECKSUM_CALCULATION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0.0)


class Saying(CannedS3):
    """Refuses everything in these words."""

    def __init__(self, status: int, code: str, words: str) -> None:
        super().__init__(status, body=f"<Error><Code>{code}</Code><Message>{escape(words)}</Message></Error>")


def use(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("status", "code", "words", "kind", "means", "hint"),
    [row[1:] for row in REFUSALS],
    ids=[f"{who}: {code} {words[:30]}" for who, _, code, words, *_ in REFUSALS],
)
def test_each_is_told_with_its_code_its_words_what_it_means_and_what_to_type(
    status: int, code: str, words: str, kind: type[SpotError], means: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Saying(status, code, words) as server:
        use(monkeypatch, server.env())
        with pytest.raises(SpotError) as caught:
            S3Store("s3://bucket/run").put("k", b"x")
    told = caught.value.args[0]
    assert type(caught.value) is kind, told
    assert code in told
    assert words.rstrip(".") in told
    assert means in told
    assert hint in caught.value.hint
    assert "\n" not in told
    assert not re.search(r"(: ){2}|None|\{\w+\}", str(caught.value))


def test_a_checksum_is_no_reason_where_none_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with Saying(403, "SignatureDoesNotMatch", "does not match") as server:
        use(monkeypatch, server.env())
        with pytest.raises(AccessDenied) as caught:
            S3Store("s3://bucket/run").get("k")
        assert CHECKSUMS not in caught.value.hint
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        with pytest.raises(AccessDenied) as caught:
            S3Store("s3://bucket/run").put("k", b"")
        assert CHECKSUMS not in caught.value.hint
        assert "aws configure" in caught.value.hint


def test_a_server_that_knows_no_checksums_is_not_taken_for_one_that_knows_no_conditions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Saying(
        501, "NotImplemented", "A header you provided implies functionality that is not implemented: x-amz-checksum-crc32"
    ) as server:
        use(monkeypatch, server.env())
        with pytest.raises(ConfigError) as caught:
            probe(S3Store("s3://bucket/run"))
    assert CHECKSUMS in caught.value.hint


class Picky(Proxy):
    """A server that refuses some requests with a code of its own."""

    def __init__(self, endpoint: str, refuses: Callable[[Exchange], bool], status: int, code: str) -> None:
        super().__init__(endpoint)
        self._refuses = refuses
        self._refusal = status, code
        self.asked: list[str] = []

    def carry(self, exchange: Exchange) -> None:
        self.asked.append(f"{exchange.method} {exchange.path}")
        if self._refuses(exchange):
            exchange.refuse(*self._refusal)
        else:
            super().carry(exchange)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "AccessDenied"),
        (400, "InvalidArgument"),
        (400, "MissingContentMD5"),
        (403, "SignatureDoesNotMatch"),
        (501, "NotImplemented"),
        (400, "MalformedXML"),
        (405, "MethodNotAllowed"),
    ],
)
def test_whatever_refuses_a_batch_of_deletes_is_asked_for_single_ones(
    status: int, code: str, seaweedfs: SeaweedFS, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Picky(
        seaweedfs.endpoint, lambda exchange: exchange.method == "POST" and "?delete" in exchange.path, status, code
    ) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = S3Store(s3_url)
        for _ in range(2):
            for key in "abc":
                store.put(key, b"x")
            store.delete(["a", "b"])
            assert [info.key for info in store.list()] == ["c"]
        assert sum("?delete" in one for one in proxy.asked) == 1, "it is tried once"
        probe(store)


@pytest.mark.parametrize(
    ("endpoint", "instead"),
    [
        ("https://bucket.s3.eu-west-1.amazonaws.com", "https://s3.eu-west-1.amazonaws.com"),
        ("https://account.r2.cloudflarestorage.com/bucket", "https://account.r2.cloudflarestorage.com"),
        ("https://account.r2.cloudflarestorage.com/bucket/", "https://account.r2.cloudflarestorage.com"),
        ("http://127.0.0.1:9000/bucket", "http://127.0.0.1:9000"),
        ("https://bucket.fra1.digitaloceanspaces.com", "https://fra1.digitaloceanspaces.com"),
        ("https://user:secret@minio.example.com/bucket", "https://minio.example.com"),
    ],
)
def test_an_endpoint_that_names_the_bucket_is_refused_before_anything_is_asked(
    endpoint: str, instead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CannedS3(404) as server:
        use(monkeypatch, server.env())
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(ConfigError, match="name of the bucket") as caught:
            S3Store("s3://bucket/run").get("k")
        assert caught.value.hint == f"export AWS_ENDPOINT_URL={instead}"
        assert "secret" not in str(caught.value)
        for fine in ("https://bucket.example.com", "http://127.0.0.1:9/other", "https://s3.amazonaws.com"):
            monkeypatch.setenv("AWS_ENDPOINT_URL", fine)
            assert S3Store("s3://bucket/run")._connection
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)


class Express(Proxy):
    """Lists as a directory bucket does: folders only, from their beginning, and in no order. It gives sessions of the key."""

    def carry(self, exchange: Exchange) -> None:
        if exchange.method == "GET" and re.search(r"[?&]session\b", exchange.path):
            keys = "<SecretAccessKey>adminsecret</SecretAccessKey><AccessKeyId>ADMINKEY</AccessKeyId>"
            given = f"{keys}<SessionToken>token</SessionToken><Expiration>2999-01-01T00:00:00Z</Expiration>"
            exchange.answer(Answer(200, {}, f"<R><Credentials>{given}</Credentials></R>".encode()))
            return
        if exchange.method == "GET" and "list-type=2" in exchange.path:
            prefix = re.search(r"prefix=([^&]*)", exchange.path)
            if "start-after" in exchange.path or (prefix and prefix[1] and not prefix[1].endswith("%2F")):
                exchange.refuse(400, "InvalidRequest")
                return
            answer = exchange.forward()
            items = re.findall(rb"<Contents>.*?</Contents>", answer.content, re.DOTALL)
            content = re.sub(rb"<Contents>.*</Contents>", b"".join(reversed(items)), answer.content, flags=re.DOTALL)
            exchange.answer(Answer(answer.status, answer.headers, content))
            return
        super().carry(exchange)


def test_a_directory_bucket_of_s3_express_is_a_store(
    seaweedfs: SeaweedFS, s3_url: str, monkeypatch: pytest.MonkeyPatch, make_checkpoint: Callable[[int], object]
) -> None:
    from hf_spot.run.checkpoint import CommitRequest
    from hf_spot.run.run import Run

    bucket = "runs--use1-az4--x-s3"
    with Express(seaweedfs.endpoint) as proxy:
        client(proxy.endpoint, seaweedfs.access_key, seaweedfs.secret_key).create_bucket(Bucket=bucket)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = S3Store(f"s3://{bucket}/run")
        for key in ("a/1", "a/2", "a/10", "ab", "b"):
            store.put(key, b"x")
        assert [info.key for info in store.list()] == ["a/1", "a/10", "a/2", "ab", "b"]
        assert [info.key for info in store.list("a/1")] == ["a/1", "a/10"]
        assert [info.key for info in store.list(start_after="a/2")] == ["ab", "b"]
        store.delete(["a/1", "a/2", "a/10", "ab", "b"])
        run = Run(f"s3://{bucket}/run")
        run.claim()
        for step in (1, 2, 3):
            request = CommitRequest(step=step)
            run.commit(request, run.upload(make_checkpoint(step), request))  # type: ignore[arg-type]
            run.prune(2)
        assert [ref.step for ref in Run(f"s3://{bucket}/run").state().checkpoints] == [2, 3]
        assert Run(f"s3://{bucket}/run").claim() == 2
        assert run.journal.refresh().launch == 2


@pytest.mark.parametrize(
    "endpoint",
    ["http://me:hunter2@127.0.0.1:9", "http://hunter2@127.0.0.1:9", "http://me:hunter2@[bad", "ftp://me:hunter2@host:x"],
)
@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "HTTP_PROXY", "HTTPS_PROXY"])
def test_a_password_in_a_url_is_never_printed(
    endpoint: str, variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hf_spot.storage.s3_connection._TRIES", 1)
    with CannedS3(404) as server:
        use(monkeypatch, server.env())
        if variable.endswith("PROXY"):
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"{variable.partition('_')[0].lower()}://s3.example.com")
            monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.setenv(variable, endpoint)
        with pytest.raises(SpotError) as caught:
            S3Store("s3://bucket/run").get("k")
        assert "hunter2" not in str(caught.value)
        assert main(["checkpoints", "ls", "s3://bucket/run"]) == 2
        assert main(["doctor", "--store", "s3://bucket/run"]) in (1, 2)
    said = capsys.readouterr()
    assert "hunter2" not in said.out + said.err
