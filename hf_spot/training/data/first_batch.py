"""The samples with which accelerate completes the last batch of a pass, where one rank reads the batches of all.

If the last samples of a pass can't be divided among the ranks, accelerate's ``DataLoaderDispatcher`` adds samples of the first
batch that it has fetched. After a resume in the middle of a pass that would be another batch than in an uninterrupted pass. So
these samples, one for each rank, are saved with each checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_spot.training.upstream import DROP_LAST, SLICE


class FirstBatch:
    """Keeps the samples that complete the last batch of a pass.

    Args:
        ranks: number of ranks.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._kept: list[torch.Tensor] = []
        self._undo: Callable[[], None] = lambda: None

    def begin_pass(self, loader: Any, resumed: list[torch.Tensor] | None = None) -> None:
        """Keep the samples of the pass that begins next.

        Args:
            loader: the ``DataLoaderDispatcher`` of the pass.
            resumed: the samples of a pass that is resumed, as from `kept`; None for a pass that begins at its start.
        """
        self._undo()
        self._kept = []
        if DROP_LAST.of(loader):
            return
        plain = SLICE.of(loader)

        def slice_first(batch: Any, *args: Any, **kwargs: Any) -> Any:
            self._undo()  # the first slice of a pass is the only one of its first batch
            found = plain(batch, *args, **kwargs)
            own = list(_tensors(found))
            if resumed is not None and len(resumed) == len(own) and len(resumed[0]) == self._ranks:
                given = iter([saved.to(one.device) for saved, one in zip(resumed, own, strict=True)])
                found = _replaced(found, lambda: next(given))
            self._kept = [one.clone() for one in _tensors(found)]
            return found

        def undo() -> None:
            SLICE.set(loader, plain)
            self._undo = lambda: None

        SLICE.set(loader, slice_first)
        self._undo = undo

    @property
    def kept(self) -> list[torch.Tensor]:
        """Return the samples, as the tensors that a batch consists of; empty if there are none."""
        return [one.cpu() for one in self._kept]

    def save(self, path: Path) -> None:
        """Write the samples to a file of a checkpoint, if there are any."""
        if self._kept:
            torch.save(self.kept, path)


def read_first_batch(path: Path) -> list[torch.Tensor] | None:
    """Return the samples from a file of `FirstBatch.save`; None if there is no such file."""
    return torch.load(path, weights_only=True) if path.exists() else None


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a batch, in a fixed order."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for one in batch.values():
            yield from _tensors(one)
    elif isinstance(batch, list | tuple):
        for one in batch:
            yield from _tensors(one)


def _replaced(batch: Any, take: Callable[[], torch.Tensor]) -> Any:
    """Return a batch of the same structure, with other tensors.

    Args:
        batch: the batch.
        take: returns the next tensor, in the order of `_tensors`.
    """
    if isinstance(batch, torch.Tensor):
        return take()
    if isinstance(batch, Mapping):
        return type(batch)({name: _replaced(one, take) for name, one in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, list | tuple):
        parts = [_replaced(one, take) for one in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
