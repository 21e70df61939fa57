"""What a launch is to run. The command line is read by a process of its own (`hf_spot.launch.options`): accelerate's parser
imports torch, which the launcher neither waits for nor keeps in memory while others train."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError
from hf_spot.launch.early import likely_signals, option
from hf_spot.notices.signals import held_back
from hf_spot.runtime import STORE_VARIABLE

_OPTIONS = "hf_spot.launch.options"


@dataclass(frozen=True)
class Machines:
    """The machines of a launch: how many, which of them this is, and where machine 0 is."""

    count: int = 1
    rank: int = 0
    main_ip: str = ""


@dataclass(frozen=True)
class Command:
    """What to run, and how.

    Args:
        store: URL of the run.
        arguments: settings.
        max_restarts: as ``--max-restarts`` says.
        argv: the command that trains.
        environ: its environment, as accelerate wants it.
        machines: that train together.
        remarks: what accelerate has to say about the options, a line each.
    """

    store: str
    arguments: SpotArguments
    max_restarts: int
    argv: list[str]
    environ: dict[str, str]
    machines: Machines = field(default_factory=lambda: Machines())
    remarks: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """For `from_json`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Command:
        """What `to_json` was called on. Raises ConfigError for a `refusal`."""
        told = json.loads(text)
        if "refused" in told:
            raise ConfigError(told["refused"], hint=told["hint"])
        return cls(**{**told, "arguments": SpotArguments(**told["arguments"]), "machines": Machines(**told["machines"])})


def refusal(error: ConfigError) -> str:
    """For `Command.from_json`, in place of a command."""
    return json.dumps({"refused": error.args[0], "hint": error.hint})


def likely_store(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> str | None:
    """The URL of the run, as far as it can be told before accelerate's options are known; None when it may be anything.

    Args:
        argv: what stands behind ``hf-spot launch``.
        environ: the environment.
    """
    if (named := option(argv, "--store")) is not None:
        return named
    return None if any(word.startswith("--store") for word in argv) else environ.get(STORE_VARIABLE)


class Reading:
    """A command line that is being read, by a process that begins at once.

    Args:
        argv: what stands behind ``hf-spot launch``.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        self.argv = argv
        ours, theirs = os.pipe()
        try:
            # In a session of its own: Ctrl-C is for the launcher, and would make a traceback here.
            command = [sys.executable, "-m", _OPTIONS, str(theirs), *argv]
            with held_back(likely_signals(argv)):  # to every process of a job: the launcher hears them
                self._process = subprocess.Popen(command, env=os.environ, pass_fds=[theirs], start_new_session=True)
        finally:
            os.close(theirs)
        self._answer = os.fdopen(ours)

    def result(self) -> Command:
        """Waits for it.

        Raises:
            ConfigError: the command line can't be used.
            SystemExit: ``--help`` was asked for and printed, or the reading failed, and has said why.
        """
        try:
            with self._answer:
                text = self._answer.read()
            code = self._process.wait()
        except BaseException:  # Ctrl-C, or a SIGTERM
            self._process.kill()
            self._process.wait()
            raise
        if not text:
            raise SystemExit(code if code >= 0 else 128 - code)
        return Command.from_json(text)
