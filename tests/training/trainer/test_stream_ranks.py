"""Two ranks resume streams and dispatched batches where they were, with the samples and random numbers of no interruption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import free_ports
from tests.waiting import PATIENCE_S
from tests.zygote import Zygote

SCRIPT = Path(__file__).parent.parent / "scripts" / "streamed.py"


@pytest.mark.parametrize(
    "kinds",
    [
        [
            "dispatched, drawing",
            "divided by sample",
            "of a length, drawing in workers",
            "loop, dispatched, drawing",
            "loop, of a length, drawing in workers",
        ],
        pytest.param(
            [
                "dispatched",
                "dispatched, by workers",
                "dispatched and split",
                "divided by shard",
                "of a length, drawing",
                "of a length, split, drawing",
                "loop, dispatched, by workers",
                "loop, dispatched and split",
                "loop, divided by sample",
                "loop, divided by shard",
                "loop, of a length, drawing",
                "loop, of a length, split, drawing",
            ],
            marks=pytest.mark.proof,
        ),
    ],
    ids=["quick", "whole"],
)
def test_two_ranks_resume_a_stream_where_it_was(zygote: Zygote, tmp_path: Path, kinds: list[str]) -> None:
    (port,) = free_ports(1)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
    with zygote.forking():
        ranks = [
            subprocess.Popen(
                [sys.executable, "-Wignore", str(SCRIPT), str(tmp_path), *kinds],
                env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in ("0", "1")
        ]
    try:
        said = [rank.communicate(timeout=PATIENCE_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    first, second = [[json.loads(line) for line in out.splitlines() if line.startswith('{"kind')] for out, _ in said]
    assert len(first) == len(second) == len(kinds)
    assert [seen["kind"] for seen in (*first, *second) if not seen["equal"]] == []
    streams = [one for one in first if "of a length" not in one["kind"]]
    for seen in (*streams, *(one for one in second if "divided" in one["kind"])):  # otherwise rank 0 reads for both
        assert any("the stream begins at batch" in line for line in seen["told"]), seen
