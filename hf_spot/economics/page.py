"""A report as one HTML file, without scripts and external resources."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
    request_lines,
    time_rows,
    tracker_lines,
    traffic_lines,
)
from hf_spot.errors import ConfigError
from hf_spot.policy.words import counted

_NUMBER = re.compile(
    r"[-+$~<>?]*[\d,.]*( ?(%|s|min|h|d|MB|→\d+|of [\d,]+))?$"
)  # with its unit, a span or a share of steps, or an empty cell
_MOST_ROWS, _FEW_ROWS = 30, 12
_MOST_LETTERS = 60  # of a cell that needs no more than a narrow column
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
td:last-child { white-space: normal; min-width: 9rem }
td.long:last-child { min-width: 22rem } td[style*="right"] { min-width: 0 !important }
details { margin: .5rem 0 } summary { cursor: pointer }
p, li { overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #161616 } }
"""
# As a safeguard, browsers then refuse to load anything from this file.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_page(path: Path, report: Report, url: str, picture: str | None, checkpoints: list[list[str]]) -> None:
    """Write the report to a file.

    Args:
        path: path of the file.
        report: report of a run.
        url: URL of the run.
        picture: an ``<svg>`` element (`hf_spot.economics.plots.timeline_svg`); None for a run without launches.
        checkpoints: rows below a header (`hf_spot.economics.proofs.checkpoint_rows`).

    Raises:
        ConfigError: the file can't be written.
    """
    try:
        path.write_text(page(report, url, picture, checkpoints), encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"the page can't be written to {path}: {error.strerror or error}", hint="--html FILE.html") from error


def page(report: Report, url: str, picture: str | None, checkpoints: list[list[str]] | None = None) -> str:
    """Return the text of the file; see `write_page`."""
    policy = f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    return document(f"hf_spot: {url}", body(report, url, picture, checkpoints or []), policy)


def body(
    report: Report, url: str, picture: str | None, checkpoints: list[list[str]], now: Sequence[str] = (), note: str = ""
) -> list[str]:
    """Return the elements of a report.

    Args:
        report: as for `write_page`.
        url: as for `write_page`.
        picture: as for `write_page`.
        checkpoints: as for `write_page`.
        now: elements about the run as it is now, shown first.
        note: said in place of a missing picture.
    """
    parts = [f"<h1>{escape(url)}</h1>", f"<p>{escape(summary(report))}</p>", *now]
    if report.launches:
        drawn = f'<figure role="img" aria-label="timeline of the run">{picture}</figure>'
        parts.append(f"<p><em>{escape(note)}</em></p>" if picture is None else drawn)
    if len(checkpoints) > 1:
        parts += ["<h2>Checkpoints</h2>", collapsed(checkpoints, "checkpoints")]
    if report.launches:
        parts += ["<h2>Where the time went</h2>", table([["", "time", "share", ""], *time_rows(report)])]
        parts += ["<h2>Launches</h2>", collapsed(launch_rows(report), "launches")]
        told = (*last_words_lines(report), *redone_lines(report), *tracker_lines(report))
        parts += [f"<p>{escape(line)}</p>" for line in told]
        machines = machine_rows(report)
        parts += ["<h2>Machines and prices</h2>", collapsed(machines, "machines")] if len(machines) > 1 else []
        money = (*money_lines(report), *report.bill.lines(), *request_lines(report, url), *traffic_lines(report, url))
        parts += ["<h2>Cost</h2>", *(f"<p>{escape(line)}</p>" for line in money)]
        parts += ["<h2>Words</h2>", *(f"<p>{escape(line)}</p>" for line in WORDS_MEAN)]
    return parts


def document(title: str, parts: Sequence[str], head: str = "") -> str:
    """Return a whole page.

    Args:
        title: plain text.
        parts: elements of its body.
        head: more elements of its head.
    """
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            f'<head><meta charset="utf-8">{head}',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head>",
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
    head = f"{state}, step {report.committed_step} committed, {counted(report.interruptions, 'interruption')}"
    return f"{head}: {counted(report.steps_lost, 'step')} lost, {report.steps_redone} redone."


def table(rows: list[list[str]], links: Sequence[str] = ()) -> str:
    """Return plain text cells as an HTML table; the first row is the header.

    Args:
        rows: all of the same length.
        links: where the first cell of each row leads; empty for nowhere.
    """
    head, *body = rows
    right = [all(_NUMBER.match(row[at]) for row in body) and any(row[at] for row in body) for at in range(len(head))]
    # Notebooks align all cells to the right, and break them.
    wraps = ["; white-space: nowrap"] * (len(head) - 1) + [""]
    marks = [f' style="text-align: {"right" if one else "left"}{wrap}"' for one, wrap in zip(right, wraps, strict=True)]
    shown = [[escape(cell) for cell in row] for row in body]
    if links:
        shown = [[f'<a href="{escape(link)}">{row[0]}</a>', *row[1:]] for row, link in zip(shown, links, strict=True)]
    long = [any(len(row[at]) > _MOST_LETTERS for row in body) for at in range(len(head))]
    kinds = [' class="long"' if one else "" for one in long]
    cells = [
        f"<tr>{''.join(f'<td{kind}{mark}>{cell}</td>' for cell, kind, mark in zip(row, kinds, marks, strict=True))}</tr>"
        for row in shown
    ]
    titles = "".join(f'<th scope="col"{mark}>{escape(cell)}</th>' for cell, mark in zip(head, marks, strict=True))
    return f"<div><table><thead><tr>{titles}</tr></thead><tbody>{''.join(cells)}</tbody></table></div>"
