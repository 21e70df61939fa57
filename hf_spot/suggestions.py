"""What a mistyped word was meant to be."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that ``word`` is most likely a misspelling of, as it is known; None if none is near.

    Case does not count, nor do the hyphens and underscores in and before the names of options.
    """
    spelled = {_plain(one): one for one in known}
    plain = _plain(word)
    found = difflib.get_close_matches(plain, spelled, 5)
    swapped = [one for one in found if sorted(one) == sorted(plain)]  # two letters in the wrong order
    return spelled[(swapped or found)[0]] if found else None


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """Return every option of a parser, in each of its spellings."""
    return [spelling for action in parser._actions for spelling in action.option_strings if action.help != argparse.SUPPRESS]


def hint_for_unknown(words: Iterable[str], parser: argparse.ArgumentParser) -> str:
    """Return what to type instead of arguments that a parser does not know.

    Args:
        words: the unknown arguments; the first option among them is looked up.
        parser: the parser, whose ``prog`` names the command.
    """
    wrong = next((word.partition("=")[0] for word in words if word.startswith("-")), "")
    meant = nearest(wrong, options_of(parser)) if wrong.startswith("--") else None
    return f"did you mean {meant}? All options: {parser.prog} --help" if meant else f"{parser.prog} --help"


def _plain(word: str) -> str:
    return word.lstrip("-").replace("_", "-").lower()
