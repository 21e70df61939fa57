"""``python -m tests.elastic``: three machines that are lost and come again in one training, and how long that takes.

Every machine is a network namespace with its own disk. The training must end with the undisturbed one's samples and learning
rate in each step, and with its losses within the rounding of another order of sums. It needs root. ``--seed`` chooses what
happens; ``--events`` how often. ``--before`` also measures how long the way of a fixed number of machines takes.

``--exact`` trains with ``--exact-on-any-gpus`` instead, on one machine, on three, and on three that are lost and come again:
the weights must be the same to the bit. Without the option those of one and of three machines must differ.

``--fsdp`` trains with FSDP2 and sharded checkpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.elastic.story import Cluster, compare, order_digest, undisturbed
from tests.elastic.train import SAMPLES
from tests.hosts import Hosts, why_not
from tests.waiting import wait_for

KINDS = ("kill", "kill machine 0", "notice", "notice on machine 0", "two at once", "unplug", "spare dies")
_KEEP_TWO = tuple(kind for kind in KINDS if kind != "two at once")
_ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=32, help="of the model; 768 makes 85 million parameters")
    parser.add_argument("--before", action="store_true", help="also kill one of two machines that are fixed")
    parser.add_argument("--keep", type=Path, help="a new folder for everything")
    parser.add_argument("--exact", action="store_true", help="compare the weights instead, with --exact-on-any-gpus")
    parser.add_argument("--fsdp", action="store_true", help="divide the model and the optimizer among the machines")
    parser.add_argument(
        "--warm-spares", default="auto", help="as of hf-spot launch: with 'on' they are soon ready on a busy host"
    )
    parser.add_argument("--plot", type=Path, help="draw the run's timeline")
    options = parser.parse_args()
    if (why := why_not()) is not None:
        print(why)
        return 1
    with _folder(options.keep) as folder, contextlib.ExitStack() as stack:
        if options.exact:
            return _exact(folder, options.events, options.seed)
        slow = folder / "slow"
        slow.touch()
        # Two epochs, with thirty steps for each event, and all of them slow until the last event has happened.
        training = ["--epochs", "2", "--samples", str(SAMPLES * (1 + 3 * options.events)), "--width", str(options.width)]
        script = [*training, "--step_s", "1", "--slow", str(slow)]
        twin_to_come = stack.enter_context(ThreadPoolExecutor(1)).submit(undisturbed, folder, _ENV, *training)
        if options.before:
            print(f"fixed machines, by hand: {_before(folder, options.width):.1f} s from kill -9 to the next step", flush=True)
        with Hosts(3, folder) as hosts:
            # A machine alone would have nobody to share with.
            least, script, kinds = (2, [*script, "--fsdp"], _KEEP_TWO) if options.fsdp else (1, script, KINDS)
            words = ["--num_machines", f"{least}:3", "--warm-spares", options.warm_spares]
            name = Path("runs", "my-run")
            (folder / name.parent).mkdir()
            cluster = Cluster(hosts, str(folder / name), _environ(), words, script=script)
            took = _disturb(cluster, random.Random(options.seed), options.events, kinds)
            slow.unlink()
            codes = cluster.wait()
            assert set(codes.values()) == {0}, f"{codes}\n{cluster.text()}"
            twin = twin_to_come.result()
            difference, again = compare(cluster, twin)
            claims = [entry.data["machines"] for entry in cluster.run().events() if entry.kind == "claim"]
            if options.plot:
                report = [sys.executable, "-m", "hf_spot", "report", str(name), "--plot", str(options.plot.absolute())]
                subprocess.run(report, cwd=folder, env=_environ(), check=True)  # so that the title is no temporary folder
    print(f"{len(took)} events, {len(claims)} launches of {claims} machines, {len(twin.losses)} steps, of which {again} again")
    print(
        f"each step has the samples and the learning rate of the undisturbed training: order of the data {order_digest(twin)}"
    )
    print(f"the losses differ by at most {difference:.1e}")
    for kind in KINDS:
        if found := sorted(seconds for name, seconds in took if name == kind):
            print(f"{kind}: {', '.join(f'{one:.1f}' for one in found)} s to the next step")
    return 0


def _exact(folder: Path, events: int, seed: int) -> int:
    """Return 1 if the weights depend on the machines with ``--exact-on-any-gpus``, or don't without it."""
    found: dict[tuple[bool, str], str] = {}
    for exact in (True, False):
        for name, machines in (("one machine", (0,)), ("three machines", (0, 1, 2)), ("that come and go", (0, 1, 2))):
            is_disturbed = name == "that come and go"
            if is_disturbed and not exact:
                continue
            here = folder / f"{name.replace(' ', '-')}-{exact}"
            here.mkdir()
            slow = here / "slow"
            script = ["--epochs", str(2 + 3 * events), "--step_s", "1", "--slow", str(slow)]
            words = ["--num_machines", "1:3", *(["--exact-on-any-gpus"] if exact else [])]
            with Hosts(3, here) as hosts:
                cluster = Cluster(hosts, str(here / "run"), _environ(), words, script=script)
                if is_disturbed:
                    slow.touch()
                    _disturb(cluster, random.Random(seed), events)
                    slow.unlink()
                else:
                    cluster.start(*machines)
                codes = cluster.wait()
                assert set(codes.values()) == {0}, f"{codes}\n{cluster.text()}"
                newest = cluster.run().latest()
                claims = [entry.data["machines"] for entry in cluster.run().events() if entry.kind == "claim"]
            assert newest is not None
            digest = next(file.digest for file in newest.files if file.path == "model.safetensors")
            found[exact, name] = digest
            print(f"{'exact' if exact else 'plain'}, {name}: {digest} in launches of {claims} machines", flush=True)
    exact_ones = {digest for (exact, _), digest in found.items() if exact}
    plain_ones = {digest for (exact, _), digest in found.items() if not exact}
    return int(len(exact_ones) != 1 or len(plain_ones) == 1)


def _disturb(cluster: Cluster, dice: random.Random, events: int, kinds: Sequence[str] = KINDS) -> list[tuple[str, float]]:
    """Let machines go and come; return what happened, and the seconds to the next step of those that are left."""
    took = []
    cluster.start(0, 1, 2)
    cluster.wait_for_step(1)
    for number in range(events):
        kind = dice.choice(kinds) if number >= len(kinds) else kinds[number]
        cluster.wait_for_step(1, after=_claimed_at(cluster))  # the launch before has begun
        cluster.wait_for_step(cluster.steps()[-1]["step"] + dice.randint(0, 3))
        step, before = cluster.steps()[-1]["step"], cluster.run().state().launch
        kind, at = _happen(cluster, dice, kind)
        if kind != "spare dies":
            wait_for(lambda before=before: cluster.run().state().launch > before, f"for a launch: {cluster.text()}")
            took_s = cluster.wait_for_step(1, after=_claimed_at(cluster)) - at
            took.append((kind, took_s))
            print(f"{number + 1}: {kind} at step {step}: {took_s:.1f} s", flush=True)
        cluster.start(*(host for host in range(3) if host not in cluster.running))
        wait_for(lambda: _come(cluster), f"for the machines: {cluster.text()}")
    return took


def _claimed_at(cluster: Cluster) -> float:
    return max(entry.time.timestamp() for entry in cluster.run().events() if entry.kind == "claim")


def _come(cluster: Cluster) -> bool:
    """Whether every machine that has been started again is connected to machine 0: it is the last one that it has seen."""
    for host, process in cluster.running.items():
        assert process.poll() is None, f"{host}: {cluster.text()}"
    logs = [cluster.newest_log(host).read_text() for host in cluster.running]
    return all("hf-spot: launch " in log or "as a spare" in log or "is here" in log for log in logs)


def _happen(cluster: Cluster, dice: random.Random, kind: str) -> tuple[str, float]:
    """Let it happen; return what it was, as not everything is possible, and when."""
    main, training = cluster.main(), cluster.training()
    others = [host for host in training if host != main]
    spares = [host for host in cluster.running if host not in training]
    if kind == "spare dies" and spares:
        return kind, cluster.kill(spares[0])
    at = time.time()
    if kind in ("kill machine 0", "notice on machine 0") or not others:
        if kind.startswith("notice"):
            cluster.notice(main)
            return "notice on machine 0", at
        return "kill machine 0", cluster.kill(main)
    victim = dice.choice(others)
    if kind == "two at once":
        cluster.kill(victim)
        cluster.notice(main)
    elif kind == "notice":
        cluster.notice(victim)
    elif kind == "unplug":
        before = cluster.run().state().launch
        cluster.hosts.unplug(victim)
        wait_for(lambda: cluster.run().state().launch > before, f"for a launch without machine {victim}: {cluster.text()}")
        cluster.hosts.plug_in(victim)
    else:
        return "kill", cluster.kill(victim)
    return kind, at


def _before(folder: Path, width: int) -> float:
    """Kill one of two fixed machines, start both again as soon as the other has ended, and return the seconds."""
    below = folder / "before"
    below.mkdir()
    with Hosts(2, below) as hosts:

        def options(host: int) -> list[str]:
            words = ["--num_machines", "2", "--machine_rank", str(host), "--main_process_ip", hosts.address(0)]
            return [*words, "--main_process_port", "29500", "--num_processes", "2", "--multi_gpu"]

        script = ["--epochs", "50", "--step_s", "0.2", "--width", str(width), "--accumulation", "3"]
        clusters = [Cluster(hosts, str(below / "run"), _environ(), options(host), script=script) for host in range(2)]
        for host, cluster in enumerate(clusters):
            cluster.started = 10 * host
            cluster.start(host)
        clusters[0].wait_for_step(6)
        wait_for(clusters[0].run().latest, "for a commit")
        at = clusters[1].kill(1)
        clusters[0].wait()
        for host, cluster in enumerate(clusters):
            cluster.start(host)
        return clusters[0].wait_for_step(1, after=at + 0.5) - at


def _environ() -> dict[str, str]:
    return {**os.environ, **_ENV, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir()
        yield keep.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="hf_spot-elastic-") as made:
        yield Path(made)


if __name__ == "__main__":
    sys.exit(main())
