"""Notices at both ends of a launch: before anything has begun, and while a script still works after its training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError, SpotError
from hf_spot.launch.command import Command, Machines
from hf_spot.launch.folder import RuntimeFolder
from hf_spot.launch.options import parse
from hf_spot.launch.supervisor import Supervisor
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.mailbox import Mailbox
from hf_spot.run.run import Run
from tests.launch.conftest import Launcher
from tests.waiting import PATIENCE_S, wait_for


def lives(process: psutil.Process) -> bool:
    """Not so of one that has ended and that nobody has asked about yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.fresh_python
def test_a_signal_before_anything_has_begun_is_a_preemption(launcher: Launcher, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("open('ran', 'w')")
    launch = launcher.start(str(tmp_path / "run"), [script])
    wait_for(lambda: any("hf_spot.launch.options" in one.cmdline() for one in launch.tree()[1:]), "for the options to be read")
    # It hears signals before it waits for its options, which takes a second; it imports for 0.2.
    status = Path(f"/proc/{launch.process.pid}/status")
    sigterm = 1 << (signal.SIGTERM - 1)
    wait_for(lambda: int(status.read_text().partition("SigCgt:")[2].split()[0], 16) & sigterm, "for the launcher to hear")
    tree = launch.tree()
    launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() == 75, launch.text()
    assert "start the same command again" in launch.text()
    assert "Traceback" not in launch.text()
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run" / "journal").exists()
    wait_for(lambda: not any(map(lives, tree)), "for what it had started")


def test_a_script_has_its_grace_after_its_last_checkpoint_however_long_that_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "training.py"
    script.write_text(
        textwrap.dedent("""
        import os, time
        from hf_spot.runtime import Runtime

        def until(is_so):
            while not is_so():
                time.sleep(0.01)

        runtime = Runtime.from_environ(os.environ)
        runtime.tell_training(True)
        until(lambda: runtime.read_notice() is not None)
        open("saves", "w")
        until(lambda: os.path.exists("saves.seen"))
        runtime.tell_training(False)
        open("closes", "w")
        until(lambda: os.path.exists("closes.seen"))
        open("closed", "w")
        raise SystemExit(75)
        """)
    )
    monkeypatch.chdir(tmp_path)
    looks = {"saves": 0, "closes": 0}

    def clock() -> float:
        """A save takes a minute, and what comes behind it some seconds; each goes on when the launcher has looked often."""
        for what in looks:
            if (tmp_path / what).exists():
                looks[what] += 1
                if looks[what] == 6:
                    (tmp_path / f"{what}.seen").touch()
        return 63.0 if looks["closes"] else 60.0 if looks["saves"] else 0.0

    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = SpotArguments(notice=f"file:{tmp_path / 'notice'}")
    command = Command(str(tmp_path / "run"), arguments, 0, [sys.executable, str(script)], environ)
    (tmp_path / "notice").touch()
    assert Supervisor(Run(command.store), command, clock=clock).supervise() == 75
    assert (tmp_path / "closed").exists()


def test_a_training_that_was_killed_before_it_could_save_is_not_called_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make_checkpoint: Callable[[int], Path]
) -> None:
    script = tmp_path / "training.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, time
        from hf_spot.runtime import Runtime, StepCounter

        runtime = Runtime.from_environ(os.environ)
        runtime.tell_training(True)
        StepCounter(runtime.step_path).tell(8)
        while runtime.read_notice() is None:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    Run(tmp_path / "run").push(make_checkpoint(5))
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = SpotArguments(notice=f"file:{tmp_path / 'notice'}")
    command = Command(str(tmp_path / "run"), arguments, 0, [sys.executable, str(script)], environ)
    (tmp_path / "notice").touch()
    assert Supervisor(Run(command.store), command).supervise() == 75
    last = caplog.messages[-1]
    assert "137" in last and "step 5 is committed; 3 steps after it will be redone" in last, caplog.text


@pytest.mark.parametrize("trains", [False, True])
def test_a_command_that_trains_nothing_leaves_a_finished_run_to_the_command_that_finished_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make_checkpoint: Callable[[int], Path], trains: bool
) -> None:
    run = Run(tmp_path / "run")
    run.claim()
    request = CommitRequest(step=5, complete=True)
    run.commit(request, run.upload(make_checkpoint(5), request))
    run.record("finished", {"step": 5, "command": "before"})
    code = "import os; from hf_spot.runtime import Runtime; runtime = Runtime.from_environ(os.environ)"
    more = "; runtime.tell_training(True); runtime.tell_training(False)" if trains else ""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = Command(str(tmp_path / "run"), SpotArguments(notice="none"), 0, [sys.executable, "-c", code + more], environ)
    supervisor = Supervisor(Run(command.store), command, finished_by="before")
    assert supervisor.supervise() == 0
    last = Run(command.store).journal.read(Run(command.store).state().number)
    assert (last.kind, last.launch) == ("finished", 2)
    assert last.data["command"] == (command.fingerprint({}) if trains else "before")
    assert ("stays finished at step 5" in caplog.text) != trains


def test_machine_0_that_waits_for_others_ends_once_another_launch_has_begun(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_spot.launch.supervisor._LOOK_EVERY_S", 0.1)
    command = Command(str(tmp_path / "run"), SpotArguments(notice="none"), 0, ["none"], dict(os.environ), Machines(2))

    def begin_another() -> None:
        wait_for(lambda: Mailbox(Run(command.store)).invitation(), "for machine 0")
        Run(command.store).claim()

    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(begin_another)
        assert Supervisor(Run(command.store), command).supervise() == 76
        begun.result()
    assert "launch 2 has begun while launch 1 waited for its machines" in caplog.text


LOOP = """
    import signal, time
    open("began", "w").close()
    while True:
        time.sleep(0.05)
"""


def test_a_script_that_nothing_protects_is_told_so_at_the_notice_and_at_the_end(launcher: Launcher, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(LOOP))
    launch = launcher.start(str(tmp_path / "run"), [script], options=["--grace-s", "2"])
    wait_for(lambda: (tmp_path / "began").exists() or launch.process.poll() is not None)
    launch.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "nothing of this script is protected" in launch.text() or launch.process.poll() is not None)
    assert launch.process.poll() is None, launch.text()
    assert launch.wait() == 75, launch.text()
    *_, last = [line for line in launch.text().splitlines() if line.startswith("hf-spot:")]
    assert "nothing was saved" in last and "begin from the start" in last and "SpotCheckpointManager.for_accelerator(" in last
    assert "to resume" not in launch.text()


def test_a_training_that_has_not_begun_again_is_told_where_it_will(
    launcher: Launcher, tmp_path: Path, make_checkpoint: Callable[[int], Path]
) -> None:
    Run(tmp_path / "run").push(make_checkpoint(5))
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(LOOP))
    launch = launcher.start(str(tmp_path / "run"), [script], options=["--grace-s", "1"])
    wait_for(lambda: (tmp_path / "began").exists() or launch.process.poll() is not None)
    launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() == 75, launch.text()
    assert "start the same command again to resume from step 5" in launch.text()


@pytest.mark.parametrize(("takes_s", "closes"), [("3", True), ("100", False)])
def test_a_process_that_is_slow_to_exit_has_its_time_and_is_ended_quietly(
    launcher: Launcher, tmp_path: Path, takes_s: str, closes: bool
) -> None:
    """The deadline is over when the last commit stands; what the script has to close comes behind that."""
    script = tmp_path / "training.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys, time
        from datetime import datetime, timezone
        from hf_spot.run.run import Run
        from hf_spot.runtime import Runtime

        runtime = Runtime.from_environ(os.environ)
        runtime.tell_training(True)
        open("began", "w").close()
        while runtime.read_notice() is None:
            time.sleep(0.01)
        run = Run(runtime.store)
        run.adopt(runtime.launch)
        while datetime.now(timezone.utc) < runtime.read_notice().deadline:
            time.sleep(0.01)
        run.record("preempted", {"step": 5, "committed_step": 5})
        runtime.tell_training(False)
        time.sleep(float(sys.argv[1]))
        open("closed", "w").close()
        raise SystemExit(75)
        """)
    )
    launch = launcher.start(str(tmp_path / "run"), [script, takes_s], options=["--grace-s", "1"])
    wait_for(lambda: (tmp_path / "began").exists() or launch.process.poll() is not None)
    launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() == 75, launch.text()
    assert (tmp_path / "closed").exists() is closes, launch.text()
    assert "did not end in time" not in launch.text()
    assert ("slow to exit" in launch.text()) is not closes


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (["-m", "no.such.module"], "No module named 'no'"),
        (["-m", "no_such_module"], "there is no such module"),
        (["-m", "json.no_such"], "there is no such module"),
        (["-m", "email"], "email.__main__: there is no such module"),
        (["broken.py"], "broken.py:2: SyntaxError"),
        (["null.py"], "null.py"),
        (["folder"], "without a __main__.py"),
    ],
)
def test_what_no_python_can_run_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: list[str], why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("import os\nprint('unfinished\n")
    Path("null.py").write_bytes(b"print()\0\n")
    Path("folder").mkdir()
    with pytest.raises(ConfigError, match=why):
        parse(["--store", "run", *script], {})


def test_a_module_that_is_not_there_is_not_launched_once(launcher: Launcher, tmp_path: Path) -> None:
    launch = launcher.start(str(tmp_path / "run"), ["-m", "no.such.module"])
    assert launch.wait() == 2, launch.text()
    assert "No module named 'no'" in launch.text() and "Traceback" not in launch.text()
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a PID namespace")
def test_as_the_first_process_of_a_container_it_hears_a_signal_before_it_has_imported_anything(tmp_path: Path) -> None:
    """The kernel drops what such a process has no handler for, and nobody sends it twice."""
    (tmp_path / "script.py").write_text("open('ran', 'w')")
    launcher = [sys.executable, "-m", "hf_spot", "launch", "--store", "run", "script.py"]
    outside = psutil.Popen(["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *launcher], cwd=tmp_path)
    try:
        wait_for(outside.children, longest_pause_s=0.005)
        (first,) = outside.children()

        def is_heard() -> bool:
            caught = Path(f"/proc/{first.pid}/status").read_text().partition("SigCgt:")[2].split()[0]
            return bool(int(caught, 16) & 1 << (signal.SIGTERM - 1))

        wait_for(is_heard, longest_pause_s=0.005)
        assert not first.children()  # nor has it started anything
        first.send_signal(signal.SIGTERM)
        assert outside.wait(60) == 75
    finally:
        if outside.poll() is None:
            outside.kill()
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()


def test_a_launcher_listens_before_it_imports_what_takes_time() -> None:
    program = """
import signal, sys
sys.argv, sys.modules["hf_spot.cli"] = ["hf-spot", "launch"], None
from hf_spot.__main__ import main
try:
    main()
except ImportError:  # of what comes next; the signals that it has listened to are ignored while it ends
    print(signal.getsignal(signal.SIGTERM) is signal.SIG_IGN, sorted({"argparse", "json", "psutil", "boto3"} & {*sys.modules}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "True []\n"


def test_the_processes_of_a_launch_disappear_while_the_machines_meet_and_before_the_next_one_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = Command(str(tmp_path / "run"), SpotArguments(notice="none"), 0, ["none"], dict(os.environ))
    supervisor, may_go, gone = Supervisor(Run(command.store), command), threading.Event(), threading.Event()

    class Slow:
        """A tree whose processes take their time to disappear."""

        killed = False

        def kill(self) -> None:
            self.killed = True

        def end(self) -> None:
            assert self.killed and may_go.wait(PATIENCE_S)
            gone.set()

    def begin() -> RuntimeFolder:
        assert gone.is_set()
        raise OSError("far enough")

    monkeypatch.setattr(Supervisor, "_goes_on_with_others", True)
    monkeypatch.setattr("hf_spot.launch.supervisor.RuntimeFolder", lambda clock: begin())
    supervisor._end(Slow())  # type: ignore[arg-type]
    assert not gone.is_set()
    with ThreadPoolExecutor(1) as pool:
        next_launch = pool.submit(supervisor._train, 2)
        try:
            assert not gone.is_set() and not next_launch.done()
        finally:
            may_go.set()
        with pytest.raises(SpotError, match="far enough"):
            next_launch.result(PATIENCE_S)


def test_a_training_that_a_store_does_not_answer_lets_a_scheduler_start_again(tmp_path: Path) -> None:
    script = tmp_path / "training.py"
    script.write_text(
        textwrap.dedent("""
        from hf_spot.errors import StoreUnavailable
        raise StoreUnavailable("no route to the store")
        """)
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-m", "hf_spot.training.bootstrap", str(script)]
    command = Command(str(tmp_path / "run"), SpotArguments(notice="none"), 0, argv, environ)
    assert Supervisor(Run(command.store), command).supervise() == 75
    [failed] = [entry for entry in Run(command.store).events() if entry.kind == "failed"]
    assert failed.data["exit_code"] == 69
