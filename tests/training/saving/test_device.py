"""What is saved of a training on a device is what it was at the save, though nobody waits for the copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_spot.training.saving import device
from hf_spot.training.saving.async_writer import AsyncCheckpointWriter

DEVICE = torch.accelerator.current_accelerator(check_available=True)
pytestmark = pytest.mark.skipif(
    DEVICE is None, reason="no accelerator on this machine; on an emulated one: python -m tests.emulated"
)


def make_state() -> dict[str, Any]:
    chance = torch.Generator().manual_seed(3)
    weights = torch.randn(1000, 30, generator=chance).to(DEVICE)
    return {
        "weights": weights,
        "a view": weights[3:5],
        "turned": torch.randn(4, 4, generator=chance).to(DEVICE).bfloat16().t(),
        "numbers": [torch.arange(7, device=DEVICE), {"step": torch.tensor(3.0)}],
        "nothing": torch.empty(0, device=DEVICE),
        "one": torch.tensor(3.5, device=DEVICE),
    }


def write(state: dict[str, Any], folder: Path) -> None:
    torch.save(state, str(folder / "optimizer.pt"))
    flat = {name: state[name].contiguous() for name in ("weights", "turned", "nothing", "one")}
    save_file(flat, str(folder / "model.safetensors"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("limit_bytes", [None, 0, 64, 130_000, 260_000])
@pytest.mark.parametrize("piece_bytes", [4096, 64 << 20])
def test_what_is_saved_is_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit_bytes: int | None, piece_bytes: int
) -> None:
    monkeypatch.setattr(device, "_PIECE_BYTES", piece_bytes)
    plain, behind = tmp_path / "plain" / "x", tmp_path / "behind" / "x"
    plain.mkdir(parents=True)
    behind.mkdir(parents=True)
    state = make_state()
    write(state, plain)
    writer = AsyncCheckpointWriter(limit_bytes)
    writer.expect(300_000)
    busy = torch.randn(800, 800, device=DEVICE)
    for _ in range(2):  # the second time into memory that has been pinned
        for _ in range(20):
            busy = busy @ busy / 800
        state["weights"] += busy.sum() * 0.0  # the copies come behind all this
        with writer.capturing():
            write(state, behind)
        for tensor in (state["weights"], state["turned"], state["numbers"][0], state["one"]):
            tensor.zero_()
        writer.wait()
        assert writer.take_error() is None
        assert contents(behind) == contents(plain)
        state = make_state()
    writer.close()


def test_what_the_device_is_asked_for_elsewhere_is_left_alone() -> None:
    asked = []
    tensor = torch.ones(3, device=DEVICE)
    with device.taken_over(lambda *what: asked.append(what)):
        assert tensor.untyped_storage().cpu().tolist() == torch.ones(3).untyped_storage().tolist()
    assert len(asked) == 1
    tensor.untyped_storage().cpu()
    assert len(asked) == 1
    assert "cpu" not in vars(torch.UntypedStorage)
