"""Pictures of runs. matplotlib is an extra: ``pip install 'hf_spot[plot]'``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_spot.errors import ConfigError


@dataclass(frozen=True)
class Interruption:
    """One end of a launch that was not the end of the run.

    Args:
        step: the last step that was trained.
        committed_step: the step from which the next launch went on.
        label: a word or two.
    """

    step: int
    committed_step: int
    label: str


def require_matplotlib() -> None:
    """Raises ConfigError when there is none."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"a plot needs matplotlib: {error}", hint="pip install 'hf_spot[plot]'") from error


def plot_losses(
    path: Path,
    twin: Mapping[int, float],
    launches: Sequence[Mapping[int, float]],
    interruptions: Sequence[Interruption],
    title: str,
) -> None:
    """Writes the loss curve of an interrupted run over that of its uninterrupted twin.

    Args:
        path: of the image; its ending chooses the format.
        twin: loss by step.
        launches: loss by step, one mapping a launch.
        interruptions: marked by a line; steps that had to be repeated are shaded.
        title: above the picture.

    Raises:
        ConfigError: matplotlib is missing, or can't write such a file.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
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
    try:
        figure.savefig(path, dpi=120)
    except (ValueError, OSError) as error:
        raise ConfigError(f"the plot can't be written to {path}: {error}", hint="--plot FILE.png") from error
