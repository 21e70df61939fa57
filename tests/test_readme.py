"""The README does what it says: its scripts are saved, and its commands run one after the other, against a real S3 server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from hf_spot.cloud.job import load
from tests.servers import SeaweedFS

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^(<!-- ci: \w+ -->\n)?```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_every_command_in_the_readme_works(seaweedfs: SeaweedFS, tmp_path: Path) -> None:
    seaweedfs.make_bucket("bucket")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, **seaweedfs.env(), "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = []
    for for_ci, language, text in BLOCK.findall(README.read_text()):
        if language in ("python", "yaml"):
            (tmp_path / text.splitlines()[0].removeprefix("# ")).write_text(text)
        elif not for_ci:  # those two `.ci/run` runs
            done = subprocess.run(
                ["bash", "-euc", text], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            ran.append(done.stdout)
    assert load(tmp_path / "job.yaml").ladder[-1].market == "on-demand"
    assert "checkpoint-30" in ran[3]
    assert "checkpoint-20 pruned" in ran[3]
    assert "finished, step 30 committed" in ran[3]
    assert (tmp_path / "elsewhere" / "checkpoint-30" / "model.safetensors").exists()
    assert (tmp_path / "pulled" / "checkpoint-20" / "model.safetensors").exists()
