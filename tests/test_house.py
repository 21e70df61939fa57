"""The rules of the house that no linter knows."""

from __future__ import annotations

import ast
import configparser
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hf_spot.training import upstream

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_spot"

HEAVY = {"torch", "transformers", "accelerate", "boto3", "botocore", "huggingface_hub", "numpy", "matplotlib"}

HELP = """
import runpy, sys
sys.argv = ["hf-spot", "--help"]
try:
    {start}
except SystemExit as end:
    assert not end.code, end.code
"""
LIGHT_STARTS = {
    "import hf_spot": "import hf_spot",
    "hf-spot --help": HELP.format(start="from hf_spot.cli import main; sys.exit(main())"),
    "python -m hf_spot --help": HELP.format(start="runpy.run_module('hf_spot', run_name='__main__', alter_sys=True)"),
    "public names but those of a training": (
        "import hf_spot\nfor name in set(hf_spot.__all__) - {'SpotCallback', 'SpotCheckpointManager'}: getattr(hf_spot, name)"
    ),
}


@pytest.mark.parametrize("start", LIGHT_STARTS.values(), ids=LIGHT_STARTS.keys())
def test_nothing_heavy_is_loaded_before_it_is_needed(start: str) -> None:
    code = f"{start}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(json.loads(done.stdout.splitlines()[-1]))


def test_the_installed_command_and_python_m_are_the_same_function() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, _, target = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert name == "hf-spot"
    assert getattr(importlib.import_module(module), function) is importlib.import_module("hf_spot.__main__").main


def test_every_folder_of_the_package_is_a_package() -> None:
    # A folder without __init__.py works in a checkout, and is left out of the wheel.
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


# -- policy is pure ---------------------------------------------------------------------------------------------------

CLOCKS_AND_DICE = {"time", "random", "secrets", "uuid"}
READS_THE_CLOCK = {"now", "utcnow", "today"}
TOUCHES_THE_WORLD = {"open", "print", "input"}


def impurities(source: str) -> Iterator[str]:
    """Where a module reads a clock, throws dice or touches the world, as ``line: what``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in CLOCKS_AND_DICE:
                    yield f"{node.lineno}: import {alias.name}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in CLOCKS_AND_DICE:
            yield f"{node.lineno}: from {node.module}"
        elif isinstance(node, ast.Attribute) and node.attr in READS_THE_CLOCK:
            yield f"{node.lineno}: .{node.attr}"
        elif isinstance(node, ast.Name) and node.id in TOUCHES_THE_WORLD:
            yield f"{node.lineno}: {node.id}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "policy").rglob("*.py")), ids=lambda path: path.name)
def test_policy_is_handed_its_clock_and_its_randomness(path: Path) -> None:
    assert list(impurities(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "from time import monotonic as m",
        "import random",
        "import numpy.random, uuid",
        "from datetime import datetime\ndatetime.now()",
        "import datetime as d\nclock = d.datetime.utcnow",
        "open('x')",
    ],
)
def test_an_impure_policy_would_be_found(source: str) -> None:
    assert list(impurities(source))


# -- the insides of other libraries -----------------------------------------------------------------------------------

UPSTREAM = PACKAGE / "training" / "upstream" / "__init__.py"
OF_PYTHON = {"_exit", "_getframe", "_SubParsersAction", "_action_groups", "_actions", "_group_actions", "_signal"}


def private_names(source: str) -> set[str]:
    """What a module calls with an underscore: its functions and classes, and attributes of its objects."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_of_self(node):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return {name for name in found if _is_private(name)}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def _is_of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def reaches_inside(source: str, own: set[str], listed: set[str]) -> Iterator[tuple[str, str]]:
    """Where a module uses a private name that is not hf_spot's: the name, and ``line: what to write instead``.

    Args:
        source: of the module.
        own: private names of hf_spot.
        listed: private names of `hf_spot.training.upstream`.
    """
    for node in ast.walk(ast.parse(source)):
        found: list[str] = []
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and not _is_of_self(node):
            found = [node.attr] if node.attr in listed or node.attr not in own | OF_PYTHON else []
        elif isinstance(node, ast.Constant) and node.value in listed:
            found = [node.value]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            parts = [part for alias in node.names for part in f"{module}.{alias.name}".split(".")]
            found = (
                [] if module.startswith("hf_spot") else [part for part in filter(_is_private, parts) if part not in OF_PYTHON]
            )
        for name in found:
            yield name, f"{node.lineno}: {ast.unparse(node)}; a Name of hf_spot/training/upstream reaches it: NAME.of(owner)"


def names_by_module() -> dict[str, set[str]]:
    """Private names of other libraries that modules below ``training/`` use, by module: they can't import the table."""
    listed: dict[str, set[str]] = {}
    for one in upstream.TABLE:
        for user in one.users:
            if not user.startswith(("training.", "launch.")):
                listed.setdefault(user, set()).add(one.name)
    return listed


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_insides_of_other_libraries_are_reached_through_one_module(path: Path, own_names: set[str]) -> None:
    module = str(path.relative_to(PACKAGE)).removesuffix(".py").replace("/", ".")
    listed = {one.name for one in upstream.TABLE if _is_private(one.name)}
    found = list(reaches_inside(path.read_text(), own_names, listed)) if path != UPSTREAM else []
    assert [told for name, told in found if name not in names_by_module().get(module, ())] == []


@pytest.fixture(scope="module")
def own_names() -> set[str]:
    return set().union(*(private_names(path.read_text()) for path in PACKAGE.rglob("*.py")))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("trainer._evaluate(None)", "_evaluate"),
        ("type(self._trainer)._evaluate", "_evaluate"),
        ("self.accelerator._models", "_models"),
        ("torch.utils.data._utils.worker", "_utils"),
        ("torch.serialization._load = 3", "_load"),
        ("from torch.utils.data._utils import worker", "_utils"),
        ("import torch._dynamo", "_dynamo"),
        ("from accelerate.commands.launch import _validate", "_validate"),
        ("getattr(trainer, '_evaluate', None)", "_evaluate"),
        ("vars(trainer)['_evaluate'] = 1", "_evaluate"),
    ],
)
def test_a_way_inside_another_library_would_be_found(source: str, name: str) -> None:
    assert [found for found, _ in reaches_inside(source, {"_trainer"}, {"_evaluate"})] == [name]


@pytest.mark.parametrize(
    "source",
    [
        "self._evaluate()",
        "one._own",
        "os._exit(0)",
        "one.__dict__",
        "from hf_spot.log import _own",
        "EVALUATE.of(trainer)(None)",
    ],
)
def test_what_is_hf_spots_own_may_be_used(source: str) -> None:
    assert list(reaches_inside(source, {"_own"}, {"_evaluate"})) == []


# -- errors say what to do --------------------------------------------------------------------------------------------


def without_hint(source: str) -> Iterator[str]:
    """Where a value that the user gave is refused, and he isn't told what to type instead."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("ConfigError", "Invalid"):
            named = {keyword.arg for keyword in node.keywords}
            if not {"hint", None} & named:
                yield f"{node.lineno}: {ast.unparse(node)}"


def test_whoever_gives_a_wrong_value_is_told_a_right_one() -> None:
    found = {str(path.relative_to(ROOT)): list(without_hint(path.read_text())) for path in PACKAGE.rglob("*.py")}
    assert {path: calls for path, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    ("source", "count"), [("ConfigError('x')", 1), ("ConfigError('x', hint='y')", 0), ("KeyError('x')", 0)]
)
def test_an_error_without_a_hint_would_be_found(source: str, count: int) -> None:
    assert len(list(without_hint(source))) == count


# -- what is in the files ---------------------------------------------------------------------------------------------

TOP_LEVEL = {
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "hf_spot",
    "notebooks",
    "setup.cfg",
    "setup.py",
    "tests",
}
BUILT = re.compile(r"build|dist|.*\.egg-info|.*\.png")  # as in .gitignore
ONE_MACHINE_ONLY = re.compile(
    # Spelt in parts, so that this file passes its own test.
    r"(?<![\w.\-])/(?:wo" + r"rk|ro" + r"ot|ho" + r"me/\w+|Use" + r"rs/\w+|opt/whe" + r"els)\b|\.\./sha" + r"red\b"
)


def project_files() -> Iterator[Path]:
    for entry in sorted(ROOT.iterdir()):
        if entry.is_file():
            yield entry
        elif entry.name in TOP_LEVEL | {".ci", ".github"}:
            yield from (path for path in sorted(entry.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in ONE_MACHINE_ONLY.finditer(text)]
    assert found == []


def test_the_top_level_holds_only_what_belongs_there() -> None:
    visible = {entry.name for entry in ROOT.iterdir() if not entry.name.startswith(".")}
    assert sorted(name for name in visible - TOP_LEVEL if not BUILT.fullmatch(name)) == []


# -- what GitHub shows to who opens an issue --------------------------------------------------------------------------

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
# https://docs.github.com/en/communities/using-templates-to-encourage-useful-issues-and-pull-requests/syntax-for-githubs-form-schema
ATTRIBUTES = {
    "markdown": {"value"},
    "textarea": {"label", "description", "placeholder", "value", "render"},
    "input": {"label", "description", "placeholder", "value"},
    "dropdown": {"label", "description", "multiple", "options", "default"},
    "checkboxes": {"label", "description", "options"},
}


def wrong_in_form(text: str) -> Iterator[str]:
    """Why GitHub would not show this form."""
    form = yaml.safe_load(text)
    if not {"name", "description", "body"} <= set(form) <= {"name", "description", "body", "title", "labels", "assignees"}:
        yield f"keys {sorted(form)}"
    fields = [field for field in form.get("body") or () if field.get("type") != "markdown"]
    if not fields:
        yield "nothing is asked"
    for name in ("id", "label"):
        values = [field.get("id") if name == "id" else field["attributes"].get("label") for field in fields]
        if len({value for value in values if isinstance(value, str)}) < len(fields):
            yield f"an {name} is missing, no text, or there twice"
    for field in form.get("body") or ():
        attributes = field.get("attributes", {})
        if not set(attributes) <= ATTRIBUTES.get(field.get("type"), set()):
            yield f"{field.get('type')} with {sorted(attributes)}"
        if not set(field) <= {"type", "id", "attributes", "validations"}:
            yield f"keys {sorted(field)}"
        if not isinstance(field.get("validations", {}).get("required", False), bool):
            yield "required is neither true nor false"
        if field.get("type") == "dropdown" and not all(isinstance(option, str) for option in attributes.get("options") or [0]):
            yield "options are no texts"  # YAML takes No for false


@pytest.mark.parametrize("path", [path for path in FORMS if path.name != "config.yml"], ids=lambda path: path.name)
def test_a_form_for_issues_is_one_that_github_shows(path: Path) -> None:
    assert list(wrong_in_form(path.read_text())) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("name: ", "nme: "),
        ('- "No"', "- No"),
        ("id: doctor", "id: command"),
        ("type: dropdown", "type: droplist"),
        ("render: text", "rendr: text"),
        ("required: true", "required: perhaps"),
    ],
)
def test_a_form_that_github_refuses_would_be_found(right: str, wrong: str) -> None:
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    assert right in text
    assert list(wrong_in_form(text.replace(right, wrong)))


def test_the_choice_of_forms_can_be_read() -> None:
    chosen = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml").read_text())
    assert set(chosen) <= {"blank_issues_enabled", "contact_links"}
    assert {path.name for path in FORMS} >= {"bug.yml", "feature.yml", "config.yml"}


# -- what the README promises is what CI runs -------------------------------------------------------------------------


def readme_command(name: str) -> str:
    """The one line in the code block under ``<!-- ci: name -->``."""
    blocks = re.findall(rf"<!-- ci: {name} -->\n```bash\n(.*?)\n```\n", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1, f"README.md has {len(blocks)} blocks marked ci: {name}"
    return str(blocks[0])


def show(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", ".ci/run", "--show", name], cwd=ROOT, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("name", ["demo", "test"])
def test_ci_runs_the_very_line_that_the_readme_shows(name: str) -> None:
    shown = show(name)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == readme_command(name) + "\n"
    assert "\n" not in readme_command(name)
    assert readme_command(name).startswith("python3 -m venv ")


def test_ci_refuses_a_readme_without_the_line() -> None:
    shown = show("nothing")
    assert shown.returncode != 0
    assert "README.md" in shown.stderr
