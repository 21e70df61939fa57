"""Brings a run's newest usable checkpoint to this machine and clears away local folders that would mislead a resume."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from hf_spot.errors import CorruptCheckpoint, IncompleteCheckpoint, ObjectNotFound
from hf_spot.run.checkpoint import Checkpoint
from hf_spot.run.journal import CheckpointRef
from hf_spot.run.run import Run
from hf_spot.runtime import Runtime
from hf_spot.storage.store import Progress

log = logging.getLogger("hf_spot")

_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
_MARKER = ".hf_spot/run"


def restore_newest(
    refs: Sequence[CheckpointRef], bring_one: Callable[[CheckpointRef], tuple[Checkpoint, Path]], url: str
) -> tuple[Checkpoint, Path] | None:
    """The newest of these checkpoints that is whole, as a local folder; None when there are none.

    A commit whose files are damaged or gone is reported, and the one before it is taken.

    Args:
        refs: oldest commit first.
        bring_one: brings one to this machine (see `bring`), or to all that train together.
        url: of the run, for what is said.

    Raises:
        CorruptCheckpoint: there are commits, and none of them is whole. Starting afresh in silence would lose the run.
        StoreError: the store could not be asked.
    """
    for ref in reversed(refs):
        try:
            return bring_one(ref)
        except (CorruptCheckpoint, IncompleteCheckpoint, ObjectNotFound) as error:
            log.error("checkpoint-%d of launch %d can't be restored, trying the one before: %s", ref.step, ref.launch, error)
    if refs:
        raise CorruptCheckpoint(
            f"none of the {len(refs)} checkpoints of {url} is whole",
            hint=f"hf-spot checkpoints verify {url}; to start afresh: trainer.train(resume_from_checkpoint=False)",
        )
    return None


def bring(
    run: Run,
    ref: CheckpointRef,
    output_dir: Path,
    *,
    ranks: Collection[int] | None = None,
    world_size: int = 1,
    progress: Callable[[int], Progress | None] = lambda size_bytes: None,
    take: Callable[[Collection[int] | None], bool] = lambda ranks: False,
) -> tuple[Checkpoint, Path]:
    """One commit as the folder ``output_dir/checkpoint-<step>``: taken from whoever has fetched and verified it already; or the
    one that is there if it is the same to the byte; else downloaded and verified.

    Args:
        run: to read from.
        ref: the commit.
        output_dir: the Trainer's.
        ranks: that read this disk, when not all do: only what they need is fetched.
        world_size: ranks in all. If there were others when it was saved, everything is fetched.
        progress: makes a progress callback for a download of so many bytes.
        take: puts a folder that holds what these ranks need into its place, and tells whether it had one.
    """
    checkpoint = run.checkpoint(ref)
    folder = output_dir / checkpoint.name
    if checkpoint.details.get("world_size") != world_size:
        ranks = None
    if not take(ranks) and folder.exists() and (problems := run.compare(checkpoint, folder, ranks=ranks)):
        set_aside(folder, problems[0])
    if not folder.exists():
        return checkpoint, run.fetch(checkpoint, output_dir, ranks=ranks, progress=progress(ref.size_bytes))
    run.remember(checkpoint, ranks=ranks)
    return checkpoint, folder


def take(runtime: Runtime, entry: int, into: Path, wait: Callable[[], None], *, ranks: Collection[int] | None = None) -> bool:
    """Moves what the launcher has fetched, and verified as it came, to its place in ``into``, if it is that entry's, and all
    that is wanted. Whether it did.

    Args:
        runtime: of the launch.
        entry: number of the commit that is wanted.
        into: folder that gets ``checkpoint-<step>``.
        wait: called between looks while the download is under way; what it raises ends the wait.
        ranks: whose files are wanted; None for those of all.
    """
    while (told := runtime.read_restore()) is not None:
        if told.entry is None:
            wait()
            continue
        enough = told.ranks is None or (ranks is not None and set(ranks) <= set(told.ranks))
        if told.entry == entry and told.folder is not None and enough and not (into / told.folder.name).exists():
            into.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # another disk, or no longer there
                os.rename(told.folder, into / told.folder.name)
                return True
        break
    return False


def set_aside(folder: Path, why: str) -> Path:
    """Renames ``checkpoint-N`` to ``torn-checkpoint-N``: rotation and ``get_last_checkpoint`` take every
    ``checkpoint-*`` for whole. Only the newest torn folder is kept."""
    for older in folder.parent.glob("torn-checkpoint-*"):
        shutil.rmtree(older, ignore_errors=True)
    target = folder.with_name(f"torn-{folder.name}")
    folder.rename(target)
    log.warning("%s was set aside as %s: %s", folder, target.name, why)
    return target


def sweep(output_dir: Path) -> None:
    """Removes what killed launches left in ``output_dir/.hf_spot``: halves of downloads, and the hard links of uploads,
    which would hold the space of checkpoints long rotated away. Only for the holder of the claim."""
    for pattern in ("restore-*", "pins-*"):
        for leftover in (output_dir / ".hf_spot").glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def set_aside_uncommitted(run: Run, output_dir: Path, resume_step: int) -> None:
    """Sets aside local checkpoints newer than the step that training goes on from: what they hold was never committed.

    In a folder that this run has not used before, with nothing to resume, they are somebody else's and stay.

    Args:
        run: whose folder it is.
        output_dir: the Trainer's.
        resume_step: 0 when nothing is resumed.
    """
    marker = output_dir / _MARKER
    used_before = marker.exists() and marker.read_text() == run.url
    for folder in output_dir.glob("checkpoint-*"):
        match = _CHECKPOINT.match(folder.name)
        if match and int(match[1]) > resume_step and (resume_step or used_before):
            set_aside(folder, "it was never committed")
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(run.url)


def holds_own_checkpoints(run: Run, output_dir: Path) -> bool:
    """True when local checkpoints here come from an earlier launch of this run (and were never committed if it has none)."""
    marker = output_dir / _MARKER
    return marker.exists() and marker.read_text() == run.url
