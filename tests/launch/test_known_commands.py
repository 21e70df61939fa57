"""Commands that people know, under ``hf-spot launch``: they are run as they are, and train in processes that they start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError
from hf_spot.launch.command import Command
from hf_spot.launch.options import find_program, parse
from hf_spot.launch.unhooked import Unhooked
from hf_spot.run.run import Run
from hf_spot.runtime import Runtime
from tests.launch.conftest import Launcher
from tests.launch.test_trainings import SETUP
from tests.zygote import Zygote

STORE = ["--store", "s3://b/r"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with files of many kinds; only ``bin`` is on PATH."""
    files = {
        "train.py": "",
        "train.sh": "python train.py",
        "run.sh": "#!/bin/sh\n",
        "program": "#!/usr/bin/env -S perl -w\n",
        "tool": "#!/usr/bin/env python3\n",
        "here": f"#!{sys.executable}\n",
        "elsewhere": f"#!{tmp_path}/other/bin/python\n",
        "text": "print(1)",
        "bin/known": "#!/bin/sh\n",
        "bin/both": "#!/bin/sh\n",
        "both/__main__.py": "",
        "known/setup.py": "",
        "other/bin/python": "\x7fELF",
        "binary": "\x7fELF",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o644 if name in ("train.sh", "text", "train.py") else 0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("word", "program"),
    [
        ("train.py", None),
        ("./train.py", None),
        ("nosuch.py", None),
        ("run.sh", "run.sh"),
        ("./run.sh", "run.sh"),
        ("program", "program"),
        ("binary", "binary"),
        ("tool", None),
        ("here", None),
        ("elsewhere", "elsewhere"),
        ("text", None),
        ("known", "bin/known"),  # a folder of that name, such as a clone of it, is no script
        ("both", None),  # but one with a __main__.py is
        ("./known", None),
        ("nosuch", None),
    ],
)
def test_a_word_that_is_no_script_is_a_command(folder: Path, word: str, program: str | None) -> None:
    found = find_program(word, {"PATH": str(folder / "bin")})
    assert found == (None if program is None else str(folder / program))


def test_a_command_that_is_not_on_the_path_may_stand_beside_this_python(folder: Path) -> None:
    found = find_program("python", {"PATH": str(folder / "bin")})
    assert found is not None and Path(found).parent == Path(sys.executable).parent


def test_a_shell_script_that_is_not_executable_is_refused_with_the_way_to_run_it(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse([*STORE, "train.sh"], {})
    assert "bash train.sh" in caught.value.hint


def test_a_command_gets_its_own_words_and_no_environment_of_accelerate(folder: Path) -> None:
    environ = {"PATH": str(folder / "bin"), "A": "b"}
    command = parse(["--notice", "imds", *STORE, "known", "sft", "--store", "x", "-m", "train.py"], environ)
    assert command.as_it_is
    assert command.argv == [str(folder / "bin" / "known"), "sft", "--store", "x", "-m", "train.py"]
    assert (command.environ, command.store, command.arguments.notice) == (environ, "s3://b/r", "imds")


def test_a_finished_run_is_known_by_the_command_and_its_files_but_not_by_what_it_writes(folder: Path) -> None:
    (folder / "data.json").write_text("1")
    (folder / "old.log").write_text("an earlier launch\n")
    words = ["known", "--data", "data.json", "--log=old.log", "--results", "new.json"]
    command = parse([*STORE, *words], {"PATH": str(folder / "bin")})
    before = command.inputs()
    (folder / "old.log").write_text("an earlier launch\nthis one\n")
    (folder / "new.json").write_text("2")
    finished = command.fingerprint(before)
    assert command.has_finished(finished)
    for name in ("old.log", "new.json", "data.json"):  # another machine has none of them
        (folder / name).unlink()
        assert command.has_finished(finished), name
    (folder / "data.json").write_text("3")
    assert not command.has_finished(finished)
    other = parse([*STORE, *words, "--more"], {"PATH": str(folder / "bin")})
    (folder / "data.json").write_text("1")
    assert command.has_finished(finished) and not other.has_finished(finished)
    assert command.has_finished(None) and command.has_finished("0123456789abcdef")  # of before fingerprints had a form


def test_options_of_accelerate_before_a_command_are_refused_with_a_hint(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse([*STORE, "--multi_gpu", "--num_processes", "2", "known", "x"], {"PATH": str(folder / "bin")})
    assert "--multi_gpu --num_processes 2" in str(caught.value)
    assert "accelerate launch --multi_gpu --num_processes 2" in caught.value.hint


def test_the_hint_for_several_machines_is_a_command_that_is_accepted(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse([*STORE, "--num_machines", "2", "known", "x"], {"PATH": str(folder / "bin")})
    assert caught.value.hint.endswith("hf-spot launch --store URL --num_machines 2 train.py")


@pytest.mark.parametrize("option", ["-q", "--quiet"])
def test_a_command_may_be_quiet(folder: Path, option: str) -> None:
    command = parse([*STORE, option, "known", "x"], {"PATH": str(folder / "bin")})
    assert command.environ["HF_SPOT_LOG_LEVEL"] == "warning"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["srun", "-n2", "python"], "as a job of a scheduler"),
        (["sudo", "-E", "python"], "as another user"),
        (["env", "-i", "python"], "without the environment"),
        (["docker", "run", "x"], "in a container"),
        (["env", "A=b", "python"], ""),
        (["deepspeed", "--hostfile=hosts", "train.py"], "3 machines (a, b, c)"),
        (["deepspeed", "-H", "hosts", "-i", "a:0,1", "train.py"], ""),
        (["deepspeed", "-H", "hosts", "--include", "a:0@c", "train.py"], "2 machines (a, c)"),
        (["deepspeed", "-H", "one", "train.py"], ""),
        (["deepspeed", "-H", "nowhere", "train.py"], ""),
        (["deepspeed", "train.py", "-H", "hosts"], ""),
        (["mpirun", "-np", "2", "-H", "a:1,b:1", "python"], "2 machines (a, b)"),
        (["mpirun", "--hostfile", "one", "-np", "2", "python"], ""),
        (["mpirun", "-np", "2", "python"], ""),
    ],
)
def test_a_command_that_trains_where_the_launch_is_not_is_refused(folder: Path, words: list[str], told: str) -> None:
    (folder / "hosts").write_text("a slots=2\n# b slots=8\n\nb slots=2\nc slots=2 # last\n")
    (folder / "one").write_text("a slots=2\n")
    (folder / "bin" / words[0]).write_text("#!/bin/sh\n")
    (folder / "bin" / words[0]).chmod(0o755)
    environ = {"PATH": str(folder / "bin")}
    if not told:
        assert parse([*STORE, *words], environ).as_it_is
        return
    with pytest.raises(ConfigError, match=re.escape(told)):
        parse([*STORE, *words], environ)


@pytest.mark.parametrize(
    ("words", "is_refused"),
    [
        (["--nnodes", "2", "train.py"], True),
        (["--nnodes=1:4", "train.py"], True),
        (["launch", "--num_machines", "2", "train.py"], True),
        (["--num_nodes=2", "train.py"], True),
        (["--nnodes", "1", "train.py"], False),
        (["--nnodes=1:1", "train.py"], False),
        (["train.py", "--num_machines", "2"], False),
    ],
)
def test_a_command_for_several_machines_is_refused(folder: Path, words: list[str], is_refused: bool) -> None:
    environ = {"PATH": str(folder / "bin")}
    if not is_refused:
        assert parse([*STORE, "known", *words], environ).as_it_is
        return
    with pytest.raises(ConfigError, match="one machine only") as caught:
        parse([*STORE, "known", *words], environ)
    assert "--num_machines 2" in caught.value.hint


def test_a_word_that_is_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no such script, and no such command on PATH"):
        parse([*STORE, "nosuch", "x"], {"PATH": str(folder / "bin")})


@pytest.mark.parametrize("code", [0, 7, 143])
def test_the_exit_code_of_a_command_is_that_of_the_launch(launcher: Launcher, tmp_path: Path, code: int) -> None:
    launch = launcher.start_known(str(tmp_path / "run"), ["sh", "-c", f"exit {code}"], options=["--max-restarts", "0"])
    assert launch.wait() == code, launch.text()


# Trainings without torch: what the launcher learns of one is a file.
REPORTS = """
import os, signal, subprocess, sys, time
from pathlib import Path
report = Path(os.environ["HF_SPOT_RUNTIME_DIR"], f"training-{os.getpid()}")
report.touch()
"""
IS_KILLED = f"{REPORTS}os.kill(os.getpid(), signal.SIGKILL)"
IS_LONG = f"{REPORTS}time.sleep(1.0); Path('trained').touch(); report.write_text('ended'); time.sleep(600)"
FAILS_LATE = f"""{REPORTS}
while not report.with_name("command-ended").exists():
    time.sleep(0.01)
report.with_name(f"failed-{{os.getpid()}}").touch()
"""
KILLS = f"""
import os, subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", {f"{REPORTS}Path('begun').touch(); time.sleep(600)"!r}])
while not Path("begun").exists():
    time.sleep(0.01)
child.kill()
child.wait()
"""


@pytest.mark.parametrize(
    ("code", "shell", "ends", "told"),
    [
        pytest.param(IS_KILLED, "{}; touch after", 137, "was killed while it trained", id="killed, and the shell goes on"),
        pytest.param(KILLS, "{}; touch after", 0, "", id="killed by a program that has started it"),
        pytest.param(IS_LONG, "{} &", 0, "has left a training behind: waiting for it", id="in the background"),
        pytest.param(
            IS_KILLED.replace("os.kill", "time.sleep(1); os.kill"), "{} &", 137, "was killed while", id="killed there"
        ),
        pytest.param(FAILS_LATE, "{} &", 1, "ended with 1", id="fails in the background"),
    ],
)
def test_a_training_that_dies_or_outlives_its_command_is_not_taken_for_a_success(
    launcher: Launcher, tmp_path: Path, code: str, shell: str, ends: int, told: str
) -> None:
    (tmp_path / "train.py").write_text(code)
    command = ["sh", "-c", shell.format(f"{sys.executable} train.py")]
    launch = launcher.start_known(str(tmp_path / "run"), command, options=["--max-restarts", "0"])
    assert launch.wait() == ends, launch.text()
    assert told in launch.text()
    assert (tmp_path / "after").exists() == ("after" in shell)
    assert (tmp_path / "trained").exists() == (code is IS_LONG)


IN_A_ROW = (
    SETUP
    + """
stop, *names = sys.argv[1:]
for name in names:
    trainer = make_trainer(f"out-{name}", ord(name), *([Stop(5)] if stop == name else []), num_train_epochs=1)
    trainer.train()
    Path(f"model-{name}.json").write_text(json.dumps([trainer.state.global_step, digest(trainer.model)]))
"""
)


@pytest.mark.slow
def test_a_shell_script_with_two_trainings_in_a_row_gives_two_models_and_runs_nothing_after_an_interruption(
    launcher: Launcher, tmp_path: Path, zygote: Zygote
) -> None:
    (tmp_path / "train.py").write_text(IN_A_ROW)
    script = tmp_path / "train.sh"
    script.write_text(f"{sys.executable} train.py $1 a\ntouch after-a\n{sys.executable} train.py $1 b\ntouch after-b\n")

    def models() -> list[object]:
        return [json.loads((tmp_path / f"model-{name}.json").read_text()) for name in "ab"]

    environ = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with zygote.forking():
        subprocess.run([sys.executable, "train.py", "none", "a", "b"], check=True, cwd=tmp_path, env=environ)
    undisturbed = models()
    store = str(tmp_path / "run")
    first = launcher.start_known(store, ["bash", script, "a"])
    assert first.wait() == 75, first.text()
    assert not (tmp_path / "after-a").exists()
    second = launcher.start_known(store, ["bash", script, "none"])
    assert second.wait() == 0, second.text()
    assert "resuming from step 5" in second.text()
    assert models() == undisturbed
    assert (tmp_path / "after-b").exists()
    assert {ref.training for ref in Run(store).state().checkpoints} == {1, 2}
    again = launcher.start_known(store, ["bash", script, "none"])
    assert again.wait() == 0 and "nothing to do" in again.text()


@pytest.mark.fresh_python
def test_a_process_that_has_torch_without_the_hook_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runtime = Runtime(str(tmp_path / "run"), 1, tmp_path, SpotArguments())
    now = [0.0]
    unhooked = Unhooked(runtime, lambda: now[0])
    code = "import time, torch; print(1, flush=True); time.sleep(60)"
    started = [subprocess.Popen([sys.executable, *more, "-c", code], stdout=subprocess.PIPE) for more in ([], ["-I"])]
    try:
        for one in started:
            assert one.stdout is not None and one.stdout.readline()
        (tmp_path / f"met-{started[0].pid}").touch()
        for _ in range(3):
            now[0] += 60.0
            unhooked.look(lambda: [psutil.Process(one.pid) for one in started])
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == 1 and f"process {started[1].pid} has loaded torch without hf_spot" in told[0]
    finally:
        for one in started:
            one.kill()
            one.wait()
            assert one.stdout is not None
            one.stdout.close()


def test_a_process_that_can_not_be_looked_into_is_named_if_it_is_a_python(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(path)

    python = [sys.executable, "-c", "import time; time.sleep(600)"]  # until it is killed
    now, started = [0.0], [subprocess.Popen(words) for words in (["sleep", "600"], python)]
    monkeypatch.setattr(Path, "read_bytes", refuse)
    try:
        unhooked = Unhooked(Runtime(str(tmp_path / "run"), 1, tmp_path, SpotArguments()), lambda: now[0])
        for _ in range(3):
            now[0] += 20.0
            unhooked.look(lambda: [psutil.Process(one.pid) for one in started])
        told = [record.getMessage() for record in caplog.records if "another user" in record.getMessage()]
        assert len(told) == 1 and f"process {started[1].pid} runs as another user" in told[0]
    finally:
        for one in started:
            one.kill()
            one.wait()


@pytest.mark.parametrize("has_met", [True, False])
def test_a_command_of_which_nothing_has_met_hf_spot_in_its_first_minute_is_told_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, has_met: bool
) -> None:
    runtime, now = Runtime(str(tmp_path / "run"), 1, tmp_path, SpotArguments()), [0.0]
    unhooked = Unhooked(runtime, lambda: now[0])
    if has_met:
        runtime.meet()
    for at in (20.0, 40.0, 60.0, 120.0):
        assert at < 60.0 or has_met or len(caplog.records) == (at > 60.0)
        now[0] = at
        unhooked.look(list)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (not has_met)
    assert has_met or "no process of this command has loaded torch with hf_spot" in told[0]


def test_the_words_of_two_machines_are_compared_by_what_they_name(folder: Path) -> None:
    def digests(*words: str) -> list[str]:
        return Command("s3://b/r", SpotArguments(), 0, [], {}, script=[*words]).word_digests()

    for place in ("here", "there"):
        (folder / place).write_text("pass")
    (folder / "newer").write_text("pass # and more")
    assert digests("here", "--config=here", "x") == digests("there", "--config=there", "x")
    assert digests("here")[0] != digests("newer")[0] != digests("nowhere")[0]
    assert digests("here", "--config=here")[1] != digests("here", "--other=here")[1]
    many = digests("here", *"x" * 500)
    assert len(many) < 200  # of a short greeting
    assert many != digests("here", *"x" * 499, "y")
