"""When a training counts as hung. Pure.

The ranks give a sign at each event of their training: a step, a batch, a part of an evaluation, bytes of a restore. What is
judged is the time since the newest sign of any rank of a machine, because ranks that wait for another one are silent, too. On
several machines each judges its own ranks, and the training hangs once none of the machines shows a sign of life any longer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum

from hf_spot.errors import ConfigError


class Phase(IntEnum):
    """What a rank is doing, as it has told its launcher. The numbers are written to a file that both read."""

    OUTSIDE = 0
    STARTING = 1
    RESTORING = 2
    FIRST_BATCH = 3
    DATA = 4
    STEP = 5
    COMPILING = 6
    EVALUATION = 7
    SAVING = 8
    FINISHING = 9
    LOOP = 10

    @property
    def in_words(self) -> str:
        """Return the phase for people."""
        return _WORDS[self]


_WORDS = {
    Phase.OUTSIDE: "outside of a training",
    Phase.STARTING: "starting",
    Phase.RESTORING: "restoring",
    Phase.FIRST_BATCH: "waiting for the first batch",
    Phase.DATA: "between two steps, or waiting for data",
    Phase.STEP: "in a step",
    Phase.COMPILING: "compiling",
    Phase.EVALUATION: "evaluating",
    Phase.SAVING: "saving",
    Phase.FINISHING: "finishing",
    Phase.LOOP: "in a custom loop",
}

_MINUTE_S = 60.0
# The shortest limits, before and after a phase is known. A step may compile, tune kernels or connect to others when it is new,
# and a callback may do anything; the default of gloo, and of Trainer for NCCL, is half an hour, too.
_FLOORS_S = {
    Phase.STARTING: (120 * _MINUTE_S, 120 * _MINUTE_S),
    Phase.RESTORING: (120 * _MINUTE_S, 120 * _MINUTE_S),
    Phase.FIRST_BATCH: (120 * _MINUTE_S, 120 * _MINUTE_S),  # a resumed stream reads again up to its position
    Phase.DATA: (60 * _MINUTE_S, 30 * _MINUTE_S),
    Phase.STEP: (60 * _MINUTE_S, 30 * _MINUTE_S),
    Phase.COMPILING: (120 * _MINUTE_S, 120 * _MINUTE_S),
    Phase.EVALUATION: (120 * _MINUTE_S, 60 * _MINUTE_S),  # metrics of all predictions are computed without a sign
    Phase.SAVING: (60 * _MINUTE_S, 60 * _MINUTE_S),
    Phase.FINISHING: (120 * _MINUTE_S, 120 * _MINUTE_S),
    Phase.LOOP: (240 * _MINUTE_S, 240 * _MINUTE_S),  # its own evaluations, and what a script does behind it, give no sign
}
_KNOWN_AFTER = 20  # silences that ended with a sign
_TIMES_SECOND, _TIMES_LONGEST = 10.0, 3.0
_LEAST_SHARE = 0.25

AUTO, OFF = "auto", "off"


@dataclass(frozen=True)
class Shown:
    """The silences of one phase that this run has shown, as far as they lasted long enough to be seen.

    Args:
        count: how many ended with a sign.
        longest_s: the longest one.
        second_s: the second longest one, which an exception (a frozen disk, a stopped machine) does not stretch.
    """

    count: int = 0
    longest_s: float = 0.0
    second_s: float = 0.0

    def after(self, silence_s: float) -> Shown:
        """Return what is known after another silence has ended."""
        longest, second, _ = sorted((self.longest_s, self.second_s, silence_s), reverse=True)
        return Shown(self.count + 1, longest, second)


@dataclass(frozen=True)
class Told:
    """What a rank has told.

    Args:
        signs: how many it has given; any change is one.
        phase: what it is doing.
        step: the last finished optimizer step.
        rank: its number.
        training: number of the training.
    """

    signs: int
    phase: Phase
    step: int
    rank: int
    training: int = 1


def parse_timeout(text: str) -> float | None:
    """Return the seconds that ``--hang-timeout`` names; None for ``auto``, infinity for ``off``. Raises ConfigError."""
    if text == AUTO:
        return None
    if text == OFF:
        return float("inf")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"--hang-timeout {text}: must be auto, off, or a number of seconds", hint="--hang-timeout 1800")
    return seconds


def limit_s(phases: Collection[Phase], shown: Mapping[Phase, Shown], timeout_s: float | None, drain_timeout_s: float) -> float:
    """Return the seconds without a sign of any rank from which on a training counts as hung.

    It is the largest limit of the phases that its ranks are in: those that wait for another rank may be in other phases. By
    itself it is the shortest limit of the phase, or ten times the second longest silence that this phase has shown, or three
    times the longest, whichever is longest.

    Args:
        phases: of the ranks that are in a training.
        shown: what is known of each phase.
        timeout_s: what the user has set; None for ``auto``.
        drain_timeout_s: the longest wait for the last upload.
    """
    inside = [phase for phase in phases if phase is not Phase.OUTSIDE]
    if not inside:
        return float("inf")
    if timeout_s is not None:
        return timeout_s + (drain_timeout_s if Phase.FINISHING in inside else 0.0)

    def of(phase: Phase) -> float:
        known = shown.get(phase, Shown())
        new_s, known_s = _FLOORS_S[phase]
        floor_s = known_s if known.count >= _KNOWN_AFTER else new_s
        if phase is Phase.FINISHING:
            floor_s = max(floor_s, 2 * drain_timeout_s)
        return max(floor_s, _TIMES_SECOND * known.second_s, _TIMES_LONGEST * known.longest_s)

    return max(map(of, inside))


def counted_s(passed_s: float, waited_for_processor_s: float) -> float:
    """Return how much of some time counts as silence: not that in which a rank had no processor, on a crowded machine.

    A quarter of it always counts, so that a loop that never ends is found there, too.

    Args:
        passed_s: the time.
        waited_for_processor_s: in which a rank's thread could have run and did not.
    """
    return max(_LEAST_SHARE * passed_s, passed_s - waited_for_processor_s)


def behind(ranks: Collection[Told]) -> list[Told]:
    """Return the ranks that the others may be waiting for: those with the fewest steps and, among them, those not in a step."""
    if not ranks:
        return []
    fewest = min(one.step for one in ranks)
    found = [one for one in ranks if one.step == fewest]
    return [one for one in found if one.phase is not Phase.STEP] or found


class Vote(str, Enum):
    """What a machine tells the others about the ranks that run there."""

    OUTSIDE = "outside"  # none of them is in a training
    ALIVE = "alive"
    SILENT = "silent"  # for longer than its limit


def all_hang(votes: Collection[Vote]) -> bool:
    """Return whether the training hangs on all machines: a machine that is silent may only wait for one that is not."""
    return Vote.SILENT in votes and Vote.ALIVE not in votes


def shares(lengths: Sequence[int], room: int) -> list[int]:
    """Return how much of each text to keep, so that all of them have room: the short ones whole, the others equally long."""
    kept = [0] * len(lengths)
    for left, index in zip(range(len(lengths), 0, -1), sorted(range(len(lengths)), key=lengths.__getitem__), strict=True):
        kept[index] = min(lengths[index], room // left)
        room -= kept[index]
    return kept


@dataclass(frozen=True)
class Known:
    """An earlier hang of a run.

    Args:
        training: number of its training.
        step: after which it hung.
    """

    training: int
    step: int
