"""Every part of a stream that is said to resume exactly does, at every position, in this process and in DataLoader workers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from hf_spot.training.data import stream_position
from hf_spot.training.data.shuffle_buffers import install
from hf_spot.training.data.stream_position import StreamPosition, why_not

Make = Callable[[], IterableDataset]


@pytest.fixture(scope="module", autouse=True)
def _offline() -> Iterator[None]:
    """Ask nobody about what lies in local files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # seconds at the end of each interleaved pass
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Make]:
    """Streams of three files of 24 rows, in groups of 7."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        rows = [{"ids": [shard * 100 + number, 1], "number": number} for number in range(24)]
        (folder / f"{shard}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        Dataset.from_list(rows).to_parquet(folder / f"{shard}.parquet", batch_size=7)

    def stream(kind: str, ending: str) -> IterableDataset:
        found = sorted(map(str, folder.glob(f"*.{ending}")))
        return load_dataset(kind, data_files=found, split="train", streaming=True, cache_dir=str(folder / "cache"))

    def rows(shards: list[int]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            yield from ({"ids": [shard * 100 + number, 1], "number": number} for number in range(24))

    return {
        "json": lambda: stream("json", "jsonl"),
        "parquet": lambda: stream("parquet", "parquet"),
        "rows": lambda: IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2]}),
    }


def add(batch: dict[str, Any]) -> dict[str, Any]:
    return {"number": [one + 1 for one in batch["number"]]}


def small(batch: dict[str, Any]) -> list[bool]:
    return [one % 3 > 0 for one in batch["number"]]


def same(batch: Any) -> Any:
    return batch


def pack(batch: dict[str, Any]) -> dict[str, Any]:
    return {"ids": [[one for ids in batch["ids"] for one in ids]]}


KINDS: dict[str, Callable[[Make], IterableDataset]] = {
    "as it is": lambda make: make(),
    "mapped": lambda make: make().map(lambda one: {"number": one["number"] + 1}),
    "mapped in batches": lambda make: make().map(add, batched=True, batch_size=4),
    "packed": lambda make: make().map(pack, batched=True, batch_size=2, remove_columns=["number"]),
    "filtered": lambda make: make().filter(lambda one: one["number"] % 3 > 0),
    "filtered in batches": lambda make: make().filter(small, batched=True, batch_size=4),
    "tensors": lambda make: make().with_format("torch"),
    "arrays, mapped": lambda make: make().with_format("numpy").map(same, batched=True, batch_size=5),
    "tables, mapped": lambda make: make().with_format("arrow").map(same, batched=True, batch_size=5).with_format(None),
    "taken": lambda make: make().take(60),
    "skipped": lambda make: make().skip(5),
    "repeated": lambda make: make().repeat(2),
    "less columns": lambda make: make().remove_columns(["number"]),
    "one after the other": lambda make: datasets.concatenate_datasets([make(), make()]),
    "side by side": lambda make: datasets.concatenate_datasets(
        [make(), make().select_columns(["number"]).rename_column("number", "more")], axis=1
    ),
}
MIXED: dict[str, Callable[[Make], IterableDataset]] = {
    "shuffled": lambda make: make().shuffle(seed=1, buffer_size=10),
    "mapped and shuffled": lambda make: make().map(lambda one: one).shuffle(seed=1, buffer_size=30).take(60),
    "shuffled, filtered and mapped in batches": lambda make: (
        make().shuffle(seed=2, buffer_size=5).filter(lambda one: one["number"] % 3 > 0).map(add, batched=True, batch_size=4)
    ),
    "shuffled twice, repeated": lambda make: make().shuffle(seed=1, buffer_size=9).shuffle(seed=3, buffer_size=7).repeat(2),
    "interleaved": lambda make: datasets.interleave_datasets([make(), make().skip(30)]),
    "drawn from two, one shuffled": lambda make: datasets.interleave_datasets(
        [make().shuffle(seed=1, buffer_size=10), make().skip(30)],
        probabilities=[0.6, 0.4],
        seed=1,
        stopping_strategy="all_exhausted",
    ),
    "drawn from two, shuffled": lambda make: datasets.interleave_datasets(
        [make(), make().skip(30)], probabilities=[0.6, 0.4], seed=1
    ).shuffle(seed=3, buffer_size=7),
    "every second one": lambda make: split_dataset_by_node(make().shuffle(seed=1, buffer_size=9), rank=1, world_size=2),
    "every third shard": lambda make: split_dataset_by_node(make(), rank=1, world_size=3),
}


def read(loader: DataLoader[Any], position: StreamPosition, saved: dict[str, Any] | None = None) -> list[str]:
    """Read a stream to its end: one that is left in the middle may wait for its threads forever."""
    resumed = None if saved is None else position.go_to(loader, saved)
    return [str(batch) for batch in position.read(loader, DataLoader.__iter__, resumed)]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], int]:
    """How often a stream was said to be read again."""
    return lambda: sum("read again from its start" in record.getMessage() for record in caplog.records)


def loader_of(stream: IterableDataset) -> DataLoader[Any]:
    return DataLoader(stream, batch_size=3, collate_fn=list, drop_last=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        *((kind, source) for kind in KINDS for source in ("json", "parquet")),
        *((kind, source) for kind in MIXED for source in ("rows", "parquet")),  # buffers treat rows and tables differently
    ],
)
def test_a_stream_begins_at_every_position(files: dict[str, Make], source: str, kind: str) -> None:
    make = (KINDS | MIXED)[kind]
    loader, position = loader_of(make(files[source])), StreamPosition()
    assert why_not(loader) is None
    whole, saved = [], {}
    for count, batch in enumerate(position.read(loader, DataLoader.__iter__), 1):
        whole.append(str(batch))
        saved[count] = json.loads(json.dumps(position.to_save(count)))
    assert saved[1] is None
    for trained in range(2, len(whole), 2 if kind in KINDS else 5):
        again, other = loader_of(make(files[source])), StreamPosition()
        assert saved[trained]["at"][0] == trained
        assert read(again, other, saved[trained]) == whole[trained - 1 :]


def count_up() -> Iterator[dict[str, int]]:
    for number in range(60):
        yield {"number": number}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("kind", "workers"),
    [("shuffled", 2), ("shuffled", 4), ("drawn from two, one shuffled", 2)],  # there are three shards
)
def test_workers_begin_at_every_position(files: dict[str, Make], kind: str, workers: int, told: Callable[[], int]) -> None:
    def make() -> DataLoader[Any]:
        stream: Any = MIXED[kind](files["json"])
        return DataLoader(stream, batch_size=3, collate_fn=jittered, num_workers=workers)

    def random() -> None:
        torch.manual_seed(5)

    random()
    position, saved, whole = StreamPosition(), {}, []
    for count, batch in enumerate(position.read(make(), DataLoader.__iter__), 1):
        whole.append(str(batch))
        saved[count] = json.loads(json.dumps(position.to_save(count)))
    begun = 0
    for trained in range(workers + 2, len(whole), 5):
        random()
        resumed = StreamPosition().go_to(make(), saved[trained])
        assert resumed is not None
        assert trained - workers <= resumed.first < trained
        assert read(make(), StreamPosition(), saved[trained]) == whole[resumed.first :]
        begun += 1
    assert begun >= 3
    assert told() == 0


def jittered(samples: list[Any]) -> Any:
    """Draw in the collator, as one that masks words does."""
    return samples, float(torch.rand(()))


def test_a_stream_that_draws_in_its_workers_is_read_again(files: dict[str, Make]) -> None:
    stream: Any = files["json"]().map(lambda one: {"number": one["number"] + float(torch.rand(()))})
    loader, position = DataLoader(stream, batch_size=3, collate_fn=list, num_workers=2), StreamPosition()
    for count, _ in enumerate(position.read(loader, DataLoader.__iter__), 1):
        saved = position.to_save(count)
        assert saved is not None and "draws random numbers" in saved["why"]
        assert position.go_to(loader, saved) is None


@pytest.mark.parametrize("change", [{"seed": 2}, {"buffer_size": 20}])
def test_another_shuffle_buffer_is_read_again(change: dict[str, int], told: Callable[[], int]) -> None:
    def make(**more: int) -> DataLoader[Any]:
        settings = {"seed": 1, "buffer_size": 10, **more}
        return loader_of(IterableDataset.from_generator(count_up).shuffle(**settings).map(lambda one: one))

    position = StreamPosition()
    saved = {count: position.to_save(count) for count, _ in enumerate(position.read(make(), DataLoader.__iter__), 1)}
    whole = read(make(**change), StreamPosition())
    for trained in (5, 12):
        assert read(make(**change), StreamPosition(), saved[trained]) == whole[trained - 1 :]
    assert told() == 2


def test_workers_read_a_stream_of_other_parts_again(files: dict[str, Make], told: Callable[[], int]) -> None:
    def make(stream: Any) -> DataLoader[Any]:
        return DataLoader(stream, batch_size=3, collate_fn=list, num_workers=2)

    position = StreamPosition()
    plain, other = files["json"](), datasets.concatenate_datasets([files["json"](), files["json"]()])
    saved = {count: position.to_save(count) for count, _ in enumerate(position.read(make(plain), DataLoader.__iter__), 1)}
    whole = read(make(other), StreamPosition())
    found = read(make(other), StreamPosition(), saved[8])
    assert found == whole[len(whole) - len(found) :]
    assert len(found) >= len(whole) - 8
    assert told() == 1


def test_what_is_compared_does_not_depend_on_how_it_is_shown() -> None:
    digest = stream_position._digest
    pixels = np.arange(5000.0)
    other = pixels.copy()
    other[2500] = -1
    assert digest([{"one": pixels}]) == digest([{"one": pixels.copy()}]) != digest([{"one": other}])
    tensors = [torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16)]
    assert digest([tensors[0]]) == digest([tensors[1]]) != digest([torch.zeros(2, 3, dtype=torch.bfloat16)])
    assert digest([b"one"]) != digest([b"two"])
    assert digest([torch.ones(())]) == digest([torch.ones(())])
    image = pytest.importorskip("PIL.Image")
    images = [image.new("RGB", (4, 4), color) for color in ("red", "red", "blue")]
    assert digest([images[0]]) == digest([images[1]]) != digest([images[2]])


WITHOUT_HF_SPOT = """
import json, sys
from datasets import IterableDataset
def rows(shards):
    for shard in shards:
        for number in range(20):
            yield {"number": shard * 100 + number}
made = IterableDataset.from_generator(rows, gen_kwargs={"shards": list(range(6))}).shuffle(seed=1, buffer_size=7)
stream = made.map(lambda one: one)
stream.load_state_dict(json.load(open(sys.argv[1])))
assert "hf_spot" not in sys.modules
print(json.dumps([one["number"] for one in stream]))
"""


def test_a_state_can_be_loaded_without_hf_spot(tmp_path: Path) -> None:
    def rows(shards: list[int]) -> Iterator[dict[str, int]]:
        for shard in shards:
            yield from ({"number": shard * 100 + number} for number in range(20))

    def make() -> Any:
        made = IterableDataset.from_generator(rows, gen_kwargs={"shards": list(range(6))})
        return made.shuffle(seed=1, buffer_size=7).map(lambda one: one)

    whole = [one["number"] for one in make()]
    install()
    stream, path = make(), tmp_path / "state.json"
    seen = []
    for one in stream:
        seen.append(one["number"])
        if len(seen) == 50:
            path.write_text(json.dumps(stream.state_dict()))
            break
    assert seen == whole[:50]
    done = subprocess.run(
        [sys.executable, "-Wignore", "-c", WITHOUT_HF_SPOT, str(path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rest = json.loads(done.stdout.splitlines()[-1])
    # datasets gives no sample again, and leaves those out that were in the buffer.
    assert not {*rest} & {*seen} and 120 - 50 - 7 <= len(rest) < 70
    resumed = make()  # with hf_spot none is left out, also if the state was loaded before it was there
    resumed.load_state_dict(json.loads(path.read_text()))
    assert [one["number"] for one in resumed] == whole[50:]
    early = make()
    vars(early)["_starting_state_dict"] = json.loads(path.read_text())
    assert why_not(loader_of(early)) is None
    assert [one["number"] for one in early] == whole[50:]


def test_an_unknown_shuffle_buffer_is_named(files: dict[str, Make], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_position, "is_installed", lambda: False)
    why = why_not(loader_of(files["json"]().shuffle(seed=1, buffer_size=10)))
    assert why is not None and "shuffle buffer" in why


def test_an_unknown_part_is_named(files: dict[str, Make], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_position, "_EXACT", stream_position._EXACT - {"TakeExamplesIterable"})
    assert why_not(loader_of(files["json"]().take(5))) == "TakeExamplesIterable is not known to resume exactly"


def test_a_stream_that_has_changed_is_read_again(files: dict[str, Make], told: Callable[[], int]) -> None:
    def mapped(more: int) -> DataLoader[Any]:
        return loader_of(files["json"]().map(lambda one: {"number": one["number"] + more}))

    position = StreamPosition()
    saved = {count: position.to_save(count) for count, _ in enumerate(position.read(mapped(0), DataLoader.__iter__), 1)}
    changed = mapped(1)
    whole = read(changed, StreamPosition())
    assert len(whole) == 24
    assert told() == 0
    assert read(changed, StreamPosition(), saved[4]) == whole[3:]
    assert told() == 1
    assert read(changed, StreamPosition()) == whole  # the next pass is whole


def test_a_stream_of_other_parts_is_not_entered(files: dict[str, Make]) -> None:
    loader, position = loader_of(files["json"]()), StreamPosition()
    saved = {count: position.to_save(count) for count, _ in enumerate(position.read(loader, DataLoader.__iter__), 1)}
    other = loader_of(files["json"]().map(lambda one: one))
    assert position.go_to(other, saved[9]) is None  # type: ignore[arg-type]
    assert len(read(other, StreamPosition())) == 24
