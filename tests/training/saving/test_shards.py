"""What two ranks write of a sharded model behind their training is what Trainer would have written, for all or for none."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

from hf_spot import Run
from hf_spot.run.manifest import files_in
from tests.waiting import PATIENCE_S
from tests.zygote import Zygote

SCRIPT = Path(__file__).parent.parent / "scripts" / "sharded.py"
STEPS = [3, 6, 9, 12]
RANGES = ("all", "wanted", "fetched", "share", "unforeseen")  # columns of megabytes


def launch(zygote: Zygote, folder: Path, *scenes: str, count: int = 2) -> tuple[list[int], list[str]]:
    """So many ranks, as machines of their own: what each ended with, and what it said."""
    shared = {"WORLD_SIZE": str(count), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    shared["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, "-Wignore", str(SCRIPT), str(folder), *scenes]
    with zygote.forking():
        ranks = [
            subprocess.Popen(
                command,
                env=os.environ | shared | {"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(count)
        ]
    try:
        said = [rank.communicate(timeout=PATIENCE_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], said


def facts(folder: Path, scene: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{scene}-{rank}.json").read_text()) for rank in range(2)]


def test_a_replicated_model_is_copied_beside_the_training_of_all_ranks(tmp_path: Path, zygote: Zygote) -> None:
    codes, said = launch(zygote, tmp_path, "replicated")
    assert codes == [0, 0], "\n".join(said)
    main, other = facts(tmp_path, "replicated")
    for seen in (main, other):
        assert seen["distributed"].endswith("MULTI_CPU")
        assert len(seen["plain"]) == 6 * 3 and seen["spot"] == seen["plain"]
        assert seen["step of the end"] == 6 and seen["commits"][-1] == 4  # others may give way to it
    assert other["left for later"] == [] and min(main["left for later"]) > 0


def test_training_goes_on_while_its_shards_are_written_and_they_are_those_of_trainer(tmp_path: Path, zygote: Zygote) -> None:
    codes, said = launch(zygote, tmp_path, "fsdp2", "fsdp1")
    assert codes == [0, 0], "\n".join(said)
    for scene, disks in (("fsdp2", ["out"]), ("fsdp1", ["out-0", "out-1"])):
        for seen in facts(tmp_path, scene):
            assert seen["shards while rank 1 is held"] == [False, False]
            assert seen["commits while rank 1 is held"] == []
            assert seen["commits while a file of rank 1 is missing"] == [3]
            assert seen["older ones meanwhile"] == ["checkpoint-3", "checkpoint-6"]
            assert seen["older ones afterwards"] == ["checkpoint-6"]
            assert seen["threads"] == ["hf_spot-writer"] * 6  # two folders for each save but the last, which ends the training
            assert seen["commits"] == STEPS
            assert seen["same"]
        for disk in disks:
            assert [path.name for path in (tmp_path / scene / disk).glob("checkpoint-*")] == ["checkpoint-12"]
        run = Run(tmp_path / scene / "run")
        assert all(problems == [] for problems in run.verify().values())
        for step in STEPS:
            check_same(tmp_path / scene / "plain" / f"checkpoint-{step}", run.pull(tmp_path / scene / "pulled", step))


def check_same(plain: Path, pulled: Path) -> None:
    names = {name for name in files_in(plain) if name != "trainer_state.json"}  # it has our metrics in it
    assert {f"{of}/__{rank}_0.distcp" for of in ("pytorch_model_fsdp_0", "optimizer_0") for rank in (0, 1)} < names
    assert names < {*files_in(pulled)}
    for name in names:
        if name.endswith(".metadata"):
            assert content(pulled / name) == content(plain / name)
        else:
            assert (pulled / name).read_bytes() == (plain / name).read_bytes()


def content(metadata: Path) -> Any:
    """Without the name of the folder, and without the number that each save draws."""
    return dataclasses.replace(pickle.loads(metadata.read_bytes()), storage_meta=None)


def test_a_sharded_save_never_mixes_two_steps_and_what_one_rank_can_not_write_is_gone_for_all(
    tmp_path: Path, zygote: Zygote
) -> None:
    codes, said = launch(zygote, tmp_path, "mutating", "odd", "no_memory", "one_reads", "trouble", "refused")
    assert codes == [0, 0], "\n".join(said)
    for seen in facts(tmp_path, "mutating"):
        assert seen["each"] == [{"written at once": False, "one step": True}] * 3
        assert seen["places"] == 1  # the memory of one save is that of the next

    main, other = facts(tmp_path, "odd")
    for seen in (main, other):
        assert seen["each"] == [{"at once": False, "same": True}, {"at once": True, "same": True}]
        assert seen["alone"] == {"at once": False, "same": True}
    assert len(main["said"]) == 1 and "torch.complex64 and torch.strided can't be copied" in main["said"][0]

    main, other = facts(tmp_path, "no_memory")
    assert main["there"] == other["there"] == [True, True]  # at once, on both
    assert len(main["said"]) == 1 and "does not fit into the 0.0 GB" in main["said"][0]
    assert other["said"] == []

    assert facts(tmp_path, "one_reads")[1]["there"] == [[True, True]] * 2  # it finds the shards of all ranks

    main, other = facts(tmp_path, "trouble")
    for seen in (main, other):
        assert seen["folders"] == [["checkpoint-3"], ["checkpoint-9"]]
        assert seen["commits"] == [3, 9, 15]
        assert seen["step"] == 15
    assert len(main["said"]) == 2 and "checkpoint-6 can't be saved: File too large" in main["said"][0]
    assert "checkpoint-12 can't be saved" in main["said"][1]
    # The file of its steps does not fit either, if it happens to be written just then.
    assert [line for line in other["said"] if "/.hf_spot/steps-" not in line] == []

    for seen in facts(tmp_path, "refused"):
        check_refused(seen)


def check_refused(seen: dict[str, Any]) -> None:
    """What Trainer can't resume is refused on each rank, before it is trained and before the run is taken."""
    tensor, context, divided = seen["said"]
    assert context.startswith("ParallelismConfig(cp_size=2): Trainer can't save and resume")
    assert tensor.startswith("ParallelismConfig(tp_size=2): Trainer can't save and resume")
    assert divided.startswith("the model was divided among the ranks when it was loaded")
    assert all("fsdp='full_shard'" in one for one in seen["said"])
    assert (seen["steps"], seen["run"]) == ([0, 0, 0], False)


def test_a_rank_that_is_killed_in_the_middle_of_its_shards_leaves_no_commit_and_nobody_waiting(
    tmp_path: Path, zygote: Zygote
) -> None:
    (main, killed, other), said = launch(zygote, tmp_path, "killed", count=3)
    assert killed == -9, said[1]
    for survivor, words in ((main, said[0]), (other, said[2])):  # who plans for all, and who waits for the plan
        assert survivor not in (0, -9), words
        assert "because a rank has ended" in words
    assert [entry.data["step"] for entry in Run(tmp_path / "killed/run").events() if entry.kind == "commit"] == [3]


def test_each_machine_fetches_what_its_ranks_read_and_has_what_was_saved(tmp_path: Path, zygote: Zygote) -> None:
    command = [sys.executable, "-Wignore", "-m", "tests.ranges", "2", "--blind", "2", "--width", "256"]
    with zygote.forking():
        played = subprocess.run(
            [*command, "--keep", str(tmp_path / "played")], capture_output=True, text=True, timeout=PATIENCE_S
        )
    assert played.returncode == 0, played.stdout + played.stderr
    foreseen, blind = (dict(zip(RANGES, map(float, line.split()[1:]), strict=True)) for line in played.stdout.splitlines()[1:])
    assert foreseen["unforeseen"] == 0
    assert foreseen["fetched"] < 0.6 * foreseen["all"], "one of two shards, and a little of the other"
    assert blind["unforeseen"] > 0.9 * blind["wanted"]
    assert blind["fetched"] < 0.6 * blind["all"]
