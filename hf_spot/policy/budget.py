"""What a run may still use of its budget. Pure."""

from __future__ import annotations

from dataclasses import dataclass

_HOUR_S = 3600.0
_WARN_SHARE = 0.1  # of the budget that is left at the beginning of a launch
_WARN_AT_MOST_S = 600.0


@dataclass(frozen=True)
class Budget:
    """What all launches of a run together may use. None for no limit.

    Args:
        max_hours: hours in which a launch has the run.
        max_spend_usd: dollars for the machines in that time.
        max_launches_without_progress: launches in a row that may end without a commit of a later step.
    """

    max_hours: float | None = None
    max_spend_usd: float | None = None
    max_launches_without_progress: int | None = None

    @property
    def is_set(self) -> bool:
        """Return whether anything is limited."""
        return self != Budget()


@dataclass(frozen=True)
class Used:
    """What the launches of a run have used.

    Args:
        hours: in which a launch had the run.
        spend_usd: for the machines with a known price.
        launches_without_progress: newest launches in a row that have ended without a commit of a later step.
    """

    hours: float = 0.0
    spend_usd: float = 0.0
    launches_without_progress: int = 0


def why_spent(budget: Budget, used: Used) -> str | None:
    """Return why no launch may begin, for people; None if one may."""
    if budget.max_hours is not None and used.hours >= budget.max_hours:
        return f"{used.hours:.2f} of --max-hours {budget.max_hours:g} are used"
    if budget.max_spend_usd is not None and used.spend_usd >= budget.max_spend_usd:
        return f"${used.spend_usd:.2f} of --max-spend {budget.max_spend_usd:g} are spent"
    most = budget.max_launches_without_progress
    if most is not None and used.launches_without_progress >= most:
        return (
            f"{used.launches_without_progress} launches in a row have committed no later step "
            f"(--max-launches-without-progress {most})"
        )
    return None


def left_s(budget: Budget, used: Used, usd_per_hour: float | None) -> float | None:
    """Return the seconds for which a launch may run; None for no limit.

    Args:
        budget: the budget.
        used: before this launch.
        usd_per_hour: price of all machines of this launch; needed if the spending is limited.
    """
    limits = []
    if budget.max_hours is not None:
        limits.append((budget.max_hours - used.hours) * _HOUR_S)
    if budget.max_spend_usd is not None and usd_per_hour:
        limits.append((budget.max_spend_usd - used.spend_usd) / usd_per_hour * _HOUR_S)
    return max(0.0, min(limits)) if limits else None


def warn_s(left_s: float) -> float:
    """Return how many seconds before its end a launch is told that the budget will be used up."""
    return min(_WARN_AT_MOST_S, _WARN_SHARE * left_s)
