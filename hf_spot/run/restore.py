"""Restore a run's newest usable checkpoint on this machine."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from hf_spot.errors import CorruptCheckpoint, IncompleteCheckpoint, ObjectNotFound
from hf_spot.run.checkpoint import Checkpoint, check_resumable
from hf_spot.run.journal import CheckpointRef
from hf_spot.run.output_folder import set_aside
from hf_spot.run.run import Run
from hf_spot.run.selection import Readers
from hf_spot.runtime import Prefetched
from hf_spot.storage.store import Progress

log = logging.getLogger("hf_spot")

Restored = tuple[Checkpoint, Path]  # and the folder on this machine


def restore_newest(
    run: Run,
    refs: Sequence[CheckpointRef],
    output_dir: Path,
    *,
    everywhere: Callable[[Callable[[], Restored]], Restored] = lambda restore: restore(),
    prefetched: Prefetched | None = None,
    readers: Readers | None = None,
    progress: Callable[[int], Progress | None] = lambda size_bytes: None,
) -> Restored | None:
    """Restore the newest of these commits that is complete. Return None if there are no commits.

    A commit whose files are damaged or missing is reported, and the one before it is restored.

    Args:
        run: to read from.
        refs: oldest commit first.
        output_dir: the Trainer's.
        everywhere: runs the restore of one commit on each disk of the training; an exception on one disk is raised on all.
        prefetched: as in `restore_checkpoint`, like the remaining arguments.

    Raises:
        CorruptCheckpoint: there are commits, but none of them is complete. Silently starting from step 0 would lose the run.
        StoreError: the store did not answer.
    """
    for ref in reversed(refs):
        restore = partial(
            restore_checkpoint,
            run,
            ref,
            output_dir,
            prefetched=prefetched,
            readers=readers,
            progress=progress,
        )
        try:
            return everywhere(restore)
        except (CorruptCheckpoint, IncompleteCheckpoint, ObjectNotFound) as error:
            log.error("checkpoint-%d of launch %d can't be restored, trying the one before: %s", ref.step, ref.launch, error)
    if refs:
        many = f"none of the {len(refs)} checkpoints of {run.url} is whole"
        raise CorruptCheckpoint(
            many if len(refs) > 1 else f"the only checkpoint of {run.url} is damaged",
            hint=f"hf-spot checkpoints verify {run.url}; to start afresh: trainer.train(resume_from_checkpoint=False)",
        )
    return None


def restore_checkpoint(
    run: Run,
    ref: CheckpointRef,
    output_dir: Path,
    *,
    prefetched: Prefetched | None = None,
    readers: Readers | None = None,
    progress: Callable[[int], Progress | None] = lambda size_bytes: None,
) -> Restored:
    """Restore one commit as the folder ``output_dir/checkpoint-<step>``.

    A checkpoint that was prefetched, and so verified, is moved there. An existing folder stays if it is the same to the byte.
    Otherwise the commit is downloaded and verified.

    Args:
        run: to read from.
        ref: the commit.
        output_dir: the Trainer's.
        prefetched: what the launcher has downloaded: this commit or another.
        readers: the ranks that read this disk, if not all do; only what they need is downloaded.
        progress: makes a progress callback for a download of a number of bytes.

    Raises:
        CorruptCheckpoint: its files differ from what was committed.
        StoreError: the store did not answer.
    """
    checkpoint = run.checkpoint(ref)
    check_resumable(checkpoint, run.url)
    folder = output_dir / checkpoint.name
    adopted = prefetched is not None and adopt_prefetched(prefetched, ref.entry, output_dir, readers=readers)
    # Where others may rename a private folder, they can have replaced it.
    trusted = adopted and prefetched is not None and prefetched.folder is not None and _is_guarded(prefetched.folder.parents[1])
    have = None
    if not adopted and prefetched is not None and prefetched.entry == ref.entry and _is_own(prefetched):
        have = prefetched.folder  # for other ranks; what these need too is taken from there, after a look at its digest
    if not trusted and folder.exists() and (problems := run.compare(checkpoint, folder, readers=readers)):
        have = set_aside(folder, problems[0])  # of several machines, each has what its own ranks have written
    if not folder.exists():
        size_bytes = run.selection(checkpoint, readers).size_bytes
        return checkpoint, run.fetch(checkpoint, output_dir, readers=readers, progress=progress(size_bytes), have=have)
    run.remember(checkpoint, readers=readers)
    return checkpoint, folder


def adopt_prefetched(prefetched: Prefetched, entry: int, into: Path, *, readers: Readers | None = None) -> bool:
    """Move a prefetched checkpoint, which was verified as it was downloaded, to its place. Return whether that was possible.

    Args:
        prefetched: what the launcher has downloaded.
        entry: number of the commit to restore.
        into: folder that gets ``checkpoint-<step>``.
        readers: who needs them; None for all ranks.
    """
    enough = prefetched.ranks is None or (
        readers is not None
        and set(readers.ranks) <= set(prefetched.ranks)
        and prefetched.world_size in (None, readers.world_size)
    )
    if prefetched.entry != entry or prefetched.folder is None or not enough or (into / prefetched.folder.name).exists():
        return False
    if not _is_own(prefetched):
        log.warning("%s is not this user's own, and is downloaded again", prefetched.folder)
        return False
    into.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(prefetched.folder, into / prefetched.folder.name)
    except OSError as error:
        log.info("%s can't be moved to %s, and is downloaded again: %s", prefetched.folder, into, error.strerror)
        return False
    return True


def _is_own(prefetched: Prefetched) -> bool:
    """Return whether only this user can have written what was prefetched."""
    folder = prefetched.folder
    return folder is not None and is_private(folder.parent) and _is_own_folder(folder)


def is_private(folder: Path) -> bool:
    """Return whether a folder belongs to this user and nobody else can enter it. A symbolic link does not count as a folder."""
    return _is_own_folder(folder) and not os.lstat(folder).st_mode & 0o077


def _is_own_folder(folder: Path) -> bool:
    try:
        found = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _is_guarded(folder: Path) -> bool:
    """Return whether nobody else can rename what this user has in a folder."""
    try:
        found = os.stat(folder)
    except OSError:
        return False
    return found.st_uid in (0, os.geteuid()) and (not found.st_mode & 0o022 or bool(found.st_mode & stat.S_ISVTX))
