"""The runs below a URL, and what stands at a URL that is not a run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import islice
from pathlib import PurePosixPath

from hf_spot.errors import SpotError
from hf_spot.run.journal import RunState
from hf_spot.run.remembered import Remembered, recall, remember
from hf_spot.run.run import Run
from hf_spot.run.seal import VARIABLE as KEY_VARIABLE
from hf_spot.storage.open import open_store
from hf_spot.storage.store import Listed, ObjectInfo, groups_of
from hf_spot.storage.threads import Workers
from hf_spot.suggestions import nearest

_ENTRY = re.compile(r"^((?:.*/)?)journal/(\d{8})\.json$")
_JOURNAL_GROUP = re.compile(r"^((?:.*/)?)journal/\d*00$")
_OWN_GROUP = re.compile(r"^((?:.*/)?)(?:e\d*00$|e\d{4,}/|logs/|wheels/|\.hf_spot)")
_TIP = re.compile(r"^((?:.*/)?)tip\.json$")
_ZEROS = "00"
_LOOKS = 60  # into groups
_FEW_NEW = 20  # runs, which are read one by one
_SETTLED = timedelta(minutes=1)
_READ_AT_ONCE = 16  # runs
_KEYS_TO_LOOK_AT = 5000  # to say what stands at a URL
_FEW = 6


@dataclass(frozen=True)
class Found:
    """A run that a listing shows.

    Args:
        name: its place below the URL that was listed; empty for that URL itself.
        entries: number of its newest entry; None if the listing does not show it.
        size_bytes: of everything in it; None if the listing does not show it.
    """

    name: str
    entries: int | None
    size_bytes: int | None


@dataclass(frozen=True)
class Summary:
    """What a run's newest entries say.

    Args:
        name: as in `Found`.
        url: of the run.
        state: its state; None if it can't be read.
        step: its newest committed step.
        max_steps: of how many, if its newest commit says so.
        committed: when that was committed; None without a checkpoint.
        heard: time of its newest entry.
        size_bytes: of everything in it.
        problem: why it can't be read; empty if it can.
    """

    name: str
    url: str
    state: RunState | None
    step: int
    max_steps: int | None
    committed: datetime | None
    heard: datetime | None
    size_bytes: int
    problem: str = ""

    @property
    def in_words(self) -> str:
        """Return how its newest launch stands."""
        if self.state is None:
            return "can't be read"
        return self.state.ended or "not ended"


def runs_in(listing: Iterable[ObjectInfo]) -> list[Found]:
    """Return the runs in a listing, by their names. Pure."""
    newest: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for info in listing:
        if found := _ENTRY.match(info.key):
            newest[found[1]] = max(int(found[2]), newest.get(found[1], 0))
        folder = info.key
        while folder:
            folder = folder.rstrip("/").rpartition("/")[0]
            folder = f"{folder}/" if folder else ""
            sizes[folder] = sizes.get(folder, 0) + info.size
    return [Found(name.rstrip("/"), number, sizes[name]) for name, number in sorted(newest.items())]


def find_runs(url: str, now: datetime | None = None) -> list[Summary]:
    """Return every run at and below a URL.

    Where the store lists many keys as one, a thousand runs that this machine knows and that have not changed since their end
    take a dozen requests, and each other run a few. Elsewhere, and where most are new, it takes one request for each thousand
    objects, and two for each run.

    Args:
        url: of a run, or of a place above runs.
        now: the time; the clock's if None.

    Raises:
        SpotError: the store can't be read.
    """
    store = open_store(url)
    signed = bool(os.environ.get(KEY_VARIABLE))  # what is remembered has no signature
    groups = None if signed else groups_of(store)
    if groups is None:
        return _read_all(url, runs_in(store.list()))
    known, tips = recall(url), _tips(groups)
    if tips is None:
        return _read_all(url, runs_in(store.list()))
    settled = {name: known[name] for name, tip in tips.items() if name in known and tip and known[name].tip == tip.words}
    if len(tips) - len(settled) > max(_FEW_NEW, len(tips) // 4):
        sizes = runs_in(store.list())
        fresh = _read_all(url, [one for one in sizes if one.name not in settled])
    else:
        fresh = _read_all(url, [Found(name, None, None) for name in tips if name not in settled])
    found = sorted([*(_recalled(url, one) for one in settled.values()), *fresh], key=lambda one: one.name)
    moment = now or datetime.now(timezone.utc)
    worth = [
        _to_remember(one, tip)
        for one in fresh
        if (tip := tips.get(one.name)) is not None and one.state is not None and one.state.ended and tip.is_older_than(moment)
    ]
    if worth or set(settled) != set(known):
        remember(url, [*settled.values(), *worth])
    return found


@dataclass(frozen=True)
class _Tip:
    """A run's ``tip.json`` as a listing shows it."""

    etag: str
    written: datetime

    @property
    def words(self) -> str:
        return f"{self.etag} {self.written.isoformat()}"

    def is_older_than(self, now: datetime) -> bool:
        """Return whether it was written long before: a launch that has just written it may still be about to add its entry."""
        return now - self.written > _SETTLED


def _tips(groups: Callable[[str, str], Iterator[Listed]]) -> dict[str, _Tip | None] | None:
    """Return the names of all runs, with their ``tip.json``: None for a run that has none, or whose store does not tell. Return
    None instead if so many other names have two zeros that listing everything is better.

    The keys of a run's checkpoints and of its journal are shown as one each, whatever their number: all of them have two zeros.
    So may the names of runs, and of what else is there: these are looked into.
    """
    tips: dict[str, _Tip] = {}
    names: set[str] = set()
    to_do = [""]
    for _ in range(_LOOKS):
        others = []
        for one in groups(to_do.pop(), _ZEROS):
            if run := (_JOURNAL_GROUP if one.is_group else _ENTRY).match(one.key):
                names.add(run[1])
            elif one.is_group:
                others.append(one.key)
            elif (run := _TIP.match(one.key)) and one.etag and one.written is not None:
                tips[run[1]] = _Tip(one.etag, one.written)
        to_do += [key for key in others if not ((run := _OWN_GROUP.match(key)) and run[1] in names)]
        if not to_do:
            return {name.rstrip("/"): tips.get(name) for name in names}
    return None


def _read_all(url: str, found: Sequence[Found]) -> list[Summary]:
    with Workers(_READ_AT_ONCE, "hf_spot-runs") as pool:
        return [one for one in pool.map(lambda one: _summary(url, one), found) if one is not None]


def _recalled(url: str, one: Remembered) -> Summary:
    return Summary(
        name=one.name,
        url=Run(url_of(url, one.name)).url,
        state=RunState(number=one.number, launch=one.launch, ended=one.ended),
        step=one.step,
        max_steps=one.max_steps,
        committed=datetime.fromisoformat(one.committed) if one.committed else None,
        heard=datetime.fromisoformat(one.heard),
        size_bytes=one.size_bytes,
    )


def _to_remember(one: Summary, tip: _Tip) -> Remembered:
    assert one.state is not None and one.state.ended is not None and one.heard is not None
    committed = one.committed.isoformat() if one.committed else None
    return Remembered(
        name=one.name,
        tip=tip.words,
        number=one.state.number,
        launch=one.state.launch,
        ended=one.state.ended,
        step=one.step,
        max_steps=one.max_steps,
        committed=committed,
        heard=one.heard.isoformat(),
        size_bytes=one.size_bytes,
    )


def url_of(url: str, name: str) -> str:
    """Return the URL of a run below a URL."""
    return f"{url.rstrip('/')}/{name}" if name else url


def _summary(url: str, one: Found) -> Summary | None:
    """Return what a run's newest entries say; None if it has been deleted since it was listed."""
    run = Run(url_of(url, one.name))
    size_bytes = one.size_bytes or 0
    try:
        if one.size_bytes is None:
            size_bytes = sum(info.size for info in run.store.list())
        number = run.state().number if one.entries is None else one.entries
        if not number:
            return None
        entry = run.journal.read(number)
        newest = entry.state.latest()
        commit = None if newest is None else run.checkpoint(newest)
    except SpotError as error:
        return Summary(one.name, run.url, None, 0, None, None, None, size_bytes, str(error.args[0]))
    steps = commit.details.get("max_steps") if commit else None
    return Summary(
        name=one.name,
        url=run.url,
        state=entry.state,
        step=commit.step if commit else 0,
        max_steps=steps if isinstance(steps, int) else None,
        committed=commit.time if commit else None,
        heard=entry.time,
        size_bytes=size_bytes,
    )


def what_is_there(url: str) -> tuple[str, str]:
    """Return what stands at a URL at which there is no run, in words, and the next command to type.

    Raises:
        SpotError: the store can't be read.
    """
    store = open_store(url)
    keys = list(islice(store.list(), _KEYS_TO_LOOK_AT))
    names = [one.name for one in runs_in(keys) if one.name]
    if names:
        more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
        return f"there is no run, but below it: {', '.join(names[:_FEW])}{more}", f"hf-spot runs ls {url}"
    folders = sorted({key.key.partition("/")[0] for key in keys if re.match(r"(tmp-)?checkpoint-\d+/", key.key)})
    if folders:
        return f"there is no run, but a folder with {', '.join(folders[:_FEW])}", f"hf-spot launch --from {url}/{folders[-1]}"
    above, _, last = store.url.rstrip("/").rpartition("/")  # a relative path has nothing above it
    beside = _beside(above)
    if keys:
        return f"there is no run, but {len(keys)} other objects, such as {keys[0].key}", f"hf-spot runs ls {above or url}"
    meant = nearest(last, beside)
    if meant is not None:
        return "there is nothing", f"did you mean {above}/{meant}?"
    return (
        "there is nothing",
        f"hf-spot runs ls {above}" if beside else f"hf-spot launch --store {url} train.py, which begins a run there",
    )


def _beside(above: str) -> list[str]:
    if not above or above.endswith((":/", "/")):  # the URL was a bucket
        return []
    try:
        listing = list(islice(open_store(above).list(), _KEYS_TO_LOOK_AT))
    except SpotError:  # a role may read the run, and nothing above it; the answer about the run itself stands without it
        return []
    return sorted({PurePosixPath(one.name).parts[0] for one in runs_in(listing) if one.name})
