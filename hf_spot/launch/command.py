"""The command that a launch runs. A separate process parses the command line (`hf_spot.launch.options`): accelerate's parser
imports torch, and the launcher should neither wait for torch nor keep it in memory during the training."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError
from hf_spot.launch.early import likely_signals, option
from hf_spot.notices.signals import held_back
from hf_spot.policy.budget import Budget
from hf_spot.runtime import STORE_VARIABLE

_OPTIONS = "hf_spot.launch.options"
_MOST_WORDS = 150  # of a command whose digests are sent: they are part of a short greeting
_FINGERPRINT = "1:"  # its form; what begins otherwise is of an unreleased version
_LARGEST_BYTES = 2**20  # of a file that an argument names: scripts and configurations are smaller, data are not


@dataclass(frozen=True)
class Machines:
    """The machines of a launch: how many, which of them this is, and where machine 0 is.

    Args:
        count: number of machines; the most that may train, before a launch of machines that come and go has begun.
        rank: of this machine.
        main_ip: where machine 0 is; empty if machines meet in the run.
        least: the fewest that may train; 0 if the machines are fixed.
        processes: of each machine, if machines come and go.
        interface: the network interface that the machines use; None for any.
    """

    count: int = 1
    rank: int = 0
    main_ip: str = ""
    least: int = 0
    processes: int = 0
    interface: str | None = None

    @property
    def are_elastic(self) -> bool:
        """Return whether machines come and go, and meet in the run."""
        return self.least > 0


@dataclass(frozen=True)
class Command:
    """The command to run, and its settings.

    Args:
        store: URL of the run.
        arguments: settings.
        max_restarts: the value of ``--max-restarts``.
        argv: the command that trains.
        environ: its environment, as accelerate sets it.
        machines: the machines that train together.
        remarks: accelerate's messages about the options, a line each.
        script: the script, as it was named, and its own arguments.
        dry_run: only say what would be done.
        budget: of the run.
        hang_timeout_s: as in `hf_spot.policy.hangs.limit_s`.
        as_it_is: ``argv`` is a command that the user knows by its name, such as ``trl``, which starts the training.
        warm_spares: the value of ``--warm-spares``.
        ranks: of this machine, as far as the command line tells.
        among_at: where in ``argv`` the options of a launch among machines that come and go belong.
    """

    store: str
    arguments: SpotArguments
    max_restarts: int
    argv: list[str]
    environ: dict[str, str]
    machines: Machines = field(default_factory=lambda: Machines())
    remarks: list[str] = field(default_factory=list)
    script: list[str] = field(default_factory=list)
    dry_run: bool = False
    as_it_is: bool = False
    budget: Budget = field(default_factory=Budget)
    among_at: int = 0
    hang_timeout_s: float | None = None
    warm_spares: str = "auto"
    ranks: int = 1

    def argv_among(self, machines: Machines, port: int) -> list[str]:
        """Return the command for a launch of machines that come and go.

        Args:
            machines: of the launch.
            port: of machine 0, for the ranks.
        """
        total = machines.count * machines.processes
        told: dict[str, str | int] = {"--num_machines": machines.count, "--num_processes": total}
        if machines.count > 1:
            told |= {"--machine_rank": machines.rank, "--main_process_ip": machines.main_ip, "--main_process_port": port}
        words = [word for name, value in told.items() for word in (name, str(value))]
        before = [one for one in self.argv[: self.among_at] if total > 1 or one.replace("-", "_") != "__multi_gpu"]
        return [*before, *words, *self.argv[self.among_at :]]

    def inputs(self) -> dict[int, str]:
        """Return a digest of each file that a word of the command names, by the number of the word."""
        found = {}
        for number, word in enumerate(self.script):
            with contextlib.suppress(OSError, ValueError):  # a word that names no file that can be read
                path = Path(word.partition("=")[2] if word.startswith("--") and "=" in word else word)
                if path.is_file() and path.stat().st_size <= _LARGEST_BYTES:
                    found[number] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        return found

    def fingerprint(self, before: dict[int, str]) -> str:
        """Return what the end of a run says of its command: digests of the words, and of the files that they name.

        Args:
            before: the files when the command was started. Those that have changed since are what it writes, such as a log, and
                are left out.
        """
        files = [f",{number}={digest}" for number, digest in self.inputs().items() if before.get(number) == digest]
        return f"{_FINGERPRINT}{self._digest_of_words}{''.join(files)}"

    def has_finished(self, fingerprint: str | None) -> bool:
        """Return whether a fingerprint is of this command, or of nobody knows which one.

        A file that is not on this machine has not changed: whatever the command needs, it asks for itself.
        """
        if fingerprint is None or not fingerprint.startswith(_FINGERPRINT):
            return True
        words, *files = fingerprint.removeprefix(_FINGERPRINT).split(",")
        here = {str(number): digest for number, digest in self.inputs().items()}
        return words == self._digest_of_words and all(
            here.get(number, digest) == digest for number, _, digest in (one.partition("=") for one in files)
        )

    @property
    def _digest_of_words(self) -> str:
        words = "".join(f"{word}\0" for word in self.script)
        return hashlib.sha256(words.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def word_digests(self) -> list[str]:
        """Return a short digest of the script and of each of its arguments, and one of all those that come late.

        Of a word that names a file it is that of the contents: the file may lie in another folder on another machine.
        """
        digests = []
        for word in self.script:
            told = word.encode("utf-8", "surrogateescape")
            with contextlib.suppress(OSError, ValueError):
                option, is_option, value = word.partition("=") if word.startswith("--") else ("", "", word)
                path = Path(value)
                if path.is_file() and path.stat().st_size <= _LARGEST_BYTES:
                    told = f"{option}{is_option}\0".encode() + path.read_bytes()
            digests.append(hashlib.sha256(told).hexdigest()[:6])
        late = hashlib.sha256("".join(digests[_MOST_WORDS:]).encode()).hexdigest()[:6]
        return [*digests[:_MOST_WORDS], *([late] if digests[_MOST_WORDS:] else [])]

    def to_json(self) -> str:
        """Return the command in the form that `from_json` reads."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Command:
        """Return the command from which `to_json` made this text. Raises ConfigError for a `refusal`."""
        told = json.loads(text)
        if "refused" in told:
            raise ConfigError(told["refused"], hint=told["hint"])
        parts = {
            "arguments": SpotArguments(**told["arguments"]),
            "machines": Machines(**told["machines"]),
            "budget": Budget(**told["budget"]),
        }
        return cls(**{**told, **parts})


def refusal(error: ConfigError) -> str:
    """Return an error in the form that `Command.from_json` reads, in place of a command."""
    return json.dumps({"refused": error.args[0], "hint": error.hint})


def likely_store(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the URL of the run if it can be determined before the command line is parsed; otherwise None.

    Args:
        argv: the arguments after ``hf-spot launch``.
        environ: the environment.
    """
    if (named := option(argv, "--store")) is not None:
        return named
    return None if any(word.startswith("--store") for word in argv) else environ.get(STORE_VARIABLE)


class Reading:
    """A command line that is being parsed, by a process that starts at once.

    Args:
        argv: the arguments after ``hf-spot launch``.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        self.argv = argv
        ours, theirs = os.pipe()
        try:
            # In a session of its own: Ctrl-C is meant for the launcher, and would print a traceback here.
            command = [sys.executable, "-m", _OPTIONS, str(theirs), *argv]
            with held_back(likely_signals(argv)):  # a scheduler may signal every process of a job; the launcher reacts
                self._process = subprocess.Popen(command, env=os.environ, pass_fds=[theirs], start_new_session=True)
        finally:
            os.close(theirs)
        self._answer = os.fdopen(ours)

    def result(self) -> Command:
        """Wait for the parsed command line and return it.

        Raises:
            ConfigError: the command line can't be used.
            SystemExit: ``--help`` was printed, or the process failed and has printed why.
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
