"""The command line: argparse, and one short function per command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_spot import __version__
from hf_spot.arguments import SpotArguments
from hf_spot.errors import EXIT_USAGE, ConfigError, SpotError

if TYPE_CHECKING:
    from hf_spot.cloud.ec2 import Cloud
    from hf_spot.run.run import Run

_EXIT_CODES = """exit codes:
  0    done; of launch: the run is finished
  1    verify found damage; demo: the two models differ
  2    usage, or a store or an account that can't be used
  75   launch: preempted, start the same command again to go on; provision: no machine is to be had now
  76   launch: a newer launch owns the run
  130  interrupted twice
  any other code of launch is the script's own"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["launch"]:
            from hf_spot.launch.supervisor import launch  # its parser is accelerate's: it can't be a sub-parser of ours

            return launch(arguments[1:])
        args = parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], int] = args.command
        return command(args)
    except SpotError as error:
        print(f"hf-spot: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nothing more to say
        return 0


def parser() -> argparse.ArgumentParser:
    """The parser of everything but ``launch``."""
    top = argparse.ArgumentParser(
        prog="hf-spot",
        description="Fine-tune with Hugging Face on machines that can be taken away.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"hf-spot {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    commands.add_parser("launch", help="accelerate launch, made preemptible (hf-spot launch --help)", add_help=False)

    demo = _add(commands, "demo", _demo, "the whole story on this machine in about a minute")
    demo.add_argument("--store", help="run against this URL; default: a directory that is deleted afterwards")
    demo.add_argument("--plot", metavar="FILE", type=Path, help="where the loss curve goes (PNG)")
    demo.add_argument("--keep", metavar="DIR", type=Path, help="keep everything that the demo writes in this folder")
    _json(demo)

    checkpoints = commands.add_parser("checkpoints", help="what is in a run", allow_abbrev=False)
    actions = checkpoints.add_subparsers(title="actions", metavar="ACTION", required=True)
    ls = _add(actions, "ls", _ls, "lists the committed checkpoints")
    _run(ls)
    _json(ls)
    verify = _add(actions, "verify", _verify, "reads every file back and compares it with the journal")
    verify.add_argument("run", metavar="RUN|FOLDER", help="URL of a run, or a local checkpoint folder")
    verify.add_argument("--step", type=int, help="only this checkpoint")
    _json(verify)
    pull = _add(actions, "pull", _pull, "downloads a checkpoint, verified")
    _run(pull)
    pull.add_argument("into", type=Path, nargs="?", default=Path(), help="folder that gets checkpoint-STEP (default: here)")
    pull.add_argument("--step", type=int, help="default: the newest")
    _json(pull)
    push = _add(actions, "push", _push, "uploads and commits a local checkpoint folder")
    _run(push)
    push.add_argument("folder", type=Path)
    push.add_argument("--step", type=int, help="needed when the folder is not named checkpoint-STEP")
    _json(push)
    prune = _add(actions, "prune", _prune, "takes old checkpoints out of a run and deletes their files")
    _run(prune)
    prune.add_argument(
        "--save-total-limit", type=int, required=True, metavar="N", help="newest ones that stay, besides the best"
    )
    _json(prune)

    report = _add(commands, "report", _report, "launches, interruptions and lost steps of a run")
    _run(report)
    _json(report)

    watch = _add(commands, "watch", _watch, "prints preemption notices as they come")
    watch.add_argument("--notice", default="auto", help=_help("notice"))
    watch.add_argument("--once", action="store_true", help="ask every source once and end")
    _json(watch)

    provision = _add(commands, "provision", _provision, "gets a machine on EC2 that trains a job, by a ladder of fallbacks")
    _job(provision)
    provision.add_argument("--dry-run", action="store_true", help="check everything, show what would be tried, start nothing")
    provision.add_argument("--watch", action="store_true", help="replace machines until the run is finished")
    provision.add_argument(
        "--api",
        choices=("fleet", "spot-request", "spot-fleet"),
        default="fleet",
        help="how to ask for spot machines; AWS calls spot-request and spot-fleet legacy: only for accounts bound to them",
    )
    _json(provision)

    prices = _add(commands, "prices", _prices, "what machines cost on EC2, now and before: spot and on demand, by zone")
    prices.add_argument("types", metavar="TYPE", nargs="+", help="an instance type, such as p4d.24xlarge")
    prices.add_argument("--region", action="append", metavar="NAME", help="may be given again (default: all of the account)")
    prices.add_argument("--days", type=float, default=7.0, metavar="N", help="of history, up to 90 (default: 7)")
    _json(prices)

    quotas = _add(commands, "quotas", _quotas, "which quota blocks which rung of a job's ladder, and how to raise it")
    _job(quotas)
    _json(quotas)

    terminate = _add(commands, "terminate", _terminate, "ends all machines of a run; the training saves first")
    _run(terminate)
    _json(terminate)

    status = _add(commands, "status", _status, "a run's machines, what they cost, and how far the training is")
    _run(status)
    _json(status)

    doctor = commands.add_parser("doctor", help="what a run needs", allow_abbrev=False)
    checks = doctor.add_subparsers(title="checks", metavar="CHECK", required=True)
    iam = _add(checks, "iam", _doctor_iam, "prints the least that a role must be allowed, as an IAM policy (JSON)")
    iam.add_argument("--store", metavar="URL", required=True, help="s3://bucket/prefix of the run")
    return top


def _add(commands: Any, name: str, function: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
    added: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
    added.set_defaults(command=function)
    return added


def _run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help="URL of a run: s3://bucket/prefix, or a directory")


def _job(command: argparse.ArgumentParser) -> None:
    command.add_argument("job", metavar="JOB", type=Path, help="a job file (YAML)")


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON for scripts")


def _help(field: str) -> str:
    return next(str(f.metadata["help"]) for f in dataclasses.fields(SpotArguments) if f.name == field)


def _open(url: str) -> Run:
    from hf_spot.run.run import Run

    return Run(url)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


def _demo(args: argparse.Namespace) -> int:
    from hf_spot.demo.story import run_demo

    return run_demo(store=args.store, plot=args.plot, keep=args.keep, as_json=args.json)


def _ls(args: argparse.Namespace) -> int:
    refs = _open(args.run).state().checkpoints
    if args.json:
        _print_json([dataclasses.asdict(ref) for ref in refs])
        return 0
    if not refs:
        print(f"{args.run}: no checkpoints")
    for ref in refs:
        marks = " ".join(word for word, holds in (("best", ref.best), ("complete", ref.complete)) if holds)
        stage = "" if ref.stage == 1 else f" stage {ref.stage}"
        print(f"checkpoint-{ref.step:<8}{stage} {_megabytes(ref.size_bytes):>14}  launch {ref.epoch:<4} {marks}".rstrip())
    return 0


def _verify(args: argparse.Namespace) -> int:
    from hf_spot.run.inspect import is_checkpoint_folder, problems_in
    from hf_spot.run.progress import bar

    if is_checkpoint_folder(Path(args.run)):
        found = {args.run: problems_in(Path(args.run))}
    else:
        run = _open(args.run)
        run.find(args.step)
        chosen = [ref for ref in run.journal.state.checkpoints if args.step in (None, ref.step)]
        names = {ref.entry: ref.prefix for ref in run.journal.state.checkpoints}
        progress = bar("verify", sum(ref.size_bytes for ref in chosen))
        found = {names[entry]: problems for entry, problems in run.verify(args.step, progress=progress).items()}
    if args.json:
        _print_json(found)
    else:
        for name, problems in found.items():
            print(f"{name}: {'whole' if not problems else ''}")
            for problem in problems:
                print(f"  {problem}")
    return 1 if any(found.values()) else 0


def _pull(args: argparse.Namespace) -> int:
    from hf_spot.run.progress import bar

    run = _open(args.run)
    checkpoint = run.find(args.step)
    folder = run.fetch(checkpoint, args.into, progress=bar("pull", checkpoint.ref.size_bytes))
    if args.json:
        _print_json({"folder": str(folder)})
    else:
        print(folder)
    return 0


def _push(args: argparse.Namespace) -> int:
    from hf_spot.run.progress import bar

    size_bytes = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
    checkpoint = _open(args.run).push(args.folder, args.step, progress=bar("push", size_bytes))
    if args.json:
        _print_json(dataclasses.asdict(checkpoint.ref))
    else:
        print(f"{checkpoint.name} committed to {args.run}: {_megabytes(checkpoint.ref.size_bytes)}")
    return 0


def _prune(args: argparse.Namespace) -> int:
    run = _open(args.run)
    run.find()  # a typo in the URL must not make a new run
    run.join()
    gone = run.prune(args.save_total_limit)
    if args.json:
        _print_json([dataclasses.asdict(ref) for ref in gone])
    else:
        print("\n".join(f"checkpoint-{ref.step} pruned, {_megabytes(ref.size_bytes)}" for ref in gone) or "nothing to prune")
    return 0


def _report(args: argparse.Namespace) -> int:
    from hf_spot.economics.report import render, summarise

    report = summarise(_open(args.run).events())
    if args.json:
        _print_json({"run": args.run, **report.to_dict()})
    else:
        print(render(report, args.run))
    return 0


def _watch(args: argparse.Namespace) -> int:
    from hf_spot.notices.detect import sources
    from hf_spot.notices.watch import watch

    watch(
        sources(SpotArguments(notice=args.notice), environ=os.environ),
        out=sys.stdout,
        as_json=args.json,
        duration_s=0 if args.once else None,
    )
    return 0


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _cloud() -> Cloud:
    from hf_spot.cloud.ec2 import Cloud

    return Cloud()


def _provision(args: argparse.Namespace) -> int:
    from hf_spot.cloud.job import load
    from hf_spot.cloud.provision import FLEET, Provisioner, render_plan

    def say(text: str, event: dict[str, Any]) -> None:
        if args.json:
            print(json.dumps({"time": _now().isoformat(), **event}), flush=True)
        else:
            print(f"{_now():%H:%M:%S} {text}", flush=True)

    job = load(args.job)
    if args.api != FLEET:
        say(f"AWS calls the API behind --api {args.api} legacy, and recommends --api fleet", {"event": "note"})
    provisioner = Provisioner(job, _open(job.store), _cloud(), api=args.api, now=_now, sleep=time.sleep, say=say)
    if args.dry_run:
        provisioner.check()
        provisioner.book.refresh()
        for plan in provisioner.plans():
            say(render_plan(plan), {"event": "plan", **plan.to_dict()})
        left = provisioner.left_usd()
        say(f"${left:.2f} of ${job.max_spend:.2f} are left; nothing was started", {"event": "budget", "left_usd": left})
    elif args.watch:
        provisioner.watch()
    elif provisioner.provision() is None:
        say(f"{job.store} is finished: nothing to do", {"event": "finished"})
    return 0


def _prices(args: argparse.Namespace) -> int:
    from hf_spot.cloud.prices import LONGEST_DAYS, look_up, render

    if not 0 < args.days <= LONGEST_DAYS:
        raise ConfigError(f"--days {args.days:g}: EC2 remembers {LONGEST_DAYS} days", hint="--days 7")
    cloud, now = _cloud(), _now()
    since = now - timedelta(days=args.days)
    known = cloud.regions()
    cloud.check_regions(args.region or (), known)
    rows, notes = look_up(cloud, args.types, args.region or known, since, now)
    if args.json:
        _print_json({"rows": [row.to_dict() for row in rows], "notes": notes})
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
        _print_json([{**dataclasses.asdict(need), "blocked": need.blocked, "command": need.command} for need in found])
    else:
        print(render(found, job))
    return 0


def _terminate(args: argparse.Namespace) -> int:
    from hf_spot.cloud.book import Book
    from hf_spot.cloud.provision import terminate

    cloud = _cloud()
    gone = terminate(Book(_open(args.run), cloud, now=_now), cloud)
    if args.json:
        _print_json([machine.to_data() for machine in gone])
    else:
        lines = [f"{one.instance_id} in {one.zone} is ended: ${one.cost_usd or 0.0:.2f}" for one in gone]
        print("\n".join(lines) or f"{args.run}: no machine is running")
    return 0


def _status(args: argparse.Namespace) -> int:
    from hf_spot.cloud.book import Book
    from hf_spot.cloud.provision import render_status, status

    cloud = _cloud()
    known = status(Book(_open(args.run), cloud, now=_now), cloud)
    if args.json:
        _print_json(known)
    else:
        print(render_status(known))
    return 0


def _doctor_iam(args: argparse.Namespace) -> int:
    from hf_spot.storage.iam import policy

    _print_json(policy(args.store))
    return 0


if __name__ == "__main__":
    sys.exit(main() or 0)


__all__ = ["EXIT_USAGE", "main", "parser"]
