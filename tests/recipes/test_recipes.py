"""The job files that ``hf-spot recipe`` prints: taken by the schemas, shells and APIs that they are for."""

from __future__ import annotations

import configparser
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from hf_spot.cli import main
from hf_spot.errors import ConfigError
from hf_spot.notices.detect import GRACE_VARIABLE, grace_s
from hf_spot.notices.file import FILE_VARIABLE, FileSource
from hf_spot.recipes import render

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("kubernetes", "slurm", "sagemaker")
NASTY = "train.py --text \"it's $HOME\" '<<name>>' '$(HF_SPOT_GRACE_S)' '#: {x}' 'ü'"
NASTY_WORDS = ["train.py", "--text", "it's $HOME", "<<name>>", "$(HF_SPOT_GRACE_S)", "#: {x}", "ü"]
STORE = "s3://bucket/a run"

Print = Callable[..., str]


@pytest.fixture
def recipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Print:
    monkeypatch.delenv("HF_SPOT_STORE", raising=False)

    def print_recipe(*argv: str) -> str:
        assert main(["recipe", *argv]) == 0
        return capsys.readouterr().out

    return print_recipe


def launch_words(kind: str, text: str) -> list[str]:
    """What stands behind ``hf-spot`` in a printed recipe."""
    if kind == "kubernetes":
        job = job_of(text)
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert container["command"] == ["hf-spot"]
        return [expand(word, environ_of(job)) for word in container["args"]]
    if kind == "slurm":
        (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
        words = shlex.split(line)
        assert words[:2] == ["srun", "hf-spot"]
        return words[2:]
    request = request_of(text)
    assert request["AlgorithmSpecification"]["ContainerEntrypoint"] == ["hf-spot"]
    return list(request["AlgorithmSpecification"]["ContainerArguments"])


def expand(word: str, environ: dict[str, str]) -> str:
    """As Kubernetes reads an argument: ``$(NAME)`` is a variable of the container, ``$$(NAME)`` is no variable."""
    return re.sub(r"\$(\$?)\((\w+)\)", lambda found: f"$({found[2]})" if found[1] else environ.get(found[2], found[0]), word)


def job_of(text: str) -> dict[str, Any]:
    yaml = importlib.import_module("yaml")
    job: dict[str, Any] = yaml.safe_load(text)
    return job


def request_of(text: str) -> dict[str, Any]:
    """Runs a SageMaker recipe: what it asked of the API, after botocore has checked it against the API's model."""
    import boto3
    from botocore.stub import Stubber

    client = boto3.client("sagemaker", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
    asked: list[dict[str, Any]] = []
    client.meta.events.register(
        "provide-client-params.sagemaker.CreateTrainingJob", lambda params, **rest: asked.append(params)
    )
    arn = "arn:aws:sagemaker:us-east-1:123456789012:training-job/my-run"
    stubber = Stubber(client)
    stubber.add_response("create_training_job", {"TrainingJobArn": arn})
    with stubber, pytest.MonkeyPatch.context() as patch:
        patch.setattr(boto3, "client", lambda name: client if name == "sagemaker" else None)
        exec(compile(text, "recipe", "exec"), {})
    stubber.assert_no_pending_responses()
    return asked[0]


# -- all ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_reaches_the_launch_word_for_word(recipe: Print, kind: str) -> None:
    words = launch_words(kind, recipe(kind, "--store", STORE, "--script", NASTY))
    assert words == ["launch", "--store", STORE, *NASTY_WORDS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gpus", [1, 4])
def test_hf_spot_launch_takes_the_command(
    recipe: Print, kind: str, gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_spot.launch.command import parse

    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()
    words = launch_words(kind, recipe(kind, "--gpus", str(gpus), "--script", "train.py --epochs 3"))
    command = parse(words[1:])
    assert command.store == render.STORE
    assert command.argv[-3:] == ["train.py", "--epochs", "3"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "bad",
    [
        ("--name", "My Run"),
        ("--name", "x\n#SBATCH --mem=0"),
        ("--name", "a" * 43),
        ("--gpus", "-1"),
        ("--script", ""),
        ("--script", "train.py 'half"),
    ],
    ids=lambda bad: bad[0] + bad[1][:8],
)
def test_what_can_not_be_used_is_refused_with_the_option_and_a_hint(
    kind: str, bad: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe", kind, *bad]) == 2
    said = capsys.readouterr()
    assert bad[0] in said.err and "Try: " in said.err
    assert said.out == ""


def test_a_store_of_the_environment_is_the_default(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_SPOT_STORE", "s3://mine/run")
    assert main(["recipe", "slurm"]) == 0
    assert "--store s3://mine/run" in capsys.readouterr().out


def test_the_templates_are_in_the_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.package_data"]["hf_spot.recipes"].split()
    folder = ROOT / "hf_spot" / "recipes"
    packaged = {path for pattern in patterns for path in folder.glob(pattern)}
    assert packaged == {path for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
    assert {path.name.partition(".")[0] for path in packaged} == set(KINDS)


# -- Kubernetes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_the_schema_of_kubernetes_takes_the_job(recipe: Print, version: str) -> None:
    validator = importlib.import_module("kubernetes_validate")
    job = job_of(
        recipe("kubernetes", "--store", STORE, "--script", NASTY, "--gpus", "8", "--image", "repo/image:1", "--name", "1")
    )
    validator.validate(job, version, strict=True)
    job["spec"]["podFailurePolicy"]["rules"][0]["action"] = 75
    with pytest.raises(validator.ValidationError):
        validator.validate(job, version, strict=True)


def test_a_preempted_pod_does_not_count_as_a_failed_one_and_what_can_not_succeed_ends_the_job(recipe: Print) -> None:
    spec = job_of(recipe("kubernetes"))["spec"]
    by_code = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert by_code == {75: "Ignore", 2: "FailJob", 76: "FailJob"}
    named = {rule["onExitCodes"]["containerName"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule}
    assert named == {container["name"] for container in spec["template"]["spec"]["containers"]}
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # a pod failure policy needs it


def environ_of(job: dict[str, Any]) -> dict[str, str]:
    """What a pod of the job sees, its annotations handed down as Kubernetes does it."""
    template = job["spec"]["template"]
    (container,) = template["spec"]["containers"]
    environ = {}
    for variable in container["env"]:
        path = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        key = path.removeprefix("metadata.annotations['").removesuffix("']")
        environ[variable["name"]] = template["metadata"]["annotations"][key] if path else variable["value"]
    return environ


def test_the_grace_of_the_pod_reaches_hf_spot_through_the_downward_api(recipe: Print) -> None:
    from hf_spot.arguments import SpotArguments

    job = job_of(recipe("kubernetes", "--grace-s", "45"))
    assert job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 45
    assert grace_s(SpotArguments(), environ_of(job)) == 45


def test_the_hook_before_the_stop_is_a_notice_with_the_deadline_of_the_pod(recipe: Print, tmp_path: Path) -> None:
    job = job_of(recipe("kubernetes", "--grace-s", "45"))
    environ = environ_of(job)
    assert set(environ) == {GRACE_VARIABLE, FILE_VARIABLE}
    path = tmp_path / "notice"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    hook = container["lifecycle"]["preStop"]["exec"]["command"]
    subprocess.run(hook, env={**os.environ, **environ, FILE_VARIABLE: str(path)}, check=True)
    notice = FileSource(path).poll()
    assert notice is not None and notice.deadline is not None
    assert notice.deadline.timestamp() - path.stat().st_mtime == pytest.approx(45, abs=0.01)


def test_a_run_in_a_directory_of_a_pod_is_refused() -> None:
    with pytest.raises(ConfigError, match="gone with the pod"):
        render.kubernetes(store="/data/run", script="train.py", name="a", gpus=1, image="i", grace_s=1)


# -- Slurm -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path) -> Callable[[str, int], tuple[int, list[str], str]]:
    """Runs a batch script where hf-spot ends with a code: the script's own, what was asked of Slurm, and what it printed."""
    commands = tmp_path / "bin"
    commands.mkdir()
    asked = tmp_path / "asked"
    for name, body in {
        "srun": f'echo "srun $*" >> {asked}; exec "$@"',
        "scontrol": f'echo "scontrol $*" >> {asked}',
        "hf-spot": f'echo "hf-spot $*" >> {asked}; exit "$CODE"',
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o755)

    def run(script: str, code: int) -> tuple[int, list[str], str]:
        asked.write_text("")
        environ = {"PATH": f"{commands}:{os.environ['PATH']}", "CODE": str(code), "SLURM_JOB_ID": "7"}
        environ |= {"SLURM_RESTART_COUNT": "2"}
        (tmp_path / "job.sh").write_text(script)
        done = subprocess.run(["bash", tmp_path / "job.sh"], env=environ, capture_output=True, text=True, check=False)
        return done.returncode, asked.read_text().splitlines(), done.stdout + done.stderr

    return run


def test_shellcheck_has_nothing_to_say(recipe: Print, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(recipe("slurm", "--store", STORE, "--script", "train.py --text 'two words'"))
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, "--format=json", script], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout) == []
    script.write_text(script.read_text().replace('"$SLURM_JOB_ID"', "$SLURM_JOB_ID"))
    assert subprocess.run([shellcheck, script], capture_output=True, check=False).returncode == 1


def test_a_preempted_job_goes_back_into_the_queue(recipe: Print, cluster: Any) -> None:
    code, asked, printed = cluster(recipe("slurm"), 75)
    assert code == 75
    launch = f"hf-spot launch --store {render.STORE} train.py"
    assert asked == [f"srun {launch}", launch, "scontrol requeue 7"]
    assert "start 3 of job 7" in printed


@pytest.mark.parametrize("code", [0, 1, 2, 76, 130])
def test_a_job_that_ends_otherwise_does_not(recipe: Print, cluster: Any, code: int) -> None:
    ended, asked, _ = cluster(recipe("slurm"), code)
    assert ended == code
    assert not [line for line in asked if line.startswith("scontrol")]


def test_slurm_is_told_the_limit_and_when_to_send_the_signal_before_anything_is_run(recipe: Print) -> None:
    text = recipe("slurm", "--time", "2-12:30:00", "--grace-s", "300", "--gpus", "4", "--name", "mine")
    lines = text.splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    told = {line.removeprefix("#SBATCH ") for line in lines[:first_command] if line.startswith("#SBATCH ")}
    assert {"--time=2-12:30:00", "--signal=USR1@300", "--gpus-per-node=4", "--job-name=mine", "--requeue"} <= told
    assert text.count("#SBATCH ") == len(told)


@pytest.mark.parametrize("time", ["", "tomorrow", "1:2:3:4", "1d", "10\n#SBATCH --mem=0"])
def test_a_time_limit_that_slurm_would_not_understand_is_refused(time: str) -> None:
    with pytest.raises(ConfigError, match="--time"):
        render.slurm(store=STORE, script="train.py", name="a", gpus=1, time=time, grace_s=1)


# -- SageMaker ---------------------------------------------------------------------------------------------------------


def test_the_api_of_sagemaker_takes_the_request_for_a_spot_job(recipe: Print) -> None:
    request = request_of(
        recipe("sagemaker", "--store", "s3://mine/run/", "--hours", "5", "--instance-type", "ml.p4d.24xlarge", "--gpus", "8")
    )
    assert request["EnableManagedSpotTraining"] is True
    limits = request["StoppingCondition"]
    assert timedelta(seconds=limits["MaxRuntimeInSeconds"]) == timedelta(hours=5)
    assert limits["MaxWaitTimeInSeconds"] >= limits["MaxRuntimeInSeconds"]  # the API refuses less
    assert request["TrainingJobName"].startswith("my-run-") and len(request["TrainingJobName"]) <= 63
    assert request["OutputDataConfig"]["S3OutputPath"] == "s3://mine/run-output"


def test_a_store_that_sagemaker_would_lose_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "sagemaker", "--store", "/opt/ml/checkpoints"]) == 2
    assert "keeps its run in S3" in capsys.readouterr().err
