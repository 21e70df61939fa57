"""Objects with a state that a custom loop uses beside its model, optimizer and scheduler: none is forgotten in silence."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel

_KINDS = (torch.amp.GradScaler, AveragedModel)


class ObjectsInUse:
    """Knows which optimizers, gradient scalers and averages of weights are used, from construction until `close`."""

    def __init__(self) -> None:
        self._stepped: weakref.WeakSet[Any] = weakref.WeakSet()
        self._before = {id(one): _mark(one) for one in _alive()}
        self._hook = register_optimizer_step_post_hook(lambda optimizer, *_: self._stepped.add(optimizer))

    def but(self, saved: Iterable[Any]) -> list[str]:
        """Return the kinds of the objects in use whose state is not among those that are saved.

        All objects of the process are looked at: about 50 ms for a million.
        """
        known = {id(one) for one in saved}
        used = [one for one in _alive() if self._is_used(one)]
        return sorted(type(one).__name__ for one in [*self._stepped, *used] if id(one) not in known)

    def _is_used(self, one: Any) -> bool:
        mark = _mark(one)
        return mark != self._before.get(id(one), (0, mark[1]))

    def close(self) -> None:
        """Stop watching. Repeated calls do nothing."""
        self._hook.remove()


def _alive() -> Iterator[Any]:
    return (one for one in gc.get_objects() if isinstance(one, _KINDS))


def _mark(one: Any) -> tuple[int, float]:
    """Return values that change when an object is used, the first of which is 0 for a new one."""
    if isinstance(one, AveragedModel):
        return int(one.n_averaged), 0.0
    state = one.state_dict()  # empty if the scaler is not enabled
    return int(state.get("_growth_tracker", 0)), float(state.get("scale", 0.0))
