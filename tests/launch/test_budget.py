"""A launch keeps to the budget of its run: told at its start and before its end, saved at the end, and not begun after it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from hf_spot.errors import ConfigError, SpotError
from hf_spot.launch.budget import BudgetKeeper
from hf_spot.launch.options import parse
from hf_spot.notices.notice import NoticeKind
from hf_spot.policy.budget import Budget
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.run import Run
from tests.launch.conftest import Launcher

PRICE = {"HF_SPOT_MACHINE": '{"price_usd_per_hour": 36.0}'}  # a cent a second


def test_a_launch_saves_and_ends_when_the_budget_is_used_up(launcher: Launcher, tmp_path: Path) -> None:
    store = str(tmp_path / "run")
    options = ["--max-spend", "0.15"]
    launch = launcher.plain(store, "--hold_at", "2", options=options, env=PRICE)
    launch.wait_for_step(2)
    launch.go_on_when_it_says("TERMINATE from budget")
    assert launch.wait() == 2, launch.text()
    text = launch.text()
    assert "the budget lasts for 15 s" in text and "the budget is used up, and the same command will start nothing" in text
    run = Run(store)
    assert run.state().ended == "preempted" and run.find().step >= 2
    launches = run.state().launch
    again = launcher.plain(store, options=options, env=PRICE)
    assert again.wait() == 2, again.text()
    assert "of --max-spend 0.15 are spent" in again.text() and run.state().launch == launches
    dry = launcher.plain(store, options=[*options, "--dry-run"], env=PRICE)
    assert dry.wait() == 2 and "of --max-spend 0.15 are spent" in dry.text()
    last = launcher.plain(store, options=["--max-hours", "1"])
    assert last.wait() == 0, last.text()


def keeper(run: Run, budget: Budget, now: list[float], environ: dict[str, str] = PRICE, machines: int = 1) -> BudgetKeeper:
    return BudgetKeeper(budget, run, machines, environ, clock=lambda: now[0])


def test_the_end_is_told_in_advance(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = [1000.0]
    kept = keeper(Run(tmp_path / "run"), Budget(max_spend_usd=0.72), now, machines=2)
    assert kept.poll() is None
    with caplog.at_level(logging.INFO, "hf_spot"):
        kept.check()
        assert "the budget lasts for 36 s" in caplog.text
        now[0] += 32
        assert kept.poll() is None and "used up in" not in caplog.text
        now[0] += 1
        assert kept.poll() is None and kept.poll() is None
    assert caplog.text.count("the budget is used up in 3 s") == 1
    now[0] += 4
    first, second = kept.poll(), kept.poll()
    assert first == second and first is not None and (first.kind, first.source) == (NoticeKind.TERMINATE, "budget")


def test_the_machines_that_have_come_are_paid_and_not_the_most_that_may(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path / "run")
    kept = keeper(run, Budget(max_spend_usd=0.72, max_launches_without_progress=1), [1000.0], machines=8)
    with caplog.at_level(logging.INFO, "hf_spot"):
        kept.check()
        assert "the budget lasts for 9 s" in caplog.text
        roster = [{"name": name, "machine": {"price_usd_per_hour": price}} for name, price in (("a", 36.0), ("b", 108.0))]
        run.claim({"by": "test", "machine": roster[0]["machine"], "machines": 2, "roster": roster})
        kept.began(2)
        assert "the budget lasts for 18 s" in caplog.text
        run.claim({"by": "test", "machine": {}, "machines": 3, "roster": [*roster, {"name": "c", "machine": {}}]})
        kept.began(3)  # what the third one costs is not known: as much as this one
        assert "the budget lasts for 24 s" in caplog.text


def test_a_price_that_is_not_known_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        keeper(Run(tmp_path / "run"), Budget(max_spend_usd=1), [0.0], {}).check()
    assert "HF_SPOT_MACHINE" in raised.value.hint


def test_launches_that_commit_nothing_are_counted_over_machines(tmp_path: Path, make_checkpoint) -> None:  # type: ignore[no-untyped-def]
    run = Run(tmp_path / "run")
    budget = Budget(max_launches_without_progress=2)
    for number in range(2):
        keeper(run, budget, [0.0]).check()
        run.claim({"by": "test", "hostname": f"machine-{number}"})
        run.record("failed", {"exit_code": 1})
    with pytest.raises(SpotError, match="2 launches in a row have committed"):
        keeper(run, budget, [0.0]).check()
    run.claim({"by": "test"})
    request = CommitRequest(step=5)
    run.commit(request, run.upload(make_checkpoint(5), request))
    keeper(run, Budget(max_launches_without_progress=1), [0.0]).check()


@pytest.mark.parametrize("option", ["--max-hours", "--max-spend", "--max-launches-without-progress"])
def test_a_budget_must_be_positive(option: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    with pytest.raises(ConfigError, match=f"{option} 0 must be positive"):
        parse(["--store", "x", option, "0", str(tmp_path / "train.py")], {})
