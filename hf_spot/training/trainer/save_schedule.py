"""When a training saves next: what `hf_spot.policy.cadence` needs to know, collected on rank 0."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from datetime import datetime

from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from hf_spot.arguments import SpotArguments
from hf_spot.policy.cadence import History, Interruptions, SaveCost, best_interval_s, learn, next_save_s
from hf_spot.run.history import Past

log = logging.getLogger("hf_spot")

_LOOK_AGAIN_S = 5.0  # what is known changes slowly, and a step must not pay for it
_BUSY_S = 0.2


class Cadence:
    """Says when a save is due. Asking costs one look at the clock, but for every few seconds.

    Args:
        trainer: whose schedule of saves is left as it is.
        arguments: settings.
        busy: whether a checkpoint is being written or uploaded: another would only queue.
        now: the wall clock, in which the journal counts.
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
        self._commit_s: float | None = None
        self._past: Past | None = None
        self._began = self._since = 0.0
        self._first_step = 0
        self._due_at = self._look_at = math.inf
        self._said = False

    def began(self) -> None:
        """The first step of this launch begins."""
        self._began = self._clock()
        self._first_step = self._trainer.state.global_step
        self.saved(None)

    def saved(self, stall_s: float | None) -> None:
        """A save has ended, or begins: from now on steps may be lost.

        Args:
            stall_s: how long training stood still for it; None when it is not known.
        """
        if stall_s is not None:
            self._stall_s = stall_s
        self._since = self._clock()
        if self._arguments.cadence == "auto":
            self._due_at = self._look_at = self._since

    def committed(self, save_s: float, upload_s: float) -> None:
        """A checkpoint was committed. Called from the uploader's thread.

        Args:
            save_s: from the begin of its save to the end of its writing.
            upload_s: from there to its last file being in place.
        """
        self._commit_s = save_s + upload_s

    def remember(self, past: Past) -> None:
        """What the journal tells. Called from another thread, some time after the start."""
        self._past = past

    @property
    def _cost(self) -> SaveCost:
        """As measured in this launch, or else in the one before."""
        known = self._past.cost if self._past else SaveCost()
        stall_s = known.stall_s if self._stall_s is None else self._stall_s
        return SaveCost(stall_s, known.commit_s if self._commit_s is None else self._commit_s)

    def due_in_s(self) -> float | None:
        """Seconds until the next save, Trainer's or one that is added; None when it is not known, or all are Trainer's."""
        if self._arguments.cadence == "fixed" or (scheduled_s := self._scheduled_s()) is None:
            return None
        return max(0.0, min(self._due_at, self._since + scheduled_s) - self._clock())

    def is_due(self) -> bool:
        """Whether a save has to be added after the step under way."""
        if self._look_at == math.inf or self._look_at > (now := self._clock()):
            return False
        step_s = self._step_s() or 0.0
        expected = learn(self._prior, self._past.now(self._now()) if self._past else History())
        scheduled_s = self._scheduled_s()
        after_s = next_save_s(self._cost, expected, self._arguments.max_interval_s, scheduled_s)
        self._due_at = self._since + after_s
        if now + step_s / 2 < self._due_at:
            self._look_at = min(self._due_at - step_s / 2, now + _LOOK_AGAIN_S)
            return False
        if self._busy():
            self._look_at = now + _BUSY_S
            return False
        self._say(expected)
        return True

    def _say(self, expected: Interruptions) -> None:
        stall_s = self._cost.stall_s
        if not self._said and stall_s is not None:
            self._said = True
            log.info(
                "saves are added: one about every %.0f s would be best, as training stands still %.2f s for one, and an "
                "interruption is expected every %.0f min, %.0f%% of them without a usable notice",
                best_interval_s(stall_s, expected),
                stall_s,
                expected.mean_time_s / 60,
                100 * expected.unannounced_share,
            )

    def _step_s(self) -> float | None:
        steps = self._trainer.state.global_step - self._first_step
        return (self._clock() - self._began) / steps if steps else None

    def _scheduled_s(self) -> float | None:
        """Seconds from the last save to the next that Trainer will make by itself."""
        step_s = self._step_s()
        if step_s is None:
            return None
        steps_left = _scheduled_step(self._trainer) - self._trainer.state.global_step
        return self._clock() - self._since + steps_left * step_s


def _scheduled_step(trainer: Trainer) -> int:
    """The step of the next save by Trainer's own strategy; the last one is saved in any case."""
    args, state, step = trainer.args, trainer.state, trainer.state.global_step
    upcoming = state.max_steps
    if args.save_strategy == SaveStrategy.STEPS and state.save_steps > 0:
        upcoming = (step // state.save_steps + 1) * state.save_steps
    elif args.save_strategy == SaveStrategy.EPOCH and (in_epoch := state.max_steps / max(1, state.num_train_epochs)) >= 1:
        upcoming = math.ceil((math.floor(step / in_epoch + 1e-9) + 1) * in_epoch)
    return min(upcoming, state.max_steps)
