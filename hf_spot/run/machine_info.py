"""Describe this machine for a claim: what it is, and what it costs."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from importlib import metadata
from typing import Any

from hf_spot.errors import ConfigError, SpotError
from hf_spot.notices.aws import IMDSSource
from hf_spot.notices.detect import is_ec2

VARIABLE = "HF_SPOT_MACHINE"
MARKETS = ("spot", "on-demand")
_EXAMPLE = f"""export {VARIABLE}='{{"price_usd_per_hour": 9.83, "price_source": "my contract"}}'"""

_PRICES = ("price_usd_per_hour", "on_demand_usd_per_hour")
_TIMES = ("price_time", "on_demand_time")
_WORDS = ("cloud", "instance_id", "instance_type", "zone", "region", "market", "price_source", "on_demand_source")
KEYS = (*_WORDS, *_PRICES, *_TIMES)

# https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-categories.html
IMDS_PATHS = {
    "instance_id": "instance-id",
    "instance_type": "instance-type",
    "zone": "placement/availability-zone",
    "region": "placement/region",
    "market": "instance-life-cycle",
}
_TIMEOUT_S = 0.5

BY_LAUNCHER = "hf-spot launch"  # the author of a claim that a launcher makes


def about_this_machine(by: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the data of a claim.

    Args:
        by: what makes the claim, such as a command.
        environ: the environment.

    Raises:
        ConfigError: ``$HF_SPOT_MACHINE`` can't be used.
    """
    return {
        "by": by,
        "hostname": platform.node(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "versions": dict(_versions()),
        "machine": this_machine(environ),
    }


@cache
def _versions() -> dict[str, str]:
    """Return the versions of what trains; they are looked up once, which takes 6 ms."""
    versions = {}
    for package in ("hf_spot", "transformers", "accelerate", "torch"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def this_machine(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return a value for each of `KEYS`, None where it is unknown.

    ``$HF_SPOT_MACHINE`` takes precedence. On a machine recognised as EC2, the metadata service supplies the rest. On other
    machines no request is made. A service that does not answer costs half a second and is not an error.

    Raises:
        ConfigError: ``$HF_SPOT_MACHINE`` can't be used.
    """
    told = _from_variable(environ.get(VARIABLE, ""))
    found = _ask_ec2(environ) if is_ec2(environ) and not told.keys() >= IMDS_PATHS.keys() else {}
    return {**dict.fromkeys(KEYS), **found, **told}


def _ask_ec2(environ: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"cloud": "aws"}
    try:
        service = IMDSSource.from_environ(environ, timeout_s=_TIMEOUT_S)
        for key, path in IMDS_PATHS.items():
            text = service.read(path)
            found[key] = None if text is None else text.decode("utf-8", "replace").strip()
    except SpotError:
        return found
    if found["market"] not in MARKETS:  # EC2 also knows "scheduled"
        found["market"] = None
    return found


def _from_variable(text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        told = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"${VARIABLE} is not JSON: {error}", hint=_EXAMPLE) from error
    if not isinstance(told, dict):
        raise ConfigError(f"${VARIABLE}={text!r} is not a JSON object", hint=_EXAMPLE)
    for key, value in told.items():
        if key not in KEYS:
            raise ConfigError(f"${VARIABLE} has a key {key!r}; it may have {', '.join(KEYS)}", hint=_EXAMPLE)
        wanted = None if value is None else _wanted(key, value)
        if wanted is not None:
            raise ConfigError(f"${VARIABLE}: {key} must be {wanted}, and is {value!r}", hint=_EXAMPLE)
    return told


def _wanted(key: str, value: Any) -> str | None:
    """Return a description of what a value should be, or None if it is valid."""
    if key in _PRICES:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return None if number and math.isfinite(value) and value >= 0 else "a number of dollars"
    if not isinstance(value, str):
        return "a string"
    if key == "market" and value not in MARKETS:
        return " or ".join(MARKETS)
    if key in _TIMES:
        try:
            datetime.fromisoformat(value.replace("Z", "+00:00"))  # Python 3.10 does not know the suffix
        except ValueError:
            return "a date or time as 2026-01-31T12:00:00+00:00"
    return None
