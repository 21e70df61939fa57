"""Hugging Face Jobs for the real client, beside the fake Hub: it runs the command of a job on this machine.

What it accepts, and what it answers, is made of the client's own types: the keys of a request are those that the client can
build, flavors are its `JobHardware`, stages its `JobStage`, and each answer is one that its `JobInfo` reads. What the service
does beyond that is what its documentation says: another attempt after every failure, `JOB_ID` in the environment, secrets that
are never shown.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from huggingface_hub import JobHardware, JobInfo, JobStage, Volume
from huggingface_hub._jobs_api import _create_job_spec

from tests.storage.fake_http import Answer, Asked
from tests.storage.fake_hub import TOKEN, FakeHub, refuse

OWNER = "me"
_ONE_OF_EACH = _create_job_spec(
    image="i",
    command=["c"],
    env={"A": "b"},
    secrets={"S": "t"},
    flavor="cpu-basic",
    timeout=1,
    name="n",
    labels={"l": "m"},
    volumes=[Volume(type="model", source="a/b", mount_path="/c")],
    expose=[1],
    ssh=True,
    network_group="g",
    network_aliases=["h"],
    resource_group_id="r",
    attempts=2,
)
KEYS = {*_ONE_OF_EACH, "spaceId"}


@dataclass
class FakeJob:
    """A job: what was asked, where it stands, and what its attempts printed."""

    id: str
    asked: dict[str, Any]
    stage: JobStage = JobStage.SCHEDULING
    message: str | None = None
    created: str = field(default_factory=lambda: _now())
    lines: list[tuple[str, str]] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    def told(self) -> dict[str, Any]:
        asked = self.asked
        made = {
            "id": self.id,
            "createdAt": self.created,
            "dockerImage": asked.get("dockerImage"),
            "spaceId": asked.get("spaceId"),
            "command": asked["command"],
            "arguments": asked["arguments"],
            "environment": asked["environment"],
            "secrets": [*asked.get("secrets", {})],  # the service shows their names
            "flavor": asked["flavor"],
            "labels": asked.get("labels"),
            "volumes": asked.get("volumes"),
            "network": asked.get("network"),
            "status": {"stage": self.stage.value, "message": self.message},
            "durations": {"schedulingSecs": 1, "runningSecs": 60, "totalSecs": 61},
            "owner": {"id": "5e9ecfc04957053f60648a3e", "name": OWNER, "type": "user"},
            "retry": asked.get("attempts", 1) - 1,
        }
        JobInfo(**made)  # the client can read it
        return made


class FakeHubWithJobs(FakeHub):
    """``env()`` leads the real client here.

    Args:
        runs: whether commands are run; otherwise a job stays where it is until a test says how it stands.
    """

    def __init__(self, *, runs: bool = False) -> None:
        super().__init__()
        self.jobs: dict[str, FakeJob] = {}
        self.runs = runs
        self.environ: dict[str, str] = {}  # of the containers, beside what a job asks for
        self._threads: list[threading.Thread] = []

    def __exit__(self, *error: object) -> None:
        for job in self.jobs.values():
            if job.process is not None and job.process.poll() is None:
                os.killpg(job.process.pid, signal.SIGKILL)
        for thread in self._threads:
            thread.join(60)
        super().__exit__(*error)

    def decide(self, asked: Asked) -> Answer:
        parts = asked.path.strip("/").split("/")
        if asked.path == "/api/whoami-v2":
            self._check_token(asked)
            return _json({"name": OWNER, "type": "user"})
        if parts[:2] != ["api", "jobs"]:
            return super().decide(asked)
        if parts[2:] == ["hardware"]:
            return _json(HARDWARE)
        self._check_token(asked)
        if parts[2] != OWNER:
            raise refuse(403, message=f"you may not run jobs as {parts[2]}")
        if len(parts) == 3:
            return self._create(json.loads(asked.body)) if asked.method == "POST" else self._list(asked)
        job = self.jobs.get(parts[3])
        if job is None:
            raise refuse(404, message="Job not found")
        if parts[4:] == ["cancel"] and asked.method == "POST":
            job.stage = JobStage.CANCELED
            if job.process is not None and job.process.poll() is None:
                job.process.terminate()
            return _json({})
        if parts[4:] == ["logs"]:
            return self._logs(job, asked)
        if not parts[4:]:
            return _json(job.told())
        raise refuse(404, message=f"no such API: {asked.method} {asked.path}")

    def _check_token(self, asked: Asked) -> None:
        if asked.headers.get("authorization") != f"Bearer {TOKEN}":
            raise refuse(401, message="Invalid credentials in Authorization header")

    def _create(self, wanted: dict[str, Any]) -> Answer:
        if unknown := [*wanted.keys() - KEYS]:
            raise refuse(400, message=f"unknown keys: {unknown}")
        if wanted["flavor"] not in {one.value for one in JobHardware}:
            raise refuse(400, message=f"unknown flavor {wanted['flavor']}")
        for key, value in wanted.get("labels", {}).items():
            if any(
                len(one) > 100 or not one.replace(".", "").replace("-", "").replace("_", "").isalnum() for one in (key, value)
            ):
                raise refuse(
                    400, message=f"a label has 100 letters, digits, dots, dashes and underscores at most: {key}={value}"
                )
        if len(wanted.get("network", {}).get("group", "")) > 46:
            raise refuse(400, message="the name of a network group is too long")
        with self._lock:
            job = FakeJob(f"{len(self.jobs):024x}", wanted)
            self.jobs[job.id] = job
        if self.runs:
            self._threads.append(threading.Thread(target=self._attempts, args=(job,), daemon=True))
            self._threads[-1].start()
        else:
            job.stage = JobStage.RUNNING
        return _json(job.told())

    def _list(self, asked: Asked) -> Answer:
        label = asked.query.get("label")  # hf_spot asks for one
        return _json([job.told() for job in self.jobs.values() if _has(job, label)])

    def _logs(self, job: FakeJob, asked: Asked) -> Answer:
        lines = [*job.lines]
        if tail := asked.query.get("tail"):
            lines = lines[-int(tail) :]
        events = "".join(f"data: {json.dumps({'timestamp': at, 'data': text})}\n\n" for at, text in lines)
        return Answer(200, events.encode(), {"Content-Type": "text/event-stream"})

    # -- the machines of the service ----------------------------------------------------------------------------------

    def _attempts(self, job: FakeJob) -> None:
        asked = job.asked
        for number in range(asked.get("attempts", 1)):
            job.lines.append((_now(), f"===== Job started at {_now()} ====="))
            environ = {**self.environ, **asked["environment"], **asked.get("secrets", {}), "JOB_ID": job.id}
            job.process = subprocess.Popen(
                asked["command"], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
            )
            job.stage = JobStage.RUNNING if job.stage is not JobStage.CANCELED else job.stage
            assert job.process.stdout is not None
            for line in job.process.stdout:
                job.lines.append((_now(), line.decode(errors="replace")))
            job.process.stdout.close()
            job.codes.append(job.process.wait())
            if job.codes[-1] == 0 or job.stage is JobStage.CANCELED or number + 1 == asked.get("attempts", 1):
                break
            time.sleep(0.05)
        if job.stage is not JobStage.CANCELED:
            job.stage = JobStage.COMPLETED if job.codes[-1] == 0 else JobStage.ERROR
            job.message = None if job.codes[-1] == 0 else f"Job failed with exit code: {job.codes[-1]}"


def _has(job: FakeJob, label: str | None) -> bool:
    return label is None or label in {f"{key}={value}" for key, value in job.asked.get("labels", {}).items()}


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _json(value: Any) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


HARDWARE = [
    {
        "name": one.value,
        "prettyName": one.value.replace("-", " "),
        "cpu": "2 vCPU",
        "ram": "16 GB",
        "ephemeralStorage": "50 GB",
        "accelerator": None,
        "unitCostMicroUSD": 16667,
        "unitCostUSD": 0.016667,
        "unitLabel": "minute",
    }
    for one in JobHardware
]
"""Every flavor of the client, each for a dollar per hour."""
