"""Lets all ranks of a training come to the same decision at the same step."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hf_spot.timeouts import RANKS_S
from hf_spot.training.ranks import shared_board
from hf_spot.training.ranks.ballot import VALUES, Ballot

T = TypeVar("T")


class Agreement:
    """Exchanges values between ranks, over a private gloo group on the CPU, independent of GPUs and the training's backend.

    Ballots of every step go over a `Board` if all ranks are on one machine. With one process every method returns at once. All
    ranks must call the same methods in the same order.

    Args:
        world_size: number of ranks; ``torch.distributed`` must be initialised when there are several.
    """

    def __init__(self, world_size: int) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=RANKS_S)) if world_size > 1 else None
        self._values = array("d", [0.0] * VALUES)
        self._tensor = torch.frombuffer(self._values, dtype=torch.float64)  # the same memory, so that no step creates a tensor
        self._options = dist.AllreduceOptions() if world_size > 1 else None
        if self._options is not None:
            self._options.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]
        self._work: Any = None
        self._own: Ballot | None = None
        self.alone = world_size == 1  # ballots need not be cast ahead of time
        self._asked = False
        rank = dist.get_rank() if world_size > 1 else 0
        self.is_main = rank == 0
        self._board = None if self.alone else shared_board.open_together(rank, world_size, VALUES, self.from_main, self.gather)

    @property
    def group(self) -> Any:
        """Return the process group, for other collectives; None with one process."""
        return self._group

    @property
    def asked(self) -> bool:
        """Return whether `ask` was called without `answer` since; the same on all ranks."""
        return self._asked

    def ask(self, ballot: Ballot) -> None:
        """Cast this rank's ballot, and return at once: the exchange overlaps with the training's next work.

        An answer that was not read is dropped.
        """
        self.answer()
        self._asked = True
        if self._group is None:
            self._own = ballot
            return
        if self._board is not None:
            self._board.show(*ballot.to_values())
            return
        self._values[:] = array("d", ballot.to_values())
        # `dist.all_reduce` would take twice as long to start.
        self._work = self._group.allreduce([self._tensor], self._options)

    def answer(self) -> Ballot | None:
        """Return the merged ballots of all ranks; None if none were cast.

        Raises:
            RuntimeError: a rank has ended.
        """
        if not self._asked:
            return None
        self._asked = False
        if self._board is not None:
            return Ballot.from_values(self._board.largest(RANKS_S))
        if self._work is not None:
            self._work.wait()
            self._work = None
        return Ballot.from_values(self._values) if self._group is not None else self._own

    def from_main(self, act: Callable[[], T]) -> T:
        """Call ``act`` on rank 0; return its result, or raise its exception, on every rank."""
        if self._group is None:
            return act()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = act()
            except BaseException as error:  # the other ranks wait for the outcome, whatever it is
                outcome[1] = error
        own = outcome[1]
        dist.broadcast_object_list(sent := [outcome[0], _sendable(own)], src=0, group=self._group)
        if sent[1] is not None:
            raise own or sent[1]
        result: T = sent[0]
        return result

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in the order of ranks."""
        if self._group is None:
            return [value]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, value, group=self._group)
        return found

    def together(self, act: Callable[[], T]) -> T:
        """Call ``act`` on every rank; if one fails, raise on all: a rank's own error, or that of the first rank with one."""
        outcome: list[Any] = [None, None]
        try:
            outcome[0] = act()
        except BaseException as error:  # the other ranks wait for the outcome, whatever it is
            outcome[1] = error
        errors = [error for error in self.gather(_sendable(outcome[1])) if error is not None]
        if errors:
            raise outcome[1] or errors[0]
        result: T = outcome[0]
        return result

    def barrier(self) -> None:
        """Wait until every rank has called it."""
        if self._group is not None:
            dist.barrier(group=self._group)

    def close(self) -> None:
        """Destroy the group: gloo sometimes aborts if that is left to the end of the interpreter."""
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._group is not None:
            self._work = None
            dist.destroy_process_group(self._group)
            self._group = None


def _sendable(error: BaseException | None) -> BaseException | None:
    """Return an exception that the other ranks can unpickle: many of those that scripts define can't be."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
