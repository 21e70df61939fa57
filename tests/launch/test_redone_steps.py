"""After kill -9 of everything, the steps that are done again are compared with those that the dead launch told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_spot import Run
from hf_spot.cli import main
from hf_spot.run.told_steps import path_of, read
from tests.launch.conftest import SCRIPTS, Launch, Launcher, of_ranks
from tests.waiting import wait_for

RESTLESS = SCRIPTS / "restless.py"
QUIET = ["--notice", "none"]


def start(
    launcher: Launcher, run: Path, *more: str, out: str = "out", ranks: int = 1, options: list[str] | None = None, **env: str
) -> Launch:
    launch = launcher.start(
        str(run),
        [RESTLESS, "--output_dir", out, "--weights", "weights", "--diary", f"diary-{len(launcher.launches) + 1}", *more],
        options=[*QUIET, *of_ranks(ranks), *(options or [])],
        env=env,
    )
    launch.output_dir = launcher.tmp_path / out
    return launch


def killed_after(launcher: Launcher, run: Path, step: int, *more: str, redone: int = 0, sent: str = "", **env: Any) -> Launch:
    """Kills a launch after a step, when it has told all steps, has committed the newest save, has compared, and has sent."""
    launch = start(launcher, run, "--hold_at", str(step), *more, **env)
    launch.wait_for_step(step)

    def has_told() -> bool:
        paths = [path_of(launch.output_dir, str(run), 1, rank) for rank in range(env.get("ranks", 1))]
        return all(max((one.step for one in read(path).steps), default=0) >= step for path in paths)

    wait_for(has_told, launch.text())
    wait_for(lambda: (newest := Run(str(run)).state().latest()) is not None and newest.step == step // 5 * 5, launch.text())
    wait_for(lambda: len(entries(run)) == redone, launch.text())
    wait_for(lambda: sent in _sent(run, len(launcher.launches)), launch.text())
    launch.kill_tree()
    return launch


def entries(run: Path) -> list[dict[str, Any]]:
    return [entry.data for entry in Run(str(run)).events() if entry.kind == "redone"]


def report(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["report", str(run)]) == 0
    return capsys.readouterr().out


def test_steps_redone_after_kill_9_are_equal_and_are_told_as_such(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    killed_after(launcher, run, 8, sent="{")  # without a heartbeat nobody knows
    assert "launch 1 ended without a word: 3 steps lost (step 8 at " in (text := report(run, capsys)), text
    assert ", by the file of steps on its disk; step 5 is committed)" in text
    killed_after(launcher, run, 9, redone=1, sent="{")
    last = start(launcher, run)
    assert last.wait() == 0, last.text()
    for launch, line in zip(launcher.launches, (None, "3 steps redone, all equal", "4 steps redone, all equal"), strict=True):
        assert launch.text().count("steps redone") == (line is not None), launch.text()
        assert line is None or f"hf-spot: {line}\n" in launch.text()
    told = entries(run)
    assert [(one["first"], one["last"], one["steps"], one["different"]) for one in told] == [(6, 8, 3, None), (6, 9, 4, None)]
    assert [one["compared"] for one in told] == [dict.fromkeys(("loss", "learning_rate", "data"), steps) for steps in (3, 4)]
    text = report(run, capsys)
    assert "7 steps redone in 2 launches, all equal\n" in text
    assert [line.split()[10] for line in text.splitlines()[2:5]] == ["0", "3", "4"]  # which a dead launcher told to nobody
    assert [line.split()[9] for line in text.splitlines()[2:5]] == ["3", "4", "0"]
    assert text.count("by the file of steps on its disk") == 2
    assert not list((tmp_path / "out" / ".hf_spot").glob("steps-*"))  # nothing will be done again


def test_a_loss_that_no_seed_fixes_is_told_with_its_first_step_and_amount(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    killed_after(launcher, run, 9, NOISY_FROM="7")
    last = start(launcher, run, NOISY_FROM="7")
    assert last.wait() == 0, last.text()
    (told,) = entries(run)
    before, again = told["different"]["before"]["loss"], told["different"]["again"]["loss"]
    lines = [{line["step"]: line["loss"] for line in launch.lines()} for launch in launcher.launches]
    assert (before, again) == pytest.approx([of[7] for of in lines], abs=1e-4)
    assert (told["steps"], told["different"]["step"], told["different"]["same"]) == (2, 7, ["learning_rate", "data"])
    line = "1 step redone equal, then step 7 differs: loss "
    assert last.text().count("differs") == 1
    assert f"hf-spot: {line}" in last.text()
    text = report(run, capsys)
    assert f"launch 2: {line}" in text
    assert f"(a relative difference of {abs(before - again) / max(before, again):.1e}); learning rate and data equal\n" in text


def test_another_order_of_the_data_is_told_as_data(launcher: Launcher, tmp_path: Path) -> None:
    run = tmp_path / "run"
    killed_after(launcher, run, 9, OTHER_ORDER_FROM="60")  # in the middle of step 8
    last = start(launcher, run, OTHER_ORDER_FROM="60")
    assert last.wait() == 0, last.text()
    (told,) = entries(run)
    assert (told["steps"], told["different"]["step"], told["different"]["same"]) == (3, 8, ["learning_rate"])
    assert set(told["different"]["before"]) == {"loss", "data"}
    assert "data: other samples, or in another order; learning rate equal" in last.text()


def test_a_launch_on_another_machine_compares_with_what_the_store_was_told(launcher: Launcher, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start(launcher, run, "--hold_at", "8", SEND_S="0.1")
    first.wait_for_step(8)
    wait_for(lambda: "[1,8," in _sent(run, 1), first.text())
    first.kill_tree()
    second = killed_after(launcher, run, 7, out="elsewhere", sent="[1,8,")  # it hands on what it has not done again
    assert "2 steps redone" not in second.text()  # of three
    last = start(launcher, run, out="third", NOISY_FROM="8")
    assert last.wait() == 0, last.text()
    (told,) = entries(run)
    assert (told["first"], told["last"], told["steps"], told["different"]["step"]) == (6, 8, 3, 8)
    assert "deleted" not in last.text()  # what every launch leaves is no garbage to read about


def _sent(run: Path, launch: int) -> str:
    path = run / f"e{launch:04d}" / "steps-1.json"
    return path.read_text() if path.exists() else ""


def test_a_changed_setting_makes_a_difference_no_surprise(launcher: Launcher, tmp_path: Path) -> None:
    run = tmp_path / "run"
    killed_after(launcher, run, 8)
    last = start(launcher, run, "--epochs", "3")
    assert last.wait() == 0, last.text()
    (line,) = [line for line in last.text().splitlines() if "differs" in line]
    assert "1 step redone equal, then step 7 differs: learning rate" in line
    assert "(to be expected: num_train_epochs was 2 and is 3: " in line


def test_every_rank_of_a_machine_is_compared(launcher: Launcher, tmp_path: Path) -> None:
    run = tmp_path / "run"
    killed_after(launcher, run, 8, ranks=2)
    last = start(launcher, run, ranks=2)
    assert last.wait() == 0, last.text()
    assert "hf-spot: 3 steps redone, all equal\n" in last.text()
    assert not list((tmp_path / "out" / ".hf_spot").glob("steps-*"))


def test_after_a_notice_nothing_is_redone_and_nothing_is_said(launcher: Launcher, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start(launcher, run, "--hold_at", "8", options=["--notice", "signal"])
    first.wait_for_step(8)
    first.process.terminate()
    first.go_on_when_it_says("TERMINATE from")
    assert first.wait() == 75, first.text()
    last = start(launcher, run)
    assert last.wait() == 0, last.text()
    assert entries(run) == []
    assert "steps redone" not in last.text()
