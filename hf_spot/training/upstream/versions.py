"""Versions of other libraries: compares them with the tested ones, and with those of the previous launch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from hf_spot.log import warn_for_all

# Versions that the whole test suite has run with, oldest first: those of tests/lowest.txt and tests/constraints.txt.
TESTED: dict[str, tuple[str, ...]] = {
    "transformers": ("5.6.0", "5.23.0"),
    "torch": ("2.13.0",),
    "accelerate": ("1.10.1", "1.15.0"),
    "peft": ("0.21.2",),
    "trl": ("1.16.0",),
}
_PACKAGES = {"google": "google-cloud-storage"}  # packages whose name differs from the module's

_told: set[tuple[str, str]] = set()


def version_of(module: str) -> str:
    """Return the version of an imported library; empty if unknown."""
    found = getattr(sys.modules.get(module), "__version__", None)
    if isinstance(found, str):
        return found
    try:
        return metadata.version(_PACKAGES.get(module, module))
    except metadata.PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """Return the versions of hf_spot and of the imported libraries in `TESTED`, for a commit."""
    return {name: version_of(name) for name in ("hf_spot", *TESTED) if name in sys.modules}


def tell_untested() -> None:
    """Warn in one line, once per process, about versions that the test suite has never run with."""
    found = {name: version for name, version in versions().items() if name in TESTED and not is_tested(name, version)}
    if fresh := found.items() - _told:
        _told.update(fresh)
        told = [f"{name} {found[name]} (only with {' and '.join(TESTED[name])})" for name, _ in sorted(fresh)]
        warn_for_all("hf_spot's tests have not run with %s", ", ".join(told))


def is_tested(name: str, version: str) -> bool:
    """Return whether the suite has run with this version; builds such as ``2.13.0+cu130`` count as the same version."""
    return version.partition("+")[0] in TESTED[name]


def version_changes(details: Mapping[str, Any]) -> list[str]:
    """Return a line about versions that differ from those at the save of the checkpoint to resume from, if any do.

    Args:
        details: details of its commit; an older hf_spot recorded no versions.
    """
    before, now = details.get("versions") or {}, versions()
    changed = [f"{name} {before[name]} → {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    return [f"versions have changed: {', '.join(changed)}; results may differ in the last bits"] if changed else []


def how_to_install(modules: set[str]) -> str:
    """Return the command that installs working versions of these libraries."""
    wanted = [f'"{name}=={TESTED[name][-1]}"' for name in TESTED if name in modules]
    others = sorted(_PACKAGES.get(name, name) for name in modules - TESTED.keys())
    commands = [f"pip install {' '.join(wanted)}"] * bool(wanted) + [f"pip install --upgrade {' '.join(others)}"] * bool(others)
    return " && ".join(commands)
