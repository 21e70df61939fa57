"""When the billing of a machine ended, and how well that is known. Pure.

EC2 bills from ``running`` until ``shutting-down``. What it tells about the end:

* of a machine that was terminated by a request: the time of the request (``StateTransitionReason``);
* of a spot machine that it took back: the time at which its spot request was closed, which is kept longer than the instance;
* of a machine that shut itself down: nothing but its spot request, whose status follows about a minute later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from hf_spot.cloud.ladder import RECLAIMED

EXACT, AT_MOST, AT_LEAST = "", "at most", "at least"
GONE = "Client.Unknown"  # EC2 has forgotten it
OF_INSTANCE, OF_REQUEST = "EC2 DescribeInstances StateTransitionReason", "EC2 DescribeSpotInstanceRequests Status.UpdateTime"
OF_POLL, OF_JOURNAL = "seen by hf-spot provision", "the last entry of the training"
_ENDED, _BY_USER = "instance-terminated-", "by-user"


@dataclass(frozen=True)
class SpotStatus:
    """The status of a spot request: its code, and since when it has it."""

    code: str
    time: datetime

    @property
    def is_end(self) -> bool:
        """Return whether the request's machine has ended."""
        return self.code.startswith(_ENDED)

    @property
    def is_reclaimed(self) -> bool:
        """Return whether EC2 ended the machine."""
        return self.is_end and not self.code.endswith(_BY_USER)


@dataclass(frozen=True)
class Ending:
    """The end of a machine.

    Args:
        time: when its billing ended.
        bound: empty if exact, ``at most`` if it may have ended earlier, ``at least`` if later.
        source: who told it.
        reason: EC2's code.
    """

    time: datetime
    bound: str
    source: str
    reason: str


def ending_of(
    began: datetime, seen: datetime, last_sign: datetime, reason: str | None, told: datetime | None, status: SpotStatus | None
) -> Ending:
    """Return the end of a machine that is gone.

    Args:
        began: when it was launched.
        seen: when it was first seen to have ended.
        last_sign: the last time at which it is known to have run.
        reason: EC2's code for why it ended; None if EC2 has forgotten the machine.
        told: the time that EC2 tells with the instance, if it does.
        status: of its spot request, if there is one.
    """
    is_end = status is not None and status.is_end
    if told is not None:
        return Ending(max(began, told), EXACT, OF_INSTANCE, reason or GONE)
    if status is not None and status.is_reclaimed:
        return Ending(max(began, min(status.time, seen)), EXACT, OF_REQUEST, reason or RECLAIMED)
    if status is not None and is_end and status.time < seen:
        return Ending(max(began, status.time), AT_MOST, OF_REQUEST, reason or GONE)
    if reason is not None:
        return Ending(max(began, seen), AT_MOST, OF_POLL, reason)
    return Ending(max(began, min(last_sign, seen)), AT_LEAST, OF_JOURNAL, GONE)


def bound_of(bounds: Iterable[str]) -> str:
    """Return the word before a sum of amounts that are known like this; empty if all are exact."""
    found = {bound for bound in bounds if bound}
    return "about" if len(found) > 1 else next(iter(found), EXACT)


def in_words(usd: float, bound: str) -> str:
    """Return an amount with the word that says how well it is known, such as ``at most $1.23``; nothing is $0.00 at most."""
    return f"{bound} ${usd:.2f}".strip() if usd else f"${usd:.2f}"
