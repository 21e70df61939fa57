"""When a training saves next: rank 0 collects what `hf_spot.policy.cadence` needs to decide it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from datetime import datetime

from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from hf_spot.arguments import SpotArguments
from hf_spot.policy.cadence import (
    History,
    Interruptions,
    SaveCost,
    assumed_stall_s,
    best_interval_s,
    learn,
    next_save_s,
)
from hf_spot.policy.requests import shortest_interval_s
from hf_spot.run.history import Past

log = logging.getLogger("hf_spot")

_LOOK_AGAIN_S = 5.0  # the data changes slowly, and steps must stay fast
_BUSY_S = 0.2
_TOLD_AFTER_S = 30.0
_LAST_SAVE_S, _FAR_SAVE_S = 120.0, 3600.0  # to the first save, if it is the last one, or another
_AFTER_FAILURE_S = 600.0  # without added saves: each of them may stop the training until it has failed, too


class Cadence:
    """Decides when a save is due. Most calls cost one look at the clock; a full decision is made every few seconds.

    Args:
        trainer: the Trainer; its own schedule of saves stays.
        arguments: settings.
        busy: returns whether a checkpoint is being written or uploaded: another one would only queue.
        now: the wall clock, which the journal uses.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        trainer: Trainer,
        arguments: SpotArguments,
        busy: Callable[[], bool],
        now: Callable[[], datetime],
        clock: Callable[[], float],
    ) -> None:
        self._trainer = trainer
        self._arguments = arguments
        self._prior = Interruptions(arguments.time_between_interruptions_s, arguments.share_without_notice)
        self._busy = busy
        self._now = now
        self._clock = clock
        self._stall_s: float | None = None
        self._assumed_stall_s: float | None = None
        self._adds = arguments.cadence == "auto"
        self._not_before = 0.0
        self._in_repository = False
        self._commit_s: float | None = None
        self._past: Past | None = None
        self._began = self._since = 0.0
        self._first_step = 0
        self._due_at = self._look_at = math.inf
        self._interval_logged = False

    def began(self) -> None:
        """Record that the first step of this launch begins."""
        self._began = self._clock()
        self._first_step = self._trainer.state.global_step
        self.saved(None)

    def saved(self, stall_s: float | None) -> None:
        """Record that a save has ended, or begins: steps from now on may be lost.

        Args:
            stall_s: seconds that training stood still for it; None if unknown.
        """
        if stall_s is not None:
            self._stall_s = stall_s
        self._since = self._clock()
        if self._adds:
            self._due_at = self._look_at = self._since

    def stalled(self, stall_s: float) -> None:
        """Record for how many seconds training stood still for the newest save, with what it waited after it."""
        self._stall_s = stall_s

    def expect(self, size_bytes: int, *, in_repository: bool) -> None:
        """Record what is known before the first save.

        Args:
            size_bytes: of a checkpoint, about.
            in_repository: each write to the store is a commit of a repository on the Hub.
        """
        self._assumed_stall_s, self._in_repository = assumed_stall_s(size_bytes), in_repository

    def add_none(self) -> None:
        """Add no saves from now on."""
        self._adds, self._due_at, self._look_at = False, math.inf, math.inf

    def failed(self) -> None:
        """Record that a save has failed: add none for some minutes."""
        self._not_before = self._clock() + _AFTER_FAILURE_S

    def committed(self, save_s: float, upload_s: float, writes: int = 0) -> None:
        """Record that a checkpoint was committed. Called from the uploader's thread.

        Args:
            save_s: seconds from the start of the save until its files were written.
            upload_s: seconds from then until its last file was uploaded.
            writes: number of writes to the store that it made.
        """
        bound_s = shortest_interval_s(writes, self._arguments.max_writes_per_hour, in_repository=self._in_repository)
        self._commit_s = max(save_s + upload_s, bound_s)

    def remember(self, past: Past) -> None:
        """Record what the journal says about earlier launches. Called from another thread, some time after the start."""
        self._past = past

    @property
    def _cost(self) -> SaveCost:
        """Return the cost of a save as measured in this launch, or else in earlier ones."""
        known = self._past.cost if self._past else SaveCost()
        stall_s = self._assumed_stall_s if self._known_stall_s is None else self._known_stall_s
        return SaveCost(stall_s, known.commit_s if self._commit_s is None else self._commit_s)

    @property
    def _known_stall_s(self) -> float | None:
        earlier_s = self._past.cost.stall_s if self._past else None
        return earlier_s if self._stall_s is None else self._stall_s

    def due_in_s(self) -> float | None:
        """Return the seconds until the next save, scheduled or added; None if unknown, or if no saves are added."""
        if not self._adds or (scheduled_s := self._scheduled_s()) is None:
            return None
        return max(0.0, min(self._due_at, self._since + scheduled_s) - self._clock())

    def is_due(self) -> bool:
        """Return whether a save must be added after the current step."""
        if self._look_at == math.inf or self._look_at > (now := self._clock()):
            return False
        step_s = self._step_s() or 0.0
        expected = learn(self._prior, self._past.now(self._now()) if self._past else History())
        scheduled_s = self._scheduled_s()
        after_s = next_save_s(self._cost, expected, self._arguments.max_interval_s, scheduled_s)
        self._due_at = max(self._since + after_s, self._not_before)
        if now + step_s / 2 < self._due_at:
            self._look_at = min(self._due_at - step_s / 2, now + _LOOK_AGAIN_S)
            return False
        if self._busy():
            self._look_at = now + _BUSY_S
            return False
        self._log_interval(expected)
        return True

    def _log_interval(self, expected: Interruptions) -> None:
        stall_s = self._known_stall_s
        if not self._interval_logged and stall_s is not None:
            self._interval_logged = True
            log.info(
                "adding saves: one about every %.0f s is best, because a save stops training for %.2f s, and an interruption "
                "is expected every %.0f min, %.0f%% of them without a usable notice",
                best_interval_s(stall_s, expected),
                stall_s,
                expected.mean_time_s / 60,
                100 * expected.unannounced_share,
            )

    def _step_s(self) -> float | None:
        steps = self._trainer.state.global_step - self._first_step
        return (self._clock() - self._began) / steps if steps else None

    def _scheduled_s(self) -> float | None:
        """Return the seconds from the last save to the next one that Trainer schedules; None if unknown."""
        step_s = self._step_s()
        if step_s is None:
            return None
        steps_left = _scheduled_step(self._trainer) - self._trainer.state.global_step
        return self._clock() - self._since + steps_left * step_s


class FirstSave:
    """Warns, soon after a launch has begun to train, that its first save is far away, or comes only at the end.

    Args:
        trainer: the Trainer.
        arguments: settings.
        clock: seconds, monotonic.
    """

    def __init__(self, trainer: Trainer, arguments: SpotArguments, clock: Callable[[], float]) -> None:
        self._trainer = trainer
        self._clock = clock
        self._began: tuple[float, int] | None = None
        self._is_told_of_auto = arguments.cadence == "fixed"
        # "best" saves after an evaluation, if that was a good one; "auto" saves whenever it pays.
        self._is_over = arguments.cadence == "auto" or trainer.args.save_strategy == SaveStrategy.BEST

    def saved(self) -> None:
        """Record that there was a save."""
        self._is_over = True

    def is_fixed(self) -> None:
        """Record that no saves are added."""
        self._is_over = self._trainer.args.save_strategy == SaveStrategy.BEST

    def look(self) -> None:
        """Warn, if it is time. Called before each step."""
        if self._is_over:
            return
        now, state = self._clock(), self._trainer.state
        if self._began is None:
            self._began = now, state.global_step
        began, first = self._began
        if now - began < _TOLD_AFTER_S or state.global_step == first:
            return
        self._is_over = True
        upcoming = _scheduled_step(self._trainer)
        left_s = (upcoming - state.global_step) * (now - began) / (state.global_step - first)
        if left_s > (_LAST_SAVE_S if upcoming >= state.max_steps else _FAR_SAVE_S):
            args = self._trainer.args
            log.warning(
                "the first save is that of step %d%s, in about %.0f minutes: until then an interruption without a notice in "
                "time loses everything (save_strategy=%r, save_steps=%s)%s",
                upcoming,
                ", the last one" if upcoming >= state.max_steps else "",
                left_s / 60,
                str(getattr(args.save_strategy, "value", args.save_strategy)),
                args.save_steps,
                ". --cadence auto saves when it pays" if self._is_told_of_auto else "",
            )


def _scheduled_step(trainer: Trainer) -> int:
    """Return the step of Trainer's next scheduled save; the last step is always saved."""
    args, state, step = trainer.args, trainer.state, trainer.state.global_step
    upcoming = state.max_steps
    if args.save_strategy == SaveStrategy.STEPS and state.save_steps > 0:
        upcoming = (step // state.save_steps + 1) * state.save_steps
    elif args.save_strategy == SaveStrategy.EPOCH and (in_epoch := state.max_steps / max(1, state.num_train_epochs)) >= 1:
        upcoming = math.ceil((math.floor(step / in_epoch + 1e-9) + 1) * in_epoch)
    return min(upcoming, state.max_steps)
