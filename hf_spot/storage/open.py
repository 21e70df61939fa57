"""open_store: from what the user writes to the store that is meant."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from hf_spot.errors import ConfigError
from hf_spot.storage.local import LocalStore
from hf_spot.storage.memory import MemoryStore
from hf_spot.storage.store import ObjectStore

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):")
_HINT = "s3://bucket/prefix, a directory such as /mnt/efs/run, file:///a/directory, or memory://name (tests only)"
_NOT_YET = ("hf", "gs", "gcs", "az", "abfs", "abfss", "azure", "wasb", "wasbs")


def open_store(url: str | os.PathLike[str] | ObjectStore) -> ObjectStore:
    """The store at ``url``. Nothing is asked or written yet: see `hf_spot.storage.probe.probe`.

    Args:
        url: ``s3://bucket/prefix``, a directory (path or ``file://`` URL), ``memory://name``, or a store, which is
            returned as it is.

    Raises:
        ConfigError: this can't be a store, or not yet.
    """
    if isinstance(url, os.PathLike):
        return LocalStore(Path(url).expanduser())
    if not isinstance(url, str):
        if isinstance(url, ObjectStore):
            return url
        raise ConfigError(f"a {type(url).__name__} is no store", hint=_HINT)
    if not url.strip() or "\0" in url:
        raise ConfigError("the store's URL is empty", hint=_HINT)
    found = _SCHEME.match(url)
    if not found:
        return LocalStore(Path(url).expanduser())
    scheme = found[1].lower()
    if not url[found.end() :].startswith("//"):
        if url[found.end() :].startswith("/") or scheme in ("s3", "file", "memory", *_NOT_YET):
            raise ConfigError(f"{_shown(url)!r}: two slashes must follow '{scheme}:'", hint=_HINT)
        return LocalStore(Path(url).expanduser())  # a file name with a colon
    if scheme == "s3":
        return _open_s3(f"s3:{url[found.end() :]}")
    if scheme == "file":
        return LocalStore(_path_of(url))
    if scheme == "memory":
        return MemoryStore(url)
    if scheme in _NOT_YET:
        raise ConfigError(f"{scheme}:// is not supported yet", hint=_HINT)
    raise ConfigError(f"{_shown(url)!r}: {scheme}:// is no kind of store", hint=_HINT)


def _open_s3(url: str) -> ObjectStore:
    try:
        from hf_spot.storage.s3 import S3Store
    except ImportError as error:
        raise ConfigError(f"{url} needs boto3, which can't be imported: {error}", hint="pip install boto3") from error
    return S3Store(url)


def _path_of(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or len(parts.path) < 2 or parts.query or parts.fragment:
        raise ConfigError(f"{url!r} names no directory", hint="file:///an/absolute/path, or the path alone")
    return Path(unquote(parts.path))


def _shown(url: str) -> str:
    """Without what could be a password."""
    return re.sub(r"//[^/]*@", "//…@", url)
