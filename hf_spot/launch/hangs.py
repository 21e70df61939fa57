"""Finds a training that hangs: reads what its ranks tell, and says when no rank has given a sign for too long.

Time in which this process itself did not run (a suspended laptop, a frozen container, a machine under load) does not count, nor
does time in which a rank is examined by a debugger. `hf_spot.policy.hangs` has the limits.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from hf_spot.errors import EXIT_HUNG
from hf_spot.launch.stacks import stacks_of, state_of, waited_for_processor_s
from hf_spot.policy.hangs import Known, Phase, Shown, Told, behind, counted_s, limit_s
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
_MOST_ENTRIES = 200  # read back for an earlier hang


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
        self._ranks: dict[int, Told] = {}
        self._looked_at = 0.0
        self._silent_s = 0.0
        self._waited_s: dict[int, float] = {}
        self._prefetched_at = 0
        self._has_warned = False
        self._is_again = False

    def begin(self, runtime: Runtime) -> None:
        """Begin to watch a launch."""
        self._runtime = runtime
        self._ranks, self._waited_s = {}, {}
        self._looked_at, self._silent_s, self._prefetched_at = self._clock(), 0.0, 0
        self._has_warned = self._is_again = False

    def look(self) -> bool:
        """Return whether the training hangs; its stacks are then in the log and the journal. Call it several times a second."""
        now, runtime = self._clock(), self._runtime
        passed_s = now - self._looked_at
        if runtime is None or self._timeout_s == math.inf or passed_s < self._look_s:
            return False
        self._looked_at = now
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
            return False
        self._silent_s += counted
        limit = limit_s(
            [told.phase for told in ranks.values()], self._shown, self._timeout_s, runtime.arguments.drain_timeout_s
        )
        if self._silent_s > limit:
            self._end(runtime, limit)
            return True
        if self._silent_s > limit / 2 and not self._has_warned:
            self._has_warned = True
            log.warning("no sign of the training for %s; it counts as hung after %s", _span(self._silent_s), _span(limit))
        return False

    def is_final(self) -> bool:
        """Return whether a training has hung twice after the same step, by this machine's looks or, of another machine, by the
        newest entry of the journal."""
        if self._is_again:
            return True
        asked = self._journal_writer.ask(self._newest_hang, patience_s=_JOURNAL_S)
        try:
            found = None if asked is None else asked.result()
        except Exception as error:  # of the store: another hang will be the last one
            log.error("%s can't be read after a hang: %s", self._run.url, error)
            return False
        return found is not None and bool(found.get("again"))

    # -- looking ------------------------------------------------------------------------------------------------------

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

    # -- a hang -------------------------------------------------------------------------------------------------------

    def _end(self, runtime: Runtime, limit: float) -> None:
        ranks = sorted(self._ranks.items(), key=lambda item: item[1].rank)
        states = {process: state_of(process) for process, _ in ranks}
        stopped = [told for process, told in ranks if states[process] == "T"]
        first = (stopped or behind([told for _, told in ranks]))[0]
        lines = [
            f"rank {told.rank}: {told.phase.in_words}, after step {told.step}{' (stopped)' if told in stopped else ''}"
            for _, told in ranks
        ]
        what = (
            f"the training hangs after step {first.step}: no sign of it for {_span(self._silent_s)}, and rank {first.rank} is "
            f"{'stopped by a signal' if stopped else first.phase.in_words}"
        )
        stacks = "\n".join([*lines, stacks_of([process for process, _ in ranks], runtime)])
        log.error("%s. Stacks of its processes:\n%s", what, stacks)
        known = Known(first.training, first.step)
        earlier = self._earlier(known)
        self._is_again = earlier is not None
        self._hangs.append((known, stacks))
        self._hook.tell(f"{what}{'; it has hung there before, and is not started again' if self._is_again else ''}")
        data: dict[str, Any] = {
            "step": first.step,
            TRAINING_KEY: first.training,
            "rank": first.rank,
            "phase": first.phase.name.lower(),
            "silent_s": round(self._silent_s, 1),
            "limit_s": round(limit, 1),
            "ranks": lines,
            "again": self._is_again,
            "stacks": stacks[:_IN_JOURNAL],
        }
        self._journal_writer.record(KIND, data, patience_s=_JOURNAL_S)
        if earlier is not None:
            log.error("it has hung after step %d before, then with these stacks:\n%s", first.step, earlier)
            log.error("it hangs there each time, so it is not started again (exit code %d)", EXIT_HUNG)

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
