"""Helpers shared by all commands: adding arguments, opening runs, printing."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_spot.arguments import SpotArguments
from hf_spot.errors import NoCheckpoint
from hf_spot.terminal import Style, columns_of, padded, paint

BEST = "best"  # in place of a step

if TYPE_CHECKING:
    from hf_spot.run.checkpoint import Checkpoint
    from hf_spot.run.progress import Bar
    from hf_spot.run.run import Run


def add_command(commands: Any, name: str, function: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
    """Add a command that runs ``function``, which returns the exit code."""
    added: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
    added.set_defaults(command=function)
    takes_verbosity(added)
    return added


def takes_verbosity(parser: argparse.ArgumentParser) -> None:
    """Add ``-q`` and ``-v``, which may stand before or behind a command: only the topmost parser has their defaults."""
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument(
        "-q", "--quiet", action="store_true", default=argparse.SUPPRESS, help="print the result, warnings and errors only"
    )
    how_much.add_argument(
        "-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="print details, and where an error came from"
    )


def takes_run(command: argparse.ArgumentParser) -> None:
    """Add the argument ``RUN``."""
    command.add_argument("run", metavar="RUN", help="URL of a run: s3://bucket/prefix, gs://…, az://…, hf://…, or a directory")


def takes_step(command: argparse.ArgumentParser, help: str) -> None:
    """Add the option ``--step``: a number, or ``best``."""
    command.add_argument("--step", metavar="STEP|best", type=_step, help=help)


def _step(text: str) -> int | str:
    if text == BEST:
        return text
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor {BEST!r}") from error


def find_checkpoint(run: Run, step: int | str | None) -> Checkpoint:
    """Return the newest checkpoint, the newest of a step, or the best one of the newest training that has one.

    Raises:
        NoCheckpoint: there is none.
    """
    if step != BEST:
        assert not isinstance(step, str)
        return run.find(step)
    best = [ref for ref in run.state().checkpoints if ref.best]
    if not best:
        run.find()  # raises if there is no checkpoint at all
        raise NoCheckpoint(
            f"{run.url} has no best checkpoint: Trainer names one if metric_for_best_model is set, or load_best_model_at_end",
            hint=f"hf-spot checkpoints ls {run.url}",
        )
    return run.checkpoint(max(best, key=lambda ref: ref.training))


def takes_unfenced(command: argparse.ArgumentParser) -> None:
    """Add the option ``--allow-unfenced-store``."""
    command.add_argument("--allow-unfenced-store", action="store_true", help=setting_help("allow_unfenced_store"))


def takes_job(command: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the argument ``JOB``."""
    nargs = "?" if optional else None
    command.add_argument(
        "job", metavar="JOB", type=Path, nargs=nargs, help="a job file (YAML); hf-spot provision --example prints one"
    )


def takes_json(command: argparse.ArgumentParser) -> None:
    """Add the option ``--json``."""
    command.add_argument("--json", action="store_true", help="print JSON for scripts")


def setting_help(field: str) -> str:
    """Return the help text of a field of `SpotArguments`."""
    return next(str(f.metadata["help"]) for f in dataclasses.fields(SpotArguments) if f.name == field)


def open_run(url: str, *, allow_unfenced_store: bool = False) -> Run:
    """Return the run at ``url``. Raises ConfigError."""
    from hf_spot.run.run import Run

    return Run(url, allow_unfenced_store=allow_unfenced_store)


def progress_bar(args: argparse.Namespace, what: str, size_bytes: int) -> Bar:
    """Return the progress bar of a command; ``-q`` hides it. See `hf_spot.run.progress.Bar`."""
    from hf_spot.run.progress import Bar

    return Bar(what, size_bytes, hidden=args.quiet)


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=2))


def megabytes(size_bytes: int) -> str:
    """Format a size in megabytes, for people."""
    return f"{size_bytes / 1e6:,.1f} MB"


def print_table(rows: Sequence[Sequence[str]], *, right: Collection[str] = ()) -> None:
    """Print rows as columns. The first row is the header; the columns whose titles are in ``right`` are aligned right."""
    widths = [max(map(columns_of, column)) for column in zip(*rows, strict=True)]
    sides = [title in right for title in rows[0]]
    for number, row in enumerate(rows):
        cells = [padded(cell, width, is_right=is_right) for cell, width, is_right in zip(row, widths, sides, strict=True)]
        line = "  ".join(cells).rstrip()
        print(paint(line, Style.HEADING, sys.stdout) if number == 0 else line)
