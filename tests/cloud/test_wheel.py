"""What a new machine installs is what this process runs, bound to its digest; no registry is asked for hf_spot."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from hf_spot.cli import main
from hf_spot.cloud import sky
from hf_spot.cloud.job import Job
from hf_spot.cloud.user_data import render
from hf_spot.cloud.wheel import VARIABLE, build, install, put, wheel_for
from hf_spot.cloud.wheel import main as put_wheel
from hf_spot.errors import ConfigError
from hf_spot.storage.open import open_store
from tests.servers import SeaweedFS

NAMED = "https://example.com/wheels/hf_spot-0.1.0-py3-none-any.whl#sha256=" + 64 * "a"
ASKS_A_REGISTRY = re.compile(r"pip3? install[^\n]*(?<![./\w])['\"]?hf[-_.]spot(?!-[\d.]+-py3)", re.IGNORECASE)


def job(**values: Any) -> Job:
    needed = {"name": "x", "run": "hf-spot launch t.py", "region": "us-east-1", "max_spend": 1.0, "instance_profile": "role"}
    return Job(**{"store": "s3://bucket/runs/x", **needed, **values})


def test_the_same_code_makes_the_same_wheel_and_pip_installs_it(tmp_path: Path) -> None:
    name, data = build()
    build.cache_clear()
    assert build() == (name, data)
    (tmp_path / name).write_bytes(data)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    command = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", f"./{name}"]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=100)
    # Without its dependencies the package itself can't be imported; that it is there, and what it requires, is known.
    found = [*(tmp_path / "venv").rglob("hf_spot/storage/keys.py"), *(tmp_path / "venv").rglob("hf_spot/recipes/*.template")]
    assert len(found) > 5
    assert (tmp_path / "venv" / "bin" / "hf-spot").exists()


Done = subprocess.CompletedProcess[str]


def commands(store: str, seaweedfs: SeaweedFS, tmp_path: Path, requirements: list[str]) -> Done:
    """Runs what a machine runs to install, with a pip that only writes down what it was told."""
    bin_ = tmp_path / "bin"
    bin_.mkdir(exist_ok=True)
    (bin_ / "pip").write_text(f'#!/bin/bash\necho pip "$@" >> {tmp_path}/calls\n')
    (bin_ / "python3").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    for program in bin_.iterdir():
        program.chmod(0o755)
    wheel = wheel_for(store, os.environ)
    script = "set -euo pipefail\n" + install(requirements, wheel)
    environ = {**os.environ, **seaweedfs.env(), "PATH": f"{bin_}:{os.environ['PATH']}"}
    return subprocess.run(["bash", "-c", script], env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=100)


def test_a_machine_fetches_the_wheel_from_the_runs_store_and_checks_it(
    seaweedfs: SeaweedFS, s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert put_wheel([s3_url]) == 0
    url, _, digest = capsys.readouterr().out.strip().partition("#sha256=")
    assert url.startswith(f"{s3_url}/wheels/{digest}/hf_spot-")
    done = commands(s3_url, seaweedfs, tmp_path, ["hf_spot[plot]>=0.1", "trl"])
    assert done.returncode == 0, done.stderr
    name = url.rpartition("/")[2]
    assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    assert (tmp_path / "calls").read_text().splitlines() == ["pip install boto3", f"pip install ./{name}[plot] trl"]


def test_a_wheel_that_was_swapped_is_not_installed(seaweedfs: SeaweedFS, s3_url: str, tmp_path: Path) -> None:
    wheel, store = wheel_for(s3_url, {}), open_store(s3_url)
    assert wheel is not None
    put(store, wheel)
    put(store, wheel)
    store.put(wheel.key, b"another one's code")
    done = commands(s3_url, seaweedfs, tmp_path, ["hf_spot"])
    assert done.returncode != 0
    assert "FAILED" in done.stdout
    assert (tmp_path / "calls").read_text().splitlines() == ["pip install boto3"]


@pytest.mark.parametrize("store", ["s3://bucket/runs/x", "/mnt/run"])
@pytest.mark.parametrize("requirements", [("hf_spot",), ("hf_spot[plot]", "trl"), ("trl", "HF-Spot==0.1")])
def test_nothing_that_starts_machines_asks_a_registry_for_hf_spot(
    store: str, requirements: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    made = job(store=store, requirements=requirements)
    wheel = wheel_for(store, {})
    texts = [render(made, [], 9, {}, wheel=wheel), sky.render(made, {})] if wheel or requirements == ("hf_spot",) else []
    texts.append(render(made, [], 9, {}, wheel=wheel_for(store, {VARIABLE: NAMED})))
    for name in ("kubernetes", "slurm", "sagemaker", "ec2"):
        assert main(["recipe", name, "--store", "s3://bucket/x"]) == 0
        texts.append(capsys.readouterr().out)
    for text in texts:
        assert not ASKS_A_REGISTRY.search(text), ASKS_A_REGISTRY.search(text)
        assert "pip install hf_spot" not in text
    assert 64 * "a" in texts[-5]


@pytest.mark.parametrize(
    "value",
    [
        "hf_spot",
        "https://example.com/x.whl",
        NAMED[:-1],
        NAMED.replace("https", "http"),
        f"{NAMED[:-70]}';reboot;'.whl#sha256={64 * 'a'}",
    ],
)
def test_a_wheel_that_is_named_needs_a_url_and_a_hash(value: str) -> None:
    with pytest.raises(ConfigError, match="sha256"):
        wheel_for("s3://bucket/x", {VARIABLE: value})


def test_no_hint_tells_to_install_a_name_that_nobody_owns() -> None:
    root = Path(__file__).resolve().parents[2]
    texts = {path.name: path.read_text() for path in (root / "hf_spot").rglob("*.py")}
    found = {name: re.findall(r"pip install[^`\n\w]*hf[-_]spot", text) for name, text in texts.items()}
    assert {name: told for name, told in found.items() if told} == {}
