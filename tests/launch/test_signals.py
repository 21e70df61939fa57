"""A signal to all processes of a launch, or to one of them, is a notice: whichever process, whichever signal."""

from __future__ import annotations

import os
import pty
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from hf_spot.run.run import Run
from tests.launch.conftest import PLAIN, Launch, Launcher, Twin, of_ranks
from tests.signals import fuzz
from tests.waiting import wait_for
from tests.zygote import SCRIPTS_FORK, Zygote

BY_DEFAULT = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"]
NAMED = "SIGUSR2,SIGUSR1,SIGQUIT,SIGALRM,SIGRTMIN"


def role(process: psutil.Process) -> str:
    """What a process of a launch is."""
    words = process.cmdline()
    if any(word.endswith("process_guard.py") for word in words[:5]):
        return "guard"
    module = words[words.index("-m") + 1] if "-m" in words[:4] else ""
    if module == "hf_spot.training.bootstrap":
        above = process.parent()
        return "rank" if above is not None and role(above) in ("guard", "agent") else "worker"
    return {"hf_spot": "launcher", "hf_spot.launch.agent": "agent"}.get(module, "helper")


def of(launch: Launch, *roles: str) -> list[psutil.Process]:
    found = []
    for one in launch.tree():
        try:
            if not roles or (role(one) if one.pid != launch.process.pid else "launcher") in roles:
                found.append(one)
        except psutil.NoSuchProcess:
            continue
    return found


def send(processes: list[psutil.Process], number: int) -> None:
    """Children first, as those who walk a tree to kill it."""
    for one in reversed(processes):
        try:
            one.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def assert_is_preempted_with_all_committed(launch: Launch, store: str) -> None:
    assert launch.wait() == 75, launch.text()
    newest = Run(store).latest()
    assert newest is not None and newest.step == launch.step() >= 3, launch.text()
    kinds = [entry.kind for entry in Run(store).events()]
    counts = tuple(map(kinds.count, ("claim", "notice", "failed", "preempted")))
    assert counts == (1, 1, 0, 1), launch.text()
    assert Run(store).state().ended == "preempted"  # the launcher writes about the notice meanwhile, and may be later
    assert "Traceback" not in launch.text() and "killing it" not in launch.text()


def options(ranks: int, *more: str) -> list[str]:
    return [*of_ranks(ranks), *more]


@pytest.mark.parametrize(
    ("ranks", "name", "to"),
    [
        (1, "SIGTERM", "rank"),  # the one that nvidia-smi shows
        (1, "SIGUSR1", "guard"),
        (1, "SIGHUP", "all"),
        pytest.param(2, "SIGTERM", "all", marks=pytest.mark.fresh_script),  # what they inherit is blocked by who executes them
        (2, "SIGUSR1", "all"),
        pytest.param(1, "SIGHUP", "launcher", marks=pytest.mark.slow),
        pytest.param(1, "SIGINT", "all", marks=pytest.mark.slow),
        pytest.param(2, "SIGINT", "all", marks=pytest.mark.slow),
        (2, "SIGTERM", "agent"),
        pytest.param(2, "SIGTERM", "rank", marks=pytest.mark.slow),
        pytest.param(3, "SIGHUP", "all", marks=pytest.mark.slow),
        pytest.param(3, "SIGUSR1", "rank", marks=pytest.mark.slow),
    ],
)
def test_whoever_gets_it_it_is_one_notice(
    tmp_path: Path, launcher: Launcher, twin_of_ranks: Callable[[int], Twin], twin: Twin, ranks: int, name: str, to: str
) -> None:
    store = str(tmp_path / "run")
    first = launcher.plain(store, "--step_s", "0.1", "--workers", "1" if ranks == 1 else "0", options=options(ranks))
    first.wait_for_step(3)
    group = of(first) if to == "all" else of(first, to)[-1:]
    assert len(group) == 1 if to != "all" else {*map(role, group)} >= {"guard", "rank"}
    send(group, getattr(signal, name))
    assert_is_preempted_with_all_committed(first, store)
    launcher.scripts_fork = True
    second = launcher.plain(store, options=options(ranks))
    assert second.wait() == 0, second.text()
    assert launcher.weights() == (twin if ranks == 1 else twin_of_ranks(ranks)).weights


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        "SIGUSR2",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("SIGUSR1", "SIGQUIT", "SIGALRM", "SIGRTMIN", "SIGTERM")),
    ],
)
def test_every_signal_of_the_users_own_list_is_one(tmp_path: Path, launcher: Launcher, ranks: int, name: str) -> None:
    store = str(tmp_path / "run")
    launch = launcher.plain(store, "--step_s", "0.1", "--workers", "1", options=options(ranks, "--signals", NAMED))
    launch.wait_for_step(3)
    send(of(launch), getattr(signal, name))
    assert_is_preempted_with_all_committed(launch, store)


@pytest.mark.parametrize(("ranks", "name"), [(1, "SIGTERM"), pytest.param(2, "SIGUSR1", marks=pytest.mark.slow)])
def test_a_data_loaders_worker_that_is_signalled_alone_is_a_notice(
    tmp_path: Path, launcher: Launcher, ranks: int, name: str
) -> None:
    store = str(tmp_path / "run")
    launch = launcher.plain(store, "--step_s", "0.1", "--workers", "1", options=options(ranks))
    launch.wait_for_step(3)
    send(of(launch, "worker")[-1:], getattr(signal, name))
    assert_is_preempted_with_all_committed(launch, store)


def test_a_crash_whose_workers_the_agent_ends_is_no_notice(tmp_path: Path, launcher: Launcher) -> None:
    store = str(tmp_path / "run")
    launch = launcher.plain(store, "--step_s", "0.1", "--workers", "1", options=options(2, "--max-restarts", "0"))
    launch.wait_for_step(3)
    send(of(launch, "rank")[-1:], signal.SIGKILL)
    assert launch.wait() not in (0, 75), launch.text()
    assert "notice" not in [entry.kind for entry in Run(store).events()]


def test_torchruns_agent_ends_the_ranks_that_a_crash_has_left_behind_at_once(tmp_path: Path, launcher: Launcher) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, subprocess, sys, time
        if os.environ["RANK"] == "0":
            child = subprocess.Popen([sys.executable, "-c", (
                "import signal, sys; signal.signal(signal.SIGTERM, lambda *a: (open('child-ended', 'w'), sys.exit()));"
                "open('child-there', 'w'); signal.pause()")])
            signal.pause()
        while not os.path.exists("child-there"):
            time.sleep(0.01)
        sys.exit(7)
        """)
    )
    launch = launcher.start(str(tmp_path / "run"), [script], options=options(2, "--max-restarts", "0"))
    wait_for(lambda: (tmp_path / "child-there").exists() or launch.process.poll() is not None)
    assert launch.wait() == 7, launch.text()
    assert (tmp_path / "child-ended").exists()  # what a rank has started is told to end as ever
    assert "via SIGKILL" not in launch.text()  # which comes when the agent has waited for half a minute
    assert [entry.kind for entry in Run(str(tmp_path / "run")).events()] == ["claim", "failed"]


def test_under_nohup_the_end_of_a_terminal_stays_ignored(tmp_path: Path, launcher: Launcher) -> None:
    store = str(tmp_path / "run")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        launch = launcher.plain(store, "--step_s", "0.05", "--workers", "1")
    finally:
        signal.signal(signal.SIGHUP, before)
    launch.wait_for_step(3)
    send(of(launch), signal.SIGHUP)
    assert launch.wait() == 0, launch.text()
    assert "notice" not in [entry.kind for entry in Run(store).events()]


def test_what_a_script_starts_dies_of_signals_as_ever(tmp_path: Path, launcher: Launcher) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, subprocess, sys
        for one in (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
            child = subprocess.Popen([sys.executable, "-c", "print(flush=True); import signal; signal.pause()"],
                                     stdout=subprocess.PIPE)
            child.stdout.readline()
            child.send_signal(one)
            assert child.wait() == -one, one
        print("masked:", signal.pthread_sigmask(signal.SIG_BLOCK, []))
        """)
    )
    launch = launcher.start(str(tmp_path / "run"), [script], options=["--signals", "SIGUSR2"])
    assert launch.wait() == 0, launch.text()
    assert "masked: set()" in launch.text()


@pytest.fixture
def as_in_a_new_process() -> Iterator[None]:
    """Another test of this worker may have left handlers, and signals that have one keep it."""
    new = {getattr(signal, name): signal.SIG_DFL for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")}
    before = {one: signal.signal(one, handler) for one, handler in {**new, signal.SIGINT: signal.default_int_handler}.items()}
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.mark.usefixtures("as_in_a_new_process")
def test_a_signal_when_all_is_done_changes_no_exit_code() -> None:
    from hf_spot.launch import early

    with early.listening(["--signals", "SIGUSR2,SIGCHLD,SIGKILL,nonsense", "train.py", "--signals", "SIGALRM"]):
        handlers = {one for one in signal.valid_signals() if signal.getsignal(one) is early._leave}
        assert handlers == {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT}
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGUSR2)
        assert ended.value.code == 75
        for one in handlers:  # nor does a second one, while the first is answered
            signal.raise_signal(one)
        early.ignore()
        assert {one for one in handlers if signal.getsignal(one) is signal.SIG_IGN} == handlers
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_terminal_that_is_lost_is_a_notice_and_nothing_that_is_printed_ends_the_training(
    tmp_path: Path, ranks: int, zygote: Zygote
) -> None:
    """As when ssh breaks off: the kernel sends SIGHUP, and whoever prints from then on gets an error."""
    store, log = str(tmp_path / "run"), tmp_path / "log"
    script = [PLAIN, "--output_dir", "out", "--diary", "diary", "--weights", "weights", "--step_s", "0.1"]
    command = ["launch", "--store", store, *options(ranks), *map(str, script)]
    ours, theirs = pty.openpty()
    begins = (
        "import fcntl, runpy, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); runpy.run_module('hf_spot', run_name='__main__')"
    )
    with zygote.forking(scripts=ranks > 1):
        process = psutil.Popen(
            [sys.executable, "-c", begins, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", SCRIPTS_FORK: "1"},
            start_new_session=True,
        )
    os.close(theirs)
    launch = Launch(process, log, tmp_path / "diary", tmp_path / "out")
    try:
        with open(ours, "rb", buffering=0) as terminal, open(log, "wb") as kept:
            while launch.step() < 3:
                kept.write(terminal.read(4096))
                kept.flush()
        assert launch.wait() == 75, launch.text()
    finally:
        if process.poll() is None:
            launch.kill_tree()
    newest = Run(store).latest()
    assert newest is not None and newest.step == launch.step() >= 3
    assert Run(store).state().ended == "preempted"


def test_random_signals_to_random_processes_lose_no_step_that_a_commit_was_due_for(tmp_path: Path, zygote: Zygote) -> None:
    came_to, wrong = fuzz(tmp_path, rounds=2, seed=3, ranks=(1, 2), zygote=zygote)
    assert not wrong and came_to.total() == 2
