"""Plots of runs and simulations. matplotlib is an extra: ``pip install '.[plot]'``."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_spot.economics.timeline import Timeline
from hf_spot.errors import ConfigError
from hf_spot.policy.words import counted

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
    "idle": "#F0E442",
    "ending": "#CC79A7",
    "other": "#BBBBBB",
    "waiting": "#555555",
}


INK, MUTED = "#262626", "#767676"  # the second is readable on black and on white
_CURVES = (INK, "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#56B4E9")  # of several trainings
_FEW_POINTS = 40  # are shown as points, too
_MOST_LINES = 60  # interruptions
_ROOM_FOR_LABELS = 0.22  # of the height of the losses, above them
_LABEL_SHARE = 0.018  # of the width that a label takes
_LABEL_HEIGHT = 0.42  # of the losses' height, at most
_WIDTH_OF_TWO_LINES, _LEVEL = 0.1, 0.1  # shares of the width and of the height


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


@contextlib.contextmanager
def _plain_text() -> Iterator[None]:
    """Draw names of machines and runs as they are within the block: two ``$`` in one would be a formula, often a wrong one."""
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        yield


def require_matplotlib() -> None:
    """Raise ConfigError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"a plot needs matplotlib: {error}", hint="pip install matplotlib") from error


@_plain_text()
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
    low, high = axes.get_ylim()
    first, last = axes.get_xlim()
    places = [(one.step - first) / (last - first) for one in interruptions]
    at_the_edge = [place > 1 - _WIDTH_OF_TWO_LINES for place in places]
    begins = [place - _WIDTH_OF_TWO_LINES * is_at_the_edge for place, is_at_the_edge in zip(places, at_the_edge, strict=True)]
    levels = _levels([(begin, begin + _WIDTH_OF_TWO_LINES) for begin in begins])
    axes.set_ylim(low, high + (_ROOM_FOR_LABELS + _LEVEL * max(levels, default=0)) * (high - low))
    for one, level, is_at_the_edge in zip(interruptions, levels, at_the_edge, strict=True):
        lost = one.step - one.committed_step
        colour = "tab:red" if lost else "0.3"
        axes.axvline(one.step, color=colour, linestyle="--", linewidth=1)
        if lost:
            axes.axvspan(one.committed_step, one.step, color=colour, alpha=0.15, linewidth=0)
        axes.annotate(
            f"{one.label}\n{counted(lost, 'step')} lost",
            (one.step, 0.96 - _LEVEL * level),
            xycoords=axes.get_xaxis_transform(),
            xytext=(-4 if is_at_the_edge else 4, 0),
            textcoords="offset points",
            horizontalalignment="right" if is_at_the_edge else "left",
            color=colour,
            fontsize=8,
            verticalalignment="top",
        )
    axes.set(xlabel="optimizer step", ylabel="training loss", title=title)
    figure.legend(loc="outside lower center", ncols=min(1 + len(launches), 6), fontsize=8, frameon=False)
    _save(figure, path)


def _levels(spans: Sequence[tuple[float, float]]) -> list[int]:
    """Return for each label how many rows below the upper edge it stands, so that those close to each other don't overlap.

    Args:
        spans: where each label begins and ends, as shares of the width.
    """
    rows: list[list[tuple[float, float]]] = []
    found = []
    for begin, end in spans:
        free = [at for at, row in enumerate(rows) if all(end <= other[0] or other[1] <= begin for other in row)]
        level = free[0] if free else len(rows)
        rows[level : level + 1] = [[*(rows[level] if free else []), (begin, end)]]
        found.append(level)
    return found


@_plain_text()
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


@_plain_text()
def timeline_svg(timeline: Timeline, title: str) -> str:
    """Return the same plot as an ``<svg>`` element for a page, without external references.

    Its text and axes have the colour of the text around it, in a dark page, too.

    Raises:
        ConfigError: matplotlib is missing.
    """
    require_matplotlib()
    import matplotlib

    figure = _draw_timeline(timeline, title)
    written = io.StringIO()
    # Text stays text, for search and screen readers; the salt makes ids reproducible.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hf_spot"}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", metadata=metadata, transparent=True)
    text = written.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


@_plain_text()
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
        axes.plot([one.mean for one in spreads], rows, "o", color="black", label="mean, with 10% to 90% of the simulated runs")
        axes.set(xlabel=what, ylim=(len(results) - 0.5, -0.5))
        axes.margins(x=0.06)
        axes.grid(axis="x", color="0.9")
    costs, hours = figure.axes
    published = [(one.row.published_usd, row) for row, one in enumerate(results) if one.row.published_usd is not None]
    if published:
        costs.plot(
            *zip(*published, strict=True), "|", color=COLOURS["redoing"], markersize=14, markeredgewidth=2, label="published"
        )
    hours.plot([one.planned_hours for one in results], rows, "|", color="0.4", markersize=14, label="without interruptions")
    costs.set_yticks(rows, [one.row.name for one in results])
    handles = {
        label: handle for axes in (costs, hours) for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.suptitle(title)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _in_ink(figure: Figure) -> None:
    """Give all text and axes one colour, which a page replaces."""
    for axes in figure.axes:
        axes.title.set_color(INK)
        axes.tick_params(color=INK, labelcolor=INK)
        for part in (axes.xaxis.label, axes.yaxis.label):
            part.set_color(INK)
        for spine in axes.spines.values():
            spine.set_edgecolor(INK)
    for legend in figure.legends:
        for text in legend.get_texts():
            text.set_color(INK)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=120)
    except (ValueError, OSError) as error:
        raise ConfigError(f"the plot can't be written to {path}: {error}", hint="--plot FILE.png") from error


def _draw_timeline(timeline: Timeline, title: str) -> Figure:
    figure = _figure(10, 3.6 + 0.3 * len(timeline.lanes))
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    top, lanes = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 0.6 + 0.3 * len(timeline.lanes)))
    end_s = max((bar.begin_s + bar.length_s for bar in timeline.bars), default=0.0)
    unit_s, unit = next(
        (pair for pair in ((86400, "days"), (3600, "hours"), (60, "minutes")) if end_s > 3 * pair[0]), (1, "seconds")
    )
    legend: list[Any] = []
    trainings = list(dict.fromkeys(timeline.trainings)) or [1]
    marker = "o" if sum(map(len, timeline.losses)) <= _FEW_POINTS else ""
    numbers = timeline.trainings or (1,) * len(timeline.losses)
    for number, curve in zip(numbers, timeline.losses, strict=True):
        colour = _CURVES[trainings.index(number) % len(_CURVES)]
        at = [at_s / unit_s for at_s, _ in curve]
        # A single point has no line.
        dot = marker or ("o" if len(curve) == 1 else "")
        size = 3.5 if marker else 1.6
        top.plot(at, [loss for _, loss in curve], color=colour, linewidth=1.4, marker=dot, markersize=size, zorder=3)
    if timeline.losses:
        names = ["loss"] if len(trainings) == 1 else [f"loss of training {number}" for number in trainings]
        legend += [
            Line2D([], [], color=_CURVES[at % len(_CURVES)], marker=marker, markersize=3.5, label=name)
            for at, name in enumerate(names)
        ]
    else:
        top.text(0.5, 0.5, "no loss in the newest checkpoint", transform=top.transAxes, ha="center", color=MUTED)
        top.set_yticks([])
    if timeline.losses and 0 < len(timeline.interruptions) <= _MOST_LINES:
        low, high = top.get_ylim()
        top.set_ylim(low, high + _ROOM_FOR_LABELS * (high - low))
    top.set(ylabel="training loss", title=title, xlim=(0, end_s / unit_s or 1))
    lost_steps = sum(steps for _, _, steps in timeline.lost)
    for begin_s, until_s, _ in timeline.lost:
        top.axvspan(begin_s / unit_s, until_s / unit_s, color=COLOURS["redoing"], alpha=0.18, linewidth=0, zorder=0)
    _mark_interruptions(timeline, top, lanes, unit_s, end_s)
    shown = [part for part in COLOURS if any(bar.part == part for bar in timeline.bars)]
    for row, lane in enumerate(timeline.lanes):
        for part in shown:
            spans = [(b.begin_s / unit_s, b.length_s / unit_s) for b in timeline.bars if (b.lane, b.part) == (lane, part)]
            lanes.broken_barh(spans, (row - 0.35, 0.7), facecolors=COLOURS[part], zorder=2)
    lanes.set_yticks(range(len(timeline.lanes)), timeline.lanes, fontsize=8)
    lanes.set(
        ylim=(len(timeline.lanes) - 0.4, -0.6),
        xlim=(0, end_s / unit_s or 1),
        xlabel=f"{unit} since {timeline.began:%Y-%m-%d %H:%M} UTC",
    )
    if timeline.interruptions:
        count = len(timeline.interruptions)
        name = "end of a launch" if count == 1 else f"ends of {count} launches"
        legend.append(
            Line2D([], [], color=COLOURS["redoing"], linestyle="-" if count > _MOST_LINES else "--", linewidth=0.9, label=name)
        )
    if lost_steps:
        legend.append(Patch(color=COLOURS["redoing"], alpha=0.18, label=f"{counted(lost_steps, 'step')} lost"))
    legend += [Patch(color=COLOURS[part], label=part) for part in shown]
    figure.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 6), fontsize=8, frameon=False)
    _in_ink(figure)
    return figure


def _mark_interruptions(timeline: Timeline, top: Any, lanes: Any, unit_s: float, end_s: float) -> None:
    """Draw a line for each interruption behind the loss, the fainter the more there are, and as many labels as fit."""
    count = len(timeline.interruptions)
    if count > _MOST_LINES:  # as ticks at the lower edge: lines would cover the loss
        at = [at_s / unit_s for at_s, _ in timeline.interruptions]
        where = top.get_xaxis_transform()
        top.vlines(at, 0, 0.04, transform=where, color=COLOURS["redoing"], linewidth=0.6, zorder=1)
        return
    labelled_at = -math.inf
    for at_s, word in timeline.interruptions:
        for axes in (top, lanes):
            axes.axvline(
                at_s / unit_s,
                color=COLOURS["redoing"],
                linestyle="--",
                linewidth=0.8,
                alpha=1.0 if count <= 12 else 0.6,
                zorder=1,
            )
        if at_s - labelled_at > _LABEL_SHARE * end_s:
            labelled_at = at_s
            inside = at_s < (1 - _LABEL_SHARE) * end_s
            is_below = _is_only_above(timeline, top.get_ylim(), at_s, 1.5 * _LABEL_SHARE * end_s)
            top.annotate(
                word,
                (at_s / unit_s, 0.03 if is_below else 0.97),
                xycoords=top.get_xaxis_transform(),
                xytext=(3 if inside else -3, 0),
                textcoords="offset points",
                rotation=90,
                ha="left" if inside else "right",
                va="bottom" if is_below else "top",
                fontsize=7,
                color=MUTED,
            )


def _is_only_above(timeline: Timeline, limits: tuple[float, float], at_s: float, around_s: float) -> bool:
    """Return whether the loss around a time would run through a label at the upper edge, but not through one at the lower."""
    low, high = limits
    near = [(loss - low) / (high - low) for curve in timeline.losses for t_s, loss in curve if abs(t_s - at_s) < around_s]
    return any(share > 1 - _LABEL_HEIGHT for share in near) and all(share > _LABEL_HEIGHT for share in near)
