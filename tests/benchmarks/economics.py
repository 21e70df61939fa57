"""How long reports and simulations take: ``python tests/benchmarks/economics.py [--entries 100000] [--jobs 1000]``.

The journal is one of launches that are preempted after 500 entries, on the local disk; each commit has twelve files. Times
are those of this process on the processor, which other processes on the machine disturb least.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_spot.economics.plan import Plan, Row, Rung
from hf_spot.economics.report import summarise
from hf_spot.economics.simulate import simulate
from hf_spot.economics.table import render_report
from hf_spot.run.journal import Entry, RunState, encode, fold
from hf_spot.run.run import Run

LAUNCH = 500  # entries
FILES = [{"path": f"file-{number}", "size": 1, "sha256": "0" * 64} for number in range(12)]


def write_journal(folder: Path, count: int) -> None:
    (folder / "journal").mkdir(parents=True)
    state, launch, step, own = RunState(), 0, 0, 0
    for number in range(1, count + 1):
        timing = {"first_step_s": 20.0, "steps_s": 50.0 * own, "stalled_s": 1.0 * own, "steps": 10 * own, "step": step}
        data: dict[str, Any]
        if number % LAUNCH == 1:
            kind, data, launch, own = (
                "claim",
                {"hostname": f"host-{launch}", "machine": {"price_usd_per_hour": 9.83}},
                launch + 1,
                0,
            )
        elif number % LAUNCH == 0:
            kind, data = "preempted", {"step": step, "timing": timing}
        elif number % 2:
            kind, step, own = "commit", step + 10, own + 1
            timing |= {"steps_s": 50.0 * own, "stalled_s": 1.0 * own, "steps": 10 * own, "step": step}
            data = {"step": step, "stage": 1, "reason": "schedule", "complete": False, "files": FILES, "timing": timing}
            data["prefix"] = f"e{launch:04d}/checkpoint-{step}"
        else:
            kind, data = "prune", {"entries": [ref.entry for ref in state.checkpoints[:-3]], "steps": []}
        state = fold(state, number, kind, launch, data)
        time_of = datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(minutes=number)
        entry = Entry(number, kind, launch, str(number), time_of, data, state)
        (folder / "journal" / f"{number:08d}.json").write_bytes(encode(entry))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--jobs", type=int, default=1_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_journal(Path(folder) / "run", args.entries)
        began = time.process_time()
        report = summarise(Run(Path(folder) / "run").events())
        render_report(report, "run")
        print(f"a report over {args.entries} entries, {len(report.launches)} launches: {time.process_time() - began:.1f} s")
    rung = Rung(9.83, "a benchmark", "2026")
    for hours in (20.0, 8000.0):
        began = time.process_time()
        result = simulate(Plan(hours, (Row("anywhere", (rung,)),)), jobs=args.jobs)[0]
        took_s = time.process_time() - began
        print(
            f"{args.jobs} trainings of {hours:g} h in nine zones, {result.interruptions:.1f} interruptions each: {took_s:.1f} s"
        )


if __name__ == "__main__":
    main()
