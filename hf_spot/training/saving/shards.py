"""Asynchronous sharded saves: a rank's part is copied in memory, and written later.

``torch.distributed.checkpoint.save`` asks a planner what this rank must write, and later for each piece. `stage` asks at once,
and copies the pieces; the same library code then writes the same files from the copies, for DTensors (FSDP2) as well as
ShardedTensors (FSDP1).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from hf_spot.training.upstream import FINISH_PLAN, GLOBAL_PLAN, LOCAL_PLAN, RESOLVE_DATA, SET_UP_PLANNER, STORAGE_META

Kept = Callable[[torch.Tensor], "torch.Tensor | None"]


class Unknown(Exception):
    """What is saved, or how it is saved, does not allow a copy."""


class StagedPlanner(SavePlanner):
    """Plans as another planner does, but returns copied data.

    Args:
        planner: the other planner.
        plan: what this rank would write, before the ranks agree who writes the data that all of them have.
        data: copies for all items of this plan.
    """

    def __init__(self, planner: SavePlanner, plan: SavePlan, data: dict[MetadataIndex, torch.Tensor | io.BytesIO]) -> None:
        self._planner = planner
        self._plan = plan
        self._data = data

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Do nothing: the other planner was set up before the copies were made."""

    def create_local_plan(self) -> SavePlan:
        """Return what this rank would write."""
        return self._plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return the other planner's global plan."""
        planned: tuple[list[SavePlan], Metadata] = GLOBAL_PLAN.of(self._planner)(all_plans)
        return planned

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Return the other planner's final plan."""
        finished: SavePlan = FINISH_PLAN.of(self._planner)(new_plan)
        return finished

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Return the copy of an item."""
        return self._data[write_item.index]


def stage(keep: Kept, *, is_coordinator: bool, **save: Any) -> StagedPlanner | None:
    """Copy what this rank must write; return None if it does not fit.

    Args:
        keep: returns a copy of one-dimensional bytes, or None if there is no room.
        is_coordinator: whether this rank coordinates the save.
        save: arguments of ``torch.distributed.checkpoint.save``, as accelerate passes them.

    Raises:
        Unknown: this can't be copied; torch must save it itself.
    """
    if save.keys() != {"state_dict", "storage_writer", "planner"}:
        raise Unknown(f"it is called with {sorted(save)}")
    planner, writer = save["planner"], save["storage_writer"]
    if type(planner) is not DefaultSavePlanner or type(writer) is not FileSystemWriter:
        # Subclasses may read what they write, or write elsewhere.
        raise Unknown(f"{type(planner).__name__} and {type(writer).__name__} may do more than write files")
    changed = [one.trouble() for one in (SET_UP_PLANNER, LOCAL_PLAN, GLOBAL_PLAN, FINISH_PLAN, RESOLVE_DATA, STORAGE_META)]
    if why := next(filter(None, changed), None):
        raise Unknown(f"torch {why}")
    SET_UP_PLANNER.of(planner)(save["state_dict"], STORAGE_META.of(writer)(), is_coordinator)
    plan = LOCAL_PLAN.of(planner)()
    data = {}
    for item in plan.items:
        value = RESOLVE_DATA.of(planner)(item)
        kept = _keep(value, keep) if isinstance(value, torch.Tensor) else value
        if kept is None:
            return None
        data[item.index] = kept
    planner.state_dict = {}  # releases the copy that FSDP1 has made of its shards
    return StagedPlanner(planner, plan, data)


def _keep(value: torch.Tensor, keep: Kept) -> torch.Tensor | None:
    """Return a copy with the strides that the library would write; None if there is no room."""
    value = value.detach()
    plain = type(value) is torch.Tensor and value.layout == torch.strided and not value.is_quantized
    if not plain or value.is_conj() or value.is_neg():
        raise Unknown(f"a {type(value).__name__} of {value.dtype} and {value.layout} can't be copied as plain bytes")
    if not value.is_contiguous():
        value = value.clone()  # the library clones too, unless the tensor fills its storage; a clone then has the same strides
    # A contiguous tensor is a range of memory from its first element on; a clone fills its own storage, in any order.
    flat = value.as_strided((value.numel(),), (1,)).view(torch.uint8)
    kept = keep(flat)
    return None if kept is None else kept.view(value.dtype).as_strided(value.size(), value.stride())
