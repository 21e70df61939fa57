"""The journal's invariants, in every order in which two or three writers' requests can reach the store.

What must hold in every state, whatever was lost on the way:

1. numbers have no gaps, and every entry carries the state that its predecessors lead to;
2. an entry belongs to the newest claim before it, and a claim is one higher than the claim before it;
3. one draft became at most one entry;
4. what a writer was told to stand, stands;
5. the files of every checkpoint of the newest state stand;
6. a writer is told that it is fenced only when a newer claim stands.

The searches here are as deep as CI has time for. Two lost answers (81 231 states) and three launches that all commit (84 240
states) take minutes and have shown nothing more.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from datetime import datetime, timezone

from hf_spot.errors import Fenced, StoreUnavailable
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.journal import Journal, RunState, decode, fold
from hf_spot.run.manifest import FileEntry
from hf_spot.run.run import Run
from hf_spot.storage.store import ObjectStore
from tests.run.interleavings import Found, Stepped, SteppedLock, World, explore

THEN = datetime(2026, 1, 1, tzinfo=timezone.utc)
FILE = FileEntry("model.safetensors", 4, "blake3:" + "0" * 64)


class Told:
    """What the writers of a run were told."""

    def __init__(self) -> None:
        self.standing: list[tuple[int, str, str]] = []  # number, id, who was told
        self.fenced: list[int] = []


class Writer:
    """A process that writes to the run, with every retry that the uploader makes."""

    def __init__(self, store: ObjectStore, told: Told, name: str) -> None:
        ids = (f"{name}-{number}" for number in itertools.count())
        self.run = Run(store)
        self.run.journal = Journal(store, now=lambda: THEN, new_id=lambda: next(ids))
        self.store, self.told, self.name = store, told, name

    def claim(self) -> None:
        entry = self.run.journal.claim({})
        self.told.standing.append((entry.number, entry.id, self.name))

    def commit(self, step: int) -> None:
        request = CommitRequest(step=step)
        self.store.put(f"{request.prefix(self.run.launch)}/{FILE.path}", b"data")
        while True:
            try:
                entry = self.run.commit(request, [FILE], id=f"{self.name}-commit-{step}")
                break
            except StoreUnavailable:
                continue
        self.told.standing.append((entry.number, entry.id, self.name))

    def record(self, kind: str) -> None:
        with contextlib.suppress(StoreUnavailable):
            entry = self.run.record(kind, {})
            self.told.standing.append((entry.number, entry.id, self.name))

    def prune(self, save_total_limit: int) -> None:
        with contextlib.suppress(StoreUnavailable):
            self.run.prune(save_total_limit)


def working(writer: Writer, work: Callable[[Writer], None]) -> Callable[[], None]:
    def program() -> None:
        try:
            work(writer)
        except Fenced:
            writer.told.fenced.append(writer.run.launch)
        except StoreUnavailable:
            pass  # a claim that failed: nothing was started

    return program


decoded = functools.cache(decode)  # the same few entries stand in thousands of states


def wrong(world: World, told: Told) -> str | None:
    objects = {info.key: world.store.get(info.key) for info in world.store.list()}
    entries = [decoded(data) for key, data in objects.items() if key.startswith("journal/")]
    state = RunState()
    for number, entry in enumerate(entries, 1):
        if entry.number != number:
            return f"entry {number} is missing"
        if entry.launch != state.launch + (entry.kind == "claim"):
            return f"entry {number}, a {entry.kind} of launch {entry.launch}, follows launch {state.launch}"
        state = fold(state, number, entry.kind, entry.launch, entry.data)
        if entry.state != state:
            return f"entry {number} does not carry the state after it"
    if len({entry.id for entry in entries}) != len(entries):
        return "a draft became two entries"
    for number, id, name in told.standing:
        if number > len(entries) or entries[number - 1].id != id:
            return f"entry {number} was said to stand"
        if not id.startswith(name):
            return f"{name} was told that {id} is its own"
    for ref in state.checkpoints:
        if f"{ref.prefix}/{FILE.path}" not in objects:
            return f"checkpoint-{ref.step} of launch {ref.launch} is in the run and has lost its files"
    if any(launch >= state.launch for launch in told.fenced):
        return "a writer was fenced by nobody"
    return None


def search(*programs: Callable[[Writer], None], max_faults: int = 0) -> Found:
    told = Told()

    def begin(world: World) -> None:
        told.__init__()  # type: ignore[misc]
        for number, work in enumerate(programs, 1):
            name = f"launch-{number}"
            world.start(name, working(Writer(Stepped(world), told, name), work))

    return explore(begin, lambda world: wrong(world, told), max_faults=max_faults)


def launch(*steps: int, save_total_limit: int = 1) -> Callable[[Writer], None]:
    def work(writer: Writer) -> None:
        writer.claim()
        writer.run.collect_garbage()
        for step in steps:
            writer.commit(step)
            writer.prune(save_total_limit)

    return work


def only_claims(writer: Writer) -> None:
    writer.claim()


def one_commit(writer: Writer) -> None:
    writer.claim()
    writer.commit(10)


def told_of(found: Found, what: str) -> str:
    return f"orders of requests, {what}: {found.runs} orders, {found.states} states, nothing wrong in any"


def test_two_launches_that_commit_prune_and_tidy_up(counted: Callable[[str], None]) -> None:
    found = search(launch(10, 20), launch())
    assert found.wrong is None, found
    counted(told_of(found, "two launches that commit prune and tidy up"))


def test_a_push_beside_a_launch_that_tidies_up(counted: Callable[[str], None]) -> None:
    def push(writer: Writer) -> None:
        if launch := writer.run.state().launch:
            writer.run.adopt(launch)
            writer.commit(10)

    found = search(launch(20), push)
    assert found.wrong is None, found
    counted(told_of(found, "a push beside a launch that tidies up"))


def test_two_launches_whose_answers_are_lost(counted: Callable[[str], None]) -> None:
    found = search(one_commit, one_commit, max_faults=1)
    assert found.wrong is None, found
    counted(told_of(found, "two launches whose answers are lost"))


def test_three_claims_at_once(counted: Callable[[str], None]) -> None:
    found = search(only_claims, only_claims, only_claims)
    assert found.wrong is None, found
    counted(told_of(found, "three claims at once"))


def test_two_threads_of_one_process_share_a_journal(counted: Callable[[str], None]) -> None:
    """The uploader commits and prunes while the training thread tells the journal of notices, and asks how it stands."""
    told = Told()

    def begin(world: World) -> None:
        told.__init__()  # type: ignore[misc]
        writer = Writer(world.store, told, "process")
        writer.claim()
        journal = writer.run.journal
        writer.store = writer.run.store = journal._store = Stepped(world)
        journal._lock = SteppedLock(world)  # type: ignore[assignment]

        def uploader(writer: Writer) -> None:
            writer.commit(10)
            writer.commit(20)
            writer.prune(1)

        def trainer(writer: Writer) -> None:
            writer.record("notice")
            writer.run.state()

        world.start("uploader", working(writer, uploader))
        world.start("trainer", working(writer, trainer))

    found = explore(begin, lambda world: wrong(world, told), max_faults=1)
    assert found.wrong is None, found
    counted(told_of(found, "two threads of one process share a journal"))
