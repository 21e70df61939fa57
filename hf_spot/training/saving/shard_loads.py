"""Load sharded checkpoints of which this machine has only parts. What torch's planner wants and is not here is fetched."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadPlan

from hf_spot.policy.shard_reads import Stretch
from hf_spot.run.checkpoint import Checkpoint
from hf_spot.run.parts import PartFiles, parts_path
from hf_spot.run.run import Run
from hf_spot.training.upstream import READ_SHARDS, SHARD_PLACES

log = logging.getLogger("hf_spot")


def can_load_parts() -> bool:
    """Return whether parts of shards are enough for the installed torch. If not, shards must be fetched as a whole."""
    return READ_SHARDS.trouble() is None and SHARD_PLACES.trouble() is None


class ShardLoader:
    """Makes torch read parts of shards, in the checkpoints that it knows, until it is closed.

    Args:
        run: to fetch from.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._known: dict[Path, Checkpoint] = {}
        self._hook = contextlib.ExitStack()
        self.fetched_bytes = 0

    def know(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Prepare for loads from the restored folder of a checkpoint."""
        if not self._known and can_load_parts():
            self._hook.enter_context(READ_SHARDS.replaced(FileSystemReader, self._reading))
        self._known[folder.resolve()] = checkpoint

    def close(self) -> None:
        """Leave torch as it was."""
        self._hook.close()
        self._known.clear()

    def _reading(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def read_data(reader: FileSystemReader, plan: LoadPlan, planner: Any) -> Any:
            found = self._checkpoint_of(Path(reader.path))
            if found is not None:
                places = SHARD_PLACES.of(reader)
                SHARD_PLACES.set(reader, self._completed(*found, plan, places))
                try:
                    return plain(reader, plan, planner)
                finally:
                    SHARD_PLACES.set(reader, places)
            return plain(reader, plan, planner)

        return read_data

    def _checkpoint_of(self, path: Path) -> tuple[Path, PurePosixPath, Checkpoint] | None:
        path = path.resolve()
        for folder, checkpoint in self._known.items():
            if path.is_relative_to(folder):
                return folder, PurePosixPath(path.relative_to(folder).as_posix()), checkpoint
        return None

    def _completed(
        self, folder: Path, inside: PurePosixPath, checkpoint: Checkpoint, plan: LoadPlan, places: dict[Any, Any]
    ) -> dict[Any, Any]:
        """Return the places of a plan's items, with the files of parts instead of whole ones that are not here. Fetch what is
        missing of them.

        Raises:
            CorruptCheckpoint: what is missing can't be fetched.
            StoreError: from the store.
        """
        wanted: dict[str, list[Stretch]] = {}
        found = {}
        for item in plan.items:
            place = places[item.storage_index]
            path = str(inside / place.relative_path)
            if not (folder / path).exists():
                wanted.setdefault(path, []).append((place.offset, place.offset + place.length))
                place = dataclasses.replace(place, relative_path=PurePosixPath(parts_path(place.relative_path)).as_posix())
            found[item.storage_index] = place
        files, here = {file.path: file for file in checkpoint.files}, PartFiles(folder)
        missing_bytes = sum(
            here.complete(self._run.store, checkpoint.ref.prefix, files[path], ranges)
            for path, ranges in wanted.items()
            if path in files
        )
        if missing_bytes:
            self.fetched_bytes += missing_bytes
            log.info("%s: %.1f MB that were not foreseen were fetched to load it", folder.name, missing_bytes / 1e6)
        return found
