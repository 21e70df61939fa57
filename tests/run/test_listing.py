"""``runs ls`` of many runs: how many requests it takes, and that what is remembered is never shown in place of what is."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from hf_spot.run import below, remembered
from hf_spot.run.below import Summary, find_runs
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.copies import copy_run, delete_run
from hf_spot.run.run import Run
from hf_spot.storage.s3 import S3Store
from tests.servers import SeaweedFS
from tests.waiting import wait_for

Make = Callable[[int], Path]
LATER = datetime.now(timezone.utc) + timedelta(hours=1)


@pytest.fixture(autouse=True)
def own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every request that stores in buckets make."""
    made: list[str] = []
    for name in ("get", "put", "create"):
        real = getattr(S3Store, name)

        def call(self: S3Store, *args: Any, name: str = name, real: Any = real) -> Any:
            made.append(f"{name} {args[0]}")
            return real(self, *args)

        monkeypatch.setattr(S3Store, name, call)
    pages = S3Store._answers

    def answers(self: S3Store, wanted: str, *args: Any) -> Iterator[Any]:
        for page in pages(self, wanted, *args):
            made.append(f"list {wanted}")
            yield page

    monkeypatch.setattr(S3Store, "_answers", answers)
    return made


def made(url: str, make_checkpoint: Make, *steps: int, ended: str | None = "preempted") -> Run:
    run = Run(url)
    run.claim({"by": "test"})
    for step in steps:
        request = CommitRequest(step=step, details={"max_steps": 20})
        run.commit(request, run.upload(make_checkpoint(step), request))
    if ended is not None:
        run.record(ended, {"step": max(steps, default=0)})
    return run


def shown(one: Summary) -> tuple[str, str, int]:
    return one.name, one.in_words, one.step


def listed(url: str, **more: Any) -> list[tuple[str, str, int]]:
    """What a listing shows, which must be what is there."""
    found = find_runs(url, LATER)
    for one in found:
        state = Run(one.url).state()
        newest = state.latest()
        assert one.state is not None and (one.state.number, one.state.launch, one.state.ended) == (
            state.number,
            state.launch,
            state.ended,
        )
        assert one.step == (newest.step if newest else 0)
    return [shown(one) for one in found]


@pytest.mark.parametrize(("count", "most"), [(24, 3), pytest.param(1000, 18, marks=pytest.mark.proof)])
def test_a_thousand_runs_take_a_dozen_requests(
    count: int, most: int, s3_url: str, seaweedfs: SeaweedFS, make_checkpoint: Make, requests: list[str]
) -> None:
    first = made(f"{s3_url}/run-0001", make_checkpoint, 5, 10, ended="finished")
    bucket, base = urlsplit(s3_url).netloc, urlsplit(s3_url).path.lstrip("/")
    # A checkpoint has many files in a folder per launch; one is enough to be listed as a group.
    of_a_run = re.compile(r"journal/|tip\.json|e0001/checkpoint-10/trainer_state")
    kept = [info.key for info in first.store.list() if of_a_run.match(info.key)]
    objects = {key: first.store.get(key) for key in kept}
    client = seaweedfs.client()

    def copy(number: int) -> None:
        for key, data in objects.items():
            name = f"{base}/run-{number:04d}/{key}".lstrip("/")
            client.put_object(Bucket=bucket, Key=name, Body=data)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(copy, range(2, count + 1)))
    requests.clear()
    assert len(find_runs(s3_url, LATER)) == count
    assert len(requests) <= 2 * count + 3 * most
    requests.clear()
    again = find_runs(s3_url, LATER)
    assert {(one.in_words, one.step, one.max_steps) for one in again} == {("finished", 10, 20)} and len(again) == count
    assert len(requests) <= most, requests  # a listing for each 1000 keys and groups, and one for each name with two zeros
    Run(f"{s3_url}/run-0020").claim({"by": "test"})
    requests.clear()
    assert [one.name for one in find_runs(s3_url, LATER) if one.in_words == "not ended"] == ["run-0020"]
    assert len(requests) <= most + 8, requests


def test_what_is_remembered_is_used_and_only_if_nothing_has_changed(
    s3_url: str, make_checkpoint: Make, requests: list[str]
) -> None:
    names = ["e100/deep-00", "exp-001", "plain", "run00journal/000"]
    for name in names:
        made(f"{s3_url}/{name}", make_checkpoint, 5, ended="finished")
    expected = [(name, "finished", 5) for name in names]
    assert listed(s3_url) == expected
    requests.clear()
    assert [shown(one) for one in find_runs(s3_url, LATER)] == expected
    assert [one for one in requests if not one.startswith("list ")] == []

    run = Run(f"{s3_url}/plain")
    run.claim({"by": "test"})  # a new launch
    assert listed(s3_url)[2] == ("plain", "not ended", 5)
    run.record("preempted", {"step": 5})
    assert listed(s3_url)[2] == ("plain", "preempted", 5)
    Run(f"{s3_url}/plain").push(make_checkpoint(7))  # by hand, beside a launch that has ended
    assert listed(s3_url)[2] == ("plain", "preempted", 7)
    copy_run(Run(f"{s3_url}/plain"), Run(f"{s3_url}/other"))
    delete_run(Run(f"{s3_url}/exp-001"))
    assert [name for name, *_ in listed(s3_url)] == ["e100/deep-00", "other", "plain", "run00journal/000"]
    made(f"{s3_url}/exp-001", make_checkpoint, 9, ended="failed")
    assert listed(s3_url)[1] == ("exp-001", "failed", 9)


@pytest.mark.parametrize("lost", ["tip", "claim"])
def test_a_launch_that_dies_at_its_claim_is_not_hidden(
    lost: str, s3_url: str, make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(f"{s3_url}/a", make_checkpoint, 5)
    assert listed(s3_url) == listed(s3_url) == [("a", "preempted", 5)]
    wrote_s = int(time.time())
    wait_for(lambda: int(time.time()) > wrote_s)  # a server tells seconds, and what is remembered is a minute old otherwise
    run, real, writes = Run(f"{s3_url}/a"), S3Store.put, []

    def put(self: S3Store, key: str, data: bytes) -> None:
        if key == "tip.json":
            writes.append(key)
            if len(writes) == 2:  # the one after the claim
                raise KeyboardInterrupt
        real(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(S3Store, "put", put)
        if lost == "claim":
            patch.setattr(S3Store, "create", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run.claim({"by": "test"})
    assert listed(s3_url) == [("a", "preempted" if lost == "claim" else "not ended", 5)]


def test_what_was_just_written_is_not_remembered(s3_url: str, make_checkpoint: Make) -> None:
    made(f"{s3_url}/a", make_checkpoint, 5)
    find_runs(s3_url)
    assert remembered.recall(s3_url) == {}
    find_runs(s3_url, LATER)
    assert [*remembered.recall(s3_url)] == ["a"]


def test_a_damaged_memory_is_none(s3_url: str, make_checkpoint: Make) -> None:
    made(f"{s3_url}/a", make_checkpoint, 5)
    find_runs(s3_url, LATER)
    path = remembered.path_of(s3_url)
    told = json.loads(path.read_text())
    told["runs"][0]["step"] = "5"
    for damaged in ("", "{}", "[]", "nan", "\0", json.dumps({"format": 1, "url": s3_url, "runs": [{}]}), json.dumps(told)):
        path.write_text(damaged)
        assert remembered.recall(s3_url) == {}
    assert listed(s3_url) == [("a", "preempted", 5)]


def test_a_journal_with_a_key_is_always_read(
    s3_url: str, make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch, requests: list[str]
) -> None:
    monkeypatch.setenv("HF_SPOT_JOURNAL_KEY", "k" * 64)
    made(f"{s3_url}/a", make_checkpoint, 5)
    find_runs(s3_url, LATER)
    requests.clear()
    assert [shown(one) for one in find_runs(s3_url, LATER)] == [("a", "preempted", 5)]
    assert any(re.match(r"get journal/", one) for one in requests)


def test_many_other_names_with_zeros_are_listed_as_before(
    s3_url: str, make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(below, "_LOOKS", 3)
    made(f"{s3_url}/a", make_checkpoint, 5)
    data = Run(f"{s3_url}/data").store
    for number in range(1, 8):
        data.put(f"x{number}/shard-{number}-of-00007", b"")
    assert listed(s3_url) == [("a", "preempted", 5)]
    monkeypatch.setattr(below, "_LOOKS", 60)
    assert listed(s3_url) == [("a", "preempted", 5)]
