"""``hf-spot report --plot --html``: pictures of a real run, and a page that needs nothing but itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hf_spot.cli import main
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.run import Run
from tests.economics.journals import claim, timing

BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in BROWSERS if (path := shutil.which(name))), None)
MARKUP = "a<b>&\"c'"  # a machine may be called anything


@pytest.fixture
def run(make_checkpoint: Callable[[int], Path], tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    for number, name in enumerate(("one", MARKUP), start=1):
        run.claim(claim(name, price_usd_per_hour=9.83, price_source="tests & co")[1])
        step = 10 * number
        folder = make_checkpoint(step)
        history = [{"step": at, "loss": 3 / at, "epoch": 1.0} for at in range(1, step + 1)]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        request = CommitRequest(step=step, details={"timing": timing(step, 10, 0.001)})
        run.commit(request, run.upload(folder, request))
    run.record("finished", {"step": 20})
    return run


class Reader(HTMLParser):
    """Checks that what is opened is closed, and keeps every attribute and all text."""

    VOID = frozenset({"meta", "br", "hr", "link", "img", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def written(run: Run, folder: Path) -> Path:
    path = folder / "report.html"
    assert main(["report", run.url, "--html", str(path)]) == 0
    return path


def test_the_page_is_whole_and_loads_nothing(run: Run, tmp_path: Path) -> None:
    text = written(run, tmp_path).read_text()
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    assert MARKUP in reader.text
    assert "Spent: $0.00" in reader.text
    assert "tests & co" in reader.text
    loads = [(n, v) for n, v in reader.attributes if n in ("src", "srcset", "href", "xlink:href", "data", "action")]
    assert [pair for pair in loads if not pair[1].startswith("#")] == []
    assert not re.search(r"@import|url\((?!#)|<script|<link", text)
    svg = text[text.index("<svg") : text.index("</svg>") + 6]
    drawn = ElementTree.fromstring(svg)
    assert "training loss" in "".join(drawn.itertext())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium-headless-shell)")
def test_a_browser_shows_the_page_and_asks_the_network_for_nothing(run: Run, tmp_path: Path) -> None:
    page, log, picture = written(run, tmp_path), tmp_path / "net.json", tmp_path / "page.png"
    assert CHROMIUM is not None
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--log-net-log={log}", f"--screenshot={picture}", "--window-size=1200,1600", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    asked = {url for url in re.findall(r'"url":\s*"([^"]+)"', log.read_text()) if url.startswith(("http", "ws", "file"))}
    assert {url for url in asked if "report.html" in url or url.startswith("file")} <= {page.as_uri()}
    assert not [url for url in asked if not url.startswith("file") and "google" not in url], asked


def test_the_plot_is_a_picture(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", run.url, "--json", "--plot", str(tmp_path / "run.png")]) == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads(capsys.readouterr().out)
    assert [launch["machine"]["price_usd_per_hour"] for launch in told["launches"]] == [9.83, 9.83]
    assert told["finished"] is True


def test_a_damaged_checkpoint_costs_the_curve_and_not_the_report(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(run.url) / "e0002" / "checkpoint-20" / "trainer_state.json").write_text("{}")
    text = written(run, tmp_path).read_text()
    assert "no loss in the newest checkpoint" in text
    assert "the loss is not drawn" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--plot", "--html"])
def test_where_nothing_can_be_written_is_said(run: Run, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", run.url, option, "/no/such/folder/x.svg"]) == 2
    assert "can't be written to /no/such/folder/x.svg" in capsys.readouterr().err


def test_a_run_that_nobody_launched_has_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "empty"), "--plot", str(tmp_path / "x.png")]) == 2
    assert "has not been launched yet" in capsys.readouterr().err
