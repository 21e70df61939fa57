"""Commands about machines: those on EC2, those of SkyPilot, and this one."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_spot.aws_errors import nearest_region
from hf_spot.commands.common import add_command, open_run, print_json, setting_help, takes_job, takes_json, takes_run
from hf_spot.errors import CloudError, ConfigError
from hf_spot.terminal import Style, paint

_STYLES = {"ok": Style.OK, "warn": Style.WARN, "fail": Style.FAIL}

if TYPE_CHECKING:
    from hf_spot.cloud.ec2 import Cloud


def add_to(commands: Any) -> None:
    """Add ``provision``, ``prices``, ``quotas``, ``terminate``, ``status``, ``sky`` and ``doctor``."""
    provision = add_command(
        commands, "provision", _provision, "start machines on EC2 that train a job, by a ladder of fallbacks"
    )
    takes_job(provision, optional=True)
    provision.add_argument("--example", action="store_true", help="print a job file with every key, and what each means (YAML)")
    provision.add_argument(
        "--dry-run", action="store_true", help="check everything and show what would be tried, without starting anything"
    )
    provision.add_argument("--watch", action="store_true", help="replace machines until the run is finished")
    provision.add_argument(
        "--api",
        choices=("fleet", "spot-request", "spot-fleet"),
        default="fleet",
        help="EC2 API for spot requests; AWS calls spot-request and spot-fleet legacy: for accounts that must use them",
    )
    takes_json(provision)

    prices = add_command(commands, "prices", _prices, "show current and past prices on EC2, spot and on-demand, by zone")
    prices.add_argument("types", metavar="TYPE", nargs="+", help="an instance type, such as p4d.24xlarge")
    prices.add_argument(
        "--region", action="append", metavar="NAME", help="region to look at; repeatable (default: all regions of the account)"
    )
    prices.add_argument("--days", type=float, default=7.0, metavar="N", help="days of history, up to 90 (default: 7)")
    takes_json(prices)

    quotas = add_command(
        commands, "quotas", _quotas, "show which quotas block which rungs of a job's ladder, and how to raise them"
    )
    takes_job(quotas)
    takes_json(quotas)

    terminate = add_command(commands, "terminate", _terminate, "terminate all machines of a run; the training saves first")
    takes_run(terminate)
    takes_json(terminate)

    status = add_command(commands, "status", _status, "show a run's machines, their cost and the training's progress")
    takes_run(status)
    takes_json(status)

    sky = add_command(commands, "sky", _sky, "run the same job as a SkyPilot managed job: SkyPilot finds the machines")
    takes_job(sky)
    actions = sky.add_mutually_exclusive_group()
    actions.add_argument("--print", action="store_true", help="print the task as YAML (default)")
    actions.add_argument("--launch", action="store_true", help="start the job")
    actions.add_argument("--status", action="store_true", help="show SkyPilot's jobs of this name")
    actions.add_argument("--logs", action="store_true", help="follow the output of the newest job")
    actions.add_argument("--cancel", action="store_true", help="cancel the jobs; the training saves first")
    takes_json(sky)

    doctor = add_command(
        commands, "doctor", _doctor, "check this machine, a store and the AWS account, and say how to fix each problem"
    )
    doctor.add_argument("--store", metavar="URL", help="URL of a run to test; test objects are deleted again")
    doctor.add_argument("--job", metavar="FILE", type=Path, help="a job file: check the account and the store for it")
    doctor.add_argument(
        "--checkpoint-gb",
        type=float,
        metavar="N",
        help="size of a checkpoint in 10^9 bytes (default: that of the run's newest)",
    )
    doctor.add_argument("--grace-s", type=float, metavar="S", help=setting_help("grace_s"))
    takes_json(doctor)
    checks = doctor.add_subparsers(title="checks", metavar="CHECK")
    iam = add_command(checks, "iam", _doctor_iam, "print the minimal IAM policy for a role (JSON)")
    whose = iam.add_mutually_exclusive_group(required=True)
    whose.add_argument("--store", metavar="URL", help="of the machines that train the run at this URL: s3://bucket/prefix")
    whose.add_argument("--job", metavar="FILE", type=Path, help="of whoever provisions machines for this job file")


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _cloud() -> Cloud:
    from hf_spot.cloud.ec2 import Cloud

    return Cloud()


def _provision(args: argparse.Namespace) -> int:
    if args.example:
        from hf_spot.cloud.example import example

        print(json.dumps({"yaml": example()}) if args.json else example(), end="\n" if args.json else "")
        return 0
    if args.job is None:
        raise ConfigError("the following arguments are required: JOB", hint="hf-spot provision --example > job.yaml")
    from hf_spot.cloud.job import load
    from hf_spot.cloud.plans import render_plan
    from hf_spot.cloud.provision import Provisioner
    from hf_spot.cloud.walk import FLEET

    def say(text: str, event: dict[str, Any]) -> None:
        if args.json:
            print(json.dumps({"time": _now().isoformat(), **event}), flush=True)
        else:
            print(f"{_now():%H:%M:%S} {text}", flush=True)

    job = load(args.job)
    if args.api != FLEET:
        say(f"AWS calls the API of --api {args.api} legacy and recommends --api fleet", {"event": "note"})
    provisioner = Provisioner(job, open_run(job.store), _cloud(), api=args.api, now=_now, sleep=time.sleep, say=say)
    if args.dry_run:
        provisioner.check()
        provisioner.records.refresh()
        for plan in provisioner.planner.plans():
            say(render_plan(plan, job.size), {"event": "plan", **plan.to_dict(job.size)})
        left = provisioner.planner.left_usd()
        say(f"${left:.2f} of ${job.max_spend:.2f} left; nothing was started", {"event": "budget", "left_usd": left})
    elif args.watch:
        provisioner.watch()
    elif job.size.is_fleet:
        if not provisioner.provision_several():
            say(f"{job.store} is finished: nothing to do", {"event": "finished"})
    elif provisioner.provision() is None:
        say(f"{job.store} is finished: nothing to do", {"event": "finished"})
    return 0


def _prices(args: argparse.Namespace) -> int:
    from hf_spot.cloud.prices import LONGEST_DAYS, look_up, render

    if not 0 < args.days <= LONGEST_DAYS:
        raise ConfigError(f"--days {args.days:g}: EC2 keeps at most {LONGEST_DAYS} days of prices", hint="--days 7")
    for region in args.region or ():  # before a misspelt one is asked which regions there are
        if (meant := nearest_region(region)) is not None:
            raise ConfigError(f"--region {region}: not a region of EC2", hint=f"did you mean {meant}?")
    cloud, now = _cloud(), _now()
    since = now - timedelta(days=args.days)
    known = cloud.regions(args.region[0] if args.region else None)
    cloud.check_regions(args.region or (), known)
    rows, notes = look_up(cloud, args.types, args.region or known, since, now)
    if args.json:
        print_json({"rows": [row.to_dict() for row in rows], "notes": notes})
    else:
        print(render(rows, notes, since, now))
    return 0


def _quotas(args: argparse.Namespace) -> int:
    from hf_spot.cloud.job import load
    from hf_spot.cloud.quotas import needs, render

    job, cloud = load(args.job), _cloud()
    known = cloud.regions(job.region)
    cloud.check_regions(job.named_regions(), known)
    found = needs(cloud, job, known)
    if args.json:
        print_json([{**dataclasses.asdict(need), "blocked": need.blocked, "command": need.command} for need in found])
    else:
        print(render(found, job))
    return 0


def _terminate(args: argparse.Namespace) -> int:
    from hf_spot.cloud.machine_records import MachineRecords
    from hf_spot.cloud.status import had_machines, terminate

    cloud = _cloud()
    records = MachineRecords(open_run(args.run), cloud, now=_now)
    try:
        gone = terminate(records, cloud, lambda text: args.quiet or print(f"hf-spot: {text}", file=sys.stderr))
    except CloudError as error:
        if had_machines(records):
            raise
        gone = []
        _note_unasked(args, error)
    if args.json:
        print_json([machine.to_data() for machine in gone])
    else:
        lines = [f"{one.instance_id} in {one.zone} terminated: ${one.cost_usd or 0.0:.2f}" for one in gone]
        print("\n".join(lines) or f"{args.run}: no machine is running")
    return 0


def _status(args: argparse.Namespace) -> int:
    from hf_spot.cloud.machine_records import MachineRecords
    from hf_spot.cloud.status import had_machines, render_status, status
    from hf_spot.run.below import what_is_there

    cloud = _cloud()
    records = MachineRecords(open_run(args.run), cloud, now=_now)
    try:
        known = status(records, cloud)
    except CloudError as error:
        if had_machines(records):
            raise
        known = status(records, None)
        _note_unasked(args, error)
    is_known = records.run.state().number or had_machines(records) or known["not_in_the_journal"]
    if not is_known:
        words, hint = what_is_there(args.run)
        raise ConfigError(f"{args.run}: {words}", hint=hint)
    if args.json:
        print_json(known)
    else:
        print(render_status(known))
    return 0


def _note_unasked(args: argparse.Namespace, error: CloudError) -> None:
    if not args.quiet:
        print(
            f"hf-spot: hf-spot provision has started no machine for this run, and EC2 was not asked: {error.args[0]}",
            file=sys.stderr,
        )


def _sky(args: argparse.Namespace) -> int:
    from hf_spot.cloud import sky
    from hf_spot.cloud.job import load

    if args.logs and args.json:
        raise ConfigError("--logs shows the training's output, which is not JSON", hint=f"hf-spot sky {args.job} --logs")
    job = load(args.job)
    if args.logs:
        return sky.logs(job)
    if args.launch:
        ids = sky.launch(job)
        for note in sky.notes(job):
            print(f"hf-spot: {note}", file=sys.stderr)
        if args.json:
            print_json({"job_ids": ids})
        else:
            print(f"SkyPilot job {', '.join(map(str, ids))}; hf-spot sky {args.job} --status")
    elif args.status:
        found = sky.status(job)
        if args.json:
            print_json(found)
        else:
            lines = (
                f"{one['job_id']:<5} {one['status']:<12} {one['recoveries']} recoveries  {one['infra'] or '-'}" for one in found
            )
            print("\n".join(lines) or f"SkyPilot has no job {job.name}")
    elif args.cancel:
        sky.cancel(job)
        print(json.dumps({"cancelled": job.name}) if args.json else f"{job.name} cancelled")
    elif args.json:
        print_json(sky.task(job, os.environ))
    else:
        print(sky.render(job, os.environ), end="")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from hf_spot.cloud.job import load
    from hf_spot.doctor.examine import examine
    from hf_spot.doctor.finding import FAIL

    job = load(args.job) if args.job else None
    findings = []
    for found in examine(os.environ, store=args.store, job=job, checkpoint_gb=args.checkpoint_gb, grace_s=args.grace_s):
        findings.append(found)
        if not args.json:
            print(str(found).replace(found.level, paint(found.level, _STYLES[found.level], sys.stdout), 1), flush=True)
    if args.json:
        print_json([dataclasses.asdict(found) for found in findings])
    return 1 if any(found.level == FAIL for found in findings) else 0


def _doctor_iam(args: argparse.Namespace) -> int:
    if args.job is not None:
        from hf_spot.cloud import permissions
        from hf_spot.cloud.job import load

        print_json(permissions.policy(load(args.job)))
        return 0
    from hf_spot.storage.iam import policy

    print_json(policy(args.store))
    return 0
