"""The commands as they are typed: provision, prices, quotas, status, terminate."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from hf_spot.cli import main
from hf_spot.cloud.ec2 import Cloud
from hf_spot.cloud.ec2_errors import NEXT_RUNG, explain
from hf_spot.cloud.ladder import Price
from hf_spot.cloud.prices import sparkline
from hf_spot.errors import CloudError
from hf_spot.run.run import Run
from tests.cloud.aws import Aws

JOB = """\
name: llama
store: {store}
run: hf-spot launch train.py
region: us-east-1
max_spend: 100
image_id: {{us-east-1: {image}}}
ladder:
- {{market: spot, instance_types: [p4d.24xlarge, p4de.24xlarge]}}
- {{market: on-demand, instance_types: [p4d.24xlarge]}}
"""


@pytest.fixture
def job(aws: Aws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("hf_spot.commands.machines._cloud", lambda: Cloud(aws.session()))
    path = tmp_path / "job.yaml"
    path.write_text(JOB.format(store=tmp_path / "run", image=aws.image("us-east-1")))
    return path


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    code = main([str(part) for part in argv])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_a_dry_run_shows_every_rung_and_starts_nothing(aws: Aws, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aws.scores = {"us-east-1": 7}
    code, said = call(capsys, "provision", job, "--dry-run")
    assert code == 0
    assert "rung 0: spot p4d.24xlarge, p4de.24xlarge, regions: preferred" in said
    assert "p4d.24xlarge in us-east-1a: $9.0000/h (EC2 DescribeSpotPriceHistory, " in said
    assert "placement score 7 of 10" in said
    assert "p4d.24xlarge in us-east-1a: $22.0000/h (AWS Price List GetProducts, 2025-06-01" in said
    assert "$100.00 of $100.00 left; nothing was started" in said
    assert aws.instances("running", "pending") == [] and aws.orders == []
    assert not (job.parent / "run").exists()


def test_a_dry_run_in_json_has_a_line_for_each_rung(aws: Aws, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = call(capsys, "provision", job, "--dry-run", "--json")
    lines = [json.loads(line) for line in said.splitlines()]
    assert code == 0
    assert [line["event"] for line in lines] == ["plan", "plan", "budget"]
    assert {pool["market"] for pool in lines[1]["pools"]} == {"on-demand"}


def test_from_provision_to_terminate(aws: Aws, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = job.parent / "run"
    code, said = call(capsys, "provision", job, "--json")
    machine = json.loads(said.splitlines()[-1])["machine"]
    assert code == 0 and machine["instance_type"] == "p4d.24xlarge"
    code, said = call(capsys, "provision", job)
    assert code == 0 and "already running" in said
    code, said = call(capsys, "status", store)
    assert code == 0 and machine["instance_id"] in said and "running" in said and "$9.0000/h" in said
    code, said = call(capsys, "terminate", store)
    assert code == 0 and f"{machine['instance_id']} in us-east-1a terminated: $" in said
    assert aws.instances("running", "pending") == []
    assert call(capsys, "terminate", store) == (0, f"{store}: no machine is running\n")
    code, said = call(capsys, "status", store, "--json")
    assert [one["reason"] for one in json.loads(said)["machines"]] == ["Client.UserInitiatedShutdown"]


def test_no_capacity_ends_with_75_so_that_a_scheduler_can_try_later(
    aws: Aws, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aws.refuse = lambda kind, zone, market: "InsufficientInstanceCapacity"
    code, said = call(capsys, "provision", job)
    assert code == 75 and "no capacity available on any rung of the ladder" in said


def test_a_legacy_api_is_called_legacy(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = call(capsys, "provision", job, "--dry-run", "--api", "spot-fleet")
    assert code == 0 and "AWS calls the API of --api spot-fleet legacy" in said


def test_a_bad_job_file_is_an_error_of_usage(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job.write_text(job.read_text() + "laddr: []\n")
    for command in (["provision", job], ["quotas", job]):
        code, said = call(capsys, *command)
        assert code == 2 and "job.yaml:10: laddr: unknown key" in said and "did you mean ladder?" in said


def test_quotas_names_the_command_for_what_blocks(aws: Aws, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aws.quotas = {"L-7212CCBC": 0}
    code, said = call(capsys, "quotas", job)
    assert code == 0 and "rung 0: spot p4d.24xlarge, p4de.24xlarge: blocked" in said and "Try: aws service-quotas" in said
    needs = json.loads(call(capsys, "quotas", job, "--json")[1])
    assert [need["blocked"] for need in needs] == [True, True, False]


def test_prices_are_sorted_and_say_where_and_when_they_are_from(
    aws: Aws, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aws.spot = {("p4d.24xlarge", "us-west-2a"): 7.0, ("p4d.24xlarge", "us-east-1a"): 9.0, ("g5.48xlarge", "us-east-1b"): 8.0}
    code, said = call(capsys, "prices", "p4d.24xlarge", "g5.48xlarge")
    lines = said.splitlines()
    assert code == 0
    assert [line.split()[:5] for line in lines[1:4]] == [
        ["p4d.24xlarge", "us-west-2a", "7.0000", "22.0000", "68%"],
        ["g5.48xlarge", "us-east-1b", "8.0000", "16.0000", "50%"],
        ["p4d.24xlarge", "us-east-1a", "9.0000", "22.0000", "59%"],
    ]
    assert lines[4].startswith("spot: EC2 DescribeSpotPriceHistory, queried 20")
    assert lines[5] == "on-demand: AWS Price List GetProducts, in force since 2025-06-01"
    rows = json.loads(call(capsys, "prices", "p4d.24xlarge", "--region", "us-east-1", "--json")[1])["rows"]
    assert [(row["zone"], row["saving"]) for row in rows] == [("us-east-1a", 0.5909)]


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["p4d.24xlarge", "--days", "91"], "EC2 keeps at most 90 days of prices"),
        (["p4d.24xlarge", "--days", "0"], "EC2 keeps at most 90 days of prices"),
        (["p4d.24xlarge", "--region", "us-esat-1"], "did you mean us-east-1?"),
    ],
)
def test_prices_refuses_what_cannot_be(job: Path, capsys: pytest.CaptureFixture[str], argv: list[Any], word: str) -> None:
    code, said = call(capsys, "prices", *argv)
    assert code == 2 and word in said


def test_a_misspelt_region_is_recognised_where_none_is_set(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    code, said = call(capsys, "prices", "p4d.24xlarge", "--region", "us-esat-1")
    assert code == 2 and "did you mean us-east-1?" in said


def test_prices_without_any_say_that_there_is_no_capacity(aws: Aws, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aws.spot = {}
    assert "no spot price and therefore no spot capacity" in call(capsys, "prices", "p4d.24xlarge")[1]


def test_prices_go_on_without_the_full_ones(aws: Aws, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aws.fail = {"GetProducts": ["AccessDeniedException"] * 3}  # in each region that has a price list
    code, said = call(capsys, "prices", "p4d.24xlarge")
    assert code == 0 and "on-demand prices are unknown" in said and "9.0000" in said


def test_a_sparkline_shows_the_price_that_held() -> None:
    now = datetime(2030, 1, 1, tzinfo=timezone.utc)
    history = [Price(usd, now - timedelta(hours=ago), "") for usd, ago in ((1.0, 3.0), (8.0, 1.9), (4.5, 0.9))]
    assert sparkline(history, now - timedelta(hours=4), now, width=4) == "▁▁█▅"
    assert sparkline(history[:1], now - timedelta(hours=4), now, width=4) == "▁▁▁▁"
    assert sparkline([], now - timedelta(hours=4), now, width=2) == "  "


def test_a_code_is_explained_by_what_it_means_and_keeps_its_name() -> None:
    for code in NEXT_RUNG - {"InsufficientHostCapacity", "MaxFleetCountExceeded", "ReservationCapacityExceeded"}:
        if code not in ("az-group-constraint", "constraint-not-fulfillable"):
            error = explain(code, "AWS's own words", doing="CreateFleet in us-east-1")
            assert error.code == code and code in str(error) and error.hint
    passing = explain("UnauthorizedOperation", "not authorized to perform: iam:PassRole on resource: …")
    assert "iam:PassRole" in passing.hint
    assert "AWS's own words" in str(explain("SomethingNew", "AWS's own words"))


def test_a_run_that_a_machine_was_asked_for_is_still_read_by_report(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "provision", job)
    store = job.parent / "run"
    assert "has not been launched yet" in call(capsys, "report", store)[1]
    run = Run(store)
    run.claim({})
    run.record("preempted", {"step": 0})
    last_word = json.loads(call(capsys, "report", store, "--json")[1])["launches"][0]["last_heard"]
    run.record("machine", {"event": "refused"})
    report = json.loads(call(capsys, "report", store, "--json")[1])
    assert [launch["last_heard"] for launch in report["launches"]] == [last_word]


def test_a_run_without_machines_needs_no_ec2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Cloud, near: str | None = None) -> list[str]:
        raise CloudError("no credentials", hint="aws configure")

    monkeypatch.setattr(Cloud, "regions", refuse)
    run = Run(tmp_path / "run")
    run.claim({})
    for command, told in (("status", "not ended, step 0 committed"), ("terminate", "no machine is running")):
        assert main([command, run.url]) == 0
        out, err = capsys.readouterr()
        assert told in out and "EC2 was not asked: no credentials" in err
    assert main(["status", str(tmp_path / "nothing")]) == 2
    assert "there is nothing" in capsys.readouterr().err
    run.record("machine", {"event": "refused"})
    for command in ("status", "terminate"):
        assert main([command, run.url]) == 2
        assert "no credentials" in capsys.readouterr().err
