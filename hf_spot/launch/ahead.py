"""Fetches the newest checkpoint while the training processes still start Python and import torch.

Of several machines each fetches what its own ranks need, to its own disk. A file system that they may share is left to
machine 0, whose training process, too, brings what stands there for all.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil

from hf_spot.errors import SpotError
from hf_spot.launch.command import Machines
from hf_spot.run.journal import CheckpointRef
from hf_spot.run.progress import Bar
from hf_spot.run.run import Run
from hf_spot.runtime import Restore, Runtime
from hf_spot.storage.threads import Workers

_OF_ONE_MACHINE = ("apfs", "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs")

log = logging.getLogger("hf_spot")


class _NotNeeded(SpotError):
    """The machine is going, or the launch has ended: nobody trains with it."""


class Ahead:
    """One download, verified as every restore is, to the disk of the folder that the checkpoint came from. The training process
    moves it to where it wants it (`hf_spot.run.restore.take`); where it can't, it fetches the checkpoint itself.

    Args:
        run: that is trained.
        runtime: of the launch; through it the training process learns of the download.
        needed: asked again and again; False ends the download.
        machines: of the launch.
    """

    def __init__(self, run: Run, runtime: Runtime, needed: Callable[[], bool], machines: Machines | None = None) -> None:
        self._run = run
        self._runtime = runtime
        self._needed = needed
        self._machines = machines or Machines()
        self._ended = False
        self._folder: Path | None = None
        self._worker = Workers(1, "hf_spot-ahead")
        newest = run.journal.state.latest()
        if newest is not None:
            runtime.expect_restore()
            self._worker.submit(self._fetch, newest)

    def close(self) -> None:
        """The launch has ended; what nobody has moved away is deleted."""
        self._ended = True
        self._worker.shutdown(wait=False)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _fetch(self, ref: CheckpointRef) -> None:
        restore = Restore(ref.entry)
        try:
            restore = self._try(ref)
        except _NotNeeded:
            log.info("the download of checkpoint-%d was given up", ref.step)
        except (SpotError, OSError) as error:
            log.debug("checkpoint-%d is left to the training process: %s", ref.step, error)
        finally:
            with contextlib.suppress(OSError):  # the folder has gone with its launch
                self._runtime.tell_restore(restore)

    def _try(self, ref: CheckpointRef) -> Restore:
        checkpoint = self._run.checkpoint(ref)
        output_dir = checkpoint.details.get("output_dir")
        if not isinstance(output_dir, str) or (Path(output_dir) / checkpoint.name).exists():
            return Restore(ref.entry)
        # Not into output_dir itself: scripts look whether it is empty, and what is in it.
        beside = next(folder for folder in Path(output_dir).absolute().parents if folder.is_dir())
        if self._machines.rank and _may_be_shared(beside):
            return Restore(ref.entry)
        ranks = None if _may_be_shared(beside) else self._ranks(checkpoint.details.get("world_size", 1))
        name = hashlib.sha256(f"{self._run.url} {self._machines.rank}".encode()).hexdigest()[:12]
        self._folder = beside / f".hf_spot-restore-{name}"
        shutil.rmtree(self._folder, ignore_errors=True)  # of a launch that was killed
        with Bar("restore", ref.size_bytes) as bar:

            def moved(count: int) -> None:
                if self._ended or not self._needed():
                    raise _NotNeeded("nobody needs it any more")
                bar(count)

            return Restore(ref.entry, self._run.fetch(checkpoint, self._folder, ranks=ranks, progress=moved), ranks)

    def _ranks(self, world_size: int) -> tuple[int, ...] | None:
        """Those of this machine, if there are as many as when the checkpoint was saved; None for all."""
        each, rest = divmod(world_size, self._machines.count)
        if self._machines.count == 1 or rest:
            return None
        return tuple(range(self._machines.rank * each, (self._machines.rank + 1) * each))


def _may_be_shared(folder: Path) -> bool:
    """Whether other machines may see the same folder, as far as the name of its file system tells."""
    mounts = [one for one in psutil.disk_partitions(all=True) if folder.is_relative_to(one.mountpoint)]
    nearest = max(mounts, key=lambda one: len(one.mountpoint), default=None)
    return nearest is None or nearest.fstype not in _OF_ONE_MACHINE
