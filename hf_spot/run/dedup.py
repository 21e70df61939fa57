"""Which of a checkpoint's files stand in the store already, as part of an earlier one: a frozen base model that is saved whole,
a tokenizer. They are copied there instead of being sent again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_spot.run.manifest import FileEntry

_WORTH_BYTES = 1 << 20  # a smaller file costs one request either way


@dataclass(frozen=True)
class Standing:
    """A file in the store.

    Args:
        digest: of its bytes, as in `FileEntry`.
        key: where it stands.
    """

    digest: str
    key: str


class Unchanged:
    """What one writer knows of the newest checkpoint that stands in the store."""

    def __init__(self) -> None:
        self._standing: dict[str, tuple[FileEntry, str]] = {}
        self._moving: set[str] = set()

    def note(self, prefix: str, files: Iterable[FileEntry]) -> None:
        """These files stand under ``prefix`` now, all of them."""
        for file in files:
            before = self._standing.get(file.path)
            if before is not None:
                change = self._moving.discard if before[0].digest == file.digest else self._moving.add
                change(file.path)
            self._standing[file.path] = (file, f"{prefix}/{file.path}")

    def candidate(self, path: str, size: int) -> Standing | None:
        """The file of the checkpoint before that this one is perhaps equal to; None when that is not worth a look.

        Comparing takes a hash before anything is sent. A file that was different last time, as weights in training are, is
        sent and hashed at the same time.
        """
        file, key = self._standing.get(path, (None, ""))
        if file is None or file.size != size or size < _WORTH_BYTES or path in self._moving:
            return None
        return Standing(file.digest, key)
