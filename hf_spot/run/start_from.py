"""Start a run from a checkpoint of another run, or from a folder that Trainer wrote."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_spot.errors import ConfigError, ObjectNotFound
from hf_spot.run import transfer
from hf_spot.run.checkpoint import Checkpoint, CommitRequest, check_resumable
from hf_spot.run.journal import TRAINING_KEY, Entry
from hf_spot.run.manifest import FileEntry, files_in, missing_for_resume
from hf_spot.run.parts import can_be_parted, digests_key, parts_in
from hf_spot.run.run import Run
from hf_spot.storage.open import open_store
from hf_spot.storage.store import ObjectStore, Progress
from hf_spot.storage.threads import Workers

log = logging.getLogger("hf_spot")

REASON = "from"
_STEP = re.compile(r"^(.+)@(\d+)$")
_HINT = "--from s3://bucket/runs/other@500, or --from out/checkpoint-500"
# What a commit records about its own run and launch, and not about the training.
_OF_ITS_RUN = frozenset(
    {
        "described",
        "reason",
        "timing",
        "trackers",
        "output_dir",
        "history",
        "complete",
        "best_step",
        "prefix",
        "step",
        TRAINING_KEY,
    }
)


@dataclass(frozen=True)
class Start:
    """A checkpoint to start from.

    Args:
        name: as the user has written it.
        step: optimizer steps done.
        world_size: number of ranks that saved it.
        complete: whether its training had reached its end.
        put: copies its files under a key of a store, and returns their manifest.
        details: what its commit recorded that still holds in another run.
    """

    name: str
    step: int
    world_size: int
    complete: bool
    put: Callable[[Run, str, Progress | None], list[FileEntry]]
    details: dict[str, Any]


def find_start(name: str) -> Start:
    """Return the checkpoint that a user has named. It is checked, and nothing is copied yet.

    Args:
        name: ``RUN`` for a run's newest checkpoint, ``RUN@STEP``, or a folder such as ``out/checkpoint-500``.

    Raises:
        ConfigError: it is neither a run nor a checkpoint.
        NoCheckpoint: the run has no checkpoint, or none of this step.
        IncompleteCheckpoint: it lacks a file that a resume needs.
        StoreError: the store could not be read.
    """
    if Path(name).is_dir() and not Path(name, "journal").is_dir():
        return _of_folder(Path(name), name)
    named = _STEP.match(name)
    other = Run(named[1] if named else name)
    if not other.state().number:
        raise ConfigError(f"--from {name}: there is neither a run nor a checkpoint", hint=_HINT)
    checkpoint = other.find(int(named[2]) if named else None)
    check_resumable(checkpoint, other.url)
    details = {key: value for key, value in checkpoint.details.items() if key not in _OF_ITS_RUN}
    described = checkpoint.details.get("described")
    origin = {"run": other.url, "launch": checkpoint.ref.launch, "step": checkpoint.step}
    if isinstance(described, int):
        origin["trains"] = other.description(described)

    def put(run: Run, prefix: str, progress: Progress | None) -> list[FileEntry]:
        return _copy(other, checkpoint, run, prefix, progress)

    return Start(name, checkpoint.step, details["world_size"], checkpoint.ref.complete, put, {**details, "from": origin})


def _of_folder(folder: Path, name: str) -> Start:
    paths = files_in(folder)
    try:
        step = json.loads((folder / "trainer_state.json").read_bytes())["global_step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--from {name}: no trainer_state.json there names a step: {error}", hint=_HINT) from error
    if parted := parts_in(folder):
        raise ConfigError(f"--from {name} has only parts of {parted[0]}", hint=_HINT)
    world_size = max(1, sum(bool(re.fullmatch(r"rng_state_\d+\.pth", path)) for path in paths))
    if missing := missing_for_resume(paths, world_size):
        raise ConfigError(f"--from {name} lacks {', '.join(missing)}: no training can resume from it", hint=_HINT)

    def put(run: Run, prefix: str, progress: Progress | None) -> list[FileEntry]:
        return transfer.upload(run.store, folder, prefix, progress=progress)

    return Start(name, int(step), world_size, False, put, {"from": {"folder": folder.absolute().name, "step": step}})


def start_or_resume(run: Run, about: dict[str, Any], name: str | None, *, after: int | None = None) -> int:
    """Claim a run for a new launch, and give it a checkpoint to start from if it has none. Return the launch's number.

    Args:
        run: to claim.
        about: data of the claim.
        name: of the checkpoint, as `find_start` takes it; None to start anew.
        after: claim only if this is still the newest launch.

    Raises:
        Fenced: another launch than ``after`` is the newest.
        SpotError: as `find_start` and `start_from`; a checkpoint that can't be found is an error before the claim.
    """
    start = None if name is None or run.state().latest() is not None else find_start(name)
    launch = run.claim(about, after=after)
    if start is not None:
        start_from(run, start)
        log.info("%s starts from step %d of %s", run.url, start.step, start.name)
    elif name is not None:
        log.info("%s has checkpoints of its own: it resumes from those, not from %s", run.url, name)
    return launch


def start_from(run: Run, start: Start, *, progress: Progress | None = None) -> Entry:
    """Commit a copy of a checkpoint as the first of a run that is claimed and has none. Return the entry.

    Within one bucket or directory the store copies the files itself.

    Args:
        run: the new run.
        start: the checkpoint.
        progress: called with the number of bytes moved.

    Raises:
        CorruptCheckpoint: a file differs from what was committed.
        StoreError: a store could not be read or written.
    """
    request = CommitRequest(
        step=start.step,
        reason=REASON,
        complete=start.complete,
        world_size=start.world_size,
        details=start.details,
    )
    return run.commit(request, start.put(run, request.prefix(run.launch), progress))


def _copy(other: Run, checkpoint: Checkpoint, run: Run, prefix: str, progress: Progress | None) -> list[FileEntry]:
    source = checkpoint.ref.prefix
    if (common := common_store(other.url, run.url)) is not None:
        store, theirs, ours = common
        with Workers(4, thread_name_prefix="hf_spot-copy") as pool:
            copies = [
                (file, pool.submit(store.copy, f"{theirs}{source}/{file.path}", f"{ours}{prefix}/{file.path}"))
                for file in checkpoint.files
            ]
            lists = [
                pool.submit(store.copy, f"{theirs}{digests_key(source, file.path)}", f"{ours}{digests_key(prefix, file.path)}")
                for file in checkpoint.files
                if can_be_parted(file)
            ]
            for file, copied in copies:
                copied.result()
                if progress is not None:
                    progress(file.size)
            for one in lists:
                with contextlib.suppress(ObjectNotFound):  # without it, the file is always fetched as a whole
                    one.result()
        return list(checkpoint.files)
    with tempfile.TemporaryDirectory(prefix="hf_spot-from-") as scratch:
        folder = other.fetch(checkpoint, Path(scratch))
        return transfer.upload(run.store, folder, prefix, progress=progress)


def common_store(one: str, other: str) -> tuple[ObjectStore, str, str] | None:
    """Return a store that contains both runs, and where in it each is; None if there is none that could copy between them."""
    urls = [url if "://" in url else str(Path(url).absolute()) for url in (one, other)]
    above = _shared(*urls)
    is_bucket = above.startswith(("s3://", "gs://", "az://")) and above.count("/") >= 3
    if "?" in above or not (is_bucket or (above.startswith("/") and above != "/")):
        return None
    theirs, ours = (f"{url.rstrip('/')}/".removeprefix(above) for url in urls)
    return open_store(above.rstrip("/")), theirs, ours


def _shared(one: str, other: str) -> str:
    """Return the beginning that two URLs share, up to a slash."""
    parts, others = f"{one.rstrip('/')}/".split("/"), f"{other.rstrip('/')}/".split("/")
    same = 0
    while same < min(len(parts), len(others)) - 1 and parts[same] == others[same]:
        same += 1
    return "/".join(parts[:same]) + "/" if same else ""
