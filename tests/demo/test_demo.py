"""The demo tells the truth, in words and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_spot.cli import main
from hf_spot.demo import story
from hf_spot.demo.story import Outcome, _Story
from hf_spot.economics.plots import Interruption
from hf_spot.run.machine_info import KEYS
from hf_spot.run.run import Run
from tests.zygote import Zygote


@pytest.mark.slow
def test_the_demo_on_a_real_s3_server(
    s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, zygote: Zygote
) -> None:
    """With one notice of its two, and half as long: `.ci/run` plays the whole story, in a directory."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(story, "_NOTICE_STEPS", (30,))
    monkeypatch.setattr(story, "_KILL_STEP", 70)
    arguments = _Story._arguments
    monkeypatch.setattr(_Story, "_arguments", lambda self, name: [*arguments(self, name), "--epochs", "1"])
    plot, keep = tmp_path / "curve.png", tmp_path / "kept"
    with zygote.forking():
        assert main(["demo", "--json", "--store", s3_url, "--plot", str(plot), "--keep", str(keep)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["identical"] is True
    assert (told["interruptions"], told["kills"]) == (1, 1)
    assert told["steps_lost_with_notice"] == 0
    assert 5 <= told["steps_lost_to_kill"] < 20
    assert len(told["notice_to_commit_s"]) == 1
    assert all(0 < one < 60 for one in told["notice_to_commit_s"])
    assert (told["store"], told["final_step"]) == (s3_url, 110)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert (keep / "launch-3" / "final" / "model.safetensors").exists()
    claims = [entry.data["machine"] for entry in Run(s3_url).events() if entry.kind == "claim"]
    assert [(machine["cloud"], tuple(sorted(machine))) for machine in claims] == [("aws", tuple(sorted(KEYS)))] * 3
    ended = [entry.kind for entry in Run(s3_url).events() if entry.kind in ("preempted", "failed", "finished")]
    assert ended == ["preempted", "finished"]
    assert main(["demo", "--store", s3_url, "--plot", str(plot)]) == 2
    assert "already contains a run" in capsys.readouterr().err


def losses(path: Path, steps: range, nudge: float = 0.0) -> None:
    path.write_text("".join(json.dumps({"step": n, "loss": 1 / n + nudge, "learning_rate": n}) + "\n" for n in steps))


@pytest.mark.parametrize(
    ("nudge", "weights", "identical", "losses_equal"),
    [(0.0, b"same", True, True), (1e-9, b"same", False, False), (0.0, b"other", False, True)],
)
def test_one_bit_is_a_difference(tmp_path: Path, nudge: float, weights: bytes, identical: bool, losses_equal: bool) -> None:
    told = _Story(tmp_path, Run("memory://demo"), lambda line: None)
    losses(tmp_path / "twin.jsonl", range(1, 10))
    for number, steps in ((1, range(1, 5)), (2, range(5, 8)), (3, range(6, 10))):
        losses(tmp_path / f"launch-{number}.jsonl", steps, nudge if number == 2 else 0.0)
        told.losses.append(story._read(tmp_path / f"launch-{number}.jsonl"))
    told.marks = [Interruption(4, 4, "notice"), Interruption(7, 5, "kill -9")]
    for name, content in (("twin", b"same"), ("launch-3", weights)):
        (tmp_path / name / "final").mkdir(parents=True)
        (tmp_path / name / "final" / "model.safetensors").write_bytes(content)
    outcome = told.compare()
    assert (outcome.identical, outcome.losses_equal) == (identical, losses_equal)
    assert (outcome.steps_lost_with_notice, outcome.steps_lost_to_kill, outcome.final_step) == (0, 2, 9)


def test_two_different_models_are_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(self: _Story) -> Outcome:
        return Outcome(False, 2, 1, 0, 5, [1.0, 1.0], "memory://demo", 220, "a", "b", True)

    monkeypatch.setattr(_Story, "play", play)
    assert main(["demo", "--plot", str(tmp_path / "plot.png")]) == 1
    assert "DIFFER" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [["--plot", "/no/such/folder/x.png"], ["--keep", "/etc"], ["--store", "http://x"], ["--keep", "/proc/new"]]
)
def test_what_can_not_work_is_said_at_once(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *argv]) == 2
    assert "hf-spot: error:" in capsys.readouterr().err
