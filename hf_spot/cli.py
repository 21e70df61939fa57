"""The command line: argparse, and one short function per command."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_spot import __version__
from hf_spot.arguments import SpotArguments
from hf_spot.errors import EXIT_USAGE, ConfigError, CorruptCheckpoint, SpotError

if TYPE_CHECKING:
    from hf_spot.economics.report import Report
    from hf_spot.run.run import Run

_EXIT_CODES = """exit codes:
  0    done; of launch: the run is finished
  1    verify found damage; demo: the two models differ
  2    usage, or a store that can't be used
  75   launch: preempted, start the same command again to go on
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

    run = _open(args.run)
    report = summarise(run.events())
    if args.plot or args.html:
        _draw(args, run, report)
    if args.json:
        _print_json({"run": args.run, **report.to_dict()})
    else:
        print(render(report, args.run))
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
    from hf_spot.economics.simulate import render, replay, simulate
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
        print(render(plan, results, f"{capacity}; {args.seeds} trainings a row"))
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


def _doctor_iam(args: argparse.Namespace) -> int:
    from hf_spot.storage.iam import policy

    _print_json(policy(args.store))
    return 0


if __name__ == "__main__":
    sys.exit(main() or 0)


__all__ = ["EXIT_USAGE", "main", "parser"]
