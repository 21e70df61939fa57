"""What is forked from a zygote is a process like one that was executed: to its parent, to the kernel, and to itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.waiting import wait_for
from tests.zygote import Zygote

SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
IS_FORKED = "import sys; print('torch' in sys.modules)"


def environ(**more: str) -> dict[str, str]:
    return {**os.environ, **SETTINGS, **more}


def said(zygote: Zygote, *words: str, **more: str) -> str:
    with zygote.forking():
        return subprocess.run([sys.executable, *words], env=environ(**more), capture_output=True, text=True, check=True).stdout


def test_only_what_would_import_with_the_same_settings_is_forked(zygote: Zygote) -> None:
    assert said(zygote, "-c", IS_FORKED) == "True\n"
    before = len(zygote.refusals)
    for different in ("TRANSFORMERS_VERBOSITY", "OMP_PROC_BIND", "HOME"):
        assert said(zygote, "-c", IS_FORKED, **{different: "true"}) == "False\n"
    assert said(zygote, "-I", "-c", IS_FORKED) == "False\n"
    assert [one.split()[0] for one in zygote.refusals[before:]] == ["variables"] * 3 + ["command"]
    assert subprocess.run([sys.executable, "-c", IS_FORKED], env=environ(), capture_output=True, text=True).stdout == "False\n"


def test_it_is_a_child_with_the_descriptors_variables_and_session_that_it_was_given(zygote: Zygote, tmp_path: Path) -> None:
    code = """if True:
        import os, sys
        listed = sorted(map(int, os.listdir("/proc/self/fd")))
        inherited = [one for one in listed if os.path.exists(f"/proc/self/fd/{one}")]  # without that of the folder itself
        print([os.getppid(), os.getsid(0) == os.getpid(), os.getcwd(), os.environ["MINE"], inherited, sys.argv, __name__])
        os.write(int(sys.argv[1]), b"there")
        sys.stdin.read()
        """
    reader, writer = os.pipe()
    words = [sys.executable, "-c", code, str(writer)]
    with zygote.forking():
        process = psutil.Popen(
            words,
            env=environ(MINE="1"),
            cwd=tmp_path,
            pass_fds=[writer],
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    os.close(writer)
    assert os.read(reader, 100) == b"there"
    os.close(reader)
    assert (process.ppid(), process.cmdline(), process.environ()["MINE"]) == (os.getpid(), words, "1")
    wanted = [os.getpid(), True, str(tmp_path), "1", [0, 1, 2, writer], ["-c", str(writer)], "__main__"]
    assert process.communicate()[0] == f"{wanted}\n"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        ("raise SystemExit(7)", 7),
        ("raise SystemExit('in words')", 1),
        ("1 / 0", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import os; os.abort()", -signal.SIGABRT),
    ],
)
def test_it_ends_as_one_that_was_executed(zygote: Zygote, code: str, ends: int) -> None:
    words = [sys.executable, "-c", f"import atexit; atexit.register(print, 'bye')\n{code}"]
    executed = subprocess.run(words, env=environ(), capture_output=True, text=True)
    with zygote.forking():
        forked = subprocess.run(words, env=environ(), capture_output=True, text=True)
    assert forked.returncode == executed.returncode == ends
    assert (forked.stdout, forked.stderr) == (executed.stdout, executed.stderr)


def test_kill_9_ends_it_and_whoever_is_tied_to_it(zygote: Zygote) -> None:
    code = """if True:
        import os, signal
        from hf_spot import process_guard
        mine = os.getpid()
        child = os.fork()
        if child == 0:
            process_guard.tie(mine)
            print(os.getpid(), flush=True)
        signal.pause()
        """
    with zygote.forking():
        process = psutil.Popen([sys.executable, "-c", code], env=environ(), stdout=subprocess.PIPE, text=True)
    tied = psutil.Process(int(process.stdout.readline()))
    assert tied in process.children()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    wait_for(lambda: not tied.is_running() or tied.status() == psutil.STATUS_ZOMBIE, "for the one that was tied")


def test_signals_are_handled_ignored_and_blocked_as_in_one_that_was_executed(zygote: Zygote) -> None:
    code = """if True:
        import signal
        for one in sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}):
            print(int(one), repr(signal.getsignal(one)))
        print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
        """
    words = [sys.executable, "-c", code]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    handler = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        executed = subprocess.run(words, env=environ(), capture_output=True, text=True, check=True).stdout
        forked = said(zygote, *words[1:])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGUSR2, handler)
    assert forked == executed
    assert "Signals.SIGUSR1: 10" in executed.splitlines()[-1] and "12 <Handlers.SIG_IGN: 1>" in executed


def test_trainer_is_imported_after_the_fork_and_draws_are_its_own(zygote: Zygote) -> None:
    code = """if True:
        import random, sys
        import numpy, torch
        assert "transformers" in sys.modules and "transformers.trainer" not in sys.modules
        from transformers import Trainer
        assert Trainer is sys.modules["transformers.trainer"].Trainer
        print(random.random(), numpy.random.random(), torch.rand(1).item())
        """
    one, other = said(zygote, "-c", code).split(), said(zygote, "-c", code).split()
    assert all(first != second for first, second in zip(one, other, strict=True))


def test_it_is_offline_if_it_is_told_so(zygote: Zygote) -> None:
    code = (
        "import datasets, huggingface_hub; print(huggingface_hub.constants.is_offline_mode(), datasets.config.HF_HUB_OFFLINE)"
    )
    assert said(zygote, "-c", code) == "True True\n"
    assert said(zygote, "-c", code, HF_HUB_OFFLINE="0") == "False False\n"


def test_workers_of_xdist_are_forked_and_have_a_zygote_that_was_handed_to_them(zygote: Zygote, worker_id: str) -> None:
    if worker_id == "master":
        pytest.skip("without xdist")
    assert zygote._process is None
    assert said(zygote, "-c", "import os; print(os.getppid())") == f"{os.getpid()}\n"
