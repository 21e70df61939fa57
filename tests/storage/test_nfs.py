"""LocalStore on what behaves like NFS: a stand-in by FUSE, because not every kernel has a client of NFS (see `nfs_like`)."""

from __future__ import annotations

import contextlib
import ctypes.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_spot.errors import Fenced, ObjectNotFound, StoreUnavailable
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.run import Run
from hf_spot.storage.local import LocalStore
from hf_spot.storage.probe import probe
from tests import leftovers
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]


def why_not() -> str:
    """Why a stand-in can't be mounted here; empty when it can."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "root and /dev/fuse are needed to mount a stand-in for NFS"
    if not (ctypes.util.find_library("fuse3") or ctypes.util.find_library("fuse")):
        return "no libfuse to mount a stand-in for NFS with: apt-get install libfuse3-3"
    return ""


needs_fuse = pytest.mark.skipif(bool(why_not()), reason=why_not() or "not skipped")


@contextlib.contextmanager
def mounted(tmp_path: Path, name: str, cache_s: float) -> Iterator[Path]:
    for folder in ("backing", "faults", name):
        (tmp_path / folder).mkdir(exist_ok=True)
    arguments = [str(tmp_path / "backing"), str(tmp_path / name), str(tmp_path / "faults"), str(cache_s), leftovers.name()]
    process = subprocess.Popen([sys.executable, "-m", "tests.storage.nfs_like", *arguments], cwd=ROOT)
    try:
        wait_for(lambda: process.poll() is not None or os.path.ismount(tmp_path / name), "for a mount")
        assert process.poll() is None, "the stand-in has ended"
        yield tmp_path / name
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / name)], stderr=subprocess.DEVNULL)
        process.kill()
        process.wait()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path, "mount", 0) as path:
        yield path


@pytest.fixture
def two_mounts(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Of one fileserver, each of which believes for a minute what it has seen."""
    with mounted(tmp_path, "here", 60) as here, mounted(tmp_path, "there", 60) as there:
        yield here, there


@needs_fuse
def test_a_link_whose_answer_was_lost_is_found_to_be_ones_own(mount: Path, tmp_path: Path) -> None:
    store = LocalStore(mount / "run")
    probe(store)

    (tmp_path / "faults" / "lose-link").touch()
    assert store.create("journal/1", b"mine") is True
    assert not (tmp_path / "faults" / "lose-link").exists()
    assert store.create("journal/1", b"another's") is False
    assert store.get("journal/1") == b"mine"


@needs_fuse
def test_a_file_that_was_replaced_while_it_was_read_is_read_again(mount: Path, tmp_path: Path) -> None:
    store = LocalStore(mount / "run")
    store.put("tip.json", b"new")

    (tmp_path / "faults" / "stale").touch()
    assert store.get("tip.json") == b"new"
    assert not (tmp_path / "faults" / "stale").exists()


@needs_fuse
def test_of_many_on_two_machines_that_create_one_key_exactly_one_wins(two_mounts: tuple[Path, Path]) -> None:
    stores = [LocalStore(mount / "run") for mount in two_mounts]
    for key in ("journal/1", "journal/2", "journal/3"):
        for store in stores:
            with pytest.raises(ObjectNotFound):  # which is remembered, and must not be believed
                store.get(key)
        gate = threading.Barrier(8)

        def create(number: int, key: str = key, gate: threading.Barrier = gate) -> bool:
            gate.wait()
            return stores[number % 2].create(key, str(number).encode())

        with ThreadPoolExecutor(8) as pool:
            won = [*pool.map(create, range(8))]

        assert won.count(True) == 1
        assert [store.get(key) for store in stores] == [str(won.index(True)).encode()] * 2


@needs_fuse
def test_a_run_moves_between_machines_whose_caches_lag(
    two_mounts: tuple[Path, Path], make_checkpoint: Callable[[int], Path], tmp_path: Path
) -> None:
    first, second = (Run(mount / "run") for mount in two_mounts)
    first.claim()
    second.state()  # its caches hold the beginning
    request = CommitRequest(step=5)
    first.commit(request, first.upload(make_checkpoint(5), request))

    second.claim()

    assert second.pull(tmp_path / "new").name == "checkpoint-5"
    with pytest.raises(Fenced):
        first.record("finished", {})


def test_what_nfs_keeps_of_a_deleted_file_is_no_object(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    store.put("e0001/checkpoint-5/a", b"x")
    left = tmp_path / "run/e0001/checkpoint-5/.nfs0000000000a1b2c300000001"
    left.write_bytes(b"still open somewhere")

    assert [info.key for info in store.list()] == ["e0001/checkpoint-5/a"]
    store.delete(["e0001/checkpoint-5/a"])
    assert [*store.list()] == [] and left.exists()


def test_a_fileserver_that_forgets_a_file_for_good_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path / "run")
    store.put("a", b"x")
    tried = []

    def stale(path: object, *args: object, **kwargs: object) -> object:
        tried.append(path)
        raise OSError(116, os.strerror(116))

    monkeypatch.setattr("builtins.open", stale)

    with pytest.raises(StoreUnavailable, match=os.strerror(116)):
        store.get("a")
    assert len(tried) == 3
