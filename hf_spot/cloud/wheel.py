"""hf_spot for new machines: a wheel of what this process runs, kept in the run's store and bound to its digest.

No package registry is asked for hf_spot: its name is not registered, and whoever registers it would own every machine.
``python -m hf_spot.cloud.wheel RUN`` puts the wheel into a run's store, for job files that something else starts.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shlex
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from hf_spot.errors import ConfigError
from hf_spot.storage.open import open_store
from hf_spot.storage.s3_settings import parse
from hf_spot.storage.store import ObjectStore

VARIABLE = "HF_SPOT_WHEEL"
_URL = re.compile(r"https://[\w.~:/?&=%@+-]+/[\w.+-]+\.whl#sha256=[0-9a-f]{64}")
_OWN = re.compile(r"hf[-_.]spot(?P<extras>\[[^\]]*\])?\s*(?:[<>=!~].*)?", re.IGNORECASE)
_LIKE_THIS = f"export {VARIABLE}=https://example.com/hf_spot-0.1.0-py3-none-any.whl#sha256=…"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # of a zip: the same files give the same digest


@dataclass(frozen=True)
class Wheel:
    """Where a machine finds hf_spot.

    Args:
        name: of the file.
        digest: SHA-256 of its bytes, in hex.
        url: ``https://…``, or ``s3://bucket/key``.
    """

    name: str
    digest: str
    url: str

    @property
    def key(self) -> str:
        """Where it stands in a run's store."""
        return f"wheels/{self.digest}/{self.name}"

    def __str__(self) -> str:
        return f"{self.url}#sha256={self.digest}"

    @classmethod
    def of(cls, text: str) -> Wheel:
        """Return the wheel that ``str`` has written."""
        url, _, digest = text.partition("#sha256=")
        return cls(url.rpartition("/")[2], digest, url)


@lru_cache(maxsize=1)
def build() -> tuple[str, bytes]:
    """Return name and bytes of a wheel of the package that this process runs.

    Raises:
        ConfigError: it is not installed as a package, so nobody knows what it requires.
    """
    folder = Path(__file__).resolve().parents[1]
    try:
        about = distribution("hf_spot")
    except PackageNotFoundError as error:
        raise ConfigError(
            "hf_spot is not installed as a package, so no wheel of it can be made", hint="pip install ."
        ) from error
    info = f"hf_spot-{about.version}.dist-info"
    files = {
        path.relative_to(folder.parent).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".pyc", ".so")
    }
    # A checkout that was installed with `pip install -e` and is the current folder has the older form, under the older name.
    described = about.read_text("METADATA") or about.read_text("PKG-INFO")
    entry_points = about.read_text("entry_points.txt")
    if not described or not entry_points:
        raise ConfigError(
            "the installed hf_spot does not describe itself, so no wheel of it can be made",
            hint="pip install --force-reinstall .",
        )
    files[f"{info}/METADATA"] = described.encode()
    files[f"{info}/entry_points.txt"] = entry_points.encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: hf_spot\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{name},sha256={_record_digest(data)},{len(data)}\n" for name, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data, zipfile.ZIP_DEFLATED)
    return f"hf_spot-{about.version}-py3-none-any.whl", packed.getvalue()


def _record_digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def wheel_for(store: str, environ: Mapping[str, str]) -> Wheel | None:
    """Return the wheel that machines of a run install: the one that ``$HF_SPOT_WHEEL`` names, or that of this process in the
    run's bucket. None where machines can't fetch it: the store is not S3.

    Args:
        store: URL of the run.
        environ: may name another wheel.

    Raises:
        ConfigError: ``$HF_SPOT_WHEEL`` is no URL with a hash, or no wheel can be made.
    """
    if named := environ.get(VARIABLE):
        if not _URL.fullmatch(named):
            raise ConfigError(f"${VARIABLE} is not the https:// URL of a wheel with #sha256= and its digest", hint=_LIKE_THIS)
        return Wheel.of(named)
    if not store.startswith("s3://"):
        return None
    name, data = build()
    wheel = Wheel(name, hashlib.sha256(data).hexdigest(), "")
    return Wheel(wheel.name, wheel.digest, f"{store.rstrip('/')}/{wheel.key}")


def put(store: ObjectStore, wheel: Wheel) -> None:
    """Put this process's wheel into a run's store, where `wheel_for` says that it is. Raises StoreError."""
    if wheel.url.startswith("s3://"):
        store.create(wheel.key, build()[1])


def install(requirements: Sequence[str], wheel: Wheel | None) -> str:
    """Return shell commands that install ``requirements``, hf_spot from its wheel. Pure.

    Args:
        requirements: as pip takes them; empty when the image has all.
        wheel: None where machines can't fetch it: then the image must have hf_spot, unless more than its bare name is required.
    """
    own = [match for one in requirements if (match := _OWN.fullmatch(one))]
    if wheel is None:
        if [*requirements] != ["hf_spot"]:
            return f"pip install {shlex.join(requirements)}"
        missing = f"hf_spot is not in this image, and no registry has it: {_LIKE_THIS}"
        return f"python3 -c 'import hf_spot' || {{ echo {shlex.quote(missing)}; false; }}"
    if not own:
        return f"pip install {shlex.join(requirements)}"
    others = [one for one in requirements if not _OWN.fullmatch(one)]
    if wheel.url.startswith("s3://"):
        bucket, key = parse(wheel.url)
        fetch = 'import boto3, sys; boto3.client("s3").download_file(*sys.argv[1:])'
        first = f"# To put it there: python -m hf_spot.cloud.wheel {shlex.quote(wheel.url.partition('/wheels/')[0])}"
        get = f"{first}\npip install boto3\npython3 -c {shlex.quote(fetch)} {shlex.join([bucket, key])} {wheel.name}"
    else:
        fetch = "import sys, urllib.request; urllib.request.urlretrieve(*sys.argv[1:])"
        get = f"python3 -c {shlex.quote(fetch)} {shlex.quote(wheel.url)} {wheel.name}"
    check = f"echo '{wheel.digest}  {wheel.name}' | sha256sum --check --strict"
    extras = next((match["extras"] for match in own if match["extras"]), "")
    return f"{get}\n{check}\npip install {shlex.join([f'./{wheel.name}{extras}', *others])}"


def main(arguments: Sequence[str]) -> int:
    """Put the wheel into the store of the run whose URL is given; print its URL and digest."""
    wheel = wheel_for(arguments[0], {}) if arguments else None
    if wheel is None:
        raise ConfigError("which run in S3?", hint="python -m hf_spot.cloud.wheel s3://bucket/runs/my-run")
    put(open_store(arguments[0]), wheel)
    print(f"{wheel.url}#sha256={wheel.digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
