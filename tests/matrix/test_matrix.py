"""The cases of the matrix that CI has time for; ``python -m tests.matrix`` runs them all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.matrix.adversary import drawn
from tests.matrix.cases import CASES
from tests.matrix.ending import differences
from tests.matrix.runner import run
from tests.zygote import Zygote


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.quick])
def test_an_interrupted_training_ends_with_the_bits_of_one_left_in_peace(
    name: str, tmp_path: Path, case_in_peace: Callable[[str], Path], zygote: Zygote
) -> None:
    peace = case_in_peace(name)
    with zygote.forking():
        row = run(name, tmp_path / "case", peace=peace, quick=True)
    logs = "\n".join(f"== {log}\n{log.read_text(errors='replace')}" for log in sorted((tmp_path / "case").glob("*.log")))
    assert row.identical, f"{row}\n{logs}"
    assert row.as_expected, f"{row}\n{logs}"


def test_the_adversary_plays_the_same_compositions_for_the_same_seed() -> None:
    assert drawn(5, 3) == drawn(5, 3) != drawn(5, 4)


def test_what_differs_in_the_end_is_named_and_seconds_are_not() -> None:
    one = {"log_history": [{"loss": 1.0, "step": 1}], "optimizer": {"a": "x"}}
    assert differences(one, json.loads(json.dumps(one))) == []
    told = differences(one, {"log_history": [{"loss": 1.5, "step": 1}], "optimizer": {}})
    assert told == ["log_history[0].loss: 1.0 undisturbed, 1.5 interrupted", 'optimizer.a: "x" undisturbed, null interrupted']
