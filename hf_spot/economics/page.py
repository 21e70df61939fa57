"""A report as one HTML file, without scripts and external resources."""

from __future__ import annotations

from html import escape
from pathlib import Path

from hf_spot.economics.report import Report
from hf_spot.economics.table import launch_rows, machine_rows, money_lines, redone_lines, time_rows, tracker_lines
from hf_spot.errors import ConfigError

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
body { color: #222; background: #fff }
h1 { font-size: 1.3rem; overflow-wrap: anywhere } h2 { font-size: 1.05rem; margin-top: 2rem }
svg { width: 100%; height: auto }
div { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; white-space: nowrap }
td:last-child { white-space: normal }
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
        parts += ["<h2>Launches</h2>", table(launch_rows(report))]
        parts += [f"<p>{escape(line)}</p>" for line in (*redone_lines(report), *tracker_lines(report))]
        machines = machine_rows(report)
        parts += ["<h2>Machines and prices</h2>", table(machines)] if len(machines) > 1 else []
        parts += ["<h2>Cost</h2>", *(f"<p>{escape(line)}</p>" for line in money_lines(report))]
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
    cells = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    titles = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    return f"<div><table><thead><tr>{titles}</tr></thead><tbody>{''.join(cells)}</tbody></table></div>"
