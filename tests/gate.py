"""A proxy that stops the world at a chosen request: before it is carried out, or after."""

from __future__ import annotations

import re
import threading

from tests.proxy import Exchange, Proxy


class Gate(Proxy):
    """Forwards everything, until a request matches `close_at`: that one is held until `let_go`, and `reached` is set."""

    def __init__(self, endpoint: str, host: str = "127.0.0.1") -> None:
        super().__init__(endpoint, host)
        self._pattern: re.Pattern[str] | None = None
        self._body = ""
        self._after = False
        self._skip = 0
        self.reached = threading.Event()
        self._go_on = threading.Event()
        self._stopped = False
        self._lock = threading.Lock()

    def close_at(self, request: str, *, body: str = "", after: bool = False, skip: int = 0) -> None:
        """Arms the gate.

        Args:
            request: regular expression for ``METHOD /path?query``.
            body: must be found in the request's body too.
            after: hold the answer of the request, and not the request.
            skip: so many matching requests pass first.
        """
        self.reached.clear()
        self._go_on.clear()
        with self._lock:
            self._pattern, self._body, self._after, self._skip = re.compile(request), body, after, skip

    def open(self) -> None:
        """Lets everything pass that comes from now on."""
        with self._lock:
            self._pattern = None

    def let_go(self) -> None:
        """Opens, and what is held goes on its way."""
        self.open()
        self._go_on.set()

    def _holds(self, request: str, body: bytes) -> bool:
        with self._lock:
            if self._pattern is None or not self._pattern.search(request) or self._body.encode() not in body:
                return False
            if self._skip:
                self._skip -= 1
                return False
            return True

    def carry(self, exchange: Exchange) -> None:
        """Forwards it, or holds it."""
        held = self._holds(f"{exchange.method} {exchange.path}", exchange.body)
        answer = None if held and not self._after else exchange.forward()
        if held:
            self.reached.set()
            self._go_on.wait()
            if self._stopped:
                return
        exchange.answer(answer or exchange.forward())

    def __exit__(self, *error: object) -> None:
        self._stopped = True
        self._go_on.set()
        super().__exit__(*error)
