"""The quickest of `tests.frontends`; `python -m tests.frontends` runs all of them, with a kill -9, too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.frontends.cases import CASES, Case, prepare
from tests.frontends.runner import Runner
from tests.zygote import Zygote


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.quick], ids=lambda case: case.name)
def test_a_command_that_people_type_is_preempted_and_resumed_to_the_bit(case: Case, tmp_path: Path, zygote: Zygote) -> None:
    prepare(tmp_path)
    outcome = Runner(case, tmp_path, Path(sys.executable), zygote=zygote).run(("preempted",))
    assert outcome.ok, outcome.line()
