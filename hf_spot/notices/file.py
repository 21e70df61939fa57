"""A file as a notice, for schedulers, scripts and people without another way to send one."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from hf_spot.errors import SpotError
from hf_spot.notices.notice import NoticeKind, PreemptionNotice

FILE_VARIABLE = "HF_SPOT_NOTICE_FILE"

_LONGEST_BYTES = 65536
_SETTLE_S = 0.05


class FileSource:
    """A notice that stands while a file exists. Removing the file cancels a termination.

    An empty file, or one that is not a JSON object, is a TERMINATE without a deadline. A JSON object may state ``kind``,
    ``id``, ``source``, and ``deadline`` (ISO time with zone) or ``deadline_s`` (seconds since the file was last written,
    by its modification time).

    Args:
        path: path of the file; neither it nor its folder needs to exist.
        interval_s: seconds between polls.
        sleep: waits for some seconds; a new file is read twice, a moment apart.
    """

    name = "file"

    def __init__(
        self, path: str | os.PathLike[str], *, interval_s: float = 1.0, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.path = Path(path).expanduser()
        self.where = str(self.path)
        self.interval_s = interval_s
        self._sleep = sleep
        self._content: bytes | None = None
        self._held: PreemptionNotice | None = None

    def poll(self) -> PreemptionNotice | None:
        """Return the notice that the file states now.

        Raises:
            SpotError: the file holds a JSON object with a value that can't be used.
            OSError: the file can't be read.
        """
        content, modified = self._read()
        if content is not None and content == self._content:
            return self._held
        if content is not None:
            # Most writers open and then write: a file that a shell's ">" has just opened would read as "terminate".
            self._sleep(_SETTLE_S)
            again, modified = self._read()
            if again != content:
                return self._held
        held = self._held
        if content is None:
            self._content = self._held = None
            if held is not None and held.kind is NoticeKind.TERMINATE:
                return PreemptionNotice(NoticeKind.CANCELLED, self.name, f"cancelled {held.id}")
            return None
        # The content identifies the notice; the date counts only the first time. A script that touches the file every few
        # seconds repeats the same notice and does not postpone the deadline.
        self._held = self._parse(content, modified)
        self._content = content
        return self._held

    def _read(self) -> tuple[bytes | None, datetime]:
        try:
            with self.path.open("rb") as file:
                modified = datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime, timezone.utc)
                return file.read(_LONGEST_BYTES), modified
        except FileNotFoundError:
            return None, datetime.fromtimestamp(0, timezone.utc)

    def _parse(self, content: bytes, modified: datetime) -> PreemptionNotice:
        try:
            stated = json.loads(content)
        except ValueError:
            stated = {}
        if not isinstance(stated, dict):
            stated = {}
        digest = hashlib.sha256(content).hexdigest()[:12]
        try:
            return PreemptionNotice(
                kind=NoticeKind(stated.get("kind", NoticeKind.TERMINATE)),
                source=str(stated.get("source", self.name)),
                id=str(stated.get("id", f"{modified.isoformat()} {digest}")),
                deadline=_deadline(stated, modified),
            )
        except (ValueError, OverflowError) as error:
            raise SpotError(
                f"{self.path} does not contain a usable notice: {error}",
                hint=f"""echo '{{"kind": "TERMINATE", "deadline_s": 120}}' > {self.path}""",
            ) from error


def _deadline(stated: dict[str, Any], modified: datetime) -> datetime | None:
    deadline, seconds = stated.get("deadline"), stated.get("deadline_s")
    if deadline is not None:
        return datetime.fromisoformat(str(deadline).replace("Z", "+00:00"))  # Python 3.10 does not know the suffix Z
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
        raise ValueError(f"deadline_s is {seconds!r}, not a number of seconds")
    return modified + timedelta(seconds=seconds)
