"""What users type and import. A change here is a change for them: do it on purpose, and say so in CHANGELOG.md.

``HF_SPOT_UPDATE_SNAPSHOTS=1 python -m pytest tests/test_public_surface.py`` renews the command line's snapshot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import hf_spot
from hf_spot import errors
from hf_spot.cli import main

CLI_SNAPSHOT = Path(__file__).parent / "snapshots" / "cli.json"

ERROR_TREE = {
    "SpotError": "Exception",
    "ConfigError": "SpotError",
    "StoreError": "SpotError",
    "StoreUnavailable": "StoreError",
    "AccessDenied": "StoreError",
    "BucketNotFound": "StoreError",
    "ObjectNotFound": "StoreError",
    "StoreNotFencing": "StoreError",
    "CloudError": "SpotError",
    "NoCapacity": "CloudError",
    "NoAnswer": "SpotError",
    "NoCheckpoint": "SpotError",
    "CorruptCheckpoint": "SpotError",
    "IncompleteCheckpoint": "SpotError",
    "Untrusted": "SpotError",
    "Fenced": "SpotError",
    "RolledBack": "SpotError",
    "TrainingPreempted": "SystemExit",
    "TrainingInterrupted": "TrainingPreempted",
}
OTHER_NAMES = {
    "Checkpoint",
    "NoticeKind",
    "NoticeSource",
    "ObjectStore",
    "PreemptionNotice",
    "Run",
    "SpotArguments",
    "SpotCallback",
    "SpotCheckpointManager",
    "__version__",
}


def test_the_public_names_are_these() -> None:
    assert set(hf_spot.__all__) == OTHER_NAMES | set(ERROR_TREE)
    assert sorted(hf_spot.__all__) == hf_spot.__all__
    assert set(hf_spot.__all__) <= set(dir(hf_spot))


@pytest.mark.parametrize("name", hf_spot.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(hf_spot, name) is not None


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="EXIT_USAGE"):
        hf_spot.EXIT_USAGE  # noqa: B018


def test_the_error_tree_is_this_and_wholly_public() -> None:
    defined = {
        name: kind.__mro__[1].__name__
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and kind.__module__ == errors.__name__
    }
    assert defined == ERROR_TREE


def test_the_exit_codes_are_these() -> None:
    codes = {name: code for name, code in vars(errors).items() if name.startswith("EXIT_")}
    ours = {"EXIT_FINISHED": 0, "EXIT_USAGE": 2, "EXIT_PREEMPTED": 75, "EXIT_FENCED": 76, "EXIT_HUNG": 79}
    assert codes == {**ours, "EXIT_KILLED": 128 + signal.SIGKILL}
    assert errors.TrainingPreempted().code == 75
    assert errors.SpotError("").exit_code == 2
    assert errors.Fenced("").exit_code == 76


def test_the_settings_and_their_defaults_are_these() -> None:
    assert {field.name: field.default for field in dataclasses.fields(hf_spot.SpotArguments)} == {
        "notice": "auto",
        "signals": "SIGTERM,SIGUSR1,SIGHUP",
        "grace_s": None,
        "cadence": "auto",
        "max_interval_s": 1800.0,
        "time_between_interruptions_s": 14400.0,
        "share_without_notice": 0.1,
        "on_event": None,
        "keep_checkpoints": 3,
        "max_writes_per_hour": 20_000,
        "keep_every": None,
        "keep_weights": False,
        "drain_timeout_s": 600.0,
        "peer_timeout_s": 30.0,
        "on_save_error": "stop",
        "on_mismatch": "stop",
        "on_change": "go-on",
        "on_nan": "stop",
        "max_rollbacks": 3,
        "start_from": None,
        "save_memory_gb": None,
        "upload_workers": 4,
        "allow_batch_change": False,
        "exact_on_any_gpus": False,
        "allow_unfenced_store": False,
    }


def test_every_setting_has_a_help_text() -> None:
    assert all(field.metadata.get("help") for field in dataclasses.fields(hf_spot.SpotArguments))


def test_the_callback_takes_a_store_and_settings() -> None:
    assert list(inspect.signature(hf_spot.SpotCallback).parameters) == ["store", "args"]


# -- the command line -------------------------------------------------------------------------------------------------

SUBCOMMAND = re.compile(r"^    ([a-z][\w-]*)(?:  |$)")
OPTIONS = re.compile(r"^  +(-\S.*?)(?:  |$)")
FLAG = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")


def help_of(*command: str) -> str:
    """What ``hf-spot COMMAND --help`` prints."""
    width = {"COLUMNS": "200", "NO_COLOR": "1"}
    if command == ("launch",):  # another process prints it
        words = [sys.executable, "-m", "hf_spot", *command, "--help"]
        return subprocess.run(words, env={**os.environ, **width}, check=True, capture_output=True, text=True).stdout
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        for name, value in width.items():
            patch.setenv(name, value)
        try:
            code: object = main([*command, "--help"])
        except SystemExit as end:
            code = end.code
    assert not code
    return printed.getvalue()


def options_in(text: str) -> set[str]:
    """The options that a help text describes."""
    return {flag for line in text.splitlines() if (found := OPTIONS.match(line)) for flag in FLAG.findall(found[1])}


def subcommands_in(text: str) -> list[str]:
    """The names listed under ``commands:``, ``actions:`` or ``recipes:``."""
    listed = re.search(r"^(?:commands|actions|recipes):\n((?:  .*\n?)*)", text, re.MULTILINE)
    return [found[1] for line in listed[1].splitlines() if (found := SUBCOMMAND.match(line))] if listed else []


def options_of_accelerate() -> set[str]:
    from accelerate.commands.launch import launch_command_parser

    return {flag for action in launch_command_parser()._actions for flag in action.option_strings}


def command_line(*command: str) -> dict[str, list[str]]:
    """Every command with its options; of ``launch``, only those that accelerate doesn't have."""
    text = help_of(*command)
    options = options_in(text) - (options_of_accelerate() if command == ("launch",) else set())
    tree = {" ".join(("hf-spot", *command)): sorted(options)}
    for name in subcommands_in(text):
        tree |= command_line(*command, name)
    return tree


def test_the_commands_and_their_options_are_those_of_the_snapshot() -> None:
    found = command_line()
    if os.environ.get("HF_SPOT_UPDATE_SNAPSHOTS") == "1":
        CLI_SNAPSHOT.parent.mkdir(exist_ok=True)
        CLI_SNAPSHOT.write_text(json.dumps(found, indent=2) + "\n")
    assert found == json.loads(CLI_SNAPSHOT.read_text())


def test_the_help_lists_the_exit_codes() -> None:
    text = help_of()
    assert all(re.search(rf"^ +{code} ", text, re.MULTILINE) for code in (0, 2, 75, 76))
