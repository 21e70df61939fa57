"""The pages that ``hf-spot serve`` shows: the runs at and below a URL, and one page per run. They are read when asked for.

Everything that comes from a store (names of runs and machines, log lines, messages) is text, and escaped.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from html import escape
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hf_spot.economics.follow import Follower, View, facts_of, lines_of
from hf_spot.economics.page import body, collapsed, document, table
from hf_spot.economics.plots import timeline_svg
from hf_spot.economics.proofs import checkpoint_rows
from hf_spot.economics.report import Report
from hf_spot.economics.shown import report_of, timeline_of
from hf_spot.errors import ConfigError, ObjectNotFound, SpotError
from hf_spot.policy.words import counted
from hf_spot.run.below import Summary, find_runs, url_of, what_is_there
from hf_spot.run.order import SORTS, age_in_words, sorted_runs
from hf_spot.run.run import Run

_KEPT = 16  # runs whose journals stay in memory
_EVENTS = 12  # shown, the newest ones
_PATIENT = 4.0  # reading takes at most a quarter of the time
_RUN = "/run/"
_STYLE = """
nav { margin-bottom: 1rem } a { color: inherit; text-decoration-color: #8888 } a:hover { text-decoration-color: currentColor }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem }
dt { opacity: .7 } dd { margin: 0; overflow-wrap: anywhere }
.problem { border-left: .25rem solid #D55E00; padding-left: .8rem } #told { color: #D55E00 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0 }
"""
# Replaces the page's contents, and keeps what a reader has unfolded and scrolled.
_SCRIPT = """
const told = document.getElementById("told"), main = document.querySelector("main");
const all = (name) => [...main.querySelectorAll(name)];
async function look() {
  try {
    if (!document.hidden) {
      const answer = await fetch(location.href, {cache: "no-store"});
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main");
      if (fresh.innerHTML !== main.innerHTML) {
        const opened = all("details").map((one) => one.open), places = all("figure, div").map((one) => one.scrollLeft);
        main.replaceChildren(...fresh.childNodes);
        all("details").forEach((one, at) => { one.open = opened[at] ?? false; });
        all("figure, div").forEach((one, at) => { one.scrollLeft = places[at] ?? 0; });
      }
      told.textContent = "";
    }
  } catch (error) {
    told.textContent = "hf-spot serve does not answer: this is the last thing it said.";
  }
  setTimeout(look, INTERVAL);
}
setTimeout(look, INTERVAL);
"""


@dataclass(frozen=True)
class Answer:
    """What a server answers.

    Args:
        status: of HTTP.
        text: a page; empty if there is only a place to go to.
        location: where to go instead; empty for nowhere.
    """

    status: int
    text: str = ""
    location: str = ""


@dataclass
class _Shown:
    """What is kept of a run, or of the list of runs, between two looks."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    follower: Follower | None = None
    picture: tuple[object, str | None, str] = (None, None, "")  # of what, the picture, and why there is none
    found: list[Summary] | None = None
    read_at: float = -float("inf")
    took_s: float = 0.0
    parts: list[str] = field(default_factory=list)  # the last page that could be read
    as_of: datetime | None = None


class Site:
    """Makes the pages. It may be used from several threads.

    Args:
        url: where the runs are.
        interval_s: seconds between two looks of an open page.
        now: the clock.
    """

    def __init__(
        self, url: str, *, interval_s: float, now: Callable[[], datetime] = lambda: datetime.now(timezone.utc)
    ) -> None:
        self.url = url
        self._interval_s = interval_s
        self._now = now
        self._lock = threading.Lock()
        self._drawing = threading.Lock()  # matplotlib's settings are those of the whole process
        self._list = _Shown()
        self._runs: OrderedDict[str, _Shown] = OrderedDict()

    def answer(self, target: str, nonce: str) -> Answer:
        """Return the answer to a request.

        Args:
            target: path and query, as they are in the request.
            nonce: of the script in the page, as the header of the answer names it.
        """
        asked = urlsplit(target)
        if asked.path == "/":
            wanted = parse_qs(asked.query).get("sort", ["age"])[-1]
            return self._all_runs(wanted if wanted in SORTS else "age", nonce)
        name = unquote(asked.path.removeprefix(_RUN), errors="surrogateescape")
        if not asked.path.startswith(_RUN) or not _is_name(name):
            return self._page(404, "not found", ["<h1>There is no such page</h1>", _TO_ALL], nonce)
        return self._one_run(name, nonce)

    # -- the list -----------------------------------------------------------------------------------------------------

    def _all_runs(self, sort: str, nonce: str) -> Answer:
        shown = self._list
        with shown.lock:
            try:
                found = self._find()
                if [one.name for one in found] == [""]:
                    return Answer(302, location=_RUN)
                shown.parts = self._list_parts(found, sort)
                return self._page(200, self.url, shown.parts, nonce)
            except SpotError as error:
                return self._failed(error, self.url, shown, nonce)

    def _find(self) -> list[Summary]:
        shown, began = self._list, time.monotonic()
        if shown.found is None or began - shown.read_at > max(0.9 * self._interval_s, _PATIENT * shown.took_s):
            shown.found = find_runs(self.url)
            shown.read_at, shown.as_of = time.monotonic(), self._now()
            shown.took_s = shown.read_at - began
        return shown.found

    def _list_parts(self, found: list[Summary], sort: str) -> list[str]:
        parts = [f"<h1>{escape(self.url)}</h1>"]
        if not found:
            words, hint = what_is_there(self.url)
            return [*parts, f"<p>{escape(words)}</p>", f"<pre>{escape(hint)}</pre>"]
        states = Counter(one.in_words for one in found).most_common()
        count = counted(len(found), "run")
        parts.append(f"<p>{count}: {escape(', '.join(f'{number} {state}' for state, number in states))}.</p>")
        links = [f"<strong>{one}</strong>" if one == sort else f'<a href="/?sort={one}">{one}</a>' for one in SORTS]
        parts.append(f"<nav>by {' · '.join(links)}</nav>")
        now, rows = self._now(), [["run", "state", "step", "committed", "launches", "size"]]
        chosen = sorted_runs(found, sort)
        for one in chosen:
            of = f" of {one.max_steps}" if one.max_steps else ""
            committed = age_in_words(now, one.committed) if one.committed else "never"
            launches = str(one.state.launch) if one.state else "?"
            size = f"{one.size_bytes / 1e6:,.1f} MB"
            rows.append([one.name or ".", one.in_words, f"{one.step}{of}", committed, launches, size])
        parts.append(table(rows, [_link(one.name) for one in chosen]))
        problems = [f"{one.name or '.'}: {one.problem}" for one in chosen if one.problem]
        return [*parts, *(f'<p class="problem">{escape(line)}</p>' for line in problems)]

    # -- a run --------------------------------------------------------------------------------------------------------

    def _one_run(self, name: str, nonce: str) -> Answer:
        url = url_of(self.url, name)
        with self._lock:
            shown = self._runs.setdefault(name, _Shown())
            self._runs.move_to_end(name)
            while len(self._runs) > _KEPT:
                self._runs.popitem(last=False)
        with shown.lock:
            try:
                parts = self._run_parts(url, shown)
            except SpotError as error:
                return self._failed(error, url, shown, nonce)
            if parts is None:
                words, hint = self._what_is_at(url)
                with self._lock:
                    self._runs.pop(name, None)
                said = [f"<h1>{escape(url)}</h1>", f"<p>{escape(words)}</p>", f"<pre>{escape(hint)}</pre>"]
                return self._page(404, url, [_TO_ALL, *said], nonce)
            is_only_one = name == "" and self._list.found is not None and len(self._list.found) == 1
            shown.parts, shown.as_of = [*([] if is_only_one else [_TO_ALL]), *parts], self._now()
            return self._page(200, url, shown.parts, nonce)

    def _what_is_at(self, url: str) -> tuple[str, str]:
        try:
            return what_is_there(url)
        except SpotError as error:
            return str(error.args[0]), error.hint or ""

    def _run_parts(self, url: str, shown: _Shown) -> list[str] | None:
        """Return the elements of a run's page; None if there is no run. Raises SpotError."""
        run = Run(url)
        state = run.state()
        if not state.number:
            return None
        if shown.follower is None or not shown.follower.continues(run):
            shown.follower = Follower(run)
        view = shown.follower.look(self._now())
        entries = shown.follower.new_entries(0)
        report = report_of(run, entries)
        picture, note = self._picture(shown, run, report)
        return body(report, url, picture, checkpoint_rows(entries), _now_parts(view, lines_of(entries)), note)

    def _picture(self, shown: _Shown, run: Run, report: Report) -> tuple[str | None, str]:
        """Return the timeline, and the reason if there is none; drawn only when there is something new."""
        newest = (run.journal.state.number, [launch.last_heard for launch in report.launches[-1:]])
        if report.launches and shown.picture[0] != newest:
            said: list[str] = []
            try:
                timeline = timeline_of(run, report, said.append)
                with self._drawing:
                    shown.picture = (newest, timeline_svg(timeline, ""), "")
            except ConfigError as error:  # no matplotlib; the tables are shown all the same
                shown.picture = (newest, None, str(error))
        return shown.picture[1:]

    # -- pages --------------------------------------------------------------------------------------------------------

    def _failed(self, error: SpotError, url: str, shown: _Shown, nonce: str) -> Answer:
        said = [f'<p class="problem"><strong>{escape(str(error.args[0]))}</strong></p>']
        said += [f"<pre>{escape(error.hint)}</pre>"] if error.hint else []
        if shown.as_of is not None:
            said.append(f"<p>What follows is as of {shown.as_of:%Y-%m-%d %H:%M:%S} UTC.</p>")
        status = 404 if isinstance(error, ObjectNotFound) else 503
        return self._page(status, url, [*said, *(shown.parts or [f"<h1>{escape(url)}</h1>"])], nonce)

    def _page(self, status: int, title: str, parts: Sequence[str], nonce: str) -> Answer:
        interval_ms = str(round(1000 * self._interval_s))
        script = f'<script nonce="{nonce}">{_SCRIPT.replace("INTERVAL", interval_ms)}</script>'
        again = f'<noscript><meta http-equiv="refresh" content="{max(1, round(self._interval_s))}"></noscript>'
        head = f'<link rel="icon" href="data:,"><style>{_STYLE}</style>{again}'
        said = '<p id="told" role="status"></p>'
        return Answer(status, document(f"hf_spot: {title}", ["<main>", *parts, "</main>", said, script], head))


_TO_ALL = '<nav><a href="/">all runs</a></nav>'


def _link(name: str) -> str:
    return _RUN + quote(name, errors="surrogateescape")


def _is_name(name: str) -> bool:
    """Return whether a name is that of a place below the URL, or of the URL itself."""
    return name == "" or not any(part in ("", ".", "..") or set(part) & {"\\", "\0"} for part in name.split("/"))


def _now_parts(view: View, lines: Iterable[str]) -> list[str]:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(words)}</dd>" for name, words in facts_of(view))
    events = [["time (UTC)", "event"], *([line[:19], line[21:]] for line in list(lines)[-_EVENTS:])]
    return [f"<dl>{facts}</dl>", f"<details><summary>newest events</summary>{collapsed(events, 'events')}</details>"]
