"""The script that `hf-spot provision` gives to a machine, run by machines."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest

from hf_spot.cloud.job import Job
from hf_spot.cloud.user_data import render
from tests.servers import SeaweedFS
from tests.spotcloud import guest
from tests.spotcloud.api import IMAGE
from tests.spotcloud.cloud import BY_ITSELF, SpotCloud
from tests.spotcloud.machine import why_not
from tests.waiting import wait_for

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

UNIT = "hf-spot.service"


def test_a_machine_ships_its_log_and_goes_unless_ec2_is_about_to_take_it(tmp_path: Path, seaweedfs: SeaweedFS) -> None:
    prefix = f"user-data-{uuid.uuid4().hex}"
    with SpotCloud(tmp_path, s3=seaweedfs) as cloud:
        cloud.make_instance_profile("trains")

        def start(setup: str, run: str) -> str:
            store = f"s3://tests/{prefix}"
            job = Job("tiny", store, run, "us-east-1", max_spend=10.0, setup=setup, instance_profile="trains")
            asked = {"ImageId": IMAGE, "InstanceType": "p4d.24xlarge", "MinCount": 1, "MaxCount": 1}
            script = render(job, [], 60, environ={})
            more = {"InstanceInitiatedShutdownBehavior": "terminate", "IamInstanceProfile": {"Name": "trains"}}
            return str(cloud.client().run_instances(**asked, **more, UserData=script)["Instances"][0]["InstanceId"])

        def log(name: str) -> str:
            read = seaweedfs.client().get_object(Bucket="tests", Key=f"{prefix}/logs/{name}.log")["Body"].read()
            return str(read.decode())

        def text() -> str:
            return "\n".join(machine.text() for machine in cloud.machines.values())

        broken = start("echo the setup begins\nfalse", "hf-spot launch train.py")
        failed = start("", "echo in place of hf-spot launch; exit 3")
        preempted = start("", 'echo "$HF_SPOT_MACHINE, in place of hf-spot launch"; exit 75')
        wait_for(lambda: cloud.running() == [preempted], f"for two ends: {text()}")
        assert {cloud.bill.stays[name].reason for name in (broken, failed)} == {BY_ITSELF}
        assert "the setup begins" in log(broken)
        assert "the setup of this machine failed" in log(broken)
        assert "in place of hf-spot launch" in log(failed)

        machine = cloud.machines[preempted]
        state = f"{guest.STATES}/{UNIT}.json"
        wait_for(lambda: '"ActiveState": "failed"' in machine.read(state), f"for the end of the unit: {machine.text()}")
        assert json.loads(machine.read(state))["NRestarts"] == 0
        assert preempted in log(preempted)  # it was told what it is
        # A second shutdown takes the place of the one at the end of the budget.
        assert machine.text().count("[spotcloud] shutdown in") == 2, machine.text()
        assert "[spotcloud] shutdown in 600 s" in machine.text()
