"""Tables in a terminal stay in line, whatever runs are called."""

from __future__ import annotations

import pytest

from hf_spot.cloud.status import render_status
from hf_spot.commands.common import print_table
from hf_spot.economics.page import table
from hf_spot.economics.table import columns
from hf_spot.terminal import columns_of

NAMES = ("run", "漢字", "e\u0301", "가나다")


@pytest.mark.parametrize(("text", "width"), list(zip(NAMES, (3, 4, 1, 6), strict=True)))
def test_wide_letters_take_two_columns_and_accents_none(text: str, width: int) -> None:
    assert columns_of(text) == width


def test_tables_are_in_line(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [[name, "x"] for name in NAMES]
    print_table(rows)
    for lines in (capsys.readouterr().out.splitlines(), columns(rows), columns(rows, left=(0,))):
        assert {columns_of(line.partition("x")[0]) for line in lines} == {8}, lines


def test_a_cell_of_prose_is_not_crushed_on_a_narrow_page() -> None:
    page = table([["name", "proven"], ["checkpoint-5", "weights, " * 20]])
    assert page.count('class="long"') == 1
    assert 'class="long"' not in table([["name", "ended"], ["1", "finished"]])


@pytest.mark.parametrize(("ended", "tells"), [("finished", False), ("preempted", True)])
def test_a_finished_run_has_no_hours_left(ended: str, tells: bool) -> None:
    known = dict.fromkeys(("traffic_usd", "fleet")) | {"run": "r", "ended": ended, "step": 5, "max_steps": 5, "hours_left": 0.0}
    said = render_status({**known, "spent_usd": 0.0, "spent_bound": "", "machines": [], "not_in_the_journal": []})
    assert ("h left" in said) is tells
