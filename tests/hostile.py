"""A store that is in trouble: a proxy that does to a share of the requests what stores and networks do to them."""

from __future__ import annotations

import random
import re
import threading
import time
from collections import Counter
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
)
_DATA = re.compile(r"/(checkpoint-\d+/|journal/)")


class Hostile(Proxy):
    """Draws for each request whether and how it fails: from the seed, from what is asked for, and from how often that was
    asked for before. However threads are timed, one number gives one run's trouble.

    Args:
        endpoint: of the real server.
        seed: of all draws.
        rate: share of the requests that fail.
        host: address to listen on.

    ``faults`` counts what was done, by the names of `FAULTS`.
    """

    def __init__(self, endpoint: str, seed: int, rate: float, host: str = "127.0.0.1") -> None:
        super().__init__(endpoint, host)
        self._seed, self.rate = seed, rate
        self._asked: Counter[str] = Counter()
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
        else:
            if fault == "slow":
                time.sleep(0.3)
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
        else:
            exchange.answer(answer)

    def _draw(self, exchange: Exchange) -> str | None:
        asked = urlsplit(exchange.path)
        part = parse_qs(asked.query).get("partNumber", [""])[0]
        what = f"{exchange.method} {asked.path} {part}"
        with self._lock:
            self._asked[what] += 1
            chance = random.Random(f"{self._seed} {what} {self._asked[what]}")
            if chance.random() >= self.rate:
                return None
            fault = chance.choice(FAULTS)
            read = exchange.method == "GET" and _DATA.search(asked.path)
            if fault in ("half an answer", "wrong bytes") and not read:
                fault = "answer lost"
            self.faults[fault] += 1
            return fault
