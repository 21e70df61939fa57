"""The display of a run in a notebook: its checkpoints, its launches, and a timeline."""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable
from html import escape

from hf_spot.economics.page import summary, table
from hf_spot.economics.plots import timeline_svg
from hf_spot.economics.proofs import checkpoint_rows
from hf_spot.economics.report import Report, summarise
from hf_spot.economics.table import (
    last_words_lines,
    launch_rows,
    money_lines,
    redone_lines,
    render_report,
    time_rows,
    tracker_lines,
)
from hf_spot.economics.timeline import Timeline, losses_in, make_timeline
from hf_spot.errors import CorruptCheckpoint, SpotError
from hf_spot.run.journal import Entry
from hf_spot.run.last_words import of_the_newest_launch
from hf_spot.run.run import Run

log = logging.getLogger("hf_spot")

_ROWS = 20  # shown of a table, the newest ones
_MOST_TRAININGS = 6  # with their losses, the newest ones: each costs a request


def report_of(run: Run, entries: list[Entry] | None = None) -> Report:
    """Return the report of a run, with what is known of a launch that has no end.

    Args:
        run: to read from.
        entries: of its journal, if they have been read.

    Raises:
        SpotError: the store could not be read.
    """
    entries = list(run.events()) if entries is None else entries
    return summarise(entries, of_the_newest_launch(run, entries))


def html_of(run: Run) -> str:
    """Return what a notebook shows of a run: tables, and a timeline if matplotlib is installed."""
    try:
        entries = list(run.events())
        report = report_of(run, entries)
        parts = [escape(summary(report)), *_picture(run, report), *_tables(report, entries)]
    except SpotError as error:
        parts = [escape(str(error)).replace("\n", "<br>")]
    return "\n".join([f"<div><strong>{escape(run.url)}</strong>", *(f"<div>{part}</div>" for part in parts), "</div>"])


def text_of(run: Run) -> str:
    """Return what a terminal shows of a run."""
    try:
        return render_report(report_of(run), run.url)
    except SpotError as error:
        return f"{run.url}: {error}"


def _picture(run: Run, report: Report) -> list[str]:
    if not report.launches:
        return []
    try:
        svg = timeline_svg(timeline_of(run, report), "")
    except SpotError as error:  # show the tables also without matplotlib
        return [f"<em>{escape(str(error))}</em>"]
    # A separate image: otherwise the ids of two timelines in one page would collide.
    data = base64.b64encode(svg.encode()).decode()
    style = "background: white; max-width: 100%"  # the theme of a notebook is not that of the browser
    return [f'<img alt="timeline of the run" style="{style}" src="data:image/svg+xml;base64,{data}">']


def timeline_of(run: Run, report: Report, on_damage: Callable[[str], None] = log.warning) -> Timeline:
    """Return the timeline of a run, with the losses of each of its trainings, as its newest checkpoint has them.

    Args:
        run: the run.
        report: its report.
        on_damage: called with a line for each training whose checkpoint can't be read.

    Raises:
        SpotError: the store could not be read.
    """
    state = run.journal.state
    numbers = sorted({ref.training for ref in state.checkpoints}, reverse=True)[:_MOST_TRAININGS]
    losses = {}
    for number in numbers:
        newest = state.latest(number)
        if newest is not None:
            try:
                losses[number] = losses_in(run.read(run.checkpoint(newest), "trainer_state.json"))
            except CorruptCheckpoint as error:
                on_damage(f"the loss is not drawn: {error}")
    newest_training = state.latest()
    number = newest_training.training if newest_training else 1
    return make_timeline(report, losses.pop(number, {}), number, losses)


def _tables(report: Report, entries: list[Entry]) -> list[str]:
    found = []
    if len(checkpoints := checkpoint_rows(entries)) > 1:
        found.append(_newest(checkpoints[0], checkpoints[1:]))
    if report.launches:
        titles, *rows = launch_rows(report)
        found.append(_newest(titles, rows))
        found += [escape(line) for line in (*last_words_lines(report), *redone_lines(report), *tracker_lines(report))]
        spent = table([["", "time", "share", ""], *time_rows(report)])
        cost = "<br>".join(map(escape, money_lines(report)))
        found.append(f"<details><summary>Where the time went, and the cost</summary>{spent}<p>{cost}</p></details>")
    return found


def _newest(titles: list[str], rows: list[list[str]]) -> str:
    older = len(rows) - _ROWS
    return table([titles, *rows[-_ROWS:]]) + (f"<p>and {older} older ones</p>" if older > 0 else "")
