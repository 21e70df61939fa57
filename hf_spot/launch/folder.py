"""The folder through which a launch and its workers exchange messages, protected from programs that clean /tmp."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Callable

from hf_spot.runtime import held_folder, hold

_FRESHEN_EVERY_S = 3600.0  # programs that delete by age wait for days


class RuntimeFolder:
    """A new folder that only this user can access, until `close`.

    systemd-tmpfiles skips locked folders. Other programs delete by age, so the files here are kept young. If the folder is
    deleted nevertheless, `renew` creates it again.

    Args:
        clock: seconds, monotonic.

    Raises:
        OSError: it can't be created.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.path, self._lock = held_folder()
        self._fresh_at = clock()

    def renew(self) -> bool:
        """Create the folder again if it was deleted. Return whether it was.

        Raises:
            OSError: it can't be created again, or it now belongs to another user.
        """
        if self._is_there():
            if self._clock() - self._fresh_at > _FRESHEN_EVERY_S:
                self._fresh_at = self._clock()
                for path in (self.path, *self.path.iterdir()):
                    with contextlib.suppress(OSError):
                        os.utime(path)
            return False
        with contextlib.suppress(FileExistsError):  # a worker may have created it
            self.path.mkdir(mode=0o700)
        # Another process may have found it before it was held, and delete it: then the next call creates it.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            found = self.path.lstat()
            if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode):
                raise PermissionError(f"{self.path} was deleted, and now belongs to another user")
            self.path.chmod(0o700)
            deleted, self._lock = self._lock, hold(self.path)
            os.close(deleted)
        return True

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(self.path.lstat(), os.fstat(self._lock))
        except OSError:
            return False
