"""Several machines: network namespaces, each with a disk and a metadata service of its own, and a real S3 server outside."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch

from hf_spot.run.run import Run
from tests.gate import Gate
from tests.hosts import Hosts, kill, why_not
from tests.launch.conftest import PLAIN, SCRIPTS, Lines, Twin, read_diary
from tests.matrix.runner import SCRIPT as TRAIN
from tests.servers import SeaweedFS
from tests.waiting import PATIENCE_S, wait_for
from tests.zygote import Zygote

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

PEER_TIMEOUT_S = 5
MORE_SAVES = SCRIPTS / "more_saves.py"
LOOP = SCRIPTS / "ddp_loop.py"


@dataclass
class Cluster:
    """Starts the same launch on every host."""

    hosts: Hosts
    url: str
    env: dict[str, str]
    zygote: Zygote | None
    launches: int = 0
    running: list[psutil.Popen] = field(default_factory=list)

    def launch(self, *more: str, only: list[int] | None = None) -> None:
        """plain.py, with files of its own for each launch."""
        number = self.launches + (only is None)
        files = ["--output_dir", f"out-{number}", "--diary", f"diary-{number}", "--weights", f"weights-{number}"]
        self.start([PLAIN, *files, *more], only=only)

    def launch_saving_more(self) -> None:
        """The same, and a save is added."""
        number = self.launches + 1
        files = ["--output_dir", f"out-{number}", "--diary", f"diary-{number}", "--weights", f"weights-{number}"]
        # No other save gets in the way of its upload.
        self.start([MORE_SAVES, *files, "--save_steps", "100", "--hold_at", "12", "--save_on_each_node"])
        self.wait_for_step(12)

    def start(self, script: Sequence[str | Path], *options: str, only: list[int] | None = None) -> None:
        if only is None:
            self.launches += 1
            self.running = []
        for host in range(self.hosts.count) if only is None else only:
            self.running.append(self._start(host, script, options))

    def _start(self, host: int, script: Sequence[str | Path], more: Sequence[str]) -> psutil.Popen:
        count = self.hosts.count
        options = ["--num_machines", count, "--machine_rank", host, "--num_processes", count, "--multi_gpu"]
        options += ["--main_process_ip", self.hosts.address(0), "--main_process_port", 29500]
        options += ["--peer-timeout-s", PEER_TIMEOUT_S, "--store", self.url, *more]
        command = [sys.executable, "-m", "hf_spot", "launch", *map(str, [*options, *script])]
        env = {**self.env, "XDG_CACHE_HOME": str(self.hosts.folder(host) / "cache")}  # each has a user of its own
        with open(self.hosts.folder(host) / f"log-{self.launches}", "wb") as out:
            streams = {"stdout": out, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            return self.hosts.start(host, command, env, self.zygote, **streams)

    def wait(self) -> list[int]:
        return [process.wait(PATIENCE_S) for process in self.running]

    def text(self) -> str:
        return "\n".join(
            f"--- host {host}\n{(self.hosts.folder(host) / f'log-{self.launches}').read_text(errors='replace')}"
            for host in range(self.hosts.count)
        )

    def lines(self, host: int = 0) -> Lines:
        return [line for line in read_diary(self.hosts.folder(host) / f"diary-{self.launches}") if "loss" in line]

    def wait_for_step(self, step: int) -> None:
        def there() -> bool:
            return self.ended() or max((line["step"] for line in self.lines()), default=0) >= step

        wait_for(there, f"for step {step}: {self.text()}")
        assert not self.ended(), self.text()

    def ended(self) -> bool:
        """Whether one of the launchers has."""
        return any(process.poll() is not None for process in self.running)

    def end_soon(self, *hosts: int) -> list[int]:
        """Exit codes of these launchers, which have noticed that another machine is gone."""
        late = psutil.wait_procs([self.running[host] for host in hosts], timeout=PEER_TIMEOUT_S + 20)[1]
        assert late == [], f"they go on: {self.text()}"
        return [self.running[host].wait() for host in hosts]

    def hold_at(self, step: int, *more: str) -> None:
        """All ranks wait behind this step, until `go_on`: whatever a test does then comes in the middle of the training."""
        self.launch("--hold_at", str(step), *more)
        self.wait_for_step(step)

    def go_on(self, when: str = "") -> None:
        wait_for(lambda: when in self.text(), f"for {when!r}: {self.text()}")
        for host in range(self.hosts.count):
            (self.hosts.folder(host) / f"out-{self.launches}" / "go-on").touch()

    def hold_again(self) -> None:
        """A launch that starts again holds at that step, too. To be called before it gets there."""
        for host in range(self.hosts.count):
            (self.hosts.folder(host) / f"out-{self.launches}" / "go-on").unlink()

    def weights(self) -> bytes:
        return (self.hosts.folder(0) / f"weights-{self.launches}" / "model.safetensors").read_bytes()


@pytest.fixture
def cluster(request: pytest.FixtureRequest, seaweedfs: SeaweedFS, tmp_path: Path) -> Iterator[Cluster]:
    with Hosts(getattr(request, "param", 2), tmp_path) as hosts, Gate(seaweedfs.endpoint, hosts.outside) as gate:
        bucket = seaweedfs.make_bucket(f"machines-{os.getpid()}-{time.monotonic_ns()}")
        env = {**os.environ, **seaweedfs.env(), "AWS_ENDPOINT_URL": gate.endpoint}
        env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        fresh = request.node.get_closest_marker("fresh_python")
        yield Cluster(hosts, f"s3://{bucket}/run", env, None if fresh else request.getfixturevalue("zygote"))


def test_a_notice_on_one_machine_stops_both_and_each_disk_is_committed_and_restored(
    cluster: Cluster, twin_of_ranks: Callable[[int], Twin], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = twin_of_ranks(2)
    with open(cluster.hosts.folder(1) / "imds", "wb") as out:
        cluster.hosts.start(1, [sys.executable, "-m", "hf_spot.testing"], cluster.env, stdout=out)
    told = cluster.hosts.folder(1) / "imds"
    wait_for(lambda: "export" in told.read_text(), "for the metadata service")
    metadata_service = cluster.hosts.processes[-1]
    address = dict(line.removeprefix("export ").split("=", 1) for line in told.read_text().splitlines())
    run = run_of(cluster, monkeypatch)
    cluster.env |= address  # machine 0 finds nobody there
    cluster.hold_at(7, "--save_on_each_node")  # Trainer then writes on machine 1 what rank 0 writes on machine 0
    [child] = metadata_service.children() or [metadata_service]
    child.send_signal(signal.SIGUSR1)
    cluster.go_on(when="TERMINATE from imds")
    assert cluster.wait() == [75, 75], cluster.text()
    newest = run.latest()
    assert newest is not None and newest.reason == "notice"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.path for file in newest.files}
    first = {line["step"]: line for line in cluster.lines()}
    assert max(first) == newest.step
    metadata_service.kill()

    cluster.launch_saving_more()
    wait_for(lambda: any(entry.data.get("reason") == "cadence" for entry in run.events()), "for the commit of the added save")
    cluster.go_on()
    assert cluster.wait() == [0, 0], cluster.text()
    second = {line["step"]: line for line in cluster.lines()}
    assert min(second) == newest.step + 1
    assert first | second == undisturbed.lines
    assert cluster.weights() == undisturbed.weights
    # Each machine fetched what its own ranks read.
    restored = cluster.hosts.folder(1) / "out-2" / newest.name
    assert not (restored / "rng_state_0.pth").exists()
    # Rank 0's clock has added a save, and both machines have made it.
    assert [entry.data["step"] for entry in run.events() if entry.data.get("reason") == "cadence"] == [11]
    assert [entry.kind for entry in run.events()][-1] == "finished"


@pytest.mark.proof
@pytest.mark.parametrize("lacking", [False, True])
def test_a_save_that_is_whole_on_the_disks_of_all_machines_is_committed_and_resumed(
    lacking: bool, cluster: Cluster, twin_of_ranks: Callable[[int], Twin], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = twin_of_ranks(2)
    run = run_of(cluster, monkeypatch)
    script = [SCRIPTS / "restless.py", "--output_dir", "out", "--weights", "weights-2"]
    cluster.env |= {"UPLOADS_UP_TO": "5"}
    cluster.start([*script, "--diary", "diary-1", "--hold_at", "12"])
    cluster.wait_for_step(12)
    records = [cluster.hosts.folder(host) / "out" / ".hf_spot" / "whole-1-10.json" for host in range(2)]
    wait_for(lambda: all(path.exists() for path in records), f"for the records: {cluster.text()}")
    for process in cluster.running:
        kill(process)
    assert [one.step for one in run.checkpoints()] == [5]
    if lacking:
        records[1].unlink()
    del cluster.env["UPLOADS_UP_TO"]
    cluster.start([*script, "--diary", "diary-2"])
    assert cluster.wait() == [0, 0], cluster.text()
    assert [line["step"] for line in cluster.lines()] == list(range(6 if lacking else 11, max(undisturbed.lines) + 1))
    assert all(line == undisturbed.lines[line["step"]] for line in cluster.lines())
    assert cluster.weights() == undisturbed.weights
    commits = [entry for entry in run.events() if entry.kind == "commit" and entry.data["step"] == 10]
    assert [(entry.launch, entry.data.get("saved_by_launch")) for entry in commits] == [(2, None if lacking else 1)]


@pytest.mark.proof
@pytest.mark.parametrize("lacking", [False, True])
def test_a_save_that_is_in_the_memory_of_all_machines_is_committed_and_resumed(
    lacking: bool, cluster: Cluster, twin_of_ranks: Callable[[int], Twin], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = twin_of_ranks(2)
    run = run_of(cluster, monkeypatch)
    script = [SCRIPTS / "restless.py", "--output_dir", "out", "--weights", "weights-1", "--diary", "diary-1"]
    cluster.env |= {"UPLOADS_UP_TO": "5", "UPLOADS_AGAIN": "out/go-on"}
    cluster.start([*script, "--hold_at", "12"])
    cluster.wait_for_step(12)
    disks = [cluster.hosts.folder(host) / "out" for host in range(2)]
    records = [disk / ".hf_spot" / "whole-1-10.json" for disk in disks]
    wait_for(lambda: all(path.exists() for path in records), f"for the records: {cluster.text()}")
    for path in records:
        path.unlink()
    shutil.rmtree(disks[1] / "checkpoint-10")
    if lacking:
        for number in Path(f"/proc/{cluster.running[1].pid}/fd").iterdir():
            if os.readlink(number).startswith("/memfd:hf_spot"):
                os.truncate(number, 0)
    ranks = [one for one in cluster.running[1].children(recursive=True) if "RANK" in one.environ()]
    ranks[-1].kill()
    for disk in disks:
        (disk / "go-on").touch()
    assert cluster.wait() == [0, 0], cluster.text()
    assert [line["step"] for line in cluster.lines()][12:] == list(range(6 if lacking else 11, max(undisturbed.lines) + 1))
    assert cluster.weights() == undisturbed.weights
    commits = [entry for entry in run.events() if entry.kind == "commit" and entry.data["step"] == 10]
    told = [(entry.launch, entry.data.get("saved_by_launch"), entry.data.get("taken_from")) for entry in commits]
    assert told == ([(2, None, None)] if lacking else [(2, 1, "memory")])


@pytest.mark.parametrize("cluster", [3], indirect=True)
@pytest.mark.fresh_python
def test_when_one_of_the_others_dies_without_a_word_all_end_soon(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machine 1 hears of machine 2 by machine 0. It is the launchers' business: what they start only waits."""
    run = run_of(cluster, monkeypatch)
    script = tmp_path / "waits.py"
    script.write_text("import signal; open('waits', 'w').close(); signal.pause()")
    cluster.start([script])
    waits = [cluster.hosts.folder(host) / "waits" for host in range(3)]
    wait_for(lambda: all(path.exists() for path in waits), f"for all scripts: {cluster.text()}")
    cluster.hosts.unplug(2)
    assert cluster.end_soon(0, 1) == [75, 75], cluster.text()
    assert [entry.kind for entry in run.events()] == ["claim", "preempted"]


def test_a_training_fails_on_one_machine_then_machine_0_dies_without_a_word_and_each_time_all_go_on_together(
    cluster: Cluster, twin_of_ranks: Callable[[int], Twin], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = twin_of_ranks(2)
    run = run_of(cluster, monkeypatch)

    def launches() -> list[int]:
        return [entry.launch for entry in run.events() if entry.kind == "claim"]

    def newest() -> int:
        found = run.state().latest()
        return found.step if found else 0

    # Both machines start again by themselves: the launchers are the same processes.
    cluster.hold_at(6)
    wait_for(lambda: newest() == 5, "for a commit")
    ranks = [one for one in cluster.running[1].children(recursive=True) if "RANK" in one.environ()]
    assert ranks
    ranks[-1].kill()
    cluster.go_on()
    wait_for(lambda: len(launches()) == 2 or cluster.ended(), "for the next launch")
    assert not cluster.ended(), cluster.text()
    cluster.hold_again()
    wait_for(lambda: [line["step"] for line in cluster.lines()] == [1, 2, 3, 4, 5, 6, 6], f"for step 6: {cluster.text()}")

    # Machine 0 is the one by which the others hear of each other.
    assert not cluster.ended(), cluster.text()
    cluster.hosts.unplug(0)
    cluster.go_on()
    assert cluster.end_soon(1) == [75], cluster.text()
    kill(cluster.running[0])
    cluster.hosts.plug_in(0)
    assert newest() == 5
    first = cluster.lines()

    cluster.launch()
    assert cluster.wait() == [0, 0], cluster.text()
    last = cluster.lines()
    assert [line["step"] for line in last] == list(range(6, max(undisturbed.lines) + 1))
    assert all(line == undisturbed.lines[line["step"]] for line in [*first, *last])
    assert cluster.weights() == undisturbed.weights
    assert launches() == [1, 2, 3]


def test_a_loop_of_ones_own_goes_on_after_a_death_and_ends_with_a_notice_as_if_nothing_had_happened(
    cluster: Cluster, loop_of_ranks_in_peace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(cluster, monkeypatch)
    cluster.start([LOOP, "--diary", "diary-1", "--hold_at", "6"])
    cluster.wait_for_step(6)
    wait_for(run.latest, f"for the commit of step 4: {cluster.text()}")
    cluster.running[1].kill()  # the launcher alone: what it has started must not outlive it
    assert cluster.running[0].wait(PATIENCE_S) == 75, cluster.text()
    first = cluster.lines()

    cluster.start([LOOP, "--diary", "diary-2", "--hold_at", "15"], "--notice", "file:notice")
    cluster.wait_for_step(15)
    (cluster.hosts.folder(1) / "notice").touch()
    wait_for(lambda: "TERMINATE from file" in cluster.text(), f"for the notice: {cluster.text()}")
    (cluster.hosts.folder(0) / "diary-2.go-on").touch()
    assert cluster.wait() == [75, 75], cluster.text()

    twin = {line["step"]: line for line in read_diary(loop_of_ranks_in_peace / "twin.json")}
    second = cluster.lines()
    assert [line["step"] for line in second] == list(range(5, 17))
    assert all(line == twin[line["step"]] for line in [*first, *second])
    # Weights, optimizer, and the random states of each rank: bit for bit those of the loop that nobody has interrupted.
    ended, undisturbed = run.latest(), Run(loop_of_ranks_in_peace / "twin").latest()
    assert ended is not None and undisturbed is not None and ended.step == undisturbed.step == 16
    digests = [{file.path: file.digest for file in one.files} for one in (ended, undisturbed)]
    assert {"model.safetensors", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"} < digests[0].keys()
    assert digests[0] == digests[1]
    # On a machine that is very busy the ranks may not find each other at once, and are started again.
    kinds = [entry.kind for entry in run.events() if entry.kind in ("claim", "preempted")]
    assert (kinds[:3], kinds[-1], kinds.count("preempted")) == (["claim", "preempted", "claim"], "preempted", 2)


def test_the_shards_of_two_machines_are_one_checkpoint(
    cluster: Cluster, case_in_peace: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = "FSDP2, sharded state"
    peace = case_in_peace(case)
    run = run_of(cluster, monkeypatch)
    cluster.env |= {"MATRIX_STOP": "notice@3", "MATRIX_NOTICE": str(cluster.hosts.folder(0) / "notice")}
    for number, codes in ((1, [75, 75]), (2, [0, 0])):
        for host in range(2):
            (cluster.hosts.folder(host) / f"launch-{number}").mkdir()
        cluster.start([TRAIN, case, f"launch-{number}"], "--notice", "file:notice")
        assert cluster.wait() == codes, cluster.text()
        (cluster.hosts.folder(0) / "notice").unlink(missing_ok=True)
        cluster.env.pop("MATRIX_STOP", None)
        if number == 1:
            newest = run.latest()
            assert newest is not None and newest.reason == "notice"
            shards = {file.path for file in newest.files if file.path.endswith(".distcp")}
            assert {Path(path).name for path in shards} == {"__0_0.distcp", "__1_0.distcp"}
    ended, undisturbed = (torch.load(path) for path in (cluster.hosts.folder(0) / "launch-2/final.pt", peace / "final.pt"))
    assert ended.keys() == undisturbed.keys()
    assert all(torch.equal(ended[name], undisturbed[name]) for name in ended)


def run_of(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name, value in cluster.env.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    return Run(cluster.url)
