"""State that has no place in a resumed launch is named, and by one rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_spot.training.state.carried import CarriedState
from hf_spot.training.state.walk import Found, Walk


class NoTensors:
    def holds(self, name: str, tensor: Any) -> bool:
        return False


def state_of(script: dict[str, Any], rank: int) -> CarriedState:
    def find(walk: Walk) -> Iterator[Found]:
        for name, value in script.items():
            yield from walk.value(f"script.{name}", value)

    return CarriedState(find, Walk, tuple, rank)


def save(folder: Path, script: dict[str, Any], rank: int) -> None:
    state = state_of(script, rank)
    state.look()
    for name in script:
        script[name] += 1
    (folder / "hf_spot_state").mkdir(exist_ok=True)

    def write(path: Path, text: str) -> None:
        path.write_text(text)

    state.save(folder, NoTensors(), write)


def test_what_has_no_place_any_more_is_named_by_one_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, {"of_all": 0, "of_0": 0}, 0)
    save(tmp_path, {"of_all": 0, "of_1": 0}, 1)
    told = []
    with caplog.at_level(logging.WARNING, logger="hf_spot"):
        for rank in range(3):
            caplog.clear()
            state_of({}, rank).restore(tmp_path)
            told.append([line.partition(": ")[2] for line in caplog.messages])
    assert told == [["script.of_all, script.of_0"], ["script.of_1"], []]
