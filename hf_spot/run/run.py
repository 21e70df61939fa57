"""Run: a run's journal and its checkpoints, behind one URL."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from hf_spot.errors import ConfigError, CorruptCheckpoint, NoCheckpoint
from hf_spot.policy.retention import milestones, to_prune
from hf_spot.policy.trackers import script_run_id, tracker_id
from hf_spot.run import transfer
from hf_spot.run.checkpoint import WEIGHTS_ONLY, Checkpoint, CommitRequest, check_resumable, check_whole
from hf_spot.run.dedup import Unchanged
from hf_spot.run.display import display
from hf_spot.run.journal import BY_HAND, TRAINING_KEY, CheckpointRef, Entry, Journal, RunState, TrainingRef
from hf_spot.run.manifest import (
    MOST_RANKS,
    FileEntry,
    check_names,
    difference,
    files_in,
    files_of_model,
    has_weights,
    is_weights,
    missing_for_resume,
)
from hf_spot.run.parts import PartFiles, parts_in
from hf_spot.run.patience import WAITS_S
from hf_spot.run.seal import key_from
from hf_spot.run.selection import Readers, Selection, select
from hf_spot.storage.open import open_store
from hf_spot.storage.probe import leftovers, probe
from hf_spot.storage.store import ObjectStore, Progress, fences, ranges_of

log = logging.getLogger("hf_spot")

_TAKEN = ".taken"
_LAUNCH_FOLDER = re.compile(r"^e(\d{4,})/")
# What a launch tells about its steps, and where its machines meet: see `hf_spot.run.mailbox`.
TOLD_STEPS = re.compile(r"^e\d{4,}/(?:steps-\d+|meeting-\d+)\.json$")


def _mark(prefix: str) -> str:
    """Return the key of the object that reserves ``prefix`` for a push."""
    return f"{prefix}/{_TAKEN}"


class Run:
    """A run's journal and checkpoints. A notebook shows it as tables, with a timeline if matplotlib is installed.

    Reading needs only the URL. Writing needs a claim: call `claim` for a new launch, `adopt` in other processes of that launch.

    Args:
        url: ``s3://bucket/prefix``, a directory, or an `ObjectStore`.
        allow_unfenced_store: accept a store that can't keep two machines apart.
        workers: number of files to move at the same time.

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
        self.sent = transfer.Meter()
        self._selections: dict[tuple[int, Readers | None], Selection] = {}
        self._is_probed = False

    @property
    def url(self) -> str:
        """Return the run's URL."""
        return self.store.url

    @property
    def launch(self) -> int:
        """Return the number of the launch that this object writes for; 0 if it only reads."""
        return self.journal.launch

    def __repr__(self) -> str:
        return f"Run({self.url!r})"

    def __str__(self) -> str:
        """Return what a terminal shows of the run: its checkpoints and launches. In contrast, `repr` sends no requests."""
        return display.text_of(self) or repr(self)

    def _repr_html_(self) -> str | None:
        """Return the HTML that Jupyter shows for a cell that ends with a run. In contrast, `repr` sends no requests."""
        return display.html_of(self)

    # -- reading ------------------------------------------------------------------------------------------------------

    def state(self) -> RunState:
        """Return the run's current state: four requests."""
        return self.journal.refresh()

    def events(self) -> Iterator[Entry]:
        """Yield all entries of the journal, oldest first."""
        return self.journal.entries()

    def checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints that exist, oldest commit first."""
        return [self.checkpoint(ref) for ref in self.state().checkpoints]

    def checkpoint(self, ref: CheckpointRef) -> Checkpoint:
        """Return the full commit for a reference from the state: one request."""
        return self._from_entry(self.journal.read(ref.entry), ref)

    def latest(self, training: int | None = None) -> Checkpoint | None:
        """Return the newest committed checkpoint (of training number ``training``), or None."""
        ref = self.state().latest(training)
        return None if ref is None else self.checkpoint(ref)

    def weights(self) -> list[Checkpoint]:
        """Return the checkpoints of which only the weights are kept, oldest first."""
        return [self.checkpoint(ref) for ref in self.state().weights]

    def find(self, step: int | None = None) -> Checkpoint:
        """Return the newest checkpoint, or the newest commit of ``step``, or its weights alone. Raises NoCheckpoint."""
        state = self.state()
        refs = [ref for ref in state.checkpoints if step is None or ref.step == step]
        refs = refs or [ref for ref in state.weights if ref.step == step]
        if not refs:
            what = "no committed checkpoint" if step is None else f"no checkpoint of step {step}"
            raise NoCheckpoint(f"{self.url} has {what}", hint=f"hf-spot checkpoints ls {self.url}")
        return self.checkpoint(refs[-1])

    def pull(self, into: str | PathLike[str], step: int | None = None, *, progress: Progress | None = None) -> Path:
        """Download and verify a checkpoint into the folder ``into/checkpoint-<step>``, and return that path.

        A folder that already has exactly these files is left as it is.

        Raises:
            NoCheckpoint: there is none (of this step).
            CorruptCheckpoint: it differs from what was committed, or a folder with this name and other files exists.
        """
        return self.fetch(self.find(step), Path(into), progress=progress)

    def fetch(
        self,
        checkpoint: Checkpoint,
        into: Path,
        *,
        readers: Readers | None = None,
        progress: Progress | None = None,
        have: Path | None = None,
    ) -> Path:
        """Download a given checkpoint as `pull` does; with ``readers``, only what these ranks need to resume; with ``have``,
        only what this other folder does not contain."""
        folder = into / checkpoint.name
        if folder.exists():
            problems = self.compare(checkpoint, folder, readers=readers)
            if not problems:
                self.remember(checkpoint, readers=readers)
                return folder
            raise CorruptCheckpoint(
                f"{folder} already exists and is not this checkpoint: {problems[0]}",
                hint=f"mv {folder} {folder.with_name('my-' + folder.name)}",
            )
        into.mkdir(parents=True, exist_ok=True)
        if checkpoint.reason not in ("push", WEIGHTS_ONLY):
            check_resumable(checkpoint, self.url)
        wanted = self.selection(checkpoint, readers)
        transfer.download(
            self.store,
            checkpoint.ref.prefix,
            wanted.whole,
            folder,
            workers=self._workers,
            progress=progress,
            have=have,
            parts=wanted.parts,
        )
        self.remember(checkpoint, readers=readers)
        return folder

    def selection(self, checkpoint: Checkpoint, readers: Readers | None) -> Selection:
        """Return what of a checkpoint a machine needs.

        Args:
            checkpoint: to resume from.
            readers: the machine's ranks; None for all of the checkpoint.

        Raises:
            CorruptCheckpoint: the index of its shards is missing or damaged.
            StoreError: the store did not answer.
        """
        key = (checkpoint.ref.entry, readers)
        if key not in self._selections:
            self._selections[key] = select(
                checkpoint.files,
                checkpoint.details.get("world_size", 1),
                readers,
                lambda file: self.read(checkpoint, file.path),
                in_parts=ranges_of(self.store) is not None,
            )
        return self._selections[key]

    def remember(self, checkpoint: Checkpoint, *, readers: Readers | None = None) -> None:
        """Remember the files of the checkpoint that this machine resumes from; ``readers`` as in `fetch`. If a later checkpoint
        has them too, they are copied within the store instead of being uploaded again."""
        self._unchanged.note(checkpoint.ref.prefix, self.selection(checkpoint, readers).whole)

    def read(self, checkpoint: Checkpoint, path: str) -> bytes:
        """Return the contents of a small file of a checkpoint, verified.

        Raises:
            CorruptCheckpoint: it is missing, or differs from what was committed.
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

    def compare(self, checkpoint: Checkpoint, folder: Path, *, readers: Readers | None = None) -> list[str]:
        """Return descriptions of how a local folder differs from a commit; an empty list if its files are the same to the byte.
        With ``readers``, only what these ranks need is compared."""
        wanted, there = self.selection(checkpoint, readers), PartFiles(folder)
        problems = [problem for file in wanted.whole if (problem := difference(folder, file))]
        for one in wanted.parts:
            if (problem := difference(folder, one.file)) and (problem := there.difference(one)):
                problems.append(problem)
        return problems

    def verify(self, step: int | None = None, *, progress: Progress | None = None) -> dict[int, list[str]]:
        """Read back every file of all checkpoints, or of one step's. Return the problems by entry number; an empty list means
        that the checkpoint is complete.

        A checkpoint that is pruned meanwhile is left out.
        """
        chosen = [self.find(step)] if step is not None else [*self.checkpoints(), *self.weights()]
        found = {}
        for checkpoint in chosen:
            problems = self._problems(checkpoint, progress)
            if problems is not None:
                found[checkpoint.ref.entry] = problems
        return found

    def _problems(self, checkpoint: Checkpoint, progress: Progress | None) -> list[str] | None:
        """Return the problems of a checkpoint's files; None if it was pruned meanwhile."""
        lacking = missing_for_resume((f.path for f in checkpoint.files), checkpoint.details.get("world_size", 1))
        problems = [f"{name} is missing" for name in lacking if checkpoint.reason not in ("push", WEIGHTS_ONLY)]
        damaged: list[str] = []
        with tempfile.TemporaryDirectory(prefix="hf_spot-verify-") as scratch:
            for file in checkpoint.files:
                folder = Path(scratch) / "file"
                waits_s = () if damaged else WAITS_S  # once one is damaged, waiting for the others changes nothing
                try:
                    transfer.download(self.store, checkpoint.ref.prefix, [file], folder, progress=progress, waits_s=waits_s)
                    shutil.rmtree(folder)
                except CorruptCheckpoint as error:
                    if not damaged and self._is_pruned(checkpoint):
                        return None
                    damaged.append(str(error))
        return None if damaged and self._is_pruned(checkpoint) else problems + damaged

    def _is_pruned(self, checkpoint: Checkpoint) -> bool:
        state = self.journal.refresh()
        return all(ref.entry != checkpoint.ref.entry for ref in (*state.checkpoints, *state.weights))

    # -- writing ------------------------------------------------------------------------------------------------------

    def check_store(self) -> None:
        """Check that the store can be used, so that a claim with ``after`` need not. Raises StoreError."""
        probe(self.store, allow_unfenced=self._allow_unfenced_store)
        self._is_probed = True

    def claim(self, data: dict[str, Any] | None = None, *, after: int | None = None) -> int:
        """Check that the store can be used, then claim the run for a new launch, and return its number.

        Args:
            data: JSON values for the entry.
            after: claim only if this is still the newest launch. The store is then checked only the first time: machines that
                come and go change the launch often.

        Raises:
            Fenced: another launch than ``after`` is the newest.
            StoreError: the store can't be used; the message names the missing permission or the fix.
        """
        if after is None or not self._is_probed:
            self.check_store()
        return self.journal.claim(data or {}, after=after).launch

    def adopt(self, launch: int) -> None:
        """Write under a claim made by another process of the same launch. Raises Fenced if it is not the newest."""
        self.journal.adopt(launch)

    def join(self) -> None:
        """Write beside the newest launch without fencing it. Claims the run if it has never been claimed."""
        probe(self.store, allow_unfenced=self._allow_unfenced_store)
        launch = self.state().launch
        if launch:
            self.adopt(launch)
        else:
            self.claim({"by": BY_HAND})

    def describe_training(self, number: int | None, description: Mapping[str, Any]) -> TrainingRef:
        """Record what a training trains, and return the record.

        Args:
            number: of the training; None for a new one, which gets the next number that is free.
            description: named values, as JSON.

        Raises:
            Fenced: a newer launch has claimed the run.
        """

        def data(state: RunState) -> dict[str, Any]:
            return {TRAINING_KEY: number or state.next_training, "trains": dict(description)}

        entry = self.journal.append("training", data)
        return next(one for one in entry.state.trainings if one.entry == entry.number)

    def description(self, entry: int) -> dict[str, Any]:
        """Return what the training that an entry describes trains: one request."""
        found = self.journal.read(entry).data.get("trains")
        return found if isinstance(found, dict) else {}

    def tracker_id(self, training: int) -> str:
        """Return the id that a training's runs in trackers have in all launches: one request."""
        return tracker_id(self.journal.run_id, training)

    def script_run_id(self, name: str, number: int) -> str:
        """Return the id that a tracker run which a script begins itself has in all launches: one request.

        Args:
            name: as for `hf_spot.policy.trackers.script_run_id`.
            number: as for `hf_spot.policy.trackers.script_run_id`.
        """
        return script_run_id(self.journal.run_id, name, number)

    def record(self, kind: str, data: dict[str, Any]) -> Entry:
        """Append an entry that is not a commit, and return it. Raises Fenced, StoreUnavailable."""
        return self.journal.append(kind, data)

    def upload(self, folder: Path, request: CommitRequest, *, progress: Progress | None = None) -> list[FileEntry]:
        """Upload a checkpoint's files and return their manifest. The checkpoint does not exist until `commit`.

        Raises:
            IncompleteCheckpoint: a file that a resume needs is missing.
        """
        if request.parts == 1:
            check_whole(request, files_in(folder), folder)
        prefix = request.prefix(self.launch)
        how: dict[str, Any] = {"unchanged": self._unchanged, "workers": self._workers, "progress": progress}
        files = transfer.upload(self.store, folder, prefix, **how, sent=self.sent)
        self._unchanged.note(prefix, files)
        return files

    def commit(self, request: CommitRequest, files: list[FileEntry], *, id: str | None = None) -> Entry:
        """Make an uploaded checkpoint exist, and return its entry. Pass the same ``id`` when repeating after a lost answer.

        Raises:
            Fenced: a newer launch has claimed the run.
            IncompleteCheckpoint: a file that a resume needs is missing.
            CorruptCheckpoint: two machines have uploaded files with the same name.
        """
        if request.parts > 1:
            check_names(files)
            check_whole(request, [file.path for file in files], request.prefix(self.launch))
        data = {**request.to_data(self.launch), "files": [file.told() for file in files]}
        return self.journal.append("commit", data, id=id)

    def push(self, folder: str | PathLike[str], step: int | None = None, *, progress: Progress | None = None) -> Checkpoint:
        """Upload and commit a local folder, beside a launch that may be running: no launch is fenced.

        Existing files are not changed: the upload gets a place of its own, which belongs to no checkpoint until the commit.

        Args:
            folder: such as ``out/checkpoint-500``.
            step: needed if the folder's name doesn't end with it.

        Raises:
            ConfigError: the folder does not exist or is not a checkpoint, the step is missing, or the run is finished.
        """
        path = Path(folder)
        if not path.is_dir():
            raise ConfigError(f"{path} is not a folder", hint="hf-spot checkpoints push RUN out/checkpoint-500")
        match = re.fullmatch(r"checkpoint-(\d+)", path.resolve().name)
        if step is None and match is None:
            raise ConfigError(f"the name of {path} has no step", hint="add --step N")
        number = int(match[1]) if step is None and match else step or 0
        if number < 0:
            raise ConfigError(f"--step {number} is not a step", hint="add --step N")
        names = files_in(path)
        if not has_weights(names):
            raise ConfigError(
                f"{path} is not a checkpoint: it has no weights, such as model.safetensors",
                hint="hf-spot checkpoints push RUN out/checkpoint-500, a folder that Trainer wrote",
            )
        world_size = max(1, sum(bool(re.fullmatch(r"rng_state_\d+\.pth", name)) for name in names))
        if parted := parts_in(path):
            raise ConfigError(
                f"{path} has only parts of {parted[0]}: this machine fetched no more than its ranks read",
                hint="hf-spot checkpoints pull RUN fetches all of it; or hf-spot runs fork RUN@STEP NEW-RUN",
            )
        if missing := missing_for_resume(names, world_size):
            log.warning("%s lacks %s: it can be pulled, but no training can resume from it", path, ", ".join(missing))
        self.join()
        if self.journal.state.ended == "finished":
            raise ConfigError(
                f"{self.url} is finished: no training would resume from a checkpoint pushed there",
                hint=f"hf-spot checkpoints push ANOTHER-RUN {path}, and launch that",
            )
        request = self._place_for(CommitRequest(step=number, reason="push", world_size=world_size))
        entry = self.commit(request, self.upload(path, request, progress=progress))
        self.store.delete([_mark(request.prefix(self.launch))])
        return self._from_entry(entry, next(ref for ref in entry.state.checkpoints if ref.entry == entry.number))

    def _place_for(self, request: CommitRequest) -> CommitRequest:
        """Return the request with a place of its own in the store: an empty one, reserved before anything is written."""
        prefix = request.prefix(self.launch)
        if not any(True for _ in self.store.list(f"{prefix}/")) and self.store.create(_mark(prefix), uuid.uuid4().hex.encode()):
            # Another push may have been committed there, and pruned, since the journal was read.
            if fences(self.store) and all(ref.prefix != prefix for ref in self.journal.refresh().checkpoints):
                return request
            self.store.delete([_mark(prefix)])
        return replace(request, apart=uuid.uuid4().hex[:12])

    def prune(
        self, save_total_limit: int | None, *, keep_every: int | None = None, keep_weights: bool = False
    ) -> list[CheckpointRef]:
        """Remove old checkpoints from the run, then delete their files. Return the removed ones.

        Args:
            save_total_limit: how many of the newest to keep, besides the best; None or 0 keeps all.
            keep_every: keep for good the first checkpoint at or after each multiple of so many steps.
            keep_weights: of those keep only the files that ``from_pretrained`` reads, once they are not among the newest.
        """
        state = self.journal.state
        gone = to_prune(state.checkpoints, save_total_limit)
        lasting = {ref.entry for ref in milestones(state.checkpoints, keep_every, state.weights)} if keep_every else set()
        kept_whole = {ref.entry for ref in gone if ref.entry in lasting and not (keep_weights and self._keep_weights(ref))}
        gone = [ref for ref in gone if ref.entry not in kept_whole]
        if gone:
            # The entry comes first, so that no reader sees a checkpoint whose files are being deleted.
            self.record("prune", {"entries": [ref.entry for ref in gone], "steps": [ref.step for ref in gone]})
            kept = set(self.journal.state.prefixes)
            transfer.delete(self.store, [ref.prefix for ref in gone if ref.prefix not in kept])
        return gone

    def _keep_weights(self, ref: CheckpointRef) -> bool:
        """Commit the weights of a checkpoint, copied within the store; return False if it has none that can be loaded alone."""
        checkpoint = self.checkpoint(ref)
        chosen = set(files_of_model(file.path for file in checkpoint.files))
        if not any(map(is_weights, chosen)):
            log.warning(
                "%s has no weights that from_pretrained reads, such as model.safetensors: it is kept whole", checkpoint.name
            )
            return False
        files = [file for file in checkpoint.files if file.path in chosen]
        prefix = f"{ref.prefix}-weights"
        for file in files:
            self.store.copy(f"{ref.prefix}/{file.path}", f"{prefix}/{file.path}")
        details = {name: checkpoint.details[name] for name in ("step", TRAINING_KEY, "complete", "world_size")}
        data = {**details, "reason": WEIGHTS_ONLY, "prefix": prefix, "files": [file.told() for file in files]}
        self.record("weights", data)
        return True

    def collect_garbage(self) -> int:
        """Delete files that older launches left without a commit, and abort their uploads. Return how many were removed,
        without what every launch leaves (`TOLD_STEPS`).

        Only files of older launches are deleted: their writers are fenced, so the files can't be committed any more.
        """

        def stale(key: str) -> bool:
            match = _LAUNCH_FOLDER.match(key)
            return match is not None and int(match[1]) < self.launch

        kept = tuple(f"{prefix}/" for prefix in self.journal.state.prefixes)
        orphans = [info.key for info in self.store.list("e") if stale(info.key) and not info.key.startswith(kept)]
        orphans += leftovers(self.store)
        self.store.delete(orphans)
        left_by_all = sum(TOLD_STEPS.match(key) is not None for key in orphans)
        return len(orphans) - left_by_all + self.store.abort(stale)

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
            raise CorruptCheckpoint(f"entry {entry.number} of {self.url} is not a commit ({error})") from error
