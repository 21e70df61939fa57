"""Every part of a stream that is said to resume exactly does, at every position; a shuffle buffer does not, and is found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
from datasets import Dataset, IterableDataset, load_dataset
from torch.utils.data import DataLoader

from hf_spot.training.data import stream_position
from hf_spot.training.data.stream_position import StreamPosition, why_not

Make = Callable[[], IterableDataset]


@pytest.fixture(scope="module", autouse=True)
def _offline() -> Iterator[None]:
    """Ask nobody about what lies in local files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
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

    return {"json": lambda: stream("json", "jsonl"), "parquet": lambda: stream("parquet", "parquet")}


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


@pytest.mark.parametrize("source", ["json", "parquet"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_begins_at_every_position(files: dict[str, Make], source: str, kind: str) -> None:
    make = KINDS[kind]
    loader, position = loader_of(make(files[source])), StreamPosition()
    assert why_not(loader) is None
    whole, saved = [], {}
    for count, batch in enumerate(position.read(loader, DataLoader.__iter__), 1):
        whole.append(str(batch))
        saved[count] = json.loads(json.dumps(position.to_save(count)))
    assert saved[1] is None
    for trained in range(2, len(whole), 2):
        again, other = loader_of(make(files[source])), StreamPosition()
        assert saved[trained]["at"][0] == trained
        assert read(again, other, saved[trained]) == whole[trained - 1 :]


def count_up() -> Iterator[dict[str, int]]:
    for number in range(60):
        yield {"number": number}


def test_a_shuffle_buffer_is_found_by_its_kind_and_by_its_samples(told: Callable[[], int]) -> None:
    def make() -> DataLoader[Any]:
        return loader_of(IterableDataset.from_generator(count_up).shuffle(seed=1, buffer_size=10).map(lambda one: one))

    why = why_not(make())
    assert why is not None and "shuffle buffer" in why
    position, saved, whole = StreamPosition(), {}, []
    for count, batch in enumerate(position.read(make(), DataLoader.__iter__), 1):
        whole.append(str(batch))
        saved[count] = position.to_save(count)
    for trained in range(2, len(saved), 5):
        assert read(make(), StreamPosition(), saved[trained]) == whole[trained - 1 :]  # it is read again from its start
    assert told() == len(range(2, len(saved), 5))


def test_an_interleaved_stream_is_named(files: dict[str, Make]) -> None:
    make = files["json"]
    for stream in (
        datasets.interleave_datasets([make(), make()]),
        datasets.interleave_datasets([make(), make()], probabilities=[0.6, 0.4], seed=1).take(9),
    ):
        why = why_not(loader_of(stream))
        assert why is not None and why.startswith("it is interleaved")


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
