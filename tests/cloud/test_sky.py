"""The job file as a SkyPilot managed job. What needs SkyPilot itself is skipped without it; CONTRIBUTING.md has the line that
installs and runs it."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from hf_spot.cli import main
from hf_spot.cloud import sky
from hf_spot.cloud.job import ANY, ON_DEMAND, SPOT, Job, Rung, load
from hf_spot.errors import ConfigError
from tests.servers import free_ports
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
P4D, G5 = "p4d.24xlarge", "g5.48xlarge"
JOB = """\
name: llama
store: s3://bucket/runs/llama
region: us-east-1
max_spend: 150
instance_profile: arn:aws:iam::123456789012:instance-profile/trainer
disk_gb: 300
tags: {team: nlp}
image_id: {us-east-1: ami-03cf127a, us-west-2: ami-03cf127a}
setup: git clone https://example.com/x.git
run: |
  cd x
  hf-spot launch train.py
ladder:
  - {instance_types: [p4d.24xlarge]}
  - {instance_types: [p4d.24xlarge, g5.48xlarge], regions: any, max_price: 12}
  - {instance_types: [g5.48xlarge], regions: [us-west-2]}
  - {instance_types: [p4d.24xlarge], market: on-demand}
"""
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIDVALUE",
    "AWS_SECRET_ACCESS_KEY": "secretvalue",
    "AWS_SESSION_TOKEN": "tokenvalue",
    "HF_SPOT_JOURNAL_KEY": "journalvalue",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path / "job.yaml"


@pytest.fixture
def job(path: Path) -> Job:
    return load(path)


# -- the task, without SkyPilot ---------------------------------------------------------------------------------------


def test_the_ladder_is_tried_in_its_order(job: Job) -> None:
    images = {"us-east-1": "ami-03cf127a", "us-west-2": "ami-03cf127a"}
    home, west = ({"image_id": {region: image}} for region, image in images.items())
    dear = {"max_hourly_cost": 12.0, "image_id": images}
    resources = sky.task(job, {})["resources"]
    assert "any_of" not in resources
    assert resources["ordered"] == [
        {"infra": "aws/us-east-1", "instance_type": P4D, "use_spot": True, **home},
        {"infra": "aws", "instance_type": P4D, "use_spot": True, **dear},
        {"infra": "aws", "instance_type": G5, "use_spot": True, **dear},
        {"infra": "aws/us-west-2", "instance_type": G5, "use_spot": True, **west},
        {"infra": "aws/us-east-1", "instance_type": P4D, "use_spot": False, **home},
    ]
    assert (resources["disk_size"], resources["labels"]) == (300, {"team": "nlp"})


def test_of_one_rung_skypilot_chooses(job: Job) -> None:
    resources = sky.task(dataclasses.replace(job, ladder=(Rung((P4D, G5), SPOT),)), {})["resources"]
    assert [one["instance_type"] for one in resources["any_of"]] == [P4D, G5]
    assert "ordered" not in resources


def test_a_preempted_training_is_recovered_in_another_region(job: Job) -> None:
    recovery = sky.task(job, {})["resources"]["job_recovery"]
    assert recovery == {"strategy": "EAGER_NEXT_REGION", "recover_on_exit_codes": [75]}


def test_an_image_that_only_ec2_can_look_up_is_left_to_skypilot(job: Job) -> None:
    plain = dataclasses.replace(job, image_id="resolve:ssm:/x", ladder=(Rung((P4D,), SPOT, ANY), Rung((P4D,), ON_DEMAND)))
    assert not any("image_id" in one for one in sky.task(plain, {})["resources"]["ordered"])


def test_checkpoints_are_no_file_mounts_and_the_script_runs_as_the_job_says(job: Job) -> None:
    task = sky.task(job, {})
    assert set(task) == {"name", "resources", "envs", "setup", "run"}
    assert task["envs"] == {"HF_SPOT_STORE": "s3://bucket/runs/llama", "AWS_REGION": "us-east-1"}
    assert re.search(
        r"echo '[0-9a-f]{64}  hf_spot-[^']*' \| sha256sum --check --strict\npip install \./hf_spot-", task["setup"]
    )
    assert task["setup"].endswith("git clone https://example.com/x.git\n")
    assert task["run"].endswith("cd x\nhf-spot launch train.py\n")


def test_the_scripts_do_what_they_should(job: Job, tmp_path: Path) -> None:
    """A failing command ends the script with its code, and what setup installed is what run finds."""
    there = dataclasses.replace(job, requirements=(), setup="touch made", run="test -e made; hf-spot launch x; echo never")
    (tmp_path / ".hf-spot-venv" / "bin").mkdir(parents=True)
    fake = tmp_path / ".hf-spot-venv" / "bin" / "hf-spot"
    fake.write_text("#!/bin/sh\nexit 75\n")
    fake.chmod(0o755)
    task = sky.task(there, {})
    for script, code in ((task["setup"], 0), (task["run"], 75)):
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, timeout=30
        )
        assert (done.returncode, done.stdout) == (code, b""), done.stderr


@pytest.mark.parametrize(("machines", "nodes", "option"), [("2:8", 8, "2:8"), (3, 3, "3:3"), (1, None, None)])
def test_several_machines_are_so_many_nodes_that_meet_in_the_run(
    job: Job, machines: int | str, nodes: int | None, option: str | None
) -> None:
    fleet = dataclasses.replace(job, machines=machines)
    task = sky.task(fleet, {})
    assert (task.get("num_nodes"), task["envs"].get("HF_SPOT_NUM_MACHINES")) == (nodes, option)
    assert valid(task, SCHEMA) and any("nodes together" in note for note in sky.notes(fleet)) is (nodes is not None)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_secrets_are_named_and_never_written(job: Job, elsewhere: bool) -> None:
    environ = {**SECRETS, "HF_SPOT_S3_EXPECTED_BUCKET_OWNER": "123456789012"}
    environ |= {"AWS_ENDPOINT_URL_S3": "https://minio"} if elsewhere else {}
    text = sky.render(job, environ)
    assert not any(value in text for value in SECRETS.values())
    task = yaml.safe_load(text)
    keys = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"] if elsewhere else []
    assert task["secrets"] == dict.fromkeys(["HF_SPOT_JOURNAL_KEY", *keys])
    assert task["envs"]["HF_SPOT_S3_EXPECTED_BUCKET_OWNER"] == "123456789012"
    assert task["envs"].get("AWS_ENDPOINT_URL_S3") == ("https://minio" if elsewhere else None)


def test_what_skypilot_cannot_be_told_is_said(job: Job) -> None:
    said = "\n".join(sky.notes(dataclasses.replace(job, key_name="mine")))
    assert "max_spend" in said and "remote_identity" in said and "key_name" in said and "deadline" not in said


def test_the_command_prints_what_sky_jobs_launch_reads(
    job: Job, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*SECRETS, "AWS_ENDPOINT_URL_S3", "HF_SPOT_S3_EXPECTED_BUCKET_OWNER", "HF_SPOT_S3_SSE_KMS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    for argv in ([], ["--print"], ["--json"]):
        assert main(["sky", str(path), *argv]) == 0
        assert yaml.safe_load(capsys.readouterr().out) == sky.task(job, {})


@pytest.mark.parametrize("what", ["--launch", "--status", "--logs", "--cancel"])
def test_without_skypilot_the_repair_is_named(
    path: Path, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sky", None)
    assert main(["sky", str(path), what]) == 2
    assert "pip install 'skypilot[aws]'" in capsys.readouterr().err


# -- a schema of the task, without SkyPilot ----------------------------------------------------------------------------

TEXT = {"type": "string", "minLength": 1}
OBJECT = {"type": "object", "additionalProperties": False}
VARIABLES = {"type": "object", "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"}}
MACHINE: dict[str, Any] = {
    "infra": {"type": "string", "pattern": "^aws(/[a-z0-9-]+)?$"},
    "instance_type": TEXT,
    "accelerators": TEXT,
    "use_spot": {"type": "boolean"},
    "max_hourly_cost": {"type": "number"},
    "image_id": {"type": "object", "additionalProperties": TEXT},
}
RESOURCES: dict[str, Any] = {
    **MACHINE,
    "disk_size": {"type": "integer"},
    "labels": {"type": "object", "additionalProperties": {"type": "string"}},
    "job_recovery": {
        **OBJECT,
        "required": ["strategy", "recover_on_exit_codes"],
        "properties": {
            "strategy": {"enum": ["EAGER_NEXT_REGION", "FAILOVER"]},
            "recover_on_exit_codes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}},
        },
    },
    **{
        name: {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "properties": MACHINE,
                "required": ["infra", "use_spot"],
            },
        }
        for name in ("any_of", "ordered")
    },
}
SCHEMA: dict[str, Any] = {
    **OBJECT,
    "required": ["resources", "run"],
    "properties": {
        "name": TEXT,
        "num_nodes": {"type": "integer", "minimum": 1},
        "resources": {**OBJECT, "properties": RESOURCES, "required": ["job_recovery"]},
        "envs": {**VARIABLES, "additionalProperties": {"type": "string"}},
        "secrets": {**VARIABLES, "additionalProperties": {"type": "null"}},  # SkyPilot would take values, and shows them
        "setup": TEXT,
        "run": TEXT,
    },
}
"""What SkyPilot 0.14 takes of the keys that hf_spot writes. Where SkyPilot is installed, its own schema is asked as well."""

MISSPELT = "a misspelt key of the recovery"  # which SkyPilot finds on its server only, for its plugins may know it

MISTAKES: dict[str, Any] = {
    "a key that is none": lambda task: task.update(exit_codes=[75]),
    MISSPELT: lambda task: task["resources"]["job_recovery"].update(recover_on_exit_code=75),
    "a code that is none": lambda task: task["resources"]["job_recovery"].update(recover_on_exit_codes=[-75]),
    "a market as text": lambda task: task["resources"]["ordered"][0].update(use_spot="spot"),
    "a price as text": lambda task: task["resources"]["ordered"][1].update(max_hourly_cost="12 dollars"),
    "a size as text": lambda task: task["resources"].update(disk_size="large"),
    "a label that is no text": lambda task: task["resources"].update(labels={"team": 7}),
    "a variable that no shell knows": lambda task: task["envs"].update({"NO-NAME": "x"}),
    "lines of a script": lambda task: task.update(run=["hf-spot launch train.py"]),
}


def valid(task: dict[str, Any], schema: dict[str, Any]) -> bool:
    return bool(importlib.import_module("jsonschema").Draft7Validator(schema).is_valid(task))


@pytest.mark.parametrize("rung", [None, Rung((P4D, G5), SPOT), Rung((P4D,), ON_DEMAND)])
@pytest.mark.parametrize("environ", [{}, {**SECRETS, "AWS_ENDPOINT_URL_S3": "https://minio"}])
def test_the_schema_takes_what_is_printed(job: Job, rung: Rung | None, environ: dict[str, str]) -> None:
    job = job if rung is None else dataclasses.replace(job, ladder=(rung,))
    assert valid(yaml.safe_load(sky.render(job, environ)), SCHEMA)


def hand_written() -> str:
    """The task that the page shows."""
    blocks = (ROOT / ".github" / "docs" / "recipes.md").read_text().split("```yaml\n")
    (text,) = [block.partition("```")[0] for block in blocks if block.startswith("# sky-task.yaml")]
    return text


def test_the_schema_takes_the_hand_written_task_of_the_page() -> None:
    task = yaml.safe_load(hand_written())
    assert valid(task, SCHEMA)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_schema_refuses_a_mistake(job: Job, mistake: str) -> None:
    task = yaml.safe_load(sky.render(job, {}))
    MISTAKES[mistake](task)
    assert not valid(task, SCHEMA)


# -- SkyPilot itself --------------------------------------------------------------------------------------------------

needs_skypilot = pytest.mark.skipif(
    importlib.util.find_spec("sky") is None, reason="SkyPilot is not installed: CONTRIBUTING.md has the line that does it"
)
COLUMNS = "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone,Arch"
MACHINES = ((P4D, "A100", 96, 1152, 22.0, 9.0), (G5, "A10G", 192, 768, 16.0, 5.0))
ZONES = (("us-east-1", "use1-az1"), ("us-east-1", "use1-az2"), ("us-west-2", "usw2-az1"))


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment in which SkyPilot knows two types of machines in two regions, and asks nobody for more."""
    where = tmp_path / "home" / ".sky" / "catalogs" / "v8"
    extra = ["LocalDiskType", "LocalDiskSize", "NVMeSSD", "LocalDiskCount"]
    rows = [
        [kind, gpu, 8, vcpus, memory, f"{{'Gpus': [{{'Name': '{gpu}', 'Count': 8}}]}}", full, spot, region, zone, "x86_64"]
        for kind, gpu, vcpus, memory, full, spot in MACHINES
        for region, zone in ZONES
    ]
    tables: dict[str, list[list[Any]]] = {
        "aws/vms.csv": [[*COLUMNS.split(","), *extra], *([*row, *[""] * 4] for row in rows)],
        "aws/images.csv": [["Tag", "Region", "OS", "OSVersion", "ImageId", "CreationDate", "BaseImageId"]],
        "aws/instance_quota_mapping.csv": [["InstanceType", "QuotaName", "SpotInstanceCode", "OnDemandInstanceCode"]],
        "common/accelerators.csv": [["AcceleratorName"], ["A100"], ["A10G"]],
    }
    for name, table in tables.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        with (where / name).open("w", newline="") as file:
            csv.writer(file).writerows(table)
    keys = "[default]\naws_access_key_id = AKTEST\naws_secret_access_key = secret\n"
    (tmp_path / "home" / ".aws").mkdir()
    (tmp_path / "home" / ".aws" / "credentials").write_text(keys)
    return {
        "HOME": str(tmp_path / "home"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


READ = """
import json, sys, yaml, sky
task = sky.Task.from_yaml_config(yaml.safe_load(sys.stdin))
print(json.dumps({
    "recovery": [one.job_recovery for one in task.resources],
    "machines": [[one.infra.to_str(), one.instance_type, one.use_spot] for one in task.resources],
    "ordered": isinstance(task.resources, list),
    "mounts": [task.file_mounts, task.storage_mounts],
}))
"""


def read(text: str, home: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What SkyPilot makes of a task."""
    return subprocess.run([sys.executable, "-c", READ], input=text, env=home, capture_output=True, text=True, timeout=120)


@needs_skypilot
def test_skypilots_own_schema_knows_every_key_of_ours_and_refuses_the_same_mistakes(job: Job) -> None:
    schemas = importlib.import_module("sky.utils.schemas")
    theirs, resources = schemas.get_task_schema(), schemas.get_resources_schema()
    assert set(SCHEMA["properties"]) <= set(theirs["properties"])
    assert set(RESOURCES) <= set(resources["properties"])
    theirs["properties"]["resources"] = resources
    assert valid(yaml.safe_load(sky.render(job, {})), theirs)
    for name, mistake in MISTAKES.items():
        task = yaml.safe_load(sky.render(job, {}))
        mistake(task)
        assert valid(task, theirs) == (name == MISSPELT), name


POOL = """
import json, sys, yaml, sky
print(json.dumps([
    [task.num_nodes, task.service.pool if task.service else None, task.service.min_replicas if task.service else None]
    for task in map(sky.Task.from_yaml_config, yaml.safe_load_all(sys.stdin))
]))
"""


@needs_skypilot
def test_skypilots_own_task_takes_several_nodes_and_the_pool_of_the_page(job: Job, home: dict[str, str]) -> None:
    page = (ROOT / ".github" / "docs" / "skypilot.md").read_text()
    files = [re.findall(rf"```yaml\n(# {name}\n.*?)```", page, re.DOTALL)[0] for name in ("sky-pool.yaml", "sky-machine.yaml")]
    text = "---\n".join([sky.render(dataclasses.replace(job, machines="2:8"), {}), *files])
    done = subprocess.run([sys.executable, "-c", POOL], input=text, env=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[8, None, None], [1, True, 8], [1, None, None]]


@needs_skypilot
def test_skypilots_own_task_takes_ours(job: Job, home: dict[str, str]) -> None:
    done = read(sky.render(job, {}), home)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["ordered"] is True
    assert made["machines"] == [
        ["aws/us-east-1", P4D, True],
        ["aws", P4D, True],
        ["aws", G5, True],
        ["aws/us-west-2", G5, True],
        ["aws/us-east-1", P4D, False],
    ]
    assert made["recovery"] == [{"strategy": "EAGER_NEXT_REGION", "recover_on_exit_codes": [75]}] * 5
    assert made["mounts"] in ([None, None], [None, {}], [{}, {}])


@needs_skypilot
def test_skypilots_own_task_would_refuse_a_mistake(job: Job, home: dict[str, str]) -> None:
    task = sky.task(job, {})
    task["resources"]["recover_on"] = [75]
    done = read(yaml.safe_dump(task), home)
    assert done.returncode != 0
    assert "recover_on" in done.stderr


@needs_skypilot
def test_skypilots_own_task_takes_the_hand_written_one(home: dict[str, str]) -> None:
    done = read(hand_written(), home)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["recovery"][0]["recover_on_exit_codes"] == [75]


@needs_skypilot
def test_a_launch_that_would_copy_credentials_to_every_machine_is_refused(path: Path, home: dict[str, str]) -> None:
    def launch() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hf_spot", "sky", str(path), "--launch"]
        return subprocess.run(command, env={**home, **AWAY}, capture_output=True, text=True, timeout=120)

    refused = launch()
    assert refused.returncode == 2
    assert "would copy this machine's AWS credentials" in refused.stderr
    assert "aws: {remote_identity: trainer}" in refused.stderr
    config = Path(home["HOME"]) / ".sky" / "config.yaml"
    config.write_text("aws: {remote_identity: trainer}\n")
    assert "SkyPilot could not start the job" in launch().stderr, "the next step is SkyPilot's server, which is not there"


AWAY = {"SKYPILOT_API_SERVER_ENDPOINT": "http://127.0.0.1:9"}  # the port that nobody listens on


@contextlib.contextmanager
def server(home: dict[str, str]) -> Iterator[dict[str, str]]:
    """SkyPilot's API server on a port of its own; gives the environment that leads to it."""
    (port,) = free_ports(1)
    log = Path(home["HOME"]) / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "sky.server.server", "--host=127.0.0.1", f"--port={port}"],
            env=home,
            cwd=home["HOME"],
            stdout=out,
            stderr=out,
            start_new_session=True,
        )

    def healthy() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5):
            return True
        return False

    try:
        wait_for(healthy, "for SkyPilot's API server")
        yield {**home, "SKYPILOT_API_SERVER_ENDPOINT": f"http://127.0.0.1:{port}"}
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its workers outlive it otherwise, and hold a port that is always the same
        process.wait()


@needs_skypilot
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not shutil.which("rsync"), reason="SkyPilot needs rsync: apt-get install rsync")
def test_skypilot_plans_the_ladder_and_is_asked_for_jobs_by_its_own_server(path: Path, home: dict[str, str]) -> None:
    """As far as it goes without AWS: moto answers for EC2, and nothing is started."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    host, moto_port = moto.get_host_and_port()
    try:
        with server({**home, "AWS_ENDPOINT_URL": f"http://{host}:{moto_port}"}) as env:
            text = JOB
            for region in ("us-east-1", "us-west-2"):
                text = text.replace(f"{region}: ami-03cf127a", f"{region}: {image_of(f'http://{host}:{moto_port}', region)}")
            path.write_text(text)

            def run(*command: str) -> subprocess.CompletedProcess[str]:
                return subprocess.run(command, env=env, cwd=path.parent, capture_output=True, text=True, timeout=200)

            task = path.with_name("task.yaml")
            task.write_text(run(sys.executable, "-m", "hf_spot", "sky", str(path)).stdout)
            planned = run("sky", "launch", "--dryrun", "-y", "-c", "dry", str(task))
            assert "Dryrun finished." in planned.stdout, planned.stdout + planned.stderr
            assert f"{P4D}[Spot]" in planned.stdout
            status = run(sys.executable, "-m", "hf_spot", "sky", str(path), "--status", "--json")
            assert (status.returncode, json.loads(status.stdout.splitlines()[-1])) == (0, []), status.stderr
            cancelled = run(sys.executable, "-m", "hf_spot", "sky", str(path), "--cancel")
            assert "No in-progress managed jobs" in cancelled.stderr
    finally:
        moto.stop()


def image_of(endpoint: str, region: str) -> str:
    client = boto3.client(
        "ec2", endpoint_url=endpoint, region_name=region, aws_access_key_id="AKTEST", aws_secret_access_key="secret"
    )
    disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 30}}
    return str(client.register_image(Name="ours", RootDeviceName="/dev/sda1", BlockDeviceMappings=[disk])["ImageId"])


def test_a_job_that_cannot_be_is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(JOB.replace("ladder:", "laddder:"))
    assert main(["sky", str(path)]) == 2
    assert "did you mean ladder?" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        load(path)


@pytest.mark.parametrize("place", ["variable", "variable of S3", "config file", "ignored"])
def test_an_endpoint_is_passed_on_wherever_the_client_finds_it_and_without_a_password(
    place: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"):
        monkeypatch.delenv(name, raising=False)
    endpoint = "https://me:hunter2@minio.example.com:9000"
    (tmp_path / "config").write_text(f"[default]\nendpoint_url = {endpoint}\n" if place == "config file" else "")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "A")
    if place != "config file":
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3" if place == "variable of S3" else "AWS_ENDPOINT_URL", endpoint)
    if place == "ignored":
        monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    made = sky.task(job, os.environ)
    if place == "ignored":
        assert "AWS_ENDPOINT_URL_S3" not in made["envs"]
        return
    assert made["envs"]["AWS_ENDPOINT_URL_S3"] == "https://minio.example.com:9000"
    assert "AWS_ACCESS_KEY_ID" in made["secrets"]
    assert "hunter2" not in sky.render(job, os.environ)
