"""Options of ``hf-spot launch`` from environment variables and from a file: what the command line says comes first, then the
variables, then the file, then the defaults."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_spot.errors import ConfigError
from hf_spot.launch.early import option
from hf_spot.suggestions import nearest
from hf_spot.yaml_file import Invalid, parse, read

PREFIX = "HF_SPOT_"
CONFIG = "config"  # the option that names the file
# What other parts of hf_spot read under this prefix; those that are also options have a meaning without a launch.
OTHER_VARIABLES = frozenset(
    {
        "HF_SPOT_MEMORY",
        "HF_SPOT_STORE",
        "HF_SPOT_ON_EVENT",
        "HF_SPOT_GRACE_S",
        "HF_SPOT_MACHINE",
        "HF_SPOT_WHEEL",
        "HF_SPOT_JOURNAL_KEY",
        "HF_SPOT_NOTICE_FILE",
        "HF_SPOT_S3_SSE_KMS_KEY_ID",
        "HF_SPOT_S3_EXPECTED_BUCKET_OWNER",
        "HF_SPOT_AZURE_METADATA_ENDPOINT",
        "HF_SPOT_ALIBABA_METADATA_ENDPOINT",
        "HF_SPOT_ARGUMENTS",
        "HF_SPOT_ANSWERED_SIGNALS",
        "HF_SPOT_CLAIMED_AT",
        "HF_SPOT_FULL_RANKS",
        "HF_SPOT_LAUNCH",
        "HF_SPOT_LAUNCHER_PID",
        "HF_SPOT_RUNTIME_DIR",
        "HF_SPOT_WAITS_ON",
        "HF_SPOT_LOG_LEVEL",
    }
)
_SECRET = frozenset({"on_event", "aws_access_key_id", "aws_secret_access_key"})
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")
_NOT_HERE = frozenset({"help", CONFIG, "print_config", "dry_run", "training_script", "training_script_args"})


@dataclass(frozen=True)
class Setting:
    """One value that the command line does not name.

    Args:
        words: how it would be written on the command line; empty for a flag that is off.
        source: the variable, or the file, that it comes from.
    """

    words: tuple[str, ...]
    source: str


def settings(argv: Sequence[str], environ: Mapping[str, str], parser: argparse.ArgumentParser) -> dict[str, Setting]:
    """Return the settings from variables and from the file, by the names (``dest``) of their options.

    Args:
        argv: the arguments after ``hf-spot launch``.
        environ: the environment.
        parser: the parser of ``hf-spot launch``.

    Raises:
        ConfigError: the file can't be read, names an option that does not exist, or a value can't be used.
    """
    options = {action.dest: action for action in parser._actions if action.option_strings and action.dest not in _NOT_HERE}
    found: dict[str, Setting] = {}
    if (path := option(argv, f"--{CONFIG}") or environ.get(f"{PREFIX}{CONFIG.upper()}")) is not None:
        found = parse(read(Path(path)), path, lambda value: _of_file(value, path, options))
    for name, action in options.items():
        variable = variable_of(action)
        if variable in OTHER_VARIABLES:  # read elsewhere, where an option that is given comes first
            if environ.get(variable):
                found.pop(name, None)
        elif (text := environ.get(variable)) is not None:
            try:
                found[name] = Setting(_words(action, text), f"${variable}")
            except ValueError as error:
                raise ConfigError(f"${variable}={text!r}: {error}", hint=f"export {variable}=1, or unset {variable}") from error
    return found


def variable_of(action: argparse.Action) -> str:
    """Return the environment variable of an option."""
    return f"{PREFIX}{_name(action).replace('-', '_').upper()}"


def unknown_variables(environ: Mapping[str, str], parser: argparse.ArgumentParser) -> list[str]:
    """Return a line for each variable with hf_spot's prefix that nothing reads: it is probably misspelled."""
    of_options = {variable_of(action) for action in parser._actions if action.option_strings}
    known = of_options | OTHER_VARIABLES | {f"{PREFIX}{CONFIG.upper()}"}
    told = []
    for name in environ:
        if name.startswith(PREFIX) and name not in known and not name.startswith(f"{PREFIX}UPDATE_"):
            meant = nearest(name.removeprefix(PREFIX), (one.removeprefix(PREFIX) for one in known))
            told.append(
                f"${name} is not a setting of hf_spot and has no effect{f'; did you mean {PREFIX}{meant}?' if meant else ''}"
            )
    return told


def render(argv: Sequence[str], found: Mapping[str, Setting], parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """Return what ``--print-config`` prints: a file for ``--config``, and where each value comes from. Of accelerate's options
    it has those that are set.

    Args:
        argv: the arguments after ``hf-spot launch``.
        found: from `settings`.
        parser: the parser of ``hf-spot launch``.
        args: what it has parsed.
    """
    ours = {action.dest for action in parser._action_groups[0]._group_actions} | {"max_restarts"}
    lines = []
    for action in parser._actions:
        if not action.option_strings or action.dest in _NOT_HERE:
            continue
        value, is_named = getattr(args, action.dest), _is_named(argv, action)
        if is_named:
            source = "command line"
        elif action.dest in found:
            source = found[action.dest].source
        elif (variable := variable_of(action)) in OTHER_VARIABLES and os.environ.get(variable):
            value, source = os.environ[variable], f"${variable}"
        elif action.dest in ours:
            source = "default"
        else:
            continue
        shown = "…" if action.dest in _SECRET and value is not None else _as_yaml(value)
        lines.append(f"{f'{_name(action)}: {shown}':48}  # {source}, {variable_of(action)}")
    return "\n".join(lines) + "\n"


def _of_file(value: Any, path: str, options: Mapping[str, argparse.Action]) -> dict[str, Setting]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Invalid((), "is not a mapping of options and values", hint="store: s3://bucket/runs/my-run")
    by_spelling = {
        _plain(spelling): action for action in options.values() for spelling in (*action.option_strings, action.dest)
    }
    found = {}
    for key, each in value.items():
        action = by_spelling.get(_plain(key))
        if action is None:
            meant = nearest(key, (_name(one) for one in options.values()))
            raise Invalid(
                (key,),
                "is not an option of hf-spot launch",
                hint=f"did you mean {meant}?" if meant else "hf-spot launch --help",
            )
        if each is None:
            continue
        try:
            found[action.dest] = Setting(_words(action, each), path)
        except ValueError as error:
            raise Invalid((key,), str(error), hint=f"{key}: true, or false") from error
    return found


def _words(action: argparse.Action, value: Any) -> tuple[str, ...]:
    """Return the words of the command line for a value. Raises ValueError."""
    flag = action.option_strings[-1]
    if action.nargs == 0:
        text = str(value).lower()
        if text not in (*_TRUE, *_FALSE):
            raise ValueError(f"{value!r} is neither true nor false")
        return (flag,) if text in _TRUE else ()
    if isinstance(value, (list, tuple)):
        return tuple(word for each in value for word in (flag, str(each)))
    if isinstance(value, dict):
        raise ValueError("a mapping is not a value of an option")
    return (f"{flag}={str(value).lower() if isinstance(value, bool) else value}",)


def _is_named(argv: Iterable[str], action: argparse.Action) -> bool:
    spellings = {_plain(one) for one in action.option_strings}
    return any(word.startswith("-") and _plain(word.partition("=")[0]) in spellings for word in argv)


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def _name(action: argparse.Action) -> str:
    return max(action.option_strings, key=len).lstrip("-").replace("_", "-")


def _plain(spelling: str) -> str:
    return spelling.lstrip("-").replace("_", "-")
