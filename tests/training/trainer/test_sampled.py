"""The digest of a sample of what a data set contains."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from functools import partial
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from hf_spot.training.state.sampled import digest_of, rows_of
from tests.zygote import Zygote


class Counting(Dataset[Any]):
    """Counts who asks it, and draws random numbers."""

    per_launch = ("opened_at",)

    def __init__(self, rows: list[str], level: int = 0) -> None:
        self.rows = rows
        self.level = level
        self.asked = 0
        self.opened_at = random.random()
        self.root = f"/somewhere/{random.random()}"
        self.rng = random.Random(random.random())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> Any:
        self.asked += 1
        return self.rows[at], self.rng.random()


ROWS = [f"row {at}" for at in range(100)]
MAKERS: dict[str, Any] = {
    "a list": list,
    "dicts of tensors": lambda rows: [{"ids": torch.tensor([ord(letter) for letter in row])} for row in rows],
    "a class of the script's": Counting,
    "a data set": lambda rows: datasets.Dataset.from_dict({"text": rows}),
    "one with a transform": lambda rows: datasets.Dataset.from_dict({"text": rows}).with_transform(lambda batch: batch),
    "a part of one": lambda rows: Subset(Counting(rows), range(len(rows))),
    "several": lambda rows: ConcatDataset([Counting(rows), Counting(ROWS)]),
    "tensors": lambda rows: TensorDataset(torch.tensor([len(row) * 256 + ord(row[-1]) for row in rows])),
    "by name": lambda rows: {"one": Counting(rows), "two": ROWS},
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_the_same_data_have_the_same_digest_and_others_another(make: Any) -> None:
    digest = digest_of(make(ROWS))
    assert digest == digest_of(make(list(ROWS)))
    assert digest != digest_of(make([*ROWS[:-1], "row x"]))
    assert digest != digest_of(make(ROWS[:-2]))


def test_nobody_is_asked_for_an_item() -> None:
    data = Counting(ROWS)
    state = data.rng.getstate()
    digest_of(data)
    assert data.asked == 0
    assert data.rng.getstate() == state
    called = []

    def transform(batch: Any) -> Any:
        called.append(1)
        return batch

    digest_of(datasets.Dataset.from_dict({"text": ROWS}).with_transform(transform))
    assert called == []


def test_a_stream_is_not_read() -> None:
    read = []

    def rows() -> Any:
        read.append(1)
        yield {"text": "a"}

    stream = datasets.IterableDataset.from_generator(rows)
    assert digest_of(stream) == digest_of(datasets.IterableDataset.from_generator(rows))
    assert rows_of(stream) is None
    assert read == []


def test_settings_of_data_and_of_functions_count() -> None:
    assert digest_of(Counting(ROWS, 1)) != digest_of(Counting(ROWS, 2))

    def loss(alpha: float) -> Any:
        return lambda outputs, labels: alpha * outputs

    assert digest_of(loss(1.0)) == digest_of(loss(1.0)) != digest_of(loss(2.0))
    assert digest_of(partial(max, 1)) != digest_of(partial(max, 2))


def test_what_holds_itself_ends() -> None:
    data = Counting(ROWS)
    data.me = data  # type: ignore[attr-defined]
    assert digest_of(data) == digest_of(data)


def test_another_process_finds_the_same(zygote: Zygote) -> None:
    code = (
        "import datasets, torch\n"
        "from hf_spot.training.state.sampled import digest_of\n"
        "rows = [f'row {at}' for at in range(100)]\n"
        "data = datasets.Dataset.from_dict({'text': rows}).map(lambda row: {'n': len(row['text'])})\n"
        "print(digest_of(data), digest_of({'a', 'b', 'c'}), digest_of([{'x': torch.arange(9.0)}]))\n"
    )
    command = [sys.executable, "-c", code]
    fresh = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with zygote.forking():  # sets are in another order in it: it has another hash seed than a fresh one
        environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
        assert subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout == fresh
