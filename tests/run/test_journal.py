"""The journal's invariants, attacked."""

from __future__ import annotations

import json
import threading
import uuid

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hf_spot.errors import ConfigError, CorruptCheckpoint, Fenced, StoreUnavailable
from hf_spot.run.journal import Journal, decode, encode
from hf_spot.run.seal import seal
from hf_spot.storage.memory import MemoryStore
from hf_spot.storage.store import ObjectInfo


def commit(step: int, **more: object) -> dict[str, object]:
    return {
        "step": step,
        "stage": 1,
        "complete": False,
        "prefix": f"e0001/checkpoint-{step}",
        "files": [{"path": "a", "size": 7, "digest": "blake3:" + "0" * 64}],
        **more,
    }


class CountingStore(MemoryStore):
    """A memory store that counts requests and can lose the answers of creates that it carried out."""

    def __init__(self) -> None:
        super().__init__(f"memory://{uuid.uuid4().hex}")
        self.requests = 0
        self.lose_answers = 0

    def get(self, key: str) -> bytes:
        self.requests += 1
        return super().get(key)

    def list(self, prefix: str = "", start_after: str = ""):  # type: ignore[no-untyped-def]
        self.requests += 1
        return super().list(prefix, start_after)

    def create(self, key: str, data: bytes) -> bool:
        made = super().create(key, data)
        if self.lose_answers:
            self.lose_answers -= 1
            raise StoreUnavailable("the answer was lost")
        return made


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(f"memory://{uuid.uuid4().hex}")


def test_a_new_writer_fences_the_old_one(store: MemoryStore) -> None:
    old, new = Journal(store), Journal(store)
    old.claim({})
    old.append("commit", commit(10))
    assert new.claim({}).launch == 2
    with pytest.raises(Fenced) as caught:
        old.append("commit", commit(20))
    assert "launch 2" in str(caught.value)
    assert [ref.step for ref in Journal(store).refresh().checkpoints] == [10]


class LaggingStore(MemoryStore):
    """Its listings show the journal as it was ``lag`` entries ago, while reads and creates are up to date."""

    lag = 3

    def list(self, prefix: str = "", start_after: str = ""):  # type: ignore[no-untyped-def]
        fresh = {f"journal/{number:08d}.json" for number in range(self.newest() - self.lag + 1, self.newest() + 1)}
        return (info for info in super().list(prefix, start_after) if info.key not in fresh)

    def newest(self) -> int:
        return sum(1 for _ in super().list("journal/"))


def test_listings_that_lag_behind_hide_no_entry_and_fence_nobody() -> None:
    store = LaggingStore(f"memory://{uuid.uuid4().hex}")
    old, new = Journal(store), Journal(store)
    old.claim({})
    for step in range(1, 6):
        old.append("commit", commit(step))
        assert old.refresh().latest().step == step  # type: ignore[union-attr]
        assert Journal(store).refresh().latest().step == step  # type: ignore[union-attr]
    assert new.claim({}).number == 7
    assert [ref.step for ref in new.refresh().checkpoints] == [1, 2, 3, 4, 5]
    new.adopt(2)
    with pytest.raises(Fenced):
        old.append("commit", commit(6))


def test_two_processes_of_one_launch_take_turns(store: MemoryStore) -> None:
    launcher, worker = Journal(store), Journal(store)
    launch = launcher.claim({}).launch
    worker.adopt(launch)
    worker.append("commit", commit(10))
    launcher.append("notice", {"kind": "TERMINATE"})
    worker.append("preempted", {"step": 10})
    assert [entry.kind for entry in launcher.entries()] == ["claim", "commit", "notice", "preempted"]
    assert launcher.refresh().ended == "preempted"


def test_adopting_an_old_claim_is_refused(store: MemoryStore) -> None:
    launch = Journal(store).claim({}).launch
    Journal(store).claim({})
    with pytest.raises(Fenced):
        Journal(store).adopt(launch)


def test_a_lost_answer_makes_one_entry_and_not_two() -> None:
    store = CountingStore()
    journal = Journal(store)
    journal.claim({})
    store.lose_answers = 1
    journal.append("commit", commit(10))
    assert [entry.kind for entry in Journal(store).entries()] == ["claim", "commit"]


def test_repeating_a_draft_whose_entry_stands_adds_nothing(store: MemoryStore) -> None:
    journal = Journal(store)
    journal.claim({})
    first = journal.append("commit", commit(10), id="same")
    again = Journal(store)
    again.launch = 1  # has read nothing yet: it tries number 1 and works its way up
    with pytest.raises(Fenced):
        again.append("commit", commit(10), id="other")
    again.adopt(1)
    assert first.number == 2
    assert again.refresh().number == 2


def test_the_tip_of_a_long_journal_is_found_in_four_requests() -> None:
    store = CountingStore()
    journal = Journal(store)
    journal.claim({})
    for step in range(300):
        journal.append("notice", {"step": step})
    store.requests = 0
    assert Journal(store).refresh().number == 301
    assert store.requests <= 4


@pytest.mark.parametrize("hint", [b'{"entry": 999}', b"garbage", b'{"entry": "x"}', b'{"entry": 1}', b"[]"])
def test_a_wrong_hint_never_hides_the_journal(store: MemoryStore, hint: bytes) -> None:
    journal = Journal(store)
    journal.claim({})
    journal.append("commit", commit(10))
    store.put("tip.json", hint)
    assert Journal(store).refresh().number == 2


def test_sixteen_claims_at_once_get_sixteen_epochs_and_one_owner(store: MemoryStore) -> None:
    journals = [Journal(store) for _ in range(16)]
    gate = threading.Barrier(16)

    def claim(journal: Journal) -> None:
        gate.wait()
        journal.claim({})

    threads = [threading.Thread(target=claim, args=(journal,)) for journal in journals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(journal.launch for journal in journals) == list(range(1, 17))
    owners = 0
    for journal in journals:
        try:
            journal.append("commit", commit(1))
            owners += 1
        except Fenced:
            continue
    assert owners == 1


def test_the_best_mark_moves_with_the_best_step(store: MemoryStore) -> None:
    journal = Journal(store)
    journal.claim({})
    journal.append("commit", commit(10, best_step=10))
    journal.append("commit", commit(20, best_step=10))
    assert [ref.best for ref in journal.state.checkpoints] == [True, False]
    journal.append("commit", commit(30, best_step=30))
    assert [ref.best for ref in journal.state.checkpoints] == [False, False, True]


def test_an_older_checkpoint_that_is_committed_after_a_newer_one_stays_the_older_one(store: MemoryStore) -> None:
    journal = Journal(store)
    journal.claim({})
    for step in (10, 30, 20):
        journal.append("commit", commit(step, best_step=20))
    assert [(ref.step, ref.best) for ref in journal.state.checkpoints] == [(10, False), (20, True), (30, False)]
    journal.claim({})
    journal.append("commit", {**commit(5), "prefix": "e0002/checkpoint-5"})  # it could not restore the others
    assert [ref.step for ref in journal.state.checkpoints] == [10, 20, 30, 5]
    for step in (40, 4):
        journal.append("commit", {**commit(step), "prefix": f"e0002/pushed/checkpoint-{step}", "reason": "push"})
    journal.append("commit", {**commit(6), "prefix": "e0002/checkpoint-6"})
    assert [ref.step for ref in Journal(store).refresh().checkpoints] == [10, 20, 30, 5, 40, 4, 6]


def test_an_entry_of_a_newer_format_asks_for_an_upgrade(store: MemoryStore) -> None:
    entry = Journal(store).claim({})
    written = json.loads(encode(entry)) | {"format": 99}
    written.pop("seal")
    with pytest.raises(ConfigError, match="upgrade"):
        decode(seal(written, None))


@pytest.mark.parametrize("data", [b"", b"null", b"{}", b'{"format": 1}', b"\xff\xfe"])
def test_bytes_that_are_no_entry_are_called_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptCheckpoint):
        decode(data)


class Interleavings(RuleBasedStateMachine):
    """Three writers claim, commit, lose answers and wake up stale, in any order."""

    @initialize()
    def start(self) -> None:
        self.store = CountingStore()
        self.store.requests = 0
        self.writers = [Journal(self.store) for _ in range(3)]

    @rule(who=st.integers(0, 2), lost=st.booleans())
    def claim(self, who: int, lost: bool) -> None:
        self.store.lose_answers = int(lost)
        self.writers[who].claim({"who": who})
        self.store.lose_answers = 0

    @rule(who=st.integers(0, 2), step=st.integers(1, 50), lost=st.booleans())
    def commit(self, who: int, step: int, lost: bool) -> None:
        writer = self.writers[who]
        owner = Journal(self.store).refresh().launch
        self.store.lose_answers = int(lost)
        try:
            entry = writer.append("commit", commit(step))
            assert entry.launch == writer.launch == owner
        except Fenced:
            assert writer.launch != owner
        finally:
            self.store.lose_answers = 0

    @rule(who=st.integers(0, 2))
    def prune(self, who: int) -> None:
        writer = self.writers[who]
        refs = writer.state.checkpoints
        if refs:
            try:
                writer.append("prune", {"entries": [refs[0].entry]})
            except Fenced:
                return

    @invariant()
    def the_journal_is_whole(self) -> None:
        entries = list(Journal(self.store).entries())
        assert [entry.number for entry in entries] == list(range(1, len(entries) + 1))
        launches = [entry.launch for entry in entries]
        assert launches == sorted(launches)
        assert len({entry.id for entry in entries}) == len(entries)
        standing: list[tuple[int, int, int]] = []
        for entry in entries:
            if entry.kind == "commit":
                standing.append((entry.launch, entry.data["step"], entry.number))
            elif entry.kind == "prune":
                standing = [one for one in standing if one[-1] not in entry.data["entries"]]
            assert [ref.entry for ref in entry.state.checkpoints] == [number for *_, number in sorted(standing)]


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_object_info_is_what_the_journal_reads(store: MemoryStore) -> None:
    Journal(store).claim({})
    assert list(store.list("journal/")) == [ObjectInfo("journal/00000001.json", len(store.get("journal/00000001.json")))]


@pytest.mark.parametrize("quick_s", [0.0, 1e9], ids=["a slow store", "a quick store"])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 100])
def test_entries_are_read_once_and_in_order_however_quick_the_store_is(
    quick_s: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_spot.run.journal._QUICK_S", quick_s)
    store = CountingStore()
    journal = Journal(store)
    journal.claim({})
    for step in range(1, count):
        journal.append("commit", commit(step))
    journal.refresh()
    before = store.requests
    assert [entry.number for entry in journal.entries()] == list(range(1, count + 1))
    assert store.requests - before <= count + 4  # finding the end takes some
    assert list(Journal(MemoryStore(f"memory://{uuid.uuid4().hex}")).entries()) == []
