"""Launches are killed at one operation after the other, and each goes on from the newest commit by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.manifest import files_in
from hf_spot.run.output_folder import enter, set_aside_uncommitted
from hf_spot.run.restore import restore_newest
from hf_spot.run.run import Run
from hf_spot.run.upload import Uploader
from hf_spot.storage.local import LocalStore
from hf_spot.storage.open import open_store
from hf_spot.storage.store import ObjectInfo, ObjectStore, Progress
from tests import leftovers
from tests.run.crashes import Crash, PowerCut, kill

NAMES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
SAVES, PATIENCE_S, GIVE_UP_S = 2, 60.0, 500.0
MOST_CHECKPOINTS = 20  # two stay, and a launch that dies behind its first commit leaves the older ones to the next
NOTHING_WRONG = "0 commits lost, 0 hangs, 0 wrong resumes"  # said by a test that has asserted it at each point


class Watched:
    """A store whose every request, and every answer, is a point to crash at."""

    def __init__(self, inner: ObjectStore, crash: Crash) -> None:
        self._inner, self._crash, self.url = inner, crash, inner.url

    def get(self, key: str) -> bytes:
        return self._at(lambda: self._inner.get(key))

    def put(self, key: str, data: bytes) -> None:
        self._at(lambda: self._inner.put(key, data))

    def create(self, key: str, data: bytes) -> bool:
        return self._at(lambda: self._inner.create(key, data))

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        self._at(lambda: self._inner.put_file(key, path, progress))

    def get_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        self._at(lambda: self._inner.get_file(key, path, progress))

    def copy(self, source: str, key: str) -> None:
        self._at(lambda: self._inner.copy(source, key))

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        return iter(self._at(lambda: [*self._inner.list(prefix, start_after)]))

    def delete(self, keys: Iterable[str]) -> None:
        names = [*keys]
        self._at(lambda: self._inner.delete(names))

    def abort(self, stale: Callable[[str], bool]) -> int:
        return self._at(lambda: self._inner.abort(stale))

    def _at(self, act):  # type: ignore[no-untyped-def]
        self._crash.point()
        answer = act()
        self._crash.point()
        return answer


def contents(step: int) -> dict[str, bytes]:
    return {name: f"{name} of step {step}".encode() * 50 for name in NAMES}


def save(folder: Path, step: int) -> Path:
    """As Trainer does: file by file, trainer_state.json at the end, nothing synced."""
    folder.mkdir()
    for name, data in contents(step).items():
        (folder / name).write_bytes(data)
    return folder


def launch(store: ObjectStore, output_dir: Path, acknowledge: Callable[[int], None]) -> None:
    """What a launch does with its files, without a model: claim, restore, save, upload, commit, prune."""
    output_dir.mkdir(exist_ok=True)
    run = Run(store)
    run.claim()
    enter(run, output_dir, keep=False)
    found = restore_newest(run, run.state().checkpoints, output_dir)
    step = found[0].step if found else 0
    if found:
        assert {name: (found[1] / name).read_bytes() for name in files_in(found[1])} == contents(step), "a wrong resume"
    set_aside_uncommitted(run, output_dir, step)
    uploader = Uploader(run, output_dir / ".hf_spot" / f"pins-{run.launch}", save_total_limit=2)
    for _ in range(SAVES):
        step += 5
        uploader.submit(save(output_dir / f"checkpoint-{step}", step), CommitRequest(step=step))
        assert uploader.drain(PATIENCE_S), uploader.trouble
        acknowledge(step)
        for old in sorted(output_dir.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)[:-2]:
            shutil.rmtree(old)
    uploader.close()


class Machine:
    """Starts launches in processes of their own, and remembers what they were told to be committed."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.disk = folder / "disk"
        self.disk.mkdir()
        self.store = open_store(url)  # for those who look at what is there: a client for each look costs more than the look
        self.committed = 0
        self.tried = 0

    def start(self, crash_at: int, make_end: Callable[[], Callable[[], None]] = lambda: kill) -> bool:
        """One launch that ends at its operation ``crash_at``; True when it came to its end before."""
        told = self.folder / "told"

        def act() -> None:
            with Crash(crash_at, make_end(), self.folder) as crash:
                launch(Watched(open_store(self.url), crash), self.disk / "out", lambda step: tell(told, step))

        self.tried += 1
        return comes_to_its_end(act)

    def check(self) -> None:
        """Nothing that was committed is lost, everything that is in the run is whole, and launches that die don't leave ever
        more to do to the next: none would come to its end before it crashes."""
        run = Run(self.store)
        told = self.folder / "told"
        self.committed = max(self.committed, *map(int, told.read_text().split())) if told.exists() else self.committed
        newest = run.latest()
        assert (newest.step if newest else 0) >= self.committed
        if newest is not None:
            assert run.verify(newest.step) == {newest.ref.entry: []}
        standing = {info.key: info.size for info in run.store.list("e")}
        assert wanted(run).items() <= standing.items(), "files of a checkpoint that is in the run are gone"
        assert len(run.state().checkpoints) < MOST_CHECKPOINTS, "old ones stay"


def wanted(run: Run) -> dict[str, int]:
    """What the journal names: keys and sizes."""
    return {f"{one.ref.prefix}/{file.path}": file.size for one in run.checkpoints() for file in one.files}


def comes_to_its_end(act: Callable[[], None]) -> bool:
    """Whether ``act`` does, in a process of its own, or is killed."""
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended in (0, -9), f"what was to crash ended with {ended}"
    return ended == 0


def tell(path: Path, step: int) -> None:
    with path.open("a") as file:
        file.write(f"{step}\n")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory, where that is possible. What a killed process has written stays there as on a disk, and what a power cut
    would leave is `PowerCut`'s business; a disk would only take its time for ten thousand syncs."""
    memory = leftovers.MEMORY if os.access(leftovers.MEMORY, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(prefix=leftovers.name(), dir=memory) as made:
        yield Path(made)


def kill_at_each(url: str, folder: Path, stride: int) -> int:
    """Kill launches at one operation after the other; return how many there were."""
    machine = Machine(url, folder)
    at = 1
    while not machine.start(at):
        machine.check()
        at += stride
    machine.check()
    nothing_grows(machine)
    assert at > 100  # each was the last operation of a launch
    return machine.tried


def cut_the_power_at_each(url: str, folder: Path, stride: int) -> int:
    """Cut the power of launches at one operation after the other; return how many there were."""
    machine = Machine(url, folder)
    at, after = 1, folder / "after"
    while not machine.start(at, lambda: PowerCut(machine.disk, after)):
        shutil.rmtree(machine.disk)
        after.rename(machine.disk)
        machine.check()
        at += stride
    machine.check()
    nothing_grows(machine)
    assert at > 100
    return machine.tried


def in_a_small_process(do: Callable[[str, Path, int], int], url: str, folder: Path, stride: int) -> int:
    """Call one of these in a Python of its own: to fork one that has imported torch takes longer than such a launch."""
    command = [sys.executable, "-m", "tests.run.test_crash_points", do.__name__, url, str(folder), str(stride)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=GIVE_UP_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(("where", "stride"), [("directory", 1), ("s3", 3)])
def test_killed_at_any_operation(
    where: str, stride: int, folder: Path, request: pytest.FixtureRequest, counted: Callable[[str], None]
) -> None:
    """Each operation on files, with the run in a directory; every third on files and store, with the run on S3: as each
    launch has more or less to restore and to prune than the one before, they are not the same ones in each round of uploads."""
    if where == "s3":
        tried = kill_at_each(request.getfixturevalue("s3_url"), folder, stride)
    else:
        tried = in_a_small_process(kill_at_each, str(folder / "disk" / "run"), folder, stride)
    counted(f"launches killed ({where}): {tried} points, {NOTHING_WRONG}")


def test_the_power_is_cut_at_any_operation(folder: Path, counted: Callable[[str], None]) -> None:
    # To follow what the disk holds takes long; each of these launches does other things than the one before.
    tried = in_a_small_process(cut_the_power_at_each, str(folder / "disk" / "run"), folder, stride=7)
    counted(f"launches whose machine lost its power: {tried} points, {NOTHING_WRONG}")


def test_what_a_directory_has_taken_or_given_outlives_a_power_cut(folder: Path) -> None:
    disk, after = folder / "disk", folder / "after"
    disk.mkdir()
    data = b"whatever"

    def act() -> None:
        cut_the_power = PowerCut(disk, after)
        store = LocalStore(disk / "run")
        (folder / "source").write_bytes(data)
        store.put("put/x", data)
        store.create("create/x", data)
        store.put_file("put_file/x", folder / "source")
        store.copy("put/x", "copy/x")
        store.get_file("put/x", disk / "got")
        cut_the_power()

    assert not comes_to_its_end(act)
    assert {info.key: LocalStore(after / "run").get(info.key) for info in LocalStore(after / "run").list()} == {
        f"{how}/x": data for how in ("copy", "create", "put", "put_file")
    }
    assert (after / "got").read_bytes() == data


def test_a_checkpoint_that_is_pulled_while_the_power_is_cut_is_there_as_a_whole_or_not_at_all(folder: Path) -> None:
    disk, after = folder / "disk", folder / "after"
    saved = save(folder / "checkpoint-5", 5)
    (saved / "sub").mkdir()
    (saved / "sub" / "more").write_bytes(b"more")
    Run(folder / "run").push(saved)
    ended, at = False, 0
    while not ended:
        at += 1
        (disk / "out").mkdir(parents=True)

        def act(at: int = at) -> None:
            cut_the_power = PowerCut(disk, after)
            with Crash(at, cut_the_power, disk) as crash:
                Run(folder / "run").pull(disk / "out")
                if crash.count < at:  # behind its last operation
                    (folder / "done").touch()
                    cut_the_power()

        assert not comes_to_its_end(act)
        ended = (folder / "done").exists()
        found = after / "out" / "checkpoint-5"
        assert found.exists() or not ended
        assert not found.exists() or Run(folder / "run").compare(Run(folder / "run").find(), found) == []
        shutil.rmtree(disk)
        shutil.rmtree(after)
    assert at > len(NAMES)


def nothing_grows(machine: Machine) -> None:
    """After a launch that came to its end there is nothing but what the journal names.

    Halves of journal entries and the objects of probes are small, and are swept after a day: see test_local and test_run.
    """
    assert machine.start(10**9)
    run = Run(machine.store)
    assert {info.key: info.size for info in run.store.list("e")} == wanted(run)
    assert run.store.abort(lambda key: key.startswith("e")) == 0
    left = {path.name for path in (machine.disk / "out").iterdir()}
    newest = run.latest()
    assert newest is not None
    torn = [name for name in left if name.startswith("torn-")]
    assert len(torn) <= 1
    assert left - {*torn, ".hf_spot"} == {f"checkpoint-{newest.step}", f"checkpoint-{newest.step - 5}"}
    assert [path.name for path in (machine.disk / "out" / ".hf_spot").iterdir()] == ["run"]


if __name__ == "__main__":
    print(globals()[sys.argv[1]](sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])))
