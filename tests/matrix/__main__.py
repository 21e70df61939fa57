"""``python -m tests.matrix``: one line for each case, and 1 when one of them is not what it must be."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.matrix.cases import CASES
from tests.matrix.runner import HEADER, run, to_json


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names of cases (all)")
    parser.add_argument("--quick", action="store_true", help="the cases that CI runs, and their stops")
    parser.add_argument("--list", action="store_true", help="only print the names")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave everything that was written there")
    options = parser.parse_args()
    chosen = [name for name in CASES if not options.names or any(part in name for part in options.names)]
    chosen = [name for name in chosen if CASES[name].quick or not options.quick]
    if options.list:
        print("\n".join(chosen))
        return 0
    print(HEADER, flush=True)
    rows = []
    with tempfile.TemporaryDirectory(prefix="hf_spot-matrix-") as scratch:
        for number, name in enumerate(chosen):
            rows.append(run(name, (options.keep or Path(scratch)) / str(number), quick=options.quick))
            print(rows[-1], flush=True)
    if options.json:
        options.json.write_text(to_json(rows))
    identical = sum(row.identical is True for row in rows)
    unexpected = sum(not row.as_expected for row in rows)
    print(f"{len(rows)} rows: {identical} identical, {unexpected} not as they must be")
    return int(unexpected > 0)


if __name__ == "__main__":
    sys.exit(main())
