"""Spot capacity over time: public traces, and a model of them."""

from __future__ import annotations

import csv
import io
import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_spot.errors import ConfigError
from hf_spot.yaml_file import read

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Spells = NDArray[np.float64]  # rows of begin and end, ascending and disjoint

MODEL_SOURCE = "a model of nine zones of AWS in 2023, with bursts and droughts"
YEAR_S = 365 * 86400.0
_BLINK_S = 1e-3  # tolerance for rounding: a spell that ends this soon has ended
_REACHED_S = 600.0  # mean delay with which a drought begins, and ends, in a zone
_WARM_UP_S = 60 * 86400.0  # simulated first: spells in progress at the start of a trace are longer than others


@dataclass(frozen=True)
class Trace:
    """The times at which one zone has capacity; when a spell ends, machines there are taken away. It repeats endlessly.

    Args:
        begins: beginnings of the spells with capacity, in seconds.
        ends: ends of these spells, in seconds.
        length_s: length of the trace.
        source: where it is from.
    """

    begins: tuple[float, ...]
    ends: tuple[float, ...]
    length_s: float
    source: str = field(default="", compare=False)

    def next_up(self, at_s: float) -> tuple[float, float]:
        """Return begin and end of the first spell that ends after ``at_s``; both infinite if there is none."""
        if not self.ends:
            return math.inf, math.inf
        rounds, within_s = divmod(at_s, self.length_s)
        index = bisect_right(self.ends, within_s + _BLINK_S)
        if index == len(self.ends):
            rounds, index = rounds + 1, 0
        shift_s = rounds * self.length_s if rounds else 0.0
        return self.begins[index] + shift_s, self.ends[index] + shift_s

    @property
    def availability(self) -> float:
        """Return the share of the time with capacity."""
        return sum(end - begin for begin, end in zip(self.begins, self.ends, strict=True)) / self.length_s


ALWAYS = Trace((0.0,), (math.inf,), math.inf)


# -- trace files ------------------------------------------------------------------------------------------------------


def load(path: Path, nodes: int = 1) -> tuple[str, Trace]:
    """Read a trace. Return the name of its zone, which is that of the file, and the trace.

    JSON is the format of "Can't Be Late" (https://github.com/skypilot-org/spot-traces), ``{"metadata": {"gap_seconds": g},
    "data": [n, …]}`` with the number of nodes up in each gap; CSV is that of Bamboo (https://github.com/uclasystem/bamboo),
    one ``milliseconds,add|remove,node`` per line.

    Args:
        path: path of the file.
        nodes: number of nodes that a training needs at the same time.

    Raises:
        ConfigError: the file is in neither format, or empty; with the line if there is one.
    """
    text = read(path)
    made = _from_json(text, path, nodes) if text.lstrip()[:1] == "{" else _from_csv(text, path, nodes)
    return path.name.partition(".")[0].partition("_")[0], made


def load_all(paths: Sequence[Path], nodes: int = 1) -> dict[str, Trace]:
    """Return traces by zone; see `load`. Raises ConfigError, also for two traces of one zone."""
    traces: dict[str, Trace] = {}
    for path in paths:
        name, trace = load(path, nodes)
        if name in traces:
            raise ConfigError(f"{traces[name].source} and {path} are both of the zone {name}", hint="rename one of them")
        traces[name] = trace
    return traces


def _from_json(text: str, path: Path, nodes: int) -> Trace:
    example = '{"metadata": {"gap_seconds": 300}, "data": [1, 0, 1]}'
    try:
        parsed = json.loads(text)
        gap_s, data = parsed["metadata"]["gap_seconds"], parsed["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a trace of spot capacity: {error!r}", hint=example) from error
    if not _is_number(gap_s) or not gap_s > 0 or not isinstance(data, list) or not data or not all(map(_is_number, data)):
        raise ConfigError(f"{path}: gap_seconds must be above 0, and data a list of numbers of nodes", hint=example)
    return _joined(((n * gap_s, count >= nodes) for n, count in enumerate(data)), len(data) * float(gap_s), str(path))


def _from_csv(text: str, path: Path, nodes: int) -> Trace:
    up: set[str] = set()
    changes: list[tuple[float, bool]] = [(0.0, False)]
    for number, row in enumerate(csv.reader(io.StringIO(text)), start=1):
        if not row:
            continue
        if len(row) != 3 or not row[0].strip().isdigit() or row[1].strip() not in ("add", "remove"):
            raise ConfigError(f"{path}:{number}: {','.join(row)[:80]!r} is not an event", hint="4000,add,node1")
        at_s = int(row[0]) / 1000
        if at_s < changes[-1][0]:
            raise ConfigError(f"{path}:{number}: {row[0]} ms comes after a later event", hint="sort -n")
        (up.add if row[1].strip() == "add" else up.discard)(row[2].strip())
        changes.append((at_s, len(up) >= nodes))
    if changes[-1][0] <= 0:
        raise ConfigError(f"{path} has no event after 0 ms", hint="4000,add,node1")
    return _joined(changes, changes[-1][0], str(path))


def _joined(states: Iterator[tuple[float, bool]] | Sequence[tuple[float, bool]], length_s: float, source: str) -> Trace:
    """Convert times at which capacity begins or ends to spells."""
    begins: list[float] = []
    ends: list[float] = []
    for at_s, is_up in states:
        if is_up and len(begins) == len(ends):
            begins.append(at_s)
        elif not is_up and len(begins) > len(ends):
            ends.append(at_s)
    if len(begins) > len(ends):
        ends.append(length_s)
    spells = [(begin, end) for begin, end in zip(begins, ends, strict=True) if end > begin]
    return Trace(tuple(begin for begin, _ in spells), tuple(end for _, end in spells), length_s, source)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


# -- a model of bursts and droughts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Zone:
    """The measurements of a zone: share of the time with capacity, and hours of its spells with and without."""

    region: str
    availability: float
    up_mean_h: float
    up_median_h: float
    down_median_h: float


@dataclass(frozen=True)
class Drought:
    """Times without capacity in any zone of a region: their share of the time, and their hours."""

    share: float
    mean_h: float
    median_h: float = 0.5


# Measured in the nine traces aws-02-15-2023 of https://github.com/skypilot-org/spot-traces: one p3.2xlarge, requested every
# 195 s for 45 days from 2023-02-15. No such traces of larger machines are public.
ZONES = {
    "us-east-1a": Zone("us-east-1", 0.167, 0.72, 0.33, 0.54),
    "us-east-1c": Zone("us-east-1", 0.467, 1.48, 0.49, 0.54),
    "us-east-1d": Zone("us-east-1", 0.447, 1.66, 0.54, 0.70),
    "us-east-1f": Zone("us-east-1", 0.591, 2.18, 0.54, 0.49),
    "us-east-2a": Zone("us-east-2", 0.759, 5.51, 0.87, 0.38),
    "us-east-2b": Zone("us-east-2", 0.682, 4.27, 1.08, 0.70),
    "us-west-2a": Zone("us-west-2", 0.883, 5.76, 1.03, 0.38),
    "us-west-2b": Zone("us-west-2", 0.905, 9.75, 1.25, 0.38),
    "us-west-2c": Zone("us-west-2", 0.891, 6.48, 0.92, 0.38),
}
# With these shares all zones of a region are down together about as often as in the traces (29%, 19% and 4% of the time). With
# these means the loss of one zone is followed by others of its region within half an hour about as often (0.5, 0.3, 0.35).
DROUGHTS = {"us-east-1": Drought(0.285, 2.0), "us-east-2": Drought(0.19, 4.0), "us-west-2": Drought(0.038, 0.9)}
EVERYWHERE = Drought(0.008, 1.0)  # some zone of the nine had capacity 99.2% of the time


def model(rng: np.random.Generator, length_s: float = YEAR_S) -> dict[str, Trace]:
    """Return random traces of the nine zones.

    Each zone alternates between spells with and without capacity, whose lengths are log-normal: many are short and few are
    very long, so the longer a machine has lived, the longer it is expected to live (unlike an exponential distribution).
    Droughts of a region, and of all regions, are added: each begins with a burst of interruptions. The spells of a zone are
    derived from the measurements such that availability and mean are right with the droughts.

    Args:
        rng: source of randomness.
        length_s: length of the traces.
    """
    end_s = length_s + _WARM_UP_S
    everywhere = _droughts(rng, EVERYWHERE, end_s)
    regional = {region: _union(everywhere, _droughts(rng, drought, end_s)) for region, drought in DROUGHTS.items()}
    traces = {}
    for name, zone in ZONES.items():
        drought = DROUGHTS[zone.region]
        dry = 1 - (1 - drought.share) * (1 - EVERYWHERE.share)
        onsets_per_h = drought.share / drought.mean_h / (1 - drought.share) + EVERYWHERE.share / EVERYWHERE.mean_h
        up_mean_h = 1 / (1 / zone.up_mean_h - onsets_per_h)
        own = zone.availability / (1 - dry)
        down_mean_h = up_mean_h * (1 - own) / own
        ups = _alternating(rng, (up_mean_h, zone.up_median_h), (down_mean_h, zone.down_median_h), end_s)
        dry_spells = _reached(rng, regional[zone.region])
        wet = _cut(_without(ups, dry_spells) - _WARM_UP_S, length_s)
        traces[name] = Trace(tuple(wet[:, 0].tolist()), tuple(wet[:, 1].tolist()), length_s, MODEL_SOURCE)
    return traces


def _reached(rng: np.random.Generator, droughts: Spells) -> Spells:
    """Return droughts as they begin and end in one zone: a training that moves to the next zone may soon lose that, too."""
    import numpy as np

    late = droughts + rng.exponential(_REACHED_S, droughts.shape)
    return _union(np.sort(late, axis=1), np.empty((0, 2)))


def _droughts(rng: np.random.Generator, drought: Drought, end_s: float) -> Spells:
    apart_h = drought.mean_h * (1 - drought.share) / drought.share
    return _alternating(rng, (drought.mean_h, drought.median_h), (apart_h, apart_h / 2), end_s)


def _alternating(rng: np.random.Generator, up_h: tuple[float, float], down_h: tuple[float, float], end_s: float) -> Spells:
    """Return random spells up to ``end_s``, given mean and median hours of their lengths and of the pauses between them."""
    import numpy as np

    count = max(16, int(1.5 * end_s / 3600 / (up_h[0] + down_h[0])))
    edges = np.zeros(1)
    while edges[-1] < end_s:
        more = np.empty(2 * count)
        more[0::2], more[1::2] = _lengths_s(rng, *down_h, count), _lengths_s(rng, *up_h, count)
        edges = np.concatenate([edges, edges[-1] + np.cumsum(more)])
    return _cut(edges[1:].reshape(-1, 2), end_s)


def _lengths_s(rng: np.random.Generator, mean_h: float, median_h: float, count: int) -> NDArray[np.float64]:
    """Return log-normal lengths: the mean is the median times exp(σ²/2)."""
    sigma = math.sqrt(2 * math.log(max(mean_h / median_h, 1.01)))
    return rng.lognormal(math.log(3600 * mean_h) - sigma**2 / 2, sigma, count)


def _cut(spells: Spells, end_s: float) -> Spells:
    """Return the spells cut to the time between 0 and ``end_s``."""
    inside = spells[(spells[:, 1] > 0) & (spells[:, 0] < end_s)]
    return inside.clip(0, end_s)


def _union(one: Spells, other: Spells) -> Spells:
    import numpy as np

    both = np.concatenate([one, other])
    both = both[np.argsort(both[:, 0])]
    ends = np.maximum.accumulate(both[:, 1])
    first = np.concatenate([[True], both[1:, 0] > ends[:-1]])
    last = np.concatenate([first[1:], [True]])
    return np.stack([both[first, 0], ends[last]], axis=1)


def _without(spells: Spells, holes: Spells) -> Spells:
    """Return the spells minus the holes."""
    import numpy as np

    edges = np.sort(np.concatenate([spells.ravel(), holes.ravel()]))
    inside = (edges[:-1] + edges[1:]) / 2
    kept = _covers(spells, inside) & ~_covers(holes, inside)
    begins, ends = edges[:-1][kept], edges[1:][kept]
    if not len(begins):
        return np.empty((0, 2))
    apart = np.concatenate([[True], begins[1:] > ends[:-1]])
    return np.stack([begins[apart], ends[np.concatenate([apart[1:], [True]])]], axis=1)


def _covers(spells: Spells, at: NDArray[np.float64]) -> NDArray[np.bool_]:
    import numpy as np

    index = np.searchsorted(spells[:, 0], at, side="right") - 1
    return (index >= 0) & (at < spells[np.maximum(index, 0), 1]) if len(spells) else np.zeros(len(at), bool)
