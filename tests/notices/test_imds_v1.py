"""Where only the first version of EC2's metadata service answers, a notice is heard as botocore would hear it."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from botocore.utils import InstanceMetadataFetcher

from hf_spot.errors import SpotError
from hf_spot.notices.aws import V1_DISABLED_VARIABLE, IMDSSource
from hf_spot.notices.notice import NoticeKind

WAYS = ["hangs", 403, 404, 405]


class V1:
    """Answers GET; PUT hangs, as behind one hop too many, or is refused."""

    def __init__(self, way: str | int, v2_required: bool = False) -> None:
        self.puts = self.gets = 0
        self.announces = False
        self.v2_required = v2_required
        self.hang = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                fake.puts += 1
                if way == "hangs":
                    fake.hang.wait(20)
                else:
                    self.send_error(int(way))

            def do_GET(self) -> None:
                fake.gets += 1
                path = self.path.removeprefix("/latest/meta-data/")
                bodies = {"iam/security-credentials/": "role"}
                keys = {"AccessKeyId": "A", "SecretAccessKey": "S", "Token": "T", "Expiration": "2999-01-01T00:00:00Z"}
                bodies["iam/security-credentials/role"] = json.dumps({"Code": "Success", **keys})
                if fake.announces:
                    bodies["spot/instance-action"] = '{"action": "terminate", "time": "2030-01-01T00:00:00Z"}'
                body = bodies.get(path, "").encode()
                self.send_response(401 if fake.v2_required else 200 if body else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Tests have better things to print."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> V1:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.hang.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(params=WAYS, ids=str)
def service(request: pytest.FixtureRequest) -> Iterator[V1]:
    with V1(request.param) as made:
        yield made


def test_the_notice_is_heard_and_the_hint_says_how_to_turn_version_2_on(service: V1, caplog: pytest.LogCaptureFixture) -> None:
    # botocore's own fetcher gets on with this service: so must we.
    fetcher = InstanceMetadataFetcher(timeout=0.3, num_attempts=1, base_url=f"{service.endpoint}/")
    assert fetcher.retrieve_iam_role_credentials()["access_key"] == "A"
    service.puts = 0
    now = [0.0]
    source = IMDSSource(service.endpoint, timeout_s=0.3, clock=lambda: now[0])
    with caplog.at_level(logging.WARNING, "hf_spot"):
        assert source.poll() is None
        service.announces = True
        began = time.monotonic()
        notice = source.poll()
        assert time.monotonic() - began < 0.25, "who hung once is not waited for at each poll"
    assert notice is not None
    assert notice.kind is NoticeKind.TERMINATE
    assert notice.deadline is not None and notice.deadline.year == 2030
    assert service.puts == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "--http-tokens required" in caplog.text
    assert "--http-put-response-hop-limit 2" in caplog.text
    now[0] = 1000.0  # and some time later version 2 may be there
    source.poll()
    assert service.puts == 2


def test_what_requires_version_2_or_may_not_be_asked_in_version_1_stays_an_error(service: V1) -> None:
    strict = IMDSSource(service.endpoint, timeout_s=0.3, allow_v1=False)
    with pytest.raises(SpotError):
        strict.poll()
    variables = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": service.endpoint, V1_DISABLED_VARIABLE: "true"}
    with pytest.raises(SpotError):
        IMDSSource.from_environ(variables, timeout_s=0.3).poll()
    assert service.gets == 0
    service.v2_required = True
    with pytest.raises(SpotError, match=r"status|no answer"):
        IMDSSource(service.endpoint, timeout_s=0.3).poll()
