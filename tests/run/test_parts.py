"""Of a sharded checkpoint a machine fetches what its ranks read; every part is verified, and parts never pass for the whole."""

from __future__ import annotations

import os
import pickle
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from hf_spot.errors import ConfigError, CorruptCheckpoint
from hf_spot.run.checkpoint import Checkpoint, CommitRequest
from hf_spot.run.copies import copy_run, fork_run
from hf_spot.run.digest import FINE_PART_BYTES, Passing, digest_of, name_for, part_digests
from hf_spot.run.folder_check import problems_in
from hf_spot.run.parts import PartFiles, Parts, digests_key, parts_path
from hf_spot.run.run import Run
from hf_spot.run.selection import Readers
from hf_spot.run.shard_index import UnknownIndex, values_in
from hf_spot.storage.faulty import FaultyStore
from hf_spot.storage.memory import MemoryStore

Make = Callable[..., Path]

CHUNK_BYTES = 300_000  # of rank 0 and rank 1, in a file each; behind it, in the second, something that all ranks read
SHARED_BYTES = 1_000
FILLED_BYTES = 200_000  # nobody reads it: it belongs to what other machines had
RANK_0 = Readers((0,), 2)


def index() -> bytes:
    """What torch writes for a tensor in two chunks, and a value of all ranks."""
    chunks = [ChunkStorageMetadata(torch.Size([32 * rank, 4]), torch.Size([32, 4])) for rank in (0, 1)]
    for rank, chunk in enumerate(chunks):
        chunk.offsets = torch.Size([32 * rank, 0])
    places = {
        MetadataIndex("weight", torch.Size([32 * rank, 0])): _StorageInfo(f"__{rank}_0.distcp", 0, CHUNK_BYTES)
        for rank in (0, 1)
    }
    places[MetadataIndex("groups")] = _StorageInfo("__1_0.distcp", CHUNK_BYTES + FILLED_BYTES, SHARED_BYTES)
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([64, 4]), chunks)
    return pickle.dumps(Metadata({"weight": tensor, "groups": BytesStorageMetadata()}, storage_data=places))


@pytest.fixture
def sharded(make_checkpoint: Make) -> Path:
    """A checkpoint of two ranks, whose optimizer is divided."""
    folder = make_checkpoint(1)
    (folder / "optimizer_0").mkdir()
    (folder / "optimizer_0/.metadata").write_bytes(index())
    (folder / "optimizer_0/__0_0.distcp").write_bytes(os.urandom(CHUNK_BYTES))
    (folder / "optimizer_0/__1_0.distcp").write_bytes(os.urandom(CHUNK_BYTES + FILLED_BYTES + SHARED_BYTES))
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    for rank in (0, 1):
        (folder / f"rng_state_{rank}.pth").write_bytes(b"%d" % rank)
    return folder


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore(MemoryStore(f"memory://{uuid.uuid4().hex}"))


@pytest.fixture
def run(store: FaultyStore, sharded: Path) -> Run:
    run = Run(store)
    run.claim()
    request = CommitRequest(step=1, world_size=2)
    run.commit(request, run.upload(sharded, request))
    return run


OTHERS = "optimizer_0/__1_0.distcp"


def fetched_by(run: Run, into: Path, readers: Readers = RANK_0) -> tuple[Checkpoint, Path]:
    checkpoint = run.find()
    return checkpoint, run.fetch(checkpoint, into, readers=readers)


def key(run: Run, path: str = OTHERS) -> str:
    return f"{run.find().ref.prefix}/{path}"


def damage(run: Run, where: str, at: int) -> None:
    data = bytearray(run.store.get(where))
    data[at] ^= 1
    run.store.put(where, bytes(data))


def test_a_machine_fetches_its_own_shard_and_the_parts_of_others_that_all_ranks_read(
    run: Run, store: FaultyStore, sharded: Path, tmp_path: Path
) -> None:
    checkpoint, folder = fetched_by(run, tmp_path / "pulled")
    assert (folder / "optimizer_0/__0_0.distcp").read_bytes() == (sharded / "optimizer_0/__0_0.distcp").read_bytes()
    assert not (folder / OTHERS).exists(), "nobody takes a file with holes for the whole one"
    wanted = run.selection(checkpoint, RANK_0)
    (parts,) = wanted.parts
    first, end = parts.numbers[0]
    at, original = first * FINE_PART_BYTES, (sharded / OTHERS).read_bytes()
    assert len(parts.numbers) == 1 and at <= CHUNK_BYTES + FILLED_BYTES and end * FINE_PART_BYTES >= len(original)
    assert (folder / parts_path(OTHERS)).read_bytes() == bytes(at) + original[at:]
    assert wanted.size_bytes < sum(file.size for file in checkpoint.files) - CHUNK_BYTES
    assert [called for called in store.calls if called[0] == "get_file" and OTHERS in called[1]] == []
    assert run.compare(checkpoint, folder, readers=RANK_0) == []
    assert run.compare(checkpoint, folder) != []
    assert (folder / "rng_state_0.pth").exists() and not (folder / "rng_state_1.pth").exists()


def test_another_number_of_ranks_chooses_by_their_rows(run: Run, tmp_path: Path) -> None:
    first_of_four = run.selection(run.find(), Readers((1,), 4))
    assert [one.file.path for one in first_of_four.parts] == [OTHERS]
    last_of_four = run.selection(run.find(), Readers((3,), 4))
    (parts,) = last_of_four.parts
    assert (parts.file.path, parts.numbers) == (OTHERS, ((0, 5), (7, 8))), "its chunk, and what all ranks read"
    assert "optimizer_0/__0_0.distcp" not in [file.path for file in last_of_four.whole]
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= {file.path for file in last_of_four.whole}
    assert run.selection(run.find(), None).whole == run.find().files


def test_what_was_fetched_before_is_used_again_and_only_what_is_missing_comes_from_the_store(
    run: Run, store: FaultyStore, tmp_path: Path
) -> None:
    checkpoint, folder = fetched_by(run, tmp_path / "pulled")
    store.calls.clear()
    assert run.fetch(checkpoint, tmp_path / "pulled", readers=RANK_0) == folder
    assert [called for called in store.calls if not called[1].startswith("journal")] == []
    again = run.fetch(checkpoint, tmp_path / "again", readers=RANK_0, have=folder)
    assert [called for called in store.calls if called[0] in ("get_file", "get_range")] == []
    assert run.compare(checkpoint, again, readers=RANK_0) == []


def test_a_part_that_was_damaged_in_the_store_is_never_used(run: Run, tmp_path: Path) -> None:
    damage(run, key(run), CHUNK_BYTES + FILLED_BYTES + 5)
    with pytest.raises(CorruptCheckpoint, match="other contents at bytes"):
        fetched_by(run, tmp_path / "pulled")
    assert not (tmp_path / "pulled/checkpoint-1").exists()


def test_damage_outside_of_what_is_read_does_not_matter(run: Run, tmp_path: Path) -> None:
    damage(run, key(run), 5)
    checkpoint, folder = fetched_by(run, tmp_path / "pulled")
    assert run.compare(checkpoint, folder, readers=RANK_0) == []


def test_a_part_that_was_damaged_on_the_way_is_read_again(run: Run, store: FaultyStore, tmp_path: Path) -> None:
    inner, answers = store.inner.get_range, []  # type: ignore[attr-defined]

    def damaged_once(key: str, first: int, count: int) -> bytes:
        data: bytes = inner(key, first, count)
        answers.append(key)
        return data if len(answers) > 1 else data[:-1] + bytes([data[-1] ^ 1])

    store.inner.get_range = damaged_once  # type: ignore[attr-defined]
    checkpoint, folder = fetched_by(run, tmp_path / "pulled")
    assert run.compare(checkpoint, folder, readers=RANK_0) == []
    assert len(answers) == 2


@pytest.mark.parametrize("gone", [True, False])
def test_without_the_digests_of_its_parts_a_file_is_fetched_as_a_whole(
    run: Run, sharded: Path, tmp_path: Path, gone: bool
) -> None:
    where = digests_key(run.find().ref.prefix, OTHERS)
    if gone:
        run.store.delete([where])
    else:
        damage(run, where, 0)
    checkpoint, folder = fetched_by(run, tmp_path / "pulled")
    assert (folder / OTHERS).read_bytes() == (sharded / OTHERS).read_bytes()
    assert run.compare(checkpoint, folder, readers=RANK_0) == []


def test_a_store_that_can_not_read_ranges_and_a_checkpoint_of_before_give_whole_files(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = MemoryStore(f"memory://{uuid.uuid4().hex}")
    monkeypatch.delattr(MemoryStore, "get_range")
    run = Run(FaultyStore(inner))
    run.claim()
    request = CommitRequest(step=1, world_size=2)
    run.commit(request, run.upload(sharded, request))
    _, folder = fetched_by(run, tmp_path / "pulled")
    assert (folder / OTHERS).read_bytes() == (sharded / OTHERS).read_bytes()


def test_a_checkpoint_with_coarse_digests_is_fetched_in_whole_files_but_not_those_that_nobody_reads(
    sharded: Path, store: FaultyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_spot.run.transfer.name_for", lambda name, size_bytes: name_for("", size_bytes))
    run = Run(store)
    run.claim()
    request = CommitRequest(step=1, world_size=2)
    run.commit(request, run.upload(sharded, request))
    _, folder = fetched_by(run, tmp_path / "pulled")
    assert (folder / OTHERS).exists()
    _, other = fetched_by(run, tmp_path / "other", Readers((1,), 2))
    assert not (other / "optimizer_0/__0_0.distcp").exists()


def test_an_index_that_nobody_understands_gives_whole_files_and_runs_nothing(
    sharded: Path, store: FaultyStore, tmp_path: Path
) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    for number, told in enumerate([pickle.dumps(Evil()), pickle.dumps({"weight": 1}), b"", index()[:-40]]):
        with pytest.raises(UnknownIndex):
            values_in(told)
        (sharded / "optimizer_0/.metadata").write_bytes(told)
        run = Run(FaultyStore(MemoryStore(f"memory://{uuid.uuid4().hex}")))
        run.claim()
        request = CommitRequest(step=1, world_size=2)
        run.commit(request, run.upload(sharded, request))
        _, folder = fetched_by(run, tmp_path / f"pulled-{number}")
        assert (folder / OTHERS).read_bytes() == (sharded / OTHERS).read_bytes()
    assert not (tmp_path / "ran").exists()


def test_an_index_that_differs_from_the_journal_is_not_read(run: Run, tmp_path: Path) -> None:
    damage(run, key(run, "optimizer_0/.metadata"), 30)
    with pytest.raises(CorruptCheckpoint):
        fetched_by(run, tmp_path / "pulled")


@pytest.mark.parametrize("what", ["part", "digests", "index", "truncated", "gone"])
def test_parts_that_changed_on_this_disk_are_found(run: Run, tmp_path: Path, what: str) -> None:
    checkpoint, folder = fetched_by(run, tmp_path / "pulled")
    parts = folder / parts_path(OTHERS)
    digests = folder / "optimizer_0/.hf_spot-parts-digests-of-__1_0.distcp"
    if what in ("part", "digests"):
        path = parts if what == "part" else digests
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif what == "index":
        (folder / ".hf_spot-parts.json").write_text("{")
    elif what == "truncated":
        os.truncate(parts, CHUNK_BYTES + FILLED_BYTES)
    else:
        parts.unlink()
    assert len(run.compare(checkpoint, folder, readers=RANK_0)) == 1


def test_what_was_not_foreseen_is_fetched_when_it_is_asked_for(
    run: Run, store: FaultyStore, sharded: Path, tmp_path: Path
) -> None:
    checkpoint, folder = fetched_by(run, tmp_path / "pulled")
    file = next(file for file in checkpoint.files if file.path == OTHERS)
    here, original = PartFiles(folder), (sharded / OTHERS).read_bytes()
    foreseen = here.complete(store, checkpoint.ref.prefix, file, [(CHUNK_BYTES + FILLED_BYTES, len(original))])
    assert foreseen == 0
    fetched_bytes = here.complete(store, checkpoint.ref.prefix, file, [(0, CHUNK_BYTES)])
    assert CHUNK_BYTES <= fetched_bytes < CHUNK_BYTES + 2 * FINE_PART_BYTES
    found = (folder / parts_path(OTHERS)).read_bytes()
    assert found[:CHUNK_BYTES] == original[:CHUNK_BYTES]
    damage(run, key(run), CHUNK_BYTES + FILLED_BYTES // 2)
    with pytest.raises(CorruptCheckpoint, match="other contents"):
        here.complete(store, checkpoint.ref.prefix, file, [(0, len(original))])


def test_a_file_of_which_nothing_was_foreseen_is_fetched_when_it_is_asked_for(run: Run, sharded: Path, tmp_path: Path) -> None:
    checkpoint, folder = fetched_by(run, tmp_path / "pulled", Readers((1,), 2))
    file = next(file for file in checkpoint.files if file.path == "optimizer_0/__0_0.distcp")
    assert PartFiles(folder).complete(run.store, checkpoint.ref.prefix, file, [(0, 10)]) == FINE_PART_BYTES
    found = (folder / parts_path(file.path)).read_bytes()
    assert found[:FINE_PART_BYTES] == (sharded / file.path).read_bytes()[:FINE_PART_BYTES]


def test_a_folder_with_parts_passes_for_no_checkpoint(run: Run, tmp_path: Path) -> None:
    _, folder = fetched_by(run, tmp_path / "pulled")
    with pytest.raises(ConfigError, match=r"has only parts of optimizer_0/__1_0.distcp"):
        run.push(folder)
    with pytest.raises(ConfigError, match="has only parts of"):
        fork_run(str(folder), Run(MemoryStore(f"memory://{uuid.uuid4().hex}")))
    assert any("only the parts" in problem for problem in problems_in(folder))


def test_copies_and_forks_of_a_run_can_be_read_in_parts_too(run: Run, store: FaultyStore, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    copy_run(run, Run(target))
    fork_run(str(target), Run(tmp_path / "fork"))
    for place in (target, tmp_path / "fork"):
        copied = Run(place)
        checkpoint, folder = fetched_by(copied, tmp_path / f"pulled-{place.name}")
        assert not (folder / OTHERS).exists()
        assert copied.compare(checkpoint, folder, readers=RANK_0) == []


def test_a_pruned_checkpoint_leaves_no_digests(run: Run, sharded: Path, store: FaultyStore) -> None:
    request = CommitRequest(step=2, world_size=2)
    sharded = sharded.rename(sharded.with_name("checkpoint-2"))
    run.commit(request, run.upload(sharded, request))
    assert {info.key.partition("/.digests/")[0] for info in store.list("e") if "/.digests/" in info.key} == {
        "e0001/checkpoint-1",
        "e0001/checkpoint-2",
    }
    run.prune(1)
    assert not [info.key for info in store.list("e0001/checkpoint-1/")]


def test_a_shard_has_one_digest_however_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "__0_0.distcp"
    data = os.urandom(3 * FINE_PART_BYTES + 17)
    path.write_bytes(data)
    passing = Passing(len(data), name=name_for(path.name, len(data)))
    for first in range(0, len(data), 100_000):
        passing.see(first, memoryview(data)[first : first + 100_000])
    assert passing.digest() == digest_of(path) and digest_of(path).startswith("blake3-64k:")
    assert passing.part_digests() == part_digests(path)
    path.write_bytes(b"small")
    assert digest_of(path).startswith("blake3:")


def test_the_size_of_parts_is_that_of_their_bytes(run: Run) -> None:
    file = next(file for file in run.find().files if file.path == OTHERS)
    count = -(-file.size // FINE_PART_BYTES)
    assert Parts(file, ((0, count),)).size_bytes == file.size
    assert Parts(file, ((0, 1), (2, 3))).size_bytes == 2 * FINE_PART_BYTES
