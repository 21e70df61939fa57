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
    assert capsys.readouterr().out.startswith("checkpoint-15 ")


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
