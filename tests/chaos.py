"""``python -m tests.chaos``: a crash-consistency tester of others over a script with SpotCallback: ``pip install ckpt-chaos``.

ckpt-chaos runs a script once in peace and counts what it does to files: each that is opened, renamed or removed, in its output
folder and in its run. Then it runs it again and again, up to one of these points each time. There the process is killed
(``before``), or the file is cut to half of its size first (``torn``), or all is lost that no fsync has secured
(``unsynced``), or SIGTERM is sent, and SIGKILL half a minute later (``term``). It starts the same command again, and compares
the model with that of the run in peace.

Prints how often each of its verdicts was given: PASS; HARD_FAIL, if the second command failed; SILENT_DIVERGENCE, if the model
is another one. Ends with 1 unless all of them are PASS.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

SCRIPT = Path(__file__).parent / "training" / "scripts" / "with_callback.py"
JOBS = {"one rank": (1, 0), "two ranks, the first is killed": (2, 0), "two ranks, the second is killed": (2, 1)}


def chaos(folder: Path, ranks: int, killed: int, points: int, modes: str) -> Counter[str]:
    """Return how often each verdict was given.

    Args:
        folder: a new one, for everything.
        ranks: of the training.
        killed: the rank that is killed.
        points: at which it is, spread evenly over those that there are.
        modes: how, separated by commas.
    """
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_SPOT_GRACE_S": "30"}
    tester = [sys.executable, "-m", "ckpt_chaos", "run", "--work", folder, "--ranks", ranks, "--crash-rank", killed]
    tester += ["--max-points", points, "--modes", modes, "--grace", 30, "--timeout", 600]
    tester += ["--step-regex", r"resuming from step (\d+)", "--result-file", "{out}/weights/model.safetensors", "--"]
    script = ["env", "TEST_STORE={out}/run", sys.executable, SCRIPT, "--output_dir", "{out}/out", "--weights", "{out}/weights"]
    script += ["--epochs", 1, "--step_s", 0.05]
    subprocess.run([*map(str, tester), *map(str, script)], env=environ, check=False)
    from ckpt_chaos.runner import rejudge

    return Counter(row.verdict for row in rejudge(folder))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--points", type=int, default=40, help="for each number of ranks")
    parser.add_argument("--modes", default="before,torn,term,unsynced")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave everything that was written there")
    options = parser.parse_args()
    if importlib.util.find_spec("ckpt_chaos") is None:
        print("ckpt-chaos is not installed: pip install ckpt-chaos", file=sys.stderr)
        return 2
    told = {}
    with tempfile.TemporaryDirectory(prefix="hf_spot-chaos-") as scratch:
        for name, (ranks, killed) in JOBS.items():
            folder = (options.keep or Path(scratch)) / name.replace(", ", "-").replace(" ", "-")
            told[name] = chaos(folder, ranks, killed, options.points, options.modes)
    print()
    for name, verdicts in told.items():
        print(
            f"{name}: " + (", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())) or "it did not run")
        )
    return int(any(not verdicts or set(verdicts) != {"PASS"} for verdicts in told.values()))


if __name__ == "__main__":
    sys.exit(main())
