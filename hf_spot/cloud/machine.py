"""What a machine that `hf-spot provision` started does beside the training: says what it is, and ships its log.

``python -m hf_spot.cloud.machine describe PRICES`` prints the JSON that ``$HF_SPOT_MACHINE`` holds: ``cloud``, and as far as
they are known ``instance_id``, ``instance_type``, ``zone``, ``region``, ``market``, ``price_usd_per_hour``, ``price_source``,
``price_time``, ``on_demand_usd_per_hour``. ``… ship LOG [--every S]`` copies a file to ``logs/`` in the run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_spot.errors import SpotError
from hf_spot.notices.aws import IMDSSource
from hf_spot.runtime import STORE_VARIABLE
from hf_spot.storage.open import open_store

MACHINE_VARIABLE = "HF_SPOT_MACHINE"
LOGS = "logs/"
_PATHS = {
    "instance_id": "instance-id",
    "instance_type": "instance-type",
    "zone": "placement/availability-zone",
    "region": "placement/region",
    "market": "instance-life-cycle",
}


def describe(read: Callable[[str], bytes | None], prices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What this machine is, and what is known of its price.

    Args:
        read: gives what the metadata service says under a path, or None; may raise SpotError.
        prices: of the pools that it may be from.
    """
    found: dict[str, Any] = {"cloud": "aws"}
    for name, path in _PATHS.items():
        try:
            if said := read(path):
                found[name] = said.decode().strip()
        except (SpotError, UnicodeDecodeError) as error:
            print(f"hf-spot: {path} of this machine is not known: {error}", file=sys.stderr)
    fitting = [
        price for price in prices if all(price.get(name) == found[name] for name in ("instance_type", "zone") if name in found)
    ]
    return {**fitting[0], **found} if len(fitting) == 1 else found


def ship(path: Path, store: str, name: str) -> None:
    """Copies a log into the run. Raises SpotError."""
    open_store(store).put_file(f"{LOGS}{name}.log", path)


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ, sleep: Callable[[float], None] = time.sleep) -> int:
    """Runs one of the two commands; 1 when the log could not be shipped."""
    parser = argparse.ArgumentParser(prog="python -m hf_spot.cloud.machine")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("describe").add_argument("prices", type=Path)
    shipping = commands.add_parser("ship")
    shipping.add_argument("log", type=Path)
    shipping.add_argument("--every", type=float, metavar="S")
    args = parser.parse_args(argv)
    if args.command == "describe":
        source = IMDSSource.from_environ(environ)
        print(json.dumps(describe(source.read, json.loads(args.prices.read_text()))))
        return 0
    name = _name(environ)
    shipped = -1
    while True:
        size = args.log.stat().st_size
        try:
            if size != shipped:
                ship(args.log, environ[STORE_VARIABLE], name)
                shipped = size
        except SpotError as error:
            print(f"hf-spot: the log could not be shipped: {error}", file=sys.stderr)
            if args.every is None:
                return 1
        if args.every is None:
            return 0
        sleep(args.every)


def _name(environ: Mapping[str, str]) -> str:
    known = json.loads(environ.get(MACHINE_VARIABLE) or "{}").get("instance_id")
    if known:
        return str(known)
    try:
        said = IMDSSource.from_environ(environ).read(_PATHS["instance_id"])
    except SpotError:
        said = None
    return said.decode().strip() if said else platform.node()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
