"""Completion, as real shells do it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_spot.cli import main, parser
from hf_spot.completion import SHELLS, script

PRESS_TAB = """
source hf-spot.sh
[[ $(complete -p hf-spot) =~ -F\\ ([^ ]+) ]]
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
"${BASH_REMATCH[1]}" hf-spot "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("completion")
    (made / "hf-spot.sh").write_text(script(parser(), "bash"))
    (made / "train.py").touch()
    return made


def offered(folder: Path, *words: str) -> set[str]:
    """What bash offers when TAB is pressed behind the last of these words."""
    done = subprocess.run(
        ["bash", "--norc", "-euc", PRESS_TAB, "bash", "hf-spot", *words],
        cwd=folder,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_bash_completes_commands_and_their_options(folder: Path) -> None:
    assert {"launch", "checkpoints", "doctor", "completion"} <= offered(folder, "")
    assert offered(folder, "do") == {"doctor"}
    assert offered(folder, "checkpoints", "p") == {"pull", "push", "prune"}
    assert offered(folder, "checkpoints", "pull", "s3://bucket/run", "--s") == {"--step"}


def test_bash_completes_the_options_of_launch_ours_and_accelerates(folder: Path) -> None:
    shown = offered(folder, "launch", "--")
    assert {"--store", "--save-total-limit", "--max-restarts", "--multi_gpu", "--num_processes"} <= shown
    assert not {"--save_total_limit", "--num-processes"} & shown  # each only once
    assert offered(folder, "launch", "--multi") == {"--multi_gpu"}


def test_bash_completes_values_and_files(folder: Path) -> None:
    assert offered(folder, "launch", "--cadence", "") == {"fixed", "auto"}
    assert "gcp" in offered(folder, "watch", "--notice", "g")
    assert offered(folder, "launch", "--store", "s3://bucket/run", "tr") == {"train.py"}
    assert offered(folder, "simulate", "tr") == {"train.py"}


@pytest.mark.parametrize("shell", [shell for shell in SHELLS if shell != "bash"])
def test_other_shells_can_read_their_scripts(shell: str, tmp_path: Path) -> None:
    written = tmp_path / "hf-spot"
    written.write_text(script(parser(), shell))
    assert "save-total-limit" in written.read_text()
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: only bash is asked what it thinks of its script")
    done = subprocess.run([shell, "-n", written], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_without_the_extra_the_command_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)  # as importing it fails where it is not installed
    assert main(["completion", "bash"]) == 2
    said = capsys.readouterr().err
    assert "shtab" in said
    assert "pip install shtab" in said


def test_a_shell_that_nobody_knows_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "csh"]) == 2
    assert "bash" in capsys.readouterr().err
