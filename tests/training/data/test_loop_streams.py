"""Loops over streams of ``datasets``, and with torchdata's ``StatefulDataLoader``, resume at their position."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from datasets import IterableDataset
from torch.utils.data import DataLoader

from hf_spot.errors import ConfigError
from hf_spot.training.data.loaders import Loaders
from hf_spot.training.data.rng import capture, restore
from tests.training.data.test_loaders import (
    BATCHES,
    Noisy,
    Step,
    seed,
    test_what_is_left_is_handed_out_as_if_nothing_had_happened,
    watch,
)

__all__ = ["watch"]
test_what_is_left_is_handed_out_as_if_nothing_had_happened.__test__ = False  # type: ignore[attr-defined]
READ: list[int] = []
SHARDS = 5


def numbers(shards: list[int]) -> Iterator[dict[str, float]]:
    for shard in shards:
        for number in range(2 * BATCHES // SHARDS):
            READ.append(shard)
            yield {"number": 10.0 * shard + number}


def stream() -> IterableDataset:
    return IterableDataset.from_generator(numbers, gen_kwargs={"shards": list(range(SHARDS))})


def values(batches: Any) -> Callable[[int], Iterator[Any]]:
    return lambda epoch: (batch["number"] if isinstance(batch, dict) else batch for batch in batches)


def plain() -> Step:
    return values(DataLoader(stream(), batch_size=2))  # type: ignore[arg-type]


def prepared() -> Step:
    return values(Accelerator(cpu=True).prepare(DataLoader(stream(), batch_size=2)))  # type: ignore[arg-type]


def shuffled() -> Step:
    return values(DataLoader(stream().shuffle(seed=4, buffer_size=3), batch_size=2))  # type: ignore[arg-type]


def in_workers() -> Step:
    return values(DataLoader(stream(), batch_size=2, num_workers=2))  # type: ignore[arg-type]


def stateful(data: Any = None, **more: Any) -> Step:
    module = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata comes with pip install -e '.[trackers]'")
    return values(module.StatefulDataLoader(Noisy() if data is None else data, batch_size=2, **more))


def stateful_shuffled() -> Step:
    return stateful(shuffle=True)


def stateful_stream() -> Step:
    return stateful(stream())


def stateful_workers() -> Step:
    return stateful(list(range(2 * BATCHES)), shuffle=True, num_workers=2)


def noisy(rows: list[dict[str, float]]) -> torch.Tensor:
    """Draw random numbers, as a collator that masks words does."""
    return torch.tensor([row["number"] for row in rows]) + torch.rand(len(rows))


def collated() -> Step:
    return values(DataLoader(stream(), batch_size=2, collate_fn=noisy))  # type: ignore[arg-type]


def prepared_collated() -> Step:
    return values(Accelerator(cpu=True).prepare(DataLoader(stream(), batch_size=2, collate_fn=noisy)))  # type: ignore[arg-type]


def prepared_shuffled_collated() -> Step:
    data = stream().shuffle(seed=4, buffer_size=3)
    return values(Accelerator(cpu=True).prepare(DataLoader(data, batch_size=2, collate_fn=noisy)))  # type: ignore[arg-type]


EXACT = [
    collated,
    prepared_collated,
    prepared_shuffled_collated,
    plain,
    prepared,
    shuffled,
    in_workers,
    stateful,
    stateful_shuffled,
    stateful_stream,
    stateful_workers,
]


@pytest.mark.filterwarnings("ignore:.*set_vital")  # torchdata calls it
@pytest.mark.parametrize("stop_at", [1, 4, 5, 11])
@pytest.mark.parametrize("pattern", EXACT)
def test_a_loop_is_resumed_as_if_nothing_had_happened(
    watch: Callable[[], Loaders], tmp_path: Path, pattern: Callable[[], Step], stop_at: int
) -> None:
    test_what_is_left_is_handed_out_as_if_nothing_had_happened(watch, tmp_path, pattern, stop_at)


@pytest.mark.filterwarnings("ignore:.*set_vital")  # torchdata calls it
@pytest.mark.parametrize("data", [Noisy, stream])
def test_a_stateful_loader_of_accelerate_is_refused_before_its_first_batch(
    watch: Callable[[], Loaders], data: Callable[[], Any]
) -> None:
    pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata comes with pip install -e '.[trackers]'")
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True))
    loader = accelerator.prepare(DataLoader(data(), batch_size=2))
    watch()
    with pytest.raises(ConfigError, match="other batches and random numbers after a resume") as refused:
        iter(loader)
    assert "use_stateful_dataloader=False" in str(refused.value)


@pytest.mark.parametrize("pattern", [plain, prepared])
def test_only_what_is_needed_is_read(
    watch: Callable[[], Loaders], tmp_path: Path, caplog: pytest.LogCaptureFixture, pattern: Callable[[], Step]
) -> None:
    seed()
    loaders, batches = watch(), pattern()(0)
    for _ in range(4):
        next(batches)
    saved, now = loaders.save(tmp_path, 0), capture()
    loaders.close()
    loaders = watch()
    restore(now)
    loaders.resume(saved, now, tmp_path, 1)
    READ.clear()
    rest = list(pattern()(0))
    assert [one.tolist() for one in rest] == [[40.0, 41.0]]
    assert set(READ) <= {2, 3, 4}  # the batch before is read once more, and its beginning is the end of a shard
    assert "has no index" not in caplog.text


def test_a_stream_that_is_read_again_is_named(
    watch: Callable[[], Loaders], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaders, batches = watch(), shuffled()(0)
    next(batches)
    saved, now = loaders.save(tmp_path, 0), capture()
    loaders.close()
    loaders = watch()
    loaders.resume(saved, now, tmp_path, 1)
    list(shuffled()(0))
    assert "has no index: reading it again from its start to batch 1" in caplog.text


def test_torchdata_is_not_imported_for_those_who_do_not_use_it(watch: Callable[[], Loaders]) -> None:
    before = "torchdata" in sys.modules
    watch()
    assert ("torchdata" in sys.modules) == before
