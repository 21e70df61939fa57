"""The job files that ``hf-spot recipe`` prints: taken by the schemas, shells and APIs that they are for."""

from __future__ import annotations

import configparser
import importlib
import json
import os
import re
import shlex
import signal
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
from tests.cloud.test_user_data import Machine
from tests.waiting import PATIENCE_S, wait_for

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("kubernetes", "slurm", "sagemaker", "ec2")
MEETING = ("jobset", "trainjob")  # for machines that come and go, and no others
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
    if kind == "ec2":
        (line,) = [line for line in text.splitlines() if line.startswith("hf-spot launch ")]
        (store,) = [line for line in text.splitlines() if line.startswith("HF_SPOT_STORE=")]
        return ["launch", "--store", store.partition("=")[2], *shlex.split(line)[2:]]
    request = request_of(text)
    assert request["AlgorithmSpecification"]["ContainerEntrypoint"] == ["hf-spot"]
    return list(request["AlgorithmSpecification"]["ContainerArguments"])


def expand(word: str, environ: dict[str, str]) -> str:
    """As Kubernetes reads an argument: ``$(NAME)`` is a variable of the container, ``$$(NAME)`` is no variable."""
    return re.sub(r"\$(\$?)\((\w+)\)", lambda found: f"$({found[2]})" if found[1] else environ.get(found[2], found[0]), word)


def job_of(text: str) -> dict[str, Any]:
    return documents_of(text)[0]


def documents_of(text: str) -> list[dict[str, Any]]:
    return list(importlib.import_module("yaml").safe_load_all(text))


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
    from hf_spot.launch import options

    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()
    words = launch_words(kind, recipe(kind, "--gpus", str(gpus), "--script", "train.py --epochs 3"))
    read = options.parse(words[1:])
    assert read.store == render.STORE
    assert read.argv[-3:] == ["train.py", "--epochs", "3"]


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
    assert {re.split("[.-]", path.name)[0] for path in packaged} == {*KINDS, *MEETING} - {"ec2"}  # whose script is provision's


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (("slurm", "--nodes", "0"), "--nodes"),
        (("slurm", "--nodes", "8:2"), "--nodes 8:2"),
        (("kubernetes", "--nodes", "0:2"), "--nodes 0:2"),
        (("jobset", "--nodes", "many"), "--nodes many"),
        (("trainjob", "--nodes", "2:x"), "--nodes 2:x"),
        (("jobset", "--gpus", "0"), "--gpus"),
        (("trainjob", "--store", "/data/run"), "lost with the pod"),
        (("slurm", "--nodes", "2:4", "--gpus", "0"), "--gpus"),
        (("jobset", "--grace-s", "0"), "--grace-s"),
        (("kubernetes", "--queue", "Team A"), "--queue 'Team A'"),
        (("jobset", "--priority-class", "high"), "needs a queue"),
        (("kubernetes", "--nodes", "-2"), "--nodes"),
        (("slurm", "--nodes", "2", "--gpus", "0"), "--gpus"),
        (("kubernetes", "--nodes", "2", "--name", "7"), "--name '7'"),
        (("ec2", "--hours", "0"), "--hours"),
        (("ec2", "--region", "mars"), "region"),
    ],
    ids=lambda bad: " ".join(bad) if isinstance(bad, tuple) else "",
)
def test_what_this_kind_can_not_use_is_refused(bad: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", *bad]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and "Try: " in printed.err
    assert printed.out == ""


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


@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_the_schema_of_kubernetes_takes_the_job_of_several_machines_and_its_service(recipe: Print, version: str) -> None:
    validator = importlib.import_module("kubernetes_validate")
    job, service = documents_of(recipe("kubernetes", "--nodes", "3", "--gpus", "8"))
    assert [one["kind"] for one in (job, service)] == ["Job", "Service"]
    for one in (job, service):
        validator.validate(one, version, strict=True)
    service["spec"]["publishNotReady"] = True
    with pytest.raises(validator.ValidationError):
        validator.validate(service, version, strict=True)


def test_every_pod_of_several_knows_its_number_and_finds_the_first_by_the_name_that_the_service_gives_it(
    recipe: Print, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, service = documents_of(recipe("kubernetes", "--nodes", "3", "--gpus", "8", "--script", NASTY, "--name", "mine"))
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    # What Kubernetes documents of an Indexed Job: its pods' host names, their label and the variable with their number.
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    for index in range(3):
        environ = {**environ_of(job), "JOB_COMPLETION_INDEX": str(index)}
        words = [expand(word, environ) for word in container["args"]]
        assert words[-len(NASTY_WORDS) :] == NASTY_WORDS
        assert machines_of(words[1:], tmp_path, monkeypatch) == (3, index, f"mine-0.{pod['subdomain']}")
        assert words[words.index("--num_processes") + 1] == "24"


def machines_of(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, str]:
    """How many machines ``hf-spot launch`` reads there, which of them this is, and where the first is."""
    from hf_spot.launch import options

    monkeypatch.chdir(folder)
    Path("train.py").touch()
    monkeypatch.setattr(options, "interface_to", lambda address: None)  # nobody answers to these names here
    machines = options.parse(words, {}).machines
    return machines.count, machines.rank, machines.main_ip


def test_crashes_of_all_pods_at_once_do_not_use_up_the_retries_of_one(recipe: Print) -> None:
    assert [job_of(recipe("kubernetes", "--nodes", nodes))["spec"]["backoffLimit"] for nodes in ("1", "4")] == [3, 12]


def test_a_preempted_pod_does_not_count_as_a_failed_one_and_what_can_not_succeed_ends_the_job(recipe: Print) -> None:
    spec = job_of(recipe("kubernetes"))["spec"]
    by_code = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert by_code == {75: "Ignore", 2: "FailJob", 76: "FailJob", 79: "FailJob"}
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
    with pytest.raises(ConfigError, match="lost with the pod"):
        render.kubernetes(store="/data/run", script="train.py", name="a", gpus=1, image="i", grace_s=1)


# -- machines that come and go, on Kubernetes --------------------------------------------------------------------------

ELASTIC = ("kubernetes", *MEETING)


def inner_job(kind: str, text: str) -> dict[str, Any]:
    """The Job that a recipe leads to, with what a TrainJob adds to its runtime as Kubeflow documents it."""
    first, *others = documents_of(text)
    if kind == "kubernetes":
        return first
    spec = first["spec"] if kind == "jobset" else first["spec"]["template"]["spec"]
    (replicated,) = spec["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": replicated["template"]["spec"]}
    if kind == "trainjob":
        (train_job,) = others
        trainer = train_job["spec"]["trainer"]
        assert train_job["spec"]["runtimeRef"] == {"kind": first["kind"], "name": first["metadata"]["name"]}
        assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert (replicated["name"], container["name"]) == ("node", "node")  # Kubeflow looks for these
        assert set(first["spec"]["mlPolicy"]) == {"numNodes"}  # the torch policy would set a rank and a main address
        container |= {key: trainer[key] for key in ("image", "command", "args")} | {"resources": trainer["resourcesPerNode"]}
        job["spec"] |= {"completions": trainer["numNodes"], "parallelism": trainer["numNodes"]}
    return job


@pytest.mark.parametrize("version", ["1.31", "1.37"])
@pytest.mark.parametrize("kind", ELASTIC)
def test_the_schema_of_kubernetes_takes_the_job_of_machines_that_come_and_go(recipe: Print, kind: str, version: str) -> None:
    validator = importlib.import_module("kubernetes_validate")
    text = recipe(kind, "--nodes", "2:8", "--gpus", "8", "--store", STORE, "--script", NASTY, "--queue", "team")
    job = inner_job(kind, text)
    validator.validate(job, version, strict=True)
    job["spec"]["maxFailedIndex"] = 1
    with pytest.raises(validator.ValidationError):
        validator.validate(job, version, strict=True)


@pytest.mark.parametrize("kind", MEETING)
def test_the_models_of_kubeflow_know_every_key_that_is_printed(recipe: Print, kind: str) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    known = {
        "JobSet": models.JobsetV1alpha2JobSet,
        "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
        "TrainJob": models.TrainerV1alpha1TrainJob,
    }
    documents = documents_of(recipe(kind, "--nodes", "2:8", "--gpus", "8", "--queue", "team", "--priority-class", "high"))
    for document in documents:
        assert known[document["kind"]].from_dict(document).to_dict() == document  # it drops what it does not know


@pytest.mark.parametrize("kind", ELASTIC)
def test_every_pod_runs_the_same_command_and_hf_spot_reads_the_numbers_from_it(
    recipe: Print, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_spot.launch import options

    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()
    job = inner_job(kind, recipe(kind, "--nodes", "2:8", "--gpus", "4", "--store", STORE, "--script", NASTY))
    spec = job["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (8, 8, "Indexed")
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 4}}
    words = [expand(word, environ_of(job)) for word in container["args"]]
    assert container["command"] == ["hf-spot"] and words[0] == "launch" and words[-len(NASTY_WORDS) :] == NASTY_WORDS
    machines = options.parse(words[1:], {}).machines
    assert (machines.least, machines.count, machines.processes) == (2, 8, 4)


@pytest.mark.parametrize("kind", MEETING)
def test_a_fixed_number_of_machines_meets_as_well(recipe: Print, kind: str) -> None:
    job = inner_job(kind, recipe(kind, "--nodes", "4"))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"][3:7] == ["--num_machines", "4:4", "--num_processes", "1"]
    assert (job["spec"]["completions"], job["spec"]["maxFailedIndexes"]) == (4, 0)


@pytest.mark.parametrize("kind", MEETING)
def test_one_machine_alone_is_an_ordinary_launch(recipe: Print, kind: str) -> None:
    job = inner_job(kind, recipe(kind, "--nodes", "1", "--gpus", "8"))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"][3:] == ["--multi_gpu", "--num_processes", "8", "train.py"]


@pytest.mark.parametrize("kind", ELASTIC)
def test_a_machine_that_can_not_take_part_leaves_the_others_alone_and_a_preempted_one_comes_again(
    recipe: Print, kind: str
) -> None:
    spec = inner_job(kind, recipe(kind, "--nodes", "2:8"))["spec"]
    rules = spec["podFailurePolicy"]["rules"]
    by_code = {code: rule["action"] for rule in rules for code in rule.get("onExitCodes", {}).get("values", [])}
    assert by_code == {75: "Ignore", 2: "FailIndex", 76: "FailJob", 79: "FailJob"}
    assert [rule["action"] for rule in rules if "onPodConditions" in rule] == ["Ignore"]
    named = {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule}
    assert named == {container["name"] for container in spec["template"]["spec"]["containers"]}
    assert spec["maxFailedIndexes"] == 6  # with one more, fewer than two could be left
    assert spec["template"]["spec"]["restartPolicy"] == "Never" and spec["backoffLimitPerIndex"] >= 1  # the policy needs both


@pytest.mark.parametrize("kind", ELASTIC)
def test_the_grace_of_each_machine_reaches_hf_spot_through_the_downward_api(recipe: Print, kind: str, tmp_path: Path) -> None:
    from hf_spot.arguments import SpotArguments

    job = inner_job(kind, recipe(kind, "--nodes", "2:8", "--grace-s", "45"))
    environ = environ_of(job)
    assert job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 45
    assert grace_s(SpotArguments(), environ) == 45
    path = tmp_path / "notice"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    hook = container["lifecycle"]["preStop"]["exec"]["command"]
    subprocess.run(hook, env={**os.environ, **environ, FILE_VARIABLE: str(path)}, check=True)
    notice = FileSource(path).poll()
    assert notice is not None and notice.deadline is not None
    assert notice.deadline.timestamp() - path.stat().st_mtime == pytest.approx(45, abs=0.01)


QUEUED = ("--queue", "team", "--priority-class", "high")


@pytest.mark.parametrize("kind", ELASTIC)
@pytest.mark.parametrize("nodes", ["2:8", "2"])
def test_kueue_finds_its_labels_on_what_it_queues(recipe: Print, kind: str, nodes: str) -> None:
    queued = {"JobSet", "TrainJob", "Job"}
    labelled = [one for one in documents_of(recipe(kind, "--nodes", nodes, *QUEUED)) if "labels" in one["metadata"]]
    assert [one["kind"] in queued for one in labelled] == [True]
    expected = {"kueue.x-k8s.io/queue-name": "team", "kueue.x-k8s.io/priority-class": "high"}
    assert labelled[0]["metadata"]["labels"] == expected
    for one in documents_of(recipe(kind, "--nodes", nodes)):
        assert set(one["metadata"]) == {"name"}


@pytest.mark.parametrize(("nodes", "fewest"), [("2:8", "2"), ("3:3", None), ("4", None)])
def test_kueue_may_admit_a_job_with_fewer_machines_if_they_may_come_and_go(
    recipe: Print, nodes: str, fewest: str | None
) -> None:
    annotations = job_of(recipe("kubernetes", "--nodes", nodes, *QUEUED))["metadata"].get("annotations", {})
    assert annotations.get("kueue.x-k8s.io/job-min-parallelism") == fewest  # which must be smaller than parallelism
    assert ("kueue.x-k8s.io/job-completions-equal-parallelism" in annotations) is (fewest is not None)


def test_a_structural_schema_refuses_a_key_that_kubernetes_would_drop() -> None:
    from tests.recipes.crds import strict

    text_or_number = {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]}
    free = {"type": "object", "additionalProperties": {"type": "string"}}
    schema = {"type": "object", "properties": {"port": text_or_number, "labels": free, "in": {"type": "object"}}}
    validator = importlib.import_module("jsonschema").Draft202012Validator(strict(schema))
    assert validator.is_valid({"port": "http", "labels": {"a": "b"}, "in": {"any": 1}})
    assert not validator.is_valid({"ports": 1}) and not validator.is_valid({"port": True})


# -- Slurm -------------------------------------------------------------------------------------------------------------


SRUN = """\
echo "srun $*" >> asked
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node "$@" &
    tasks+=($!)
done
echo "${tasks[@]}" > tasks
worst=0
for task in "${tasks[@]}"; do
    wait "$task"
    code=$?
    if ((code > worst)); then worst=$code; fi
done
exit "$worst"
"""
SCONTROL = """\
if [[ "$*" == "show hostnames node-[a-b]" ]]; then printf '%s\\n' node-a node-b; else echo "scontrol $*" >> asked; fi
"""
SCANCEL = """\
echo "scancel $*" >> asked
"""
HF_SPOT = """\
echo "hf-spot $*" >> asked
printf '%s\\0' "$@" > argv-"$SLURM_NODEID"
if [[ $CODE != notice ]]; then exit "$CODE"; fi
trap 'exit 75' USR1
touch ready-"$SLURM_NODEID"
for ((waits = 0; waits < 60; waits++)); do read -rt 1 <> <(:); done
"""


class Cluster:
    """Runs batch scripts where srun starts a process for each node, and hf-spot ends with a code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, body in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL, "hf-spot": HF_SPOT}.items():
            (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}")
            (folder / "bin" / name).chmod(0o755)

    def start(self, script: str, code: int | str, nodes: int = 1) -> subprocess.Popen[str]:
        (self.folder / "job.sh").write_text(script)
        environ = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "CODE": str(code), "SLURM_JOB_ID": "7"}
        environ |= {"SLURM_RESTART_COUNT": "2", "SLURM_NNODES": str(nodes), "SLURM_JOB_NODELIST": "node-[a-b]"}
        environ |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
        return subprocess.Popen(
            ["bash", "job.sh"], env=environ, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def __call__(self, script: str, code: int | str, nodes: int = 1) -> tuple[int, list[str], str]:
        """The script's own code, what was asked of Slurm and of hf-spot, and what was printed."""
        (self.folder / "asked").write_text("")
        with self.start(script, code, nodes) as process:
            printed = process.communicate(timeout=PATIENCE_S)[0]
        return process.returncode, self.asked(), printed

    def asked(self) -> list[str]:
        return (self.folder / "asked").read_text().splitlines()

    def argv(self, node: int) -> list[str]:
        return (self.folder / f"argv-{node}").read_text().split("\0")[:-1]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@pytest.mark.parametrize("nodes", ["1", "2", "2:8"])
def test_shellcheck_has_nothing_to_say(recipe: Print, tmp_path: Path, nodes: str) -> None:
    script = tmp_path / "job.sh"
    script.write_text(recipe("slurm", "--store", STORE, "--script", "train.py --text 'two words'", "--nodes", nodes))
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, "--format=json", script], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout) == []
    quoted = ('"$SLURM_JOB_ID"', '"$SLURM_ARRAY_JOB_ID"')
    text = script.read_text()
    for word in quoted:
        text = text.replace(word, word.strip('"'))
    script.write_text(text)
    assert subprocess.run([shellcheck, script], capture_output=True, check=False).returncode == 1


def test_a_preempted_job_goes_back_into_the_queue(recipe: Print, cluster: Cluster) -> None:
    code, asked, printed = cluster(recipe("slurm"), 75)
    assert code == 75
    launch = f"hf-spot launch --store {render.STORE} train.py"
    assert asked == [f"srun {launch}", launch, "scontrol requeue 7"]
    assert "start 3 of job 7" in printed


@pytest.mark.parametrize("code", [0, 1, 2, 76, 79, 130])
def test_a_job_that_ends_otherwise_does_not(recipe: Print, cluster: Cluster, code: int) -> None:
    ended, asked, _ = cluster(recipe("slurm"), code)
    assert ended == code
    assert not [line for line in asked if line.startswith("scontrol")]


def test_each_of_several_nodes_starts_one_launch_that_knows_its_number_and_the_first_node(
    recipe: Print, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = recipe("slurm", "--nodes", "2", "--gpus", "4", "--store", STORE, "--script", NASTY)
    assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --gpus-per-node=4"} <= set(script.splitlines())
    code, asked, printed = cluster(script, 0, nodes=2)
    assert code == 0 and len([line for line in asked if line.startswith("hf-spot ")]) == 2, printed
    for node in range(2):
        words = cluster.argv(node)
        assert words[-len(NASTY_WORDS) :] == NASTY_WORDS and words[words.index("--store") + 1] == STORE
        assert machines_of(words[1:], tmp_path, monkeypatch) == (2, node, "node-a")
        assert words[words.index("--num_processes") + 1] == "8"
        assert words[words.index("--main_process_port") + 1] == "10007"  # of job 7


def test_the_signal_of_slurm_reaches_the_launch_on_every_node_and_the_job_goes_back_into_the_queue(
    recipe: Print, cluster: Cluster
) -> None:
    with cluster.start(recipe("slurm", "--nodes", "2"), "notice", nodes=2) as process:
        ready = [cluster.folder / name for name in ("ready-0", "ready-1", "tasks")]
        wait_for(lambda: process.poll() is not None or all(path.exists() for path in ready))
        for task in ready[-1].read_text().split():
            os.kill(int(task), signal.SIGUSR1)  # as Slurm's daemon on each node does, to what srun has started there
        printed = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 75, printed
    assert cluster.asked()[-1] == "scontrol requeue 7"


def test_no_node_is_killed_because_another_one_is_done(recipe: Print, cluster: Cluster) -> None:
    _, asked, _ = cluster(recipe("slurm", "--nodes", "2"), 75, nodes=2)
    assert {"--kill-on-bad-exit=0", "--wait=0"} <= set(asked[0].split())  # a cluster may have other defaults


def test_each_element_of_an_array_is_a_machine_that_meets_the_others_in_the_run(
    recipe: Print, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_spot.launch import options

    script = recipe("slurm", "--nodes", "2:8", "--gpus", "4", "--store", STORE, "--script", NASTY)
    told = {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")}
    assert {"--array=1-8", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=4", "--requeue"} <= told
    cluster(script, 0)
    words = cluster.argv(0)
    assert words[-len(NASTY_WORDS) :] == NASTY_WORDS and words[words.index("--store") + 1] == STORE
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()
    machines = options.parse(words[1:], {}).machines
    assert (machines.least, machines.count, machines.processes) == (2, 8, 4)


@pytest.mark.parametrize(
    ("code", "done"),
    [(75, ["scontrol requeue 7_3"]), (0, ["scancel --state=PENDING 7"]), (1, []), (2, []), (76, []), (79, [])],
)
def test_a_preempted_element_comes_again_alone_and_the_finished_run_needs_no_more_of_them(
    recipe: Print, cluster: Cluster, code: int, done: list[str]
) -> None:
    ended, asked, _ = cluster(recipe("slurm", "--nodes", "2:8"), code)
    assert ended == code
    assert [line for line in asked if not line.startswith(("srun ", "hf-spot "))] == done


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
    assert "needs a run in S3" in capsys.readouterr().err


# -- EC2 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize("more", [(), ("--auto-scaling-group",)])
def test_shellcheck_has_nothing_to_say_of_the_user_data(recipe: Print, tmp_path: Path, more: tuple[str, ...]) -> None:
    script = tmp_path / "user-data.sh"
    script.write_text(recipe("ec2", "--store", STORE, "--script", NASTY, *more))
    shellcheck = [Path(sys.executable).parent / "shellcheck", "--exclude=SC2016", script]  # the dollar in quotes is meant
    done = subprocess.run(shellcheck, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_machine_of_somebody_elses_sets_its_fuse_and_starts_the_training(recipe: Print, fresh: Machine) -> None:
    script = fresh.folder / "user-data.sh"
    script.write_text(recipe("ec2", "--store", STORE, "--hours", "5", "--setup", "echo mine > trace"))
    done = fresh.run("bash", script)
    assert done.returncode == 0, done.stderr
    assert fresh.called()[0] == "shutdown -h +300 hf-spot: 5 hours are over"
    assert fresh.called()[-1] == "systemctl start --no-block hf-spot.service"
    assert (fresh.folder / "it/training/trace").read_text() == "mine\n"


OUT = "aws autoscaling terminate-instance-in-auto-scaling-group --region us-west-2 --should-decrement-desired-capacity"


@pytest.mark.parametrize(
    ("status", "called"),
    [
        ("0", OUT),
        ("1", OUT),  # the next machine would fail as well
        ("75", "shutdown -h +10"),  # EC2 takes it, and the group starts another
        ("76", "shutdown -h now"),  # another has been started already: to shrink the group would end that one
    ],
)
def test_a_machine_shrinks_its_group_when_the_training_has_ended_and_only_then(
    recipe: Print, fresh: Machine, status: str, called: str
) -> None:
    script = fresh.folder / "user-data.sh"
    script.write_text(
        recipe("ec2", "--store", str(fresh.folder / "run"), "--auto-scaling-group", "--region", "us-west-2", "--setup", "true")
    )
    assert fresh.run("bash", script).returncode == 0
    fresh.calls.write_text("")
    (fresh.folder / "log").touch()
    fresh.run("bash", fresh.folder / "it/stop", EXIT_CODE="exited", EXIT_STATUS=status, HF_SPOT_STORE=str(fresh.folder / "run"))
    assert [line.partition(" --instance-id")[0] for line in fresh.called()] == [called]


def test_a_machine_that_may_not_shrink_its_group_or_can_not_set_itself_up_goes_away_all_the_same(
    recipe: Print, fresh: Machine
) -> None:
    (fresh.folder / "bin/aws").write_text("#!/bin/bash\nexit 1\n")
    script = fresh.folder / "user-data.sh"
    script.write_text(recipe("ec2", "--store", str(fresh.folder / "run"), "--auto-scaling-group", "--setup", "false"))
    assert fresh.run("bash", script).returncode != 0
    assert fresh.called()[-1] == "shutdown -h now"
