"""The commands that look into a run, as a script would call them."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_spot.cli import main, parser
from hf_spot.errors import SpotError
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.run import Run

NAMES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def make_checkpoint(folder: Path) -> Path:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for name in NAMES:
        torch.save({"name": name, "tensor": torch.arange(100)}, folder / name)
    save_file({"weight": torch.arange(1000)}, folder / "model.safetensors")
    (folder / "trainer_state.json").write_text('{"global_step": 5}')
    return folder


@pytest.fixture
def url(tmp_path: Path) -> str:
    run = Run(tmp_path / "run")
    run.claim()
    for step in (5, 10, 15):
        request = CommitRequest(step=step)
        run.commit(request, run.upload(make_checkpoint(tmp_path / f"checkpoint-{step}"), request))
    return str(tmp_path / "run")


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, Any]:
    code = main([*argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_ls_and_prune(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert [ref["step"] for ref in call(capsys, "checkpoints", "ls", url)[1]] == [5, 10, 15]
    code, gone = call(capsys, "checkpoints", "prune", url, "--save-total-limit", "1")
    assert (code, [ref["step"] for ref in gone]) == (0, [5, 10])
    assert main(["checkpoints", "ls", url]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["checkpoint", "committed", "(UTC)", "reason", "launch", "size"]
    assert re.match(r"checkpoint-15 +20\d\d-\d\d-\d\d \d\d:\d\d:\d\d +schedule +1 ", line)


def test_verify_a_run(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", "verify", url]) == 0
    capsys.readouterr()
    (Path(url) / "e0001" / "checkpoint-10" / "optimizer.pt").write_bytes(b"rotten")
    code, found = call(capsys, "checkpoints", "verify", url)
    assert code == 1
    assert found["e0001/checkpoint-5"] == found["e0001/checkpoint-15"] == []
    assert "optimizer.pt" in found["e0001/checkpoint-10"][0]
    assert call(capsys, "checkpoints", "verify", url, "--step", "5")[0] == 0


@pytest.mark.parametrize("damage", [None, "missing", "short", "flipped", "json"])
def test_verify_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str | None) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-5")
    victim = folder / "optimizer.pt"
    data = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    elif damage == "short":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "flipped":
        middle = data.index(bytes(range(8, 9)) + bytes(7) + bytes(range(9, 10)))
        victim.write_bytes(data[:middle] + b"\xff" + data[middle + 1 :])
    elif damage == "json":
        (folder / "trainer_state.json").write_text("{")
    code, found = call(capsys, "checkpoints", "verify", str(folder))
    assert code == (1 if damage else 0)
    assert bool(found[str(folder)]) == bool(damage)


def test_pull_and_push(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = call(capsys, "checkpoints", "pull", url, str(tmp_path / "here"), "--step", "10")
    assert (code, told["folder"]) == (0, str(tmp_path / "here" / "checkpoint-10"))
    assert (tmp_path / "here/checkpoint-10/model.safetensors").read_bytes() == (
        tmp_path / "checkpoint-10/model.safetensors"
    ).read_bytes()
    code, ref = call(capsys, "checkpoints", "push", str(tmp_path / "other"), told["folder"])
    assert (code, ref["step"]) == (0, 10)
    assert call(capsys, "checkpoints", "ls", str(tmp_path / "other"))[1][0]["step"] == 10


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["checkpoints", "pull", "URL", "x", "--step", "7"], "no checkpoint of step 7"),
        (["checkpoints", "push", "URL", "/no/such/folder"], "/no/such/folder"),
        (["checkpoints", "prune", "EMPTY", "--save-total-limit", "1"], "no committed checkpoint"),
        (["checkpoints", "ls", "/no/such/place/run"], "/no/such/place"),
        (["watch", "--notice", "smoke", "--once"], "smoke"),
    ],
)
def test_errors_are_one_line_and_a_hint(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], word: str
) -> None:
    places = {"URL": url, "EMPTY": str(tmp_path / "empty")}
    assert main([places.get(one, one) for one in argv]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("hf-spot: error: ")
    assert word in printed
    assert "Try:" in printed


WRONG_USES = [
    (["lanch"], "lanch", "hf-spot launch"),
    (["checkpoints", "pul", "x"], "pul", "hf-spot checkpoints pull"),
    (["checkpoints", "pull"], "RUN", "hf-spot checkpoints pull --help"),
    (["prices"], "TYPE", "hf-spot prices --help"),
    (["report", "x", "--plt", "y"], "--plt", "--help"),
    (["report", "x", "--plt", "y"], "--plt", "did you mean --plot? All options: hf-spot report --help"),
    (["report", "x", "--Plot=y", "--nothing-like-it"], "--nothing-like-it", "did you mean --plot?"),
    (["checkpoints", "pull", "x", "--to", "y"], "--to", "hf-spot checkpoints pull --help"),
    (["provision", "job.yaml", "--api", "flet"], "flet", "hf-spot provision --api fleet"),
    (["provision"], "JOB", "hf-spot provision --example > job.yaml"),
    (["help", "chekpoints"], "chekpoints", "hf-spot checkpoints"),
    (["checkpoints", "pull", "x", "--step", "three"], "three", "hf-spot checkpoints pull --help"),
    (["sky", "job.yaml", "--logs", "--json"], "--logs", "hf-spot sky job.yaml --logs"),
]


@pytest.mark.parametrize(("argv", "word", "hint"), WRONG_USES)
def test_a_wrong_use_is_answered_with_what_to_type_next(
    capsys: pytest.CaptureFixture[str], argv: list[str], word: str, hint: str
) -> None:
    assert main([*argv, "--json"] if "--json" not in argv else argv) == 2
    out, err = capsys.readouterr()
    told = json.loads(err)
    assert out == ""
    assert word in told["error"]
    assert told["hint"].startswith(hint) or hint in told["hint"]


def test_errors_are_json_where_the_answer_would_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", "pull", str(tmp_path / "none"), "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    told = json.loads(err)
    assert (told["kind"], told["exit_code"]) == ("NoCheckpoint", 2)
    assert str(tmp_path) in told["error"]
    assert told["hint"].startswith("hf-spot ")


PRINT_A_FILE = {"completion", "recipe", "doctor iam"}  # the last one is JSON


def commands_without_json(parser: argparse.ArgumentParser, name: str = "") -> Iterator[str]:
    if parser.get_default("command") and not any("--json" in action.option_strings for action in parser._actions):
        yield name
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one, below in action.choices.items():
                yield from commands_without_json(below, f"{name} {one}".strip())


def test_every_command_that_answers_can_answer_in_json() -> None:
    assert {re.sub(r"^recipe .*", "recipe", name) for name in commands_without_json(parser())} == PRINT_A_FILE


def test_report(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = call(capsys, "report", url)
    assert (code, report["committed_step"], report["finished"]) == (0, 15, False)


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        ([], "usage: hf-spot "),
        (["help"], "usage: hf-spot "),
        (["checkpoints"], "usage: hf-spot checkpoints "),
        (["help", "checkpoints", "pull"], "usage: hf-spot checkpoints pull "),
        (["recipe"], "usage: hf-spot recipe "),
    ],
)
def test_help_is_shown_where_a_command_is_missing(capsys: pytest.CaptureFixture[str], argv: list[str], shown: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert out.startswith(shown)


def test_the_best_checkpoint_can_be_pulled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "run")
    run.claim()
    for step, best in ((5, 5), (10, 5)):
        request = CommitRequest(step=step, best_step=best)
        run.commit(request, run.upload(make_checkpoint(tmp_path / f"checkpoint-{step}"), request))
    url = str(tmp_path / "run")
    code, told = call(capsys, "checkpoints", "pull", url, str(tmp_path / "here"), "--step", "best")
    assert (code, told["folder"]) == (0, str(tmp_path / "here" / "checkpoint-5"))
    assert [*call(capsys, "checkpoints", "verify", url, "--step", "best")[1]] == ["e0001/checkpoint-5"]
    assert [(ref["step"], ref["reason"]) for ref in call(capsys, "checkpoints", "ls", url)[1]] == [
        (5, "schedule"),
        (10, "schedule"),
    ]


def test_a_run_without_a_best_checkpoint_says_so(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", "pull", url, str(tmp_path), "--step", "best"]) == 2
    assert "has no best checkpoint" in capsys.readouterr().err


def test_verbose_shows_where_an_error_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["-v", "report", "/no/such/place/run"], ["report", "-v", "/no/such/place/run"]):
        assert main(argv) == 2
        assert "Traceback" in capsys.readouterr().err
    assert main(["report", "/no/such/place/run"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_colours_are_for_terminals(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    assert main(["checkpoints", "verify", url]) == 0
    assert "\033" not in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["checkpoints", "verify", url]) == 0
    assert "\033[32mwhole\033[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["checkpoints", "verify", url]) == 0
    assert "\033" not in capsys.readouterr().out


PAGE = "<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head><body><center>nginx</center></body></html>"


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        (f"can't read x: {PAGE}", "can't read x: a web page: 502 Bad Gateway"),
        (
            "no XML: b'<html>\\n<body><p>Blocked by\\n  policy</p></body></html>' (again)",
            "no XML: b'a web page: Blocked by policy' (again)",
        ),
        ("a < b, and <key> is a placeholder", "a < b, and <key> is a placeholder"),
    ],
)
def test_no_error_shows_a_web_page(sent: str, shown: str) -> None:
    assert SpotError(sent).args[0] == shown
