"""Run: a run's journal and its checkpoints, behind one URL."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any

from hf_spot.errors import ConfigError, CorruptCheckpoint, NoCheckpoint
from hf_spot.policy.retention import to_prune
from hf_spot.run import transfer
from hf_spot.run.checkpoint import Checkpoint, CommitRequest, check_resumable, check_whole
from hf_spot.run.dedup import Unchanged
from hf_spot.run.display import display
from hf_spot.run.journal import BY_HAND, CheckpointRef, Entry, Journal, RunState
from hf_spot.run.manifest import (
    MOST_RANKS,
    FileEntry,
    check_names,
    difference,
    files_in,
    has_weights,
    missing_for_resume,
    needed_by,
)
from hf_spot.run.patience import WAITS_S
from hf_spot.run.seal import key_from
from hf_spot.storage.open import open_store
from hf_spot.storage.probe import leftovers, probe
from hf_spot.storage.store import ObjectStore, Progress, fences

log = logging.getLogger("hf_spot")

_TAKEN = ".taken"
_LAUNCH_FOLDER = re.compile(r"^e(\d{4,})/")


def _mark(prefix: str) -> str:
    """Key of the object that says that a push writes under ``prefix``."""
    return f"{prefix}/{_TAKEN}"


class Run:
    """A run's journal and checkpoints. A notebook shows it as tables, with a timeline if matplotlib is installed.

    Reading needs nothing but the URL. Writing needs a claim: `claim` for a new launch, `adopt` for a process of it.

    Args:
        url: ``s3://bucket/prefix``, a directory, or an `ObjectStore`.
        allow_unfenced_store: accept a store that can't keep two machines apart.
        workers: files moved at the same time.

    ``$HF_SPOT_JOURNAL_KEY`` signs the journal (`hf_spot.run.seal`).

    Raises:
        ConfigError: the URL or the key can't be used.
    """

    def __init__(self, url: str | PathLike[str] | ObjectStore, *, allow_unfenced_store: bool = False, workers: int = 4) -> None:
        self.store = open_store(url)
        self.journal = Journal(self.store, key=key_from(os.environ))
        self._allow_unfenced_store = allow_unfenced_store
        self._workers = workers
        self._unchanged = Unchanged()

    @property
    def url(self) -> str:
        """Where the run stands."""
        return self.store.url

    @property
    def launch(self) -> int:
        """Number of the launch that this object writes for; 0 when it only reads."""
        return self.journal.launch

    def __repr__(self) -> str:
        return f"Run({self.url!r})"

    def _repr_html_(self) -> str | None:
        """Return the HTML that Jupyter shows for a cell that ends with a run. In contrast, `repr` sends no requests."""
        return display.html_of(self)

    # -- reading ------------------------------------------------------------------------------------------------------

    def state(self) -> RunState:
        """Where the run stands now: four requests."""
        return self.journal.refresh()

    def events(self) -> Iterator[Entry]:
        """The whole journal, oldest first."""
        return self.journal.entries()

    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that exist, oldest commit first."""
        return [self.checkpoint(ref) for ref in self.state().checkpoints]

    def checkpoint(self, ref: CheckpointRef) -> Checkpoint:
        """The whole commit behind what the state remembers of it: one request."""
        return self._from_entry(self.journal.read(ref.entry), ref)

    def latest(self, stage: int | None = None) -> Checkpoint | None:
        """The newest committed checkpoint, or None."""
        ref = self.state().latest(stage)
        return None if ref is None else self.checkpoint(ref)

    def find(self, step: int | None = None) -> Checkpoint:
        """The newest checkpoint, or the newest commit of ``step``. Raises NoCheckpoint."""
        refs = [ref for ref in self.state().checkpoints if step is None or ref.step == step]
        if not refs:
            what = "no committed checkpoint" if step is None else f"no checkpoint of step {step}"
            raise NoCheckpoint(f"{self.url} has {what}", hint=f"hf-spot checkpoints ls {self.url}")
        return self.checkpoint(refs[-1])

    def pull(self, into: str | PathLike[str], step: int | None = None, *, progress: Progress | None = None) -> Path:
        """Downloads and verifies a checkpoint into the folder ``into/checkpoint-<step>`` and returns that path.

        A folder that already holds exactly these files is left as it is.

        Raises:
            NoCheckpoint: there is none (of this step).
            CorruptCheckpoint: it differs from what was committed, or another folder stands in the way.
        """
        return self.fetch(self.find(step), Path(into), progress=progress)

    def fetch(
        self, checkpoint: Checkpoint, into: Path, *, ranks: Collection[int] | None = None, progress: Progress | None = None
    ) -> Path:
        """`pull` for a checkpoint in hand; with ``ranks`` only what these ranks need to resume."""
        folder = into / checkpoint.name
        files = checkpoint.files if ranks is None else needed_by(checkpoint.files, ranks)
        if folder.exists():
            problems = self.compare(checkpoint, folder, ranks=ranks)
            if not problems:
                self.remember(checkpoint, ranks=ranks)
                return folder
            raise CorruptCheckpoint(
                f"{folder} stands in the way and is not this checkpoint: {problems[0]}",
                hint=f"mv {folder} {folder.with_name('my-' + folder.name)}",
            )
        into.mkdir(parents=True, exist_ok=True)
        if checkpoint.reason != "push":
            check_resumable(checkpoint, self.url)
        transfer.download(self.store, checkpoint.ref.prefix, files, folder, workers=self._workers, progress=progress)
        self.remember(checkpoint, ranks=ranks)
        return folder

    def remember(self, checkpoint: Checkpoint, *, ranks: Collection[int] | None = None) -> None:
        """This machine goes on from it (``ranks`` as for `fetch`): what a later checkpoint has of its files is copied in the
        store, and not sent again."""
        files = checkpoint.files if ranks is None else needed_by(checkpoint.files, ranks)
        self._unchanged.note(checkpoint.ref.prefix, files)

    def read(self, checkpoint: Checkpoint, path: str) -> bytes:
        """One small file of a checkpoint, verified.

        Raises:
            CorruptCheckpoint: it is not there, or differs from what was committed.
        """
        files = [file for file in checkpoint.files if file.path == path]
        if not files:
            raise CorruptCheckpoint(
                f"{checkpoint.name} of {self.url} has no {path}", hint=f"hf-spot checkpoints verify {self.url}"
            )
        with tempfile.TemporaryDirectory(prefix="hf_spot-read-") as scratch:
            folder = Path(scratch) / "file"
            transfer.download(self.store, checkpoint.ref.prefix, files, folder)
            return (folder / path).read_bytes()

    def compare(self, checkpoint: Checkpoint, folder: Path, *, ranks: Collection[int] | None = None) -> list[str]:
        """How a local folder differs from a commit (for ``ranks``, from what they need), in words; an empty list when its
        files are the same to the byte."""
        files = checkpoint.files if ranks is None else needed_by(checkpoint.files, ranks)
        return [problem for file in files if (problem := difference(folder, file))]

    def verify(self, step: int | None = None, *, progress: Progress | None = None) -> dict[int, list[str]]:
        """Reads every file of the checkpoints (or of one step's) back: problems by entry number, empty lists when whole.

        One that is pruned meanwhile is left out.
        """
        chosen = [self.find(step)] if step is not None else self.checkpoints()
        found = {}
        for checkpoint in chosen:
            problems = self._problems(checkpoint, progress)
            if problems is not None:
                found[checkpoint.ref.entry] = problems
        return found

    def _problems(self, checkpoint: Checkpoint, progress: Progress | None) -> list[str] | None:
        """What is wrong with a checkpoint's files; None when somebody has pruned it meanwhile."""
        lacking = missing_for_resume((f.path for f in checkpoint.files), checkpoint.details.get("world_size", 1))
        problems = [f"{name} is missing" for name in lacking if checkpoint.reason != "push"]
        damaged: list[str] = []
        with tempfile.TemporaryDirectory(prefix="hf_spot-verify-") as scratch:
            for file in checkpoint.files:
                folder = Path(scratch) / "file"
                waits_s = () if damaged else WAITS_S  # patience for one is enough to tell
                try:
                    transfer.download(self.store, checkpoint.ref.prefix, [file], folder, progress=progress, waits_s=waits_s)
                    shutil.rmtree(folder)
                except CorruptCheckpoint as error:
                    if not damaged and self._is_pruned(checkpoint):
                        return None
                    damaged.append(str(error))
        return None if damaged and self._is_pruned(checkpoint) else problems + damaged

    def _is_pruned(self, checkpoint: Checkpoint) -> bool:
        return all(ref.entry != checkpoint.ref.entry for ref in self.journal.refresh().checkpoints)

    # -- writing ------------------------------------------------------------------------------------------------------

    def claim(self, data: dict[str, Any] | None = None) -> int:
        """Proves that the store can be used, then takes the run over under a new launch, which is returned.

        Raises:
            StoreError: the store can't be used; the message names the permission or the repair.
        """
        probe(self.store, allow_unfenced=self._allow_unfenced_store)
        return self.journal.claim(data or {}).launch

    def adopt(self, launch: int) -> None:
        """Writes on under a claim made by another process of the same launch. Raises Fenced."""
        self.journal.adopt(launch)

    def join(self) -> None:
        """Writes beside the newest launch without fencing it; claims the run when nobody has yet."""
        probe(self.store, allow_unfenced=self._allow_unfenced_store)
        launch = self.state().launch
        if launch:
            self.adopt(launch)
        else:
            self.claim({"by": BY_HAND})

    def record(self, kind: str, data: dict[str, Any]) -> Entry:
        """Appends an entry that is no commit. Raises Fenced, StoreUnavailable."""
        return self.journal.append(kind, data)

    def upload(self, folder: Path, request: CommitRequest, *, progress: Progress | None = None) -> list[FileEntry]:
        """Puts a checkpoint's files in place; nobody sees them until `commit`.

        Raises:
            IncompleteCheckpoint: a file that a resume needs is missing.
        """
        if request.parts == 1:
            check_whole(request, files_in(folder), folder)
        prefix = request.prefix(self.launch)
        files = transfer.upload(self.store, folder, prefix, unchanged=self._unchanged, workers=self._workers, progress=progress)
        self._unchanged.note(prefix, files)
        return files

    def commit(self, request: CommitRequest, files: list[FileEntry], *, id: str | None = None) -> Entry:
        """Makes an uploaded checkpoint exist. ``id``: the same one when repeating after a lost answer.

        Raises:
            Fenced: a newer launch owns the run.
            IncompleteCheckpoint: a file that a resume needs is missing.
            CorruptCheckpoint: two machines have uploaded a file of one name.
        """
        if request.parts > 1:
            check_names(files)
            check_whole(request, [file.path for file in files], request.prefix(self.launch))
        data = {
            "step": request.step,
            "stage": request.stage,
            "reason": request.reason,
            "complete": request.complete,
            "best_step": request.best_step,
            "world_size": request.world_size,
            "prefix": request.prefix(self.launch),
            "files": [asdict(file) for file in files],
            **(request.details or {}),
        }
        return self.journal.append("commit", data, id=id)

    def push(self, folder: str | PathLike[str], step: int | None = None, *, progress: Progress | None = None) -> Checkpoint:
        """Upload and commit a local folder, beside whatever launch is running: nobody is fenced.

        Nothing that stands is touched: its files get a place of their own, and are nobody's until the commit.

        Args:
            folder: such as ``out/checkpoint-500``.
            step: needed when the folder's name doesn't end in it.

        Raises:
            ConfigError: no such folder, no step, no checkpoint, or the run is finished.
        """
        path = Path(folder)
        if not path.is_dir():
            raise ConfigError(f"{path} is no folder", hint="hf-spot checkpoints push RUN out/checkpoint-500")
        match = re.fullmatch(r"checkpoint-(\d+)", path.resolve().name)
        if step is None and match is None:
            raise ConfigError(f"{path} does not say which step it is", hint="add --step N")
        number = int(match[1]) if step is None and match else step or 0
        if number < 0:
            raise ConfigError(f"--step {number} is no step", hint="add --step N")
        names = files_in(path)
        if not has_weights(names):
            raise ConfigError(
                f"{path} is no checkpoint: it has no weights, such as model.safetensors",
                hint="hf-spot checkpoints push RUN out/checkpoint-500, a folder that Trainer wrote",
            )
        world_size = max(1, sum(bool(re.fullmatch(r"rng_state_\d+\.pth", name)) for name in names))
        if missing := missing_for_resume(names, world_size):
            log.warning("%s lacks %s: it can be pulled, and no training can resume from it", path, ", ".join(missing))
        self.join()
        if self.journal.state.ended == "finished":
            raise ConfigError(
                f"{self.url} is finished: nothing would be trained from what is pushed there",
                hint=f"hf-spot checkpoints push ANOTHER-RUN {path}, and launch that",
            )
        request = self._place_for(CommitRequest(step=number, reason="push", world_size=world_size))
        entry = self.commit(request, self.upload(path, request, progress=progress))
        self.store.delete([_mark(request.prefix(self.launch))])
        return self._from_entry(entry, next(ref for ref in entry.state.checkpoints if ref.entry == entry.number))

    def _place_for(self, request: CommitRequest) -> CommitRequest:
        """The request with a place that is nobody else's: where nothing stands, and that is marked as taken first."""
        prefix = request.prefix(self.launch)
        if not any(True for _ in self.store.list(f"{prefix}/")) and self.store.create(_mark(prefix), uuid.uuid4().hex.encode()):
            # Another push may have been committed there, and pruned, since the journal was read.
            if fences(self.store) and all(ref.prefix != prefix for ref in self.journal.refresh().checkpoints):
                return request
            self.store.delete([_mark(prefix)])
        return replace(request, apart=uuid.uuid4().hex[:12])

    def prune(self, save_total_limit: int | None) -> list[CheckpointRef]:
        """Takes old checkpoints out of the run, then deletes their files; returns what went.

        Args:
            save_total_limit: newest ones that stay, besides the best; None or 0 keeps all.
        """
        gone = to_prune(self.journal.state.checkpoints, save_total_limit)
        if gone:
            # First the entry: a reader never sees a checkpoint whose files are going.
            self.record("prune", {"entries": [ref.entry for ref in gone], "steps": [ref.step for ref in gone]})
            kept = {ref.prefix for ref in self.journal.state.checkpoints}
            transfer.delete(self.store, [ref.prefix for ref in gone if ref.prefix not in kept])
        return gone

    def collect_garbage(self) -> int:
        """Deletes files that older launches left without a commit, and aborts their uploads; returns how many went.

        Only what older launches wrote: those writers are fenced, so nothing of theirs can be committed any more.
        """

        def stale(key: str) -> bool:
            match = _LAUNCH_FOLDER.match(key)
            return match is not None and int(match[1]) < self.launch

        kept = tuple(f"{ref.prefix}/" for ref in self.journal.state.checkpoints)
        orphans = [info.key for info in self.store.list("e") if stale(info.key) and not info.key.startswith(kept)]
        orphans += leftovers(self.store)
        self.store.delete(orphans)
        return len(orphans) + self.store.abort(stale)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _from_entry(self, entry: Entry, ref: CheckpointRef) -> Checkpoint:
        details = dict(entry.data)
        try:
            files = tuple(FileEntry.of(file) for file in details.pop("files"))
            ranks = details.get("world_size", 1)
            if type(ranks) is not int or not 0 < ranks <= MOST_RANKS:
                raise TypeError(f"world_size is {ranks!r}")
            return Checkpoint(ref=ref, time=entry.time, reason=details["reason"], files=files, details=details)
        except (KeyError, TypeError) as error:
            raise CorruptCheckpoint(f"entry {entry.number} of {self.url} is no commit ({error})") from error
