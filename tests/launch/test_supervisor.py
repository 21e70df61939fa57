"""What the launcher does with scripts that crash, hang, spawn, and end in every way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest

from hf_spot.run.run import Run
from tests.launch.conftest import Launcher, Lines, of_ranks
from tests.waiting import PATIENCE_S, wait_for


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def write(tmp_path: Path):  # type: ignore[no-untyped-def]
    def write_script(text: str, name: str = "script.py") -> Path:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write_script


def kinds(store: str) -> list[str]:
    return [entry.kind for entry in Run(store).events()]


def test_a_crash_is_restarted_until_the_budget_is_spent_and_its_code_is_passed_on(launcher, store, write) -> None:  # type: ignore[no-untyped-def]
    script = write("open('launches', 'a').write('x'); raise SystemExit(7)")
    launch = launcher.start(store, [script], options=["--max-restarts", "1"])
    assert launch.wait() == 7, launch.text()
    assert (launcher.tmp_path / "launches").read_text() == "xx"
    assert kinds(store) == ["claim", "failed", "claim", "failed"]
    assert [entry.data["exit_code"] for entry in Run(store).events() if entry.kind == "failed"] == [7, 7]


@pytest.mark.fresh_script
def test_a_death_by_signal_counts_as_128_and_its_number(launcher, store, write) -> None:  # type: ignore[no-untyped-def]
    script = write("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    launch = launcher.start(store, [script], options=["--max-restarts", "0"])
    assert launch.wait() == 128 + signal.SIGSEGV, launch.text()


@pytest.mark.fresh_script
def test_of_several_ranks_the_first_code_is_passed_on_and_not_torchruns(launcher, store, write) -> None:  # type: ignore[no-untyped-def]
    script = write("import os, sys; sys.exit(7 if os.environ['RANK'] == '1' else 0)")
    launch = launcher.start(store, [script], options=["--max-restarts", "0", *of_ranks(2)])
    assert launch.wait() == 7, launch.text()


def test_a_wrong_argument_of_the_script_is_not_tried_again(launcher, store, write) -> None:  # type: ignore[no-untyped-def]
    script = write("import argparse; argparse.ArgumentParser().parse_args()")
    launch = launcher.start(store, [script, "--no-such-option"])
    assert launch.wait() == 2
    assert kinds(store) == ["claim", "failed"]


@pytest.mark.fresh_script
def test_a_script_that_trains_nothing_ends_well_and_is_not_called_finished(launcher, store, write) -> None:  # type: ignore[no-untyped-def]
    script = write("import sys; print(sys.argv, __name__, sys.path[0])")
    launch = launcher.start(store, [script, "--one", "two words"])
    assert launch.wait() == 0
    assert f"['{script}', '--one', 'two words'] __main__ {script.parent}" in launch.text()
    assert "not marked as finished" in launch.text()
    assert kinds(store) == ["claim"]


@pytest.mark.fresh_script
def test_a_module_runs_as_under_python_m(launcher, store, write) -> None:  # type: ignore[no-untyped-def]
    write("import sys; print(__name__, __package__, sys.argv[1:])", "mine.py")
    launch = launcher.start(store, ["mine", "--x"], options=["-m"])
    assert launch.wait() == 0, launch.text()
    assert "__main__  ['--x']" in launch.text()


HANGS = """
    import os, signal, subprocess, sys
    daemon = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
    with open("pids.tmp", "w") as file:
        file.write(f"{os.getpid()} {daemon.pid}")
    os.rename("pids.tmp", "pids")
    while True:
        signal.pause()
"""


def pids(launcher: Launcher) -> list[psutil.Process]:
    path = launcher.tmp_path / "pids"
    wait_for(path.exists, "for the script")
    return [psutil.Process(int(pid)) for pid in path.read_text().split()]


@pytest.mark.fresh_script
def test_two_interrupts_end_everything_at_once(launcher, store, write) -> None:  # type: ignore[no-untyped-def]
    launch = launcher.start(store, [write(HANGS)])
    left = pids(launcher)
    launch.process.send_signal(signal.SIGINT)
    wait_for(lambda: ">>> interrupted by Ctrl-C <<<" in launch.text())
    assert launch.process.poll() is None
    launch.process.send_signal(signal.SIGINT)
    assert launch.wait() == 130, launch.text()
    assert psutil.wait_procs(left, timeout=PATIENCE_S)[1] == []
    assert kinds(store) == ["claim", "notice", "preempted"]


@pytest.mark.fresh_script
def test_a_script_that_is_not_training_gets_until_the_deadline(launcher, store, write) -> None:  # type: ignore[no-untyped-def]
    launch = launcher.start(store, [write(HANGS)], options=["--grace-s", "1"])
    left = pids(launcher)
    launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() == 75, launch.text()
    assert "did not end in time" in launch.text()
    assert psutil.wait_procs(left, timeout=PATIENCE_S)[1] == []


@pytest.mark.fresh_script
def test_what_a_script_leaves_behind_is_gone_with_the_launch(launcher, store, write) -> None:  # type: ignore[no-untyped-def]
    launch = launcher.start(store, [write(HANGS.replace("while True:", "while False:"))])
    assert launch.wait() == 0, launch.text()
    assert not any(psutil.pid_exists(int(pid)) for pid in (launcher.tmp_path / "pids").read_text().split())


@pytest.mark.fresh_python
def test_everything_dies_with_a_launcher_that_is_killed(launcher, store, write) -> None:  # type: ignore[no-untyped-def]
    launch = launcher.start(store, [write(HANGS)])
    left = [*pids(launcher), *launch.process.children(recursive=True)]
    launch.process.kill()
    assert psutil.wait_procs(left, timeout=PATIENCE_S)[1] == []


@pytest.mark.fresh_python
def test_everything_dies_with_a_guard_that_is_killed(launcher, store, write) -> None:  # type: ignore[no-untyped-def]
    launch = launcher.start(store, [write(HANGS)], options=["--max-restarts", "0"])
    left = pids(launcher)
    (guard,) = launch.process.children()
    guard.kill()
    assert launch.wait() == 128 + signal.SIGKILL, launch.text()
    assert psutil.wait_procs(left, timeout=PATIENCE_S)[1] == []


@pytest.mark.fresh_script
def test_signals_to_the_whole_group_do_not_end_the_script_before_the_launcher_does(launcher, store, write) -> None:  # type: ignore[no-untyped-def]
    script = write(
        """
        import os, signal
        for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), one)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, b"x")
            signal.pause()
        os.read(reader, 1)
        os.kill(child, signal.SIGTERM)
        print("alive, and the child ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    launch = launcher.start(store, [script])
    assert launch.wait() == 0, launch.text()
    assert "alive, and the child ended with -15" in launch.text()


@pytest.mark.fresh_script
def test_a_signal_to_every_process_of_the_job_is_one_notice(launcher, store, twin) -> None:  # type: ignore[no-untyped-def]
    first = launcher.plain(store, "--step_s", "0.2", "--workers", "2")
    first.wait_for_step(3)
    for one in reversed(first.tree()):
        one.send_signal(signal.SIGTERM)
    assert first.wait() == 75, first.text()
    assert kinds(store).count("notice") == 1
    newest = Run(store).latest()
    assert newest is not None and newest.step == first.step(), first.text()
    lines = first.lines()
    assert {line["step"]: line for line in lines} == {step: twin.lines[step] for step in range(1, newest.step + 1)}


def test_a_newer_launch_on_another_machine_stops_this_one(launcher, store) -> None:  # type: ignore[no-untyped-def]
    launch = launcher.plain(store, "--step_s", "0.2", "--save_steps", "2")
    launch.wait_for_step(3)
    Run(store).claim({"by": "a test"})
    assert launch.wait() == 76, launch.text()
    assert [entry.launch for entry in Run(store).events()][-1] == 2
    assert "Traceback" not in launch.text()


@pytest.mark.fresh_script
def test_a_crash_in_training_goes_on_from_the_last_commit(launcher, store, twin, write) -> None:  # type: ignore[no-untyped-def]
    from tests.launch.conftest import PLAIN

    script = write(
        f"""
        import gc, os, runpy
        def main():
            import transformers
            class Crash(transformers.TrainerCallback):
                def on_step_begin(self, args, state, control, **kwargs):
                    if state.global_step == 13 and not os.path.exists("crashed"):
                        open("crashed", "w").close()
                        os.abort()
            from transformers.trainer import DEFAULT_CALLBACKS
            DEFAULT_CALLBACKS.append(Crash)
        main()
        print("collector:", gc.isenabled(), gc.get_freeze_count())
        runpy.run_path({str(PLAIN)!r}, run_name="__main__")
        """
    )
    launch = launcher.start(
        store, [script, "--output_dir", "out", "--diary", "diary-1", "--weights", "weights-1", "--step_s", "0.05"]
    )
    assert launch.wait() == 0, launch.text()
    assert "collector: True 0" in launch.text()  # what was there before a function imported Trainer may become garbage
    assert launcher.weights() == twin.weights
    claim, *_ = [entry for entry in Run(store).events() if entry.kind == "failed"]
    assert claim.data == {"exit_code": 128 + signal.SIGABRT, "step": 13, "committed_step": 10}
    assert [line["step"] for line in launch.lines()] == [*range(1, 14), *range(11, 33)]


@pytest.mark.slow
def test_two_ranks_are_preempted_together_and_end_with_the_model_of_two_ranks_left_in_peace(launcher, tmp_path) -> None:  # type: ignore[no-untyped-def]
    ranks = of_ranks(2)
    # An evaluation after every step: whichever step the notice stops, the resumed launch has one to make up for.
    script = ("--evaluate", "steps", "--eval_steps", "1", "--best")
    peace = launcher.plain(str(tmp_path / "peace"), *script, options=ranks)
    assert peace.wait() == 0, peace.text()
    undisturbed = launcher.weights()
    run = str(tmp_path / "run")
    first = launcher.plain(run, *script, "--eval_batch_s", "0.3", options=ranks)  # most likely it comes in one
    first.wait_for_step(3)
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 75, first.text()
    assert Run(run).state().ended == "preempted"
    stopped_at = first.step()
    second = launcher.plain(run, *script, options=ranks)
    assert second.wait() == 0, second.text()
    assert min(line["step"] for line in second.lines()) == stopped_at + 1
    assert launcher.weights() == undisturbed

    def by_step(lines: Lines) -> dict[int, Any]:  # both ranks write
        return {line["step"]: line for line in lines}

    assert by_step(first.lines()) | by_step(second.lines()) == by_step(peace.lines())


def as_of_the_first_commit(run: Path, store: str) -> None:
    """Copies a run as it was when its machine vanished behind its first commit."""
    shutil.copytree(run, store)
    first = kinds(store).index("commit")
    for path in sorted((Path(store) / "journal").glob("*.json"))[first + 1 :]:
        path.unlink()
    assert kinds(store) == ["claim", "training", "commit"]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_on_another_number_of_ranks_each_step_keeps_its_samples_and_learning_rate(
    launcher,  # type: ignore[no-untyped-def]
    store: str,
    tmp_path: Path,
    before: int,
    after: int,
) -> None:
    peace = launcher.plain(str(tmp_path / "peace"), "--dropout", "0", options=[*of_ranks(before), "--save-total-limit", "0"])
    assert peace.wait() == 0, peace.text()
    as_of_the_first_commit(tmp_path / "peace", store)
    second = launcher.plain(store, "--dropout", "0", options=of_ranks(after))
    assert second.wait() == 0, second.text()
    assert "The samples are the same, but results will not be bit-exact" in second.text()
    undisturbed = {line["step"]: line for line in peace.lines()}
    assert max(undisturbed) == second.step()
    lines = second.lines()
    assert min(line["epoch"] for line in lines) < 1
    for line in lines:
        assert line["learning_rate"] == undisturbed[line["step"]]["learning_rate"]
        # Several ranks fill up the last step of an epoch with samples from its start; one rank doesn't.
        exact = line["epoch"] < 1
        assert float(line["loss"]) == pytest.approx(float(undisturbed[line["step"]]["loss"]), rel=1e-6 if exact else 1e-2)


def test_the_journal_knows_the_machine_and_no_secret(launcher, store, write) -> None:  # type: ignore[no-untyped-def]
    launch = launcher.start(store, [write("pass"), "--token", "hf_secret"], env={"AWS_SECRET_ACCESS_KEY": "very-secret"})
    assert launch.wait() == 0
    claim = next(Run(store).events())
    assert claim.data["hostname"] == os.uname().nodename
    assert set(claim.data["versions"]) >= {"torch", "transformers", "accelerate"}
    assert "secret" not in json.dumps(claim.data)
