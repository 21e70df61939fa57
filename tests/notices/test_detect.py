from __future__ import annotations

import functools
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError
from hf_spot.notices.detect import grace_s, sources
from hf_spot.notices.file import FileSource
from hf_spot.notices.notice import NoticeSource
from hf_spot.notices.signals import SignalSource

DISABLED = {"AWS_EC2_METADATA_DISABLED": "true"}
ENDPOINT = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1338"}


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine that says nothing about itself; tests write ``sys_vendor``, ``product_uuid`` and ``xen``."""
    return tmp_path


def found(machine: Path, notice: str = "auto", environ: dict[str, str] | None = None) -> list[NoticeSource]:
    arguments = SpotArguments(notice=notice)
    return sources(arguments, environ=environ or {}, dmi=machine, hypervisor_uuid=machine / "xen")


def names(machine: Path, notice: str = "auto", environ: dict[str, str] | None = None) -> list[str]:
    return [source.name for source in found(machine, notice, environ)]


def test_a_machine_of_no_cloud_has_signals_only(machine: Path) -> None:
    assert names(machine) == ["signal"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("sys_vendor", "Amazon EC2\n"),
        ("product_uuid", "EC2A8B5C-0000-0000-0000-000000000000\n"),
        ("xen", "ec2a8b5c-0000-0000-0000-000000000000\n"),
    ],
)
def test_a_machine_of_ec2_is_known_by_its_firmware(machine: Path, file: str, content: str) -> None:
    (machine / file).write_text(content)
    assert names(machine) == ["signal", "imds"]


@pytest.mark.parametrize(
    ("file", "content", "name"),
    [
        ("product_name", "Google Compute Engine\n", "gcp"),
        ("product_name", "Google\n", "gcp"),
        ("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77\n", "azure"),
        ("product_name", "Alibaba Cloud ECS\n", "alibaba"),
    ],
)
def test_machines_of_other_clouds_are_known_by_their_firmware(machine: Path, file: str, content: str, name: str) -> None:
    (machine / file).write_text(content)
    assert names(machine) == ["signal", name]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("sys_vendor", "Amazon EC2 lookalike"),
        ("sys_vendor", "Microsoft Corporation"),  # a Hyper-V that is not Azure's
        ("chassis_asset_tag", "No Asset Tag"),
        ("product_name", "Google Pixelbook"),
        ("product_name", ""),
    ],
)
def test_a_machine_of_another_vendor_is_taken_for_no_cloud(machine: Path, file: str, content: str) -> None:
    (machine / file).write_text(content)
    assert names(machine) == ["signal"]


def test_google_is_left_alone_where_its_own_libraries_leave_it_alone(machine: Path) -> None:
    (machine / "product_name").write_text("Google Compute Engine")
    assert names(machine, environ={"NO_GCE_CHECK": "true"}) == ["signal"]


def test_a_slurm_job_that_knows_its_time_limit_listens_to_it(machine: Path) -> None:
    assert names(machine, environ={"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "4102444800"}) == ["signal", "slurm"]
    assert names(machine, environ={"SLURM_JOB_ID": "7"}) == ["signal"]


def test_a_container_of_sagemaker_asks_no_metadata_service_and_has_two_minutes(machine: Path) -> None:
    (machine / "sys_vendor").write_text("Amazon EC2")
    environ = {"TRAINING_JOB_ARN": "arn:aws:sagemaker:us-east-1:123456789012:training-job/mine"}
    assert names(machine, environ=environ) == ["signal"]
    assert grace_s(SpotArguments(), environ) == 120


@pytest.mark.parametrize(
    ("setting", "environ", "expected"),
    [
        (None, {}, None),
        (None, {"HF_SPOT_GRACE_S": "25"}, 25),
        (None, {"HF_SPOT_GRACE_S": "25", "SM_TRAINING_ENV": "{}"}, 25),
        (40.0, {"HF_SPOT_GRACE_S": "25", "SM_TRAINING_ENV": "{}"}, 40),
    ],
)
def test_the_grace_is_the_setting_else_the_environment_else_what_the_platform_gives(
    setting: float | None, environ: dict[str, str], expected: float | None
) -> None:
    assert grace_s(SpotArguments(grace_s=setting), environ) == expected


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan", "inf"])
def test_a_grace_in_the_environment_that_is_no_time_is_refused_with_the_name_of_the_variable(machine: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="HF_SPOT_GRACE_S"):
        found(machine, environ={"HF_SPOT_GRACE_S": text})


@pytest.mark.parametrize("notice", ["gcp:soon", "slurm:-1", "gcp:0"])
def test_seconds_behind_a_name_must_be_seconds(machine: Path, notice: str) -> None:
    with pytest.raises(ConfigError, match=notice):
        found(machine, notice, {"SLURM_JOB_END_TIME": "4102444800"})


@pytest.mark.parametrize("notice", ["azure:3", "signal:x", "gpc", "signal,nobody"])
def test_a_name_that_is_none_is_refused_with_those_that_are(machine: Path, notice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SpotArguments(notice=notice)
    assert "imds, gcp, azure, alibaba, slurm, signal, file" in caught.value.hint


def test_a_firmware_file_that_can_not_be_read_is_no_error(machine: Path) -> None:
    (machine / "product_uuid").mkdir()
    assert names(machine) == ["signal"]


def test_an_endpoint_in_the_environment_means_that_there_is_a_metadata_service(machine: Path) -> None:
    assert names(machine, environ=ENDPOINT) == ["signal", "imds"]


def test_a_disabled_metadata_service_is_left_alone(machine: Path) -> None:
    (machine / "sys_vendor").write_text("Amazon EC2")
    assert names(machine, environ={**ENDPOINT, **DISABLED}) == ["signal"]


def test_a_disabled_metadata_service_that_is_named_is_an_error(machine: Path) -> None:
    with pytest.raises(ConfigError, match="AWS_EC2_METADATA_DISABLED"):
        found(machine, "imds", DISABLED)


def test_a_file_in_the_environment_is_listened_to(machine: Path) -> None:
    assert names(machine, environ={"HF_SPOT_NOTICE_FILE": "/tmp/notice"}) == ["signal", "file"]


def test_only_what_is_named_is_listened_to_and_once(machine: Path) -> None:
    assert names(machine, "imds, signal,imds") == ["imds", "signal"]


def test_none_is_none(machine: Path) -> None:
    assert names(machine, "none", ENDPOINT) == []


def test_a_file_takes_its_path_from_the_name_or_from_the_environment(machine: Path) -> None:
    stated, from_environ = found(machine, "file:/tmp/a:b,file", {"HF_SPOT_NOTICE_FILE": "/tmp/c"})
    assert isinstance(stated, FileSource) and isinstance(from_environ, FileSource)
    assert (stated.path, from_environ.path) == (Path("/tmp/a:b"), Path("/tmp/c"))


def test_a_file_without_a_path_is_an_error_that_names_both_ways(machine: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        found(machine, "file")
    assert "file:/" in caught.value.hint and "HF_SPOT_NOTICE_FILE" in caught.value.hint


def test_the_signals_of_the_arguments_are_the_ones_heard(machine: Path) -> None:
    arguments = SpotArguments(notice="signal", signals="SIGUSR2, SIGTERM")
    (source,) = sources(arguments, environ={}, dmi=machine)
    assert isinstance(source, SignalSource) and source.where == "SIGUSR2,SIGTERM"


watching: list[tuple[int, list[str]]] = []


@functools.cache  # a hook can't be taken off again
def install_the_hook() -> None:
    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith(("socket.", "subprocess.", "os.exec", "os.posix_spawn", "os.system")):
            for thread, seen in watching:
                if thread == threading.get_ident():
                    seen.append(event)

    sys.addaudithook(hook)


@pytest.fixture
def seen() -> Iterator[list[str]]:
    """What this thread does with the network and with programs, as Python itself tells it."""
    install_the_hook()
    watching.append((threading.get_ident(), []))
    yield watching[-1][1]
    watching.pop()


def test_detection_opens_no_socket_asks_no_name_server_and_starts_no_program(machine: Path, seen: list[str]) -> None:
    for file, content in [
        ("sys_vendor", "Amazon EC2"),
        ("product_name", "Google Compute Engine"),
        ("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77"),
    ]:
        (machine / file).write_text(content)
    environ = {"HF_SPOT_ALIBABA_METADATA_ENDPOINT": "http://metadata.example", "SLURM_JOB_END_TIME": "4102444800"}
    assert names(machine, environ=environ) == ["signal", "imds", "gcp", "azure", "alibaba", "slurm"]
    assert seen == []
    socket.socket().close()
    assert seen == ["socket.__new__"], "it would have been seen"


def test_this_very_machine_can_be_asked() -> None:
    assert "signal" in [source.name for source in sources(SpotArguments(), environ={})]


# -- sources of other packages -----------------------------------------------------------------------------------------

PLUGIN = """
from hf_spot import NoticeKind, PreemptionNotice

class Drain:
    name = "drain"
    interval_s = 1.0

    def __init__(self, path="nowhere"):
        self.path = path

    @staticmethod
    def is_here(environ):
        return "DRAINS" in environ

    def poll(self):
        return PreemptionNotice(NoticeKind.TERMINATE, self.name, f"drained by {self.path}")

class Unasked(Drain):
    is_here = None

def half():
    return object()
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with sources of notices, installed as pip would leave it."""
    site = tmp_path / "site"
    info = site / "drains-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: drains\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[hf_spot.notices]\ndrain = drains:Drain\nunasked = drains:Unasked\nhalf = drains:half\nbroken = drains.gone:Drain\n"
        "imds = drains:Drain\n"
    )
    (site / "drains.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(site)
    yield site
    sys.modules.pop("drains", None)


def test_a_plugin_is_listened_to_by_its_name_with_the_text_behind_the_colon(machine: Path, plugin: Path) -> None:
    one, other = found(machine, "drain,drain:/dev/drain")
    notices = [source.poll() for source in (one, other)]
    assert [notice and notice.id for notice in notices] == ["drained by nowhere", "drained by /dev/drain"]


def test_the_automatic_choice_takes_the_plugins_that_say_that_they_are_here(
    machine: Path, plugin: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert names(machine) == ["signal"]
    assert sorted(names(machine, environ={"DRAINS": "yes"})) == ["drain", "signal"]
    assert "skipping the source of notices 'broken' (drains.gone:Drain)" in caplog.text


def test_a_plugin_can_not_take_the_name_of_a_source_of_hf_spot(machine: Path, plugin: Path) -> None:
    (source,) = found(machine, "imds")
    assert type(source).__name__ == "IMDSSource"


@pytest.mark.parametrize(("notice", "why"), [("broken", "drains.gone"), ("half", "not a hf_spot.NoticeSource")])
def test_a_plugin_that_is_named_and_can_not_be_used_is_an_error(machine: Path, plugin: Path, notice: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        found(machine, notice)
    assert caught.value.hint


def test_names_of_plugins_are_among_those_that_a_typo_is_answered_with(plugin: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        SpotArguments(notice="drian")
    assert "drain, " in caught.value.hint
