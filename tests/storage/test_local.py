"""What only LocalStore does: files on a filesystem that others share, and errors that name their repair."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_spot.errors import AccessDenied, BucketNotFound, StoreError, StoreUnavailable
from hf_spot.storage.keys import TEMPORARY_FOLDER
from hf_spot.storage.local import LocalStore
from hf_spot.storage.probe import probe
from tests.small_disk import SmallDisk, why_not


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_objects_are_plain_files_that_others_may_read_as_the_umask_says(store: LocalStore, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        store.put("a", b"x")
        store.create("b", b"x")
    finally:
        os.umask(before)

    assert [(tmp_path / "run" / name).stat().st_mode & 0o777 for name in "ab"] == [0o644, 0o644]


def test_listing_a_prefix_reads_no_other_folders(store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("journal/1", "journal/2", "e0001/checkpoint-5/a", "e0002/checkpoint-9/deep/b"):
        store.put(key, b"")
    read: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: read.append(str(path)) or scandir(path))

    assert [info.key for info in store.list("journal/", "journal/1")] == ["journal/2"]
    assert read == [str(tmp_path / "run" / "journal")]
    read.clear()
    assert [info.key for info in store.list("e0002", "e0001/z")] == ["e0002/checkpoint-9/deep/b"]
    assert str(tmp_path / "run" / "e0001") not in read


def test_deleting_removes_the_folders_that_it_empties_but_not_the_run(store: LocalStore, tmp_path: Path) -> None:
    store.put("e0001/checkpoint-5/deep/a", b"")
    store.put("e0001/b", b"")

    store.delete(["e0001/checkpoint-5/deep/a"])
    assert files_under(tmp_path / "run") == [TEMPORARY_FOLDER, "e0001", "e0001/b"]
    store.delete(["e0001/b"])
    assert files_under(tmp_path / "run") == [TEMPORARY_FOLDER]


def test_writing_beside_one_who_deletes_the_same_folder_loses_nothing(store: LocalStore) -> None:
    done = threading.Event()

    def write(number: int) -> None:
        for turn in range(100):
            store.put(f"shared/deep/{number}-{turn}", b"x")
            assert store.create(f"shared/new/{number}-{turn}", b"x")
            store.delete([f"shared/deep/{number}-{turn}", f"shared/new/{number}-{turn}"])

    with ThreadPoolExecutor(4) as pool:
        [*pool.map(write, range(4))]
    done.set()

    assert [*store.list()] == []


def test_what_a_dead_machine_left_half_written_is_swept_after_a_day_and_never_listed(store: LocalStore, tmp_path: Path) -> None:
    folder = tmp_path / "run" / TEMPORARY_FOLDER
    folder.mkdir(parents=True)
    for name, age_s in (("old", 90_000), ("young", 3_000)):
        (folder / name).write_bytes(b"half")
        now_s = (folder / name).stat().st_mtime
        os.utime(folder / name, (now_s - age_s, now_s - age_s))

    store.put("a", b"")

    assert files_under(folder) == ["young"]
    assert [info.key for info in store.list()] == ["a"]


def test_a_created_object_is_whole_for_every_reader(store: LocalStore) -> None:
    data = os.urandom(3_000_000)
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.extend(info.size for info in store.list("journal/"))

    reader = threading.Thread(target=watch)
    reader.start()
    try:
        for number in range(30):
            assert store.create(f"journal/{number}", data)
    finally:
        done.set()
        reader.join()

    assert set(seen) <= {len(data)}


def test_links_to_folders_are_not_followed(store: LocalStore, tmp_path: Path) -> None:
    store.put("e0001/a", b"")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"")
    (tmp_path / "run" / "e0001" / "loop").symlink_to(tmp_path / "run")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "run" / "broken").symlink_to(tmp_path / "absent")

    assert [info.key for info in store.list()] == ["e0001/a"]


def test_an_own_link_whose_answer_was_lost_counts_as_created(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def link_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)  # what an NFS client does when the first answer does not arrive

    monkeypatch.setattr(os, "link", link_twice)

    assert store.create("journal/1", b"mine") is True


def test_a_filesystem_without_hard_links_is_refused(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)

    with pytest.raises(StoreError, match="without hard links") as caught:
        probe(store)
    assert "s3://" in caught.value.hint


def test_a_parent_that_does_not_exist_is_not_made_because_it_may_be_an_unmounted_disk(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "not-mounted" / "run")

    for attempt in (lambda: store.put("a", b""), lambda: store.get("a"), lambda: [*store.list()], lambda: probe(store)):
        with pytest.raises(BucketNotFound, match="not-mounted") as caught:
            attempt()
        assert f"mkdir -p {tmp_path / 'not-mounted'}" in caught.value.hint
    assert not (tmp_path / "not-mounted").exists()


def test_a_run_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(b"")
    store = LocalStore(tmp_path / "run")

    for attempt in (lambda: store.put("a", b""), lambda: store.get("a"), lambda: [*store.list()]):
        with pytest.raises(BucketNotFound, match="is a file"):
            attempt()


def test_a_key_below_another_object_is_a_clear_error(store: LocalStore, tmp_path: Path) -> None:
    store.put("a", b"")
    (tmp_path / "run" / "folder" / "x").mkdir(parents=True)

    for attempt in (lambda: store.put("a/b", b""), lambda: store.create("a/b", b""), lambda: store.put("folder", b"")):
        with pytest.raises(StoreError, match="can't"):
            attempt()


@pytest.fixture
def unprivileged() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_without_write_permission_is_access_denied(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.name.startswith("pytest-"):
            folder.chmod(0o755)
    run = tmp_path / "run"
    run.mkdir()
    run.chmod(0o555)
    request.getfixturevalue("unprivileged")

    with pytest.raises(AccessDenied, match="Permission denied") as caught:
        probe(LocalStore(run))
    assert str(run) in caught.value.hint


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if why := why_not():
        pytest.skip(why)
    with SmallDisk(tmp_path / "disk", size_kb=256) as disk:
        yield disk.path


def test_a_full_disk_is_unavailable_leaves_no_part_and_recovers(small_disk: Path, tmp_path: Path) -> None:
    store = LocalStore(small_disk / "run")
    source = tmp_path / "big"
    source.write_bytes(bytes(1_000_000))
    store.put("kept", b"x")

    with pytest.raises(StoreUnavailable, match="No space left") as caught:
        store.put_file("big", source)
    with pytest.raises(StoreUnavailable, match="No space left"):
        store.put("big", source.read_bytes())
    assert "free" in caught.value.hint
    assert [info.key for info in store.list()] == ["kept"]
    assert files_under(small_disk / "run" / TEMPORARY_FOLDER) == []

    store.put("small", b"fits again")
    assert store.get("small") == b"fits again"


def test_a_read_only_filesystem_is_access_denied(small_disk: Path) -> None:
    LocalStore(small_disk / "run").put("a", b"x")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    store = LocalStore(small_disk / "run")

    assert store.get("a") == b"x"
    with pytest.raises(AccessDenied, match="Read-only") as caught:
        store.put("b", b"x")
    assert "mounted read-only" in caught.value.hint


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOTCONN])
def test_a_fileserver_in_trouble_is_unavailable(store: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    store.put("a", b"")

    def fail(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)

    with pytest.raises(StoreUnavailable, match=os.strerror(number)) as caught:
        store.put("a", b"new")
    assert "findmnt" in caught.value.hint
    assert store.get("a") == b""
