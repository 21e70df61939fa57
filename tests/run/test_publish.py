"""A checkpoint of a run becomes a model on the Hub: what goes, what stays, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hf_spot.cli import main
from hf_spot.errors import AccessDenied, ConfigError, CorruptCheckpoint, NoCheckpoint, StoreError
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.manifest import files_of_model
from hf_spot.run.publish import publish
from hf_spot.run.run import Run
from hf_spot.storage.hub import HubRepoStore
from tests.storage.fake_hub import READER, FakeHub

MODEL_FILES = {
    "config.json": json.dumps({"model_type": "bert", "_name_or_path": "google-bert/bert-base-uncased"}).encode(),
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "vocab.txt": b"[PAD]",
    "generation_config.json": b"{}",
    "chat_template.jinja": b"{{ x }}",
}
TRAINING_FILES = {"training_args.bin": b"\0pickle", "random_states/next_batch_0.json": b"{}", "callback.pkl": b"\0"}


@pytest.fixture
def run(tmp_path: Path, make_checkpoint: Callable[[int], Path]) -> Run:
    """With checkpoints of steps 5, the best, and 6."""
    run = Run(tmp_path / "run")
    run.claim()
    for step in (5, 6):
        folder = make_checkpoint(step)
        for name, data in {**MODEL_FILES, **TRAINING_FILES}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        request = CommitRequest(step=step, best_step=5)
        run.commit(request, run.upload(folder, request))
    return run


def content(hub: FakeHub, name: str, path: str) -> bytes:
    file = hub.repos[f"models/{name}"].files[path]
    return file.content if file.content is not None else hub.bytes_of(file)


def files(hub: FakeHub, name: str) -> set[str]:
    return {*hub.repos[f"models/{name}"].files} - {".gitattributes"}


def test_a_model_takes_along_what_it_is_loaded_from_and_nothing_of_the_training() -> None:
    model = [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.model",
        "modeling_custom.py",
        "1_Pooling/config.json",
        "value_head.safetensors",
        *MODEL_FILES,
    ]
    training = [
        "optimizer.pt",
        "optimizer.bin",
        "scheduler.pt",
        "scaler.pt",
        "rng_state_0.pth",
        "trainer_state.json",
        "training_args.bin",
        "pytorch_model_fsdp_0/__0_0.distcp",
        "pytorch_model_fsdp_0/.metadata",
        "optimizer_0/x.json",
        "global_step10/mp_rank_00_model_states.pt",
        "zero_to_fp32.py",
        "workers_0.json",
        *TRAINING_FILES,
    ]

    assert files_of_model([*model, *training]) == model


def test_the_best_checkpoint_is_published_with_a_card_in_one_commit(run: Run, logged_in: FakeHub) -> None:
    done = publish(run, "hf://me/first", story="It took an hour.")

    repo = logged_in.repos["models/me/first"]
    assert files(logged_in, "me/first") == {*MODEL_FILES, "model.safetensors", "README.md"} == {*done.files}
    assert content(logged_in, "me/first", "model.safetensors").startswith(b"model.safetensors of step 5")
    assert [summary for _, summary in repo.commits] == ["initial commit", "Step 5"]
    card = ModelCard(content(logged_in, "me/first", "README.md").decode())
    assert card.data.base_model == "google-bert/bert-base-uncased"
    assert (card.data.library_name, card.data.tags) == ("transformers", ["hf_spot", "bert"])
    assert "step 5" in card.text and "It took an hour." in card.text
    assert not repo.private


def test_another_step_replaces_it_takes_old_shards_away_and_leaves_a_card_that_somebody_has_improved(
    run: Run, logged_in: FakeHub
) -> None:
    publish(run, "hf://me/second", private=True)
    repo = logged_in.repos["models/me/second"]
    assert repo.private
    repo.files["README.md"] = repo.files["notes.md"] = repo.files["config.json"]
    repo.files["model-00001-of-00002.safetensors"] = repo.files["model.safetensors"]

    done = publish(run, "hf://me/second", step=6)

    assert done.step == 6
    assert content(logged_in, "me/second", "model.safetensors").startswith(b"model.safetensors of step 6")
    assert "model-00001-of-00002.safetensors" not in repo.files and "notes.md" in repo.files
    assert content(logged_in, "me/second", "README.md") == MODEL_FILES["config.json"]
    assert len(repo.commits) == 3


def test_all_of_a_checkpoint_can_be_published(run: Run, logged_in: FakeHub) -> None:
    publish(run, "hf://me/all", everything=True)

    assert {"optimizer.pt", "training_args.bin", "trainer_state.json"} < files(logged_in, "me/all")


def test_a_repository_that_changed_meanwhile_is_left_alone(
    run: Run, logged_in: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = logged_in.make("models/me/busy")
    prepared = HubRepoStore.prepared

    def interfere(self: HubRepoStore, *args: Any) -> Any:
        repo.add_commit("somebody else's")
        return prepared(self, *args)

    monkeypatch.setattr(HubRepoStore, "prepared", interfere)

    with pytest.raises(StoreError, match="changed by someone else") as caught:
        publish(run, "hf://me/busy")
    assert "commits/main" in caught.value.hint
    assert files(logged_in, "me/busy") == set()


def test_what_cant_be_published_is_refused_before_anything_is_made(
    run: Run, logged_in: FakeHub, tmp_path: Path, make_checkpoint: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in ("hf://buckets/me/x", "hf://datasets/me/x", "hf://me/x/folder", "hf://x"):
        with pytest.raises(ConfigError):
            publish(run, url)
    with pytest.raises(NoCheckpoint, match="step 7"):
        publish(run, "hf://me/refused", step=7)
    folder = tmp_path / "sharded" / "checkpoint-9"
    (folder / "pytorch_model_fsdp_0").mkdir(parents=True)
    (folder / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"x")
    run.push(folder)
    with pytest.raises(ConfigError, match="no model") as caught:
        publish(run, "hf://me/refused", step=9)
    assert "merge-weights" in caught.value.hint
    checkpoint = run.find(6)
    (tmp_path / "run" / checkpoint.ref.prefix / "config.json").write_bytes(b"damaged")
    with pytest.raises(CorruptCheckpoint):
        publish(run, "hf://me/refused", step=6)
    assert "models/me/refused" not in logged_in.repos
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(AccessDenied):
        publish(run, "hf://me/refused", step=5)


def test_the_command_tells_the_two_kinds_of_push_apart(
    run: Run, logged_in: FakeHub, make_checkpoint: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoints", "push", run.url, "hf://me/by-command", "--step", "6", "--private", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["url"]) == (6, "hf://me/by-command")
    assert logged_in.repos["models/me/by-command"].private
    assert b"machines that can be taken away, was never interrupted" in content(logged_in, "me/by-command", "README.md")

    assert main(["checkpoints", "push", run.url, str(make_checkpoint(8))]) == 0
    assert "checkpoint-8 committed" in capsys.readouterr().out
    assert main(["checkpoints", "push", run.url, str(make_checkpoint(8)), "--private"]) == 2
    assert "hf://owner/name" in capsys.readouterr().err


def test_the_commands_read_a_run_on_the_hub(
    run: Run, logged_in: FakeHub, hub_repo_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Run(hub_repo_url).push(tmp_path / "out" / "checkpoint-6")

    assert main(["checkpoints", "ls", hub_repo_url]) == 0
    assert "checkpoint-6" in capsys.readouterr().out
    assert main(["checkpoints", "verify", hub_repo_url]) == 0
    assert main(["checkpoints", "pull", hub_repo_url, str(tmp_path / "back")]) == 0
    assert (tmp_path / "back/checkpoint-6/optimizer.pt").read_bytes().startswith(b"optimizer.pt of step 6")
    assert main(["report", hub_repo_url]) == 0
