"""The reference pages, made of what the code says of itself: ``python -m tests.reference`` writes them.

``api.md`` comes from the docstrings of the public names, read without importing them; ``cli.md`` from the parsers of the
command line; ``upstream.md`` from the table of names of other libraries. `tests/test_docs.py` fails when a page is not what the
code says.
"""

from __future__ import annotations

import argparse
import builtins
import dataclasses
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest import mock

import griffe

from hf_spot import cli
from hf_spot.arguments import SpotArguments
from hf_spot.training.upstream_name import Name

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / ".github" / "docs"

GROUPS = {
    "Training": ["SpotCallback", "SpotArguments", "SpotCheckpointManager", "TrainingPreempted", "TrainingInterrupted"],
    "Runs": ["Run", "Checkpoint"],
    "Extension points": ["NoticeSource", "PreemptionNotice", "NoticeKind", "ObjectStore"],
}
REST = "Errors"

_SAY_SOMETHING = ("Exception", "SystemExit", "TrainerCallback")  # bases beside our own
_LITERAL = re.compile(r"^::\n\n((?:    .*\n|\n)+(?:    .*)?)", re.MULTILINE)
_CODE = re.compile(r"``(.+?)``", re.DOTALL)
_REFERENCE = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)")


def package() -> griffe.Module:
    """hf_spot, read and not imported."""
    loaded = griffe.load(
        "hf_spot", search_paths=[ROOT], docstring_parser="google", resolve_aliases=True, resolve_external=False
    )
    assert isinstance(loaded, griffe.Module)
    return loaded


# -- api.md -----------------------------------------------------------------------------------------------------------


def api() -> str:
    """The page about the public names."""
    loaded = package()
    names = [name for name in loaded.exports or () if name != "__version__"]
    grouped = {name for group in GROUPS.values() for name in group}
    groups = GROUPS | {REST: [name for name in names if name not in grouped]}
    lost = [name for name in groups[REST] if loaded[name].target_path != f"hf_spot.errors.{name}"]
    assert not lost, f"{lost} belong into GROUPS of {__file__}"
    testing = [f"testing.{name}" for name in loaded["testing"].exports or ()]
    lines = [
        "# Every name in Python",
        "Made by `python -m tests.reference` from the docstrings.",
    ]
    for title, members in groups.items():
        lines.append(f"**{title}:** " + ", ".join(f"[`{name}`](#{name.lower()})" for name in members))
    lines.append("**Fakes** (`hf_spot.testing`): " + ", ".join(f"[`{one[8:]}`](#{one[8:].lower()})" for one in testing))
    public = {*names, *(name.removeprefix("testing.") for name in testing)}
    for name in [name for members in groups.values() for name in members] + testing:
        lines += _about(loaded[name], name.removeprefix("testing."), public)
    return "\n\n".join(lines) + "\n"


def _about(named: griffe.Object | griffe.Alias, name: str, public: set[str]) -> Iterator[str]:
    found = named.final_target if isinstance(named, griffe.Alias) else named
    yield f"## {name}"
    if isinstance(found, griffe.Function):
        yield f"```py\n{_called(name, found)}\n```"
    if not found.is_class:
        yield from _docstring(found, public)
        return
    assert isinstance(found, griffe.Class)
    bases = [str(base) for base in found.bases if str(base) in {*public, *_SAY_SOMETHING}]
    if "Enum" not in map(str, found.bases) and "Protocol" not in map(str, found.bases):
        yield f"```py\n{_signature(name, found.parameters)}\n```"
    if bases:
        yield "A " + ", ".join(_linked(f"`{base}`", public) for base in bases) + "."
    if name == "SpotArguments":
        yield from _docstring(found, public)
        yield "| setting | default | meaning |\n|---|---|---|\n" + "\n".join(
            f"| `{one.name}` | `{one.default!r}` | {_cell(str(one.metadata['help']))} |"
            for one in dataclasses.fields(SpotArguments)
        )
        return
    yield from _docstring(found, public)
    for member in found.members.values():
        if member.name.startswith(("_", "on_")) or not member.docstring or isinstance(member, griffe.Alias):
            continue  # on_…: what Trainer calls
        if isinstance(member, griffe.Function):
            yield f"### {name}.{member.name}"
            yield f"```py\n{_called(member.name, member)}\n```"
            yield from _docstring(member, public)
        elif member.is_attribute and "property" in member.labels:
            yield f"### {name}.{member.name}"
            yield from _docstring(member, public)


def _called(name: str, function: griffe.Function) -> str:
    result = "" if function.returns is None or str(function.returns) == "None" else f" -> {function.returns}"
    return _signature(name, function.parameters) + result


def _signature(name: str, parameters: griffe.Parameters) -> str:
    parts: list[str] = []
    for one in parameters:
        if one.name in ("self", "cls"):
            continue
        if one.kind is griffe.ParameterKind.keyword_only and "*" not in parts:
            parts.append("*")
        kind = f": {one.annotation}" if one.annotation is not None else ""
        default = "" if one.default is None else f" = {one.default}"
        parts.append(f"{one.name}{kind}{default}")
        if one.kind is griffe.ParameterKind.positional_only:
            parts.append("/")
    flat = f"{name}({', '.join(parts)})"
    return flat if len(flat) < 110 else f"{name}(\n    " + ",\n    ".join(parts) + ",\n)"


def _docstring(found: griffe.Object, public: set[str]) -> Iterator[str]:
    for section in found.docstring.parsed if found.docstring else ():
        if section.kind is griffe.DocstringSectionKind.text:
            for index, part in enumerate(_LITERAL.split(section.value)):
                text = f"```py\n{textwrap.dedent(part).strip()}\n```" if index % 2 else _linked(part.strip(), public)
                if text:
                    yield text
        elif section.kind is griffe.DocstringSectionKind.parameters:
            yield "\n".join(f"- `{one.name}`: {_flat(one.description, public)}" for one in section.value)
        elif section.kind is griffe.DocstringSectionKind.raises:
            yield "\n".join(
                f"- raises {_linked(f'`{one.annotation}`', public)}: {_flat(one.description, public)}" for one in section.value
            )
        else:
            raise ValueError(f"{found.path}: tests/reference.py does not know sections of the kind {section.kind.value}")


def _flat(text: str, public: set[str]) -> str:
    return _linked(" ".join(text.split()), public)


def _linked(text: str, public: set[str]) -> str:
    def link(found: re.Match[str]) -> str:
        last = found[1].rpartition(".")[2]
        return f"[`{found[1]}`](#{last.lower()})" if last in public else found[0]

    return _CODE.sub(r"`\1`", _REFERENCE.sub(link, text))


# -- what docstrings refer to -----------------------------------------------------------------------------------------


def dangling() -> Iterator[str]:
    """What a docstring of hf_spot has in backticks, and is neither in its scope nor a name of the package or of Python."""
    loaded = package()
    known = {name for module in _walk(loaded) for name in module.members} | set(dir(builtins)) | sys.stdlib_module_names
    for found in (loaded, *_walk(loaded)):
        for reference in _REFERENCE.findall(found.docstring.value) if found.docstring else ():
            first, _, rest = reference.partition(".")
            if first == "hf_spot":
                try:
                    loaded[rest]
                except KeyError:
                    yield f"{found.path}: `{reference}`"
            elif reference not in known and not _in_scope(found, reference):
                yield f"{found.path}: `{reference}`"


def _walk(found: griffe.Object) -> Iterator[griffe.Object]:
    for member in found.members.values():
        if not isinstance(member, griffe.Alias):
            yield member
            yield from _walk(member)


def _in_scope(found: griffe.Object, reference: str) -> bool:
    scope: griffe.Object | None = found
    while scope is not None:
        try:
            scope[reference]
            return True
        except griffe.AliasResolutionError:
            return True  # something that the module imports
        except KeyError:
            scope = scope.parent
    return False


# -- cli.md -----------------------------------------------------------------------------------------------------------


def command_line() -> str:
    """The page about the commands. Of ``launch`` it has hf_spot's own options."""
    from hf_spot.launch import options

    with mock.patch.dict(os.environ, clear=False):
        os.environ.pop("HF_SPOT_STORE", None)
        top = cli.parser()
    launch = options.parser()
    restarts = [one for one in launch._actions if one.dest == "max_restarts"]  # accelerate's, which means more here
    lines = [
        "# Every command",
        "Made by `python -m tests.reference` from the parsers; `hf-spot COMMAND --help` says the same.",
        "```text\n" + str(top.epilog) + "\n```",
        "## hf-spot launch",
        "```text\nhf-spot launch --store URL [options of hf-spot and of accelerate launch] SCRIPT [its own arguments]\n```",
        "accelerate launch, made preemptible: [launch.md](launch.md). All options of `accelerate launch` may be given, too; "
        "underscores and hyphens are the same.",
        _table([*launch._action_groups[0]._group_actions, *restarts]),
    ]
    for name, parser, text in _commands(top):
        if name != "hf-spot launch":
            lines += [f"## {name}", f"```text\n{_usage(name, parser)}\n```", _sentence(text)]
            lines += [_table(shown)] if (shown := _own(parser)) else []
    return "\n\n".join(lines) + "\n"


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, below in action.choices.items():
                if below.get_default("command") is not None or name == "launch":
                    yield f"{parser.prog} {name}", below, texts[name]
                yield from _commands(below)


def _own(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [one for one in parser._actions if not isinstance(one, (argparse._HelpAction, argparse._SubParsersAction))]


def _usage(name: str, parser: argparse.ArgumentParser) -> str:
    parts = [name]
    for one in _own(parser):
        text = f"{one.option_strings[0]}{_value(one)}" if one.option_strings else str(one.metavar or one.dest)
        parts.append(text if one.required and one.nargs != "?" else f"[{text}]")
    return " ".join(parts)


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices:
        return " " + "|".join(map(str, action.choices))
    return f" {action.metavar or action.dest.upper()}"


def _table(actions: list[argparse.Action]) -> str:
    rows = ["| argument | meaning |", "|---|---|"]
    for one in actions:
        name = f"{_dashed(one.option_strings)}{_value(one)}" if one.option_strings else str(one.metavar or one.dest)
        rows.append(f"| `{_cell(name)}` | {_cell((one.help or '') % {'default': one.default, 'prog': 'hf-spot'})} |")
    return "\n".join(rows)


def _dashed(spellings: list[str]) -> str:
    return spellings[0].replace("_", "-") if spellings[0].startswith("--") else spellings[0]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


# -- upstream.md ------------------------------------------------------------------------------------------------------


def names_of_others() -> str:
    """The page about what hf_spot uses inside other libraries."""
    from hf_spot.training import upstream, versions
    from hf_spot.training.upstream_name import Scope

    tested = ", ".join(f"{name} {' and '.join(found)}" for name, found in versions.TESTED.items())
    lines = [
        "# What it uses inside other libraries",
        "Made by `python -m tests.reference` from `hf_spot/training/upstream.py`.",
        "These names are no public interface of their libraries, or are replaced while a training runs: a new version may "
        "rename them, or change what they take. When a training begins, each is looked at.",
        "- **refused**: a promise rests on it. The training does not begin, and the error (exit code 2) names the versions to "
        "install.\n- **said**: only speed or comfort is lost. One line says what, and the training begins.",
        f"The test suite has run with {tested}. Any other version is named in one line, and so is a version that has changed "
        "since the checkpoint was saved that a training resumes from.",
    ]
    both = Scope.TRAINER | Scope.LOOP
    titles = {Scope.TRAINER: "Trainer", Scope.LOOP: "Loops", both: "Trainer and loops", Scope.LAUNCH: "hf-spot launch"}
    for scope, title in titles.items():
        lines.append(f"## {title}")
        lines.append("\n".join(_rows(one for one in upstream.TABLE if one.scope == scope)))
    return "\n\n".join(lines) + "\n"


def _rows(names: Iterable[Name]) -> Iterator[str]:
    yield "| name | parameters | used by | without it | then |\n|---|---|---|---|---|"
    for one in sorted(names, key=lambda one: (one.owner, one.name)):
        called = f"`{one.takes}`" if one.takes else "none" if one.kind in ("function", "method") else one.kind
        users = ", ".join(f"`{user.removeprefix('training.')}`" for user in one.users)
        without = f"{one.only}: {one.without}" if one.only else one.without
        then = "refused" if one.refused else "said"
        yield f"| `{one.owner.replace(':', '.')}.{one.name}` | {_cell(called)} | {users} | {_cell(without)} | {then} |"


PAGES: dict[str, Callable[[], str]] = {"api.md": api, "cli.md": command_line, "upstream.md": names_of_others}


if __name__ == "__main__":
    for page, made in PAGES.items():
        (DOCS / page).write_text(made())
