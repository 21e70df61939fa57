"""Steps that don't depend on the number of ranks; ``python -m tests.any_gpus`` trains more kinds on more numbers."""

from __future__ import annotations

import logging
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers.trainer as trainer_module
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, default_data_collator
from transformers.trainer_pt_utils import distributed_concat

from hf_spot import Run, SpotArguments, SpotCallback
from hf_spot.errors import ConfigError
from hf_spot.policy.micro_batches import Shares
from hf_spot.training.data.micro_batches import MicroBatch, MicroBatches, _plain_fetch, seed_fetches, seeded
from hf_spot.training.data.rng import capture, pack
from hf_spot.training.trainer.exact_limits import looking_for_collective_calls, refuse_what_is_not_exact
from hf_spot.training.trainer.exact_metrics import METRICS_ONLY, _answering
from hf_spot.training.trainer.random_states import RandomStates
from hf_spot.training.upstream import COUNT_FLOS, FETCH, GET_BATCH_SAMPLES, TRAIN_LOADER, TRAINING_STEP
from tests.training.conftest import Recorder, make_trainer, same, weights
from tests.waiting import PATIENCE_S
from tests.zygote import Zygote

EXACT = SpotArguments(notice="none", exact_on_any_gpus=True)
SETTINGS: dict[str, Any] = {"gradient_accumulation_steps": 3, "num_train_epochs": 2}  # 12 micro-batches in an epoch


@pytest.mark.parametrize("row", ["GPT-2", "SFT"])
def test_one_and_two_ranks_and_a_change_in_mid_run_give_the_same_bits(zygote: Zygote, tmp_path: Path, row: str) -> None:
    command = [sys.executable, "-Wignore", "-m", "tests.any_gpus", "--quick", "--only", row, "--folder", str(tmp_path)]
    with zygote.forking():
        played = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE_S)
    assert played.returncode == 0, played.stdout
    assert "1 row, 0 with different results" in played.stdout


def test_the_result_is_that_of_trainer_but_for_rounding(store: str, tmp_path: Path) -> None:
    def still() -> Any:
        from transformers import GPT2Config, GPT2LMHeadModel

        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2, **none))

    plain_lines, exact_lines = Recorder(), Recorder()
    plain = make_trainer(tmp_path / "plain", plain_lines, model=still, **SETTINGS)
    plain.train()
    exact = make_trainer(tmp_path / "exact", exact_lines, SpotCallback(store, EXACT), model=still, **SETTINGS)
    exact.train()
    found, wanted = weights(exact), weights(plain)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-3) for name in wanted)
    assert exact_lines.losses.keys() == plain_lines.losses.keys()
    for step, loss in plain_lines.losses.items():
        assert exact_lines.losses[step] == pytest.approx(loss, rel=1e-3)


def test_only_a_trainer_that_asks_for_metrics_is_answered_with_its_own() -> None:
    asking = "def ask(gather): return gather(3)"
    own: dict[str, Any] = {"__name__": METRICS_ONLY[0]}
    script: dict[str, Any] = {"__name__": "__main__"}
    exec(asking, own)
    exec(asking, script)
    assert own["ask"](_answering(lambda value: [value, value])) == 3
    assert script["ask"](_answering(lambda value: [value, value])) == [3, 3]


def _interrupt() -> None:
    raise InterruptedError


def test_an_interrupted_training_ends_as_an_uninterrupted_one(store: str, tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", SpotCallback(f"{store}-whole", EXACT), **SETTINGS)
    whole.train()
    with pytest.raises(InterruptedError):
        make_trainer(tmp_path / "out", SpotCallback(store, EXACT), Recorder(6, _interrupt), **SETTINGS).train()
    trainer = make_trainer(tmp_path / "out", SpotCallback(store, EXACT), **SETTINGS)
    trainer.train()
    assert same(weights(trainer), weights(whole))
    commit = Run(store).checkpoints()[-1]
    assert commit.details["micro_batches"] == 3 and commit.details["data_parallel_size"] == 1


def test_ranks_that_did_not_exist_at_a_save_leave_the_checkpoint_as_it_is(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out")
    loader, folder = trainer.get_train_dataloader(), tmp_path / "checkpoint-1" / "random_states"
    saved = RandomStates(trainer, tmp_path / "saved")
    saved.begin_epoch(loader, None)
    state = torch.get_rng_state()
    saved.save(folder.parent)
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")  # so two ranks would save it; now there is one
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    torch.rand(1)
    resumed = RandomStates(trainer, tmp_path / "resumed")
    resumed.begin_epoch(loader, folder.parent)
    assert torch.equal(torch.get_rng_state(), state)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, "other ranks may be reading it"
    saved.close()
    resumed.close()


def test_settings_are_the_users_own_again_afterwards(store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="hf_spot")
    trainer = make_trainer(tmp_path, SpotCallback(store, EXACT), **SETTINGS, max_steps=1)
    threads, averages = torch.get_num_threads(), trainer.args.average_tokens_across_devices
    methods = {name for name, value in vars(trainer).items() if callable(value)}
    trainer.train()
    assert torch.get_num_threads() == threads
    assert trainer.args.average_tokens_across_devices == averages
    assert {name for name, value in vars(trainer).items() if callable(value)} == methods
    assert "also saved with" not in caplog.text, "what hf_spot sets is no state of the script"


@pytest.mark.parametrize("exact", [True, False])
def test_without_the_option_nothing_is_replaced(store: str, tmp_path: Path, exact: bool) -> None:
    FETCH.put(_plain_fetch)  # trainings before this one have replaced it
    found: dict[str, bool] = {}

    def look() -> None:
        code = [name.of(trainer).__code__.co_filename for name in (TRAINING_STEP, GET_BATCH_SAMPLES, COUNT_FLOS, TRAIN_LOADER)]
        found["a method"] = any(Path(one).name == "exact_steps.py" for one in code)
        found["gathering"] = Path(trainer_module.nested_gather.__code__.co_filename).name == "exact_steps.py"
        found["fetching"] = FETCH.find() is not _plain_fetch

    trainer = make_trainer(
        tmp_path, SpotCallback(store, EXACT if exact else SpotArguments(notice="none")), Recorder(2, look), max_steps=2
    )
    trainer.train()
    assert set(found.values()) == {exact}, found


def test_a_worker_that_has_not_inherited_it_seeds_what_it_makes() -> None:
    FETCH.put(_plain_fetch)
    batch = MicroBatch([3, 4])
    batch.seed = 7
    sent = pickle.dumps(batch)
    assert FETCH.find() is _plain_fetch
    received = pickle.loads(sent)
    assert (received, received.seed, type(received)) == ([3, 4], 7, MicroBatch)
    assert FETCH.find() is not _plain_fetch


class _Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from (
            {"input_ids": torch.ones(4, dtype=torch.long), "labels": torch.ones(4, dtype=torch.long)} for _ in range(99)
        )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "split batches": ({"accelerator_config": {"split_batches": True}}, "split_batches"),
    "dispatched batches": ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
    "found batch size": ({"auto_find_batch_size": True}, "auto_find_batch_size"),
    "rebalanced": ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance"),
    "out of order": ({"dataloader_in_order": False}, "dataloader_in_order"),
    "a stream": ({"train_dataset": _Stream, "max_steps": 2}, "without a length"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_exact_is_refused_before_the_first_step(store: str, tmp_path: Path, name: str) -> None:
    settings, why = REFUSED[name]
    recorder = Recorder()
    trainer = make_trainer(tmp_path, recorder, SpotCallback(store, EXACT), **settings)
    with pytest.raises(ConfigError, match=why) as refused:
        trainer.train()
    assert refused.value.hint and trainer.state.global_step == 0


def _normalized() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    class Normalized(GPT2LMHeadModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.norm = torch.nn.BatchNorm1d(16)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = super().forward(*args, **kwargs, output_hidden_states=True)
            found["loss"] = found["loss"] + self.norm(found["hidden_states"][0][:, 0]).mean()
            return found

    return Normalized(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2))


def test_running_statistics_are_refused_before_the_first_step(store: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, SpotCallback(store, EXACT), model=_normalized, remove_unused_columns=False)
    with pytest.raises(ConfigError, match=r"norm\.running_mean") as refused:
        trainer.train()
    assert "GroupNorm" in str(refused.value.hint) and trainer.state.global_step == 0


def _with_teacher() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    class Taught(GPT2LMHeadModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.teacher = torch.nn.Parameter(torch.zeros(16), requires_grad=False)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.teacher.data.mul_(0.9).add_(self.transformer.wte.weight.detach().mean(0))  # torch does not count this change
            return super().forward(*args, **kwargs)

    return Taught(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2))


def test_parameters_that_change_with_each_micro_batch_are_refused_before_the_first_step(store: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, SpotCallback(store, EXACT), model=_with_teacher, remove_unused_columns=False)
    with pytest.raises(ConfigError, match="teacher change with each micro-batch") as refused:
        trainer.train()
    assert "in a callback" in str(refused.value.hint) and trainer.state.global_step == 0


class _Substeps(TrainerCallback):
    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        pass


class _SeededCollator:
    seed, generator = 7, None

    def __call__(self, samples: Any) -> Any:
        return default_data_collator(samples)


NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "substeps": ({"callbacks": [_Substeps()]}, "on_substep_end of _Substeps"),
    "a seeded collator": ({"data_collator": _SeededCollator()}, "omit its seed"),
    "reference rewards made ahead": ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs"),
    "a compiled model": ({"torch_compile": True}, "pad all batches to one length"),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_may_not_be_exact_is_named(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings, told = NAMED[name]
    trainer = make_trainer(tmp_path)
    refuse_what_is_not_exact(trainer)
    assert told not in caplog.text
    for one in settings.pop("callbacks", []):
        trainer.add_callback(one)
    for key, value in settings.items():
        setattr(trainer if hasattr(trainer, key) else trainer.args, key, value)
    refuse_what_is_not_exact(trainer)
    assert told in caplog.text


@pytest.mark.parametrize(
    ("attribute", "why"),
    [
        ("is_fsdp_enabled", "FSDP adds gradients up"),
        ("is_deepspeed_enabled", "DeepSpeed adds gradients up"),
        ("fp16", "loss scale"),
    ],
)
def test_engines_that_add_gradients_up_themselves_are_refused(tmp_path: Path, attribute: str, why: str) -> None:
    trainer = make_trainer(tmp_path)
    setattr(trainer if hasattr(trainer, attribute) else trainer.args, attribute, True)
    with pytest.raises(ConfigError, match=why) as refused:
        refuse_what_is_not_exact(trainer)
    assert "bf16=True" in str(refused.value.hint) or "--multi_gpu in its place" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        ("KTOTrainer", {"calculate_KL": True}, "KTO"),
        ("DPOTrainer", {"loss_type": ["sigmoid", "bco_pair"]}, "bco_pair"),
    ],
)
def test_losses_that_use_means_over_ranks_are_refused(tmp_path: Path, kind: str, settings: dict[str, Any], why: str) -> None:
    trainer = make_trainer(tmp_path)
    trainer.__class__ = type(kind, (Trainer,), {})
    for key, value in settings.items():
        setattr(trainer if key == "calculate_KL" else trainer.args, key, value)
    with pytest.raises(ConfigError, match=why):
        refuse_what_is_not_exact(trainer)


def _make(sample: Any) -> tuple[Any, ...]:
    return sample, random.random(), float(numpy.random.rand()), float(torch.rand(()))


class _Drawing(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 11

    def __getitem__(self, at: int) -> Any:
        return _make(at)


@pytest.mark.parametrize("workers", [0, 2])
def test_random_numbers_of_the_data_belong_to_the_micro_batch(workers: int) -> None:
    seed_fetches()

    def every(shares: Shares, rank: int) -> list[Any]:
        inner = torch.utils.data.BatchSampler(range(11), 2, False)
        batches = MicroBatches(inner, shares, rank, 7, lambda: 3)
        return list(DataLoader(_Drawing(), batch_sampler=batches, collate_fn=list, num_workers=workers))

    alone = every(Shares(4, 1), 0)
    of_ranks = [every(Shares(4, 3), rank) for rank in range(3)]
    for at in range(6):  # four in the first step, two in the second one
        step, number = divmod(at, 4)
        turn, rank = divmod(number, 3)
        assert of_ranks[rank][step * 2 + turn] == alone[at]
    drawn = [sample[1:] for batch in alone[:6] for sample in batch]
    assert len(set(drawn)) == len(drawn)


def test_what_draws_between_two_steps_does_not_depend_on_the_data() -> None:
    seed_fetches()
    batches = MicroBatches(torch.utils.data.BatchSampler(range(11), 2, False), Shares(2, 1), 0, 7, lambda: 3)
    made = iter(DataLoader(_Drawing(), batch_sampler=batches, collate_fn=list))
    before = pack(capture())
    assert next(made) and pack(capture()) == before


def test_seeded_blocks_leave_the_generators_as_they_were() -> None:
    before = pack(capture())
    found = []
    for seed in (1, 1, 2):
        with seeded(seed):
            found.append(_make(0))
    assert pack(capture()) == before
    assert found[0] == found[1] != found[2]


def test_the_option_that_is_missing_later_is_told(store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InterruptedError):
        make_trainer(tmp_path, SpotCallback(store, EXACT), Recorder(6, _interrupt), **SETTINGS).train()
    make_trainer(tmp_path, SpotCallback(store, SpotArguments(notice="none")), **SETTINGS).train()
    assert "up to step 3 this training was exact on any number of GPUs" in caplog.text


def test_code_that_asks_other_ranks_is_named_with_its_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with looking_for_collective_calls():
            torch.distributed.all_reduce(torch.ones(1))
            distributed_concat(torch.ones(1))  # Trainer's own
    finally:
        torch.distributed.destroy_process_group()
    told = [one for one in caplog.messages if "asks other ranks" in one]
    assert len(told) == 1 and "test_code_that_asks_other_ranks" in told[0] and f"{__file__}:" in told[0]
