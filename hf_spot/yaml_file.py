"""Reading YAML files, with errors that name file and line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path as FilePath
from typing import Any, TypeVar

import yaml

from hf_spot.errors import ConfigError

_SPECIFICATION = "https://yaml.org/spec"

T = TypeVar("T")
Path = tuple[Any, ...]

_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?")


class _Loader(yaml.SafeLoader):
    """Reads ``2:8`` as text: YAML 1.1 has it as a number to the base of 60, 128."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0] and _SEXAGESIMAL.fullmatch(value):
            return self.DEFAULT_SCALAR_TAG
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]


class Invalid(ConfigError):
    """A value in the file can't be used.

    Args:
        path: the keys and indices that lead to the value; empty for the whole file.
        problem: why it can't be used.
        hint: how to fix it.
    """

    def __init__(self, path: Path, problem: str, *, hint: str = "") -> None:
        super().__init__(f"{dotted(path)}: {problem}" if path else problem, hint=hint)
        self.path = path


def dotted(path: Path) -> str:
    """Return a path as text, such as ``rows[1].ladder``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def check_keys(value: dict[str, Any], known: Collection[str], path: Path) -> None:
    """Raise Invalid for a key that is not in ``known``, with the nearest known key as its hint."""
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise Invalid((*path, key), "unknown key", hint=f"did you mean {near[0]}?" if near else ", ".join(known))


def read(path: FilePath) -> str:
    """Return the text of a file. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}", hint=f"ls -l {path.parent}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} can't be read: it is not UTF-8", hint=f"file {path}") from error


def parse(text: str, where: str, build: Callable[[Any], T]) -> T:
    """Parse YAML and build an object from its plain values.

    Args:
        text: content of the file.
        where: name of the file, for errors.
        build: takes the plain values and returns the result; may raise `Invalid`, whose path becomes a line number.

    Raises:
        ConfigError: the text is not YAML, has a duplicate key, or a value that ``build`` refuses; with file and line.
    """
    lines: dict[Path, int] = {}
    try:
        node = yaml.compose(text, Loader=_Loader)
        loader = _Loader("")
        for path, found in _walk(loader, node, ()) if node else ():
            if path in lines:
                raise yaml.constructor.ConstructorError(None, None, f"{dotted(path)} appears twice", found.start_mark)
            lines[path] = found.start_mark.line + 1
        value = loader.construct_document(node) if node else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        what = "" if isinstance(error, yaml.constructor.ConstructorError) else "not YAML: "
        raise ConfigError(f"{where}{line}: {what}{error.problem or error.context}", hint=_SPECIFICATION) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a control character, an invalid date, a recursive alias
        raise ConfigError(f"{where}: this YAML can't be used: {error}", hint=_SPECIFICATION) from error
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
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is not a text key", key.start_mark)
            yield (*path, name), key
            yield from _walk(loader, value, (*path, name))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*path, index), value
            yield from _walk(loader, value, (*path, index))
