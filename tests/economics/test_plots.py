"""What is written into pictures does not cover what they show. How they look, a person has to see."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from hf_spot.economics import plots
from hf_spot.economics.plots import Interruption, plot_losses, plot_timeline
from hf_spot.economics.report import summarise
from hf_spot.economics.timeline import make_timeline
from tests.economics.journals import claim, commit, timed, timing


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written."""
    found: list[Figure] = []
    save = plots._save

    def keep(figure: Figure, path: Path) -> None:
        found.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return found


def labels(figure: Figure) -> list[Any]:
    """Where each label is, in pixels."""
    axes = figure.axes[0]
    return [one.get_window_extent() for one in axes.texts if isinstance(one, Annotation)]


def test_labels_of_interruptions_close_to_each_other_overlap_neither_each_other_nor_the_frame(
    drawn: list[Figure], tmp_path: Path
) -> None:
    twin = {step: 4 - step / 25 for step in range(1, 61)}
    marks = [Interruption(step, step - 2, "kill -9") for step in (20, 21, 23, 45, 57, 59)]
    plot_losses(tmp_path / "demo.png", twin, [twin], marks, "a demo")
    found, frame = labels(drawn[0]), drawn[0].axes[0].get_window_extent()
    assert len(found) == len(marks)
    assert all(frame.x0 < one.x0 and one.x1 < frame.x1 and frame.y0 < one.y0 for one in found)
    assert not [pair for pair in combinations(found, 2) if pair[0].overlaps(pair[1])]


def test_labels_of_a_timeline_leave_the_loss_alone(drawn: list[Figure], tmp_path: Path) -> None:
    events = []
    for number in range(12):
        begin, step = 1000 * number, 100 * number
        events.append((begin, claim("a")))
        events.append((begin + 900, commit(step + 100, timing=timing(step + 100, 100, 900))))
        events.append((begin + 901, ("preempted", {"step": step + 100, "committed_step": step + 100})))
    losses = {step: 1 + 3 * 0.997**step for step in range(5, 1201, 5)}
    plot_timeline(tmp_path / "run.png", make_timeline(summarise(timed(events)), losses), "a run")
    axes = drawn[0].axes[0]
    points = [
        point for line in axes.lines if len(line.get_xdata()) > 2 for point in line.get_transform().transform(line.get_xydata())
    ]
    found = labels(drawn[0])
    assert len(found) >= 11 and points
    assert not [box for box in found if any(box.contains(*point) for point in points)]
