"""hf_spot's lines beside a script's own logging: in real processes, as what is set up there is the process's."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from hf_spot.log import shown_level
from tests.zygote import Zygote

BASIC = "logging.basicConfig()"
LINES = {"committed": "log.info", "is set aside": "log.warning", "notice": "alert", "not committed": "log_always"}
SPEAK = """
from hf_spot.log import alert, log, log_always
log.debug("a detail")
log.info("committed")
log.warning("is set aside")
alert("notice")
log_always(logging.ERROR, "not %s", "committed")
"""


def run(script: str, tmp_path: Path, zygote: Zygote | None = None, **env: str) -> str:
    """All that a script of its own process writes: to both streams, and to a file."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "TRANSFORMERS_VERBOSITY")}
    with zygote.forking() if zygote else contextlib.nullcontext():
        done = subprocess.run(
            [sys.executable, "-c", f"import logging, sys\n{script}"],
            cwd=tmp_path,
            env={**kept, "HF_HUB_OFFLINE": "1", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stdout
    file = tmp_path / "file.log"
    return done.stdout + (file.read_text() if file.exists() else "")


def seen(text: str) -> list[str]:
    """Which of the lines of SPEAK stand there, as often as they do."""
    told = re.findall(r"not committed|committed|is set aside|notice|a detail", text)
    return sorted(told, key=[*LINES, "a detail"].index)


ALL = list(LINES)


@pytest.mark.parametrize(
    ("before", "after", "how"),
    [
        ("", "", "hf-spot: committed"),
        (BASIC, "", "INFO:hf_spot:committed"),
        ("", BASIC, "INFO:hf_spot:committed"),
        (BASIC, BASIC, "INFO:hf_spot:committed"),
        ("logging.basicConfig(level='INFO')", "", "INFO:hf_spot:committed"),
        ("", "logging.basicConfig(level='INFO')", "INFO:hf_spot:committed"),
        ("logging.basicConfig(level='WARNING')", "", "INFO:hf_spot:committed"),
        ("", "logging.basicConfig(level='WARNING')", "INFO:hf_spot:committed"),
        ("", "logging.basicConfig(level='ERROR', force=True)", "INFO:hf_spot:committed"),
        (BASIC, "logging.basicConfig(format='%(name)s says %(message)s', force=True)", "hf_spot says committed"),
        ("", "logging.basicConfig(handlers=[logging.StreamHandler(sys.stdout)])", "INFO:hf_spot:committed"),
        (
            "",
            "logging.basicConfig(); logging.getLogger().handlers[0].addFilter(lambda record: record.levelno >= 30)",
            "hf-spot: committed",
        ),
        ("", "logging.basicConfig(filename='file.log')", "INFO:hf_spot:committed"),
        ("logging.getLogger('hf_spot').addHandler(logging.StreamHandler())", "", "committed"),
        ("", "logging.getLogger('hf_spot').addHandler(logging.StreamHandler())", "committed"),
        ("", "logging.getLogger('hf_spot').addHandler(logging.NullHandler())", "hf-spot: committed"),
        ("logging.getLogger('hf_spot').propagate = False", BASIC, "hf-spot: committed"),
        ("logging.getLogger('hf_spot').addHandler(logging.StreamHandler())", "log.propagate = False\n" + BASIC, "committed"),
        ("", "import importlib, hf_spot.log\nimportlib.reload(hf_spot.log)", "hf-spot: committed"),
        ("", "import importlib, hf_spot.log\nimportlib.reload(hf_spot.log)\n" + BASIC, "INFO:hf_spot:committed"),
        (
            "",
            "logging.getLogger().addHandler(logging.StreamHandler()); logging.getLogger().handlers[0].setLevel(99)",
            "committed",
        ),
    ],
)
def test_each_line_appears_once_whatever_a_script_sets_up(before: str, after: str, how: str, tmp_path: Path) -> None:
    text = run(f"{before}\nimport hf_spot\nfrom hf_spot.log import log\n{after}{SPEAK}", tmp_path)
    assert seen(text) == ALL, text
    assert how in text.splitlines() or f"hf-spot: {how}" in text.splitlines(), text


SET = "import transformers\ntransformers.utils.logging.set_verbosity_{}()"
QUIET = ["notice", "not committed"]


@pytest.mark.parametrize("order", ["", BASIC])
@pytest.mark.parametrize(
    ("before", "after", "env", "shown"),
    [
        ("", "", {"TRANSFORMERS_VERBOSITY": "debug"}, [*ALL, "a detail"]),
        ("", "", {"TRANSFORMERS_VERBOSITY": "info"}, ALL),
        ("", "", {"TRANSFORMERS_VERBOSITY": "warning"}, ALL[1:]),
        ("", "", {"TRANSFORMERS_VERBOSITY": "critical"}, QUIET),
        ("", "", {"TRANSFORMERS_VERBOSITY": "no such level"}, ALL),
        ("", "", {"ACCELERATE_LOG_LEVEL": "warning"}, ALL[1:]),
        ("", "", {"ACCELERATE_LOG_LEVEL": "ERROR"}, QUIET),
        ("", "", {"ACCELERATE_LOG_LEVEL": "error", "TRANSFORMERS_VERBOSITY": "info"}, ALL),
        ("", "", {"RANK": "1"}, ALL[1:]),
        ("", "", {"RANK": "1", "TRANSFORMERS_VERBOSITY": "info"}, ALL[1:]),
        ("", "", {"OMPI_COMM_WORLD_RANK": "3"}, ALL[1:]),
        ("", "log.setLevel('INFO')", {"RANK": "1", "TRANSFORMERS_VERBOSITY": "error"}, ALL),
        ("logging.getLogger('hf_spot').setLevel('ERROR')", "", {"TRANSFORMERS_VERBOSITY": "info"}, QUIET),
        ("", "log.setLevel('CRITICAL')", {}, QUIET),
        ("", "logging.disable(logging.CRITICAL)", {}, QUIET),
        ("", f"log.handlers.clear()\n{BASIC}\nlogging.getLogger().handlers[0].setLevel('CRITICAL')", {}, QUIET),
        ("", "from logging.config import dictConfig\ndictConfig({'version': 1})", {}, QUIET),
        ("import transformers", "", {}, ALL),
        (SET.format("error"), "", {}, QUIET),
        ("", SET.format("error"), {}, QUIET),
        ("", SET.format("debug"), {}, [*ALL, "a detail"]),
        ("", SET.format("warning"), {"TRANSFORMERS_VERBOSITY": "info"}, ALL[1:]),
        ("", SET.format("info"), {"TRANSFORMERS_VERBOSITY": "error", "ACCELERATE_LOG_LEVEL": "error"}, ALL),
    ],
)
def test_lines_follow_the_verbosity(
    order: str, before: str, after: str, env: dict[str, str], shown: list[str], tmp_path: Path
) -> None:
    text = run(f"{before}\nimport hf_spot\nfrom hf_spot.log import log\n{order}\n{after}{SPEAK}", tmp_path, **env)
    assert seen(text) == shown, text


def test_a_level_that_changes_in_between_counts_from_then_on(tmp_path: Path) -> None:
    script = "\n".join(
        f"{SET.format(level)}\nlog.info('{level} committed')" for level in ("error", "info", "warning", "error", "debug")
    )
    text = run(f"import hf_spot\nfrom hf_spot.log import log\n{script}", tmp_path)
    assert re.findall(r"(\w+) committed", text) == ["info", "warning", "debug"]  # WARNING is what transformers begins with


@pytest.mark.parametrize("transformers_level", [logging.NOTSET, logging.WARNING])
def test_the_level_of_a_trainer_that_nobody_chose_is_nobodys_wish(transformers_level: int) -> None:
    assert shown_level(transformers_level, {}, is_first_rank=True) == logging.INFO
    assert shown_level(transformers_level, {}, is_first_rank=False) == logging.WARNING
    assert shown_level(transformers_level, {"TRANSFORMERS_VERBOSITY": "warning"}, is_first_rank=True) == logging.WARNING


def test_the_classes_touch_no_logger(tmp_path: Path, zygote: Zygote) -> None:
    script = """
import hf_spot
def state():
    return [(one.handlers[:], one.level, one.propagate, one.disabled) for one in map(logging.getLogger, ("", "hf_spot"))]
before = state()
assert before[0][:2] == ([], logging.WARNING)
hf_spot.SpotCallback(args=hf_spot.SpotArguments(notice="none"))
hf_spot.SpotCheckpointManager("run", args=hf_spot.SpotArguments(notice="none"))
assert state() == before
"""
    run(script, tmp_path, zygote)  # torch and transformers are imported already: they are not ours


@pytest.mark.parametrize("handlers", ["", BASIC])
def test_a_line_begins_where_no_bar_is(handlers: str, tmp_path: Path) -> None:
    script = f"""
from tqdm import tqdm
import hf_spot.log
{handlers}
bar = tqdm(total=10, mininterval=0)
bar.update(5)
hf_spot.log.log.info("committed")
bar.update(1)
"""
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    with subprocess.Popen([sys.executable, "-c", f"import logging{script}"], stderr=other, cwd=tmp_path) as process:
        os.close(other)
        written = b""
        while True:
            try:
                written += os.read(main, 1000)
            except OSError:  # the end, for a terminal
                break
        assert process.wait(60) == 0
    os.close(main)
    screen = [
        line.rpartition("\r")[2].replace("\x1b[K", "").strip() for line in written.decode().replace("\r\n", "\n").split("\n")
    ]
    assert [line for line in screen if "committed" in line] == ["INFO:hf_spot:committed" if handlers else "hf-spot: committed"]
    assert sum("60%" in line for line in screen) == 1, screen
