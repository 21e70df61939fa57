"""The command line: argparse, and one short function per command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_spot import __version__
from hf_spot.arguments import SpotArguments
from hf_spot.errors import EXIT_USAGE, SpotError

if TYPE_CHECKING:
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

    _add_recipes(commands)

    doctor = commands.add_parser("doctor", help="what a run needs", allow_abbrev=False)
    checks = doctor.add_subparsers(title="checks", metavar="CHECK", required=True)
    iam = _add(checks, "iam", _doctor_iam, "prints the least that a role must be allowed, as an IAM policy (JSON)")
    iam.add_argument("--store", metavar="URL", required=True, help="s3://bucket/prefix of the run")
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


def _recipe(args: argparse.Namespace) -> int:
    from hf_spot.recipes import render

    values = {name: value for name, value in vars(args).items() if name not in ("command", "recipe")}
    print(getattr(render, args.recipe)(**values), end="")
    return 0


def _doctor_iam(args: argparse.Namespace) -> int:
    from hf_spot.storage.iam import policy

    _print_json(policy(args.store))
    return 0


if __name__ == "__main__":
    sys.exit(main() or 0)


__all__ = ["EXIT_USAGE", "main", "parser"]
