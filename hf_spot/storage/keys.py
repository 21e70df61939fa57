"""Which keys a store accepts: the same ones in every store, so that a run can move between them."""

from __future__ import annotations

import re

from hf_spot.errors import ConfigError

TEMPORARY_FOLDER = ".hf_spot-tmp"
"""Top folder in which a `LocalStore` keeps half-written files; no object may stand there."""

# Not every server keeps a backslash: SeaweedFS makes a slash of it.
_UNKEPT = re.compile(r"[\x00-\x1f\x7f\\]")
_LONGEST_BYTES = 900  # S3 takes 1024, of which the run's own prefix needs some
_HINT = "a plain path, such as runs/my-run"


def check_key(key: str) -> str:
    """Returns ``key``.

    Raises:
        ConfigError: the key is empty, could lead out of the store, or can't be stored everywhere.
    """
    _check_text(key)
    for segment in key.split("/"):
        if segment in ("", ".", ".."):
            raise ConfigError(
                f"{key!r} is no key: keys are relative, '/'-separated, without empty parts, '.' or '..'", hint=_HINT
            )
    if key.split("/", 1)[0] == TEMPORARY_FOLDER:
        raise ConfigError(f"{key!r} is no key: {TEMPORARY_FOLDER}/ belongs to the store itself", hint=_HINT)
    return key


def check_prefix(prefix: str) -> str:
    """Returns ``prefix``, which may be empty or end anywhere in a key.

    Raises:
        ConfigError: the prefix could lead out of the store.
    """
    _check_text(prefix)
    if prefix.startswith("/") or ".." in prefix.split("/"):
        raise ConfigError(f"{prefix!r} is no prefix: keys are relative and without '..'", hint=_HINT)
    return prefix


def _check_text(text: str) -> None:
    try:
        length_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise ConfigError(f"{text!r} is no key: it is not valid Unicode", hint=_HINT) from None
    if length_bytes > _LONGEST_BYTES:
        raise ConfigError(f"{text[:60]!r}… is no key: {length_bytes} bytes are more than {_LONGEST_BYTES}", hint=_HINT)
    if _UNKEPT.search(text):
        raise ConfigError(f"{text!r} is no key: it holds a backslash or a control character", hint=_HINT)
