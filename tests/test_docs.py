"""The README and the pages in ``.github/docs`` do what they say: their scripts are saved, their commands run one after the
other against a real S3 server, and their links lead somewhere.

In a page, a block marked ``bash`` is run, ``sh`` and ``text`` are only shown. A block of Python or YAML whose first line is
a comment with a file's name is saved under that name. A page that begins with ``<!-- ci: after OTHER.md -->`` is run behind
that page, in the same folder and with the same bucket.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from hf_spot.cloud.job import load
from tests import reference
from tests.servers import SeaweedFS
from tests.zygote import Zygote

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / ".github" / "docs"
INDEX = DOCS / "README.md"
PAGES = sorted(DOCS.glob("*.md"))
WRITTEN = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / ".github").rglob("*.md"))]

BLOCK = re.compile(r"^(<!-- ci: \w+ -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAVED_AS = re.compile(r"# ([\w.-]+\.(?:py|yaml))\b")
AFTER = re.compile(r"<!-- ci: after (\S+) -->")

# What the commands of a page must have printed, and the files that they must have left.
SAYS = {
    "README.md": ["checkpoint-30", "finished, step 30 committed", "ok    conditional"],
    "cost.md": ["goodput", "two regions", "$655.40"],
    "doctor.md": ["s3:PutObject"],
    "runs.md": ["checkpoint-20 pruned", "finished, step 30 committed", "checkpoint-30"],
}
LEAVES = {
    "cost.md": ["run.html", "run.png"],
    "callback.md": ["out/checkpoint-30/trainer_state.json"],
    "runs.md": ["elsewhere/checkpoint-30/model.safetensors", "pulled/checkpoint-20/model.safetensors"],
    "skypilot.md": ["task.yaml"],
}


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS if page.parent == DOCS and page != INDEX else ROOT))


def chains() -> Iterator[list[Path]]:
    """Pages that are run one after the other: each that stands for itself, and those that say that they follow it."""
    follows = {page: found[1] if (found := AFTER.match(page.read_text())) else None for page in [README, *PAGES]}

    def behind(page: Path) -> Iterator[Path]:
        yield page
        for other, before in follows.items():
            if before == name_of(page):
                yield from behind(other)

    for page, before in follows.items():
        if before is None:
            yield list(behind(page))


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Each block's mark for ``.ci/run`` (mostly empty), language and text."""
    return BLOCK.findall(page.read_text())


def empty_bucket(server: SeaweedFS) -> None:
    client = server.client()
    if "bucket" not in [one["Name"] for one in client.list_buckets()["Buckets"]]:
        server.make_bucket("bucket")
    for listed in client.get_paginator("list_objects_v2").paginate(Bucket="bucket"):
        for found in listed.get("Contents", ()):
            client.delete_object(Bucket="bucket", Key=found["Key"])


def run(page: Path, folder: Path, environ: dict[str, str], zygote: Zygote) -> str:
    """Does what a page says; everything that its commands printed."""
    printed = ""
    for for_ci, language, text in blocks(page):
        if saved_as := SAVED_AS.match(text):
            (folder / saved_as[1]).write_text(text)
        elif language == "bash" and not for_ci:  # the two that are, `.ci/run` runs
            # What a reader tries first is run exactly as they do; after it a command that needs no shell may be forked.
            plain = None if page == README else commands_of_python(text)
            for words in [["bash", "-euo", "pipefail", "-c", text]] if plain is None else plain:
                with zygote.forking():
                    done = subprocess.run(
                        words, cwd=folder, env=environ, capture_output=True, text=True, timeout=400, check=False
                    )
                assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
                printed += done.stdout
    return printed


def commands_of_python(text: str) -> list[list[str]] | None:
    """What a shell would execute, if each line is just one command of Python's; None if there is more to it."""
    found = []
    programs = {"python": [sys.executable], "hf-spot": [sys.executable, str(Path(sys.executable).parent / "hf-spot")]}
    for line in re.sub(r" +# .*$", "", text, flags=re.MULTILINE).splitlines():
        program, *words = line.split()
        if not re.fullmatch(r"[\w ./:@=,+-]+", line) or program not in programs:
            return None
        found.append([*programs[program], *words])
    return found


def with_commands() -> list[list[Path]]:
    return [chain for chain in chains() if any(language == "bash" for page in chain for _, language, _ in blocks(page))]


@pytest.mark.parametrize("chain", with_commands(), ids=lambda chain: name_of(chain[0]))
def test_every_command_of_a_page_works(chain: list[Path], tmp_path: Path, seaweedfs: SeaweedFS, zygote: Zygote) -> None:
    empty_bucket(seaweedfs)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = {**os.environ, **seaweedfs.env(), "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for page in chain:
        printed = run(page, tmp_path, environ, zygote)
        assert [words for words in SAYS.get(name_of(page), ()) if words not in printed] == []
        assert [name for name in LEAVES.get(name_of(page), ()) if not (tmp_path / name).exists()] == []


@pytest.mark.parametrize("page", [README, *PAGES], ids=name_of)
def test_what_is_not_run_can_at_least_be_read(page: Path, tmp_path: Path) -> None:
    for _, language, text in blocks(page):
        if language == "python":
            ast.parse(text)  # may be a part of a function
        elif language == "yaml":
            assert list(yaml.safe_load_all(text))
            if SAVED_AS.match(text) and SAVED_AS.match(text)[1] == "job.yaml":
                (tmp_path / "job.yaml").write_text(text)
                assert load(tmp_path / "job.yaml").ladder[-1].market == "on-demand"


def test_a_page_follows_one_that_is_there() -> None:
    assert sorted(page for chain in chains() for page in chain) == sorted([README, *PAGES])


# -- links ------------------------------------------------------------------------------------------------------------

CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)|<(?:img|a)\b[^>]*(?:src|href)=\"([^\"]+)\"|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
HEADING = re.compile(r"^#+ +(.+?) *#*$", re.MULTILINE)
FILE = re.compile(r"`((?:tests|hf_spot|notebooks|\.github|\.ci)/[\w./-]+)`")


def links(text: str) -> list[str]:
    return [next(filter(None, found)) for found in LINK.findall(CODE.sub("`", text))]


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    made: set[str] = set()
    for heading in HEADING.findall(re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        made.add(next(name for n in count() if (name := f"{slug}-{n}" if n else slug) not in made))
    return made


def broken(text: str, page: Path) -> Iterator[str]:
    """The links of a page's text that lead nowhere. Nothing is asked over the network."""
    for link in links(text):
        parts = urlsplit(link)
        if parts.scheme:
            if parts.scheme not in ("http", "https") or "." not in parts.netloc or not parts.hostname:
                yield link
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        there = target.is_relative_to(ROOT) and target.exists()
        if not there or (parts.fragment and parts.fragment not in anchors(text if target == page else target.read_text())):
            yield link
    yield from (name for name in FILE.findall(text) if "NAME" not in name and not (ROOT / name).exists())


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert list(broken(page.read_text(), page)) == []


@pytest.mark.parametrize(
    "text",
    [
        "[x](nowhere.md)",
        "[x](README.md#no-such-heading)",
        "[x](#nothing)",
        "[x](https:///path)",
        "[x](ftp://example.com)",
        "[two\nlines](../../../outside)",
        '<img src="none.png">',
        "[x]: none.md",
        "in `tests/none.py`",
    ],
)
def test_a_broken_link_would_be_found(text: str) -> None:
    assert list(broken(f"# A page\n\n{text}\n", README))


def test_links_that_lead_somewhere_are_not_found() -> None:
    text = "# One `two`: [three](LICENSE)\n[a](#one-two-three) [b](LICENSE) [c](https://example.com) `[d](none.md)`"
    assert list(broken(text, README)) == []


def test_every_page_is_in_the_index() -> None:
    there = {str((DOCS / link).resolve()) for link in links(INDEX.read_text())}
    assert [page.name for page in PAGES if page != INDEX and str(page) not in there] == [], f"add a line to {INDEX}"


# -- pages that the code writes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", reference.PAGES)
def test_the_reference_says_what_the_code_says(page: str) -> None:
    assert (DOCS / page).read_text() == reference.PAGES[page](), "python -m tests.reference writes it anew"


@pytest.mark.parametrize("page", reference.TABLES)
def test_a_table_says_what_the_code_says(page: str) -> None:
    assert (DOCS / page).read_text() == reference.filled(page), "python -m tests.reference writes it anew"


def test_what_docstrings_refer_to_is_there() -> None:
    assert list(reference.dangling()) == []
