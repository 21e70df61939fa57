"""Traces of capacity that people bring, and the model of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_spot.economics.traces import DROUGHTS, YEAR_S, ZONES, Trace, load, load_all, model
from hf_spot.errors import ConfigError


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_trace_of_cant_be_late(tmp_path: Path) -> None:
    told = {"metadata": {"gap_seconds": 300, "device": "v100"}, "data": [0, 2, 2, 1, 0, 3]}
    path = written(tmp_path, "us-west-2a_v100_1.json", json.dumps(told))
    assert load(path) == ("us-west-2a", Trace((300, 1500), (1200, 1800), 1800))
    assert load(path, nodes=2)[1] == Trace((300, 1500), (900, 1800), 1800)
    assert load(path, nodes=4)[1] == Trace((), (), 1800)


def test_a_trace_of_bamboo(tmp_path: Path) -> None:
    path = written(tmp_path, "p3.csv", "0,add,a\n1000,add,b\n4000,remove,a\n9000,add,c\n10000,remove,b\n")
    assert load(path) == ("p3", Trace((0,), (10,), 10))
    assert load(path, nodes=2)[1] == Trace((1, 9), (4, 10), 10)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.json", "{", "is not a trace of spot capacity"),
        ("a.json", '{"data": [1]}', "is not a trace of spot capacity"),
        ("a.json", '{"metadata": {"gap_seconds": 0}, "data": [1]}', "gap_seconds must be above 0"),
        ("a.json", '{"metadata": {"gap_seconds": 1}, "data": []}', "gap_seconds must be above 0"),
        ("a.json", '{"metadata": {"gap_seconds": 1}, "data": [1, "2"]}', "gap_seconds must be above 0"),
        ("a.csv", "", "has no event"),
        ("a.csv", "0,add,a\n5,move,a\n", "a.csv:2: '5,move,a' is not an event"),
        ("a.csv", "5000,add,a\n4000,remove,a\n", "a.csv:2: 4000 ms comes after"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, name: str, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(written(tmp_path, name, text))
    assert problem in str(error.value)


def test_two_traces_of_one_zone_are_refused(tmp_path: Path) -> None:
    paths = [written(tmp_path, name, "1000,add,a") for name in ("z_1.csv", "z_2.csv")]
    with pytest.raises(ConfigError, match="both of the zone z"):
        load_all(paths)
    with pytest.raises(ConfigError, match="can't be read"):
        load(tmp_path / "none.json")


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 40))
def test_a_trace_begins_anew_at_its_end(states: list[bool], at: int) -> None:
    begins = [n for n, up in enumerate(states) if up]
    trace = Trace(
        tuple(map(float, begins)), tuple(n + 1.0 for n in begins), float(len(states))
    )  # one spell an hour, not joined
    begin, end = trace.next_up(at + 0.5)
    wanted = next((n for n in range(at, at + len(states) + 1) if states[n % len(states)]), None)
    assert (begin, end) == ((wanted, wanted + 1) if wanted is not None else (np.inf, np.inf))


def lengths_h(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    begins, ends = np.array(trace.begins), np.array(trace.ends)
    return (ends - begins) / 3600, (begins[1:] - ends[:-1]) / 3600


def test_the_model_has_the_statistics_that_were_measured() -> None:
    years = 4
    traces = model(np.random.default_rng(7), years * YEAR_S)
    at_s = np.arange(0, years * YEAR_S, 600.0)
    grid = {}
    for name, zone in ZONES.items():
        ups_h, downs_h = lengths_h(traces[name])
        seen_h = ups_h[ups_h > 195 / 3600]  # what is shorter was not seen by those who asked every 195 s
        assert traces[name].availability == pytest.approx(zone.availability, abs=0.05)
        assert seen_h.mean() == pytest.approx(zone.up_mean_h, rel=0.5)
        assert np.median(downs_h) == pytest.approx(zone.down_median_h, rel=0.3)
        assert np.median(seen_h) < 0.6 * seen_h.mean()  # many short ones, few long ones
        index = np.searchsorted(traces[name].begins, at_s, side="right") - 1
        grid[name] = (index >= 0) & (at_s < np.array(traces[name].ends)[np.maximum(index, 0)])
    assert np.any(list(grid.values()), axis=0).mean() == pytest.approx(0.992, abs=0.004)
    for region, all_down in (("us-east-1", 0.287), ("us-east-2", 0.194), ("us-west-2", 0.039)):
        ups = [up for name, up in grid.items() if ZONES[name].region == region]
        assert 1 - np.any(ups, axis=0).mean() == pytest.approx(all_down, abs=0.035)


def test_the_model_is_not_memoryless_and_comes_in_bursts() -> None:
    traces = model(np.random.default_rng(7), 4 * YEAR_S)
    ups_h, _ = lengths_h(traces["us-west-2b"])
    old = ups_h[ups_h > 10]
    assert (old - 10).mean() > 1.5 * ups_h.mean()  # who has lived for ten hours lives longer than who has just begun
    first, second = traces["us-west-2a"], np.array(traces["us-west-2c"].ends)
    soon = np.searchsorted(second, np.array(first.ends) + 1800) - np.searchsorted(second, np.array(first.ends))
    by_chance = len(second) * 1800 / (4 * YEAR_S)
    assert (soon > 0).mean() > 2 * by_chance


def test_the_same_seed_is_the_same_year() -> None:
    assert model(np.random.default_rng(3), 1e6) == model(np.random.default_rng(3), 1e6)
    assert model(np.random.default_rng(3), 1e6) != model(np.random.default_rng(4), 1e6)
    assert {zone.region for zone in ZONES.values()} == DROUGHTS.keys()
