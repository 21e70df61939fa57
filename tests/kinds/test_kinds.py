"""Three kinds of model in the suite; ``python -m tests.kinds`` trains all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kinds.__main__ import play
from tests.kinds.models import KINDS


@pytest.mark.parametrize("name", ["BERT, classes", "SegFormer", "Mixtral"])
def test_a_kind_of_model_ends_as_plain_trainers(tmp_path: Path, name: str) -> None:
    assert play(KINDS[name], {}, tmp_path) == ""
