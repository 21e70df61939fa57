"""Loops that iterate loaders in other ways than one after the other: after a resume each hands out what was left."""

from __future__ import annotations

import json
import multiprocessing
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from hf_spot.training.data.loaders import Loaders
from hf_spot.training.data.rng import capture, restore
from tests.waiting import PATIENCE_S

EPOCHS, BATCHES = 3, 5


class Noisy(Dataset):
    """Each sample draws from all generators."""

    def __init__(self, start: int = 0) -> None:
        self.start = start

    def __len__(self) -> int:
        return 2 * BATCHES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([self.start + index, random.random(), float(np.random.rand())]) + torch.rand(3)


class Stream(IterableDataset):
    """The same in each pass."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from torch.arange(2.0 * BATCHES).reshape(-1, 1)


Step = Callable[[int], Iterator[Any]]


def shuffled() -> Step:
    loader = DataLoader(Noisy(), batch_size=2, shuffle=True)
    return lambda epoch: iter(loader)


def own_generator() -> Step:
    loader = DataLoader(Noisy(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(5))
    return lambda epoch: iter(loader)


def generator_of_the_sampler() -> Step:
    sampler = RandomSampler(Noisy(), generator=torch.Generator().manual_seed(5))
    loader = DataLoader(Noisy(), batch_size=2, sampler=sampler)
    return lambda epoch: iter(loader)


def two_at_once() -> Step:
    one, other = (DataLoader(Noisy(start), batch_size=2, shuffle=True) for start in (0, 100))
    return lambda epoch: iter(zip(one, other, strict=True))


def made_anew_each_epoch() -> Step:
    return lambda epoch: iter(DataLoader(Noisy(epoch), batch_size=2, shuffle=True))


def with_an_evaluation_of_the_same_kind() -> Step:
    loader, held_out = (DataLoader(Noisy(start), batch_size=2, shuffle=True) for start in (0, 100))
    peek = iter(held_out)
    next(peek)

    def batches(epoch: int) -> Iterator[Any]:
        for batch in loader:
            yield batch, list(held_out), peek is None

    return batches


def unbatched() -> Step:
    loader = DataLoader(Noisy(), batch_size=None, shuffle=True)
    return lambda epoch: iter(loader)


def streamed() -> Step:
    loader = DataLoader(Stream(), batch_size=2)
    return lambda epoch: iter(loader)


PATTERNS = [
    shuffled,
    own_generator,
    generator_of_the_sampler,
    two_at_once,
    made_anew_each_epoch,
    with_an_evaluation_of_the_same_kind,
    unbatched,
    streamed,
]


def seed() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


def flat(batch: Any) -> list[Any]:
    return [flat(one) for one in batch] if isinstance(batch, (list, tuple)) else torch.as_tensor(batch).tolist()


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[[], Loaders]]:
    made: list[Loaders] = []

    def watch() -> Loaders:
        made.append(Loaders(tmp_path))
        made[-1].watch()
        return made[-1]

    yield watch
    for one in made:
        one.close()


def assert_what_is_left_is_handed_out(
    watch: Callable[[], Loaders], tmp_path: Path, pattern: Callable[[], Step], stop_at: int
) -> None:
    """Leave an iteration, continue it in other loaders, and compare it with one that nobody has left."""
    seed()
    step = pattern()
    twin = [(flat(batch), torch.rand(1).item()) for epoch in range(EPOCHS) for batch in step(epoch)]

    seed()
    loaders, step, trained = watch(), pattern(), 0
    for epoch in range(EPOCHS):
        for batch in step(epoch):
            assert (flat(batch), torch.rand(1).item()) == twin[trained]
            trained += 1
            if trained == stop_at:
                saved, now = loaders.save(tmp_path, 0), capture()
                break
        if trained == stop_at:
            break
    del batch
    loaders.close()
    seed()
    loaders, step = watch(), pattern()
    restore(now)
    loaders.resume(saved, now, tmp_path, 1)
    rest = [(flat(batch), torch.rand(1).item()) for again in range(epoch, EPOCHS) for batch in step(again)]

    assert rest == twin[stop_at:]


@pytest.mark.parametrize("stop_at", [1, 4, 5, 11])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_left_is_handed_out_as_if_nothing_had_happened(
    watch: Callable[[], Loaders], tmp_path: Path, pattern: Callable[[], Step], stop_at: int
) -> None:
    assert_what_is_left_is_handed_out(watch, tmp_path, pattern, stop_at)


def one_by_one(self: Any) -> Iterator[Any]:
    """Takes the place of accelerate's iteration, which makes a batch before it hands out the one before."""
    self.begin()
    self.set_epoch(self.iteration)
    yield from self.base_dataloader
    self.iteration += 1
    self.end()


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "one by one"])
@pytest.mark.parametrize("stop_at", [1, 4, 5, 11])
def test_what_accelerate_has_prepared_is_handed_out_whether_it_makes_batches_ahead_or_not(
    monkeypatch: pytest.MonkeyPatch, watch: Callable[[], Loaders], tmp_path: Path, stop_at: int, ahead: bool
) -> None:
    if not ahead:
        monkeypatch.setattr(DataLoaderShard, "__iter__", one_by_one)

    def prepared() -> Step:
        loader = Accelerator(cpu=True).prepare(DataLoader(Noisy(), batch_size=2, shuffle=True))
        return lambda epoch: iter(loader)

    assert_what_is_left_is_handed_out(watch, tmp_path, prepared, stop_at)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_between_two_epochs_the_next_one_is_as_if_nothing_had_happened(
    watch: Callable[[], Loaders], tmp_path: Path, pattern: Callable[[], Step]
) -> None:
    seed()
    loaders, step = watch(), pattern()
    for _ in step(0):
        torch.rand(1)
    saved, now = loaders.save(tmp_path, 0), capture()
    rest = [flat(batch) for batch in step(1)]
    loaders.close()
    seed()
    loaders, step = watch(), pattern()
    restore(now)
    loaders.resume(saved, now, tmp_path, 1)
    assert [flat(batch) for batch in step(1)] == rest


def test_nothing_that_was_trained_is_loaded_again(watch: Callable[[], Loaders], tmp_path: Path) -> None:
    asked: list[int] = []

    class Told(Noisy):
        def __getitem__(self, index: int) -> torch.Tensor:
            asked.append(index)
            return torch.tensor(index)

    loaders = watch()
    batches = iter(DataLoader(Told(), batch_size=2))
    next(batches), next(batches)
    saved, now = loaders.save(tmp_path, 0), capture()
    loaders.close()
    loaders = watch()
    loaders.resume(saved, now, tmp_path, 1)
    asked.clear()
    assert len(list(DataLoader(Told(), batch_size=2))) == BATCHES - 2
    assert asked == list(range(4, 2 * BATCHES))


def under_way(loaders: Loaders, folder: Path) -> list[int | None]:
    return [entry["under_way"] and entry["under_way"]["handed_out"] for entry in loaders.save(folder, 0)]


def test_a_loop_that_is_left_or_at_its_end_is_not_under_way(watch: Callable[[], Loaders], tmp_path: Path) -> None:
    loaders, loader = watch(), DataLoader(Noisy(), batch_size=2)
    for _ in loader:
        break
    assert under_way(loaders, tmp_path) == [None]
    used_up = iter(loader)
    list(used_up)
    assert under_way(loaders, tmp_path) == [None]


def test_a_look_at_another_loader_is_not_under_way_unless_it_is_named(watch: Callable[[], Loaders], tmp_path: Path) -> None:
    loaders, (looked_at, loader) = watch(), (DataLoader(Noisy(), batch_size=size) for size in (1, 2))
    look, batches = iter(looked_at), iter(loader)
    next(look), next(batches), next(batches)
    assert under_way(loaders, tmp_path) == [None, 2]
    assert [entry["main"] for entry in loaders.save(tmp_path, 0, [looked_at])] == [True, False]


def test_a_worker_that_is_slow_to_start_is_waited_for(watch: Callable[[], Loaders], tmp_path: Path) -> None:
    may_start = multiprocessing.Event()

    def init(worker: int) -> None:
        assert worker == 0 or may_start.wait(PATIENCE_S)

    loaders, loader = watch(), DataLoader(Noisy(), batch_size=2, num_workers=2, worker_init_fn=init)
    batches = iter(loader)
    next(batches)
    timer = threading.Timer(0.2, may_start.set)
    timer.start()
    [entry] = loaders.save(tmp_path, 0)
    timer.join()
    assert len(json.loads((tmp_path / entry["workers"]).read_text())["states"]) == 2
    list(batches)


def test_a_loader_is_what_it_was_when_nobody_watches(watch: Callable[[], Loaders]) -> None:
    plain = DataLoader.__iter__
    loaders = watch()
    assert DataLoader.__iter__ is not plain
    loaders.close()
    assert DataLoader.__iter__ is plain
