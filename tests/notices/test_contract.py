"""What every source of notices promises, and what those that ask a metadata service over HTTP promise besides.

A new source is one more `Case`, with what makes it speak.
"""

from __future__ import annotations

import configparser
import contextlib
import http.client
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from hf_spot.arguments import NOTICE_NAMES, SpotArguments
from hf_spot.errors import SpotError
from hf_spot.notices.alibaba import AlibabaSource
from hf_spot.notices.aws import IMDSSource
from hf_spot.notices.azure import AzureSource
from hf_spot.notices.detect import sources
from hf_spot.notices.file import FileSource
from hf_spot.notices.gcp import GCPSource
from hf_spot.notices.notice import NoticeKind, NoticeSource, PreemptionNotice
from hf_spot.notices.signals import SignalSource
from hf_spot.notices.slurm import SlurmSource
from hf_spot.notices.watcher import Watcher
from hf_spot.testing import FakeAlibaba, FakeAzure, FakeGCP, FakeIMDS, FakeService, check_source
from tests.waiting import wait_for

LONG_S = 60.0


@dataclass
class Service:
    """A metadata service, and a source that asks it."""

    fake: FakeService
    make: Callable[[str], NoticeSource]
    source: NoticeSource

    def another(self) -> NoticeSource:
        """As another process would have it."""
        return self.make(self.fake.endpoint)


# What a service says when it has nothing sensible to say. Each is answered to every request of one poll.
GARBAGE = ["", "<html>", '{"Events": 7}', '{"action": "termi', "[1]", "null", '{"Events": [{"EventType": "Preempt"}]}']

SERVICES: dict[str, tuple[Callable[[], FakeService], Callable[[str], NoticeSource]]] = {
    "imds": (FakeIMDS, lambda endpoint: IMDSSource(endpoint, timeout_s=LONG_S, interval_s=0.01)),
    "gcp": (
        FakeGCP,
        lambda endpoint: GCPSource(endpoint.removeprefix("http://"), timeout_s=LONG_S, wait_s=0, interval_s=0.01),
    ),
    "azure": (FakeAzure, lambda endpoint: AzureSource(endpoint, timeout_s=LONG_S, interval_s=0.01)),
    "alibaba": (FakeAlibaba, lambda endpoint: AlibabaSource(endpoint, timeout_s=LONG_S, interval_s=0.01)),
}
HASTY: dict[str, Callable[[str], NoticeSource]] = {
    "imds": lambda endpoint: IMDSSource(endpoint, timeout_s=0.2),
    "gcp": lambda endpoint: GCPSource(endpoint.removeprefix("http://"), timeout_s=0.2),
    "azure": lambda endpoint: AzureSource(endpoint, timeout_s=0.2, first_answer_s=0),
    "alibaba": lambda endpoint: AlibabaSource(endpoint, timeout_s=0.2),
}


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    fake, make = SERVICES[request.param]
    with fake() as server:
        yield Service(server, make, make(server.endpoint))


def heard(source: NoticeSource) -> PreemptionNotice:
    notice = source.poll()
    assert notice is not None
    return notice


# -- every source ------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A source that has heard nothing yet, what makes it hear the end of the machine, and what takes that back."""

    source: NoticeSource
    announce: Callable[[], object]
    withdraw: Callable[[], object] | None = None


def signal_case(stack: ExitStack, folder: Path) -> Case:
    return Case(SignalSource(["SIGUSR2"], grace_s=30), lambda: os.kill(os.getpid(), signal.SIGUSR2))


def file_case(stack: ExitStack, folder: Path) -> Case:
    path = folder / "notice"
    return Case(FileSource(path), lambda: path.write_text('{"deadline_s": 30}'), path.unlink)


def slurm_case(stack: ExitStack, folder: Path) -> Case:
    clock = [datetime(2026, 1, 1, tzinfo=timezone.utc)]
    source = SlurmSource(clock[0] + timedelta(hours=1), now=lambda: clock[0])
    return Case(source, lambda: clock.append(clock.pop() + timedelta(minutes=59)))


def service_case(name: str) -> Callable[[ExitStack, Path], Case]:
    def make(stack: ExitStack, folder: Path) -> Case:
        server = stack.enter_context(SERVICES[name][0]())
        return Case(SERVICES[name][1](server.endpoint), lambda: server.interrupt(in_s=30), server.cancel)

    return make


PAGE = Path(__file__).resolve().parents[2] / ".github" / "docs" / "notices.md"


def block(name: str) -> str:
    """A file that the page shows."""
    (text,) = re.findall(rf"^```\w+\n# {re.escape(name)}\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return str(text)


def install_what_the_page_shows(stack: ExitStack, folder: Path) -> None:
    """As ``pip install .`` leaves it."""
    package = configparser.ConfigParser()
    package.read_string(block("pyproject.toml"))
    section = 'project.entry-points."hf_spot.notices"'
    entries = [f"{name} = {value.strip(chr(34))}" for name, value in package[section].items()]
    info = folder / "shutdown_notice-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shutdown-notice\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(["[hf_spot.notices]", *entries, ""]))
    (folder / "shutdown_notice.py").write_text(block("shutdown_notice.py"))
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.syspath_prepend(folder)
    stack.callback(sys.modules.pop, "shutdown_notice", None)


def page_case(stack: ExitStack, folder: Path) -> Case:
    install_what_the_page_shows(stack, folder)
    scheduled = folder / "scheduled"
    (source,) = sources(SpotArguments(notice=f"shutdown:{scheduled}"), environ={})
    at = datetime.now(timezone.utc) + timedelta(seconds=60)
    text = f"USEC={int(at.timestamp() * 1e6)}\nWARN_WALL=1\nMODE=poweroff\n"
    return Case(source, lambda: scheduled.write_text(text), scheduled.unlink)


OURS: dict[str, Callable[[ExitStack, Path], Case]] = {
    "signal": signal_case,
    "file": file_case,
    "slurm": slurm_case,
    **{name: service_case(name) for name in SERVICES},
}
CASES = {**OURS, "the page's": page_case}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    with ExitStack() as stack:
        yield CASES[request.param](stack, tmp_path)


def test_every_name_for_the_command_line_has_its_case() -> None:
    assert set(OURS) == set(NOTICE_NAMES) - {"auto", "none"}


def test_a_source_keeps_the_contract_and_states_a_deadline(case: Case) -> None:
    notice = check_source(case.source, case.announce, case.withdraw)
    assert notice.deadline is not None


@pytest.mark.parametrize("name", OURS)
def test_a_source_of_ours_says_where_it_listens_and_asks_often(name: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        source = OURS[name](stack, tmp_path).source
        assert source.name == name and getattr(source, "where", "")
        assert 0 < source.interval_s <= 5


def test_the_example_of_the_page_is_short_and_the_test_that_it_shows_passes(tmp_path: Path) -> None:
    assert len(block("shutdown_notice.py").splitlines()) <= 25
    with ExitStack() as stack:
        install_what_the_page_shows(stack, tmp_path)
        shown: dict[str, Any] = {}
        exec(compile(block("test_shutdown_notice.py"), "test_shutdown_notice.py", "exec"), shown)
        tests = [test for name, test in shown.items() if name.startswith("test_")]
        for test in tests:
            test(tmp_path)
    assert len(tests) == 1


class Perfect:
    """A source that keeps every promise; those below break one each."""

    name, interval_s = "mine", 1.0
    announced: PreemptionNotice | None = None
    polls = 0

    def announce(self) -> None:
        self.announced = PreemptionNotice(NoticeKind.TERMINATE, self.name, "the end", datetime(2030, 1, 1, tzinfo=timezone.utc))

    def withdraw(self) -> None:
        self.announced = PreemptionNotice(NoticeKind.CANCELLED, self.name, "not the end")

    def poll(self) -> PreemptionNotice | None:
        self.polls += 1
        return self.announced


class TwoWords(Perfect):
    name = "my source"


class Sleepy(Perfect):
    interval_s = 3600.0


class Panicking(Perfect):
    def poll(self) -> PreemptionNotice | None:
        self.announce()
        return self.announced


class Deaf(Perfect):
    def announce(self) -> None:
        pass


class Harmless(Perfect):
    def announce(self) -> None:
        self.announced = PreemptionNotice(NoticeKind.ADVISORY, self.name, "the end")


class Anonymous(Perfect):
    def announce(self) -> None:
        self.announced = PreemptionNotice(NoticeKind.TERMINATE, "somebody", "the end")


class Renaming(Perfect):
    def poll(self) -> PreemptionNotice | None:
        notice = super().poll()
        return notice and replace(notice, id=f"the end, {self.polls}")


class Postponing(Perfect):
    def poll(self) -> PreemptionNotice | None:
        notice = super().poll()
        return notice and replace(notice, deadline=datetime(2030 + self.polls, 1, 1, tzinfo=timezone.utc))


class Silent(Perfect):
    def withdraw(self) -> None:
        self.announced = None


@pytest.mark.parametrize(
    ("kind", "broken"),
    [
        (object, "has name, interval_s and poll"),
        (TwoWords, "one word"),
        (Sleepy, "at most a minute"),
        (Panicking, "returns None before an announcement"),
        (Deaf, "after an announcement returns a notice"),
        (Harmless, "is a TERMINATE"),
        (Anonymous, "names its source"),
        (Renaming, "keeps its id"),
        (Postponing, "the deadline stays"),
        (Silent, "is CANCELLED, once"),
    ],
)
def test_the_contract_names_the_promise_that_a_source_breaks(kind: type[Any], broken: str) -> None:
    source = kind()
    with pytest.raises(AssertionError, match=broken):
        check_source(source, getattr(source, "announce", print), getattr(source, "withdraw", None))


def test_the_contract_has_nothing_to_say_of_a_source_that_keeps_it() -> None:
    one, other = Perfect(), Perfect()
    assert check_source(one, one.announce, one.withdraw).id == "the end"
    assert check_source(other, other.announce).id == "the end"


# -- those that ask over HTTP ------------------------------------------------------------------------------------------


def test_the_deadline_is_the_one_that_was_announced(service: Service) -> None:
    deadline = service.fake.interrupt(in_s=30)
    notice = heard(service.source)
    assert notice.deadline is not None
    assert abs(notice.deadline - deadline) < timedelta(seconds=LONG_S)  # of GCP: by the clock of whoever hears


def test_another_process_gives_the_same_end_the_same_id(service: Service) -> None:
    service.fake.interrupt(in_s=30)
    assert heard(service.source).id == heard(service.another()).id


def test_an_end_that_is_no_longer_announced_is_cancelled_once_and_can_come_again(service: Service) -> None:
    service.fake.interrupt(in_s=30)
    first = heard(service.source)
    service.fake.cancel()
    gone = heard(service.source)
    assert gone.kind is NoticeKind.CANCELLED and first.id in gone.id
    assert service.source.poll() is None
    service.fake.interrupt(in_s=30)
    assert heard(service.source).kind is NoticeKind.TERMINATE


@pytest.mark.parametrize("status", [400, 403, 429, 500, 503])
def test_a_refused_request_is_an_error_and_the_next_poll_hears(service: Service, status: int) -> None:
    assert service.source.poll() is None
    service.fake.interrupt(in_s=30)
    service.fake.fail(status)
    with pytest.raises(SpotError, match=str(status)):
        service.source.poll()
    assert heard(service.source).kind is NoticeKind.TERMINATE


def test_a_service_that_knows_nothing_of_notices_is_no_notice_and_the_next_poll_hears(service: Service) -> None:
    service.source.poll()
    service.fake.interrupt(in_s=30)
    service.fake.fail(404)
    with contextlib.suppress(SpotError):  # of EC2 and Alibaba it is how they say that there is none
        assert service.source.poll() is None
    assert heard(service.source).kind is NoticeKind.TERMINATE


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_an_error_and_nobody_follows_it(service: Service, status: int) -> None:
    service.source.poll()
    with FakeIMDS() as elsewhere:
        service.fake.fail(status, headers={"Location": f"{elsewhere.endpoint}/latest/meta-data/spot/instance-action"})
        with pytest.raises(SpotError, match=str(status)):
            service.source.poll()
        assert elsewhere.requests == []
    service.fake.interrupt(in_s=30)
    assert heard(service.source).kind is NoticeKind.TERMINATE


def test_an_answer_that_breaks_off_is_an_error_even_where_its_beginning_makes_sense(service: Service) -> None:
    beginning = {
        "imds": '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}',
        "gcp": "TRUE",
        "azure": '{"DocumentIncarnation": 1, "Events": []}',
        "alibaba": "2026-01-01",
    }[service.source.name]
    service.fake.interrupt(in_s=30)
    first = heard(service.source)
    headers = {"Content-Length": "400", "Connection": "close", "Metadata-Flavor": "Google"}
    service.fake.fail(200, body=beginning, headers=headers)
    with pytest.raises(SpotError, match="no answer"):
        service.source.poll()
    assert heard(service.source).id == first.id


def test_a_server_that_speaks_another_protocol_is_an_error_that_names_it(service: Service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        where = f"127.0.0.1:{other.getsockname()[1]}"

        def greet() -> None:  # every connection: EC2's source asks a second time, without a token
            while True:
                try:
                    connection, _ = other.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                    connection.recv(65536)  # closed unread, the request would reset the connection before the greeting is read

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(SpotError, match=where):
            service.make(f"http://{where}").poll()
        other.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_an_answer_that_takes_its_time_is_waited_for(service: Service) -> None:
    service.fake.interrupt(in_s=30)
    service.fake.stall(0.05)
    assert heard(service.source).kind is NoticeKind.TERMINATE


def test_trouble_cancels_nothing(service: Service) -> None:
    service.fake.interrupt(in_s=30)
    first = heard(service.source)
    service.fake.fail(500)
    with pytest.raises(SpotError):
        service.source.poll()
    second = heard(service.source)
    assert (second.kind, second.id) == (first.kind, first.id)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_is_an_error_that_names_the_service_and_no_notice(service: Service, garbage: str) -> None:
    service.source.poll()
    service.fake.fail(200, body=garbage)
    with pytest.raises(SpotError) as caught:
        service.source.poll()
    assert service.fake.address in str(caught.value)
    assert service.source.poll() is None


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_that_hangs_is_given_up_and_heard_when_it_is_back(name: str) -> None:
    with SERVICES[name][0]() as fake:
        source = HASTY[name](fake.endpoint)
        fake.interrupt(in_s=30)
        fake.stall(LONG_S)
        with pytest.raises(SpotError, match=r"no answer from .* in 0\.2 s"):
            source.poll()
        fake.stall(0)
        assert heard(SERVICES[name][1](fake.endpoint)).kind is NoticeKind.TERMINATE


def test_a_service_that_is_gone_is_an_error(service: Service) -> None:
    service.fake.stop()
    with pytest.raises(SpotError, match="no answer"):
        service.source.poll()


def test_proxies_of_the_environment_are_bypassed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.setblocking(False)
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        service.fake.interrupt(in_s=30)
        assert heard(service.source).kind is NoticeKind.TERMINATE
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_every_request_carries_what_the_service_demands_and_came_through_no_proxy(service: Service) -> None:
    service.source.poll()
    service.source.poll()
    assert {request.status for request in service.fake.requests} <= {200, 404}
    assert not [request for request in service.fake.requests if "x-forwarded-for" in request.headers]


def test_the_threads_of_a_watcher_hear_it_through_trouble_and_log_that_once(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[PreemptionNotice] = []
    service.fake.fail(503, times=5)
    with caplog.at_level(logging.WARNING, "hf_spot"), Watcher([service.source], told.append):
        wait_for(lambda: len(service.fake.requests) > 6)
        service.fake.interrupt(in_s=30)
        wait_for(lambda: told)
        service.fake.cancel()
        wait_for(lambda: len(told) > 1)
    assert [notice.kind for notice in told] == [NoticeKind.TERMINATE, NoticeKind.CANCELLED]
    assert sum("it is polled again" in record.message for record in caplog.records) == 1


def test_the_variables_of_the_fake_lead_the_automatic_choice_to_it(service: Service, tmp_path: Path) -> None:
    found = sources(SpotArguments(), environ=service.fake.env(), dmi=tmp_path, hypervisor_uuid=tmp_path / "none")
    assert [one.name for one in found] == ["signal", service.source.name]
    assert getattr(found[1], "where", "") == service.fake.endpoint
    service.fake.interrupt(in_s=30)
    assert heard(found[1]).kind is NoticeKind.TERMINATE


@pytest.mark.parametrize("name", SERVICES)
def test_the_fake_refuses_a_request_that_lacks_what_the_real_service_demands(name: str) -> None:
    paths = {
        "imds": "/latest/meta-data/spot/instance-action",
        "gcp": "/computeMetadata/v1/instance/preempted",
        "azure": "/metadata/scheduledevents?api-version=2020-07-01",
        "alibaba": "/latest/meta-data/instance/spot/termination-time",
    }
    with SERVICES[name][0]() as fake:
        connection = http.client.HTTPConnection(fake.address, timeout=LONG_S)
        try:
            connection.request("GET", paths[name])
            assert connection.getresponse().status in (400, 401, 403)
        finally:
            connection.close()


def test_a_source_can_be_polled_while_another_thread_asks_the_same_service(service: Service) -> None:
    service.fake.interrupt(in_s=30)
    answers: list[PreemptionNotice | None] = []
    threads = [threading.Thread(target=lambda: answers.append(service.another().poll())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer.id for answer in answers if answer}) == 1 and None not in answers
