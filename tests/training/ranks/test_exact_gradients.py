from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hf_spot.errors import ConfigError
from hf_spot.training.ranks import exact_gradients
from hf_spot.training.ranks.exact_gradients import ExactGradients
from tests.waiting import PATIENCE_S
from tests.zygote import Zygote


def _parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]


@pytest.mark.parametrize("most", [1, 7, 4_000_000])
def test_gradients_are_summed_and_given_back_in_their_shapes(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(exact_gradients, "_BUCKET", most)
    trained = [*_parameters((2, 3), (5,), ()), *_parameters((3,), dtype=torch.bfloat16)]
    sums = ExactGradients(lambda: trained, 1)
    for _ in range(2):
        sums.begin(4)
        for number in range(4):
            for one in trained:
                one.grad = torch.full_like(one, 2.0**number)
            sums.add()
            assert all(one.grad is None for one in trained)
        sums.finish()
        for one in trained:
            assert one.grad is not None and one.grad.shape == one.shape and one.grad.dtype == one.dtype
            assert torch.equal(one.grad, torch.full_like(one, 15.0))


def test_what_no_micro_batch_used_has_no_gradient_and_others_keep_theirs() -> None:
    used, unused, once, frozen = trained = _parameters((2,), (2,), (2,), (2,))
    frozen.requires_grad = False
    sums = ExactGradients(lambda: trained, 1)
    sums.begin(3)
    for number in range(3):
        used.grad = torch.tensor([1.0, -0.0])
        if number == 1:
            once.grad = torch.tensor([5.0, -0.0])
        sums.add()
    sums.finish()
    assert used.grad is not None and used.grad.tolist() == [3.0, 0.0] and torch.signbit(used.grad[1])
    assert once.grad is not None and once.grad.tolist() == [5.0, 0.0] and torch.signbit(once.grad[1])
    assert unused.grad is None and frozen.grad is None


def test_a_dropped_micro_batch_leaves_nothing() -> None:
    (one,) = trained = _parameters((2,))
    sums = ExactGradients(lambda: trained, 1)
    sums.begin(2)
    one.grad = torch.ones(2)
    sums.add()
    one.grad = torch.full((2,), 7.0)
    sums.drop()
    assert one.grad is None
    sums.finish()
    assert one.grad is not None and one.grad.tolist() == [1.0, 1.0]


def test_a_step_that_was_abandoned_leaves_nothing() -> None:
    (one,) = trained = _parameters((1,))
    sums = ExactGradients(lambda: trained, 1)
    for _ in range(2):
        sums.begin(2)
        one.grad = torch.ones(1)
        sums.add()
    sums.finish()
    assert one.grad is not None and one.grad.tolist() == [1.0]


def test_sparse_gradients_and_other_dtypes_are_refused() -> None:
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    sums = ExactGradients(embedding.parameters, 1)
    sums.begin(1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="sparse") as refused:
        sums.add()
    assert "sparse=False" in str(refused.value.hint)
    (double,) = _parameters((1,), dtype=torch.float64)
    sums = ExactGradients(lambda: [double], 1)
    sums.begin(1)
    double.grad = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ConfigError, match="float64"):
        sums.add()


def test_gradients_that_travel_during_the_backward_pass_have_the_sums_of_one_rank(zygote: Zygote) -> None:
    command = [sys.executable, "-Wignore", "-m", "tests.any_gpus.exchange", "--quick"]
    with zygote.forking():
        played = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE_S)
    assert played.returncode == 0 and "10 cases, 0 ranks" in played.stdout, played.stdout


def test_an_optimizer_that_steps_in_the_backward_pass_is_refused() -> None:
    (one,) = trained = _parameters((1,))
    step = lambda parameter: setattr(parameter, "grad", None)  # noqa: E731
    one.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]
    sums = ExactGradients(lambda: trained, 1)
    sums.begin(1)
    one.sum().backward()  # type: ignore[no-untyped-call]
    sums.add()
    with pytest.raises(ConfigError, match="no gradient is left") as refused:
        sums.finish()
    assert "after the backward pass" in str(refused.value.hint)
