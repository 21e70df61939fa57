"""State that Trainer's checkpoint files lack: detected by its changes in a training, saved with them, restored at a resume."""

from __future__ import annotations

import ast
import contextlib
import copy
import json
import logging
import operator
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch

from hf_spot.errors import CorruptCheckpoint
from hf_spot.training.state.iterators import position_of
from hf_spot.training.state.values import (
    copy_of,
    decode,
    encode,
    mark_of,
    mark_of_data,
    new_generator,
    put_into,
    set_state,
    state_of,
    with_objects,
    without_objects,
)
from hf_spot.training.state.walk import MOST_OBJECTS, Found, Walk, is_of_script, set_attribute

log = logging.getLogger("hf_spot")

FOLDER = "hf_spot_state"  # in a checkpoint; neither Trainer nor `from_pretrained` reads it
_FORMAT = 1
_UNREADABLE = object()  # in place of the mark of an object whose `state_dict` raises
_CLASS = ".__class__"  # at the end of a path: the class of an object
_OF_PARAMETERS = "._post_accumulate_grad_hooks"  # in a path: what a hook of a parameter keeps
_KEYS = re.compile(r"\[[^\]]*\]")
_BEYOND = "<beyond>"  # among the names of what was logged
_SHOWN = 4  # paths, in one line


class Saved(Protocol):
    """The tensors in the files of a checkpoint."""

    def holds(self, name: str, tensor: torch.Tensor) -> bool:
        """Return whether the files contain a tensor, or one of this name and shape."""


class CarriedState:
    """Saves and restores state that has changed since the training began, and that the checkpoint's other files lack.

    Args:
        find: yields all state, always in the same order.
        walk: creates the walk for ``find``.
        trained: returns the tensors that an optimizer currently changes.
        rank: number of this process. Tensors of models are the same on all ranks, and only rank 0 saves them.
        never: returns whether a path must not be saved, such as a cache of another process's state.
        divided: whether ranks divide the parameters among them, whose shapes then change while they are gathered.
    """

    def __init__(
        self,
        find: Callable[[Walk], Iterator[Found]],
        walk: Callable[[], Walk],
        trained: Callable[[], Collection[torch.Tensor]],
        rank: int,
        never: Callable[[str], bool] = lambda path: False,
        *,
        divided: bool = False,
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
        self._written_to: set[str] = set()
        self._kept: dict[str, Any] = {}
        self._shapes: dict[str, torch.Size] | None = None
        self._is_restructured = False
        self._marks_at_save: dict[str, str] = {}
        self._divided = divided

    def look(self, only: str = "") -> None:
        """Record the current state of everything that was not recorded before.

        Args:
            only: prefix of the paths to record.
        """
        every = list(self._all(self._walk()))
        for found in every:
            if found.path.startswith(only) and found.path not in self._began:
                self._began[found.path] = _mark(found)
        if self._shapes is None:
            self._shapes = _shapes(every)

    def keep(self, only: str = "") -> None:
        """Keep a copy of all current values, for `restore`: what a checkpoint does not contain was the same at the save.

        Call it before the callbacks of a resumed training can change anything. Tensors of models are not copied.

        Args:
            only: prefix of the paths to keep.
        """
        for found in self._all(self._walk()):
            wanted = found.path.startswith(only) and found.kind in ("value", "generator", "state", "adapted")
            if wanted and found.path not in self._kept and (mark := _mark(found)) is not _UNREADABLE:
                self._kept[found.path] = (mark, copy_of(_current(found)))

    @contextlib.contextmanager
    def writes_noted(self) -> Iterator[None]:
        """Note which tensors are written to within the block, so that `save` saves them even if they are the same as before.

        A resumed training may repeat the block with another result: ``reference.load_state_dict(model.state_dict())``.
        """
        before = {found.path: _version(found) for found in self._all(self._walk()) if found.kind == "tensor"}
        yield
        now = {found.path: _version(found) for found in self._all(self._walk()) if found.kind == "tensor"}
        self._written_to.update(path for path, version in now.items() if before.get(path, version) != version)

    def _all(self, walk: Walk) -> Iterator[Found]:
        return (found for found in self._find(walk) if not self._never(found.path))

    def save(self, checkpoint: Path, saved: Saved, write: Callable[[Path, str], None]) -> list[str]:
        """Write state that has changed and is in no other file.

        Args:
            checkpoint: folder of the checkpoint, with all other files.
            saved: the tensors in those files.
            write: writes a text to a file, now or later.

        Returns:
            The paths of what was written.
        """
        trained = {id(one) for one in self._trained()}
        values: dict[str, Any] = {}
        tensors: dict[str, torch.Tensor] = {}
        lost = []
        walk = self._walk()
        every = list(self._all(walk))
        self._name_structure(every)
        self._name_beyond(walk)
        for found in every:
            if found.kind == "tensor" and (self._rank or saved.holds(found.path, found.value)):
                continue
            if found.path not in self._began and _is_set_up(found.path, found.value, walk):
                continue
            is_trained = found.kind == "tensor" and id(found.value) in trained
            mark = _mark(found)
            if mark is _UNREADABLE:
                self._name_unreadable(found.path)
                continue
            known = self._carried | self._written_to
            if not is_trained and found.path not in known and mark == self._began.get(found.path):
                continue
            if found.kind in ("long", "iterator", "opaque"):
                lost.append(found.path)
                continue
            try:
                values[found.path] = {"kind": found.kind, "value": encode(_current(found), tensors, found.path)}
            except TypeError as error:
                log.debug("%s: %s", found.path, error)
                lost.append(found.path)
        self._carried.update(values)
        self._marks_at_save = self._marks_in(every)
        self._name(values, lost)
        if values:
            folder = checkpoint / FOLDER
            folder.mkdir(exist_ok=True)
            write(folder / f"state_{self._rank}.json", json.dumps({"format": _FORMAT, "values": values}))
            if tensors:
                safetensors.torch.save_file(_apart(tensors), folder / f"state_{self._rank}.safetensors")
        return list(values)

    def marks(self) -> dict[str, str]:
        """Return a mark for each saved path, which changes when the value changes."""
        return self._marks_in(self._all(self._walk())) if self._carried - self._homeless else {}

    @property
    def marks_at_save(self) -> dict[str, str]:
        """Return what `marks` was at the newest `save`."""
        return self._marks_at_save

    def _marks_in(self, every: Iterable[Found]) -> dict[str, str]:
        compared = self._carried - self._homeless
        here = {found.path: found for found in every if found.path in compared}
        marks = {path: _mark(here[path]) for path in sorted(self._carried) if path in here}
        return {path: repr(mark) for path, mark in marks.items() if mark is not _UNREADABLE}

    def _name(self, values: dict[str, Any], lost: list[str]) -> None:
        """Log once per path what is saved, and what can't be."""
        fresh = [path for path in values if path not in self._named]
        self._named.update(fresh)
        if fresh and not self._rank:
            log.info("also saved with each checkpoint, because it changes and Trainer does not save it: %s", _in_words(fresh))
        for path in lost:
            kind = _KEYS.sub("[]", path)  # of the items of one list or dictionary, or the parameters of a model, one is enough
            kind = kind[kind.find(_OF_PARAMETERS) :] if _OF_PARAMETERS in kind else kind
            if not {path, kind} & self._named:
                self._named |= {path, kind}
                owner = path.rpartition(".")[0]
                log.warning(
                    "%s changes in this training and can't be saved: it is reset in a resumed run. Give %s a state_dict(), or "
                    "make the callback an ExportableState",
                    path,
                    owner or path,
                )

    def _name_structure(self, every: list[Found]) -> None:
        """Log once that the model has other parameters than it had when the training began."""
        if self._shapes is None or self._is_restructured or self._rank or self._divided:
            return
        now = _shapes(every)
        other = [path for path in {**self._shapes, **now} if self._shapes.get(path) != now.get(path)]
        if other:
            self._is_restructured = True
            log.warning(
                "this training changes which parameters its model has (%s): a resumed run builds it without that and can't "
                "load this checkpoint. Change the model before train(), as it is in the checkpoint",
                _in_words(other),
            )

    def _name_beyond(self, walk: Walk) -> None:
        """Log once that there is more than a save can look through."""
        if walk.beyond and not self._rank and _BEYOND not in self._named:
            self._named.add(_BEYOND)
            log.warning(
                "more than %d objects can be reached from the trainer: %s and what comes after it are not looked into, and "
                "what changes there is reset in a resumed run. Give what holds them a state_dict(), or keep them in one array",
                MOST_OBJECTS,
                walk.beyond,
            )

    def _name_unreadable(self, path: str) -> None:
        """Log once that nobody can tell whether an object changes."""
        if path not in self._named:
            self._named.add(path)
            log.warning("%s is not saved, because its state_dict() raises an exception: a resumed run may differ there", path)

    def restore(self, checkpoint: Path, *, last: bool = True, without: str | None = None) -> list[str]:
        """Restore what `save` wrote, and what `keep` has kept of the rest; return the paths of what was written.

        Args:
            checkpoint: folder of the checkpoint.
            last: whether paths that don't exist in this launch are logged, because nothing will create them later.
            without: prefix of paths that are not expected to exist.

        Raises:
            CorruptCheckpoint: the files are inconsistent.
        """
        written: dict[str, Any] = {}
        own: set[str] = set()  # of which no other rank tells that there is no place for it
        tensors: dict[str, torch.Tensor] = {}
        for rank in dict.fromkeys((0, self._rank)):
            file = checkpoint / FOLDER / f"state_{rank}.json"
            values = json.loads(file.read_text())["values"] if file.exists() else {}
            own = set(values) - set(written)
            written |= values
            if file.with_suffix(".safetensors").exists():
                tensors |= safetensors.torch.load_file(file.with_suffix(".safetensors"))
        self._carried.update(written)
        decoded: dict[str, Any] = {}
        for path, told in written.items():
            try:
                decoded[path] = decode(told["value"], tensors)
            except (KeyError, TypeError, ValueError) as error:
                raise CorruptCheckpoint(f"{checkpoint.name}/{FOLDER}: {path} can't be read ({error!r})") from error
        walk = self._walk()
        here = {found.path: found for found in self._all(walk)}
        missing = [path for path in written if path.endswith(_CLASS) and path not in here]
        created = [_create(path.removesuffix(_CLASS), decoded[path], here, walk) for path in missing]
        if any(created):
            walk = self._walk()
            here = {found.path: found for found in self._all(walk)}
        homeless = []
        for path, told in written.items():
            value, place = decoded[path], here.get(path) or _item(path, here)
            if place is None and _is_set_up(path, value, walk):  # of an earlier hf_spot
                continue
            if place is None and isinstance(told["value"], dict) and told["value"].get("mapping") == "defaultdict":
                put = False  # nobody but the script knows its factory
            else:
                put = _put(place, path, told["kind"], value, walk)
            if not put and not (without is not None and path.startswith(without)):
                homeless.append(path)
        self._homeless = set(homeless)
        self._put_back(written)
        if last and (told_here := [path for path in homeless if path in own]):
            log.warning("not restored, because this launch does not have it: %s", _in_words(told_here))
        return [path for path in written if path not in homeless]

    def _put_back(self, written: Collection[str]) -> None:
        """Put back what callbacks have changed at the start of this launch alone."""
        walk = self._walk()
        changed = []
        for found in list(self._all(walk)):
            if found.path in written or found.path not in self._kept:
                continue
            if any(path.startswith(f"{found.path}[") for path in written):  # items of it have just been restored
                continue
            mark, value = self._kept[found.path]
            if _mark(found) != mark and _put(found, found.path, found.kind, copy_of(value), walk):
                changed.append(found.path)
        if changed and not self._rank:
            log.info("put back, because a callback changed it only after the resume: %s", _in_words(changed))


def _current(found: Found) -> Any:
    if found.kind == "generator":
        return state_of(found.value)
    if found.kind == "adapted":
        return found.value.get()
    return without_objects(found.value.state_dict()) if found.kind == "state" else found.value


def _mark(found: Found) -> Any:
    if found.kind == "long":
        return mark_of_data(found.value)
    if found.kind == "opaque":
        return found.value
    if found.kind == "adapted":
        return mark_of(found.value.get())
    if found.kind == "iterator":
        return position_of(found.value)
    if found.kind != "state":
        return mark_of(found.value)
    try:
        return mark_of(without_objects(found.value.state_dict()))
    except Exception as error:  # foreign code
        log.debug("%s: %r", found.path, error)
        return _UNREADABLE


def _shapes(every: list[Found]) -> dict[str, torch.Size]:
    """Return the shapes of the model's parameters by path."""
    parameters = (one for one in every if isinstance(one.value, torch.nn.Parameter) and one.path.startswith("model."))
    return {one.path: one.value.shape for one in parameters if one.kind == "tensor"}


def _is_set_up(path: str, value: Any, walk: Walk) -> bool:
    """Return whether a value is a private yes or no at a module of an installed package.

    If it appears while training, it tells that the library has set something up in this process: transformers installs hooks in
    the first forward pass, and does not in a process that finds the note that they are installed. Anything else may be what a
    script counts there.
    """
    at, _, name = path.rpartition(".")
    owner = walk.owners.get(at)
    is_note = isinstance(value, bool) and name.startswith("_") and not name.startswith("__")
    return is_note and isinstance(owner, torch.nn.Module) and not is_of_script(type(owner))


def _version(found: Found) -> int:
    return int(found.value._version)


def _item(path: str, here: Mapping[str, Found]) -> Found | None:
    """Return the item that a path names, in a value that is found as a whole: at the save it had other items, too, which were
    no values."""
    for whole, found in here.items():
        if found.kind == "value" and path.startswith(f"{whole}["):
            value, put, rest = found.value, found.put, path[len(whole) :]
            while rest and isinstance(value, (dict, list)):
                items = list(value.items() if isinstance(value, dict) else enumerate(value))
                named = next(((key, one) for key, one in items if rest.startswith(f"[{key!r}]")), None)
                if named is None:
                    break
                rest = rest[len(f"[{named[0]!r}]") :]
                put, value = partial(operator.setitem, value, named[0]), named[1]
            if not rest:
                return Found(path, "value", value, put)
    return None


def _create(path: str, kind: Any, here: Mapping[str, Found], walk: Walk) -> bool:
    """Create an object that the script creates later in an uninterrupted run; return whether it has a place.

    Its attributes are restored next. A model is a copy of one of its class that is here.

    Args:
        path: its path.
        kind: its class.
        here: what this launch has, by path.
        walk: that has found it.
    """
    if not isinstance(kind, type) or not (is_of_script(kind) or issubclass(kind, torch.nn.Module)):
        return False
    try:
        if issubclass(kind, torch.nn.Module):
            like = next((one for one in walk.owners.values() if type(one) is kind), None)
            if like is None:
                return False
            made: Any = copy.deepcopy(like)
        else:
            made = kind.__new__(kind)
        if path.endswith("]"):
            of, _, key = path.removesuffix("]").rpartition("[")
            container = walk.owners.get(of, here[of].value if of in here else None)
            name = ast.literal_eval(key)
            if isinstance(container, dict):
                container[name] = made
            elif isinstance(container, list) and name == len(container):
                container.append(made)
            else:
                return False
        elif path in here and here[path].put is not None:
            here[path].put(made)  # type: ignore[misc]
        else:
            owner = walk.owners.get(path.rpartition(".")[0])
            if owner is None or isinstance(owner, (dict, list, tuple)):
                return False
            set_attribute(owner, path.rpartition(".")[2], made)
    except (AttributeError, TypeError, ValueError, SyntaxError) as error:
        log.debug("%s: %r", path, error)
        return False
    walk.owners[path] = made
    return True


def _put(found: Found | None, path: str, kind: str, value: Any, walk: Walk) -> bool:
    """Put a value in its place; tell whether it has one. A property, or an object that refuses it, is none."""
    try:
        return _put_there(found, path, kind, value, walk)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        log.debug("%s: %r", path, error)
        return False


def _put_there(found: Found | None, path: str, kind: str, value: Any, walk: Walk) -> bool:
    if found is None:
        owner = walk.owners.get(path.rpartition(".")[0])
        if owner is None:  # a parameter has no truth
            owner = _class_named(path.rpartition(".")[0])
        is_attribute = path.rpartition(".")[2].isidentifier()  # and no item of one
        if owner is None or kind == "state" or not is_attribute:  # its state is not the object itself
            return False
        if kind == "generator" and (value := new_generator(value)) is None:
            return False
        set_attribute(owner, path.rpartition(".")[2], value)  # an uninterrupted run creates it later
        return True
    if found.kind == "generator":
        set_state(found.value, value)
    elif found.kind == "state":
        found.value.load_state_dict(with_objects(value))
    elif found.kind == "adapted":
        found.value.set(value)
    else:
        held = put_into(found.value, value)
        if held is not found.value:
            if found.put is None:
                return False
            found.put(held)
    return True


def _class_named(path: str) -> Any:
    """Return a class of the script by its full name, of which there are no objects yet; None if there is none."""
    module = next((one for one in _prefixes(path) if one in sys.modules), None)
    found: Any = sys.modules.get(module or "")
    for part in path[len(module or "") :].split(".")[1:]:
        found = getattr(found, part, None)
    return found if isinstance(found, type) and is_of_script(found) else None


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the same tensors without shared memory, which safetensors does not allow."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.contiguous() if memory not in seen else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(memory)
    return apart


def _in_words(paths: list[str]) -> str:
    return ", ".join(paths[:_SHOWN]) + (f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "")
