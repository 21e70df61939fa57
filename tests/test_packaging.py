"""What is built from the source is whole, and an environment that has nothing else can say what it is."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(source: Path, kind: str, into: Path) -> Path:
    """An sdist or a wheel, by the hooks that every installer calls (PEP 517)."""
    command = [sys.executable, "-W", "ignore", "-c", BUILD, f"build_{kind}", str(into)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return into / done.stdout.splitlines()[-1]


def in_git(*under: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", *under], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.splitlines())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy of what git knows: setuptools leaves folders behind, and takes along what lies about.
    copy = tmp_path_factory.mktemp("source")
    for name in in_git():
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    for command in (["init", "-q"], ["remote", "add", "origin", "https://someone:secret@git.example.org/owner/name.git"]):
        subprocess.run(["git", *command], cwd=copy, check=True)
    built = build(copy, "sdist", tmp_path_factory.mktemp("sdist"))
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(built) as archive:
        archive.extractall(unpacked, filter="data")
    return next(unpacked.iterdir())


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(sdist, "wheel", tmp_path_factory.mktemp("wheel"))


def test_the_source_archive_holds_what_a_build_needs(sdist: Path) -> None:
    assert all((sdist / name).is_file() for name in ("setup.cfg", "setup.py", "README.md", "LICENSE"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == in_git("hf_spot")
    assert any(name.endswith("/licenses/LICENSE") for name in about)


def test_the_addresses_are_those_of_the_repository_that_was_cloned(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        told = archive.read(name).decode()
    home = "https://git.example.org/owner/name"
    assert re.findall(r"^Project-URL: (\w+), (.*)$", told, re.MULTILINE) == [
        ("Source", home),
        ("Documentation", f"{home}#readme"),
        ("Issues", f"{home}/issues"),
        ("Changelog", f"{home}/blob/main/CHANGELOG.md"),
    ]
    assert "secret" not in told


@pytest.mark.parametrize(
    ("origin", "home"),
    [
        ("git@git.example.org:owner/name.git", "https://git.example.org/owner/name"),
        ("ssh://git@git.example.org/owner/name", "https://git.example.org/owner/name"),
        ("https://token@git.example.org/owner/name/", "https://git.example.org/owner/name"),
        ("/a/folder/name.git", None),
        ("../name", None),
        ("", None),
    ],
)
def test_where_a_checkout_came_from_is_its_home_if_that_is_on_the_web(origin: str, home: str | None, tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_bytes((ROOT / "setup.py").read_bytes())
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    if origin:
        subprocess.run(["git", "remote", "add", "origin", origin], cwd=tmp_path, check=True)
    code = "import setuptools; setuptools.setup = lambda **given: None; import setup; print(setup.project_urls().get('Source'))"
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert told.splitlines()[-1] == str(home)


def test_in_an_empty_environment_the_command_says_what_it_is(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", symlinks=True)
    python = tmp_path / "empty" / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def say(*words: str) -> str:
        spot = str(tmp_path / "empty" / "bin" / "hf-spot")
        done = subprocess.run([spot, *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert say("--version").startswith("hf-spot ")
    assert "launch" in say("--help")
    assert "requeue" in say("recipe", "slurm", "--store", "s3://bucket/run")


# -- versions ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def required(text: str) -> dict[str, Requirement]:
    return {one.name: one for one in map(Requirement, text.strip().splitlines())}


def pinned(name: str) -> dict[str, str]:
    """What a file of constraints pins, by package."""
    return dict(re.findall(r"^([\w.-]+)==([^;\s]+)", (ROOT / "tests" / name).read_text(), re.MULTILINE))


def test_the_oldest_packages_are_those_that_setup_cfg_allows(setup: configparser.ConfigParser) -> None:
    lowest = pinned("lowest.txt")
    bounds = required(setup["options"]["install_requires"]) | required(setup["options.extras_require"]["completion"])
    for name, one in bounds.items():
        if name == "torch":  # older ones are built for CUDA only
            continue
        (bound,) = one.specifier
        assert bound.operator == ">="
        assert re.fullmatch(rf"{re.escape(bound.version)}(\.\d+)*", lowest[name]), name


def test_what_an_extra_brings_the_tests_have_too(setup: configparser.ConfigParser) -> None:
    extras = setup["options.extras_require"]
    test = required(extras["test"])
    for extra in ("completion", "crt", "plot", "gcs", "azure", "notebooks"):
        for one in required(extras[extra]).values():
            assert test.get(one.name) is not None, f"{extra}: {one}"
            assert str(test[one.name].specifier) == str(one.specifier)


def test_every_library_that_the_package_imports_is_declared(setup: configparser.ConfigParser) -> None:
    declared = required(setup["options"]["install_requires"])
    modules = {"yaml": "pyyaml"}
    imported = {
        found
        for path in (ROOT / "hf_spot").rglob("*.py")
        for found in re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
    }
    ours = {"hf_spot", "azure", "google", "requests", "botocore", "s3transfer", "awscrt", "urllib3", *sys.stdlib_module_names}
    assert {modules.get(name, name) for name in imported - ours} <= {*declared, "hf_xet"}


def test_each_python_that_is_promised_is_tested_each_week(setup: configparser.ConfigParser) -> None:
    environments = re.split(r"[,\s]+", setup["tox:tox"]["env_list"].strip())
    promised = re.findall(r"Python :: 3\.(\d+)$", setup["metadata"]["classifiers"], re.MULTILINE)
    assert {f"py3{minor}" for minor in promised} <= {*environments}
    weekly = yaml.safe_load((ROOT / ".github" / "workflows" / "weekly.yml").read_text())
    runs = {one["environment"]: one["python"] for one in weekly["jobs"]["tox"]["strategy"]["matrix"]["include"]}
    assert {*runs} == {*environments} >= {"lowest", "newest"}
    assert all(name.replace("py3", "3.") == python for name, python in runs.items() if name.startswith("py"))
    assert setup["options"]["python_requires"] == f">=3.{min(map(int, promised))}"
    assert runs["lowest"] == setup["testenv:lowest"]["base_python"].replace("py3", "3.")


def test_the_newest_packages_are_not_held_back(setup: configparser.ConfigParser) -> None:
    assert "-c" not in setup["testenv:newest"]["install_command"].split()
    assert "-c tests/lowest.txt" in setup["testenv:lowest"]["install_command"]


def test_a_commit_is_checked_by_the_linters_of_ci() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    ci = (ROOT / ".ci" / "run").read_text()
    for hook in hooks:
        assert hook["entry"].partition(" --")[0] in ci
    linters = re.findall(r"^part \w+ (\.venv/bin/\S+)", ci, re.MULTILINE)
    assert {*linters} == {hook["entry"].split()[0] for hook in hooks}
