"""Download the newest checkpoint while the command line is parsed and the training processes start: both import torch.

Each of several machines downloads what its own ranks need, to its own disk. On a filesystem that they may share only machine 0
downloads, as its training process would.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path

import psutil

from hf_spot.errors import SpotError
from hf_spot.launch.command import Machines
from hf_spot.run.journal import CheckpointRef
from hf_spot.run.progress import Bar
from hf_spot.run.restore import is_private
from hf_spot.run.run import Run
from hf_spot.run.selection import Readers
from hf_spot.runtime import Prefetched, Runtime
from hf_spot.storage.threads import Workers

_OF_ONE_MACHINE = ("apfs", "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs")

_CLOSE_S = 1.0

log = logging.getLogger("hf_spot")


class _NotNeeded(SpotError):
    """The machine is being taken away, or the launch has ended: the checkpoint is no longer needed."""


def newest_of(url: str) -> tuple[Run, CheckpointRef | None]:
    """Return a run and the checkpoint that its next launch will resume from, for `Prefetch`; None if the run is finished."""
    run = Run(url)
    state = run.state()
    return run, None if state.ended == "finished" else state.latest()


class Prefetch:
    """One download, verified like every restore, to the disk of the folder that the checkpoint was saved in. The training
    process moves it to its place (`hf_spot.run.restore.adopt_prefetched`); if it can't, it downloads the checkpoint itself.

    The download begins at once, in a thread.

    Args:
        find: returns the run and the commit to download.
        machines: of the launch; None while they are unknown: then nothing is downloaded to a disk that may be shared.
    """

    def __init__(self, find: Callable[[], tuple[Run, CheckpointRef | None]], machines: Machines | None = None) -> None:
        self._find = find
        self._machines = machines
        self._needed: Callable[[], bool] = lambda: True
        self._moved: Callable[[], None] = lambda: None
        self._ended = False
        self.run: Run | None = None  # set once it is found
        self._ref: CheckpointRef | None = None
        self._folder: Path | None = None
        worker = Workers(1, "hf_spot-ahead")
        self._fetched = worker.submit(self._fetch)
        worker.shutdown(wait=False)

    def serves(self, ref: CheckpointRef) -> bool:
        """Return whether this is, or was, a download of this commit. If not, close it."""
        fruitless = self._fetched.done() and self._fetched.result().folder is None
        if self._ended or self._ref != ref or fruitless:
            self.close()
        return not self._ended

    def hand_to(self, runtime: Runtime, needed: Callable[[], bool]) -> None:
        """Make the training process of this launch wait for the download.

        Args:
            runtime: of the launch.
            needed: called repeatedly; False ends the download.
        """
        self._needed, self._moved = needed, runtime.tell_prefetching
        runtime.expect_prefetch()

        def tell(fetched: Future[Prefetched]) -> None:
            with contextlib.suppress(OSError):  # the folder was deleted at the end of its launch
                runtime.tell_prefetched(fetched.result())

        self._fetched.add_done_callback(tell)

    def close(self) -> None:
        """End the download, and delete its folder unless it was moved away."""
        self._ended = True
        wait([self._fetched], _CLOSE_S)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _fetch(self) -> Prefetched:
        try:
            self.run, self._ref = self._find()
            return Prefetched(0) if self._ref is None else self._try(self.run, self._ref)
        except _NotNeeded:
            log.log(logging.DEBUG if self._ended else logging.INFO, "the download of the newest checkpoint was given up")
        except (SpotError, OSError) as error:
            log.debug("the training process will download the newest checkpoint: %s", error)
        except Exception as error:  # if it persists, the training process will report it
            log.debug("the training process will download the newest checkpoint: %s: %s", type(error).__name__, error)
        return Prefetched(self._ref.entry if self._ref else 0)

    @staticmethod
    def _private_folder(beside: Path, whose: str) -> Path | None:
        """Create a folder that only this user can enter, with a name that nobody can guess; return None if that is impossible.

        Folders that killed launches have left with the same ``whose`` are deleted.
        """
        name = f".hf_spot-restore-{hashlib.sha256(whose.encode()).hexdigest()[:12]}-"
        for left in beside.glob(f"{name}*"):
            if is_private(left):
                shutil.rmtree(left, ignore_errors=True)
        made = Path(tempfile.mkdtemp(prefix=name, dir=beside))
        if is_private(made):
            return made
        made.rmdir()
        return None

    def _try(self, run: Run, ref: CheckpointRef) -> Prefetched:
        checkpoint = run.checkpoint(ref)
        output_dir = checkpoint.details.get("output_dir")
        if not isinstance(output_dir, str) or (Path(output_dir) / checkpoint.name).exists():
            return Prefetched(ref.entry)
        # Not into output_dir itself: scripts check whether it is empty, and look at its contents.
        beside = next(folder for folder in Path(output_dir).absolute().parents if folder.is_dir())
        machines, shared = self._machines or Machines(), _may_be_shared(beside)
        if shared and (machines.rank or self._machines is None):
            return Prefetched(ref.entry)
        readers = None if shared else _readers(machines, checkpoint.details.get("world_size", 1))
        self._folder = self._private_folder(beside, f"{run.url} {machines.rank}")
        if self._folder is None:
            log.info("%s can't have private folders: the training process will download the checkpoint", beside)
            return Prefetched(ref.entry)
        folder = self._folder
        with Bar("restore", run.selection(checkpoint, readers).size_bytes) as bar:

            def moved(count: int) -> None:
                if self._ended or not self._needed():
                    raise _NotNeeded("no longer needed")
                bar(count)
                self._moved()

            fetched = run.fetch(checkpoint, folder, readers=readers, progress=moved)
            if readers is None:
                return Prefetched(ref.entry, fetched)
            return Prefetched(ref.entry, fetched, readers.ranks, readers.world_size)


def _readers(machines: Machines, saved_world_size: int) -> Readers | None:
    """Return the ranks of this machine; None for all ranks. As long as the number of processes is unknown, that of all ranks is
    thought to be what it was when the checkpoint was saved."""
    each, rest = divmod(saved_world_size, machines.count)
    if machines.processes:
        each, rest = machines.processes, 0
    if machines.count == 1 or rest:
        return None
    return Readers(tuple(range(machines.rank * each, (machines.rank + 1) * each)), machines.count * each)


def _may_be_shared(folder: Path) -> bool:
    """Return whether other machines may see the same folder, according to the type of its filesystem."""
    mounts = [one for one in psutil.disk_partitions(all=True) if folder.is_relative_to(one.mountpoint)]
    nearest = max(mounts, key=lambda one: len(one.mountpoint), default=None)
    return nearest is None or nearest.fstype not in _OF_ONE_MACHINE
