"""Commands about runs: checkpoints, reports and simulations."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from datetime import timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_spot.commands.common import (
    BEST,
    add_command,
    find_checkpoint,
    megabytes,
    open_run,
    print_json,
    print_table,
    progress_bar,
    setting_help,
    takes_json,
    takes_run,
    takes_step,
    takes_unfenced,
)
from hf_spot.commands.whole_runs import FOLLOW_INTERVAL_S, follow_run
from hf_spot.errors import ConfigError
from hf_spot.policy.words import counted
from hf_spot.storage.threads import awaited
from hf_spot.terminal import Style, paint

if TYPE_CHECKING:
    from hf_spot.economics.report import Report
    from hf_spot.run.journal import Entry
    from hf_spot.run.run import Run


def add_to(commands: Any) -> None:
    """Add ``checkpoints``, ``report`` and ``simulate``."""
    checkpoints = commands.add_parser(
        "checkpoints", help="list, verify, download, upload and prune the checkpoints of a run", allow_abbrev=False
    )
    actions = checkpoints.add_subparsers(title="actions", metavar="ACTION", required=True)
    ls = add_command(actions, "ls", _ls, "list the committed checkpoints")
    takes_run(ls)
    takes_json(ls)
    verify = add_command(actions, "verify", _verify, "read every file back and compare it with the journal")
    verify.add_argument("run", metavar="RUN|FOLDER", help="URL of a run, or a local checkpoint folder")
    takes_step(verify, "verify only this checkpoint")
    takes_json(verify)
    pull = add_command(actions, "pull", _pull, "download a checkpoint and verify it")
    takes_run(pull)
    pull.add_argument(
        "into", metavar="INTO", type=Path, nargs="?", default=Path(), help="parent folder of checkpoint-STEP (default: here)"
    )
    takes_step(pull, "step of the checkpoint (default: the newest)")
    takes_json(pull)
    push = add_command(
        actions, "push", _push, "upload and commit a local checkpoint folder, or publish a checkpoint as a model on the Hub"
    )
    takes_run(push)
    push.add_argument("what", metavar="FOLDER|MODEL", help="a local folder, or hf://owner/name")
    push.add_argument(
        "--step",
        type=int,
        help="step of a folder not named checkpoint-STEP; for a model, the checkpoint to publish (default: the best or newest)",
    )
    push.add_argument("--private", action="store_true", help="make a new model repository private")
    push.add_argument("--all", action="store_true", help="also publish the optimizer and everything else that a resume needs")
    takes_unfenced(push)
    takes_json(push)
    prune = add_command(actions, "prune", _prune, "remove old checkpoints from a run and delete their files")
    takes_run(prune)
    takes_unfenced(prune)
    prune.add_argument(
        "--save-total-limit", type=int, required=True, metavar="N", help="newest checkpoints to keep, besides the best"
    )
    prune.add_argument("--keep-every", type=int, metavar="N", help=setting_help("keep_every"))
    prune.add_argument("--dry-run", action="store_true", help="list what would be removed, and remove nothing")
    takes_json(prune)

    report = add_command(commands, "report", _report, "show where the time of a run went, launch by launch, and what it cost")
    takes_run(report)
    report.add_argument("--plot", metavar="FILE", type=Path, help="draw the timeline and the loss (PNG, SVG or PDF)")
    report.add_argument("--follow", action="store_true", help="show the run while it trains, as hf-spot runs follow does")
    report.add_argument("--html", metavar="FILE", type=Path, help="write the report as one page")
    takes_json(report)

    simulate = add_command(commands, "simulate", _simulate, "estimate the cost and duration of a training with interruptions")
    simulate.add_argument(
        "plan", metavar="PLAN", type=Path, nargs="?", help="YAML file: the training and the ladders of machines to compare"
    )
    simulate.add_argument("--preset", metavar="NAME", help="a plan that is part of hf_spot: blog")
    simulate.add_argument("--replay", metavar="RUN", help="compare a run with a simulation of its machines")
    simulate.add_argument(
        "--trace",
        metavar="FILE",
        type=Path,
        action="extend",
        nargs="+",
        help="capacity traces, one of each zone; repeatable (default: a model)",
    )
    simulate.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="machines of a trace that the training needs (default: 1)"
    )
    simulate.add_argument(
        "--seeds", type=int, default=1000, metavar="N", help="trainings simulated for each row (default: 1000)"
    )
    simulate.add_argument("--prices", metavar="FILE", type=Path, help="take prices from the output of hf-spot prices --json")
    simulate.add_argument("--plot", metavar="FILE", type=Path, help="draw cost and time (PNG, SVG or PDF)")
    takes_json(simulate)


def _ls(args: argparse.Namespace) -> int:
    from hf_spot.run.below import what_is_there

    run = open_run(args.run)
    checkpoints = [*run.weights(), *run.checkpoints()]
    if args.json:
        told = [{**dataclasses.asdict(one.ref), "time": one.time.isoformat(), "reason": one.reason} for one in checkpoints]
        print_json(told)
        return 0
    if not checkpoints:
        if run.journal.state.number:
            print(f"{args.run} has no checkpoints yet")
            return 0
        words, hint = what_is_there(args.run)
        print(f"{args.run}: {words}\n  Try: {hint}")
        return 0
    several = any(one.ref.training != 1 for one in checkpoints)
    rows = [["checkpoint", *(["training"] if several else []), "committed (UTC)", "reason", "launch", "size", ""]]
    for one in checkpoints:
        ref = one.ref
        marks = " ".join(word for word, holds in (("best", ref.best), ("complete", ref.complete)) if holds)
        when = f"{one.time.astimezone(timezone.utc):%Y-%m-%d %H:%M:%S}"
        training = [str(ref.training)] if several else []
        rows.append([one.name, *training, when, str(one.reason), str(ref.launch), megabytes(ref.size_bytes), marks])
    print_table(rows, right=("training", "launch", "size"))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from hf_spot.run.folder_check import is_checkpoint_folder, problems_in

    if is_checkpoint_folder(Path(args.run)):
        found = {args.run: problems_in(Path(args.run))}
    else:
        run = open_run(args.run)
        step = find_checkpoint(run, args.step).step if args.step == BEST else args.step
        run.find(step)
        refs = (*run.journal.state.checkpoints, *run.journal.state.weights)
        chosen = [ref for ref in refs if step in (None, ref.step)]
        names = {ref.entry: ref.prefix for ref in refs}
        with progress_bar(args, "verify", sum(ref.size_bytes for ref in chosen)) as bar:
            found = {names[entry]: problems for entry, problems in run.verify(step, progress=bar).items()}
    if args.json:
        print_json(found)
    else:
        for name, problems in found.items():
            print(f"{name}: {paint('whole', Style.OK, sys.stdout) if not problems else ''}")
            for problem in problems:
                print(f"  {paint(problem, Style.FAIL, sys.stdout)}")
        if not found:
            print(f"{args.run}: pruned while it was read")
    return 1 if any(found.values()) else 0


@awaited()
def _pull(args: argparse.Namespace) -> int:
    run = open_run(args.run)
    checkpoint = find_checkpoint(run, args.step)
    with progress_bar(args, "pull", checkpoint.ref.size_bytes) as bar:
        folder = run.fetch(checkpoint, args.into, progress=bar)
    if args.json:
        print_json({"folder": str(folder)})
    else:
        print(folder)
    return 0


@awaited()
def _push(args: argparse.Namespace) -> int:
    if args.what.startswith("hf://"):
        return _publish(args)
    if args.private or args.all:
        raise ConfigError(
            f"--private and --all apply to a model, and {args.what} is a folder",
            hint=f"hf-spot checkpoints push {args.run} hf://owner/name",
        )
    folder = Path(args.what)
    run = open_run(args.run, allow_unfenced_store=args.allow_unfenced_store)
    with progress_bar(args, "push", sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())) as bar:
        checkpoint = run.push(folder, args.step, progress=bar)
    if args.json:
        print_json(dataclasses.asdict(checkpoint.ref))
    else:
        print(f"{checkpoint.name} committed to {args.run}: {megabytes(checkpoint.ref.size_bytes)}")
    return 0


def _publish(args: argparse.Namespace) -> int:
    from hf_spot.economics.report import summarise
    from hf_spot.economics.table import story

    run = open_run(args.run)
    open_run(args.what)  # raises when the client for this URL is missing here
    from hf_spot.run.publish import publish

    done = publish(
        run,
        args.what,
        step=args.step,
        private=args.private,
        everything=args.all,
        story=story(summarise(run.events())),
        progress=lambda size_bytes: progress_bar(args, "push", size_bytes),
    )
    if args.json:
        print_json(dataclasses.asdict(done))
    else:
        print(f"step {done.step} published as {done.url}: {counted(len(done.files), 'file')}, {megabytes(done.size_bytes)}")
    return 0


def _prune(args: argparse.Namespace) -> int:
    from hf_spot.policy.retention import milestones, to_prune

    if args.keep_every is not None and args.keep_every < 1:
        raise ConfigError(f"--keep-every {args.keep_every} must be at least 1 step", hint="--keep-every 1000, or leave it out")
    run = open_run(args.run, allow_unfenced_store=args.allow_unfenced_store)
    run.find()  # a typo in the URL must not create a new run
    if args.dry_run:
        refs = run.state().checkpoints
        lasting = milestones(refs, args.keep_every, run.journal.state.weights) if args.keep_every else []
        gone = [ref for ref in to_prune(refs, args.save_total_limit) if ref not in lasting]
        lines = [f"checkpoint-{ref.step} would be pruned, {megabytes(ref.size_bytes)}" for ref in gone]
        if args.json:
            print_json([dataclasses.asdict(ref) for ref in gone])
        else:
            print("\n".join(lines) or "nothing to prune")
        return 0
    run.join()
    gone = run.prune(args.save_total_limit, keep_every=args.keep_every)
    if args.json:
        print_json([dataclasses.asdict(ref) for ref in gone])
    else:
        print("\n".join(f"checkpoint-{ref.step} pruned, {megabytes(ref.size_bytes)}" for ref in gone) or "nothing to prune")
    return 0


def _report(args: argparse.Namespace) -> int:
    from hf_spot.run.below import what_is_there

    if args.follow:
        return follow_run(args.run, interval_s=FOLLOW_INTERVAL_S, once=False, as_json=args.json)
    from hf_spot.economics.shown import report_of
    from hf_spot.economics.table import render_report

    run = open_run(args.run)
    entries = list(run.events())
    report = report_of(run, entries)
    if args.plot or args.html:
        _draw(args, run, report, entries)
    if args.json:
        print_json({"run": args.run, **report.to_dict()})
    else:
        print(render_report(report, args.run, _width()))
        if not run.journal.state.number:
            words, hint = what_is_there(args.run)
            print(f"{words}\n  Try: {hint}")
    return 0


def _width() -> int | None:
    """Return the columns of the terminal; None for a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _draw(args: argparse.Namespace, run: Run, report: Report, entries: list[Entry]) -> None:
    from hf_spot.economics.page import write_page
    from hf_spot.economics.plots import plot_timeline, timeline_svg
    from hf_spot.economics.proofs import checkpoint_rows
    from hf_spot.economics.shown import timeline_of

    if not report.launches:
        raise ConfigError(f"{args.run} has not been launched yet, so there is nothing to draw", hint="hf-spot launch")
    timeline = timeline_of(run, report, lambda line: print(f"hf-spot: {line}", file=sys.stderr))
    if args.plot:
        plot_timeline(args.plot, timeline, args.run)
    if args.html:
        write_page(args.html, report, args.run, timeline_svg(timeline, ""), checkpoint_rows(entries))


def _simulate(args: argparse.Namespace) -> int:
    from hf_spot.economics.plan import PRESETS, load, preset, with_prices
    from hf_spot.economics.replay import replay
    from hf_spot.economics.simulate import simulate
    from hf_spot.economics.table import render_simulation
    from hf_spot.economics.traces import MODEL_SOURCE, load_all
    from hf_spot.yaml_file import read

    if [args.plan, args.preset, args.replay].count(None) != 2:
        raise ConfigError("give exactly one of PLAN, --preset and --replay", hint="hf-spot simulate --preset blog")
    if args.replay:
        found = replay(open_run(args.replay).events())
        if args.json:
            print_json(dataclasses.asdict(found))
        else:
            print(found)
        return 0
    if args.preset and args.preset not in PRESETS:
        raise ConfigError(
            f"--preset {args.preset}: unknown; known presets: {', '.join(PRESETS)}", hint="hf-spot simulate --preset blog"
        )
    if args.seeds < 1 or args.nodes < 1:
        raise ConfigError(f"--seeds {args.seeds} --nodes {args.nodes}: both must be at least 1", hint="--seeds 1000 --nodes 1")
    plan = preset(args.preset) if args.preset else load(args.plan)
    if args.prices:
        plan = with_prices(plan, read(args.prices), str(args.prices))
    traces = load_all(args.trace, args.nodes) if args.trace else None
    results = simulate(plan, traces, jobs=args.seeds)
    if args.plot:
        from hf_spot.economics.plots import plot_simulation

        plot_simulation(args.plot, results, args.preset or str(args.plan))
    if args.json:
        print_json([result.to_dict() for result in results])
    else:
        capacity = ", ".join(str(path) for path in args.trace) if args.trace else MODEL_SOURCE
        print(render_simulation(plan, results, f"{capacity}; {args.seeds} trainings a row", _width()))
    return 0
