"""Which machines train together when machines come and go, and when that is worth a change. Pure.

A machine that is in no group looks at the run, and joins the group that trains, or the meeting for the next launch, or opens
such a meeting itself (`next_step`). Who has opened it claims the run only when enough machines are there (`form`), and only if
nobody has claimed it since: a machine that the others can't reach fences nobody until it could train without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from hf_spot.timeouts import LAST_CALL_S, UNHOSTED_S

# A change must gain this many times what it costs: the seconds that it costs are certain, and those that it gains are not.
_WORTH = 2.0


@dataclass(frozen=True)
class Place:
    """Where machines meet: the group of a launch, or a meeting for it.

    Args:
        launch: its number.
        attempt: 0 for the group that trains; from 1 on for the meetings that were opened for this launch, one after the other.
    """

    launch: int
    attempt: int = 0


@dataclass(frozen=True)
class Sight:
    """What a machine sees in the store.

    Args:
        number: of the journal's newest entry.
        launch: of the newest claim; 0 for a new run.
        ended: how that launch has ended, as in the journal; None if it has not.
        hosted: whether its group says where it can be reached.
        attempt: the newest meeting for the launch after it; 0 if there is none.
        starts_over: whether that launch finished the run for another command than this machine's, which trains on.
    """

    number: int
    launch: int
    ended: str | None
    hosted: bool
    attempt: int
    starts_over: bool = False


@dataclass(frozen=True)
class Unanswered:
    """A place where nobody has answered.

    Args:
        since_s: when that began.
        number: of the journal's newest entry at that time.
        is_gone: whether its process has certainly ended; an address that does not answer may be on the other side of a
            network that is broken.
    """

    since_s: float
    number: int
    is_gone: bool = False


class Move(Enum):
    """What a machine that is in no group does next."""

    END = "end"  # the run is finished
    JOIN = "join"
    WAIT = "wait"
    OPEN = "open"  # a meeting, where others can join


@dataclass(frozen=True)
class Step:
    """A move, and the place where it is made."""

    move: Move
    place: Place


def next_step(
    sight: Sight, unanswered: Mapping[Place, Unanswered], now_s: float, quiet_s: float, *, was_fenced: bool = False
) -> Step:
    """Return what a machine that is in no group does next.

    Args:
        sight: what it sees.
        unanswered: the places where nobody answered.
        now_s: seconds, monotonic.
        quiet_s: how long a place must neither answer nor write to the journal to count as gone.
        was_fenced: another launch has claimed the run from this machine. If it does not say where it is, it may be one of a
            single machine, and gets as much time to write as one that does.
    """
    running, coming = Place(sight.launch), Place(sight.launch + 1, sight.attempt)
    if sight.ended == "finished" and not sight.starts_over:
        return Step(Move.END, running)
    if sight.hosted and not _is_gone(unanswered.get(running), sight, now_s, quiet_s):
        return Step(Move.JOIN, running)
    is_about_to_say = sight.launch and not sight.hosted and sight.ended is None
    unhosted_s = quiet_s if was_fenced else UNHOSTED_S
    if is_about_to_say and not _is_gone(unanswered.get(running), sight, now_s, unhosted_s):
        return Step(Move.WAIT, running)
    if sight.attempt and not _is_gone(unanswered.get(coming), sight, now_s, quiet_s):
        return Step(Move.JOIN, coming)
    return Step(Move.OPEN, Place(sight.launch + 1, sight.attempt + 1))


def not_answered(before: Unanswered | None, sight: Sight, now_s: float, *, is_gone: bool) -> Unanswered:
    """Return what to remember about a place after it has not answered.

    Args:
        before: what was remembered.
        sight: what this machine sees in the store.
        now_s: seconds, monotonic.
        is_gone: as in `Unanswered`.
    """
    if before is None or before.number != sight.number:  # whoever writes to the journal lives
        return Unanswered(now_s, sight.number, is_gone)
    return Unanswered(before.since_s, before.number, is_gone or before.is_gone)


def _is_gone(found: Unanswered | None, sight: Sight, now_s: float, quiet_s: float) -> bool:
    if found is None:
        return False
    return found.is_gone or (found.number == sight.number and now_s - found.since_s >= quiet_s)


def is_void(place: Place, sight: Sight, unanswered: Mapping[Place, Unanswered], now_s: float, quiet_s: float) -> bool:
    """Return whether a meeting that lacks machines should be given up, because those that come look elsewhere.

    Args:
        place: the meeting, or the group of a launch whose machines meet again.
        sight: what its host sees.
        unanswered: as in `next_step`, like the rest.
    """
    coming = place.launch if place.attempt else place.launch + 1
    if sight.launch + 1 != coming or sight.attempt > place.attempt:
        return True
    running = Place(sight.launch)
    # It was opened because nobody answered there; and now they write to the journal.
    return place.attempt > 0 and sight.hosted and not _is_gone(unanswered.get(running), sight, now_s, quiet_s)


def quiet_for_s(timeout_s: float, times_fenced: int) -> float:
    """Return ``quiet_s`` for `next_step`. It doubles each time that this machine was fenced: two machines that can't reach
    each other, but both the store, must not take the run from each other for ever.

    Args:
        timeout_s: silence after which a machine counts as lost.
        times_fenced: how often another launch has claimed the run while this machine trained.
    """
    return timeout_s * 2.0 ** (min(times_fenced, 8) + 1)


# -- the meeting ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """How many machines may train together.

    Args:
        least: with fewer there is no launch.
        most: with more, the others are spares.
        ranks: of each machine.
        samples: of an optimizer step; None before the first launch has told.
        is_free: whether the samples of a step may change.
    """

    least: int
    most: int
    ranks: int = 1
    samples: int | None = None
    is_free: bool = False

    @property
    def full_ranks(self) -> int:
        """Return the ranks of all machines: the samples of a step are those of that many."""
        return self.most * self.ranks

    def of(self, present: int) -> int:
        """Return how many of the machines that are present train: the most that divide the samples of a step. Return 0 if
        there are too few."""
        sizes = range(min(present, self.most), self.least - 1, -1)
        fitting = [size for size in sizes if self._fits(size)]
        if not fitting and self.samples is None:
            fitting = list(sizes)  # how many samples a device gets is not known yet: it may still divide
        return fitting[0] if fitting else 0

    def _fits(self, size: int) -> bool:
        return self.is_free or (self.samples or self.full_ranks) % (size * self.ranks) == 0


@dataclass(frozen=True)
class Gathering:
    """The machines that have come to a meeting.

    Args:
        waiting: guests that are ready.
        busy: guests whose ranks of the launch before have not ended yet.
        is_whole: whether all machines that are known to come are here.
        began_s: when the meeting began.
        changed_s: when a machine has come or gone for the last time.
    """

    waiting: int
    busy: int
    is_whole: bool
    began_s: float
    changed_s: float


class Form(Enum):
    """What the machine that holds a meeting does next."""

    WAIT = "wait"
    START = "start"
    GIVE_UP = "give up"


def may_be_minority(lost_silently: int, left: int) -> bool:
    """Return whether more machines may train on elsewhere than are here: those that fell silent may be on the other side of a
    network that is broken. They should go on first, so this side waits.

    Args:
        lost_silently: machines of the launch before from which nothing was heard any more.
        left: guests that are here.
    """
    return lost_silently > left + 1


def form(gathering: Gathering, size: Size, now_s: float, *, patience_s: float, call_s: float = LAST_CALL_S) -> Form:
    """Return whether to begin a launch with the machines that are here.

    Args:
        gathering: the machines.
        size: how many may train.
        now_s: seconds, monotonic.
        patience_s: how long to wait for enough machines.
        call_s: how long to wait for more, once enough are there.
    """
    present = 1 + gathering.waiting
    if gathering.busy:
        return Form.WAIT
    if size.of(present):
        all_here = present >= size.most or gathering.is_whole
        return Form.START if all_here or now_s - gathering.changed_s >= call_s else Form.WAIT
    return Form.GIVE_UP if now_s - gathering.began_s >= patience_s else Form.WAIT


# -- taking a machine in ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outlook:
    """What is known when a spare waits.

    Args:
        machines: that train.
        after: that would train with the spares.
        steps_left: optimizer steps to the end; None if unknown.
        step_s: seconds of a step, as measured in this launch; None before the first ones.
        change_s: seconds in which nobody trains if the machines change: the save, its upload, and the start.
        lives_s: seconds that a machine of this kind lives.
    """

    machines: int
    after: int
    steps_left: int | None
    step_s: float | None
    change_s: float
    lives_s: float


def takes_in(outlook: Outlook) -> bool:
    """Return whether to save now and begin the next launch, with the spares.

    What is gained ends with the training, or with the next machine that is lost, because the machines change then anyway.
    """
    if outlook.after <= outlook.machines or outlook.steps_left is None or outlook.step_s is None:
        return False
    rest_s = outlook.steps_left * outlook.step_s
    until_s = min(rest_s, outlook.lives_s / outlook.after)
    return until_s * (1 - outlook.machines / outlook.after) > _WORTH * outlook.change_s
