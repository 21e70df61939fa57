"""The runs below a URL, and what stands at a URL that is not a run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import PurePosixPath

from hf_spot.errors import SpotError
from hf_spot.run.journal import RunState
from hf_spot.run.run import Run
from hf_spot.storage.open import open_store
from hf_spot.storage.store import ObjectInfo
from hf_spot.storage.threads import Workers
from hf_spot.suggestions import nearest

_ENTRY = re.compile(r"^((?:.*/)?)journal/(\d{8})\.json$")
_READ_AT_ONCE = 16  # runs
_KEYS_TO_LOOK_AT = 5000  # to say what stands at a URL
_FEW = 6


@dataclass(frozen=True)
class Found:
    """A run that a listing shows.

    Args:
        name: its place below the URL that was listed; empty for that URL itself.
        entries: number of its newest entry.
        size_bytes: of everything in it.
    """

    name: str
    entries: int
    size_bytes: int


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


def find_runs(url: str) -> list[Summary]:
    """Return every run at and below a URL: one request for each thousand objects there, and two for each run.

    Raises:
        SpotError: the store can't be read.
    """
    found = runs_in(open_store(url).list())
    with Workers(_READ_AT_ONCE, "hf_spot-runs") as pool:
        return list(pool.map(lambda one: _summary(url, one), found))


def url_of(url: str, name: str) -> str:
    """Return the URL of a run below a URL."""
    return f"{url.rstrip('/')}/{name}" if name else url


def _summary(url: str, one: Found) -> Summary:
    run = Run(url_of(url, one.name))
    try:
        entry = run.journal.read(one.entries)  # its number is known from the listing
        newest = entry.state.latest()
        commit = None if newest is None else run.checkpoint(newest)
    except SpotError as error:
        return Summary(one.name, run.url, None, 0, None, None, None, one.size_bytes, str(error.args[0]))
    steps = commit.details.get("max_steps") if commit else None
    return Summary(
        name=one.name,
        url=run.url,
        state=entry.state,
        step=commit.step if commit else 0,
        max_steps=steps if isinstance(steps, int) else None,
        committed=commit.time if commit else None,
        heard=entry.time,
        size_bytes=one.size_bytes,
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
