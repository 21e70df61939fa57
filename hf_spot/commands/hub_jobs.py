"""``hf-spot jobs``: train a job file on Hugging Face Jobs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from hf_spot.commands.common import add_command, open_run, print_json, print_table, takes_job, takes_json
from hf_spot.errors import CloudError, ConfigError, SpotError

if TYPE_CHECKING:
    from hf_spot.cloud.hub_service import HubService, Started


def add_to(commands: Any) -> None:
    """Add ``jobs``."""
    jobs = commands.add_parser("jobs", help="train a job file on Hugging Face Jobs", allow_abbrev=False)
    actions = jobs.add_subparsers(title="actions", metavar="ACTION", required=True)
    run = add_command(actions, "run", _run, "start the job, or those of its machines that are not running")
    run.add_argument(
        "--dry-run", action="store_true", help="check everything and show what would be asked, without starting anything"
    )
    ps = add_command(actions, "ps", _ps, "show the jobs of this run")
    logs = add_command(actions, "logs", _logs, "show the output of a job")
    logs.add_argument("--follow", action="store_true", help="show new lines until the job has ended")
    logs.add_argument("--tail", type=int, metavar="N", help="show the last N lines only")
    cancel = add_command(actions, "cancel", _cancel, "cancel the jobs of this run that have not ended")
    for command in (run, ps, logs, cancel):
        takes_job(command)
        takes_json(command)
    for command in (logs, cancel):
        command.add_argument(
            "--id", metavar="ID", help="of one job, as ps shows it (default: the newest for logs, all for cancel)"
        )


def _service(args: argparse.Namespace) -> HubService:
    from hf_spot.cloud.hub_job import load

    job = load(args.job)
    try:
        from hf_spot.cloud.hub_service import HubService
    except ImportError as error:
        raise ConfigError(
            f"this huggingface_hub does not know Hugging Face Jobs: {error}", hint="pip install --upgrade huggingface_hub"
        ) from error
    return HubService(job, os.environ)


def _run(args: argparse.Namespace) -> int:
    from hf_spot.cloud.hub_job import notes

    service = _service(args)
    job = service.job
    service.secrets()  # raises if one is missing
    run = open_run(job.store, allow_unfenced_store=True)  # the launch in the job checks that
    if run.state().ended == "finished":
        _tell(args, {"started": [], "finished": True}, f"{job.store} is finished: nothing to do")
        return 0
    hardware = service.hardware()
    active = [one for one in service.jobs() if one.is_active]
    missing = max(0, job.count - len(active))
    most_usd = service.check_spend(run, hardware, missing)
    if not args.quiet:
        for note in notes(job):
            print(f"hf-spot: {note}", file=sys.stderr)
    if args.dry_run:
        return _show(args, service, hardware.about, missing, most_usd, active)
    if not missing:
        told = {"started": [], "running": [one.to_dict() for one in active]}
        _tell(
            args, told, f"{_names(active)} {'are' if len(active) > 1 else 'is'} running already; hf-spot jobs logs {args.job}"
        )
        return 0
    service.put_wheel(run)
    started: list[Started] = []
    try:
        for _ in range(missing):
            started.append(service.start(hardware))
            if not args.json:
                print(f"{started[-1].id} started: {started[-1].url}", flush=True)
    except SpotError as error:
        if not started:
            raise
        kind = CloudError if isinstance(error, CloudError) else ConfigError
        raise kind(
            f"{len(started)} of {missing} jobs started ({_names(started)}): {error.args[0]}",
            hint=f"hf-spot jobs run {args.job} starts the others, hf-spot jobs cancel {args.job} ends those",
        ) from error
    if args.json:
        print_json({"started": [one.to_dict() for one in started], "most_usd": most_usd})
    else:
        print(f"${most_usd:.2f} at most, if every attempt runs until its timeout; hf-spot jobs logs {args.job} --follow")
    return 0


def _show(
    args: argparse.Namespace, service: HubService, about: str, missing: int, most_usd: float, active: list[Started]
) -> int:
    from hf_spot.cloud.hub_job import secret_names

    hardware = service.hardware()
    request = {**service.request(hardware), "secrets": secret_names(service.job, os.environ), "namespace": service.namespace}
    if args.json:
        print_json({"jobs": missing, "most_usd": most_usd, "running": [one.id for one in active], "request": request})
        return 0
    command = request.pop("command")[-1]
    print(f"{missing} jobs of {service.namespace} on {hardware.name} ({about}), ${most_usd:.2f} at most; nothing was started")
    for name, value in request.items():
        print(f"{name}: {value if isinstance(value, str) else json.dumps(value)}")
    print(f"command:\n{command}", end="")
    return 0


def _ps(args: argparse.Namespace) -> int:
    service = _service(args)
    found = service.jobs()
    if args.json:
        print_json([one.to_dict() for one in found])
        return 0
    if not found:
        print(f"no job of {service.job.store}; hf-spot jobs run {args.job}")
        return 0
    rows = [["job", "stage", "flavor", "attempts", "running", "message"]]
    for one in found:
        running = "-" if one.running_s is None else f"{one.running_s / 60:.0f} min"
        rows.append([one.id, one.stage, one.flavor or "-", str(one.attempts), running, one.message or ""])
    print_table(rows, right=("attempts", "running"))
    return 0


def _logs(args: argparse.Namespace) -> int:
    if args.json:
        raise ConfigError("logs shows the training's output, which is not JSON", hint=f"hf-spot jobs logs {args.job}")
    if args.tail is not None and args.tail < 1:
        raise ConfigError(f"--tail {args.tail} must be at least 1", hint="--tail 100")
    service = _service(args)
    found = _chosen(args, service)
    if not found:
        raise ConfigError(f"there is no job of {service.job.store}", hint=f"hf-spot jobs run {args.job}")
    for line in service.logs(found[0], follow=args.follow, tail=args.tail):
        print(line, end="" if line.endswith("\n") else "\n", flush=True)
    return 0


def _cancel(args: argparse.Namespace) -> int:
    service = _service(args)
    ids = _chosen(args, service, active=True)
    for job_id in ids:
        service.cancel(job_id)
    _tell(
        args,
        {"cancelled": ids},
        "\n".join(f"{job_id} cancelled" for job_id in ids) or f"no job of {service.job.store} is running",
    )
    return 0


def _chosen(args: argparse.Namespace, service: HubService, *, active: bool = False) -> list[str]:
    """Return the ids of this run's jobs, newest first, or the one that ``--id`` names."""
    known = service.jobs()
    if args.id is None:
        return [one.id for one in known if one.is_active or not active]
    if args.id not in [one.id for one in known]:
        raise ConfigError(f"--id {args.id} is not a job of {service.job.store}", hint=f"hf-spot jobs ps {args.job}")
    return [args.id]


def _names(jobs: list[Started]) -> str:
    return ", ".join(one.id for one in jobs)


def _tell(args: argparse.Namespace, told: dict[str, Any], text: str) -> None:
    if args.json:
        print_json(told)
    else:
        print(text)
