"""Checkpoints that are kept for good, whole or as weights alone: these can be loaded, and no training resumes from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_spot import Run, SpotArguments
from hf_spot.cli import main
from hf_spot.errors import ConfigError, IncompleteCheckpoint
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.copies import copy_run
from hf_spot.run.restore import restore_newest
from hf_spot.run.start_from import find_start
from hf_spot.run.upload import Uploader

Make = Callable[..., Path]


def call(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def trained(url: str, make_checkpoint: Make, *steps: int, **keep: Any) -> Run:
    """A run whose uploader has committed checkpoints of these steps, with real models in them."""
    run = Run(url)
    run.claim({})
    uploader = Uploader(run, Path(url).parent / "pins", save_total_limit=1, **keep)
    for step in steps:
        folder = make_checkpoint(step)
        torch.manual_seed(step)
        GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8)).save_pretrained(folder)
        uploader.submit(folder, CommitRequest(step=step))
        assert uploader.drain(60)
    uploader.close()
    return Run(url)


def test_every_nth_checkpoint_is_kept_whole(make_checkpoint: Make, tmp_path: Path) -> None:
    run = trained(str(tmp_path / "run"), make_checkpoint, 5, 10, 15, 20, 25, keep_every=10)
    assert [one.step for one in run.checkpoints()] == [10, 20, 25]
    assert not any(run.verify().values())
    assert run.weights() == []


def test_weights_alone_are_loaded_and_never_resumed(
    make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(str(tmp_path / "run"), make_checkpoint, 5, 10, 15, 20, 25, keep_every=10, keep_weights=True)
    assert ([one.step for one in run.weights()], [one.step for one in run.checkpoints()]) == ([10, 20], [25])
    assert [ref.step for ref in run.state().checkpoints] == [25]
    assert not any(run.verify().values())
    stored = {info.key for info in run.store.list("e")}
    assert {key.split("/")[1] for key in stored} == {"checkpoint-10-weights", "checkpoint-20-weights", "checkpoint-25"}
    assert not [
        key for key in stored if "weights/" in key and ("optimizer" in key or "rng_state" in key or "trainer_state" in key)
    ]
    successor = Run(run.url)
    successor.claim({})
    successor.collect_garbage()
    assert {info.key for info in run.store.list("e")} == stored

    folder = run.pull(tmp_path / "models", step=10)
    assert folder.name == "weights-10"  # which no Trainer resumes from
    loaded, saved = (AutoModelForCausalLM.from_pretrained(one) for one in (folder, tmp_path / "out" / "checkpoint-10"))
    assert all(torch.equal(one, saved.state_dict()[name]) for name, one in loaded.state_dict().items())
    restored = restore_newest(successor, successor.state().checkpoints, tmp_path / "new")
    assert restored is not None and restored[0].step == 25
    with pytest.raises(IncompleteCheckpoint, match=r"lacks optimizer\.pt"):
        find_start(f"{run.url}@10")

    copy = Run(tmp_path / "copy")
    copy_run(run, copy)
    assert [one.step for one in copy.weights()] == [10, 20]
    assert not any(copy.verify().values())
    told = call(capsys, "checkpoints", "ls", run.url)
    assert [(one["step"], one["reason"]) for one in told] == [(10, "weights"), (20, "weights"), (25, "schedule")]
    assert all(problems == [] for problems in call(capsys, "checkpoints", "verify", run.url).values())


def test_what_was_interrupted_between_weights_and_pruning_goes_on(make_checkpoint: Make, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.claim({})
    for step in (10, 20):
        folder = make_checkpoint(step)
        request = CommitRequest(step=step)
        run.commit(request, run.upload(folder, request))
    run._keep_weights(run.state().checkpoints[0])  # and then the launch was killed
    assert [ref.step for ref in run.prune(1, keep_every=10, keep_weights=True)] == [10]
    assert ([one.step for one in run.weights()], [one.step for one in run.checkpoints()]) == ([10], [20])
    assert not any(run.verify().values())


def test_a_checkpoint_without_weights_of_its_own_is_kept_whole(
    make_checkpoint: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path / "run")
    run.claim({})
    for step in (10, 20):
        folder = make_checkpoint(step)
        (folder / "pytorch_model_fsdp_0").mkdir()
        (folder / "model.safetensors").rename(folder / "pytorch_model_fsdp_0" / "__0_0.distcp")
        request = CommitRequest(step=step)
        run.commit(request, run.upload(folder, request))
    assert run.prune(1, keep_every=10, keep_weights=True) == []
    assert "checkpoint-10 has no weights that from_pretrained reads" in caplog.text
    assert [one.step for one in run.checkpoints()] == [10, 20]


def test_pruning_by_hand_can_keep_them_too(make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(str(tmp_path / "run"), make_checkpoint, 5, 10, 15, keep_every=5)
    words = ["checkpoints", "prune", run.url, "--save-total-limit", "1", "--keep-every", "10"]
    assert [ref["step"] for ref in call(capsys, *words, "--dry-run")] == [5]
    assert [ref["step"] for ref in call(capsys, *words)] == [5]
    assert main([*words[:-1], "0"]) == 2


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="keep_every=0"):
        SpotArguments(keep_every=0)
    with pytest.raises(ConfigError, match="keep_weights needs keep_every"):
        SpotArguments(keep_weights=True)
