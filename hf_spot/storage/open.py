"""open_store: open the store that a URL or path refers to."""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

from hf_spot.errors import ConfigError
from hf_spot.runtime import from_system, to_system
from hf_spot.storage.local import LocalStore
from hf_spot.storage.memory import MemoryStore
from hf_spot.storage.store import ObjectStore

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):")
_HINT = (
    "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, hf://buckets/owner/name/prefix, hf://owner/name/prefix, a "
    "directory such as /mnt/efs/run, file:///a/directory, or memory://name (tests only)"
)
_KINDS = {
    "s3": ("s3", "S3Store", "boto3", "pip install boto3"),
    "hf": ("hub", "open_hub", "huggingface_hub", "pip install --upgrade huggingface_hub"),
    "gs": ("gcs", "GoogleStore", "google-cloud-storage", "pip install 'google-cloud-storage>=3.1'"),
    "az": (
        "azure",
        "AzureStore",
        "azure-storage-blob",
        "pip install azure-storage-blob azure-identity",
    ),
}  # scheme: module, function that opens it, the package that it needs, and how to install that
_OTHER_SPELLINGS = {
    "gcs": "gs",
    "azure": "az",
    "abfs": "az",
    "abfss": "az",
    "wasb": "az",
    "wasbs": "az",
    "s3a": "s3",
    "s3n": "s3",
}


def open_store(url: str | os.PathLike[str] | ObjectStore) -> ObjectStore:
    """Return the store at ``url``. No request is made yet: `hf_spot.storage.probe.probe` checks the store.

    Args:
        url: ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``az://container/prefix``, ``hf://owner/name/prefix``,
            ``hf://buckets/owner/name/prefix``, a directory (path or ``file://`` URL), ``memory://name``, or a store, which is
            returned as it is.

    Raises:
        ConfigError: ``url`` can't be a store, or a package that it needs is missing.
    """
    if isinstance(url, os.PathLike):
        return LocalStore(Path(url).expanduser())
    if not isinstance(url, str):
        if isinstance(url, ObjectStore):
            return url
        raise ConfigError(f"a {type(url).__name__} is not a store", hint=_HINT)
    if not url.strip() or "\0" in url:
        raise ConfigError("the store's URL is empty", hint=_HINT)
    found = _SCHEME.match(url)
    if not found:
        return LocalStore(Path(to_system(from_system(url))).expanduser())
    scheme = found[1].lower()
    if not url[found.end() :].startswith("//"):
        if url[found.end() :].startswith("/") or scheme in ("file", "memory", *_KINDS, *_OTHER_SPELLINGS):
            raise ConfigError(f"{_shown(url)!r}: two slashes must follow '{scheme}:'", hint=_HINT)
        return LocalStore(Path(url).expanduser())  # a file name with a colon
    if scheme in _KINDS:
        return _open(scheme, from_system(f"{scheme}:{url[found.end() :]}"))
    if scheme == "file":
        return LocalStore(_path_of(url))
    if scheme == "memory":
        return MemoryStore(url)
    if scheme in _OTHER_SPELLINGS:
        meant = _OTHER_SPELLINGS[scheme]
        place = "container" if meant == "az" else "bucket"
        raise ConfigError(f"{_shown(url)!r}: {scheme}:// is spelled {meant}:// here", hint=f"{meant}://{place}/prefix")
    raise ConfigError(f"{_shown(url)!r}: {scheme}:// is not a kind of store", hint=_HINT)


def _open(scheme: str, url: str) -> ObjectStore:
    module, opener, package, install = _KINDS[scheme]
    try:
        found = import_module(f"hf_spot.storage.{module}")
    except ImportError as error:
        raise ConfigError(f"{_shown(url)} needs {package}, which can't be imported: {error}", hint=install) from error
    store: ObjectStore = getattr(found, opener)(url)
    return store


def _path_of(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or len(parts.path) < 2 or parts.query or parts.fragment:
        raise ConfigError(f"{url!r} is not the URL of a directory", hint="file:///an/absolute/path, or only the path")
    return Path(unquote(parts.path))


def _shown(url: str) -> str:
    """Return the URL without a part that could be a password."""
    return re.sub(r"//[^/]*@", "//…@", url)
