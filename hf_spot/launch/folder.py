"""The folder through which a launch and its workers speak, kept alive in a place that others clean."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

_FRESHEN_EVERY_S = 3600.0  # those who delete by age take days


class RuntimeFolder:
    """A fresh folder for this user alone, until `close`.

    systemd-tmpfiles passes by what is locked; others go by the age of files, which never get old here; and what is deleted all
    the same, `renew` makes again.

    Args:
        clock: seconds, monotonic.

    Raises:
        OSError: it can't be made.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.path = Path(tempfile.mkdtemp(prefix="hf_spot-"))
        self._lock = self._locked()
        self._fresh_at = clock()

    def renew(self) -> bool:
        """Make the folder again if it was deleted; tell whether it was.

        Raises:
            OSError: it can't be made again, or it is another user's now.
        """
        if self._is_there():
            if self._clock() - self._fresh_at > _FRESHEN_EVERY_S:
                self._fresh_at = self._clock()
                for path in (self.path, *self.path.iterdir()):
                    with contextlib.suppress(OSError):
                        os.utime(path)
            return False
        with contextlib.suppress(FileExistsError):  # a worker may have made it
            self.path.mkdir(mode=0o700)
        found = self.path.lstat()
        if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode):
            raise PermissionError(f"{self.path} was deleted, and is another user's now")
        self.path.chmod(0o700)
        os.close(self._lock)
        self._lock = self._locked()
        return True

    def close(self) -> None:
        """Delete it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(self.path.lstat(), os.fstat(self._lock))
        except OSError:
            return False

    def _locked(self) -> int:
        held = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):  # some network file systems lock nothing
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return held
