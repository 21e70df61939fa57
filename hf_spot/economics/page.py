"""A report as one HTML file, without scripts and external resources."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from hf_spot.economics.report import Report
from hf_spot.economics.table import (
    WORDS_MEAN,
    last_words_lines,
    launch_rows,
    machine_rows,
    money_lines,
    redone_lines,
    time_rows,
    tracker_lines,
)
from hf_spot.errors import ConfigError

_NUMBER = re.compile(r"[-+$~<>?]*[\d,.]*( ?(%|s|min|h|d|MB|→\d+))?$")  # with its unit, a span of steps, or an empty cell
_MOST_ROWS, _FEW_ROWS = 30, 12
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
:root { color-scheme: light dark }
body { color: #222; background: #fff }
h1 { font-size: 1.3rem; overflow-wrap: anywhere } h2 { font-size: 1.05rem; margin-top: 2rem }
figure { margin: 1rem 0; overflow-x: auto }
svg { width: 100%; min-width: 38rem; height: auto }
div { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8885; white-space: nowrap }
td:last-child { white-space: normal }
details { margin: .5rem 0 } summary { cursor: pointer }
p, li { overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #161616 } }
"""
# As a safeguard, browsers then refuse to load anything from this file.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_page(path: Path, report: Report, url: str, picture: str | None) -> None:
    """Write the report to a file.

    Args:
        path: path of the file.
        report: report of a run.
        url: URL of the run.
        picture: an ``<svg>`` element (`hf_spot.economics.plots.timeline_svg`); None for a run without launches.

    Raises:
        ConfigError: the file can't be written.
    """
    try:
        path.write_text(page(report, url, picture), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the page can't be written to {path}: {error.strerror or error}", hint="--html FILE.html") from error


def page(report: Report, url: str, picture: str | None) -> str:
    """Return the text of the file; see `write_page`."""
    parts = [f"<h1>{escape(url)}</h1>", f"<p>{escape(summary(report))}</p>"]
    if picture is not None:
        parts += [f'<figure role="img" aria-label="timeline of the run">{picture}</figure>']
        parts += ["<h2>Where the time went</h2>", table([["", "time", "share", ""], *time_rows(report)])]
        parts += ["<h2>Launches</h2>", collapsed(launch_rows(report), "launches")]
        told = (*last_words_lines(report), *redone_lines(report), *tracker_lines(report))
        parts += [f"<p>{escape(line)}</p>" for line in told]
        machines = machine_rows(report)
        parts += ["<h2>Machines and prices</h2>", collapsed(machines, "machines")] if len(machines) > 1 else []
        parts += ["<h2>Cost</h2>", *(f"<p>{escape(line)}</p>" for line in money_lines(report))]
        parts += ["<h2>Words</h2>", *(f"<p>{escape(line)}</p>" for line in WORDS_MEAN)]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            f'<head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>hf_spot: {escape(url)}</title><style>{_STYLE}</style></head>",
            "<body>",
            *parts,
            "</body></html>",
            "",
        ]
    )


def collapsed(rows: list[list[str]], what: str) -> str:
    """Return a table of the newest rows, and all of them below, to be unfolded, if there are more.

    Args:
        rows: the first one is the header.
        what: the rows, in the plural.
    """
    head, *body = rows
    if len(body) <= _MOST_ROWS:
        return table(rows)
    newest = table([head, *body[-_FEW_ROWS:]])
    return f"{newest}<details><summary>all {len(body)} {escape(what)}</summary>{table(rows)}</details>"


def summary(report: Report) -> str:
    """Return the state of the run in one sentence."""
    if not report.launches:
        return "This run has not been launched yet."
    state = "finished" if report.finished else "not finished"
    head = f"{state}, step {report.committed_step} committed, {report.interruptions} interruptions"
    return f"{head}: {report.steps_lost} steps lost, {report.steps_redone} redone."


def table(rows: list[list[str]]) -> str:
    """Return plain text cells as an HTML table; the first row is the header."""
    head, *body = rows
    right = [all(_NUMBER.match(row[at]) for row in body) and any(row[at] for row in body) for at in range(len(head))]
    marks = [f' style="text-align: {"right" if one else "left"}"' for one in right]  # notebooks align all to the right
    cells = [
        f"<tr>{''.join(f'<td{mark}>{escape(cell)}</td>' for cell, mark in zip(row, marks, strict=True))}</tr>" for row in body
    ]
    titles = "".join(f'<th scope="col"{mark}>{escape(cell)}</th>' for cell, mark in zip(head, marks, strict=True))
    return f"<div><table><thead><tr>{titles}</tr></thead><tbody>{''.join(cells)}</tbody></table></div>"
