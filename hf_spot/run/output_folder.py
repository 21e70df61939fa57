"""Keep apart what is in an output folder: this run's checkpoints, and those of others."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from hf_spot.run.local_copies import recorded
from hf_spot.run.run import Run
from hf_spot.run.transfer import sync

log = logging.getLogger("hf_spot")

_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
_MARKER = ".hf_spot/run"  # names the run that uses the folder
_OWN_SAVES = ".hf_spot/saves"
_FOREIGN = ".hf_spot/foreign"  # names of checkpoints, one a line, that are not its own and stay where they are


def enter(run: Run, output_dir: Path, *, keep: bool) -> None:
    """Take an output folder into use.

    At the first use, checkpoints that were there before are set aside: Trainer would overwrite them, rotate them away, or take
    them for its own. Only the holder of the claim may call this.

    Args:
        run: the run that will use the folder.
        output_dir: the Trainer's.
        keep: leave them in place, because the script resumes from one of them.
    """
    sweep(output_dir)
    _show_own_saves(run, output_dir)
    marker = output_dir / _MARKER
    if marker.exists() and marker.read_bytes() == _on_disk(run):
        return
    before = marker.read_bytes().decode("utf-8", "surrogateescape") if marker.exists() else ""
    own = {ref.step for ref in run.journal.state.checkpoints}
    foreign = [path for path in _checkpoints(output_dir) if _step(path) not in own or not _is_committed(run, path)]
    if not keep:
        for folder in foreign:
            _keep_aside(folder, f"belongs to {before}" if before else "was there before this run")
    marker.parent.mkdir(parents=True, exist_ok=True)
    (output_dir / _FOREIGN).unlink(missing_ok=True)
    if keep and foreign:
        (output_dir / _FOREIGN).write_text("".join(f"{folder.name}\n" for folder in foreign), encoding="utf-8")
    marker.write_bytes(_on_disk(run))
    for path in (marker, marker.parent, output_dir):  # without it, checkpoints of this run would be taken for another's
        sync(path)


def foreign_checkpoints(output_dir: Path) -> Collection[str]:
    """Return the names of the checkpoints that stay in a folder although they are not of the run that uses it."""
    listed = output_dir / _FOREIGN
    names = listed.read_text(encoding="utf-8").split() if listed.exists() else []
    return {name for name in names if (output_dir / name).is_dir()}


def own_save(output_dir: Path, step: int) -> Path:
    """Return the folder of a save that Trainer has not asked for: rotation, ``get_last_checkpoint`` and people don't see it.

    Args:
        output_dir: the Trainer's.
        step: its number.
    """
    return output_dir / _OWN_SAVES / str(step) / f"checkpoint-{step}"


def discard_own_saves(output_dir: Path, before_step: int) -> None:
    """Delete the folders of `own_save` that are older than a step."""
    for folder in _own_saves(output_dir):
        if _step(folder) < before_step:
            shutil.rmtree(folder.parent, ignore_errors=True)
    with contextlib.suppress(OSError):  # there are others, or none was made
        (output_dir / _OWN_SAVES).rmdir()


def _show_own_saves(run: Run, output_dir: Path) -> None:
    """Move the saves of `own_save` to where a resume looks for them, if they can be of use; delete the others."""
    whole = {step for step, _ in recorded(output_dir)}
    newest = max((ref.step for ref in run.journal.state.checkpoints), default=0)
    for folder in _own_saves(output_dir):
        if (_step(folder) in whole or _step(folder) == newest) and not (output_dir / folder.name).exists():
            folder.rename(output_dir / folder.name)
    shutil.rmtree(output_dir / _OWN_SAVES, ignore_errors=True)


def _own_saves(output_dir: Path) -> list[Path]:
    return [path for place in (output_dir / _OWN_SAVES).glob("*") for path in _checkpoints(place)]


def set_aside_uncommitted(run: Run, output_dir: Path, resume_step: int, training: int = 1) -> None:
    """Set aside local checkpoints newer than the step that training resumes from: they were never committed, or are another
    training's.

    Args:
        run: the run that uses the folder.
        output_dir: the Trainer's.
        resume_step: 0 when nothing is resumed.
        training: number of the training.
    """
    foreign = foreign_checkpoints(output_dir)
    for folder in _checkpoints(output_dir):
        if _step(folder) <= resume_step or folder.name in foreign:
            continue
        others = [ref for ref in run.journal.state.checkpoints if ref.step == _step(folder) and ref.training != training]
        theirs = next((ref for ref in others if not run.compare(run.checkpoint(ref), folder)), None)
        if theirs is None:
            set_aside(folder, "it was never committed")
        elif resume_step and not run.compare(run.checkpoint(theirs), folder.with_name(f"other-{folder.name}")):
            shutil.rmtree(folder)  # an earlier launch has kept it already
        elif resume_step:  # otherwise Trainer reads no checkpoint here, and treats it as it does those of an earlier training
            _keep_aside(folder, f"belongs to training {theirs.training} of this run")


def sweep(output_dir: Path) -> None:
    """Remove what killed launches left in ``output_dir/.hf_spot``: partial downloads, and the hard links of uploads, which
    would keep the space of checkpoints that rotation has deleted. Only the holder of the claim may call this."""
    for pattern in ("restore-*", "pins-*", "memory-*"):
        for leftover in (output_dir / ".hf_spot").glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
    for leftover in (output_dir / ".hf_spot").glob(".whole-*"):  # a record that was cut short
        leftover.unlink(missing_ok=True)


def set_aside(folder: Path, why: str) -> Path:
    """Rename ``checkpoint-N`` to ``torn-checkpoint-N``, because rotation and ``get_last_checkpoint`` assume that every
    ``checkpoint-*`` is complete. Only the newest torn folder is kept. Return its path."""
    for older in folder.parent.glob("torn-checkpoint-*"):
        shutil.rmtree(older, ignore_errors=True)
    target = folder.with_name(f"torn-{folder.name}")
    folder.rename(target)
    log.warning("%s was set aside as %s: %s", folder, target.name, why)
    return target


def _keep_aside(folder: Path, why: str) -> None:
    """Rename another's ``checkpoint-N`` to ``other-checkpoint-N``, and keep it for ever."""
    number = 1
    while (target := folder.with_name(f"other-{folder.name}{'' if number == 1 else f'.{number}'}")).exists():
        number += 1
    folder.rename(target)
    log.warning("%s %s: it is kept as %s. To start a run from it: --from %s", folder, why, target.name, target)


def _checkpoints(output_dir: Path) -> list[Path]:
    return sorted((path for path in output_dir.glob("checkpoint-*") if _CHECKPOINT.match(path.name)), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _is_committed(run: Run, folder: Path) -> bool:
    """Return whether a folder is the same to the byte as a commit of the run."""
    refs = [ref for ref in run.journal.state.checkpoints if ref.step == _step(folder)]
    return any(not run.compare(run.checkpoint(ref), folder) for ref in refs)


def _on_disk(run: Run) -> bytes:
    return run.url.encode("utf-8", "surrogateescape")  # whatever the locale
