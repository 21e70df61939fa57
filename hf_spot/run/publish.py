"""Publish a checkpoint of a run as a model on the Hugging Face Hub: the files that a model needs and a card, in one commit."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_spot.errors import ConfigError
from hf_spot.run import transfer
from hf_spot.run.checkpoint import Checkpoint
from hf_spot.run.manifest import files_of_model, is_weights
from hf_spot.run.run import Run
from hf_spot.storage.hub import open_model
from hf_spot.storage.hub_connection import model_card
from hf_spot.storage.store import Progress

CARD = "README.md"
_HUB_ID = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Published:
    """What was published: ``step`` of the run, ``url`` of the model, ``files`` in it, ``size_bytes`` of all files."""

    step: int
    url: str
    files: tuple[str, ...]
    size_bytes: int


def pick(run: Run, step: int | None) -> Checkpoint:
    """Return the checkpoint of ``step``; by default the best if Trainer chose one, else the newest. Raises NoCheckpoint."""
    best = [ref for ref in run.state().checkpoints if ref.best]
    return run.checkpoint(best[-1]) if step is None and best else run.find(step)


def publish(
    run: Run,
    url: str,
    *,
    step: int | None = None,
    private: bool = False,
    everything: bool = False,
    story: str = "",
    progress: Callable[[int], Progress | None] = lambda size_bytes: None,
) -> Published:
    """Download and verify a checkpoint, and upload it to a model repository, which is created if it does not exist.

    Args:
        run: the run that has the checkpoint.
        url: ``hf://owner/name``.
        step: of the checkpoint; by default the best, else the newest.
        private: make a new repository private.
        everything: include the optimizer and everything else that a resume needs.
        story: a line about the training, for the card.
        progress: makes a progress callback for a number of bytes.

    Raises:
        NoCheckpoint: there is none.
        ConfigError: ``url`` is not a model repository, or the checkpoint has no weights to load a model from.
        CorruptCheckpoint: the checkpoint differs from what was committed.
        StoreError: others have changed the repository meanwhile, or one of the stores refused.
    """
    model = open_model(url)
    checkpoint = pick(run, step)
    names = {file.path for file in checkpoint.files}
    chosen = names if everything else {*files_of_model(names)}
    if not everything and not any(is_weights(name) for name in chosen):
        raise ConfigError(
            f"{checkpoint.name} of {run.url} has no model.safetensors or other weights that a model is loaded from",
            hint="accelerate merge-weights makes them from FSDP's shards; --all uploads the checkpoint as it is",
        )
    files = [file for file in checkpoint.files if file.path in chosen]
    size_bytes = sum(file.size for file in files)
    moved = progress(2 * size_bytes)  # down and up
    with tempfile.TemporaryDirectory(prefix="hf_spot-publish-") as scratch:
        folder = Path(scratch) / "model"
        transfer.download(run.store, checkpoint.ref.prefix, files, folder, progress=moved)
        written = () if CARD in chosen else (CARD,)
        for name in written:
            (folder / name).write_text(card(folder, model.hub.id, checkpoint, story), encoding="utf-8")
        model.publish(
            folder,
            sorted({*chosen, *written}),
            defaults=written,  # an existing card may have been edited and stays
            superseded=is_weights,  # else the old shards would be loaded with the new ones
            private=private,
            message=f"Step {checkpoint.step}",
            progress=moved,
        )
    return Published(checkpoint.step, model.url, tuple(sorted({*chosen, *written})), size_bytes)


def card(folder: Path, name: str, checkpoint: Checkpoint, story: str) -> str:
    """Return the text of a model card, with the information found in the model's files.

    Args:
        folder: of the model.
        name: ``owner/name``.
        checkpoint: the published checkpoint.
        story: a line about the training.
    """
    config, adapter = _read(folder / "config.json"), _read(folder / "adapter_config.json")
    library = "sentence-transformers" if (folder / "modules.json").exists() else "transformers"
    metadata: dict[str, Any] = {"library_name": "peft" if adapter else library, "tags": ["hf_spot"]}
    base = adapter.get("base_model_name_or_path") or config.get("_name_or_path")
    if isinstance(base, str) and _HUB_ID.fullmatch(base) and not Path(base).exists():
        metadata["base_model"] = base
    if isinstance(kind := config.get("model_type"), str):
        metadata["tags"].append(kind)
    which = "the best checkpoint" if checkpoint.ref.best else "a checkpoint"
    lines = [
        f"# {name.partition('/')[2]}",
        f"This is {which} of a fine-tuning with the Hugging Face Trainer: step {checkpoint.step}, saved on "
        f"{checkpoint.time:%Y-%m-%d}."
        + (f" It began from [{base}](https://huggingface.co/{base})." if "base_model" in metadata else ""),
        *([story] if story else []),
    ]
    return model_card(metadata, "\n\n".join(lines) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
