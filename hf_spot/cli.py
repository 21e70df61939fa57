"""The command line: the top-level parser and single commands; `hf_spot.commands` has the groups of commands."""

from __future__ import annotations

import argparse
import functools
import io
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hf_spot import __version__
from hf_spot.arguments import SpotArguments
from hf_spot.aws_errors import nearest_region
from hf_spot.commands import hub_jobs, machines, runs, serve, whole_runs
from hf_spot.commands.common import add_command, setting_help, takes_json, takes_verbosity
from hf_spot.completion import SHELLS
from hf_spot.errors import EXIT_USAGE, ConfigError, SpotError
from hf_spot.suggestions import hint_for_unknown, nearest
from hf_spot.terminal import Style, outlive_terminal, paint

log = logging.getLogger("hf_spot")

_VERBOSITY = ("-q", "--quiet", "-v", "--verbose")
_STORE_VARIABLE = "HF_SPOT_STORE"  # as in hf_spot.runtime, which an environment without our dependencies can't import
_EXIT_CODES = """exit codes:
  0    success; launch: the run is finished
  1    verify: damage found; doctor: a check failed; demo: the two models differ
  2    usage error, or the store or account can't be used; launch: also a budget that is used up, or numbers that are NaN
  75   launch: preempted, run the same command again to resume; provision: no capacity available; both: the store or the
       account did not answer for five minutes, start the same command again later
  76   launch: a newer launch owns the run
  79   launch: the training has hung twice after the same step, and would hang there again
  130  interrupted twice
  any other exit code of launch is the script's own"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="backslashreplace")  # a URL may hold what the terminal's encoding doesn't
    arguments = _reordered(arguments)
    is_launch, is_verbose = arguments[:1] == ["launch"], False
    try:
        if is_launch:
            return _launch(arguments[1:])
        args = _commands(os.environ.get(_STORE_VARIABLE)).parse_args(arguments)
        is_verbose = args.verbose
        if args.verbose or args.quiet:
            log.setLevel(logging.DEBUG if args.verbose else logging.WARNING)
        command: Callable[[argparse.Namespace], int] = args.command
        return command(args)
    except SpotError as error:
        if is_verbose:
            traceback.print_exception(error, file=sys.stderr)
        # For launch, --json may be an argument of the script.
        told = _as_json(error) if "--json" in arguments and not is_launch else None
        print(told or f"{paint('hf-spot: error:', Style.FAIL, sys.stderr)} {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader closed the pipe
        return 0


def _reordered(arguments: list[str]) -> list[str]:
    """Return the arguments with ``help COMMAND`` as ``COMMAND --help``, and ``launch`` first: it has its own parser."""
    if arguments[:1] == ["help"] and not "".join(arguments[1:2]).startswith("-"):
        return [*arguments[1:], "--help"]
    before = next((count for count, word in enumerate(arguments) if word not in _VERBOSITY), len(arguments))
    if arguments[before : before + 1] == ["launch"]:
        return ["launch", *arguments[:before], *arguments[before + 1 :]]
    return arguments


def _launch(argv: Sequence[str]) -> int:
    from hf_spot.launch import early

    outlive_terminal()
    with early.listening(argv):
        from hf_spot.launch.command import Reading

        reading = Reading(argv)  # its parser is accelerate's: it can't be a sub-parser of ours
        from hf_spot.launch.supervisor import launch

        return launch(reading)


def _as_json(error: SpotError) -> str:
    fields = {"error": error.args[0], "kind": type(error).__name__, "hint": error.hint, "exit_code": error.exit_code}
    return json.dumps(fields)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are `ConfigError` with a hint, instead of the whole usage text. If a command must follow and none
    does, it prints its help."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments as argparse does. Raises ConfigError for those that are not known here, or by a command below."""
        if not args and any(isinstance(one, argparse._SubParsersAction) and one.required for one in self._actions):
            self.print_help()
            self.exit()
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            raise ConfigError(f"unrecognized arguments: {' '.join(unknown)}", hint=hint_for_unknown(unknown, self))
        return found, unknown

    def error(self, message: str) -> NoReturn:
        hint = f"{self.prog} --help"
        if wrong := re.search(r"^argument ([^:]*): invalid choice: '([^']*)'", message):
            option = wrong[1].split("/")[-1] if wrong[1].startswith("-") else ""
            known = [
                str(name)
                for action in self._actions
                for name in action.choices or ()
                if not option or option in action.option_strings
            ]
            if (near := nearest(wrong[2], known)) is not None:
                hint = " ".join(word for word in (self.prog, option, near) if word)
        raise ConfigError(message, hint=hint)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands but ``launch``, which has its own."""
    top = _Parser(
        prog="hf-spot",
        description="Fine-tune with Hugging Face on machines that can be taken away.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.set_defaults(quiet=False, verbose=False)
    top.add_argument("--version", action="version", version=f"hf-spot {__version__}")
    takes_verbosity(top)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    helping = commands.add_parser("help", help="show the help of a command", allow_abbrev=False)
    helping.add_argument("words", metavar="COMMAND", nargs="*", help="such as: checkpoints pull")
    commands.add_parser("launch", help="accelerate launch, made preemptible (hf-spot launch --help)", add_help=False)

    demo = add_command(
        commands, "demo", _demo, "show an interrupted training and its uninterrupted twin on this machine, in a minute or two"
    )
    demo.add_argument("--store", metavar="URL", help="use this run URL (default: a directory that is deleted afterwards)")
    demo.add_argument("--plot", metavar="FILE", type=Path, help="write the loss curve to this file (PNG)")
    demo.add_argument("--keep", metavar="DIR", type=Path, help="keep all files of the demo in this folder")
    takes_json(demo)

    runs.add_to(commands)
    whole_runs.add_to(commands)
    serve.add_to(commands)

    watch = add_command(commands, "watch", _watch, "print preemption notices as they arrive")
    watch.add_argument("--notice", default="auto", help=setting_help("notice"))
    watch.add_argument("--once", action="store_true", help="poll every source once and exit")
    takes_json(watch)

    _add_recipes(commands)

    machines.add_to(commands)
    hub_jobs.add_to(commands)

    completion = add_command(
        commands, "completion", _completion, "print a script that makes a shell complete commands and options"
    )
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))
    return top


@functools.lru_cache(maxsize=1)
def _commands(store: str | None) -> argparse.ArgumentParser:
    """Return the parser for `main`, made once: that takes longer than most commands. A default depends on ``store``."""
    return parser()


def _add_recipes(commands: Any) -> None:
    from hf_spot.recipes.render import STORE

    recipe = commands.add_parser(
        "recipe",
        help="print a job file for Kubernetes, JobSet, Kubeflow, Slurm, SageMaker or EC2",
        description="Print a job file. hf-spot provision and hf-spot sky need none: they start machines themselves.",
        allow_abbrev=False,
    )
    recipes = recipe.add_subparsers(title="recipes", metavar="RECIPE", required=True)
    kubernetes = add_command(recipes, "kubernetes", _recipe, "a Job that restarts after a preemption (YAML)")
    jobset = add_command(recipes, "jobset", _recipe, "a JobSet for machines that come and go (YAML)")
    trainjob = add_command(recipes, "trainjob", _recipe, "a TrainJob of Kubeflow Trainer for machines that come and go (YAML)")
    slurm = add_command(recipes, "slurm", _recipe, "a batch script that requeues itself after a preemption")
    sagemaker = add_command(recipes, "sagemaker", _recipe, "a script that starts a managed spot training job")
    ec2 = add_command(
        recipes, "ec2", _recipe, "user data for machines from an Auto Scaling group, a launch template or Terraform"
    )
    store = os.environ.get(_STORE_VARIABLE) or STORE
    by_name = {
        "kubernetes": kubernetes,
        "jobset": jobset,
        "trainjob": trainjob,
        "slurm": slurm,
        "sagemaker": sagemaker,
        "ec2": ec2,
    }
    for name, command in by_name.items():
        command.set_defaults(recipe=name)
        command.add_argument(
            "--store", metavar="URL", default=store, help="URL of the run (default: $HF_SPOT_STORE, or an example)"
        )
        command.add_argument("--script", default="train.py", help="training script with its arguments (default: train.py)")
        command.add_argument("--name", default="my-run", help="name of the job (default: my-run)")
        command.add_argument("--gpus", type=int, default=1, help="GPUs of each machine (default: 1)")
    for command, nodes in ((kubernetes, "1"), (jobset, "1:2"), (trainjob, "1:2"), (slurm, "1")):
        command.add_argument(
            "--nodes",
            default=nodes,
            metavar="N|MIN:MAX",
            help=f"machines that train together; with MIN:MAX they come and go (default: {nodes})",
        )
        command.add_argument(
            "--grace-s", type=int, default=120, metavar="S", help="seconds from the notice to the kill (default: 120)"
        )
    for command in (kubernetes, jobset, trainjob):
        command.add_argument("--queue", metavar="NAME", help="local queue of Kueue (default: Kueue is not used)")
        command.add_argument("--priority-class", metavar="NAME", help="priority class of Kueue")
    for command in (kubernetes, jobset, trainjob, sagemaker):
        command.add_argument(
            "--image", default="registry.example.com/train:latest", help="container image that contains hf_spot and the script"
        )
    slurm.add_argument("--time", default="24:00:00", help="time limit of one launch, in Slurm's format (default: 24:00:00)")
    sagemaker.add_argument("--role", metavar="ARN", default="arn:aws:iam::123456789012:role/hf-spot", help="role of the job")
    sagemaker.add_argument("--instance-type", default="ml.g5.xlarge", help="instance type (default: ml.g5.xlarge)")
    sagemaker.add_argument("--hours", type=int, default=24, help="maximum hours that the training may take (default: 24)")
    ec2.add_argument("--region", metavar="NAME", default="us-east-1", help="region of the machines (default: us-east-1)")
    ec2.add_argument(
        "--setup",
        metavar="COMMANDS",
        default="git clone https://github.com/me/my-training .",
        help="commands that a new machine runs first, for example to fetch the script",
    )
    ec2.add_argument("--hours", type=int, default=48, help="hours after which a machine shuts down in any case (default: 48)")
    ec2.add_argument(
        "--auto-scaling-group",
        action="store_true",
        help="when the training has ended, leave the group and shrink it",
    )


def _demo(args: argparse.Namespace) -> int:
    from hf_spot.demo.story import run_demo

    return run_demo(store=args.store, plot=args.plot, keep=args.keep, as_json=args.json)


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

    known = ("command", "recipe", "quiet", "verbose")
    values = {name: value for name, value in vars(args).items() if name not in known}
    if (meant := nearest_region(values.get("region", ""))) is not None and not args.quiet:
        print(f"hf-spot: is --region {args.region} misspelled? The nearest known region is {meant}", file=sys.stderr)
    print(getattr(render, args.recipe)(**values), end="")
    return 0


def _completion(args: argparse.Namespace) -> int:
    from hf_spot.completion import script

    print(script(parser(), args.shell))
    return 0


if __name__ == "__main__":
    sys.exit(main() or 0)


__all__ = ["EXIT_USAGE", "main", "parser"]
