"""Reports and simulations as people read them in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from hf_spot.economics.plan import Plan
from hf_spot.economics.report import FREE_FIRST_HOUR, PART_MEANS, Report, dollars
from hf_spot.economics.simulate import Result


def render_report(report: Report, url: str) -> str:
    """What happened to a run."""
    if not report.launches:
        return f"{url}: nobody has launched this run yet"
    lines = [f"{url}: {'finished' if report.finished else 'not finished'}, step {report.committed_step} committed"]
    lines += columns(launch_rows(report))
    unknown = sum(launch.steps_lost is None and launch is not report.launches[-1] for launch in report.launches)
    lines.append(
        f"{report.interruptions} interruptions, {report.steps_lost} steps lost"
        + (f" and {unknown} launches that ended without a word" if unknown else "")
        + f", {report.steps_redone} steps redone"
    )
    machines = machine_rows(report)
    lines += ["", *columns(machines)] if len(machines) > 1 else []
    lines += ["", *columns(time_rows(report), left=(0, 3)), "", *money_lines(report)]
    return "\n".join(lines)


def render_simulation(plan: Plan, results: Sequence[Result], capacity: str) -> str:
    """What trainings should take and cost.

    Args:
        plan: that was simulated.
        results: of its rows.
        capacity: where it comes from, in words.
    """
    rows = [
        [
            "row",
            "without interruptions",
            "published",
            "hours",
            "10%..90%",
            "extra",
            "cost",
            "10%..90%",
            "taken",
            "full price",
            "late",
        ]
    ]
    for one in results:
        published = one.row.published_usd
        rows.append(
            [
                one.row.name,
                one.formula,
                "" if published is None else f"${published:,.2f}",
                f"{one.hours.mean:.1f}",
                f"{one.hours.low:.1f}..{one.hours.high:.1f}",
                f"{100 * one.extra_share:+.0f}%",
                f"${one.usd.mean:,.2f}",
                f"${one.usd.low:,.0f}..${one.usd.high:,.0f}",
                f"{one.interruptions:.1f}",
                f"{100 * one.on_demand_share:.0f}%",
                "" if one.row.deadline_hours is None else f"{100 * one.late_share:.1f}%",
            ]
        )
    lines = columns(rows, left=(0,))
    lines += ["", f"Capacity: {capacity}."]
    given_up = [f"{one.row.name} ({100 * one.unfinished_share:.0f}%)" for one in results if one.unfinished_share]
    if given_up:
        lines.append(f"Given up, because there was hardly any capacity, and not a fair mean: {', '.join(given_up)}.")
    sources = dict.fromkeys(
        f"{rung.instance_type} {rung.market} ${rung.usd_per_hour:g}/h: {rung.source}, {rung.date}"
        for one in results
        for rung in one.row.ladder
    )
    lines += ["Prices: " + "; ".join(sources) + ".", *plan.notes]
    return "\n".join(lines)


def columns(rows: list[list[str]], left: tuple[int, ...] = ()) -> list[str]:
    """Rows of equal length as lines, aligned to the right but for the columns ``left``, and the last one."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if at in (*left, last) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def launch_rows(report: Report) -> list[list[str]]:
    """One row a launch, below their titles."""
    rows = [["launch", "began (UTC)", "waited", "lasted", "steps", "commits", "notice→commit", "lost", "redone", "ended"]]
    for launch in report.launches:
        answered = "" if launch.notice_to_commit_s is None else f"{launch.notice_to_commit_s:.1f} s"
        rows.append(
            [
                str(launch.number),
                f"{launch.began:%Y-%m-%d %H:%M:%S}",
                duration(launch.waited_s),
                duration(launch.wall_s),
                f"{launch.resumed_step}→{launch.committed_step}",
                str(launch.commits),
                answered,
                "?" if launch.steps_lost is None else str(launch.steps_lost),
                str(launch.steps_redone),
                launch.ended,
            ]
        )
    return rows


def machine_rows(report: Report) -> list[list[str]]:
    """One row a launch of which more is known than a name, below their titles."""
    rows = [["launch", "machine", "type", "zone", "market", "$/h", "on demand $/h", "cost", "prices from"]]
    for launch in report.launches:
        told = launch.machine
        if not any(value for key, value in told.items() if key != "cloud"):
            continue
        prices = ((name, told.get(f"{name}_source"), told.get(f"{name}_time")) for name in ("price", "on_demand"))
        sources = [
            f"{source or 'no source'} ({str(time or 'no date')[:10]})" for name, source, time in prices if dollars(told, name)
        ]
        times = "" if launch.machines == 1 else f"{launch.machines} x "
        rows.append(
            [
                str(launch.number),
                times + launch.name,
                str(told.get("instance_type") or "?"),
                str(told.get("zone") or told.get("region") or "?"),
                str(told.get("market") or "?"),
                _usd(launch.price_usd_per_hour, 4),
                _usd(launch.on_demand_usd_per_hour, 4),
                _usd(launch.cost_usd, 2),
                "; ".join(dict.fromkeys(sources)),
            ]
        )
    return rows


def time_rows(report: Report) -> list[list[str]]:
    """What the time went to: name, duration, share of the wall time, and what it means."""
    whole_s = report.wall_s or 1.0
    spent = {**report.parts, "waiting": report.waiting_s}
    rows = [
        [name, duration(seconds), f"{100 * seconds / whole_s:.1f}%", PART_MEANS[name]]
        for name, seconds in spent.items()
        if seconds or name == "training"
    ]
    return [*rows, ["in all", duration(report.wall_s), "100.0%", _goodput_words(report)]]


def money_lines(report: Report) -> list[str]:
    """What it cost, as far as prices are known; each line is a sentence."""
    machine_s = sum(launch.wall_s * launch.machines for launch in report.launches)
    if report.unpriced_s == machine_s:
        return ["""Cost: no price is known. Before the next launch: export HF_SPOT_MACHINE='{"price_usd_per_hour": 9.83}'"""]
    lines = [
        f"Spent: ${report.cost_usd:,.2f}, counted from each claim to the last word: booting and shutting down come on top."
    ]
    if report.unpriced_s:
        lines[0] += f" No price is known of {duration(report.unpriced_s)} of {duration(machine_s)}."
    if report.maybe_free_usd:
        lines.append(
            f"Up to ${report.maybe_free_usd:,.2f} of it may be free: EC2 charges nothing for a spot instance that it interrupts"
            f" in its first hour ({FREE_FIRST_HOUR}). The journal can't tell who ended it, so it is not taken off."
        )
    if report.on_demand_s > report.on_demand_unpriced_s:
        priced_s = report.on_demand_s - report.on_demand_unpriced_s
        lines.append(
            f"On demand, without an interruption: ${report.on_demand_usd:,.2f} for {duration(priced_s)} of machine time"
            + (f", and {duration(report.on_demand_unpriced_s)} without a known price" if report.on_demand_unpriced_s else "")
            + "."
        )
    if report.saved_usd is not None:
        lines.append(
            f"Saved: ${report.saved_usd:,.2f} ({100 * report.saved_usd / report.on_demand_usd:.0f}%)."
            if report.on_demand_usd
            else f"Saved: ${report.saved_usd:,.2f}."
        )
    return lines


def story(report: Report) -> str:
    """One sentence about how a run went, for who finds its model; empty when it was never launched."""
    if not report.launches:
        return ""
    times = {0: "was never interrupted", 1: "was interrupted once"}
    told = times.get(report.interruptions, f"was interrupted {report.interruptions} times")
    cost = f", and cost ${_usd(report.cost_usd, 2)}" if report.cost_usd and not report.unpriced_s else ""
    return f"The training took {duration(report.held_s)} on machines that can be taken away, {told}{cost}."


def duration(seconds: float) -> str:
    """For people: ``42.0 s``, ``12.5 min``, ``3.2 h`` or ``4.1 d``."""
    for limit_s, unit_s, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if abs(seconds) < limit_s:
            return f"{seconds / unit_s:.1f} {unit}"
    return f"{seconds / 86400:.1f} d"


def _goodput_words(report: Report) -> str:
    words = "nobody measured what it went to" if report.goodput is None else f"goodput {100 * report.goodput:.1f}%"
    if report.goodput is not None and report.unmeasured_s:
        words += f" at least: {duration(report.unmeasured_s)} were not measured"
    if report.clock_skew_s >= 1:
        words += f"; the machines' clocks differ by {duration(report.clock_skew_s)} or more"
    return words


def _usd(amount: float | None, digits: int) -> str:
    return "?" if amount is None else f"{amount:,.{digits}f}"
