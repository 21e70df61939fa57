"""Copy and delete whole runs, and fork one from a checkpoint. Within one bucket or directory the store copies the files."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from hf_spot.errors import ConfigError, ObjectNotFound
from hf_spot.run.journal import BY_HAND, RunState
from hf_spot.run.run import Run
from hf_spot.run.start_from import common_store, find_start, start_from
from hf_spot.storage.probe import probe
from hf_spot.storage.store import ObjectInfo, Progress
from hf_spot.storage.threads import Workers

# What hf_spot writes into a run. An output_dir may have more, such as TensorBoard's files below ``logs/``.
_SHIPPED = r"logs/[^/]+\.log$|wheels/[^/]+/[^/]+\.whl$"
_OWN = re.compile(rf"^(journal/|tip\.json$|e\d{{4,}}/|{_SHIPPED}|\.hf[_-]spot)")
_TO_COPY = re.compile(_SHIPPED)
_JOURNAL = re.compile(r"^journal/(\d{8})\.json$")
_AT_ONCE = 8
_TRIES = 5  # a launch of the source may prune a checkpoint while it is copied


def belongs(key: str) -> bool:
    """Return whether a key of a run's store is part of the run: other files may stand beside it, as in an ``output_dir``."""
    return _OWN.match(key) is not None


def has_ended(run: Run, state: RunState) -> bool:
    """Return whether the newest launch has said how it ended; otherwise it may be running. A run that was only forked or pushed
    to by hand has none that could."""
    if state.ended is not None or not state.number:
        return True
    try:
        return state.launch == 1 and run.journal.read(1).data.get("by") == BY_HAND
    except ObjectNotFound:  # a deletion was interrupted
        return False


def check_source(run: Run) -> RunState:
    """Return the state of a run. Raises ConfigError if it does not exist."""
    state = run.state()
    if not state.number:
        raise ConfigError(
            f"{run.url} is not a run", hint=f"hf-spot runs ls {run.url.rstrip('/').rpartition('/')[0] or run.url}"
        )
    return state


def check_target(source: Run, target: Run) -> None:
    """Check that a run can be copied to a place. What an interrupted copy of the same run has left there is accepted.

    Raises:
        ConfigError: another run is there, or the two overlap.
    """
    one, other = (f"{run.url.rstrip('/')}/" for run in (source, target))
    if one == other:
        raise ConfigError(f"{source.url} can't be copied to itself", hint="another URL")
    if one.startswith(other) or other.startswith(one):
        raise ConfigError(f"{target.url}: a run can't be copied to a place inside or above itself", hint="another URL")
    state = target.state()
    if state.number and not _is_remainder(source, target, state.number):
        raise ConfigError(f"{target.url} already contains a run", hint=f"another URL, or hf-spot runs rm {target.url}")


def _is_remainder(source: Run, target: Run, number: int) -> bool:
    """Return whether the newest entry of the target is a copy of an entry of the source."""
    try:
        return source.journal.read(number).id == target.journal.read(number).id
    except ObjectNotFound:
        return False


def files_to_copy(run: Run, state: RunState) -> list[ObjectInfo]:
    """Return what a copy of a run consists of, without its journal: the files of its checkpoints, and logs."""
    kept = tuple(f"{prefix}/" for prefix in state.prefixes)
    return [info for info in run.store.list() if info.key.startswith(kept) or _TO_COPY.match(info.key)]


def copy_run(source: Run, target: Run, *, progress: Callable[[int], Progress] | None = None) -> RunState:
    """Copy a run as it is now, with its history; a launch of it may be running. Return the state that was copied.

    The journal comes last, its newest entry first, then the commits of the checkpoints, then the rest: from the moment at which
    the copy is a run, its state is that of the source and the files of all its checkpoints are there. A copy that was
    interrupted goes on when it is repeated.

    Args:
        source: the run.
        target: an empty place, or one with the remainder of an interrupted copy.
        progress: takes the number of bytes to move, and returns the progress.

    Raises:
        ConfigError: see `check_target`.
        StoreError: a store could not be read or written.
    """
    check_target(source, target)
    probe(target.store)
    for last in (*(False for _ in range(_TRIES - 1)), True):
        state = check_source(source)
        files = files_to_copy(source, state)
        shown = progress(sum(info.size for info in files)) if progress is not None else None
        try:
            _copy_all(source, target, files, shown)
            break
        except ObjectNotFound:
            if last or source.state() == state:
                raise
    copied = {info.key for info in files}
    stale = [info.key for info in target.store.list("e") if belongs(info.key) and info.key not in copied]
    target.store.delete(stale)  # of an attempt during which the source pruned them
    for number in reversed(_by_importance(state)):
        target.store.create(f"journal/{number:08d}.json", source.store.get(f"journal/{number:08d}.json"))
    target.store.put("tip.json", source.store.get("tip.json"))
    return state


def _copy_all(source: Run, target: Run, files: Iterable[ObjectInfo], progress: Progress | None) -> None:
    common = common_store(source.url, target.url)

    def copy(info: ObjectInfo) -> None:
        if common is not None:
            store, theirs, ours = common
            store.copy(f"{theirs}{info.key}", f"{ours}{info.key}")
        else:
            with tempfile.TemporaryDirectory(prefix="hf_spot-copy-") as scratch:
                source.store.get_file(info.key, Path(scratch) / "file")
                target.store.put_file(info.key, Path(scratch) / "file")
        if progress is not None:
            progress(info.size)

    there = {info.key: info.size for info in target.store.list()}
    with Workers(_AT_ONCE, "hf_spot-copy") as pool:
        # Files of checkpoints are never rewritten, so one that is there with its size was copied before.
        jobs = [pool.submit(copy, info) for info in files if there.get(info.key) != info.size]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _by_importance(state: RunState) -> list[int]:
    """Return the numbers of all entries: first those that only tell the history, then the commits, last the newest."""
    commits = {ref.entry for ref in (*state.checkpoints, *state.weights)} - {state.number}
    history = [number for number in range(1, state.number) if number not in commits]
    return [*history, *sorted(commits), state.number] if state.number else []


def delete_run(run: Run) -> tuple[int, list[str]]:
    """Delete a run, and nothing else at its place. Return how many objects were deleted, and the keys that stay.

    The journal goes first, what `copy_run` writes first at its end: as long as its newest entry is there, the state is right. A
    deletion that was interrupted goes on when it is repeated.
    """
    state = run.state()
    keys = [info.key for info in run.store.list()]
    own, others = [key for key in keys if belongs(key)], [key for key in keys if not belongs(key)]
    there = {key for key in own if _JOURNAL.match(key)}
    known = [f"journal/{number:08d}.json" for number in _by_importance(state)]
    entries = [*sorted(there.difference(known)), *(key for key in known if key in there)]
    files = [key for key in own if not key.startswith("journal/") and key != "tip.json"]
    rest = [key for key in own if key not in {*entries, *files}]
    for keys_now in (entries[:-1], entries[-1:], rest, files):
        run.store.delete(keys_now)
    with contextlib.suppress(ObjectNotFound):
        run.store.abort(belongs)
    return len(own), others


def fork_run(name: str, target: Run, *, progress: Progress | None = None) -> int:
    """Begin a new run with a copy of a checkpoint, from which its first launch resumes. Return the step.

    Args:
        name: ``RUN``, ``RUN@STEP`` or a folder, as ``launch --from`` takes it.
        target: the new run.
        progress: called with the number of bytes moved.

    Raises:
        ConfigError: the target has a checkpoint already, or the name is neither a run nor a checkpoint.
    """
    if target.state().latest() is not None:
        raise ConfigError(f"{target.url} already contains a run", hint=f"another URL, or hf-spot runs rm {target.url}")
    start = find_start(name)
    target.claim({"by": BY_HAND})
    start_from(target, start, progress=progress)
    return start.step
