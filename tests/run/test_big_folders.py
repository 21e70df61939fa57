"""Folders of very many files, and of very many bytes."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.run import Run
from hf_spot.run.upload import Uploader
from hf_spot.storage.memory import MemoryStore
from hf_spot.storage.s3 import S3Store
from tests.waiting import PATIENCE_S

MEMORY = Path(__file__).parent.parent / "benchmarks" / "memory.py"
Make = Callable[..., Path]


def add_files(folder: Path, count: int) -> Path:
    """As FSDP and DeepSpeed write them: many, small, in folders."""
    for number in range(count):
        path = folder / f"shard_{number % 50}" / f"__{number}_0.distcp"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"%d" % number)
    return folder


def test_a_folder_of_10_000_files_comes_back_whole_and_makes_a_small_entry(make_checkpoint: Make, tmp_path: Path) -> None:
    store = MemoryStore(f"memory://{uuid.uuid4().hex}")
    run = Run(store)
    run.claim()
    uploader = Uploader(run, tmp_path / "pins", save_total_limit=1)
    uploader.submit(add_files(make_checkpoint(1), 10_000), CommitRequest(step=1))
    assert uploader.drain(PATIENCE_S)
    entry = next(info for info in store.list("journal/") if info.key.endswith("2.json"))
    assert entry.size < 10_100 * 150
    pulled = run.pull(tmp_path / "pulled")
    assert run.compare(run.find(), pulled) == []
    assert sum(path.is_file() for path in pulled.rglob("*")) == 10_006
    uploader.submit(make_checkpoint(2), CommitRequest(step=2))
    assert uploader.drain(PATIENCE_S)
    uploader.close()
    assert list(store.list("e0001/checkpoint-1/")) == []
    entry = max(store.list("journal/"), key=lambda info: info.key)
    assert entry.size < 2000, "an entry carries the state, and that does not grow with the files"


def test_many_files_cost_one_request_each_on_their_way_and_few_to_delete(
    s3_url: str, make_checkpoint: Make, tmp_path: Path
) -> None:
    requests: Counter[str] = Counter()
    run = Run(s3_url)
    run.claim()
    assert isinstance(run.store, S3Store)
    events = run.store._client.meta.events
    events.register("before-send.s3", lambda request, **_: requests.update([str(request.method)]))

    def count(act: Callable[[], object]) -> Counter[str]:
        requests.clear()
        act()
        return Counter(requests)

    files = 500
    folder = add_files(make_checkpoint(1), files)
    few = 20

    def save(folder: Path, step: int) -> None:
        request = CommitRequest(step=step)
        run.commit(request, run.upload(folder, request))

    sent = count(lambda: save(folder, 1))
    assert set(sent) == {"PUT"}
    assert sent["PUT"] < files + few
    fetched = count(lambda: run.pull(tmp_path / "pulled"))
    assert set(fetched) == {"GET"}
    assert fetched["GET"] < files + few
    save(make_checkpoint(2), 2)
    pruned = count(lambda: run.prune(1))
    assert pruned.total() < few
    assert list(run.store.list("e0001/checkpoint-1/")) == []


def test_the_memory_of_an_upload_does_not_grow_with_the_checkpoint() -> None:
    ran = subprocess.run([sys.executable, MEMORY, "--gb", "1.5"], capture_output=True, text=True, timeout=PATIENCE_S)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["committed"]
    assert found["came_in_gb"] >= 1.5
    assert found["peak_mb"] < 256, "promised are 512"
