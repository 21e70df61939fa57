"""``hf-spot jobs``: the job file on Hugging Face Jobs, through the real client and a service that runs what it is asked to."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi

from hf_spot.cli import main
from hf_spot.cloud import hub_job, hub_machine
from hf_spot.cloud.hub_job import parse
from hf_spot.cloud.wheel import Wheel, build
from hf_spot.errors import ConfigError
from hf_spot.run.run import Run
from hf_spot.storage.open import open_store
from tests.storage.fake_http import Answer
from tests.storage.fake_hub import TOKEN
from tests.waiting import wait_for

if "network_group" not in inspect.signature(HfApi.run_job).parameters:
    pytest.skip("this huggingface_hub is older than what hf-spot jobs needs, which it says", allow_module_level=True)

from huggingface_hub import JobHardware, JobStage

from tests.cloud.fake_hub_jobs import FakeHubWithJobs, FakeJob

ROOT = Path(__file__).resolve().parents[2]
PLAIN = ROOT / "tests" / "training" / "scripts" / "plain.py"
FILE = """\
name: llama
store: {store}
run: {run}
requirements: []
hf_jobs:
  flavor: a10g-small
  timeout: 24h
  attempts: 3
"""
LAUNCH = "hf-spot launch train.py"

Write = Callable[..., Path]
Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHubWithJobs]:
    with FakeHubWithJobs() as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        for name in ("HF_SPOT_JOURNAL_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_SPOT_WHEEL"):
            monkeypatch.delenv(name, raising=False)
        for name in ("HF_HUB_OFFLINE", "AWS_ENDPOINT_URL_S3", "HF_SPOT_S3_EXPECTED_BUCKET_OWNER", "HF_SPOT_S3_SSE_KMS_KEY_ID"):
            monkeypatch.delenv(name, raising=False)
        server.environ = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(server.folder)}
        server.environ |= {"OMP_NUM_THREADS": "1", "HF_XET_CACHE": str(server.folder / "xet-cache")}
        yield server


@pytest.fixture
def store(service: FakeHubWithJobs) -> str:
    name = f"me/{uuid.uuid4().hex}"
    service.make(f"models/{name}")
    return f"hf://{name}/run"


@pytest.fixture
def write(tmp_path: Path, store: str) -> Write:
    def write_job(run: str = LAUNCH, text: str = FILE, **section: Any) -> Path:
        made = yaml.safe_load(text.format(store=store, run=json.dumps(run)))
        made["hf_jobs"] |= section
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(made))
        return path

    return write_job


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    def run_command(*argv: str | Path) -> tuple[int, str, str]:
        code = main(["jobs", *map(str, argv)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run_command


def only(service: FakeHubWithJobs) -> FakeJob:
    (job,) = service.jobs.values()
    return job


def first(service: FakeHubWithJobs) -> FakeJob:
    return next(iter(service.jobs.values()))


# -- the story --------------------------------------------------------------------------------------------------------


@pytest.mark.proof
def test_a_preempted_job_is_started_again_and_ends_with_the_finished_run(
    service: FakeHubWithJobs, store: str, write: Write, said: Said, tmp_path: Path
) -> None:
    service.runs = True
    out_folder = tmp_path / "out"
    options = f"--output_dir {out_folder} --weights {tmp_path / 'weights'} --save_steps 4 --hold_at 6 --step_s 0.2"
    path = write(f"hf-spot launch {shlex.quote(str(PLAIN))} {options}", attempts=4)
    service.environ["TMPDIR"] = str(tmp_path)
    code, out, err = said("run", path)
    assert code == 0 and "started: " in out, err
    job = only(service)
    has_ended = (JobStage.COMPLETED, JobStage.ERROR)
    wait_for(lambda: bool(Run(store).state().checkpoints) or job.stage in has_ended, "for the first commit")
    assert job.process is not None and job.stage not in has_ended, printed(job)
    os.kill(job.process.pid, signal.SIGTERM)  # as a container's first process gets it
    wait_for(lambda: [*tmp_path.glob("tmp.*/notice")] or job.stage in has_ended, "for the notice")
    (out_folder / "go-on").touch()
    wait_for(lambda: job.stage in has_ended, "for the job to end")
    assert job.stage is JobStage.COMPLETED and job.codes == [75, 0], printed(job)
    state = Run(store).state()
    assert (state.ended, state.launch) == ("finished", 2)
    machine = next(entry.data["machine"] for entry in Run(store).events() if entry.kind == "claim")
    assert (machine["instance_type"], machine["instance_id"], machine["cloud"]) == ("a10g-small", job.id, "huggingface")
    assert machine["price_usd_per_hour"] == pytest.approx(1, rel=0.01)
    code, out, _ = said("run", path)
    assert (code, out) == (0, f"{store} is finished: nothing to do\n") and len(service.jobs) == 1


def printed(job: FakeJob) -> str:
    return "".join(line for _, line in job.lines)


# -- attempts ---------------------------------------------------------------------------------------------------------


def waited(job: FakeJob) -> FakeJob:
    wait_for(lambda: job.stage not in (JobStage.SCHEDULING, JobStage.RUNNING), f"for {job.id}: {printed(job)}")
    return job


@pytest.mark.parametrize(
    ("code", "codes"),
    [
        (0, [0]),
        (75, [75, 75]),  # preempted: as often as the file says
        (137, [137, 137]),  # killed, as when the machine has no memory left
        (2, [2, 2]),  # the second attempt reads that the first was final, and trains nothing
    ],
)
def test_only_what_another_attempt_can_mend_trains_again(
    service: FakeHubWithJobs, write: Write, said: Said, tmp_path: Path, code: int, codes: list[int]
) -> None:
    service.runs = True
    trained = tmp_path / "trained"
    ended, _, err = said("run", write(f"echo x >> {trained}  # hf-spot launch\nexit {code}", attempts=len(codes)))
    assert ended == 0, err
    job = waited(only(service))
    assert job.codes == codes, printed(job)
    repeats = code in (75, 137)
    assert len(trained.read_text().split()) == (len(codes) if repeats else 1)
    assert job.stage is (JobStage.COMPLETED if code == 0 else JobStage.ERROR)
    assert ("an earlier attempt of job" in printed(job)) is (not repeats and code != 0)


def test_a_new_job_of_the_run_is_not_held_back_by_how_another_one_ended(
    service: FakeHubWithJobs, write: Write, said: Said, tmp_path: Path
) -> None:
    service.runs = True
    path = write(f"echo x >> {tmp_path / 'trained'}  # hf-spot launch\nexit 2", attempts=1)
    for _ in range(2):
        assert said("run", path)[0] == 0
        waited([*service.jobs.values()][-1])
    assert (tmp_path / "trained").read_text().split() == ["x", "x"]


UNTIL_TOLD = """\
for i in {1..300}; do [ -e "$HF_SPOT_NOTICE_FILE" ] || sleep 0.1; done
cp "$HF_SPOT_NOTICE_FILE" told
exit 75
"""


def run_here(folder: Path, script: str, *argv: str, clock: Callable[[], float]) -> int:
    (folder / "run").write_text(script)
    environ = {**os.environ, "HF_SPOT_STORE": str(folder / "store"), "JOB_ID": "a"}
    return hub_machine.main([str(folder / "run"), *argv], environ, clock)


@pytest.mark.parametrize(
    ("code", "is_final"), [(0, False), (1, True), (2, True), (75, False), (76, True), (79, True), (143, False)]
)
def test_an_ending_that_is_final_belongs_to_the_run_and_goes_away_with_it(tmp_path: Path, code: int, is_final: bool) -> None:
    from hf_spot.run.copies import belongs

    assert run_here(tmp_path, f"exit {code}", "--timeout-s", "3600", clock=lambda: 0.0) == code
    keys = [info.key for info in open_store(str(tmp_path / "store")).list()]
    assert [belongs(key) for key in keys] == [True] * is_final
    assert run_here(tmp_path, "exit 0", "--timeout-s", "3600", clock=lambda: 0.0) == (code if is_final else 0)


def test_the_end_of_the_timeout_is_a_notice_with_the_time_that_is_left(tmp_path: Path) -> None:
    now = iter([0.0, 3000.0])  # when it begins, and whenever it looks
    script = UNTIL_TOLD
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert run_here(tmp_path, script, "--timeout-s", "3600", clock=lambda: next(now, 3000.0)) == 75
    assert json.loads((tmp_path / "told").read_text()) == {"deadline_s": 540.0, "source": "hf-jobs"}  # a minute is kept back


def test_before_that_nothing_is_told(tmp_path: Path) -> None:
    script = 'sleep 1; if [ -e "$HF_SPOT_NOTICE_FILE" ]; then exit 75; fi'
    assert run_here(tmp_path, script, "--timeout-s", "3600", clock=lambda: 0.0) == 0


def test_a_sigterm_is_a_notice_and_the_training_has_its_grace(tmp_path: Path) -> None:
    script = "kill -TERM $PPID; " + UNTIL_TOLD
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert run_here(tmp_path, script, "--timeout-s", "3600", clock=lambda: 0.0) == 75
    assert json.loads((tmp_path / "told").read_text())["deadline_s"] == 30


def test_a_training_that_a_signal_has_ended_may_be_tried_again(tmp_path: Path) -> None:
    for _ in range(2):
        assert run_here(tmp_path, "kill -KILL $$", "--timeout-s", "3600", clock=lambda: 0.0) == 137


# -- what is asked ----------------------------------------------------------------------------------------------------


def test_the_request_is_what_the_file_says(service: FakeHubWithJobs, store: str, write: Write, said: Said) -> None:
    section = {
        "volumes": ["hf://datasets/owner/data@v1/part:/data:ro"],
        "env": {"WANDB_PROJECT": "mine"},
        "image": "repo/image:1",
    }
    path = write(**section, attempts=5)
    code, out, err = said("run", path, "--json")
    assert code == 0, err
    asked = only(service).asked
    assert asked["dockerImage"] == "repo/image:1" and asked["flavor"] == "a10g-small"
    assert (asked["attempts"], asked["timeoutSeconds"]) == (5, 86400)
    assert asked["environment"]["WANDB_PROJECT"] == "mine" and asked["environment"]["HF_SPOT_STORE"] == store
    mount = {
        "type": "dataset",
        "source": "owner/data",
        "mountPath": "/data",
        "readOnly": True,
        "path": "part",
        "revision": "v1",
    }
    assert asked["volumes"] == [mount]
    assert asked["secrets"] == {"HF_TOKEN": TOKEN} and asked["labels"]["name"] == "llama" and "network" not in asked
    assert json.loads(out)["started"][0]["id"] == only(service).id
    shellcheck = Path(sys.executable).parent / "shellcheck"
    checked = subprocess.run([shellcheck, "--shell=bash", "-"], input=asked["command"][2], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_machines_that_come_and_go_are_so_many_jobs_in_one_network(service: FakeHubWithJobs, write: Write, said: Said) -> None:
    path = write(text=FILE + "machines: '2:3'\n")
    assert said("run", path)[0] == 0
    assert {job.asked["environment"]["HF_SPOT_NUM_MACHINES"] for job in service.jobs.values()} == {"2:3"}
    groups = {job.asked["network"]["group"] for job in service.jobs.values()}
    assert len(service.jobs) == 3 and len(groups) == 1 and re.fullmatch(r"[a-z0-9-]{1,46}", groups.pop())
    [*service.jobs.values()][1].stage = JobStage.ERROR
    assert said("run", path)[0] == 0  # starts the one that is missing
    assert len(service.jobs) == 4
    code, out, _ = said("run", path)
    assert code == 0 and "running already" in out and len(service.jobs) == 4


def test_no_secret_is_in_the_command_in_what_is_printed_or_in_an_error(
    service: FakeHubWithJobs, write: Write, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "wandb-hunter2")
    monkeypatch.setenv("HF_SPOT_JOURNAL_KEY", "journal-hunter2-" * 3)
    path = write(secrets=["WANDB_API_KEY"])
    code, out, err = said("run", path, "--dry-run")
    assert code == 0 and not service.jobs
    shown = out + err
    for as_json in ((), ("--json",)):
        for action in (("run",), ("ps",), ("cancel",)):
            _, out, err = said(*action, path, *as_json)
            shown += out + err
    asked = first(service).asked
    assert asked["secrets"] == {
        "HF_TOKEN": TOKEN,
        "HF_SPOT_JOURNAL_KEY": "journal-hunter2-" * 3,
        "WANDB_API_KEY": "wandb-hunter2",
    }
    shown += json.dumps([asked["command"], asked["environment"], asked["labels"]])
    refusal = json.dumps({"error": f"bad request: {asked['secrets']}"}).encode()
    service.failures.append(("POST /api/jobs", Answer(400, refusal, {"Content-Type": "application/json"})))
    code, out, err = said("run", path)
    assert code == 2 and "$WANDB_API_KEY" in err
    shown += out + err
    assert not [value for value in asked["secrets"].values() if value in shown]


def test_a_run_in_s3_needs_the_keys_of_its_bucket(
    service: FakeHubWithJobs, tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch, s3_url: str
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(FILE.format(store=s3_url, run=LAUNCH))
    keys = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    assert said("run", path)[0] == 0
    assert only(service).asked["secrets"] == keys
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    (tmp_path / "credentials").write_text(
        f"[default]\naws_access_key_id=x\naws_secret_access_key={keys['AWS_SECRET_ACCESS_KEY']}\n"
    )
    first(service).stage = JobStage.ERROR
    code, _, err = said("run", path)
    assert code == 2 and "AWS_SECRET_ACCESS_KEY is not set here" in err and "export AWS_SECRET_ACCESS_KEY=…" in err


def test_hf_spot_itself_comes_from_the_run_by_its_digest(
    service: FakeHubWithJobs, store: str, write: Write, said: Said, tmp_path: Path
) -> None:
    path = write(text=FILE.replace("requirements: []", "requirements: ['hf_spot[plot]', 'peft==0.20']"))
    assert said("run", path)[0] == 0
    asked, (name, data) = only(service).asked, build()
    (mount,) = asked["volumes"]
    key = f"wheels/{Path(mount['path']).name}/{name}"
    assert open_store(store).get(key) == data
    assert (
        mount["source"] == store.removeprefix("hf://").removesuffix("/run") and mount["type"] == "model" and mount["readOnly"]
    )
    assert mount["path"] == f"run/{Path(key).parent}"
    # What the container does with it, where installing is only told.
    there = tmp_path / "mounted"
    there.mkdir()
    (there / name).write_bytes(data)
    for program, body in {"pip": 'echo "$@" >> "$TOLD"', "python3": "true"}.items():
        script = tmp_path / program
        script.write_text(f"#!/bin/bash\n{body}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TOLD": str(tmp_path / "told"), "TMPDIR": str(tmp_path)}
    text = asked["command"][2].replace(mount["mountPath"], str(there))
    done = subprocess.run(["bash", "-c", text], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "told").read_text() == f"install ./{name}[plot] peft==0.20\n"
    (there / name).write_bytes(data + b"x")
    assert subprocess.run(["bash", "-c", text], env=environ, capture_output=True).returncode != 0


# -- ps, logs, cancel -------------------------------------------------------------------------------------------------


def test_jobs_of_this_run_are_shown_read_and_cancelled_and_no_others(
    service: FakeHubWithJobs, store: str, write: Write, said: Said, tmp_path: Path
) -> None:
    path = write()
    assert said("ps", path)[1] == f"no job of {store}; hf-spot jobs run {path}\n"
    assert said("logs", path)[0] == 2
    assert said("run", path)[0] == 0
    job = only(service)
    other = tmp_path / "other.yaml"
    other.write_text(path.read_text().replace(store, f"{store}-2"))
    assert said("run", other)[0] == 0
    job.lines = [(job.created, "one\n"), (job.created, "two\n")]
    assert said("ps", path)[1].splitlines()[1].split()[:4] == [job.id, "RUNNING", "a10g-small", "3"]
    assert [one["id"] for one in json.loads(said("ps", path, "--json")[1])] == [job.id]
    assert said("logs", path)[1] == "one\ntwo\n"
    assert said("logs", path, "--tail", "1")[1] == "two\n"
    job.stage = JobStage.COMPLETED
    assert said("logs", path, "--follow")[1] == "one\ntwo\n"
    job.stage = JobStage.RUNNING
    for wrong in ("nothing", [*service.jobs][1]):
        assert said("cancel", path, "--id", wrong)[0] == 2
    assert said("cancel", path)[1] == f"{job.id} cancelled\n"
    assert [one.stage for one in service.jobs.values()] == [JobStage.CANCELED, JobStage.RUNNING]
    assert said("cancel", path)[1] == f"no job of {store} is running\n"


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_an_answer_that_is_lost_does_not_start_a_job_twice(service: FakeHubWithJobs, write: Write, said: Said) -> None:
    service.lose_answers.append("POST /api/jobs/me")
    code, out, err = said("run", write())
    assert code == 0 and only(service).id in out, err


def test_a_job_that_was_not_started_is_said(service: FakeHubWithJobs, write: Write, said: Said) -> None:
    service.failures.append(("POST /api/jobs/me", Answer(402, b'{"error": "no credit"}', {"Content-Type": "application/json"})))
    code, out, err = said("run", write())
    assert (code, out) == (2, "") and "no credit" in err and "settings/billing" in err


def test_of_several_jobs_those_that_have_started_are_named(service: FakeHubWithJobs, write: Write, said: Said) -> None:
    path = write(text=FILE + "machines: 2\n")
    service.failures.append(("POST /api/jobs/me", Answer(429, b"{}")))
    assert said("run", path)[0] == 2  # the first one
    started = FakeHubWithJobs._create
    with pytest.MonkeyPatch.context() as patch:

        def only_one(self: FakeHubWithJobs, wanted: dict[str, Any]) -> Answer:
            return started(self, wanted) if not self.jobs else Answer(429, b"{}")

        patch.setattr(FakeHubWithJobs, "_create", only_one)
        code, _, err = said("run", path)
    assert code == 2 and f"1 of 2 jobs started ({only(service).id})" in err and "hf-spot jobs cancel" in err


def test_an_unknown_flavor_lists_those_that_exist(service: FakeHubWithJobs, write: Write, said: Said) -> None:
    code, _, err = said("run", write(flavor="a10g-smal"))
    assert code == 2 and "flavor: 'a10g-smal' does not exist" in err and "Try: flavor: a10g-small" in err
    assert all(one.value in err for one in JobHardware) and not service.jobs


def test_more_than_the_budget_can_not_be_started(service: FakeHubWithJobs, write: Write, said: Said) -> None:
    path = write(text=FILE + "  namespace: me\nmax_spend: 71\n")  # three attempts of a day, for a dollar per hour
    code, _, err = said("run", path)
    assert code == 2 and "cost $72.00 at most" in err and "$71.00 of $71.00 are left" in err and not service.jobs
    assert said("run", write(text=FILE + "max_spend: 73\n"))[0] == 0


def test_without_a_login_the_command_is_named(
    service: FakeHubWithJobs, write: Write, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent")
    code, _, err = said("run", write())
    assert code == 2 and "not logged in" in err and "hf auth login" in err
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    code, _, err = said("ps", write())
    assert code == 2 and "(401)" in err and "hf auth login" in err and "hf_of_somebody_else" not in err


def test_a_namespace_that_is_not_ones_own_and_a_service_that_is_away_are_said(
    service: FakeHubWithJobs, write: Write, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = said("ps", write(namespace="others"))
    assert code == 2 and "you may not run jobs as others" in err and "settings/tokens" in err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, _, err = said("ps", write())
    assert code == 2 and "can this machine reach http://127.0.0.1:9?" in err


def test_a_client_that_is_too_old_is_said(
    service: FakeHubWithJobs, write: Write, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_job(self: HfApi, *, image: str, command: list[str], secrets: dict[str, str]) -> None:
        """Has the arguments of its first version."""

    monkeypatch.setattr(HfApi, "run_job", run_job)
    code, _, err = said("run", write())
    assert code == 2 and "does not know attempts, network_group" in err and "pip install --upgrade huggingface_hub" in err
    monkeypatch.setitem(sys.modules, "hf_spot.cloud.hub_service", None)
    code, _, err = said("run", write())
    assert code == 2 and "pip install --upgrade huggingface_hub" in err


def test_the_example_of_a_job_file_names_the_section() -> None:
    from hf_spot.cloud.example import example

    (line,) = [line for line in example().splitlines() if line.startswith("# hf_jobs:")]
    assert parse(GOOD.partition("hf_jobs:")[0] + line.removeprefix("# ")).section.flavor == "a10g-small"


GOOD = FILE.format(store="hf://me/x/run", run=LAUNCH)


@pytest.mark.parametrize(
    ("old", "new", "said", "hint"),
    [
        ("  flavor: a10g-small\n", "", "job.yaml:5: hf_jobs: flavor is missing", "flavor: a10g-small"),
        ("  timeout: 24h\n", "", "timeout is missing: the service ends a job", "timeout: 24h"),
        ("timeout: 24h", "timeout: 5m", "hf_jobs.timeout: '5m'", "90m"),
        ("timeout: 24h", "timeout: 24", "hf_jobs.timeout: 24", "24h"),
        ("attempts: 3", "attempts: 0", "job.yaml:8: hf_jobs.attempts: 0", "attempts: 3"),
        ("attempts: 3", "attemps: 3", "hf_jobs.attemps: unknown key", "did you mean attempts?"),
        ("attempts: 3", "secrets: HF_TOKEN", "hf_jobs.secrets: 'HF_TOKEN' is not a list", "secrets: ["),
        ("attempts: 3", "secrets: [WANDB_API_KEY=hunter2]", "secrets[0]: is not the name", "secrets: [WANDB_API_KEY]"),
        ("attempts: 3", "env: {WANDB_API_KEY: hunter2}", "hf_jobs.env.WANDB_API_KEY: would be shown", "export WANDB_API_KEY=…"),
        ("attempts: 3", "env: {N: 3}", "hf_jobs.env.N: must be text", '"3"'),
        ("attempts: 3", "volumes: [./data:/data]", "hf_jobs.volumes[0]: './data:/data'", "hf://datasets/owner/name:/data"),
        ("hf_jobs:", "hf_job:", "hf_job: unknown key", "did you mean hf_jobs?"),
        ("hf://me/x/run", "/data/run", "store: '/data/run'", "hf://owner/name/my-run"),
        ("hf://me/x/run", "gs://bucket/run", "store: 'gs://bucket/run'", "s3://bucket"),
        ("hf://me/x/run", "hf://buckets/me/x/run", "can't keep two launches", "--allow-unfenced-store"),
        (LAUNCH, "python train.py", "run: does not start", "hf-spot launch train.py"),
        (LAUNCH, "hf-spot launch --store s3://a/b train.py", "names the store again", "remove --store"),
        (LAUNCH, "hf-spot launch --num_machines 2 train.py", "run: --num_machines", "machines: 2:8"),
        ("name: llama", "name: llama\nmachines: 8:2", "job.yaml:2: machines: '8:2'", "machines: 2:8"),
        ("name: llama", "name: two words", "job.yaml:1: name: 'two words'", "letters"),
        ("name: llama", "name: llama\nmax_spend: free", "max_spend: 'free'", "150"),
    ],
)
def test_what_can_not_be_used_is_refused_with_line_key_and_hint(old: str, new: str, said: str, hint: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as refusal:
        parse(GOOD.replace(old, new))
    assert said in str(refusal.value) and hint in refusal.value.hint
    assert "hunter2" not in f"{refusal.value} {refusal.value.hint}"


def test_a_file_without_the_section_names_what_to_add() -> None:
    with pytest.raises(ConfigError, match="hf_jobs is missing") as refusal:
        parse(GOOD.partition("hf_jobs:")[0])
    assert refusal.value.hint == "hf_jobs: {flavor: a10g-small, timeout: 24h}"


def test_one_file_serves_ec2_and_hugging_face_jobs_and_what_is_not_used_is_said() -> None:
    from hf_spot.cloud.job import parse as parse_for_ec2

    both = (
        GOOD.replace("hf://me/x/run", "s3://bucket/run")
        + "region: us-east-1\nmax_spend: 150\ninstance_profile: role\ndisk_gb: 300\n"
    )
    assert parse_for_ec2(both).disk_gb == 300
    job = parse(both)
    assert (job.unused, job.region, job.max_spend) == (("instance_profile", "disk_gb"), "us-east-1", 150)
    assert any("nothing for instance_profile, disk_gb" in note for note in hub_job.notes(job))


def test_a_wheel_that_is_named_is_taken_from_there(store: str) -> None:
    job = parse(GOOD.replace("requirements: []", "requirements: [hf_spot]"))
    wheel = Wheel("hf_spot-1-py3-none-any.whl", "0" * 64, "https://example.com/hf_spot-1-py3-none-any.whl")
    assert "https://example.com/hf_spot-1-py3-none-any.whl" in hub_job.command(job, wheel)[2]
    assert "/hf-spot-wheels" not in hub_job.command(job, wheel)[2]


def test_the_commands_of_the_page_do_what_they_say(
    service: FakeHubWithJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    page = (ROOT / ".github" / "docs" / "hub-jobs.md").read_text()
    files = {found[1]: found[0] for found in re.findall(r"```yaml\n(# ([\w-]+\.yaml)\n.*?)```", page, re.DOTALL)}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    service.make("models/me/my-run")
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^hf-spot jobs (.*?)(?: +# .*)?$", page, re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["run", "run", "ps", "logs", "cancel"]
    for line in lines:
        if line.startswith("logs"):
            only(service).stage = JobStage.COMPLETED
        code, _, err = said(*line.split())
        assert code == 0, err
    assert said("run", "hub-machines.yaml")[0] == 0
    assert len(service.jobs) == 5
