"""A sharded save that training hardly feels: what a rank would write of it, kept in memory.

``torch.distributed.checkpoint.save`` asks a planner what this rank has to write, and later for each piece of it. `stage` asks
at once, and copies the pieces; the same library code then writes the same files from the copies, whatever they were shards of
(DTensors of FSDP2, ShardedTensors of FSDP1).
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
    """What is saved, or how, is nothing that could be kept."""


class StagedPlanner(SavePlanner):
    """Plans as another planner does, with data that does not change any more.

    Args:
        planner: whose plan it is.
        plan: what this rank would write, before the ranks have agreed who writes what they all have.
        data: of all items of this plan.
    """

    def __init__(self, planner: SavePlanner, plan: SavePlan, data: dict[MetadataIndex, torch.Tensor | io.BytesIO]) -> None:
        self._planner = planner
        self._plan = plan
        self._data = data

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing: it was set up with the state that it keeps."""

    def create_local_plan(self) -> SavePlan:
        """What this rank would write."""
        return self._plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """As the other planner does."""
        planned: tuple[list[SavePlan], Metadata] = GLOBAL_PLAN.of(self._planner)(all_plans)
        return planned

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """As the other planner does."""
        finished: SavePlan = FINISH_PLAN.of(self._planner)(new_plan)
        return finished

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The copy."""
        return self._data[write_item.index]


def stage(keep: Kept, *, is_coordinator: bool, **save: Any) -> StagedPlanner | None:
    """Copies what this rank has to write; None when that does not fit.

    Args:
        keep: gives a copy of one-dimensional bytes, or None when there is no room.
        is_coordinator: of the ranks that save together.
        save: arguments of ``torch.distributed.checkpoint.save``, as accelerate gives them.

    Raises:
        Unknown: only torch itself can save this.
    """
    if save.keys() != {"state_dict", "storage_writer", "planner"}:
        raise Unknown(f"it is called with {sorted(save)}")
    planner, writer = save["planner"], save["storage_writer"]
    if type(planner) is not DefaultSavePlanner or type(writer) is not FileSystemWriter:
        # They may look at what they write, or write elsewhere.
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
    planner.state_dict = {}  # FSDP1 has made a copy of its shards, too
    return StagedPlanner(planner, plan, data)


def _keep(value: torch.Tensor, keep: Kept) -> torch.Tensor | None:
    """A copy with the strides that the library would write."""
    value = value.detach()
    plain = type(value) is torch.Tensor and value.layout == torch.strided and not value.is_quantized
    if not plain or value.is_conj() or value.is_neg():
        raise Unknown(f"a {type(value).__name__} of {value.dtype} and {value.layout} has more to it than its bytes")
    if not value.is_contiguous():
        value = value.clone()  # as the library does, unless it fills its storage: the clone then has the same strides
    # A contiguous tensor is its memory from its first element on; a clone fills its own, in whatever order.
    flat = value.as_strided((value.numel(),), (1,)).view(torch.uint8)
    kept = keep(flat)
    return None if kept is None else kept.view(value.dtype).as_strided(value.size(), value.stride())
