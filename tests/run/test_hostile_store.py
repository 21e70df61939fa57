"""Through a proxy that fails a quarter of all requests, before a real S3 server: nothing is lost, and nobody is fooled.

One number replays a test's trouble: the seed, with the name of the run.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import pytest

from hf_spot.errors import StoreError
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.manifest import files_in
from hf_spot.run.run import Run
from hf_spot.run.upload import Uploader
from hf_spot.storage.open import open_store
from tests.hostile import Hostile
from tests.proxy import Answer, Exchange, Proxy
from tests.servers import KeyServer, SeaweedFS

T = TypeVar("T")
LAUNCHES, SAVES, PATIENCE_S = 3, 4, 60.0


def persistent(act: Callable[[], T]) -> T:
    """A user, or a scheduler, that starts the same command again."""
    for _ in range(20):
        try:
            return act()
        except StoreError:
            continue
    return act()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch, s3_url: str) -> None:
    """How long to wait between tries is botocore's business and ours; only that there are tries matters here."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0.0)
    monkeypatch.setattr("hf_spot.run.upload._FIRST_RETRY_S", 0.01)
    monkeypatch.setattr("hf_spot.storage.s3_connection._FIRST_SILENCES_S", (0.5, 1.0, 2.0))


@pytest.fixture
def keys(seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch, at_once: None) -> Iterator[KeyServer]:
    """Credentials come from somebody who may give others."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with KeyServer(seaweedfs.access_key, seaweedfs.secret_key) as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        yield server


def hostile_to(seaweedfs: SeaweedFS, keys: KeyServer, seed: int) -> Hostile:
    def expire() -> None:
        old = seaweedfs.access_key
        keys.access_key = f"{old}2" if keys.access_key == old else old

    return Hostile(seaweedfs.endpoint, seed, rate=0.25, silence_s=0.7, expire=expire)


@pytest.mark.parametrize("seed", range(3))
def test_launch_after_launch_goes_on_from_the_last_save(
    seed: int,
    seaweedfs: SeaweedFS,
    keys: KeyServer,
    make_checkpoint: Callable[[int, Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"s3://tests/hostile-{seed}"
    step = 0
    with hostile_to(seaweedfs, keys, seed) as hostile:
        monkeypatch.setenv("AWS_ENDPOINT_URL", hostile.endpoint)
        for launch in range(LAUNCHES):
            machine = tmp_path / f"machine-{launch}"
            run = Run(url)
            persistent(run.claim)
            newest = persistent(run.latest)
            assert (newest.step if newest else 0) == step
            if newest:
                restored = persistent(lambda run=run, machine=machine: run.pull(machine))
                saved = tmp_path / f"machine-{launch - 1}" / newest.name
                assert {name: (restored / name).read_bytes() for name in files_in(restored)} == {
                    name: (saved / name).read_bytes() for name in files_in(saved)
                }
            uploader = Uploader(run, machine / "pins", save_total_limit=2)
            for _ in range(SAVES):
                step += 5
                uploader.submit(make_checkpoint(step, machine), CommitRequest(step=step))
                assert uploader.drain(PATIENCE_S), uploader.trouble
            uploader.close()
        assert hostile.faults.total() > 40, hostile.faults

    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweedfs.endpoint)
    run = Run(url)
    run.claim()
    run.collect_garbage()
    assert [ref.step for ref in run.state().checkpoints] == [step - 5, step]
    assert all(problems == [] for problems in run.verify().values())
    steps = [entry.data["step"] for entry in run.events() if entry.kind == "commit"]
    assert steps == list(range(5, step + 5, 5))
    wanted = {f"{c.ref.prefix}/{file.path}" for c in run.checkpoints() for file in c.files}
    assert {info.key for info in run.store.list("e")} == wanted


class Once(Proxy):
    """The first answer to each request of one method is lost, or damaged; the second is as it should be."""

    def __init__(self, endpoint: str, method: str) -> None:
        super().__init__(endpoint)
        self.method = method
        self.hit: set[str] = set()
        self.statuses: list[tuple[str, int]] = []

    def carry(self, exchange: Exchange) -> None:
        answer = exchange.forward()
        self.statuses.append((exchange.path, answer.status))
        if exchange.method != self.method or exchange.path in self.hit or (not answer.content and self.method == "GET"):
            exchange.answer(answer)
            return
        self.hit.add(exchange.path)
        if self.method == "GET":
            exchange.answer(Answer(answer.status, answer.headers, answer.content[:-9] + b"?" + answer.content[-8:]))
        else:
            exchange.reset()


@pytest.mark.parametrize("validation", ["when_supported", "when_required"])
def test_what_is_damaged_on_the_way_is_asked_for_again(
    validation: str,
    seaweedfs: SeaweedFS,
    s3_url: str,
    make_checkpoint: Callable[[int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """boto3 finds damage itself in what was put in one piece and is read whole; the rest is ours to find."""
    Run(s3_url).push(make_checkpoint(5))
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", validation)
    with Once(seaweedfs.endpoint, "GET") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        pulled = Run(s3_url).pull(tmp_path / "pulled")
        assert {name.rpartition("/")[2] for name in proxy.hit} >= {"00000002.json", "model.safetensors", "optimizer.pt"}
    assert (pulled / "model.safetensors").read_bytes() == (tmp_path / "out/checkpoint-5/model.safetensors").read_bytes()


def test_a_run_whose_every_answer_is_lost_once_is_claimed_at_the_first_try(
    seaweedfs: SeaweedFS, s3_url: str, make_checkpoint: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Once(seaweedfs.endpoint, "PUT") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        run = Run(s3_url)
        assert run.claim() == 1
        run.push(make_checkpoint(5))
        assert len(proxy.hit) > 8
        # The server itself refuses what botocore sends again: the claim, and the commit. That is our own success.
        refused = [path.rpartition("/")[2] for path, status in proxy.statuses if status == 412 and "/journal/" in path]
        assert refused == ["00000001.json", "00000002.json"]
        assert [entry.kind for entry in run.events()] == ["claim", "commit"]


def test_one_number_replays_a_run(
    seaweedfs: SeaweedFS,
    keys: KeyServer,
    make_checkpoint: Callable[[int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every request gets the same trouble again, although eight threads send them in whatever order."""
    folder = make_checkpoint(5)

    def train(seed: int, time: int) -> dict[tuple[str, int], str | None]:
        keys.access_key = seaweedfs.access_key
        with hostile_to(seaweedfs, keys, seed) as hostile:
            monkeypatch.setenv("AWS_ENDPOINT_URL", hostile.endpoint)
            run = Run("s3://tests/replayed")
            persistent(run.claim)
            persistent(lambda: run.push(folder))
            persistent(lambda: run.pull(tmp_path / f"pulled-{time}"))
        monkeypatch.setenv("AWS_ENDPOINT_URL", seaweedfs.endpoint)
        store = open_store("s3://tests/replayed")
        store.delete([info.key for info in store.list()])
        return hostile.drawn

    first, again, other = train(1, 1), train(1, 2), train(2, 3)
    same = first.keys() & again.keys()  # how often a request is repeated while a store is silent is up to the clock
    assert len(same) > 0.8 * len(first)
    assert {request: first[request] for request in same} == {request: again[request] for request in same}
    assert any(first[request] for request in same)
    assert any(first[request] != other[request] for request in first.keys() & other.keys())


class Lagging(Proxy):
    """Its listings show what was there some writes ago; everything else is up to date."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.written: list[str] = []
        self.lag = 6
        self.hidden = 0
        self._lock = threading.Lock()

    def carry(self, exchange: Exchange) -> None:
        """Forwards it, and takes the newest keys out of a listing."""
        answer = exchange.forward()
        path = urlsplit(exchange.path).path
        with self._lock:
            if exchange.method == "PUT" and answer.status == 200:
                self.written.append(path.removeprefix("/tests/"))
            fresh = set(self.written[-self.lag :])
        if "list-type=2" in exchange.path:
            entries = re.findall(rb"<Contents>.*?</Contents>", answer.content, re.DOTALL)
            content = answer.content
            for entry in entries:
                key = re.search(rb"<Key>(.*?)</Key>", entry)
                # A probe looks until it sees what it wrote.
                if key and key[1].decode() in fresh and b".probe/" not in key[1]:
                    content = content.replace(entry, b"")
                    self.hidden += 1
            answer = Answer(answer.status, answer.headers, content)
        exchange.answer(answer)


def test_listings_that_lag_behind_fence_nobody_lose_nothing_and_delete_nothing_that_lives(
    seaweedfs: SeaweedFS,
    s3_url: str,
    make_checkpoint: Callable[[int, Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Lagging(seaweedfs.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        for launch in (1, 2):
            run = Run(s3_url)
            assert run.claim() == launch
            newest = run.latest()
            assert (newest.step if newest else 0) == 10 * (launch - 1)
            uploader = Uploader(run, tmp_path / f"pins-{launch}", save_total_limit=2)
            for step in (10 * launch - 5, 10 * launch):
                uploader.submit(make_checkpoint(step, tmp_path / str(launch)), CommitRequest(step=step))
                assert uploader.drain(PATIENCE_S), uploader.trouble
                assert Run(s3_url).latest().step == step  # type: ignore[union-attr]
            uploader.close()
            assert uploader.fenced is None
        assert proxy.hidden > 10
    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweedfs.endpoint)
    run = Run(s3_url)
    assert [ref.step for ref in run.state().checkpoints] == [15, 20]
    assert all(problems == [] for problems in run.verify().values())
    # What could not be seen when it should have gone is found by the next launch.
    run.claim()
    run.collect_garbage()
    wanted = {f"{c.ref.prefix}/{file.path}" for c in run.checkpoints() for file in c.files}
    assert {info.key for info in run.store.list("e")} == wanted
