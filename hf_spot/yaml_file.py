"""Reads a YAML file so that every complaint about it names the line."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path as FilePath
from typing import Any, TypeVar

import yaml

from hf_spot.errors import ConfigError

_SPECIFICATION = "https://yaml.org/spec"

T = TypeVar("T")
Path = tuple[Any, ...]


class Invalid(ConfigError):
    """A value of the file can't be used.

    Args:
        path: the keys and indices that lead to it; empty for the whole file.
        problem: with it.
        hint: the repair.
    """

    def __init__(self, path: Path, problem: str, *, hint: str = "") -> None:
        super().__init__(f"{spelt(path)}: {problem}" if path else problem, hint=hint)
        self.path = path


def spelt(path: Path) -> str:
    """Such as ``rows[1].ladder``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def check_keys(value: dict[str, Any], known: Collection[str], path: Path) -> None:
    """Raises Invalid for a key that is none of ``known``, and names the nearest."""
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise Invalid((*path, key), "there is no such key", hint=f"did you mean {near[0]}?" if near else ", ".join(known))


def read(path: FilePath) -> str:
    """A file's text. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}", hint=f"ls -l {path.parent}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} can't be read: it is not UTF-8", hint=f"file {path}") from error


def parse(text: str, where: str, build: Callable[[Any], T]) -> T:
    """What ``build`` makes of a file's plain values.

    Args:
        text: of the file.
        where: its name, for errors.
        build: may raise `Invalid`, whose path becomes a line number.

    Raises:
        ConfigError: the text is no YAML, has a key twice, or holds what ``build`` refuses; with file and line.
    """
    lines: dict[Path, int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        loader = yaml.SafeLoader("")
        for path, found in _walk(loader, node, ()) if node else ():
            if path in lines:
                raise yaml.constructor.ConstructorError(None, None, f"{spelt(path)} is there twice", found.start_mark)
            lines[path] = found.start_mark.line + 1
        value = loader.construct_document(node) if node else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        what = "" if isinstance(error, yaml.constructor.ConstructorError) else "no YAML: "
        raise ConfigError(f"{where}{line}: {what}{error.problem or error.context}", hint=_SPECIFICATION) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a control character; a date that is none; a loop
        raise ConfigError(f"{where}: no YAML that can be used: {error}", hint=_SPECIFICATION) from error
    try:
        return build(value)
    except Invalid as error:
        near = next((error.path[:length] for length in range(len(error.path), -1, -1) if error.path[:length] in lines), None)
        raise ConfigError(
            f"{where}{f':{lines[near]}' if near is not None else ''}: {error.args[0]}", hint=error.hint
        ) from error


def _walk(loader: Any, node: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if not path:
        yield path, node
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = loader.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is no key", key.start_mark)
            yield (*path, name), key
            yield from _walk(loader, value, (*path, name))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*path, index), value
            yield from _walk(loader, value, (*path, index))
