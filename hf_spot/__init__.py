"""Fine-tune with the Hugging Face Trainer on machines that can be taken away.

Public names are imported on first use, so ``import hf_spot`` alone loads neither torch nor boto3.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import hf_spot.log  # importing the package adds the log handler, as in transformers
import hf_spot.run.display

if TYPE_CHECKING:
    from hf_spot.arguments import SpotArguments
    from hf_spot.errors import (
        AccessDenied,
        BucketNotFound,
        CloudError,
        ConfigError,
        CorruptCheckpoint,
        Fenced,
        IncompleteCheckpoint,
        NoAnswer,
        NoCapacity,
        NoCheckpoint,
        ObjectNotFound,
        RolledBack,
        SpotError,
        StoreError,
        StoreNotFencing,
        StoreUnavailable,
        TrainingInterrupted,
        TrainingPreempted,
        Untrusted,
    )
    from hf_spot.notices.notice import NoticeKind, NoticeSource, PreemptionNotice
    from hf_spot.run.checkpoint import Checkpoint
    from hf_spot.run.run import Run
    from hf_spot.storage.store import ObjectStore
    from hf_spot.training.callback import SpotCallback
    from hf_spot.training.manager import SpotCheckpointManager

__version__ = "0.1.0"

__all__ = [
    "AccessDenied",
    "BucketNotFound",
    "Checkpoint",
    "CloudError",
    "ConfigError",
    "CorruptCheckpoint",
    "Fenced",
    "IncompleteCheckpoint",
    "NoAnswer",
    "NoCapacity",
    "NoCheckpoint",
    "NoticeKind",
    "NoticeSource",
    "ObjectNotFound",
    "ObjectStore",
    "PreemptionNotice",
    "RolledBack",
    "Run",
    "SpotArguments",
    "SpotCallback",
    "SpotCheckpointManager",
    "SpotError",
    "StoreError",
    "StoreNotFencing",
    "StoreUnavailable",
    "TrainingInterrupted",
    "TrainingPreempted",
    "Untrusted",
    "__version__",
]

_MODULES = {
    "Checkpoint": "hf_spot.run.checkpoint",
    "NoticeKind": "hf_spot.notices.notice",
    "NoticeSource": "hf_spot.notices.notice",
    "ObjectStore": "hf_spot.storage.store",
    "PreemptionNotice": "hf_spot.notices.notice",
    "Run": "hf_spot.run.run",
    "SpotArguments": "hf_spot.arguments",
    "SpotCallback": "hf_spot.training.callback",
    "SpotCheckpointManager": "hf_spot.training.manager",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES.get(name, "hf_spot.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _draw(run: Run) -> str:
    from hf_spot.economics.shown import html_of

    return html_of(run)


def _write(run: Run) -> str:
    from hf_spot.economics.shown import text_of

    return text_of(run)


hf_spot.run.display.display.register(_draw, _write)
