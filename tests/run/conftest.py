from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

NAMES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "sub/.metadata")


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[[int], Path]:
    """Writes a folder that has everything a resume reads, with contents that depend on the step."""

    def make(step: int, parent: Path | None = None) -> Path:
        folder = (parent or tmp_path / "out") / f"checkpoint-{step}"
        for name in NAMES:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"{name} of step {step}".encode() * 100)
        return folder

    return make
