"""``python -m tests.frontends``: commands that people type, undisturbed, under ``hf-spot launch``, preempted and killed.

Every case is trained four times: undisturbed, without hf_spot; under ``hf-spot launch``; with a SIGTERM and the same command
again; with a kill -9 of all its processes and the same command again. Those on several ranks also lose one of them, by
a kill -9 and by an exception, and are started again by the launch. All must end with the same weights, to the bit. It takes
about an hour. A case whose packages are missing says so; those of front ends that need an environment of their own
run where ``--python`` names its Python, in which hf_spot must be installed, too:

    python -m tests.frontends --python /tmp/llamafactory/bin/python --only llamafactory
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.frontends.cases import CASES, Case, prepare
from tests.frontends.runner import Outcome, Runner


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.frontends", description=__doc__)
    parser.add_argument("--only", nargs="*", metavar="CASE", help=f"of {', '.join(one.name for one in CASES)}")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of the environment that trains")
    parser.add_argument("--folder", type=Path, help="kept; default: one that is deleted")
    options = parser.parse_args()
    cases = [one for one in CASES if not options.only or any(one.name.startswith(name) for name in options.only)]
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="frontends-") as scratch:
        for case in cases:
            folder = (options.folder or Path(scratch)) / case.name
            outcome = run(case, folder, options.python)
            outcomes.append(outcome)
            print(outcome.line(), flush=True)
    return int(any(not one.ok for one in outcomes))


def run(case: Case, folder: Path, python: Path) -> Outcome:
    """Return what became of a case."""
    if missing := missing_in(python, case.needs):
        return Outcome(case, skipped=f"{' and '.join(missing)} not installed")
    folder.mkdir(parents=True)
    prepare(folder)
    return Runner(case, folder, python, say=_say).run()


def missing_in(python: Path, packages: tuple[str, ...]) -> list[str]:
    """Return which packages an environment lacks."""
    code = (
        "import importlib.metadata as m, json\n"
        "print(json.dumps(sorted({d.metadata['Name'].lower().replace('_', '-') for d in m.distributions()})))"
    )
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": ""}
    )
    there = set(json.loads(done.stdout))
    return [one for one in packages if one not in there]


def _say(text: str) -> None:
    print(f"    {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
