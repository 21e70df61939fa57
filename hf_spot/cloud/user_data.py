"""The script with which a new machine starts itself: it installs, trains under systemd, and goes away when it is done.

Everything stands in one folder and one unit, so that who logs in can read what happens: ``systemctl cat hf-spot``.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from hf_spot.cloud.job import SHUTDOWN, Job
from hf_spot.errors import EXIT_FENCED, EXIT_PREEMPTED, EXIT_USAGE, ConfigError
from hf_spot.storage.s3_settings import KMS_KEY_VARIABLE, OWNER_VARIABLE

FOLDER = "/var/lib/hf-spot"
LOG = "/var/log/hf-spot.log"
UNIT = "/etc/systemd/system/hf-spot.service"
LONGEST_BYTES = 16384  # https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/user-data.html
LEAVE = "shutdown -h now"
_RECLAIM_MINUTES = 10  # EC2 takes an interrupted machine away within two
_SHIP_EVERY_S = 60

_SCRIPT = """\
#!/bin/bash
# Made by `{made_by}` for {name}: {store}
set -euo pipefail
exec > >(tee -a {log}) 2>&1
{fuse}
mkdir -p {folder}/training
cd {folder}/training
export HOME={folder} PYTHONUNBUFFERED=1 PATH={folder}/venv/bin:$PATH {variables}

# Nobody looks at a machine that can't start: its log goes to the store, and it goes away.
give_up() {{
    echo "hf-spot: the setup of this machine failed in line $1"
    python3 -m hf_spot.cloud.machine ship {log} || {fallback}
    {leave}
}}
trap 'give_up $LINENO' ERR

{install}
{prices}
{setup_file}
{run_file}
{start_file}
{stop_file}
{environment}
printf '%s\\n' "PATH=$PATH" "HOME=$HOME" PYTHONUNBUFFERED=1 >> {folder}/environment
{unit_file}
bash -euo pipefail {folder}/setup
systemctl daemon-reload
systemctl enable hf-spot.service
systemctl start --no-block hf-spot.service
"""

_START = """\
HF_SPOT_MACHINE=$(python3 -m hf_spot.cloud.machine describe {folder}/prices.json) || HF_SPOT_MACHINE={{}}
export HF_SPOT_MACHINE
python3 -m hf_spot.cloud.machine ship {log} --every {every_s} &
exec bash -euo pipefail {folder}/run
"""

# A shell that is waiting for the training must outlive the signal that tells the training to save.
_RUN = """\
trap : TERM
{run}
"""

_STOP = """\
python3 -m hf_spot.cloud.machine ship {log}
# After a crash of the launcher itself, systemd starts it again.
if [[ $EXIT_CODE != exited || $EXIT_STATUS == 137 ]]; then exit; fi
{ending}
"""

# Whoever shuts down on a notice pays for the first hour, and who waits for EC2 does not. If EC2 does not come after all,
# a machine that nobody uses must not stay.
_LEAVE = """\
case $EXIT_STATUS in
{preempted}) shutdown -h +{minutes} ;;
{fenced}) shutdown -h now ;; # a newer machine trains; this one is only in the way
*) {retire} ;;
esac"""

_UNIT = """\
[Unit]
Description=hf-spot {name}
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=1800
StartLimitBurst=5
{limit}
[Service]
WorkingDirectory={folder}/training
EnvironmentFile={folder}/environment
ExecStart=/bin/bash {folder}/start
ExecStopPost=/bin/bash {folder}/stop
StandardOutput=append:{log}
StandardError=append:{log}
Restart=on-abnormal
RestartForceExitStatus=137
RestartPreventExitStatus={final}
RestartSec=10
TimeoutStopSec=180
OOMPolicy=continue
[Install]
WantedBy=multi-user.target
"""


def render(
    job: Job,
    prices: Sequence[Mapping[str, Any]],
    minutes: int,
    environ: Mapping[str, str] = os.environ,
    *,
    made_by: str = "hf-spot provision",
    fuse: str = "the budget is spent",
    retire: str = LEAVE,
) -> str:
    """The user data of a machine.

    What it does, in this order: sets the fuse (a shutdown when the budget is spent, whoever watches), installs, runs the
    job's setup, and starts a systemd unit that trains. Exit code 75 of the training starts nothing again on a machine that
    is about to go; a launcher that was killed is started again, five times in half an hour.

    Args:
        job: what is trained.
        prices: what is known of each pool that the machine may be from: ``instance_type``, ``zone`` and more.
        minutes: after which the budget is spent at the dearest of these prices.
        environ: what is passed on of it: the key and the owner of the bucket, no credentials.
        made_by: the command that the user data says it was made by.
        fuse: why the machine goes away after these minutes.
        retire: the shell command with which a machine goes away for good, for which nothing is left to do.

    Raises:
        ConfigError: setup and run are longer than EC2 takes.
    """
    leaves = job.on_finish == SHUTDOWN
    variables = {"HF_SPOT_STORE": job.store, "AWS_REGION": job.region}
    variables |= {name: environ[name] for name in (KMS_KEY_VARIABLE, OWNER_VARIABLE) if environ.get(name)}
    ending = _LEAVE.format(preempted=EXIT_PREEMPTED, minutes=_RECLAIM_MINUTES, fenced=EXIT_FENCED, retire=retire)
    copy = f'aws s3 cp {LOG} {shlex.quote(job.store)}/logs/"$(hostname)".log || true'
    unit = _UNIT.format(
        name=job.name,
        folder=FOLDER,
        log=LOG,
        final=f"{EXIT_USAGE} {EXIT_PREEMPTED} {EXIT_FENCED}",
        limit="StartLimitAction=poweroff" if leaves else "",
    )
    text = _SCRIPT.format(
        made_by=made_by,
        name=job.name,
        store=job.store,
        log=LOG,
        folder=FOLDER,
        fuse=f"shutdown -h +{minutes} 'hf-spot: {fuse}'",
        variables=" ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items()),
        environment=_file("environment", "\n".join(f"{name}={value}" for name, value in variables.items())),
        fallback=copy if job.store.startswith("s3://") else "true",
        leave=retire if leaves else "true",
        install=_install(job.requirements),
        prices=_file("prices.json", json.dumps([*prices])),
        setup_file=_file("setup", job.setup),
        run_file=_file("run", _RUN.format(run=job.run)),
        start_file=_file("start", _START.format(folder=FOLDER, log=LOG, every_s=_SHIP_EVERY_S)),
        stop_file=_file("stop", _STOP.format(log=LOG, ending=ending if leaves else "echo 'hf-spot: stays, as asked'")),
        unit_file=_file(UNIT, unit),
    )
    if len(text.encode()) > LONGEST_BYTES:
        raise ConfigError(
            f"setup and run make {len(text.encode())} bytes of user data, and EC2 takes {LONGEST_BYTES}",
            hint="put the commands into a file of your repository, and let setup fetch and run it",
        )
    return text


def _install(requirements: Sequence[str]) -> str:
    if not requirements:
        return "# requirements: [] says that the image has hf_spot"
    make = f"python3 -m venv {FOLDER}/venv"
    return f"{make} || (apt-get update && apt-get install -y python3-venv && {make})\npip install {shlex.join(requirements)}"


def _file(name: str, text: str) -> str:
    end = "END"
    while end in text.splitlines():
        end += "_"
    path = name if name.startswith("/") else f"{FOLDER}/{name}"
    return f"cat > {path} <<'{end}'\n{text.rstrip()}\n{end}"
