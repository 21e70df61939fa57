"""``hf-spot completion``: a script that makes a shell complete commands and options, written by shtab from the parsers."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_spot.arguments import CADENCES, NOTICE_NAMES, SAVE_ERROR_ANSWERS
from hf_spot.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")
_WORDS = {"notice": NOTICE_NAMES, "cadence": CADENCES, "on_save_error": SAVE_ERROR_ANSWERS}
_FILES = ("training_script", "config_file")  # options of accelerate that it does not declare to be paths


def script(top: argparse.ArgumentParser, shell: str) -> str:
    """The script for a shell.

    It holds everything that can be completed: the shell starts no Python when somebody presses TAB.

    Args:
        top: the parser of ``hf-spot``; it is changed, and of no use for anything else afterwards.
        shell: one of `SHELLS`.

    Raises:
        ConfigError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise ConfigError(
            f"hf-spot completion needs shtab, which can't be imported: {error}", hint="pip install shtab"
        ) from error
    from hf_spot.launch.options import parser as launch_parser

    commands = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    commands.choices["launch"] = _spelt_once(launch_parser())  # the same object that shtab walks
    for action in _actions(top):
        if action.type is Path or action.dest in _FILES:
            action.complete = shtab.FILE
        elif action.dest in _WORDS:
            action.choices = _WORDS[action.dest]
    return str(shtab.complete(top, shell=shell))


def _spelt_once(launch: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Offers accelerate's options as its documentation spells them, and ours with hyphens; who types may use either."""
    ours = {action.dest for action in launch._action_groups[0]._group_actions} | {"max_restarts"}
    for action in launch._actions:
        hyphens = [one for one in action.option_strings if "_" not in one]
        underscores = [one for one in action.option_strings if "-" not in one.lstrip("-")]
        action.option_strings = (hyphens if action.dest in ours else underscores) or action.option_strings
    return launch


def _actions(parser: argparse.ArgumentParser) -> Iterable[Any]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)
