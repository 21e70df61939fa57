"""Finds a training that hangs: reads what its ranks tell, and says when no rank has given a sign for too long.

On several machines each keeper looks at the ranks of its own, and tells machine 0 when they begin and cease to be silent. Once
no machine shows a sign any longer, machine 0 asks all of them for their stacks, writes one entry about the hang, and says
whether the machines begin again.

Time in which this process itself did not run (a suspended laptop, a frozen container, a machine under load) does not count, nor
does time in which a rank is examined by a debugger. `hf_spot.policy.hangs` has the limits.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from hf_spot.errors import EXIT_HUNG
from hf_spot.launch.group import Group
from hf_spot.launch.stacks import stacks_of, state_of, waited_for_processor_s
from hf_spot.policy.hangs import Known, Phase, Shown, Told, Vote, all_hang, behind, counted_s, limit_s, shares
from hf_spot.run.journal import TRAINING_KEY
from hf_spot.run.journal_writer import JournalWriter
from hf_spot.run.run import Run
from hf_spot.run.webhook import Hook
from hf_spot.runtime import Runtime

log = logging.getLogger("hf_spot")

KIND = "hang"
_LOOK_S = 1.0
_LATE_S = 2.0  # a longer pause between two looks counts as this long
_JOURNAL_S = 60.0
_IN_JOURNAL = 40_000  # characters of stacks
_IN_MESSAGE = 60_000  # of JSON
_REPORT_S = 90.0  # for the stacks of the other machines, whose native ones take seconds for each rank
_VERDICT_S = 2 * _REPORT_S + 3 * _JOURNAL_S
_TICK_S = 0.1
_MOST_ENTRIES = 200  # read back for an earlier hang
_AGAIN = "it hangs there each time, so it is not started again"


@dataclass(frozen=True)
class _Report:
    """What a machine knows of a hang.

    Args:
        ranks: that are in a training there, and which of them are stopped by a signal.
        silent_s: how long they have been silent.
        limit_s: from when on that counts as a hang.
        stacks: of their processes.
    """

    ranks: tuple[tuple[Told, bool], ...]
    silent_s: float
    limit_s: float
    stacks: str

    def to_message(self) -> dict[str, Any]:
        ranks = [[one.signs, one.phase, one.step, one.rank, one.training, is_stopped] for one, is_stopped in self.ranks]
        stacks = self.stacks[:_IN_JOURNAL]
        while len(json.dumps(stacks)) > _IN_MESSAGE:
            stacks = stacks[: len(stacks) // 2]
        return {"ranks": ranks, "silent_s": self.silent_s, "limit_s": self.limit_s, "stacks": stacks}

    @classmethod
    def of(cls, message: dict[str, Any]) -> _Report:
        """Return the report in a message. Raises ValueError, KeyError or TypeError."""
        ranks = tuple(
            (Told(int(signs), Phase(phase), int(step), int(rank), int(training)), bool(is_stopped))
            for signs, phase, step, rank, training, is_stopped in message["ranks"]
        )
        return cls(ranks, float(message["silent_s"]), float(message["limit_s"]), str(message["stacks"]))


class HangKeeper:
    """Watches one launch after the other, with what all of them have shown.

    Args:
        timeout_s: the user's limit; None for limits by what the run shows, infinity to look for no hangs.
        run: the run.
        journal_writer: writes its journal.
        hook: of the user.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        timeout_s: float | None,
        run: Run,
        journal_writer: JournalWriter,
        hook: Hook,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout_s = timeout_s
        self._run = run
        self._journal_writer = journal_writer
        self._hook = hook
        self._clock = clock
        self._look_s = _LOOK_S if timeout_s is None else min(_LOOK_S, timeout_s / 4)
        self._shown: dict[Phase, Shown] = {}
        self._hangs: list[tuple[Known, str]] = []  # of this process, with their stacks
        self._runtime: Runtime | None = None
        self._group: Group | None = None
        self._machine, self._machines = 0, 1
        self._votes: dict[int, Vote] = {}  # of all machines on machine 0, of this one on the others
        self._ranks: dict[int, Told] = {}
        self._looked_at = 0.0
        self._silent_s = self._limit_s = 0.0
        self._waited_s: dict[int, float] = {}
        self._prefetched_at = 0
        self._has_warned = False
        self._is_again: bool | None = None  # None while this machine does not know

    def begin(self, runtime: Runtime, machine: int = 0, machines: int = 1, group: Group | None = None) -> None:
        """Begin to watch a launch.

        Args:
            runtime: of the launch.
            machine: number of this machine.
            machines: how many train.
            group: the connections to the others; None if there are none.
        """
        self._runtime, self._machine, self._machines, self._group = runtime, machine, machines, group
        self._votes = {}
        self._ranks, self._waited_s = {}, {}
        self._looked_at, self._silent_s, self._prefetched_at = self._clock(), 0.0, 0
        self._limit_s = math.inf
        self._has_warned, self._is_again = False, None

    def look(self) -> bool:
        """Return whether the training hangs; its stacks are then in the log and the journal. Call it several times a second."""
        now, runtime = self._clock(), self._runtime
        if runtime is None:
            return False
        if self._is_asked():
            self._answer(runtime)
            return True
        passed_s = now - self._looked_at
        if self._timeout_s != math.inf and passed_s >= self._look_s:
            self._looked_at = now
            self._cast(self._look(runtime, passed_s))
        if self._machine == 0 and all_hang(self._votes.values()):
            self._conclude(runtime)
            return True
        return False

    def accept_end(self) -> None:
        """Note that the other machines have ended, since the training hangs after the same step each time."""
        self._is_again = True

    def is_final(self) -> bool:
        """Return whether a training has hung twice after the same step, as machine 0 says or, if it could not, the newest entry
        of the journal."""
        if self._is_again is not None:
            return self._is_again
        asked = self._journal_writer.ask(self._newest_hang, patience_s=_JOURNAL_S)
        try:
            found = None if asked is None else asked.result()
        except Exception as error:  # of the store: another hang will be the last one
            log.error("%s can't be read after a hang: %s", self._run.url, error)
            return False
        return found is not None and bool(found.get("again"))

    # -- looking ------------------------------------------------------------------------------------------------------

    def _look(self, runtime: Runtime, passed_s: float) -> Vote:
        ranks = {
            process: Told(signs, Phase(phase), step, rank, training)
            for process, (signs, phase, step, rank, training) in runtime.read_phases().items()
        }
        ranks = {process: told for process, told in ranks.items() if told.phase is not Phase.OUTSIDE}
        prefetched_at = runtime.prefetched_at_ns()
        gave_sign = ranks != self._ranks or prefetched_at != self._prefetched_at
        if gave_sign:
            self._learn()
        counted = self._counted_s(min(passed_s, _LATE_S), ranks)
        self._ranks, self._prefetched_at = ranks, prefetched_at
        if gave_sign or not ranks:
            self._silent_s, self._has_warned = 0.0, False
            return Vote.ALIVE if ranks else Vote.OUTSIDE
        self._silent_s += counted
        limit = self._limit_s = limit_s(
            [told.phase for told in ranks.values()], self._shown, self._timeout_s, runtime.arguments.drain_timeout_s
        )
        if self._silent_s > limit:
            return Vote.SILENT
        if self._silent_s > limit / 2 and not self._has_warned:
            self._has_warned = True
            log.warning("no sign of the training for %s; it counts as hung after %s", _span(self._silent_s), _span(limit))
        return Vote.ALIVE

    def _learn(self) -> None:
        for phase in {told.phase for told in self._ranks.values()}:
            self._shown[phase] = self._shown.get(phase, Shown()).after(self._silent_s)

    def _counted_s(self, passed_s: float, ranks: dict[int, Told]) -> float:
        counted = passed_s
        for process in ranks:
            waited, before = waited_for_processor_s(process), self._waited_s.get(process)
            self._waited_s[process] = waited
            if state_of(process) == "t":
                counted = 0.0
            elif before is not None:
                counted = min(counted, counted_s(passed_s, waited - before))
        return counted

    # -- the other machines -------------------------------------------------------------------------------------------

    def _cast(self, vote: Vote) -> None:
        if self._votes.get(self._machine) is vote:
            return
        self._votes[self._machine] = vote
        if self._group is not None and self._machine > 0:
            if vote is Vote.SILENT:
                log.warning("no sign of the training on this machine for %s; asking machine 0", _span(self._silent_s))
            self._group.say({"vote": vote.value})

    def _is_asked(self) -> bool:
        """Read what other machines have said. Return whether machine 0 asks for a report."""
        is_asked = False
        for machine, about in [] if self._group is None else self._group.said():
            if self._machine == 0:
                with suppress(ValueError):
                    if "vote" in about:
                        self._votes[machine] = Vote(about["vote"])
            is_asked |= self._machine > 0 and "ask" in about
        return is_asked

    def _answer(self, runtime: Runtime) -> None:
        """Send this machine's report to machine 0, and wait for what it makes of all of them."""
        assert self._group is not None
        report = self._report(runtime)
        log.error("the training hangs on all machines. Stacks of the processes of this one:\n%s", report.stacks)
        self._group.say({"report": report.to_message()})
        until_s = self._clock() + _VERDICT_S
        while self._clock() < until_s:
            for _, about in self._group.said():
                if "again" in about:
                    self._is_again = bool(about["again"])
                    if self._is_again:
                        log.error("%s (exit code %d)", _AGAIN, EXIT_HUNG)
                    return
            if (ended := self._group.ended(_TICK_S)) is not None:
                if ended.machine == 0:
                    return
                time.sleep(_TICK_S)

    def _reports(self, runtime: Runtime) -> dict[int, _Report]:
        """Return the reports of all machines that answer."""
        if self._group is not None:
            self._group.say({"ask": True})
        found = {self._machine: self._report(runtime)}
        until_s = self._clock() + _REPORT_S
        while self._group is not None and len(found) < self._machines and self._clock() < until_s:
            for machine, about in self._group.said():
                if "report" in about:
                    with suppress(ValueError, KeyError, TypeError):
                        found[machine] = _Report.of(about["report"])
            if self._group.ended(_TICK_S) is not None:
                break  # it can't report any more, and this machine ends soon
        missing = sorted(set(range(self._machines)) - found.keys())
        if missing:
            log.error("no stacks of machines %s", ", ".join(map(str, missing)))
        return dict(sorted(found.items()))

    def _report(self, runtime: Runtime) -> _Report:
        ranks = sorted(self._ranks.items(), key=lambda item: item[1].rank)
        told = tuple((one, state_of(process) == "T") for process, one in ranks)
        stacks = stacks_of([process for process, _ in ranks], runtime)
        return _Report(told, self._silent_s, self._limit_s if ranks else 0.0, stacks)

    # -- a hang -------------------------------------------------------------------------------------------------------

    def _conclude(self, runtime: Runtime) -> None:
        reports = self._reports(runtime)
        machines = {one.rank: machine for machine, report in reports.items() for one, _ in report.ranks}
        ranks = sorted((found for report in reports.values() for found in report.ranks), key=lambda found: found[0].rank)
        if not ranks:
            log.error("the training hangs, and the machine on which it does has not answered")
            self._tell_end(is_again=False)
            return
        stopped = [one for one, is_stopped in ranks if is_stopped]
        first = (stopped or behind([one for one, _ in ranks]))[0]

        def name(rank: int) -> str:
            return f"rank {rank}{f' (machine {machines[rank]})' if self._machines > 1 else ''}"

        lines = [
            f"{name(one.rank)}: {one.phase.in_words}, after step {one.step}{' (stopped)' if is_stopped else ''}"
            for one, is_stopped in ranks
        ]
        silent_s = max(one.silent_s for one in reports.values())
        longest_s = max(one.limit_s for one in reports.values())
        what = (
            f"the training hangs after step {first.step}: no sign of it for {_span(silent_s)}, and {name(first.rank)} is "
            f"{'stopped by a signal' if stopped else first.phase.in_words}"
        )
        stacks = _joined(reports, None)
        log.error("%s. Stacks of its processes:\n%s", what, "\n".join([*lines, stacks]))
        known = Known(first.training, first.step)
        earlier = self._earlier(known)
        is_again = earlier is not None
        self._hangs.append((known, "\n".join([*lines, stacks])))
        self._hook.tell(f"{what}{'; it has hung there before, and is not started again' if is_again else ''}")
        data: dict[str, Any] = {
            "step": first.step,
            TRAINING_KEY: first.training,
            "rank": first.rank,
            "phase": first.phase.name.lower(),
            "silent_s": round(silent_s, 1),
            "limit_s": round(longest_s, 1),
            "ranks": lines,
            "again": is_again,
            "stacks": "\n".join([*lines, _joined(reports, _IN_JOURNAL - len("\n".join(lines)))]),
        }
        if self._machines > 1:
            data["machine"] = machines[first.rank]
        self._journal_writer.record(KIND, data, patience_s=_JOURNAL_S)
        if earlier is not None:
            log.error("it has hung after step %d before, then with these stacks:\n%s", first.step, earlier)
            log.error("%s (exit code %d)", _AGAIN, EXIT_HUNG)
        self._tell_end(is_again=is_again)

    def _tell_end(self, *, is_again: bool) -> None:
        self._is_again = is_again
        if self._group is not None:
            self._group.say({"again": is_again})

    def _earlier(self, known: Known) -> str | None:
        """Return the stacks of an earlier hang of the same training after the same step; None if there was none."""
        found = next((stacks for one, stacks in self._hangs if one == known), None)
        if found is not None:
            return found
        asked = self._journal_writer.ask(partial(self._hang_after, known), patience_s=_JOURNAL_S)
        try:
            return None if asked is None else asked.result()
        except Exception as error:  # of the store, which may be why the training hangs
            log.error("earlier hangs can't be read from %s: %s", self._run.url, error)
            return None

    def _hang_after(self, known: Known) -> str | None:
        number = self._run.state().number
        for each in range(number, max(0, number - _MOST_ENTRIES), -1):
            entry = self._run.journal.read(each)
            step, training = entry.data.get("step"), entry.data.get(TRAINING_KEY, 1)
            if entry.kind == "commit" and training == known.training and step is not None and step > known.step:
                return None
            if entry.kind == KIND and (training, step) == (known.training, known.step):
                return str(entry.data.get("stacks", ""))
        return None

    def _newest_hang(self) -> dict[str, Any] | None:
        state = self._run.state()
        for each in range(state.number, max(0, state.number - _MOST_ENTRIES), -1):
            entry = self._run.journal.read(each)
            if entry.kind == KIND and entry.launch == self._run.launch:
                return entry.data
            if entry.launch < self._run.launch:
                return None
        return None


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _joined(reports: dict[int, _Report], room: int | None) -> str:
    """Return the stacks of all machines, each with the same share of the room if they need more."""
    texts = [one.stacks for one in reports.values()]
    if len(texts) > 1:
        texts = [f"==== machine {machine}\n{text}" for machine, text in zip(reports, texts, strict=True)]
    if room is None:
        return "\n".join(texts)
    kept = shares([*map(len, texts)], max(0, room - len(texts)))
    return "\n".join(text[:most] for text, most in zip(texts, kept, strict=True))
