"""Machines that come and go, as network namespaces with disks of their own: whole launchers, and whole trainings."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.elastic.story import Cluster, compare, undisturbed
from tests.hosts import Hosts, why_not
from tests.waiting import PATIENCE_S, wait_for
from tests.zygote import Zygote

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture
def cluster(tmp_path: Path, zygote: Zygote) -> Iterator[Cluster]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    with Hosts(3, tmp_path) as hosts:
        yield Cluster(
            hosts,
            str(tmp_path / "run"),
            env,
            ["--num_machines", "2:3", "--warm-spares", "on", "-v"],
            zygote,
            ["--step_s", "0.3", "--hold", str(tmp_path / "hold")],
        )


def test_machine_0_is_killed_and_comes_again_then_another_one_gets_a_notice_and_the_training_is_the_undisturbed_one(
    cluster: Cluster, tmp_path: Path
) -> None:
    twin = undisturbed(tmp_path, {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    (tmp_path / "hold").touch()
    cluster.start(0, 1, 2)
    cluster.wait_for_step(6, ranks=3)
    wait_for(cluster.run().latest, f"for the commit of step 5: {cluster.text()}")
    wait_for(lambda: cluster.text().count("a Python is kept warm") >= 3, f"for spares: {cluster.text()}")
    killed = cluster.main()
    at = cluster.kill(killed)
    (tmp_path / "hold").unlink()
    cluster.wait_for_step(6, ranks=2, after=at)
    assert "a fresh Python starts" not in cluster.text()  # though the ranks of the spares have changed
    cluster.start(killed)  # and waits as a spare
    before = cluster.steps()[-1]
    going = next(host for host in cluster.running if host not in (cluster.main(), killed))
    gone = cluster.notice(going)
    assert gone.wait(PATIENCE_S) == 75, cluster.text()
    cluster.wait_for_step(before["step"] + 1, ranks=2, after=before["at"])
    assert cluster.wait() == dict.fromkeys(cluster.running, 0), cluster.text()
    difference, _ = compare(cluster, twin)
    assert difference < 2e-3
    events = list(cluster.run().events())
    assert [entry.data["machines"] for entry in events if entry.kind == "claim"] == [3, 2, 2]
    # Nothing is redone after a notice, and after a kill what came behind the last commit.
    resumed = [entry.data["step"] for entry in events if entry.kind == "resumed"]
    noticed = [entry.data["step"] for entry in events if entry.kind == "commit" and entry.data["reason"] == "notice"]
    assert resumed == [5, *noticed]
    assert events[-1].kind == "finished"
