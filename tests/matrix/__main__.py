"""``python -m tests.matrix``: one line for each case, and 1 when one of them is not what it must be.

``--adversary 100`` plays random compositions instead, the same ones for the same ``--seed``; each that fails is printed as
JSON, which ``--composition`` plays again; ``--regressions`` plays those that have failed before.

None of the cases hangs: a launch that is taken for hung fails its case. The last line says how many launches were looked at,
and for how long; ``--hang-timeout 60`` looks more sharply than ``auto``, whose shortest limit is half an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.matrix.adversary import Outcome, attack, play
from tests.matrix.cases import CASES
from tests.matrix.compose import LIBRARIES
from tests.matrix.runner import HEADER, alarms, run, to_json

REGRESSIONS = Path(__file__).with_name("regressions.json")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of cases (all)")
    parser.add_argument("--quick", action="store_true", help="the cases that CI runs, and their stops")
    parser.add_argument("--list", action="store_true", help="only print the names")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave everything that was written there")
    parser.add_argument("--adversary", type=int, metavar="COUNT", help="play so many random compositions instead of cases")
    parser.add_argument("--seed", type=int, default=0, help="of the adversary (0)")
    parser.add_argument("--families", nargs="+", choices=LIBRARIES, default=tuple(LIBRARIES), help="what it trains (all)")
    parser.add_argument("--composition", type=json.loads, metavar="JSON", help="play this composition of the adversary's again")
    parser.add_argument("--regressions", action="store_true", help="play the compositions that once differed without a word")
    parser.add_argument("--hang-timeout", default="auto", metavar="auto|SECONDS", help="of the launches (auto)")
    options = parser.parse_args()
    os.environ["HF_SPOT_HANG_TIMEOUT"] = options.hang_timeout
    if options.adversary or options.composition or options.regressions:
        return _attack(options)
    chosen = [name for name in CASES if not options.names or any(part in name for part in options.names)]
    chosen = [name for name in chosen if CASES[name].quick or not options.quick]
    if options.list:
        print("\n".join(chosen))
        return 0
    print(HEADER, flush=True)
    rows = []
    launches = found = 0
    warned: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hf_spot-matrix-") as scratch:
        for number, name in enumerate(chosen):
            folder = (options.keep or Path(scratch)) / str(number)
            rows.append(run(name, folder, quick=options.quick))
            print(rows[-1], flush=True)
            looked_at, hangs, warnings = alarms(folder)
            launches, found, warned = launches + looked_at, found + hangs, warned + warnings
            print("".join(f"    {one}\n" for one in warnings), end="", flush=True)
            if options.keep is None:
                shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        options.json.write_text(to_json(rows))
    identical = sum(row.identical is True for row in rows)
    unexpected = sum(not row.as_expected for row in rows)
    print(f"{len(rows)} rows: {identical} identical, {unexpected} not as they must be")
    minutes = (time.monotonic() - began) / 60
    print(
        f"{launches} launches in {minutes:.0f} min, --hang-timeout {options.hang_timeout}: {found} taken for hung, "
        f"{len(warned)} warnings of silence"
    )
    return int(unexpected > 0 or found > 0)


def _attack(options: argparse.Namespace) -> int:
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="hf_spot-adversary-") as scratch:
        folder = options.keep or Path(scratch)
        if options.composition:
            found.append(play(options.composition, folder / "0"))
            print("\n".join([found[0].verdict, *found[0].why]))
        elif options.regressions:
            for number, made in enumerate(json.loads(REGRESSIONS.read_text())):
                found.append(play(made, folder / str(number)))
                print("\n     ".join([f"{number:4} {found[-1].verdict}", *found[-1].why[:10]]), flush=True)
        else:
            print(f"seed {options.seed}", flush=True)
            for number, outcome, seconds in attack(options.adversary, options.seed, folder, tuple(options.families)):
                found.append(outcome)
                print(f"{number:4} {outcome.verdict:10} {seconds:5.0f} s  {outcome.made['family']}", flush=True)
                if outcome.verdict != "identical":
                    print(
                        "\n".join(["     " + json.dumps(outcome.made), *(f"     {one}" for one in outcome.why[:10])]),
                        flush=True,
                    )
    failed = sum(not one.passed for one in found)
    print(f"{len(found)} compositions: {sum(one.verdict == 'identical' for one in found)} identical, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
