"""The files of a loop's checkpoint: the trained state, random states, and the position in the data of each rank."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from hf_spot.errors import ConfigError, SpotError, StoreError
from hf_spot.training.data.loaders import Loaders
from hf_spot.training.data.rng import capture, capture_gpus, restore
from hf_spot.training.loop.loop_states import LoopState
from hf_spot.training.saving.disk_errors import is_of_a_disk

log = logging.getLogger("hf_spot")

_FORMAT = "hf_spot loop 1"


class LoopFiles:
    """Writes and reads the files of a loop's checkpoint.

    Args:
        loaders: the data loaders of this process.
        rank: number of this process.
        ranks: number of ranks in the training.
        url: URL of the run, for errors.
    """

    def __init__(self, loaders: Loaders, rank: int, ranks: int, url: str) -> None:
        self._loaders = loaders
        self._rank = rank
        self._ranks = ranks
        self._url = url
        self._random_name = "rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth"

    def write(self, folder: Path, state: LoopState, told: dict[str, Any], only: Collection[Any] | None) -> None:
        """Write this rank's files. Every rank must call it.

        Args:
            folder: empty folder for the checkpoint.
            state: the state to save.
            told: the step, and anything else that `read` should return.
            only: as in `Loaders.save`.

        Raises:
            ConfigError: a value can't be used.
            StoreError: the local disk can't be written to.
        """
        try:
            self._write(folder, state, told, only)
        except Exception as error:
            if isinstance(error, SpotError) or not is_of_a_disk(error):
                raise
            local_dir = folder.parent
            free_gb = shutil.disk_usage(local_dir).free / 1e9
            raise StoreError(
                f"{folder.name} can't be saved: {error}; {os.uname().nodename}:{local_dir} has {free_gb:.1f} GB free",
                hint=f"df -h {local_dir}; free some space and start the same command again to resume from the newest "
                "commit. To continue training without this checkpoint: SpotArguments(on_save_error='go-on')",
            ) from None  # its traceback would keep half-written files open and their disk space in use

    def _write(self, folder: Path, state: LoopState, told: dict[str, Any], only: Collection[Any] | None) -> None:
        is_main = self._rank == 0
        now = capture() | capture_gpus()
        loaders = self._loaders.save(folder, self._rank, only)
        torch.save({"now": now, "loaders": loaders, "ranks": self._ranks}, folder / self._random_name)
        state.write(folder, is_main=is_main)
        if is_main:
            whole = {"format": _FORMAT, "global_step": told["step"], **told}
            (folder / "trainer_state.json").write_text(json.dumps(whole, indent=2))

    def read(self, folder: Path, state: LoopState) -> dict[str, Any]:
        """Restore this rank's state, and return what `write` was told. Every rank must call it.

        Raises:
            ConfigError: the checkpoint is of another training.
        """
        told: dict[str, Any] = json.loads((folder / "trainer_state.json").read_bytes())
        if told.get("format") != _FORMAT:
            raise ConfigError(
                f"{folder.name} of {self._url} was not saved by a SpotCheckpointManager, but by Trainer",
                hint="SpotCallback for that run; another checkpoint_dir for this loop",
            )
        state.read(folder)
        path = folder / self._random_name
        if not path.exists():
            log.warning("rank %d did not exist at the save: it starts with the random state of another rank", self._rank)
            path = next(folder.glob("rng_state*.pth"))
        # Like everything that is unpickled here, verified by the digest in the journal.
        random = torch.load(path, map_location="cpu", weights_only=False)
        self._loaders.resume(random["loaders"], random["now"], folder, random["ranks"])
        if random["ranks"] != self._ranks and self._rank == 0:
            log.warning(
                "this run was trained by %d ranks, and now by %d: results will not be bit-exact", random["ranks"], self._ranks
            )
        restore(random["now"])
        return told
