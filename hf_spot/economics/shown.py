"""The display of a run in a notebook: its checkpoints, its launches, and a timeline."""

from __future__ import annotations

import base64
from html import escape

from hf_spot.economics.page import summary, table
from hf_spot.economics.plots import timeline_svg
from hf_spot.economics.report import Report, summarise
from hf_spot.economics.table import launch_rows, money_lines, redone_lines, render_report, time_rows, tracker_lines
from hf_spot.economics.timeline import losses_in, make_timeline
from hf_spot.errors import SpotError
from hf_spot.run.journal import CheckpointRef, Entry
from hf_spot.run.run import Run

_ROWS = 20  # shown of a table, the newest ones


def html_of(run: Run) -> str:
    """Return what a notebook shows of a run: tables, and a timeline if matplotlib is installed."""
    try:
        entries = list(run.events())
        report = summarise(entries)
        parts = [escape(summary(report)), *_picture(run, report), *_tables(report, entries)]
    except SpotError as error:
        parts = [escape(str(error)).replace("\n", "<br>")]
    return "\n".join([f"<div><strong>{escape(run.url)}</strong>", *(f"<div>{part}</div>" for part in parts), "</div>"])


def text_of(run: Run) -> str:
    """Return what a terminal shows of a run."""
    try:
        return render_report(summarise(run.events()), run.url)
    except SpotError as error:
        return f"{run.url}: {error}"


def _picture(run: Run, report: Report) -> list[str]:
    if not report.launches:
        return []
    newest = run.journal.state.latest()
    try:
        losses = losses_in(run.read(run.checkpoint(newest), "trainer_state.json")) if newest else {}
        svg = timeline_svg(make_timeline(report, losses, newest.training if newest else 1), "")
    except SpotError as error:  # show the tables also without matplotlib
        return [f"<em>{escape(str(error))}</em>"]
    # A separate image: otherwise the ids of two timelines in one page would collide.
    data = base64.b64encode(svg.encode()).decode()
    return [f'<img alt="timeline of the run" style="background: white" src="data:image/svg+xml;base64,{data}">']


def _tables(report: Report, entries: list[Entry]) -> list[str]:
    refs = entries[-1].state.checkpoints if entries else ()
    reasons = {entry.number: str(entry.data.get("reason", "")) for entry in entries if entry.kind == "commit"}
    times = {entry.number: f"{entry.time:%Y-%m-%d %H:%M:%S}" for entry in entries}
    found = []
    if refs:
        titles = ["checkpoint", "size", "launch", "reason", "committed (UTC)", ""]
        rows = [_checkpoint_row(ref, reasons[ref.entry], times[ref.entry]) for ref in refs]
        found.append(_newest(titles, rows))
    if report.launches:
        titles, *rows = launch_rows(report)
        found.append(_newest(titles, rows))
        found += [escape(line) for line in (*redone_lines(report), *tracker_lines(report))]
        spent = table([["", "time", "share", ""], *time_rows(report)])
        cost = "<br>".join(map(escape, money_lines(report)))
        found.append(f"<details><summary>Where the time went, and the cost</summary>{spent}<p>{cost}</p></details>")
    return found


def _checkpoint_row(ref: CheckpointRef, reason: str, time: str) -> list[str]:
    marks = " ".join(word for word, holds in (("best", ref.best), ("complete", ref.complete)) if holds)
    name = f"checkpoint-{ref.step}" + (f" of training {ref.training}" if ref.training > 1 else "")
    return [name, f"{ref.size_bytes / 1e6:,.1f} MB", str(ref.launch), reason, time, marks]


def _newest(titles: list[str], rows: list[list[str]]) -> str:
    older = len(rows) - _ROWS
    return table([titles, *rows[-_ROWS:]]) + (f"<p>and {older} older ones</p>" if older > 0 else "")
