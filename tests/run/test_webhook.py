"""A webhook is told what happens, by a real HTTP server's account, and nobody ever waits for it or sees its secret."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError
from hf_spot.run import webhook
from hf_spot.run.webhook import Hook, hook_url
from tests.waiting import PATIENCE_S, wait_for

SECRET = "T0123/B4567/s3cr3t"


class Listener:
    """An HTTP server that remembers what it was posted.

    Args:
        statuses: of its answers; the last one goes on. 0 gives no answer until `close`.
    """

    def __init__(self, *statuses: int) -> None:
        self.texts: list[str] = []
        self.types: set[str | None] = set()
        self._let_go = threading.Event()
        listener, left = self, list(statuses or [200])

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == f"/services/{SECRET}"
                listener.types.add(self.headers["Content-Type"])
                status = left.pop(0) if len(left) > 1 else left[0]
                listener.texts.append(json.loads(body)["text"])
                if not status:
                    listener._let_go.wait(PATIENCE_S)
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/services/{SECRET}"

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *error: object) -> None:
        self._let_go.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "_PAUSE_S", 0.01)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_events_are_posted_in_their_order_as_slack_takes_them(caplog: pytest.LogCaptureFixture) -> None:
    with Listener() as listener:
        told = Hook(listener.url, "s3://bucket/run")
        for event in ("launch 1 has begun", "finished at step 9"):
            told.tell(event)
        told.close(PATIENCE_S)
    assert listener.texts == [
        "hf_spot: s3://bucket/run: launch 1 has begun",
        "hf_spot: s3://bucket/run: finished at step 9",
    ]
    assert listener.types == {"application/json"}
    assert said(caplog) == []


def test_what_fails_once_is_tried_once_more(caplog: pytest.LogCaptureFixture) -> None:
    with Listener(503, 200) as listener:
        told = Hook(listener.url, "run")
        told.tell("x")
        told.close(PATIENCE_S)
    assert len(listener.texts) == 2
    assert said(caplog) == []


def test_what_fails_twice_is_one_line_without_the_secret(caplog: pytest.LogCaptureFixture) -> None:
    with Listener(404) as listener:
        told = Hook(listener.url, "run")
        told.tell("x")
        told.close(PATIENCE_S)
        port = listener.url.split(":")[2].split("/")[0]
    assert len(listener.texts) == 2
    nobody = Hook(f"http://127.0.0.1:{port}/services/{SECRET}", "run")
    nobody.tell("y")
    nobody.close(PATIENCE_S)
    lines = said(caplog)
    assert len(lines) == 2
    assert "HTTP status 404" in lines[0]
    assert "Connection refused" in lines[1]
    assert not any(part in line for line in lines for part in SECRET.split("/"))


def test_a_server_that_never_answers_holds_up_nobody(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with Listener(0) as listener:
        told = Hook(listener.url, "run")
        told.tell("x")
        wait_for(lambda: listener.texts)  # it has it, and says nothing
        told.tell("y")
        told.close(0.05)
        assert not told._told[0].done()
        assert listener.texts == ["hf_spot: run: x"]
    monkeypatch.setattr(webhook, "_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        told = Hook(f"http://127.0.0.1:{silent.getsockname()[1]}/services/{SECRET}", "run")
        told.tell("z")
        told.close(PATIENCE_S)
    assert [line for line in said(caplog) if "'hf_spot: run: z'" in line]
    assert "s3cr3t" not in str(said(caplog))


@pytest.mark.parametrize(
    "url", ["", "slack", "ftp://host/s3cr3t", "http:///s3cr3t", "http://host/s3cr3t x", "http://h:1x/s3cr3t"]
)
def test_what_is_no_url_is_refused_without_being_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="on_event is not an http") as caught:
        SpotArguments(on_event=url)
    assert "s3cr3t" not in str(caught.value)
    if url:
        with pytest.raises(ConfigError, match=r"\$HF_SPOT_ON_EVENT is not an http") as caught:
            hook_url(SpotArguments(), {"HF_SPOT_ON_EVENT": url})
        assert "s3cr3t" not in str(caught.value)


def test_the_setting_counts_before_the_environment_and_is_not_printed() -> None:
    arguments = SpotArguments(on_event="https://host/s3cr3t")
    assert hook_url(arguments, {"HF_SPOT_ON_EVENT": "https://other/"}) == "https://host/s3cr3t"
    assert hook_url(SpotArguments(), {"HF_SPOT_ON_EVENT": "https://other/"}) == "https://other/"
    assert hook_url(SpotArguments(), {}) is None
    assert "s3cr3t" not in repr(arguments)


def test_without_a_url_nothing_is_started() -> None:
    before = threading.active_count()
    told = Hook(None, "run")
    told.tell("x")
    told.close()
    assert threading.active_count() == before
