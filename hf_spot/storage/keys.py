"""Check keys. Every store accepts the same ones, so that a run can move from one store to another."""

from __future__ import annotations

import re

from hf_spot.errors import ConfigError

TEMPORARY_FOLDER = ".hf_spot-tmp"
"""Top-level folder in which a `LocalStore` keeps half-written files; it may have no objects."""

# Not every server keeps a backslash: SeaweedFS turns it into a slash.
_UNKEPT = re.compile(r"[\x00-\x1f\x7f\\]")
_LONGEST_BYTES = 900  # S3 allows 1024, of which the run's own prefix needs some
_HINT = "a plain path, such as runs/my-run"


def check_key(key: str) -> str:
    """Return ``key`` if it is valid.

    Raises:
        ConfigError: the key is empty, could lead out of the store, or can't be stored everywhere.
    """
    _check_text(key)
    for segment in key.split("/"):
        if segment in ("", ".", ".."):
            raise ConfigError(
                f"{key!r} is not a key: keys are relative, '/'-separated, without empty parts, '.' or '..'", hint=_HINT
            )
    if key.split("/", 1)[0] == TEMPORARY_FOLDER:
        raise ConfigError(f"{key!r} is not a key: {TEMPORARY_FOLDER}/ belongs to the store itself", hint=_HINT)
    return key


def check_prefix(prefix: str) -> str:
    """Return ``prefix`` if it is valid. It may be empty or end anywhere in a key.

    Raises:
        ConfigError: the prefix could lead out of the store.
    """
    _check_text(prefix)
    if prefix.startswith("/") or ".." in prefix.split("/"):
        raise ConfigError(f"{prefix!r} is not a prefix: keys are relative and without '..'", hint=_HINT)
    return prefix


def _check_text(text: str) -> None:
    try:
        length_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise ConfigError(f"{text!r} is not a key: it is not valid Unicode", hint=_HINT) from None
    if length_bytes > _LONGEST_BYTES:
        raise ConfigError(f"{text[:60]!r}… is not a key: {length_bytes} bytes are more than {_LONGEST_BYTES}", hint=_HINT)
    if _UNKEPT.search(text):
        raise ConfigError(f"{text!r} is not a key: it contains a backslash or a control character", hint=_HINT)
