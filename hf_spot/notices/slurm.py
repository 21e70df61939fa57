"""The time limit of a Slurm job as a notice: Slurm states it in the environment of the job, so no signal is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone

from hf_spot.errors import ConfigError
from hf_spot.notices.metadata import stamp
from hf_spot.notices.notice import NoticeKind, PreemptionNotice

END_VARIABLE = "SLURM_JOB_END_TIME"


def ends_at(environ: Mapping[str, str]) -> datetime | None:
    """Return the time at which this job ends at the latest; None outside Slurm, and before Slurm 22.05."""
    text = environ.get(END_VARIABLE, "").strip()
    try:
        return datetime.fromtimestamp(int(text), timezone.utc) if text.isdecimal() and int(text) else None
    except (OverflowError, ValueError, OSError):
        return None


class SlurmSource:
    """Announces the end of the job in advance. Preemption by Slurm is a signal, which `SignalSource` receives.

    Args:
        end: end of the job.
        ahead_s: seconds before the end at which the notice comes; at most half of the time left at construction, so that a
            short job does not stop before it begins.
        interval_s: seconds between polls.
        now: the wall clock.
    """

    name = "slurm"

    def __init__(
        self,
        end: datetime,
        *,
        ahead_s: float = 120.0,
        interval_s: float = 1.0,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ) -> None:
        self.where = f"time limit {stamp(end)}"
        self.interval_s = interval_s
        self._end = end
        self._now = now
        self._from = end - min(timedelta(seconds=ahead_s), max(timedelta(0), (end - now()) / 2))

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], ahead_s: float | None = None) -> SlurmSource:
        """Return the source for the time limit that Slurm states.

        Args:
            environ: the environment.
            ahead_s: as for the constructor; None for its default.

        Raises:
            ConfigError: Slurm states no time limit.
        """
        end = ends_at(environ)
        if end is None:
            raise ConfigError(
                f"{END_VARIABLE}={environ.get(END_VARIABLE, '')!r}: not a Slurm job with a known time limit",
                hint="#SBATCH --signal=USR1@120 and --notice signal --grace-s 120",
            )
        return cls(end) if ahead_s is None else cls(end, ahead_s=ahead_s)

    def poll(self) -> PreemptionNotice | None:
        """Return TERMINATE when the end is near."""
        if self._now() < self._from:
            return None
        return PreemptionNotice(NoticeKind.TERMINATE, self.name, self.where, self._end)
