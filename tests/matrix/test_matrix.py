"""The cases of the matrix that CI has time for; ``python -m tests.matrix`` runs them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.matrix.cases import CASES
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
