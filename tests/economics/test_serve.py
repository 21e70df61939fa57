"""``hf-spot serve``: pages of real runs over real HTTP, from a directory, a bucket and a server that stops answering."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from hf_spot.cli import main
from hf_spot.commands.serve import _bound
from hf_spot.economics.site import Site
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.run import Run
from tests.economics.journals import claim, timing
from tests.economics.test_page import CHROMIUM, Reader
from tests.zygote import Zygote

MARKUP = """<img src=x onerror="alert(1)">&'$x^$"""  # a run and a machine may be called anything
Ask = Callable[..., tuple[int, dict[str, str], str]]


def made(url: str | Path, make_checkpoint: Callable[[int], Path], *, steps: int = 10, ended: str | None = "finished") -> Run:
    run = Run(url)
    run.claim(claim(MARKUP, price_usd_per_hour=9.83)[1])
    folder = make_checkpoint(steps)
    history = [{"step": at, "loss": 3 / at, "epoch": 1.0} for at in range(1, steps + 1)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    details = {"timing": timing(steps, 10, 0.001), "max_steps": 40, "finite": True, "fingerprint": {"weights": "a"}}
    request = CommitRequest(step=steps, details=details)
    run.commit(request, run.upload(folder, request))
    if ended is not None:
        run.record(ended, {"step": steps})
    return run


def options(url: str | Path, **more: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"url": str(url), "host": "127.0.0.1", "port": 0, "allow_others": False, "name": [], **more})


@contextlib.contextmanager
def serving(url: str | Path, **more: Any) -> Iterator[Ask]:
    """A server in this process, and a function that asks it for a page."""
    with _bound(options(url, **more), Site(str(url), interval_s=0.001)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def ask(path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
            port = urlsplit(server.address).port
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            with contextlib.closing(connection):
                connection.request(method, path, headers=headers)
                got = connection.getresponse()
                return got.status, dict(got.headers), got.read().decode()

        try:
            yield ask
        finally:
            server.shutdown()
            thread.join()


def test_a_run_has_a_page_that_is_its_report(make_checkpoint: Callable[[int], Path], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    made(tmp_path / "runs" / MARKUP, make_checkpoint)
    made(tmp_path / "runs" / "going", make_checkpoint, ended=None)
    with serving(tmp_path / "runs") as ask:
        status, headers, text = ask("/")
        reader = Reader()
        reader.feed(text)
        assert (status, reader.open) == (200, [])
        assert "2 runs" in reader.text and MARKUP in reader.text and "10 of 40" in reader.text
        links = [value for name, value in reader.attributes if name == "href" and value.startswith("/run/")]
        assert sorted(links) == sorted([f"/run/{quote(MARKUP)}", "/run/going"])
        for link in links:
            status, headers, text = ask(link)
            reader = Reader()
            reader.feed(text)
            assert (status, reader.open) == (200, [])
            for words in ("10 of 40 committed", "checkpoint-10", "no NaN or infinity found", "a resume will compare weights"):
                assert words in reader.text
            for words in ("Launches", "Machines and prices", "Spent: $", "training loss", MARKUP):
                assert words in reader.text
            assert "<img" not in text and [name for name, _ in reader.attributes if name.startswith("on")] == []
            loads = [value for name, value in reader.attributes if name in ("src", "href", "xlink:href", "action")]
            assert [one for one in loads if not one.startswith(("#", "/", "data:,"))] == []
        nonce = re.search(r"script-src 'nonce-([^']+)'", headers["Content-Security-Policy"])
        assert nonce is not None and re.findall(r"<script[^>]*>", text) == [f'<script nonce="{nonce[1]}">']
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert ask("/run/going", "HEAD")[2] == "" and ask("/run/going", "POST")[0] == 501


def test_a_page_shows_what_is_new(make_checkpoint: Callable[[int], Path], tmp_path: Path) -> None:
    run = made(tmp_path / "run", make_checkpoint, ended=None)
    with serving(tmp_path / "run") as ask:
        status, headers, _ = ask("/")
        assert (status, headers["Location"]) == (302, "/run/")
        assert "step 10 committed" in ask("/run/")[2]
        request = CommitRequest(step=20, details={"max_steps": 40})
        run.commit(request, run.upload(make_checkpoint(20), request))
        assert "step 20 committed" in ask("/run/")[2]
        shutil.rmtree(tmp_path / "run")
        made(tmp_path / "run", make_checkpoint, steps=5)  # another run, with as many entries
        made_anew = ask("/run/")[2]
        assert "step 5 committed" in made_anew and "checkpoint-20" not in made_anew
        shutil.rmtree(tmp_path / "run")
        assert ask("/run/")[0] == 404


def test_what_is_no_run_is_said(make_checkpoint: Callable[[int], Path], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    made(tmp_path / "outside", make_checkpoint)
    with serving(tmp_path / "runs") as ask:
        assert "there is nothing" in ask("/")[2]
        made(tmp_path / "runs" / "llama", make_checkpoint)
        status, _, text = ask("/run/lama")
        assert status == 404 and "did you mean" in text and "runs/llama" in text
        for path in ("/run/../outside", "/run/%2e%2e/outside", "/run/%2E%2E%2Foutside", "/run//llama", "/nothing", "/run/a%00"):
            assert ask(path)[0] == 404 and "committed" not in ask(path)[2]


def test_only_its_own_names_are_answered(make_checkpoint: Callable[[int], Path], tmp_path: Path) -> None:
    made(tmp_path / "run", make_checkpoint)
    with serving(tmp_path / "run", name=["notebook.example"]) as ask:
        for host in ("localhost:1", "127.0.0.1", "[::1]:8467", "LOCALHOST.", "notebook.example:443"):
            assert ask("/run/", Host=host)[0] == 200
        for host in ("evil.example", "evil.example:8467", "localhost.evil.example", "10.0.0.7", "[::2]:1", "", "<b>"):
            status, headers, text = ask("/run/", Host=host)
            assert status == 421 and "committed" not in text and headers["Content-Type"].startswith("text/plain")
    with serving(tmp_path / "run", host="0.0.0.0", allow_others=True) as ask:
        assert ask("/run/", Host="10.0.0.7")[0] == 200 and ask("/run/", Host="evil.example")[0] == 421


def test_a_store_that_stops_answering_costs_no_page(
    s3_url: str, make_checkpoint: Callable[[int], Path], seaweedfs: Any
) -> None:
    made(f"{s3_url}/one", make_checkpoint)
    bucket = urlsplit(s3_url).netloc
    with serving(s3_url) as ask:
        assert "1 run" in ask("/")[2] and "step 10 committed" in ask("/run/one")[2]
        client, moved = seaweedfs.client(), []
        for found in client.list_objects_v2(Bucket=bucket)["Contents"]:
            if "/journal/" in found["Key"]:
                moved.append((found["Key"], client.get_object(Bucket=bucket, Key=found["Key"])["Body"].read()))
                client.put_object(Bucket=bucket, Key=found["Key"], Body=b"<b>rotten</b>")
        status, _, text = ask("/run/one")
        assert status == 503 and "not a journal entry" in text and "<b>" not in text
        assert "as of" in text and "step 10 committed" in text  # what was read last
        for key, data in moved:
            client.put_object(Bucket=bucket, Key=key, Body=data)
        assert ask("/run/one")[0] == 200


def test_a_closed_connection_to_the_store_is_said_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "SECRETKEY"),
            ("AWS_SECRET_ACCESS_KEY", "OTHERKEY"),
            ("AWS_MAX_ATTEMPTS", "1"),
        ):
            monkeypatch.setenv(name, value)
        with serving("s3://bucket/runs") as ask:
            for path in ("/", "/run/one"):
                status, _, text = ask(path)
                assert status == 503 and "127.0.0.1" in text and "SECRETKEY" not in text and "OTHERKEY" not in text


def test_without_matplotlib_the_tables_are_shown(
    make_checkpoint: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "run", make_checkpoint)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with serving(tmp_path / "run") as ask:
        text = ask("/run/")[2]
    assert "pip install matplotlib" in text and "Launches" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "other machines could read all runs there"),
        (["--host", "::"], "--allow-others"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--port", "70000"], "70000 is not a port"),
        (["--interval-s", "0"], "must be positive"),
        (["--port", "TAKEN"], "is in use"),
        (["--port", "0", "NOWHERE"], "does not exist"),
    ],
)
def test_what_can_not_be_served_is_said(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = [str(taken.getsockname()[1]) if word == "TAKEN" else word for word in words]
        url = tmp_path / "no" / "such" / "folder" if words[-1] == "NOWHERE" else tmp_path
        assert main(["serve", str(url), *[word for word in words if word != "NOWHERE"]]) == 2
    assert said in capsys.readouterr().err


def test_it_says_where_it_is_and_ends_at_ctrl_c(zygote: Zygote, tmp_path: Path) -> None:
    command = [sys.executable, str(Path(sys.executable).parent / "hf-spot"), "serve", str(tmp_path / "runz"), "--port", "0"]
    (tmp_path / "runs").mkdir()
    with zygote.forking():
        process = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    while not line.rstrip().endswith("}"):
        line += process.stdout.readline()
    address = urlsplit(json.loads(line)["address"])
    connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/")
        assert b"there is nothing" in connection.getresponse().read()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err and "there is nothing" in err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium-headless-shell)")
def test_a_browser_runs_its_script_and_no_other(make_checkpoint: Callable[[int], Path], tmp_path: Path) -> None:
    assert CHROMIUM is not None
    run = made(tmp_path / "run", make_checkpoint, ended=None)
    request = CommitRequest(step=20, details={"max_steps": 40})
    files = run.upload(make_checkpoint(20), request)
    looks = []

    class Counted(Site):
        def answer(self, target: str, nonce: str) -> Any:
            looks.append(target)
            if len(looks) == 2:
                run.commit(request, files)
            return super().answer(target, nonce)

    with _bound(options(tmp_path / "run"), Counted(str(tmp_path / "run"), interval_s=0.1)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--virtual-time-budget=3000", "--dump-dom", f"{server.address}run/"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env={**os.environ})
        server.shutdown()
        thread.join()
    assert done.returncode == 0 and len(looks) > 1
    assert "step 20 committed" in done.stdout and 'role="status"></p>' in done.stdout
