"""State that no file of a checkpoint holds: found by what changes in a training, saved with the rest, restored at a resume."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch

from hf_spot.errors import CorruptCheckpoint
from hf_spot.training.state.values import decode, encode, mark_of, put_into, set_state, state_of
from hf_spot.training.state.walk import Found, Walk

log = logging.getLogger("hf_spot")

FOLDER = "hf_spot_state"  # in a checkpoint; neither Trainer nor `from_pretrained` looks into it
_FORMAT = 1
_SHOWN = 4  # paths, in one line


class Saved(Protocol):
    """What has been written to the files of a checkpoint."""

    def holds(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a tensor, or one of this name and shape, is in them."""


class CarriedState:
    """Remembers how everything stood when the training began; what differs at a save, and is in no file, is carried.

    Args:
        find: looks at everything, in the same order each time.
        walk: makes the walk that ``find`` is given.
        trained: the tensors that an optimizer changes, at that moment.
        rank: of this process. Tensors of models are the same on all ranks: rank 0 carries them.
        never: paths that are another launch's business, such as caches of what stands in another process.
    """

    def __init__(
        self,
        find: Callable[[Walk], Iterator[Found]],
        walk: Callable[[], Walk],
        trained: Callable[[], Collection[torch.Tensor]],
        rank: int,
        never: Callable[[str], bool] = lambda path: False,
    ) -> None:
        self._find = find
        self._walk = walk
        self._trained = trained
        self._rank = rank
        self._never = never
        self._began: dict[str, Any] = {}
        self._carried: set[str] = set()
        self._homeless: set[str] = set()
        self._named: set[str] = set()

    def look(self, only: str = "") -> None:
        """Remember how everything stands that has not been seen before.

        Args:
            only: the beginning of the paths that are looked at.
        """
        for found in self._all(self._walk()):
            if found.path.startswith(only) and found.path not in self._began:
                self._began[found.path] = _mark(found)

    def _all(self, walk: Walk) -> Iterator[Found]:
        return (found for found in self._find(walk) if not self._never(found.path))

    def save(self, checkpoint: Path, saved: Saved, write: Callable[[Path, str], None]) -> list[str]:
        """Write what has changed and is in no file.

        Args:
            checkpoint: its folder, in which everything else has been written.
            saved: what was.
            write: writes a text to a file, now or later.

        Returns:
            The paths of what was written.
        """
        trained = {id(one) for one in self._trained()}
        values: dict[str, Any] = {}
        tensors: dict[str, torch.Tensor] = {}
        lost = []
        for found in self._all(self._walk()):
            if found.kind == "tensor" and (self._rank or saved.holds(found.path, found.value)):
                continue
            is_trained = found.kind == "tensor" and id(found.value) in trained
            if not is_trained and found.path not in self._carried and _mark(found) == self._began.get(found.path):
                continue
            if found.kind == "long":
                lost.append(found.path)
                continue
            try:
                values[found.path] = {"kind": found.kind, "value": encode(_current(found), tensors, found.path)}
            except TypeError as error:
                log.debug("%s: %s", found.path, error)
                lost.append(found.path)
        self._carried.update(values)
        self._name(values, lost)
        if values:
            folder = checkpoint / FOLDER
            folder.mkdir(exist_ok=True)
            write(folder / f"state_{self._rank}.json", json.dumps({"format": _FORMAT, "values": values}))
            if tensors:
                safetensors.torch.save_file(_apart(tensors), folder / f"state_{self._rank}.safetensors")
        return list(values)

    def marks(self) -> dict[str, str]:
        """Return something for each path that is carried, which differs when what stands there does."""
        compared = self._carried - self._homeless
        here = {found.path: found for found in self._all(self._walk()) if found.path in compared}
        return {path: repr(_mark(here[path])) for path in sorted(self._carried) if path in here}

    def _name(self, values: dict[str, Any], lost: list[str]) -> None:
        """Say once what is carried, and what can't be."""
        fresh = [path for path in values if path not in self._named]
        self._named.update(fresh)
        if fresh and not self._rank:
            log.info("saved with each checkpoint, as it changes and no file of Trainer's has it: %s", _in_words(fresh))
        for path in lost:
            if path not in self._named:
                self._named.add(path)
                owner = path.rpartition(".")[0]
                log.warning(
                    "%s changes in this training and can't be saved: a resumed run begins anew with it. Give %s a "
                    "state_dict(), or make the callback an ExportableState",
                    path,
                    owner or path,
                )

    def restore(self, checkpoint: Path) -> list[str]:
        """Put back what `save` wrote; return the paths. What has no place any more is named.

        Raises:
            CorruptCheckpoint: the files do not fit together.
        """
        written: dict[str, Any] = {}
        tensors: dict[str, torch.Tensor] = {}
        for rank in dict.fromkeys((0, self._rank)):
            file = checkpoint / FOLDER / f"state_{rank}.json"
            if file.exists():
                written |= json.loads(file.read_text())["values"]
                if file.with_suffix(".safetensors").exists():
                    tensors |= safetensors.torch.load_file(file.with_suffix(".safetensors"))
        self._carried.update(written)
        walk = self._walk()
        here = {found.path: found for found in self._all(walk)}
        homeless = []
        for path, told in written.items():
            try:
                value = decode(told["value"], tensors)
            except (KeyError, TypeError, ValueError) as error:
                raise CorruptCheckpoint(f"{checkpoint.name}/{FOLDER}: {path} can't be read ({error!r})") from error
            if not _put(here.get(path), path, value, walk):
                homeless.append(path)
        self._homeless.update(homeless)
        if homeless:
            log.warning("%s: saved, but not there any more in this launch, so not restored", _in_words(homeless))
        return [path for path in written if path not in homeless]


def _current(found: Found) -> Any:
    if found.kind == "generator":
        return state_of(found.value)
    return found.value.state_dict() if found.kind == "state" else found.value


def _mark(found: Found) -> Any:
    return mark_of(found.value.state_dict() if found.kind == "state" else found.value)


def _put(found: Found | None, path: str, value: Any, walk: Walk) -> bool:
    """Put a value in its place; tell whether it has one. A property, or an object that refuses it, is none."""
    try:
        return _put_there(found, path, value, walk)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        log.debug("%s: %r", path, error)
        return False


def _put_there(found: Found | None, path: str, value: Any, walk: Walk) -> bool:
    if found is None:
        owner = walk.owners.get(path.rpartition(".")[0])
        if owner is None:
            return False
        setattr(owner, path.rpartition(".")[2], value)  # made later in an undisturbed run
        return True
    if found.kind == "generator":
        set_state(found.value, value)
    elif found.kind == "state":
        found.value.load_state_dict(value)
    else:
        held = put_into(found.value, value)
        if held is not found.value:
            if found.put is None:
                return False
            found.put(held)
    return True


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, each with memory of its own, as safetensors wants them."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.contiguous() if memory not in seen else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(memory)
    return apart


def _in_words(paths: list[str]) -> str:
    return ", ".join(paths[:_SHOWN]) + (f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "")
