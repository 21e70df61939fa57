from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from hf_spot.errors import CorruptCheckpoint
from hf_spot.run.digest import digest_of
from hf_spot.run.manifest import FileEntry, difference, files_in, missing_for_resume, needed_by

DIGEST = "blake3:" + "0" * 64
WHOLE = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"]


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "", ".", "a\\..\\x", "a//b", "./a", "a\0b", "a/."])
def test_a_name_that_could_leave_the_folder_is_refused(path: str) -> None:
    with pytest.raises(CorruptCheckpoint):
        FileEntry(path, 1, DIGEST)


@pytest.mark.parametrize("lost", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_each_file_that_a_resume_reads_is_missed(lost: str) -> None:
    assert missing_for_resume(WHOLE, 1) == []
    assert lost in " ".join(missing_for_resume([name for name in WHOLE if name != lost], 1))


@pytest.mark.parametrize(
    "names",
    [
        ["adapter_model.safetensors", "optimizer.pt"],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "optimizer.pt"],
        ["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp"],
        ["pytorch_model_fsdp.bin", "optimizer.bin"],
        ["global_step5/mp_rank_00_model_states.pt"],
        ["reward/adapter_model.safetensors", "optimizer.pt"],
    ],
)
def test_lora_sharded_fsdp_and_deepspeed_layouts_are_whole(names: list[str]) -> None:
    ranks = ["rng_state_0.pth", "rng_state_1.pth", "scheduler.pt", "trainer_state.json"]
    assert missing_for_resume([*names, *ranks], 2) == []


def test_every_rank_needs_its_own_rng_file() -> None:
    names = [*WHOLE, "rng_state_0.pth"]
    assert missing_for_resume(names, 2) == ["rng_state_1.pth"]


def test_dot_files_count_and_leftovers_of_a_killed_save_do_not(tmp_path: Path) -> None:
    (tmp_path / "fsdp").mkdir()
    for name in ("fsdp/.metadata", "a", ".tmpx2k"):
        (tmp_path / name).write_text("x")
    assert files_in(tmp_path) == ["a", "fsdp/.metadata"]


def test_a_missing_short_or_changed_file_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"hello")
    entry = FileEntry("a", 5, digest_of(path))
    assert difference(tmp_path, entry) is None
    path.write_bytes(b"jello")
    assert "other contents" in (difference(tmp_path, entry) or "")
    path.write_bytes(b"hell")
    assert "4 bytes, not 5" in (difference(tmp_path, entry) or "")
    path.unlink()
    assert "missing" in (difference(tmp_path, entry) or "")


def test_a_digest_is_what_b3sum_prints_and_older_runs_are_read_by_theirs(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"")
    # The first value of the specification's test vectors.
    assert digest_of(path) == "blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    path.write_bytes(b"hello")
    old = FileEntry.of({"path": "a", "size": 5, "sha256": hashlib.sha256(b"hello").hexdigest()})
    assert difference(tmp_path, old) is None
    path.write_bytes(b"jello")
    assert "other contents" in (difference(tmp_path, old) or "")
    for broken in ("md5:" + "0" * 64, "0" * 64, "blake3:xyz", None):
        with pytest.raises(CorruptCheckpoint):
            FileEntry.of({"path": "a", "size": 5, "digest": broken})


def test_a_machine_needs_what_its_ranks_read_and_what_all_do() -> None:
    of_one = [
        "rng_state_{}.pth",
        "random_states/rng_state_{}.pth",
        "random_states/workers_{}.json",
        "global_step5/bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt",
        "pytorch_model_fsdp_rank{}.bin",
        "optimizer_0_rank{}.bin",
    ]
    of_all = ["model.safetensors", "optimizer.pt", "pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__1_0.distcp"]
    names = [*of_all, *(name.format(rank) for name in of_one for rank in (0, 1, 12))]
    needed = needed_by([FileEntry(name, 1, DIGEST) for name in names], (1, 2))
    assert [file.path for file in needed] == [*of_all, *(name.format(1) for name in of_one)]
