"""What only the stores on the Hugging Face Hub do: commits that are few and fence, and errors that name their repair."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hf_spot.errors import AccessDenied, BucketNotFound, ConfigError, Fenced, StoreNotFencing, StoreUnavailable
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.run import Run
from hf_spot.storage import hub_connection
from hf_spot.storage.open import open_store
from hf_spot.storage.probe import probe
from tests.storage.fake_http import Answer
from tests.storage.fake_hub import READER, FakeHub, Repo
from tests.waiting import PATIENCE_S


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_connection, "_WAITS_S", (0.01, 0.02))


def repo_of(hub: FakeHub, url: str) -> Repo:
    return hub.repos["models/" + "/".join(url.removeprefix("hf://").split("/")[:2])]


def run_one_checkpoint(run: Run, folder: Path, step: int) -> None:
    request = CommitRequest(step=step)
    run.commit(request, run.upload(folder, request))


def test_files_on_their_way_at_the_same_time_are_one_commit_and_the_journal_takes_two(
    logged_in: FakeHub, hub_repo_url: str, make_checkpoint: Callable[[int], Path]
) -> None:
    run, repo, gate = Run(hub_repo_url, workers=6), repo_of(logged_in, hub_repo_url), threading.Barrier(6)
    run.claim()
    before = len(repo.commits)
    ask = run.store.hub.ask  # type: ignore[attr-defined]

    def meet(method: str, url: str, **request: object) -> object:
        if "/preupload/" in url:
            gate.wait(PATIENCE_S)  # all six files have begun before one has arrived
        return ask(method, url, **request)

    run.store.hub.ask = meet  # type: ignore[attr-defined]

    run_one_checkpoint(run, make_checkpoint(5), 5)

    # The files, the journal's entry, and the hint where the newest entry is.
    assert len(repo.commits) - before == 1 + 2


def test_a_run_goes_on_from_its_checkpoint_and_an_older_launch_is_fenced(
    hub_repo_url: str, make_checkpoint: Callable[[int], Path], tmp_path: Path
) -> None:
    first, second = Run(hub_repo_url), Run(hub_repo_url)
    first.claim()
    run_one_checkpoint(first, make_checkpoint(5), 5)

    second.claim()
    folder = second.pull(tmp_path / "new")

    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "out/checkpoint-5/model.safetensors").read_bytes()
    with pytest.raises(Fenced):
        run_one_checkpoint(first, make_checkpoint(6), 6)
    assert [ref.step for ref in second.state().checkpoints] == [5]


def test_a_create_whose_answer_is_lost_is_found_to_be_ones_own(logged_in: FakeHub, hub_repo_url: str) -> None:
    run = Run(hub_repo_url)
    run.claim()
    logged_in.lose_answers.append("/commit/")

    entry = run.record("notice", {"said": "once"})

    assert [one.number for one in run.events()] == [1, entry.number] == [1, 2]


def test_a_create_goes_on_when_others_commit_something_else_in_between(logged_in: FakeHub, hub_repo_url: str) -> None:
    store, repo = open_store(hub_repo_url), repo_of(logged_in, hub_repo_url)
    ask = store.hub.ask  # type: ignore[attr-defined]
    came = []

    def interfere(method: str, url: str, **request: object) -> object:
        if "/commit/" in url and len(came) < 2:
            came.append(repo.add_commit("somebody else's"))
        return ask(method, url, **request)

    store.hub.ask = interfere  # type: ignore[attr-defined]

    assert store.create("journal/1", b"mine") is True
    assert len(came) == 2 and store.get("journal/1") == b"mine"


def test_what_threads_write_at_the_same_time_is_one_commit(logged_in: FakeHub, hub_repo_url: str) -> None:
    store, repo = open_store(hub_repo_url), repo_of(logged_in, hub_repo_url)
    before, gate = len(repo.commits), threading.Barrier(8)
    ask = store.hub.ask  # type: ignore[attr-defined]

    def slowly(method: str, url: str, **request: object) -> object:
        if "/commit/" in url and len(repo.commits) == before:
            gate.wait(10)  # the first commit takes until all others are waiting
        return ask(method, url, **request)

    store.hub.ask = slowly  # type: ignore[attr-defined]

    def write(number: int) -> None:
        if number:
            gate.wait(10)
        store.put(f"e0001/{number}", b"x")

    with ThreadPoolExecutor(8) as pool:
        [*pool.map(write, range(8))]

    assert [info.key for info in store.list()] == [f"e0001/{number}" for number in range(8)]
    assert len(repo.commits) - before <= 4


def test_a_copy_moves_no_bytes(logged_in: FakeHub, hub_repo_url: str, hub_bucket_url: str, tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    source.write_bytes(b"\0" * 100_000)
    for url in (hub_repo_url, hub_bucket_url):
        store = open_store(url)
        store.put_file("e0001/model", source)
        before = logged_in.count("xet-write-token"), logged_in.count("/resolve/")

        store.copy("e0001/model", "e0002/model")

        assert (logged_in.count("xet-write-token"), logged_in.count("/resolve/")) == before
        store.get_file("e0002/model", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_of_a_file_that_has_changed_a_little_only_a_little_travels(
    logged_in: FakeHub, hub_repo_url: str, hub_bucket_url: str, tmp_path: Path
) -> None:
    source = tmp_path / "model.safetensors"
    for url in (hub_repo_url, hub_bucket_url):
        store, data = open_store(url), os.urandom(3_000_000)
        source.write_bytes(data)
        store.put_file("e0001/model", source)
        before = logged_in.xet.received_bytes
        source.write_bytes(data[:1_500_000] + b"changed" + data[1_500_000:])

        store.put_file("e0002/model", source)

        assert logged_in.xet.received_bytes - before < 500_000
        store.get_file("e0002/model", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_a_bucket_is_refused_unless_its_risk_is_accepted(
    hub_bucket_url: str, make_checkpoint: Callable[[int], Path], tmp_path: Path
) -> None:
    with pytest.raises(StoreNotFencing, match="no create-if-absent") as caught:
        Run(hub_bucket_url).claim()
    assert "--allow-unfenced-store" in caught.value.hint

    first, second = (Run(hub_bucket_url, allow_unfenced_store=True) for _ in range(2))
    first.claim()
    run_one_checkpoint(first, make_checkpoint(5), 5)
    second.claim()
    assert second.pull(tmp_path / "new").name == "checkpoint-5"
    with pytest.raises(Fenced):  # one after the other they are still kept apart
        run_one_checkpoint(first, make_checkpoint(6), 6)


def test_what_the_hub_keeps_for_itself_is_no_object_of_the_run(logged_in: FakeHub) -> None:
    logged_in.make("models/me/whole")

    assert [*open_store("hf://me/whole").list()] == []


def test_a_repository_that_is_not_there_is_told_with_the_command_that_makes_it(logged_in: FakeHub) -> None:
    for url, hint in (("hf://me/absent/run", "hf repos create"), ("hf://buckets/me/absent/run", "hf buckets create")):
        with pytest.raises(BucketNotFound, match="does not exist") as caught:
            probe(open_store(url))
        assert caught.value.hint.startswith(hint) and caught.value.hint.endswith("me/absent")


def test_who_is_not_logged_in_is_told_how(logged_in: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    logged_in.make("models/me/secret", private=True)
    monkeypatch.setenv("HF_TOKEN", "")

    with pytest.raises(AccessDenied, match="private") as caught:
        open_store("hf://me/secret/run").get("tip.json")

    assert caught.value.hint.startswith("hf auth login")


def test_a_token_that_may_only_read_and_one_that_is_wrong_are_refused_and_not_shown(
    logged_in: FakeHub, hub_repo_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for token in (READER, "hf_wrong"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(AccessDenied) as caught:
            probe(open_store(hub_repo_url))
        assert caught.value.hint and token not in f"{caught.value}"


def test_a_short_wait_that_the_hub_asks_for_is_waited_and_a_long_one_is_told(logged_in: FakeHub, hub_repo_url: str) -> None:
    store = open_store(hub_repo_url)
    logged_in.failures += [("/commit/", Answer(429, b"", {"Retry-After": "0"}))]
    store.put("a", b"x")
    assert store.get("a") == b"x"

    logged_in.failures += [("/commit/", Answer(429, b"", {"RateLimit": '"api";r=0;t=1800'}))]
    with pytest.raises(StoreUnavailable, match="fewer requests") as caught:
        store.put("b", b"x")
    assert "1800 s" in caught.value.hint and "commits" in caught.value.hint


def test_trouble_that_passes_is_not_noticed_and_what_stays_is_unavailable(logged_in: FakeHub, hub_repo_url: str) -> None:
    store = open_store(hub_repo_url)
    logged_in.failures += [("/commit/", Answer(503)), ("/commit/", Answer(502))]
    store.put("a", b"x")

    logged_in.failures += [("/resolve/", Answer(500)) for _ in range(3)]
    with pytest.raises(StoreUnavailable, match="can't read"):
        store.get("a")
    assert store.get("a") == b"x"


def test_a_hub_that_does_not_answer_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")

    with pytest.raises(StoreUnavailable, match="can't read hf://me/name/run/a") as caught:
        open_store("hf://me/name/run").get("a")
    assert "http://127.0.0.1:1" in caught.value.hint


def test_offline_mode_is_told(hub_repo_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True, raising=False)
    from huggingface_hub.utils import _http

    _http.close_session()
    try:
        with pytest.raises(ConfigError, match="offline") as caught:
            open_store(hub_repo_url).get("a")
    finally:
        monkeypatch.undo()
        _http.close_session()
    assert caught.value.hint == "unset HF_HUB_OFFLINE"


def test_a_batch_that_failed_in_part_is_no_success(logged_in: FakeHub, hub_bucket_url: str) -> None:
    failed = json.dumps({"success": False, "failed": [{"path": "run/a", "error": "quota exceeded"}]}).encode()
    logged_in.failures += [("/batch", Answer(200, failed, {"Content-Type": "application/json"}))]

    with pytest.raises(StoreUnavailable, match="quota exceeded"):
        open_store(hub_bucket_url).put("a", b"x")


@pytest.mark.parametrize("size", [10, 100_000])
def test_hugging_faces_own_client_and_the_stores_read_what_each_other_wrote(
    logged_in: FakeHub, hub_repo_url: str, hub_bucket_url: str, tmp_path: Path, size: int
) -> None:
    source, api = tmp_path / "source", HfApi(endpoint=logged_in.endpoint)
    source.write_bytes(b"\0" * size)
    name, bucket = (
        hub_repo_url.removeprefix("hf://").removesuffix("/run"),
        hub_bucket_url.split("buckets/")[1].removesuffix("/run"),
    )

    api.upload_file(path_or_fileobj=source, path_in_repo="run/theirs", repo_id=name)
    api.batch_bucket_files(bucket, add=[(source, "run/theirs")])
    for url in (hub_repo_url, hub_bucket_url):
        store = open_store(url)
        store.put_file("ours", source)
        store.get_file("theirs", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == source.read_bytes() == store.get("theirs")
        assert [(info.key, info.size) for info in store.list()] == [("ours", size), ("theirs", size)]

    fetched = api.hf_hub_download(name, "run/ours", local_dir=tmp_path / "repo")
    api.download_bucket_files(bucket, [("run/ours", tmp_path / "from-bucket")])
    assert Path(fetched).read_bytes() == (tmp_path / "from-bucket").read_bytes() == source.read_bytes()
