"""Plots of runs and simulations. matplotlib is an extra: ``pip install '.[plot]'``."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_spot.economics.timeline import Timeline
from hf_spot.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_spot.economics.simulate import Result

# A palette for all kinds of colour vision (https://jfly.uni-koeln.de/color/).
COLOURS = {
    "training": "#009E73",
    "redoing": "#D55E00",
    "saving": "#0072B2",
    "restoring": "#56B4E9",
    "starting": "#E69F00",
    "ending": "#CC79A7",
    "other": "#BBBBBB",
    "waiting": "#555555",
}


@dataclass(frozen=True)
class Interruption:
    """The end of a launch before the end of the run.

    Args:
        step: the last trained step.
        committed_step: the step from which the next launch resumed.
        label: a word or two.
    """

    step: int
    committed_step: int
    label: str


def require_matplotlib() -> None:
    """Raise ConfigError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"a plot needs matplotlib: {error}", hint="pip install matplotlib") from error


def plot_losses(
    path: Path,
    twin: Mapping[int, float],
    launches: Sequence[Mapping[int, float]],
    interruptions: Sequence[Interruption],
    title: str,
) -> None:
    """Plot the loss curve of an interrupted run over that of its uninterrupted twin.

    Args:
        path: image file; its extension determines the format.
        twin: loss by step.
        launches: loss by step, one mapping per launch.
        interruptions: drawn as lines; repeated steps are shaded.
        title: title of the plot.

    Raises:
        ConfigError: matplotlib is missing, or can't write this file.
    """
    figure = _figure(9, 4.5)
    axes = figure.subplots()
    axes.plot(list(twin), list(twin.values()), color="0.8", linewidth=6, label="never interrupted")
    for number, losses in enumerate(launches, start=1):
        axes.plot(list(losses), list(losses.values()), linewidth=1.2, label=f"launch {number}")
    top = axes.get_ylim()[1]
    for one in interruptions:
        lost = one.step - one.committed_step
        colour = "tab:red" if lost else "0.3"
        axes.axvline(one.step, color=colour, linestyle="--", linewidth=1)
        if lost:
            axes.axvspan(one.committed_step, one.step, color=colour, alpha=0.15, linewidth=0)
        axes.text(one.step, top, f" {one.label}\n {lost} steps lost", color=colour, fontsize=8, verticalalignment="top")
    axes.set(xlabel="optimizer step", ylabel="training loss", title=title)
    axes.legend(loc="upper right", fontsize=8)
    _save(figure, path)


def plot_timeline(path: Path, timeline: Timeline, title: str) -> None:
    """Plot where the time of a run went: one lane per machine, with the loss above.

    Args:
        path: image file; its extension determines the format.
        timeline: the timeline to plot.
        title: title of the plot.

    Raises:
        ConfigError: matplotlib is missing, or can't write this file.
    """
    _save(_draw_timeline(timeline, title), path)


def timeline_svg(timeline: Timeline, title: str) -> str:
    """Return the same plot as an ``<svg>`` element for a page, without external references.

    Raises:
        ConfigError: matplotlib is missing.
    """
    figure = _draw_timeline(timeline, title)
    import matplotlib

    written = io.StringIO()
    # Text stays text, for search and screen readers; the salt makes ids reproducible.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hf_spot"}):
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = written.getvalue()
    return text[text.index("<svg") :]


def plot_simulation(path: Path, results: Sequence[Result], title: str) -> None:
    """Plot cost and wall-clock time of each row: the mean, and the 10% and 90% quantiles.

    Args:
        path: image file; its extension determines the format.
        results: results of a simulation.
        title: title of the plot.

    Raises:
        ConfigError: matplotlib is missing, or can't write this file.
    """
    figure = _figure(10, 1.6 + 0.5 * len(results))
    rows = range(len(results))
    for axes, what, spreads in zip(
        figure.subplots(1, 2, sharey=True),
        ("cost in dollars", "wall-clock hours"),
        ([one.usd for one in results], [one.hours for one in results]),
        strict=True,
    ):
        axes.hlines(rows, [one.low for one in spreads], [one.high for one in spreads], color=COLOURS["saving"], linewidth=5)
        axes.plot([one.mean for one in spreads], rows, "o", color="black", label="mean, and 10% to 90%")
        axes.set(xlabel=what, ylim=(len(results) - 0.5, -0.5), xlim=(0, 1.1 * max(one.high for one in spreads)))
        axes.grid(axis="x", color="0.9")
    costs, hours = figure.axes
    published = [(one.row.published_usd, row) for row, one in enumerate(results) if one.row.published_usd is not None]
    if published:
        costs.plot(
            *zip(*published, strict=True), "|", color=COLOURS["redoing"], markersize=14, markeredgewidth=2, label="published"
        )
    hours.plot([one.planned_hours for one in results], rows, "|", color="0.4", markersize=14, label="without interruptions")
    costs.set_yticks(rows, [one.row.name for one in results])
    for axes in (costs, hours):
        axes.legend(fontsize=8)
    figure.suptitle(title)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=120)
    except (ValueError, OSError) as error:
        raise ConfigError(f"the plot can't be written to {path}: {error}", hint="--plot FILE.png") from error


def _draw_timeline(timeline: Timeline, title: str) -> Figure:
    figure = _figure(10, 3.4 + 0.3 * len(timeline.lanes))
    from matplotlib.patches import Patch

    top, lanes = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 0.6 + 0.3 * len(timeline.lanes)))
    end_s = max((bar.begin_s + bar.length_s for bar in timeline.bars), default=0.0)
    unit_s, unit = next(
        (pair for pair in ((86400, "days"), (3600, "hours"), (60, "minutes")) if end_s > 3 * pair[0]), (1, "seconds")
    )
    for curve in timeline.losses:
        top.plot([at_s / unit_s for at_s, _ in curve], [loss for _, loss in curve], color="0.2", linewidth=1.2)
    top.set(ylabel="training loss", title=title)
    if not timeline.losses:
        top.text(0.5, 0.5, "no loss in the newest checkpoint", transform=top.transAxes, ha="center", color="0.4")
    for number, (at_s, word) in enumerate(timeline.interruptions):
        for axes in (top, lanes):
            axes.axvline(at_s / unit_s, color=COLOURS["redoing"], linestyle="--", linewidth=0.8)
        if number < 12:  # more labels would overlap
            where = top.get_xaxis_transform()
            top.text(at_s / unit_s, 0.98, f" {word}", transform=where, rotation=90, va="top", fontsize=7, color="0.3")
    shown = [part for part in COLOURS if any(bar.part == part for bar in timeline.bars)]
    for row, lane in enumerate(timeline.lanes):
        for part in shown:
            spans = [(b.begin_s / unit_s, b.length_s / unit_s) for b in timeline.bars if (b.lane, b.part) == (lane, part)]
            lanes.broken_barh(spans, (row - 0.35, 0.7), facecolors=COLOURS[part])
    lanes.set_yticks(range(len(timeline.lanes)), timeline.lanes, fontsize=8)
    lanes.set(
        ylim=(len(timeline.lanes) - 0.4, -0.6),
        xlim=(0, end_s / unit_s or 1),
        xlabel=f"{unit} since {timeline.began:%Y-%m-%d %H:%M} UTC",
    )
    patches = [Patch(color=COLOURS[part], label=part) for part in shown]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)
    return figure
