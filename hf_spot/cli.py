"""The command line: argparse, and one short function per command."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hf_spot import __version__
from hf_spot.arguments import SpotArguments
from hf_spot.completion import SHELLS
from hf_spot.errors import EXIT_USAGE, ConfigError, CorruptCheckpoint, SpotError

if TYPE_CHECKING:
    from hf_spot.cloud.ec2 import Cloud
    from hf_spot.economics.report import Report
    from hf_spot.run.run import Run

_EXIT_CODES = """exit codes:
  0    done; of launch: the run is finished
  1    verify found damage; doctor found what does not work; demo: the two models differ
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
            gc.disable()  # accelerate imports torch, and the collector would look for garbage in it
            from hf_spot.launch.supervisor import launch  # its parser is accelerate's: it can't be a sub-parser of ours

            gc.freeze()
            gc.enable()
            return launch(arguments[1:])
        args = parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], int] = args.command
        return command(args)
    except SpotError as error:
        # Not of launch: what stands behind its script is the script's.
        print(
            _as_json(error) if "--json" in arguments and arguments[0] != "launch" else f"hf-spot: error: {error}",
            file=sys.stderr,
        )
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nothing more to say
        return 0


def _as_json(error: SpotError) -> str:
    told = {"error": error.args[0], "kind": type(error).__name__, "hint": error.hint, "exit_code": error.exit_code}
    return json.dumps(told)


class _Parser(argparse.ArgumentParser):
    """Its errors are said as all others are, with what to type next instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        hint = f"{self.prog} --help"
        if wrong := re.search(r"invalid choice: '([^']*)'", message):
            known = [str(name) for action in self._actions for name in action.choices or ()]
            if near := difflib.get_close_matches(wrong[1], known, 1):
                hint = f"{self.prog} {near[0]}"
        raise ConfigError(message, hint=hint)


def parser() -> argparse.ArgumentParser:
    """The parser of everything but ``launch``."""
    top = _Parser(
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
    demo.add_argument("--store", metavar="URL", help="run against this URL; default: a directory that is deleted afterwards")
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
    pull.add_argument(
        "into", metavar="INTO", type=Path, nargs="?", default=Path(), help="folder that gets checkpoint-STEP (default: here)"
    )
    pull.add_argument("--step", type=int, help="default: the newest")
    _json(pull)
    push = _add(
        actions, "push", _push, "uploads and commits a local checkpoint folder; or publishes a checkpoint as a model on the Hub"
    )
    _run(push)
    push.add_argument("what", metavar="FOLDER|MODEL", help="a local folder, or hf://owner/name")
    push.add_argument(
        "--step", type=int, help="needed when the folder is not named checkpoint-STEP; of a model: default: the best or newest"
    )
    push.add_argument("--private", action="store_true", help="a model's new repository is for its owner alone")
    push.add_argument("--all", action="store_true", help="publish the optimizer and all else that a resume needs, too")
    _unfenced(push)
    _json(push)
    prune = _add(actions, "prune", _prune, "takes old checkpoints out of a run and deletes their files")
    _run(prune)
    _unfenced(prune)
    prune.add_argument(
        "--save-total-limit", type=int, required=True, metavar="N", help="newest ones that stay, besides the best"
    )
    _json(prune)

    report = _add(commands, "report", _report, "what a run's time went to, launch by launch, and what it cost")
    _run(report)
    report.add_argument("--plot", metavar="FILE", type=Path, help="draw the timeline and the loss (PNG, SVG or PDF)")
    report.add_argument("--html", metavar="FILE", type=Path, help="write all of it as one page")
    _json(report)

    simulate = _add(commands, "simulate", _simulate, "what a training should cost and how long it should take, interrupted")
    simulate.add_argument(
        "plan", metavar="PLAN", type=Path, nargs="?", help="YAML file: the training, and ways to get machines"
    )
    simulate.add_argument("--preset", metavar="NAME", help="a plan that comes with hf_spot: blog")
    simulate.add_argument("--replay", metavar="RUN", help="compare a run with what is simulated for its machines")
    simulate.add_argument(
        "--trace", metavar="FILE", type=Path, action="append", help="capacity of a zone, may be given again (default: a model)"
    )
    simulate.add_argument("--nodes", type=int, default=1, metavar="N", help="machines of a trace that the training needs (1)")
    simulate.add_argument("--seeds", type=int, default=1000, metavar="N", help="trainings simulated for each row (1000)")
    simulate.add_argument("--prices", metavar="FILE", type=Path, help="take prices from what hf-spot prices --json has printed")
    simulate.add_argument("--plot", metavar="FILE", type=Path, help="draw cost and time (PNG, SVG or PDF)")
    _json(simulate)

    watch = _add(commands, "watch", _watch, "prints preemption notices as they come")
    watch.add_argument("--notice", default="auto", help=_help("notice"))
    watch.add_argument("--once", action="store_true", help="ask every source once and end")
    _json(watch)

    _add_recipes(commands)

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

    sky = _add(commands, "sky", _sky, "the same job as a SkyPilot managed job: SkyPilot finds the machines")
    _job(sky)
    ways = sky.add_mutually_exclusive_group()
    ways.add_argument("--print", action="store_true", help="print the task as YAML (default)")
    ways.add_argument("--launch", action="store_true", help="start it")
    ways.add_argument("--status", action="store_true", help="SkyPilot's jobs of this name")
    ways.add_argument("--logs", action="store_true", help="follow the newest one's output")
    ways.add_argument("--cancel", action="store_true", help="end them; the training saves first")
    _json(sky)

    doctor = _add(commands, "doctor", _doctor, "checks this machine, a store and the AWS account, and names each repair")
    doctor.add_argument("--store", metavar="URL", help="of a run; what is written there is deleted again")
    doctor.add_argument("--job", metavar="FILE", type=Path, help="a job file: check the account for it, and its store")
    doctor.add_argument(
        "--checkpoint-gb", type=float, metavar="N", help="size of a checkpoint in 10^9 bytes (default: of the run's newest)"
    )
    doctor.add_argument("--grace-s", type=float, metavar="S", help=_help("grace_s"))
    _json(doctor)
    checks = doctor.add_subparsers(title="checks", metavar="CHECK")
    iam = _add(checks, "iam", _doctor_iam, "prints the least that a role must be allowed, as an IAM policy (JSON)")
    iam.add_argument("--store", metavar="URL", required=True, help="s3://bucket/prefix of the run")

    completion = _add(commands, "completion", _completion, "prints a script that makes a shell complete commands and options")
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))
    return top


def _add(commands: Any, name: str, function: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
    added: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
    added.set_defaults(command=function)
    return added


def _add_recipes(commands: Any) -> None:
    from hf_spot.recipes.render import STORE

    recipe = commands.add_parser(
        "recipe",
        help="prints a job file for Kubernetes, Slurm or SageMaker",
        description="Prints a job file. EC2 and SkyPilot need none: hf-spot provision, hf-spot sky.",
        allow_abbrev=False,
    )
    recipes = recipe.add_subparsers(title="recipes", metavar="RECIPE", required=True)
    kubernetes = _add(recipes, "kubernetes", _recipe, "a Job that is started again after a preemption (YAML)")
    slurm = _add(recipes, "slurm", _recipe, "a batch script that requeues itself after a preemption")
    sagemaker = _add(recipes, "sagemaker", _recipe, "a script that starts a managed spot training job")
    store = os.environ.get("HF_SPOT_STORE") or STORE
    for name, command in (("kubernetes", kubernetes), ("slurm", slurm), ("sagemaker", sagemaker)):
        command.set_defaults(recipe=name)
        command.add_argument(
            "--store", metavar="URL", default=store, help="of the run (default: $HF_SPOT_STORE, or an example)"
        )
        command.add_argument("--script", default="train.py", help="that trains, with its arguments (default: train.py)")
        command.add_argument("--name", default="my-run", help="of the job (default: my-run)")
        command.add_argument("--gpus", type=int, default=1, help="of the machine (default: 1)")
    for command in (kubernetes, slurm):
        command.add_argument(
            "--grace-s", type=int, default=120, metavar="S", help="seconds from the notice to the end (default: 120)"
        )
    for command in (kubernetes, sagemaker):
        command.add_argument(
            "--image", default="registry.example.com/train:latest", help="container image with hf_spot and the script"
        )
    slurm.add_argument("--time", default="24:00:00", help="time limit of one start, as Slurm writes it (default: 24:00:00)")
    sagemaker.add_argument("--role", metavar="ARN", default="arn:aws:iam::123456789012:role/hf-spot", help="of the job")
    sagemaker.add_argument("--instance-type", default="ml.g5.xlarge", help="default: ml.g5.xlarge")
    sagemaker.add_argument("--hours", type=int, default=24, help="that the training may take (default: 24)")


def _run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help="URL of a run: s3://bucket/prefix, gs://…, az://…, hf://…, or a directory")


def _unfenced(command: argparse.ArgumentParser) -> None:
    command.add_argument("--allow-unfenced-store", action="store_true", help=_help("allow_unfenced_store"))


def _job(command: argparse.ArgumentParser) -> None:
    command.add_argument("job", metavar="JOB", type=Path, help="a job file (YAML)")


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON for scripts")


def _help(field: str) -> str:
    return next(str(f.metadata["help"]) for f in dataclasses.fields(SpotArguments) if f.name == field)


def _open(url: str, *, allow_unfenced_store: bool = False) -> Run:
    from hf_spot.run.run import Run

    return Run(url, allow_unfenced_store=allow_unfenced_store)


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
    from hf_spot.run.progress import Bar

    if is_checkpoint_folder(Path(args.run)):
        found = {args.run: problems_in(Path(args.run))}
    else:
        run = _open(args.run)
        run.find(args.step)
        chosen = [ref for ref in run.journal.state.checkpoints if args.step in (None, ref.step)]
        names = {ref.entry: ref.prefix for ref in run.journal.state.checkpoints}
        with Bar("verify", sum(ref.size_bytes for ref in chosen)) as bar:
            found = {names[entry]: problems for entry, problems in run.verify(args.step, progress=bar).items()}
    if args.json:
        _print_json(found)
    else:
        for name, problems in found.items():
            print(f"{name}: {'whole' if not problems else ''}")
            for problem in problems:
                print(f"  {problem}")
    return 1 if any(found.values()) else 0


def _pull(args: argparse.Namespace) -> int:
    from hf_spot.run.progress import Bar

    run = _open(args.run)
    checkpoint = run.find(args.step)
    with Bar("pull", checkpoint.ref.size_bytes) as bar:
        folder = run.fetch(checkpoint, args.into, progress=bar)
    if args.json:
        _print_json({"folder": str(folder)})
    else:
        print(folder)
    return 0


def _push(args: argparse.Namespace) -> int:
    from hf_spot.run.progress import Bar

    if args.what.startswith("hf://"):
        return _publish(args)
    if args.private or args.all:
        raise ConfigError("--private and --all are for models", hint=f"hf-spot checkpoints push {args.run} hf://owner/name")
    folder = Path(args.what)
    run = _open(args.run, allow_unfenced_store=args.allow_unfenced_store)
    with Bar("push", sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())) as bar:
        checkpoint = run.push(folder, args.step, progress=bar)
    if args.json:
        _print_json(dataclasses.asdict(checkpoint.ref))
    else:
        print(f"{checkpoint.name} committed to {args.run}: {_megabytes(checkpoint.ref.size_bytes)}")
    return 0


def _publish(args: argparse.Namespace) -> int:
    from hf_spot.economics.report import summarise
    from hf_spot.economics.table import story
    from hf_spot.run.progress import Bar

    run = _open(args.run)
    _open(args.what)  # tells what is missing here, where something is
    from hf_spot.run.publish import publish

    done = publish(
        run,
        args.what,
        step=args.step,
        private=args.private,
        everything=args.all,
        story=story(summarise(run.events())),
        progress=lambda size_bytes: Bar("push", size_bytes),
    )
    if args.json:
        _print_json(dataclasses.asdict(done))
    else:
        print(f"step {done.step} published as {done.url}: {len(done.files)} files, {_megabytes(done.size_bytes)}")
    return 0


def _prune(args: argparse.Namespace) -> int:
    run = _open(args.run, allow_unfenced_store=args.allow_unfenced_store)
    run.find()  # a typo in the URL must not make a new run
    run.join()
    gone = run.prune(args.save_total_limit)
    if args.json:
        _print_json([dataclasses.asdict(ref) for ref in gone])
    else:
        print("\n".join(f"checkpoint-{ref.step} pruned, {_megabytes(ref.size_bytes)}" for ref in gone) or "nothing to prune")
    return 0


def _report(args: argparse.Namespace) -> int:
    from hf_spot.economics.report import summarise
    from hf_spot.economics.table import render_report

    run = _open(args.run)
    report = summarise(run.events())
    if args.plot or args.html:
        _draw(args, run, report)
    if args.json:
        _print_json({"run": args.run, **report.to_dict()})
    else:
        print(render_report(report, args.run))
    return 0


def _draw(args: argparse.Namespace, run: Run, report: Report) -> None:
    from hf_spot.economics.page import write_page
    from hf_spot.economics.plots import plot_timeline, timeline_svg
    from hf_spot.economics.timeline import draw_up, losses_in

    if not report.launches:
        raise ConfigError(f"{args.run}: nobody has launched this run yet, so there is nothing to draw", hint="hf-spot launch")
    newest, losses = run.latest(), {}
    if newest is not None:
        try:
            losses = losses_in(run.read(newest, "trainer_state.json"))
        except CorruptCheckpoint as error:
            print(f"hf-spot: the loss is not drawn: {error}", file=sys.stderr)
    timeline = draw_up(report, losses, newest.ref.stage if newest else 1)
    if args.plot:
        plot_timeline(args.plot, timeline, args.run)
    if args.html:
        write_page(args.html, report, args.run, timeline_svg(timeline, ""))


def _simulate(args: argparse.Namespace) -> int:
    from hf_spot.economics.plan import PRESETS, load, preset, with_prices
    from hf_spot.economics.replay import replay
    from hf_spot.economics.simulate import simulate
    from hf_spot.economics.table import render_simulation
    from hf_spot.economics.traces import MODEL_SOURCE, load_all
    from hf_spot.yaml_file import read

    if [args.plan, args.preset, args.replay].count(None) != 2:
        raise ConfigError("one of PLAN, --preset and --replay is wanted", hint="hf-spot simulate --preset blog")
    if args.replay:
        found = replay(_open(args.replay).events())
        if args.json:
            _print_json(dataclasses.asdict(found))
        else:
            print(found)
        return 0
    if args.preset and args.preset not in PRESETS:
        raise ConfigError(f"--preset {args.preset}: there are {', '.join(PRESETS)}", hint="hf-spot simulate --preset blog")
    if args.seeds < 1 or args.nodes < 1:
        raise ConfigError("--seeds and --nodes must be at least 1", hint="--seeds 1000 --nodes 1")
    plan = preset(args.preset) if args.preset else load(args.plan)
    if args.prices:
        plan = with_prices(plan, read(args.prices), str(args.prices))
    traces = load_all(args.trace, args.nodes) if args.trace else None
    results = simulate(plan, traces, jobs=args.seeds)
    if args.plot:
        from hf_spot.economics.plots import plot_simulation

        plot_simulation(args.plot, results, args.preset or str(args.plan))
    if args.json:
        _print_json([result.to_dict() for result in results])
    else:
        capacity = ", ".join(str(path) for path in args.trace) if args.trace else MODEL_SOURCE
        print(render_simulation(plan, results, f"{capacity}; {args.seeds} trainings a row"))
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
    from hf_spot.cloud.status import terminate

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
    from hf_spot.cloud.status import render_status, status

    cloud = _cloud()
    known = status(Book(_open(args.run), cloud, now=_now), cloud)
    if args.json:
        _print_json(known)
    else:
        print(render_status(known))
    return 0


def _sky(args: argparse.Namespace) -> int:
    from hf_spot.cloud import sky
    from hf_spot.cloud.job import load

    if args.logs and args.json:
        raise ConfigError("--logs shows what the training prints, which is no JSON", hint=f"hf-spot sky {args.job} --logs")
    job = load(args.job)
    if args.logs:
        return sky.logs(job)
    if args.launch:
        ids = sky.launch(job)
        for note in sky.notes(job):
            print(f"hf-spot: {note}", file=sys.stderr)
        if args.json:
            _print_json({"job_ids": ids})
        else:
            print(f"SkyPilot job {', '.join(map(str, ids))}; hf-spot sky {args.job} --status")
    elif args.status:
        found = sky.status(job)
        if args.json:
            _print_json(found)
        else:
            lines = (
                f"{one['job_id']:<5} {one['status']:<12} {one['recoveries']} recoveries  {one['infra'] or '-'}" for one in found
            )
            print("\n".join(lines) or f"SkyPilot has no job {job.name}")
    elif args.cancel:
        sky.cancel(job)
        print(json.dumps({"cancelled": job.name}) if args.json else f"{job.name} is cancelled")
    elif args.json:
        _print_json(sky.task(job, os.environ))
    else:
        print(sky.render(job, os.environ), end="")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from hf_spot.cloud.doctor.examine import examine
    from hf_spot.cloud.doctor.finding import FAIL
    from hf_spot.cloud.job import load

    job = load(args.job) if args.job else None
    findings = []
    for found in examine(os.environ, store=args.store, job=job, checkpoint_gb=args.checkpoint_gb, grace_s=args.grace_s):
        findings.append(found)
        if not args.json:
            print(found, flush=True)
    if args.json:
        _print_json([dataclasses.asdict(found) for found in findings])
    return 1 if any(found.level == FAIL for found in findings) else 0


def _recipe(args: argparse.Namespace) -> int:
    from hf_spot.recipes import render

    values = {name: value for name, value in vars(args).items() if name not in ("command", "recipe")}
    print(getattr(render, args.recipe)(**values), end="")
    return 0


def _completion(args: argparse.Namespace) -> int:
    from hf_spot.completion import script

    print(script(parser(), args.shell))
    return 0


def _doctor_iam(args: argparse.Namespace) -> int:
    from hf_spot.storage.iam import policy

    _print_json(policy(args.store))
    return 0


if __name__ == "__main__":
    sys.exit(main() or 0)


__all__ = ["EXIT_USAGE", "main", "parser"]
