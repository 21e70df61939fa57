"""All benchmarks, one after the other: ``python -m tests.benchmarks [--json FILE] [NAME ...]``; about a quarter of an hour.

They want the machine for themselves. Each prints its own lines; ``--json`` collects what they found.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = (
    "saves",
    "proof",
    "notice",
    "steps",
    "agreement",
    "any_gpus",
    "transfers",
    "commands",
    "resume",
    "restart",
    "growth",
    "streams",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", metavar="NAME", nargs="*", default=NAMES, help=f"of {', '.join(NAMES)} (all)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory(prefix="hf_spot-benchmarks-") as scratch:
        for name in options.names:
            print(f"== {name}", flush=True)
            out = Path(scratch) / f"{name}.json"
            subprocess.run([sys.executable, Path(__file__).with_name(f"{name}.py"), "--json", out], check=True)
            found[name] = json.loads(out.read_text())
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
