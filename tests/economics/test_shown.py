"""``Run(url)`` in a notebook: what Jupyter asks it for."""

from __future__ import annotations

import base64
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hf_spot import Run
from hf_spot.run.checkpoint import CommitRequest
from tests.economics.journals import claim, timing
from tests.economics.test_page import MARKUP, Reader
from tests.servers import free_ports


@pytest.fixture
def url(make_checkpoint: Callable[[int], Path], tmp_path: Path) -> Path:
    run = Run(tmp_path / "a<b>")
    for number in range(1, 24):
        run.claim(claim(MARKUP, price_usd_per_hour=9.83)[1])
        folder = make_checkpoint(10 * number)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 3.0}]}))
        reason = "notice" if number < 23 else "end"
        request = CommitRequest(10 * number, reason=reason, details={"timing": timing(10 * number, 10, 0.001)})
        run.commit(request, run.upload(folder, request))
    return tmp_path / "a<b>"


def read(run: Run) -> tuple[Reader, str]:
    html = run._repr_html_()
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return reader, html


def test_a_run_shows_its_newest_checkpoints_and_launches_and_a_picture(url: Path) -> None:
    reader, html = read(Run(url))
    assert str(url) in reader.text and "a<b>" not in html
    assert "not finished, step 230 committed, 22 interruptions" in reader.text
    assert re.search(r"checkpoint-230\s*0\.0 MB\s*23\s*end", reader.text)
    assert "checkpoint-40" in reader.text and "checkpoint-30" not in reader.text
    assert reader.text.count("and 3 older ones") == 2  # checkpoints, and launches
    assert "Where the time went, and the cost" in reader.text and "Spent: $" in reader.text
    picture = next(value for name, value in reader.attributes if name == "src")
    svg = base64.b64decode(picture.removeprefix("data:image/svg+xml;base64,"))
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg" and b"training loss" in svg


def test_without_matplotlib_the_tables_are_still_shown(url: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    reader, html = read(Run(url))
    assert "<img" not in html and "pip install matplotlib" in reader.text and "checkpoint-230" in reader.text


def test_a_run_that_nobody_has_launched_says_so(tmp_path: Path) -> None:
    reader, _ = read(Run(tmp_path / "new"))
    assert "This run has not been launched yet." in reader.text and "table" not in reader.text


def test_a_store_that_can_not_be_reached_is_one_line_and_its_repr_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_ports(1)[0]}", "AWS_REGION": "us-east-1"}
    for name, value in {**environment, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    run = Run("s3://bucket/run")
    assert repr(run) == "Run('s3://bucket/run')"
    reader, _ = read(run)
    assert "Could not connect" in reader.text and "Try: " in reader.text and "Traceback" not in reader.text


def test_there_is_one_class_of_runs(url: Path) -> None:
    import hf_spot.run.run

    assert Run is hf_spot.run.run.Run and Run.__subclasses__() == []
    assert pickle.loads(pickle.dumps(Run)) is Run
    script = f"from hf_spot.run.run import Run\nassert 'checkpoint-230' in Run({str(url)!r})._repr_html_()"
    subprocess.run([sys.executable, "-c", script], check=True)  # whichever way a process comes to it
