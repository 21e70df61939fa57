"""The options of ``hf-spot launch``: accelerate's parser with a group of hf-spot's own, and the command that results from them.

``python -m hf_spot.launch.options FD ARGUMENTS…`` writes the command to a file descriptor, for
`hf_spot.launch.command.Reading`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import itertools
import logging
import math
import os
import re
import shlex
import shutil
import socket
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil

if __name__ == "__main__":
    gc.disable()  # accelerate imports torch, and garbage collection would slow that down
import accelerate.commands.launch
import accelerate.commands.utils
import accelerate.utils.launch  # noqa: F401

from hf_spot.arguments import SpotArguments
from hf_spot.errors import EXIT_FINISHED, ConfigError
from hf_spot.launch.command import Command, Machines, refusal
from hf_spot.launch.early import has_flag
from hf_spot.launch.settings import render, settings, unknown_variables
from hf_spot.log import LEVEL_VARIABLE
from hf_spot.policy import warm
from hf_spot.policy.budget import Budget
from hf_spot.policy.hangs import AUTO, parse_timeout
from hf_spot.runtime import STORE_VARIABLE
from hf_spot.suggestions import hint_for_unknown
from hf_spot.training.upstream import LAUNCH_ENVIRONMENT, LAUNCH_PARSER, OPTIONS_PARSER, VALIDATE_LAUNCH, check
from hf_spot.training.upstream.name import Scope

MAX_RESTARTS = 3
_BUDGET = (
    (
        "--max_hours",
        float,
        "Hours that all launches of the run together may take; then the training saves and ends, with exit code 2.",
    ),
    (
        "--max_spend",
        float,
        "Dollars that the machines of the run may cost, by the price in $HF_SPOT_MACHINE; then it ends likewise.",
    ),
    (
        "--max_launches_without_progress",
        int,
        "Launches in a row, on whatever machines, that may commit nothing before no more begin.",
    ),
)
_HANG_HELP = (
    "Seconds without a sign of the training (a step, a batch of an evaluation, bytes of a restore) after which it is ended and "
    "started again from the newest checkpoint; if it hangs after the same step again, the launch ends with exit code 79. "
    "'auto': half an hour to four hours, and more for what takes long in this run; 'off': never (default: auto)."
)
_WARM_HELP = (
    "Whether Pythons for the next launch are kept ready while this one trains, with their imports done, so that a restart does "
    "not wait for them; that takes 0.4 GB of memory for each rank. 'auto': from 15 s after the first step of a launch, with "
    "processor time that nobody else wants, and not when memory is short; 'on': at once, whatever that costs; 'off': never "
    "(default: auto)."
)
_ACCELERATES_LOG = logging.getLogger(VALIDATE_LAUNCH.owner)
_OF_ONE_LAUNCH = ("num_machines", "machine_rank", "main_process_ip", "main_process_port", "num_processes")
_NUM_MACHINES_HELP = (
    "Machines that train together. N: exactly N. MIN:MAX: any number between, and machines may come and go while the training "
    "goes on; --num_processes is then that of each machine (default: its GPUs), and a step has the samples of MAX machines. "
    "Without --machine_rank and --main_process_ip the machines meet in the run."
)
_AGENT = "hf_spot.launch.agent"
_NAMES = {"keep_checkpoints": "save_total_limit", "start_from": "from"}  # options that have another name than their setting
_BOOTSTRAP = "hf_spot.training.bootstrap"
_GLOO_VARIABLE = "GLOO_SOCKET_IFNAME"
_NCCL_VARIABLE = "NCCL_SOCKET_IFNAME"
_LOOPBACK = re.compile(r"localhost$|127\.|::1$")  # then all "machines" are on this one
_ELF = b"\x7fELF"
_LONGEST_LINE_BYTES = 4096
_MACHINES = ("--nnodes", "--num-machines", "--num-nodes")  # of torchrun, accelerate and deepspeed
_HOSTS = {  # options that name the machines, or a file that does, by the launcher's name
    "deepspeed": ("-i", "--include"),
    "mpirun": ("-H", "--host"),
    "mpiexec": ("-H", "--host", "-hosts"),
}
_HOST_FILES = {
    "deepspeed": ("-H", "--hostfile"),
    "mpirun": ("--hostfile", "-hostfile", "--machinefile", "-machinefile"),
    "mpiexec": ("--hostfile", "-hostfile", "--machinefile", "-machinefile", "-f"),
}
_ELSEWHERE = {  # commands whose children are not children of this process, have another environment, or belong to another user
    **dict.fromkeys(("srun", "sbatch", "qsub", "salloc"), "as a job of a scheduler"),
    **dict.fromkeys(("ssh", "pdsh", "kubectl"), "on another machine"),
    **dict.fromkeys(("docker", "podman", "nerdctl"), "in a container"),
    **dict.fromkeys(("sudo", "doas", "su", "runuser"), "as another user, without the environment of this launch"),
}
_QUIET = ("-q", "--quiet")  # of accelerate, too
_EXAMPLE = "hf-spot launch --store s3://bucket/runs/my-run train.py"
_MAX_RESTARTS_HELP = (
    "Launches in a row that may crash without committing anything before hf-spot gives up; preemptions don't count, and 0 "
    f"never restarts (default: {MAX_RESTARTS}). The restarts of torchrun's own agent stay off."
)


def parser() -> argparse.ArgumentParser:
    """Return accelerate's parser, with hf-spot's options as its first group."""
    check(Scope.LAUNCH)
    made: argparse.ArgumentParser = LAUNCH_PARSER.find()()
    made.prog = "hf-spot launch"
    made.description = (
        "Run a training script as `accelerate launch` does, detect preemption notices, and resume from the newest committed "
        "checkpoint. All options of `accelerate launch` are accepted. A command such as `trl sft …`, `torchrun … train.py` or "
        "`bash train.sh` is run as it is, without options of accelerate."
    )
    # accelerate's own formatter hides every group that it does not know.
    made.formatter_class = argparse.HelpFormatter
    made.usage = "hf-spot launch --store URL [options of hf-spot and of accelerate launch] SCRIPT|COMMAND [its own arguments]"
    _add_options(made.add_argument_group("hf-spot"))
    made._action_groups.insert(0, made._action_groups.pop())
    for action in made._actions:
        if action.dest == "max_restarts":
            action.default, action.help = MAX_RESTARTS, _MAX_RESTARTS_HELP
        elif action.dest == "num_machines":
            action.type, action.help, action.metavar = _Count.of, _NUM_MACHINES_HELP, "N|MIN:MAX"
    _show_one_spelling(made)
    made.error = _fail  # type: ignore[method-assign]
    return made


def _show_one_spelling(made: argparse.ArgumentParser) -> None:
    """Show one spelling of each option, and accept both: accelerate's as in its documentation, ours with hyphens."""
    ours = {action.dest for action in made._action_groups[0]._group_actions} | {"max_restarts"}
    for action in made._actions:
        hyphens = [one for one in action.option_strings if "_" not in one]
        underscores = [one for one in action.option_strings if "-" not in one.lstrip("-")]
        action.option_strings = (hyphens if action.dest in ours else underscores) or action.option_strings


def parse(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Command:
    """Parse the command line, and check everything that can be checked before the launch starts.

    Args:
        argv: the arguments after ``hf-spot launch``.
        environ: the environment.

    Raises:
        ConfigError: something is missing, can't be used, or is not supported.
    """
    made = parser()
    found = settings(argv, environ, made)
    given, argv = argv, [*(word for one in found.values() for word in one.words), *argv]  # the last one of an option counts
    if has_flag(given, "--print-config"):
        print(render(given, found, made, made.parse_args([*argv, "train.py"])), end="")  # a script need not be named
        raise SystemExit(EXIT_FINISHED)
    args = made.parse_args(list(argv))
    arguments = SpotArguments(**{f.name: getattr(args, f.name) for f in dataclasses.fields(SpotArguments)})
    store = args.store or environ.get(STORE_VARIABLE)
    if not store:
        raise ConfigError("hf-spot launch: --store is missing", hint=f"{_EXAMPLE}, or export {STORE_VARIABLE}")
    if args.max_restarts < 0:
        raise ConfigError(f"--max-restarts {args.max_restarts} must not be negative", hint="0 never restarts")
    if args.no_python:
        raise ConfigError("--no_python: hf-spot can only make Python scripts preemptible", hint=_EXAMPLE)
    script = [*(["--module"] if args.module else []), args.training_script, *args.training_script_args]
    options = list(argv[: len(argv) - 1 - len(args.training_script_args)])
    if args.module:
        _check_module(args.training_script)
    elif (program := find_program(args.training_script, environ)) is not None:
        _refuse_options_of_accelerate([one for one in _of_accelerate(options) if one not in _QUIET], script)
        _refuse_what_trains_elsewhere(script)
        _refuse_several_machines(script)
        return Command(
            store,
            arguments,
            args.max_restarts,
            [program, *args.training_script_args],
            {**environ, **_log_level(args)},
            remarks=unknown_variables(environ, made),
            script=script,
            dry_run=args.dry_run,
            as_it_is=True,
            budget=_budget(args),
            hang_timeout_s=parse_timeout(args.hang_timeout),
        )
    else:
        _check_script(Path(args.training_script))
    are_elastic = _are_elastic(args)
    if are_elastic:
        _prepare_elastic(args)
    try:
        with _kept_remarks() as remarks:
            args, config, _ = VALIDATE_LAUNCH.find()(args)
    except (ValueError, OSError) as error:
        raise ConfigError(f"accelerate launch: {error}", hint="hf-spot launch --help, or accelerate config") from error
    _refuse_what_is_not_supported(args, config)
    machines = _elastic_machines(args) if are_elastic else _machines(args)
    remarks += unknown_variables(environ, made)
    among_at = 0
    if _is_distributed(args):
        words = _of_accelerate(options, but=_OF_ONE_LAUNCH if are_elastic else ())
        if are_elastic and args.multi_gpu and "--multi_gpu" not in words:
            words.append("--multi_gpu")
        command = [sys.executable, "-m", _AGENT, *words, "-m", _BOOTSTRAP, *script]
        among_at = 3 + len(words)
        env = dict(environ)
    else:
        command = [sys.executable, "-m", _BOOTSTRAP, *script]
        env = LAUNCH_ENVIRONMENT.find()(args)[1]
    env |= _log_level(args)
    remarks += _without_effect(args, are_elastic)
    if machines.interface is not None:
        env = {_GLOO_VARIABLE: machines.interface, _NCCL_VARIABLE: machines.interface, **env}
    elif machines.count > 1 and not are_elastic and _GLOO_VARIABLE not in env and (interface := interface_to(machines.main_ip)):
        # If a machine's name resolves to 127.0.1.1, as on Debian, gloo would listen on an unreachable address.
        if interface == "lo" and not _LOOPBACK.match(machines.main_ip):
            raise ConfigError(
                f"--main_process_ip {machines.main_ip}: on this machine that name resolves to a loopback address, which no "
                "other machine reaches",
                hint=f"an address that `hostname -I` prints there, or export {_GLOO_VARIABLE}=eth0 (see ip -br addr)",
            )
        env[_GLOO_VARIABLE] = interface
    return Command(
        store,
        arguments,
        args.max_restarts,
        command,
        env,
        machines,
        remarks,
        script,
        dry_run=args.dry_run,
        budget=_budget(args),
        among_at=among_at,
        hang_timeout_s=parse_timeout(args.hang_timeout),
        warm_spares=warm.check(args.warm_spares),
        ranks=machines.processes or max(1, int(args.num_processes or 1) // max(1, int(args.num_machines or 1))),
    )


def _without_effect(args: argparse.Namespace, are_elastic: bool) -> list[str]:
    """Return a line for each option that was given and does nothing."""
    found = []
    if are_elastic and args.machine_rank is not None:
        found.append("--machine_rank has no effect: machines that come and go meet in the run, and get their ranks there")
    if not _is_distributed(args) and args.num_processes > 1:
        several = "leave out --cpu, and give --multi_gpu" if args.cpu else "give --multi_gpu"
        found.append(
            f"--num_processes {args.num_processes} has no effect: accelerate starts one process here. For several, "
            f"{several} (without GPUs also use_cpu=True in TrainingArguments)"
        )
    return found


def _log_level(args: argparse.Namespace) -> dict[str, str]:
    return {LEVEL_VARIABLE: "debug" if args.verbose else "warning"} if args.verbose or args.quiet else {}


def find_program(word: str, environ: Mapping[str, str]) -> str | None:
    """Return the path of the program that a command line starts with; None for a script that Python runs.

    A word that names no file is looked up on PATH, and then beside this Python, whose environment may not be activated.

    Args:
        word: the first word of the command.
        environ: the environment.

    Raises:
        ConfigError: it is a shell script that can't be executed.
    """
    path = Path(word)
    if path.is_file():
        if os.access(path, os.X_OK) and path.suffix != ".py" and not _is_for_this_python(path):
            return str(path.resolve())
        if path.suffix in (".sh", ".bash"):
            raise ConfigError(f"{path} is a shell script that is not executable", hint=f"hf-spot launch … bash {path}")
        return None
    if os.sep in word or (path / "__main__.py").is_file():
        return None
    return shutil.which(word, path=environ.get("PATH")) or shutil.which(word, path=os.path.dirname(sys.executable))


def _is_for_this_python(path: Path) -> bool:
    """Tell whether Python runs a file: its first line names no other program. Raises ConfigError if it can't be read."""
    try:
        with path.open("rb") as file:
            first = file.readline(_LONGEST_LINE_BYTES)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error}", hint=f"ls -l {path}") from error
    if first.startswith(_ELF):
        return False
    if not first.startswith(b"#!"):
        return True
    words = os.fsdecode(first[2:]).split()
    program = Path(words[-1] if words and words[0].endswith("/env") else words[0] if words else "")
    if not program.name.startswith(("python", "pypy")):
        return False
    return not program.is_absolute() or not program.exists() or program.parent == Path(sys.executable).parent


def _refuse_options_of_accelerate(options: Sequence[str], script: Sequence[str]) -> None:
    if options:
        told = shlex.join(options)
        several = any(one.partition("=")[0].replace("_", "-") == "--num-machines" for one in options)
        with_them = f"hf-spot launch --store URL {'' if several else 'accelerate launch '}{told} train.py"
        raise ConfigError(
            f"{told}: {script[0]} is a command of its own, which gets no options of accelerate",
            hint=f"leave {told} out, or {with_them}",
        )


def _refuse_what_trains_elsewhere(script: Sequence[str]) -> None:
    """Refuse a command that starts the training where this launch can neither see nor protect it."""
    name = os.path.basename(script[0])
    where = _ELSEWHERE.get(name)
    if name == "env" and {"-", "-i", "--ignore-environment"} & set(script[1:]):
        where = "without the environment of this launch"
    if where is not None:
        raise ConfigError(
            f"{name} starts the training {where}, where this launch can't protect it",
            hint=f"put hf-spot launch behind it: {name} … hf-spot launch --store URL train.py",
        )


def _refuse_several_machines(script: Sequence[str]) -> None:
    """Refuse a command whose own options say that several machines train together: each launch would fence the others."""
    for option, value in itertools.pairwise([word for each in script for word in each.split("=", 1)] + [""]):
        if option.replace("_", "-") in _MACHINES and value not in ("1", "1:1"):
            raise ConfigError(
                f"{option} {value}: a command that is run as it is can train on one machine only",
                hint="hf-spot launch … --num_machines 2 --machine_rank 0 --main_process_ip 10.0.0.1 --multi_gpu train.py",
            )
        if option.endswith(".py"):  # the rest are the script's own
            break
    if len(hosts := _hosts(script)) > 1:
        raise ConfigError(
            f"{script[0]} trains on {len(hosts)} machines ({', '.join(hosts)}): a command that is run as it is can train on "
            "one machine only",
            hint="hf-spot launch … --num_machines 2 --machine_rank 0 --main_process_ip 10.0.0.1 --multi_gpu train.py",
        )


def _hosts(script: Sequence[str]) -> list[str]:
    """Return the machines that a launcher's options name, of which it starts processes on each."""
    name = os.path.basename(script[0])
    if name not in _HOSTS:
        return []
    found: list[str] = []
    file = "/job/hostfile" if name == "deepspeed" else ""
    for option, value in itertools.pairwise([word for each in script for word in each.split("=", 1)] + [""]):
        if option in _HOSTS[name]:
            found = re.split("[@,]" if name != "deepspeed" else "@", value)
        elif option in _HOST_FILES[name]:
            file = value
        elif option.endswith(".py"):
            break
    if not found and file:
        with contextlib.suppress(OSError, UnicodeDecodeError):  # the launcher says so itself
            lines = [line.split("#")[0].split() for line in Path(file).read_text().splitlines()]
            found = [words[0] for words in lines if words]
    return sorted({one.partition(":")[0] for one in found if one})


def _check_script(path: Path) -> None:
    """Refuse a script that Python can't run, so that it is not restarted in vain."""
    if not path.exists():
        what = "there is no such script" if os.sep in str(path) else "there is no such script, and no such command on PATH"
        raise ConfigError(f"{path}: {what}", hint=f"ls {path.parent}")
    if path.is_dir() and not (path / "__main__.py").exists():
        raise ConfigError(f"{path} is a directory without a __main__.py", hint=f"ls {path}")
    if path.suffix != ".py" or path.is_dir():
        return
    try:
        compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        where = f"{path}:{error.lineno}" if error.lineno else str(path)
        raise ConfigError(f"{where}: {type(error).__name__}: {error.msg}", hint=f"python -m py_compile {path}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read: {error}", hint=f"python -m py_compile {path}") from error


def _check_module(name: str) -> None:
    hint = f"python -c 'import {name.partition('.')[0]}'"
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name = f"{name}.__main__"
            spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:  # of a package above it
        raise ConfigError(f"-m {name}: {error}", hint=hint) from error
    except Exception:  # the import of its packages may fail here, and succeed in the environment of a launch
        return
    if spec is None:
        raise ConfigError(f"-m {name}: there is no such module", hint=hint)


@contextlib.contextmanager
def _kept_remarks() -> Iterator[list[str]]:
    """Collect accelerate's messages about the options instead of printing them: the launcher decides whether to show them."""
    remarks: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines = [line.strip() for line in record.getMessage().splitlines()]
            remarks.append("; ".join(lines).replace(":; ", ": ").replace("; To ", ". To "))

    keep, propagated = Keep(), _ACCELERATES_LOG.propagate
    _ACCELERATES_LOG.addHandler(keep)
    _ACCELERATES_LOG.propagate = False
    try:
        yield remarks
    finally:
        _ACCELERATES_LOG.removeHandler(keep)
        _ACCELERATES_LOG.propagate = propagated


def interface_to(address: str) -> str | None:
    """Return the network interface through which this machine reaches another one, or None."""
    try:
        family, *_, where = socket.getaddrinfo(address, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    found = [name for name, parts in psutil.net_if_addrs().items() if any(part.address == own for part in parts)]
    return found[0] if found else None


class _Count(int):
    """The value of ``--num_machines``: accelerate sees the largest number of a range."""

    least = 0
    is_range = False

    @classmethod
    def of(cls, text: str) -> _Count:
        """Return the value of ``N`` or ``MIN:MAX``. Raises ArgumentTypeError."""
        first, colon, last = text.partition(":")
        try:
            least, most = int(first), int(last if colon else first)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a range such as 2:8") from None
        if not 1 <= least <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on, and no range of such numbers, as 2:8 is")
        made = cls(most)
        made.least, made.is_range = least, bool(colon) and most > 1
        return made


def _are_elastic(args: argparse.Namespace) -> bool:
    """Return whether the machines come and go, or meet in the run: no rank and no address is given for them."""
    count = args.num_machines
    if not isinstance(count, _Count):
        return False
    return count.is_range or (count > 1 and args.machine_rank is None and not args.main_process_ip)


def _prepare_elastic(args: argparse.Namespace) -> None:
    """Make the options such as accelerate takes them: for a launch of all machines."""
    args.given_processes = args.num_processes
    distributed = (args.multi_gpu, args.use_fsdp, args.use_deepspeed, args.use_megatron_lm)
    if not any(distributed) and not (args.cpu or args.tpu or args.config_file):
        args.multi_gpu = True
    if args.num_machines.is_range and args.num_processes is not None:
        if args.num_processes < 1:
            raise ConfigError(f"--num_processes {args.num_processes} must be positive", hint="the number of GPUs of a machine")
        args.num_processes *= int(args.num_machines)


def _elastic_machines(args: argparse.Namespace) -> Machines:
    least, most, total = args.num_machines.least, int(args.num_machines), args.num_processes
    shown = f"{least}:{most}" if args.num_machines.is_range else most
    if not _is_distributed(args):
        raise ConfigError(f"--num_machines {shown} needs --multi_gpu, --use_fsdp or --use_deepspeed", hint="leave out --cpu")
    if args.use_deepspeed:
        raise ConfigError(
            f"--num_machines {shown}: DeepSpeed divides the optimizer among a fixed number of processes",
            hint=f"--num_machines {most} --machine_rank 0 --main_process_ip 10.0.0.1, on every machine with its own rank",
        )
    if args.given_processes is None:
        processes = max(1, total)  # accelerate has counted the GPUs of this machine
    elif total % most:
        raise ConfigError(
            f"--num_processes {total} is the total of all {most} machines, and must be a multiple of {most}",
            hint=f"--num_processes {most}",
        )
    else:
        processes = total // most
    return Machines(most, least=least, processes=processes, interface=args.interface)


def _machines(args: argparse.Namespace) -> Machines:
    count = args.num_machines or 1
    if count == 1:
        return Machines()
    example = "--num_machines 2 --machine_rank 0 --main_process_ip 10.0.0.1 --main_process_port 29500"
    if args.machine_rank is None or not args.main_process_ip:
        raise ConfigError(
            f"--num_machines {count}: give both --machine_rank and --main_process_ip on every machine, or neither: then the "
            "machines meet in the run",
            hint=example,
        )
    if args.interface is not None:
        raise ConfigError(
            "--interface is for machines that meet in the run, without --machine_rank and --main_process_ip",
            hint=f"export {_GLOO_VARIABLE}={args.interface}",
        )
    if not 0 <= args.machine_rank < count:
        raise ConfigError(f"--machine_rank {args.machine_rank} is not one of 0 to {count - 1}", hint=example)
    if not _is_distributed(args):
        raise ConfigError(
            f"--num_machines {count} needs --multi_gpu, --use_fsdp or --use_deepspeed", hint=f"--multi_gpu {example}"
        )
    launcher = args.deepspeed_multinode_launcher or "pdsh"  # as in accelerate
    if args.use_deepspeed and launcher != "standard":
        raise ConfigError(
            f"--deepspeed_multinode_launcher {launcher} starts the processes of all machines from one of them, where hf-spot "
            "launch could not protect them",
            hint=f"--deepspeed_multinode_launcher standard, on every machine: {example}",
        )
    if args.num_processes % count:
        raise ConfigError(
            f"--num_processes {args.num_processes} is the total of all {count} machines, and must be a multiple of {count}",
            hint=f"--num_processes {count}",
        )
    return Machines(count, int(args.machine_rank), args.main_process_ip)


def _add_options(group: Any) -> None:
    group.add_argument(
        "--store",
        metavar="URL",
        help=f"the run: s3://bucket/prefix, gs://…, az://…, hf://…, or a directory (default: ${STORE_VARIABLE})",
    )
    group.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file with options, without their hyphens in front; environment variables (HF_SPOT_CADENCE for --cadence) "
        "override it, and the command line overrides both (default: $HF_SPOT_CONFIG)",
    )
    group.add_argument(
        "--print_config", action="store_true", help="print the options, and where each comes from, as such a file"
    )
    group.add_argument(
        "--dry_run", action="store_true", help="check everything and say what would be resumed, without starting it"
    )
    group.add_argument(
        "--interface",
        metavar="NAME",
        help="the network interface by which machines that meet in the run reach each other (default: that of the default "
        "route, or whichever answers)",
    )
    for name, kind, what in _BUDGET:
        group.add_argument(name, metavar="N", type=kind, help=what)
    group.add_argument("--hang_timeout", metavar="auto|SECONDS|off", default=AUTO, help=_HANG_HELP)
    group.add_argument("--warm_spares", metavar="auto|on|off", default=warm.AUTO, help=_WARM_HELP)
    group.add_argument("-v", "--verbose", action="store_true", help="log details, too; -q logs warnings and errors only")
    types = typing.get_type_hints(SpotArguments)
    for setting in dataclasses.fields(SpotArguments):
        # accelerate's groups add the spelling with hyphens
        flag, text = f"--{_NAMES.get(setting.name, setting.name)}", str(setting.metadata["help"])
        if types[setting.name] is bool:
            group.add_argument(flag, dest=setting.name, action="store_true", default=setting.default, help=text)
            continue
        shown = "" if setting.default is None else f" (default: {setting.default})"
        kind = next(one for one in (*typing.get_args(types[setting.name]), types[setting.name]) if one is not type(None))
        metavar = kind.__name__.upper()
        group.add_argument(flag, dest=setting.name, type=kind, default=setting.default, metavar=metavar, help=text + shown)


def _of_accelerate(options: list[str], but: Sequence[str] = ()) -> list[str]:
    """Return the options without those that hf-spot handles itself, and without others.

    Args:
        options: as given.
        but: names of options, each with a value, to leave out as well.
    """
    ours = OPTIONS_PARSER.find()(add_help=False, allow_abbrev=False)
    _add_options(ours.add_argument_group("hf-spot"))
    ours.add_argument("--max_restarts")
    ours.add_argument("-m", "--module", action="store_true")
    for name in but:
        ours.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    rest: list[str] = ours.parse_known_args(options)[1]
    return rest


def _budget(args: argparse.Namespace) -> Budget:
    for name in ("max_hours", "max_spend", "max_launches_without_progress"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g} must be positive", hint="omit it for no limit")
    return Budget(args.max_hours, args.max_spend, args.max_launches_without_progress)


def _is_distributed(args: argparse.Namespace) -> bool:
    return not args.cpu and any((args.use_deepspeed, args.use_fsdp, args.use_megatron_lm, args.multi_gpu))


def _refuse_what_is_not_supported(args: argparse.Namespace, config: Any) -> None:
    sagemaker = config is not None and "SAGEMAKER" in str(config.compute_environment)
    if args.tpu or sagemaker:
        raise ConfigError(
            "hf-spot launch does not support TPUs and SageMaker", hint="accelerate launch, and SpotCallback in the script"
        )
    if args.mpirun_hostfile:
        raise ConfigError("--mpirun_hostfile is not supported", hint="--multi_gpu --num_processes N")


def _fail(message: str) -> NoReturn:
    hint = f"{_EXAMPLE}; all options: hf-spot launch --help"
    if (unknown := message.removeprefix("unrecognized arguments: ")) != message:
        hint = hint_for_unknown(unknown.split(), parser())
    raise ConfigError(f"hf-spot launch: {message}", hint=hint)


def _main() -> None:
    _, answer_to, *argv = sys.argv
    sys.argv = ["hf-spot", "launch", *argv]
    try:
        told = parse(argv).to_json()
    except ConfigError as error:
        told = refusal(error)
    with contextlib.suppress(BrokenPipeError), os.fdopen(int(answer_to), "w") as answer:  # the launcher has ended
        answer.write(told)
    os._exit(0)  # a normal exit would spend time on cleaning up torch


if __name__ == "__main__":
    _main()
