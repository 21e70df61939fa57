"""The metadata service of EC2, as a real HTTP server."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

import pytest

from hf_spot.errors import ConfigError, SpotError
from hf_spot.notices.aws import IMDSSource
from hf_spot.notices.notice import NoticeKind, PreemptionNotice
from hf_spot.testing import FakeIMDS
from tests.servers import free_ports

ACTION = "/latest/meta-data/spot/instance-action"
TOKEN = "/latest/api/token"


@pytest.fixture
def imds() -> Iterator[FakeIMDS]:
    with FakeIMDS() as server:
        yield server


@pytest.fixture
def source(imds: FakeIMDS) -> IMDSSource:
    return IMDSSource.from_environ(imds.env())


def heard(source: IMDSSource) -> PreemptionNotice:
    notice = source.poll()
    assert notice is not None
    return notice


def asked(imds: FakeIMDS) -> list[tuple[str, str, int]]:
    return [(one.method, one.path, one.status) for one in imds.requests]


# -- what is announced -------------------------------------------------------------------------------------------------


def test_404_is_no_notice(imds: FakeIMDS, source: IMDSSource) -> None:
    assert source.poll() is None
    assert {one.status for one in imds.requests if one.method == "GET"} == {404}


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_every_action_is_a_termination_at_the_time_that_ec2_names(imds: FakeIMDS, source: IMDSSource, action: str) -> None:
    deadline = imds.interrupt(in_s=108, action=action)
    notice = heard(source)
    assert (notice.kind, notice.source, notice.deadline) == (NoticeKind.TERMINATE, "imds", deadline)


def test_repeated_polls_of_one_interruption_return_one_notice(imds: FakeIMDS, source: IMDSSource) -> None:
    imds.interrupt()
    assert source.poll() == source.poll() == source.poll()


def test_a_new_process_gives_the_same_interruption_the_same_id(imds: FakeIMDS, source: IMDSSource) -> None:
    imds.interrupt()
    assert heard(source).id == heard(IMDSSource(imds.endpoint)).id


def test_an_interruption_that_the_emulator_redates_at_every_poll_stays_one_notice_with_its_first_deadline() -> None:
    now = datetime(2026, 1, 1, tzinfo=timezone.utc)
    with FakeIMDS(redate=True, now=lambda: now) as imds:
        source = IMDSSource(imds.endpoint)
        imds.interrupt(in_s=120)
        first = heard(source)
        now += timedelta(seconds=50)
        assert heard(source) == first
        assert first.seconds_left(now) == 70


def test_an_earlier_deadline_is_believed_under_the_same_id(imds: FakeIMDS, source: IMDSSource) -> None:
    imds.interrupt(in_s=120)
    first = heard(source)
    sooner = imds.interrupt(in_s=30)
    second = heard(source)
    assert (second.id, second.deadline) == (first.id, sooner)


def test_another_action_is_another_notice(imds: FakeIMDS, source: IMDSSource) -> None:
    imds.interrupt(action="stop")
    first = heard(source)
    imds.interrupt(action="terminate")
    assert heard(source).id != first.id


@pytest.mark.parametrize("body", ['{"action": "terminate"}', '{"action": "terminate", "time": "soon"}'])
def test_an_interruption_at_an_unknown_time_is_still_one(imds: FakeIMDS, source: IMDSSource, body: str) -> None:
    imds.answer("spot/instance-action", body)
    notice = heard(source)
    assert (notice.kind, notice.deadline) == (NoticeKind.TERMINATE, None)


def test_an_interruption_that_is_no_longer_announced_is_cancelled_once(imds: FakeIMDS, source: IMDSSource) -> None:
    imds.interrupt()
    first = heard(source)
    imds.cancel()
    gone = heard(source)
    assert gone.kind is NoticeKind.CANCELLED and first.id in gone.id
    assert source.poll() is None


def test_a_rebalance_recommendation_is_an_advisory_without_deadline(imds: FakeIMDS, source: IMDSSource) -> None:
    imds.rebalance()
    notice = heard(source)
    assert (notice.kind, notice.deadline) == (NoticeKind.ADVISORY, None)
    assert source.poll() == notice


def test_a_recommendation_that_is_redated_at_every_poll_stays_one_notice() -> None:
    now = datetime(2026, 1, 1, tzinfo=timezone.utc)
    with FakeIMDS(redate=True, now=lambda: now) as imds:
        source = IMDSSource(imds.endpoint)
        imds.rebalance()
        first = heard(source)
        now += timedelta(seconds=5)
        assert heard(source) == first


def test_an_interruption_is_heard_even_while_a_rebalance_is_recommended(imds: FakeIMDS, source: IMDSSource) -> None:
    imds.rebalance()
    assert heard(source).kind is NoticeKind.ADVISORY
    imds.interrupt()
    assert heard(source).kind is NoticeKind.TERMINATE


# -- session tokens ----------------------------------------------------------------------------------------------------


def test_one_token_serves_many_polls(imds: FakeIMDS, source: IMDSSource) -> None:
    for _ in range(3):
        source.poll()
    assert [method for method, _, _ in asked(imds)].count("PUT") == 1


def test_a_401_makes_it_fetch_a_new_token_and_ask_again(imds: FakeIMDS, source: IMDSSource) -> None:
    source.poll()
    imds.expire_tokens()
    imds.interrupt()
    before = len(imds.requests)
    assert heard(source).kind is NoticeKind.TERMINATE
    assert asked(imds)[before:] == [("GET", ACTION, 401), ("PUT", TOKEN, 200), ("GET", ACTION, 200)]


def test_a_401_for_a_fresh_token_is_an_error_and_not_a_loop() -> None:
    clock_s = 0.0
    # Tokens that are dead on arrival: the service's clock runs ahead between the PUT and the GET.
    with FakeIMDS(clock=lambda: clock_s) as imds:
        source = IMDSSource(imds.endpoint)
        clock_s = float("inf")
        with pytest.raises(SpotError, match="401"):
            source.poll()
        assert [method for method, _, _ in asked(imds)] == ["PUT", "GET", "PUT", "GET"]


def test_a_token_is_renewed_before_it_expires() -> None:
    clock_s = 0.0
    with FakeIMDS(clock=lambda: clock_s) as imds:
        source = IMDSSource(imds.endpoint, clock=lambda: clock_s)
        source.poll()
        clock_s = 21600 - 30
        source.poll()
        assert [status for method, _, status in asked(imds) if method == "PUT"] == [200, 200]
        assert 401 not in {status for _, _, status in asked(imds)}


def test_a_token_with_a_line_break_is_refused_and_not_kept(imds: FakeIMDS) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        source = IMDSSource(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=5)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\na\r\nb")

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(SpotError, match="not a session token"):
            source.poll()
        thread.join()


# -- trouble -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["", "<html>", '{"action": "termi', "[1]", "null", "{}", '{"action": 7}'])
def test_a_malformed_answer_is_an_error_that_names_it(imds: FakeIMDS, source: IMDSSource, body: str) -> None:
    imds.answer("spot/instance-action", body)
    with pytest.raises(SpotError, match=r"instance-action|interruption"):
        source.poll()


def test_a_server_error_is_an_error_and_the_next_poll_hears(imds: FakeIMDS, source: IMDSSource) -> None:
    imds.interrupt()
    imds.fail(503)
    with pytest.raises(SpotError, match="503"):
        source.poll()
    assert heard(source).kind is NoticeKind.TERMINATE


def test_a_server_error_does_not_cancel_an_interruption(imds: FakeIMDS, source: IMDSSource) -> None:
    imds.interrupt()
    first = heard(source)
    imds.fail(500)
    with pytest.raises(SpotError):
        source.poll()
    assert heard(source) == first


def test_further_attempts_are_made_within_a_poll_if_the_environment_asks_for_them(imds: FakeIMDS) -> None:
    source = IMDSSource.from_environ({**imds.env(), "AWS_METADATA_SERVICE_NUM_ATTEMPTS": "3"})
    imds.interrupt()
    imds.fail(500, times=2)
    assert heard(source).kind is NoticeKind.TERMINATE


def test_a_service_that_stalls_is_given_up_after_the_timeout_of_the_environment(imds: FakeIMDS) -> None:
    source = IMDSSource.from_environ({**imds.env(), "AWS_METADATA_SERVICE_TIMEOUT": "0.2"})
    imds.stall(30)
    began = time.monotonic()
    with pytest.raises(SpotError, match=r"no answer .* in 0\.2 s") as caught:
        source.poll()
    assert time.monotonic() - began < 5
    assert "hop-limit" in caught.value.hint
    imds.stall(0)
    assert source.poll() is None


def test_a_service_that_hangs_up_is_an_error() -> None:
    with FakeIMDS() as imds:
        source = IMDSSource(imds.endpoint)
    with pytest.raises(SpotError, match="no answer"):
        source.poll()


def test_a_service_that_is_switched_off_is_explained(imds: FakeIMDS, source: IMDSSource) -> None:
    imds.fail(403)
    with pytest.raises(SpotError, match="403") as caught:
        source.poll()
    assert "--http-endpoint enabled" in caught.value.hint


# -- where it asks -----------------------------------------------------------------------------------------------------


def test_proxies_of_the_environment_are_bypassed(imds: FakeIMDS, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.setblocking(False)
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        imds.interrupt()
        assert heard(IMDSSource.from_environ(imds.env())).kind is NoticeKind.TERMINATE
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_an_ipv6_endpoint_is_asked() -> None:
    try:
        imds = FakeIMDS(host="::1")
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with imds:
        imds.interrupt()
        assert heard(IMDSSource.from_environ(imds.env())).kind is NoticeKind.TERMINATE


@pytest.mark.parametrize(
    ("environ", "where"),
    [
        ({}, "http://169.254.169.254"),
        ({"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "IPv6"}, "http://[fd00:ec2::254]"),
        ({"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "ipv4"}, "http://169.254.169.254"),
        (
            {
                "AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1338/",
                "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "IPv6",
            },
            "http://127.0.0.1:1338",
        ),
    ],
)
def test_the_endpoint_follows_the_environment(environ: dict[str, str], where: str) -> None:
    assert IMDSSource.from_environ(environ).where == where


@pytest.mark.parametrize(
    "environ",
    [
        {"AWS_EC2_METADATA_DISABLED": "TRUE"},
        {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "169.254.169.254"},
        {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "ftp://host"},
        {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://host:port"},
        {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://[half"},
        {"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "IPv5"},
        {"AWS_METADATA_SERVICE_TIMEOUT": "soon"},
        {"AWS_METADATA_SERVICE_TIMEOUT": "-1"},
        {"AWS_METADATA_SERVICE_TIMEOUT": "nan"},
        {"AWS_METADATA_SERVICE_NUM_ATTEMPTS": "0"},
        {"AWS_METADATA_SERVICE_NUM_ATTEMPTS": "1.5"},
    ],
)
def test_an_environment_that_can_not_be_used_is_refused_with_the_name_of_the_variable(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        IMDSSource.from_environ(environ)
    assert next(iter(environ)) in str(caught.value)


# -- the fake is as strict as the real one -----------------------------------------------------------------------------


def ask(imds: FakeIMDS, method: str, path: str, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", int(imds.endpoint.rpartition(":")[2]), timeout=5)
    try:
        connection.request(method, path, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


def test_the_fake_refuses_what_the_real_service_refuses(imds: FakeIMDS) -> None:
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    assert ask(imds, "GET", ACTION, {}) == 401
    assert ask(imds, "GET", ACTION, {"X-aws-ec2-metadata-token": "made up"}) == 401
    assert ask(imds, "PUT", TOKEN, {}) == 400
    assert ask(imds, "PUT", TOKEN, {"X-aws-ec2-metadata-token-ttl-seconds": "0"}) == 400
    assert ask(imds, "PUT", TOKEN, {"X-aws-ec2-metadata-token-ttl-seconds": "21601"}) == 400
    assert ask(imds, "PUT", TOKEN, {**ttl, "X-Forwarded-For": "10.0.0.1"}) == 403
    assert ask(imds, "GET", TOKEN, ttl) == 405
    assert ask(imds, "PUT", TOKEN, ttl) == 200


def test_a_token_of_the_fake_lives_as_long_as_was_asked_for() -> None:
    clock_s = 0.0
    with FakeIMDS(clock=lambda: clock_s) as imds:
        source = IMDSSource(imds.endpoint, clock=lambda: 0.0)
        source.poll()
        clock_s = 21600.0
        source.poll()
        assert 401 in {status for _, _, status in asked(imds)}


def test_botocore_reads_the_fake_as_it_reads_the_real_service(imds: FakeIMDS) -> None:
    utils = pytest.importorskip("botocore.utils")
    imds.answer("placement/availability-zone/", "us-east-1a")
    fetcher = utils.InstanceMetadataRegionFetcher(env=imds.env(), config={}, base_url=imds.endpoint)
    assert fetcher.retrieve_region() == "us-east-1"


def test_the_fake_stands_on_the_port_and_answers_the_paths_that_it_is_given() -> None:
    document = "/latest/dynamic/instance-identity/document"
    [port] = free_ports(1)
    with FakeIMDS(port=port, metadata={document: "{}", "placement/region": "us-east-1"}) as imds:
        assert imds.endpoint == f"http://127.0.0.1:{port}"
        token = {"X-aws-ec2-metadata-token": IMDSSource(imds.endpoint)._session.token()}
        assert ask(imds, "GET", document, token) == 200
        assert ask(imds, "GET", f"/latest/meta-data{document}", token) == 404
        assert ask(imds, "GET", "/latest/meta-data/placement/region", token) == 200
