"""Warm spares: a restart takes Pythons that have done their imports, and trains as with fresh ones."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from fsspec.config import set_conf_env
from tqdm.utils import envwrap

from hf_spot.arguments import SpotArguments
from hf_spot.launch.process import ProcessTree
from hf_spot.launch.warm import WarmSpares
from hf_spot.runtime import WAITS_ON, Runtime
from hf_spot.training.warm import WarmSpare
from tests.launch.conftest import Launch, Launcher, Twin, of_ranks
from tests.waiting import PATIENCE_S, wait_for
from tests.zygote import Zygote

ON = {"HF_SPOT_WARM_SPARES": "on", "HF_SPOT_LOG_LEVEL": "debug"}
IS_WARM = "a Python is kept warm for a restart"

SCRIPT = """import os, sys
import torch
with open("told", "a") as file:
    print(os.getpid(), os.environ["HF_SPOT_LAUNCH"], *sys.argv, file=file)
    for number in os.listdir("/proc/self/fd"):
        try:
            print(number, os.readlink(f"/proc/self/fd/{number}"), file=file)
        except FileNotFoundError:
            pass
print("the script")
sys.exit(7)
"""


class Spares:
    """The spares of a script that trains nothing, as a supervisor keeps them."""

    def __init__(self, folder: Path, log: Callable[[], str]) -> None:
        self.folder, self.log = folder, log
        self.script = folder / "script.py"
        self.script.write_text(SCRIPT)
        self.argv = [sys.executable, "-m", "hf_spot.training.bootstrap", str(self.script), "--one"]
        self.spares = WarmSpares("on", 1, time.monotonic)

    def environ(self, launch: int) -> dict[str, str]:
        runtime = Runtime(str(self.folder / "run"), launch, self.folder / f"runtime-{launch}", SpotArguments())
        runtime.directory.mkdir(exist_ok=True)
        return {**os.environ, **runtime.to_environ()}

    def warm(self) -> list[psutil.Process]:
        self.spares.begin(self.argv, self.environ(1), (signal.SIGTERM,))
        wait_for(self._is_warm, "for the spare")
        return list(self.spares.processes())

    def _is_warm(self) -> bool:
        self.spares.look(lambda: True)
        return IS_WARM in self.log()

    def told(self) -> list[str]:
        return (self.folder / "told").read_text().splitlines()


@pytest.fixture
def spares(
    tmp_path: Path, zygote: Zygote, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[Spares]:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG, logger="hf_spot")
    made = Spares(tmp_path, lambda: caplog.text)
    with zygote.forking():
        yield made
    made.spares.close()


def ended(tree: ProcessTree) -> int:
    code = tree.wait(PATIENCE_S)
    tree.end()
    assert code is not None
    return code


def test_a_spare_becomes_the_process_of_the_next_launch(spares: Spares, capfd: pytest.CaptureFixture[str]) -> None:
    waiting = {one.pid for one in spares.warm()}
    assert "the script" not in capfd.readouterr().out
    tree = spares.spares.take(spares.argv, spares.environ(2))
    assert tree is not None
    assert ended(tree) == 7
    first, *descriptors = spares.told()
    pid, launch, *argv = first.split()
    assert int(pid) in waiting
    assert (launch, argv) == ("2", [str(spares.script), "--one"])
    assert not [one for one in descriptors if "socket" in one or "memfd" in one]
    assert "the script" in capfd.readouterr().out
    assert list(spares.spares.processes()) == []


def test_a_changed_variable_means_a_fresh_python(spares: Spares) -> None:
    waiting = spares.warm()
    assert spares.spares.take(spares.argv, {**spares.environ(2), "MKL_CBWR": "COMPATIBLE"}) is None
    assert "a fresh Python starts, since MKL_CBWR has changed" in spares.log()
    assert psutil.wait_procs(waiting, timeout=PATIENCE_S)[1] == []


def test_other_first_lines_or_arguments_mean_a_fresh_python(spares: Spares) -> None:
    spares.warm()
    spares.script.write_text(f"import random\n{SCRIPT}")
    assert spares.spares.take(spares.argv, spares.environ(2)) is None
    assert f"the first lines of {spares.script} have changed" in spares.log()


def test_the_rest_of_the_script_may_change(spares: Spares) -> None:
    spares.warm()
    spares.script.write_text(SCRIPT.replace("sys.exit(7)", "sys.exit(9)"))
    tree = spares.spares.take(spares.argv, spares.environ(2))
    assert tree is not None and ended(tree) == 9


@pytest.mark.parametrize(
    ("read", "is_bound"),
    [
        (lambda: envwrap("tqdm"), False),
        (lambda: set_conf_env({}), False),
        (urllib.request.getproxies_environment, False),
        (lambda: os.environ.get("RANK"), True),
        (lambda: os.environ.copy(), True),
        (lambda: [value for name, value in os.environ.items() if name.startswith("R")], True),
    ],
    ids=["tqdm", "fsspec", "proxies", "by name", "a copy", "a search"],
)
def test_an_import_binds_a_spare_to_its_rank_only_if_it_reads_the_rank(
    read: Callable[[], object], is_bound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TQDM_NCOLS", "70")
    monkeypatch.setenv(WAITS_ON, f"{theirs.detach()},0")
    spare = WarmSpare.from_environ()
    assert spare is not None
    with ours, spare.connection:
        ours.sendall(json.dumps({"argv": sys.orig_argv, "environ": {**os.environ, "RANK": "0"}}).encode() + b"\n")
        ended = pytest.raises(_Ended) if is_bound else contextlib.nullcontext()
        monkeypatch.setattr(os, "_exit", _end)
        with ended:
            spare.wait(lambda: read() and None)
        told = [json.loads(line) for line in ours.recv(2**16).splitlines()]
    assert told == [{"ready": True}, {"no": "RANK has changed"} if is_bound else {"yes": True}]


class _Ended(Exception):
    """Stands for the end of a process."""


def _end(code: int) -> None:
    raise _Ended(code)


def test_a_spare_that_has_died_means_a_fresh_python(spares: Spares) -> None:
    for one in spares.warm():
        one.kill()
    assert spares.spares.take(spares.argv, spares.environ(2)) is None


def test_an_own_beginning_of_the_script_is_said_once_and_no_spare_is_kept(spares: Spares) -> None:
    spares.script.write_text("import warnings\nwarnings.simplefilter('ignore')\nimport torch\n")
    spares.spares.begin(spares.argv, spares.environ(1), ())

    def has_said() -> bool:
        spares.spares.look(lambda: True)
        return "no Python is kept warm for a restart: the script does something of its own before" in spares.log()

    wait_for(has_said, "for the remark")
    assert list(spares.spares.processes()) == []
    assert spares.spares.take(spares.argv, spares.environ(2)) is None


def test_a_spare_that_is_not_needed_leaves_nothing(spares: Spares) -> None:
    waiting = spares.warm()
    spares.spares.close()
    assert psutil.wait_procs(waiting, timeout=PATIENCE_S)[1] == []


# -- launches ---------------------------------------------------------------------------------------------------------


def ranks_of(launch: Launch, *, were_spares: bool) -> set[int]:
    """The processes of a launch that train or wait to: those that were started as spares, or the others."""
    found = set()
    for one in launch.tree():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
            if "hf_spot.training.bootstrap" in one.cmdline()[2:4] and (WAITS_ON in one.environ()) is were_spares:
                found.add(one.pid)
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_training_goes_on_in_its_spare_and_ends_with_the_same_weights(
    launcher: Launcher, twin: Twin, tmp_path: Path, ranks: int
) -> None:
    with socket.create_server(("", 0)) as probe:
        port = str(probe.getsockname()[1])  # one that the training uses while the spares are started
    options = [port if word == "0" else word for word in of_ranks(ranks)]
    launch = launcher.plain(str(tmp_path / "run"), "--hold_at", "6", options=options, env=ON)
    launch.wait_for_step(6)
    wait_for(lambda: IS_WARM in launch.text(), "for the spare")
    waiting = ranks_of(launch, were_spares=True)
    assert len(waiting) == ranks
    psutil.Process(min(ranks_of(launch, were_spares=False))).kill()
    wait_for(lambda: "hf-spot: resumed at step 5" in launch.text(), "for the next launch")
    assert ranks_of(launch, were_spares=True) >= waiting
    assert not ranks_of(launch, were_spares=False)
    (launch.output_dir / "go-on").touch()
    assert launch.wait() == 0, launch.text()
    assert "a fresh Python starts" not in launch.text()
    if ranks == 1:  # `python -m tests.benchmarks restart` compares those of two
        assert launcher.weights() == twin.weights


def test_a_killed_launcher_leaves_no_spare(launcher: Launcher, tmp_path: Path) -> None:
    launch = launcher.plain(str(tmp_path / "run"), "--hold_at", "6", env=ON)
    wait_for(lambda: IS_WARM in launch.text() or launch.process.poll() is not None, "for the spare")
    tree = launch.tree()
    launch.process.send_signal(signal.SIGKILL)
    assert psutil.wait_procs(tree, timeout=PATIENCE_S)[1] == []
