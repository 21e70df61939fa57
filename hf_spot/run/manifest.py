"""The contents of a checkpoint folder: names, sizes, digests, and whether they are enough to resume from."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hf_spot.errors import CorruptCheckpoint
from hf_spot.run.digest import NAMES, digest_of
from hf_spot.run.seal import LARGEST

MOST_RANKS = 1_000_000
PARTS_PREFIX = ".hf_spot-parts"
"""How the names of parts of files begin, and of what is known about them."""
_LEFT_OUT = (".tmp", PARTS_PREFIX)
_MOST_NAMED = 20  # missing files of ranks that a message names
_DIGEST = re.compile(rf"({'|'.join(NAMES)}):[0-9a-f]{{64}}")


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: ``path`` relative to its folder, with ``/``; ``size`` in bytes; and ``digest``: the name of a
    hash, a colon, and its value in hex.

    ``blake3`` (https://github.com/BLAKE3-team/BLAKE3-specs) is what ``b3sum`` prints. Files of more than 64 MiB have
    ``blake3-64m``: the BLAKE3 of the BLAKE3 digests (32 bytes each) of their parts of 64 MiB, which can be computed while the
    parts arrive in any order. Shards (``.distcp``) of more than 64 KiB have ``blake3-64k``, with parts of 64 KiB, whose digests
    are stored beside the checkpoint's files: a machine that reads some of the parts can verify these. The hash must be
    cryptographic, because restored files are unpickled: the journal must bind their contents. BLAKE3 takes a quarter of the
    time of SHA-256, which older runs used.
    """

    path: str
    size: int
    digest: str

    def __post_init__(self) -> None:
        check_path(self.path)
        if type(self.size) is not int or not 0 <= self.size <= LARGEST or not _DIGEST.fullmatch(str(self.digest)):
            raise CorruptCheckpoint(f"a manifest has no size or digest for {self.path!r}")

    def told(self) -> dict[str, Any]:
        """Return the entry as it is in a journal."""
        return {"path": self.path, "size": self.size, "digest": self.digest}

    @classmethod
    def of(cls, told: dict[str, Any]) -> FileEntry:
        """Return the entry for a file in a journal; older runs have ``sha256``. Raises CorruptCheckpoint, KeyError."""
        digest = told["digest"] if "digest" in told else f"sha256:{told['sha256']}"
        return cls(told["path"], told["size"], digest)


def check_path(path: str) -> None:
    """Refuse a name that could lead outside the checkpoint's folder. Raises CorruptCheckpoint."""
    parts = path.split("/") if isinstance(path, str) else [""]
    if not {"", ".", ".."}.isdisjoint(parts) or "\\" in path or "\0" in path:
        raise CorruptCheckpoint(f"a manifest names the file {path!r}, which could lie outside the checkpoint's folder")


def check_names(files: Iterable[FileEntry]) -> None:
    """Refuse names that some filesystems can't tell apart, or that are both a file and a folder. Raises CorruptCheckpoint."""
    names = Counter(file.path.casefold() for file in files)
    folders = {name[:at] for name in names for at, character in enumerate(name) if character == "/"}
    if twins := sorted(name for name, count in names.items() if count > 1 or name in folders):
        raise CorruptCheckpoint(f"a manifest names {twins[0]!r} twice")


def files_in(folder: Path) -> list[str]:
    """Return the relative names of all regular files below ``folder``, sorted, with dot-files such as FSDP's ``.metadata``.

    Names that begin with ``.tmp`` are left out, because Trainer leaves such files behind when a save is cut short, and parts of
    files that were fetched to resume (`hf_spot.run.parts`).
    """
    found, top = [], os.fspath(folder)
    for root, _, names in os.walk(top):
        below = os.path.relpath(root, top)
        within = "" if below == os.curdir else f"{below}{os.sep}"
        found += [f"{within}{name}".replace(os.sep, "/") for name in names if not name.startswith(_LEFT_OUT)]
    return sorted(found)


def difference(folder: Path, entry: FileEntry) -> str | None:
    """Return a description of how the file in ``folder`` differs from the manifest, or None. Sizes are compared first: that
    costs nothing."""
    path = folder / entry.path
    if not path.is_file():
        return f"{entry.path} is missing"
    if (size := path.stat().st_size) != entry.size:
        return f"{entry.path} has {size} bytes, not {entry.size}"
    if digest_of(path, entry.digest.partition(":")[0]) != entry.digest:
        return f"{entry.path} has other contents (its digest differs)"
    return None


# What Trainer's resume reads; each group is satisfied by any one of its patterns. When one is missing, Trainer itself silently
# continues with a new optimizer, schedule or random state.
_WEIGHTS = r"(model|adapter_model|pytorch_model)[^/]*\.(safetensors|bin)|pytorch_model_fsdp_\d+/.+|global_step\d+/.+"
_NEEDED = {
    "weights (model.safetensors)": rf"({_WEIGHTS}|.+/adapter_model\.(safetensors|bin))",
    "optimizer.pt": r"(optimizer\.(pt|bin)|optimizer_\d+/.+|global_step\d+/.+)",
    "scheduler.pt": r"(scheduler\.(pt|bin)|global_step\d+/.+)",  # DeepSpeed may keep a schedule of its own
    "trainer_state.json": r"trainer_state\.json",
}


def missing_for_resume(paths: Iterable[str], world_size: int) -> list[str]:
    """Return the names of files that a resume needs and ``paths`` lacks; an empty list if the checkpoint is complete.

    Of missing files of ranks only the first ones are named.

    Args:
        paths: relative file names.
        world_size: number of ranks that trained; if there are several, each has its own file of random states.
    """
    names = set(paths)
    missing = [label for label, pattern in _NEEDED.items() if not any(re.fullmatch(pattern, name) for name in names)]
    states = ("rng_state.pth" if world_size == 1 else f"rng_state_{rank}.pth" for rank in range(world_size))
    return [*missing, *islice((state for state in states if state not in names), _MOST_NAMED)]


def has_weights(paths: Iterable[str]) -> bool:
    """Return whether ``paths`` has the weights of a model or adapter, in one of the forms that Trainer writes."""
    return any(re.fullmatch(next(iter(_NEEDED.values())), name) for name in paths)


_OF_MODEL = re.compile(r"(.+/)?(model|adapter_model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?")
_BESIDE_MODEL = re.compile(r".+\.(json|jinja|txt|md|model|tiktoken|py|safetensors)")
# Files that only a resume reads: those of Trainer, FSDP, DeepSpeed and hf_spot.
_OF_TRAINING = re.compile(
    r"(.+/)?(trainer_state\.json|zero_to_fp32\.py|optimizer[^/]*|(next_batch|workers)_\d+\.json"
    r"|(pytorch_model_fsdp|optimizer|global_step)_?\d+/.+|random_states/.+|\.[^/]+)"
)


def is_weights(name: str) -> bool:
    """Return whether a file has weights that ``from_pretrained`` loads, or is an index of such files."""
    return _OF_MODEL.fullmatch(name) is not None


def files_of_model(names: Iterable[str]) -> list[str]:
    """Return the names of files that loading the model needs. Pickle files other than weights are left out."""
    return [name for name in names if is_weights(name) or (_BESIDE_MODEL.fullmatch(name) and not _OF_TRAINING.fullmatch(name))]


# Files that only one rank reads: Trainer's random states, those that hf_spot adds, DeepSpeed's shards, and shards that FSDP
# saves without torch's planner.
_OF_ONE_RANK = re.compile(
    r"(?:.*/)?(?:rng_state_(\d+)\.pth|random_states/[^/]*_(\d+)\.[a-z]+|[a-z0-9_]*zero_pp_rank_(\d+)_[^/]*"
    r"|(?:pytorch_model_fsdp|optimizer)(?:_\d+)?_rank(\d+)\.bin)"
)


def needed_by(files: Iterable[FileEntry], ranks: Collection[int]) -> tuple[FileEntry, ...]:
    """Return the files that a machine with these ranks reads when it resumes: all except those that only other ranks read."""

    def needed(path: str) -> bool:
        match = _OF_ONE_RANK.fullmatch(path)
        return match is None or int(next(group for group in match.groups() if group is not None)) in ranks

    return tuple(file for file in files if needed(file.path))
