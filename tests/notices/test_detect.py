from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError
from hf_spot.notices.detect import sources
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


@pytest.mark.parametrize("vendor", ["Google", "Microsoft Corporation", "Amazon EC2 lookalike", ""])
def test_a_machine_of_another_vendor_is_not_taken_for_ec2(machine: Path, vendor: str) -> None:
    (machine / "sys_vendor").write_text(vendor)
    assert names(machine) == ["signal"]


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


def test_detection_is_quick_and_opens_no_socket(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("detection must not open a socket")

    (machine / "sys_vendor").write_text("Amazon EC2")
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    began = time.perf_counter()
    assert names(machine) == ["signal", "imds"]
    assert time.perf_counter() - began < 0.05


def test_this_very_machine_can_be_asked() -> None:
    assert "signal" in [source.name for source in sources(SpotArguments(), environ={})]
