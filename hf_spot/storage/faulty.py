"""FaultyStore: any store, with errors on demand, for tests, for the demo, and for users who want to see the effect."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hf_spot.errors import StoreUnavailable
from hf_spot.storage.store import ObjectInfo, ObjectStore, Progress, fences, ranges_of


def _unavailable() -> Exception:
    return StoreUnavailable("injected: the store did not answer")


@dataclass(frozen=True)
class Fault:
    """One way in which calls fail.

    Args:
        method: name of an `ObjectStore` method, ``get_range``, or ``*``.
        key: pattern (`fnmatch`) for the key; for `list` its prefix; for `delete` any of its keys.
        occurrence: only the n-th matching call fails, counted from 1; 0 means every call.
        probability: that such a call fails; drawn from the store's seed, and independent of the timing of threads.
        answer_lost: the call is carried out first, and then fails.
        error: makes the exception to raise; None raises nothing (to wait only).
        until: the call first waits for this event.
    """

    method: str = "*"
    key: str = "*"
    occurrence: int = 1
    probability: float = 1.0
    answer_lost: bool = False
    error: Callable[[], Exception] | None = _unavailable
    until: threading.Event | None = field(default=None, repr=False)


class FaultyStore:
    """An `ObjectStore` around another one.

    While ``outage`` is True, every call fails with `StoreUnavailable`, including transfers under way. ``calls`` lists
    (method, key) of every call so far.

    Args:
        inner: the store that does the work.
        faults: the faults to inject; the first that applies to a call is used.
        seed: for ``probability``.
    """

    def __init__(self, inner: ObjectStore, faults: Iterable[Fault] = (), *, seed: int = 0) -> None:
        self.inner = inner
        self.faults = list(faults)
        self.seed = seed
        self.outage = False
        self.calls: list[tuple[str, str]] = []
        self._seen: Counter[object] = Counter()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Return the inner store's URL."""
        return self.inner.url

    @property
    def fences(self) -> bool:
        """Return whether the inner store fences."""
        return fences(self.inner)

    def get(self, key: str) -> bytes:
        """Call the inner store, or fail."""
        after = self._enter("get", key)
        data = self.inner.get(key)
        after()
        return data

    def __getattr__(self, name: str) -> Any:
        """Return `get_range`, which calls the inner store or fails, if the inner store can read ranges."""
        inner = ranges_of(self.__dict__["inner"]) if name == "get_range" and "inner" in self.__dict__ else None
        if inner is None:
            raise AttributeError(name)

        def get_range(key: str, first: int, count: int) -> bytes:
            after = self._enter("get_range", key)
            data = inner(key, first, count)
            after()
            return data

        return get_range

    def put(self, key: str, data: bytes) -> None:
        """Call the inner store, or fail."""
        after = self._enter("put", key)
        self.inner.put(key, data)
        after()

    def create(self, key: str, data: bytes) -> bool:
        """Call the inner store, or fail."""
        after = self._enter("create", key)
        made = self.inner.create(key, data)
        after()
        return made

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Call the inner store, or fail."""
        after = self._enter("put_file", key)
        self.inner.put_file(key, path, self._watched(progress))
        after()

    def get_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Call the inner store, or fail."""
        after = self._enter("get_file", key)
        self.inner.get_file(key, path, self._watched(progress))
        after()

    def copy(self, source: str, key: str) -> None:
        """Call the inner store, or fail. A fault's pattern is matched with ``key``, not with ``source``."""
        after = self._enter("copy", key)
        self.inner.copy(source, key)
        after()

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        """Call the inner store, or fail at the first item."""
        after = self._enter("list", prefix)
        for info in self.inner.list(prefix, start_after):
            self._check_outage()
            yield info
        after()

    def delete(self, keys: Iterable[str]) -> None:
        """Call the inner store, or fail."""
        gone = [*keys]
        after = self._enter("delete", *gone)
        self.inner.delete(gone)
        after()

    def abort(self, stale: Callable[[str], bool]) -> int:
        """Call the inner store, or fail."""
        after = self._enter("abort", "")
        count = self.inner.abort(stale)
        after()
        return count

    def _enter(self, method: str, *keys: str) -> Callable[[], None]:
        """Fail now, or return a function to call once the work is done."""
        with self._lock:
            self.calls.extend((method, key) for key in keys)
            fault = self._fault_for(method, keys)
        if fault is not None and fault.until is not None:
            fault.until.wait()
        self._check_outage()
        if fault is None or fault.error is None:
            return self._check_outage
        error = fault.error()
        if not fault.answer_lost:
            raise error

        def lose_answer() -> None:
            raise error

        return lose_answer

    def _fault_for(self, method: str, keys: tuple[str, ...]) -> Fault | None:
        chosen = None
        for index, fault in enumerate(self.faults):
            hit = [key for key in keys if fnmatchcase(key, fault.key)]
            if fault.method not in ("*", method) or not hit:
                continue
            self._seen[index] += 1
            self._seen[index, method, hit[0]] += 1
            draw = random.Random(f"{self.seed} {index} {method} {hit[0]} {self._seen[index, method, hit[0]]}").random()
            if chosen is None and fault.occurrence in (0, self._seen[index]) and draw < fault.probability:
                chosen = fault
        return chosen

    def _watched(self, progress: Progress | None) -> Progress:
        def report(count: int) -> None:
            self._check_outage()
            if progress is not None:
                progress(count)

        return report

    def _check_outage(self) -> None:
        if self.outage:
            raise StoreUnavailable("injected: the store is out")
