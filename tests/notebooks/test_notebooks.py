"""Every notebook runs from top to bottom in a clean kernel, on a real S3 server, and what is committed is what came out.

``HF_SPOT_UPDATE_NOTEBOOKS=1 pytest tests/notebooks/test_notebooks.py`` writes the outputs.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_core.utils import run_sync
from nbclient import NotebookClient

from tests.servers import SeaweedFS
from tests.waiting import PATIENCE_S
from tests.zygote import Zygote

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 150_000
FRESH = ("01_finetune_in_a_notebook",)  # imports torch after hf_spot; the kernels of the others are forked from one that has it
# Paths, warnings, colours of a terminal, and widgets, which nobody sees without the kernel that made them.
UNWANTED = re.compile(r"/(?:tmp|usr|mnt|var|opt)/|site-packages|[Ww]arning|\x1b\[(?!3[0-9]m|0m)|widget-view")


def outputs(cell: Any) -> str:
    """All that a cell shows as text."""
    if cell.cell_type != "code":
        return ""
    found = []
    for output in cell.outputs:
        found.append(output.get("text", "") + "\n".join(output.get("traceback", [])))
        found += [str(text) for kind, text in output.get("data", {}).items() if not kind.startswith("image/")]
    return "\n".join(found)


def execute(path: Path, folder: Path, environment: dict[str, str], zygote: Zygote | None) -> Any:
    """The notebook after a run from top to bottom. Where it asks the reader to restart the kernel, that happens, and the cells
    which it says are to be run again are run again. With a zygote the kernels have imported torch."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook, timeout=int(PATIENCE_S), record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    with zygote.forking() if zygote else contextlib.nullcontext(), client.setup_kernel(env=environment):
        for number, cell in enumerate(notebook.cells):
            if "restart-kernel" in tags(cell):
                run_sync(client.km.restart_kernel)(now=True)
                run_sync(client.kc.wait_for_ready)(timeout=PATIENCE_S)
                for place, before in enumerate(notebook.cells[:number]):
                    if "after-restart" in tags(before):
                        client.execute_cell(nbformat.from_dict(before), place, store_history=False)
                        notebook.cells[place] = before  # what the reader sees is the first time
            client.execute_cell(cell, number)
    return notebook


def tags(cell: Any) -> list[str]:
    return cell.metadata.get("tags", [])


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_a_clean_kernel(path: Path, tmp_path: Path, seaweedfs: SeaweedFS, zygote: Zygote) -> None:
    if "bucket" not in {bucket["Name"] for bucket in seaweedfs.client().list_buckets()["Buckets"]}:
        seaweedfs.make_bucket("bucket")
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "120"}
    environment = {**os.environ, **seaweedfs.env(), **quiet, "PATH": programs}
    updating = bool(os.environ.get("HF_SPOT_UPDATE_NOTEBOOKS"))
    done = execute(path, tmp_path, environment, None if updating or path.stem in FRESH else zygote)
    shown = "\n".join(outputs(cell) for cell in done.cells)
    for text in PROMISES[path.stem]:
        assert re.search(text, shown), shown[-3000:]
    if updating:
        for cell in done.cells:
            if cell.cell_type == "code":  # a bar that is a widget shows nothing without the kernel that drew it
                cell.outputs = [
                    output for output in cell.outputs if not any("widget" in kind for kind in output.get("data", {}))
                ]
        done.metadata.pop("widgets", None)
        done.metadata.language_info = {"name": "python"}
        nbformat.write(done, path)


# What a reader must find in the outputs; the notebooks themselves assert the numbers.
PROMISES = {
    "01_finetune_in_a_notebook": [
        r"preempted at step (1[0-5]); step \1 is committed to s3://bucket/runs/minilm",
        "Run this cell again",
        r"resumed from another-machine/checkpoint-1[0-5]",
        "numbers: all the same",
        "unseen docstrings are classified correctly",
    ],
    "02_lora_with_trl": ["exit code 75", "is finished at step 12", "bit for bit the same", "checkpoint-12"],
    "03_read_a_run": [
        r"preempted at step (\d+); step \1 is",
        "timeline of the run",
        "checkpoint-60",
        "2 interruptions, 0 steps lost",
    ],
    "04_plan_and_cost": ["spot, any region", "a save every 28 minutes", r"Spent: \$", "2 interruptions, 0 steps lost"],
}


def test_every_notebook_promises_something() -> None:
    assert sorted(PROMISES) == [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_has_been_run_and_is_small(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < MOST_BYTES
    shown = "\n".join(outputs(cell) for cell in notebook.cells)
    assert [text for text in PROMISES[path.stem] if not re.search(text, shown)] == []
    assert UNWANTED.findall(shown) == []
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert "widgets" not in notebook.metadata
