"""The command line: its parser, and the commands that stand alone; `hf_spot.commands` has those that belong together."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hf_spot import __version__
from hf_spot.arguments import SpotArguments
from hf_spot.commands import machines, runs
from hf_spot.commands.common import add_command, setting_help, takes_json
from hf_spot.completion import SHELLS
from hf_spot.errors import EXIT_USAGE, ConfigError, SpotError

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
            from hf_spot.launch.command import Reading

            reading = Reading(arguments[1:])  # its parser is accelerate's: it can't be a sub-parser of ours
            from hf_spot.launch.supervisor import launch

            return launch(reading)
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

    demo = add_command(commands, "demo", _demo, "the whole story on this machine in about a minute")
    demo.add_argument("--store", metavar="URL", help="run against this URL; default: a directory that is deleted afterwards")
    demo.add_argument("--plot", metavar="FILE", type=Path, help="where the loss curve goes (PNG)")
    demo.add_argument("--keep", metavar="DIR", type=Path, help="keep everything that the demo writes in this folder")
    takes_json(demo)

    runs.add_to(commands)

    watch = add_command(commands, "watch", _watch, "prints preemption notices as they come")
    watch.add_argument("--notice", default="auto", help=setting_help("notice"))
    watch.add_argument("--once", action="store_true", help="ask every source once and end")
    takes_json(watch)

    _add_recipes(commands)

    machines.add_to(commands)

    completion = add_command(
        commands, "completion", _completion, "prints a script that makes a shell complete commands and options"
    )
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))
    return top


def _add_recipes(commands: Any) -> None:
    from hf_spot.recipes.render import STORE

    recipe = commands.add_parser(
        "recipe",
        help="prints a job file for Kubernetes, Slurm, SageMaker or EC2",
        description="Prints a job file. hf-spot provision and hf-spot sky need none: they start machines themselves.",
        allow_abbrev=False,
    )
    recipes = recipe.add_subparsers(title="recipes", metavar="RECIPE", required=True)
    kubernetes = add_command(recipes, "kubernetes", _recipe, "a Job that is started again after a preemption (YAML)")
    slurm = add_command(recipes, "slurm", _recipe, "a batch script that requeues itself after a preemption")
    sagemaker = add_command(recipes, "sagemaker", _recipe, "a script that starts a managed spot training job")
    ec2 = add_command(
        recipes, "ec2", _recipe, "user data for machines of an Auto Scaling group, a launch template or Terraform"
    )
    store = os.environ.get("HF_SPOT_STORE") or STORE
    for name, command in (("kubernetes", kubernetes), ("slurm", slurm), ("sagemaker", sagemaker), ("ec2", ec2)):
        command.set_defaults(recipe=name)
        command.add_argument(
            "--store", metavar="URL", default=store, help="of the run (default: $HF_SPOT_STORE, or an example)"
        )
        command.add_argument("--script", default="train.py", help="that trains, with its arguments (default: train.py)")
        command.add_argument("--name", default="my-run", help="of the job (default: my-run)")
        command.add_argument("--gpus", type=int, default=1, help="of each machine (default: 1)")
    for command in (kubernetes, slurm):
        command.add_argument("--nodes", type=int, default=1, metavar="N", help="machines that train together (default: 1)")
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
    ec2.add_argument("--region", metavar="NAME", default="us-east-1", help="of the machines (default: us-east-1)")
    ec2.add_argument(
        "--setup",
        metavar="COMMANDS",
        default="git clone https://github.com/me/my-training .",
        help="that a new machine runs first, such as fetching the script",
    )
    ec2.add_argument("--hours", type=int, default=48, help="after which a machine goes, whatever happens (default: 48)")
    ec2.add_argument(
        "--auto-scaling-group",
        action="store_true",
        help="leave the group when the training has ended, and shrink it",
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

    values = {name: value for name, value in vars(args).items() if name not in ("command", "recipe")}
    print(getattr(render, args.recipe)(**values), end="")
    return 0


def _completion(args: argparse.Namespace) -> int:
    from hf_spot.completion import script

    print(script(parser(), args.shell))
    return 0


if __name__ == "__main__":
    sys.exit(main() or 0)


__all__ = ["EXIT_USAGE", "main", "parser"]
