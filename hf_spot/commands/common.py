"""Helpers shared by all commands: adding arguments, opening runs, printing."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_spot.arguments import SpotArguments

if TYPE_CHECKING:
    from hf_spot.run.run import Run


def add_command(commands: Any, name: str, function: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
    """Add a command that runs ``function``, which returns the exit code."""
    added: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
    added.set_defaults(command=function)
    return added


def takes_run(command: argparse.ArgumentParser) -> None:
    """Add the argument ``RUN``."""
    command.add_argument("run", metavar="RUN", help="URL of a run: s3://bucket/prefix, gs://…, az://…, hf://…, or a directory")


def takes_unfenced(command: argparse.ArgumentParser) -> None:
    """Add the option ``--allow-unfenced-store``."""
    command.add_argument("--allow-unfenced-store", action="store_true", help=setting_help("allow_unfenced_store"))


def takes_job(command: argparse.ArgumentParser) -> None:
    """Add the argument ``JOB``."""
    command.add_argument("job", metavar="JOB", type=Path, help="a job file (YAML)")


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


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=2))


def megabytes(size_bytes: int) -> str:
    """Format a size in megabytes, for people."""
    return f"{size_bytes / 1e6:,.1f} MB"
