"""Whether the system has a file in memory, so that reading it reads no disk."""

from __future__ import annotations

import os
from pathlib import Path

_SAMPLES = 64


def is_cached(path: Path) -> bool:
    """Return whether samples of a file, evenly spread, are in the system's page cache; False if that can't be found out.

    Raises:
        OSError: the file can't be opened.
    """
    flag = getattr(os, "RWF_NOWAIT", 0)
    if not flag:
        return False
    file = os.open(path, os.O_RDONLY)
    try:
        size_bytes, block = os.fstat(file).st_size, bytearray(1)
        for number in range(_SAMPLES if size_bytes else 0):
            os.preadv(file, [block], number * (size_bytes - 1) // max(1, _SAMPLES - 1), flag)
        return True
    except OSError:  # it would have to be read, or this filesystem can't tell
        return False
    finally:
        os.close(file)
