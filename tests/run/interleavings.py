"""Runs real writers in every order in which their requests can reach a store, with answers that get lost on the way.

Stateless search with visited states: a run follows a prefix of choices and then takes the first choice each time; every
other choice that it passed is a run of its own. A state is what the store holds and what each writer has been told, so a
run that comes to a known one is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from greenlet import getcurrent, greenlet

from hf_spot.errors import StoreUnavailable
from hf_spot.storage.memory import MemoryStore
from hf_spot.storage.store import ObjectInfo, Progress

OK = "ok"
LOST = "carried out, the answer is lost"
FAILED = "not carried out"
LATE = "not carried out yet: it arrives when the writer has given up"


class _Abandoned(BaseException):
    """Ends a writer whose run is of no more interest."""


@dataclass
class _Writer:
    name: str
    told: list[Any] = field(default_factory=list)
    wants: tuple[Any, ...] | None = None  # the request it stands before; None while it runs, or when it is done
    done: bool = False
    thread: greenlet = field(default_factory=greenlet)  # a switch takes a hundredth of what one of threads takes
    outcome: str = OK


class World:
    """One run: its store, its writers, and whose turn it is."""

    def __init__(self, number: int) -> None:
        self.store = MemoryStore(f"memory://world-{number}")
        self.writers: list[_Writer] = []
        self.late: list[tuple[str, bytes]] = []
        self.faults = 0
        self.errors: list[BaseException] = []
        self._abandoned = False
        self._search = getcurrent()
        self._running: _Writer | None = None

    def start(self, name: str, program: Callable[[], None]) -> None:
        """Runs ``program`` as a writer, up to its first request."""
        writer = _Writer(name)
        self.writers.append(writer)

        def body() -> None:
            try:
                program()
            except _Abandoned:
                pass
            except BaseException as error:
                self.errors.append(error)
            writer.done = True

        writer.thread = greenlet(body)
        self._go_on(writer)

    def _go_on(self, writer: _Writer) -> None:
        self._running = writer
        writer.thread.switch()

    @property
    def current(self) -> _Writer:
        """The writer that calls."""
        assert self._running is not None
        return self._running

    def turn(self, *wants: Any) -> str:
        """Called by a writer: stands before a request until the search lets it through."""
        writer = self.current
        writer.wants = wants
        self._search.switch()
        writer.wants = None
        if self._abandoned:
            raise _Abandoned
        return writer.outcome

    def choices(self, max_faults: int) -> list[tuple[int, str]]:
        """Who can go on, and how; -1 is a late request that arrives."""
        found = []
        for index, writer in enumerate(self.writers):
            if writer.done or (writer.wants and writer.wants[0] == "lock" and not writer.wants[1].free_for(writer)):
                continue
            found.append((index, OK))
            if writer.wants and writer.wants[0] == "create" and self.faults < max_faults:
                found += [(index, LOST), (index, FAILED), (index, LATE)]
        return found + ([(-1, OK)] if self.late else [])

    def step(self, index: int, outcome: str) -> None:
        if index < 0:
            self.store.create(*self.late.pop(0))
            return
        writer = self.writers[index]
        self.faults += outcome != OK
        writer.outcome = outcome
        self._go_on(writer)

    def state(self) -> int:
        objects = tuple(sorted((info.key, self.store.get(info.key)) for info in self.store.list()))
        return hash((objects, tuple(repr((w.told, w.wants and w.wants[0], w.done)) for w in self.writers), tuple(self.late)))

    def abandon(self) -> None:
        self._abandoned = True
        for writer in self.writers:
            while not writer.done:
                self._go_on(writer)


class Stepped:
    """The store as the writers see it: an `ObjectStore` whose every request is a step of the search."""

    def __init__(self, world: World) -> None:
        self._world, self._inner, self.url = world, world.store, world.store.url

    def get(self, key: str) -> bytes:
        return self._do(lambda: self._inner.get(key), "get", key)

    def put(self, key: str, data: bytes) -> None:
        self._do(lambda: self._inner.put(key, data), "put", key)

    def create(self, key: str, data: bytes) -> bool:
        return self._do(lambda: self._inner.create(key, data), "create", key, data)

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        return iter(self._do(lambda: [*self._inner.list(prefix, start_after)], "list", prefix, start_after))

    def delete(self, keys: Iterable[str]) -> None:
        names = [*keys]
        self._do(lambda: self._inner.delete(names), "delete", *names)

    def abort(self, stale: Callable[[str], bool]) -> int:
        return 0

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        self._do(lambda: self._inner.put_file(key, path, progress), "put_file", key)

    def get_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        self._do(lambda: self._inner.get_file(key, path, progress), "get_file", key)

    def copy(self, source: str, key: str) -> None:
        self._do(lambda: self._inner.copy(source, key), "copy", key)

    def _do(self, act: Callable[[], Any], *wants: Any) -> Any:
        outcome = self._world.turn(*wants)
        answer: Any = None
        try:
            if outcome in (OK, LOST):
                answer = act()
            elif outcome == LATE:
                self._world.late.append((wants[1], wants[2]))
            if outcome != OK:
                raise StoreUnavailable(outcome)
        except Exception as error:
            answer = repr(error)
            raise
        finally:
            self._world.current.told.append((wants[:2], answer))
        return answer


class SteppedLock:
    """A reentrant lock between writers of one process: waiting for it is a step of the search, too."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._held: list[_Writer] = []

    def free_for(self, writer: _Writer) -> bool:
        return not self._held or self._held[-1] is writer

    def __enter__(self) -> None:
        if not self._held or self._held[-1] is not self._world.current:
            self._world.turn("lock", self)
        self._held.append(self._world.current)

    def __exit__(self, *error: object) -> None:
        self._held.pop()


@dataclass(frozen=True)
class Found:
    """How many runs and states a search had, and the shortest way to what it found wrong."""

    runs: int
    states: int
    wrong: str | None
    way: tuple[str, ...] = ()


def explore(
    begin: Callable[[World], None], wrong: Callable[[World], str | None], *, max_faults: int = 0, max_runs: int = 1_000_000
) -> Found:
    """Every order of the writers' requests.

    Args:
        begin: starts the writers.
        wrong: looks at the store in every state, and says what must not be.
        max_faults: so many creates go wrong in a run, each in every way.
        max_runs: AssertionError beyond that: a search that is cut off has shown nothing.
    """
    seen: set[int] = set()
    prefixes: list[tuple[tuple[int, str], ...]] = [()]
    runs = 0
    while prefixes:
        prefix = prefixes.pop()
        runs += 1
        assert runs <= max_runs, f"more than {max_runs} runs"
        world = World(0)
        world.store.delete([info.key for info in world.store.list()])
        begin(world)
        path: list[tuple[int, str]] = []
        try:
            for choice in prefix:
                world.step(*choice)
                path.append(choice)
            while True:
                state = world.state()
                if len(path) >= len(prefix) and state in seen and path:
                    break
                seen.add(state)
                if world.errors:
                    raise world.errors[0]
                if found := wrong(world):
                    return Found(runs, len(seen), found, _way(world, path))
                choices = world.choices(max_faults)
                if not choices:
                    assert all(writer.done for writer in world.writers), "deadlock"
                    break
                prefixes += [(*path, other) for other in choices[1:]]
                world.step(*choices[0])
                path.append(choices[0])
        finally:
            world.abandon()
    return Found(runs, len(seen), None)


def _way(world: World, path: Sequence[tuple[int, str]]) -> tuple[str, ...]:
    steps: list[str] = []
    counts = [0] * len(world.writers)
    for index, outcome in path:
        if index < 0:
            steps.append("a late create arrives")
            continue
        steps.append(f"{world.writers[index].name} {outcome}")
        counts[index] += 1
    return tuple(steps)
