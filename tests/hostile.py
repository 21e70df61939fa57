"""A store that is in trouble: a proxy that does to a share of the requests what stores and networks do to them."""

from __future__ import annotations

import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

from tests.proxy import Answer, Exchange, Proxy

FAULTS = (
    "500",
    "503 SlowDown",
    "429",
    "reset",
    "answer lost",
    "500, carried out",
    "half an answer",
    "wrong bytes",
    "slow",
    "silence, then carried out",
    "silence in an answer",
    "lagging list",
)
EXPIRED = "expired token"
_DATA = re.compile(r"/(checkpoint-\d+/|journal/)")
_ONCE = re.compile(r"(\.probe/)[^/]+")
_LAST_LISTED = re.compile(rb"<Contents>(?!.*<Contents>).*</Contents>", re.DOTALL)


class Hostile(Proxy):
    """Draws for each request whether and how it fails: from the seed, from what is asked for, and from how often that was
    asked for before. However threads are timed, one number gives one run's trouble.

    Args:
        endpoint: of the real server.
        seed: of all draws.
        rate: share of the requests that fail.
        host: address to listen on.
        silence_s: how long a silence lasts.
        expire: makes other credentials be given from now on. Without it no token expires.

    ``drawn`` remembers what each request got: by what was asked, and how often it had been asked before. ``faults`` counts
    what was done, by the names of `FAULTS`.
    """

    def __init__(
        self,
        endpoint: str,
        seed: int,
        rate: float,
        host: str = "127.0.0.1",
        *,
        silence_s: float = 1.0,
        expire: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(endpoint, host)
        self._seed, self.rate, self._silence_s, self._expire = seed, rate, silence_s, expire
        self._kinds = FAULTS if expire is None else (*FAULTS, EXPIRED)
        self._asked: Counter[str] = Counter()
        self.drawn: dict[tuple[str, int], str | None] = {}
        self.faults: Counter[str] = Counter()
        self._lock = threading.Lock()

    def carry(self, exchange: Exchange) -> None:
        """Forwards it, or makes it fail."""
        fault = self._draw(exchange)
        if fault in ("500", "503 SlowDown", "429"):
            names = {"500": "InternalError", "503 SlowDown": "SlowDown", "429": "TooManyRequests"}
            exchange.refuse(int(fault[:3]), names[fault])
        elif fault == "reset":
            exchange.reset()
        elif fault == EXPIRED:
            exchange.refuse(400, "ExpiredToken")
        else:
            if fault == "slow":
                time.sleep(0.3)
            if fault == "silence, then carried out":  # its sender may have given up, and sent it again
                time.sleep(self._silence_s)
            self._answer(exchange, exchange.forward(), fault)

    def _answer(self, exchange: Exchange, answer: Answer, fault: str | None) -> None:
        if fault == "answer lost":
            exchange.reset()
        elif fault == "500, carried out":
            exchange.refuse(500, "InternalError")
        elif fault == "half an answer":
            exchange.answer_in_part(answer)
        elif fault == "wrong bytes":
            middle = len(answer.content) // 2
            damaged = answer.content[:middle] + bytes([answer.content[middle] ^ 1]) + answer.content[middle + 1 :]
            exchange.answer(Answer(answer.status, answer.headers, damaged))
        elif fault == "silence in an answer":
            exchange.answer_with_a_pause(answer, self._silence_s)
        elif fault == "lagging list":
            exchange.answer(Answer(answer.status, answer.headers, _LAST_LISTED.sub(b"", answer.content)))
        else:
            exchange.answer(answer)

    def _draw(self, exchange: Exchange) -> str | None:
        asked = urlsplit(exchange.path)
        query = parse_qs(asked.query)
        listing = "list-type" in query
        details = [query[name][0] for name in ("partNumber", "prefix", "start-after") if name in query]
        what = _ONCE.sub(r"\1…", " ".join([exchange.method, asked.path, *details]))  # probes have names of their own
        with self._lock:
            self._asked[what] += 1
            chance = random.Random(f"{self._seed} {what} {self._asked[what]}")
            fault = chance.choice(self._kinds) if chance.random() < self.rate else None
            read = exchange.method == "GET" and _DATA.search(asked.path)
            if fault in ("half an answer", "wrong bytes", "silence in an answer") and not read:
                fault = "answer lost"
            if fault == "lagging list" and not listing:
                fault = "reset"
            self.drawn[what, self._asked[what]] = fault
            if fault is not None:
                self.faults[fault] += 1
            if fault == EXPIRED and self._expire is not None:
                self._expire()
            return fault


class SlowLink(Proxy):
    """A line to the store that all connections share.

    Args:
        endpoint: of the real server.
        bytes_per_s: upwards; may be changed at any time.
    """

    def __init__(self, endpoint: str, bytes_per_s: float) -> None:
        super().__init__(endpoint)
        self.bytes_per_s = bytes_per_s
        self._lock = threading.Lock()

    def arrived(self, count: int) -> None:
        """One block after the other, whoever sends it."""
        with self._lock:
            time.sleep(count / self.bytes_per_s)
