"""The journal of a run: numbered entries, each made by one create-if-absent put and never rewritten.

Protocol (the tests attack the invariants in capitals):

* Entry *n* is the object ``journal/{n:08d}.json``. Its writer has read entry *n-1* first: NUMBERS HAVE NO GAPS, and
  every entry carries the state of the run after it, so reading the newest one is enough.
* ``claim`` begins the next launch. A writer belongs to one launch and may append only while that is the newest:
  AN ENTRY OF AN OLDER LAUNCH NEVER FOLLOWS A NEWER CLAIM. A writer of an older launch finds its number taken, reads the
  entry, and raises `Fenced`.
* An answer can be lost. Every draft has an ``id``. After an error the writer reads that number back; if it finds its own
  id, the write succeeded: ONE DRAFT BECOMES AT MOST ONE ENTRY.
* Entries are never deleted: otherwise a stalled writer could recreate a number that all others have passed.

``tip.json`` holds a number near the newest one, so that finding the newest entry costs four requests however long the
journal is: the hint, a listing from there, the last entry listed, and the one after it, because listings lag on some stores.
The number is only a hint: it decides where the listing starts, and nothing else. The object is also written again before the
first entry after the end of a launch: WHILE IT IS NOT WRITTEN, A RUN THAT HAS ENDED STAYS AS IT IS (`hf_spot.run.below`).
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any, TypeVar

from hf_spot.errors import ConfigError, CorruptCheckpoint, Fenced, ObjectNotFound, StoreUnavailable, Untrusted
from hf_spot.policy.cadence import ADDED
from hf_spot.run.patience import again_if_missing
from hf_spot.run.seal import seal, unseal
from hf_spot.storage.store import ObjectStore

FORMAT = 1
KINDS = (
    "claim",
    "training",
    "resumed",
    "redone",
    "commit",
    "notice",
    "trained",
    "preempted",
    "finished",
    "failed",
    "prune",
    "machine",
    "hang",
    "rollback",
    "spike",
    "lost",
    "weights",
)
ENDINGS = ("preempted", "finished", "failed")
BY_HAND = "hf-spot checkpoints"  # the author of a claim that no training follows
TRAINING_KEY = "stage"  # the number of a training, in an entry's data
_PREFIX = "journal/"
_HINT_KEY = "tip.json"
_BATCH = 16  # entries read in a row
_QUICK_S = 0.0005  # entries that take no longer, as on a local disk, are read faster without threads
_LAST_NUMBER = 10**8 - 1  # of an entry: its name has eight digits
_NAME = re.compile(r"^journal/(\d{8})\.json$")


@dataclass(frozen=True)
class CheckpointRef:
    """The short record of a commit that every later entry carries.

    Args:
        entry: number of the commit's entry.
        launch: the launch that wrote it.
        training: number of the training that it belongs to, from 1.
        step: optimizer steps done.
        size_bytes: of all its files.
        prefix: where its files are, relative to the run.
        best: whether Trainer considers it the best checkpoint of its training.
        complete: whether its training had reached its end.
        added: whether Trainer has not asked for it: see `hf_spot.policy.retention`.
    """

    entry: int
    launch: int
    training: int
    step: int
    size_bytes: int
    prefix: str
    best: bool = False
    complete: bool = False
    added: bool = False


@dataclass(frozen=True)
class TrainingRef:
    """The short record of a training that every later entry carries.

    Args:
        training: its number, from 1, in the order in which the run's trainings have begun.
        entry: number of the newest entry that describes what it trains.
        launch: the newest launch that worked on it.
    """

    training: int
    entry: int
    launch: int


@dataclass(frozen=True)
class RunState:
    """The state of a run after entry ``number``. Number 0 is a run that has never been claimed.

    Args:
        number: of the newest entry.
        launch: of the newest claim.
        checkpoints: those that exist, oldest first: in the order of their commits, but those of one launch by their steps.
        ended: how the newest launch ended (one of `ENDINGS`); None while it runs, or if it died without an entry.
        trainings: those that have described themselves, by their numbers. Earlier versions of hf_spot described none.
        weights: of checkpoints that are gone, those whose weights are kept, oldest first. No training resumes from them.
    """

    number: int = 0
    launch: int = 0
    checkpoints: tuple[CheckpointRef, ...] = ()
    ended: str | None = None
    trainings: tuple[TrainingRef, ...] = ()
    weights: tuple[CheckpointRef, ...] = ()

    @property
    def prefixes(self) -> list[str]:
        """Return the keys under which there are files that the run keeps, without a trailing slash."""
        return [ref.prefix for ref in (*self.checkpoints, *self.weights)]

    def latest(self, training: int | None = None) -> CheckpointRef | None:
        """Return the newest checkpoint (of training number ``training``), or None."""
        found = [ref for ref in self.checkpoints if training is None or ref.training == training]
        return found[-1] if found else None

    @property
    def next_training(self) -> int:
        """Return the number that the next new training gets."""
        known = [one.training for one in self.trainings] + [ref.training for ref in self.checkpoints]
        return max(known, default=0) + 1


@dataclass(frozen=True)
class Entry:
    """One line of the journal. ``time`` is the writer's clock; order is by ``number`` alone."""

    number: int
    kind: str
    launch: int
    id: str
    time: datetime
    data: dict[str, Any]
    state: RunState = field(repr=False)


def fold(state: RunState, number: int, kind: str, launch: int, data: dict[str, Any]) -> RunState:
    """Return the state after an entry, from the state before it. Pure."""
    after = replace(state, number=number, launch=launch)
    if kind == "claim":
        return replace(after, ended=None)
    if kind in ENDINGS:
        return replace(after, ended=kind)
    if kind == "training":
        new_one = TrainingRef(training=data[TRAINING_KEY], entry=number, launch=launch)
        others = (one for one in state.trainings if one.training != new_one.training)
        return replace(after, trainings=tuple(sorted((*others, new_one), key=lambda one: one.training)))
    if kind == "resumed":
        resumed = data.get(TRAINING_KEY)
        met = (replace(one, launch=launch) if one.training == resumed else one for one in state.trainings)
        return replace(after, trainings=tuple(met))
    if kind == "prune":
        gone = set(data["entries"])
        return replace(after, checkpoints=tuple(ref for ref in state.checkpoints if ref.entry not in gone))
    if kind in ("commit", "weights"):
        new = CheckpointRef(
            entry=number,
            launch=launch,
            training=data[TRAINING_KEY],
            step=data["step"],
            size_bytes=sum(file["size"] for file in data["files"]),
            prefix=data["prefix"],
            complete=data["complete"],
            added=data.get("reason") == ADDED,
        )
        if kind == "weights":
            return replace(after, weights=(*state.weights, new))
        refs = [*state.checkpoints]
        place = len(refs)
        # Before a deadline the newest checkpoint is uploaded first: an older one of the same launch that is committed after it
        # must still count as older.
        while place and data.get("reason") != "push" and _follows(refs[place - 1], new):
            place -= 1
        refs.insert(place, new)
        # The best one can change with every evaluation, and a step can be committed again after falling back to an older one.
        best = max(
            (ref.entry for ref in refs if (ref.training, ref.step) == (new.training, data.get("best_step"))), default=None
        )
        marked = (replace(ref, best=ref.entry == best) if ref.training == new.training else ref for ref in refs)
        return replace(after, checkpoints=tuple(marked))
    return after


def _follows(one: CheckpointRef, other: CheckpointRef) -> bool:
    """Return whether ``one`` has more steps than ``other``, both of the same training of the same launch."""
    beside = one.prefix.rpartition("/")[0] == other.prefix.rpartition("/")[0]
    return one.launch == other.launch and beside and one.step > other.step


# The names that differ between format 1 and the code.
_LAUNCH_KEY = "epoch"
_KEYS = {"launch": _LAUNCH_KEY, "training": TRAINING_KEY}
_NAMES = {key: name for name, key in _KEYS.items()}


def _to_disk(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a `RunState` or one of its records, in their order, under the keys of format 1."""
    for name in ("checkpoints", "trainings", "weights"):
        if name in fields:
            fields[name] = [_to_disk(ref) for ref in fields[name]]
    for name, usual in (("weights", []), ("added", False)):  # earlier versions of hf_spot don't know them
        if fields.get(name) == usual:
            del fields[name]
    return {_KEYS.get(name, name): value for name, value in fields.items()}


def _from_disk(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a dataclass's fields from the keys of format 1. Raises TypeError for a key that format 1 does not have."""
    if unknown := _KEYS.keys() & fields.keys():
        raise TypeError(f"format 1 has no key {min(unknown)!r}")
    return {_NAMES.get(name, name): value for name, value in fields.items()}


def encode(entry: Entry, key: bytes | None = None) -> bytes:
    """Return the bytes to write for an entry, sealed (see `hf_spot.run.seal`)."""
    written = {
        "format": FORMAT,
        "number": entry.number,
        "kind": entry.kind,
        _LAUNCH_KEY: entry.launch,
        "id": entry.id,
        "time": entry.time.astimezone(timezone.utc).isoformat(),
        "data": entry.data,
        "state": _to_disk(asdict(entry.state)),
    }
    return seal(written, key)


def decode(data: bytes, key: bytes | None = None) -> Entry:
    """Return the entry that `encode` wrote.

    Raises:
        ConfigError: the entry was written by a newer hf_spot.
        CorruptCheckpoint: these bytes are not a journal entry.
        Untrusted: they were not signed with this key.
    """
    written = unseal(data, key)
    try:
        if written["format"] > FORMAT:
            raise ConfigError(
                f"this run was written by a newer hf_spot (journal format {written['format']}, this one reads {FORMAT})",
                hint="upgrade hf_spot: install the version that wrote this run, from where this one came",
            )
        state = written["state"]
        refs = tuple(_ref(**ref) for ref in state.pop("checkpoints"))
        trainings = tuple(_typed(TrainingRef(**_from_disk(one))) for one in state.pop("trainings", ()))
        weights = tuple(_ref(**ref) for ref in state.pop("weights", ()))
        state = _typed(RunState(checkpoints=refs, trainings=trainings, weights=weights, **_from_disk(state)))
        written_at = datetime.fromisoformat(written["time"])
        if written_at.tzinfo is None:
            raise TypeError(f"time {written['time']!r} has no time zone")
        number, kind, launch, id, told = (written[name] for name in ("number", "kind", _LAUNCH_KEY, "id", "data"))
        _check_counts(told)
        return _typed(Entry(number, kind, launch, id, written_at, told, state))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(f"not a journal entry: {data[:80]!r} ({error})") from error


T = TypeVar("T", CheckpointRef, TrainingRef, RunState, Entry)
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "str": (str,),
    "bool": (bool,),
    "str | None": (str, type(None)),
    "datetime": (datetime,),
    "dict[str, Any]": (dict,),
    "tuple[CheckpointRef, ...]": (tuple,),
    "tuple[TrainingRef, ...]": (tuple,),
    "RunState": (RunState,),
}
_FIELDS = {
    one: [(each.name, _TYPES[str(each.type)]) for each in fields(one)] for one in (CheckpointRef, TrainingRef, RunState, Entry)
}


def _typed(found: T) -> T:
    """Return ``found`` if every field has its declared type. Raises TypeError, or ValueError for a number below zero."""
    for name, types in _FIELDS[type(found)]:
        value = getattr(found, name)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise TypeError(f"{name} is {value!r}")
        if isinstance(value, int) and value < 0:
            raise ValueError(f"{name} is {value}")
    return found


def _check_counts(data: dict[str, Any]) -> None:
    """Check the fields that are used as counts. Raises TypeError for one that is not an integer from 0 on."""
    for name in ("step", "committed_step", "best_step", TRAINING_KEY):
        value = data.get(name)
        if value is not None and (type(value) is not int or value < 0):
            raise TypeError(f"{name} is {value!r}")


@lru_cache(maxsize=1024, typed=True)  # the entries of a journal repeat each other's checkpoints
def _ref(**fields: Any) -> CheckpointRef:
    return _typed(CheckpointRef(**_from_disk(fields)))


class Journal:
    """Reads and appends entries, and keeps the newest state it has seen. Safe to use from several threads.

    Args:
        store: the run's store.
        key: signs entries; entries that are not signed with it are refused.
        now: the clock that stamps entries.
        new_id: makes the ids of drafts.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        key: bytes | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self._store = store
        self.key = key
        self._now = now
        self._new_id = new_id
        self._lock = threading.RLock()
        self._state = RunState()
        self._doubtful: dict[str, int] = {}  # ids of drafts that may have been written: the first number that each may have
        self.launch = 0  # the launch that this writer belongs to; 0 when it only reads
        self.claimed_at: datetime | None = None  # set when this writer made the claim itself
        self._run_id: str | None = None

    @property
    def state(self) -> RunState:
        """Return the state as last seen. `refresh` asks the store."""
        return self._state

    @property
    def run_id(self) -> str:
        """Return what no other run has, not even a later one under the same URL: the id of the first entry.

        It takes a request, once. Raises as `read`.
        """
        if self._run_id is None:
            self._run_id = self.read(1).id
        return self._run_id

    def refresh(self) -> RunState:
        """Find the newest entry and return the state after it: at most four requests while the hint is fresh."""
        with self._lock:
            number = self._last_number(self._state.number or self._read_hint())
            if number > self._state.number:
                self._state = self.read(number).state
            while (entry := self._read_if_there(self._state.number + 1)) is not None:  # a listing may lag behind
                self._state = entry.state
            return self._state

    def read(self, number: int) -> Entry:
        """Return an entry that must exist. Raises ObjectNotFound, CorruptCheckpoint, Untrusted."""
        return again_if_missing(lambda: self._read_twice(number))

    def _read_twice(self, number: int) -> Entry:
        try:
            return self._read(number)
        except (CorruptCheckpoint, Untrusted):  # if it was only damaged on the way, a second read succeeds
            return self._read(number)

    def _read(self, number: int) -> Entry:
        entry = decode(self._store.get(_name(number)), self.key)
        if not entry.number == entry.state.number == number:  # the signature covers the entry's bytes, not its key in the store
            raise CorruptCheckpoint(f"entry {entry.number} of {self._store.url} is stored under the number {number}")
        return entry

    def _read_if_there(self, number: int) -> Entry | None:
        try:
            return self._read_twice(number)
        except ObjectNotFound:
            return None

    def entries(self) -> Iterator[Entry]:
        """Yield all entries, oldest first."""
        last = self.refresh().number
        quickest_s = math.inf
        for number in range(1, min(_BATCH, last) + 1):
            began = time.perf_counter()
            entry = self.read(number)
            quickest_s = min(quickest_s, time.perf_counter() - began)
            yield entry
        if quickest_s < _QUICK_S:
            yield from map(self.read, range(_BATCH + 1, last + 1))
            return
        batches = (range(first, min(first + _BATCH, last + 1)) for first in range(_BATCH + 1, last + 1, _BATCH))
        with ThreadPoolExecutor(max_workers=16, thread_name_prefix="hf_spot-journal") as pool:
            for entries in pool.map(lambda batch: [self.read(number) for number in batch], batches):
                yield from entries

    def claim(self, data: dict[str, Any], *, after: int | None = None) -> Entry:
        """Begin a new launch, which fences every earlier writer.

        Args:
            data: JSON values.
            after: claim only if this is still the newest launch; None claims in any case.

        Raises:
            Fenced: another launch has begun since.
        """

        def next_launch(state: RunState) -> int:
            if after is not None and state.launch != after:
                raise Fenced(f"launch {state.launch} has taken over {self._store.url}; this machine knew of launch {after}")
            return state.launch + 1

        with self._lock:
            self.refresh()
            entry = self._append("claim", data, self._new_id(), next_launch)
            self.launch, self.claimed_at = entry.launch, entry.time
            return entry

    def adopt(self, launch: int) -> None:
        """Write under a claim made by another process of the same launch. Raises Fenced if it is not the newest."""
        with self._lock:
            self.launch = launch
            self._holds(self.refresh())

    def append(self, kind: str, data: dict[str, Any] | Callable[[RunState], dict[str, Any]], *, id: str | None = None) -> Entry:
        """Add an entry under this writer's launch, and return it.

        Args:
            kind: one of `KINDS`.
            data: JSON values, or a function that returns them for the state before the entry.
            id: pass the same id again when repeating a call whose answer was lost.

        Raises:
            Fenced: a newer launch has claimed the run.
            StoreUnavailable: the store did not answer; the entry may or may not have been written.
        """
        with self._lock:
            return self._append(kind, data, id or self._new_id(), self._holds)

    def _holds(self, state: RunState) -> int:
        if state.launch != self.launch:
            raise Fenced(
                f"launch {state.launch} has taken over {self._store.url}; this one is launch {self.launch} and stops",
                hint=f"hf-spot report {self._store.url}",
            )
        return self.launch

    def _append(
        self,
        kind: str,
        data: dict[str, Any] | Callable[[RunState], dict[str, Any]],
        id: str,
        launch_for: Callable[[RunState], int],
    ) -> Entry:
        if (standing := self._find_doubtful(id)) is not None:
            return standing
        while True:
            launch = launch_for(self._state)
            number = self._state.number + 1
            told = data(self._state) if callable(data) else data
            draft = Entry(number, kind, launch, id, self._now(), told, fold(self._state, number, kind, launch, told))
            if self._state.ended is not None:  # so that whoever remembers the end sees that it may not be the end any more
                self._store.put(_HINT_KEY, _hint(self._state.number))
            try:
                standing = self._create(draft)
            except StoreUnavailable:
                self._doubtful.setdefault(id, number)
                raise
            self._state = standing.state
            if standing.id == id:
                self._doubtful.pop(id, None)
                self._store_hint(number)
                return standing
            self.refresh()

    def _find_doubtful(self, id: str) -> Entry | None:
        """Return the entry of a draft whose answer was lost, or None. Others may have appended entries after it since."""
        for number in range(self._doubtful.get(id, self._state.number + 1), self._state.number + 1):
            if (entry := self.read(number)).id == id:
                del self._doubtful[id]
                return entry
        return None

    def _create(self, draft: Entry) -> Entry:
        """Create the draft; return the entry that has its number now: the draft, or the entry of a faster writer."""
        try:
            if self._store.create(_name(draft.number), encode(draft, self.key)):
                return draft
        except StoreUnavailable as trouble:
            try:
                return self._read_twice(draft.number)
            except ObjectNotFound:
                raise trouble from None
        return self.read(draft.number)

    def _last_number(self, near: int) -> int:
        last, first_seen = 0, 0
        for info in self._store.list(_PREFIX, start_after=_name(near - 1) if near > 1 else ""):
            match = _NAME.match(info.key)
            if match:
                last = int(match[1])
                first_seen = first_seen or last
        # A hint that points past the end (a bucket rolled back, a copied run) must not hide the journal.
        return self._last_number(0) if near > 1 and first_seen != near else last

    def _read_hint(self) -> int:
        try:
            number = json.loads(self._store.get(_HINT_KEY))["entry"]
            return number if isinstance(number, int) and 0 < number <= _LAST_NUMBER else 0
        except (ObjectNotFound, ValueError, KeyError, TypeError, RecursionError):
            return 0

    def _store_hint(self, number: int) -> None:
        try:
            self._store.put(_HINT_KEY, _hint(number))
        except StoreUnavailable:
            return  # the entry is written; the next one writes a newer hint


def _hint(number: int) -> bytes:
    return json.dumps({"entry": number}).encode()


def _name(number: int) -> str:
    return f"{_PREFIX}{number:08d}.json"
