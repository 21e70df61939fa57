"""Keeps a run within its budget: refuses a launch when it is used up, and ends one in time, saved, as a notice does."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone

from hf_spot.economics.report import Report, price_of, price_of_all, summarise
from hf_spot.errors import ConfigError, SpotError
from hf_spot.notices.notice import NoticeKind, PreemptionNotice
from hf_spot.policy.budget import Budget, Used, left_s, warn_s, why_spent
from hf_spot.run.machine_info import this_machine
from hf_spot.run.run import Run

log = logging.getLogger("hf_spot")

SOURCE = "budget"
_HOUR_S = 3600.0


class BudgetKeeper:
    """A `NoticeSource` whose notice comes when the budget is used up. Without a budget it reads nothing and says nothing.

    Args:
        budget: the budget.
        run: whose launches use it.
        machines: the most that train together.
        environ: the environment, with the price of this machine.
        clock: seconds, monotonic.
    """

    name = SOURCE
    interval_s = 0.5

    def __init__(
        self,
        budget: Budget,
        run: Run,
        machines: int,
        environ: Mapping[str, str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget = budget
        self._run = run
        self._machines = machines
        self._environ = environ
        self._clock = clock
        self._ends_at: float | None = None
        self._warns_at: float | None = None
        self._id = ""

    def check(self) -> None:
        """Call it before each launch.

        Raises:
            ConfigError: the spending is limited, and the price of this machine is not known.
            SpotError: the budget is used up.
        """
        if not self._budget.is_set:
            return
        report = summarise(self._run.events())
        used = used_by(report)
        if (why := why_spent(self._budget, used)) is not None:
            raise SpotError(
                f"the budget of {self._run.url} is used up: {why}", hint=f"raise it; hf-spot report {self._run.url}"
            )
        self._plan(report, used)

    def began(self, machines: int) -> None:
        """Call it when machines that come and go have begun a launch: fewer or cheaper ones may train longer.

        Args:
            machines: that train in it.

        Raises:
            ConfigError: the spending is limited, and the price of this machine is not known.
        """
        self._machines = machines
        if self._budget.max_spend_usd is not None:
            report = summarise(self._run.events())
            self._plan(report, used_by(report))

    def _plan(self, report: Report, used: Used) -> None:
        """Note when the budget will be used up."""
        usd_per_hour = self._usd_per_hour(report) if self._budget.max_spend_usd is not None else None
        if self._budget.max_spend_usd is not None and report.unpriced_s:
            log.warning("%.1f machine hours without a known price do not count for --max-spend", report.unpriced_s / _HOUR_S)
        left = left_s(self._budget, used, usd_per_hour)
        if left is None:
            return
        now = self._clock()
        self._ends_at, self._warns_at = now + left, now + left - warn_s(left)
        self._id = f"{SOURCE} {datetime.now(timezone.utc).isoformat()}"
        log.info("the budget lasts for %s; then the training saves and ends", _span(left))

    def poll(self) -> PreemptionNotice | None:
        """Return TERMINATE once the budget is used up; log a warning some time before."""
        now = self._clock()
        if self._ends_at is None:
            return None
        if self._warns_at is not None and now >= self._warns_at:
            self._warns_at = None
            if now < self._ends_at:
                log.warning("the budget is used up in %s: the training then saves and ends", _span(self._ends_at - now))
        return PreemptionNotice(NoticeKind.TERMINATE, SOURCE, self._id) if now >= self._ends_at else None

    def _usd_per_hour(self, report: Report) -> float:
        of_launch = price_of_all(report.launches[-1]) if report.launches else None
        if of_launch is not None and report.launches[-1].machines == self._machines > 1:
            return of_launch
        machine = this_machine(self._environ)
        price = price_of(machine)
        if price is None:
            raise ConfigError(
                "--max-spend needs the price of this machine",
                hint="""export HF_SPOT_MACHINE='{"price_usd_per_hour": 9.83, "price_source": "my contract"}'""",
            )
        return price * self._machines


def used_by(report: Report) -> Used:
    """Return what the launches of a run have used. Pure."""
    fruitless = 0
    for launch in reversed(report.launches):
        if launch.commits:
            break
        fruitless += 1
    return Used(report.held_s / _HOUR_S, report.cost_usd, fruitless)


def _span(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds // 60 % 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes >= 10 else f"{seconds:.0f} s"
