"""What a model looks like, in short values that another launch computes again to know its training."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from hf_spot.training.state.values import bytes_of

_SAMPLED = 16  # values of each parameter


def parameters_of(model: Any) -> str:
    """Return a digest of the names and shapes of a model's parameters and of which are trained, and the number of these."""
    digest = hashlib.sha256()
    trained = 0
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # DeepSpeed has divided it among the ranks
        digest.update(f"{name} {tuple(shape)} {parameter.requires_grad}\n".encode())
        trained += parameter.requires_grad
    return f"{digest.hexdigest()[:16]} ({trained} trained)"


def weights_of(model: Any) -> str | None:
    """Return a digest of a sample of each parameter's values; None if they can't be looked at on this rank."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.is_meta or hasattr(parameter, "ds_id") or type(parameter.data) is not torch.Tensor:
            return None  # its values are elsewhere
        flat = parameter.detach().reshape(-1)
        digest.update(bytes_of(flat[:: max(1, flat.numel() // _SAMPLED)][: _SAMPLED + 1]))
    return digest.hexdigest()[:16]


def dtypes_of(model: Any) -> str:
    """Return the names of the parameters' dtypes."""
    return ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}))
