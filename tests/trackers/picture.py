"""A picture of one curve over several launches."""

from __future__ import annotations

from pathlib import Path

Curve = list[tuple[int, float]]
COLOURS = ("#0b62a4", "#d1495b", "#2e8b57", "#8e6bbf")


def draw(path: Path, undisturbed: Curve, curves: dict[str, Curve], launches: list[tuple[int, int, str]]) -> None:
    """Draw the undisturbed curve beside that of the trackers, with each launch marked.

    Args:
        path: of the PNG.
        undisturbed: step and loss.
        curves: what each tracker shows of the interrupted training.
        launches: first step, last step, and how it ended.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
    left.plot(*zip(*undisturbed, strict=True), color="#444444", marker=".", linewidth=1)
    left.set_title("undisturbed")
    shown = next(iter(curves.values()))
    same = [name for name, curve in curves.items() if sorted(curve) == sorted(shown)]
    right.plot(*zip(*shown, strict=True), color="#444444", marker=".", linewidth=1)
    low, high = min(value for _, value in shown), max(value for _, value in shown)
    for number, (first, last, how) in enumerate(launches):
        height = low - (high - low) * (0.12 + 0.09 * number)
        colour = COLOURS[number % len(COLOURS)]
        right.plot([first - 0.4, last + 0.4], [height, height], color=colour, linewidth=5, solid_capstyle="butt")
        right.text(last + 1, height, f"launch {number + 1}: {how}", color=colour, va="center", fontsize=8)
        if number:
            right.axvline(first - 0.5, color=colour, linewidth=0.8, linestyle=":")
    right.set_title(f"four launches, one run: {', '.join(same)}", fontsize=9)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.set_xlim(0, max(step for step, _ in undisturbed) * 1.3)
    left.set_ylabel("loss")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
