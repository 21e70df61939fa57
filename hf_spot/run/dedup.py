"""Find the files of a checkpoint that the store already has as part of an earlier one, such as a tokenizer or a frozen base
model that is saved in full. They are copied within the store instead of being uploaded again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_spot.run.manifest import FileEntry

_WORTH_BYTES = 1 << 20  # copying or uploading a smaller file costs one request either way


@dataclass(frozen=True)
class Standing:
    """A file in the store.

    Args:
        digest: of its bytes, as in `FileEntry`.
        key: its key in the store.
    """

    digest: str
    key: str


class Unchanged:
    """What one writer knows about the newest checkpoint in the store."""

    def __init__(self) -> None:
        self._standing: dict[str, tuple[FileEntry, str]] = {}
        self._moving: set[str] = set()

    def note(self, prefix: str, files: Iterable[FileEntry]) -> None:
        """Record that the store now has all of these files under ``prefix``."""
        for file in files:
            before = self._standing.get(file.path)
            if before is not None:
                change = self._moving.discard if before[0].digest == file.digest else self._moving.add
                change(file.path)
            self._standing[file.path] = (file, f"{prefix}/{file.path}")

    def candidate(self, path: str, size: int) -> Standing | None:
        """Return the previous checkpoint's file that this one may be equal to; None when a comparison does not pay off.

        A comparison must hash the file before anything is sent. A file that differed last time, as the weights being trained
        do, is sent and hashed at the same time instead.
        """
        file, key = self._standing.get(path, (None, ""))
        if file is None or file.size != size or size < _WORTH_BYTES or path in self._moving:
            return None
        return Standing(file.digest, key)
