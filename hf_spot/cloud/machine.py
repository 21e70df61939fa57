"""The tasks of a machine from `hf-spot provision` besides the training: describe itself, and ship its log.

``python -m hf_spot.cloud.machine describe PRICES`` prints the JSON for ``$HF_SPOT_MACHINE``: ``cloud``, and if known
``instance_id``, ``instance_type``, ``zone``, ``region``, ``market``, ``price_usd_per_hour``, ``price_source``,
``price_time``, ``on_demand_usd_per_hour``. ``… ship LOG [--every S] [--network]`` copies a file to ``logs/`` in the run, and
beside it how many bytes the network interfaces of the machine have sent and received.
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

import psutil

from hf_spot.errors import SpotError
from hf_spot.notices.aws import IMDSSource
from hf_spot.run.machine_info import IMDS_PATHS
from hf_spot.run.machine_info import VARIABLE as MACHINE_VARIABLE
from hf_spot.runtime import STORE_VARIABLE
from hf_spot.storage.open import open_store

LOGS = "logs/"


def describe(read: Callable[[str], bytes | None], prices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a description of this machine and its price.

    Args:
        read: returns the metadata service's value of a path, or None; may raise SpotError.
        prices: prices of the pools that it may be from.
    """
    found: dict[str, Any] = {"cloud": "aws"}
    for name, path in IMDS_PATHS.items():
        try:
            if value := read(path):
                found[name] = value.decode().strip()
        except (SpotError, UnicodeDecodeError) as error:
            print(f"hf-spot: {path} of this machine is unknown: {error}", file=sys.stderr)
    fitting = [
        price for price in prices if all(price.get(name) == found[name] for name in ("instance_type", "zone") if name in found)
    ]
    return {**fitting[0], **found} if len(fitting) == 1 else found


def ship(path: Path, store: str, name: str) -> None:
    """Copy a log into the run. Raises SpotError."""
    open_store(store).put_file(f"{LOGS}{name}.log", path)


def network_bytes() -> dict[str, int]:
    """Return what all network interfaces of this machine have sent and received since its start; EFAs count for themselves."""
    counters = [one for name, one in psutil.net_io_counters(pernic=True).items() if name != "lo"]
    return {
        "sent_bytes": sum(one.bytes_sent for one in counters),
        "received_bytes": sum(one.bytes_recv for one in counters),
    }


def network_key(name: str) -> str:
    """Return the key of a machine's `network_bytes` in the run."""
    return f"{LOGS}{name}.network.log"


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ, sleep: Callable[[float], None] = time.sleep) -> int:
    """Run one of the two commands. Return 1 if the log could not be shipped."""
    parser = argparse.ArgumentParser(prog="python -m hf_spot.cloud.machine")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("describe").add_argument("prices", type=Path)
    shipping = commands.add_parser("ship")
    shipping.add_argument("log", type=Path)
    shipping.add_argument("--every", type=float, metavar="S")
    shipping.add_argument("--network", action="store_true")
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
            if args.network:
                open_store(environ[STORE_VARIABLE]).put(network_key(name), json.dumps(network_bytes()).encode())
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
        value = IMDSSource.from_environ(environ).read(IMDS_PATHS["instance_id"])
    except SpotError:
        value = None
    return value.decode().strip() if value else platform.node()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
