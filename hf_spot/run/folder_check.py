"""Check that a local checkpoint folder is complete, from the files alone: without torch, and without unpickling anything."""

from __future__ import annotations

import json
import re
import struct
import zipfile
from pathlib import Path

from hf_spot.run.manifest import files_in, missing_for_resume
from hf_spot.run.parts import parts_in

_LONGEST_HEADER_BYTES = 100_000_000  # the safetensors format's own limit


def is_checkpoint_folder(path: Path) -> bool:
    """Return whether Trainer wrote this folder, complete or not. A run's folder has a journal instead."""
    return path.is_dir() and not (path / "journal").exists() and bool(_looks_like(path))


def _looks_like(path: Path) -> bool:
    known = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "model.safetensors", "training_args.bin")
    return bool(re.match(r"(torn-)?checkpoint-\d+$", path.resolve().name)) or any((path / name).exists() for name in known)


def problems_in(folder: Path) -> list[str]:
    """Return descriptions of what prevents a resume from this folder; an empty list if nothing was found.

    The checks: every file that a resume reads exists; JSON files parse; safetensors files are as long as their header says
    (https://github.com/huggingface/safetensors#format); torch files are complete zip archives whose members match their CRC-32.
    """
    names = files_in(folder)
    ranks = sum(bool(re.fullmatch(r"rng_state_\d+\.pth", name)) for name in names)
    problems = [f"{name} is missing" for name in missing_for_resume(names, max(1, ranks))]
    problems += [f"of {name} there are only the parts that this machine's ranks read" for name in parts_in(folder)]
    for name in names:
        path = folder / name
        suffix = path.suffix
        if suffix == ".json":
            problems += _problem(name, _json_problem(path))
        elif suffix == ".safetensors":
            problems += _problem(name, _safetensors_problem(path))
        elif suffix in (".pt", ".pth", ".bin"):
            problems += _problem(name, _zip_problem(path))
    return problems


def _problem(name: str, problem: str | None) -> list[str]:
    return [f"{name} {problem}"] if problem else []


def _json_problem(path: Path) -> str | None:
    try:
        json.loads(path.read_bytes())
    except ValueError as error:
        return f"is not JSON: {error}"
    return None


def _safetensors_problem(path: Path) -> str | None:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else _LONGEST_HEADER_BYTES + 1
        if length > min(size - 8, _LONGEST_HEADER_BYTES):
            return "is cut short in its header"
        try:
            tensors = json.loads(file.read(length))
            end = max((tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return "has a header that can't be read"
    expected = 8 + length + end
    return None if size == expected else f"has {size} bytes, and its header says {expected}"


def _zip_problem(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        return f"is no whole torch file: {error}"
    return f"is damaged in {damaged}" if damaged else None
