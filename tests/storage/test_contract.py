"""What every ObjectStore promises, asked of each of them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_spot.errors import ConfigError, ObjectNotFound
from hf_spot.run.digest import Passing, digest_of
from hf_spot.storage.open import open_store
from hf_spot.storage.probe import probe
from hf_spot.storage.store import ObjectStore, fences, ranges_of

BIG_BYTES = 70 * 1024 * 1024 + 1  # two parts on S3


STORES = ["memory", "local", "s3", "gcs", "azure", "hub-repo", "hub-bucket"]
if shutil.which("azurite-blob"):  # Microsoft's emulator; else only the fake, which answers as that does
    STORES.append("azurite")
SHOW_NOTHING = ("memory:", "az:")
SHORT_PAGES = ("gs:", "az:", "hf:")
LEAVES_NOTHING = ("memory:", "hf:", "gs:")  # at least of a first part; what has no name is the Hub's and Google's to remove


@pytest.fixture(params=STORES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    if request.param == "local":
        return str(tmp_path / "run")
    found: str = request.getfixturevalue(f"{request.param.replace('-', '_')}_url")
    return found


@pytest.fixture
def store(url: str) -> ObjectStore:
    return open_store(url)


@pytest.fixture(scope="module")
def big_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("big") / "model.safetensors"
    block = os.urandom(1024 * 1024)
    with path.open("wb") as file:
        for number in range(BIG_BYTES // len(block)):
            file.write(number.to_bytes(8, "big") + block[8:])
        file.write(b"!")
    yield path
    path.unlink()


def keys(store: ObjectStore, prefix: str = "", start_after: str = "") -> list[str]:
    return [info.key for info in store.list(prefix, start_after)]


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def test_it_is_an_object_store(store: ObjectStore, url: str) -> None:
    assert isinstance(store, ObjectStore)
    assert store.url == url


def test_probe_finds_nothing_wrong_and_leaves_nothing_behind(store: ObjectStore) -> None:
    probe(store, allow_unfenced=not fences(store))

    assert keys(store) == []


def test_an_object_can_be_read_back_also_by_another_opening_of_the_url(store: ObjectStore, url: str) -> None:
    store.put("a/b", b"one")
    store.put("empty", b"")

    assert store.get("a/b") == b"one"
    assert open_store(url).get("a/b") == b"one"
    assert store.get("empty") == b""


def test_put_replaces(store: ObjectStore) -> None:
    store.put("tip.json", b"a longer text")
    store.put("tip.json", b"short")

    assert store.get("tip.json") == b"short"


def test_a_missing_object_is_object_not_found(store: ObjectStore, tmp_path: Path) -> None:
    store.put("folder/there", b"x")

    for key in ("absent", "folder", "folder/absent", "folder/there/absent"):
        with pytest.raises(ObjectNotFound, match=key):
            store.get(key)
        with pytest.raises(ObjectNotFound, match=key):
            store.get_file(key, tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


def test_second_create_of_the_same_key_returns_false_and_changes_nothing(store: ObjectStore) -> None:
    assert store.create("journal/00000001.json", b"first") is True
    assert store.create("journal/00000001.json", b"second") is False
    assert store.create("journal/00000001.json", b"first") is False
    assert store.get("journal/00000001.json") == b"first"


def test_of_sixteen_that_create_one_key_at_the_same_time_exactly_one_wins(url: str) -> None:
    stores = [open_store(url) for _ in range(4)]
    if not fences(stores[0]):
        pytest.skip("a bucket of the Hub has no conditional write, and says so")
    for round_number in range(3):
        together = threading.Barrier(16)

        def create(number: int, key: str = f"journal/{round_number}", gate: threading.Barrier = together) -> bool:
            gate.wait()
            return stores[number % 4].create(key, str(number).encode())

        with ThreadPoolExecutor(16) as pool:
            won = [*pool.map(create, range(16))]

        assert won.count(True) == 1
        assert stores[0].get(f"journal/{round_number}") == str(won.index(True)).encode()


def test_what_a_killed_upload_left_is_found_and_removed(store: ObjectStore, url: str, big_file: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from hf_spot.storage.open import open_store
store, kill = open_store(sys.argv[1]), lambda count: os.kill(os.getpid(), 9)
store.put_file("e0001/checkpoint-5/model.safetensors", Path(sys.argv[2]), kill)
"""
    assert subprocess.run([sys.executable, "-c", code, url, str(big_file)]).returncode == -9
    store.put("e0001/checkpoint-4/model.safetensors", b"whole")
    left = 0 if url.startswith(LEAVES_NOTHING) else 1

    assert store.abort(lambda key: key.startswith("e0002/")) == 0
    assert store.abort(lambda key: key.startswith("e0001/")) == left
    assert store.abort(lambda key: True) == 0
    assert keys(store) == ["e0001/checkpoint-4/model.safetensors"]


def test_list_gives_keys_in_order_with_their_sizes(store: ObjectStore) -> None:
    for number in (10, 2, 1):
        store.put(f"journal/{number:08d}.json", b"x" * number)
    store.put("e0001/checkpoint-5/model", b"abc")
    store.put("tip.json", b"")

    assert [(info.key, info.size) for info in store.list()] == [
        ("e0001/checkpoint-5/model", 3),
        ("journal/00000001.json", 1),
        ("journal/00000002.json", 2),
        ("journal/00000010.json", 10),
        ("tip.json", 0),
    ]


def test_a_folder_sorts_among_files_as_if_its_slash_were_a_letter(store: ObjectStore) -> None:
    if store.url.startswith("s3://"):
        pytest.skip("SeaweedFS sorts folder by folder, other than S3 itself")
    expected = ["A", "a b", "a-b", "a.b/x", "a/x", "a/y/z", "a0", "b", "é"]
    for key in reversed(expected):
        store.put(key, b"")

    assert keys(store) == expected
    for index, key in enumerate(expected):
        assert keys(store, start_after=key) == expected[index + 1 :]


def test_a_prefix_may_end_anywhere_in_a_key(store: ObjectStore) -> None:
    for key in ("e0001/a", "e0002/a", "e0002/b/c", "f", "journal/1"):
        store.put(key, b"")

    assert keys(store, "e") == ["e0001/a", "e0002/a", "e0002/b/c"]
    assert keys(store, "e0002/") == ["e0002/a", "e0002/b/c"]
    assert keys(store, "e0002/b") == ["e0002/b/c"]
    assert keys(store, "e0002/b/c") == ["e0002/b/c"]
    assert keys(store, "nothing/here") == []
    assert keys(store, "e0002/a/") == []


def test_start_after_leaves_out_what_comes_before_and_itself(store: ObjectStore) -> None:
    for number in range(1, 6):
        store.put(f"journal/{number}", b"")

    assert keys(store, "journal/", "journal/3") == ["journal/4", "journal/5"]
    assert keys(store, "journal/", "journal/35") == ["journal/4", "journal/5"]
    assert keys(store, "journal/", "journal/9") == []
    assert keys(store, "journal/", "a") == [f"journal/{number}" for number in range(1, 6)]


def test_a_fresh_place_is_empty(store: ObjectStore) -> None:
    assert keys(store) == []
    assert keys(store, "journal/", "journal/1") == []
    store.delete(["never/there"])


def test_delete_is_idempotent_and_takes_any_iterable(store: ObjectStore) -> None:
    for key in ("a/1", "a/2", "b"):
        store.put(key, b"x")

    store.delete(info.key for info in store.list("a/"))
    store.delete(["a/1", "a/2", "never"])
    store.delete([])

    assert keys(store) == ["b"]
    assert store.create("a/1", b"again") is True


def test_more_keys_than_one_request_carries_can_be_listed_and_deleted(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 1005
    if store.url.startswith(SHORT_PAGES):
        monkeypatch.setattr("hf_spot.storage.gcs.PAGE", 100)
        count = 120
    names = [f"many/{number:04d}" for number in range(count)]
    with ThreadPoolExecutor(8) as pool:
        [*pool.map(lambda name: store.put(name, b""), names)]

    assert keys(store, "many/") == names
    store.delete(names)
    assert keys(store, "many/") == []


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
def test_a_file_comes_back_as_it_was(store: ObjectStore, tmp_path: Path, size: int) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(size))
    target.write_bytes(b"is replaced")

    store.put_file("e0001/checkpoint-5/optimizer.pt", source)
    store.get_file("e0001/checkpoint-5/optimizer.pt", target)

    assert target.read_bytes() == source.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["source", "target"]


def test_a_big_file_comes_back_and_progress_sums_to_its_size(store: ObjectStore, tmp_path: Path, big_file: Path) -> None:
    sent: list[int] = []
    received: list[int] = []

    going, coming = Passing(BIG_BYTES, sent.append), Passing(BIG_BYTES, received.append)
    store.put_file("e0001/model", big_file, going)
    store.get_file("e0001/model", tmp_path / "back", coming)

    assert digest(tmp_path / "back") == digest(big_file)
    # A store shows what passes or nothing of it: what it shows is what the journal believes.
    expected = {None, digest_of(big_file)} if store.url.startswith(SHOW_NOTHING) else {digest_of(big_file)}
    assert {going.digest(), coming.digest()} <= expected
    assert (sum(sent), sum(received)) == (BIG_BYTES, BIG_BYTES)
    assert len(sent) > 10
    (tmp_path / "back").unlink()


def test_a_part_of_an_object_is_read_alone(store: ObjectStore) -> None:
    get_range = ranges_of(store)
    if get_range is None:
        assert store.url.startswith("hf:"), "only the Hub can't"
        return
    data = os.urandom(300_000)
    store.put("e0001/shard", data)

    assert get_range("e0001/shard", 0, 10) == data[:10]
    assert get_range("e0001/shard", 100_001, 100_000) == data[100_001:200_001]
    assert get_range("e0001/shard", 299_990, 100) == data[-10:]
    with pytest.raises(ObjectNotFound):
        get_range("e0001/absent", 0, 10)


def test_a_copy_is_an_object_of_its_own(store: ObjectStore, tmp_path: Path, big_file: Path) -> None:
    store.put_file("e0001/model", big_file)
    store.put("e0002/model", b"is replaced")

    store.copy("e0001/model", "e0002/model")
    store.put("e0001/model", b"something else")
    store.copy("e0002/model", "e0003/model")
    store.delete(["e0001/model", "e0002/model"])

    assert keys(store) == ["e0003/model"]
    store.get_file("e0003/model", tmp_path / "back")
    assert digest(tmp_path / "back") == digest(big_file)
    (tmp_path / "back").unlink()


def test_what_is_not_there_cant_be_copied(store: ObjectStore) -> None:
    with pytest.raises(ObjectNotFound, match="absent"):
        store.copy("e0001/absent", "e0002/model")

    assert keys(store) == []


class Cancelled(Exception):
    """What a caller raises in `progress`."""


def cancel_after(count: int) -> Callable[[int], None]:
    left = [count]

    def progress(moved: int) -> None:
        left[0] -= moved
        if left[0] < 0:
            raise Cancelled

    return progress


def test_an_upload_cancelled_by_its_progress_leaves_nothing_visible(store: ObjectStore, big_file: Path) -> None:
    with pytest.raises(Cancelled):
        store.put_file("e0001/model", big_file, cancel_after(20_000_000))

    assert keys(store) == []
    assert store.create("e0001/model", b"free") is True


def test_a_cancelled_replacement_leaves_the_old_object(store: ObjectStore, big_file: Path) -> None:
    store.put("e0001/model", b"old")

    with pytest.raises(Cancelled):
        store.put_file("e0001/model", big_file, cancel_after(20_000_000))

    assert store.get("e0001/model") == b"old"


def test_a_download_can_be_cancelled_by_its_progress(store: ObjectStore, tmp_path: Path, big_file: Path) -> None:
    store.put_file("e0001/model", big_file)

    with pytest.raises(Cancelled):
        store.get_file("e0001/model", tmp_path / "part", cancel_after(2_000_000))


def test_a_file_that_is_not_there_is_the_callers_trouble(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.put_file("key", tmp_path / "absent")

    assert keys(store) == []


@pytest.mark.parametrize(
    "key",
    [
        "with space/and + plus",
        "dots..inside/.hidden/..x/x..",
        "ünï/código/模型.bin",
        "percent%20/a=b&c",
        "quote'\"/(x)[y]{z}~",
        "colon:x",
    ],
)
def test_unusual_keys_are_kept_exactly(store: ObjectStore, tmp_path: Path, key: str) -> None:
    store.put(key, b"1")
    assert store.create(key, b"2") is False
    assert [*keys(store), store.get(key)] == [key, b"1"]
    store.get_file(key, tmp_path / "back")
    store.delete([key])

    assert keys(store) == []


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "../outside",
        "a/../../outside",
        "a/..",
        "..",
        ".",
        "a/./b",
        "a//b",
        "a/",
        "nul\x00",
        "line\nfeed",
        "a\\b",
        ".hf_spot-tmp/x",
        "\udcff",
        "x" * 1000,
    ],
)
def test_keys_that_could_lead_out_or_cannot_be_stored_everywhere_are_refused(
    store: ObjectStore, tmp_path: Path, key: str
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    for attempt in (
        lambda: store.get(key),
        lambda: store.put(key, b""),
        lambda: store.create(key, b""),
        lambda: store.put_file(key, source),
        lambda: store.get_file(key, tmp_path / "target"),
        lambda: store.delete([key]),
    ):
        with pytest.raises(ConfigError):
            attempt()
    assert [path.name for path in tmp_path.iterdir() if path.name != "run"] == ["source"]


@pytest.mark.parametrize("prefix", ["/", "../", "a/../..", "/etc/"])
def test_listing_outside_is_refused(store: ObjectStore, prefix: str) -> None:
    with pytest.raises(ConfigError):
        keys(store, prefix)


def test_threads_can_share_a_store(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(200_000))

    def work(number: int) -> None:
        prefix = f"e{number % 3:04d}/{number}"
        store.put(f"{prefix}/small", b"x")
        store.put_file(f"{prefix}/file", source)
        store.get_file(f"{prefix}/file", tmp_path / f"target-{number}")
        assert (tmp_path / f"target-{number}").read_bytes() == source.read_bytes()
        assert keys(store, f"{prefix}/") == [f"{prefix}/file", f"{prefix}/small"]
        store.delete([f"{prefix}/small", f"{prefix}/file"])

    with ThreadPoolExecutor(8) as pool:
        [*pool.map(work, range(24))]

    assert keys(store) == []


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_store_goes_on_working_after_a_fork(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"from the file")
    store.put_file("before", source)  # the parent has connections and threads by now

    child = os.fork()
    if child == 0:
        code = 1
        try:
            store.put_file("child", source)
            store.get_file("child", tmp_path / "child")
            code = 0 if store.get("before") == b"from the file" and store.create("made", b"") else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == 0
    assert (tmp_path / "child").read_bytes() == b"from the file"
    assert store.get("before") == b"from the file"
