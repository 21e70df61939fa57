"""What each cloud's protocol has of its own. What all have in common is in test_contract.py; EC2's is in test_imds.py."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

import pytest

from hf_spot.errors import ConfigError, SpotError
from hf_spot.notices.alibaba import AlibabaSource
from hf_spot.notices.azure import AzureSource
from hf_spot.notices.gcp import GCPSource
from hf_spot.notices.metadata import MetadataService
from hf_spot.notices.notice import NoticeKind, NoticeSource, PreemptionNotice
from hf_spot.notices.slurm import SlurmSource
from hf_spot.notices.watcher import Watcher
from hf_spot.testing import FakeAlibaba, FakeAzure, FakeGCP

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
OTHERS = ["that-machine"]


def heard(source: NoticeSource) -> PreemptionNotice:
    notice = source.poll()
    assert notice is not None
    return notice


# -- Google Cloud ------------------------------------------------------------------------------------------------------


@pytest.fixture
def google() -> Iterator[FakeGCP]:
    with FakeGCP() as server:
        yield server


def paths(fake: FakeGCP) -> list[str]:
    return [request.path.removeprefix("/computeMetadata/v1/instance/") for request in fake.requests]


def test_the_first_poll_asks_at_once_and_the_next_waits_for_a_change_of_what_was_read(google: FakeGCP) -> None:
    source = GCPSource(google.address, wait_s=1)
    assert source.poll() is None
    assert source.poll() is None
    first, _, second, _ = paths(google)
    assert first == "preempted"
    assert second.startswith("preempted?wait_for_change=true&timeout_sec=1&last_etag=")


def test_a_waiting_poll_is_answered_when_the_preemption_begins(google: FakeGCP) -> None:
    source = GCPSource(google.address, wait_s=600, timeout_s=60)
    assert source.poll() is None
    answers: list[PreemptionNotice | None] = []
    polls = threading.Thread(target=lambda: answers.append(source.poll()))
    polls.start()
    google.interrupt()
    polls.join()
    assert [answer and answer.kind for answer in answers] == [NoticeKind.TERMINATE]
    assert "wait_for_change" in paths(google)[-1]


def test_a_preemption_between_two_polls_is_heard_at_once(google: FakeGCP) -> None:
    source = GCPSource(google.address, wait_s=600, timeout_s=60)
    source.poll()
    google.interrupt()
    assert heard(source).kind is NoticeKind.TERMINATE


def test_the_deadline_counts_from_when_it_was_first_heard_and_is_not_put_off(google: FakeGCP) -> None:
    now = NOW
    source = GCPSource(google.address, lives_s=120, now=lambda: now)
    google.interrupt()
    first = heard(source)
    assert first.deadline == NOW + timedelta(seconds=120)
    now += timedelta(seconds=50)
    assert heard(source) == first


def test_while_a_preemption_stands_polls_do_not_wait(google: FakeGCP) -> None:
    source = GCPSource(google.address, wait_s=600, timeout_s=60)
    google.interrupt()
    assert heard(source) == heard(source)  # a listener that failed is told again at the next poll
    assert paths(google) == ["preempted", "preempted"]


def test_after_trouble_the_next_poll_does_not_wait(google: FakeGCP) -> None:
    source = GCPSource(google.address, wait_s=600, timeout_s=60)
    source.poll()
    google.fail(503)
    with pytest.raises(SpotError, match="503"):
        source.poll()
    assert source.poll() is None
    assert paths(google)[-2:] == ["preempted", "maintenance-event"]


@pytest.mark.parametrize("event", ["TERMINATE_ON_HOST_MAINTENANCE", "MIGRATE_ON_HOST_MAINTENANCE"])
def test_maintenance_of_the_host_is_an_advisory_that_is_told_once_and_again_when_it_comes_again(
    google: FakeGCP, event: str
) -> None:
    now = NOW
    source = GCPSource(google.address, wait_s=0, now=lambda: now)
    told: list[PreemptionNotice] = []
    watcher = Watcher([source], told.append)
    google.maintain(event)
    watcher.poll_once()
    now += timedelta(seconds=60)
    watcher.poll_once()
    assert [(notice.kind, notice.deadline) for notice in told] == [(NoticeKind.ADVISORY, None)]
    assert event in told[0].id
    google.cancel()
    watcher.poll_once()
    google.maintain(event)
    watcher.poll_once()
    assert [notice.kind for notice in told] == [NoticeKind.ADVISORY] * 2


def test_a_preemption_counts_more_than_maintenance(google: FakeGCP) -> None:
    google.maintain()
    google.interrupt()
    assert heard(GCPSource(google.address)).kind is NoticeKind.TERMINATE


@pytest.mark.parametrize("body", ["", "true", "PERHAPS", "<html>"])
def test_what_is_neither_true_nor_false_is_an_error(google: FakeGCP, body: str) -> None:
    google.answer("preempted", body)
    with pytest.raises(SpotError, match="neither TRUE nor FALSE"):
        GCPSource(google.address).poll()


def test_a_server_that_is_not_googles_is_not_believed() -> None:
    with FakeAlibaba(hardened=False) as other:
        other.fail(200, body="TRUE")
        with pytest.raises(SpotError, match="not a metadata server of Google Cloud"):
            GCPSource(other.address).poll()


def test_a_metadata_server_that_does_not_know_of_preemption_names_the_other_way(google: FakeGCP) -> None:
    google.fail(404)
    with pytest.raises(SpotError, match="404") as caught:
        GCPSource(google.address).poll()
    assert "--notice signal" in caught.value.hint


@pytest.mark.parametrize(
    ("environ", "where"),
    [
        ({}, "http://169.254.169.254"),
        ({"GCE_METADATA_IP": "10.0.0.1"}, "http://10.0.0.1"),
        ({"GCE_METADATA_IP": "10.0.0.1", "GCE_METADATA_HOST": "localhost:8080"}, "http://localhost:8080"),
    ],
)
def test_the_host_follows_the_variables_of_googles_libraries(environ: dict[str, str], where: str) -> None:
    assert GCPSource.from_environ(environ).where == where


@pytest.mark.parametrize("host", ["http://metadata", "host:port", "host/path"])
def test_a_host_that_is_none_is_refused_with_the_name_of_the_variable(host: str) -> None:
    with pytest.raises(ConfigError, match="GCE_METADATA_HOST"):
        GCPSource.from_environ({"GCE_METADATA_HOST": host})


# -- Azure -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def azure() -> Iterator[FakeAzure]:
    with FakeAzure() as server:
        yield server


@pytest.mark.parametrize("kind", ["Preempt", "Terminate", "Redeploy", "Reboot"])
def test_what_no_process_outlives_is_a_termination_at_the_time_that_azure_names(azure: FakeAzure, kind: str) -> None:
    not_before = azure.interrupt(kind=kind)
    notice = heard(AzureSource(azure.endpoint))
    assert (notice.kind, notice.deadline) == (NoticeKind.TERMINATE, not_before)


@pytest.mark.parametrize("kind", ["Freeze", "SomethingNew"])
def test_everything_else_is_an_advisory(azure: FakeAzure, kind: str) -> None:
    azure.interrupt(kind=kind)
    assert heard(AzureSource(azure.endpoint)).kind is NoticeKind.ADVISORY


def test_events_of_other_machines_are_not_this_ones(azure: FakeAzure) -> None:
    azure.interrupt(resources=OTHERS)
    assert AzureSource(azure.endpoint).poll() is None


def test_a_machine_is_found_among_others_whatever_the_case_of_its_name(azure: FakeAzure) -> None:
    azure.interrupt(resources=[*OTHERS, azure.name.upper()])
    assert heard(AzureSource(azure.endpoint)).kind is NoticeKind.TERMINATE


@pytest.mark.parametrize("name", ["", "<html>", '{"error": "Bad request"}', "two words"])
def test_an_answer_that_is_no_name_is_asked_for_again_and_not_taken_for_this_machines(azure: FakeAzure, name: str) -> None:
    source = AzureSource(azure.endpoint)
    azure.interrupt()
    azure.name, real = name, azure.name
    with pytest.raises(SpotError, match="not a machine name"):
        source.poll()
    azure.name = real
    assert heard(source).kind is NoticeKind.TERMINATE


@pytest.mark.parametrize("version", ["", "2016-01-01", "tomorrow"])
def test_the_fake_refuses_a_version_that_azure_never_had(azure: FakeAzure, version: str) -> None:
    service = MetadataService(azure.endpoint, "VARIABLE", timeout_s=60)
    answer = service.request("GET", f"/metadata/scheduledevents?api-version={version}", {"Metadata": "true"})
    assert answer.status == 400


def test_of_several_events_the_first_to_begin_counts_and_an_end_more_than_a_pause(azure: FakeAzure) -> None:
    azure.interrupt(in_s=10, kind="Freeze")
    azure.interrupt(in_s=900, kind="Reboot")
    soonest = azure.interrupt(in_s=30)
    assert heard(AzureSource(azure.endpoint)).deadline == soonest


def test_an_end_that_has_begun_says_no_time_and_keeps_the_one_that_it_had(azure: FakeAzure) -> None:
    source = AzureSource(azure.endpoint)
    not_before = azure.interrupt(kind="Reboot")
    first = heard(source)
    azure.begin()
    assert heard(source) == first
    assert first.deadline == not_before


def test_a_preemption_that_had_begun_before_it_was_heard_of_is_a_termination_at_an_unknown_time(azure: FakeAzure) -> None:
    azure.interrupt()
    azure.begin()
    notice = heard(AzureSource(azure.endpoint))
    assert (notice.kind, notice.deadline) == (NoticeKind.TERMINATE, None)


@pytest.mark.parametrize("kind", ["Redeploy", "Reboot"])
def test_a_restart_that_had_begun_before_it_was_heard_of_is_behind_this_process(azure: FakeAzure, kind: str) -> None:
    azure.interrupt(kind=kind)
    azure.begin()
    assert AzureSource(azure.endpoint).poll() is None


def test_the_first_answer_may_take_its_time_and_only_the_first() -> None:
    with FakeAzure(first_answer_s=0.5) as azure:
        source = AzureSource(azure.endpoint, timeout_s=0.1)
        azure.interrupt()
        assert heard(source).kind is NoticeKind.TERMINATE
        azure.stall(60)
        with pytest.raises(SpotError, match=r"in 0\.1 s"):
            source.poll()


def test_an_acknowledged_end_begins(azure: FakeAzure) -> None:
    source = AzureSource(azure.endpoint)
    azure.interrupt()
    first = heard(source)
    assert source.acknowledge()
    assert [one in first.id for one in azure.acknowledged] == [True]
    assert heard(source) == first  # it has started, and says no time any more
    assert not source.acknowledge()
    assert len(azure.acknowledged) == 1


def test_nothing_is_acknowledged_but_an_end_of_this_machine_alone(azure: FakeAzure) -> None:
    source = AzureSource(azure.endpoint)
    assert source.poll() is None and not source.acknowledge()
    azure.interrupt(kind="Freeze")
    assert heard(source).kind is NoticeKind.ADVISORY and not source.acknowledge()
    azure.interrupt(resources=[azure.name, *OTHERS])
    assert heard(source).kind is NoticeKind.TERMINATE and not source.acknowledge()
    azure.cancel()
    source.poll()
    assert not source.acknowledge()
    assert azure.acknowledged == []


def test_a_watcher_acknowledges_what_can_be_and_logs_what_fails(azure: FakeAzure, caplog: pytest.LogCaptureFixture) -> None:
    azure.interrupt()
    with FakeGCP() as google, caplog.at_level("INFO", "hf_spot"):
        watcher = Watcher([GCPSource(google.address), AzureSource(azure.endpoint)], lambda notice: None)
        watcher.poll_once()
        azure.fail(500)
        watcher.acknowledge()
        assert azure.acknowledged == []
        assert "azure could not be told that the machine may go" in caplog.text and "500" in caplog.text
        watcher.acknowledge()
    assert len(azure.acknowledged) == 1
    assert "told azure that the machine may go" in caplog.text


def test_an_azure_endpoint_that_is_no_url_is_refused_with_the_name_of_the_variable() -> None:
    with pytest.raises(ConfigError, match="HF_SPOT_AZURE_METADATA_ENDPOINT"):
        AzureSource.from_environ({"HF_SPOT_AZURE_METADATA_ENDPOINT": "169.254.169.254"})


# -- Alibaba -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hardened", "knows_tokens"), [(True, True), (False, True), (False, False)])
def test_the_release_is_heard_in_every_mode_of_the_service(hardened: bool, knows_tokens: bool) -> None:
    with FakeAlibaba(hardened=hardened, knows_tokens=knows_tokens) as fake:
        source = AlibabaSource(fake.endpoint)
        assert source.poll() is None
        deadline = fake.interrupt(in_s=300)
        assert heard(source).deadline == deadline
        assert [request.method for request in fake.requests].count("PUT") == 1


def test_a_token_that_died_is_fetched_anew() -> None:
    with FakeAlibaba() as fake:
        source = AlibabaSource(fake.endpoint)
        source.poll()
        fake.expire_tokens()
        fake.interrupt()
        assert heard(source).kind is NoticeKind.TERMINATE
        assert [request.status for request in fake.requests][-3:] == [401, 200, 200]


def test_a_release_long_past_was_another_life_of_the_instance() -> None:
    with FakeAlibaba() as fake:
        source = AlibabaSource(fake.endpoint)
        fake.interrupt(in_s=-3600)
        assert source.poll() is None
        fake.interrupt(in_s=-60)  # late, but this one
        assert heard(source).kind is NoticeKind.TERMINATE


# -- Slurm -------------------------------------------------------------------------------------------------------------


def test_the_time_limit_is_announced_ahead_and_is_the_deadline() -> None:
    now, end = NOW, NOW + timedelta(hours=1)
    source = SlurmSource(end, ahead_s=300, now=lambda: now)
    now = end - timedelta(seconds=301)
    assert source.poll() is None
    now = end - timedelta(seconds=300)
    first = heard(source)
    assert first.deadline == end
    now = end - timedelta(seconds=1)
    assert heard(source) == first


def test_a_job_shorter_than_the_notice_is_not_over_before_it_begins() -> None:
    now, end = NOW, NOW + timedelta(seconds=60)
    source = SlurmSource(end, ahead_s=120, now=lambda: now)
    assert source.poll() is None
    now += timedelta(seconds=30)
    assert heard(source).deadline == end


@pytest.mark.parametrize("text", ["", "0", "tomorrow", "-1", "9" * 30])
def test_a_job_that_states_no_end_can_not_be_listened_to_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="SLURM_JOB_END_TIME") as caught:
        SlurmSource.from_environ({"SLURM_JOB_END_TIME": text})
    assert "--signal=USR1" in caught.value.hint
