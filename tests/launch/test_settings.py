"""Options of a launch from the command line, from variables and from a file, and what of them is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import hf_spot
from hf_spot.cli import main
from hf_spot.errors import ConfigError
from hf_spot.launch.early import likely_signals
from hf_spot.launch.options import parse, parser
from hf_spot.launch.settings import OTHER_VARIABLES, unknown_variables, variable_of
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.run import Run


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "train.py").write_text("")
    return str(tmp_path / "train.py")


def config(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


FILE = "store: /of/file\nupload-workers: 2\nallow_batch_change: true\nsave_total_limit: 7\nnum_processes: 1\n"


@pytest.mark.parametrize(
    ("argv", "environ", "workers"),
    [
        ([], {}, 2),
        ([], {"HF_SPOT_UPLOAD_WORKERS": "3"}, 3),
        (["--upload_workers", "5"], {"HF_SPOT_UPLOAD_WORKERS": "3"}, 5),
        (["--upload-workers=5"], {}, 5),
    ],
)
def test_the_command_line_comes_before_variables_and_those_before_the_file(
    tmp_path: Path, script: str, argv: list[str], environ: dict[str, str], workers: int
) -> None:
    for more in (["--config", config(tmp_path, FILE)], [f"--config={config(tmp_path, FILE)}"]):
        command = parse([*more, *argv, script], environ)
        assert command.arguments.upload_workers == workers
        assert (command.store, command.arguments.allow_batch_change, command.arguments.keep_checkpoints) == (
            "/of/file",
            True,
            7,
        )
    named_by_variable = parse([*argv, script], {**environ, "HF_SPOT_CONFIG": config(tmp_path, FILE)})
    assert named_by_variable.arguments.upload_workers == workers


def test_variables_that_other_parts_read_come_before_the_file(tmp_path: Path, script: str) -> None:
    path = config(tmp_path, "store: /of/file\ngrace_s: 5\non-event: http://of.file/hook\n")
    command = parse(["--config", path, script], {"HF_SPOT_STORE": "/of/variable", "HF_SPOT_GRACE_S": "9"})
    assert (command.store, command.arguments.grace_s, command.arguments.on_event) == (
        "/of/variable",
        None,
        "http://of.file/hook",
    )


def test_a_flag_of_the_file_can_be_switched_off_by_a_variable(tmp_path: Path, script: str) -> None:
    path = config(tmp_path, FILE)
    assert not parse(["--config", path, script], {"HF_SPOT_ALLOW_BATCH_CHANGE": "no"}).arguments.allow_batch_change


def test_options_of_accelerate_reach_accelerate_from_a_file(tmp_path: Path, script: str) -> None:
    path = config(tmp_path, "store: /x\nmulti_gpu: true\nnum-processes: 2\nmain_process_port: 0\nmax-restarts: 5\n")
    command = parse(["--config", path, script, "--its", "own"], {"PATH": ""})
    assert "--num_processes=2" in command.argv and "--multi_gpu" in command.argv and command.max_restarts == 5
    assert not any("config" in word or "store" in word for word in command.argv)
    assert command.script == [script, "--its", "own"]


@pytest.mark.parametrize(
    ("text", "environ", "word", "hint"),
    [
        ("stor: x\n", {}, "run.yaml:1: stor", "did you mean store?"),
        ("store: x\ncadense: auto\n", {}, "run.yaml:2: cadense", "did you mean cadence?"),
        ("allow-batch-change: perhaps\n", {}, "neither true nor false", "true, or false"),
        ("- store\n", {}, "not a mapping", "store: s3://"),
        ("store: {a: b}\n", {}, "mapping is not a value", ""),
        ("store: x\n", {"HF_SPOT_ALLOW_BATCH_CHANGE": "perhaps"}, "$HF_SPOT_ALLOW_BATCH_CHANGE='perhaps'", "unset"),
        ("store: x\n", {"HF_SPOT_UPLOAD_WORKERS": "many"}, "many", "hf-spot launch --help"),
    ],
)
def test_what_can_not_be_used_is_named(
    tmp_path: Path, script: str, text: str, environ: dict[str, str], word: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(["--config", config(tmp_path, text), script], environ)
    assert word in raised.value.args[0]
    assert hint in raised.value.hint


def test_an_unknown_option_is_answered_with_the_nearest(script: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(["--store", "x", "--cadense", "auto", script], {})
    assert raised.value.hint == "did you mean --cadence? All options: hf-spot launch --help"


def test_a_misspelled_variable_is_named(script: str) -> None:
    told = "$HF_SPOT_CADENSE is not a setting of hf_spot and has no effect; did you mean HF_SPOT_CADENCE?"
    assert told in parse(["--store", "x", script], {"HF_SPOT_CADENSE": "auto"}).remarks
    assert not unknown_variables(dict.fromkeys(OTHER_VARIABLES, ""), parser())


def test_every_variable_that_hf_spot_reads_is_known() -> None:
    sources = Path(hf_spot.__file__).parent.rglob("*.py")
    read = {found for path in sources for found in re.findall(r'"(HF_SPOT_[A-Z0-9_]+[A-Z0-9])"', path.read_text())}
    of_options = {variable_of(action) for action in parser()._actions if action.option_strings}
    assert read <= OTHER_VARIABLES | of_options


def test_the_signals_of_a_variable_are_handled_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPOT_SIGNALS", "SIGUSR2")
    assert "SIGUSR2" in [one.name for one in likely_signals(["train.py"])]


def test_the_printed_settings_are_a_file_with_the_same_settings(
    tmp_path: Path, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, f"{FILE}mixed_precision: 'no'\non_event: https://hooks.example/secret\n")
    argv = ["--config", path, "--cadence", "auto", "--print-config"]
    with pytest.raises(SystemExit) as ended:
        parse(argv, {"HF_SPOT_PEER_TIMEOUT_S": "40"})
    printed = capsys.readouterr().out
    assert (ended.value.code, "secret" in printed) == (0, False)
    for line in ("cadence: auto .*# command line, HF_SPOT_CADENCE", "peer-timeout-s: 40.0 .*# .HF_SPOT_PEER_TIMEOUT_S, "):
        assert re.search(line, printed), printed
    again = config(tmp_path, "\n".join(line for line in printed.splitlines() if not line.startswith("on-event")))
    command = parse(["--config", again, script], {})
    first = parse(["--config", config(tmp_path, FILE), "--cadence", "auto", "--peer-timeout-s", "40", script], {})
    assert (command.arguments, command.store, command.max_restarts) == (first.arguments, first.store, first.max_restarts)
    assert yaml.safe_load(printed)["mixed-precision"] == "no"


def test_quiet_and_verbose_are_for_all_ranks(script: str) -> None:
    assert parse(["--store", "x", "-v", script], {}).environ["HF_SPOT_LOG_LEVEL"] == "debug"
    assert parse(["--store", "x", "-q", script], {}).environ["HF_SPOT_LOG_LEVEL"] == "warning"
    assert "HF_SPOT_LOG_LEVEL" not in parse(["--store", "x", script], {}).environ


def test_a_dry_run_starts_nothing_and_says_what_it_would_do(
    tmp_path: Path, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "run"
    words = ["launch", "--store", str(store), "--num_processes", "1", "--dry-run", script]
    assert main(words) == 0
    assert "it would: begin from the start, as launch 1" in capsys.readouterr().out
    assert not store.exists()
    run, folder = Run(store), tmp_path / "checkpoint-5"
    run.claim()
    folder.mkdir()
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (folder / name).write_text("{}")
    request = CommitRequest(step=5)
    run.commit(request, run.upload(folder, request))
    before = sorted(store.rglob("*"))
    assert main(words) == 0
    assert "it would: go on as launch 2 from step 5, committed by launch 1 at " in capsys.readouterr().out
    run.record("finished", {"step": 5})
    assert main(words) == 0
    assert "it would: do nothing: the run is finished at step 5" in capsys.readouterr().out
    assert {path.name for path in store.rglob("*")} - {path.name for path in before} == {"00000003.json"}
