"""The example for Ray in the documentation, on a Ray cluster of nodes on this machine: one is lost, and comes again.

Ray is in no extra: ``pip install ray``, and ``pytest -m proof tests/recipes/test_ray.py``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_spot.run.run import Run
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / ".github" / "docs" / "ray.md"
PLAIN = ROOT / "tests" / "training" / "scripts" / "plain.py"
# Both machines of this test have the same disk, and each needs a folder of its own.
SCRIPT = """\
import os, runpy, sys, tempfile
folder = tempfile.mkdtemp(dir={folder!r})
sys.argv = [{plain!r}, "--output_dir", folder + "/out", "--weights", folder + "/weights"]
sys.argv += ["--save_steps", "5", "--step_s", "1.5"]
runpy.run_path({plain!r}, run_name="__main__")
"""


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_node_of_a_ray_cluster_is_lost_and_another_one_takes_its_place(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    (example,) = re.findall(r"```python\n(# on_ray\.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "on_ray.py").write_text(example)
    (tmp_path / "train.py").write_text(SCRIPT.format(folder=str(tmp_path), plain=str(PLAIN)))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PATH": path, "OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"}.items():
            patch.setenv(name, value)  # what Ray's nodes have, their tasks have
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            nodes = [cluster.add_node(num_cpus=1, resources={"machine": 1}) for _ in range(2)]
            cluster.wait_for_nodes()
            words = ["on_ray.py", "--store", str(tmp_path / "run"), "--num_machines", "1:2", "--num_processes", "1", "train.py"]
            log = tmp_path / "log"
            with log.open("wb") as out:
                driver = subprocess.Popen(
                    [sys.executable, *words[:-1], str(tmp_path / "train.py")],
                    cwd=tmp_path,
                    env={**os.environ, "RAY_ADDRESS": cluster.address},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            try:

                def until(condition: str) -> None:
                    wait_for(lambda: condition in log.read_text() or driver.poll() is not None, f"for {condition!r}")
                    assert condition in log.read_text(), log.read_text()

                until("checkpoint-5 committed")
                cluster.remove_node(nodes[1], allow_graceful=False)
                until("launch 2 of")
                cluster.add_node(num_cpus=1, resources={"machine": 1})
                assert driver.wait(300) == 0, log.read_text()
            finally:
                driver.kill()
                driver.wait()
        finally:
            cluster.shutdown()
    state = Run(str(tmp_path / "run")).state()
    assert state.ended == "finished" and state.launch >= 2
