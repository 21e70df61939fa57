"""What `hf-spot doctor` says of this machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
from pathlib import Path

import pytest

from hf_spot.cli import main
from hf_spot.doctor import this_machine as module
from hf_spot.doctor.finding import FAIL, OK, WARN, Finding, Notice
from hf_spot.doctor.this_machine import disk, machine, notice_of
from hf_spot.notices.aws import IMDSSource
from hf_spot.notices.signals import SignalSource
from hf_spot.testing import FakeIMDS

HERE = Notice(120.0, "EC2")


def found(
    check: str, *, environ: dict[str, str] | None = None, root: Path | None = None, imds: FakeIMDS | None = None
) -> Finding:
    """The one finding of a check."""
    sources = [SignalSource()] + ([IMDSSource(imds.endpoint, timeout_s=0.2)] if imds else [])
    findings = machine(
        environ or {}, sources, notice_of(environ or {}, [one.name for one in sources], None), root=root or Path("/")
    )
    (one,) = [finding for finding in findings if finding.check == check]
    return one


# -- the metadata service ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hop_limit", "level"), [(1, WARN), (2, OK), (None, OK)])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_hop_limit_that_keeps_containers_out_is_measured(
    host: str, hop_limit: int | None, level: str, tmp_path: Path
) -> None:
    if ":" in host and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    with FakeIMDS(host=host, hop_limit=hop_limit) as imds:
        finding = found("metadata", root=tmp_path, imds=imds)
    assert finding.level == level
    assert imds.endpoint in finding.text
    assert ("--http-put-response-hop-limit 2" in finding.hint) == (level == WARN)


def test_inside_a_container_it_is_enough_that_the_answer_arrives(tmp_path: Path) -> None:
    (tmp_path / ".dockerenv").touch()
    with FakeIMDS(hop_limit=1) as imds:
        assert found("metadata", root=tmp_path, imds=imds).level == OK


def test_a_metadata_service_that_is_not_reached_is_a_failure_with_the_repair(tmp_path: Path) -> None:
    with FakeIMDS() as imds:
        pass
    finding = found("metadata", root=tmp_path, imds=imds)
    assert finding.level == FAIL
    assert "--http-put-response-hop-limit 2" in finding.hint


def test_a_notice_that_is_out_already_is_told(tmp_path: Path) -> None:
    with FakeIMDS() as imds:
        imds.interrupt()
        finding = found("metadata", root=tmp_path, imds=imds)
    assert (finding.level, finding.hint) == (WARN, "hf-spot watch")


def test_a_switched_off_metadata_service_is_told() -> None:
    finding = found("metadata", environ={"AWS_EC2_METADATA_DISABLED": "true"})
    assert (finding.level, finding.hint) == (WARN, "unset AWS_EC2_METADATA_DISABLED")


def test_elsewhere_no_metadata_service_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", lambda *args, **kwargs: pytest.fail("the network was asked"))
    assert found("metadata").level == OK


# -- how long there is after a notice ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "clouds", "grace_s", "expected"),
    [
        ({}, [], None, Notice(None, "")),
        ({}, ["signal", "imds"], None, Notice(120.0, "EC2")),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ["imds"], None, Notice(30.0, "Kubernetes")),
        ({"SLURM_JOB_ID": "7"}, [], None, Notice(30.0, "Slurm")),
        ({"SM_TRAINING_ENV": "{}"}, ["imds"], None, Notice(120.0, "SageMaker")),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, [], 45.0, Notice(45.0, "--grace-s")),
    ],
)
def test_the_notice_is_that_of_who_ends_the_machine(
    environ: dict[str, str], clouds: list[str], grace_s: float | None, expected: Notice
) -> None:
    assert notice_of(environ, clouds, grace_s) == expected


@pytest.mark.parametrize(
    ("environ", "level", "in_hint"),
    [
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, WARN, "terminationGracePeriodSeconds"),
        ({"SLURM_JOB_ID": "7"}, WARN, "--signal=B:USR1@120"),
        ({"SM_TRAINING_ENV": "{}"}, OK, ""),
        ({}, OK, ""),
    ],
)
def test_a_scheduler_that_has_to_be_told_the_notice_is_named_with_the_setting(
    environ: dict[str, str], level: str, in_hint: str
) -> None:
    finding = found("notice", environ=environ)
    assert finding.level == level
    assert in_hint in finding.hint


@pytest.mark.parametrize(("first", "level"), [("bash", WARN), ("tini", OK)])
def test_a_shell_that_swallows_signals_in_a_container_is_found(tmp_path: Path, first: str, level: str) -> None:
    (tmp_path / "proc" / "1").mkdir(parents=True)
    (tmp_path / "proc" / "1" / "comm").write_text(f"{first}\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".containerenv").touch()
    finding = found("signals", root=tmp_path)
    assert finding.level == level
    assert first in finding.text


# -- disk, GPU, versions ----------------------------------------------------------------------------------------------


def test_a_disk_is_compared_with_the_size_of_a_checkpoint(tmp_path: Path) -> None:
    statvfs = os.statvfs(tmp_path)
    free = statvfs.f_bavail * statvfs.f_frsize
    assert disk(tmp_path, None).level == OK
    assert disk(tmp_path, free // 4).level == OK
    assert disk(tmp_path, free * 3 // 4).level == WARN
    assert disk(tmp_path, free * 2).level == FAIL
    assert "output_dir" in disk(tmp_path, free * 2).hint


def program(folder: Path, script: str) -> dict[str, str]:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    return {"PATH": str(folder)}


def test_gpus_are_counted_and_named(tmp_path: Path) -> None:
    line = "NVIDIA A100-SXM4-40GB, 40960 MiB, 570.133.20"
    finding = found("gpu", environ=program(tmp_path, f"echo '{line}'; echo '{line}'"))
    assert (finding.level, finding.text) == (OK, "2 NVIDIA A100-SXM4-40GB, 40960 MiB, driver 570.133.20")


@pytest.mark.parametrize("script", ["echo 'No devices were found'; exit 6", "echo 'has failed' >&2; exit 9", "exit 0"])
def test_a_driver_without_a_gpu_is_a_failure(tmp_path: Path, script: str) -> None:
    finding = found("gpu", environ=program(tmp_path, script))
    assert finding.level == FAIL
    assert "dmesg" in finding.hint


def test_no_driver_is_a_warning(tmp_path: Path) -> None:
    assert found("gpu", environ={"PATH": str(tmp_path)}).level == WARN


def test_versions_are_compared_with_what_the_package_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = found("versions")
    assert fine.level == OK
    assert f"torch {importlib.metadata.version('torch')}" in fine.text
    wanted = ["torch>=999", "no-such-package>=1", "matplotlib>=999; extra == 'plot'", "boto3>=1.36"]
    monkeypatch.setattr(module.importlib.metadata, "requires", lambda name: wanted)
    findings = [one for one in machine({}, [], HERE) if one.check == "versions"]
    assert [one.level for one in findings] == [FAIL, FAIL]
    assert [one.hint for one in findings] == ["pip install 'torch>=999'", "pip install 'no-such-package>=1'"]


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_line_and_a_repair_for_each_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("KUBERNETES_SERVICE_HOST", "AWS_EC2_METADATA_SERVICE_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "warn  gpu           no nvidia-smi: training would run on the CPU" in lines
    assert lines[lines.index("warn  gpu           no nvidia-smi: training would run on the CPU") + 1].startswith("      Try: ")
    assert main(["doctor", "--json"]) == 0
    assert {"level": "warn", "check": "gpu"}.items() <= json.loads(capsys.readouterr().out)[-2].items()


def test_the_command_fails_when_something_does_not_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--checkpoint-gb", "1e9"]) == 1
    assert "fail  disk" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--checkpoint-gb", "0"], "--checkpoint-gb 0"),
        (["--checkpoint-gb", "nan"], "--checkpoint-gb nan"),
        (["--grace-s", "-1"], "grace_s=-1"),
        (["--store", "s3://x"], "not the name of a bucket"),
        (["--store", "ftp://bucket/x"], "not a kind of store"),
        (["--job", "no-such-file.yaml"], "no-such-file.yaml"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_looked_at(
    argv: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert word in printed.err
    assert "Try:" in printed.err
