"""What every Python of a launch runs first: `hf_spot.every_python.sitecustomize`, in real Pythons that nothing has forked."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

from hf_spot.arguments import SpotArguments
from hf_spot.every_python import FOLDER, python_path
from hf_spot.launch.process import ProcessTree
from hf_spot.notices.notice import NoticeKind, PreemptionNotice
from hf_spot.runtime import Runtime
from tests.waiting import PATIENCE_S, wait_for

pytestmark = pytest.mark.fresh_python
ANSWERED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
SHOWS = "import json, sys; print(json.dumps([sorted(sys.modules), [type(one).__name__ for one in sys.meta_path], sys.path]))"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """The variables of a launch whose launcher is this process."""
    runtime = Runtime(str(tmp_path / "run"), 1, tmp_path / "runtime", SpotArguments())
    runtime.directory.mkdir()
    numbers = ",".join(str(int(one)) for one in ANSWERED)
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**inherited, **runtime.to_environ(), "HF_SPOT_ANSWERED_SIGNALS": numbers, "PYTHONPATH": FOLDER}


def python(environ: dict[str, str], *words: str, program: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *words], env=environ, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_a_python_that_does_not_train_imports_nothing_of_hf_spot(environ: dict[str, str]) -> None:
    done = python(environ, "-c", SHOWS)
    modules, finders, path = json.loads(done.stdout)
    bare = json.loads(python({**environ, "PYTHONPATH": ""}, "-c", SHOWS).stdout)
    assert finders == ["Finder", *bare[1]]
    assert set(modules) - set(bare[0]) <= {"sitecustomize", "atexit"}
    assert path == bare[2]


def test_torchruns_agent_is_known_before_it_imports_torch_which_takes_long_on_a_busy_machine(environ: dict[str, str]) -> None:
    look = "lambda: sys.exit(4 if Runtime.from_environ(os.environ).has_met(os.getpid()) else 3)"
    code = (
        f"import os, sys\nfrom hf_spot.launch import agent\nfrom hf_spot.runtime import Runtime\nagent._import_all = {look}\n"
    )
    assert python(environ, "-c", f"{code}agent._main()").returncode == 4


@pytest.mark.parametrize("options", [["-I"], ["-S"], ["-E"]])
def test_a_python_that_reads_no_environment_or_no_site_is_left_alone(environ: dict[str, str], options: list[str]) -> None:
    done = python(environ, *options, "-c", SHOWS)
    assert "Finder" not in json.loads(done.stdout)[1]
    assert done.stderr == ""


def test_outside_a_launch_nothing_is_installed(environ: dict[str, str]) -> None:
    del environ["HF_SPOT_RUNTIME_DIR"]
    assert "Finder" not in json.loads(python(environ, "-c", SHOWS).stdout)[1]


@pytest.mark.parametrize("ours_first", [True, False])
def test_the_users_own_sitecustomize_runs_too(environ: dict[str, str], tmp_path: Path, ours_first: bool) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    chains = f"import sys; sys.path.remove({str(theirs)!r}); del sys.modules['sitecustomize']; import sitecustomize\n"
    (theirs / "sitecustomize.py").write_text(f"print('theirs')\n{'' if ours_first else chains}")
    environ["PYTHONPATH"] = os.pathsep.join([FOLDER, str(theirs)] if ours_first else [str(theirs), FOLDER])
    shown = python(environ, "-c", SHOWS).stdout.splitlines()
    assert shown[0] == "theirs"
    assert "Finder" in json.loads(shown[1])[1]


def test_a_sitecustomize_that_fails_fails_as_it_did(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import no_such_module")
    bare = python({**environ, "PYTHONPATH": str(tmp_path)}, "-c", "print(1)")
    done = python({**environ, "PYTHONPATH": os.pathsep.join([FOLDER, str(tmp_path)])}, "-c", "print(1)")
    assert (done.returncode, done.stdout) == (bare.returncode, bare.stdout) == (0, "1\n")
    assert "no_such_module" in done.stderr


def test_what_pythonpath_named_stays_behind_our_folder() -> None:
    assert python_path({}) == python_path({"PYTHONPATH": ""}) == FOLDER
    assert python_path({"PYTHONPATH": f"/a:{FOLDER}:/b"}) == f"{FOLDER}:/a:/b"


def test_in_another_environment_without_hf_spot_it_is_said_once(environ: dict[str, str], tmp_path: Path) -> None:
    venv.create(tmp_path / "other", symlinks=True)
    other = str(tmp_path / "other" / "bin" / "python")
    package = tmp_path / "packages" / "transformers"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "trainer.py").write_text("print('trains')")
    environ["PYTHONPATH"] += f":{tmp_path / 'packages'}"
    quiet, first, second = (python(environ, "-c", code, program=other) for code in ("", *["import transformers.trainer"] * 2))
    assert (quiet.stderr, first.stdout, second.stdout) == ("", "trains\n", "trains\n")
    assert f"a training under {other} is not protected" in first.stderr
    assert second.stderr == ""


WAITS = """
import os, signal, subprocess, sys, time
BEGIN
print("ready", flush=True)
time.sleep(60)
"""
REPORTS = "open(os.path.join(os.environ['HF_SPOT_RUNTIME_DIR'], f'training-{os.getpid()}'), 'w').close()"
IN_CHILD = f"import os, time; {REPORTS}; print(1, flush=True); time.sleep(60)"
ABOVE = f"subprocess.Popen([sys.executable, '-c', {IN_CHILD!r}], stdout=subprocess.PIPE).stdout.readline()"
HANDLES = "signal.signal(signal.SIGTERM, lambda *a: sys.exit(9)); assert callable(signal.getsignal(signal.SIGTERM))"


@pytest.mark.parametrize(
    ("begin", "code"),
    [
        pytest.param("", -signal.SIGTERM, id="trains nothing"),
        pytest.param(HANDLES, 9, id="has a handler"),
        pytest.param("signal.signal(signal.SIGTERM, signal.SIG_DFL)", -signal.SIGTERM, id="has set the default"),
        pytest.param("import sitecustomize; sys.meta_path[0]._shield.pass_on_always()", None, id="has imported Trainer"),
        pytest.param(REPORTS, None, id="trains"),
        pytest.param(f"{REPORTS}\n{HANDLES}", 9, id="trains and has a handler"),
        pytest.param(ABOVE, None, id="trains in a child"),
        pytest.param(f"{ABOVE}\n{HANDLES}", None, id="trains in a child and would kill it"),
    ],
)
def test_a_signal_becomes_a_notice_where_a_training_runs_and_nowhere_else(
    environ: dict[str, str], begin: str, code: int | None
) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", WAITS.replace("BEGIN", begin)],
            env={**environ, "HF_SPOT_LAUNCHER_PID": str(os.getpid())},
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        if code is None:
            wait_for(lambda: bool(received), "for the notice")
            assert process.poll() is None
        else:
            assert process.wait(PATIENCE_S) == code
            assert not received
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        signal.signal(signal.SIGTERM, before)
        assert process.stdout is not None
        process.stdout.close()


TRAINS = f"import os, sys; {REPORTS}; print(1, flush=True); sys.stdin.read()"
STARTS = f"""
import asyncio, os, signal, subprocess, sys, threading, time
pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
FIRST
child = subprocess.Popen([sys.executable, '-c', {TRAINS!r}], **pipes)
child.stdout.readline()
ACT
print(f"asked {{os.getpid()}} {{child.pid}}", flush=True)
sys.stdin.readline()
print(child.wait() if ENDS else child.poll(), flush=True)
"""
FORWARDS = "loop = asyncio.new_event_loop(); loop.add_signal_handler(signal.SIGTERM, lambda: (child.terminate(), loop.stop()))"
WAITS_FOR_IT = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])"
SIBLING = "subprocess.run([sys.executable, '-c', f'import os; os.kill({child.pid}, 15)'])"


@pytest.mark.parametrize(
    ("first", "act", "ends"),
    [
        pytest.param("", "child.terminate()", True, id="a program ends its child"),
        pytest.param("", "os.kill(child.pid, 10)", True, id="by another signal"),
        pytest.param("", "os.killpg(child.pid, signal.SIGTERM)", True, id="a program ends the group of its child"),
        pytest.param("", "import psutil; psutil.Process(child.pid).terminate()", True, id="with psutil"),
        pytest.param(FORWARDS, "os.kill(os.getpid(), 15); loop.run_forever()", False, id="it passes on what it has received"),
        pytest.param(
            "",
            f"{WAITS_FOR_IT}; os.kill(os.getpid(), 15); signal.sigwait([signal.SIGTERM]); child.terminate()",
            False,
            id="it passes on what it has waited for",
        ),
        pytest.param("", SIBLING, False, id="a process beside it sends it"),
        pytest.param("", "subprocess.run(['sh', '-c', f'kill {child.pid}'])", False, id="a shell sends it"),
    ],
)
def test_a_program_that_ends_its_training_child_gives_no_notice(
    environ: dict[str, str], first: str, act: str, ends: bool
) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    code = STARTS.replace("FIRST", first).replace("ACT", act).replace("ENDS", str(ends))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**environ, "HF_SPOT_LAUNCHER_PID": str(os.getpid())},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        _, parent, child = process.stdout.readline().split()
        if not ends:
            wait_for(lambda: bool(received), "for the notice")
        out, said = process.communicate("\n", PATIENCE_S)
        assert (out.strip() != "None", bool(received)) == (ends, not ends)
        told = f"process {parent} ({sys.executable} -c"
        assert (told in said and f"ends process {child}" in said) == ends, said
    finally:
        process.kill()
        process.communicate()  # also ends when the last child has: none of them sends another signal afterwards
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("failure", "age_s", "ends"),
    [
        ("training", 0.0, True),  # it died while it trained, and the launcher has not seen that yet
        ("gone", 5.0, True),
        ("gone", 100.0, False),
        ("failed", 5.0, True),
        ("failed", 100.0, False),
    ],
)
def test_a_signal_soon_after_a_process_has_failed_is_its_launchers_way_to_end_the_others(
    environ: dict[str, str], failure: str, age_s: float, ends: bool
) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    folder, received = Path(environ["HF_SPOT_RUNTIME_DIR"]), []
    (folder / f"training-{dead.pid}").write_text("ended" if failure == "failed" else "")
    (folder / f"{failure}-{dead.pid}").touch()
    then = time.time() - age_s
    os.utime(folder / f"{failure}-{dead.pid}", (then, then))
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINS],
        env={**environ, "HF_SPOT_LAUNCHER_PID": str(os.getpid())},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        process.send_signal(signal.SIGTERM)
        if not ends:
            wait_for(lambda: bool(received), "for the notice")
        said = process.communicate(timeout=PATIENCE_S)[1]
        assert (process.returncode, bool(received)) == ((-signal.SIGTERM, False) if ends else (0, True))
        assert (f"process {dead.pid} has failed" in said.decode()) == ends
    finally:
        process.kill()
        process.communicate()  # also ends when the last child has: none of them sends another signal afterwards
        signal.signal(signal.SIGTERM, before)


def test_once_there_is_a_notice_nothing_is_an_end_from_inside(environ: dict[str, str]) -> None:
    runtime = Runtime.from_environ(environ)
    assert runtime is not None
    runtime.write_notice(PreemptionNotice(NoticeKind.TERMINATE, "file", "1"))
    test_a_program_that_ends_its_training_child_gives_no_notice(environ, "", "child.terminate()", False)
    test_a_signal_soon_after_a_process_has_failed_is_its_launchers_way_to_end_the_others(environ, "training", 0.0, False)


def test_a_process_that_died_while_it_trained_is_marked_once(environ: dict[str, str]) -> None:
    runtime = Runtime.from_environ(environ)
    assert runtime is not None
    one = living()
    (runtime.directory / f"training-{one.pid}").touch()
    runtime.mark_gone()
    gone = runtime.directory / f"gone-{one.pid}"
    assert not gone.exists()
    end(one)
    runtime.mark_gone()
    os.utime(gone, (1.0, 1.0))
    runtime.mark_gone()
    assert gone.stat().st_mtime == 1.0


FORKS = """
import os, sitecustomize
if (child := os.fork()) == 0:
    from hf_spot.runtime import Runtime
    import hf_spot.runtime
    sitecustomize.sys.meta_path[0]._shield.pass_on_always() if IMPORTS else None
    Runtime.from_environ(os.environ).tell_training(True)
    print(os.getpid(), flush=True)
    input()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize("imports", ["before the fork", "in the child"])
def test_a_forked_child_that_trains_passes_signals_on(environ: dict[str, str], imports: str) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    code = FORKS.replace("IMPORTS", str(imports == "in the child"))
    if imports == "before the fork":
        code = f"import sys; sys.meta_path[0].find_spec('transformers.trainer')\n{code}"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**environ, "HF_SPOT_LAUNCHER_PID": str(os.getpid())},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        os.kill(int(process.stdout.readline()), signal.SIGTERM)
        wait_for(lambda: bool(received), "for the notice")
        assert process.communicate("\n", PATIENCE_S)[0] == "7\n"
    finally:
        process.kill()
        process.communicate()  # also ends when the last child has: none of them sends another signal afterwards
        signal.signal(signal.SIGTERM, before)


def test_a_forked_child_has_the_programs_own_handlers(environ: dict[str, str]) -> None:
    code = (
        "import os, signal; before = signal.getsignal(signal.SIGTERM)\n"
        "if (child := os.fork()) == 0: os.kill(os.getpid(), 15); os._exit(3)\n"
        "print(before == signal.SIG_DFL, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert python(environ, "-c", code).stdout == "True -15\n"


def test_whoever_is_started_with_blocked_signals_keeps_them_so(environ: dict[str, str]) -> None:
    code = (
        "import _signal, signal; blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())\n"
        "print(signal.SIGTERM in blocked, type(_signal.signal).__name__)"
    )
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        assert python(environ, "-c", code).stdout == "True builtin_function_or_method\n"
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


@pytest.mark.parametrize("told", ["75", "76"])
def test_a_process_whose_training_was_stopped_waits_at_its_end_for_the_launcher(environ: dict[str, str], told: str) -> None:
    runtime = Runtime.from_environ(environ)
    assert runtime is not None
    report = REPORTS.replace("'w').close()", f"'w').write('{told}')")
    code = f"import atexit, os; {report}; atexit.register(print, 'others at the end'); print('trained')"
    process = subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["trained\n", "others at the end\n"]
        wait_for(lambda: runtime.read_stopped() is not None, "for it to wait")
        assert runtime.read_stopped() == int(told)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert runtime.read_stopped() is None


def living() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "600"])


def test_the_launch_is_over_only_when_no_process_trains_any_more(
    environ: dict[str, str], request: pytest.FixtureRequest
) -> None:
    runtime = Runtime.from_environ(environ)
    assert runtime is not None
    processes = [living() for _ in range(3)]
    request.addfinalizer(lambda: [end(one) for one in processes])
    first, second, third = processes

    def tell(process: subprocess.Popen[bytes], text: str, name: str = "training") -> None:
        (runtime.directory / f"{name}-{process.pid}").write_text(text)

    assert runtime.read_training() is None
    tell(first, "75")
    tell(first, "", "left")
    tell(second, "")
    assert (runtime.read_training(), runtime.read_stopped()) == (True, None)
    tell(second, "76")  # it has not reached its end
    assert (runtime.read_training(), runtime.read_stopped()) == (False, None)
    tell(second, "", "left")
    assert runtime.read_stopped() == 76
    tell(third, "")
    assert (runtime.read_training(), runtime.read_stopped()) == (True, None)
    end(third)  # killed: it trains no longer
    assert (runtime.read_training(), runtime.read_stopped()) == (False, 76)


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_command_that_a_signal_ends_leaves_the_guard_waiting_for_what_it_has_started(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    child = f"trap '' TERM; touch {tmp_path}/on; until [ -e {tmp_path}/told ]; do sleep 0.05; done; touch {tmp_path}/saved"
    script.write_text(f'bash -c "{child}"\ntouch {tmp_path}/after\n')
    notices: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: notices.append(number))
    try:
        tree = ProcessTree(["bash", str(script)], os.environ, ANSWERED, as_it_is=True)
        try:
            wait_for((tmp_path / "on").exists, "for the child")
            for one in tree.processes():
                one.send_signal(signal.SIGTERM)
            assert tree.wait(0.5) is None  # the child still works
            (tmp_path / "told").touch()
            wait_for(lambda: tree.wait(0.05) is not None, "for the end")
            assert tree.wait(0) == 128 + signal.SIGTERM
        finally:
            tree.end()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert notices
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "after").exists()
