"""Limits of control groups count, as containers, Slurm and systemd set them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from hf_spot.free_memory import available_and_total_bytes

V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cached}\nother 2\n")


def found(tmp_path: Path, own: str) -> tuple[int, int]:
    (tmp_path / "own").write_text(own)
    return available_and_total_bytes(tmp_path / "groups", tmp_path / "own")


def test_without_a_limit_it_is_the_machines(tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    assert found(tmp_path, "0::/a\n3:cpu:/\n")[1] == total
    assert available_and_total_bytes(tmp_path, tmp_path / "missing")[1] == total
    group(tmp_path / "groups" / "a", V2, "max", 5)
    assert found(tmp_path, "0::/a\n")[1] == total


@pytest.mark.parametrize("place", ["job/step", "job", "."])
def test_the_nearest_limit_may_be_of_any_group_above(place: str, tmp_path: Path) -> None:
    group(tmp_path / "groups" / place, V2, "1000", 900, cached=300)
    assert found(tmp_path, "0::/job/step\n") == (400, 1000)


def test_the_least_that_any_of_them_leaves_counts_and_is_never_negative(tmp_path: Path) -> None:
    group(tmp_path / "groups" / "job", V2, "1000", 100)
    group(tmp_path / "groups" / "job" / "step", V2, "800", 900)
    assert found(tmp_path, "0::/job/step\n") == (0, 800)


def test_groups_of_version_1_count_too(tmp_path: Path) -> None:
    group(tmp_path / "groups" / "memory", V1, "1000", 700, cached=100)  # as a container sees its own, under the host's path
    assert found(tmp_path, "11:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n") == (400, 1000)
    assert found(tmp_path, "5:pids:/\n")[1] == psutil.virtual_memory().total
