"""Reports and simulations as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from hf_spot.economics.plan import Plan
from hf_spot.economics.report import FREE_FIRST_HOUR, PART_MEANS, Launch, Report, dollars, name_of, price_of
from hf_spot.economics.simulate import Result
from hf_spot.policy.redone import VALUES, in_words
from hf_spot.policy.requests import PRICE_SOURCE, WRITE_USD
from hf_spot.policy.trackers import TRACKERS
from hf_spot.policy.words import counted
from hf_spot.run.last_words import BY_FILE, BY_HEARTBEAT, is_repository
from hf_spot.run.traffic import GB, charged_usd, pairs
from hf_spot.terminal import columns_of, padded

# One explanation of each word, wherever reports and simulations use them.
WORDS_MEAN = (
    "goodput: the share of the whole time, waiting included, in which steps were done for the first time.",
    "lost, redone: steps done and not committed when a launch ended; the next launch does them again.",
)
SIMULATION_WORDS_MEAN = ("late: the share of the simulated runs that end after their deadline.",)
_LEAST_NEEDED = ("notice→commit", "waited", "commits", "redone", "lasted")  # columns, the first one first
_LEAST_NEEDED_OF_MACHINES = ("prices from", "on demand $/h", "zone")
_LEAST_NEEDED_OF_SIMULATIONS = ("without interruptions", "published", "extra", "on-demand", "10%..90%", "10%..90%")
_NEWEST = 40  # launches in a terminal
_MOST_LAST_WORDS = 5
_KNOWN_BY = {
    BY_FILE: "the file of steps on its disk",
    BY_HEARTBEAT: "its heartbeat, sent once a minute",
    None: "its launcher",
}


def render_report(report: Report, url: str, width: int | None = None) -> str:
    """Format the report of a run.

    Args:
        report: the report.
        url: URL of the run.
        width: columns of the terminal: what does not fit is left out, and said; None leaves nothing out.
    """
    if not report.launches:
        return f"{url}: this run has not been launched yet"
    lines = [f"{url}: {'finished' if report.finished else 'not finished'}, step {report.committed_step} committed"]
    lines += columns(launch_rows(report)) if width is None else _fitted(launch_rows(report), width, _LEAST_NEEDED)
    unknown = sum(launch.steps_lost is None and launch is not report.launches[-1] for launch in report.launches)
    lines.append(
        f"{counted(report.interruptions, 'interruption')}, {counted(report.steps_lost, 'step')} lost"
        + (f" and {counted(unknown, 'launch')} without a recorded end" if unknown else "")
        + f", {counted(report.steps_redone, 'step')} redone"
    )
    lines += last_words_lines(report)
    if unknown and is_repository(url):
        lines.append("how far they had come is unknown: a Hub repository takes no heartbeat, because each write is a commit")
    proven = [launch for launch in report.launches if launch.verified]
    if proven:
        parts = [part for part in proven[0].verified if all(part in launch.verified for launch in proven)]
        whose = "its" if len(proven) == 1 else "their"
        lines.append(f"{counted(len(proven), 'resume')} verified before {whose} first step: {', '.join(parts)}")
    lines += redone_lines(report)
    lines += tracker_lines(report)
    machines = machine_rows(report)
    if len(machines) > 1:
        lines += ["", *(columns(machines) if width is None else _fitted(machines, width, _LEAST_NEEDED_OF_MACHINES))]
    money = [*money_lines(report), *report.bill.lines(), *request_lines(report, url), *traffic_lines(report, url)]
    lines += ["", *columns(time_rows(report), left=(0, 3)), "", *money, "", *WORDS_MEAN]
    return "\n".join(lines if width is None else [part for line in lines for part in _wrapped(line, width)])


def _fitted(
    rows: list[list[str]],
    width: int,
    least_needed: Sequence[str],
    left: tuple[int, ...] = (),
    where: str = "--html FILE, or --json",
) -> list[str]:
    """Return the rows as lines that fit: the newest ones, and without the columns that are needed least.

    Args:
        rows: the first one has the titles.
        width: columns of the terminal.
        least_needed: titles, in the order in which they are left out.
        left: the columns that are aligned to the left.
        where: the options that show everything.
    """
    head, *body = rows
    older, shown = len(body) - _NEWEST, [head, *body[-_NEWEST:]]
    omitted = []
    for name in least_needed:
        if max(map(len, columns(shown, left))) <= width:
            break
        at = shown[0].index(name)
        shown = [row[:at] + row[at + 1 :] for row in shown]
        omitted.append(name)
    lines = columns(shown, left)
    told = [f"{older} older rows" if older > 0 else "", f"columns {', '.join(omitted)}" if omitted else ""]
    if any(told):
        lines.append(f"(without {' and '.join(filter(None, told))}: {where})")
    return lines


def _wrapped(line: str, width: int) -> list[str]:
    """Return a line of text as lines that fit; a line of a table, which has wide gaps, continues below its last column."""
    if len(line) <= width:
        return [line]
    gap = line.rfind("  ", 0, width)
    indent = gap + 2 if gap > 0 and gap + 2 <= width // 2 else 2
    return textwrap.wrap(
        line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )


def render_simulation(plan: Plan, results: Sequence[Result], capacity: str, width: int | None = None) -> str:
    """Format the results of a simulation.

    Args:
        plan: the simulated plan.
        results: results of its rows.
        capacity: source of the capacity, as text.
        width: as in `render_report`.
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
            "interruptions",
            "on-demand",
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
    where = "a wider terminal, or --json"
    lines = columns(rows, (0,)) if width is None else _fitted(rows, width, _LEAST_NEEDED_OF_SIMULATIONS, (0,), where)
    lines += ["", f"Capacity: {capacity}."]
    aborted = [f"{one.row.name} ({100 * one.unfinished_share:.0f}%)" for one in results if one.unfinished_share]
    if aborted:
        lines.append(
            f"Aborted because there was hardly any capacity, so their means are not representative: {', '.join(aborted)}."
        )
    sources = dict.fromkeys(
        f"{rung.instance_type} {rung.market} ${rung.usd_per_hour:g}/h: {rung.source}, {rung.date}"
        for one in results
        for rung in one.row.ladder
    )
    lines += ["Prices: " + "; ".join(sources) + ".", *plan.notes, *_words_of(rows[0])]
    return "\n".join(lines if width is None else [part for line in lines for part in _wrapped(line, width)])


def _words_of(titles: Sequence[str]) -> list[str]:
    return [line for line in SIMULATION_WORDS_MEAN if line.partition(":")[0] in " ".join(titles).split()]


def columns(rows: list[list[str]], left: tuple[int, ...] = ()) -> list[str]:
    """Format rows of equal length as lines, aligned to the right except for the columns ``left`` and the last one."""
    widths = [max(columns_of(row[at]) for row in rows) for at in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            padded(cell, width, is_right=at not in (*left, last))
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def launch_rows(report: Report) -> list[list[str]]:
    """Return one row per launch, below a header."""
    rows = [["launch", "began (UTC)", "waited", "lasted", "steps", "commits", "notice→commit", "lost", "redone", "ended"]]
    for launch in report.launches:
        reaction = "" if launch.notice_to_commit_s is None else f"{launch.notice_to_commit_s:.1f} s"
        rows.append(
            [
                str(launch.number),
                f"{launch.began:%Y-%m-%d %H:%M:%S}",
                duration(launch.waited_s),
                duration(launch.wall_s),
                f"{launch.resumed_step}→{launch.committed_step}",
                str(launch.commits),
                reaction,
                "?" if launch.steps_lost is None else str(launch.steps_lost),
                str(launch.steps_redone),
                launch.ended if launch.hung is None else f"{launch.ended}, hung after step {launch.hung}",
            ]
        )
    return rows


def last_words_lines(report: Report) -> list[str]:
    """Return how the lost steps of launches without a recorded end are known: a line for each of the newest ones."""
    told = [launch for launch in report.launches if launch.known_by is not None or _is_known_by_launcher(launch)]
    older = len(told) - _MOST_LAST_WORDS
    lines = [f"({counted(older, 'older launch')} that ended without a word: --json)"] if older > 0 else []
    for launch in told[-_MOST_LAST_WORDS:]:
        by = _KNOWN_BY[launch.known_by]
        committed = launch.committed.get(launch.training, 0)
        place = "in its machine's memory" if launch.whole_in_memory else "on its disk"
        saved = f"step {launch.whole_step} was whole {place}" if launch.whole_step else f"step {committed} is committed"
        at = f"step {launch.reached_step} at {launch.last_heard:%H:%M:%S}, by {by}; {saved}"
        least = "at least " if launch.known_by == BY_HEARTBEAT else ""
        if launch.steps_lost is None:
            lines.append(f"launch {launch.number} has done {at}")
        else:
            how = "ended without a word" if launch.known_by is not None else launch.ended
            lines.append(f"launch {launch.number} {how}: {least}{counted(launch.steps_lost, 'step')} lost ({at})")
    return lines


def _is_known_by_launcher(launch: Launch) -> bool:
    """Return whether a launcher has told how its training ended, and its commits alone don't tell what was lost."""
    return launch.whole_step > 0 and launch.ended != "no word" and launch.steps_lost is not None


def redone_lines(report: Report) -> list[str]:
    """Return how redone steps compare with those of earlier launches: a line for all that are equal, and one for each launch
    whose steps differ."""
    compared = [(launch.number, one) for launch in report.launches for one in launch.redone.values()]
    equal = [(number, one) for number, one in compared if one.different is None]
    lines = [f"launch {number}: {in_words(one)}" for number, one in (equal if len(equal) == 1 else [])]
    if len(equal) > 1:
        steps = sum(one.steps for _, one in equal)
        known = {name: sum(one.compared.get(name, 0) for _, one in equal) for name in VALUES}
        limits = ", ".join(f"{VALUES[name]} of {count}" for name, count in known.items() if count != steps)
        lines.append(f"{steps} steps redone in {len(equal)} launches, all equal{f' ({limits} compared)' if limits else ''}")
    return lines + [f"launch {number}: {in_words(one)}" for number, one in compared if one.different is not None]


def tracker_lines(report: Report) -> list[str]:
    """Return one line per training and tracker that shows it."""
    several = len({one.training for one in report.trackers}) > 1
    shown = {tracker.key: tracker.shown for tracker in TRACKERS}
    return [
        f"{shown.get(one.name, one.name)}{f' of training {one.training}' if several else ''}: "
        + " ".join(part for part in (one.place, one.id and f"(run {one.id})") if part)
        for one in report.trackers
    ]


def machine_rows(report: Report) -> list[list[str]]:
    """Return one row per launch whose machine is known beyond its name, below a header."""
    rows = [["launch", "machine", "type", "zone", "market", "$/h", "on demand $/h", "cost", "prices from"]]
    for launch in report.launches:
        count = "" if launch.machines == 1 or launch.others else f"{launch.machines} x "
        cost = launch.cost_usd
        if launch.others:  # each machine at its own price
            price = launch.price_usd_per_hour
            cost = None if price is None else launch.wall_s / 3600 * price
        rows += _machine_row(launch, count + launch.name, launch.machine, cost)
        for one in launch.others:
            price = price_of(one["machine"])
            cost = None if price is None else launch.wall_s / 3600 * price
            rows += _machine_row(launch, name_of(one), one["machine"], cost)
    return rows


def _machine_row(launch: Launch, name: str, machine: dict[str, Any], cost_usd: float | None) -> list[list[str]]:
    """Return a row, or none for a machine of which only the name is known and that trained alone."""
    if not launch.others and not any(value for key, value in machine.items() if key != "cloud"):
        return []
    prices = ((name, machine.get(f"{name}_source"), machine.get(f"{name}_time")) for name in ("price", "on_demand"))
    sources = [
        f"{source or 'no source'} ({str(time or 'no date')[:10]})" for name, source, time in prices if dollars(machine, name)
    ]
    return [
        [
            str(launch.number),
            name,
            str(machine.get("instance_type") or "?"),
            str(machine.get("zone") or machine.get("region") or "?"),
            str(machine.get("market") or "?"),
            _usd(price_of(machine), 4),
            _usd(dollars(machine, "on_demand"), 4),
            _usd(cost_usd, 2),
            "; ".join(dict.fromkeys(sources)),
        ]
    ]


def time_rows(report: Report) -> list[list[str]]:
    """Return where the time went: name, duration, share of the wall time, and meaning of each part."""
    whole_s = report.wall_s or 1.0
    spent = {**report.parts, "waiting": report.waiting_s}
    rows = [
        [name, duration(seconds), f"{100 * seconds / whole_s:.1f}%", PART_MEANS[name]]
        for name, seconds in spent.items()
        if seconds or name == "training"
    ]
    return [*rows, ["total", duration(report.wall_s), "100.0%", _goodput_words(report)]]


def money_lines(report: Report) -> list[str]:
    """Return the cost as sentences, as far as prices are known."""
    machine_s = sum(launch.wall_s * launch.machines for launch in report.launches)
    if report.unpriced_s == machine_s:
        return [
            """Cost: unknown. Before the next launch, set the price: export HF_SPOT_MACHINE='{"price_usd_per_hour": 9.83}'"""
        ]
    lines = [f"Spent: ${report.cost_usd:,.2f} from the claim to the last entry of each launch, without boot and shutdown."]
    if report.unpriced_s:
        lines[0] += f" The price of {duration(report.unpriced_s)} of {duration(machine_s)} is unknown."
    if report.maybe_free_usd:
        lines.append(
            f"Up to ${report.maybe_free_usd:,.2f} of it may be free: EC2 charges nothing for a spot instance that it interrupts"
            f" in its first hour ({FREE_FIRST_HOUR}). The journal does not show who ended it, so it is not subtracted."
        )
    if report.on_demand_s > report.on_demand_unpriced_s:
        priced_s = report.on_demand_s - report.on_demand_unpriced_s
        lines.append(
            f"On-demand, without interruptions: ${report.on_demand_usd:,.2f} for {duration(priced_s)} of machine time"
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


def request_lines(report: Report, url: str) -> list[str]:
    """Return how many writes were made to the store, and what they cost where the price is known; nothing for a directory."""
    hours = report.held_s / 3600
    if "://" not in url or not hours:
        return []
    per_hour = report.writes / hours
    cost = f": ${per_hour * WRITE_USD:.4f} per hour at S3's ${WRITE_USD * 1000:g} for 1,000 ({PRICE_SOURCE})"
    return [f"Requests: about {report.writes:,} writes, {per_hour:,.0f} per hour{cost if url.startswith('s3://') else ''}."]


def traffic_lines(report: Report, url: str) -> list[str]:
    """Return what machines and store have exchanged, and what it costs where prices are known; nothing for a directory."""
    traffic, store = report.traffic, report.store_place
    zones = sum(traffic.between_zones.values())
    told = []
    if "://" in url and (traffic.sent_bytes or traffic.fetched_bytes):
        told.append(f"{_gb(traffic.sent_bytes)} sent to the store, at most {_gb(traffic.fetched_bytes)} fetched from it")
    if zones:
        told.append(f"at most {_gb(zones)} between zones")
    if not told:
        return []
    line, charged = f"Traffic: {', '.join(told)}", [*pairs(traffic, store)]
    usd = charged_usd(traffic, store, report.traffic_rates)
    unknown = " What the store's part costs is unknown: AWS charges for what leaves a region." if not store else ""
    if not charged:
        return [f"{line}.{unknown}" if unknown else f"{line}: $0.00, because machines and store are in {store}."]
    if usd is None:
        return [f"{line}, of it {_gb(sum(count for *_, count in charged))} that a cloud charges for, at an unknown price."]
    prices = "; ".join(
        f"{one.source_place} to {one.target_place}: ${one.usd_per_gb:g} per GB ({one.source})"
        for one in report.traffic_rates
        if (one.source_place, one.target_place) in {(source, target) for source, target, _ in charged}
    )
    return [f"{line}: at most ${usd:,.2f}. {prices}.{unknown}"]


def _gb(count: int) -> str:
    return f"{count / GB:,.2f} GB"


def story(report: Report) -> str:
    """Return one sentence about the run for its model card; empty if it was never launched."""
    if not report.launches:
        return ""
    times = {0: "was never interrupted", 1: "was interrupted once"}
    history = times.get(report.interruptions, f"was interrupted {report.interruptions} times")
    cost = f", and cost ${_usd(report.cost_usd, 2)}" if report.cost_usd and not report.unpriced_s else ""
    return f"The training took {duration(report.held_s)} on machines that can be taken away, {history}{cost}."


def duration(seconds: float) -> str:
    """Format a duration: ``42.0 s``, ``12.5 min``, ``3.2 h`` or ``4.1 d``."""
    for limit_s, unit_s, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if abs(seconds) < limit_s:
            return f"{seconds / unit_s:.1f} {unit}"
    return f"{seconds / 86400:.1f} d"


def _goodput_words(report: Report) -> str:
    words = "not measured" if report.goodput is None else f"goodput {100 * report.goodput:.1f}%"
    if report.goodput is not None and report.unmeasured_s:
        words += f" at least ({duration(report.unmeasured_s)} not measured)"
    if report.clock_skew_s >= 1:
        words += f"; the machines' clocks differ by {duration(report.clock_skew_s)} or more"
    return words


def _usd(amount: float | None, digits: int) -> str:
    return "?" if amount is None else f"{amount:,.{digits}f}"
