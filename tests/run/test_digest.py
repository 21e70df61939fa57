"""A file's digest is the same whether it is read or passes by, in whatever order its parts come, and is never guessed."""

from __future__ import annotations

from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from hf_spot.run import digest, transfer
from hf_spot.run.digest import PART_BYTES, Passing, digest_of
from hf_spot.storage.memory import MemoryStore
from hf_spot.storage.s3 import S3Store


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint-1" / "optimizer.pt"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(2 * PART_BYTES + 5)
        file.seek(PART_BYTES - 3)
        file.write(b"across")
    return path


def test_a_file_of_one_part_has_the_digest_that_b3sum_prints(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(b"small")
    assert digest_of(path) == f"blake3:{blake3(b'small').hexdigest()}"
    path.write_bytes(b"")
    assert digest_of(path) == f"blake3:{blake3(b'').hexdigest()}"


def test_a_larger_file_has_the_digest_of_its_parts_digests(large_file: Path) -> None:
    data = large_file.read_bytes()
    parts = [data[first : first + PART_BYTES] for first in range(0, len(data), PART_BYTES)]
    assert digest_of(large_file) == f"blake3-64m:{blake3(b''.join(blake3(part).digest() for part in parts)).hexdigest()}"
    assert digest_of(large_file, "blake3") == f"blake3:{blake3(data).hexdigest()}"


@given(data=st.data(), content=st.binary(max_size=40))
def test_parts_in_any_order_cut_anywhere_and_begun_again_give_the_digest_of_the_file(
    data: st.DataObject, content: bytes
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "PART_BYTES", 8)
        starts = data.draw(st.permutations(range(0, len(content), 8)))
        passing, expected = Passing(len(content)), Passing(len(content))
        expected.see(0, memoryview(content))
        for start in starts:
            assert passing.digest() is None
            end = min(start + 8, len(content))
            broken_off = data.draw(st.integers(start, end))
            passing.see(start, memoryview(content)[start:broken_off])
            if data.draw(st.booleans()):
                broken_off = start  # begun again
            cut = data.draw(st.integers(broken_off, end))
            passing.see(broken_off, memoryview(content)[broken_off:cut])
            passing.see(cut, memoryview(content)[cut:end])
        assert passing.digest() == expected.digest() is not None


@pytest.mark.parametrize("seen", [[(0, 4)], [(4, 8)], [(0, 3), (4, 8)], [(0, 8), (2, 8)], [(0, 8), (8, 9)]], ids=str)
def test_a_file_that_was_not_seen_as_a_whole_has_no_digest(seen: list[tuple[int, int]]) -> None:
    passing = Passing(8)
    for first, end in seen:
        passing.see(first, memoryview(bytes(range(first, end))))
    assert passing.digest() is None


def test_what_goes_to_s3_and_comes_back_is_read_once(s3_url: str, large_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "digest_of", None)
    monkeypatch.setattr(transfer, "difference", None)
    store, back = S3Store(s3_url), large_file.parent.parent / "back"
    entries = transfer.upload(store, large_file.parent, "e0001/checkpoint-1")
    assert [entry.digest for entry in entries] == [digest_of(large_file)]
    transfer.download(store, "e0001/checkpoint-1", entries, back)
    assert digest_of(back / "optimizer.pt") == digest_of(large_file)


def test_a_store_that_shows_nothing_has_its_files_read(large_file: Path) -> None:
    store, moved, back = MemoryStore("memory://digest"), [0], large_file.parent.parent / "back"

    def progress(count: int) -> None:
        moved[0] += count

    entries = transfer.upload(store, large_file.parent, "e0001/checkpoint-1", progress=progress)
    assert [entry.digest for entry in entries] == [digest_of(large_file)]
    transfer.download(store, "e0001/checkpoint-1", entries, back, progress=progress)
    assert digest_of(back / "optimizer.pt") == digest_of(large_file)
    assert moved[0] == 2 * large_file.stat().st_size
