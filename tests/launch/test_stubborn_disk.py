"""Trainer saves on filesystems that refuse modes, links, times or syncs, as mounted buckets do, and so does a launch."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hf_spot.run.run import Run
from tests.launch.conftest import Launcher, Twin
from tests.stubborn_disk import StubbornDisk, compiled, why_not
from tests.zygote import Zygote

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "not skipped")


@pytest.fixture(scope="module")
def library(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    return made_once("stubborn-disk", compiled) / "stubborn.so"


@pytest.fixture(scope="module")
def stubborn_zygote(library: Path) -> Iterator[Zygote]:
    """Forks Pythons that have loaded the library before libc; it reads what it refuses at each call.

    No test here is marked ``slow`` (those marked ``proof`` aside): each worker would get one of them, and import torch for it.
    """
    made = Zygote({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LD_PRELOAD": str(library)})
    yield made
    assert made.refusals == []
    made.close()


@pytest.fixture
def disk(tmp_path: Path, library: Path) -> StubbornDisk:
    """That of the launcher's working directory."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "train").mkdir()
    return StubbornDisk(library, tmp_path / "train", tmp_path / "scratch")


@pytest.fixture
def trainings(disk: StubbornDisk, stubborn_zygote: Zygote) -> Launcher:
    return Launcher(disk.under, zygote=stubborn_zygote)


@pytest.mark.parametrize(
    ("refuses", "error"),
    [
        ("chmod,utime", errno.EPERM),
        ("link,symlink", errno.EPERM),
        ("link", errno.ENOTSUP),
        ("fsync", errno.EINVAL),
        ("chmod,utime,link,symlink,fsync", errno.ENOSYS),
    ],
)
def test_a_training_is_saved_restored_and_finished_where_the_disk_refuses(
    refuses: str, error: int, disk: StubbornDisk, trainings: Launcher, twin: Twin, tmp_path: Path
) -> None:
    store = str(tmp_path / "store")
    env = disk.env(refuses, error=error)
    launch = trainings.plain(store, "--hold_at", "7", env=env)
    try:
        launch.wait_for_step(7)
        launch.process.send_signal(signal.SIGTERM)
        launch.go_on_when_it_says("TERMINATE from signal")
        assert launch.wait() == 75, launch.text()
        assert Run(store).find().step == launch.step() >= 7
        launch = trainings.plain(store, env=env)
        assert launch.wait() == 0, launch.text()
    finally:
        for one in trainings.launches:
            if one.process.poll() is None:
                one.kill_tree()
    assert trainings.weights() == twin.weights
    assert "Traceback" not in launch.text()
    assert "downloaded again" not in launch.text()
    assert set(map(tuple, Run(store).verify().values())) == {()}


def test_a_disk_that_cannot_rename_saves_and_a_restore_there_is_refused_in_one_line(
    disk: StubbornDisk, trainings: Launcher, tmp_path: Path
) -> None:
    store = str(tmp_path / "store")
    env = disk.env("rename", error=errno.ENOSYS)
    launch = trainings.plain(store, "--hold_at", "7", env=env)
    try:
        launch.wait_for_step(7)
        launch.process.send_signal(signal.SIGTERM)
        launch.go_on_when_it_says("TERMINATE from signal")
        assert launch.wait() == 75, launch.text()
        launch = trainings.plain(store, options=["--max-restarts", "0"], env=env)
        assert launch.wait() == 2, launch.text()
    finally:
        for one in trainings.launches:
            if one.process.poll() is None:
                one.kill_tree()
    assert "can't be written: Function not implemented" in launch.text()
    assert "set output_dir to another disk" in launch.text()


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_whichever_write_fails_the_run_stands_and_the_next_launch_finishes_it(
    error: int, disk: StubbornDisk, trainings: Launcher, twin: Twin, tmp_path: Path, counted: Callable[[str], None]
) -> None:
    def train(number: int, *, fails: int) -> int:
        env = disk.env(write=fails, error=error)
        launch = trainings.plain(str(tmp_path / f"store-{number}"), options=["--max-restarts", "0"], env=env)
        try:
            code = launch.wait()
        finally:
            if launch.process.poll() is None:
                launch.kill_tree()
        return code

    assert train(0, fails=0) == 0
    writes = disk.writes
    assert writes > 20
    refused = 0
    for number, at in enumerate(range(1 + error % 5, writes, writes // 4), 1):
        refused += train(number, fails=at) != 0
        run = Run(tmp_path / f"store-{number}")
        assert set(map(tuple, run.verify().values())) <= {()}
        if run.state().ended != "finished":
            assert train(number, fails=0) == 0, trainings.launches[-1].text()
            assert trainings.weights() == twin.weights
    counted(f"disks that fail a write with {errno.errorcode[error]}: {number} trainings, {refused} ended by it, none lost")
