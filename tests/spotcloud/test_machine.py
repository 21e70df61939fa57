"""A machine of the local spot cloud has a disk, a network and processes of its own, starts by user data, and can be taken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.servers import SeaweedFS
from tests.spotcloud.api import IMAGE
from tests.spotcloud.cloud import BY_ITSELF, BY_USER, SpotCloud
from tests.spotcloud.machine import Machine, why_not
from tests.spotcloud.market import RECLAIMED
from tests.waiting import wait_for

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture
def cloud(tmp_path: Path, seaweedfs: SeaweedFS) -> Iterator[SpotCloud]:
    with SpotCloud(tmp_path, s3=seaweedfs, environment={"GREETING": "hello there"}) as made:
        yield made


def start(cloud: SpotCloud, script: str, **more: Any) -> Machine:
    asked: dict[str, Any] = {"ImageId": IMAGE, "InstanceType": "p4d.24xlarge", "MinCount": 1, "MaxCount": 1, "UserData": script}
    asked["InstanceInitiatedShutdownBehavior"] = "terminate"
    name = cloud.client().run_instances(**asked, **more)["Instances"][0]["InstanceId"]
    return wait_for(lambda: cloud.machines.get(name), "for the machine")  # type: ignore[no-any-return]


def said(machine: Machine, name: str) -> str:
    """What the machine wrote into a file of the folder that it shares with the tests."""
    path = machine.folder / name
    wait_for(path.exists, f"for {name}: {machine.text()}")
    return path.read_text()


def reason(cloud: SpotCloud) -> str:
    wait_for(lambda: not cloud.running(), "for the end")
    [stay] = cloud.bill.stays.values()
    instance = cloud.client().describe_instances(InstanceIds=[stay.instance_id])["Reservations"][0]["Instances"][0]
    assert instance["State"]["Name"] == "terminated"
    assert instance["StateReason"]["Code"] == stay.reason
    return stay.reason


UNIT = """#!/bin/bash
set -eu
cat > /etc/systemd/system/{name}.service <<'END'
{unit}
END
systemctl daemon-reload
systemctl enable --now {name}.service
"""

LOOK_AROUND = """#!/bin/bash
set -eu
echo "home: ${HOME:-none}, $GREETING, $(cat /sys/class/dmi/id/sys_vendor), process 1 is $(cat /proc/1/comm)"
date > /etc/only-here
python3 - <<'END'
import json, urllib.error, urllib.request
where = "http://169.254.169.254/latest/"
def ask(path, **more):
    return urllib.request.urlopen(urllib.request.Request(where + path, **more)).read().decode()
try:
    ask("meta-data/instance-id")
except urllib.error.HTTPError as error:
    print("without a token:", error.code)
token = ask("api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"})
headers = {"X-aws-ec2-metadata-token": token}
role = ask("meta-data/iam/security-credentials/", headers=headers)
seen = {name: ask("meta-data/" + name, headers=headers) for name in ("instance-id", "instance-life-cycle")}
seen["document"] = json.loads(ask("dynamic/instance-identity/document", headers=headers))
json.dump({**seen, "role": role}, open("/run/spotcloud/seen", "w"))
END
python3 -c 'import boto3; boto3.client("s3", region_name="us-east-1").put_object(Bucket="tests", Key="greeting", Body=b"hi")'
apt-get update && apt-get install -y -q python3-venv
python3 -m venv /opt/ours && . /opt/ours/bin/activate
pip install -q 'hf_spot>=0.1'
command -v hf-spot
pip install no-such-package-of-ours || echo "that is not to be had"
systemctl start nothing.service || echo "that is no unit"
echo done > /run/spotcloud/done
"""


def test_user_data_runs_on_a_disk_and_with_a_metadata_service_of_its_own(cloud: SpotCloud, seaweedfs: SeaweedFS) -> None:
    cloud.make_instance_profile("writes")
    spot = {"MarketType": "spot"}
    machine = start(cloud, LOOK_AROUND, IamInstanceProfile={"Name": "writes"}, InstanceMarketOptions=spot)
    wait_for(lambda: (machine.folder / "user-data.exit").exists(), f"for the user data: {machine.text()}")
    text = machine.text()
    assert (machine.folder / "user-data.exit").read_text() == "0", text
    assert "home: none, hello there, Amazon EC2, process 1 is python" in text
    assert "without a token: 401" in text
    assert "/opt/ours/bin/hf-spot" in text
    assert "No matching distribution found for no-such-package-of-ours" in text
    assert "that is not to be had" in text
    assert "Unit nothing.service not found." in text
    seen = json.loads(said(machine, "seen"))
    [stay] = cloud.bill.stays.values()
    assert (seen["instance-id"], seen["instance-life-cycle"], seen["role"]) == (stay.instance_id, "spot", "writes")
    assert seen["document"]["availabilityZone"] == stay.pool.zone
    assert seaweedfs.client().get_object(Bucket="tests", Key="greeting")["Body"].read() == b"hi"
    assert not Path("/etc/only-here").exists()
    assert not Path("/opt/ours").exists()


RESTARTS = """[Unit]
StartLimitIntervalSec=0
FailureAction=poweroff
[Service]
Environment=COUNT=/srv/count "WORDS=two words"
ExecStart=/bin/bash -c 'echo one >> $COUNT; (setsid sleep 1000 &); [ "$(wc -l < $COUNT)" = 3 ] && exit 75; kill -9 $$$$'
ExecStopPost=/bin/bash -c 'echo "$WORDS: $SERVICE_RESULT $EXIT_CODE $EXIT_STATUS" >> /run/spotcloud/stops'
ExecStopPost=/bin/bash -c 'pgrep sleep && echo left >> /run/spotcloud/stops'
Restart=always
RestartPreventExitStatus=75
RestartSec=10ms"""


def test_a_unit_is_restarted_as_it_says_and_may_end_the_machine(cloud: SpotCloud) -> None:
    machine = start(cloud, UNIT.format(name="trains", unit=RESTARTS))
    assert reason(cloud) == BY_ITSELF, machine.text()
    lines = (machine.folder / "stops").read_text().splitlines()
    assert lines == [*["two words: signal killed KILL"] * 2, "two words: exit-code exited 75"], machine.text()


def test_a_unit_that_this_machine_would_not_understand_is_refused(cloud: SpotCloud) -> None:
    machine = start(cloud, UNIT.format(name="odd", unit="[Service]\nExecStart=/bin/true\nWatchdogSec=3"))
    assert said(machine, "user-data.exit") == "1"
    assert "does not know WatchdogSec= in [Service]" in machine.text()


def test_a_machine_without_a_role_has_no_credentials(cloud: SpotCloud) -> None:
    script = "import boto3, sys; sys.exit(0 if boto3.Session().get_credentials() is None else 1)"
    machine = start(cloud, f"#!/bin/sh\npython3 -c '{script}'\n")
    assert said(machine, "user-data.exit") == "0", machine.text()


STUBBORN = """[Service]
ExecStart=/bin/bash -c 'trap "" TERM; touch /run/spotcloud/ready; while true; do setsid sleep 1000; done'
ExecStartPost=/usr/local/sbin/python3 /srv/listen"""
LISTEN = """#!/bin/bash
cat > /srv/listen <<'END'
import time, urllib.error, urllib.request
where = "http://169.254.169.254/latest/"
def ask(path, **more):
    return urllib.request.urlopen(urllib.request.Request(where + path, **more)).read()
token = ask("api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"})
while True:
    try:
        told = ask("meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token.decode()})
        open("/run/spotcloud/heard", "wb").write(told)
        break
    except urllib.error.HTTPError:
        time.sleep(0.05)
END
"""
OBEDIENT = """[Service]
ExecStart=/bin/bash -c 'trap "echo saved > /run/spotcloud/saved; exit 0" TERM; touch /run/spotcloud/ready; sleep 1000 & wait'"""


def test_a_notice_is_heard_and_at_its_end_every_process_is_gone(cloud: SpotCloud) -> None:
    unit = UNIT.format(name="deaf", unit=STUBBORN)
    machine = start(cloud, f"{LISTEN}{unit}", InstanceMarketOptions={"MarketType": "spot"})
    said(machine, "ready")
    processes = [machine.process, *machine.process.children(recursive=True)]
    assert len(processes) >= 4, processes
    [name] = cloud.running()
    pool = cloud.bill.stays[name].pool
    assert cloud.reclaim(pool, notice_s=120) == [name]
    wait_for(lambda: '"action": "terminate"' in said(machine, "heard"), "for the notice")
    assert cloud.running() == [name]
    cloud.give_notice(name, 0.05)  # it need not wait for the end of the two minutes
    assert reason(cloud) == RECLAIMED
    assert not [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert not cloud.market.has_capacity(pool)


def test_who_terminates_an_instance_lets_it_save(cloud: SpotCloud) -> None:
    machine = start(cloud, UNIT.format(name="polite", unit=OBEDIENT))
    said(machine, "ready")
    cloud.client().terminate_instances(InstanceIds=cloud.running())
    assert reason(cloud) == BY_USER
    assert (machine.folder / "saved").read_text() == "saved\n"


def test_machines_neither_share_disks_nor_processes(cloud: SpotCloud) -> None:
    script = "#!/bin/sh\necho $(ls /srv | grep -c mine) $(pgrep -c -f sleep.1234) > /run/spotcloud/seen\ntouch /srv/mine\n"
    first = start(cloud, f"{script}setsid sleep 1234 &\n")
    assert said(first, "user-data.exit") == "0"
    second = start(cloud, script)
    assert said(second, "seen") == "0 0\n"
    assert first.address != second.address
